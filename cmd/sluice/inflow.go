package main

import (
	"context"
	"math"
	"net"
	"runtime/debug"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/tap"
)

// inflow bounds what gRPC's clients have sent and not been answered yet, for the whole process: gRPC itself bounds a message and the
// calls of a connection, and some hundred messages that are sent by halves fit into these bounds and in no memory.
//
// Of each connection it knows the calls under way, and how many bytes came since the oldest of them began, which is at least what is
// kept of them. When the connections together hold more than the budget, the one that holds most is closed. So is a connection with a
// call that takes longer than any check does, as its message does not arrive.
type inflow struct {
	listener *boundedListener
	budget   int64         // bytes
	step     int64         // bytes that a connection may receive until the sum is looked at again
	life     time.Duration // of a call
	log      *zap.Logger
	closed   *prometheus.CounterVec
}

// callCost is what a call takes beside its message: a goroutine, and its headers.
const callCost = 16 << 10

// leastBudget has room for the largest message that gRPC accepts, and some beside it.
const leastBudget = 20 << 20

// messageTime is how long a message may take to arrive.
const messageTime = 5 * time.Second

// newInflow bounds the calls on l. answer is the longest that an answer takes once the message is there.
func newInflow(l *boundedListener, answer time.Duration, log *zap.Logger, metrics prometheus.Registerer) *inflow {
	f := &inflow{
		listener: l,
		budget:   max(memoryLimit()/4, leastBudget),
		life:     messageTime + answer,
		log:      log,
		closed: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "sluice_grpc_connections_closed_total", Help: "Total number of gRPC connections that sluice closed to protect itself, by reason.",
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

// memoryLimit is what this process may use, which the Go runtime knows as GOMEMLIMIT; without one, 4 GiB.
func memoryLimit() int64 {
	if limit := debug.SetMemoryLimit(-1); limit < math.MaxInt64 {
		return limit
	}
	return 4 << 30
}

// grpcConnections is how many connections gRPC may have: an idle one takes some 30 kB, and with TLS 100.
func grpcConnections() int { return int(min(max(memoryLimit()/(256<<10), 128), 4096)) }

// callsOf are a connection's calls under way.
type callsOf struct {
	unseen int64 // bytes since the sum was looked at; the connection's reader's own

	mu   sync.Mutex
	all  []call // in the order in which they began; some have ended
	tidy int    // the length from which on all that have ended are removed
}

// call is one call.
type call struct {
	ctx      context.Context // done when the call has ended
	began    int64           // Unix nanoseconds
	received int64           // the connection's bytes before it
	watches  bool            // it is there to last
}

// begin is called with each call that begins, by its connection's reader.
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
	calls.forget(false)
	calls.all = append(calls.all, call{
		ctx: ctx, began: c.active.Load(), received: c.received.Load(), watches: info.FullMethodName == grpc_health_v1.Health_Watch_FullMethodName,
	})
	calls.mu.Unlock()
	f.received(c, callCost)
	return ctx, nil
}

// forget removes the oldest calls that have ended; all of them where asked, or where there may be many. The caller holds mu.
func (c *callsOf) forget(all bool) {
	n := 0
	for n < len(c.all) && c.all[n].ctx.Err() != nil {
		n++
	}
	clear(c.all[:n])
	if c.all = c.all[n:]; len(c.all) < max(c.tidy, 64) && !all {
		return
	}
	kept := make([]call, 0, 2*len(c.all))
	for _, k := range c.all {
		if k.ctx.Err() == nil {
			kept = append(kept, k)
		}
	}
	c.all, c.tidy = kept, 2*len(kept)
}

// holds is what is kept of a connection's calls, at most.
func (c *boundedConn) holds() int64 {
	c.calls.mu.Lock()
	defer c.calls.mu.Unlock()
	c.calls.forget(false)
	if len(c.calls.all) == 0 {
		return 0
	}
	return c.received.Load() - c.calls.all[0].received + callCost*int64(len(c.calls.all))
}

// received is told of bytes that a connection takes.
func (f *inflow) received(c *boundedConn, n int64) {
	if c.calls.unseen += n; c.calls.unseen < f.step {
		return
	}
	c.calls.unseen = 0
	if c.holds() >= f.step { // or it is not this one
		f.relieve()
	}
}

// relieve closes connections until the others hold no more than the budget.
func (f *inflow) relieve() {
	type holder struct {
		conn *boundedConn
		n    int64
	}
	for {
		var sum int64
		var most holder
		for _, c := range f.listener.all() {
			n := c.holds()
			sum += n
			if n > most.n {
				most = holder{c, n}
			}
		}
		if sum <= f.budget {
			return
		}
		f.close(most.conn, "memory", "gRPC connection closed: what it sent and was not answered yet takes too much memory", zap.Int64("bytes", most.n))
	}
}

func (f *inflow) close(c *boundedConn, reason, message string, fields ...zap.Field) {
	f.closed.WithLabelValues(reason).Inc()
	f.log.Warn(message, append(fields, zap.Stringer("peer", c.Conn.RemoteAddr()))...)
	c.abort()
}

// run closes connections whose messages do not arrive, until ctx ends.
func (f *inflow) run(ctx context.Context) {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case now := <-tick.C:
			for _, c := range f.listener.all() {
				if c.late(now.Add(-f.life)) {
					f.close(c, "time", "gRPC connection closed: a message on it did not arrive in time", zap.Duration("allowed", f.life))
				}
			}
		}
	}
}

// late reports whether a call is under way that began before an instant.
func (c *boundedConn) late(instant time.Time) bool {
	c.calls.mu.Lock()
	defer c.calls.mu.Unlock()
	c.calls.forget(false)
	for _, k := range c.calls.all {
		if !k.watches && k.ctx.Err() == nil {
			return k.began < instant.UnixNano()
		}
	}
	return false
}

// remoteAddr is a connection's peer, by which a call's connection is found.
type remoteAddr struct {
	net.Addr
	conn *boundedConn
}
