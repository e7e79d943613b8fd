package authz

import (
	"fmt"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/sluiceproxy/sluice/limiter"
	"github.com/sluiceproxy/sluice/limiter/policy"
)

// TestCheckByConfig checks what a config does besides charges: exemptions,
// limits without buckets, errors, and the limits of routes.
func TestCheckByConfig(t *testing.T) {
	const refused = `status 14
deny 503
` + unavailable + `metadata cost=null decision="invalid" key=null limit=null remaining=null shadow=[] source="none"
`
	const (
		isRefused = "config error: requests are refused (logged once)"
		isSkipped = "config error: the shadow limit is skipped (logged once)"
	)
	const allowed = `status 0
allow
client x-ratelimit-limit: 9
client x-ratelimit-remaining: 5
client x-ratelimit-reset: 1
metadata cost=1 decision="allowed" key="-" limit="b" remaining=5 shadow=[] source="redis"
`
	nothing := func(decision string) string {
		return "status 0\nallow\nmetadata cost=null decision=\"" + decision +
			"\" key=null limit=null remaining=null shadow=[] source=\"none\"\n"
	}
	five := said{ok(5, time.Second, 1)}
	for _, tt := range []struct {
		name, config string
		store        limiter.Store
		context      string // key=value
		want         string
		counted      string // a metric and its value, but for the prefix sluice_
		logged       string // the last line
	}{
		{
			"exempt", "{exempt: [{match: {paths: [/]}}], limits: [{name: a, rate: 1/s}]}", panics{}, "",
			nothing("exempt"), `checks_total{decision="exempt"} 1`, "",
		},
		{
			"exempt, whatever its route says", "{exempt: [{match: {paths: [/]}}]}", panics{}, "sluice.limit.a={}",
			nothing("exempt"), `checks_total{decision="exempt"} 1`, "",
		},
		{
			"unlimited", "limits: [{name: a, rate: unlimited}]", panics{}, "",
			nothing("allowed"), `limit_decisions_total{decision="allowed",limit="a"} 1`, "",
		},
		{
			"unlimited beside a limit", "limits: [{name: a, rate: unlimited}, {name: b, rate: 9/s}]", five, "",
			allowed, `limit_decisions_total{decision="allowed",limit="a"} 1`, "",
		},
		{
			"a limit's error",
			`limits: [{name: a, rate: 9/s, cost: 'int(request.path)'}, {name: b, rate: 9/s}]`, panics{}, "",
			refused, `config_mistakes_total{field="cost",limit="a"} 1`, isRefused,
		},
		{
			"an error, whatever on_failure says",
			`{on_failure: allow, limits: [{name: a, rate: 9/s, cost: 'int(request.path)'}]}`, panics{}, "",
			refused, `checks_total{decision="invalid"} 1`, isRefused,
		},
		{
			"a shadow limit's error",
			`limits: [{name: a, mode: shadow, rate: 9/s, cost: 'int(request.path)'}, {name: b, rate: 9/s}]`, five, "",
			allowed, `config_mistakes_total{field="cost",limit="a"} 1`, isSkipped,
		},
		{
			"a route's limit", "", five, "sluice.limit.b={rate: 9/s}",
			allowed, `limit_decisions_total{decision="allowed",limit="b"} 1`, "",
		},
		{
			"a route's error", "limits: [{name: b, rate: 9/s}]", panics{}, "sluice.limit.a={rate: 9}",
			refused, `config_mistakes_total{field="context_extensions",limit="a"} 1`, isRefused,
		},
		{
			"an unknown key", "limits: [{name: b, rate: 9/s}]", panics{}, "sluice.limit=a",
			refused, `config_mistakes_total{field="context_extensions",limit=""} 1`, isRefused,
		},
		{
			"a route's error in shadow mode",
			"{mode: shadow, limits: [{name: c, rate: 9/s}]}", said{ok(5, 1, 1)}, "sluice.limit.a={rate: 9}",
			nothing("allowed"), `config_mistakes_total{field="context_extensions",limit="a"} 1`, isSkipped,
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s, registry, logs := newServer(t, tt.config, tt.store)
			check := checkOf()
			if key, value, ok := strings.Cut(tt.context, "="); ok {
				check.Attributes.ContextExtensions = map[string]string{key: value}
			}
			if got := spell(s.Check(t.Context(), check)); got != tt.want {
				t.Errorf("got %s\nwant %s", got, tt.want)
			}
			if !counts(t, registry, "sluice_"+tt.counted) {
				t.Errorf("no %s", tt.counted)
			}
			last := ""
			if all := logs.All(); len(all) > 0 {
				last = all[len(all)-1].Message
			}
			if last != tt.logged {
				t.Errorf("logged %q, want %q", last, tt.logged)
			}
		})
	}
}

// counts reports whether /metrics has a line.
func counts(t *testing.T, registry *prometheus.Registry, line string) bool {
	t.Helper()
	return strings.Contains(scrape(registry), line+"\n")
}

func scrape(registry *prometheus.Registry) string {
	recorder := httptest.NewRecorder()
	request := httptest.NewRequest("GET", "/metrics", nil)
	promhttp.HandlerFor(registry, promhttp.HandlerOpts{}).ServeHTTP(recorder, request)
	return recorder.Body.String()
}

// A new config is in force from the next check on, and no check mixes two.
func TestSetConfig(t *testing.T) {
	version := func(n int) *policy.Config {
		return configOf(t, fmt.Sprintf("{failure_status: %d, headers: [retry-after], "+
			"limits: [{name: l%[1]d, rate: 1/s, key: client.ip}]}", n))
	}
	configs := []*policy.Config{version(501), version(502)}
	s, registry, _ := newServer(t, "", said{failed})
	s.SetConfig(configs[0])
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 500 {
				r, err := s.Check(t.Context(), checkOf())
				if code := int(r.GetDeniedResponse().GetStatus().GetCode()); err != nil || code != 501 && code != 502 {
					t.Errorf("%d, %v", code, err)
				}
			}
		})
	}
	for i := range 500 {
		s.SetConfig(configs[i%2])
	}
	wg.Wait()
	if r, _ := s.Check(t.Context(), checkOf()); r.GetDeniedResponse().GetStatus().GetCode() != 502 {
		t.Errorf("%v", r)
	}
	if !counts(t, registry, `sluice_rejections_total{limit="l502"} 0`) ||
		counts(t, registry, `sluice_rejections_total{limit="l501"} 0`) {
		t.Error("the metrics are not those of the limits in force")
	}
}

// Limits past the bounds, of the config and of Envoy's routes, are counted
// together.
func TestNamesAreBounded(t *testing.T) {
	s, registry, _ := newServer(t, "", nil)
	config := s.config.Load()
	count := func(name string, shadow bool) {
		l := &limiter.Limit{Name: name, Shadow: shadow}
		s.report.charged(s.report.limits.forLimit(config, l), &limiter.Charge{Limit: l, Bucket: bucketOf(t), Cost: 1},
			&limiter.Verdict{Source: limiter.RedisSource}, true, time.Now())
	}
	var many []*limiter.Limit
	for i := range maxConfigLimits + 1 {
		many = append(many, &limiter.Limit{Name: fmt.Sprint("l", i)})
	}
	s.report.limits.setLimits(many)
	count(many[maxConfigLimits].Name, false)
	for i := range maxRouteLimits - 1 {
		count(fmt.Sprint("route-", i), false)
	}
	for i := range 3 {
		count(fmt.Sprint("late-", i), false)
		count(fmt.Sprint("late-", i), true)
	}
	text := scrape(registry)
	for _, want := range []string{
		`sluice_rejections_total{limit="_other"} 4`,
		`sluice_limit_decisions_total{decision="shadow_limited",limit="_other"} 3`,
		`sluice_rejections_total{limit="route-1998"} 1`,
	} {
		if !strings.Contains(text, want+"\n") {
			t.Errorf("no %s", want)
		}
	}
	if n := len(s.Limits()); n != maxConfigLimits+maxRouteLimits+1 { // and the shared shadow
		t.Errorf("%d names", n)
	}
	for i := range maxLoggedMistakes + 10 {
		s.report.mistaken(&policy.RuleError{Limit: fmt.Sprint("late-", i), Field: "cost", Err: errNoHTTP})
	}
	if !counts(t, registry, `sluice_config_mistakes_total{field="cost",limit="_other"} 10`) ||
		len(s.report.loggedMistakes) != maxLoggedMistakes {
		t.Errorf("%d mistakes logged", len(s.report.loggedMistakes))
	}
}

func bucketOf(t testing.TB) limiter.Bucket {
	t.Helper()
	b, err := limiter.NewBucket(1, time.Second, 1)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func noEnv(string) (string, bool) { return "", false }
