package limiter

import (
	"context"
	"slices"
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
	r.settle(ctx, settlements, results, 0)
}

// settleEnds is Settle for requests that have ended, for which nobody waits: they
// go with a take that comes within endLinger, or else by themselves.
func (r *Redis) settleEnds(ctx context.Context, settlements []Settlement, results []Settled) {
	r.settle(ctx, settlements, results, endLinger)
}

func (r *Redis) settle(ctx context.Context, settlements []Settlement, results []Settled, linger time.Duration) {
	deadline := r.deadline(ctx)
	ctx, cancel := context.WithDeadline(ctx, deadline)
	defer cancel()
	var wg sync.WaitGroup
	for _, slot := range r.bySlot(len(settlements), func(i int) string { return settlements[i].Key }) {
		for indexes := range slices.Chunk(slot, maxSettlements) {
			wg.Go(func() {
				part, settled := make([]Settlement, len(indexes)), make([]Settled, len(indexes))
				for i, at := range indexes {
					part[i] = settlements[at]
				}
				r.settleSlot(ctx, deadline, part, settled, linger)
				for i, at := range indexes {
					results[at] = settled[i]
				}
			})
		}
	}
	wg.Wait()
}

// settleSlot settles holds of buckets that are all in one hash slot. It does not
// panic, as it has a goroutine of its own.
func (r *Redis) settleSlot(
	ctx context.Context, deadline time.Time, settlements []Settlement, results []Settled, linger time.Duration,
) {
	fail := func(err *StoreError) {
		for i := range results {
			results[i] = Settled{Err: err}
		}
	}
	defer func() {
		if recover() != nil {
			fail(&StoreError{Kind: KindOther, Err: errPanicked})
		}
	}()
	n, err := r.nodeOf(ctx, settlements[0].Key)
	if err == nil {
		t := newSettling(settlements, deadline, linger)
		var abandoned bool
		if abandoned, err = n.do(ctx, t); err == nil {
			err = r.readSettled(t.reply, settlements, results)
		}
		if !abandoned {
			t.recycle()
		}
	}
	if err != nil {
		fail(r.failed(err))
	}
}
