package limiter

import (
	"context"
	"errors"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"
)

// Fallback is a Store over a Redis. While Redis does not answer, it decides in
// this process about the charges whose limit has the failure mode Local. Each key
// has a bucket here, of this sidecar's share of the limit's rate and burst
// (Charge.Local).
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
	parts := f.redis.takeSlots(ctx, deadline, charges, verdicts)
	f.decide(charges, verdicts)
	if !outcomeOf(charges, verdicts).Spends() {
		f.redis.refundAll(ctx, parts, charges, verdicts)
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

// decide decides about the charges for which Redis failed and whose limit says
// Local. It takes nothing if the request is refused already.
func (f *Fallback) decide(charges []Charge, verdicts []Verdict) {
	var indexes []int
	var failed []Charge
	for i := range charges {
		c, v := &charges[i], &verdicts[i]
		switch {
		case !isLocal(c):
		case errors.Is(v.Err, context.Canceled): // nobody waits for the verdict
		case v.Err != nil:
			local := *c
			local.Bucket = c.Local
			indexes, failed = append(indexes, i), append(failed, local)
		case v.Source == RedisSource && v.Remaining < c.Local.burst:
			f.memory.lower(c.Key, c.Local, v.Remaining)
		}
	}
	if len(failed) == 0 {
		return
	}
	if !outcomeOf(charges, verdicts).Spends() { // report what the buckets hold
		for i := range failed {
			failed[i].Cost, failed[i].Refused = 0, false
		}
	}
	decided := make([]Verdict, len(failed))
	f.memory.Take(context.Background(), failed, decided)
	for i, at := range indexes {
		verdicts[at] = decided[i]
		verdicts[at].Source = LocalSource
	}
}
