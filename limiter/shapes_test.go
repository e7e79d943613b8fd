package limiter

import (
	"context"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/redis/go-redis/v9"

	"github.com/sluiceproxy/sluice/limiter/redistest"
)

// shapesStore is a store whose clock and whose ends of buckets are the test's.
type shapesStore struct {
	take  []func(Charge) Verdict // of each sidecar
	clock func(at int64)
	// expire drops the bucket if its end has come.
	expire func(key string)
}

// shapesRun takes from one bucket in several shapes, as two routes, a reload
// and its return, or two sidecars with different files do, always as much as
// there is or nearly so. It returns by how many tokens the grants exceed the
// larger burst and the larger rate, in the worst window.
func shapesRun(t *testing.T, random *rand.Rand, key string, s shapesStore) float64 {
	t.Helper()
	shapes := make([]Bucket, 2+random.IntN(2))
	larger := Bucket{n: 0, p: 1}
	for i := range shapes {
		period := []time.Duration{time.Second, time.Minute, time.Hour, 24 * time.Hour}[random.IntN(4)]
		shapes[i] = bucket(t, 1+random.Int64N(60), period, 1+random.Int64N(100))
		if b := shapes[i]; float64(b.n)/float64(b.p) > float64(larger.n)/float64(larger.p) {
			larger.n, larger.p = b.n, b.p
		}
		larger.burst = max(larger.burst, shapes[i].burst)
	}
	way := random.IntN(3)
	var grants []grant
	now := int64(begin)
	for step := range 40 {
		var of, sidecar int
		switch way {
		case 0: // routes
			of = random.IntN(len(shapes))
		case 1: // a reload, and another
			of = step / 7 % len(shapes)
		default: // sidecars
			sidecar = random.IntN(len(s.take))
			of = sidecar % len(shapes)
		}
		b := shapes[of]
		s.clock(now)
		s.expire(key)
		cost := b.burst
		for range 3 { // what there is, or nearly
			v := s.take[sidecar](Charge{Limit: &Limit{Domain: "d", Name: "l", OnFailure: Deny}, Bucket: b, Key: key, Cost: cost})
			if v.Err != nil {
				t.Fatal(v.Err)
			}
			if v.Allowed {
				grants = append(grants, grant{now, cost})
				break
			}
			if cost = v.Remaining; cost == 0 {
				break
			}
		}
		// Until the bucket is full in one of the shapes and its key may have ended,
		// or any part of that.
		wait := shapes[random.IntN(len(shapes))].FillTime() + time.Duration(random.Int64N(int64(20*time.Second)))
		if random.IntN(3) == 0 {
			wait = time.Duration(random.Int64N(int64(wait)))
		}
		now += wait.Microseconds()
	}
	return excess(larger, grants)
}

// shapesMemory is a Memory that is swept by a rule before each take.
func shapesMemory(ends func(state, int64) bool) (s shapesStore) {
	clock := &testClock{}
	m := newMemory("buckets", 1<<20, clock.now, nil, prometheus.NewRegistry())
	take := func(c Charge) Verdict {
		v := make([]Verdict, 1)
		m.Take(context.Background(), []Charge{c}, v)
		return v[0]
	}
	return shapesStore{
		take:  []func(Charge) Verdict{take, take},
		clock: clock.set,
		expire: func(key string) {
			if ends == nil {
				m.sweep()
				return
			}
			buckets := m.shards[m.shardOf(key)].buckets
			if stored, ok := buckets[key]; ok && ends(stored, clock.at) {
				delete(buckets, key)
			}
		},
	}
}

// shapesRedis is one of two stores on servers. The script's clock is a key beside
// the bucket's; a bucket's end is taken from Redis when the bucket is written, and
// comes by that clock.
func shapesRedis(t *testing.T, o RedisOptions) (s shapesStore) {
	t.Helper()
	ctx := context.Background()
	const clock = "return take(tonumber(redis.call('GET', 'clock:' .. KEYS[1]:match('{.*}'))))\n"
	var client redis.UniversalClient
	now, ends := int64(0), int64(0)
	var last, written string // the key that was used last, and what was stored under it
	for range 2 {
		o.Timeout = time.Minute
		r, err := newRedis(o, clock, nil, prometheus.NewRegistry())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = r.Close() })
		client = r.client
		s.take = append(s.take, func(c Charge) Verdict {
			_, run, _ := strings.Cut(c.Key, "{")
			if err := client.Set(ctx, "clock:{"+run, now, 0).Err(); err != nil {
				t.Fatal(err)
			}
			v := make([]Verdict, 1)
			r.Take(ctx, []Charge{c}, v)
			if value := client.Get(ctx, c.Key).Val(); value != written {
				written, ends = value, now+client.PTTL(ctx, c.Key).Val().Microseconds()
			}
			return v[0]
		})
	}
	s.clock = func(at int64) { now = at }
	s.expire = func(key string) {
		if key != last {
			last, written = key, ""
		}
		if written != "" && now >= ends {
			written = ""
			if err := client.Del(ctx, key).Err(); err != nil {
				t.Fatal(err)
			}
		}
	}
	return s
}

// Whatever shapes use a bucket, no window has more grants than the larger burst
// and the larger rate allow.
func TestBoundAcrossShapes(t *testing.T) {
	play := func(t *testing.T, runs int, s func() shapesStore) (over int, worst float64) {
		seed := uint64(time.Now().UnixNano())
		random := rand.New(rand.NewPCG(seed, 1))
		for run := range runs {
			if e := shapesRun(t, random, fmt.Sprintf("p:d:l:{%d}", run), s()); e > 0 {
				over, worst = over+1, max(worst, e)
			}
		}
		t.Logf("seed %d: %d of %d runs over the bound, by up to %.1f tokens", seed, over, runs, worst)
		return over, worst
	}
	none := func(t *testing.T, runs int, s func() shapesStore) {
		if over, worst := play(t, runs, s); over > 0 {
			t.Errorf("%d runs over the bound, by up to %.1f tokens; want none", over, worst)
		}
	}
	t.Run("memory", func(t *testing.T) {
		none(t, redistest.Scaled(500, 2000), func() shapesStore { return shapesMemory(nil) })
	})
	t.Run("redis", func(t *testing.T) {
		server := redistest.Start(t)
		s := shapesRedis(t, RedisOptions{URL: server.URL()})
		none(t, redistest.Scaled(60, 500), func() shapesStore { return s })
	})
	t.Run("cluster", func(t *testing.T) {
		nodes := redistest.StartCluster(t, 3)
		o := RedisOptions{Mode: Cluster}
		for _, node := range nodes {
			o.Addresses = append(o.Addresses, node.Addr)
		}
		s := shapesRedis(t, o)
		none(t, redistest.Scaled(30, 250), func() shapesStore { return s })
	})
	// The checker sees what goes wrong when a bucket ends once it is full in the
	// last shape only, and when the end of an earlier shape is kept but not moved
	// by what is taken after it.
	t.Run("checker", func(t *testing.T) {
		lastShape := func(s state, now int64) bool {
			l, _ := levelAt(s, s.shape, now)
			return l.tokens == s.shape.burst
		}
		if over, _ := play(t, 2000, func() shapesStore { return shapesMemory(lastShape) }); over == 0 {
			t.Error("the end by the last shape was not seen to break the bound")
		}
		keptEnd := func() func(state, int64) bool {
			var end int64
			return func(s state, now int64) bool {
				end = max(end, s.at+s.shape.wait(s.level, s.shape.burst).Microseconds())
				return now >= end
			}
		}
		if over, _ := play(t, 2000, func() shapesStore { return shapesMemory(keptEnd()) }); over == 0 {
			t.Error("an end that is kept and not moved was not seen to break the bound")
		}
	})
}
