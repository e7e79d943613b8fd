package limiter

import (
	"context"
	"flag"
	"fmt"
	"math/rand/v2"
	"sync"
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

// far is a lender that is half a millisecond away. It calls denied when it denies
// a check.
type far struct {
	*lender

	denied func()
}

func (f far) Take(ctx context.Context, charges []Charge, verdicts []Verdict) {
	time.Sleep(250 * time.Microsecond)
	f.lender.Take(ctx, charges, verdicts)
	if !verdicts[0].Allowed && charges[0].HoldFor == 0 {
		f.denied()
	}
	time.Sleep(250 * time.Microsecond)
}

func (f far) Settle(ctx context.Context, settlements []Settlement, results []Settled) {
	time.Sleep(250 * time.Microsecond)
	f.lender.Settle(ctx, settlements, results)
	time.Sleep(250 * time.Microsecond)
}

// play plays the load on sidecars as they are wired, with a lender in this process
// and a clock that does not wait. Its checks come as a Poisson process.
func (l leaseLoad) play(t *testing.T) (cost leaseCost) {
	const rate = 2000
	synctest.Test(t, func(t *testing.T) {
		random := rand.New(rand.NewPCG(1, 2))
		from := &lender{Memory: newMemory("buckets", 1<<20, wallClock, nil, prometheus.NewRegistry())}
		c := charge(bucket(t, rate, time.Second, int64(rate*l.burst.Seconds())), "tenant").leased(l.lease)
		var mu sync.Mutex // guards cost
		var all []*Leases
		denied := func() {
			left := int64(0)
			for _, s := range all {
				if e := s.find(c.Key); e != nil {
					e.mu.Lock()
					left += e.left
					e.mu.Unlock()
				}
			}
			if left >= c.Cost {
				mu.Lock()
				cost.wrong++
				mu.Unlock()
			}
		}
		for range l.sidecars {
			store := far{from, denied}
			all = append(all, newLeases(NewCeiling(store, prometheus.NewRegistry()), store, wallClock, prometheus.NewRegistry()))
		}
		var under sync.WaitGroup
		began, next := time.Now(), time.Duration(0)
		for {
			next += time.Duration(random.ExpFloat64() / (rate * l.demand) * float64(time.Second))
			if next > l.lasts {
				break
			}
			time.Sleep(time.Until(began.Add(next)))
			sidecar := all[random.IntN(len(all))]
			under.Go(func() {
				d := Decide(context.Background(), sidecar, []Charge{c})
				if d.Verdicts[0].Source == CeilingSource {
					denied()
				}
				mu.Lock()
				defer mu.Unlock()
				if cost.checks++; d.Outcome == Allowed {
					cost.granted++
				}
			})
		}
		under.Wait()
		cost.calls = int(from.calls.Load())
		for _, s := range all {
			s.Close(context.Background())
		}
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
	lasts := 10 * time.Second
	for _, sidecars := range []int{1, 4, 16} {
		for _, demand := range []float64{.8, 2} {
			l := leaseLoad{sidecars: sidecars, demand: demand, lease: 200 * time.Millisecond, burst: time.Second, lasts: lasts}
			with := l.play(t)
			l.lease = 0
			without := l.play(t)
			t.Logf("%d sidecars at %.1f of the rate: %v; without leases %v", sidecars, demand, with, without)
			most := .005
			if sidecars > 4 {
				most = .01
			}
			switch wrong := float64(with.wrong) / float64(with.checks); {
			case demand < 1 && (with.granted < with.checks || with.calls*4 > without.calls):
				t.Error("below the rate none is denied, and most checks ask nobody")
			case wrong > most || float64(with.granted) < .98*float64(without.granted):
				t.Errorf("%.4f denied wrongly, want %.3f at most; %.4f of the grants", wrong, most,
					float64(with.granted)/float64(without.granted))
			}
		}
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
