package main

import (
	"errors"
	"io"
	"maps"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"google.golang.org/grpc/mem"
)

// stalled is how long a connection must have carried no byte before it may be
// closed in favor of a new one.
const stalled = time.Second

// boundedListener limits the number of concurrent connections. When it is full,
// it makes room for a new connection by closing the one that has been silent for
// longest, of the address that has the most connections. So a client with thousands of idle connections does
// not keep others out. If that address has no more connections than the new
// one's, and all of them are busy, the new connection is closed instead.
type boundedListener struct {
	net.Listener
	most   int     // the maximum number of connections
	inflow *inflow // nil for HTTP, where a connection has one request at a time

	mu    sync.Mutex
	conns map[*boundedConn]struct{}
	held  map[netip.Addr]int // number of connections by address; the zero address for unix sockets
}

// bounded returns l limited to most concurrent connections.
func bounded(l net.Listener, most int) *boundedListener {
	return &boundedListener{
		Listener: l, most: most, conns: make(map[*boundedConn]struct{}), held: make(map[netip.Addr]int),
	}
}

// Accept returns the next connection that is not closed for the limit.
func (l *boundedListener) Accept() (net.Conn, error) {
	for {
		raw, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		c := &boundedConn{Conn: raw, listener: l}
		if tcp, ok := raw.RemoteAddr().(*net.TCPAddr); ok {
			c.peer = tcp.AddrPort().Addr().Unmap()
		}
		c.touch()
		ok, victim := l.admit(c)
		if victim != nil {
			victim.abort()
		}
		if ok {
			return c, nil
		}
		c.abort()
	}
}

// admit adds c, and reports whether it did. It may remove another connection for
// it, the victim, which the caller must close.
func (l *boundedListener) admit(c *boundedConn) (ok bool, victim *boundedConn) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.conns) >= l.most {
		var most int
		for other := range l.conns {
			if n := l.held[other.peer]; n > most || n == most && other.active.Load() < victim.active.Load() {
				most, victim = n, other
			}
		}
		if victim == nil {
			return false, nil
		}
		if most <= l.held[c.peer]+1 && time.Since(time.Unix(0, victim.active.Load())) < stalled {
			return false, nil
		}
		l.removeLocked(victim)
	}
	l.conns[c] = struct{}{}
	l.held[c.peer]++
	return true, victim
}

// remove removes c if it is there.
func (l *boundedListener) remove(c *boundedConn) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.removeLocked(c)
}

func (l *boundedListener) removeLocked(c *boundedConn) {
	if _, ok := l.conns[c]; !ok {
		return
	}
	delete(l.conns, c)
	if l.held[c.peer]--; l.held[c.peer] == 0 {
		delete(l.held, c.peer)
	}
}

// all returns all connections, in no order.
func (l *boundedListener) all() []*boundedConn {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Collect(maps.Keys(l.conns))
}

// boundedConn is a connection of a boundedListener.
type boundedConn struct {
	net.Conn
	listener *boundedListener
	peer     netip.Addr
	active   atomic.Int64 // when it last carried a byte, in Unix nanoseconds
	received atomic.Int64 // bytes since the connection began

	calls connCalls // of gRPC

	raw  syscall.RawConn // of ReadOnReady, nil before its first call
	read readyRead
}

// touch records that the connection carried a byte.
func (c *boundedConn) touch() { c.active.Store(time.Now().UnixNano()) }

// got records that n bytes were received.
func (c *boundedConn) got(n int) {
	if n > 0 {
		c.touch()
		c.received.Add(int64(n))
		if f := c.listener.inflow; f != nil {
			f.received(c, int64(n))
		}
	}
}

// RemoteAddr implements net.Conn. The address refers to c, so that the calls on
// a connection can be found by it.
func (c *boundedConn) RemoteAddr() net.Addr { return remoteAddr{c.Conn.RemoteAddr(), c} }

// Read implements net.Conn.
func (c *boundedConn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	c.got(n)
	return n, err
}

// Write implements net.Conn.
func (c *boundedConn) Write(b []byte) (int, error) {
	n, err := c.Conn.Write(b)
	if n > 0 {
		c.touch()
	}
	return n, err
}

// Close implements net.Conn.
func (c *boundedConn) Close() error {
	c.listener.remove(c)
	return c.Conn.Close()
}

// abort closes the connection at once. Data that is not sent yet is dropped,
// which also frees the kernel's buffers.
func (c *boundedConn) abort() {
	if tcp, ok := c.Conn.(*net.TCPConn); ok {
		_ = tcp.SetLinger(0)
	}
	_ = c.Close()
}

// readyRead has the arguments and the results of readNow, which is a callback.
type readyRead struct {
	pool mem.BufferPool
	size int
	call func(fd uintptr) bool

	buffer *[]byte
	n      int
	err    error
}

// ReadOnReady reads at most size bytes into a buffer from the pool. It takes the
// buffer only when there is something to read, so that an idle connection has
// none. gRPC's transport uses this method if a connection has it; for a
// net.TCPConn it does the same by itself.
func (c *boundedConn) ReadOnReady(size int, pool mem.BufferPool) (*[]byte, int, error) {
	if c.raw == nil {
		conn, ok := c.Conn.(syscall.Conn)
		if !ok {
			return c.readBlocking(size, pool)
		}
		raw, err := conn.SyscallConn()
		if err != nil {
			return nil, 0, err
		}
		c.raw, c.read.call = raw, c.readNow
	}
	r := &c.read
	r.pool, r.size, r.buffer, r.n, r.err = pool, size, nil, 0, nil
	err := c.raw.Read(r.call)
	buffer, n := r.buffer, r.n
	r.pool, r.buffer = nil, nil
	if err == nil {
		err = r.err
	}
	if err == nil && n == 0 {
		err = io.EOF
	}
	if err != nil {
		if buffer != nil {
			pool.Put(buffer)
		}
		return nil, 0, err
	}
	c.got(n)
	return buffer, n, nil
}

// readNow reads what is there. It returns false if there is nothing.
func (c *boundedConn) readNow(fd uintptr) bool {
	r := &c.read
	r.buffer = r.pool.Get(r.size)
	r.n, r.err = syscall.Read(int(fd), *r.buffer)
	if r.err == nil {
		return true
	}
	r.pool.Put(r.buffer)
	r.buffer = nil
	return !errors.Is(r.err, syscall.EAGAIN)
}

// readBlocking is ReadOnReady for a connection without a file descriptor.
func (c *boundedConn) readBlocking(size int, pool mem.BufferPool) (*[]byte, int, error) {
	buffer := pool.Get(size)
	n, err := c.Read(*buffer)
	if err != nil {
		pool.Put(buffer)
		return nil, 0, err
	}
	return buffer, n, nil
}
