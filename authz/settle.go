package authz

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"time"

	"go.opentelemetry.io/otel/trace"

	"github.com/sluiceproxy/sluice/limiter"
)

// Settler is a store that settles what its takes hold. Settle fills results[i]
// with what became of settlements[i], each of which is executed at most once,
// and returns by the deadline of ctx. It is safe for concurrent use.
type Settler interface {
	Settle(ctx context.Context, settlements []limiter.Settlement, results []limiter.Settled)
}

const (
	// maxQueued is how many settlements wait for the store at most, and
	// maxQueuedBytes about how much memory they take. What is beyond fails.
	// endingBytes is what each takes besides its key.
	maxQueued, maxQueuedBytes, endingBytes = 10_000, 8 << 20, 512
	// settleBatch is how many settlements one call has at most, and
	// settleWorkers how many calls are under way at most.
	settleBatch, settleWorkers = 50, 16
	// settleTimeout bounds one call. The store's own timeout may be shorter.
	settleTimeout = time.Second
)

// ending is a settlement that waits for the store.
type ending struct {
	limiter.Settlement
	isMistake bool              // the limit's settle failed, so that what was taken stands
	check     trace.SpanContext // of the check that took; invalid if it was not traced
	began     time.Time         // when the end was read
}

// settling settles the requests whose ends Envoy's access log reports, by calls
// of their own, so that no check waits for one.
type settling struct {
	store  Settler
	report *report
	tracer trace.Tracer // nil disables tracing

	queue       chan *ending
	queuedBytes atomic.Int64

	draining chan struct{} // closed when the server begins to drain
}

func newSettling(store Settler, report *report, tracer trace.Tracer) *settling {
	return &settling{
		store:    store,
		report:   report,
		tracer:   tracer,
		queue:    make(chan *ending, maxQueued),
		draining: make(chan struct{}),
	}
}

// add queues a settlement. It never waits: a settlement for which there is no
// room fails.
func (s *settling) add(e *ending) {
	size := e.size()
	if s.queuedBytes.Add(size) <= maxQueuedBytes {
		select {
		case s.queue <- e:
			return
		default:
		}
	}
	s.queuedBytes.Add(-size)
	s.report.settled(e.Limit.Name, settleFailed, &limiter.Settled{})
}

// size is about how much memory a settlement takes.
func (e *ending) size() int64 { return int64(len(e.Key)) + endingBytes }

// run settles what is queued until ctx ends, and then what is left. It starts its
// workers when there is something to settle.
func (s *settling) run(ctx context.Context) {
	select {
	case first := <-s.queue:
		s.settle(first)
	case <-ctx.Done():
	}
	var workers sync.WaitGroup
	for range settleWorkers {
		workers.Go(func() {
			for ctx.Err() == nil {
				select {
				case first := <-s.queue:
					s.settle(first)
				case <-ctx.Done():
				}
			}
			for first := s.queued(); first != nil; first = s.queued() {
				s.settle(first)
			}
		})
	}
	workers.Wait()
}

// queued returns a settlement from the queue, or nil if it is empty.
func (s *settling) queued() *ending {
	select {
	case e := <-s.queue:
		return e
	default:
		return nil
	}
}

// settle settles first and what else is queued, in one call.
func (s *settling) settle(first *ending) {
	var batch []*ending
	for e := first; e != nil; e = s.queued() {
		if batch = append(batch, e); len(batch) == settleBatch {
			break
		}
	}
	settlements := make([]limiter.Settlement, len(batch))
	for i := range batch {
		settlements[i] = batch[i].Settlement
		s.queuedBytes.Add(-batch[i].size())
	}
	results := s.execute(settlements)
	for i, e := range batch {
		r := &results[i]
		result := resultOf(e, r)
		s.report.settled(e.Limit.Name, result, r)
		if s.tracer != nil && e.check.IsValid() {
			settleSpan(s.tracer, e, r, result)
		}
	}
}

// execute makes one call of the store. It recovers from panics.
func (s *settling) execute(settlements []limiter.Settlement) (results []limiter.Settled) {
	results = make([]limiter.Settled, len(settlements))
	defer func() {
		if p := recover(); p != nil {
			s.report.panicked("settlement", p)
			for i := range results {
				results[i] = limiter.Settled{Err: errPanicked}
			}
		}
	}()
	ctx, cancel := context.WithTimeout(context.Background(), settleTimeout)
	defer cancel()
	s.store.Settle(ctx, settlements, results)
	return results
}

var errPanicked = errors.New("the store panicked")

// settleResult is what became of a settlement.
type settleResult int

const (
	settleUnchanged settleResult = iota
	settleReturned
	settleSurcharged
	settleLate
	settleRepeated
	settleUnknown
	settleMistake
	settleFailed
	settleResults // how many there are
)

// String returns the result as it is in metrics and traces.
func (r settleResult) String() string {
	return [...]string{
		"unchanged", "returned", "surcharged", "late", "repeated", "unknown", "mistake", "failed",
	}[r]
}

func resultOf(e *ending, r *limiter.Settled) settleResult {
	switch {
	case r.Err != nil:
		return settleFailed
	case !r.Known:
		return settleUnknown
	case r.Repeated:
		return settleRepeated
	case e.isMistake:
		return settleMistake
	case r.Late:
		return settleLate
	case r.Returned > 0:
		return settleReturned
	case r.Surcharged > 0 || r.Forgiven > 0:
		return settleSurcharged
	}
	return settleUnchanged
}
