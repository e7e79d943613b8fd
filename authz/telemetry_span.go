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

// startSpan begins the span of a check. If Envoy traces, the parent is Envoy's
// span of the call, which the metadata of the call name. Otherwise the trace
// headers of the request are the client's, who must neither decide what is
// sampled nor choose the trace ID of an exemplar. The span is then the root of
// a new trace with a link to the client's span.
func startSpan(
	ctx context.Context, tracer trace.Tracer, r *policy.Request, began time.Time,
) (context.Context, trace.Span) {
	parent := propagation.MapCarrier{}
	for _, name := range []string{"traceparent", "tracestate"} {
		if all := metadata.ValueFromIncomingContext(ctx, name); len(all) > 0 {
			parent[name] = all[0]
		}
	}
	options := []trace.SpanStartOption{trace.WithTimestamp(began), trace.WithSpanKind(trace.SpanKindServer)}
	if len(parent) == 0 {
		client := propagation.MapCarrier{
			"traceparent": r.Headers["traceparent"],
			"tracestate":  r.Headers["tracestate"],
		}
		if link := trace.SpanContextFromContext(propagation.TraceContext{}.Extract(ctx, client)); link.IsValid() {
			options = append(options, trace.WithLinks(trace.Link{SpanContext: link}))
		}
	}
	return tracer.Start(propagation.TraceContext{}.Extract(ctx, parent), "sluice check", options...)
}

// endSpan ends the span of a check and sets its attributes.
func endSpan(check *checkState, outcome limiter.Outcome, at time.Time) {
	span := check.span
	if span.IsRecording() {
		span.SetAttributes(attribute.String("sluice.decision", outcome.String()))
		if d := &check.decision; d.Strictest >= 0 {
			c, v := &d.Charges[d.Strictest], &d.Verdicts[d.Strictest]
			span.SetAttributes(
				attribute.String("sluice.limit", c.Limit.Name),
				attribute.String("sluice.domain", c.Limit.Domain),
				attribute.String("sluice.key", c.ShownKey()),
				attribute.Int64("sluice.cost", c.Cost),
				attribute.Int64("sluice.remaining", v.Remaining),
				attribute.String("sluice.source", sourceNames[v.Source]),
			)
		}
		if check.request != nil {
			span.SetAttributes(attribute.String("sluice.request_id", requestID(check.request)))
		}
		if classes[outcome].isFailure {
			span.SetStatus(codes.Error, outcome.String())
		}
	}
	span.End(trace.WithTimestamp(at))
}

// observe records a value in h. If the span is sampled, its trace ID becomes
// the exemplar.
func observe(h prometheus.Histogram, seconds float64, span trace.Span) {
	if c := span.SpanContext(); c.IsSampled() {
		labels := prometheus.Labels{"trace_id": c.TraceID().String()}
		h.(prometheus.ExemplarObserver).ObserveWithExemplar(seconds, labels)
		return
	}
	h.Observe(seconds)
}
