package limiter

import (
	"context"
	"math"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// Replay decides about requests of the past: it is a Memory whose clock the
// caller sets, without a bound on its size. It drops buckets that are full
// again, so that it grows with the buckets that are in use at a time. It is not
// safe for concurrent use.
type Replay struct {
	memory *Memory
	now    int64 // of settlements and sweeps, in microseconds since 1970
	swept  int64 // when it last swept
	kept   int64 // buckets that the last sweep left
	slack  int64 // how far instants may be apart, in microseconds
}

// NewReplay returns a Replay without buckets: all are full. No instant that it
// is given may be earlier than another one before by more than the slack, which
// is at least 0.
func NewReplay(slack time.Duration) *Replay {
	r := &Replay{swept: math.MinInt64 / 2, slack: slack.Microseconds()}
	r.memory = newMemory("replay", math.MaxInt64, func() int64 { return r.now }, nil, prometheus.NewRegistry())
	return r
}

// Take takes the charges as Store's Take does, charges[i] at the instant at[i],
// and returns the outcome: Allowed or Limited. The slices have the same length,
// at least 1. Instants are in microseconds since 1970; those of one bucket
// should not go back. Usually all are the same. They differ if requests of
// which only the second is known are spread over it, for each bucket by itself.
func (r *Replay) Take(at []int64, charges []Charge, verdicts []Verdict) Outcome {
	r.sweep(at[0])
	r.memory.take(at, charges, verdicts)
	return outcomeOf(charges, verdicts)
}

// Settle settles a hold at an instant in microseconds since 1970, or at the
// latest instant of the bucket if that is later.
func (r *Replay) Settle(at int64, s Settlement) Settled {
	r.now = max(at, r.memory.shards[r.memory.shardOf(s.Key)].buckets[s.Key].at)
	var result [1]Settled
	r.memory.Settle(context.Background(), []Settlement{s}, result[:])
	return result[0]
}

// sweep drops full buckets, at most once in five seconds of the clock, and only
// when there are twice as many as the last sweep has left: a sweep looks at all
// of them.
func (r *Replay) sweep(now int64) {
	const few = 10_000
	if n := r.memory.entries.Load(); n < max(few, 2*r.kept) || now-r.swept < sweepEvery.Microseconds() {
		return
	}
	r.now, r.swept = now-r.slack, now
	r.memory.sweep()
	r.kept = r.memory.entries.Load()
}

// Depth measures how many tokens a bucket of some rate must hold so that it
// never denies: the deepest that a bucket of any size is drawn. Its zero value
// has seen no request. It is not safe for concurrent use.
type Depth struct {
	left    level // in a bucket of MaxTokens
	at      int64 // when
	isUsed  bool  // left is valid
	deepest int64
}

// Take takes cost tokens, at least 0, at an instant in microseconds of a clock
// that does not go back, from a bucket with the rate of b. The burst of b has no
// meaning. Beyond MaxTokens the measure is MaxTokens.
func (d *Depth) Take(b Bucket, at, cost int64) {
	d.Look(b, at, cost)
	d.left.tokens = max(0, d.left.tokens-cost)
}

// Look is Take for a request that another bucket denies: the bucket must hold the
// cost, too, but keeps it.
func (d *Depth) Look(b Bucket, at, cost int64) {
	b.burst = MaxTokens
	switch {
	case !d.isUsed:
		d.left, d.isUsed = b.full(), true
	case at > d.at:
		d.left = b.refill(d.left, at-d.at, MaxTokens)
	}
	d.at = max(d.at, at)
	d.deepest = max(d.deepest, min(MaxTokens, MaxTokens-d.left.tokens+cost))
}

// Deepest returns the least burst with which a bucket of the rate would have
// allowed all requests: at least 0 and at most MaxTokens.
func (d *Depth) Deepest() int64 { return d.deepest }
