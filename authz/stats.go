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

// Totals is what a Server has counted since it began.
type Totals struct {
	Checks  map[limiter.Outcome]uint64 // by how they ended; under FailedLocal those that this process decided in the store's place
	Seconds *dto.Histogram             // how long they took
}

// LimitTotals is what a Server has counted of one limit since it began, or since the config has it.
type LimitTotals struct {
	Name             string
	Shadow           bool
	Allowed, Limited uint64 // its own verdicts
	Taken            uint64 // tokens
}

// Totals returns the counts of all checks.
func (s *Server) Totals() Totals {
	t := Totals{Checks: make(map[limiter.Outcome]uint64, len(s.report.checks))}
	for o, c := range s.report.checks {
		t.Checks[limiter.Outcome(o)] = count(c)
	}
	var m dto.Metric
	_ = s.report.seconds.Write(&m) // which never fails
	t.Seconds = m.GetHistogram()
	return t
}

// Limits returns the counts of each limit, the config's and those of Envoy's routes, by name.
func (s *Server) Limits() []LimitTotals {
	known := s.report.limits.all()
	all := make([]LimitTotals, 0, len(known))
	for name, l := range known {
		all = append(all, LimitTotals{
			Name: name.name, Shadow: name.shadow, Allowed: count(l.allowed), Limited: count(l.limited), Taken: count(l.taken),
		})
	}
	slices.SortFunc(all, func(a, b LimitTotals) int { return cmp.Compare(a.Name, b.Name) })
	return all
}

func count(c prometheus.Counter) uint64 {
	var m dto.Metric
	_ = c.Write(&m) // which never fails
	return uint64(m.GetCounter().GetValue())
}

// Top returns a limit's keys with the most requests and those with the most denials in the last five to ten minutes, at most n each. None
// are known of a limit that nobody knows, and of more than a hundred limits.
func (s *Server) Top(limit string, n int) (requests, denials []TopKey) {
	for _, l := range s.report.limits.named(limit) {
		if t := l.top.Load(); t != nil {
			return t.told(n, time.Now())
		}
	}
	return nil, nil
}

// Denials returns the last ones, the newest first.
func (s *Server) Denials() []Denial { return s.report.last.told() }

// Denied returns the request of a denial, the newest of those that it stands for, for an explanation. It holds what the client sent, secrets
// too, and is nil where it is not kept any more or was too large.
func (s *Server) Denied(id uint64) *policy.Request {
	for _, d := range s.report.last.told() {
		if d.ID == id {
			return d.request
		}
	}
	return nil
}

// Explainable reports whether the denial's request is kept (Server.Denied).
func (d *Denial) Explainable() bool { return d.request != nil }
