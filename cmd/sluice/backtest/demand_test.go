package backtest

import (
	"math/rand/v2"
	"testing"
	"time"

	"github.com/sluiceproxy/sluice/limiter"
)

// TestLeastRate compares the least rate with replays on random logs: with it
// nothing is denied, and with one token less something is.
func TestLeastRate(t *testing.T) {
	random := rand.New(rand.NewPCG(3, 4))
	rates, longest := 0, 0
	for i := range 500 {
		period := time.Duration(1+random.Int64N(5_000_000)) * time.Microsecond
		burst := 1 + random.Int64N(10)
		n := 1 + random.IntN(200)
		at, cost := make([]int64, n), make([]int64, n)
		for j := range at {
			if j > 0 {
				at[j] = at[j-1] + random.Int64N(1+period.Microseconds()/(1+random.Int64N(8)))
			}
			cost[j] = random.Int64N(min(burst, 3) + 1)
		}
		var r leastRate
		for j := range at {
			r.take(burst, period.Microseconds(), at[j], cost[j])
			longest = max(longest, len(r.lines))
		}
		denies := func(tokens int64) bool {
			b, err := limiter.NewBucket(tokens, period, burst)
			if err != nil {
				t.Fatal(err)
			}
			var replay limiter.Replay
			bucket, l := []*limiter.ReplayBucket{{}}, &limiter.Limit{Name: "a"}
			for j := range at {
				charges := []limiter.Charge{{Limit: l, Bucket: b, Key: "k", Cost: cost[j]}}
				if replay.Take(at[j:], bucket, charges, make([]limiter.Verdict, 1)) == limiter.Limited {
					return true
				}
			}
			return false
		}
		switch {
		case r.tokens == noRate:
			if !denies(limiter.MaxTokens) {
				t.Errorf("log %d: no rate, but %d allows all", i, limiter.MaxTokens)
			}
		case denies(r.tokens):
			t.Errorf("log %d: %d/%v denies", i, r.tokens, period)
		case r.tokens > 1 && !denies(r.tokens-1):
			t.Errorf("log %d: %d/%v denies nothing, either", i, r.tokens-1, period)
		default:
			rates++
		}
	}
	if rates < 100 || longest > 60 {
		t.Errorf("%d logs have a rate; at most %d lines were kept", rates, longest)
	}
}
