package authz

import (
	"context"
	"errors"
	"fmt"
	"maps"
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

	decisions, rejections, taken *prometheus.CounterVec
	ratio                        *prometheus.HistogramVec

	// limits are the limits that are known, replaced whole where one comes.
	limits atomic.Pointer[map[limitName]*limitReport]

	last *denials
	tops atomic.Int32 // limits that have a top

	mu   sync.Mutex      // of what follows, and of replacing limits
	told map[string]bool // the mistakes of the config in force that were logged
}

// The bounds of what is kept by name. Names are the config's and Envoy's routes', which change.
const (
	maxLimits = 20_000
	maxTold   = 10_000
	others    = "_other" // the name of all limits past the bound, which no limit can have
)

// limitName is what a limit's metrics are known by.
type limitName struct {
	name   string
	shadow bool
}

// limitReport is what is kept ready for one limit.
type limitReport struct {
	ofMany                       bool               // past the bound
	allowed, limited, rejections prometheus.Counter // rejections: nil where it is a shadow limit
	taken                        prometheus.Counter
	ratio                        prometheus.Observer
	lines                        sampler             // which of its denials are logged
	top                          atomic.Pointer[top] // nil: nobody asked for it yet, or there are too many limits
}

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
		Name: "sluice_checks_total", Help: "Checks, by how they ended.",
	}, []string{"decision"})
	decisions := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "sluice_limit_decisions_total", Help: "Each limit's own verdicts, also where another limit denied.",
	}, []string{"limit", "decision"})
	rejections := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "sluice_rejections_total", Help: "Requests that an enforced limit denied.",
	}, []string{"limit"})
	taken := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "sluice_tokens_taken_total", Help: "Tokens that were taken.",
	}, []string{"limit"})
	ratio := prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Name: "sluice_tokens_remaining_ratio", Help: "The part of the burst that a check left, 0 to 1.",
		Buckets: []float64{0, .05, .1, .25, .5, .75, .9, 1},
	}, []string{"limit"})
	r := &report{
		log:        log,
		decisions:  decisions,
		rejections: rejections,
		taken:      taken,
		ratio:      ratio,
		seldom: log.WithOptions(zap.WrapCore(func(c zapcore.Core) zapcore.Core {
			return zapcore.NewSamplerWithOptions(c, time.Second, 1, 0)
		})),
		seconds: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "sluice_check_seconds", Help: "How long checks took, in seconds, the store's part included.",
			Buckets: []float64{.00005, .0001, .00025, .0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1},
		}),
		panics: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "sluice_panics_total", Help: "Checks that a mistake in sluice itself ended; each was refused.",
		}),
		tooLarge: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "sluice_checks_too_large_total",
			Help: fmt.Sprintf("Total number of checks above %d MiB, which got no decision.", maxMessage>>20),
		}),
		mistakes: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "sluice_config_mistakes_total", Help: "Checks that showed a mistake of the config; such are refused, but for a shadow limit's.",
		}, []string{"limit", "field"}),
		last: newDenials(),
		told: make(map[string]bool),
	}
	for _, o := range limiter.Outcomes {
		r.checks = append(r.checks, checks.WithLabelValues(o.String()))
	}
	r.limits.Store(&map[limitName]*limitReport{})
	metrics.MustRegister(checks, decisions, rejections, taken, ratio, r.seconds, r.panics, r.tooLarge, r.mistakes)
	return r
}

// use makes a config's limits known, so that their metrics are there before the first check, and forgets all that only earlier configs
// had. The limits of Envoy's routes come again with their next check.
func (r *report) use(limits []*limiter.Limit) {
	r.mu.Lock()
	defer r.mu.Unlock()
	keep := make(map[string]bool, len(limits))
	for _, l := range limits {
		keep[l.Name] = true
	}
	known := maps.Clone(*r.limits.Load())
	for at := range known {
		if keep[at.name] {
			continue
		}
		if known[at].top.Load() != nil {
			r.tops.Add(-1)
		}
		delete(known, at)
		r.decisions.DeletePartialMatch(prometheus.Labels{"limit": at.name})
		for _, v := range []interface{ DeleteLabelValues(...string) bool }{r.rejections, r.taken, r.ratio} {
			v.DeleteLabelValues(at.name)
		}
	}
	r.limits.Store(&known)
	r.add(limits...)
	clear(r.told)
	r.mistakes.Reset()
}

// add makes limits known. The caller holds mu.
func (r *report) add(limits ...*limiter.Limit) {
	all := maps.Clone(*r.limits.Load())
	for _, l := range limits {
		at := limitName{l.Name, l.Shadow}
		if all[at] != nil {
			continue
		}
		name, limited := l.Name, "limited"
		if len(all) >= maxLimits {
			name = others
		}
		if l.Shadow {
			limited = "shadow_limited"
		}
		known := &limitReport{
			allowed: r.decisions.WithLabelValues(name, "allowed"),
			limited: r.decisions.WithLabelValues(name, limited),
			taken:   r.taken.WithLabelValues(name),
			ratio:   r.ratio.WithLabelValues(name),
		}
		if !l.Shadow {
			known.rejections = r.rejections.WithLabelValues(name)
		}
		if name == others {
			known.ofMany = true
			at = limitName{others, l.Shadow}
		}
		all[at] = known
	}
	r.limits.Store(&all)
}

// of is a limit's report. Those of a route's limits come with the first check that has them.
func (r *report) of(l *limiter.Limit) *limitReport {
	if known := (*r.limits.Load())[limitName{l.Name, l.Shadow}]; known != nil {
		return known
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	all := *r.limits.Load()
	if other := all[limitName{others, l.Shadow}]; other != nil && len(all) >= maxLimits {
		return other
	}
	r.add(l)
	if known := (*r.limits.Load())[limitName{l.Name, l.Shadow}]; known != nil {
		return known
	}
	return (*r.limits.Load())[limitName{others, l.Shadow}]
}

// checked counts a check that began then and ends now, and logs what an operator should see of it.
func (r *report) checked(v *verdict, began time.Time) {
	now := time.Now()
	d := &v.decision
	outcome := d.Outcome
	if d.Local && outcome != limiter.Canceled {
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
		l := r.of(c.Limit)
		r.charged(l, c, told, passed, now)
		if d.Outcome == limiter.Limited && i == d.Telling {
			r.denied(l, c, v, now)
		}
	}
	for _, l := range v.unlimited {
		r.of(l).allowed.Inc()
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
	leftOut, sampled := l.lines.next(now)
	level := zap.DebugLevel
	if sampled {
		level = zap.InfoLevel
	}
	e := r.log.Check(level, "limited")
	if e == nil {
		return
	}
	all := append(fields(charge, v), zap.Int64("remaining", told.Remaining))
	if told.RetryAfter != limiter.Never {
		all = append(all, zap.Float64("retry_after", told.RetryAfter.Seconds()))
	}
	if sampled {
		all = append(all, zap.Uint64("left_out", leftOut))
	}
	e.Write(all...)
}

// failed logs that the store did not answer for a limit; the store counts it.
func (r *report) failed(c *limiter.Charge, v *limiter.Verdict) {
	if e := r.seldom.Check(zap.WarnLevel, "the store does not answer: "+string(limiter.KindOf(v.Err))); e != nil {
		e.Write(zap.String("limit", c.Limit.Name), zap.String("domain", c.Limit.Domain), zap.Error(v.Err))
	}
}

// charged counts a limit's verdict.
func (r *report) charged(l *limitReport, c *limiter.Charge, v *limiter.Verdict, passed bool, now time.Time) {
	l.ratio.Observe(float64(v.Remaining) / float64(c.Bucket.Burst()))
	if t := r.topOf(l); t != nil {
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
	if passed || c.Limit.Shadow {
		l.taken.Add(float64(c.Cost))
	}
}

// topOf is a limit's, made for its first request; nil where there are too many.
func (r *report) topOf(l *limitReport) *top {
	if t := l.top.Load(); t != nil || l.ofMany {
		return t
	}
	if r.tops.Add(1) > maxTops || !l.top.CompareAndSwap(nil, newTop()) {
		r.tops.Add(-1)
	}
	return l.top.Load()
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
	limit, field, effect := "", "", "such requests are refused"
	var rule *policy.RuleError
	if errors.As(err, &rule) {
		limit, field = rule.Limit, rule.Field
		if rule.Shadow {
			effect = "the limit is a shadow, so such requests are not held against it"
		}
	}
	r.mu.Lock()
	at := limit + "\n" + field
	known := r.told[at]
	if !known && len(r.told) >= maxTold {
		limit, known = others, true // the limits of Envoy's routes have any number of names
	}
	if !known {
		r.told[at] = true
	}
	r.mu.Unlock()
	r.mistakes.WithLabelValues(limit, field).Inc()
	if !known {
		r.log.Error("a mistake of the config: "+effect+" (said once)", zap.String("limit", limit), zap.String("field", field), zap.Error(err))
	}
}

// notRead counts and logs a check that gRPC did not read, as it is larger than maxMessage. What ends it otherwise is the caller's doing.
func (r *report) notRead(err error) {
	if status.Code(err) != codes.ResourceExhausted {
		return
	}
	r.tooLarge.Inc()
	r.seldom.Warn(fmt.Sprintf("a check above %d MiB got no decision, so that failure_mode_allow of Envoy's ext_authz filter decides about the request: "+
		"remove with_request_body there, since sluice reads no body, or lower its max_request_bytes", maxMessage>>20))
}

// panicked counts and logs a panic. What the panic says may hold what a client sent, so only its type is logged, and where it was.
func (r *report) panicked(kind string, stack []byte) {
	r.panics.Inc()
	r.seldom.Error("a check panicked", zap.String("panic", kind), zap.ByteString("stack", stack))
}
