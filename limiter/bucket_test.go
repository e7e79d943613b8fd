package limiter

import (
	"math/big"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"
)

const day = 24 * time.Hour

// bucket makes a Bucket, or fails the test.
func bucket(t interface{ Fatal(...any) }, tokens int64, period time.Duration, burst int64) Bucket {
	b, err := NewBucket(tokens, period, burst)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// anyBucket draws from every kind of bucket that NewBucket accepts: known hard
// cases, the ends of the ranges and all between.
func anyBucket() *rapid.Generator[Bucket] {
	type rate struct {
		tokens int64
		period time.Duration
	}
	named := []rate{
		{3, time.Second}, {7, time.Minute}, {1, day}, {1_000_000, time.Second}, {3, 250 * time.Millisecond},
		{700_000, time.Second}, {1_000_003, day}, {1, time.Microsecond}, {MaxTokens, time.Microsecond}, {1, maxPeriod},
		{MaxTokens, maxPeriod}, {999_999_937, maxPeriod - time.Microsecond},
	}
	return rapid.Custom(func(t *rapid.T) Bucket {
		r := rapid.OneOf(
			rapid.SampledFrom(named),
			rapid.Custom(func(t *rapid.T) rate {
				return rate{
					rapid.Int64Range(1, MaxTokens).Draw(t, "tokens"),
					time.Duration(rapid.Int64Range(1, maxPeriod.Microseconds()).Draw(t, "period")) * time.Microsecond,
				}
			}),
		).Draw(t, "rate")
		burst := rapid.OneOf(rapid.SampledFrom([]int64{1, 2, 5, MaxTokens}), rapid.Int64Range(1, MaxTokens)).Draw(t, "burst")
		b, err := NewBucket(r.tokens, r.period, burst)
		if err != nil {
			if !strings.Contains(err.Error(), "100 years") {
				t.Fatal(err)
			}
			return bucket(t, r.tokens, r.period, 1) // at most 366 days to fill
		}
		return b
	})
}

// exact is a level as a fraction.
func (b Bucket) exact(l level) *big.Rat {
	r := big.NewRat(l.frac, b.p)
	return r.Add(r, new(big.Rat).SetInt64(l.tokens))
}

func TestRefillIsExact(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		b := anyBucket().Draw(t, "bucket")
		l := b.full()
		want := b.exact(l)
		for range rapid.IntRange(1, 30).Draw(t, "steps") {
			cost := rapid.Int64Range(0, l.tokens).Draw(t, "cost")
			l.tokens -= cost
			want.Sub(want, new(big.Rat).SetInt64(cost))

			elapsed := rapid.OneOf(rapid.Int64Range(0, 5000), rapid.Int64Range(0, b.FillTime().Microseconds()+1),
				rapid.Int64Range(0, 400*day.Microseconds())).Draw(t, "elapsed")
			l = b.refill(l, elapsed, b.burst)
			arrived := new(big.Rat).Mul(big.NewRat(b.n, b.p), new(big.Rat).SetInt64(elapsed))
			if want.Add(want, arrived); want.Cmp(new(big.Rat).SetInt64(b.burst)) > 0 {
				want.SetInt64(b.burst)
			}
			if got := b.exact(l); got.Cmp(want) != 0 {
				t.Fatalf("%+v after %dus: %v, want %v", b, elapsed, got, want)
			}
			if l.tokens < 0 || l.frac < 0 || l.frac >= b.p || l.tokens == b.burst && l.frac != 0 || l.tokens > b.burst {
				t.Fatalf("%+v: no level: %+v", b, l)
			}
		}
	})
}

func TestWaitIsTheLeast(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		b := anyBucket().Draw(t, "bucket")
		l := level{tokens: rapid.Int64Range(0, b.burst-1).Draw(t, "tokens"), frac: rapid.Int64Range(0, b.p-1).Draw(t, "frac")}
		want := rapid.Int64Range(l.tokens+1, b.burst).Draw(t, "want")
		wait := b.wait(l, want).Microseconds()
		if got := b.refill(l, wait, b.burst); got.tokens < want {
			t.Fatalf("%+v at %+v holds %d tokens after %dus, want %d", b, l, got.tokens, wait, want)
		}
		if got := b.refill(l, wait-1, b.burst); got.tokens >= want {
			t.Fatalf("%+v at %+v holds %d tokens a microsecond before %dus already", b, l, got.tokens, wait)
		}
	})
}

// After a limit changes, its bucket has the tokens that it had, up to the new
// burst, to within a millionth of a token.
func TestDrawConvertsDown(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		from, to := anyBucket().Draw(t, "from"), anyBucket().Draw(t, "to")
		l := level{
			tokens: rapid.Int64Range(0, from.burst-1).Draw(t, "tokens"),
			frac:   rapid.Int64Range(0, from.p-1).Draw(t, "frac"),
		}
		next, moved, _ := state{shape: from, level: l, at: 7}.next(to, 7)
		if moved != (from != to) {
			t.Fatalf("moved: %v", moved)
		}
		got := next.level
		had := from.exact(l)
		if most := new(big.Rat).SetInt64(to.burst); had.Cmp(most) > 0 {
			had = most
		}
		lost := new(big.Rat).Sub(had, to.exact(got))
		if lost.Sign() < 0 || lost.Cmp(big.NewRat(1, minP)) > 0 {
			t.Fatalf("%+v held %v, as %+v it holds %v", from, had, to, to.exact(got))
		}
	})
}

func TestNewBucket(t *testing.T) {
	for _, tt := range []struct {
		tokens int64
		period time.Duration
		burst  int64
		want   string
	}{
		{1, time.Second, 1, ""},
		{MaxTokens, minPeriod, MaxTokens, ""},
		{1, maxPeriod, 99, ""},
		{0, time.Second, 1, "a rate is 1 to 1000000000 tokens a period, not 0"},
		{-1, time.Second, 1, "not -1"},
		{MaxTokens + 1, time.Second, 1, "not 1000000001"},
		{1, 0, 1, "a rate's period is 1us to 366 days, not 0s"},
		{1, maxPeriod + time.Microsecond, 1, "1us to 366 days"},
		{1, 1500 * time.Nanosecond, 1, "a rate's period is in whole microseconds, not 1.5µs"},
		{1, time.Second, 0, "a burst is 1 to 1000000000 tokens, not 0"},
		{1, time.Second, MaxTokens + 1, "not 1000000001"},
		{1, maxPeriod, 100, "a burst of 100 at 1 tokens each 8784h0m0s takes longer than 100 years to fill"},
		{1, day, 36525, ""},
		{1, day, 36526, "longer than 100 years"},
	} {
		_, err := NewBucket(tt.tokens, tt.period, tt.burst)
		if (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want) {
			t.Errorf("NewBucket(%d, %v, %d): %v, want %q", tt.tokens, tt.period, tt.burst, err, tt.want)
		}
	}
	if bucket(t, 60, time.Minute, 5) != bucket(t, 1, time.Second, 5) {
		t.Error("60/m and 1/s are not the same bucket")
	}
}
