package limiter

import (
	"context"
	"errors"
	"slices"

	"github.com/redis/go-redis/v9"
)

// Where a limit says so, this process limits by itself while Redis does not answer: each key has a bucket here, of this sidecar's share of
// the limit's rate and burst. These buckets outlive outages, so that a Redis that comes and goes grants no burst each time; and while
// Redis answers they are held to what it says is left, so that an outage grants nobody what was used up before it.

func anyLocal(charges []Charge) bool {
	for i := range charges {
		if isLocal(&charges[i]) {
			return true
		}
	}
	return false
}

func isLocal(c *Charge) bool { return c.Limit.OnFailure == Local && !c.Limit.Shadow }

// fallBack decides here about the charges for which Redis failed and that say so.
// It takes nothing where the request is refused already.
func (r *Redis) fallBack(charges []Charge, verdicts []Verdict) {
	var indexes []int
	var here []Charge
	for i := range charges {
		c, v := &charges[i], &verdicts[i]
		switch {
		case !isLocal(c):
		case errors.Is(v.Err, context.Canceled): // nobody waits for an answer, so that none is looked for here
		case v.Err != nil:
			local := *c
			local.Bucket = c.Local
			indexes, here = append(indexes, i), append(here, local)
		case v.Source == RedisSource && v.Remaining < c.Local.burst:
			r.local.lower(c.Key, c.Local, v.Remaining)
		}
	}
	if len(here) == 0 {
		return
	}
	if !outcomeOf(charges, verdicts).Spends() { // what is told is what there is
		for i := range here {
			here[i].Cost, here[i].Refused = 0, false
		}
	}
	said := make([]Verdict, len(here))
	r.local.Take(context.Background(), here, said)
	for i, at := range indexes {
		verdicts[at] = said[i]
		verdicts[at].Source = LocalSource
	}
}

// takeBack gives back what a script took for a request that was then refused.
func (r *Redis) takeBack(ctx context.Context, charges []Charge, verdicts []Verdict, takes []taken) {
	if !slices.ContainsFunc(takes, func(t taken) bool { return t.is }) {
		return
	}
	node, ok := r.client.(*redis.Client)
	if !ok {
		var err error
		if node, err = r.masterFor(ctx, charges[0].Key); err != nil {
			return
		}
	}
	r.refundAll(ctx, &slotTake{charges: slices.Clone(charges), takes: takes, node: node})
	for i := range charges {
		if c := &charges[i]; takes[i].is && !c.Limit.Shadow {
			verdicts[i] = c.Bucket.verdict(takes[i].before, c.needs(), 0, RedisSource)
			verdicts[i].at = takes[i].at
		}
	}
}
