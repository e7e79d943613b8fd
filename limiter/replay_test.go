package limiter

import (
	"math/rand/v2"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// replayTake takes one charge from a bucket at an instant.
func replayTake(r *Replay, from *ReplayBucket, b Bucket, at, cost int64) Outcome {
	charges := []Charge{{Limit: &Limit{Name: "a"}, Bucket: b, Cost: cost}}
	return r.Take([]int64{at}, []*ReplayBucket{from}, charges, make([]Verdict, 1))
}

// TestReplay walks one bucket through a clock that the caller sets.
func TestReplay(t *testing.T) {
	b, err := NewBucket(2, time.Second, 2)
	if err != nil {
		t.Fatal(err)
	}
	var r Replay
	var bucket ReplayBucket
	start := time.Date(2015, 5, 17, 10, 5, 3, 0, time.UTC).UnixMicro()
	for i, step := range []struct {
		after time.Duration
		want  Outcome
	}{
		{0, Allowed},
		{0, Allowed},
		{0, Limited},
		{499_999 * time.Microsecond, Limited},
		{500 * time.Millisecond, Allowed},
		{24 * time.Hour, Allowed},
		{24 * time.Hour, Allowed},
		{24 * time.Hour, Limited},
	} {
		if got := replayTake(&r, &bucket, b, start+step.after.Microseconds(), 1); got != step.want {
			t.Errorf("step %d: %v, want %v", i, got, step.want)
		}
	}
}

// TestReplayIsMemory compares Replay with Memory on random charges of several
// shapes and limits, with holds and settlements.
func TestReplayIsMemory(t *testing.T) {
	random := rand.New(rand.NewPCG(3, 4))
	for range 50 {
		now := int64(1_700_000_000_000_000)
		memory := newMemory("a", 1<<30, func() int64 { return now }, nil, prometheus.NewRegistry())
		memory.wall = func() int64 { return now }
		var replay Replay
		calendars := []Calendar{calendar(t, Hour, "", ""), calendar(t, Day, "Asia/Tokyo", "")}
		limits := []*Limit{{Name: "a"}, {Name: "b", Shadow: true}, {Name: "c"}}
		buckets := make([]ReplayBucket, 6)
		type held struct {
			bucket    int
			key       string
			ofMemory  Hold
			ofReplay  Hold
			limit     *Limit
			ofRequest int64
		}
		var holds []held
		for step := range 500 {
			now += random.Int64N(400_000)
			if random.IntN(50) == 0 {
				now += random.Int64N(2 * time.Hour.Microseconds())
			}
			if len(holds) > 0 && random.IntN(3) == 0 {
				h := holds[0]
				holds = holds[1:]
				cost := random.Int64N(2*h.ofRequest + 1)
				var settled [1]Settled
				memory.Settle(t.Context(), []Settlement{{Limit: h.limit, Key: h.key, Hold: h.ofMemory, Cost: cost}}, settled[:])
				if got := buckets[h.bucket].Settle(now, h.ofReplay, cost); got != settled[0] {
					t.Fatalf("step %d: %+v, want %+v", step, got, settled[0])
				}
				continue
			}
			var charges []Charge
			var at []int64
			var from []*ReplayBucket
			var numbers []int
			for i, l := range limits {
				if random.IntN(3) == 0 {
					continue
				}
				n := 2*i + random.IntN(2)
				b, err := NewBucket(1+random.Int64N(5), time.Second, 1+random.Int64N(6))
				if err != nil {
					t.Fatal(err)
				}
				if n >= 4 { // some are of two calendars
					b = quota(t, 1+random.Int64N(20), calendars[random.IntN(2)])
				}
				c := Charge{Limit: l, Bucket: b, Key: string(rune('a' + n)), Cost: random.Int64N(4)}
				if i != 1 {
					c.HoldFor = time.Duration(random.Int64N(3)) * time.Second
				}
				charges, at = append(charges, c), append(at, now)
				from, numbers = append(from, &buckets[n]), append(numbers, n)
			}
			if len(charges) == 0 {
				continue
			}
			want, got := make([]Verdict, len(charges)), make([]Verdict, len(charges))
			memory.Take(t.Context(), charges, want)
			if outcome := replay.Take(at, from, charges, got); outcome != outcomeOf(charges, want) {
				t.Fatalf("step %d: %v, want %v", step, outcome, outcomeOf(charges, want))
			}
			for i := range charges {
				if got[i].Allowed != want[i].Allowed || got[i].Hold.Tokens != want[i].Hold.Tokens ||
					got[i].Hold.IsZero() != want[i].Hold.IsZero() {
					t.Fatalf("step %d: %+v, want %+v", step, got[i], want[i])
				}
				if !got[i].Hold.IsZero() {
					holds = append(holds, held{numbers[i], charges[i].Key, want[i].Hold, got[i].Hold, charges[i].Limit, charges[i].Cost})
				}
			}
			if random.IntN(10) == 0 {
				memory.sweep()
				for i := range buckets {
					if buckets[i].IsFull(now) {
						buckets[i] = ReplayBucket{}
					}
				}
			}
		}
	}
}

// TestDepth checks on random requests that a bucket of the deepest draw denies
// nothing, and that one of a token less does.
func TestDepth(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	for i := range 200 {
		tokens, period := 1+random.Int64N(20), time.Duration(1+random.Int64N(5_000_000))*time.Microsecond
		at := make([]int64, 200)
		cost := make([]int64, len(at))
		for j := range at {
			if j > 0 {
				at[j] = at[j-1] + random.Int64N(2*period.Microseconds()/tokens)
			}
			cost[j] = random.Int64N(4)
		}
		rate, err := NewBucket(tokens, period, 1)
		if err != nil {
			t.Fatal(err)
		}
		var d Depth
		for j := range at {
			d.Take(rate, at[j], cost[j])
		}
		denied := func(burst int64) (n int) {
			b, err := NewBucket(tokens, period, burst)
			if err != nil {
				t.Fatal(err)
			}
			var r Replay
			var bucket ReplayBucket
			for j := range at {
				if replayTake(&r, &bucket, b, at[j], cost[j]) == Limited {
					n++
				}
			}
			return n
		}
		if n := denied(d.Deepest()); n > 0 {
			t.Errorf("log %d: with %d tokens, %d requests are denied", i, d.Deepest(), n)
		}
		if d.Deepest() > 1 && denied(d.Deepest()-1) == 0 {
			t.Errorf("log %d: %d tokens are enough, too", i, d.Deepest()-1)
		}
	}
}
