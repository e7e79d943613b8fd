package limiter

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/redis/go-redis/v9"
)

// Connections for takes are made in the background, and have a time of their
// own for that: the way to Redis, TLS, the greeting and the password may need
// more round trips than a take has time for. A take only uses a connection that
// is ready. If there is none it waits for the first, until its deadline.

const (
	// minConnections is how many connections for takes a node has, however
	// near it is.
	minConnections = 4
	// maxConnections is how many it has at most.
	maxConnections = 12
	// callsEvery is how often a call may leave, which together with the latency
	// says how many connections a node needs.
	callsEvery = 5 * time.Millisecond
	// connectTimeout is how long it may take to connect, from the lookup of the
	// name to the first answer.
	connectTimeout = 5 * time.Second
	// reconnectsEvery is how soon after a failed attempt to connect the next one
	// begins; until then takes fail with what that one said.
	reconnectsEvery = 100 * time.Millisecond
	// checkedAfter is how long a connection may be idle until it is checked, and
	// closed if it is not needed.
	checkedAfter = 30 * time.Second
	// maxLifetime bounds the life of a connection, so that a name that has moved
	// to another address is followed.
	maxLifetime = 5 * time.Minute
)

// connection is a connection that is ready for takes.
type connection struct {
	*redis.Conn
	address      string
	opened, used time.Time
	latency      time.Duration // of the round trip that tried it
}

// connections are a node's connections for takes. The node's mutex protects
// them.
type connections struct {
	idle    []*connection // the last one is the one used last
	held    int           // idle ones and those in use
	opening int
	// queue has a channel for each caller of acquire that waits.
	queue []chan acquired
	// opened is closed when an attempt to connect ends; nil if nobody waits.
	opened chan struct{}
	// refused is how the last attempt to connect failed; nil if it did not.
	refused *StoreError
	retryAt time.Time // the earliest next attempt
}

type acquired struct {
	on  *connection
	err error
}

func (n *node) popLocked() *connection {
	on := n.idle[len(n.idle)-1]
	n.idle = n.idle[:len(n.idle)-1]
	return on
}

// acquire returns a connection, which the caller releases. If there is none it
// waits until one is ready, an attempt to connect fails, or ctx ends.
func (n *node) acquire(ctx context.Context) (*connection, error) {
	n.mu.Lock()
	if len(n.idle) > 0 {
		defer n.mu.Unlock()
		return n.popLocked(), nil
	}
	ready := make(chan acquired, 1)
	n.queue = append(n.queue, ready)
	n.openLocked()
	n.mu.Unlock()
	select {
	case a := <-ready:
		return a.on, a.err
	case <-ctx.Done():
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	for i, q := range n.queue {
		if q == ready {
			n.queue = append(n.queue[:i], n.queue[i+1:]...)
			return nil, n.unconnectedLocked(ctx.Err())
		}
	}
	a := <-ready // at the same moment
	return a.on, a.err
}

// unconnectedLocked is the error of a take that ran out of time while there was
// no connection.
func (n *node) unconnectedLocked(why error) *StoreError {
	if n.refused != nil {
		return &StoreError{
			Kind: KindTimeout,
			Err:  fmt.Errorf("%s: no connection yet (%w), the last attempt: %w", n.name, why, n.refused.Err),
		}
	}
	return &StoreError{Kind: KindTimeout, Err: fmt.Errorf("%s: no connection yet: %w", n.name, why)}
}

// release takes back a connection after use, with the error of that use.
func (n *node) release(on *connection, err error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.releaseLocked(on, err)
	if n.inFlight == 0 { // no end of a call will start one
		n.startDueLocked()
	}
}

func (n *node) releaseLocked(on *connection, err error) {
	if on == nil {
		return
	}
	if on.isUsable(err) {
		on.used = time.Now()
		n.offerLocked(on)
		return
	}
	n.held--
	go func() { _ = on.Close() }() // TLS says goodbye, which may block
	n.openLocked()
}

// isUsable reports whether a connection can be used after an error: Redis has
// answered on it, and did not say that another server should have been asked
// under its address.
func (c *connection) isUsable(err error) bool {
	if err == nil {
		return true
	}
	var answer redis.Error
	if !errors.As(err, &answer) || redis.HasErrorPrefix(err, "READONLY") {
		return false
	}
	return !redis.HasErrorPrefix(err, "MOVED") || !strings.HasSuffix(answer.Error(), " "+c.address)
}

// offerLocked gives a connection to whoever waits for one.
func (n *node) offerLocked(on *connection) {
	if len(n.queue) > 0 {
		n.queue[0] <- acquired{on: on}
		n.queue = n.queue[1:]
		return
	}
	n.idle = append(n.idle, on)
}

// openLocked sees to it that the node gets as many connections as it needs.
func (n *node) openLocked() {
	need := n.limitLocked()
	if n.held+n.opening >= need {
		return
	}
	if now := time.Now(); now.Before(n.retryAt) {
		if n.held == 0 && n.opening == 0 {
			for range n.waiting {
				_ = n.failed(n.refused) // the takes are refused below, in any case
			}
			n.failWaitersLocked(n.refused)
		}
		return
	}
	for n.held+n.opening < need {
		n.opening++
		go n.open()
	}
}

// open makes a connection.
func (n *node) open() {
	ctx, cancel := context.WithTimeout(context.Background(), connectTimeout)
	defer cancel()
	on, err := n.dial(ctx)
	n.mu.Lock()
	defer n.mu.Unlock()
	n.opening--
	if n.opened != nil {
		close(n.opened)
		n.opened = nil
	}
	if err != nil {
		n.refused = storeError(err)
		n.retryAt = time.Now().Add(reconnectsEvery)
		if n.held == 0 && n.opening == 0 {
			_ = n.failed(n.refused) // nobody is left to be refused
			n.failWaitersLocked(n.refused)
		}
		return
	}
	n.refused, n.retryAt = nil, time.Time{}
	if n.held++; n.held == 1 {
		n.probeNext()
	}
	if n.latency == 0 {
		n.latency = on.latency
		n.openLocked() // now that it is known how many are needed
	}
	n.offerLocked(on)
	n.startBatchLocked()
}

// retry lets the next attempt to connect begin at once, and the next take cause
// it, even if the breaker is open.
func (n *node) retry() {
	n.probeNext()
	n.mu.Lock()
	defer n.mu.Unlock()
	n.retryAt = time.Time{}
}

// failWaitersLocked ends the wait of all who wait for a connection.
func (n *node) failWaitersLocked(err *StoreError) {
	for _, q := range n.queue {
		q <- acquired{err: err}
	}
	n.queue = nil
	n.refuseLocked(err)
}

// warm waits until the node has the connections that it needs, and returns an
// error if it has none.
func (n *node) warm(ctx context.Context) error {
	on, err := n.acquire(ctx)
	if err != nil {
		return err
	}
	// Whether it answers now: the connection may be an old one.
	err = on.Time(ctx).Err()
	n.release(on, err)
	if errors.Is(err, errNotSent) {
		return n.warm(ctx)
	}
	if err != nil {
		return err
	}
	for {
		n.mu.Lock()
		n.openLocked()
		if n.opening == 0 {
			n.mu.Unlock()
			return nil
		}
		if n.opened == nil {
			n.opened = make(chan struct{})
		}
		opened := n.opened
		n.mu.Unlock()
		select {
		case <-opened:
		case <-ctx.Done():
			return nil // what there is will do
		}
	}
}

// refresh closes a connection that is too old or not needed, checks those that
// nobody has used for a while, and makes what is missing.
func (n *node) refresh(ctx context.Context) {
	now := time.Now()
	n.mu.Lock()
	var checked []*connection
	for len(n.idle) > 0 && now.Sub(n.idle[0].used) > checkedAfter {
		checked = append(checked, n.idle[0])
		n.idle = n.idle[1:]
	}
	if len(checked) > 0 && n.held > n.limitLocked() {
		n.closeLocked(checked[0])
		checked = checked[1:]
	}
	for i, on := range n.idle {
		if now.Sub(on.opened) > maxLifetime {
			n.idle = append(n.idle[:i], n.idle[i+1:]...)
			n.closeLocked(on)
			break // one at a time: the others carry on
		}
	}
	n.openLocked()
	n.mu.Unlock()
	for _, on := range checked {
		err := errNotSent // too old
		if now.Sub(on.opened) <= maxLifetime {
			err = on.Time(ctx).Err()
		}
		n.release(on, err)
	}
}

// closeLocked closes a connection that is not idle any more.
func (n *node) closeLocked(on *connection) {
	n.held--
	go func() { _ = on.Close() }()
}

// close closes all connections that are idle.
func (n *node) close() {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, on := range n.idle {
		n.closeLocked(on)
	}
	n.idle = nil
}
