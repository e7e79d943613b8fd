package limiter

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"
)

// Takes fly together. While a node works on one call, the takes that arrive gather, and the next call carries them all. An idle node's
// take leaves at once, in its caller's own goroutine, so that nothing waits for company that does not come; and under load the costs of a
// call (a round trip, the script's start, Redis's clock) are shared by all that it carries.

const (
	// maxFlights is how many calls a node has at once. One carries what gathers; the others are for when it is slow.
	maxFlights = 4
	// maxBoard is how many takes a call carries. The script takes some 5 µs for each, in which Redis does nothing else.
	maxBoard = 128
	// maxWaiting is how many takes gather for a node. More would have to wait so long that they had better fail at once.
	maxWaiting = 512
	// patience is how long a take waits for the flight before it until it takes another.
	patience = time.Millisecond
)

// take is what a request takes in one slot, on its way to the node and back.
type take struct {
	keys     []string
	packed   []byte // the charges, as the script has them
	deadline time.Time
	// turn says that the take's time has come: with a batch, that its caller is to fly that (it is in it); with nil, that it is answered.
	turn  chan []*take
	timer *time.Timer // stopped

	// What became of it. Only the pilot writes it, before turn says so.
	at    int64  // microseconds of the node's clock
	reply string // the script's, to its charges
	err   error  // why there is none
	batch int    // takes in its call, it included
}

var takes = sync.Pool{New: func() any { return blankTake() }}

func blankTake() *take {
	t := &take{turn: make(chan []*take, 1), timer: time.NewTimer(time.Hour)}
	t.timer.Stop()
	return t
}

// newTake packs charges. It is to be recycled once its answer is read, unless its caller left it before.
func newTake(charges []Charge, deadline time.Time) *take {
	t := takes.Get().(*take)
	t.deadline = deadline
	for i := range charges {
		t.keys = append(t.keys, charges[i].Key)
		t.packed = appendCharge(t.packed, &charges[i], i == len(charges)-1)
	}
	return t
}

func (t *take) recycle() {
	clear(t.keys)
	t.keys, t.packed, t.at, t.reply, t.err, t.batch = t.keys[:0], t.packed[:0], 0, "", nil, 0
	takes.Put(t)
}

// node is a Redis server, as far as takes go to it.
type node struct {
	*breaker
	send func(ctx context.Context, batch []*take) error // fills the takes' answers; its error is of those that have none

	mu      sync.Mutex
	waiting []*take // in the order of their arrival
	flights int
}

// carry has a take executed by its deadline, at most once, and says why it was not or why nobody knows. left says that the take is still
// in the hands of others. A take whose caller hangs up before it flies is not executed.
func (n *node) carry(ctx context.Context, t *take) (left bool, err error) {
	if err := ctx.Err(); err != nil {
		return false, err
	}
	if !time.Now().Before(t.deadline) {
		return false, context.DeadlineExceeded
	}
	n.mu.Lock()
	if len(n.waiting) >= maxWaiting {
		n.mu.Unlock()
		return false, &StoreError{Kind: KindOverload, Err: fmt.Errorf("%d takes are waiting for Redis already", maxWaiting)}
	}
	n.waiting = append(n.waiting, t)
	// Where the breaker is open a flight ends before it begins, or tries the node: nobody waits for that.
	if n.flights == 0 || n.flights < maxFlights && len(n.waiting) >= maxBoard || n.isOpen() {
		n.depart()
	}
	n.mu.Unlock()
	return n.await(ctx, t)
}

// depart gives the takes that wait, or as many as a call carries, to one of their callers to fly: the one that may stay longest. The
// caller holds mu.
func (n *node) depart() {
	batch := slices.Clone(n.waiting[:min(maxBoard, len(n.waiting))])
	n.waiting = slices.Delete(n.waiting, 0, len(batch))
	n.flights++
	pilot := batch[len(batch)-1] // the last to come has mostly the latest deadline
	for _, t := range batch {
		t.batch = len(batch)
		if t.deadline.After(pilot.deadline) {
			pilot = t
		}
	}
	pilot.turn <- batch
}

// await waits for a take's turn. Who has waited for patience sees to it that another flight leaves.
func (n *node) await(ctx context.Context, t *take) (left bool, err error) {
	select {
	case batch := <-t.turn:
		return n.turn(t, batch)
	default:
	}
	wait := time.Until(t.deadline)
	isPatient := wait > patience
	if isPatient {
		wait = patience
	}
	t.timer.Reset(wait)
	defer t.timer.Stop()
	for {
		select {
		case batch := <-t.turn:
			return n.turn(t, batch)
		case <-ctx.Done():
			return n.leave(t, ctx.Err())
		case <-t.timer.C:
			if !isPatient {
				return n.leave(t, context.DeadlineExceeded)
			}
			isPatient = false
			t.timer.Reset(time.Until(t.deadline))
			n.mu.Lock()
			if n.flights < maxFlights && slices.Contains(n.waiting, t) {
				n.depart()
			}
			n.mu.Unlock()
		}
	}
}

// turn is a take's.
func (n *node) turn(t *take, batch []*take) (left bool, err error) {
	if batch != nil {
		n.fly(batch, t)
	}
	return false, t.err
}

// leave withdraws a take that has not left, leaves one that is under way, and flies where others wait for that.
func (n *node) leave(t *take, why error) (left bool, err error) {
	n.mu.Lock()
	if i := slices.Index(n.waiting, t); i >= 0 {
		n.waiting = slices.Delete(n.waiting, i, i+1)
		n.mu.Unlock()
		return false, why
	}
	n.mu.Unlock()
	select {
	case batch := <-t.turn:
		return n.turn(t, batch)
	default:
		return true, why
	}
}

// fly makes the call, and gives everybody on board the answer.
func (n *node) fly(batch []*take, pilot *take) {
	defer func() {
		for _, t := range batch {
			if t != pilot {
				t.turn <- nil
			}
		}
		n.mu.Lock()
		n.flights--
		if len(n.waiting) > 0 {
			n.depart()
		}
		n.mu.Unlock()
	}()
	// Not under the pilot's own context: its caller may hang up, and others are on board.
	ctx, cancel := context.WithDeadline(context.Background(), pilot.deadline)
	defer cancel()
	if err := n.run(ctx, func() error { return n.send(ctx, batch) }); err != nil {
		for _, t := range batch {
			if t.reply == "" && t.err == nil {
				t.err = err
			}
		}
	}
}
