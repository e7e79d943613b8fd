package main

import (
	"context"
	"encoding/hex"
	"fmt"
	"io"
	"net"
	"net/http"
	"regexp"
	"strings"
	"sync"
	"testing"

	collectorv1 "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	commonv1 "go.opentelemetry.io/proto/otlp/common/v1"
	tracev1 "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	"github.com/sluiceproxy/sluice/limiter/redistest"
)

// collector receives spans by OTLP, over gRPC and over HTTP.
type collector struct {
	collectorv1.UnimplementedTraceServiceServer
	grpc, http string // addresses

	mu    sync.Mutex
	spans []span
}

type span struct {
	*tracev1.Span
	service string
}

func (c *collector) Export(
	_ context.Context,
	r *collectorv1.ExportTraceServiceRequest,
) (*collectorv1.ExportTraceServiceResponse, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, resource := range r.GetResourceSpans() {
		for _, scope := range resource.GetScopeSpans() {
			for _, s := range scope.GetSpans() {
				c.spans = append(c.spans, span{s, attributeOf(resource.GetResource().GetAttributes(), "service.name")})
			}
		}
	}
	return &collectorv1.ExportTraceServiceResponse{}, nil
}

// of returns the spans of a trace.
func (c *collector) of(trace string) (all []span) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, s := range c.spans {
		if hex.EncodeToString(s.GetTraceId()) == trace {
			all = append(all, s)
		}
	}
	return all
}

func attributeOf(all []*commonv1.KeyValue, name string) string {
	for _, kv := range all {
		if kv.GetKey() == name {
			if n, ok := kv.GetValue().GetValue().(*commonv1.AnyValue_IntValue); ok {
				return fmt.Sprint(n.IntValue)
			}
			return kv.GetValue().GetStringValue()
		}
	}
	return ""
}

func startCollector(t testing.TB) *collector {
	t.Helper()
	c := &collector{}
	calls := grpc.NewServer()
	collectorv1.RegisterTraceServiceServer(calls, c)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	c.grpc = l.Addr().String()
	go func() { _ = calls.Serve(l) }()
	t.Cleanup(calls.Stop)
	plain, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	c.http = plain.Addr().String()
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var request collectorv1.ExportTraceServiceRequest
		body, err := io.ReadAll(r.Body)
		if err != nil || r.URL.Path != "/v1/traces" || proto.Unmarshal(body, &request) != nil {
			http.Error(w, "what is this?", http.StatusBadRequest)
			return
		}
		_, _ = c.Export(r.Context(), &request)
		w.Header().Set("Content-Type", "application/x-protobuf")
	})}
	go func() { _ = server.Serve(plain) }()
	t.Cleanup(func() { _ = server.Close() })
	return c
}

// TestTraces checks that a request's trace is complete: the client's span,
// Envoy's, the check of sluice as a child of Envoy's call, and the call to the
// store as a child of the check.
func TestTraces(t *testing.T) {
	for _, protocol := range []string{"grpc", "http/protobuf"} {
		t.Run(protocol, func(t *testing.T) { seeTraces(t, startCollector(t), protocol) })
	}
}

// seeTraces sends requests through a real Envoy and a sluice on a real Redis,
// which both send spans to the collector, and checks the spans. sluice uses the
// protocol, Envoy gRPC.
func seeTraces(t *testing.T, c *collector, protocol string) {
	t.Helper()
	const envoyTraces = `tracing:
            provider:
              name: envoy.tracers.opentelemetry
              typed_config:
                "@type": type.googleapis.com/envoy.config.trace.v3.OpenTelemetryConfig
                grpc_service: { envoy_grpc: { cluster_name: otlp }, timeout: 1s }
                service_name: envoy
          access_log:
`
	const cluster = `  clusters:
  - name: otlp
    type: STATIC
    typed_extension_protocol_options:
      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
        "@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
        explicit_http_config: { http2_protocol_options: {} }
    load_assignment:
      cluster_name: otlp
      endpoints: [{ lb_endpoints: [{ endpoint: { address: { socket_address: { address: %s, port_value: %s } } } }] }]
`
	t.Setenv("OTEL_BSP_SCHEDULE_DELAY", "50") // milliseconds
	t.Setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://"+map[string]string{"grpc": c.grpc, "http/protobuf": c.http}[protocol])
	t.Setenv("OTEL_EXPORTER_OTLP_PROTOCOL", protocol)
	config := file(t, "sluice.yaml", patientStore+
		"limits: [{name: a, rate: 1/h, key: 'request.headers[\"x-api-key\"]'}, {name: b, rate: 100/s}]")
	p := startSluice(t, "--config", config, "--redis", redistest.Start(t).URL())
	host, port, _ := strings.Cut(c.grpc, ":")
	envoy := startEnvoy(t, p.grpc, startUpstream(t).Listener.Addr().String(), func(s string) string {
		return strings.Replace(
			strings.Replace(s, "access_log:\n", envoyTraces, 1), "  clusters:\n", fmt.Sprintf(cluster, host, port), 1,
		)
	})

	const caller = "00f067aa0ba902b7"
	wants := []string{"allowed a 0 redis", "limited a 0 ceiling"}
	traceOf := func(i int) string { return fmt.Sprintf("4bf92f3577b34da6a3ce929d0e0e473%d", i) }
	for i := range wants {
		fetch(t, client(t), "http://"+envoy, "x-api-key", "s3cr3t", "traceparent", "00-"+traceOf(i)+"-"+caller+"-01")
	}
	for i, want := range wants { // Envoy sends its spans each five seconds
		trace := traceOf(i)
		var ingress, check, store *span
		eventually(t, "the trace to be whole", func() bool {
			ingress, check, store = nil, nil, nil
			for _, s := range c.of(trace) {
				switch {
				case s.service == "envoy" && hex.EncodeToString(s.GetParentSpanId()) == caller:
					ingress = &s
				case s.GetName() == "sluice check":
					check = &s
				case s.GetName() == "sluice store":
					store = &s
				}
			}
			return ingress != nil && check != nil && (store != nil || i > 0)
		})
		if check.service != "sluice" || string(check.GetParentSpanId()) == string(ingress.GetSpanId()) {
			t.Errorf("the check's span is no child of Envoy's call: %v", check)
		}
		eventually(t, "Envoy's own span of the call", func() bool {
			for _, s := range c.of(trace) {
				if s.service == "envoy" && string(s.GetSpanId()) == string(check.GetParentSpanId()) &&
					string(s.GetParentSpanId()) == string(ingress.GetSpanId()) {
					return true
				}
			}
			return false
		})
		var said []string
		for _, name := range []string{"decision", "limit", "remaining", "source"} {
			said = append(said, attributeOf(check.GetAttributes(), "sluice."+name))
		}
		if got := strings.Join(said, " "); got != want {
			t.Errorf("%d: %s, want %s", i, got, want)
		}
		if i > 0 { // the ceiling decides without the store
			if store != nil {
				t.Errorf("the store was called: %v", store)
			}
		} else if string(store.GetParentSpanId()) != string(check.GetSpanId()) ||
			attributeOf(store.GetAttributes(), "db.operation.batch.size") != "1" ||
			attributeOf(store.GetAttributes(), "sluice.buckets") != "2" {
			t.Errorf("%v", store)
		}
		if text := fmt.Sprint(check, store); strings.Contains(text, "s3cr3t") {
			t.Errorf("a secret: %s", text)
		}
	}

	// A histogram has a trace as exemplar.
	_, page := fetch(t, client(t), "http://"+p.metrics+"/metrics", "Accept", "application/openmetrics-text; version=1.0.0")
	if !regexp.MustCompile(`sluice_check_seconds_bucket\{le="[^"]+"\} \d+ # ` +
		`\{trace_id="4bf92f3577b34da6a3ce929d0e0e473\d"\}`).
		MatchString(page) {
		t.Errorf("no exemplar:\n%s", page)
	}
}

// TestTracesNowhere checks that a missing collector disturbs nothing and that
// the sidecar still ends in time. Invalid settings fail the start.
func TestTracesNowhere(t *testing.T) {
	t.Setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", fmt.Sprintf("http://127.0.0.1:%d", freePort(t)))
	t.Setenv("OTEL_BSP_SCHEDULE_DELAY", "10")
	p := startSluice(t, "--config", file(t, "sluice.yaml", "limits: [{name: a, rate: 1/h}]"))
	conn := dial(t, p.grpc)
	for i, want := range []string{"ok", "429", "429"} {
		if got := check(t, conn, from("203.0.113.7", "/")); got != want {
			t.Errorf("check %d: %s", i, got)
		}
	}
	eventually(t, "a line in the log", func() bool { return strings.Contains(p.logged(), "traces are not sent") })

	for name, value := range map[string]string{
		"OTEL_EXPORTER_OTLP_ENDPOINT":        "collector:4317",
		"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "unix:///x",
		"OTEL_EXPORTER_OTLP_PROTOCOL":        "carrier-pigeon",
	} {
		status, _, stderr := sluice(
			t, []string{name + "=" + value}, "run", "--grpc", "127.0.0.1:0", "--admin", "127.0.0.1:0", "--metrics",
			"127.0.0.1:0",
		)
		if status != 1 || !strings.Contains(stderr, name) || !strings.Contains(stderr, "must be http") ||
			strings.Count(stderr, "\n") != 1 {
			t.Errorf("%s=%s: %d %s", name, value, status, stderr)
		}
	}
}
