package main

import (
	"context"
	"sync"
	"time"

	dto "github.com/prometheus/client_model/go"

	"github.com/sluiceproxy/sluice/limiter"
)

const (
	sampleEvery = time.Second
	maxSamples  = 300 // five minutes
	// quantilesOver is how many samples back the latencies are told of.
	quantilesOver = 60
	// maxBounds is how many buckets of a histogram are kept.
	maxBounds = 16
)

// history is what the last minutes were like, second by second, for who looks only when something has happened. It is safe for
// concurrent use.
type history struct {
	mu      sync.Mutex
	samples []sample // at most maxSamples and one, the oldest first
	checks  []float64
	store   []float64 // the bounds of the two histograms, in seconds
}

// sample is what was counted by an instant.
type sample struct {
	at                       time.Time
	passed, limited, refused uint64
	storeErrors              uint64
	checks, store            [maxBounds]uint64 // the histograms' buckets, each with those below
	checked, stored          uint64            // all that the histograms have seen
}

// run takes samples until ctx ends.
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
	if len(h.samples) > maxSamples {
		h.samples = append(h.samples[:0], h.samples[1:]...)
	}
	h.samples = append(h.samples, s)
}

// second is what one second of the past was like.
type second struct {
	At      int64   `json:"at"` // in seconds since 1970, when it ended
	Passed  float64 `json:"passed"`
	Limited float64 `json:"limited"`
	Refused float64 `json:"refused"` // each a second
}

// seconds are those of the past, the oldest first.
func (h *history) seconds() []second {
	h.mu.Lock()
	defer h.mu.Unlock()
	all := make([]second, 0, maxSamples)
	for i := 1; i < len(h.samples); i++ {
		a, b := &h.samples[i-1], &h.samples[i]
		took := b.at.Sub(a.at).Seconds()
		all = append(all, second{
			At:     b.at.Unix(),
			Passed: float64(b.passed-a.passed) / took, Limited: float64(b.limited-a.limited) / took, Refused: float64(b.refused-a.refused) / took,
		})
	}
	return all
}

// quantiles are how long something took, in seconds: half of all and 99 of 100 were faster. Null where there was nothing.
type quantiles struct {
	P50 *float64 `json:"p50"`
	P99 *float64 `json:"p99"`
}

// lately is what the last minute was like.
func (h *history) lately() (checks, store quantiles, storeErrors uint64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.samples) == 0 {
		return
	}
	b := &h.samples[len(h.samples)-1]
	a := &h.samples[max(0, len(h.samples)-1-quantilesOver)]
	between := func(bounds []float64, from, to *[maxBounds]uint64, n uint64) quantiles {
		return quantiles{quantile(.5, bounds, from, to, n), quantile(.99, bounds, from, to, n)}
	}
	return between(h.checks, &a.checks, &b.checks, b.checked-a.checked), between(h.store, &a.store, &b.store, b.stored-a.stored), b.storeErrors - a.storeErrors
}

// quantile is that of n observations, which two states of a histogram differ by: between a bucket's bounds in proportion, as Prometheus
// does it.
func quantile(q float64, bounds []float64, from, to *[maxBounds]uint64, n uint64) *float64 {
	if n == 0 {
		return nil
	}
	want, below, lower := q*float64(n), 0.0, 0.0
	for i, upper := range bounds {
		upTo := float64(to[i] - from[i])
		if upTo >= want {
			at := lower + (upper-lower)*(want-below)/(upTo-below)
			return &at
		}
		below, lower = upTo, upper
	}
	return &lower // above all bounds: at least the last
}

// observe puts a histogram into a sample.
func observe(into *[maxBounds]uint64, h *dto.Histogram) (bounds []float64, n uint64) {
	for i, b := range h.GetBucket() {
		if i == maxBounds {
			break
		}
		into[i] = b.GetCumulativeCount()
		bounds = append(bounds, b.GetUpperBound())
	}
	return bounds, h.GetSampleCount()
}

// sample counts what there is now.
func (a *admin) sample() sample {
	totals, store := a.sidecar.check.Totals(), a.storeHealth()
	s := sample{at: time.Now()}
	for outcome, n := range totals.Checks {
		switch outcome {
		case limiter.Limited:
			s.limited += n
		case limiter.FailedClosed, limiter.Delegated, limiter.Invalid:
			s.refused += n
		case limiter.Canceled: // neither: nobody learned of the decision
		default:
			s.passed += n
		}
	}
	for _, n := range store.Errors {
		s.storeErrors += n
	}
	var checks, stored []float64
	checks, s.checked = observe(&s.checks, totals.Seconds)
	stored, s.stored = observe(&s.store, store.histogram)
	a.history.mu.Lock()
	a.history.checks, a.history.store = checks, stored
	a.history.mu.Unlock()
	return s
}
