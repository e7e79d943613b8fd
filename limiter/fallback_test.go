package limiter

import (
	"context"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/sluiceproxy/sluice/limiter/redistest"
)

// under returns the charge with the failure mode Local and a part of its
// bucket.
func (c Charge) under(part float64) Charge {
	l := *c.Limit
	l.OnFailure = Local
	l.LocalShare = part
	c.Limit = &l
	return c
}

// While Redis does not answer, this process grants its share and no more,
// however often Redis comes and goes.
func TestLocal(t *testing.T) {
	server := redistest.Start(t, "--appendonly", "yes", "--appendfsync", "always")
	r := NewFallback(newTestRedis(t, server, serverClock), nil, prometheus.NewRegistry())
	k := taker{t, r}
	a := charge(bucket(t, 1, day, 10), "a").under(.5)
	plain := charge(bucket(t, 1, day, 10), "plain").costs(0) // which nobody answers for but Redis
	take := func(n int, charges ...Charge) (granted int) {
		t.Helper()
		for range n {
			d := Decide(context.Background(), r, charges)
			if d.Outcome == Allowed {
				granted++
			} else if d.Outcome != Limited {
				t.Fatalf("%+v", d)
			}
		}
		return granted
	}
	if n := take(3, a); n != 3 {
		t.Fatalf("%d of 3", n)
	}
	server.Kill()
	d := Decide(context.Background(), r, []Charge{a})
	if v := d.Verdicts[0]; d.Outcome != Allowed || !d.Local || v.Source != LocalSource || v.Remaining != 4 ||
		v.Err != nil {
		t.Fatalf("%+v", d)
	}
	if n := take(20, a); n != 4 {
		t.Errorf("%d granted of the 4 that were left of this process's 5", n)
	}
	for range 2 { // it comes and goes: neither fills the local bucket
		server.Restart()
		waitForAnswer(t, r.redis, plain)
		server.Kill()
		if n := take(5, a); n != 0 {
			t.Errorf("%d granted by a flap", n)
		}
	}
	server.Restart()
	waitForAnswer(t, r.redis, plain)
	if d := Decide(context.Background(), r, []Charge{a}); d.Local || d.Verdicts[0].Source != RedisSource ||
		d.Verdicts[0].Remaining != 6 {
		t.Errorf("%+v", d)
	}
	// What Redis says is left is the most that an outage begins with.
	b := charge(bucket(t, 1, day, 10), "b").under(.5)
	k.want("ok 2", b.costs(8))
	server.Kill()
	if n := take(10, b); n != 2 {
		t.Errorf("%d granted where 2 were left", n)
	}
	// All or none here, too: what another local bucket denies costs nobody
	// anything.
	c := charge(bucket(t, 1, day, 10), "c").under(.5)
	if n := take(5, b, c); n != 0 {
		t.Errorf("%d granted", n)
	}
	if n := take(10, c); n != 5 {
		t.Errorf("%d of c's 5", n)
	}
	// Beside a limit that fails closed the request is refused, and costs nothing.
	e := charge(bucket(t, 1, day, 10), "e").under(.5)
	if d := Decide(context.Background(), r, []Charge{e, charge(bucket(t, 1, day, 10), "f")}); d.Outcome != FailedClosed {
		t.Errorf("%+v", d)
	}
	if n := take(10, e); n != 5 {
		t.Errorf("%d of e's 5", n)
	}
}

// A sidecar grants its share of a quota in each window, and no more than Redis said
// was left.
func TestLocalQuota(t *testing.T) {
	server := redistest.Start(t)
	r := NewFallback(newTestRedis(t, server, serverClock), nil, prometheus.NewRegistry())
	clock := &testClock{t: t, at: time.Now().UnixMicro()}
	r.memory.wall = clock.now
	k := taker{t, r}
	c := calendar(t, Month, "", "")
	a, b := charge(quota(t, 100, c), "a").under(.1), charge(quota(t, 100, c), "b").under(.1)
	k.want("ok 5", a.costs(95))
	server.Kill()
	k.want("ok 0", a.costs(5))
	k.want("ok 0", b.costs(10))
	ends := c.window(clock.at).end
	for _, charge := range []Charge{a, b} {
		if v := k.take(charge)[0]; v.Allowed || v.Source != LocalSource || v.RetryAfter.Microseconds() != ends-clock.at {
			t.Errorf("%+v", v)
		}
	}
	clock.set(ends)
	k.want("ok 0", a.costs(10))
}

// If one bucket fails in Redis and the local one denies, the request's other
// buckets keep their tokens.
func TestLocalBesideRedis(t *testing.T) {
	server := redistest.Start(t)
	r := NewFallback(newTestRedis(t, server, serverClock), nil, prometheus.NewRegistry())
	ctx := context.Background()
	newer, good := charge(bucket(t, 1, day, 10), "newer").under(.1), charge(bucket(t, 1, day, 10), "good")
	if err := server.Client().Set(ctx, newer.Key, stateMagic+"\x04", 0).Err(); err != nil {
		t.Fatal(err)
	}
	for i, want := range []Outcome{Allowed, Limited, Limited} { // a tenth of the burst is one token
		if d := Decide(ctx, r, []Charge{newer, good}); d.Outcome != want || !d.Local || d.Verdicts[1].Remaining != 9 {
			t.Errorf("%d: %+v", i, d)
		}
	}
	taker{t, r}.want("ok 8", good)
}

func TestShare(t *testing.T) {
	random := rand.New(rand.NewPCG(3, 4))
	for range 20_000 {
		b := anyBucketOf(t, random)
		part := max(1e-6, random.Float64())
		s := b.Share(part)
		rate, want := float64(s.n)/float64(s.p), part*float64(b.n)/float64(b.p)
		if s.n < 1 || s.p < minP || s.p > maxPeriod.Microseconds() || s.n > MaxTokens*minP || s.burst < 1 {
			t.Fatalf("%+v of %+v by %v: the script would refuse it", s, b, part)
		}
		if s.burst > max(1, int64(part*float64(b.burst))) || rate > max(want, 1/float64(s.p))*1.0001 ||
			rate < want-1/float64(s.p)-want*2e-6/part {
			t.Fatalf("%+v of %+v by %v: rate %v, want %v", s, b, part, rate, want)
		}
	}
}

func anyBucketOf(t *testing.T, random *rand.Rand) Bucket {
	t.Helper()
	for {
		b, err := NewBucket(1+random.Int64N(1<<random.IntN(30)),
			time.Duration(1+random.Int64N(1<<random.IntN(44)))*time.Microsecond, 1+random.Int64N(1<<random.IntN(30)))
		if err == nil {
			return b
		}
	}
}

// A limit under Local fails closed where nobody decides in the store's place.
func TestLocalWithoutFallback(t *testing.T) {
	server := redistest.Start(t)
	r := newTestRedis(t, server, serverClock)
	server.Kill()
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	if d := Decide(ctx, r, []Charge{charge(bucket(t, 1, day, 10), "a").under(.5)}); d.Outcome != FailedClosed {
		t.Errorf("%+v", d)
	}
}
