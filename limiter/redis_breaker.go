package limiter

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// tripsAfter is how many failures in a row, without an answer in between,
	// open a node's breaker.
	tripsAfter = 5
	// probesEvery is how often one take is let through while the breaker is
	// open. A dead node costs one take its time budget that often, and a node
	// that is back is found within this time and one round trip.
	probesEvery = 200 * time.Millisecond
)

// breaker is a node's circuit breaker: it keeps takes from waiting for a node
// that does not answer. It is safe for concurrent use.
//
// It counts calls, attempts to connect, and takes that failed while there was no
// connection. Any answer to a call closes it, whatever the answer says and
// however late it comes.
type breaker struct {
	open     atomic.Bool
	failures atomic.Int32 // in a row

	mu        sync.Mutex
	nextProbe time.Time   // of no meaning unless open
	last      *StoreError // the latest failure; nil if there was none
}

func (b *breaker) isOpen() bool { return b.open.Load() }

// admit returns an error if the breaker is open, unless the caller is the one
// that probes the node.
func (b *breaker) admit() *StoreError {
	if !b.isOpen() {
		return nil
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if now := time.Now(); !now.Before(b.nextProbe) {
		b.nextProbe = now.Add(probesEvery)
		return nil
	}
	return b.refusalLocked()
}

// refusalLocked returns the error of a take that an open breaker refuses.
func (b *breaker) refusalLocked() *StoreError {
	return &StoreError{Kind: b.last.Kind, Err: fmt.Errorf("circuit breaker open: %w", b.last.Err)}
}

// answered records that the node has answered a call.
func (b *breaker) answered() {
	if b.failures.Load() != 0 {
		b.failures.Store(0)
	}
	if b.isOpen() {
		b.open.Store(false)
	}
}

// failed records a failure, if it is one of the node's. It returns what takes
// are refused with if that opened the breaker, and else nil.
func (b *breaker) failed(err *StoreError) *StoreError {
	if err.Kind != KindTimeout && err.Kind != KindConnection || errors.Is(err, context.Canceled) {
		return nil
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.last = err
	if b.failures.Add(1) < tripsAfter || b.isOpen() {
		return nil
	}
	b.nextProbe = time.Now().Add(probesEvery)
	b.open.Store(true)
	return b.refusalLocked()
}

// probeNext lets the next take probe the node: a connection could be made, or
// there are new credentials.
func (b *breaker) probeNext() {
	if !b.isOpen() {
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.nextProbe = time.Time{}
}
