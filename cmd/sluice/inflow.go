package main

import (
	"context"
	"math"
	"net"
	"runtime/debug"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/tap"

	"github.com/sluiceproxy/sluice/authz"
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
//
// A stream of Envoy's access log lasts for days. It counts with what was received
// since its last message was read, which may all belong to checks on the same
// connection. So a stream that counts too much is ended, and the connection stays:
// Envoy opens another stream for its next entry.
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
	// streams has the streams of access logs in flight.
	streams []*logStream
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

// logStream is a stream of Envoy's access log. It keeps at most what the
// connection has received since the server began to wait for the stream's next
// message, and what gRPC had received in advance then.
type logStream struct {
	done     <-chan struct{} // closed when the stream has ended
	received atomic.Int64    // bytes on the connection when the server began to wait
	end      chan struct{}   // closed to end the stream
	ending   sync.Once
}

// streamCost is the memory of a logStream in bytes besides what the connection
// has received since its last message: that of a call, and a flow-control window.
const streamCost = callCost + 64<<10

// hasEnded reports whether the call has ended.
func (k call) hasEnded() bool { return isClosed(k.done) }

func isClosed(c <-chan struct{}) bool {
	select {
	case <-c:
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
	if info.FullMethodName == authz.AccessLogMethod {
		calls.addStream(ctx, c.received.Load())
		f.received(c, streamCost)
		return ctx, nil
	}
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

// addStream records a stream of an access log.
func (c *connCalls) addStream(ctx context.Context, received int64) {
	s := &logStream{done: ctx.Done(), end: make(chan struct{})}
	s.received.Store(received)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.streams = append(slices.DeleteFunc(c.streams, (*logStream).hasEnded), s)
}

// hasEnded reports whether the stream has ended, or soon will.
func (s *logStream) hasEnded() bool { return isClosed(s.done) || isClosed(s.end) }

// endStreams ends the streams of access logs.
func (c *connCalls) endStreams() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, s := range c.streams {
		s.ending.Do(func() { close(s.end) })
	}
}

// stream returns the stream of an access log whose context is done when done is
// closed, or nil.
func (c *connCalls) stream(done <-chan struct{}) *logStream {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, s := range c.streams {
		if s.done == done {
			return s
		}
	}
	return nil
}

// readingLog is the server's side of a stream of an access log.
type readingLog struct {
	grpc.ServerStream
	conn   *boundedConn
	stream *logStream
}

// RecvMsg implements grpc.ServerStream. The server must be done with the message
// before.
func (r readingLog) RecvMsg(message any) error {
	r.stream.received.Store(r.conn.received.Load())
	return r.ServerStream.RecvMsg(message)
}

// readLogs is an interceptor that sees how far access logs have been read, and
// ends them.
func readLogs(server any, stream grpc.ServerStream, _ *grpc.StreamServerInfo, handle grpc.StreamHandler) error {
	ctx := stream.Context()
	if from, ok := peer.FromContext(ctx); ok {
		if at, ok := from.Addr.(remoteAddr); ok {
			if s := at.conn.calls.stream(ctx.Done()); s != nil {
				handled := make(chan error, 1)
				go func() { handled <- handle(server, readingLog{stream, at.conn, s}) }()
				select {
				case err := <-handled:
					return err
				case <-s.end: // what the stream holds is then freed
					return status.Error(codes.Unavailable, "too much was received since the last entry; open another stream")
				}
			}
		}
	}
	return handle(server, stream)
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

// heldBytes returns upper bounds on the memory of the calls in flight, and on that
// of the streams of access logs.
func (c *boundedConn) heldBytes() (ofCalls, ofStreams int64) {
	calls := &c.calls
	calls.mu.Lock()
	defer calls.mu.Unlock()
	for calls.oldest < len(calls.all) && calls.all[calls.oldest].hasEnded() {
		calls.oldest++
	}
	inFlight := calls.all[calls.oldest:]
	received := c.received.Load()
	if len(inFlight) > 0 {
		ofCalls = received - inFlight[0].received + callCost*int64(len(inFlight))
	}
	since := received
	for _, s := range calls.streams {
		if !s.hasEnded() {
			since = min(since, s.received.Load())
			ofStreams += streamCost
		}
	}
	return ofCalls, ofStreams + received - since
}

// received records that c received n bytes.
func (f *inflow) received(c *boundedConn, n int64) {
	if c.calls.unseen += n; c.calls.unseen < f.step {
		return
	}
	c.calls.unseen = 0
	if ofCalls, ofStreams := c.heldBytes(); ofCalls+ofStreams >= f.step { // otherwise c is not the cause
		f.relieve()
	}
}

// relieve ends streams of access logs and closes connections until what is left
// is within the budget.
func (f *inflow) relieve() {
	type holder struct {
		conn      *boundedConn
		n         int64
		ofStreams bool
	}
	for {
		var sum int64
		var most holder
		for _, c := range f.listener.all() {
			ofCalls, ofStreams := c.heldBytes()
			sum += ofCalls + ofStreams
			if n := max(ofCalls, ofStreams); n > most.n {
				most = holder{c, n, ofStreams > ofCalls}
			}
		}
		if sum <= f.budget {
			return
		}
		if most.ofStreams {
			most.conn.calls.endStreams()
			continue
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
