package limiter

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/sony/gobreaker/v2"
)

const (
	// tripsAfter is how many calls in a row a node leaves without an answer until its breaker opens.
	tripsAfter = 5
	// probesEvery is how long an open breaker lets nothing through; then one call tries whether the node is back. So a dead node costs
	// one call its time budget now and then, and one that is back is found within this time and one round trip.
	probesEvery = 200 * time.Millisecond
)

// breaker spares a node that does not answer, and the takes that would wait for it.
type breaker struct {
	calls   *gobreaker.TwoStepCircuitBreaker[any]
	timeout time.Duration              // of the store
	open    atomic.Bool                // the node is not asked, but by one call now and then
	last    atomic.Pointer[StoreError] // why it opened
}

func newBreaker(timeout time.Duration) *breaker {
	b := &breaker{timeout: timeout}
	b.calls = gobreaker.NewTwoStepCircuitBreaker[any](gobreaker.Settings{
		Timeout:     probesEvery,
		ReadyToTrip: func(c gobreaker.Counts) bool { return c.ConsecutiveFailures >= tripsAfter },
		OnStateChange: func(_ string, _, to gobreaker.State) {
			b.open.Store(to != gobreaker.StateClosed)
		},
		// An answer is one, whatever it says; who hung up has not waited for one.
		IsSuccessful: func(err error) bool {
			k := KindOf(err)
			return err == nil || k != KindTimeout && k != KindConnection
		},
		IsExcluded: func(err error) bool { return errors.Is(err, context.Canceled) || errors.Is(err, errHurried) },
	})
	return b
}

func (b *breaker) isOpen() bool { return b.open.Load() }

// errHurried is of a call whose callers left it too little time to tell anything of the node.
var errHurried = errors.New("the caller's deadline was near")

// errPanicked is of a call that a mistake of sluice's own ended.
var errPanicked = errors.New("a call panicked")

// run asks a node, unless its breaker is open. Its error is a *StoreError.
func (b *breaker) run(ctx context.Context, ask func() error) error {
	done, err := b.calls.Allow()
	if err != nil {
		last := b.last.Load()
		if last == nil {
			last = &StoreError{Kind: KindConnection, Err: err}
		}
		return &StoreError{Kind: last.Kind, Err: fmt.Errorf("not asked, as it does not answer: %w", last.Err)}
	}
	began := time.Now()
	err = errPanicked // unless it says otherwise
	defer func() {
		if errors.Is(err, errPanicked) { // a breaker that waits for this end would never ask again
			done(storeError(err))
		}
	}()
	err = ask()
	if err == nil {
		done(nil)
		return nil
	}
	failed := storeError(err)
	b.last.Store(failed)
	if d, ok := ctx.Deadline(); ok && failed.Kind == KindTimeout && d.Sub(began) < b.timeout/2 {
		done(errHurried)
	} else {
		done(failed)
	}
	return failed
}
