package limiter

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"pgregory.net/rapid"

	"github.com/sluiceproxy/sluice/limiter/redistest"
)

// counted is a store that counts its takes and their charges.
type counted struct {
	Store
	takes, charges atomic.Int64
}

func (c *counted) Take(ctx context.Context, charges []Charge, verdicts []Verdict) {
	c.takes.Add(1)
	c.charges.Add(int64(len(charges)))
	c.Store.Take(ctx, charges, verdicts)
}

// underCeiling is a Ceiling over a Memory, both by a test's clock.
func underCeiling(t *testing.T) (*Ceiling, *counted, *testClock) {
	clock := &testClock{t: t}
	clock.set(begin)
	store := &counted{Store: newMemory("buckets", maxMemory, clock.now, nil, prometheus.NewRegistry())}
	return newCeiling(store, clock.now, prometheus.NewRegistry()), store, clock
}

// With several sidecars on one store, and any rates and costs, a ceiling denies
// only what the store would have denied, and leaves every other decision to the
// store.
func TestCeilingIsNeverWrong(t *testing.T) {
	setRapidChecks(t, 2000)
	denials := 0
	rapid.Check(t, func(rt *rapid.T) {
		clock := &testClock{t: t}
		clock.set(begin)
		m := newMemory("buckets", 1<<20, clock.now, nil, prometheus.NewRegistry())
		m.wall = clock.now
		sidecars := make([]*Ceiling, 2)
		for i := range sidecars {
			sidecars[i] = newCeiling(m, clock.now, prometheus.NewRegistry())
		}
		shape := rapid.OneOf(anyBucket(), anyQuotaOf(t)).Draw(rt, "bucket")
		token := shape.wait(level{}, 1).Microseconds()
		if shape.IsQuota() {
			clock.set(shape.Calendar().window(begin).end - rapid.Int64Range(0, 2_000_000).Draw(rt, "before its end"))
			token = 10_000
		}
		for range 30 {
			clock.set(clock.at + rapid.OneOf(rapid.Int64Range(0, 2*token), rapid.Int64Range(0, 100_000)).Draw(rt, "later"))
			c := charge(shape, rapid.SampledFrom([]string{"a", "b"}).Draw(rt, "key"))
			c.Cost = rapid.OneOf(rapid.Int64Range(0, 3), rapid.Int64Range(0, shape.burst+1)).Draw(rt, "cost")
			fresh := newState(shape, clock.at)
			before := fresh.levelFor(shape)
			if s, ok := m.shards[m.shardOf(c.Key)].buckets[c.Key]; ok {
				before, _ = levelAt(s, shape, clock.at)
			}
			var v [1]Verdict
			sidecars[rapid.IntRange(0, 1).Draw(rt, "sidecar")].Take(t.Context(), []Charge{c}, v[:])
			if v[0].Allowed != (before.tokens >= c.needs()) {
				rt.Fatalf("%+v of a bucket with %+v: %+v", c, before, v[0])
			}
			if v[0].Source == CeilingSource {
				denials++
				if exact := shape.wait(before, c.needs()); v[0].RetryAfter > exact {
					rt.Fatalf("retry after %v, and %v would do", v[0].RetryAfter, exact)
				}
			}
		}
	})
	if denials < 1000 {
		t.Errorf("only %d denials without asking", denials)
	}
}

// A flood is answered without the store, and everyone gets each token as it
// comes.
func TestCeilingSparesTheStore(t *testing.T) {
	c, store, clock := underCeiling(t)
	a := charge(bucket(t, 1, time.Second, 5), "a")
	granted := 0
	for range 10_000 { // ten seconds
		var v [1]Verdict
		if c.Take(t.Context(), []Charge{a}, v[:]); v[0].Allowed {
			granted++
		} else if v[0].RetryAfter <= 0 || v[0].RetryAfter > time.Second || v[0].Remaining != 0 {
			t.Fatalf("%+v", v[0])
		}
		clock.advance(time.Millisecond)
	}
	// The drift of a thousandth, which has the store asked a millisecond early.
	if n := store.takes.Load(); granted != 14 || n > 14+10+10 {
		t.Errorf("%d granted, the store was asked %d times", granted, n)
	}
	// While the next token is far off, the store is asked once a second, as no
	// answer is trusted for longer: here the bucket is reset.
	b := charge(bucket(t, 1, day, 1), "b")
	taker{t, c}.want("ok 0", b)
	before := store.takes.Load()
	for range 500 {
		taker{t, c}.want("no 0 retry "+clock.left(b, c), b)
		clock.advance(time.Millisecond)
	}
	if n := store.takes.Load() - before; n != 0 {
		t.Errorf("asked %d times", n)
	}
	m := store.Store.(*Memory)
	delete(m.shards[m.shardOf(b.Key)].buckets, b.Key)
	for wrong := 0; ; wrong++ {
		var v [1]Verdict
		if c.Take(t.Context(), []Charge{b}, v[:]); v[0].Allowed {
			if wrong != 501 {
				t.Errorf("denied for %d ms after the reset", wrong)
			}
			break
		}
		clock.advance(time.Millisecond)
	}
}

// left returns the verdict of a ceiling on an empty bucket, by the ceiling's
// own arithmetic.
func (c *testClock) left(charge Charge, of *Ceiling) string {
	l, _, _ := of.most(c.at, &charge)
	return fmt.Sprint(charge.Bucket.wait(l, 1))
}

// If a ceiling denies a request, its other enforced charges have no verdict and
// take no tokens, and its shadow charges are taken.
func TestCeilingBesideOthers(t *testing.T) {
	c, store, _ := underCeiling(t)
	empty, full := charge(bucket(t, 1, time.Hour, 1), "empty"), charge(bucket(t, 1, time.Hour, 10), "full")
	shadow := charge(bucket(t, 1, time.Hour, 10), "shadow").shadow()
	denying := charge(bucket(t, 1, time.Hour, 1), "denying").shadow()
	k := taker{t, c}
	k.want("ok 0, ok 0", empty, denying)
	asked := store.takes.Load()
	d := Decide(t.Context(), c, []Charge{full, shadow, empty, denying})
	if d.Outcome != Limited || d.Strictest != 2 || d.Verdicts[0].Known() || !d.Verdicts[1].Allowed ||
		d.Verdicts[1].Remaining != 9 || d.Verdicts[3].Allowed || d.Verdicts[2].Source != CeilingSource ||
		d.Verdicts[3].Source != CeilingSource {
		t.Errorf("%+v", d)
	}
	if n := store.takes.Load() - asked; n != 1 {
		t.Errorf("the store was asked %d times, want once for the shadow", n)
	}
	for name, want := range map[string]int64{"full": 10, "shadow": 9} {
		m := store.Store.(*Memory)
		if v := (taker{t, m}).take(charge(bucket(t, 1, time.Hour, 10), name).costs(0))[0]; v.Remaining != want {
			t.Errorf("%s: %d left, want %d", name, v.Remaining, want)
		}
	}
	// The shadow counts for itself, until it denies for certain, too: then nobody
	// is asked.
	allowed, denied := 1, 0
	for range 20 {
		if v := k.take(empty, shadow)[1]; v.Allowed {
			allowed++
		} else if v.Known() {
			denied++
		}
	}
	if n := store.takes.Load() - asked; allowed != 10 || denied != 11 || n > 12 {
		t.Errorf("the shadow allowed %d and denied %d, want 10 and 11; the store was asked %d times", allowed, denied, n)
	}
	// A shadow's certain denial denies nobody.
	k.want("no 0 retry 1h0m0s, ok 9", denying, full)
	// Another shape is another question, and a cost of nothing is never denied.
	wider := empty
	wider.Bucket = bucket(t, 1, time.Second, 5)
	k.want("no 0 retry 1s", wider)
	k.want("ok 0", empty.costs(0))
}

// A take may begin before another take's answer arrives. It then still gets a
// sound verdict from what the bucket held when it began.
func TestCeilingOfANewerAnswer(t *testing.T) {
	c, _, clock := underCeiling(t)
	fast := charge(bucket(t, 10_000_000, time.Second, 1000), "fast").costs(1000)
	taker{t, c}.want("ok 0", fast)
	clock.at -= 100
	if most, _, ok := c.most(clock.now(), &fast); !ok || most.tokens < 0 || most.tokens > 10 {
		t.Errorf("%+v, %v", most, ok)
	}
}

// What is kept is bounded, and swept.
func TestCeilingIsBounded(t *testing.T) {
	registry := prometheus.NewRegistry()
	clock := &testClock{t: t}
	clock.set(begin)
	store := &counted{Store: newMemory("buckets", maxMemory, clock.now, nil, prometheus.NewRegistry())}
	c := newCeiling(store, clock.now, registry)
	for i := range 80_000 {
		taker{t, c}.want("ok 0", charge(bucket(t, 1, day, 1), fmt.Sprint(i)))
	}
	kept, bytes := c.entries.Load(), int64(0)
	for i := range c.shards {
		for key := range c.shards[i].known {
			bytes += entrySize(key)
		}
	}
	if bytes > ceilingBudget() || bytes < ceilingBudget()*9/10 {
		t.Errorf("%d are kept, in %d bytes of %d", kept, bytes, ceilingBudget())
	}
	if n, err := testutil.GatherAndCount(registry, "sluice_janitor_entries"); n != 1 || err != nil {
		t.Error(n, err)
	}
	clock.advance(ceilingLife)
	if c.sweep(); c.entries.Load() != kept {
		t.Error("swept too early")
	}
	clock.advance(time.Microsecond)
	if c.sweep(); c.entries.Load() != 0 || testutil.ToFloat64(c.swept) != float64(kept) ||
		testutil.ToFloat64(c.sweeps) != 2 {
		t.Errorf("%d left of %d", c.entries.Load(), kept)
	}
	// A bucket that others have filled again is forgotten with the next answer.
	a := charge(bucket(t, 1, day, 4), "a").costs(3)
	k := taker{t, c}
	k.want("ok 1", a)
	if k.want("ok 0", a.costs(1)); c.entries.Load() != 1 {
		t.Errorf("%d entries", c.entries.Load())
	}
	m := store.Store.(*Memory)
	delete(m.shards[m.shardOf(a.Key)].buckets, a.Key)
	if k.want("ok 4", a.costs(0)); c.entries.Load() != 0 {
		t.Errorf("%d entries of a full bucket", c.entries.Load())
	}
}

// Many concurrent callers on a real Redis get no more than the buckets hold, in
// few calls.
func TestCeilingOnRedis(t *testing.T) {
	const callers, keys, lasts = 16, 5, 2 * time.Second
	r := newTestRedis(t, redistest.Start(t), serverClock)
	c := NewCeiling(r, prometheus.NewRegistry())
	var wg sync.WaitGroup
	var granted, checks atomic.Int64
	began := time.Now()
	for i := range callers {
		wg.Go(func() {
			random := rand.New(rand.NewPCG(3, uint64(i)))
			for time.Since(began) < lasts {
				var v [1]Verdict
				c.Take(t.Context(), []Charge{charge(bucket(t, 10, time.Second, 10), fmt.Sprint(random.IntN(keys)))}, v[:])
				checks.Add(1)
				if v[0].Allowed {
					granted.Add(1)
				} else if v[0].Err != nil {
					t.Error(v[0].Err)
				}
			}
		})
	}
	wg.Wait()
	took := time.Since(began)
	most := keys * (10 + 10*took.Seconds())
	if g := float64(granted.Load()); g > most || g < most*8/10 {
		t.Errorf("%v granted, at most %.1f", g, most)
	}
	if n := int64(calls(t, r)); n > granted.Load()+int64(keys*took.Seconds())+checks.Load()/100 {
		t.Errorf("%d calls for %d checks, of which %d were granted", n, checks.Load(), granted.Load())
	}
	t.Logf("%d checks, %d granted, %d calls", checks.Load(), granted.Load(), calls(t, r))
}
