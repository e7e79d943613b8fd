package limiter

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/prometheus/common/expfmt"
)

// leased makes a charge's limit have a lease.
func (c Charge) leased(lasts time.Duration) Charge {
	l := *c.Limit
	l.Lease = lasts
	c.Limit = &l
	return c
}

// lender is a Memory that counts its calls. It can be made to fail, as a Redis
// does: before a call is executed, or after.
type lender struct {
	*Memory
	calls  atomic.Int64
	fails  atomic.Bool
	before func() error // nil: no call fails by it
	after  func() error
}

// refuses reports whether a call is not executed.
func (l *lender) refuses() bool { return l.fails.Load() || l.before != nil && l.before() != nil }

var errLost = &StoreError{Kind: KindTimeout, Err: errors.New("lost")}

func (l *lender) Take(ctx context.Context, charges []Charge, verdicts []Verdict) {
	l.calls.Add(1)
	if l.refuses() {
		failAll(verdicts, errLost)
		return
	}
	l.Memory.Take(ctx, charges, verdicts)
	if l.after != nil && l.after() != nil {
		failAll(verdicts, errLost)
	}
}

func (l *lender) Settle(ctx context.Context, settlements []Settlement, results []Settled) {
	l.calls.Add(1)
	if l.refuses() {
		return
	}
	l.Memory.Settle(ctx, settlements, results)
	if l.after != nil {
		_ = l.after()
	}
}

// wallClock is Redis's clock, and that of the lender in a test.
func wallClock() int64 { return time.Now().UnixMicro() }

// newTestLeases returns a Leases over a lender, in a synctest bubble.
func newTestLeases(t *testing.T, budget int64) (*Leases, *lender, taker) {
	memory := newMemory("buckets", budget, wallClock, nil, prometheus.NewRegistry())
	from := &lender{Memory: memory}
	l := newLeases(from, from, wallClock, prometheus.NewRegistry())
	return l, from, taker{t, l}
}

// left returns what a bucket has and what of it is held, as the lender has it.
func (l *lender) left(c Charge) string {
	v := make([]Verdict, 1)
	l.ReadOnly().Take(context.Background(), []Charge{c.costs(0).holding(time.Second)}, v)
	return fmt.Sprintf("%d left, %d held", v[0].Remaining, v[0].Held)
}

func TestLeases(t *testing.T) {
	const lasts = 200 * time.Millisecond
	for _, tt := range []struct {
		name string
		test func(t *testing.T, l *Leases, from *lender, k taker, tenant Charge)
	}{
		{"checks of a busy key ask nobody", func(t *testing.T, l *Leases, from *lender, k taker, tenant Charge) {
			sources := map[Source]int{}
			for range 2000 {
				time.Sleep(time.Millisecond)
				v := k.take(tenant)[0]
				if !v.Allowed {
					t.Fatalf("%+v", v)
				}
				sources[v.Source]++
			}
			if calls := from.calls.Load(); sources[LeaseSource] < 1950 || calls > 80 {
				t.Errorf("%v, and %d calls; want at most 50 checks that ask", sources, calls)
			}
		}},
		{"no lease outlives a quota's window", func(t *testing.T, l *Leases, from *lender, k taker, tenant Charge) {
			const tokens = 2000
			tenant = onBucket(tenant, quota(t, tokens, calendar(t, Hour, "", "")))
			time.Sleep(time.Hour - time.Second)
			granted := map[window]int64{}
			sources := map[Source]int{}
			for range 4000 {
				time.Sleep(time.Millisecond)
				v := k.take(tenant)[0]
				if !v.Allowed {
					continue
				}
				w := tenant.Bucket.Calendar().window(v.at)
				granted[w]++
				sources[v.Source]++
				if left := time.Duration(w.end-v.at) * time.Microsecond; (v.FullAfter - left).Abs() > time.Millisecond {
					t.Fatalf("the window ends in %v: %+v", left, v)
				}
				if v.Remaining > tokens-granted[w] {
					t.Fatalf("%d remain after %d: %+v", v.Remaining, granted[w], v)
				}
			}
			first := tenant.Bucket.Calendar().window(time.Now().Add(-time.Hour).UnixMicro())
			second := tenant.Bucket.Calendar().window(time.Now().UnixMicro())
			if granted[first] < 990 || granted[second] != tokens || len(granted) != 2 || sources[LeaseSource] < 2500 {
				t.Errorf("granted %v, from %v", granted, sources)
			}
		}},
		{"what was not granted comes back before the lease ends", func(t *testing.T, l *Leases, from *lender, k taker, tenant Charge) {
			tenant = onBucket(tenant, bucket(t, 1, time.Hour, 1000))
			for range 40 {
				time.Sleep(time.Millisecond)
				k.take(tenant)
			}
			synctest.Wait()
			if l.bytes.Load() == 0 {
				t.Fatal("nothing is leased")
			}
			time.Sleep(2 * lasts) // it was renewed once
			synctest.Wait()
			if got := from.left(tenant); got != "960 left, 0 held" || l.bytes.Load() != 0 {
				t.Errorf("%s, and leases of %d bytes", got, l.bytes.Load())
			}
			v := make([]Verdict, 1)
			from.Memory.Take(t.Context(), []Charge{tenant.costs(0).holding(time.Second)}, v)
			if v[0].Expired > 0 {
				t.Errorf("%d holds ended by themselves", v[0].Expired)
			}
		}},
		{"a key that is asked for rarely has none", func(t *testing.T, l *Leases, from *lender, k taker, tenant Charge) {
			for range 100 {
				time.Sleep(lasts / 7)
				if v := k.take(tenant)[0]; v.Source != MemorySource {
					t.Fatalf("%+v", v)
				}
			}
			if calls := from.calls.Load(); calls != 100 {
				t.Errorf("%d calls of 100 checks", calls)
			}
		}},
		{"no more than a quarter of what is left", func(t *testing.T, l *Leases, from *lender, k taker, tenant Charge) {
			tenant = onBucket(tenant, bucket(t, 1, time.Hour, 1000))
			var granted, most int64
			for range 3000 {
				time.Sleep(50 * time.Microsecond)
				v := k.take(tenant)[0]
				if v.Allowed {
					granted++
				}
				synctest.Wait()
				if e := l.find(tenant.Key); e != nil {
					e.mu.Lock()
					most = max(most, e.hold.Tokens*100/(e.hold.Tokens+e.rest.tokens+1))
					e.mu.Unlock()
				}
			}
			if granted != 1000 || most < 15 || most > 25 {
				t.Errorf("%d granted of 1000; a lease had up to %d %% of what was left", granted, most)
			}
		}},
		{"the numbers are of the last answer, less what was granted since", func(t *testing.T, l *Leases, from *lender, k taker, tenant Charge) {
			tenant = onBucket(tenant, bucket(t, 1, time.Hour, 1000))
			for i := range int64(60) {
				v := k.take(tenant)[0]
				synctest.Wait()
				if v.Remaining != 999-i {
					t.Fatalf("check %d: %+v", i, v)
				}
			}
			// Another sidecar takes: this one does not know yet.
			from.Take(t.Context(), []Charge{tenant.costs(100)}, make([]Verdict, 1))
			if v := k.take(tenant)[0]; v.Remaining != 939 || v.Source != LeaseSource {
				t.Errorf("%+v", v)
			}
		}},
		{"a request that another bucket denies puts its tokens back", func(t *testing.T, l *Leases, from *lender, k taker, tenant Charge) {
			tenant = onBucket(tenant, bucket(t, 1, time.Hour, 1000))
			other := charge(bucket(t, 1, time.Hour, 50), "other")
			denied := 0
			for range 100 {
				time.Sleep(time.Millisecond)
				d := Decide(t.Context(), l, []Charge{tenant, other})
				if synctest.Wait(); d.Outcome == Limited {
					denied++
				}
			}
			l.Close(t.Context())
			if got := from.left(tenant); denied != 50 || got != "950 left, 0 held" {
				t.Errorf("%d denied, then %s", denied, got)
			}
		}},
		{"a shadow limit is taken whatever becomes of the request", func(t *testing.T, l *Leases, from *lender, k taker, tenant Charge) {
			tenant = onBucket(tenant, bucket(t, 1, time.Hour, 1000)).shadow()
			other := charge(bucket(t, 1, time.Hour, 50), "other")
			for range 100 {
				time.Sleep(time.Millisecond)
				Decide(t.Context(), l, []Charge{tenant, other})
				synctest.Wait()
			}
			l.Close(t.Context())
			if got := from.left(tenant); got != "900 left, 0 held" {
				t.Error(got)
			}
		}},
		{"several buckets, some of them leased", func(t *testing.T, l *Leases, from *lender, k taker, tenant Charge) {
			tenant = onBucket(tenant, bucket(t, 1, time.Hour, 1000))
			other := charge(bucket(t, 1, time.Hour, 1000), "other")
			for range 100 {
				time.Sleep(time.Millisecond)
				if d := Decide(t.Context(), l, []Charge{other, tenant}); d.Outcome != Allowed || d.Verdicts[0].Source != MemorySource {
					t.Fatalf("%+v", d)
				}
			}
			l.Close(t.Context())
			if a, b := from.left(tenant), from.left(other); a != "900 left, 0 held" || b != a {
				t.Errorf("%s, and %s", a, b)
			}
		}},
		{"costs of all kinds", func(t *testing.T, l *Leases, from *lender, k taker, tenant Charge) {
			tenant = onBucket(tenant, bucket(t, 1, time.Hour, 1000))
			for range 20 {
				time.Sleep(time.Millisecond)
				k.take(tenant.costs(2))
				synctest.Wait()
			}
			for _, c := range []Charge{tenant.costs(0), tenant.holding(time.Second), tenant.costs(1001), {
				Limit: tenant.Limit, Bucket: tenant.Bucket, Key: tenant.Key, Cost: 1, Refused: true,
			}} {
				if v := k.take(c)[0]; v.Source != MemorySource || v.Allowed != (c.Cost < 1000 && !c.Refused) {
					t.Errorf("%+v: %+v", c, v)
				}
			}
		}},
		{"a lease gives nothing once it has ended", func(t *testing.T, l *Leases, from *lender, k taker, tenant Charge) {
			for range 40 {
				time.Sleep(time.Millisecond)
				k.take(tenant)
			}
			synctest.Wait()
			e := l.find(tenant.Key)
			from.fails.Store(true)
			e.mu.Lock()
			end, left := e.end, e.left
			e.mu.Unlock()
			if v := k.take(tenant)[0]; v.Source != LeaseSource || left < 2 {
				t.Fatalf("%+v, %d left", v, left)
			}
			if at := time.UnixMicro(end - 1); time.Until(at) > lasts {
				t.Fatalf("the lease ends in %v", time.Until(at))
			} else {
				synctest.Wait()
				l.now = func() int64 { return end } // the sidecar was frozen
			}
			if d := Decide(t.Context(), l, []Charge{tenant}); d.Outcome != FailedClosed {
				t.Errorf("%+v", d)
			}
			l.now = wallClock
		}},
		{"another shape ends the lease", func(t *testing.T, l *Leases, from *lender, k taker, tenant Charge) {
			for range 40 {
				time.Sleep(time.Millisecond)
				k.take(tenant)
			}
			tenant = onBucket(tenant, bucket(t, 2000, time.Second, 2000))
			if v := k.take(tenant)[0]; v.Source != MemorySource {
				t.Errorf("%+v", v)
			}
			last := Verdict{}
			for range 400 {
				time.Sleep(time.Millisecond)
				last = k.take(tenant)[0]
			}
			if last.Source != LeaseSource || last.Remaining < 1000 {
				t.Errorf("%+v", last)
			}
		}},
		{"while the store fails", func(t *testing.T, l *Leases, from *lender, k taker, tenant Charge) {
			for range 200 {
				time.Sleep(time.Millisecond)
				k.take(tenant)
			}
			from.fails.Store(true)
			began := time.Now()
			for Decide(t.Context(), l, []Charge{tenant}).Outcome == Allowed {
				time.Sleep(time.Millisecond)
			}
			if took := time.Since(began); took < lasts/8 || took > lasts {
				t.Errorf("the lease lasted for %v more", took)
			}
		}},
		{"Close gives back at once", func(t *testing.T, l *Leases, from *lender, k taker, tenant Charge) {
			l.SetLimits([]*Limit{tenant.Limit, {Name: "none"}})
			for range 100 {
				time.Sleep(time.Millisecond)
				k.take(tenant)
			}
			want := func(leases, takes string) {
				t.Helper()
				got := []string{}
				for line := range strings.SplitSeq(metricsOf(t, l), "\n") {
					if !strings.HasPrefix(line, "#") && line != "" {
						got = append(got, line)
					}
				}
				if len(got) != 2 || got[1] != `sluice_leases{limit="tenant"} `+leases ||
					takes != "" && got[0] != `sluice_lease_takes_total{limit="tenant"} `+takes {
					t.Errorf("%q", got)
				}
			}
			want("1", "")
			l.Close(t.Context())
			want("0", "")
			if got := from.left(tenant); !strings.HasSuffix(got, " 0 held") || l.bytes.Load() != 0 {
				t.Error(got)
			}
			for range 100 {
				time.Sleep(time.Millisecond)
				if v := k.take(tenant)[0]; v.Source != MemorySource {
					t.Fatalf("%+v after Close", v)
				}
			}
			l.SetLimits(nil)
			if got := metricsOf(t, l); got != "" {
				t.Errorf("%q", got)
			}
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				l, from, k := newTestLeases(t, 1<<20)
				tt.test(t, l, from, k, charge(bucket(t, 5000, time.Second, 5000), "tenant").leased(lasts))
				l.Close(t.Context())
				synctest.Wait()
			})
		})
	}
}

func onBucket(c Charge, b Bucket) Charge { c.Bucket = b; return c }

func metricsOf(t *testing.T, c prometheus.Collector) string {
	t.Helper()
	text, err := testutil.CollectAndFormat(c, expfmt.TypeTextPlain, "sluice_leases", "sluice_lease_takes_total")
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// Leases take no more memory than their budget, however many keys are busy, and
// keys that are asked for rarely take none.
func TestLeasesAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, _, k := newTestLeases(t, 64<<20)
		l.budget = 100 * (leaseOverhead + 30)
		b := bucket(t, 100_000, time.Second, 100_000)
		for i := range 100_000 {
			k.take(keyed(b, "rare", fmt.Sprint(i)).leased(time.Second))
		}
		if l.bytes.Load() != 0 {
			t.Errorf("%d bytes for keys that are used once", l.bytes.Load())
		}
		time.Sleep(2 * time.Second)
		for i := range 500 {
			for range 3 * hotChecks {
				k.take(keyed(b, "busy", fmt.Sprint(i)).leased(time.Second))
			}
		}
		synctest.Wait()
		if n := l.bytes.Load(); n > l.budget || n < l.budget*9/10 {
			t.Errorf("%d bytes of %d", n, l.budget)
		}
		l.Close(t.Context())
		if l.bytes.Load() != 0 {
			t.Errorf("%d bytes after Close", l.bytes.Load())
		}
	})
}

// leasedRun plays four sidecars with leases on one bucket, which freeze, crash,
// lose calls and answers, and change the shape. It returns by how many tokens
// what was granted exceeds the larger burst and rate in the worst window, and
// how many checks were granted from leases. broken, if not nil, changes what a
// lender gets.
//
// If isQuota is set, the bucket is a quota whose window ends amid the run, and it
// returns by how many tokens the worst window exceeds the quota.
func leasedRun(t *testing.T, seed uint64, isQuota bool, broken func(*Settlement)) (over float64, leased int) {
	random := rand.New(rand.NewPCG(seed, 7))
	period := []time.Duration{time.Second, 100 * time.Millisecond}[random.IntN(2)]
	b := bucket(t, 20+random.Int64N(500), period, 40+random.Int64N(1000))
	lasts := time.Duration(20+random.IntN(400)) * time.Millisecond
	if isQuota {
		time.Sleep(time.Until(time.Now().Truncate(time.Hour).Add(time.Hour - 2*time.Second)))
	}
	memory := newMemory("buckets", 1<<20, wallClock, nil, prometheus.NewRegistry())
	var mu sync.Mutex // guards random and grants
	var grants []grant
	chance := func(one int) bool {
		mu.Lock()
		defer mu.Unlock()
		return random.IntN(one) == 0
	}
	below := func(n int) time.Duration {
		mu.Lock()
		defer mu.Unlock()
		return time.Duration(random.IntN(n)) * time.Microsecond
	}
	var all sync.WaitGroup
	end := time.Now().Add(4 * time.Second)
	// The callers rest, use most of the rate, or far more than it, by turns.
	token := b.wait(level{}, 1).Microseconds()
	if isQuota {
		b = quota(t, 500+random.Int64N(2000), calendar(t, Hour, "", ""))
	}
	var pace atomic.Int64 // of one caller, in microseconds
	sidecars := 1 + random.IntN(4)
	callers := int64(3 * sidecars)
	rest, most, full := int64(300_000), token*callers*3, 10+token*callers/20
	all.Go(func() {
		for time.Now().Before(end) {
			pace.Store([]int64{rest, most, full}[below(3)/time.Microsecond])
			time.Sleep(below(600_000))
		}
	})
	for range sidecars {
		var frozen atomic.Int64 // until when, in microseconds
		now := func() int64 {
			time.Sleep(time.Until(time.UnixMicro(frozen.Load())))
			return wallClock()
		}
		trouble := func() error {
			now()
			time.Sleep(below(2000))
			now()
			if chance(20) {
				return errLost
			}
			return nil
		}
		from := &brokenLender{lender: lender{Memory: memory, before: trouble, after: trouble}, broken: broken}
		l := newLeases(from, from, now, prometheus.NewRegistry())
		for range 3 {
			all.Go(func() {
				for time.Now().Before(end) {
					time.Sleep(min(below(int(2*pace.Load()+1)), 50*time.Millisecond))
					c := charge(b, "tenant").leased(lasts)
					if chance(3) {
						c = c.costs(3)
					}
					now()
					d := Decide(context.Background(), l, []Charge{c})
					if d.Outcome != Allowed {
						continue
					}
					mu.Lock()
					grants = append(grants, grant{d.Verdicts[0].at, c.Cost})
					if d.Verdicts[0].Source == LeaseSource {
						leased++
					}
					mu.Unlock()
				}
			})
		}
		all.Go(func() {
			for time.Now().Before(end) {
				time.Sleep(below(1_000_000))
				frozen.Store(wallClock() + int64(below(1_000_000)/time.Microsecond))
				now()
				pace.Store(full) // what it has by mistake shows best in a full bucket that all drain
			}
			if chance(2) {
				l.Close(context.Background())
			}
		})
	}
	all.Wait()
	synctest.Wait()
	time.Sleep(2 * MaxLease) // all timers have fired
	if !isQuota {
		return excess(b, grants), leased
	}
	windows := map[window]int64{}
	for _, g := range grants {
		windows[b.Calendar().window(g.at)] += g.tokens
	}
	for _, granted := range windows {
		over = max(over, float64(granted-b.burst))
	}
	return over, leased
}

// brokenLender is a lender that changes settlements.
type brokenLender struct {
	lender

	broken func(*Settlement)
}

func (l *brokenLender) Settle(ctx context.Context, settlements []Settlement, results []Settled) {
	for i := range settlements {
		if l.broken != nil {
			l.broken(&settlements[i])
		}
	}
	l.lender.Settle(ctx, settlements, results)
}

// However sidecars with leases freeze, crash and lose calls, no window has more
// granted than burst + rate·t.
func TestLeaseBound(t *testing.T) {
	play := func(runs int, isQuota bool, broken func(*Settlement)) (over, leased int, worst float64) {
		seed := uint64(time.Now().UnixNano())
		for i := range runs {
			synctest.Test(t, func(t *testing.T) {
				e, n := leasedRun(t, seed+uint64(i), isQuota, broken)
				if leased += n; e > 0 {
					over, worst = over+1, max(worst, e)
				}
			})
		}
		t.Logf("seed %d: %d of %d runs over the bound, by up to %.1f tokens; %d checks granted from leases", seed, over, runs, worst, leased)
		return over, leased, worst
	}
	for _, isQuota := range []bool{false, true} {
		if over, leased, _ := play(60, isQuota, nil); over > 0 || leased < 1000 {
			t.Errorf("%d runs over the bound, %d checks from leases; want 0, and many", over, leased)
		}
		// The checker sees a lease of which all is given back.
		if over, _, _ := play(20, isQuota, func(s *Settlement) { s.Cost = 0 }); over == 0 {
			t.Error("leases that give back what they granted were not seen to break the bound")
		}
	}
}

// What is left is what the last of all answers says, in whatever order they are
// noted: of one instant that with the fewest tokens.
func TestLeaseLearnsWhatIsLeft(t *testing.T) {
	answers := []Verdict{
		{Source: RedisSource, at: 5, left: level{tokens: 80}}, {Source: RedisSource, at: 7, left: level{tokens: 91}},
		{Source: RedisSource, at: 7, left: level{tokens: 90}}, {Source: NoSource, at: 9, left: level{tokens: 1}},
	}
	for _, order := range [][]int{{0, 1, 2, 3}, {0, 2, 1, 3}, {1, 0, 2, 3}, {2, 1, 0, 3}, {3, 2, 0, 1}} {
		e := &lease{rest: level{tokens: 100}, restAt: 1}
		for _, i := range order {
			e.learnLocked(1, &answers[i])
		}
		if e.rest.tokens != 90 || e.restAt != 7 {
			t.Errorf("in the order %v: %d tokens at %d; want 90 at 7", order, e.rest.tokens, e.restAt)
		}
	}
}
