package authz

import (
	"context"
	"testing"
	"time"

	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"google.golang.org/grpc/metadata"

	"github.com/sluiceproxy/sluice/limiter/policy"
)

// A client decides neither what is sampled nor the trace ID. Envoy's own trace
// is continued.
func TestClientDoesNotSample(t *testing.T) {
	const traceID = "4bf92f3577b34da6a3ce929d0e0e4736"
	const parent = "00-" + traceID + "-00f067aa0ba902b7-01"
	sampler := sdktrace.WithSampler(sdktrace.ParentBased(sdktrace.NeverSample()))
	never := sdktrace.NewTracerProvider(sampler).Tracer("test")
	always := sdktrace.NewTracerProvider().Tracer("test")
	client := &policy.Request{Headers: map[string]string{"traceparent": parent}}
	if _, s := startSpan(context.Background(), never, client, time.Now()); s.SpanContext().IsSampled() {
		t.Error("a client's traceparent was sampled against the operator's sampler")
	}
	_, s := startSpan(context.Background(), always, client, time.Now())
	if s.SpanContext().TraceID().String() == traceID {
		t.Error("a client chose the trace's ID")
	}
	links := s.(sdktrace.ReadOnlySpan).Links()
	if len(links) != 1 || links[0].SpanContext.TraceID().String() != traceID {
		t.Errorf("no link to the client's trace: %v", links)
	}
	envoy := metadata.NewIncomingContext(context.Background(), metadata.Pairs("traceparent", parent))
	_, s = startSpan(envoy, never, client, time.Now())
	if c := s.SpanContext(); c.TraceID().String() != traceID || !c.IsSampled() {
		t.Error("Envoy's own trace is not continued")
	}
}
