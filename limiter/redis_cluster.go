package limiter

import (
	"context"
	"errors"
	"strings"
	"sync"
	"time"

	"github.com/redis/go-redis/v9"
)

// A Redis Cluster runs a script on the keys of one hash slot only, even if one
// node has several slots. So a request takes from its buckets slot by slot,
// from all slots at once, and within a slot from all buckets or from none. Each
// slot holds what it took until all have answered. Then all holds are settled:
// as spent, or, if one slot denies, as released. A hold that is not settled, as
// after a crash, counts as spent in the end.

// hashTag is what decides about a key's slot: its part in braces.
func hashTag(key string) string {
	_, tag, _ := strings.Cut(key, "{")
	tag, _, _ = strings.Cut(tag, "}")
	return tag
}

func oneSlot(charges []Charge) bool {
	for i := range charges[1:] {
		if hashTag(charges[1+i].Key) != hashTag(charges[0].Key) {
			return false
		}
	}
	return true
}

// bySlot returns the indexes below n by the slots of their keys. Outside a cluster
// all are in one slot.
func (r *Redis) bySlot(n int, key func(int) string) (slots [][]int) {
	known := make(map[string]int)
	for i := range n {
		tag := ""
		if r.cluster != nil {
			tag = hashTag(key(i))
		}
		at, ok := known[tag]
		if !ok {
			at = len(slots)
			known[tag], slots = at, append(slots, nil)
		}
		slots[at] = append(slots[at], i)
	}
	return slots
}

// takeCluster is Take on a cluster.
func (r *Redis) takeCluster(ctx context.Context, deadline time.Time, charges []Charge, verdicts []Verdict) {
	ctx, cancel := context.WithDeadline(ctx, deadline) // for the lookup of slots, and for settlements
	defer cancel()
	r.takeUnsettled(ctx, deadline, charges, verdicts)
	r.settleOwn(ctx, charges, verdicts)
}

// takeUnsettled takes from the buckets of a request. What it takes from several
// slots is held until settleOwn.
func (r *Redis) takeUnsettled(ctx context.Context, deadline time.Time, charges []Charge, verdicts []Verdict) {
	if r.cluster == nil || oneSlot(charges) {
		r.takeSlot(ctx, deadline, charges, verdicts)
		return
	}
	r.takeSlots(ctx, deadline, charges, verdicts)
}

// takeSlots takes slot by slot, and holds what it takes until settleOwn.
func (r *Redis) takeSlots(ctx context.Context, deadline time.Time, charges []Charge, verdicts []Verdict) {
	var wg sync.WaitGroup
	for _, indexes := range r.bySlot(len(charges), func(i int) string { return charges[i].Key }) {
		wg.Go(func() {
			part, said := make([]Charge, len(indexes)), make([]Verdict, len(indexes))
			defer func() {
				if recover() != nil { // the panic does not reach the request's goroutine, so its verdicts tell it
					failAll(said, &StoreError{Kind: KindOther, Err: errPanicked})
				}
				for i, at := range indexes {
					verdicts[at] = said[i]
				}
			}()
			for i, at := range indexes {
				part[i] = charges[at]
				if !part[i].Limit.Shadow && part[i].Cost > 0 { // what may be given back
					part[i].ownHold = 2 * r.timeout // a take, and a settlement
				}
			}
			r.takeSlot(ctx, deadline, part, said)
		})
	}
	wg.Wait()
}

// maxSettling is the maximum number of requests whose own holds are being
// settled. The holds of others end by themselves, and their tokens count as
// spent.
const maxSettling = 1024

// settleOwn settles what takeSlots held of a request. If the request does not
// spend what it took, all is released, and the verdicts become those of a
// request that took nothing; settleOwn then waits for that, until ctx ends at
// most, as a slot that did not answer may have used up the request's time.
// Otherwise what the charges themselves do not hold counts as spent, and nobody
// waits. Settlements have a timeout of their own, so that one slow node does not
// cost the other buckets their tokens.
func (r *Redis) settleOwn(ctx context.Context, charges []Charge, verdicts []Verdict) {
	spends := outcomeOf(charges, verdicts).Spends()
	var settlements []Settlement
	for i := range charges {
		c, v := &charges[i], &verdicts[i]
		isSpent := spends || c.Limit.Shadow
		if v.Source != RedisSource || v.Hold.IsZero() || isSpent && c.HoldFor > 0 {
			continue
		}
		s := Settlement{Limit: c.Limit, Key: c.Key, Hold: v.Hold}
		if isSpent {
			s.Cost = c.Cost
			v.Hold = Hold{}
		} else {
			before, at, expired := v.left, v.at, v.Expired
			before.tokens += c.Cost
			*v = c.verdict(before, v.held-c.Cost, 0, RedisSource)
			v.at, v.Expired = at, expired
		}
		settlements = append(settlements, s)
	}
	if len(settlements) == 0 {
		return
	}
	select {
	case r.settling <- struct{}{}:
	default:
		r.errors[KindOverload].Add(float64(len(settlements)))
		return
	}
	done := make(chan struct{})
	go func() {
		defer func() { <-r.settling }()
		defer close(done)
		own, cancel := context.WithTimeout(context.WithoutCancel(ctx), r.timeout+deadlineMargin)
		defer cancel()
		r.Settle(own, settlements, make([]Settled, len(settlements)))
	}()
	if !spends {
		select {
		case <-done:
		case <-ctx.Done():
		}
	}
}

// callSlots calls the script for takes on one node: once for each slot, all in
// one pipeline.
func (r *Redis) callSlots(ctx context.Context, on *connection, batch []*pending) error {
	bySlot := make(map[string][]*pending)
	for _, t := range batch {
		tag := hashTag(t.keys[0])
		bySlot[tag] = append(bySlot[tag], t)
	}
	// The connection sends a pipeline once, whatever becomes of it.
	calls := make(map[string]once, len(bySlot))
	pipe := on.Pipeline()
	for tag, takes := range bySlot {
		r.batches.Observe(float64(len(takes)))
		calls[tag] = once{redis.NewStringCmd(ctx, append([]any{"evalsha", r.script.sha}, takeArgs(takes)...)...)}
		_ = pipe.Process(ctx, calls[tag])
	}
	_, execErr := pipe.Exec(ctx)
	if errors.Is(execErr, errNotSent) {
		return execErr
	}
	var wg sync.WaitGroup
	for tag, takes := range bySlot {
		reply, err := calls[tag].Result()
		if err == nil && reply == "" { // the connection failed before the first command
			err = execErr
		}
		switch {
		case err == nil:
			err = deal(reply, takes)
		case notExecuted(err):
			// Call again: the client follows the slot, and run sends the script
			// if the node does not have it.
			wg.Go(func() { _ = r.callSlot(ctx, takes) }) // each take has its own error then
			continue
		}
		failTakes(takes, err)
	}
	wg.Wait()
	return firstError(batch)
}

// callSlot calls the script for takes in one slot, and gives each take its
// answer or error. While a slot moves, some of its keys are on one node and
// some on another, and no call may use both: then each take is sent by itself.
func (r *Redis) callSlot(ctx context.Context, takes []*pending) error {
	err := r.call(ctx, r.client, takes)
	if len(takes) == 1 || !redis.HasErrorPrefix(err, "TRYAGAIN") {
		failTakes(takes, err)
		return err
	}
	var wg sync.WaitGroup
	for _, t := range takes {
		wg.Go(func() { t.err = r.call(ctx, r.client, []*pending{t}) })
	}
	wg.Wait()
	return firstError(takes)
}

func firstError(takes []*pending) error {
	for _, t := range takes {
		if t.err != nil {
			return t.err
		}
	}
	return nil
}

func failTakes(takes []*pending, err error) {
	for _, t := range takes {
		t.err = err
	}
}

// notExecuted reports whether a node refused a script that must be sent again,
// because another node has the slot or the script is not loaded.
func notExecuted(err error) bool {
	for _, code := range []string{"NOSCRIPT", "MOVED", "ASK", "TRYAGAIN", "CLUSTERDOWN"} {
		if redis.HasErrorPrefix(err, code) {
			return true
		}
	}
	return false
}
