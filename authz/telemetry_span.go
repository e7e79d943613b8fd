package authz

import (
	"context"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/trace"
	"google.golang.org/grpc/metadata"

	"github.com/sluiceproxy/sluice/limiter"
	"github.com/sluiceproxy/sluice/limiter/policy"
)

// startSpan begins a check's span. Where Envoy traces, it is a child of Envoy's own span of the call, which the call's metadata name. Where
// Envoy does not, the request's headers hold what a client sent, who must neither decide what is sampled nor choose the ID of an
// exemplar: the span is then the root of a trace of its own, with a link to the client's.
func startSpan(ctx context.Context, tracer trace.Tracer, r *policy.Request, began time.Time) (context.Context, trace.Span) {
	parent := propagation.MapCarrier{}
	for _, name := range []string{"traceparent", "tracestate"} {
		if all := metadata.ValueFromIncomingContext(ctx, name); len(all) > 0 {
			parent[name] = all[0]
		}
	}
	options := []trace.SpanStartOption{trace.WithTimestamp(began), trace.WithSpanKind(trace.SpanKindServer)}
	if len(parent) == 0 {
		client := propagation.MapCarrier{"traceparent": r.Headers["traceparent"], "tracestate": r.Headers["tracestate"]}
		if link := trace.SpanContextFromContext(propagation.TraceContext{}.Extract(ctx, client)); link.IsValid() {
			options = append(options, trace.WithLinks(trace.Link{SpanContext: link}))
		}
	}
	return tracer.Start(propagation.TraceContext{}.Extract(ctx, parent), "sluice check", options...)
}

// endSpan ends a check's span, which then says what the log would.
func endSpan(v *verdict, outcome limiter.Outcome, at time.Time) {
	if v.span.IsRecording() {
		v.span.SetAttributes(attribute.String("sluice.decision", outcome.String()))
		if d := &v.decision; d.Telling >= 0 {
			c, told := &d.Charges[d.Telling], &d.Verdicts[d.Telling]
			v.span.SetAttributes(
				attribute.String("sluice.limit", c.Limit.Name), attribute.String("sluice.domain", c.Limit.Domain), attribute.String("sluice.key_hash", keyOf(c)),
				attribute.Int64("sluice.cost", c.Cost), attribute.Int64("sluice.remaining", told.Remaining), attribute.String("sluice.source", sources[told.Source]),
			)
		}
		if v.request != nil {
			v.span.SetAttributes(attribute.String("sluice.request_id", requestID(v.request)))
		}
		switch outcome {
		case limiter.FailedOpen, limiter.FailedClosed, limiter.FailedLocal, limiter.Delegated, limiter.Invalid:
			v.span.SetStatus(codes.Error, outcome.String())
		}
	}
	v.span.End(trace.WithTimestamp(at))
}

// observe is a histogram's, with the trace as an exemplar where it is kept.
func observe(h prometheus.Histogram, seconds float64, span trace.Span) {
	if c := span.SpanContext(); c.IsSampled() {
		h.(prometheus.ExemplarObserver).ObserveWithExemplar(seconds, prometheus.Labels{"trace_id": c.TraceID().String()})
		return
	}
	h.Observe(seconds)
}
