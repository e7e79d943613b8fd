package limiter

import (
	"context"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/sluiceproxy/sluice/limiter/redistest"
)

// TestLostSettlements measures how long a key is refused because settlements
// were lost: when Redis is frozen for a second, when one of four sidecars is
// killed, and when all that the bucket has is in flight and lost.
func TestLostSettlements(t *testing.T) {
	const rate, burst, life = 100, 100, 2 * time.Second
	b := bucket(t, rate, time.Second, burst)
	const half, inFlight = rate / 2, 30 // requests at half the rate, 30 % of the burst at a time
	const response = inFlight * time.Second / half
	for _, tt := range []struct {
		name  string
		fault func(server *redistest.Server, dead *[4]atomic.Bool) time.Time // returns when it is over
		// The longest time after the fault for which requests are denied.
		most time.Duration
	}{
		{"frozen for a second", func(server *redistest.Server, _ *[4]atomic.Bool) time.Time {
			server.Freeze()
			<-time.After(time.Second)
			server.Thaw()
			return time.Now()
		}, 0},
		{"one of four sidecars killed", func(_ *redistest.Server, dead *[4]atomic.Bool) time.Time {
			dead[0].Store(true)
			return time.Now()
		}, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			server := redistest.Start(t)
			s := &shaky{options: RedisOptions{URL: server.URL()}}
			var stores [4]*Redis
			for i := range stores {
				stores[i] = s.open(t, 100*time.Millisecond)
				if err := stores[i].Ping(t.Context()); err != nil {
					t.Fatal(err)
				}
			}
			var dead [4]atomic.Bool
			var mu sync.Mutex
			var denied []time.Time
			var n, allowed, failed, lost atomic.Int64
			a := charge(b, "a").holding(life)
			request := func() {
				i := n.Add(1) % 4
				if dead[i].Load() {
					return
				}
				d := Decide(context.Background(), stores[i], []Charge{a})
				switch d.Outcome {
				case Limited:
					mu.Lock()
					denied = append(denied, time.Now())
					mu.Unlock()
				case Allowed:
					allowed.Add(1)
					<-time.After(response) // what the upstream takes
					if dead[i].Load() {
						lost.Add(1)
						return
					}
					result := make([]Settled, 1)
					ctx, cancel := context.WithTimeout(context.Background(), time.Second)
					defer cancel()
					stores[i].Settle(ctx, []Settlement{{Limit: a.Limit, Key: a.Key, Hold: d.Verdicts[0].Hold}}, result)
					if result[0].Err != nil {
						lost.Add(1)
					}
				default:
					failed.Add(1)
				}
			}
			var over time.Time
			meanwhile(func() { redistest.Pace(half, 6*time.Second, request) }, func() {
				<-time.After(2 * time.Second)
				over = tt.fault(server, &dead)
			})
			var until time.Duration
			for _, at := range denied {
				until = max(until, at.Sub(over))
			}
			t.Logf("%d allowed, %d failed, %d settlements lost; %d denied, the last %v after it was over",
				allowed.Load(), failed.Load(), lost.Load(), len(denied), until)
			if allowed.Load() < 100 || lost.Load() == 0 {
				t.Error("this says little")
			}
			if until > tt.most {
				t.Errorf("denied for %v, want at most %v", until, tt.most)
			}
		})
	}
	// The whole burst is in flight and lost: nothing is granted until the holds
	// end, at most a twelfth late.
	t.Run("the whole burst", func(t *testing.T) {
		t.Parallel()
		r := (&shaky{options: RedisOptions{URL: redistest.Start(t).URL()}}).open(t, time.Second)
		a := charge(b, "a").holding(life)
		began := time.Now()
		for range burst {
			if d := Decide(t.Context(), r, []Charge{a}); d.Outcome != Allowed {
				t.Fatal(d.Outcome)
			}
		}
		eventually(t, "a grant", func() bool { return Decide(t.Context(), r, []Charge{a}).Outcome == Allowed })
		took := time.Since(began)
		t.Logf("nothing is granted for %v", took)
		if took < life || took > life+life/sliceParts+500*time.Millisecond {
			t.Errorf("a grant after %v, want %v and a twelfth at most", took, life)
		}
	})
}
