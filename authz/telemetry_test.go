package authz

import (
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"github.com/sluiceproxy/sluice/limiter"
)

func TestMetrics(t *testing.T) {
	const config = "limits: [{name: a, rate: 100/s}, {name: b, rate: 10/s, mode: shadow}]"
	s, registry, logs := newServer(t, config, nil)
	allow, deny := ok(50, 1, 1), no(0, time.Second, time.Second, 1)
	for _, verdicts := range []said{{allow, allow}, {deny, allow}, {allow, deny}, {deny, deny}, {failed, failed}} {
		s.store = verdicts
		_, _ = s.Check(t.Context(), checkOf("x-request-id", "id-1"))
	}
	s.store = panics{}
	_, _ = s.Check(t.Context(), checkOf())
	_, _ = s.Check(t.Context(), &authv3.CheckRequest{})
	_, _ = s.Check(t.Context(), &authv3.CheckRequest{})
	want := `
# HELP sluice_checks_total Total number of checks, by decision.
# TYPE sluice_checks_total counter
sluice_checks_total{decision="allowed"} 2
sluice_checks_total{decision="canceled"} 0
sluice_checks_total{decision="delegated"} 0
sluice_checks_total{decision="exempt"} 0
sluice_checks_total{decision="failed_closed"} 2
sluice_checks_total{decision="failed_local"} 0
sluice_checks_total{decision="failed_open"} 0
sluice_checks_total{decision="invalid"} 2
sluice_checks_total{decision="limited"} 2
sluice_checks_total{decision="unmatched"} 0
# HELP sluice_limit_decisions_total Total number of decisions of each limit, by decision.
# TYPE sluice_limit_decisions_total counter
sluice_limit_decisions_total{decision="allowed",limit="a"} 2
sluice_limit_decisions_total{decision="allowed",limit="b"} 2
sluice_limit_decisions_total{decision="limited",limit="a"} 2
sluice_limit_decisions_total{decision="shadow_limited",limit="b"} 2
# HELP sluice_rejections_total Total number of requests that an enforced limit denied.
# TYPE sluice_rejections_total counter
sluice_rejections_total{limit="a"} 2
# HELP sluice_tokens_taken_total Total number of tokens taken.
# TYPE sluice_tokens_taken_total counter
sluice_tokens_taken_total{limit="a"} 2
sluice_tokens_taken_total{limit="b"} 2
# HELP sluice_panics_total Total number of checks that panicked and were refused, and of settlements that panicked.
# TYPE sluice_panics_total counter
sluice_panics_total 1
# HELP sluice_config_mistakes_total Total number of requests that revealed an error in the config, by limit and field.
# TYPE sluice_config_mistakes_total counter
sluice_config_mistakes_total{field="",limit=""} 2
`
	if err := testutil.GatherAndCompare(registry, strings.NewReader(want),
		"sluice_checks_total", "sluice_limit_decisions_total", "sluice_rejections_total",
		"sluice_tokens_taken_total", "sluice_panics_total", "sluice_config_mistakes_total",
	); err != nil {
		t.Error(err)
	}
	n, err := testutil.GatherAndCount(registry, "sluice_check_seconds", "sluice_tokens_remaining_ratio")
	if err != nil || n != 3 {
		t.Errorf("%d histograms, %v", n, err)
	}

	var lines []string
	for _, l := range logs.All() {
		lines = append(lines, l.Level.String()+" "+l.Message)
	}
	if got, want := strings.Join(lines, "\n"), `info request limited
info request would be limited
debug request limited
debug request would be limited
warn store error: timeout
error check panicked
error config error: requests are refused (logged once)`; got != want {
		t.Errorf("logged\n%s\nwant\n%s", got, want)
	}
	got := fmt.Sprint(logs.All()[0].ContextMap())
	if got != "map[client:203.0.113.7 cost:1 decision:limited domain:default host:shop.example.com key:- limit:a "+
		"method:GET path:/ remaining:0 request_id:id-1 retry_after:1 suppressed:0]" {
		t.Error(got)
	}
	got = fmt.Sprint(logs.All()[1].ContextMap())
	if got != "map[client:203.0.113.7 cost:1 decision:shadow_limited domain:default host:shop.example.com key:- limit:b "+
		"method:GET path:/ remaining:0 request_id:id-1 retry_after:1 shadow:true suppressed:0]" {
		t.Error(got)
	}
}

// The first denial is logged, then every thousandth, and the first one after a
// minute. Each line says how many were suppressed.
func TestDenialsAreLoggedSampled(t *testing.T) {
	var s sampler
	at := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	var got []string
	deny := func(n int) {
		for range n {
			if suppressed, is := s.next(at); is {
				got = append(got, fmt.Sprint(s.events.Load(), " suppressed ", suppressed))
			}
		}
	}
	deny(2100)
	at = at.Add(logAtMost - 1)
	deny(1)
	at = at.Add(1)
	deny(3)
	at = at.Add(logAtMost)
	deny(1)
	want := "1 suppressed 0, 1001 suppressed 999, 2001 suppressed 999, 2102 suppressed 100, 2105 suppressed 2"
	if got := strings.Join(got, ", "); got != want {
		t.Errorf("%s\nwant %s", got, want)
	}

	// With concurrent events, the logged and the suppressed ones add up to all.
	var many sampler
	var logged, suppressed atomic.Uint64
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 10_000 {
				if n, is := many.next(at); is {
					logged.Add(1)
					suppressed.Add(n)
				}
			}
		})
	}
	wg.Wait()
	rest := many.events.Load() - many.logged.Load()
	if n := logged.Load(); n+suppressed.Load()+rest != 40_000 || n < 30 || n > 41 {
		t.Errorf("%d logged, %d suppressed, %d since", logged.Load(), suppressed.Load(), rest)
	}
}

// At the info level denials are sampled; at the debug level each is logged.
func TestDenialsInTheLog(t *testing.T) {
	for level, want := range map[zapcore.Level]int{zap.DebugLevel: 2500, zap.InfoLevel: 3, zap.WarnLevel: 0} {
		s, _, _ := newServer(t, "limits: [{name: a, rate: 100/s}]", said{no(0, limiter.Never, time.Second, 1)})
		core, logs := observer.New(level)
		s.report.log = zap.New(core)
		for range 2500 {
			_, _ = s.Check(t.Context(), checkOf())
		}
		if logs.Len() != want {
			t.Errorf("at %v %d lines, want %d", level, logs.Len(), want)
		}
		if want == 3 {
			got := fmt.Sprint(logs.All()[2].ContextMap())
			if got != "map[client:203.0.113.7 cost:1 decision:limited domain:default host:shop.example.com key:- "+
				"limit:a method:GET path:/ remaining:0 suppressed:999]" {
				t.Error(got)
			}
		}
	}
}

// Each key is logged when a limit first denies it, then one of every thousand
// denials, and the first after a minute.
func TestDenialsAreSampledByKey(t *testing.T) {
	var s denialSampler
	var l limitReport
	at := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	var got []string
	deny := func(n int, key string, shadow bool) {
		for range n {
			if suppressed, ok := s.next(&l, key, shadow, at); ok {
				got = append(got, fmt.Sprintf("%s%v %d", key, shadow, suppressed))
			}
		}
	}
	deny(1001, "a", false)
	deny(3, "b", false)
	deny(2, "a", true)
	at = at.Add(logAtMost - 1)
	deny(1, "a", false)
	at = at.Add(1)
	deny(2, "b", false)
	deny(1, "a", false)
	want := "afalse 0, afalse 999, bfalse 0, atrue 0, bfalse 2, afalse 1"
	if got := strings.Join(got, ", "); got != want {
		t.Errorf("%s\nwant %s", got, want)
	}
}

// A flood of keys writes a bounded number of lines, and no limit is kept out of
// the log by another's flood. A key that was not logged is when there is room.
func TestDenialLinesAreBounded(t *testing.T) {
	var s denialSampler
	var flooded, quiet limitReport
	at := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	lines := 0
	for i := range 100_000 {
		if _, ok := s.next(&flooded, fmt.Sprint("key ", i), false, at); ok {
			lines++
		}
	}
	if want := maxKeyLines + (100_000-maxKeyLines+logEvery-1)/logEvery; lines != want {
		t.Errorf("%d lines, want %d", lines, want)
	}
	for _, want := range []bool{true, false, false} {
		if _, ok := s.next(&quiet, fmt.Sprint("another ", want), false, at); ok != want {
			t.Errorf("%v, want %v", ok, want)
		}
	}
	at = at.Add(time.Minute)
	if n, ok := s.next(&quiet, "another false", false, at); !ok || n != 2 {
		t.Errorf("%v, %d suppressed, want 2", ok, n)
	}
}

// What a client sent is escaped and truncated in the log, and its query and
// secrets are not there.
func TestDenialsInTheLogAreEscaped(t *testing.T) {
	s, _, logs := newServer(t, `
client_ip: {header: x-real-ip}
limits: [{name: a, rate: 1/s, key: 'request.headers["x-api-key"]'}]`, said{no(0, limiter.Never, 0, 0)})
	check := checkOf("x-api-key", "s3cr3t", "x-real-ip", "2001:DB8::1", "x-request-id", "a\nb")
	http := check.Attributes.Request.Http
	http.Method, http.Host = "GET\x1b[2J", "h\u202e\n.example"
	http.Path = "/\"\u00e9" + strings.Repeat("x", 1000) + "?token=s3cr3t"
	_, _ = s.Check(t.Context(), check)
	fields := logs.All()[0].ContextMap()
	for name, want := range map[string]any{
		"method": `GET\x1b[2J`, "host": `h\u202e\n.example`, "path": `/\"\u00e9` + strings.Repeat("x", maxShown-4),
		"client": "2001:db8::1", "request_id": nil,
	} {
		if got := fields[name]; got != want {
			t.Errorf("%s: %v, want %v", name, got, want)
		}
	}
	if text := fmt.Sprint(fields); strings.Contains(text, "s3cr3t") || !strings.Contains(text, "key:#43.") {
		t.Error(text)
	}
}

// If another limit denies, or a store fails, a limit that allows has taken
// nothing.
func TestTokensOfARefusedRequest(t *testing.T) {
	const config = "limits: [{name: a, rate: 100/s}, {name: b, rate: 10/s}]"
	s, registry, _ := newServer(t, config, nil)
	for _, verdicts := range []said{{ok(50, 1, 1), no(0, time.Second, time.Second, 1)}, {ok(50, 1, 1), failed}} {
		s.store = verdicts
		if r, err := s.Check(t.Context(), checkOf()); err != nil || r.GetDeniedResponse() == nil {
			t.Errorf("%v, %v", r, err)
		}
	}
	want := `
# HELP sluice_tokens_taken_total Total number of tokens taken.
# TYPE sluice_tokens_taken_total counter
sluice_tokens_taken_total{limit="a"} 0
sluice_tokens_taken_total{limit="b"} 0
`
	if err := testutil.GatherAndCompare(registry, strings.NewReader(want), "sluice_tokens_taken_total"); err != nil {
		t.Error(err)
	}
}
