package authz

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/sluiceproxy/sluice/limiter"
	"github.com/sluiceproxy/sluice/limiter/policy"
)

// said is a store that answers with the given verdicts, in the order of the
// charges.
type said []limiter.Verdict

func (s said) Take(_ context.Context, _ []limiter.Charge, verdicts []limiter.Verdict) {
	copy(verdicts, s)
}

// panics is a store that panics.
type panics struct{}

func (panics) Take(context.Context, []limiter.Charge, []limiter.Verdict) {
	panic("the client's secret")
}

func ok(remaining int64, full, next time.Duration) limiter.Verdict {
	return limiter.Verdict{Allowed: true, Source: limiter.RedisSource, Remaining: remaining, FullAfter: full, NextAfter: next}
}

func no(remaining int64, retry, full, next time.Duration) limiter.Verdict {
	return limiter.Verdict{Source: limiter.RedisSource, Remaining: remaining, RetryAfter: retry, FullAfter: full, NextAfter: next}
}

var failed = limiter.Verdict{Err: &limiter.StoreError{Kind: limiter.KindTimeout, Err: errors.New("late")}}

// newServer returns a server with a config and a store, its metrics and its
// log.
func newServer(t testing.TB, config string, store limiter.Store) (*Server, *prometheus.Registry, *observer.ObservedLogs) {
	t.Helper()
	c := configOf(t, config)
	core, logs := observer.New(zap.DebugLevel)
	registry := prometheus.NewRegistry()
	s := New(Options{Config: c, Store: store, Log: zap.New(core), Metrics: registry})
	s.jitter = func() int { return 7 }
	return s, registry, logs
}

func configOf(t testing.TB, config string) *policy.Config {
	t.Helper()
	c, err := policy.Parse("test.yaml", []byte(config), noEnv)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// checkOf returns a check of GET / with headers, given as name, value, name,
// value.
func checkOf(headers ...string) *authv3.CheckRequest {
	all := map[string]string{}
	for i := 0; i < len(headers); i += 2 {
		all[headers[i]] = headers[i+1]
	}
	return &authv3.CheckRequest{Attributes: &authv3.AttributeContext{
		Source: address("203.0.113.7", 5000),
		Request: &authv3.AttributeContext_Request{Http: &authv3.AttributeContext_HttpRequest{
			Method: "GET", Path: "/", Host: "shop.example.com", Scheme: "https", Protocol: "HTTP/2", Headers: all,
		}},
	}}
}

func address(ip string, port uint32) *authv3.AttributeContext_Peer {
	return &authv3.AttributeContext_Peer{Address: &corev3.Address{Address: &corev3.Address_SocketAddress{SocketAddress: &corev3.SocketAddress{
		Address: ip, PortSpecifier: &corev3.SocketAddress_PortValue{PortValue: port},
	}}}}
}

// spell writes an answer as text, one line for each part.
func spell(r *authv3.CheckResponse, err error) string {
	if err != nil {
		return "error " + status.Code(err).String() + "\n"
	}
	var b strings.Builder
	say := func(what string, headers []*corev3.HeaderValueOption) {
		for _, h := range headers {
			fmt.Fprintf(&b, "%s %s: %s", what, h.GetHeader().GetKey(), h.GetHeader().GetValue())
			//nolint:staticcheck // the deprecated field is over append_action in Envoy, so it must not be there
			if h.GetAppendAction() != corev3.HeaderValueOption_OVERWRITE_IF_EXISTS_OR_ADD || h.GetAppend() != nil || h.GetHeader().GetRawValue() != nil {
				b.WriteString(" (not overwriting)")
			}
			b.WriteString("\n")
		}
	}
	fmt.Fprintf(&b, "status %d\n", r.GetStatus().GetCode())
	if o := r.GetOkResponse(); o != nil {
		b.WriteString("allow\n")
		say("upstream", o.GetHeaders())
		for _, name := range o.GetHeadersToRemove() {
			b.WriteString("remove " + name + "\n")
		}
		say("client", o.GetResponseHeadersToAdd())
	}
	if d := r.GetDeniedResponse(); d != nil {
		fmt.Fprintf(&b, "deny %d\n", d.GetStatus().GetCode())
		say("client", d.GetHeaders())
		b.WriteString("body " + d.GetBody() + "\n")
	}
	names := make([]string, 0, 7)
	for name := range r.GetDynamicMetadata().GetFields() {
		names = append(names, name)
	}
	slices.Sort(names)
	b.WriteString("metadata")
	for _, name := range names {
		b.WriteString(" " + name + "=")
		switch v := r.GetDynamicMetadata().GetFields()[name].GetKind().(type) {
		case *structpb.Value_StringValue:
			b.WriteString(strconv.Quote(v.StringValue))
		case *structpb.Value_NumberValue:
			b.WriteString(strconv.FormatFloat(v.NumberValue, 'f', -1, 64))
		case *structpb.Value_ListValue:
			fmt.Fprint(&b, v.ListValue.AsSlice())
		case *structpb.Value_NullValue:
			b.WriteString("null")
		}
	}
	return b.String() + "\n"
}

func TestCheck(t *testing.T) {
	const (
		one    = "limits: [{name: orders, rate: 100/m, burst: 100}]"
		two    = "limits: [{name: orders, rate: 100/m}, {name: per-client, rate: 1/s, burst: 10, key: client.ip}]"
		shadow = "limits: [{name: a, rate: 1/s, mode: shadow}, {name: b, rate: 1/s, mode: shadow}, {name: orders, rate: 100/m}]"
	)
	for _, tt := range []struct {
		name   string
		config string
		store  limiter.Store
		check  *authv3.CheckRequest
		want   string
	}{
		{"no limit applies", "", said{}, checkOf(), `status 0
allow
metadata cost=null decision="unmatched" limit=null remaining=null shadow=[] source="none"
`},
		{"allowed", one, said{ok(50, 30*time.Second, 600*time.Millisecond)}, checkOf(), `status 0
allow
client x-ratelimit-limit: 100
client x-ratelimit-remaining: 50
client x-ratelimit-reset: 30
metadata cost=1 decision="allowed" limit="orders" remaining=50 shadow=[] source="redis"
`},
		{"the reset is rounded up", one, said{ok(50, 29*time.Second+time.Microsecond, 0)}, checkOf(), `status 0
allow
client x-ratelimit-limit: 100
client x-ratelimit-remaining: 50
client x-ratelimit-reset: 30
metadata cost=1 decision="allowed" limit="orders" remaining=50 shadow=[] source="redis"
`},
		{"limited", one, said{no(0, 2*time.Second+1, time.Minute, 1)}, checkOf(), `status 8
deny 429
client x-envoy-ratelimited: true
client x-ratelimit-limit: 100
client x-ratelimit-remaining: 0
client x-ratelimit-reset: 60
client retry-after: 3
client content-type: application/problem+json
body {"title":"Too Many Requests","status":429,"detail":"Rate limit \"orders\" exceeded. Retry in 3 s.","limit":"orders","retry_after":3}
metadata cost=1 decision="limited" limit="orders" remaining=0 retry_after=3 shadow=[] source="redis"
`},
		{"limited for a moment", one, said{no(0, time.Microsecond, time.Minute, 1)}, checkOf(), `status 8
deny 429
client x-envoy-ratelimited: true
client x-ratelimit-limit: 100
client x-ratelimit-remaining: 0
client x-ratelimit-reset: 60
client retry-after: 1
client content-type: application/problem+json
body {"title":"Too Many Requests","status":429,"detail":"Rate limit \"orders\" exceeded. Retry in 1 s.","limit":"orders","retry_after":1}
metadata cost=1 decision="limited" limit="orders" remaining=0 retry_after=1 shadow=[] source="redis"
`},
		{"limited for ever", one, said{no(100, limiter.Never, 0, 0)}, checkOf(), `status 8
deny 429
client x-envoy-ratelimited: true
client x-ratelimit-limit: 100
client x-ratelimit-remaining: 100
client x-ratelimit-reset: 0
client content-type: application/problem+json
body {"title":"Too Many Requests","status":429,"detail":"Rate limit \"orders\" does not allow this request.","limit":"orders"}
metadata cost=1 decision="limited" limit="orders" remaining=100 shadow=[] source="redis"
`},
		{"a gRPC call is limited", one, said{no(0, time.Second, time.Minute, 1)}, checkOf("content-type", "application/grpc+proto"), `status 8
deny 429
client x-envoy-ratelimited: true
client x-ratelimit-limit: 100
client x-ratelimit-remaining: 0
client x-ratelimit-reset: 60
client retry-after: 1
client grpc-status: 8
body Rate limit "orders" exceeded. Retry in 1 s.
metadata cost=1 decision="limited" limit="orders" remaining=0 retry_after=1 shadow=[] source="redis"
`},
		{"gRPC-Web is HTTP", "headers: []\n" + one, said{no(0, time.Second, time.Minute, 1)}, checkOf("content-type", "application/grpc-web+proto"), `status 8
deny 429
client x-envoy-ratelimited: true
client content-type: application/problem+json
body {"title":"Too Many Requests","status":429,"detail":"Rate limit \"orders\" exceeded. Retry in 1 s.","limit":"orders","retry_after":1}
metadata cost=1 decision="limited" limit="orders" remaining=0 retry_after=1 shadow=[] source="redis"
`},
		{"of two that allow, the one with less left", two, said{ok(50, time.Second, 1), ok(4, 6*time.Second, 1)}, checkOf(), `status 0
allow
client x-ratelimit-limit: 10
client x-ratelimit-remaining: 4
client x-ratelimit-reset: 6
metadata cost=1 decision="allowed" limit="per-client" remaining=4 shadow=[] source="redis"
`},
		{"of two that deny, the one that denies for longer", "headers: [retry-after]\n" + two, said{no(0, 9*time.Second, 60*time.Second, 1), no(0, time.Second, 10*time.Second, 1)}, checkOf(), `status 8
deny 429
client x-envoy-ratelimited: true
client retry-after: 9
client content-type: application/problem+json
body {"title":"Too Many Requests","status":429,"detail":"Rate limit \"orders\" exceeded. Retry in 9 s.","limit":"orders","retry_after":9}
metadata cost=1 decision="limited" limit="orders" remaining=0 retry_after=9 shadow=[] source="redis"
`},
		{"the IETF's fields speak of all", "headers: [ratelimit]\n" + two, said{ok(100, 0, 0), ok(4, 6*time.Second, time.Second)}, checkOf(), `status 0
allow
client ratelimit-policy: "orders";q=100;w=60, "per-client";q=10;w=10
client ratelimit: "orders";r=100, "per-client";r=4;t=1
metadata cost=1 decision="allowed" limit="per-client" remaining=4 shadow=[] source="redis"
`},
		{"shadow limits that would have denied", "headers: [ratelimit]\n" + shadow, said{no(0, time.Second, time.Second, 1), no(0, time.Second, time.Second, 1), ok(99, time.Second, time.Second)},
			checkOf("x-sluice-shadow", "forged", "x-sluice-other", "forged"), `status 0
allow
upstream x-sluice-shadow: a,b
remove x-sluice-other
client ratelimit-policy: "orders";q=100;w=60
client ratelimit: "orders";r=99;t=1
metadata cost=1 decision="allowed" limit="orders" remaining=99 shadow=[a b] source="redis"
`},
		{"what a client says to sluice", "headers: []\n" + shadow, said{ok(0, 1, 1), ok(0, 1, 1), ok(99, 1, 1)}, checkOf("x-sluice-shadow", "forged"), `status 0
allow
remove x-sluice-shadow
metadata cost=1 decision="allowed" limit="orders" remaining=99 shadow=[] source="redis"
`},
		{"nothing but shadow, and the store does not answer", "mode: shadow\n" + one, said{failed}, checkOf(), `status 0
allow
metadata cost=null decision="allowed" limit=null remaining=null shadow=[] source="none"
`},
		{"failed closed", one, said{failed}, checkOf(), `status 14
deny 503
client retry-after: 7
client content-type: application/problem+json
body {"title":"Rate Limiter Unavailable","status":503,"detail":"The rate limiter is temporarily unavailable.","retry_after":7}
metadata cost=null decision="failed_closed" limit=null remaining=null shadow=[] source="none"
`},
		{"failed closed, by another status", "failure_status: 502\n" + one, said{failed}, checkOf(), `status 14
deny 502
client retry-after: 7
client content-type: application/problem+json
body {"title":"Rate Limiter Unavailable","status":502,"detail":"The rate limiter is temporarily unavailable.","retry_after":7}
metadata cost=null decision="failed_closed" limit=null remaining=null shadow=[] source="none"
`},
		{"failed closed, for a gRPC call", one, said{failed}, checkOf("content-type", "application/grpc"), `status 14
deny 503
client retry-after: 7
client grpc-status: 14
body The rate limiter is temporarily unavailable.
metadata cost=null decision="failed_closed" limit=null remaining=null shadow=[] source="none"
`},
		{"failed closed beside a limit that allows: no x-ratelimit", two, said{ok(3, 1, 1), failed}, checkOf(), `status 14
deny 503
client retry-after: 7
client content-type: application/problem+json
body {"title":"Rate Limiter Unavailable","status":503,"detail":"The rate limiter is temporarily unavailable.","retry_after":7}
metadata cost=1 decision="failed_closed" limit="orders" remaining=3 shadow=[] source="redis"
`},
		{"failed open", "on_failure: allow\n" + one, said{failed}, checkOf(), `status 0
allow
metadata cost=null decision="failed_open" limit=null remaining=null shadow=[] source="none"
`},
		{"left to Envoy", "on_failure: delegate\n" + one, said{failed}, checkOf(), "error Unavailable\n"},
		{"a panic", one, panics{}, checkOf(), `status 14
deny 503
client retry-after: 7
client content-type: application/problem+json
body {"title":"Rate Limiter Unavailable","status":503,"detail":"The rate limiter is temporarily unavailable.","retry_after":7}
metadata cost=null decision="failed_closed" limit=null remaining=null shadow=[] source="none"
`},
		{"a mistake of the config", `limits: [{name: a, rate: 1/s, key: 'request.path.split("?")[1]'}]`, said{}, checkOf(), `status 14
deny 503
client retry-after: 7
client content-type: application/problem+json
body {"title":"Rate Limiter Unavailable","status":503,"detail":"The rate limiter is temporarily unavailable.","retry_after":7}
metadata cost=null decision="invalid" limit=null remaining=null shadow=[] source="none"
`},
		{"no HTTP in it", one, said{}, &authv3.CheckRequest{}, `status 14
deny 503
client retry-after: 7
client content-type: application/problem+json
body {"title":"Rate Limiter Unavailable","status":503,"detail":"The rate limiter is temporarily unavailable.","retry_after":7}
metadata cost=null decision="invalid" limit=null remaining=null shadow=[] source="none"
`},
		{"nothing at all", one, said{}, nil, `status 14
deny 503
client retry-after: 7
client content-type: application/problem+json
body {"title":"Rate Limiter Unavailable","status":503,"detail":"The rate limiter is temporarily unavailable.","retry_after":7}
metadata cost=null decision="invalid" limit=null remaining=null shadow=[] source="none"
`},
	} {
		s, _, logs := newServer(t, tt.config, tt.store)
		if got := spell(s.Check(t.Context(), tt.check)); got != tt.want {
			t.Errorf("%s\n got %s\nwant %s", tt.name, got, tt.want)
		}
		for _, l := range logs.All() {
			if strings.Contains(fmt.Sprint(l.Message, l.ContextMap()), "secret") {
				t.Errorf("%s: logged a secret: %v %v", tt.name, l.Message, l.ContextMap())
			}
		}
	}
}

func TestEveryOutcomeHasAClass(t *testing.T) {
	for _, o := range limiter.Outcomes {
		if int(o) >= len(classes) || classes[o].disposition == 0 {
			t.Errorf("%v has no class", o)
		}
	}
	if len(classes) != len(limiter.Outcomes) {
		t.Errorf("%d classes of %d outcomes", len(classes), len(limiter.Outcomes))
	}
	for source, name := range sourceNames {
		if name == "" {
			t.Errorf("source %d has no name", source)
		}
	}
	if len(sourceNames) != int(limiter.CeilingSource)+1 {
		t.Errorf("%d names of sources", len(sourceNames))
	}
}

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
# HELP sluice_panics_total Total number of checks that panicked and were refused.
# TYPE sluice_panics_total counter
sluice_panics_total 1
# HELP sluice_config_mistakes_total Total number of checks that revealed an error in the config, by limit and field.
# TYPE sluice_config_mistakes_total counter
sluice_config_mistakes_total{field="",limit=""} 2
`
	if err := testutil.GatherAndCompare(registry, strings.NewReader(want), "sluice_checks_total", "sluice_limit_decisions_total",
		"sluice_rejections_total", "sluice_tokens_taken_total", "sluice_panics_total", "sluice_config_mistakes_total"); err != nil {
		t.Error(err)
	}
	if n, err := testutil.GatherAndCount(registry, "sluice_check_seconds", "sluice_tokens_remaining_ratio"); err != nil || n != 3 {
		t.Errorf("%d histograms, %v", n, err)
	}

	var lines []string
	for _, l := range logs.All() {
		lines = append(lines, l.Level.String()+" "+l.Message)
	}
	if got, want := strings.Join(lines, "\n"), `info request limited
debug request limited
warn store error: timeout
error check panicked
error config error: requests are refused (logged once)`; got != want {
		t.Errorf("logged\n%s\nwant\n%s", got, want)
	}
	if got := fmt.Sprint(logs.All()[0].ContextMap()); got != "map[cost:1 decision:limited domain:default key:- limit:a remaining:0 request_id:id-1 retry_after:1 suppressed:0]" {
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
				got = append(got, fmt.Sprint(s.events.Load(), " left out ", suppressed))
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
	if got, want := strings.Join(got, ", "), "1 left out 0, 1001 left out 999, 2001 left out 999, 2102 left out 100, 2105 left out 2"; got != want {
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
	if rest := many.events.Load() - many.logged.Load(); logged.Load()+suppressed.Load()+rest != 40_000 || logged.Load() < 30 || logged.Load() > 41 {
		t.Errorf("%d logged, %d left out, %d since", logged.Load(), suppressed.Load(), rest)
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
			if got := fmt.Sprint(logs.All()[2].ContextMap()); got != "map[cost:1 decision:limited domain:default key:- limit:a remaining:0 suppressed:999]" {
				t.Error(got)
			}
		}
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

func TestRequestOf(t *testing.T) {
	full := checkOf("a", "1")
	full.Attributes.Source.Principal = "spiffe://a/b"
	full.Attributes.Destination = address("10.0.0.2", 8080)
	full.Attributes.ContextExtensions = map[string]string{"k": "v"}
	full.Attributes.Request.Http.Headers["content-length"] = "12"

	raw := checkOf()
	raw.Attributes.Request.Http.Headers = nil
	raw.Attributes.Request.Http.HeaderMap = &corev3.HeaderMap{Headers: []*corev3.HeaderValue{
		{Key: "X-Key", RawValue: []byte("a")}, {Key: "x-key", Value: "b"}, {Key: "x-other", RawValue: []byte{0xff}}, {Key: "Empty"}, {Key: "empty", Value: "c"},
	}}
	pipe := checkOf()
	pipe.Attributes.Source.Address = &corev3.Address{Address: &corev3.Address_Pipe{Pipe: &corev3.Pipe{Path: "/x"}}}
	bare := &authv3.CheckRequest{Attributes: &authv3.AttributeContext{Request: &authv3.AttributeContext_Request{Http: &authv3.AttributeContext_HttpRequest{}}}}

	for name, tt := range map[string]struct {
		check *authv3.CheckRequest
		want  string
	}{
		"full": {full, "GET https shop.example.com / HTTP/2 map[a:1 content-length:12] {203.0.113.7 5000 spiffe://a/b} {10.0.0.2 8080 } map[k:v]"},
		"raw":  {raw, "GET https shop.example.com / HTTP/2 map[empty:,c x-key:a,b x-other:\xff] {203.0.113.7 5000 } { 0 } map[]"},
		"pipe": {pipe, "GET https shop.example.com / HTTP/2 map[] { 0 } { 0 } map[]"},
		"bare": {bare, "     map[] { 0 } { 0 } map[]"},
	} {
		r, err := requestOf(tt.check)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		got := fmt.Sprint(r.Method, " ", r.Scheme, " ", r.Host, " ", r.Path, " ", r.Protocol, " ", r.Headers, " ", r.Source, " ", r.Destination, " ", r.Context)
		if got != tt.want {
			t.Errorf("%s\n got %q\nwant %q", name, got, tt.want)
		}
	}
	for i, check := range []*authv3.CheckRequest{nil, {}, {Attributes: &authv3.AttributeContext{}}, {Attributes: &authv3.AttributeContext{Request: &authv3.AttributeContext_Request{}}}} {
		if _, err := requestOf(check); !errors.Is(err, errNoHTTP) {
			t.Errorf("%d: %v", i, err)
		}
	}
}

func TestRequestID(t *testing.T) {
	for id, want := range map[string]string{
		"7f1f2a3b-5a0c-4a53-9d5a-0a3f5a9e3c11": "7f1f2a3b-5a0c-4a53-9d5a-0a3f5a9e3c11",
		"a\nb":                                 "",
		`"}`:                                   "",
		strings.Repeat("a", 65):                "",
		"":                                     "",
	} {
		if got := requestID(&policy.Request{Headers: map[string]string{"x-request-id": id}}); got != want {
			t.Errorf("%q: %q", id, got)
		}
	}
}

// A caller who has canceled gets an answer at once if the store needs no wait.
func TestCallerIsGone(t *testing.T) {
	s, _, _ := newServer(t, "limits: [{name: a, rate: 1/s}]", limiter.NewMemory(1<<20, nil, prometheus.NewRegistry()))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if r, err := s.Check(ctx, checkOf()); err != nil || codes.Code(r.GetStatus().GetCode()) != codes.OK {
		t.Error(r, err)
	}
}

// A check that the caller canceled before the store answered is counted as
// canceled. It is neither logged nor listed as a denial.
func TestCallerHungUp(t *testing.T) {
	s, registry, logs := newServer(t, "limits: [{name: a, rate: 1/s}]", said{{Err: &limiter.StoreError{Kind: limiter.KindOther, Err: context.Canceled}}})
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := s.Check(ctx, checkOf()); status.Code(err) != codes.Canceled {
		t.Error(err)
	}
	if n := testutil.ToFloat64(s.report.checks[limiter.Canceled]); n != 1 || logs.Len() != 0 || len(s.report.denials.list()) != 0 {
		t.Errorf("%v canceled; logged %v; denials %v", n, logs.All(), s.report.denials.list())
	}
	if n, err := testutil.GatherAndCount(registry, "sluice_checks_total"); err != nil || n != len(limiter.Outcomes) {
		t.Errorf("%d decisions, %v", n, err)
	}
}
