package authz

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/sluiceproxy/sluice/limiter"
	"github.com/sluiceproxy/sluice/limiter/policy"
)

// report is where checks become metrics and log lines. Labels hold names from the config only, and nothing that a client sent is
// logged but a request id of harmless form. It is safe for concurrent use.
type report struct {
	log *zap.Logger
	// seldom logs at most one line a second of each message, for what comes with every request while it lasts.
	seldom *zap.Logger

	checks   []prometheus.Counter // by outcome
	seconds  prometheus.Histogram
	panics   prometheus.Counter
	tooLarge prometheus.Counter
	mistakes *prometheus.CounterVec

	limits *limitTable

	last *denials

	mu   sync.Mutex      // guards told
	told map[string]bool // the mistakes of the config in force that were logged
}

// maxTold bounds the mistakes that are remembered as logged. Those of Envoy's
// routes have any number of names.
const maxTold = 10_000

// The denials of one limit that are logged: the first, and then one in so many, or the first after so long.
const (
	logEvery  = 1000
	logAtMost = time.Minute
)

// sampler says which of many are logged. It is safe for concurrent use.
type sampler struct {
	seen, told atomic.Uint64 // how many there were, and the number of the one that was logged last
	toldAt     atomic.Int64  // when that was, in nanoseconds since 1970
}

// next counts one more, and reports whether it is to be logged and how many were left out since the last that was.
func (s *sampler) next(now time.Time) (leftOut uint64, is bool) {
	told := s.told.Load()
	n := s.seen.Add(1)
	if told > 0 && n-told < logEvery && now.UnixNano()-s.toldAt.Load() < int64(logAtMost) {
		return 0, false
	}
	s.toldAt.Store(now.UnixNano())
	return n - told - 1, s.told.CompareAndSwap(told, n) // or another is, at the same time
}

func newReport(log *zap.Logger, metrics prometheus.Registerer) *report {
	checks := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "sluice_checks_total", Help: "Total number of checks, by decision.",
	}, []string{"decision"})
	r := &report{
		log:    log,
		limits: newLimitTable(metrics),
		seldom: log.WithOptions(zap.WrapCore(func(c zapcore.Core) zapcore.Core {
			return zapcore.NewSamplerWithOptions(c, time.Second, 1, 0)
		})),
		seconds: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "sluice_check_seconds", Help: "Duration of checks in seconds, including the store.",
			Buckets: []float64{.00005, .0001, .00025, .0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1},
		}),
		panics: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "sluice_panics_total", Help: "Total number of checks that panicked and were refused.",
		}),
		tooLarge: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "sluice_checks_too_large_total",
			Help: fmt.Sprintf("Total number of checks larger than %d MiB, which got no decision.", maxMessage>>20),
		}),
		mistakes: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "sluice_config_mistakes_total", Help: "Total number of checks that revealed an error in the config, by limit and field.",
		}, []string{"limit", "field"}),
		last: newDenials(),
		told: make(map[string]bool),
	}
	for _, o := range limiter.Outcomes {
		r.checks = append(r.checks, checks.WithLabelValues(o.String()))
	}
	metrics.MustRegister(checks, r.seconds, r.panics, r.tooLarge, r.mistakes)
	return r
}

// setConfig registers the limits of a config that comes into force, and removes
// the series of the limits that are gone.
func (r *report) setConfig(config *policy.Config) {
	r.limits.setLimits(config.Limits())
	r.mu.Lock()
	defer r.mu.Unlock()
	clear(r.told)
	r.mistakes.Reset()
}

// checked counts a check that began then and ends now, and logs what an operator should see of it.
func (r *report) checked(v *verdict, began time.Time) {
	now := time.Now()
	d := &v.decision
	outcome := d.Outcome
	if d.Local && (outcome == limiter.Allowed || outcome == limiter.Limited) {
		outcome = limiter.FailedLocal
	}
	r.checks[outcome].Inc()
	if v.span == nil {
		r.seconds.Observe(now.Sub(began).Seconds())
	} else {
		observe(r.seconds, now.Sub(began).Seconds(), v.span)
		endSpan(v, outcome, now)
	}
	passed := manners[d.Outcome] == pass
	for i := range d.Charges {
		c, told := &d.Charges[i], &d.Verdicts[i]
		if told.Err != nil {
			if !errors.Is(told.Err, context.Canceled) {
				r.failed(c, told)
			}
			continue
		}
		if !told.Known() {
			continue
		}
		l := r.limits.forLimit(v.config, c.Limit)
		r.charged(l, c, told, d.Outcome.Spends(), now)
		if d.Outcome == limiter.Limited && i == d.Telling {
			r.denied(l, c, v, now)
		}
	}
	for _, l := range v.unlimited {
		r.limits.forLimit(v.config, l).allowed.Inc()
	}
	for _, m := range v.mistakes {
		r.mistaken(m)
	}
	if !passed && d.Outcome != limiter.Canceled {
		r.last.note(v, now)
	}
}

// denied logs a denial by a limit: at debug each, else some of them.
func (r *report) denied(l *limitReport, charge *limiter.Charge, v *verdict, now time.Time) {
	told := &v.decision.Verdicts[v.decision.Telling]
	leftOut, sampled := l.denials.next(now)
	level := zap.DebugLevel
	if sampled {
		level = zap.InfoLevel
	}
	e := r.log.Check(level, "request limited")
	if e == nil {
		return
	}
	all := append(fields(charge, v), zap.Int64("remaining", told.Remaining))
	if told.RetryAfter != limiter.Never {
		all = append(all, zap.Float64("retry_after", told.RetryAfter.Seconds()))
	}
	if sampled {
		all = append(all, zap.Uint64("suppressed", leftOut))
	}
	e.Write(all...)
}

// failed logs that the store did not answer for a limit; the store counts it.
func (r *report) failed(c *limiter.Charge, v *limiter.Verdict) {
	if e := r.seldom.Check(zap.WarnLevel, "store error: "+string(limiter.KindOf(v.Err))); e != nil {
		e.Write(zap.String("limit", c.Limit.Name), zap.String("domain", c.Limit.Domain), zap.Error(v.Err))
	}
}

// charged counts a limit's verdict.
func (r *report) charged(l *limitReport, c *limiter.Charge, v *limiter.Verdict, spends bool, now time.Time) {
	l.ratio.Observe(float64(v.Remaining) / float64(c.Bucket.Burst()))
	if t := r.limits.topOf(l); t != nil {
		t.add(keyOf(c), !v.Allowed, now)
	}
	if !v.Allowed {
		l.limited.Inc()
		if l.rejections != nil {
			l.rejections.Inc()
		}
		return
	}
	l.allowed.Inc()
	if spends || c.Limit.Shadow {
		l.taken.Add(float64(c.Cost))
	}
}

// fields are a log line's about a charge.
func fields(c *limiter.Charge, v *verdict) []zap.Field {
	all := []zap.Field{
		zap.Stringer("decision", v.decision.Outcome), zap.String("limit", c.Limit.Name), zap.String("domain", c.Limit.Domain),
		zap.String("key_hash", keyOf(c)), zap.Int64("cost", c.Cost),
	}
	if id := requestID(v.request); id != "" {
		all = append(all, zap.String("request_id", id))
	}
	return all
}

// mistaken counts a mistake of the config each time, and logs it once. A check without HTTP in it is Envoy's config's.
func (r *report) mistaken(err error) {
	limit, field, effect := "", "", "requests are refused"
	var rule *policy.RuleError
	if errors.As(err, &rule) {
		limit, field = rule.Limit, rule.Field
		if rule.Shadow {
			effect = "the shadow limit is skipped"
		}
	}
	r.mu.Lock()
	at := limit + "\n" + field
	known := r.told[at]
	if !known && len(r.told) >= maxTold {
		limit, known = otherLimits, true // the limits of Envoy's routes have any number of names
	}
	if !known {
		r.told[at] = true
	}
	r.mu.Unlock()
	r.mistakes.WithLabelValues(limit, field).Inc()
	if !known {
		r.log.Error("config error: "+effect+" (logged once)", zap.String("limit", limit), zap.String("field", field), zap.Error(err))
	}
}

// notRead counts and logs a check that gRPC did not read, as it is larger than maxMessage. What ends it otherwise is the caller's doing.
func (r *report) notRead(err error) {
	if status.Code(err) != codes.ResourceExhausted {
		return
	}
	r.tooLarge.Inc()
	r.seldom.Warn(fmt.Sprintf("check larger than %d MiB got no decision, so failure_mode_allow of Envoy's ext_authz filter applies: "+
		"remove with_request_body from that filter, since sluice reads no bodies, or lower its max_request_bytes", maxMessage>>20))
}

// panicked counts and logs a panic. What the panic says may hold what a client sent, so only its type is logged, and where it was.
func (r *report) panicked(kind string, stack []byte) {
	r.panics.Inc()
	r.seldom.Error("check panicked", zap.String("panic", kind), zap.ByteString("stack", stack))
}
