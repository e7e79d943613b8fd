package limiter

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/sluiceproxy/sluice/limiter/redistest"
)

// eachStore runs a test on every store, with a clock that the test sets.
func eachStore(t *testing.T, test func(t *testing.T, s Store, clock *testClock)) {
	t.Run("memory", func(t *testing.T) {
		clock := &testClock{t: t}
		clock.set(begin)
		m := newMemory("buckets", 1<<20, clock.now, nil, prometheus.NewRegistry())
		m.wall = clock.now
		test(t, m, clock)
	})
	t.Run("redis", func(t *testing.T) {
		server := redistest.Start(t)
		clock := &testClock{t: t, client: server.Client()}
		clock.set(begin)
		test(t, newTestRedis(t, server, keyClock), clock)
	})
}

// taker takes from a store in a test's words.
type taker struct {
	t *testing.T
	s Store
}

// charge is one token of a limit that is named as its key.
func charge(b Bucket, key string) Charge {
	return Charge{
		Limit:  &Limit{Domain: "test", Name: key, OnFailure: Deny},
		Bucket: b,
		Key:    "sluice:test:" + key + ":{-}",
		Cost:   1,
	}
}

func (c Charge) costs(cost int64) Charge { c.Cost = cost; return c }

func (c Charge) shadow() Charge {
	l := *c.Limit
	l.Shadow = true
	c.Limit = &l
	return c
}

// take takes from the store, and returns a line a charge: "ok" or "no", the
// tokens left, and the waits.
func (k taker) take(charges ...Charge) []Verdict {
	k.t.Helper()
	verdicts := make([]Verdict, len(charges))
	k.s.Take(context.Background(), charges, verdicts)
	for i, v := range verdicts {
		if v.Err != nil {
			k.t.Fatalf("%s: %v", charges[i].Key, v.Err)
		}
	}
	return verdicts
}

func (k taker) want(want string, charges ...Charge) {
	k.t.Helper()
	var got []string
	for _, v := range k.take(charges...) {
		line := "no"
		if v.Allowed {
			line = "ok"
		}
		line += fmt.Sprint(" ", v.Remaining)
		if v.RetryAfter != 0 {
			line += fmt.Sprint(" retry ", v.RetryAfter)
		}
		got = append(got, line)
	}
	if got := strings.Join(got, ", "); got != want {
		k.t.Errorf("got %q, want %q", got, want)
	}
}

func TestStores(t *testing.T) {
	for _, tt := range []struct {
		name string
		test func(t *testing.T, k taker, clock *testClock)
	}{
		{"starts full, and a token comes back in its time", func(t *testing.T, k taker, clock *testClock) {
			a := charge(bucket(t, 1, time.Second, 3), "a")
			k.want("ok 2", a)
			k.want("ok 1", a)
			k.want("ok 0", a)
			k.want("no 0 retry 1s", a)
			clock.advance(time.Second - time.Microsecond)
			k.want("no 0 retry 1µs", a)
			clock.advance(time.Microsecond)
			k.want("ok 0", a)
		}},
		{"never above its burst", func(t *testing.T, k taker, clock *testClock) {
			a := charge(bucket(t, 10, time.Second, 3), "a")
			k.want("ok 0", a.costs(3))
			clock.advance(400 * day)
			k.want("ok 0", a.costs(3))
			k.want("no 0 retry 100ms", a)
		}},
		{"a cost of 0 looks, and stores nothing", func(t *testing.T, k taker, clock *testClock) {
			a := charge(bucket(t, 1, time.Second, 3), "a")
			k.want("ok 3", a.costs(0))
			k.want("ok 0", a.costs(3))
			k.want("ok 0", a.costs(0))
		}},
		{"a cost above the burst is never granted", func(t *testing.T, k taker, clock *testClock) {
			a := charge(bucket(t, 1, time.Second, 3), "a")
			k.want("no 3 retry "+Never.String(), a.costs(4))
			k.want("no 3 retry "+Never.String(), a.costs(1<<62))
			k.want("ok 2", a)
		}},
		{"all or none", func(t *testing.T, k taker, clock *testClock) {
			a, b := charge(bucket(t, 1, time.Second, 5), "a"), charge(bucket(t, 1, time.Minute, 1), "b")
			k.want("ok 4, ok 0", a, b)
			for range 1000 {
				k.want("ok 4, no 0 retry 1m0s", a, b)
				k.want("no 0 retry 1m0s, ok 4", b, a)
			}
			k.want("ok 3", a)
		}},
		{"a shadow limit neither denies nor is held back", func(t *testing.T, k taker, clock *testClock) {
			a, b := charge(bucket(t, 1, time.Second, 1), "a"), charge(bucket(t, 1, time.Second, 3), "b").shadow()
			k.want("ok 0, ok 2", a, b)
			k.want("no 0 retry 1s, ok 1", a, b)
			k.want("no 0 retry 1s, ok 0", a, b)
			clock.advance(time.Second)
			k.want("ok 0, no 1 retry 1s", a, b.costs(2))
		}},
		{"says when it is full, and when the next token comes", func(t *testing.T, k taker, clock *testClock) {
			a := charge(bucket(t, 3, time.Second, 5), "a")
			if v := k.take(a.costs(0))[0]; v.FullAfter != 0 || v.NextAfter != 0 {
				t.Errorf("full: %+v", v)
			}
			k.want("ok 0", a.costs(5))
			clock.advance(100 * time.Millisecond) // 0.3 of a token
			v := k.take(a)[0]
			if v.Allowed || v.RetryAfter != 233334*time.Microsecond || v.NextAfter != v.RetryAfter ||
				v.FullAfter != 1566667*time.Microsecond {
				t.Errorf("%+v", v)
			}
		}},
		{"a clock that goes back grants nothing, and holds back no longer than a token takes",
			func(t *testing.T, k taker, clock *testClock) {
				a := charge(bucket(t, 1, time.Second, 2), "a")
				k.want("ok 0", a.costs(2))
				clock.advance(500 * time.Millisecond)
				k.want("no 0 retry 500ms", a)
				clock.advance(-time.Hour)
				k.want("no 0 retry 1s", a) // what came by then was not stored
				clock.advance(time.Second)
				k.want("ok 0", a)
				clock.advance(time.Hour) // a step forward: one burst
				k.want("ok 0", a.costs(2))
				k.want("no 0 retry 1s", a)
			}},
		{"a grant at a clock that went back counts from there", func(t *testing.T, k taker, clock *testClock) {
			a := charge(bucket(t, 1, time.Second, 2), "a")
			k.want("ok 1", a)
			clock.advance(-time.Hour)
			k.want("ok 0", a)
			clock.advance(time.Second)
			k.want("ok 0", a)
		}},
		{"a raised rate counts from now on, also where it denies first", func(t *testing.T, k taker, clock *testClock) {
			slow, fast := charge(bucket(t, 1, day, 10), "a"), charge(bucket(t, 10, time.Second, 10), "a")
			k.want("ok 0", slow.costs(10))
			clock.advance(12 * time.Hour)
			k.want("no 0 retry 50ms", fast) // half a token was there
			clock.advance(50 * time.Millisecond)
			k.want("ok 0", fast)
		}},
		{"a changed burst keeps the tokens that are there", func(t *testing.T, k taker, clock *testClock) {
			small, large := charge(bucket(t, 1, time.Hour, 5), "a"), charge(bucket(t, 1, time.Hour, 50), "a")
			k.want("ok 2", small.costs(3))
			k.want("ok 1", large)
			k.want("ok 0", small)
			k.want("no 0 retry 1h0m0s", large)
		}},
		{"a lowered burst is the most that is kept", func(t *testing.T, k taker, clock *testClock) {
			large, small := charge(bucket(t, 1, time.Hour, 50), "a"), charge(bucket(t, 1, time.Hour, 5), "a")
			k.want("ok 49", large)
			k.want("ok 4", small)
			k.want("ok 3", large)
		}},
		{"keys are their own", func(t *testing.T, k taker, clock *testClock) {
			one := bucket(t, 1, time.Hour, 1)
			for _, key := range []string{"a", "A", "a:", "a\x00", ""} {
				k.want("ok 0", charge(one, key))
			}
		}},
		{"many limits at once", func(t *testing.T, k taker, clock *testClock) {
			var charges []Charge
			for i := range 100 {
				charges = append(charges, charge(bucket(t, 1, time.Hour, 2), fmt.Sprint(i)))
			}
			for range 2 {
				for i, v := range k.take(charges...) {
					if !v.Allowed {
						t.Errorf("%d: %+v", i, v)
					}
				}
			}
			for i, v := range k.take(charges...) {
				if v.Allowed || v.Remaining != 0 {
					t.Errorf("%d: %+v", i, v)
				}
			}
		}},
		{"64 callers get what there is, and no more", func(t *testing.T, k taker, clock *testClock) {
			a, b := charge(bucket(t, 1, time.Hour, 1000), "a"), charge(bucket(t, 1, time.Hour, 700), "b")
			var both, onlyA atomic.Int64
			var wg sync.WaitGroup
			for range 64 {
				wg.Go(func() {
					verdicts := make([]Verdict, 2)
					for range 20 {
						k.s.Take(t.Context(), []Charge{a, b}, verdicts)
						if verdicts[0].Allowed && verdicts[1].Allowed {
							both.Add(1)
						}
						k.s.Take(t.Context(), []Charge{a}, verdicts[:1])
						if verdicts[0].Allowed {
							onlyA.Add(1)
						}
					}
				})
			}
			wg.Wait()
			if both.Load() > 700 || both.Load()+onlyA.Load() != 1000 {
				t.Errorf("%d took from both and %d from the first, of 1000 and 700", both.Load(), onlyA.Load())
			}
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			eachStore(t, func(t *testing.T, s Store, clock *testClock) { tt.test(t, taker{t, s}, clock) })
		})
	}
}

// The walk of the README, step by step.
func TestREADMEWalk(t *testing.T) {
	eachStore(t, func(t *testing.T, s Store, clock *testClock) {
		k := taker{t, s}
		orders := charge(bucket(t, 2, time.Second, 5), "orders")
		k.want("ok 4", orders)
		k.want("ok 0", orders.costs(4))
		k.want("no 0 retry 500ms", orders)
		clock.advance(250 * time.Millisecond)
		k.want("no 0 retry 250ms", orders)
		clock.advance(250 * time.Millisecond)
		k.want("ok 0", orders)
		clock.advance(2 * time.Second)
		k.want("no 4 retry 500ms", orders.costs(5))
		k.want("ok 0", orders.costs(4))
		clock.advance(time.Hour)
		k.want("ok 4", orders)
	})
}
