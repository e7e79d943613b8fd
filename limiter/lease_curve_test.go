package limiter

import (
	"context"
	"flag"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// leaseLoad is sidecars whose checks of one key come at random.
type leaseLoad struct {
	sidecars int
	demand   float64 // over the rate
	lease    time.Duration
	burst    time.Duration // of the rate
	lasts    time.Duration
}

// leaseCost is what came of a leaseLoad.
type leaseCost struct {
	checks, granted int
	// wrong is how many checks were denied although sidecars had leased tokens that
	// they had not granted.
	wrong int
	calls int
}

func (c leaseCost) String() string {
	return fmt.Sprintf("%d checks, %d granted, %.3f %% denied wrongly, %.4f calls a check",
		c.checks, c.granted, 100*float64(c.wrong)/float64(c.checks), float64(c.calls)/float64(c.checks))
}

// want checks that leases cost those who wait nothing below the rate, and little
// above it, beside the same checks without leases. The denials of so many checks,
// which were late, are the machine's.
func (c leaseCost) want(t *testing.T, without leaseCost, sidecars int, demand float64, late int) {
	t.Helper()
	most := .005
	if sidecars > 4 {
		most = .01
	}
	wrong := float64(c.wrong-late) / float64(c.checks)
	granted := float64(c.granted+late) / float64(without.granted)
	switch {
	case demand < 1 && (c.granted+late < c.checks || c.calls*4 > without.calls):
		t.Error("below the rate none is denied, and most checks ask nobody")
	case wrong > most || granted < .98:
		t.Errorf("%.4f denied wrongly, want %.3f at most; %.4f of the grants", wrong, most, granted)
	}
}

// fleet is sidecars with leases on one bucket, and what came of their checks.
type fleet struct {
	sidecars []*Leases
	charge   Charge

	mu   sync.Mutex
	cost leaseCost
}

// add adds a sidecar whose calls take so long, half of it each way.
func (f *fleet) add(from Lender, takes time.Duration) {
	store := &far{from, takes / 2, f}
	metrics := prometheus.NewRegistry()
	f.sidecars = append(f.sidecars, newLeases(NewCeiling(store, metrics), store, bootClock(), metrics))
}

// check has a sidecar decide a check.
func (f *fleet) check(sidecar int) {
	d := Decide(context.Background(), f.sidecars[sidecar], []Charge{f.charge})
	if d.Verdicts[0].Source == CeilingSource {
		f.denied()
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.cost.checks++; d.Outcome == Allowed {
		f.cost.granted++
	}
}

// denied judges a denial of this moment.
func (f *fleet) denied() {
	left := int64(0)
	for _, s := range f.sidecars {
		if e := s.find(f.charge.Key); e != nil {
			e.mu.Lock()
			if s.now() < e.end {
				left += e.left
			}
			e.mu.Unlock()
		}
	}
	if left >= f.charge.Cost {
		f.mu.Lock()
		defer f.mu.Unlock()
		f.cost.wrong++
	}
}

// close returns what came of the checks, and ends the leases.
func (f *fleet) close() leaseCost {
	f.mu.Lock()
	cost := f.cost
	f.mu.Unlock()
	for _, s := range f.sidecars {
		s.Close(context.Background())
	}
	return cost
}

// far is a lender that may be far away, and counts the calls of a fleet. It has
// the fleet judge denials in the moment in which they are decided.
type far struct {
	Lender

	away  time.Duration
	fleet *fleet
}

func (f *far) Take(ctx context.Context, charges []Charge, verdicts []Verdict) {
	f.called()
	f.Lender.Take(ctx, charges, verdicts)
	if !verdicts[0].Allowed && charges[0].HoldFor == 0 {
		f.fleet.denied()
	}
	time.Sleep(f.away)
}

func (f *far) Settle(ctx context.Context, settlements []Settlement, results []Settled) {
	f.called()
	f.Lender.Settle(ctx, settlements, results)
	time.Sleep(f.away)
}

func (f *far) called() {
	f.fleet.mu.Lock()
	f.fleet.cost.calls++
	f.fleet.mu.Unlock()
	time.Sleep(f.away)
}

// arrivals calls check for as long as lasts says, with the number of a sidecar, each
// time in a goroutine of its own: at random, as a Poisson process, rate times a
// second. It returns how many of these ended long after they should have begun, as
// the machine was slow.
func arrivals(lasts time.Duration, rate float64, sidecars int, check func(sidecar int)) (late int) {
	const long = 20 * time.Millisecond
	random := rand.New(rand.NewPCG(1, 2))
	pause := func() time.Duration { return time.Duration(random.ExpFloat64() / rate * float64(time.Second)) }
	var under sync.WaitGroup
	var slow atomic.Int64
	began := time.Now()
	for next := pause(); next <= lasts; next += pause() {
		due, sidecar := began.Add(next), random.IntN(sidecars)
		time.Sleep(time.Until(due))
		under.Go(func() {
			if check(sidecar); time.Since(due) > long {
				slow.Add(1)
			}
		})
	}
	under.Wait()
	return int(slow.Load())
}

// play plays the load on sidecars as they are wired, with a lender in this process
// that is half a millisecond away, and a clock that does not wait.
func (l leaseLoad) play(t *testing.T) (cost leaseCost) {
	const rate = 2000
	synctest.Test(t, func(t *testing.T) {
		f := &fleet{charge: charge(bucket(t, rate, time.Second, int64(rate*l.burst.Seconds())), "tenant").leased(l.lease)}
		from := newMemory("buckets", 1<<20, wallClock, nil, prometheus.NewRegistry())
		for range l.sidecars {
			f.add(from, 500*time.Microsecond)
		}
		for _, s := range f.sidecars {
			s.now = wallClock
		}
		arrivals(l.lasts, rate*l.demand, l.sidecars, f.check)
		cost = f.close()
		time.Sleep(time.Second) // the timers have fired
	})
	return cost
}

var curves = flag.Bool("curves", false, "TestLeaseCosts logs the figures of BENCHMARKS.md")

// What leases cost those who wait: nothing below the rate, and little at twice
// the rate.
func TestLeaseCosts(t *testing.T) {
	if *curves {
		logCurves(t)
	}
	for _, l := range []leaseLoad{
		{sidecars: 1, demand: .8},
		{sidecars: 1, demand: 2},
		{sidecars: 4, demand: .8},
		{sidecars: 4, demand: 2},
		{sidecars: 16, demand: .8},
		{sidecars: 16, demand: 2},
	} {
		l.lease, l.burst, l.lasts = 200*time.Millisecond, time.Second, 10*time.Second
		with := l.play(t)
		l.lease = 0
		without := l.play(t)
		t.Logf("%d sidecars at %.1f of the rate: %v; without leases %v", l.sidecars, l.demand, with, without)
		with.want(t, without, l.sidecars, l.demand, 0)
	}
}

// logCurves logs what leases spare and cost, over the number of sidecars, the
// demand, and the burst. Its clock does not wait, so that it says the same on every
// machine.
func logCurves(t *testing.T) {
	t.Helper()
	sidecars := []int{1, 2, 4, 8, 16, 50}
	for _, burst := range []time.Duration{time.Second, 200 * time.Millisecond} {
		for _, demand := range []float64{.5, .8, 1, 1.2, 2} {
			calls, wrong := "", ""
			for _, n := range sidecars {
				l := leaseLoad{sidecars: n, demand: demand, lease: 200 * time.Millisecond, burst: burst, lasts: 20 * time.Second}
				c := l.play(t)
				calls += fmt.Sprintf(" | %.3f", float64(c.calls)/float64(c.checks))
				wrong += fmt.Sprintf(" | %.2f %%", 100*float64(c.wrong)/float64(c.checks))
			}
			t.Logf("burst %v | %.1f%s |%s |", burst, demand, calls, wrong)
		}
	}
}
