package main

import (
	"fmt"
	"maps"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

	logdatav3 "github.com/envoyproxy/go-control-plane/envoy/data/accesslog/v3"
	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/sluiceproxy/sluice/limiter/redistest"
)

// series returns the values of the series of a /metrics page.
func series(t testing.TB, addr string) map[string]string {
	t.Helper()
	_, page := get(t, "http://"+addr+"/metrics")
	all := make(map[string]string)
	for line := range strings.Lines(page) {
		if at := strings.LastIndexByte(line, ' '); line[0] != '#' {
			all[line[:at]] = strings.TrimSpace(line[at:])
		}
	}
	return all
}

// family returns the metric name of a series, without the suffix of a
// histogram.
func family(series string) string {
	name, _, _ := strings.Cut(series, "{")
	for _, suffix := range []string{"_bucket", "_sum", "_count"} {
		name = strings.TrimSuffix(name, suffix)
	}
	return name
}

// TestMetricsMove checks that something real changes every exported metric, and
// that labels have only names of the config and of the program, whatever
// clients send. TestREADMEMetrics checks that the README has the same metrics.
func TestMetricsMove(t *testing.T) {
	const hostile = "c4n4ry\"} 1\nsluice_forged 1\n"
	const limits = `
local_share: 0.5
exempt: [{match: {paths: [/healthz]}}]
limits:
  - {name: strict, rate: 1/d, burst: 2, key: client.ip, match: {paths: [/strict]}}
  - {name: shadow, rate: 1/d, burst: 1, mode: shadow, match: {paths: [/strict]}}
  - {name: swept, rate: 1000000/s, key: client.ip, match: {paths: [/swept]}, on_failure: local}
  - {name: open, rate: 1/s, match: {paths: [/open]}, on_failure: allow}
  - {name: asked, rate: 1/s, match: {paths: [/asked]}, on_failure: delegate}
  - {name: bad, rate: 1/s, match: {paths: [/bad]}, key: 'request.path.split("?")[1]'}
  - name: settled
    match: {paths: [/settled]}
    rate: 1/d
    burst: 10
    cost: 2
    settle: int(response.headers["x"])
    settle_within: 1s
`
	config := file(t, "sluice.yaml", limits)
	redis := redistest.Start(t)
	t.Setenv("GOMEMLIMIT", "256KiB") // so that 256 buckets fill a table in process
	inProcess := startSluice(t, "--config", config)
	t.Setenv("GOMEMLIMIT", "off")
	onRedis := startSluice(t, "--config", config, "--redis", redis.URL())
	both := []*process{inProcess, onRedis}
	before := []map[string]string{series(t, inProcess.metrics), series(t, onRedis.metrics)}

	conns := map[*process]*grpc.ClientConn{inProcess: dial(t, inProcess.grpc), onRedis: dial(t, onRedis.grpc)}
	send := func(p *process, ip, path string) {
		t.Helper()
		r := from(ip, path)
		r.Attributes.Request.Http.Host, r.Attributes.Request.Http.Method = hostile, hostile
		r.Attributes.Request.Http.Headers["x-request-id"] = hostile
		_, err := authv3.NewAuthorizationClient(conns[p]).Check(t.Context(), r)
		if err != nil && path != "/asked" {
			t.Error(err)
		}
	}
	for _, p := range both {
		for _, path := range []string{"/strict", "/strict", "/strict", "/swept", "/healthz", "/bad", "/" + hostile} {
			send(p, "203.0.113.1", path)
		}
	}
	// A request to /settled uses less than it took, another more than the largest
	// debt, and the end of a third does not come.
	log := openLog(t, conns[inProcess], "sluice")
	end := func(text, used string) {
		t.Helper()
		entry := endWith(text)
		entry.Response = &logdatav3.HTTPResponseProperties{ResponseHeaders: map[string]string{"x": used}}
		if err := log.Send(logOf(entry)); err != nil {
			t.Fatal(err)
		}
	}
	settled := func() string {
		t.Helper()
		r, err := authv3.NewAuthorizationClient(conns[inProcess]).Check(t.Context(), from("203.0.113.1", "/settled"))
		if err != nil {
			t.Fatal(err)
		}
		return r.GetDynamicMetadata().GetFields()["settle"].GetStringValue()
	}
	end(hostile, "1")
	little, much, lost := settled(), settled(), settled()
	if little == "" || much == "" || lost == "" {
		t.Fatal("nothing is held")
	}
	end(little, "1")
	end(much, "100")
	eventually(t, "an expired hold", func() bool {
		settled()
		return series(t, inProcess.metrics)[`sluice_holds_expired_total{limit="settled"}`] != "0"
	})
	var many sync.WaitGroup
	for i := range 10 {
		many.Go(func() {
			for j := range 40 {
				send(inProcess, fmt.Sprintf("10.0.%d.%d", i, j), "/strict")
			}
		})
	}
	many.Wait()
	const newer = "\xb5\x08\x02" // a bucket of a newer version
	if err := redis.Client().Set(t.Context(), "sluice:default:open:{-}", newer, 0).Err(); err != nil {
		t.Fatal(err)
	}
	send(onRedis, "203.0.113.1", "/open")
	large := from("203.0.113.1", "/open")
	large.Attributes.Request.Http.Body = strings.Repeat("b", 17<<20)
	if _, err := authv3.NewAuthorizationClient(conns[onRedis]).Check(t.Context(), large); status.Code(
		err,
	) != codes.ResourceExhausted {
		t.Errorf("a check of 17 MiB: %v", err)
	}
	redis.Kill()
	for range 6 { // the breaker opens
		for _, path := range []string{"/strict", "/swept", "/open", "/asked"} {
			send(onRedis, "203.0.113.2", path) // whose buckets are full, so that no ceiling denies it
		}
	}
	for _, p := range both {
		for i, text := range []string{limits + "  - {name: more, rate: 1/d}\nfailure_status: 502\ndomain: moved\n", "bad"} {
			if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
			if err := p.cmd.Process.Signal(syscall.SIGHUP); err != nil {
				t.Fatal(err)
			}
			eventually(t, "a reload", func() bool {
				return series(t, p.metrics)[`sluice_config_reloads_total{result="`+[]string{"success", "failure"}[i]+`"}`] != "0"
			})
		}
	}

	// The janitor's metrics change with its next sweep, which the test waits
	// for.
	still := func() []string {
		moved, all := map[string]bool{}, map[string]bool{}
		for i, p := range both {
			for s, v := range series(t, p.metrics) {
				if strings.HasPrefix(s, "sluice_") || strings.HasPrefix(s, "grpc_") {
					all[family(s)] = true
					moved[family(s)] = moved[family(s)] || before[i][s] != v
				}
			}
		}
		// Only an error in sluice changes this metric. The tests of authz cause
		// one.
		delete(all, "sluice_panics_total")
		// Only an attack changes this metric. TestAttackGRPC makes some.
		delete(all, "sluice_grpc_connections_closed_total")
		delete(all, "sluice_build_info") // another version has another
		delete(all, "sluice_ready")      // TestReadyWithRedis sees it change
		return slices.DeleteFunc(slices.Sorted(maps.Keys(all)), func(name string) bool { return moved[name] })
	}
	var unmoved []string
	defer func() {
		if t.Failed() {
			t.Logf("nothing moved %v", unmoved)
		}
	}()
	eventually(t, "a change of every metric", func() bool { unmoved = still(); return len(unmoved) == 0 })

	// Every decision was made.
	for _, decision := range []string{
		"allowed", "limited", "unmatched", "exempt", "failed_open", "failed_closed", "failed_local", "delegated", "invalid",
	} {
		if n := series(t, onRedis.metrics)[`sluice_checks_total{decision="`+decision+`"}`]; n == "0" || n == "" {
			t.Errorf("no check was %s: %q", decision, n)
		}
	}

	named := regexp.MustCompile(`^(?:|strict|shadow|swept|open|asked|bad|settled|more` + // limits
		`|allowed|limited|shadow_limited|unmatched|exempt|failed_open|failed_closed|failed_local|delegated|invalid|canceled` + // decisions
		`|timeout|connection|auth|readonly|oom|loading|script|state|overload|other` + // kinds of a store's errors
		`|unchanged|returned|surcharged|late|repeated|forged|unknown|mistake|failed` + // settlements
		`|memory|time` + // why a gRPC connection was closed
		`|enforce|shadow|devel` + // modes, and the version
		`|default|moved` + // domains
		`|success|failure|buckets|ceilings|local|key|[0-9a-f]{16}|unary|client_stream|[A-Z][A-Za-z]+` +
		`|envoy\.service\.auth\.v3\.Authorization|envoy\.service\.accesslog\.v3\.AccessLogService)$`)
	label := regexp.MustCompile(`([a-z_]+)=("(?:[^"\\]|\\.)*")`)
	looked := 0
	for _, p := range both {
		for s := range series(t, p.metrics) {
			if strings.HasPrefix(s, "go_") || strings.HasPrefix(s, "process_") || strings.HasPrefix(s, "promhttp_") {
				continue
			}
			if !strings.HasPrefix(s, "sluice_") && !strings.HasPrefix(s, "grpc_") || strings.Contains(s, "sluice_forged") ||
				strings.Contains(s, "c4n4ry") {
				t.Errorf("what is %s?", s)
			}
			for _, l := range label.FindAllStringSubmatch(s, -1) {
				looked++
				value, err := strconv.Unquote(l[2])
				if err != nil || l[1] != "le" && !named.MatchString(value) {
					t.Errorf("%s: who says %q?", s, value)
				}
			}
		}
	}
	if looked < 100 {
		t.Errorf("only %d labels", looked)
	}
}
