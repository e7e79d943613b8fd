package limiter

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/sluiceproxy/sluice/limiter/redistest"
)

// stalls are when this machine, and not Redis, kept somebody waiting.
type stalls struct {
	mu   sync.Mutex
	seen []time.Time
}

// watchStalls notes each time that a goroutine wakes late.
func watchStalls(t *testing.T, late time.Duration) *stalls {
	s := &stalls{}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		for ctx.Err() == nil {
			before := time.Now()
			<-time.After(time.Millisecond)
			if now := time.Now(); now.Sub(before) > late {
				s.mu.Lock()
				s.seen = append(s.seen, now)
				s.mu.Unlock()
			}
		}
	}()
	t.Cleanup(func() { cancel(); <-done })
	return s
}

// during reports whether there was one in this time.
func (s *stalls) during(from, to time.Time) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.ContainsFunc(s.seen, func(at time.Time) bool { return at.After(from) && at.Before(to.Add(5*time.Millisecond)) })
}

// Redis is far away, and the timeout is the default. No take on a key of its own fails for that, nor waits long beside the round trip.
func TestChaosDistance(t *testing.T) {
	const timeout, late = 100 * time.Millisecond, 25 * time.Millisecond
	lasts := redistest.Scaled(2*time.Second, time.Minute)
	machine := watchStalls(t, 5*time.Millisecond)
	shape := bucket(t, 1, time.Minute, 5)
	for _, away := range []time.Duration{20, 40, 60, 80} {
		away *= time.Millisecond
		t.Run(away.String(), func(t *testing.T) {
			for _, perSecond := range []int{50, 200, 1000} {
				s := startShakySingle(t)
				s.proxies[0].Delay(away)
				r := s.open(t, timeout)
				if err := r.Ping(t.Context()); err != nil {
					t.Fatal(err)
				}
				var next, failed, excused atomic.Int64
				var mu sync.Mutex
				var took []time.Duration
				pace(perSecond, lasts, func() {
					began := time.Now()
					d := Decide(context.Background(), r, []Charge{charge(shape, fmt.Sprint(next.Add(1)))})
					ended := time.Now()
					switch {
					case machine.during(began, ended):
						excused.Add(1)
						return
					case d.Outcome != Allowed:
						failed.Add(1)
						t.Logf("%v after %v", d.Verdicts[0].Err, ended.Sub(began))
					}
					mu.Lock()
					defer mu.Unlock()
					took = append(took, ended.Sub(began))
				})
				opened := s.proxies[0].Opened()
				s.proxies[0].Mend()
				slices.Sort(took)
				if len(took) < perSecond/2 {
					t.Logf("%d/s: the machine stalled during all but %d of %d", perSecond, len(took), next.Load())
					continue
				}
				p99 := took[len(took)*99/100]
				t.Logf("%d/s: of %d takes %d failed, 99 %% took at most %v, the slowest %v; %d connections; the machine stalled during %d",
					perSecond, next.Load(), failed.Load(), p99, took[len(took)-1], opened, excused.Load())
				if failed.Load() > 0 {
					t.Errorf("%d/s: %d failed", perSecond, failed.Load())
				}
				if p99 > away+late {
					t.Errorf("%d/s: 99 %% took %v", perSecond, p99)
				}
				if opened > poolSize {
					t.Errorf("%d/s: %d connections", perSecond, opened)
				}
			}
		})
	}
}

// A client that comes with a thousand new keys at once takes nobody else's place.
func TestBurstOfKeys(t *testing.T) {
	const burst, perSecond, timeout, away = 1100, 20, 300 * time.Millisecond, 100 * time.Millisecond
	lasts := redistest.Scaled(5*time.Second, time.Minute)
	machine := watchStalls(t, 20*time.Millisecond)
	s := startShakySingle(t)
	s.proxies[0].Delay(away)
	r := s.open(t, timeout)
	if err := r.Ping(t.Context()); err != nil {
		t.Fatal(err)
	}
	shape := bucket(t, 1, time.Minute, 5)
	var next, asked, refused, excused, bursts atomic.Int64
	meanwhile(func() {
		pace(perSecond, lasts, func() {
			began := time.Now()
			d := Decide(context.Background(), r, []Charge{charge(shape, fmt.Sprint("other-", next.Add(1)))})
			switch {
			case d.Outcome == Allowed:
			case machine.during(began, time.Now()):
				excused.Add(1)
				return
			default:
				refused.Add(1)
				t.Log(d.Verdicts[0].Err)
			}
			asked.Add(1)
		})
	}, func() {
		pace(2, lasts, func() {
			bursts.Add(1)
			var wg sync.WaitGroup
			for range burst {
				wg.Go(func() { Decide(context.Background(), r, []Charge{charge(shape, fmt.Sprint("burst-", next.Add(1)))}) })
			}
			wg.Wait()
		})
	})
	t.Logf("beside %d bursts %d of %d takes were refused, and %d more while the machine stalled", bursts.Load(), refused.Load(), asked.Load(), excused.Load())
	if refused.Load()*100 > asked.Load() {
		t.Errorf("%d of %d were refused", refused.Load(), asked.Load())
	}
	if asked.Load() < int64(lasts.Seconds())*perSecond/2 {
		t.Errorf("only %d takes: this says little", asked.Load())
	}
}
