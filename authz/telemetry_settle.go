package authz

import (
	"context"

	"github.com/prometheus/client_golang/prometheus"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/trace"
	"go.uber.org/zap"

	"github.com/sluiceproxy/sluice/limiter"
)

// settleVecs are the metrics of settlements.
type settleVecs struct {
	settlements                             *prometheus.CounterVec // by limit and result
	returned, surcharged, forgiven, expired *prometheus.CounterVec // by limit
}

func newSettleVecs(metrics prometheus.Registerer) settleVecs {
	byLimit := func(name, help string) *prometheus.CounterVec {
		c := prometheus.NewCounterVec(prometheus.CounterOpts{Name: name, Help: help}, []string{"limit"})
		metrics.MustRegister(c)
		return c
	}
	v := settleVecs{
		settlements: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "sluice_settlements_total", Help: "Total number of settlements, by limit and result.",
		}, []string{"limit", "result"}),
		returned: byLimit("sluice_tokens_returned_total", "Total number of tokens that settlements returned."),
		surcharged: byLimit("sluice_tokens_surcharged_total",
			"Total number of tokens that settlements took besides those that were held."),
		forgiven: byLimit("sluice_tokens_forgiven_total",
			"Total number of tokens that requests used and no bucket paid, since its debt was the largest."),
		expired: byLimit("sluice_holds_expired_total",
			"Total number of holds that ended without a settlement, so that what they held counts as spent."),
	}
	metrics.MustRegister(v.settlements)
	for _, result := range []string{forgedResult, settleFailed.String()} {
		v.settlements.WithLabelValues("", result) // ends whose limit is unknown
	}
	return v
}

// forgedResult is the result of an end with a text that this sidecar cannot open.
const forgedResult = "forged"

// settleReport has the metrics of the settlements of a limit.
type settleReport struct {
	results                                 [settleResults]prometheus.Counter
	returned, surcharged, forgiven, expired prometheus.Counter
}

func (v *settleVecs) add(limit string) *settleReport {
	r := &settleReport{
		returned:   v.returned.WithLabelValues(limit),
		surcharged: v.surcharged.WithLabelValues(limit),
		forgiven:   v.forgiven.WithLabelValues(limit),
		expired:    v.expired.WithLabelValues(limit),
	}
	for i := range r.results {
		r.results[i] = v.settlements.WithLabelValues(limit, settleResult(i).String())
	}
	return r
}

func (v *settleVecs) remove(limit string) {
	v.settlements.DeletePartialMatch(prometheus.Labels{"limit": limit})
	for _, vec := range []*prometheus.CounterVec{v.returned, v.surcharged, v.forgiven, v.expired} {
		vec.DeleteLabelValues(limit)
	}
}

// settleOf returns the metrics of the settlements of a limit. Limits that the
// config in force does not have share those of otherLimits.
func (t *limitTable) settleOf(limit string) *settleReport {
	find := func() *limitReport {
		config := *t.config.Load()
		for _, shadow := range []bool{false, true} {
			if l := config[limitName{limit, shadow}]; l != nil && !l.isShared {
				return l
			}
		}
		limit = otherLimits
		return t.gone
	}
	l := find()
	if r := l.settle.Load(); r != nil {
		return r
	}
	t.series.Lock()
	defer t.series.Unlock()
	l = find() // a change of the config removes series only while it holds the lock
	if r := l.settle.Load(); r != nil {
		return r
	}
	r := t.settle.add(limit)
	l.settle.Store(r)
	return r
}

// settled counts a settlement.
func (r *report) settled(limit string, result settleResult, s *limiter.Settled) {
	m := r.limits.settleOf(limit)
	m.results[result].Inc()
	m.returned.Add(float64(s.Returned))
	m.surcharged.Add(float64(s.Surcharged))
	m.forgiven.Add(float64(s.Forgiven))
	m.expired.Add(float64(s.Expired))
}

// forged counts the end of a request whose text this sidecar cannot open.
func (r *report) forged() {
	r.limits.settle.settlements.WithLabelValues("", forgedResult).Inc()
}

// notSettled counts an entry of the access log that cannot be read.
func (r *report) notSettled() {
	r.limits.settle.settlements.WithLabelValues("", settleFailed.String()).Inc()
	r.throttled.Warn("an entry of the access log cannot be read, and settles nothing", zap.Int("max_bytes", maxLogEntry))
}

// otherLog logs that an access log of another name is ignored.
func (r *report) otherLog(name string) {
	r.throttled.Warn("an access log is ignored: its log_name must be "+logName,
		zap.String("log_name", name[:min(len(name), 100)]))
}

// settleSpan records a settlement as a span from the end of the request on. The
// check's span is its parent, so that it is sampled as that is, and is linked.
func settleSpan(tracer trace.Tracer, e *ending, r *limiter.Settled, result settleResult) {
	_, span := tracer.Start(trace.ContextWithRemoteSpanContext(context.Background(), e.check), "sluice settle",
		trace.WithTimestamp(e.began), trace.WithLinks(trace.Link{SpanContext: e.check}),
		trace.WithAttributes(
			attribute.String("sluice.limit", e.Limit.Name),
			attribute.String("sluice.domain", e.Limit.Domain),
			attribute.String("sluice.result", result.String()),
			attribute.Int64("sluice.held", e.Hold.Tokens),
			attribute.Int64("sluice.cost", e.Cost),
			attribute.Int64("sluice.returned", r.Returned),
			attribute.Int64("sluice.surcharged", r.Surcharged),
			attribute.Int64("sluice.forgiven", r.Forgiven),
		))
	if result == settleFailed {
		span.SetStatus(codes.Error, "the store did not settle")
	}
	span.End()
}
