package limiter

import (
	"context"
	"fmt"
	"math"
	"runtime"
	"runtime/debug"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
)

func TestMemorySweepsWhatIsFull(t *testing.T) {
	clock := &testClock{t: t, at: begin}
	m := newMemory("buckets", 1<<20, clock.now, nil, prometheus.NewRegistry())
	k := taker{t, m}
	soon, late := charge(bucket(t, 1, time.Second, 3), "soon"), charge(bucket(t, 1, time.Hour, 3), "late")
	k.want("ok 1", soon.costs(2))
	k.want("ok 2", late)
	sweep := func(entries int64, swept float64) {
		t.Helper()
		m.sweep()
		if m.entries.Load() != entries || testutil.ToFloat64(m.swept) != swept {
			t.Errorf("%d entries after %v swept, want %d after %v", m.entries.Load(), testutil.ToFloat64(m.swept), entries,
				swept)
		}
	}
	sweep(2, 0)
	clock.advance(2*time.Second - time.Microsecond)
	sweep(2, 0)
	clock.advance(time.Microsecond)
	sweep(1, 1)
	k.want("ok 2", soon)
	k.want("ok 1", late)
	clock.advance(2 * time.Hour)
	sweep(0, 3)
}

func TestMemoryRunsItsJanitor(t *testing.T) {
	m := NewMemory(1<<20, nil, prometheus.NewRegistry())
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		m.Run(ctx)
	}()
	cancel()
	<-done
}

// Past its bound the store drops nothing: the new keys of a limit share one
// bucket.
func TestMemoryIsBounded(t *testing.T) {
	clock := &testClock{t: t, at: begin}
	core, logs := observer.New(zap.WarnLevel)
	m := newMemory("buckets", 3*(entryOverhead+10), clock.now, zap.New(core), prometheus.NewRegistry())
	k := taker{t, m}
	b := bucket(t, 1, time.Hour, 2)
	limit, other := &Limit{Domain: "d", Name: "one"}, &Limit{Domain: "d", Name: "two"}
	of := func(l *Limit, key int) Charge {
		return Charge{Limit: l, Bucket: b, Key: fmt.Sprint(l.Name, key), Cost: 1}
	}

	k.want("ok 1, ok 1, ok 1", of(limit, 1), of(limit, 2), of(limit, 3))
	k.want("ok 1", of(limit, 4)) // the shared one
	k.want("ok 0", of(limit, 5))
	k.want("no 0 retry 1h0m0s", of(limit, 6))
	k.want("ok 1", of(other, 1)) // another limit shares another
	k.want("ok 0", of(limit, 1)) // and who was there first is as before
	k.want("no 0 retry 1h0m0s, ok 0", of(limit, 7), of(limit, 2).shadow())
	if n := m.entries.Load(); n != 3 {
		t.Errorf("%d entries", n)
	}
	if n := testutil.ToFloat64(m.shared); n != 5 {
		t.Errorf("%v takes counted", n)
	}
	m.sweep()
	m.sweep()
	if logs.Len() != 1 || logs.All()[0].ContextMap()["takes"] != int64(5) {
		t.Errorf("logged: %+v", logs.All())
	}
	clock.advance(2 * time.Hour)
	m.sweep()
	k.want("ok 1", of(limit, 8)) // a bucket of its own again
	if len(m.overflow.buckets) != 0 {
		t.Errorf("%d overflow buckets are left", len(m.overflow.buckets))
	}
}

// The keys of one limit that have a quota share another bucket than those that have
// a rate, and what it holds is settled by their keys.
func TestOverflowOfQuotas(t *testing.T) {
	m := newMemory("buckets", 0, (&testClock{t: t, at: begin}).now, nil, prometheus.NewRegistry())
	calendar, err := NewCalendar(Month, "UTC", time.Time{})
	if err != nil {
		t.Fatal(err)
	}
	monthly, err := NewQuota(1000, calendar)
	if err != nil {
		t.Fatal(err)
	}
	limit := &Limit{Domain: "d", Name: "one"}
	rated := Charge{Limit: limit, Bucket: bucket(t, 1, time.Hour, 9), Key: "s:d:one:{a}", Cost: 1}
	counted := Charge{Limit: limit, Bucket: monthly, Key: "s:d:one/quota:{b}", Cost: 5, HoldFor: time.Minute}
	verdicts, settled := make([]Verdict, 2), make([]Settled, 1)
	m.Take(t.Context(), []Charge{rated, counted}, verdicts)
	m.Settle(t.Context(), []Settlement{{Limit: limit, Key: counted.Key, Hold: verdicts[1].Hold, Cost: 1}}, settled)
	if !settled[0].Known || settled[0].Returned != 4 {
		t.Errorf("settled %+v", settled[0])
	}
	m.Take(t.Context(), []Charge{rated, counted}, verdicts)
	if verdicts[0].Remaining != 7 || verdicts[1].Remaining != 994 {
		t.Errorf("%d and %d are left", verdicts[0].Remaining, verdicts[1].Remaining)
	}
}

// A look, and a denied take of a full bucket, leave nothing behind.
func TestMemoryKeepsNoFullBucket(t *testing.T) {
	m := newMemory("buckets", 3*(entryOverhead+10), (&testClock{t: t, at: begin}).now, nil, prometheus.NewRegistry())
	k := taker{t, m}
	b := bucket(t, 1, time.Hour, 2)
	for i := range 10 {
		k.want("ok 2", charge(b, fmt.Sprint(i)).costs(0))
		k.want("no 2 retry "+Never.String(), charge(b, fmt.Sprint(i)).costs(3))
	}
	if n := m.entries.Load(); n != 0 {
		t.Errorf("%d entries", n)
	}
}

func TestMemoryBudget(t *testing.T) {
	old := debug.SetMemoryLimit(math.MaxInt64)
	defer debug.SetMemoryLimit(old)
	if n := MemoryBudget(); n != maxMemory {
		t.Errorf("%d bytes without GOMEMLIMIT", n)
	}
	debug.SetMemoryLimit(128 << 20)
	if n := MemoryBudget(); n != 32<<20 {
		t.Errorf("%d bytes with 128 MiB", n)
	}
}

// The names of routes' limits are bounded, too: those past the bound share one
// bucket.
func TestOverflowIsBounded(t *testing.T) {
	m := newMemory("buckets", 0, (&testClock{t: t, at: begin}).now, nil, prometheus.NewRegistry())
	k := taker{t, m}
	b := bucket(t, 1, time.Hour, 2)
	for i := range maxOverflow {
		k.want("ok 1", charge(b, fmt.Sprint(i)))
	}
	k.want("ok 1", charge(b, "late"))
	k.want("ok 0", charge(b, "later"))
	k.want("ok 0", charge(b, "0"))
	if n := len(m.overflow.buckets); n != maxOverflow+1 {
		t.Errorf("%d overflow buckets", n)
	}
}

// Takes, sweeps and the bound at once: nothing is given twice. -race looks on.
func TestMemoryUnderLoad(t *testing.T) {
	m := NewMemory(50*(entryOverhead+10), nil, prometheus.NewRegistry())
	b := bucket(t, 1, time.Hour, 100)
	limit := &Limit{Domain: "d", Name: "one"}
	var mu sync.Mutex
	granted := map[string]int{}
	var wg sync.WaitGroup
	for g := range 8 {
		wg.Go(func() {
			mine := map[string]int{}
			for i := range 2000 {
				key, other := fmt.Sprint("k", i%40), fmt.Sprint("k", (i+g)%40)
				charges := []Charge{{Limit: limit, Bucket: b, Key: key, Cost: 1}}
				if key != other {
					charges = append(charges, Charge{Limit: limit, Bucket: b, Key: other, Cost: 1})
				}
				verdicts := make([]Verdict, len(charges))
				m.Take(t.Context(), charges, verdicts)
				all := true
				for _, v := range verdicts {
					all = all && v.Allowed
				}
				for _, c := range charges {
					if all {
						mine[c.Key]++
					}
				}
			}
			mu.Lock()
			defer mu.Unlock()
			for key, n := range mine {
				granted[key] += n
			}
		})
	}
	for range 100 {
		m.sweep()
	}
	wg.Wait()
	for key, n := range granted {
		if n > 100 {
			t.Errorf("%s was granted %d of 100", key, n)
		}
	}
}

// What a table takes is what is counted, whatever the length of the keys.
func TestMemoryInBytes(t *testing.T) {
	heap := func() uint64 {
		runtime.GC()
		var s runtime.MemStats
		runtime.ReadMemStats(&s)
		return s.HeapAlloc
	}
	limit := &Limit{Domain: "shop/checkout", Name: "per-client"}
	b := bucket(t, 1, time.Hour, 100)
	for _, tt := range []struct{ keys, length int }{{1_000_000, 60}, {12_000, 450}, {200_000, 450}} {
		before := heap()
		m := NewMemory(32<<20, nil, prometheus.NewRegistry())
		verdicts := make([]Verdict, 1)
		for i := range tt.keys {
			c := Charge{
				Limit:  limit,
				Bucket: b,
				Key:    fmt.Sprintf("sluice:shop/checkout:per-client:{%0*d}", tt.length-34, i),
				Cost:   1,
			}
			m.Take(t.Context(), []Charge{c}, verdicts)
		}
		took := heap() - before
		t.Logf("%d keys of %d bytes: %d buckets in %d kB, counted as %d kB", tt.keys, tt.length, m.entries.Load(), took>>10,
			m.bytes.Load()>>10)
		if took > 32<<20 {
			t.Errorf("%d keys of %d bytes take %d kB, want at most 32 MiB", tt.keys, tt.length, took>>10)
		}
		start := time.Now()
		m.sweep()
		t.Logf("a sweep over %d buckets took %v", m.entries.Load(), time.Since(start))
		runtime.KeepAlive(m)
	}
}

// A read-only take has the verdict that a take would have. It takes no tokens
// and creates no bucket.
func TestMemoryReadOnly(t *testing.T) {
	clock := &testClock{t: t, at: begin}
	m := newMemory("buckets", 1<<20, clock.now, nil, prometheus.NewRegistry())
	take, look := taker{t, m}, taker{t, m.ReadOnly()}
	c := charge(bucket(t, 1, time.Second, 3), "a")
	for range 3 {
		look.want("ok 3", c.costs(2))
	}
	if m.entries.Load() != 0 {
		t.Errorf("%d buckets of who only looked", m.entries.Load())
	}
	take.want("ok 1", c.costs(2))
	look.want("no 1 retry 1s", c.costs(2))
	take.want("no 1 retry 1s", c.costs(2))
	clock.advance(time.Second)
	look.want("ok 2", c.costs(2))
	take.want("ok 0", c.costs(2))
}
