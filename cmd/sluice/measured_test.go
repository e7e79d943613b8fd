package main

import (
	"fmt"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"google.golang.org/grpc"

	"github.com/sluiceproxy/sluice/limiter/redistest"
)

// measured is one server of a comparison.
type measured struct {
	name     string
	process  *process
	flood    bool // it denies nearly all
	earlier  bool // it is the program of an earlier commit, which may tell fewer metadata
	requests []*authv3.CheckRequest
	conns    []*grpc.ClientConn

	checks, granted, scripts int
	cpu, redis, took         time.Duration
	latencies                []time.Duration
}

// start connects to the server and checks its answer, because a server with a
// wrong answer is not worth measuring.
func (m *measured) start(b testing.TB) {
	b.Helper()
	for range 2 {
		m.conns = append(m.conns, dial(b, m.process.grpc))
	}
	answer, err := authv3.NewAuthorizationClient(m.conns[0]).Check(b.Context(), from("192.0.2.1", "/"))
	if err != nil {
		b.Fatal(err)
	}
	got := map[string]string{}
	for _, h := range answer.GetOkResponse().GetResponseHeadersToAdd() {
		got[h.GetHeader().GetKey()] = h.GetHeader().GetValue()
	}
	limit, left := "1000000000", "999999999"
	if m.flood {
		limit, left = "1", "0"
	}
	fields := len(answer.GetDynamicMetadata().GetFields())
	if got["x-ratelimit-limit"] != limit || got["x-ratelimit-remaining"] != left || len(got) != 3 ||
		fields != 7 && !m.earlier {
		b.Fatalf("%s answers %v", m.name, answer)
	}
}

// manyClients returns a request of each of n clients.
func manyClients(n int) []*authv3.CheckRequest {
	all := make([]*authv3.CheckRequest, n)
	for i := range all {
		all[i] = from(fmt.Sprintf("10.1.%d.%d", i/250, i%250), "/v1/orders?page=2")
	}
	return all
}

func (m *measured) reset() {
	m.checks, m.granted, m.scripts, m.cpu, m.redis, m.took, m.latencies = 0, 0, 0, 0, 0, 0, m.latencies[:0]
}

// round loads the server, and counts that unless it is for warming up.
func (m *measured) round(b *testing.B, store *redistest.Server, callers, each int, counts bool) {
	b.Helper()
	before := *m
	pid, scripts := m.process.cmd.Process.Pid, evalshas(b, store)
	redis, cpu, began := store.CPU(), redistest.ProcessTime(b, pid), time.Now()
	m.load(b, callers, each)
	if !counts {
		m.granted, m.latencies = before.granted, before.latencies
		return
	}
	m.took += time.Since(began)
	m.cpu += redistest.ProcessTime(b, pid) - cpu
	m.redis += store.CPU() - redis
	m.scripts += evalshas(b, store) - scripts
	m.checks += each
}

// load makes checks from that many callers, at requests in turn.
func (m *measured) load(b *testing.B, callers, checks int) {
	b.Helper()
	var wg sync.WaitGroup
	var mu sync.Mutex
	for c := range callers {
		wg.Go(func() {
			client := authv3.NewAuthorizationClient(m.conns[c%len(m.conns)])
			mine, granted := make([]time.Duration, 0, checks/callers+1), 0
			for i := c; i < checks; i += callers {
				began := time.Now()
				answer, err := client.Check(b.Context(), m.requests[i%len(m.requests)])
				mine = append(mine, time.Since(began))
				code := answer.GetStatus().GetCode()
				if err != nil || code != 0 && (code != 8 || !m.flood) {
					b.Errorf("%s: %v, %v", m.name, answer, err)
					return
				}
				if code == 0 {
					granted++
				}
			}
			mu.Lock()
			defer mu.Unlock()
			m.granted += granted
			m.latencies = append(m.latencies, mine...)
		})
	}
	wg.Wait()
}

func (m *measured) server() float64     { return float64(m.cpu.Microseconds()) / float64(m.checks) }
func (m *measured) ofRedis() float64    { return float64(m.redis.Microseconds()) / float64(m.checks) }
func (m *measured) both() float64       { return m.server() + m.ofRedis() }
func (m *measured) throughput() float64 { return float64(m.checks) / m.took.Seconds() }

func (m *measured) quantile(q float64) time.Duration {
	slices.Sort(m.latencies)
	return m.latencies[int(float64(len(m.latencies)-1)*q)]
}

func (m *measured) print(base *measured) {
	fmt.Printf(
		"%-20s %10.1f %10.1f %8.2f %8.2f %12.3f %10.0f %8d %8d %8d\n",
		m.name,
		m.server(),
		m.ofRedis(),
		m.server()/base.server(),
		m.both()/base.both(),
		float64(
			m.scripts,
		)/float64(
			m.checks,
		),
		m.throughput(),
		m.quantile(.5).Microseconds(),
		m.quantile(.99).Microseconds(),
		m.quantile(.999).Microseconds(),
	)
}

func evalshas(b *testing.B, s *redistest.Server) int {
	b.Helper()
	_, rest, _ := strings.Cut(s.Info("commandstats")["cmdstat_evalsha"], "calls=")
	n, _, _ := strings.Cut(rest, ",")
	calls, _ := strconv.Atoi(n) // none yet: 0
	return calls
}

// rss is a process's resident memory in bytes.
func rss(b testing.TB, pid int) int { return memory(b, pid, "VmRSS") }

// peak is the most memory that a process has held.
func peak(b testing.TB, pid int) int { return memory(b, pid, "VmHWM") }

func memory(b testing.TB, pid int, field string) int {
	b.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		b.Fatal(err)
	}
	found := regexp.MustCompile(field + `:\s+(\d+) kB`).FindSubmatch(text)
	kB, err := strconv.Atoi(string(found[1]))
	if err != nil {
		b.Fatal(err)
	}
	return kB << 10
}

// draw writes a bar for each server: its processor time a check, and Redis's.
func draw(b *testing.B, path string, servers []*measured) {
	b.Helper()
	const left, top, bar, scale = 150, 34, 26, 5.0 // pixels, and pixels a microsecond
	var most float64
	for _, s := range servers {
		most = max(most, s.both())
	}
	width, height := left+int(most*scale)+150, top+bar*len(servers)+34
	var svg strings.Builder
	fmt.Fprintf(
		&svg,
		`<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" width="%d" height="%d" `+
			`font-family="sans-serif" font-size="12">
<rect width="100%%" height="100%%" fill="#fff"/>
<text x="10" y="20" font-weight="bold">Processor time of one check, in µs, by 64 callers</text>
`,
		width,
		height,
		width,
		height,
	)
	for i, s := range servers {
		y := top + bar*i
		fmt.Fprintf(
			&svg, `<text x="%d" y="%d" text-anchor="end">%s</text><rect x="%d" y="%d" width="%.0f" height="18" fill="#2f6f9f"/>`,
			left-8, y+14, s.name, left, y, s.server()*scale,
		)
		fmt.Fprintf(
			&svg, `<rect x="%.0f" y="%d" width="%.0f" height="18" fill="#d9822b"/><text x="%.0f" y="%d">%.1f + %.1f</text>`+"\n",
			left+s.server()*scale, y, s.ofRedis()*scale, left+s.both()*scale+8, y+14, s.server(), s.ofRedis(),
		)
	}
	y := top + bar*len(servers) + 8
	fmt.Fprintf(
		&svg, `<rect x="%d" y="%d" width="12" height="12" fill="#2f6f9f"/><text x="%d" y="%d">the server's</text>`, left, y,
		left+18, y+11,
	)
	fmt.Fprintf(
		&svg, `<rect x="%d" y="%d" width="12" height="12" fill="#d9822b"/><text x="%d" y="%d">Redis's</text>`+"\n</svg>\n",
		left+110, y, left+128, y+11,
	)
	if err := os.WriteFile(path, []byte(svg.String()), 0o644); err != nil {
		b.Fatal(err)
	}
}
