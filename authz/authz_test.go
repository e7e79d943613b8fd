package authz

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"go.uber.org/zap"
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
	return limiter.Verdict{
		Allowed: true, Source: limiter.RedisSource,
		Remaining: remaining, FullAfter: full, NextAfter: next,
	}
}

func no(remaining int64, retry, full, next time.Duration) limiter.Verdict {
	return limiter.Verdict{
		Source:    limiter.RedisSource,
		Remaining: remaining, RetryAfter: retry, FullAfter: full, NextAfter: next,
	}
}

var failed = limiter.Verdict{Err: &limiter.StoreError{Kind: limiter.KindTimeout, Err: errors.New("late")}}

// newServer returns a server with a config and a store, its metrics and its
// log.
func newServer(
	t testing.TB, config string, store limiter.Store,
) (*Server, *prometheus.Registry, *observer.ObservedLogs) {
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
	socket := &corev3.SocketAddress{Address: ip, PortSpecifier: &corev3.SocketAddress_PortValue{PortValue: port}}
	return &authv3.AttributeContext_Peer{
		Address: &corev3.Address{Address: &corev3.Address_SocketAddress{SocketAddress: socket}},
	}
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
			if h.GetAppendAction() != corev3.HeaderValueOption_OVERWRITE_IF_EXISTS_OR_ADD || h.GetAppend() != nil ||
				h.GetHeader().GetRawValue() != nil {
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

// unavailable is what spell writes of a refusal, after its status.
const unavailable = `client retry-after: 7
client content-type: application/problem+json
body {"title":"Rate Limiter Unavailable","status":503,"detail":"The rate limiter is temporarily unavailable.",` +
	`"retry_after":7}
`

// failedClosed is what spell writes of the metadata of a check that no store
// answered.
const failedClosed = `metadata cost=null decision="failed_closed" ` +
	`key=null limit=null remaining=null shadow=[] source="none"
`

// exceeded returns what spell writes of the body of a denial.
func exceeded(limit string, seconds int) string {
	return fmt.Sprintf(`client content-type: application/problem+json
body {"title":"Too Many Requests","status":429,"detail":"Rate limit \"%s\" exceeded. Retry in %d s.",`+
		`"limit":"%[1]s","retry_after":%[2]d}
`, limit, seconds)
}

// limited returns what spell writes of the metadata of a denial by the limit orders
// in Redis.
func limited(seconds int) string {
	return fmt.Sprintf(
		`metadata cost=1 decision="limited" key="-" limit="orders" remaining=0 retry_after=%d shadow=[] source="redis"
`, seconds)
}

func TestCheck(t *testing.T) {
	limitedHTTP := `status 8
deny 429
client x-envoy-ratelimited: true
` + exceeded("orders", 1) + limited(1)
	limitedWeb := `status 8
deny 429
client x-envoy-ratelimited: true
client grpc-status: 8
client grpc-message: Rate limit "orders" exceeded. Retry in 1 s.
` + exceeded("orders", 1) + limited(1)
	const (
		one    = "limits: [{name: orders, rate: 100/m, burst: 100}]"
		two    = "limits: [{name: orders, rate: 100/m}, {name: per-client, rate: 1/s, burst: 10, key: client.ip}]"
		shadow = "limits: [{name: a, rate: 1/s, mode: shadow}, {name: b, rate: 1/s, mode: shadow}, " +
			"{name: orders, rate: 100/m}]"
	)
	for _, tt := range []struct {
		name   string
		config string
		store  limiter.Store
		check  *authv3.CheckRequest
		want   string
	}{
		{"none", `
headers: [x-ratelimit, retry-after, ratelimit]
limits: [{name: orders, rate: 1/s}, {name: gone, rate: none}, {name: s, rate: none, mode: shadow}]`,
			panics{}, checkOf(), `status 8
deny 429
client x-envoy-ratelimited: true
client content-type: application/problem+json
body {"title":"Too Many Requests","status":429,"detail":"Rate limit \"gone\" does not allow this request.","limit":"gone"}
metadata cost=1 decision="limited" key="-" limit="gone" remaining=0 shadow=[s] shadow_keys=[-] source="none"
`},
		{"none in the shadow", "limits: [{name: s, rate: none, mode: shadow}]", panics{}, checkOf(), `status 0
allow
upstream x-sluice-shadow: s
metadata cost=null decision="allowed" key=null limit=null remaining=null shadow=[s] shadow_keys=[-] source="none"
`},
		{"no limit applies", "", said{}, checkOf(), `status 0
allow
metadata cost=null decision="unmatched" key=null limit=null remaining=null shadow=[] source="none"
`},
		{"allowed", one, said{ok(50, 30*time.Second, 600*time.Millisecond)}, checkOf(), `status 0
allow
client x-ratelimit-limit: 100
client x-ratelimit-remaining: 50
client x-ratelimit-reset: 30
metadata cost=1 decision="allowed" key="-" limit="orders" remaining=50 shadow=[] source="redis"
`},
		{"the reset is rounded up", one, said{ok(50, 29*time.Second+time.Microsecond, 0)}, checkOf(), `status 0
allow
client x-ratelimit-limit: 100
client x-ratelimit-remaining: 50
client x-ratelimit-reset: 30
metadata cost=1 decision="allowed" key="-" limit="orders" remaining=50 shadow=[] source="redis"
`},
		{"limited", one, said{no(0, 2*time.Second+1, time.Minute, 1)}, checkOf(), `status 8
deny 429
client x-envoy-ratelimited: true
client x-ratelimit-limit: 100
client x-ratelimit-remaining: 0
client x-ratelimit-reset: 60
client retry-after: 3
` + exceeded("orders", 3) + limited(3)},
		{"limited for a moment", one, said{no(0, time.Microsecond, time.Minute, 1)}, checkOf(), `status 8
deny 429
client x-envoy-ratelimited: true
client x-ratelimit-limit: 100
client x-ratelimit-remaining: 0
client x-ratelimit-reset: 60
client retry-after: 1
` + exceeded("orders", 1) + limited(1)},
		{"limited for ever", one, said{no(100, limiter.Never, 0, 0)}, checkOf(), `status 8
deny 429
client x-envoy-ratelimited: true
client x-ratelimit-limit: 100
client x-ratelimit-remaining: 100
client x-ratelimit-reset: 0
client content-type: application/problem+json
body {"title":"Too Many Requests","status":429,"detail":` +
			`"Rate limit \"orders\" does not allow this request.","limit":"orders"}
metadata cost=1 decision="limited" key="-" limit="orders" remaining=100 shadow=[] source="redis"
`},
		{"a gRPC call is limited", one, said{no(0, time.Second, time.Minute, 1)},
			checkOf("content-type", "application/grpc+proto"), `status 8
deny 429
client x-envoy-ratelimited: true
client x-ratelimit-limit: 100
client x-ratelimit-remaining: 0
client x-ratelimit-reset: 60
client retry-after: 1
client grpc-status: 8
body Rate limit "orders" exceeded. Retry in 1 s.
metadata cost=1 decision="limited" key="-" limit="orders" remaining=0 retry_after=1 shadow=[] source="redis"
`},
		{"a gRPC-Web call is limited", "headers: []\n" + one, said{no(0, time.Second, time.Minute, 1)},
			checkOf("content-type", "application/grpc-web+proto"), limitedWeb},
		{"a gRPC-Web call in text is limited", "headers: []\n" + one, said{no(0, time.Second, time.Minute, 1)},
			checkOf("content-type", "application/grpc-web-text", "x-grpc-web", "1"), limitedWeb},
		{"a gRPC-Web call is limited after the grpc_web filter", one, said{no(0, time.Second, time.Minute, 1)},
			checkOf("content-type", "application/grpc", "x-grpc-web", "1"), `status 8
deny 200
client x-envoy-ratelimited: true
client x-ratelimit-limit: 100
client x-ratelimit-remaining: 0
client x-ratelimit-reset: 60
client retry-after: 1
client grpc-status: 8
client grpc-message: Rate limit "orders" exceeded. Retry in 1 s.
body 
` + limited(1)},
		{"x-grpc-web without gRPC is HTTP", "headers: []\n" + one, said{no(0, time.Second, time.Minute, 1)},
			checkOf("content-type", "application/json", "x-grpc-web", "1"), limitedHTTP},
		{"application/grpc-website is HTTP", "headers: []\n" + one, said{no(0, time.Second, time.Minute, 1)},
			checkOf("content-type", "application/grpc-website"), limitedHTTP},
		{"of two that allow, the one with less left", two,
			said{ok(50, time.Second, 1), ok(4, 6*time.Second, 1)}, checkOf(), `status 0
allow
client x-ratelimit-limit: 10
client x-ratelimit-remaining: 4
client x-ratelimit-reset: 6
metadata cost=1 decision="allowed" key="=11.203.0.113.7" limit="per-client" remaining=4 shadow=[] source="redis"
`},
		{"of two that deny, the one that denies for longer", "headers: [retry-after]\n" + two,
			said{no(0, 9*time.Second, 60*time.Second, 1), no(0, time.Second, 10*time.Second, 1)}, checkOf(), `status 8
deny 429
client x-envoy-ratelimited: true
client retry-after: 9
` + exceeded("orders", 9) + limited(9)},
		{"the IETF's fields speak of all", "headers: [ratelimit]\n" + two,
			said{ok(100, 0, 0), ok(4, 6*time.Second, time.Second)}, checkOf(), `status 0
allow
client ratelimit-policy: "orders";q=100;w=60, "per-client";q=10;w=10
client ratelimit: "orders";r=100, "per-client";r=4;t=1
metadata cost=1 decision="allowed" key="=11.203.0.113.7" limit="per-client" remaining=4 shadow=[] source="redis"
`},
		{"shadow limits that would have denied", "headers: [ratelimit]\n" + shadow,
			said{
				no(0, time.Second, time.Second, 1), no(0, time.Second, time.Second, 1),
				ok(99, time.Second, time.Second),
			},
			checkOf("x-sluice-shadow", "forged", "x-sluice-other", "forged"), `status 0
allow
upstream x-sluice-shadow: a,b
remove x-sluice-other
client ratelimit-policy: "orders";q=100;w=60
client ratelimit: "orders";r=99;t=1
metadata cost=1 decision="allowed" key="-" limit="orders" remaining=99 shadow=[a b] shadow_keys=[- -] source="redis"
`},
		{"what a client says to sluice", "headers: []\n" + shadow,
			said{ok(0, 1, 1), ok(0, 1, 1), ok(99, 1, 1)}, checkOf("x-sluice-shadow", "forged"), `status 0
allow
remove x-sluice-shadow
metadata cost=1 decision="allowed" key="-" limit="orders" remaining=99 shadow=[] source="redis"
`},
		{"nothing but shadow, and the store does not answer", "mode: shadow\n" + one, said{failed}, checkOf(), `status 0
allow
metadata cost=null decision="allowed" key=null limit=null remaining=null shadow=[] source="none"
`},
		{"failed closed", one, said{failed}, checkOf(), `status 14
deny 503
` + unavailable + failedClosed},
		{"failed closed, by another status", "failure_status: 502\n" + one, said{failed}, checkOf(), `status 14
deny 502
` + strings.Replace(unavailable, "503", "502", 1) + failedClosed},
		{"failed closed, for a gRPC call", one, said{failed}, checkOf("content-type", "application/grpc"), `status 14
deny 503
client retry-after: 7
client grpc-status: 14
body The rate limiter is temporarily unavailable.
metadata cost=null decision="failed_closed" key=null limit=null remaining=null shadow=[] source="none"
`},
		{"failed closed, for a gRPC-Web call", one, said{failed}, checkOf("content-type", "application/grpc-web"),
			`status 14
deny 503
` + strings.Replace(unavailable, "client content-type", `client grpc-status: 14
client grpc-message: The rate limiter is temporarily unavailable.
client content-type`, 1) + failedClosed},
		{"failed closed, for a gRPC-Web call after the grpc_web filter", one, said{failed},
			checkOf("content-type", "application/grpc", "x-grpc-web", "1"), `status 14
deny 200
client retry-after: 7
client grpc-status: 14
client grpc-message: The rate limiter is temporarily unavailable.
body 
metadata cost=null decision="failed_closed" key=null limit=null remaining=null shadow=[] source="none"
`},
		{"failed closed beside a limit that allows: no x-ratelimit", two,
			said{ok(3, 1, 1), failed}, checkOf(), `status 14
deny 503
` + unavailable + `metadata cost=1 decision="failed_closed" key="-" limit="orders" remaining=3 shadow=[] source="redis"
`},
		{"failed open", "on_failure: allow\n" + one, said{failed}, checkOf(), `status 0
allow
metadata cost=null decision="failed_open" key=null limit=null remaining=null shadow=[] source="none"
`},
		{"left to Envoy", "on_failure: delegate\n" + one, said{failed}, checkOf(), "error Unavailable\n"},
		{"a panic", one, panics{}, checkOf(), `status 14
deny 503
` + unavailable + failedClosed},
		{"an error in the config", `limits: [{name: a, rate: 1/s, key: 'request.path.split("?")[1]'}]`,
			said{}, checkOf(), `status 14
deny 503
` + unavailable + `metadata cost=null decision="invalid" key=null limit=null remaining=null shadow=[] source="none"
`},
		{"no HTTP in it", one, said{}, &authv3.CheckRequest{}, `status 14
deny 503
` + unavailable + `metadata cost=null decision="invalid" key=null limit=null remaining=null shadow=[] source="none"
`},
		{"nothing at all", one, said{}, nil, `status 14
deny 503
` + unavailable + `metadata cost=null decision="invalid" key=null limit=null remaining=null shadow=[] source="none"
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
	if len(sourceNames) != int(limiter.BlockSource)+1 {
		t.Errorf("%d names of sources", len(sourceNames))
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
	canceled := limiter.Verdict{Err: &limiter.StoreError{Kind: limiter.KindOther, Err: context.Canceled}}
	s, registry, logs := newServer(t, "limits: [{name: a, rate: 1/s}]", said{canceled})
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := s.Check(ctx, checkOf()); status.Code(err) != codes.Canceled {
		t.Error(err)
	}
	count, denials := testutil.ToFloat64(s.report.checks[limiter.Canceled]), s.report.denials.list()
	if count != 1 || logs.Len() != 0 || len(denials) != 0 {
		t.Errorf("%v canceled; logged %v; denials %v", count, logs.All(), denials)
	}
	if n, err := testutil.GatherAndCount(registry, "sluice_checks_total"); err != nil || n != len(limiter.Outcomes) {
		t.Errorf("%d decisions, %v", n, err)
	}
}
