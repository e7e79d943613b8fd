package limiter

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/redis/go-redis/v9"
	"pgregory.net/rapid"

	"github.com/sluiceproxy/sluice/limiter/redistest"
)

// keyClock is a last line for the script that reads the time from a key, which
// tests set.
const keyClock = "return take(tonumber(redis.call('GET', 'clock')))\n"

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

// describe returns what a state says, but for the random birth of its holds.
func describe(s state) string {
	text := fmt.Sprintf("%+v %+v at %d", s.shape, s.level, s.at)
	if s.other != nil {
		text += fmt.Sprintf(", other %+v", *s.other)
	}
	if s.quota != nil {
		text += fmt.Sprintf(", quota %+v", *s.quota)
	}
	if s.holds != nil {
		text += fmt.Sprintf(", held %d, next %d", s.holds.total, s.holds.next)
		for _, e := range s.holds.slices {
			text += fmt.Sprintf(", %+v", e)
		}
	}
	return text
}

// bothHolds is what two stores hold of the same charge.
type bothHolds struct {
	charge         Charge
	redis, inProcs Hold
}

// withoutBirth returns a hold without what is random in it.
func withoutBirth(h Hold) Hold {
	if !h.IsZero() {
		h.birth = [8]byte{1}
	}
	return h
}

// anyQuotaOf returns a quota of a few tokens or many, of calendars of which some
// have windows in common.
func anyQuotaOf(t *testing.T) *rapid.Generator[Bucket] {
	calendars := []Calendar{
		calendar(t, Hour, "", ""), calendar(t, Hour, "Asia/Kolkata", ""), calendar(t, Day, "", ""),
		calendar(t, Day, "Europe/Berlin", ""), calendar(t, Week, "", "2026-11-26"), calendar(t, Month, "", ""),
		calendar(t, Year, "America/New_York", "2024-02-29"),
	}
	return rapid.Custom(func(r *rapid.T) Bucket {
		tokens := rapid.OneOf(rapid.Int64Range(1, 20), rapid.Int64Range(1, MaxTokens)).Draw(r, "tokens")
		return quota(t, tokens, rapid.SampledFrom(calendars).Draw(r, "calendar"))
	})
}

// The script agrees with state.next, hold and settle, for buckets with rates and
// for quotas.
func TestScriptAgreesWithGo(t *testing.T) {
	t.Run("rates", func(t *testing.T) { scriptAgrees(t, anyBucket(), redistest.Scaled(2000, 10_000)) })
	t.Run("quotas", func(t *testing.T) { scriptAgrees(t, anyQuotaOf(t), redistest.Scaled(2000, 5000)) })
	t.Run("both", func(t *testing.T) { scriptAgrees(t, rapid.OneOf(anyBucket(), anyQuotaOf(t)), 2000) })
}

// scriptAgrees compares a Redis and a Memory on shapes that it draws. On random sequences of
// takes and settlements, with costs, holds, limits that change, buckets that are
// lost and clocks that jump both ways, Redis and a Memory return the same
// verdicts and store the same state, and every key in Redis expires, after its
// last hold.
func scriptAgrees(t *testing.T, anyShape *rapid.Generator[Bucket], checks int) {
	setRapidChecks(t, checks)
	server := redistest.Start(t)
	client := server.Client()
	clock := &testClock{t: t, client: client}
	r := newTestRedis(t, server, keyClock)
	ctx := context.Background()
	var takes, sequences, mixed, withHolds, debts, expired, quotas int
	settlements := map[string]int{}
	rapid.Check(t, func(t *rapid.T) {
		sequences++
		m := newMemory("buckets", 1<<24, clock.now, nil, prometheus.NewRegistry())
		m.wall = clock.now
		clock.set(begin)
		began := time.Now()
		shapes := rapid.SliceOfN(anyShape, 1, 3).Draw(t, "shapes")
		life := rapid.Int64Range(int64(MinHold), int64(time.Hour)).Draw(t, "life")
		holdsAtAll := rapid.IntRange(0, 3).Draw(t, "holds at all") > 0
		var out []bothHolds
		compare := func(key string, step any) {
			kept, ok := m.shards[m.shardOf(key)].buckets[key]
			raw, err := client.Get(ctx, key).Result()
			if !ok {
				if !errors.Is(err, redis.Nil) {
					t.Fatalf("Redis has %q (%v) where nothing had to be stored", raw, err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if kept.other != nil || kept.quota != nil && kept.quota.otherBurst > 0 {
				mixed++
			}
			if kept.quota != nil {
				quotas++
				if len(raw) > 120 && raw[2] == 4 {
					t.Fatalf("a quota takes %d bytes", len(raw))
				}
			}
			if kept.holds != nil {
				withHolds++
			}
			if kept.level.tokens < 0 {
				debts++
			}
			if kept.quota != nil && byte(4) != raw[2] && (kept.holds == nil || raw[2] != 5) ||
				kept.quota == nil && (kept.holds == nil && kept.level.tokens >= 0) != (raw[2] < 3) {
				t.Fatalf("version %d of %s", raw[2], describe(kept))
			}
			if stored := decode(t, raw); describe(stored) != describe(kept) {
				t.Fatalf("after %+v\nstored %s\n  want %s", step, describe(stored), describe(kept))
			}
			end := kept.keepFor()
			ttl, err := client.PTTL(ctx, key).Result()
			if err != nil || kept.at == clock.at && (ttl < end+time.Second || ttl > end+time.Minute) || ttl < 0 {
				t.Fatalf("TTL %v (%v) of %s, which is kept for %v", ttl, err, describe(kept), end)
			}
		}
		// Buckets that fill soon expire within seconds by Redis's own clock;
		// stop long before that.
		for range rapid.IntRange(1, 14).Draw(t, "steps") {
			if time.Since(began) > 2*time.Second {
				return
			}
			shape := rapid.SampledFrom(shapes).Draw(t, "shape")
			lasts := shape.FillTime().Microseconds()
			if shape.IsQuota() {
				w := shape.Calendar().window(clock.at)
				lasts = 2 * rapid.SampledFrom([]int64{w.end - clock.at, w.end - w.start}).Draw(t, "lasts")
			}
			jump := rapid.OneOf(
				rapid.Int64Range(0, 10),
				rapid.Int64Range(0, 2*shape.wait(level{}, 1).Microseconds()),
				rapid.Int64Range(0, lasts),
				rapid.Int64Range(0, 3*life/1000),
				rapid.Int64Range(0, life/10_000),
				rapid.Int64Range(-time.Hour.Microseconds(), 0),
				rapid.Int64Range(-30*time.Hour.Microseconds(), 0),
			).Draw(t, "jump")
			clock.set(min(clock.at+jump, 1<<52))

			what := rapid.IntRange(0, 9).Draw(t, "what")
			if what < 4 && len(out) > 0 {
				var mine, theirs []Settlement
				for range rapid.IntRange(1, 4).Draw(t, "settlements") {
					of := rapid.SampledFrom(out).Draw(t, "of")
					cost := rapid.OneOf(rapid.Int64Range(0, 2*of.charge.Cost+1), rapid.Int64Range(0, 4*MaxTokens)).Draw(t, "cost")
					a := Settlement{Limit: of.charge.Limit, Key: of.charge.Key, Hold: of.redis, Cost: cost}
					b := a
					b.Hold = of.inProcs
					switch rapid.IntRange(0, 9).Draw(t, "forged") {
					case 0:
						a.Hold.birth[3]++
						b.Hold.birth[3]++
					case 1:
						a.Hold.index++
						b.Hold.index++
					case 2:
						a.Hold.slice++
						b.Hold.slice++
					}
					theirs, mine = append(theirs, a), append(mine, b)
				}
				got, want := make([]Settled, len(theirs)), make([]Settled, len(mine))
				r.Settle(ctx, theirs, got)
				m.Settle(ctx, mine, want)
				for i := range got {
					if got[i] != want[i] {
						t.Fatalf("%+v at %d\nthe script says %+v\n   the maths say %+v", mine[i], clock.at, got[i], want[i])
					}
					expired += got[i].Expired
					switch s := got[i]; {
					case !s.Known:
						settlements["unknown"]++
					case s.Repeated:
						settlements["repeated"]++
					case s.Late:
						settlements["late"]++
					default:
						settlements["on time"]++
					}
					if got[i].Forgiven > 0 {
						settlements["forgiven"]++
					}
				}
				for i := range mine {
					compare(mine[i].Key, mine)
				}
				continue
			}
			if what == 9 && rapid.IntRange(0, 3).Draw(t, "lost") == 0 {
				key := fmt.Sprintf("a%d", sequences)
				delete(m.shards[m.shardOf(key)].buckets, key)
				if err := client.Del(ctx, key).Err(); err != nil {
					t.Fatal(err)
				}
			}

			var charges []Charge
			for _, key := range []string{"a", "b", "c"}[:rapid.IntRange(1, 3).Draw(t, "charges")] {
				b := rapid.SampledFrom(shapes).Draw(t, "of")
				c := Charge{
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
				}
				if holdsAtAll && rapid.IntRange(0, 3).Draw(t, "held") > 0 {
					c.HoldFor = rapid.SampledFrom([]time.Duration{time.Duration(life), time.Duration(life) * 3, 1}).Draw(t, "hold for")
				}
				charges = append(charges, c)
			}
			got, want := make([]Verdict, len(charges)), make([]Verdict, len(charges))
			r.Take(ctx, charges, got)
			m.Take(ctx, charges, want)
			for i, c := range charges {
				takes++
				want[i].Source = RedisSource
				if !got[i].Hold.IsZero() {
					out = append(out, bothHolds{c, got[i].Hold, want[i].Hold})
				}
				expired += got[i].Expired
				got[i].Hold, want[i].Hold = withoutBirth(got[i].Hold), withoutBirth(want[i].Hold)
				if got[i] != want[i] {
					t.Fatalf("%+v of %+v at %d\nthe script says %+v\n   the maths say %+v", c, c.Limit, clock.at, got[i], want[i])
				}
				compare(c.Key, charges)
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
	t.Logf("%d sequences, %d takes, %v settlements, %d holds expired; of the states %d were quotas, "+
		"%d had another shape, %d holds, %d a debt; 0 mismatches; %s",
		sequences, takes, settlements, expired, quotas, mixed, withHolds, debts, info)
	for _, kind := range []string{"on time", "late", "repeated", "unknown", "forgiven"} {
		if settlements[kind] < sequences/100 {
			t.Errorf("only %d settlements %s: this says little", settlements[kind], kind)
		}
	}
	if mixed < takes/20 || withHolds < takes/5 || debts < takes/100 || expired < takes/100 {
		t.Error("too few of some states: this says little")
	}
}

// checksAsked reports whether the command line has a number of checks, which
// then is in force.
var checksAsked = sync.OnceValue(func() (asked bool) {
	flag.Visit(func(f *flag.Flag) { asked = asked || f.Name == "rapid.checks" })
	return asked
})

func setRapidChecks(t *testing.T, n int) {
	if checksAsked() {
		return
	}
	old := flag.Lookup("rapid.checks").Value.String()
	if err := flag.Set("rapid.checks", strconv.Itoa(n)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = flag.Set("rapid.checks", old) })
}
