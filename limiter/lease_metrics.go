package limiter

import (
	"sync/atomic"

	"github.com/prometheus/client_golang/prometheus"
)

// leaseMetrics are the metrics of a limit's leases.
type leaseMetrics struct{ leases, takes atomic.Int64 }

// count counts that a term begins, and that one ends. m may be nil.
func (m *leaseMetrics) count(begins, ends bool) {
	if m == nil {
		return
	}
	if begins {
		m.takes.Add(1)
		m.leases.Add(1)
	}
	if ends {
		m.leases.Add(-1)
	}
}

// SetLimits says which limits have metrics: those with a Lease. It does not
// change what is leased. Limits of one name share their metrics.
func (l *Leases) SetLimits(limits []*Limit) {
	before, next := *l.limits.Load(), make(map[string]*leaseMetrics)
	for _, limit := range limits {
		if limit.Lease <= 0 {
			continue
		}
		if next[limit.Name] = before[limit.Name]; next[limit.Name] == nil {
			next[limit.Name] = &leaseMetrics{}
		}
	}
	l.limits.Store(&next)
}

// LeaseTotals has the counts of one limit's leases.
type LeaseTotals struct {
	Keys  int64 // whose tokens this sidecar has leased now
	Takes int64 // how often it leased some, renewals included
}

// Totals returns the counts of the limits that have a Lease, by name. It is safe
// for concurrent use.
func (l *Leases) Totals() map[string]LeaseTotals {
	limits := *l.limits.Load()
	all := make(map[string]LeaseTotals, len(limits))
	for name, m := range limits {
		all[name] = LeaseTotals{Keys: m.leases.Load(), Takes: m.takes.Load()}
	}
	return all
}

var (
	leasesDesc = prometheus.NewDesc("sluice_leases",
		"Number of keys whose tokens this sidecar has leased, by limit.", []string{"limit"}, nil)
	leaseTakesDesc = prometheus.NewDesc("sluice_lease_takes_total",
		"Total number of times that tokens were leased, by limit; renewals count, too.", []string{"limit"}, nil)
)

// Describe is prometheus.Collector's.
func (l *Leases) Describe(to chan<- *prometheus.Desc) {
	to <- leasesDesc
	to <- leaseTakesDesc
}

// Collect is prometheus.Collector's.
func (l *Leases) Collect(to chan<- prometheus.Metric) {
	for name, m := range *l.limits.Load() {
		to <- prometheus.MustNewConstMetric(leasesDesc, prometheus.GaugeValue, float64(m.leases.Load()), name)
		to <- prometheus.MustNewConstMetric(leaseTakesDesc, prometheus.CounterValue, float64(m.takes.Load()), name)
	}
}
