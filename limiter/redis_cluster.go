package limiter

import (
	"context"
	"encoding/binary"
	"errors"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/redis/go-redis/v9"
)

// A Redis Cluster runs a script on the keys of one hash slot only, even if one
// node has several slots. So a request takes from its buckets slot by slot,
// from all slots at once, and within a slot from all buckets or from none. If
// one slot denies, the others are refunded (refund in take.lua says how much),
// so that the request draws from all of its buckets or from none, except for
// what refilled meanwhile.

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

// takeCluster is Take on a cluster.
func (r *Redis) takeCluster(ctx context.Context, deadline time.Time, charges []Charge, verdicts []Verdict) {
	ctx, cancel := context.WithDeadline(ctx, deadline) // for the lookup of slots, and for refunds
	defer cancel()
	if oneSlot(charges) {
		r.takeSlot(ctx, deadline, charges, verdicts)
		return
	}
	parts := r.takeSlots(ctx, deadline, charges, verdicts)
	if !outcomeOf(charges, verdicts).Spends() {
		r.refundAll(ctx, parts, charges, verdicts)
	}
}

// slotTake is the part of a take that is in one slot: what a refund needs. It
// shares no slice with the take's caller.
type slotTake struct {
	indexes  []int // of the request's charges
	charges  []Charge
	verdicts []Verdict
	// node had the slot before the take; nil if that is unknown.
	node *redis.Client
}

// takeSlots takes slot by slot and returns the parts, or nil if there is one
// slot only. The caller refunds them if the request does not spend what it took.
func (r *Redis) takeSlots(ctx context.Context, deadline time.Time, charges []Charge, verdicts []Verdict) []*slotTake {
	if r.cluster == nil || oneSlot(charges) {
		r.takeSlot(ctx, deadline, charges, verdicts)
		return nil
	}
	bySlot := make(map[string]*slotTake)
	var all []*slotTake
	for i := range charges {
		tag := hashTag(charges[i].Key)
		s := bySlot[tag]
		if s == nil {
			s = &slotTake{}
			bySlot[tag], all = s, append(all, s)
		}
		s.indexes, s.charges = append(s.indexes, i), append(s.charges, charges[i])
	}
	var wg sync.WaitGroup
	for _, s := range all {
		s.verdicts = make([]Verdict, len(s.charges))
		wg.Go(func() {
			defer func() {
				if recover() != nil { // the panic does not reach the request's goroutine, so its verdicts tell it
					failAll(s.verdicts, &StoreError{Kind: KindOther, Err: errPanicked})
				}
			}()
			// The refund must go to the node that took the tokens and to no
			// other, and the cluster's client might choose another one.
			var err error
			if s.node, err = r.masterFor(ctx, s.charges[0].Key); err != nil {
				s.node = nil
			}
			r.takeSlot(ctx, deadline, s.charges, s.verdicts)
		})
	}
	wg.Wait()
	for _, s := range all {
		for i, at := range s.indexes {
			verdicts[at] = s.verdicts[i]
		}
	}
	return all
}

// onlySlot returns what Redis took of charges in one slot, or nil if it took
// nothing or nobody knows the node. Another store may have decided about the
// rest.
func (r *Redis) onlySlot(ctx context.Context, charges []Charge, verdicts []Verdict) *slotTake {
	var only slotTake
	for i := range verdicts {
		if verdicts[i].taken && verdicts[i].Source == RedisSource {
			only.indexes = append(only.indexes, i)
			only.charges = append(only.charges, charges[i])
			only.verdicts = append(only.verdicts, verdicts[i])
		}
	}
	if len(only.indexes) == 0 {
		return nil
	}
	var ok bool
	if only.node, ok = r.client.(*redis.Client); !ok {
		var err error
		if only.node, err = r.masterFor(ctx, only.charges[0].Key); err != nil {
			return nil
		}
	}
	return &only
}

// maxRefunds is how many requests may be refunded at once. Further refunds are
// dropped, and their tokens are lost.
const maxRefunds = 1024

// refundAll refunds what the parts of a take took, and makes their verdicts
// those of a request that took nothing. It waits until ctx ends at most, as a
// slot that did not answer may have used up the request's time. Refunds
// continue after that, with their own timeout, so that one slow node does not
// cost the other buckets their tokens. charges and verdicts are all of the take;
// parts are nil if it had one slot only.
func (r *Redis) refundAll(ctx context.Context, parts []*slotTake, charges []Charge, verdicts []Verdict) {
	if parts == nil {
		only := r.onlySlot(ctx, charges, verdicts)
		if only == nil {
			return
		}
		parts = []*slotTake{only}
	}
	select {
	case r.refunds <- struct{}{}:
		done := make(chan struct{})
		go func() {
			defer func() { <-r.refunds }()
			defer close(done)
			own, cancel := context.WithTimeout(context.WithoutCancel(ctx), r.timeout)
			defer cancel()
			var wg sync.WaitGroup
			for _, s := range parts {
				wg.Go(func() { r.refund(own, s) })
			}
			wg.Wait()
		}()
		select {
		case <-done:
		case <-ctx.Done():
		}
	default:
	}
	for _, s := range parts {
		for i, at := range s.indexes {
			c, v := &s.charges[i], &s.verdicts[i]
			if !v.taken || c.Limit.Shadow {
				continue
			}
			before := v.left
			before.tokens += c.Cost
			verdicts[at] = c.Bucket.verdict(before, c.needs(), 0, RedisSource)
			verdicts[at].at = v.at
		}
	}
}

// refundSize is the length of one packed argument of refund, REFUND_SIZE in the
// script.
const refundSize = 28

// refund puts back what the charges of a slot took. It is sent once, to the
// node that had the slot: if the slot has moved, or the node is no longer a
// master, nothing is put back, and the tokens are lost.
func (r *Redis) refund(ctx context.Context, s *slotTake) {
	var charges []Charge
	var packed []byte
	for i := range s.charges {
		c := &s.charges[i]
		if !s.verdicts[i].taken || c.Limit.Shadow || c.Cost == 0 {
			continue
		}
		packed = appendShape(packed, c.Bucket)
		packed = binary.BigEndian.AppendUint32(packed, uint32(c.Cost))
		packed = append56(packed, uint64(s.verdicts[i].at))
		charges = append(charges, *c)
	}
	if len(charges) == 0 || s.node == nil {
		return
	}
	args := []any{len(charges)}
	for i := range charges {
		args = append(args, charges[i].Key)
	}
	for one := range slices.Chunk(packed, refundSize) {
		args = append(args, one)
	}
	if _, err := r.run(ctx, s.node, &r.refundScript, args...); err != nil {
		r.errors[storeError(err).Kind].Inc()
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
		calls[tag] = once{redis.NewStringCmd(ctx, append([]any{"evalsha", r.takeScript.sha}, takeArgs(takes)...)...)}
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
