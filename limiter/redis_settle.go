package limiter

import (
	"context"
	"errors"
	"sync"
	"time"
)

// maxSettlements is how many settlements one entry of a batch has at most, so
// that takes can go with them.
const maxSettlements = maxBatch / 4

// Settle settles holds, and fills results[i] with what became of settlements[i].
// The slices have the same length. Settlements go to Redis with the takes that
// are on their way. Each is executed at most once, and Settle ends within the
// store's timeout, and deadlineMargin before the deadline of ctx. If a
// settlement fails (Settled.Err) it must not be tried again: it may have been
// executed.
func (r *Redis) Settle(ctx context.Context, settlements []Settlement, results []Settled) {
	deadline := r.deadline(ctx)
	ctx, cancel := context.WithDeadline(ctx, deadline)
	defer cancel()
	// The settlements of one call must be of one slot on a cluster.
	type part struct {
		indexes     []int
		settlements []Settlement
	}
	var all []*part
	bySlot := make(map[string]*part)
	for i := range settlements {
		tag := ""
		if r.cluster != nil {
			tag = hashTag(settlements[i].Key)
		}
		p := bySlot[tag]
		if p == nil || len(p.indexes) == maxSettlements {
			p = &part{}
			bySlot[tag], all = p, append(all, p)
		}
		p.indexes, p.settlements = append(p.indexes, i), append(p.settlements, settlements[i])
	}
	settle := func(p *part) {
		settled := make([]Settled, len(p.settlements))
		defer func() {
			if recover() != nil { // the panic does not reach the caller's goroutine, so the results tell it
				for _, at := range p.indexes {
					results[at] = Settled{Err: &StoreError{Kind: KindOther, Err: errPanicked}}
				}
			}
		}()
		r.settleSlot(ctx, deadline, p.settlements, settled)
		for i, at := range p.indexes {
			results[at] = settled[i]
		}
	}
	var wg sync.WaitGroup
	for _, p := range all[min(1, len(all)):] {
		wg.Go(func() { settle(p) })
	}
	if len(all) > 0 {
		settle(all[0])
	}
	wg.Wait()
}

// settleSlot settles holds of buckets that are all in one hash slot.
func (r *Redis) settleSlot(ctx context.Context, deadline time.Time, settlements []Settlement, results []Settled) {
	n, err := r.nodeOf(ctx, settlements[0].Key)
	if err == nil {
		t := newSettling(settlements, deadline)
		var abandoned bool
		if abandoned, err = n.do(ctx, t); err == nil {
			err = r.readSettled(t.reply, settlements, results)
		}
		if !abandoned {
			t.recycle()
		}
	}
	if err == nil {
		return
	}
	failed := r.options.explain(err)
	if !errors.Is(failed, context.Canceled) {
		r.errors[failed.Kind].Inc()
	}
	for i := range results {
		results[i] = Settled{Err: failed}
	}
}
