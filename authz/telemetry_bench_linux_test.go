package authz

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"runtime/debug"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	protobuf "google.golang.org/protobuf/proto"

	"github.com/sluiceproxy/sluice/limiter"
	"github.com/sluiceproxy/sluice/limiter/policy"
	"github.com/sluiceproxy/sluice/limiter/redistest"
)

// reportingEnv makes this test binary one of the servers that
// BenchmarkReporting compares: "on" or "off".
const reportingEnv = "SLUICE_TEST_REPORTING"

func TestMain(m *testing.M) {
	if side := os.Getenv(reportingEnv); side != "" {
		if err := serveSide(side, os.Args[1]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

// reportingLimits has a path for each load. The third limit denies everything:
// its cost is above its burst, which only a check can show.
const reportingLimits = `
limits:
  - {name: allowed, match: {paths: [/allowed]}, key: client.ip, rate: 1000000000/s}
  - {name: flooded, match: {paths: [/flooded]}, key: client.ip, rate: 1/s}
  - {name: strangers, match: {paths: [/strangers]}, key: client.ip, rate: 1/s, cost: 'request.method == "GET" ? 2 : 1'}
`

// silent returns the service without metrics, logs and statistics, which no
// configuration offers.
func silent() *grpc.ServiceDesc {
	quiet := service
	quiet.Methods = []grpc.MethodDesc{{
		MethodName: "Check",
		Handler: func(s any, ctx context.Context, decode func(any) error, _ grpc.UnaryServerInterceptor) (any, error) {
			raw := new(rawRequest)
			if err := decode(raw); err != nil {
				return nil, err
			}
			v := checkState{config: s.(*Server).config.Load(), wire: raw.wire}
			if err := s.(*Server).decide(ctx, time.Time{}, &v); err != nil {
				return nil, err
			}
			return s.(*Server).answer(&v)
		},
	}}
	return &quiet
}

// spent is what a process reports about itself.
type spent struct {
	CPU    time.Duration // since it began, of all its threads
	Peak   int           // its largest resident memory, in kB
	Counts map[limiter.Outcome]uint64
	Top    int // keys that are told of the limit of strangers
}

// serveSide runs a sidecar with or without reporting on a port that it prints.
// For each line on stdin it prints a spent, and it ends with stdin. Its log
// goes to stderr.
func serveSide(side, url string) error {
	debug.SetGCPercent(200) // as cmd/sluice has it
	config, err := policy.Parse("reporting.yaml", []byte(reportingLimits), noEnv)
	if err != nil {
		return err
	}
	log, err := zap.NewProduction()
	if err != nil {
		return err
	}
	metrics := prometheus.NewRegistry()
	redis, err := limiter.NewRedis(limiter.RedisOptions{URL: url, Timeout: 5 * time.Second}, log, metrics)
	if err != nil {
		return err
	}
	go redis.Run(context.Background())
	ceiling := limiter.NewCeiling(redis, metrics)
	go ceiling.Run(context.Background())
	s := New(Options{Config: config, Store: ceiling, Log: log, Metrics: metrics})
	g := s.GRPC()
	if side == "off" {
		g = grpc.NewServer(serverOptions()...)
		g.RegisterService(silent(), s)
	} else {
		go func() { // a scrape each second, which is more than Prometheus and the page ask for together
			for range time.Tick(time.Second) {
				_, _ = metrics.Gather()
				s.Limits()
			}
		}()
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	go func() { _ = g.Serve(l) }()
	fmt.Println(l.Addr())
	for lines := bufio.NewScanner(os.Stdin); lines.Scan(); {
		var usage syscall.Rusage
		if err := syscall.Getrusage(syscall.RUSAGE_SELF, &usage); err != nil {
			return err
		}
		top, _, _ := s.Top("strangers", sketchSize)
		if err := json.NewEncoder(os.Stdout).Encode(spent{
			CPU:    time.Duration(usage.Utime.Nano() + usage.Stime.Nano()),
			Peak:   int(usage.Maxrss),
			Counts: s.Totals().Checks,
			Top:    len(top),
		}); err != nil {
			return err
		}
	}
	return nil
}

// reportingSide is such a process and the connections to it.
type reportingSide struct {
	b      *testing.B
	name   string
	ask    io.WriteCloser
	said   *bufio.Reader
	conns  []*grpc.ClientConn
	checks map[limiter.Outcome]uint64 // that it answered
	close  func()
}

func startSide(b *testing.B, name, url string) *reportingSide {
	b.Helper()
	cmd := exec.Command(os.Args[0], url)
	cmd.Env = append(os.Environ(), reportingEnv+"="+name)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	in, err := cmd.StdinPipe()
	if err != nil {
		b.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		b.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	s := &reportingSide{b: b, name: name, ask: in, said: bufio.NewReader(out), checks: make(map[limiter.Outcome]uint64)}
	var addr string
	if _, err := fmt.Fscanln(s.said, &addr); err != nil {
		b.Fatal(err)
	}
	for range 2 {
		conn, err := grpc.NewClient("passthrough:///"+addr,
			grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithDefaultCallOptions(grpc.ForceCodecV2(newCodec())))
		if err != nil {
			b.Fatal(err)
		}
		s.conns = append(s.conns, conn)
	}
	s.close = sync.OnceFunc(func() {
		for _, c := range s.conns {
			_ = c.Close()
		}
		_ = in.Close()
		if err := cmd.Wait(); err != nil {
			b.Error(err)
		}
	})
	b.Cleanup(s.close)
	return s
}

func (s *reportingSide) spent() (all spent) {
	s.b.Helper()
	if _, err := fmt.Fprintln(s.ask); err != nil {
		s.b.Fatal(err)
	}
	line, err := s.said.ReadBytes('\n')
	if err == nil {
		err = json.Unmarshal(line, &all)
	}
	if err != nil {
		s.b.Fatal(err)
	}
	return all
}

// load sends checks for path from 64 callers, for so many clients in turn
// beginning with from, and returns the processor time of one check.
func (s *reportingSide) load(path string, checks, from, clients int) time.Duration {
	s.b.Helper()
	before := s.spent().CPU
	var wg sync.WaitGroup
	var mu sync.Mutex
	const callers = 64
	for c := range callers {
		wg.Go(func() {
			granted, denied := uint64(0), uint64(0)
			for i := c; i < checks; i += callers {
				client := (from + i) % clients
				ip := fmt.Sprintf("10.%d.%d.%d", client>>16&255, client>>8&255, client&255)
				wire, err := protobuf.Marshal(browsersCheck(ip, path))
				if err != nil {
					s.b.Error(err)
					return
				}
				var got rawRequest
				err = s.conns[c%len(s.conns)].Invoke(s.b.Context(), authv3.Authorization_Check_FullMethodName,
					&rawResponse{wire: wire}, &got)
				if err != nil {
					s.b.Error(err)
					return
				}
				var answer authv3.CheckResponse
				if err := protobuf.Unmarshal([]byte(got.wire), &answer); err != nil {
					s.b.Error(err)
					return
				}
				switch {
				case answer.GetStatus().GetCode() == 0 && answer.GetOkResponse() != nil && path != "/strangers":
					granted++
				case answer.GetDeniedResponse().GetStatus().GetCode() == 429 && path != "/allowed":
					denied++
				default:
					s.b.Errorf("%s: %v", path, &answer)
					return
				}
			}
			mu.Lock()
			defer mu.Unlock()
			s.checks[limiter.Allowed] += granted
			s.checks[limiter.Limited] += denied
		})
	}
	wg.Wait()
	return (s.spent().CPU - before) / time.Duration(checks)
}

// browsersCheck returns a check as Envoy sends it.
func browsersCheck(ip, path string) *authv3.CheckRequest {
	check := checkOf(":authority", "shop.example.com", ":method", "GET", ":path", path, ":scheme", "https",
		"accept", "*/*", "user-agent", "curl/8.5.0",
		"x-forwarded-proto", "https", "x-request-id", "7f1f2a3b-5a0c-4a53-9d5a-0a3f5a9e3c11")
	check.Attributes.Source = address(ip, 50123)
	check.Attributes.Destination = address("127.0.0.1", 8080)
	check.Attributes.Request.Http.Path = path
	return check
}

// BenchmarkReporting prints the cost of reporting: metrics, sampled log lines,
// top keys, denials, the counts of gRPC calls, and a scrape a second. Two
// sidecars run as processes beside one Redis, one with reporting and one
// without. They take turns in short slices, so that other load on the machine
// affects both, and the medians of the slices and of their ratios are compared.
// The third load has a new client in each check: after it each sidecar has seen
// a million. The metrics of the store are in both.
//
//	go test ./authz -run '^$' -bench Reporting -benchtime 1x
func BenchmarkReporting(b *testing.B) {
	const slicesEach = 6
	store := redistest.Start(b)
	for b.Loop() {
		fmt.Printf("\n%-44s %8s %8s %8s %20s\n",
			"server CPU of a check by 64 callers, in µs", "off", "on", "on/off", "half of the slices")
		for _, load := range []struct {
			name, path    string
			each, clients int
			pairs         int // of processes, as one process differs from the next
		}{
			{"allowed, of a thousand clients", "/allowed", 20_000, 1000, 10},
			{"denied, a flood of ten clients", "/flooded", 20_000, 10, 10},
			{"denied, of a client that is always another", "/strangers", 150_000, 1 << 24, 2},
		} {
			var all [2][]time.Duration
			var ratios []float64
			var peak [2]int
			for range load.pairs {
				sides := []*reportingSide{startSide(b, "off", store.URL()), startSide(b, "on", store.URL())}
				for _, s := range sides {
					s.load(load.path, load.each, load.clients/2, load.clients) // warms up
				}
				for slice := range slicesEach {
					var took [2]time.Duration
					for i := range sides {
						i = (i + slice) % 2 // neither is always first
						took[i] = sides[i].load(load.path, load.each, slice*load.each, load.clients)
						all[i] = append(all[i], took[i])
					}
					ratios = append(ratios, float64(took[1])/float64(took[0]))
				}
				for i, s := range sides {
					said := s.spent()
					peak[i] = max(peak[i], said.Peak)
					for _, outcome := range []limiter.Outcome{limiter.Allowed, limiter.Limited} {
						want := s.checks[outcome] * uint64(i) // none if reporting is off
						if said.Counts[outcome] != want {
							b.Errorf("%s: %d are counted as %v, want %d", s.name, said.Counts[outcome], outcome, want)
						}
					}
					if want := sketchSize * i; load.path == "/strangers" && said.Top != want {
						b.Errorf("%s: %d keys are told", s.name, said.Top)
					}
					s.close()
				}
			}
			for i := range all {
				slices.Sort(all[i])
			}
			slices.Sort(ratios)
			median := func(i int) float64 { return float64(all[i][len(all[i])/2].Nanoseconds()) / 1000 }
			fmt.Printf("%-44s %8.2f %8.2f %8.3f %12.3f to %.3f   memory at most %d MiB off, %d MiB on\n",
				load.name, median(0), median(1), ratios[len(ratios)/2],
				ratios[len(ratios)/4], ratios[len(ratios)*3/4], peak[0]>>10, peak[1]>>10)
		}
	}
}
