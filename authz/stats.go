package authz

import (
	"cmp"
	"slices"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"

	"github.com/sluiceproxy/sluice/limiter"
	"github.com/sluiceproxy/sluice/limiter/policy"
)

// Totals has the counts of all checks since a Server was made.
type Totals struct {
	// Checks has the number of checks by outcome. Checks that this process
	// decided in the store's place are counted as FailedLocal.
	Checks map[limiter.Outcome]uint64
	// Seconds is the distribution of the durations of checks.
	Seconds *dto.Histogram
}

// LimitTotals has the counts of one limit since a Server was made, or since its
// config has the limit.
type LimitTotals struct {
	Name   string
	Shadow bool
	Route  bool // whether it is a limit of Envoy's routes, and not of the config
	// Allowed and Limited are the numbers of the limit's own verdicts, whatever
	// other limits decided.
	Allowed, Limited uint64
	Taken            uint64 // tokens
	// Settled is nil if the limit has never settled.
	Settled *SettledTotals
}

// Mode returns the limit's mode as the config writes it: shadow, or enforce.
func (t *LimitTotals) Mode() string {
	l := limiter.Limit{Shadow: t.Shadow}
	return l.Mode()
}

// SettledTotals has the counts of the settlements of one limit: tokens, but for
// Expired, which counts requests whose end did not arrive in time.
type SettledTotals struct {
	Returned, Surcharged, Forgiven, Expired uint64
}

// Totals returns the counts of all checks.
func (s *Server) Totals() Totals {
	t := Totals{Checks: make(map[limiter.Outcome]uint64, len(s.report.checks))}
	for o, c := range s.report.checks {
		t.Checks[limiter.Outcome(o)] = count(c)
	}
	var m dto.Metric
	_ = s.report.seconds.Write(&m) // never fails
	t.Seconds = m.GetHistogram()
	return t
}

// Limits returns the counts of the limits of the config, in no particular order,
// and then those of Envoy's routes, sorted by name.
func (s *Server) Limits() []LimitTotals {
	all := make([]LimitTotals, 0, len(*s.report.limits.config.Load()))
	s.report.limits.all(func(name limitName, l *limitReport, isRoute bool) { all = append(all, l.totals(name, isRoute)) })
	routes := slices.IndexFunc(all, func(t LimitTotals) bool { return t.Route })
	if routes >= 0 {
		slices.SortFunc(all[routes:], func(a, b LimitTotals) int { return cmp.Compare(a.Name, b.Name) })
	}
	return all
}

// totals returns the counts of a limit with this name.
func (l *limitReport) totals(name limitName, isRoute bool) LimitTotals {
	t := LimitTotals{
		Name: name.name, Shadow: name.shadow, Route: isRoute,
		Allowed: count(l.allowed), Limited: count(l.limited), Taken: count(l.taken),
	}
	if r := l.settle.Load(); r != nil {
		t.Settled = &SettledTotals{
			Returned: count(r.returned), Surcharged: count(r.surcharged),
			Forgiven: count(r.forgiven), Expired: count(r.expired),
		}
	}
	return t
}

// count returns the value of a counter.
func count(c prometheus.Counter) uint64 {
	var m dto.Metric
	_ = c.Write(&m) // never fails
	return uint64(m.GetCounter().GetValue())
}

// Top returns the keys of a limit with the most requests, and those with the
// most denials, in the last five to ten minutes: at most n each, highest count
// first. counted is false if the keys of the limit are not counted: it is unknown,
// no check has drawn from it yet, or a hundred other limits were first.
func (s *Server) Top(limit string, n int) (requests, denials []TopKey, counted bool) {
	for _, l := range s.report.limits.named(limit) {
		if k := l.topKeys.Load(); k != nil {
			requests, denials = k.list(n, time.Now())
			return requests, denials, true
		}
	}
	return nil, nil, false
}

// Denials returns the last denials, the newest first: at most a hundred, and as
// many of limits in shadow mode.
func (s *Server) Denials() []Denial {
	all := append(s.report.denials.list(), s.report.shadowDenials.list()...)
	slices.SortStableFunc(all, func(a, b Denial) int { return b.Last.Compare(a.Last) })
	return all
}

// Denied returns the latest request of the denial with an ID, so that it can be
// explained. The request has all that the client sent, including secrets. Denied
// returns nil if the denial is no longer kept or its request was too large.
func (s *Server) Denied(id uint64) *policy.Request {
	for _, d := range s.Denials() {
		if d.ID == id {
			return d.request
		}
	}
	return nil
}

// Decision returns what was decided, as logs show it.
func (d *Denial) Decision() string {
	if d.Shadow {
		return shadowLimited
	}
	return d.Outcome.String()
}

// Explainable reports whether Server.Denied returns a request for d.
func (d *Denial) Explainable() bool { return d.request != nil }
