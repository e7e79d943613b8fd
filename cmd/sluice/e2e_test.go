package main

import (
	"bufio"
	"fmt"
	"net"
	"net/http"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	"github.com/sluiceproxy/sluice/limiter/redistest"
)

// about returns the rate-limit headers of a response, sorted.
func about(h http.Header) string {
	var all []string
	for name, values := range h {
		name = strings.ToLower(name)
		if strings.Contains(name, "ratelimit") || name == "retry-after" {
			for _, v := range values {
				all = append(all, name+"="+v)
			}
		}
	}
	slices.Sort(all)
	return strings.Join(all, " ")
}

// TestHeadersThroughEnvoy checks that Envoy removes what clients and upstreams
// say about limits, and that the headers of sluice arrive, on every kind of
// response.
func TestHeadersThroughEnvoy(t *testing.T) {
	const limits = `
limits:
  - {name: per-client, key: client.ip, rate: 1/d, burst: 100, match: {paths: ["/limited/**", /missing, /moved, /busy, /socket]}}
  - {name: would-deny, rate: 1/d, burst: 1, mode: shadow, match: {paths: [/limited/shadowed]}}
  - {name: strict, rate: 1/d, burst: 1, match: {paths: [/limited/strict, "/grpc.health.v1.Health/Check"]}}
`
	up := startUpstream(t)
	p := startSluice(t, "--config", file(t, "sluice.yaml", limits))
	addr := startEnvoy(t, p.grpc, up.Listener.Addr().String())
	c := client(t)
	left := 100
	told := func() string {
		left--
		return fmt.Sprintf("x-ratelimit-limit=100 x-ratelimit-remaining=%d x-ratelimit-reset=%d", left, (100-left)*86400)
	}
	for _, tt := range []struct {
		path   string
		status int
		also   string // besides sluice's own
	}{
		{"/limited/a", 200, ""},
		{"/missing", 404, ""},
		{"/moved", 302, ""},
		{"/busy", 503, "retry-after=120 "},
	} {
		r, _ := fetch(
			t, c, "http://"+addr+tt.path, "x-ratelimit-limit", "forged", "X-RateLimit-Foo", "forged", "RateLimit", "forged",
			"RateLimit-Policy", "forged", "x-sluice-shadow", "forged", "X-Sluice-Other", "forged", "x-envoy-ratelimited",
			"forged", "x-mine", "kept",
		)
		if got, want := about(r.Header), tt.also+told(); r.StatusCode != tt.status || got != want {
			t.Errorf("%s: %d %s, want %d %s", tt.path, r.StatusCode, got, tt.status, want)
		}
		for name := range up.got() {
			if n := strings.ToLower(name); strings.Contains(n, "ratelimit") || strings.Contains(n, "sluice") {
				t.Errorf("%s: the client's %s came through", tt.path, name)
			}
		}
		if up.got().Get("X-Mine") != "kept" {
			t.Errorf("%s: x-mine did not come through", tt.path)
		}
	}

	t.Run("no limit applies", func(t *testing.T) {
		if r, body := fetch(t, c, "http://"+addr+"/free"); r.StatusCode != 200 || about(r.Header) != "" || body != "hello" {
			t.Errorf("%d %s", r.StatusCode, about(r.Header))
		}
	})
	t.Run("websocket", func(t *testing.T) {
		conn, err := net.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = conn.Close() }()
		const upgrade = "GET /socket HTTP/1.1\r\nHost: h\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
		if _, err := fmt.Fprint(conn, upgrade); err != nil {
			t.Fatal(err)
		}
		in := bufio.NewReader(conn)
		r, err := http.ReadResponse(in, nil)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = r.Body.Close() }()
		if got, want := about(r.Header), told(); r.StatusCode != 101 || got != want {
			t.Errorf("%d %s, want %s", r.StatusCode, got, want)
		}
		if _, err := fmt.Fprint(conn, "hello\n"); err != nil {
			t.Fatal(err)
		}
		if line, err := in.ReadString('\n'); err != nil || line != "you said hello\n" {
			t.Errorf("%q, %v", line, err)
		}
	})
	t.Run("a shadow limit", func(t *testing.T) {
		for i, want := range []string{"", "would-deny"} {
			r, _ := fetch(t, c, "http://"+addr+"/limited/shadowed", "x-sluice-shadow", "forged")
			if got := strings.Join(up.got().Values("X-Sluice-Shadow"), "|"); r.StatusCode != 200 || got != want ||
				about(r.Header) != told() {
				t.Errorf("request %d: %d, x-sluice-shadow %q, want %q; %s", i, r.StatusCode, got, want, about(r.Header))
			}
		}
	})
	t.Run("limited", func(t *testing.T) {
		fetch(t, c, "http://"+addr+"/limited/strict")
		left--
		r, body := fetch(t, c, "http://"+addr+"/limited/strict")
		if got, want := about(r.Header), "retry-after=86400 x-envoy-ratelimited=true x-ratelimit-limit=1 "+
			"x-ratelimit-remaining=0 x-ratelimit-reset=86400"; r.StatusCode != 429 ||
			got != want {
			t.Errorf("%d %s, want %s", r.StatusCode, got, want)
		}
		const want = `{"title":"Too Many Requests","status":429,` +
			`"detail":"Rate limit \"strict\" exceeded. Retry in 86400 s.","limit":"strict","retry_after":86400}`
		if body != want ||
			r.Header.Get("Content-Type") != "application/problem+json" {
			t.Errorf("%s %s", r.Header.Get("Content-Type"), body)
		}
	})
	t.Run("gRPC", func(t *testing.T) {
		// The bucket is empty by now.
		_, err := grpc_health_v1.NewHealthClient(dial(t, addr)).Check(t.Context(), &grpc_health_v1.HealthCheckRequest{})
		if status.Code(err) != codes.ResourceExhausted ||
			status.Convert(err).Message() != `Rate limit "strict" exceeded. Retry in 86400 s.` {
			t.Errorf("%v", err)
		}
		_, metrics := get(t, "http://"+p.metrics+"/metrics")
		if want := `sluice_rejections_total{limit="strict"} 2`; !strings.Contains(metrics, want) {
			t.Errorf("no %s: the call was checked more than once", want)
		}
	})
	t.Run("no upstream", func(t *testing.T) {
		up.Close()
		if r, _ := fetch(t, c, "http://"+addr+"/limited/a"); r.StatusCode != 503 || about(r.Header) != told() {
			t.Errorf("%d %s", r.StatusCode, about(r.Header))
		}
	})
}

// spellings returns paths as clients may write them.
func spellings() []string {
	all := []string{
		// Spellings of /v1/orders, or of something close to it.
		"/v1/orders", "//v1/orders", "/v1//orders", "/v1///orders", "/./v1/orders", "/v1/./orders", "/v1/x/../orders",
		"/x/../v1/orders", "/../v1/orders",
		"/%76%31/orders", "/v1/%6frders", "/v1/%6Frders", "/v1/orders/", "/v1/orders//", "/v1/orders/.", "/v1/orders/x/..",
		"/v1%2forders", "/v1%2Forders",
		"/v1/orders%2f", "/%2e/v1/orders", "/v1/%2e%2e/v1/orders", "/%2e%2e/v1/orders", "/v1\\orders", "\\v1\\orders",
		"/v1%5corders", "/v1/orders;v=1", "/v1;a=b/orders",
		"/v1/orders;", "/v1/orders%3bv=1", "/v1/orders?", "/v1/orders?x=/../..", "/v1/orders/?x", "/v1/orders;a/?x",
		"/v1/orders#x", "/v1/orders%3f", "/v1/orders%23",
		"http://shop.example.com/v1/orders", "/v1/%256frders", "/v1%252forders", "/v1/orders/%2e%2e", "/v1/orders/%252e%252e",
		"/v1/orders/..", "/V1/orders", "/v1/orders%00",
		"/v1/orders%20", "/v1/orders%", "/v1/orders%zz", "/v1/orders\xff", "/v1/orders%ff", "/v1/orders%c0%af",
		"/v1/orders/7", "/v1/orders/%2e%2e%2fhealthz",
		"/v1/orders/1%2f..%2f..%2f..%2fhealthz", "/v1/orders/" + strings.Repeat("x", 8000),
		"/v1/" + strings.Repeat("./", 4000) + "orders", "/" + strings.Repeat("a/../", 1600) + "v1/orders",
		// Spellings of what is exempt.
		"/healthz", "/healthz/", "//healthz", "/./healthz", "/x/../healthz", "/%68ealthz", "/healthz;x=1", "/healthz?x",
		"/healthz#x", "/healthz%2f", "\\healthz", "/healthz%00",
		"/healthz/../v1/orders", "/healthz/%2e%2e/v1/orders", "/healthz%2f..%2fv1/orders", "/healthz;/../v1/orders",
		"/healthz\\..\\v1\\orders", "/healthz?/../v1/orders",
		"/public/a", "/public", "/public/", "/public//a", "/public/../v1/orders", "/public/%2e%2e/v1/orders",
		"/public/..%2fv1/orders", "/public/%2e%2e%2fv1%2forders",
		"/public/x/../../v1/orders", "/public/x/%2e%2e/%2e%2e/v1/orders", "/public/..;/v1/orders", "/public/..\\v1\\orders",
		"/public%2f..%2f..%2fv1/orders", "/public/%252e%252e/v1/orders",
		"/PUBLIC/a", "/v1/../public/a", "/v1/orders/../../public/a", "/v1/orders/%2e%2e/%2e%2e/public/a",
		"/v1/orders/..%2f..%2fpublic/a", "/public/" + strings.Repeat("../", 2600) + "v1/orders",
	}
	return all
}

// TestPathsThroughEnvoy checks, for many spellings of paths, that sluice limits
// what Envoy routes to the limited route, and that Envoy routes what sluice
// exempts to the exempt route, with normalisation in Envoy and without.
func TestPathsThroughEnvoy(t *testing.T) {
	up := startUpstream(t)
	p := startSluice(t, "--config", file(t, "sluice.yaml", `
headers: [ratelimit]
exempt: [{match: {paths: [/healthz, "/public/**"]}}]
limits:
  - {name: orders, rate: 1/d, burst: 10000, match: {hosts: [shop.example.com], paths: ["/v1/orders/**"]}}
  - {name: all, rate: 1/d, burst: 10000}
`))
	const catchAll = "              - match: { prefix: / }\n                route: { cluster: upstream }\n"
	route := func(name, match string) string {
		return "              - match: { " + match + " }\n                route: { cluster: upstream }\n                " +
			"response_headers_to_add: [{ header: { key: x-route, value: " + name + " } }]\n"
	}
	routes := func(b string) string {
		return strings.Replace(
			b,
			catchAll,
			route("orders", "path_separated_prefix: /v1/orders")+route("exempt", "path: /healthz")+
				route("exempt", "path_separated_prefix: /public")+route("other", "prefix: /"),
			1,
		)
	}
	if n := len(spellings()); n < 90 {
		t.Errorf("only %d spellings", n)
	}
	for name, change := range map[string]func(string) string{
		"as shipped": func(b string) string { return b },
		"without normalisation": strings.NewReplacer(
			"normalize_path: true", "normalize_path: false", "merge_slashes: true", "merge_slashes: false").Replace,
		"with escaped slashes": strings.NewReplacer("merge_slashes: true", "merge_slashes: true\n          "+
			"path_with_escaped_slashes_action: UNESCAPE_AND_FORWARD").Replace,
	} {
		t.Run(name, func(t *testing.T) {
			addr := startEnvoy(t, p.grpc, up.Listener.Addr().String(), func(b string) string { return routes(change(b)) })
			seen := map[string]int{}
			for _, target := range spellings() {
				for _, host := range []string{"shop.example.com", "SHOP.Example.com:80"} {
					r := rawGet(t, addr, host, target)
					routed, limits := r.Header.Get("X-Route"), r.Header.Get("Ratelimit-Policy")
					if routed == "" && r.StatusCode >= 400 {
						seen["refused"]++
						continue // by Envoy, before any check
					}
					limited, exempt := strings.Contains(limits, `"orders"`), limits == ""
					seen[fmt.Sprintf("%s, limited %v, exempt %v", routed, limited, exempt)]++
					if routed == "orders" && !limited || exempt && routed != "exempt" {
						t.Errorf("%.200q is routed to %s, limited by %q, status %d", target, routed, limits, r.StatusCode)
					}
				}
			}
			t.Log(seen)
			for _, some := range []string{
				"orders, limited true, exempt false", "exempt, limited false, exempt true", "other, limited false, exempt false",
			} {
				if seen[some] < 4 {
					t.Errorf("only %d of %s", seen[some], some)
				}
			}
		})
	}
}

// TestRestartLosesNothing checks that three restarts of a sidecar under load
// lose no request and let none pass without a decision.
func TestRestartLosesNothing(t *testing.T) {
	const (
		restarts, between = 3, 50 // requests after each restart, and before the first
		burst             = 10_000
		// Envoy waits 200 ms for an answer, retries included. A restart that
		// takes longer on a busy machine proves nothing and is repeated.
		enough, tries = 150 * time.Millisecond, 20
	)
	redis := redistest.Start(t)
	up := startUpstream(t)
	socket := "unix://" + filepath.Join(t.TempDir(), "s.sock")
	config := file(t, "sluice.yaml", fmt.Sprintf("limits: [{name: all, rate: 1/d, burst: %d}]\n", burst))
	begin := func() *process {
		return startSluice(t, "--grpc", socket, "--redis", redis.URL(), "--config", config)
	}
	p := begin()
	addr := startEnvoy(t, socket, up.Listener.Addr().String())

	var passed, lost atomic.Int64
	answers := make(chan bool, 1024)
	done := make(chan struct{})
	var wg sync.WaitGroup
	tick := time.NewTicker(5 * time.Millisecond) // so that there are requests during all of a restart
	defer tick.Stop()
	for range 4 {
		c := client(t)
		wg.Go(func() {
			for {
				select {
				case <-done:
					return
				case <-tick.C:
				}
				r, _ := fetch(t, c, "http://"+addr+"/")
				if r.StatusCode == 200 && about(r.Header) != "" {
					passed.Add(1)
				} else {
					lost.Add(1)
				}
				answers <- true
			}
		})
	}
	await := func(n int) {
		for range n {
			<-answers
		}
	}
	await(between)
	good := 0
	for try := 0; good < restarts && try < tries; try++ {
		before := lost.Load()
		began := time.Now()
		if status := p.stop(); status != 0 {
			t.Errorf("sluice ended with %d", status)
		}
		p = begin()
		took := time.Since(began)
		await(between)
		if took > enough {
			t.Logf("a restart took %v: not counted, with %d lost", took, lost.Load()-before)
			continue
		}
		if n := lost.Load() - before; n > 0 {
			t.Errorf("%d requests lost in a restart that took %v", n, took)
		}
		good++
	}
	close(done)
	go func() {
		for range answers { // let the callers end
		}
	}()
	wg.Wait()
	close(answers)
	if good < restarts {
		t.Errorf("only %d of %d restarts took less than %v", good, tries, enough)
	}
	r, _ := fetch(t, client(t), "http://"+addr+"/")
	left, err := strconv.ParseInt(r.Header.Get("X-Ratelimit-Remaining"), 10, 64)
	if err != nil || left > burst-passed.Load()-1 || left < burst-passed.Load()-lost.Load()-1 {
		t.Errorf("%d tokens are left after %d requests passed and %d were lost, %v", left, passed.Load()+1, lost.Load(), err)
	}
	t.Logf(
		"%d requests over %d restarts, %d lost; %d of %d tokens are left", passed.Load()+lost.Load(), good, lost.Load(), left,
		burst,
	)
}
