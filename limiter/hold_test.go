package limiter

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/sluiceproxy/sluice/limiter/redistest"
)

// holding is a hold in a test, and what its request has spent.
type holding struct {
	id        Hold
	at, until int64 // microseconds
	isSettled bool
	spent     int64
	spentAt   int64
}

// holdsRun takes, holds and settles tokens of a bucket at random, in one to three
// shapes, with repeated, late and lost settlements. It returns by how many tokens
// what was spent exceeds the larger burst and the larger rate, in the worst
// window. broken, if not nil, changes the bucket before each step.
func holdsRun(t *testing.T, random *rand.Rand, broken func(*state)) float64 {
	t.Helper()
	shapes := make([]Bucket, 1+random.IntN(3))
	larger := Bucket{n: 0, p: 1}
	for i := range shapes {
		period := []time.Duration{time.Second, time.Minute}[random.IntN(2)]
		shapes[i] = bucket(t, 1+random.Int64N(60), period, 1+random.Int64N(100))
		if b := shapes[i]; float64(b.n)/float64(b.p) > float64(larger.n)/float64(larger.p) {
			larger.n, larger.p = b.n, b.p
		}
		larger.burst = max(larger.burst, shapes[i].burst)
	}
	lives := []time.Duration{
		time.Duration(1+random.IntN(60)) * time.Second, time.Duration(1+random.IntN(5000)) * time.Millisecond,
	}
	now := int64(begin)
	s := state{shape: shapes[0], level: shapes[0].full(), at: now}
	var grants []grant
	var out []*holding
	for range 80 {
		life := max(MinHold, lives[random.IntN(len(lives))])
		now += random.Int64N(2 * life.Microseconds() / int64(1+random.IntN(20)))
		b := shapes[random.IntN(len(shapes))]
		s, _, _ = s.next(b, now)
		if broken != nil {
			broken(&s)
		} else if s.level.tokens+s.held() > max(b.burst, s.held()) || s.level.tokens < -larger.burst {
			t.Fatalf("level %d, held %d, burst %d", s.level.tokens, s.held(), b.burst)
		}
		what := random.IntN(4)
		switch {
		case what < 3 && s.level.tokens > 0:
			cost := 1 + random.Int64N(s.level.tokens)
			if what == 0 {
				s.level.tokens -= cost
				grants = append(grants, grant{now, cost})
				continue
			}
			id := s.hold(cost, life, newBirth())
			// If no settlement comes, all of it may have been spent at any time of its life.
			out = append(out, &holding{id: id, at: now, until: now + life.Microseconds(), isSettled: id.IsZero(),
				spent: cost, spentAt: now + random.Int64N(life.Microseconds())})
		case len(out) > 0:
			h := out[random.IntN(len(out))]
			cost := random.Int64N(2*h.id.Tokens + 1)
			r := s.settle(h.id, cost)
			switch {
			case h.isSettled || !r.Known:
				if r.Known && !r.Repeated || r.Returned != 0 || r.Surcharged != 0 {
					t.Fatalf("%+v of %+v, settled before", r, h)
				}
			case r.Repeated:
				if now < h.until {
					t.Fatalf("%+v: settled once, and said to be settled before", h)
				}
			case r.Late:
				if r.Returned != 0 || now < h.until {
					t.Fatalf("%+v of %+v", r, h)
				}
				h.isSettled = true
			default:
				h.isSettled, h.spent, h.spentAt = true, min(h.id.Tokens, cost), now
				if random.IntN(2) == 0 {
					h.spentAt = h.at + random.Int64N(now-h.at+1)
				}
			}
		}
	}
	for _, h := range out {
		grants = append(grants, grant{h.spentAt, h.spent})
	}
	return excess(larger, grants)
}

// Whatever is held, settled, settled twice, late or never, no window has more
// tokens spent than the larger burst and the larger rate allow.
func TestBoundWithHolds(t *testing.T) {
	play := func(broken func(*state)) (over int, worst float64) {
		seed := uint64(time.Now().UnixNano())
		random := rand.New(rand.NewPCG(seed, 1))
		for range 6000 {
			if e := holdsRun(t, random, broken); e > 0 {
				over, worst = over+1, max(worst, e)
			}
		}
		t.Logf("seed %d: %d of 6000 runs over the bound, by up to %.1f tokens", seed, over, worst)
		return over, worst
	}
	if over, _ := play(nil); over > 0 {
		t.Error("runs over the bound; want none")
	}
	// The checker sees a bucket that refills while its tokens are held.
	if over, _ := play(func(s *state) {
		if s.level.tokens >= 0 {
			s.level.tokens = min(s.shape.burst, s.level.tokens+s.held()/2)
		}
	}); over == 0 {
		t.Error("a bucket that refills while its tokens are held was not seen to break the bound")
	}
}

// A state never has more slices than fit, whatever holds are made. If there is no
// room the tokens are spent at once.
func TestHoldsAreBounded(t *testing.T) {
	b := bucket(t, MaxTokens, time.Second, MaxTokens)
	s := state{shape: b, level: b.full(), at: begin}
	random := rand.New(rand.NewPCG(1, 2))
	var refused int
	for range 1_000_000 {
		s, _, _ = s.next(b, s.at+random.Int64N(500))
		life := time.Duration(1+random.Int64N(1000)) * 100 * time.Millisecond
		if s.hold(1, life, newBirth()).IsZero() {
			refused++
		}
		if len(s.holds.slices) > maxSlices {
			t.Fatalf("%d slices", len(s.holds.slices))
		}
	}
	if size := s.holds.size(); size > 200_000 || refused == 0 {
		t.Errorf("%d bytes of holds, %d refused", size, refused)
	}
	if held := s.holds.clone(); held.total != s.held() || &held.slices[0] == &s.holds.slices[0] {
		t.Error("a clone is not a copy")
	}
}

// settled returns what became of one settlement in a test's words.
func (k taker) settled(v Verdict, c Charge, cost int64) string {
	k.t.Helper()
	results := make([]Settled, 1)
	settlements := []Settlement{{Limit: c.Limit, Key: c.Key, Hold: v.Hold, Cost: cost}}
	switch s := k.s.(type) {
	case *Redis:
		s.Settle(context.Background(), settlements, results)
	case *Memory:
		s.Settle(context.Background(), settlements, results)
	}
	r := results[0]
	text := ""
	switch {
	case r.Err != nil:
		k.t.Fatal(r.Err)
	case !r.Known:
		text = "unknown"
	case r.Repeated:
		text = "repeated"
	default:
		text = fmt.Sprintf("returned %d, surcharged %d, forgiven %d", r.Returned, r.Surcharged, r.Forgiven)
		if r.Late {
			text = "late, " + text
		}
	}
	if r.Expired > 0 {
		text += fmt.Sprintf(", %d expired", r.Expired)
	}
	return text
}

// holding makes a charge hold its cost.
func (c Charge) holding(life time.Duration) Charge { c.HoldFor = life; return c }

func TestHolds(t *testing.T) {
	is := func(t *testing.T, got, want string) {
		t.Helper()
		if got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
	for _, tt := range []struct {
		name string
		test func(t *testing.T, k taker, clock *testClock)
	}{
		{"what is held occupies the bucket", func(t *testing.T, k taker, clock *testClock) {
			a := charge(bucket(t, 1, time.Second, 10), "a").holding(time.Minute)
			v := k.take(a.costs(8))[0]
			clock.advance(30 * time.Second)
			k.want("ok 2", a.costs(0)) // not 10
			is(t, k.settled(v, a, 3), "returned 5, surcharged 0, forgiven 0")
			k.want("ok 7", a.costs(0))
			clock.advance(3 * time.Second)
			k.want("ok 10", a.costs(0))
		}},
		{"settled once", func(t *testing.T, k taker, clock *testClock) {
			a := charge(bucket(t, 1, time.Hour, 10), "a").holding(time.Minute)
			v := k.take(a.costs(5))[0]
			is(t, k.settled(v, a, 0), "returned 5, surcharged 0, forgiven 0")
			is(t, k.settled(v, a, 0), "repeated")
			is(t, k.settled(v, a, 100), "repeated")
			k.want("ok 10", a.costs(0))
		}},
		{"a hold that ends has spent its tokens", func(t *testing.T, k taker, clock *testClock) {
			a := charge(bucket(t, 1, time.Hour, 10), "a").holding(time.Minute)
			v := k.take(a.costs(5))[0]
			clock.advance(66 * time.Second)
			w := k.take(a.costs(0))[0]
			if w.Expired != 1 || w.Held != 0 || w.Remaining != 5 {
				t.Errorf("%+v", w)
			}
			is(t, k.settled(v, a, 0), "late, returned 0, surcharged 0, forgiven 0")
			is(t, k.settled(v, a, 0), "repeated")
		}},
		{"a late surcharge is taken", func(t *testing.T, k taker, clock *testClock) {
			a := charge(bucket(t, 1, time.Hour, 10), "a").holding(time.Minute)
			v := k.take(a.costs(5))[0]
			clock.advance(70 * time.Second)
			is(t, k.settled(v, a, 9), "late, returned 0, surcharged 4, forgiven 0, 1 expired")
			k.want("ok 1", a.costs(0))
		}},
		{"a debt of one burst at most, and nothing until it is paid", func(t *testing.T, k taker, clock *testClock) {
			a := charge(bucket(t, 1, time.Second, 10), "a").holding(time.Minute)
			v := k.take(a.costs(2))[0]
			is(t, k.settled(v, a, 100), "returned 0, surcharged 18, forgiven 80")
			k.want("no 0 retry 10s", a.costs(0))
			w := k.take(a)[0]
			if w.Allowed || w.Owed != 10 || w.RetryAfter != 11*time.Second || w.FullAfter != 20*time.Second ||
				w.NextAfter != 11*time.Second {
				t.Errorf("%+v", w)
			}
			clock.advance(10 * time.Second)
			k.want("ok 0", a.costs(0))
			k.want("no 0 retry 1s", a)
			clock.advance(time.Second)
			k.want("ok 0", a)
		}},
		{"what is held would suffice: retry in a second", func(t *testing.T, k taker, clock *testClock) {
			a := charge(bucket(t, 1, time.Minute, 10), "a").holding(time.Minute)
			k.take(a.costs(9))
			k.want("no 1 retry 1s", a.costs(10))
			k.take(a)
			w := k.take(a)[0]
			if w.RetryAfter != time.Second || w.FullAfter != 10*time.Minute || w.Held != 10 {
				t.Errorf("%+v", w)
			}
		}},
		{"the life of another process's state is over", func(t *testing.T, k taker, clock *testClock) {
			a := charge(bucket(t, 1, time.Hour, 10), "a").holding(time.Minute)
			v := k.take(a.costs(5))[0]
			b := charge(bucket(t, 1, time.Hour, 10), "b").holding(time.Minute)
			k.take(b.costs(5))
			is(t, k.settled(v, b, 0), "unknown")
			k.want("ok 5", b.costs(0))
		}},
		{"all or none, with holds", func(t *testing.T, k taker, clock *testClock) {
			a := charge(bucket(t, 1, time.Hour, 5), "a").holding(time.Minute)
			b := charge(bucket(t, 1, time.Hour, 1), "b").holding(time.Minute)
			if v := k.take(a, b); v[0].Hold.IsZero() || v[1].Hold.IsZero() {
				t.Errorf("%+v", v)
			}
			v := k.take(a, b)
			if v[0].Allowed != true || !v[0].Hold.IsZero() || v[0].Held != 1 || v[1].Allowed || !v[1].Hold.IsZero() {
				t.Errorf("%+v", v)
			}
		}},
		{"a smaller burst keeps what is held", func(t *testing.T, k taker, clock *testClock) {
			large := charge(bucket(t, 1, time.Hour, 100), "a").holding(time.Minute)
			small := charge(bucket(t, 1, time.Hour, 10), "a").holding(time.Minute)
			v := k.take(large.costs(100))[0]
			k.want("no 0 retry 1s", small)
			k.want("ok 0", large.costs(0))
			is(t, k.settled(v, large, 50), "returned 50, surcharged 0, forgiven 0")
			k.want("ok 50", large.costs(0))
		}},
		{"a clock that goes back: no hold outlasts its life", func(t *testing.T, k taker, clock *testClock) {
			a := charge(bucket(t, 1, 24*time.Hour, 10), "a").holding(time.Minute)
			k.take(a.costs(10))
			clock.advance(-time.Hour)
			k.want("ok 0", a.costs(0).holding(0))
			clock.advance(66 * time.Second)
			if w := k.take(a.costs(0))[0]; w.Held != 0 || w.Expired != 1 {
				t.Errorf("%+v", w)
			}
		}},
		{"a hold of nothing, for a surcharge", func(t *testing.T, k taker, clock *testClock) {
			a := charge(bucket(t, 1, time.Hour, 10), "a").holding(time.Minute).costs(0)
			v := k.take(a)[0]
			is(t, k.settled(v, a, 3), "returned 0, surcharged 3, forgiven 0")
			is(t, k.settled(v, a, 3), "repeated")
			k.want("ok 7", a)
		}},
		{"10,000 holds of one bucket", func(t *testing.T, k taker, clock *testClock) {
			a := charge(bucket(t, 1, time.Hour, 10_000), "a").holding(time.Minute)
			var all []Verdict
			for range 10_000 {
				all = append(all, k.take(a)[0])
			}
			k.want("no 0 retry 1s", a)
			for _, v := range all {
				is(t, k.settled(v, a, 0), "returned 1, surcharged 0, forgiven 0")
			}
			for _, i := range []int{0, 9000, 9999} {
				is(t, k.settled(all[i], a, 0), "repeated")
			}
			k.want("ok 10000", a.costs(0))
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			eachStore(t, func(t *testing.T, s Store, clock *testClock) { tt.test(t, taker{t, s}, clock) })
		})
	}
}

// A bucket that is full, and whose holds have all been settled, ends as any other
// full bucket; and what a shape can never grant is not promised in a second.
func TestSettledHoldsKeepNoBucket(t *testing.T) {
	server := redistest.Start(t)
	k := taker{t, newTestRedis(t, server, serverClock)}
	a := charge(bucket(t, 1000, time.Second, 1000), "a").holding(24 * time.Hour)
	if got := k.settled(k.take(a)[0], a, 0); got != "returned 1, surcharged 0, forgiven 0" {
		t.Error(got)
	}
	if ttl := server.Client().PTTL(t.Context(), a.Key).Val(); ttl < time.Second || ttl > time.Minute {
		t.Errorf("the key of a full bucket ends in %v", ttl)
	}
	large, small := charge(bucket(t, 1, time.Hour, 100), "b"), charge(bucket(t, 1, time.Hour, 10), "b")
	large = large.holding(time.Minute)
	k.take(large.costs(100))
	if v := k.take(small.holding(time.Minute).costs(50))[0]; v.RetryAfter != Never {
		t.Errorf("%+v", v)
	}
}

// What somebody else has stored as holds is no state: the bucket counts as empty.
func TestStoredHoldsAreChecked(t *testing.T) {
	server := redistest.Start(t)
	client := server.Client()
	r := newTestRedis(t, server, serverClock)
	a := charge(bucket(t, 1, day, 10), "a").holding(time.Minute)
	taker{t, r}.want("ok 9", a)
	good := client.Get(t.Context(), a.Key).Val()
	if len(good) != heldSize+sliceSize+1 {
		t.Fatalf("%q", good)
	}
	patch := func(at int, bytes string) string { return good[:at] + bytes + good[at+len(bytes):] }
	for name, raw := range map[string]string{
		"more slices than there are": patch(heldSize-1, "\x02"),
		"fewer":                      patch(heldSize-1, "\x00"),
		"too many slices": patch(heldSize-1, "\x41")[:heldSize] +
			strings.Repeat(good[heldSize:], maxSlices+1),
		"a number to come": patch(heldSize, "\x00\x00\x00\x01"),
		"an end too late":  patch(heldSize+4, "\x20"),
		"a life too long":  patch(heldSize+11, "\xff"),
		"too many tokens":  patch(heldSize+16, "\xff"),
		"too many holds": patch(heldSize+20, "\x20\x08")[:heldSize+sliceSize] +
			strings.Repeat("\x00", maxSliceHolds/8+1),
		"more open than made": patch(heldSize+22, "\x00\x02"),
		"expired and open":    patch(heldSize+24, "\x01"),
		"tokens of nobody":    patch(heldSize+22, "\x00\x00"),
		"a debt too large":    patch(3, "\xc0\x00\x00\x00"),
		"cut":                 good[:len(good)-1],
		"more":                good + "\x00",
	} {
		if s, err := parseState(raw); err == nil {
			t.Errorf("%s: read as %s", name, describe(s))
		}
		if err := client.Set(t.Context(), a.Key, raw, 0).Err(); err != nil {
			t.Fatal(err)
		}
		if v := (taker{t, r}).take(a)[0]; v.Allowed || v.Held != 0 {
			t.Errorf("%s: %+v", name, v)
		}
	}
}

// A settlement in which sluice panics fails, and ends nothing else.
func TestSettlementThatPanics(t *testing.T) {
	r := newTestRedis(t, redistest.Start(t), serverClock)
	a := charge(bucket(t, 1, day, 10), "a").holding(time.Minute)
	v := taker{t, r}.take(a)[0]
	n, err := r.nodeOf(t.Context(), a.Key)
	if err != nil {
		t.Fatal(err)
	}
	n.call = func(context.Context, *connection, []*pending) error { panic("planted") }
	results := make([]Settled, 1)
	r.Settle(t.Context(), []Settlement{{Limit: a.Limit, Key: a.Key, Hold: v.Hold}}, results)
	if !errors.Is(results[0].Err, errPanicked) {
		t.Errorf("%+v", results[0])
	}
}
