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
	// Allowed and Limited are the numbers of the limit's own verdicts, whatever
	// other limits decided.
	Allowed, Limited uint64
	Taken            uint64 // tokens
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

// Limits returns the counts of the limits of the config and of Envoy's routes,
// sorted by name.
func (s *Server) Limits() []LimitTotals {
	known := s.report.limits.all()
	all := make([]LimitTotals, 0, len(known))
	for name, l := range known {
		all = append(all, LimitTotals{
			Name:    name.name,
			Shadow:  name.shadow,
			Allowed: count(l.allowed),
			Limited: count(l.limited),
			Taken:   count(l.taken),
		})
	}
	slices.SortFunc(all, func(a, b LimitTotals) int { return cmp.Compare(a.Name, b.Name) })
	return all
}

// count returns the value of a counter.
func count(c prometheus.Counter) uint64 {
	var m dto.Metric
	_ = c.Write(&m) // never fails
	return uint64(m.GetCounter().GetValue())
}

// Top returns the keys of a limit with the most requests, and those with the
// most denials, in the last five to ten minutes: at most n each, highest count
// first. It returns nil for an unknown limit. At most a hundred limits have
// their keys counted; it returns nil for the others, too.
func (s *Server) Top(limit string, n int) (requests, denials []TopKey) {
	for _, l := range s.report.limits.named(limit) {
		if k := l.topKeys.Load(); k != nil {
			return k.list(n, time.Now())
		}
	}
	return nil, nil
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
