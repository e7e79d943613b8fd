package limiter

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/sluiceproxy/sluice/limiter/redistest"
)

func quota(t testing.TB, tokens int64, c Calendar) Bucket {
	t.Helper()
	b, err := NewQuota(tokens, c)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// setTo sets the clock to an instant in RFC 3339.
func (c *testClock) setTo(at string) {
	c.t.Helper()
	instant, err := time.Parse(time.RFC3339Nano, at)
	if err != nil {
		c.t.Fatal(err)
	}
	c.set(instant.UnixMicro())
}

func (c Charge) holdsFor(life time.Duration) Charge { c.HoldFor = life; return c }
func (c Charge) of(b Bucket) Charge                 { c.Bucket = b; return c }

// settle settles a hold, and returns what became of it.
func (k taker) settle(c Charge, hold Hold, cost int64) Settled {
	k.t.Helper()
	results := make([]Settled, 1)
	k.s.(Lender).Settle(context.Background(), []Settlement{{Limit: c.Limit, Key: c.Key, Hold: hold, Cost: cost}}, results)
	if results[0].Err != nil {
		k.t.Fatal(results[0].Err)
	}
	return results[0]
}

// hold takes a charge that must be allowed, and returns its hold.
func (k taker) hold(c Charge) Hold {
	k.t.Helper()
	v := k.take(c)[0]
	if !v.Allowed || v.Hold.IsZero() {
		k.t.Fatalf("no hold: %+v", v)
	}
	return v.Hold
}

func TestQuotas(t *testing.T) {
	month, dayOf := calendar(t, Month, "", ""), calendar(t, Day, "", "")
	berlin := calendar(t, Day, "Europe/Berlin", "")
	for _, tt := range []struct {
		name string
		test func(t *testing.T, k taker, clock *testClock)
	}{
		{"all is back when the next window begins, and nothing before", func(t *testing.T, k taker, clock *testClock) {
			a := charge(quota(t, 3, month), "a")
			clock.setTo("2026-02-10T00:00:00Z")
			k.want("ok 1", a.costs(2))
			clock.setTo("2026-02-28T23:59:59Z")
			k.want("ok 0", a)
			k.want("no 0 retry 1s", a)
			clock.setTo("2026-02-28T23:59:59.999999Z")
			k.want("no 0 retry 1µs", a)
			clock.setTo("2026-03-01T00:00:00Z")
			k.want("ok 0", a.costs(3))
			k.want("no 0 retry 744h0m0s", a)
			k.want("no 0 retry "+Never.String(), a.costs(4))
			clock.setTo("2027-03-01T00:00:00Z")
			k.want("ok 2", a)
		}},
		{"the numbers speak of the window", func(t *testing.T, k taker, clock *testClock) {
			a := charge(quota(t, 3, dayOf), "a")
			clock.setTo("2026-02-10T18:00:00Z")
			for _, want := range []Verdict{
				{Allowed: true, Remaining: 3, FullAfter: 6 * time.Hour},
				{Allowed: true, Remaining: 2, FullAfter: 6 * time.Hour, NextAfter: 6 * time.Hour},
			} {
				v := k.take(a.costs(3 - want.Remaining))[0]
				got := Verdict{Allowed: v.Allowed, Remaining: v.Remaining, FullAfter: v.FullAfter, NextAfter: v.NextAfter}
				if got != want {
					t.Errorf("got %+v, want %+v", got, want)
				}
			}
		}},
		{"through days of 23 and 25 hours", func(t *testing.T, k taker, clock *testClock) {
			a := charge(quota(t, 1, berlin), "a")
			clock.setTo("2026-03-28T23:00:00Z")
			k.want("ok 0", a)
			k.want("no 0 retry 23h0m0s", a)
			clock.setTo("2026-10-24T22:00:00Z")
			k.want("ok 0", a)
			k.want("no 0 retry 25h0m0s", a)
			clock.setTo("2026-10-25T22:59:59Z")
			k.want("no 0 retry 1s", a)
			clock.setTo("2026-10-25T23:00:00Z")
			k.want("ok 0", a)
		}},
		{"a clock that goes back stays in its window", func(t *testing.T, k taker, clock *testClock) {
			a := charge(quota(t, 3, dayOf), "a")
			clock.setTo("2026-02-10T23:59:00Z")
			k.want("ok 0", a.costs(3))
			clock.setTo("2026-02-11T00:00:01Z")
			k.want("ok 1", a.costs(2))
			clock.setTo("2026-02-10T23:59:00Z")
			k.want("ok 0", a)
			k.want("no 0 retry 24h1m0s", a)
			clock.setTo("2026-02-11T12:00:00Z")
			k.want("no 0 retry 12h0m0s", a)
			clock.setTo("2026-02-12T00:00:00Z")
			k.want("ok 2", a)
		}},
		{"another N keeps what was used", func(t *testing.T, k taker, clock *testClock) {
			a := charge(quota(t, 10, dayOf), "a")
			clock.setTo("2026-02-10T12:00:00Z")
			k.want("ok 3", a.costs(7))
			k.want("ok 12", a.of(quota(t, 20, dayOf)))
			k.want("no 0 retry 12h0m0s", a.of(quota(t, 5, dayOf)))
			k.want("ok 1", a)
			k.want("ok 1", a.of(quota(t, 10, dayOf)).costs(0))
			k.want("ok 0", a.of(quota(t, 5, dayOf)).costs(0)) // a lowered N is no debt
			clock.setTo("2026-02-11T12:00:00Z")
			k.want("ok 0", a.of(quota(t, 5, dayOf)).costs(5))
		}},
		{"another unit or zone begins a window, and each keeps what it used", func(t *testing.T, k taker, clock *testClock) {
			inDays := charge(quota(t, 3, dayOf), "a")
			inMonths, inBerlin := inDays.of(quota(t, 5, month)), inDays.of(quota(t, 4, berlin))
			clock.setTo("2026-02-10T12:00:00Z")
			k.want("ok 0", inDays.costs(3))
			k.want("ok 1", inMonths.costs(4))
			k.want("no 0 retry 12h0m0s", inDays)
			k.want("ok 0", inMonths)
			k.want("no 0 retry 12h0m0s", inDays)
			clock.setTo("2026-02-11T00:00:00Z")
			k.want("ok 1", inDays.costs(2))
			k.want("no 0 retry 432h0m0s", inMonths)
			k.want("ok 3", inBerlin)
			k.want("ok 1", inBerlin.costs(2))
		}},
		{"a rate's bucket is no quota's", func(t *testing.T, k taker, clock *testClock) {
			a := charge(quota(t, 3, dayOf), "a")
			clock.setTo("2026-02-10T12:00:00Z")
			k.want("ok 9", a.of(bucket(t, 1, time.Second, 10)))
			k.want("no 0 retry 12h0m0s", a)
			k.want("no 0 retry 1s", a.of(bucket(t, 1, time.Second, 10)))
			clock.setTo("2026-02-11T12:00:00Z")
			k.want("no 0 retry 12h0m0s", a)
			clock.setTo("2026-02-12T00:00:00Z")
			k.want("ok 2", a)
		}},
		{"from all or none", func(t *testing.T, k taker, clock *testClock) {
			a, b := charge(quota(t, 3, dayOf), "a"), charge(bucket(t, 1, time.Hour, 1), "b")
			clock.setTo("2026-02-10T12:00:00Z")
			k.want("ok 2, ok 0", a, b)
			k.want("ok 2, no 0 retry 1h0m0s", a, b)
			k.want("ok 1, no 0 retry 1h0m0s", a.shadow(), b)
			k.want("ok 0", a)
			clock.advance(time.Hour)
			k.want("no 0 retry 11h0m0s, ok 1", a, b)
		}},
		{"what is settled below its hold comes back", func(t *testing.T, k taker, clock *testClock) {
			a := charge(quota(t, 10, dayOf), "a").holdsFor(time.Minute)
			clock.setTo("2026-02-10T12:00:00Z")
			hold := k.hold(a.costs(8))
			k.want("no 2 retry 1s", a.costs(3))
			if s := k.settle(a, hold, 3); !s.Known || s.Returned != 5 {
				t.Errorf("%+v", s)
			}
			if s := k.settle(a, hold, 3); !s.Repeated {
				t.Errorf("%+v", s)
			}
			k.want("ok 6", a)
		}},
		{"a hold is spent whole at its window's end", func(t *testing.T, k taker, clock *testClock) {
			a := charge(quota(t, 10, dayOf), "a").holdsFor(time.Hour)
			clock.setTo("2026-02-10T23:59:00Z")
			hold := k.hold(a.costs(8))
			clock.setTo("2026-02-11T00:00:00Z")
			if v := k.take(a)[0]; v.Remaining != 9 || v.Held != 1 || v.Expired != 1 {
				t.Errorf("%+v", v)
			}
			if s := k.settle(a, hold, 3); !s.Known || !s.Late || s.Returned != 0 || s.Surcharged != 0 {
				t.Errorf("%+v", s)
			}
			k.want("ok 8", a)
		}},
		{"a surcharge is taken from the window in which it arrives", func(t *testing.T, k taker, clock *testClock) {
			a := charge(quota(t, 10, dayOf), "a").holdsFor(time.Hour)
			clock.setTo("2026-02-10T23:59:00Z")
			first, second := k.hold(a.costs(8)), k.hold(a)
			clock.setTo("2026-02-11T00:01:00Z")
			if s := k.settle(a, first, 11); !s.Late || s.Surcharged != 3 { // before any take of the window
				t.Errorf("%+v", s)
			}
			k.want("ok 6", a)
			if s := k.settle(a, second, 3); !s.Late || s.Surcharged != 2 {
				t.Errorf("%+v", s)
			}
			k.want("ok 3", a)
		}},
		{"a debt goes on into the next window, of one burst at most", func(t *testing.T, k taker, clock *testClock) {
			a := charge(quota(t, 10, dayOf), "a").holdsFor(time.Hour)
			clock.setTo("2026-02-10T23:00:00Z")
			hold := k.hold(a.costs(10))
			if s := k.settle(a, hold, 16); s.Surcharged != 6 {
				t.Errorf("%+v", s)
			}
			if v := k.take(a.costs(0))[0]; v.Allowed || v.Owed != 6 || v.RetryAfter != time.Hour {
				t.Errorf("%+v", v)
			}
			clock.setTo("2026-02-11T00:00:00Z")
			hold = k.hold(a.costs(4))
			if s := k.settle(a, hold, 100); s.Surcharged != 10 || s.Forgiven != 86 {
				t.Errorf("%+v", s)
			}
			clock.setTo("2026-02-12T00:00:00Z")
			k.want("no 0 retry 24h0m0s", a)
			k.want("ok 0", a.costs(0))
			clock.setTo("2026-02-13T00:00:00Z")
			k.want("ok 9", a)
		}},
		{"a window in which nobody asks pays a debt", func(t *testing.T, k taker, clock *testClock) {
			a := charge(quota(t, 10, dayOf), "a").holdsFor(time.Hour)
			clock.setTo("2026-02-10T23:00:00Z")
			k.settle(a, k.hold(a.costs(10)), 16)
			clock.setTo("2026-02-12T00:00:00Z")
			k.want("ok 9", a)
		}},
		{"holds end in their time within a window", func(t *testing.T, k taker, clock *testClock) {
			a := charge(quota(t, 10, dayOf), "a").holdsFor(time.Minute)
			clock.setTo("2026-02-10T12:00:00Z")
			k.hold(a.costs(8))
			clock.advance(2 * time.Minute)
			if v := k.take(a)[0]; v.Expired != 1 || v.Held != 1 || v.Remaining != 1 {
				t.Errorf("%+v", v)
			}
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			eachStore(t, func(t *testing.T, s Store, clock *testClock) { tt.test(t, taker{t, s}, clock) })
		})
	}
}

// A read-only store says of a quota what a take would, also where the stored state is
// absent, invalid or newer.
func TestReadOnlyQuota(t *testing.T) {
	server := redistest.Start(t)
	client, ctx := server.Client(), t.Context()
	r := newTestRedis(t, server, serverClock)
	taking, looking := taker{t, r}, taker{t, r.ReadOnly()}
	a := charge(quota(t, 10, calendar(t, Year, "", "")), "a")
	for range 2 { // an absent bucket, too
		for _, cost := range []int64{0, 1, 11} {
			got, want := looking.take(a.costs(cost))[0], taking.take(a.costs(cost).of(a.Bucket))[0]
			if cost != 1 {
				if got.Remaining != want.Remaining || got.Allowed != want.Allowed ||
					(got.FullAfter-want.FullAfter).Abs() > time.Minute || (got.RetryAfter-want.RetryAfter).Abs() > time.Minute {
					t.Errorf("a cost of %d: looking says %+v, taking %+v", cost, got, want)
				}
			}
		}
	}
	v, exists, err := r.Get(ctx, a)
	if err != nil || !exists || v.Remaining != 8 || v.FullAfter <= 0 || v.FullAfter > 366*day {
		t.Errorf("%+v %t %v", v, exists, err)
	}
	good := client.Get(ctx, a.Key).Val()
	if good[2] != 4 || len(good) != quotaSize {
		t.Errorf("%q", good)
	}
	hold := taking.hold(a.holdsFor(time.Minute))
	held := client.Get(ctx, a.Key).Val()
	taking.settle(a, hold, 1)
	ones := func(n int) string { return strings.Repeat("\xff", n) }
	for _, value := range []string{
		good[:3] + ones(58), good[:7] + "\x00\x00\x00\x00" + good[11:], good[:3] + "\x7f\xff\xff\xff" + good[7:],
		good[:18] + good[25:32] + good[18:25] + good[32:], held[:len(held)-1], held + "x",
	} {
		if err := client.Set(ctx, a.Key, value, 0).Err(); err != nil {
			t.Fatal(err)
		}
		for _, k := range []taker{looking, taking} {
			if v := k.take(a)[0]; v.Allowed || v.Remaining != 0 || v.RetryAfter <= 0 || v.RetryAfter > 366*day {
				t.Errorf("%q: %+v", value, v)
			}
		}
	}
	for _, value := range []string{good + "x", good[:60], stateMagic + "\x06"} {
		if err := client.Set(ctx, a.Key, value, 0).Err(); err != nil {
			t.Fatal(err)
		}
		for _, s := range []Store{r, r.ReadOnly()} {
			verdicts := make([]Verdict, 1)
			if s.Take(ctx, []Charge{a}, verdicts); KindOf(verdicts[0].Err) != KindState {
				t.Errorf("%q: %+v", value, verdicts)
			}
		}
	}
}

// On a cluster a quota and a rate of one limit share a slot, and quotas of several
// keys are taken from together, whatever slots they are in.
func TestQuotasOnACluster(t *testing.T) {
	r := newClusterStore(t, redistest.StartCluster(t, 3))
	k, month := taker{t, r}, calendar(t, Month, "", "")
	rate, quotas := keyed(bucket(t, 1, day, 5), "api", "one"), keyed(quota(t, 10, month), "api/quota", "one")
	other, third := keyed(quota(t, 3, month), "other", "two"), keyed(bucket(t, 1, day, 100), "third", "three")
	until := func(v Verdict, c Charge) time.Duration {
		return time.Duration(c.Bucket.Calendar().window(v.at).end-v.at) * time.Microsecond
	}
	for i, want := range []struct {
		charges []Charge
		left    []int64
		denies  int // the index of the charge that denies, or -1
	}{
		{[]Charge{rate, quotas}, []int64{4, 9}, -1},
		{[]Charge{rate, quotas, other}, []int64{3, 8, 2}, -1},
		{[]Charge{other.costs(2), third, quotas}, []int64{0, 99, 7}, -1},
		{[]Charge{third, quotas, other}, []int64{99, 7, 0}, 2},
		{[]Charge{rate.costs(4), quotas.costs(2)}, []int64{3, 7}, 0},
		{[]Charge{third, quotas}, []int64{98, 6}, -1},
		{[]Charge{other.of(quota(t, 5, month)), rate}, []int64{1, 2}, -1},
	} {
		for j, v := range k.take(want.charges...) {
			if c := want.charges[j]; v.Allowed != (j != want.denies) || v.Remaining != want.left[j] ||
				c.Bucket.IsQuota() && !v.Allowed && v.RetryAfter != until(v, c) {
				t.Errorf("take %d of %s: %+v", i, c.Key, v)
			}
		}
	}
	var granted atomic.Int64
	var wg sync.WaitGroup
	a, b := keyed(quota(t, 300, month), "a", "four"), keyed(quota(t, 200, month), "b", "five")
	for range 32 {
		wg.Go(func() {
			verdicts := make([]Verdict, 2)
			for range 15 {
				if r.Take(t.Context(), []Charge{a, b}, verdicts); verdicts[0].Allowed && verdicts[1].Allowed {
					granted.Add(1)
				}
			}
		})
	}
	wg.Wait()
	if n := granted.Load(); n > 200 || n < 190 {
		t.Errorf("%d took from both, of 300 and 200", n)
	}
	v := k.take(b.costs(0))[0]
	if v.Remaining != 200-granted.Load() {
		t.Errorf("%d took, and %d are left", granted.Load(), v.Remaining)
	}
}

// A raised N is stored by the take that raises it, whether it is granted, whether the
// clock went back and whether its guess of the window was right: settlements count
// with the largest N of the window.
func TestRaisedQuotaIsStored(t *testing.T) {
	hourly := calendar(t, Hour, "", "")
	few, many := quota(t, 8, hourly), quota(t, 254, hourly)
	eachStore(t, func(t *testing.T, s Store, clock *testClock) {
		k := taker{t, s}
		never := charge(few, "never").costs(9)
		for _, raised := range []string{"2026-02-10T13:30:00Z", "2026-02-10T12:30:00Z"} {
			a := charge(few, "raised at "+raised).holdsFor(time.Hour)
			clock.setTo("2026-02-10T13:30:00Z")
			hold := k.hold(a)
			clock.setTo(raised)
			k.take(never) // after 12:30 the next guess is the window of 12:00, which is wrong
			k.want("ok 253, no 8 retry "+Never.String(), a.of(many).costs(19), never)
			if got := k.settle(a, hold, 264); got.Surcharged != 263 || got.Forgiven != 0 {
				t.Errorf("raised at %s: %+v", raised, got)
			}
		}
	})
}

// The value of a quota takes at most 120 bytes of Redis's memory, and is kept until
// its window ends and no longer than a minute more. So does one that sidecars count in
// two calendars.
func TestQuotaInRedis(t *testing.T) {
	server := redistest.Start(t)
	client, ctx := server.Client(), t.Context()
	k := taker{t, newTestRedis(t, server, serverClock)}
	const object = 16 // bytes of an integer's, which the value replaces
	for _, unit := range []Unit{Hour, Day, Week, Month, Year} {
		t.Run(unit.String(), func(t *testing.T) {
			c, india := calendar(t, unit, "Europe/Berlin", ""), calendar(t, unit, "Asia/Kolkata", "")
			a := charge(quota(t, MaxTokens, c), "per-tenant-"+unit.String())
			if err := client.Set(ctx, a.Key, 1<<40, time.Hour).Err(); err != nil {
				t.Fatal(err)
			}
			without, err := client.MemoryUsage(ctx, a.Key).Result()
			if err != nil {
				t.Fatal(err)
			}
			client.Del(ctx, a.Key)
			for _, take := range []struct {
				name string
				Charge
			}{
				{"the first", a.costs(7)},
				{"of a lower N", a.of(quota(t, MaxTokens/2, c))},
				{"denied", a.costs(MaxTokens)},
				{"of another calendar", a.of(quota(t, 10, india))},
			} {
				v := k.take(take.Charge)[0]
				ends := c.window(v.at).end
				if take.Bucket.Calendar() == india {
					ends = max(ends, india.window(v.at).end)
				}
				expires, err := client.PExpireTime(ctx, a.Key).Result()
				if over := expires - time.Duration(ends)*time.Microsecond; err != nil || over < 0 || over > time.Minute {
					t.Errorf("%s: expires %v after its window ends (%v)", take.name, over, err)
				}
				whole, err := client.MemoryUsage(ctx, a.Key).Result()
				if err != nil || whole-without+object > 120 {
					t.Errorf("%s: the value takes %d bytes of %d (%v)", take.name, whole-without+object, whole, err)
				}
			}
		})
	}
}

// Batches that mix quotas and rates of a few keys answer each take as if it were
// alone: the guesses of a batch's windows are each take's own, and each bucket
// gives what it has.
func TestBatchesOfQuotasAndRates(t *testing.T) {
	server := redistest.Start(t)
	hourly, kathmandu := calendar(t, Hour, "", ""), calendar(t, Month, "Asia/Kathmandu", "")
	shapes := []Bucket{
		quota(t, 400, hourly), bucket(t, 1, day, 300), quota(t, 500, kathmandu), bucket(t, 1, 30*day, 350),
		quota(t, 250, hourly),
	}
	var all []Charge
	for i, b := range shapes {
		all = append(all, charge(b, fmt.Sprint("mixed-", i)))
	}
	clock := &testClock{t: t, client: server.Client()}
	clock.setTo("2026-02-28T18:10:00Z") // five minutes before Kathmandu's March
	sidecars := make([]*Redis, 3)
	for i, off := range []time.Duration{-10 * time.Minute, 0, 10 * time.Minute} {
		sidecars[i] = newTestRedis(t, server, keyClock)
		sidecars[i].wall = func() int64 { return clock.now() + off.Microseconds() }
	}
	// window plays takes of all callers at one instant, and compares what is left of
	// each bucket with what was granted.
	window := func(before []int64) (left []int64) {
		taken := make([]atomic.Int64, len(all))
		var wg sync.WaitGroup
		for caller := range 24 {
			wg.Go(func() {
				random := rand.New(rand.NewPCG(uint64(caller), uint64(before[0])))
				for range redistest.Scaled(60, 600) {
					order := random.Perm(len(all))[:1+random.IntN(len(all))]
					charges, verdicts := make([]Charge, len(order)), make([]Verdict, len(order))
					for i, b := range order {
						charges[i] = all[b]
					}
					sidecars[caller%3].Take(t.Context(), charges, verdicts)
					allowed := true
					for i, v := range verdicts {
						if v.Err != nil || !v.Known() {
							t.Errorf("%s: %+v", charges[i].Key, v)
							return
						}
						allowed = allowed && v.Allowed
					}
					for _, b := range order {
						if allowed {
							taken[b].Add(1)
						}
					}
				}
			})
		}
		wg.Wait()
		for i, v := range (taker{t, sidecars[1]}).take(zeroCosts(all)...) {
			if left = append(left, v.Remaining); v.Remaining < 0 || v.Remaining != before[i]-taken[i].Load() {
				t.Errorf("bucket %d: of %d were taken %d, and %d are left", i, before[i], taken[i].Load(), v.Remaining)
			}
		}
		return left
	}
	left := window([]int64{400, 300, 500, 350, 250})
	if left[4] != 0 {
		t.Errorf("%v are left: this says little", left)
	}
	clock.setTo("2026-02-28T18:15:00Z") // Kathmandu's March is UTC's same hour
	left[2] = 500
	left = window(left)
	clock.setTo("2026-02-28T19:00:00Z")
	left[0], left[4] = 400, 250
	window(left)
}

// zeroCosts returns the charges with a cost of 0.
func zeroCosts(charges []Charge) []Charge {
	all := slices.Clone(charges)
	for i := range all {
		all[i].Cost = 0
	}
	return all
}
