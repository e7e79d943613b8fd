package authz

import (
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/sluiceproxy/sluice/limiter"
	"github.com/sluiceproxy/sluice/limiter/policy"
)

const (
	// maxConfigLimits is how many of a config's limits have metrics of their
	// own. The others are counted together, as otherLimits.
	maxConfigLimits = 20_000
	// maxRouteLimits is the same for the limits of Envoy's routes, whose names
	// whoever reaches the gRPC listener can choose.
	maxRouteLimits = 2_000
	// routeLimitLife is how long a route's limit keeps its metrics after the
	// last check that named it.
	routeLimitLife = time.Hour
	// otherLimits is the label of limits past a bound. No limit can have this
	// name.
	otherLimits = "_other"
)

// limitTable finds the metrics of a limit. The limits of the config are there
// from the start, so that their series exist before the first check; a limit of
// Envoy's routes is added by the first check that names it and dropped when no
// check has named it for routeLimitLife.
//
// It is safe for concurrent use. No lookup waits for a change of the config:
// locks are held for one limit at a time.
type limitTable struct {
	decisions, rejections, taken *prometheus.CounterVec
	ratio                        *prometheus.HistogramVec
	settle                       settleVecs
	now                          func() time.Time

	// config holds the limits of the config in force. The map is replaced, never
	// changed.
	config atomic.Pointer[map[limitName]*limitReport]
	// gone counts for limits of a config that is no longer in force. Nobody
	// reads it.
	gone *limitReport

	// series is held while series are made or deleted, which waits for a scrape
	// in progress. No lookup of a known limit waits for it.
	series sync.Mutex
	swept  time.Time // when sweepLocked last ran; guarded by series

	mu     sync.RWMutex // guards routes; a change requires series, too
	routes map[limitName]*limitReport

	counted atomic.Int32 // limits whose keys are counted
}

// limitName identifies a limit's metrics.
type limitName struct {
	name   string
	shadow bool
}

// limitReport has the metrics and statistics of one limit.
type limitReport struct {
	isShared         bool // by all limits past a bound
	allowed, limited prometheus.Counter
	rejections       prometheus.Counter // nil for a shadow limit
	taken            prometheus.Counter
	ratio            prometheus.Observer
	denials          sampler // selects the denials that are logged past maxKeyLines
	// topKeys is nil before the first check, and if too many limits have their
	// keys counted.
	topKeys atomic.Pointer[topKeys]
	// settle is nil until the limit settles.
	settle atomic.Pointer[settleReport]
	// used is when a check last named a route's limit, in Unix seconds, rounded
	// down to a minute.
	used atomic.Int64
}

func newLimitTable(metrics prometheus.Registerer) *limitTable {
	t := &limitTable{
		decisions: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "sluice_limit_decisions_total", Help: "Total number of decisions of each limit, by decision.",
		}, []string{"limit", "decision"}),
		rejections: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "sluice_rejections_total", Help: "Total number of requests that an enforced limit denied.",
		}, []string{"limit"}),
		taken: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "sluice_tokens_taken_total", Help: "Total number of tokens taken.",
		}, []string{"limit"}),
		ratio: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "sluice_tokens_remaining_ratio", Help: "Fraction of the burst remaining after a check.",
			Buckets: []float64{0, .05, .1, .25, .5, .75, .9, 1},
		}, []string{"limit"}),
		settle: newSettleVecs(metrics),
		now:    time.Now,
		gone: &limitReport{
			isShared:   true,
			allowed:    prometheus.NewCounter(prometheus.CounterOpts{}),
			limited:    prometheus.NewCounter(prometheus.CounterOpts{}),
			rejections: prometheus.NewCounter(prometheus.CounterOpts{}),
			taken:      prometheus.NewCounter(prometheus.CounterOpts{}),
			ratio:      prometheus.NewHistogram(prometheus.HistogramOpts{}),
		},
		routes: make(map[limitName]*limitReport),
	}
	t.config.Store(&map[limitName]*limitReport{})
	metrics.MustRegister(t.decisions, t.rejections, t.taken, t.ratio)
	return t
}

// shadowLimited is what metrics, logs and the list of denials call what a limit in
// shadow mode would have denied.
const shadowLimited = "shadow_limited"

// limitedLabel is what sluice_limit_decisions_total calls a denial.
func (n limitName) limitedLabel() string {
	if n.shadow {
		return shadowLimited
	}
	return "limited"
}

// setLimits registers the limits of a config that comes into force, and removes
// the series of the limits that are gone.
func (t *limitTable) setLimits(limits []*limiter.Limit) {
	before := *t.config.Load()
	next := make(map[limitName]*limitReport, len(limits))
	for _, l := range limits {
		name := limitName{l.Name, l.Shadow}
		switch known := before[name]; {
		case known != nil && !known.isShared:
			next[name] = known
		case len(next) >= maxConfigLimits:
			next[name] = t.add(limitName{otherLimits, l.Shadow})
		default:
			next[name] = t.add(name)
		}
	}
	t.config.Store(&next)
	for name, l := range before {
		if next[name] == nil && !l.isShared {
			t.remove(name, l)
		}
	}
}

// add returns the limitReport of a limit of the config, which may have been a
// route's until now.
func (t *limitTable) add(name limitName) *limitReport {
	t.series.Lock()
	defer t.series.Unlock()
	known := t.route(name)
	switch {
	case known == nil:
		known = t.newLocked(name)
		if known.isShared {
			t.setRouteLocked(name, known)
		}
	case !known.isShared:
		t.setRouteLocked(name, nil)
	}
	return known
}

// route returns a route's limit, or nil.
func (t *limitTable) route(name limitName) *limitReport {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return t.routes[name]
}

// setRouteLocked adds a route's limit, or removes it if l is nil. The caller
// holds series.
func (t *limitTable) setRouteLocked(name limitName, l *limitReport) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if l == nil {
		delete(t.routes, name)
	} else {
		t.routes[name] = l
	}
}

// newLocked makes the series of a limit.
func (t *limitTable) newLocked(name limitName) *limitReport {
	l := &limitReport{
		isShared: name.name == otherLimits,
		allowed:  t.decisions.WithLabelValues(name.name, "allowed"),
		limited:  t.decisions.WithLabelValues(name.name, name.limitedLabel()),
		taken:    t.taken.WithLabelValues(name.name),
		ratio:    t.ratio.WithLabelValues(name.name),
	}
	if !name.shadow {
		l.rejections = t.rejections.WithLabelValues(name.name)
	}
	return l
}

// remove deletes the series of a limit that the config in force does not have.
func (t *limitTable) remove(name limitName, l *limitReport) {
	t.series.Lock()
	defer t.series.Unlock()
	t.removeLocked(name, l)
}

// removeLocked is remove for a caller that holds series.
func (t *limitTable) removeLocked(name limitName, l *limitReport) {
	if l.topKeys.Load() != nil {
		t.counted.Add(-1)
	}
	config := *t.config.Load()
	if config[name] != nil || t.route(name) != nil {
		return // a check or another config has named it again
	}
	t.decisions.DeleteLabelValues(name.name, name.limitedLabel())
	if !name.shadow {
		t.rejections.DeleteLabelValues(name.name)
	}
	// The other series are shared with a limit of the same name in the other
	// mode.
	if twin := (limitName{name.name, !name.shadow}); config[twin] == nil && t.route(twin) == nil {
		t.decisions.DeleteLabelValues(name.name, "allowed")
		t.taken.DeleteLabelValues(name.name)
		t.ratio.DeleteLabelValues(name.name)
		t.settle.remove(name.name)
	}
}

// forLimit returns the limitReport of a limit that applied to a check by config.
func (t *limitTable) forLimit(config *policy.Config, l *limiter.Limit) *limitReport {
	name := limitName{l.Name, l.Shadow}
	if known := (*t.config.Load())[name]; known != nil {
		return known
	}
	now := t.now()
	known := t.route(name)
	switch {
	case known != nil:
	case config.Has(l): // and config is no longer in force
		return t.gone
	default:
		known = t.addRoute(name, now)
	}
	if minute := now.Unix() / 60 * 60; known.used.Load() != minute {
		known.used.Store(minute)
	}
	return known
}

// addRoute adds a limit of a route and returns its limitReport. Past
// maxRouteLimits the limit shares its metrics with others.
func (t *limitTable) addRoute(name limitName, now time.Time) *limitReport {
	t.series.Lock()
	defer t.series.Unlock()
	if len(t.routes) >= maxRouteLimits || now.Sub(t.swept) >= routeLimitLife {
		t.sweepLocked(now)
	}
	known := t.route(name)
	if known == nil && len(t.routes) >= maxRouteLimits {
		name.name = otherLimits
		known = t.route(name)
	}
	if known == nil {
		known = t.newLocked(name)
		known.used.Store(now.Unix())
		t.setRouteLocked(name, known)
	}
	return known
}

// sweepLocked drops the routes' limits that no check has named for
// routeLimitLife. It runs at most once a minute.
func (t *limitTable) sweepLocked(now time.Time) {
	if now.Sub(t.swept) < time.Minute {
		return
	}
	t.swept = now
	for name, l := range t.routes {
		if !l.isShared && now.Unix()-l.used.Load() > int64(routeLimitLife/time.Second) {
			t.setRouteLocked(name, nil)
			t.removeLocked(name, l)
		}
	}
}

// all calls do with every limit that has metrics of its own and with the shared
// ones: first with those of the config, then with those of Envoy's routes that the
// config does not have.
func (t *limitTable) all(do func(name limitName, l *limitReport, isRoute bool)) {
	config := *t.config.Load()
	for name, l := range config {
		if !l.isShared {
			do(name, l, false)
		}
	}
	t.mu.RLock()
	routes := maps.Clone(t.routes)
	t.mu.RUnlock()
	for name, l := range routes {
		if known := config[name]; known == nil || known.isShared {
			do(name, l, true)
		}
	}
}

// named returns the limits with a name: none, an enforced one, a shadow limit,
// or both.
func (t *limitTable) named(name string) []*limitReport {
	var found []*limitReport
	for _, shadow := range []bool{false, true} {
		at := limitName{name, shadow}
		for _, l := range []*limitReport{(*t.config.Load())[at], t.route(at)} {
			if l != nil && !slices.Contains(found, l) {
				found = append(found, l)
			}
		}
	}
	return found
}

// topKeysOf returns the counters of a limit's keys, which the first call makes.
// It returns nil if too many limits have their keys counted.
func (t *limitTable) topKeysOf(l *limitReport) *topKeys {
	if k := l.topKeys.Load(); k != nil || l.isShared {
		return k
	}
	if t.counted.Add(1) > maxCountedLimits || !l.topKeys.CompareAndSwap(nil, newTopKeys()) {
		t.counted.Add(-1)
	}
	return l.topKeys.Load()
}
