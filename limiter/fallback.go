package limiter

import (
	"context"
	"errors"
	"slices"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"
)

// Fallback is a Store over a Redis. While Redis does not answer, it decides in
// this process about the charges whose limit has the failure mode Local. Each key
// has a bucket here, of this sidecar's share of the limit's rate and burst
// (Limit.LocalShare).
//
// These buckets outlive outages, so that a Redis that comes and goes does not
// grant a burst each time. While Redis answers they are held to what it says is
// left, so that an outage grants nobody what was used up before it.
//
// It is safe for concurrent use. Run sweeps it.
type Fallback struct {
	redis  *Redis
	memory *Memory
}

var _ Store = (*Fallback)(nil)

// NewFallback returns a Fallback over a Redis, with empty buckets that take at
// most the bytes of MemoryBudget that a Ceiling leaves. A nil log logs nothing.
func NewFallback(redis *Redis, log *zap.Logger, metrics prometheus.Registerer) *Fallback {
	start := time.Now()
	now := func() int64 { return time.Since(start).Microseconds() }
	return &Fallback{redis: redis, memory: newMemory("local", MemoryBudget()-ceilingBudget(), now, log, metrics)}
}

// Run sweeps its buckets every few seconds until ctx ends. It does not run the
// Redis.
func (f *Fallback) Run(ctx context.Context) { f.memory.Run(ctx) }

// Take is Store's. It ends when the Take of the Redis would.
func (f *Fallback) Take(ctx context.Context, charges []Charge, verdicts []Verdict) {
	if !anyLocal(charges) {
		f.redis.Take(ctx, charges, verdicts)
		return
	}
	defer f.redis.observe(time.Now())
	deadline := f.redis.deadline(ctx)
	ctx, cancel := context.WithDeadline(ctx, deadline)
	defer cancel()
	f.redis.takeUnsettled(ctx, deadline, charges, verdicts)
	f.learn(charges, verdicts)
	if failed := failedLocal(charges, verdicts); len(failed) > 0 {
		if passesBeside(failed, charges, verdicts) {
			f.takeRest(ctx, deadline, charges, verdicts)
			failed = failedLocal(charges, verdicts)
		}
		f.decide(failed, charges, verdicts)
	}
	f.redis.settleOwn(ctx, charges, verdicts)
}

// failedLocal returns the indexes of the charges that this process has to decide
// about.
func failedLocal(charges []Charge, verdicts []Verdict) (failed []int) {
	for i := range charges {
		err := verdicts[i].Err
		if isLocal(&charges[i]) && err != nil && !errors.Is(err, context.Canceled) { // if it is, nobody waits
			failed = append(failed, i)
		}
	}
	return failed
}

// passesBeside reports whether the request would pass if the charges with these
// indexes were allowed.
func passesBeside(failed []int, charges []Charge, verdicts []Verdict) bool {
	others, said := slices.Clone(charges), slices.Clone(verdicts)
	for _, i := range slices.Backward(failed) {
		others, said = slices.Delete(others, i, i+1), slices.Delete(said, i, i+1)
	}
	return outcomeOf(others, said).Spends()
}

// takeRest takes from the buckets that answered in a slot where the bucket of a
// Local charge failed: that slot took nothing. It holds what it takes, as this
// process has yet to decide.
func (f *Fallback) takeRest(ctx context.Context, deadline time.Time, charges []Charge, verdicts []Verdict) {
	var indexes []int
	var rest []Charge
	for i := range charges {
		if v := &verdicts[i]; v.Allowed && !v.taken {
			indexes, rest = append(indexes, i), append(rest, charges[i])
		}
	}
	if len(rest) == 0 {
		return
	}
	taken := make([]Verdict, len(rest))
	f.redis.takeSlots(ctx, deadline, rest, taken)
	for i, at := range indexes {
		taken[i].Expired += verdicts[at].Expired
		verdicts[at] = taken[i]
	}
}

// Settle settles the holds of requests that have ended, in Redis or in this
// process, as where they were taken. See Redis.Settle. In Redis they wait up to
// endLinger for a take to go with.
func (f *Fallback) Settle(ctx context.Context, settlements []Settlement, results []Settled) {
	var indexes []int
	var shared []Settlement
	for i := range settlements {
		if settlements[i].Hold.isLocal {
			f.memory.Settle(ctx, settlements[i:i+1], results[i:i+1])
		} else {
			indexes, shared = append(indexes, i), append(shared, settlements[i])
		}
	}
	if len(shared) == 0 {
		return
	}
	settled := make([]Settled, len(shared))
	f.redis.settleEnds(ctx, shared, settled)
	for i, at := range indexes {
		results[at] = settled[i]
	}
}

func anyLocal(charges []Charge) bool {
	for i := range charges {
		if isLocal(&charges[i]) {
			return true
		}
	}
	return false
}

func isLocal(c *Charge) bool { return c.Limit.OnFailure == Local && !c.Limit.Shadow }

// local returns the shape of the bucket that this process keeps for the charge.
func (c *Charge) local() Bucket { return c.Bucket.Share(c.Limit.LocalShare) }

// learn holds the buckets here to what Redis says is left.
func (f *Fallback) learn(charges []Charge, verdicts []Verdict) {
	for i := range charges {
		c, v := &charges[i], &verdicts[i]
		if !isLocal(c) || v.Source != RedisSource {
			continue
		}
		if b := c.local(); v.Remaining < b.burst {
			f.memory.lower(c.Key, b, v.Remaining)
		}
	}
}

// decide decides about the charges with the indexes failed. It takes nothing if
// the request is refused already.
func (f *Fallback) decide(failed []int, charges []Charge, verdicts []Verdict) {
	passes := passesBeside(failed, charges, verdicts)
	local := make([]Charge, len(failed))
	for i, at := range failed {
		local[i] = charges[at]
		local[i].Bucket = charges[at].local()
		if !passes { // report what the buckets hold
			local[i].Cost, local[i].Refused, local[i].HoldFor = 0, false, 0
		}
	}
	decided := make([]Verdict, len(failed))
	f.memory.Take(context.Background(), local, decided)
	for i, at := range failed {
		v := &verdicts[at]
		*v = decided[i]
		v.Source, v.Hold.isLocal = LocalSource, !v.Hold.IsZero()
	}
}
