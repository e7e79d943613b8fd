package limiter

import (
	"container/heap"
	"sync"
	"time"
)

// wakes has the leases that are to be renewed or ended at an instant, and one
// timer for the earliest of them. A timer for each would take as much memory as a
// lease. It is safe for concurrent use.
type wakes struct {
	now  func() int64                  // microseconds
	wake func(now int64, due []*lease) // called with those whose instant has come

	mu    sync.Mutex
	queue wakeQueue
	timer *time.Timer // nil before the first set
}

// set has a lease woken at an instant, in place of the one set before. The caller
// holds the lease's mu.
func (w *wakes) set(e *lease, now, at int64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	e.wakeAt = at
	if e.place == 0 {
		heap.Push(&w.queue, e)
	} else {
		heap.Fix(&w.queue, int(e.place-1))
	}
	if w.queue[0] == e {
		w.resetLocked(now)
	}
}

// drop ends the wait of a lease, which may have ended by itself.
func (w *wakes) drop(e *lease) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if e.place > 0 {
		heap.Remove(&w.queue, int(e.place-1))
	}
}

// resetLocked sets the timer for the earliest instant.
func (w *wakes) resetLocked(now int64) {
	wait := time.Duration(max(0, w.queue[0].wakeAt-now)) * time.Microsecond
	if w.timer == nil {
		w.timer = time.AfterFunc(wait, w.fire)
		return
	}
	w.timer.Reset(wait)
}

func (w *wakes) fire() {
	now := w.now()
	var due []*lease
	w.mu.Lock()
	for len(w.queue) > 0 && w.queue[0].wakeAt <= now { // none if the timer runs fast
		due = append(due, heap.Pop(&w.queue).(*lease))
	}
	if len(w.queue) > 0 {
		w.resetLocked(now)
	}
	w.mu.Unlock()
	w.wake(now, due)
}

// wakeQueue is a heap of leases by wakeAt. A lease's place is its index and one
// more; 0 if it is not in the queue.
type wakeQueue []*lease

func (q wakeQueue) Len() int           { return len(q) }
func (q wakeQueue) Less(i, j int) bool { return q[i].wakeAt < q[j].wakeAt }
func (q wakeQueue) Swap(i, j int) {
	q[i], q[j] = q[j], q[i]
	q[i].place, q[j].place = int32(i+1), int32(j+1)
}

// Push is heap.Interface's.
func (q *wakeQueue) Push(e any) {
	*q = append(*q, e.(*lease))
	e.(*lease).place = int32(len(*q))
}

// Pop is heap.Interface's.
func (q *wakeQueue) Pop() any {
	last := len(*q) - 1
	e := (*q)[last]
	(*q)[last] = nil
	*q, e.place = (*q)[:last], 0
	return e
}
