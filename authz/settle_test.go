package authz

import (
	"context"
	"fmt"
	"io"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	logdatav3 "github.com/envoyproxy/go-control-plane/envoy/data/accesslog/v3"
	logv3 "github.com/envoyproxy/go-control-plane/envoy/service/accesslog/v3"
	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/trace"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/sluiceproxy/sluice/limiter"
	"github.com/sluiceproxy/sluice/limiter/policy"
)

const settlingLimits = `
limits:
  - name: logins
    rate: 5/h
    settle: 'response.code >= 200 && response.code < 400 ? 0 : 1'
  - name: usage
    rate: 1000/h
    cost: 100
    settle: int(response.headers["x-usage"])
`

// settlingServer is a server in whose store nothing refills.
type settlingServer struct {
	*Server
	t       *testing.T
	metrics *prometheus.Registry
	checks  authv3.AuthorizationClient
	log     logv3.AccessLogService_StreamAccessLogsClient
	store   *limiter.Memory
}

func newSettlingServer(t *testing.T, config string) *settlingServer {
	return newTracedServer(t, config, nil)
}

func newTracedServer(t *testing.T, config string, tracer trace.Tracer) *settlingServer {
	s := &settlingServer{t: t, metrics: prometheus.NewRegistry()}
	s.store = limiter.NewMemory(1<<20, nil, prometheus.NewRegistry())
	s.Server = New(Options{
		Config: configOf(t, config), Store: s.store, Settler: s.store, Metrics: s.metrics, Tracer: tracer,
	})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { s.Run(ctx); close(done) }()
	conn := serve(t, s.Server, "tcp", "127.0.0.1:0")
	t.Cleanup(func() { cancel(); <-done })
	s.checks = authv3.NewAuthorizationClient(conn)
	var err error
	if s.log, err = logv3.NewAccessLogServiceClient(conn).StreamAccessLogs(t.Context()); err != nil {
		t.Fatal(err)
	}
	return s
}

// check returns the sealed text of an allowed check; empty if it is denied.
func (s *settlingServer) check() string {
	s.t.Helper()
	r, err := s.checks.Check(s.t.Context(), checkOf())
	if err != nil {
		s.t.Fatal(err)
	}
	return r.GetDynamicMetadata().GetFields()["settle"].GetStringValue()
}

// end sends the end of a request.
func (s *settlingServer) end(text string, code uint32, headers map[string]string) {
	s.t.Helper()
	metadata, err := structpb.NewStruct(map[string]any{"settle": text})
	if err != nil {
		s.t.Fatal(err)
	}
	s.send("sluice", &logdatav3.HTTPAccessLogEntry{
		CommonProperties: &logdatav3.AccessLogCommon{
			AccessLogType: logdatav3.AccessLogType_DownstreamEnd,
			Metadata: &corev3.Metadata{
				FilterMetadata: map[string]*structpb.Struct{"envoy.filters.http.ext_authz": metadata},
			},
		},
		Response: &logdatav3.HTTPResponseProperties{
			ResponseCode: wrapperspb.UInt32(code), ResponseHeaders: headers,
		},
	})
}

func (s *settlingServer) send(name string, entry *logdatav3.HTTPAccessLogEntry) {
	s.t.Helper()
	if err := s.log.Send(logOf(name, entry)); err != nil {
		s.t.Fatal(err)
	}
}

// logOf is a message of an access log of a name.
func logOf(name string, entries ...*logdatav3.HTTPAccessLogEntry) *logv3.StreamAccessLogsMessage {
	return &logv3.StreamAccessLogsMessage{
		Identifier: &logv3.StreamAccessLogsMessage_Identifier{LogName: name},
		LogEntries: &logv3.StreamAccessLogsMessage_HttpLogs{
			HttpLogs: &logv3.StreamAccessLogsMessage_HTTPAccessLogEntries{LogEntry: entries},
		},
	}
}

// counts waits until a metric has a value.
func (s *settlingServer) counts(name, labels string, want float64) {
	s.t.Helper()
	var got float64
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for late := time.Now().Add(10 * time.Second); time.Now().Before(late); <-tick.C {
		families, err := s.metrics.Gather()
		if err != nil {
			s.t.Fatal(err)
		}
		for _, f := range families {
			for _, m := range f.GetMetric() {
				var all []string
				for _, l := range m.GetLabel() {
					all = append(all, l.GetValue())
				}
				if f.GetName() == name && strings.Join(all, " ") == labels {
					got = m.GetCounter().GetValue()
				}
			}
		}
		if got == want {
			return
		}
	}
	s.t.Fatalf("%s of %s is %v, want %v", name, labels, got, want)
}

// left returns how many tokens two limits have.
func (s *settlingServer) left() string {
	s.t.Helper()
	draw := s.config.Load().Draw(&policy.Request{Method: "GET", Path: "/"})
	verdicts := make([]limiter.Verdict, len(draw.Charges))
	for i := range draw.Charges {
		draw.Charges[i].Cost = 0
	}
	s.store.ReadOnly().Take(s.t.Context(), draw.Charges, verdicts)
	return fmt.Sprint(verdicts[0].Remaining, " ", verdicts[0].Held, ", ", verdicts[1].Remaining, " ", verdicts[1].Held)
}

func (s *settlingServer) want(want string) {
	s.t.Helper()
	if got := s.left(); got != want {
		s.t.Errorf("left and held: %s; want %s", got, want)
	}
}

func TestSettlements(t *testing.T) {
	s := newSettlingServer(t, settlingLimits)
	first := s.check()
	s.want("4 1, 900 100")
	s.end(first, 200, map[string]string{"x-usage": "30"})
	s.counts("sluice_tokens_returned_total", "logins", 1)
	s.counts("sluice_tokens_returned_total", "usage", 70)
	s.want("5 0, 970 0")

	s.end(first, 200, nil) // again
	s.counts("sluice_settlements_total", "logins repeated", 1)
	s.end(s.check(), 401, map[string]string{"x-usage": "250"})
	s.counts("sluice_settlements_total", "logins unchanged", 1)
	s.counts("sluice_tokens_surcharged_total", "usage", 150)
	s.want("4 0, 720 0")

	s.end(s.check(), 0, nil) // the client hung up, and the header is absent
	s.counts("sluice_settlements_total", "usage unchanged", 1)
	s.want("3 0, 620 0")

	s.end(s.check(), 200, map[string]string{"x-usage": "many"})
	s.counts("sluice_settlements_total", "usage mistake", 1)
	s.want("3 0, 520 0")

	text := s.check()
	for i, forged := range []string{
		"x", text[:len(text)-1], text[:30] + "~" + text[31:], strings.Repeat("A", 5000), text + "AA",
	} {
		s.end(forged, 200, nil)
		s.counts("sluice_settlements_total", " forged", float64(i+1))
	}
	another := newSettlingServer(t, settlingLimits)
	another.end(text, 200, nil)
	another.counts("sluice_settlements_total", " forged", 1)
	s.want("2 1, 420 100")

	// What is not an end, and what another log says, settles nothing.
	s.send("another", endEntry(t, text, logdatav3.AccessLogType_DownstreamEnd))
	s.send("sluice", endEntry(t, text, logdatav3.AccessLogType_DownstreamStart))
	s.send("sluice", endEntry(t, text, logdatav3.AccessLogType_DownstreamPeriodic))
	s.send("sluice", endEntry(t, text, logdatav3.AccessLogType_DownstreamEnd))
	s.counts("sluice_settlements_total", "logins unchanged", 3)
	s.want("2 0, 420 0")
}

// A shadow limit settles, too.
func TestSettleShadow(t *testing.T) {
	s := newSettlingServer(t, "limits: [{name: shadow, rate: 5/h, cost: 3, mode: shadow, settle: 1}]")
	s.end(s.check(), 200, nil)
	s.counts("sluice_tokens_returned_total", "shadow", 2)
	s.counts("sluice_settlements_total", "shadow returned", 1)
}

// A quota settles, alone, beside a rate, and where only some keys have it.
func TestSettleQuota(t *testing.T) {
	s := newSettlingServer(t, `limits:
  - {name: alone, quota: 1000/year, cost: 3, settle: 1}
  - {name: both, rate: 5/h, quota: 1000/year, cost: 3, settle: 1}
  - {name: some, key: request.method, rate: 5/h, cost: 3, settle: 1, overrides: [{key: GET, quota: 1000/year}]}
`)
	s.end(s.check(), 200, nil)
	for _, limit := range []string{"alone", "both", "both/quota", "some"} {
		s.counts("sluice_tokens_returned_total", limit, 2)
		s.counts("sluice_settlements_total", limit+" returned", 1)
	}
	s.counts("sluice_settlements_total", "_other returned", 0)
}

// Another filter may put something else into metadata under the same key.
func TestSettleBesideOtherMetadata(t *testing.T) {
	s := newSettlingServer(t, settlingLimits)
	for _, name := range []string{"a", "z"} { // before and after the other in the order of names
		entry := endEntry(t, s.check(), logdatav3.AccessLogType_DownstreamEnd)
		entry.CommonProperties.Metadata.FilterMetadata[name] = &structpb.Struct{
			Fields: map[string]*structpb.Value{"settle": structpb.NewStringValue("later")},
		}
		s.send("sluice", entry)
	}
	s.counts("sluice_settlements_total", "logins unchanged", 2)
	s.counts("sluice_settlements_total", " forged", 0)
}

// scriptedLog is a stream of an access log that gives the messages of a channel.
type scriptedLog struct {
	grpc.ServerStream
	messages chan string
}

func (scriptedLog) SendHeader(metadata.MD) error { return nil }

func (l scriptedLog) RecvMsg(message any) error {
	wire, ok := <-l.messages
	if !ok {
		return io.EOF
	}
	message.(*rawLog).wire = wire
	return nil
}

// While the server drains, a log is read until it is quiet, or for a second.
func TestSettleWhileDraining(t *testing.T) {
	for _, tt := range []struct{ sends, ends time.Duration }{
		{500 * time.Millisecond, 500*time.Millisecond + 3*logQuiet}, {10 * time.Second, logDrain},
	} {
		synctest.Test(t, func(t *testing.T) {
			s, _, _ := newServer(t, "limits: [{name: a, rate: 10000/h, settle: 0}]",
				limiter.NewMemory(1<<20, nil, prometheus.NewRegistry()))
			s.Drain()
			log, ended := scriptedLog{messages: make(chan string)}, make(chan struct{})
			sent := make(chan int)
			go func() {
				n := 0
				defer func() { close(log.messages); sent <- n }()
				for end := time.Now().Add(tt.sends); time.Now().Before(end); time.Sleep(logQuiet / 2) {
					select {
					case log.messages <- anEnd(t, s):
						n++
					case <-ended:
						return
					}
				}
				<-ended
			}()
			began := time.Now()
			err := s.readLog(log)
			took := time.Since(began)
			close(ended)
			n := <-sent
			synctest.Wait() // until the last message has been read
			if len(s.settling.queue) != n || took < min(tt.sends, logDrain) || took > tt.ends ||
				status.Code(err) != codes.Unavailable {
				t.Errorf("%d of %d ends are settled, and the log ended after %v with %v", len(s.settling.queue), n, took, err)
			}
		})
	}
}

// anEnd is a message with the end of a request, whose check it makes.
func anEnd(t *testing.T, s *Server) string {
	t.Helper()
	answer, err := s.Check(t.Context(), checkOf())
	if err != nil {
		t.Error(err)
	}
	text := answer.GetDynamicMetadata().GetFields()[settleField].GetStringValue()
	wire, err := proto.Marshal(logOf(logName, endEntry(t, text, logdatav3.AccessLogType_DownstreamEnd)))
	if err != nil {
		t.Error(err)
	}
	return string(wire)
}

// panickingSettler is a store whose settlements panic.
type panickingSettler struct{}

func (panickingSettler) Settle(context.Context, []limiter.Settlement, []limiter.Settled) {
	panic("secret")
}

// A panic of a settlement, or while an entry is read, ends neither the process nor
// the stream.
func TestSettlementPanics(t *testing.T) {
	s := newSettlingServer(t, settlingLimits)
	s.settling.store = panickingSettler{}
	s.end(s.check(), 200, nil)
	s.counts("sluice_settlements_total", "logins failed", 1)
	s.counts("sluice_panics_total", "", 1)
	sealer := s.sealer
	wire, err := proto.Marshal(endEntry(t, s.check(), logdatav3.AccessLogType_DownstreamEnd))
	if err != nil {
		t.Fatal(err)
	}
	s.sealer = nil
	s.readEntry(string(wire))
	s.sealer = sealer
	s.counts("sluice_settlements_total", " failed", 1)
	s.counts("sluice_panics_total", "", 2)
}

// endEntry is an entry of a type with a sealed text.
func endEntry(t *testing.T, text string, of logdatav3.AccessLogType) *logdatav3.HTTPAccessLogEntry {
	t.Helper()
	metadata, err := structpb.NewStruct(map[string]any{"settle": text})
	if err != nil {
		t.Fatal(err)
	}
	return &logdatav3.HTTPAccessLogEntry{CommonProperties: &logdatav3.AccessLogCommon{
		AccessLogType: of,
		Metadata:      &corev3.Metadata{FilterMetadata: map[string]*structpb.Struct{"a-name-of-its-own": metadata}},
	}}
}

// spans collects ended spans.
type spans chan sdktrace.ReadOnlySpan

func (s spans) OnEnd(span sdktrace.ReadOnlySpan)              { s <- span }
func (spans) OnStart(context.Context, sdktrace.ReadWriteSpan) {}
func (spans) Shutdown(context.Context) error                  { return nil }
func (spans) ForceFlush(context.Context) error                { return nil }

// A settlement is a span with a link to that of the check.
func TestSettleSpan(t *testing.T) {
	ended := make(spans, 10)
	provider := sdktrace.NewTracerProvider(sdktrace.WithSpanProcessor(ended))
	s := newTracedServer(t, settlingLimits, provider.Tracer("test"))
	s.end(s.check(), 200, map[string]string{"x-usage": "30"})
	check, first, second := <-ended, <-ended, <-ended
	if check.Name() != "sluice check" {
		t.Fatalf("the first span is %s", check.Name())
	}
	for _, span := range []sdktrace.ReadOnlySpan{first, second} {
		links := span.Links()
		trace, id := check.SpanContext().TraceID(), check.SpanContext().SpanID()
		if span.Name() != "sluice settle" || len(links) != 1 || links[0].SpanContext.SpanID() != id ||
			span.SpanContext().TraceID() != trace || span.Parent().SpanID() != id {
			t.Errorf("%s with the links %v; the check is %v", span.Name(), links, check.SpanContext())
		}
	}
	if text := fmt.Sprint(second.Attributes()); !strings.Contains(text, "returned") {
		t.Error(text)
	}

	// Without a sampled check there is none, whatever the sampler of new traces
	// says.
	unsampled := metadata.NewOutgoingContext(t.Context(), metadata.Pairs("traceparent",
		"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00"))
	r, err := s.checks.Check(unsampled, checkOf())
	if err != nil {
		t.Fatal(err)
	}
	s.end(r.GetDynamicMetadata().GetFields()["settle"].GetStringValue(), 200, nil)
	s.counts("sluice_tokens_returned_total", "logins", 2)
	select {
	case span := <-ended:
		t.Errorf("%s", span.Name())
	default:
	}
}

// A limit that is gone when its request ends shares its series with others like
// it, and those of limits that settle exist from the start.
func TestSettleSeries(t *testing.T) {
	s := newSettlingServer(t, settlingLimits)
	series := func() (n int) {
		families, err := s.metrics.Gather()
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range families {
			for _, m := range f.GetMetric() {
				if l := m.GetLabel(); strings.Contains(f.GetName(), "settle") && l[0].GetValue() == "logins" {
					n++
				}
			}
		}
		return n
	}
	if n := series(); n != int(settleResults) {
		t.Errorf("%d series, want one for each result", n)
	}
	text := s.check()
	s.SetConfig(configOf(t, "limits: [{name: other, rate: 1/s, settle: 0}]"))
	s.end(text, 200, nil)
	s.counts("sluice_settlements_total", "_other unchanged", 2)
	if n := series(); n != 0 {
		t.Errorf("%d series of a limit that is gone", n)
	}
}

// What waits for the store is bounded by bytes and number.
func TestSettleQueue(t *testing.T) {
	s := newSettling(nil, newReport(zap.NewNop(), prometheus.NewRegistry()), nil)
	add := func(n, key int) {
		for range n {
			s.add(&ending{Settlement: limiter.Settlement{Limit: &limiter.Limit{Name: "a"}, Key: strings.Repeat("k", key)}})
		}
	}
	add(3, maxQueuedBytes/2-endingBytes)
	if len(s.queue) != 2 || s.queuedBytes.Load() != maxQueuedBytes {
		t.Errorf("%d queued, with %d bytes", len(s.queue), s.queuedBytes.Load())
	}
	s = newSettling(nil, s.report, nil)
	add(maxQueued+5, 10)
	if len(s.queue) != maxQueued || s.queuedBytes.Load() != (10+endingBytes)*maxQueued {
		t.Errorf("%d queued, with %d bytes", len(s.queue), s.queuedBytes.Load())
	}
}

// A denied request has nothing to settle, and the text of many limits is bounded.
func TestSettleText(t *testing.T) {
	s := newSettlingServer(t, "limits: [{name: a, rate: 1/h, settle: 0}, {name: b, rate: 1/h}]")
	if s.check() == "" || s.check() != "" {
		t.Error("want a text for the first check alone")
	}
	var many strings.Builder
	many.WriteString("limits:\n")
	for i := range 200 {
		fmt.Fprintf(&many, "  - {name: limit-%d, rate: 10/h, settle: 0}\n", i)
	}
	if text := newSettlingServer(t, many.String()).check(); len(text) > maxSealed || len(text) < maxSealed/2 {
		t.Errorf("a text of %d bytes", len(text))
	}
	if text := newSettlingServer(t, "limits: [{name: a, rate: 1/h}]").check(); text != "" {
		t.Errorf("%q, and nothing settles", text)
	}
}

// FuzzAccessLog checks that no message of an access log panics, allocates much,
// or settles what nobody sealed.
func FuzzAccessLog(f *testing.F) {
	metadata, err := structpb.NewStruct(map[string]any{"settle": "AYIIvyqvTXl9rFPwJTw26J09t6nTLga5FpS8"})
	if err != nil {
		f.Fatal(err)
	}
	entry := &logdatav3.HTTPAccessLogEntry{
		CommonProperties: &logdatav3.AccessLogCommon{
			AccessLogType: logdatav3.AccessLogType_DownstreamEnd,
			Metadata:      &corev3.Metadata{FilterMetadata: map[string]*structpb.Struct{"f": metadata}},
		},
		Response: &logdatav3.HTTPResponseProperties{ResponseHeaders: map[string]string{"x-usage": "5", "grpc-status": "-1"}},
	}
	wire, err := proto.Marshal(logOf(logName, entry, entry))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(wire)
	f.Add([]byte("\x0a\x08\x12\x06sluice\x12\x0a\x0a\x08\x0a\x06settle"))
	s, _, _ := newServer(f, settlingLimits, limiter.NewMemory(1<<20, nil, prometheus.NewRegistry()))
	s.report.log, s.report.throttled = zap.NewNop(), zap.NewNop()
	f.Fuzz(func(t *testing.T, wire []byte) {
		text := string(wire)
		log := accessLog{isOurs: true}
		if cost := allocates(func() { log.read(s, text) }); cost > 64<<10+300*len(wire) {
			t.Errorf("%d bytes are allocated for %d", cost, len(wire))
		}
		if len(s.settling.queue) > 0 {
			t.Errorf("%q settles something", wire)
		}
		if n := testutil.ToFloat64(s.report.panics); n != 0 {
			t.Fatal("it panicked")
		}
	})
}
