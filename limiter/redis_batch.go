package limiter

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/redis/go-redis/v9"
)

// Takes travel in batches. While a node works on one call, the takes that
// arrive gather, and the next call carries them all. A take for an idle node
// leaves at once, in its caller's own goroutine, after it has let callers that are
// ready to run add theirs. Under load all takes of a batch share the costs of a
// call: a round trip, the start of the script, and Redis's clock.

const (
	// maxBatch is how many charges a call carries, unless one take alone has
	// more. The script needs some 5 µs for each, in which Redis does nothing
	// else, so that a call holds Redis up for about 1 ms.
	maxBatch = 200
	// minLinger is how long the first take of a batch waits at least while a
	// call is under way: an answer that is about to come starts the next batch
	// sooner.
	minLinger = time.Millisecond
	// endLinger is how long the settlement of a request that has ended waits for a
	// take to go with: a call costs Redis more than twice as much as a settlement in it.
	endLinger = 5 * time.Millisecond
	// latencyWeight: in the moving average of the latency, the newest call
	// counts 1/latencyWeight.
	latencyWeight = 8
)

// pending is what a request takes in one slot, on its way to the node and back.
type pending struct {
	keys   []string
	packed []byte // the charges or settlements, as the script has them
	holds  bool   // a charge holds
	// guesses says that a charge is of a quota, whose window is guessed.
	guesses bool
	// replySize is how long the reply is, in bytes.
	replySize int
	deadline  time.Time
	// linger is how long it starts no call by itself, but waits for one to go with. It
	// is 0 for takes, and once that time is over. The node's mu guards it.
	linger time.Duration
	// wake receives, once, a batch that the caller is to execute, which
	// includes this take; or an empty one when the take has been answered.
	wake  chan batch
	timer *time.Timer // stopped

	// The outcome. It is written before wake receives an empty batch.
	at    int64  // microseconds of the node's clock
	reply string // the script's, to the charges or settlements
	err   error  // why there is no reply
	batch int    // takes in the call, this one included
}

// batch is some takes that one call carries, and the connection for it.
type batch struct {
	takes []*pending
	on    *connection
}

var pendingPool = sync.Pool{New: func() any { return newBlank() }}

func newBlank() *pending {
	t := &pending{wake: make(chan batch, 1), timer: time.NewTimer(time.Hour)}
	t.timer.Stop()
	return t
}

// pendingFor returns a blank for so many charges or settlements.
func pendingFor(n int, deadline time.Time) *pending {
	t := pendingPool.Get().(*pending)
	t.deadline, t.linger, t.replySize = deadline, 0, verdictSize*n
	return t
}

// newPending packs charges, with the windows that the instants in guesses are in
// for the quotas among them; it may be nil if there are none. The caller recycles
// the take once it has read the answer, unless it has abandoned it.
func newPending(charges []Charge, deadline time.Time, guesses []int64) *pending {
	t := pendingFor(len(charges), deadline)
	t.guesses = guesses != nil
	for i := range charges {
		var guess window
		if charges[i].Bucket.IsQuota() {
			guess = charges[i].Bucket.Calendar().window(guesses[i])
		}
		t.keys = append(t.keys, charges[i].Key)
		t.packed = appendCharge(t.packed, &charges[i], i == len(charges)-1, guess)
		if charges[i].life() > 0 {
			t.holds = true
			t.replySize += holdSize
		}
	}
	return t
}

// newSettling packs settlements that linger so long. The caller recycles it as
// newPending's.
func newSettling(settlements []Settlement, deadline time.Time, linger time.Duration) *pending {
	t := pendingFor(len(settlements), deadline)
	t.linger = linger
	for i := range settlements {
		t.keys = append(t.keys, settlements[i].Key)
		t.packed = appendSettlement(t.packed, &settlements[i])
	}
	return t
}

func (t *pending) recycle() {
	clear(t.keys)
	t.keys, t.packed, t.holds, t.guesses, t.at, t.reply, t.err, t.batch = t.keys[:0], t.packed[:0], false, false, 0, "",
		nil, 0
	pendingPool.Put(t)
}

// node sends takes to one Redis server.
type node struct {
	breaker
	name   string // in errors: host:port, mostly
	client atomic.Pointer[redis.Client]
	// call executes a batch over a connection and fills in the answers. Its
	// error is that of the takes without one. If it wraps errNotSent, nothing
	// was executed.
	call func(ctx context.Context, on *connection, batch []*pending) error
	dial func(ctx context.Context) (*connection, error)
	// ahead is by how many microseconds the node's clock was ahead of this machine's
	// at the last answer about a quota, so that the next guess of a window is right.
	ahead atomic.Int64

	mu          sync.Mutex
	waiting     []*pending    // in the order of arrival
	charges     int           // of waiting
	inFlight    int           // calls under way
	began       []time.Time   // when those began, the oldest first
	latency     time.Duration // of a call, a moving average; 0 if none has ended
	connections               // see there
}

// do executes t at most once and by its deadline. If abandoned is true, another
// goroutine still uses t and the caller must not recycle it. A take whose
// caller hangs up before the call is not executed.
func (n *node) do(ctx context.Context, t *pending) (abandoned bool, err error) {
	if err := ctx.Err(); err != nil {
		return false, err
	}
	now := time.Now()
	if !now.Before(t.deadline) {
		return false, context.DeadlineExceeded
	}
	if err := n.admit(); err != nil {
		return false, err
	}
	n.mu.Lock()
	if t.deadline.Sub(now) < 2*(t.linger+n.latency) {
		t.linger = 0
	}
	if err := n.hopelessLocked(now, t); err != nil {
		n.mu.Unlock()
		return false, err
	}
	n.waiting = append(n.waiting, t)
	n.charges += len(t.keys)
	if n.inFlight == 0 && t.linger == 0 {
		n.mu.Unlock()
		runtime.Gosched() // others that are ready to run add their takes
		n.mu.Lock()
	}
	switch {
	case n.charges >= maxBatch || n.isOpen(): // behind an open breaker the calls under way may never end
		n.startBatchLocked()
	case n.inFlight == 0:
		n.startDueLocked()
	}
	linger := max(n.lingerLocked(), t.linger)
	n.mu.Unlock()
	return n.wait(ctx, t, linger)
}

// limitLocked is how many calls may be under way at once: as many as it takes
// for one to leave every few milliseconds, whatever the latency.
func (n *node) limitLocked() int {
	return min(max(int((n.latency+callsEvery-1)/callsEvery), minConnections), maxConnections)
}

// lingerLocked is how long the first take of a batch waits for others before it
// leaves beside the calls under way. It grows with their number. So calls start
// evenly over about one round trip, and even when the maximum is under way, one
// soon returns.
func (n *node) lingerLocked() time.Duration {
	limit := time.Duration(n.limitLocked())
	return max(minLinger, 2*n.latency*time.Duration(n.inFlight)/(limit*limit))
}

// hopelessLocked returns an error if t would not be answered before its
// deadline. Within one round trip as many calls end as may be under way, so
// each full batch that waits adds a part of one. If the oldest call has
// taken longer than calls usually do, the node has become slow, and that call
// is expected to take as long again.
func (n *node) hopelessLocked(now time.Time, t *pending) error {
	batches := n.charges / maxBatch
	if batches == 0 || n.inFlight == 0 {
		return nil
	}
	latency := n.latency
	if age := now.Sub(n.began[0]); age > latency {
		latency = 2 * age
	}
	need := latency + latency*time.Duration(batches)/time.Duration(n.limitLocked())
	left := t.deadline.Sub(now)
	if need <= left {
		return nil
	}
	return &StoreError{
		Kind: KindOverload,
		Err: fmt.Errorf("%s: overloaded: %d charges are queued, and the deadline is in %v", n.name, n.charges,
			left.Round(time.Millisecond)),
	}
}

// startBatchLocked gives the takes that wait, or as many as a call carries, to
// one of their callers to execute: the one with the latest deadline. Without
// an idle connection it starts none, and asks for a new connection.
func (n *node) startBatchLocked() {
	if len(n.waiting) == 0 || n.inFlight >= n.limitLocked() && !n.isOpen() {
		return
	}
	if len(n.idle) == 0 {
		n.openLocked()
		return
	}
	size, charges := 1, len(n.waiting[0].keys)
	for size < len(n.waiting) && charges+len(n.waiting[size].keys) <= maxBatch {
		charges += len(n.waiting[size].keys)
		size++
	}
	takes := slices.Clone(n.waiting[:size])
	n.waiting = slices.Delete(n.waiting, 0, size)
	n.charges -= charges
	n.inFlight++
	n.began = append(n.began, time.Now())
	leader := takes[size-1] // the last to come mostly has the latest deadline
	for _, t := range takes {
		t.batch = size
		if t.deadline.After(leader.deadline) {
			leader = t
		}
	}
	leader.wake <- batch{takes, n.popLocked()}
}

// startDueLocked starts a batch if one waits that does not linger.
func (n *node) startDueLocked() {
	if slices.ContainsFunc(n.waiting, func(t *pending) bool { return t.linger == 0 }) {
		n.startBatchLocked()
	}
}

// leave starts a batch if t still waits, which does not linger any more.
func (n *node) leave(t *pending) {
	n.mu.Lock()
	defer n.mu.Unlock()
	t.linger = 0
	if slices.Contains(n.waiting, t) {
		n.startBatchLocked()
	}
}

// wait waits for what becomes of a take. After linger it starts a batch.
func (n *node) wait(ctx context.Context, t *pending, linger time.Duration) (abandoned bool, err error) {
	select {
	case b := <-t.wake:
		return n.finish(t, b)
	default:
	}
	wait := time.Until(t.deadline)
	lingers := wait > linger
	if lingers {
		wait = linger
	} else if t.linger > 0 {
		n.leave(t)
	}
	t.timer.Reset(wait)
	defer t.timer.Stop()
	for {
		select {
		case b := <-t.wake:
			return n.finish(t, b)
		case <-ctx.Done():
			return n.abandon(t, ctx.Err())
		case <-t.timer.C:
			if !lingers {
				return n.abandon(t, context.DeadlineExceeded)
			}
			lingers = false
			t.timer.Reset(time.Until(t.deadline))
			n.leave(t)
		}
	}
}

// finish handles what t was woken with: a batch to execute, or an empty one
// when t has been answered.
func (n *node) finish(t *pending, b batch) (abandoned bool, err error) {
	if b.takes != nil {
		n.execute(b, t)
	}
	return false, t.err
}

// abandon withdraws a take that has not left, leaves one that is under way, and
// executes a batch whose leader it has become in this moment.
func (n *node) abandon(t *pending, why error) (abandoned bool, err error) {
	n.mu.Lock()
	i := slices.Index(n.waiting, t)
	if i < 0 {
		n.mu.Unlock()
		select {
		case b := <-t.wake:
			return n.finish(t, b)
		default:
			return true, n.late(why)
		}
	}
	n.waiting = slices.Delete(n.waiting, i, i+1)
	n.charges -= len(t.keys)
	defer n.mu.Unlock()
	if !errors.Is(why, context.DeadlineExceeded) {
		return false, why
	}
	if n.held > 0 {
		return false, &StoreError{Kind: KindTimeout, Err: fmt.Errorf("%s: earlier calls took too long: %w", n.name, why)}
	}
	failed := n.unconnectedLocked(why)
	n.refuseLocked(n.failed(failed))
	return false, failed
}

// late is the error of a take that has left and was not answered in time.
func (n *node) late(why error) error {
	if !errors.Is(why, context.DeadlineExceeded) {
		return why
	}
	return &StoreError{Kind: KindTimeout, Err: fmt.Errorf("%s did not answer in time: %w", n.name, why)}
}

// refuseLocked ends the wait of all takes, unless the error is nil.
func (n *node) refuseLocked(err *StoreError) {
	if err == nil {
		return
	}
	for _, t := range n.waiting {
		t.err = err
		t.wake <- batch{}
	}
	clear(n.waiting)
	n.waiting, n.charges = n.waiting[:0], 0
}

// errPanicked is the error of a call in which sluice panicked.
var errPanicked = errors.New("a call panicked")

// execute makes the call, and wakes all takes of the batch with the answer.
func (n *node) execute(b batch, leader *pending) {
	began, took, err := time.Now(), time.Duration(0), errPanicked // it stays if n.call panics
	defer func() {
		if err != nil {
			err = n.fail(b.takes, err, leader.deadline.Sub(began))
		}
		for _, t := range b.takes {
			if t != leader {
				t.wake <- batch{}
			}
		}
		n.mu.Lock()
		defer n.mu.Unlock()
		n.inFlight--
		n.began = slices.Delete(n.began, 0, 1) // near enough, if calls do not end in the order in which they began
		if err == nil {
			n.measureLocked(took)
		}
		n.releaseLocked(b.on, err)
		n.startDueLocked()
	}()
	// Not under the leader's own context: its caller may hang up, and others
	// are on the way with it.
	ctx, cancel := context.WithDeadline(context.Background(), leader.deadline)
	defer cancel()
	for {
		err = n.call(ctx, b.on, b.takes)
		if !errors.Is(err, errNotSent) {
			break
		}
		// Nothing was sent, as the server had closed the connection before.
		n.release(b.on, err)
		if b.on, err = n.acquire(ctx); err != nil {
			return
		}
		began = time.Now()
	}
	took = time.Since(began)
	if err == nil || !isFailure(storeError(err)) {
		n.answered()
	}
}

func isFailure(err *StoreError) bool { return err.Kind == KindTimeout || err.Kind == KindConnection }

// fail gives an error to the takes of a batch that have no answer, and tells
// the breaker. A call that had less time than calls usually need says nothing
// of the node: its caller was in a hurry.
func (n *node) fail(batch []*pending, err error, had time.Duration) error {
	failed := storeError(err)
	if failed.Kind == KindTimeout && !errors.As(err, new(*StoreError)) {
		failed = &StoreError{
			Kind: KindTimeout,
			Err:  fmt.Errorf("%s did not answer within %v: %w", n.name, had.Round(time.Millisecond), err),
		}
	}
	for _, t := range batch {
		if t.reply == "" && t.err == nil {
			t.err = failed
		}
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if failed.Kind != KindTimeout || had >= n.latency {
		n.refuseLocked(n.failed(failed))
	}
	return failed
}

// measureLocked takes the duration of a call that was answered into the
// average.
func (n *node) measureLocked(took time.Duration) {
	if n.latency == 0 {
		n.latency = took
		return
	}
	n.latency += (took - n.latency) / latencyWeight
}
