package main

import (
	"context"
	"math"
	"net"
	"runtime/debug"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/tap"
)

// inflow bounds the memory of all gRPC calls in flight. gRPC itself bounds the
// size of a message and the number of calls on a connection; but some hundred
// messages of that size, each without its last byte, would fill the memory.
//
// For each connection, inflow knows the calls in flight and the number of bytes
// received since the oldest of them began. That is an upper bound on what is
// kept of them. When the sum over the connections exceeds the budget, the one
// that holds most is closed. A connection is also closed if a call on it takes
// longer than any check, because its message does not arrive.
type inflow struct {
	listener *boundedListener
	budget   int64         // bytes
	step     int64         // bytes that a connection may receive before the sum is computed again
	maxCall  time.Duration // the longest time that a call may take
	log      *zap.Logger
	closed   *prometheus.CounterVec
}

// callCost is the memory of a call besides its message, in bytes: a goroutine
// and the headers.
const callCost = 16 << 10

// leastBudget is more than the largest message that gRPC accepts, in bytes.
const leastBudget = 20 << 20

// messageTime is the longest time that a message may take to arrive.
const messageTime = 5 * time.Second

// newInflow bounds the calls on l. answer is the longest time from a message to
// its answer.
func newInflow(l *boundedListener, answer time.Duration, log *zap.Logger, metrics prometheus.Registerer) *inflow {
	f := &inflow{
		listener: l,
		budget:   max(memoryLimit()/4, leastBudget),
		maxCall:  messageTime + answer,
		log:      log,
		closed: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "sluice_grpc_connections_closed_total",
			Help: "Total number of gRPC connections that sluice closed to protect itself, by reason.",
		}, []string{"reason"}),
	}
	f.step = max(f.budget/2/int64(l.most), 1)
	for _, reason := range []string{"memory", "time"} {
		f.closed.WithLabelValues(reason)
	}
	metrics.MustRegister(f.closed)
	l.inflow = f
	return f
}

// memoryLimit returns GOMEMLIMIT in bytes, or 4 GiB if it is not set.
func memoryLimit() int64 {
	if limit := debug.SetMemoryLimit(-1); limit < math.MaxInt64 {
		return limit
	}
	return 4 << 30
}

// grpcConnections returns the maximum number of gRPC connections. An idle one
// takes about 30 kB, with TLS 100 kB.
func grpcConnections() int { return int(min(max(memoryLimit()/(256<<10), 128), 4096)) }

// connCalls has the calls in flight on a connection.
type connCalls struct {
	// unseen is the number of bytes received since the sum was computed. Only
	// the reader of the connection uses it.
	unseen int64

	mu sync.Mutex
	// all has the calls in the order in which they began. Of those before
	// oldest all have ended, of the others some.
	all    []call
	oldest int
}

// fewCalls is the least room for calls that a connection keeps.
const fewCalls = 32

// call is a gRPC call.
type call struct {
	done     <-chan struct{} // closed when the call has ended
	began    int64           // Unix nanoseconds
	received int64           // bytes on the connection before the call
	watches  bool            // a health watch, which lasts
}

// hasEnded reports whether the call has ended.
func (k call) hasEnded() bool {
	select {
	case <-k.done:
		return true
	default:
		return false
	}
}

// begin records a call. gRPC calls it at the beginning of each, from the
// goroutine that reads the connection.
func (f *inflow) begin(ctx context.Context, info *tap.Info) (context.Context, error) {
	from, ok := peer.FromContext(ctx)
	if !ok {
		return ctx, nil
	}
	at, ok := from.Addr.(remoteAddr)
	if !ok {
		return ctx, nil
	}
	c := at.conn
	calls := &c.calls
	calls.mu.Lock()
	if len(calls.all) == cap(calls.all) {
		calls.forgetLocked()
	}
	calls.all = append(calls.all, call{
		done: ctx.Done(), began: c.active.Load(), received: c.received.Load(),
		watches: info.FullMethodName == grpc_health_v1.Health_Watch_FullMethodName,
	})
	calls.mu.Unlock()
	f.received(c, callCost)
	return ctx, nil
}

// forgetLocked removes the calls that have ended. It then leaves room for at
// least as many calls as there are, so that it is seldom called, and for at most
// three times as many.
func (c *connCalls) forgetLocked() {
	c.all, c.oldest = slices.DeleteFunc(c.all, call.hasEnded), 0
	if room := max(2*len(c.all), fewCalls); cap(c.all) < room || cap(c.all) > 2*room {
		c.all = append(make([]call, 0, room), c.all...)
	}
}

// heldBytes returns an upper bound on the memory of the calls in flight.
func (c *boundedConn) heldBytes() int64 {
	calls := &c.calls
	calls.mu.Lock()
	defer calls.mu.Unlock()
	for calls.oldest < len(calls.all) && calls.all[calls.oldest].hasEnded() {
		calls.oldest++
	}
	inFlight := calls.all[calls.oldest:]
	if len(inFlight) == 0 {
		return 0
	}
	return c.received.Load() - inFlight[0].received + callCost*int64(len(inFlight))
}

// received records that c received n bytes.
func (f *inflow) received(c *boundedConn, n int64) {
	if c.calls.unseen += n; c.calls.unseen < f.step {
		return
	}
	c.calls.unseen = 0
	if c.heldBytes() >= f.step { // otherwise c is not the cause
		f.relieve()
	}
}

// relieve closes connections until the others are within the budget.
func (f *inflow) relieve() {
	type holder struct {
		conn *boundedConn
		n    int64
	}
	for {
		var sum int64
		var most holder
		for _, c := range f.listener.all() {
			n := c.heldBytes()
			sum += n
			if n > most.n {
				most = holder{c, n}
			}
		}
		if sum <= f.budget {
			return
		}
		f.close(most.conn, "memory", "gRPC connection closed: its unanswered calls take too much memory",
			zap.Int64("bytes", most.n))
	}
}

// close closes c, and counts and logs why.
func (f *inflow) close(c *boundedConn, reason, message string, fields ...zap.Field) {
	f.closed.WithLabelValues(reason).Inc()
	f.log.Warn(message, append(fields, zap.Stringer("peer", c.Conn.RemoteAddr()))...)
	c.abort()
}

// run closes connections whose messages do not arrive in time, until ctx ends.
func (f *inflow) run(ctx context.Context) {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case now := <-tick.C:
			for _, c := range f.listener.all() {
				if c.hasCallBefore(now.Add(-f.maxCall)) {
					f.close(c, "time", "gRPC connection closed: a message did not arrive in time",
						zap.Duration("allowed", f.maxCall))
				}
			}
		}
	}
}

// hasCallBefore reports whether a call in flight began before instant. It
// ignores health watches.
func (c *boundedConn) hasCallBefore(instant time.Time) bool {
	c.calls.mu.Lock()
	defer c.calls.mu.Unlock()
	c.calls.forgetLocked()
	for _, k := range c.calls.all {
		if !k.watches {
			return k.began < instant.UnixNano()
		}
	}
	return false
}

// remoteAddr is the address of a connection's peer. A call's connection is found
// by it.
type remoteAddr struct {
	net.Addr
	conn *boundedConn
}
