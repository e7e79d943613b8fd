package main

import (
	"bufio"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"

	"github.com/sluiceproxy/sluice/envoy"
	"github.com/sluiceproxy/sluice/limiter/policy"
	"github.com/sluiceproxy/sluice/limiter/redistest"
)

// settling is a sluice whose limits settle, with an Envoy before it.
type settling struct {
	t     testing.TB
	p     *process
	envoy *envoy.Process
	addr  string // of Envoy
	c     *http.Client
}

// noVariables is an environment without variables.
func noVariables(string) (string, bool) { return "", false }

// startSettling runs sluice with a config and args, and Envoy with what
// `sluice envoy` prints for that config, changed by change.
func startSettling(
	t testing.TB, config string, up http.Handler, args []string, change ...func(string) string,
) *settling {
	t.Helper()
	server := httptest.NewUnstartedServer(up)
	server.Config.Protocols = new(http.Protocols)
	server.Config.Protocols.SetHTTP1(true)
	server.Config.Protocols.SetUnencryptedHTTP2(true)
	server.Start()
	t.Cleanup(server.Close)
	s := &settling{t: t, c: client(t)}
	s.p = startSluice(t, append(args, "--config", file(t, "sluice.yaml", config))...)
	cfg, err := policy.Parse("sluice.yaml", []byte(config), noVariables)
	if err != nil {
		t.Fatal(err)
	}
	binary, release := envoyBinary(t)
	bootstrap, err := envoy.Plain(envoy.Options{
		Listener: "127.0.0.1:0", Admin: "127.0.0.1:0", Sluice: s.p.grpc, Upstream: server.Listener.Addr().String(),
		Envoy: release, Settle: settleOf(cfg),
	})
	if err != nil {
		t.Fatal(err)
	}
	// As many requests at once as there are.
	const many = "    circuit_breakers: { thresholds: " +
		"[{ max_connections: 5000, max_pending_requests: 5000, max_requests: 5000 }] }\n"
	all := append([]func(string) string{
		patiently(t),
		replaced(t, "route: { cluster: upstream }", "route: { cluster: upstream, timeout: 60s }"),
		replaced(t, "  - name: upstream\n", "  - name: upstream\n"+many),
	}, change...)
	s.envoy, s.addr = runEnvoy(t, binary, bootstrap, all...)
	return s
}

// healthHandler serves gRPC's health service over HTTP/2.
func healthHandler() http.Handler {
	calls := grpc.NewServer()
	grpc_health_v1.RegisterHealthServer(calls, health.NewServer())
	return calls
}

// settlements returns how many settlements of a limit there were.
func (s *settling) settlements(limit string) int {
	return s.p.counted(`sluice_settlements_total\{limit="` + limit + `",result="[a-z]+"\}`)
}

// postLogin answers a login with the status that it asks for, and counts it.
func postLogin(served *atomic.Int64, takes time.Duration) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		served.Add(1)
		if takes > 0 { // as a password's hash does
			select {
			case <-time.After(takes/2 + rand.N(takes)):
			case <-r.Context().Done():
				return
			}
		}
		status, _ := strconv.Atoi(r.URL.RawQuery)
		w.WriteHeader(status)
	}
}

// TestGuesses checks that of many guesses at once no more reach the upstream
// than the limit of failed logins allows, even if their clients hang up.
func TestGuesses(t *testing.T) {
	guesses := redistest.Scaled(200, 1000)
	failedLogins := recipe(t, "Only failed logins count")
	t.Run("to the end", func(t *testing.T) {
		var served atomic.Int64
		s := startSettling(t, failedLogins, postLogin(&served, 0), nil)
		var wg sync.WaitGroup
		var denied atomic.Int64
		for range guesses {
			wg.Go(func() {
				r, err := s.c.Post("http://"+s.addr+"/login?401", "", nil)
				if err != nil {
					t.Error(err)
					return
				}
				_ = r.Body.Close()
				if r.StatusCode == http.StatusTooManyRequests {
					denied.Add(1)
				}
			})
		}
		wg.Wait()
		if n := served.Load(); n != 5 || denied.Load() != int64(guesses-5) {
			t.Errorf("%d guesses reached the upstream, and %d were denied", n, denied.Load())
		}
		eventually(t, "all ends", func() bool { return s.settlements("failed-logins") == 5 })
	})
	t.Run("hanging up", func(t *testing.T) {
		var served atomic.Int64
		s := startSettling(t, failedLogins, postLogin(&served, time.Minute), nil)
		// Those that pass wait for the upstream, until the client hangs up.
		var conns []net.Conn
		for range guesses {
			conn, err := net.Dial("tcp", s.addr)
			if err != nil {
				t.Fatal(err)
			}
			conns = append(conns, conn)
			if _, err := fmt.Fprint(conn, "POST /login?401 HTTP/1.1\r\nHost: h\r\nContent-Length: 0\r\n\r\n"); err != nil {
				t.Fatal(err)
			}
		}
		eventually(t, "all decisions", func() bool {
			return s.p.counted(`sluice_checks_total\{decision="[a-z]+"\}`) == guesses && served.Load() == 5
		})
		for _, conn := range conns {
			_ = conn.Close()
		}
		eventually(t, "all ends", func() bool { return s.settlements("failed-logins") == 5 })
		if n := s.p.counted(`sluice_tokens_returned_total\{limit="failed-logins"\}`); n != 0 {
			t.Errorf("%d guesses were free", n)
		}
		r, err := s.c.Post("http://"+s.addr+"/login?200", "", nil)
		if err != nil {
			t.Fatal(err)
		}
		_ = r.Body.Close()
		if r.StatusCode != http.StatusTooManyRequests || served.Load() != 5 {
			t.Errorf("another login: %d; %d reached the upstream", r.StatusCode, served.Load())
		}
	})
}

// TestGoodLogins checks that good logins do not count, as many as there are, if
// what is under way at once fits into the burst. A login that begins at the
// instant at which another ends may find that one's token still out: with three at
// once and a burst of five two such are free. That is for a long run, as the race
// detector slows a settlement down.
func TestGoodLogins(t *testing.T) {
	logins, takes := redistest.Scaled(40, 1000), redistest.Scaled(200*time.Millisecond, 50*time.Millisecond)
	failedLogins := recipe(t, "Only failed logins count")
	for _, tt := range []struct {
		atOnce int
		burst  string
	}{{1, ""}, {3, ""}, {20, "\n    burst: 40"}} {
		if tt.atOnce == 3 && os.Getenv("SLUICE_LONG") == "" {
			continue
		}
		t.Run(fmt.Sprint(tt.atOnce), func(t *testing.T) {
			var served atomic.Int64
			s := startSettling(t, patientStore+strings.Replace(failedLogins, "rate: 5/15m", "rate: 5/15m"+tt.burst, 1),
				postLogin(&served, takes),
				[]string{"--redis", "redis://" + redistest.StartNode(t).Addr})
			var wg sync.WaitGroup
			var next, refused atomic.Int64
			for range tt.atOnce {
				wg.Go(func() {
					for next.Add(1) <= int64(logins) {
						r, err := s.c.Post("http://"+s.addr+"/login?204", "", nil)
						if err != nil {
							t.Error(err)
							return
						}
						_ = r.Body.Close()
						if r.StatusCode != http.StatusNoContent {
							refused.Add(1)
						}
					}
				})
			}
			wg.Wait()
			if n := refused.Load(); n > 0 {
				t.Fatalf("%d good logins were refused", n)
			}
			eventually(t, "all ends", func() bool {
				return s.p.counted(`sluice_tokens_returned_total\{limit="failed-logins"\}`) == logins
			})
		})
	}
}

// TestEnds checks what the ends of requests settle, by how they end.
func TestEnds(t *testing.T) {
	t.Run("told at once", func(t *testing.T) { testEnds(t, true) })
	// What Envoy has collected when it ends may be lost.
	t.Run("collected", func(t *testing.T) {
		testEnds(t, false, replaced(t, "buffer_size_bytes: 0", "buffer_flush_interval: 0.010s"))
	})
}

// testEnds checks it through an Envoy whose config is changed by change. isTold
// says that Envoy tells the ends of its requests when it ends itself.
func testEnds(t *testing.T, isTold bool, change ...func(string) string) {
	const config = patientStore + `
key_secret: a-secret-of-at-least-thirty-two-bytes
limits:
  - {name: code, rate: 1000/d, burst: 1000000, cost: 1000, settle: response.code}
  - name: flags
    rate: 1000/d
    burst: 1000000
    cost: 1000
    settle: 'size(response.flags) == 0 ? 0 : "DC" in response.flags ? 1 :
      "UR" in response.flags || "UC" in response.flags ? 2 : "UT" in response.flags ? 3 : 9'
  - {name: grpc, rate: 1000/d, burst: 1000000, cost: 1000, settle: response.grpc_status}
  - {name: bytes, rate: 1000/d, burst: 1000000, cost: 1000, settle: response.size}
  - {name: timed, rate: 1000/d, burst: 1000000, cost: 1000, settle: 'request.duration > duration("0s") ? 7 : 900'}
`
	calls := healthHandler()
	reached := make(chan bool, 1)
	release := make(chan bool)
	mux := http.NewServeMux()
	mux.HandleFunc("/hello", func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "hello") })
	mux.HandleFunc("/hang", func(_ http.ResponseWriter, r *http.Request) {
		reached <- true
		<-r.Context().Done()
	})
	mux.HandleFunc("/half", func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.WriteString(w, "hel")
		w.(http.Flusher).Flush()
		reached <- true
		<-r.Context().Done()
	})
	mux.HandleFunc("/released", func(w http.ResponseWriter, _ *http.Request) {
		reached <- true
		<-release
		_, _ = io.WriteString(w, "hello")
	})
	mux.HandleFunc("/reset", func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) })
	mux.HandleFunc("/socket", echoSocket)
	up := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.HasPrefix(r.Header.Get("Content-Type"), "application/grpc") {
			calls.ServeHTTP(w, r)
			return
		}
		mux.ServeHTTP(w, r)
	})
	redis := "redis://" + redistest.StartNode(t).Addr
	port := fmt.Sprintf("127.0.0.1:%d", freePort(t))
	s := startSettling(t, config, up, []string{"--redis", redis, "--grpc", port},
		append(change, replaced(t, "timeout: 60s }", "timeout: 2s }"))...)

	// raw sends a request on a connection of its own.
	raw := func(t *testing.T, path, more string) (net.Conn, *bufio.Reader) {
		t.Helper()
		conn, err := net.Dial("tcp", s.addr)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = conn.Close() })
		if _, err := fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: h\r\n%s\r\n", path, more); err != nil {
			t.Fatal(err)
		}
		return conn, bufio.NewReader(conn)
	}
	const local = 1 // byte at least, of a page of Envoy's own
	limits := []string{"code", "flags", "grpc", "bytes"}
	timed := func() int {
		return s.p.counted(`sluice_tokens_returned_total\{limit="timed"\}`) - 993*s.settlements("timed")
	}
	spent := func() (all [4]int) {
		for i, limit := range limits {
			all[i] = 1000*s.p.counted(`sluice_limit_decisions_total\{decision="allowed",limit="`+limit+`"\}`) -
				s.p.counted(`sluice_tokens_returned_total\{limit="`+limit+`"\}`)
		}
		return all
	}
	// ends returns how many requests all the limits have settled.
	ends := func() int {
		n := s.settlements("timed")
		for _, limit := range limits {
			n = min(n, s.settlements(limit))
		}
		return n
	}
	for _, tt := range []struct {
		name string
		do   func(t *testing.T)
		// What the limits settle: the code, the kind of flags, the gRPC status
		// and the bytes. Without a gRPC status what was taken stands.
		want [4]int
	}{
		{"a whole response", func(t *testing.T) {
			if r, body := fetch(t, s.c, "http://"+s.addr+"/hello"); r.StatusCode != 200 || body != "hello" {
				t.Errorf("%d %q", r.StatusCode, body)
			}
		}, [4]int{200, 0, 1000, 5}},
		{"the client hangs up before the response", func(t *testing.T) {
			conn, _ := raw(t, "/hang", "")
			<-reached
			_ = conn.Close()
		}, [4]int{0, 1, 1000, 0}},
		{"the client hangs up in the response", func(t *testing.T) {
			conn, in := raw(t, "/half", "")
			<-reached
			if r, err := http.ReadResponse(in, nil); err != nil || r.StatusCode != 200 {
				t.Errorf("%v", err)
			}
			_ = conn.Close()
		}, [4]int{200, 1, 1000, 3}},
		{"the upstream resets", func(t *testing.T) {
			if r, _ := fetch(t, s.c, "http://"+s.addr+"/reset"); r.StatusCode != 503 {
				t.Errorf("%d", r.StatusCode)
			}
		}, [4]int{503, 2, 1000, local}},
		{"the upstream is too slow", func(t *testing.T) {
			r, _ := fetch(t, s.c, "http://"+s.addr+"/hang")
			<-reached
			if r.StatusCode != 504 {
				t.Errorf("%d", r.StatusCode)
			}
		}, [4]int{504, 3, 1000, local}},
		{"a websocket is closed", func(t *testing.T) {
			conn, in := raw(t, "/socket", "Connection: Upgrade\r\nUpgrade: websocket\r\n")
			if r, err := http.ReadResponse(in, nil); err != nil || r.StatusCode != 101 {
				t.Fatalf("%v", err)
			}
			if _, err := fmt.Fprint(conn, "hello\n"); err != nil {
				t.Fatal(err)
			}
			if line, err := in.ReadString('\n'); err != nil || line != "you said hello\n" {
				t.Errorf("%q, %v", line, err)
			}
			_ = conn.Close()
		}, [4]int{101, 1, 1000, 15}},
		{"a gRPC call", func(t *testing.T) {
			_, err := grpc_health_v1.NewHealthClient(dial(t, s.addr)).Check(t.Context(), &grpc_health_v1.HealthCheckRequest{})
			if err != nil {
				t.Error(err)
			}
		}, [4]int{200, 0, 0, 7}},
		{"a gRPC call that fails", func(t *testing.T) {
			_, err := grpc_health_v1.NewHealthClient(dial(t, s.addr)).Check(t.Context(),
				&grpc_health_v1.HealthCheckRequest{Service: "none"})
			if err == nil {
				t.Error("no error")
			}
		}, [4]int{200, 0, 5, 0}},
		{"a restart of sluice", func(t *testing.T) {
			_, in := raw(t, "/released", "")
			<-reached
			if s.p.stop() != 0 {
				t.Error(s.p.logged())
			}
			s.p = startSluice(s.t, "--config", file(t, "sluice.yaml", config), "--redis", redis, "--grpc", port)
			release <- true
			r, err := http.ReadResponse(in, nil)
			if err != nil || r.StatusCode != 200 {
				t.Errorf("%v", err)
			}
		}, [4]int{200, 0, 1000, 5}},
		{"the end of Envoy", func(t *testing.T) {
			settled := ends()
			// The first request opens the log's stream of the Envoy thread that has the
			// connection.
			conn, in := raw(t, "/hello", "")
			if r, err := http.ReadResponse(in, nil); err != nil || r.StatusCode != 200 {
				t.Fatalf("%v", err)
			}
			eventually(t, "its end", func() bool { return ends() > settled })
			if _, err := fmt.Fprint(conn, "GET /hang HTTP/1.1\r\nHost: h\r\n\r\n"); err != nil {
				t.Fatal(err)
			}
			<-reached
			s.envoy.Stop()
			eventually(t, "both ends", func() bool { return ends() == settled+2 })
		}, [4]int{200, 1, 2000, 5}}, // 200 and 0; none and 1
	} {
		if tt.name == "the end of Envoy" && !isTold {
			continue
		}
		t.Run(tt.name, func(t *testing.T) {
			settled, before := ends(), spent()
			tt.do(t)
			if tt.name == "a restart of sluice" {
				settled, before = 0, [4]int{-1000, -1000, -1000, -1000} // its metrics are new
			}
			eventually(t, "the end", func() bool { return ends() > settled })
			if n := timed(); n != 0 {
				t.Errorf("a request had no duration: %d", n)
			}
			var got [4]int
			for i, n := range spent() {
				got[i] = n - before[i]
			}
			if tt.want[3] == local {
				got[3] = min(got[3], local)
			}
			if got != tt.want {
				t.Errorf("%v settled %v, want %v", limits, got, tt.want)
			}
		})
	}
}
