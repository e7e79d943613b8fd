package page

import (
	"context"
	"sync"
	"time"

	dto "github.com/prometheus/client_model/go"
)

const (
	sampleEvery = time.Second
	maxSamples  = 300 // five minutes
	// lastMinuteSamples is the number of samples that the latencies are taken over.
	lastMinuteSamples = 60
	// maxBuckets is the maximum number of buckets of a histogram that are
	// kept.
	maxBuckets = 16
)

// history keeps counts of the last five minutes, second by second, for an
// operator who looks only after something has happened. It is safe for
// concurrent use.
type history struct {
	mu      sync.Mutex
	samples []sample // oldest first, at most maxSamples and one
	// checked is when the last check was seen, to a second; zero before the first.
	checked time.Time
}

// sample has the counts since the start as they were at an instant.
type sample struct {
	at                       time.Time
	passed, limited, refused uint64
	storeErrors              uint64
	checks, calls            histogram // the durations of checks, and of calls to the store
}

// histogram is a Prometheus histogram of seconds.
type histogram struct {
	bounds  []float64          // upper bounds of the buckets, in order
	buckets [maxBuckets]uint64 // cumulative counts
	count   uint64             // of all observations
}

// histogramOf returns h, or the zero histogram if h is nil.
func histogramOf(h *dto.Histogram) histogram {
	out := histogram{count: h.GetSampleCount()}
	for i, b := range h.GetBucket() {
		if i == maxBuckets {
			break
		}
		out.buckets[i] = b.GetCumulativeCount()
		out.bounds = append(out.bounds, b.GetUpperBound())
	}
	return out
}

// run takes a sample every second until ctx ends.
func (h *history) run(ctx context.Context, take func() sample) {
	tick := time.NewTicker(sampleEvery)
	defer tick.Stop()
	for {
		h.add(take())
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

func (h *history) add(s sample) {
	h.mu.Lock()
	defer h.mu.Unlock()
	before := uint64(0)
	if n := len(h.samples); n > 0 {
		before = h.samples[n-1].checks.count
	}
	if s.checks.count > before {
		h.checked = s.at
	}
	if len(h.samples) > maxSamples {
		h.samples = append(h.samples[:0], h.samples[1:]...)
	}
	h.samples = append(h.samples, s)
}

// second is one element of GET /api/history.
type second struct {
	At int64 `json:"at"` // its end, in Unix seconds
	// Checks per second.
	Passed  float64 `json:"passed"`
	Limited float64 `json:"limited"`
	Refused float64 `json:"refused"`
}

// seconds returns the past seconds, oldest first.
func (h *history) seconds() []second {
	h.mu.Lock()
	defer h.mu.Unlock()
	all := make([]second, 0, maxSamples)
	for i := 1; i < len(h.samples); i++ {
		a, b := &h.samples[i-1], &h.samples[i]
		took := b.at.Sub(a.at).Seconds()
		all = append(all, second{
			At:      b.at.Unix(),
			Passed:  float64(b.passed-a.passed) / took,
			Limited: float64(b.limited-a.limited) / took,
			Refused: float64(b.refused-a.refused) / took,
		})
	}
	return all
}

// lastCheck returns when the last check was seen, to a second, or zero before
// the first.
func (h *history) lastCheck() time.Time {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.checked
}

// quantiles are the median and the 99th percentile of durations in seconds.
// They are nil if there were none.
type quantiles struct {
	P50 *float64 `json:"p50"`
	P99 *float64 `json:"p99"`
}

// lastMinute returns the durations of checks and of calls to the store, and
// the number of the store's errors, in the last minute.
func (h *history) lastMinute() (checks, calls quantiles, storeErrors uint64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.samples) == 0 {
		return
	}
	b := &h.samples[len(h.samples)-1]
	a := &h.samples[max(0, len(h.samples)-1-lastMinuteSamples)]
	return quantilesOf(&a.checks, &b.checks), quantilesOf(&a.calls, &b.calls), b.storeErrors - a.storeErrors
}

// quantilesOf returns the quantiles of the observations between two states of
// a histogram.
func quantilesOf(before, after *histogram) quantiles {
	return quantiles{quantile(.5, before, after), quantile(.99, before, after)}
}

// quantile returns the q-quantile of the observations between two states of a
// histogram, or nil if there were none. Within a bucket it interpolates
// linearly, as Prometheus' histogram_quantile does. Above the last bound it
// returns that bound.
func quantile(q float64, before, after *histogram) *float64 {
	n := after.count - before.count
	if n == 0 {
		return nil
	}
	want, below, lower := q*float64(n), 0.0, 0.0
	for i, upper := range after.bounds {
		upTo := float64(after.buckets[i] - before.buckets[i])
		if upTo >= want {
			return new(lower + (upper-lower)*(want-below)/(upTo-below))
		}
		below, lower = upTo, upper
	}
	return &lower
}
