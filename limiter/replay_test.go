package limiter

import (
	"math/rand/v2"
	"testing"
	"time"
)

// replayTake takes one charge of a key from r at an instant.
func replayTake(r *Replay, l *Limit, b Bucket, key string, at, cost int64) Outcome {
	return r.Take([]int64{at}, []Charge{{Limit: l, Bucket: b, Key: key, Cost: cost}}, make([]Verdict, 1))
}

// TestReplay walks one bucket through a clock that the caller sets.
func TestReplay(t *testing.T) {
	b, err := NewBucket(2, time.Second, 2)
	if err != nil {
		t.Fatal(err)
	}
	r, l := NewReplay(0), &Limit{Name: "a"}
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
		if got := replayTake(r, l, b, "k", start+step.after.Microseconds(), 1); got != step.want {
			t.Errorf("step %d: %v, want %v", i, got, step.want)
		}
	}
}

// TestReplayDropsFullBuckets checks that only the buckets in use are kept.
func TestReplayDropsFullBuckets(t *testing.T) {
	b, err := NewBucket(10, time.Second, 10)
	if err != nil {
		t.Fatal(err)
	}
	r, l := NewReplay(time.Second), &Limit{Name: "a"}
	most := int64(0)
	for i := range int64(200_000) {
		replayTake(r, l, b, string([]byte{byte(i), byte(i >> 8), byte(i >> 16)}), i*1_000, 1)
		most = max(most, r.memory.entries.Load())
	}
	if most > 20_000 {
		t.Errorf("%d buckets were kept; a key is in use for 0.1 s, and 1000 keys come in a second", most)
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
			r, l := NewReplay(0), &Limit{Name: "a"}
			for j := range at {
				if replayTake(r, l, b, "k", at[j], cost[j]) == Limited {
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
