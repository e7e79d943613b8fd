package limiter

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"strconv"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/redis/go-redis/v9"
	"pgregory.net/rapid"

	"github.com/sluiceproxy/sluice/limiter/redistest"
)

// keyClock is a last line for the script that reads the time from a key, which
// tests set.
const keyClock = "return %s(tonumber(redis.call('GET', 'clock')))\n"

// testClock is a clock in microseconds that tests set. A Redis store with
// keyClock and a Memory whose now is set both follow it.
type testClock struct {
	t      testing.TB
	at     int64
	client *redis.Client // nil where no Redis goes by it
}

// begin is where test clocks start: an ordinary day of Redis's.
const begin = 1_700_000_000_000_000

func (c *testClock) now() int64 { return c.at }

func (c *testClock) set(at int64) {
	c.at = at
	if c.client != nil {
		if err := c.client.Set(context.Background(), "clock", at, 0).Err(); err != nil {
			c.t.Fatal(err)
		}
	}
}

func (c *testClock) advance(d time.Duration) { c.set(c.at + d.Microseconds()) }

// newTestRedis returns a store on the server with a timeout that a slow machine
// does not exceed.
func newTestRedis(t testing.TB, s *redistest.Server, clock string) *Redis {
	t.Helper()
	r, err := newRedis(RedisOptions{URL: s.URL(), Timeout: time.Minute}, clock, nil, prometheus.NewRegistry())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = r.Close() })
	return r
}

// decode reads what the script has stored.
func decode(t interface{ Fatalf(string, ...any) }, raw string) state {
	s, err := parseState(raw)
	if err != nil {
		t.Fatalf("stored: %q: %v", raw, err)
	}
	return s
}

// equal compares states by what they say.
func (s state) equal(o state) bool {
	if s.other != nil && o.other != nil && *s.other == *o.other {
		s.other, o.other = nil, nil
	}
	return s == o
}

// The script agrees with levelAt. On random sequences of takes, with costs,
// limits that change and clocks that jump both ways, Redis and a Memory return
// the same verdicts and store the same state, and every key in Redis expires.
func TestScriptAgreesWithLevelAt(t *testing.T) {
	setRapidChecks(t, 10_000)
	server := redistest.Start(t)
	client := server.Client()
	clock := &testClock{t: t, client: client}
	r := newTestRedis(t, server, keyClock)
	ctx := context.Background()
	var takes, sequences, mixed int
	rapid.Check(t, func(t *rapid.T) {
		sequences++
		m := newMemory("buckets", 1<<20, clock.now, nil, prometheus.NewRegistry())
		clock.set(begin)
		began := time.Now()
		shapes := rapid.SliceOfN(anyBucket(), 1, 3).Draw(t, "shapes")
		// Buckets that fill soon expire within seconds by Redis's own clock;
		// stop long before that.
		for range rapid.IntRange(1, 12).Draw(t, "steps") {
			if time.Since(began) > 2*time.Second {
				return
			}
			shape := rapid.SampledFrom(shapes).Draw(t, "shape")
			jump := rapid.OneOf(
				rapid.Int64Range(0, 10),
				rapid.Int64Range(0, 2*shape.wait(level{}, 1).Microseconds()),
				rapid.Int64Range(0, shape.FillTime().Microseconds()),
				rapid.Int64Range(-time.Hour.Microseconds(), 0),
			).Draw(t, "jump")
			clock.set(min(clock.at+jump, 1<<53-1))

			var charges []Charge
			for _, key := range []string{"a", "b", "c"}[:rapid.IntRange(1, 3).Draw(t, "charges")] {
				b := rapid.SampledFrom(shapes).Draw(t, "of")
				charges = append(charges, Charge{
					Limit: &Limit{
						Domain:    "d",
						Name:      key,
						Shadow:    rapid.IntRange(0, 3).Draw(t, "shadow") == 0,
						OnFailure: rapid.SampledFrom([]FailureMode{Allow, Delegate, Deny}).Draw(t, "on failure"),
					},
					Bucket: b,
					Key:    fmt.Sprintf("%s%d", key, sequences),
					Cost: rapid.OneOf(rapid.Just(int64(1)), rapid.Int64Range(0, 3), rapid.Int64Range(0, b.burst),
						rapid.Just(b.burst), rapid.Just(int64(1)<<60)).Draw(t, "cost"),
				})
			}
			got, want := make([]Verdict, len(charges)), make([]Verdict, len(charges))
			r.Take(ctx, charges, got)
			m.Take(ctx, charges, want)
			for i, c := range charges {
				takes++
				want[i].Source = RedisSource
				if got[i] != want[i] {
					t.Fatalf("%+v of %+v at %d\nthe script says %+v\n   the maths say %+v", c, c.Limit, clock.at, got[i], want[i])
				}
				kept, ok := m.shards[m.shardOf(c.Key)].buckets[c.Key]
				raw, err := client.Get(ctx, c.Key).Result()
				if !ok {
					if !errors.Is(err, redis.Nil) {
						t.Fatalf("Redis has %q (%v) where nothing had to be stored", raw, err)
					}
					continue
				}
				if err != nil {
					t.Fatal(err)
				}
				if kept.other != nil {
					mixed++
				}
				if stored := decode(t, raw); !stored.equal(kept) {
					t.Fatalf("stored %+v, want %+v", stored, kept)
				}
				full := kept.fullAfter()
				ttl, err := client.PTTL(ctx, c.Key).Result()
				if err != nil || kept.at == clock.at && (ttl < full+time.Second || ttl > full+time.Minute) || ttl < 0 {
					t.Fatalf("TTL %v (%v) of %+v, which is full in %v", ttl, err, kept, full)
				}
			}
		}
	})
	info := server.Info("keyspace")["db0"]
	var keys, expires int
	if _, err := fmt.Sscanf(info, "keys=%d,expires=%d", &keys, &expires); err != nil {
		t.Fatalf("%q: %v", info, err)
	}
	if keys != expires+1 { // the clock
		t.Errorf("%d keys, of which %d have an end", keys, expires)
	}
	if mixed < takes/20 {
		t.Errorf("%d of %d states had another shape: this says little", mixed, takes)
	}
	t.Logf("%d sequences, %d takes, %d states with another shape, 0 mismatches; %s", sequences, takes, mixed, info)
}

func setRapidChecks(t *testing.T, n int) {
	old := flag.Lookup("rapid.checks").Value.String()
	if was, err := strconv.Atoi(old); err == nil && was > n {
		return // more was asked for
	}
	if err := flag.Set("rapid.checks", strconv.Itoa(n)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = flag.Set("rapid.checks", old) })
}
