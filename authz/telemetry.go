package authz

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"
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

// report turns checks into metrics, log lines and statistics. Metric labels are
// names from the config only. Of what a client sent, method, host, path without
// its query and request ID are logged, truncated and escaped. It is safe for
// concurrent use.
type report struct {
	log *zap.Logger
	// throttled logs at most one line a second of each message. It is for
	// what every request may cause.
	throttled *zap.Logger

	checks   []prometheus.Counter // by outcome
	seconds  prometheus.Histogram
	panics   prometheus.Counter
	tooLarge prometheus.Counter
	mistakes *prometheus.CounterVec

	limits  *limitTable
	sampler denialSampler
	denials *denials
	// shadowDenials has the requests that limits in shadow mode would have denied.
	shadowDenials *denials

	mu sync.Mutex // guards loggedMistakes
	// loggedMistakes has the errors of the config in force that were logged.
	loggedMistakes map[mistake]bool
}

// mistake identifies an error in the config.
type mistake struct{ limit, field string }

// maxLoggedMistakes is the maximum size of report.loggedMistakes. The limits of
// Envoy's routes can have any number of names.
const maxLoggedMistakes = 10_000

// sampler selects the events that are logged: the first, and then one of every
// logEvery or the first after logAtMost, whichever comes first. The zero value is
// ready. It is safe for concurrent use.
type sampler struct {
	events   atomic.Uint64 // how many there were
	logged   atomic.Uint64 // the number of the event that was logged last, from 1
	loggedAt atomic.Int64  // when that was, in nanoseconds since 1970
}

// next counts an event. It reports whether to log it, and if so how many events
// since the last one that was logged were suppressed.
func (s *sampler) next(now time.Time) (suppressed uint64, ok bool) {
	logged := s.logged.Load()
	n := s.events.Add(1)
	if logged > 0 && n-logged < logEvery && now.UnixNano()-s.loggedAt.Load() < int64(logAtMost) {
		return 0, false
	}
	s.loggedAt.Store(now.UnixNano())
	// If this fails, a concurrent event is logged instead.
	return n - logged - 1, s.logged.CompareAndSwap(logged, n)
}

func newReport(log *zap.Logger, metrics prometheus.Registerer) *report {
	checks := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "sluice_checks_total", Help: "Total number of checks, by decision.",
	}, []string{"decision"})
	r := &report{
		log:    log,
		limits: newLimitTable(metrics),
		throttled: log.WithOptions(zap.WrapCore(func(c zapcore.Core) zapcore.Core {
			return zapcore.NewSamplerWithOptions(c, time.Second, 1, 0)
		})),
		seconds: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name:    "sluice_check_seconds",
			Help:    "Duration of checks in seconds, including the store.",
			Buckets: []float64{.00005, .0001, .00025, .0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1},
		}),
		panics: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "sluice_panics_total",
			Help: "Total number of checks that panicked and were refused, and of settlements that panicked.",
		}),
		tooLarge: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "sluice_checks_too_large_total",
			Help: fmt.Sprintf("Total number of checks larger than %d MiB, which got no decision.", maxMessage>>20),
		}),
		mistakes: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "sluice_config_mistakes_total",
			Help: "Total number of requests that revealed an error in the config, by limit and field.",
		}, []string{"limit", "field"}),
		loggedMistakes: make(map[mistake]bool),
	}
	r.denials, r.shadowDenials = newDenials()
	for _, o := range limiter.Outcomes {
		r.checks = append(r.checks, checks.WithLabelValues(o.String()))
	}
	metrics.MustRegister(checks, r.seconds, r.panics, r.tooLarge, r.mistakes)
	return r
}

// setConfig registers the limits of a config that comes into force, and removes
// the series of the limits that are gone.
func (r *report) setConfig(config *policy.Config) {
	r.limits.setLimits(config.InEachMode())
	for _, l := range config.SettlingLimits() {
		r.limits.settleOf(l.Name) // its series are there from the start
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	clear(r.loggedMistakes)
	r.mistakes.Reset()
}

// checked counts a check that began at began and ends now, and logs what an
// operator should see of it.
func (r *report) checked(check *checkState, began time.Time) {
	now := time.Now()
	d := &check.decision
	outcome := countedAs(d)
	r.checks[outcome].Inc()
	if check.span == nil {
		r.seconds.Observe(now.Sub(began).Seconds())
	} else {
		observe(r.seconds, now.Sub(began).Seconds(), check.span)
		endSpan(check, outcome, now)
	}
	for i := range d.Charges {
		c, v := &d.Charges[i], &d.Verdicts[i]
		if v.Err != nil {
			if !errors.Is(v.Err, context.Canceled) {
				r.failed(c, v)
			}
			continue
		}
		if !v.Known() {
			continue
		}
		l := r.limits.forLimit(check.config, c.Limit)
		r.charged(l, c, v, d.Outcome.Spends(), now)
		if v.Expired > 0 {
			r.limits.settleOf(c.Limit.Name).expired.Add(float64(v.Expired))
		}
		if d.Outcome == limiter.Limited && i == d.Strictest {
			r.denied(l, c, v, check, now)
		}
		if wouldDeny(c, v) && d.Outcome != limiter.Canceled {
			r.denied(l, c, v, check, now)
			r.shadowDenials.add(check, limiter.Limited, c, v, now)
		}
	}
	for _, l := range check.unlimited {
		r.limits.forLimit(check.config, l).allowed.Inc()
	}
	for _, m := range check.mistakes {
		r.mistaken(m)
	}
	if IsDenial(d.Outcome) {
		charge, verdict := deniedBy(d)
		r.denials.add(check, d.Outcome, charge, verdict, now)
	}
}

// failed logs a store error. The store counts it.
func (r *report) failed(c *limiter.Charge, v *limiter.Verdict) {
	if e := r.throttled.Check(zap.WarnLevel, "store error: "+string(limiter.KindOf(v.Err))); e != nil {
		e.Write(zap.String("limit", c.Limit.Name), zap.String("domain", c.Limit.Domain), zap.Error(v.Err))
	}
}

// charged counts the verdict of a limit.
func (r *report) charged(l *limitReport, c *limiter.Charge, v *limiter.Verdict, spends bool, now time.Time) {
	if c.HasBucket() {
		l.ratio.Observe(float64(v.Remaining) / float64(c.Bucket.Burst()))
	}
	if k := r.limits.topKeysOf(l); k != nil {
		k.add(c.ShownKey(), !v.Allowed, now)
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

// mistaken counts a check that revealed an error in the config, and logs each
// such error once. An err that is no *policy.RuleError, such as a check without
// an HTTP request, is an error in Envoy's config and has no limit or field.
func (r *report) mistaken(err error) {
	var m mistake
	effect := "requests are refused"
	if rule, ok := errors.AsType[*policy.RuleError](err); ok {
		m = mistake{rule.Limit, rule.Field}
		switch {
		case rule.Field == "settle":
			effect = "what was taken stands"
		case rule.Shadow:
			effect = "the shadow limit is skipped"
		}
	}
	r.mu.Lock()
	isLogged := r.loggedMistakes[m]
	switch {
	case isLogged:
	case len(r.loggedMistakes) >= maxLoggedMistakes:
		m.limit, isLogged = otherLimits, true
	default:
		r.loggedMistakes[m] = true
	}
	r.mu.Unlock()
	r.mistakes.WithLabelValues(m.limit, m.field).Inc()
	if !isLogged {
		r.log.Error("config error: "+effect+" (logged once)",
			zap.String("limit", m.limit), zap.String("field", m.field), zap.Error(err))
	}
}

// notRead counts and logs a check that gRPC did not read because it is larger
// than maxMessage. Other errors of reading a call are the caller's.
func (r *report) notRead(err error) {
	if status.Code(err) != codes.ResourceExhausted {
		return
	}
	r.tooLarge.Inc()
	r.throttled.Warn(fmt.Sprintf("check larger than %d MiB got no decision, "+
		"so failure_mode_allow of Envoy's ext_authz filter applies: remove with_request_body from that filter, "+
		"since sluice reads no bodies, or lower its max_request_bytes", maxMessage>>20))
}

// panicked counts and logs a panic of a check or of a settlement, by the value
// that was recovered. It logs the type of the value and the stack, but not the
// value itself, which may contain what a client sent.
func (r *report) panicked(what string, value any) {
	r.panics.Inc()
	r.throttled.Error(what+" panicked",
		zap.String("panic", fmt.Sprintf("%T", value)), zap.ByteString("stack", debug.Stack()))
}
