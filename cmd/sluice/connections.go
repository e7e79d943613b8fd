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

// stalled is how long a connection must have carried no byte before it may be closed to make room for another of the same
// address.
const stalled = time.Second

// boundedListener accepts at most a number of connections at once. When another one comes it closes the one that has been
// silent for longest of the address that holds most of them, so that one neighbour with thousands of idle connections keeps
// nobody else out. Where that address holds no more than the new one's, and all of its connections are busy, the new one is
// closed instead.
type boundedListener struct {
	net.Listener
	most   int
	inflow *inflow // nil for HTTP, where a connection has one request at a time

	mu    sync.Mutex
	conns map[*boundedConn]struct{}
	held  map[netip.Addr]int // connections by address; of a unix socket all have the zero address
}

// bounded returns l with at most so many connections at once.
func bounded(l net.Listener, most int) *boundedListener {
	return &boundedListener{Listener: l, most: most, conns: make(map[*boundedConn]struct{}), held: make(map[netip.Addr]int)}
}

// Accept returns the next connection that there is room for.
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

// admit adds c if there is room. The victim, if any, is a connection that has lost its place, and must be closed.
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

// all returns the connections that there are.
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
	received atomic.Int64 // bytes

	calls callsOf // with gRPC

	raw  syscall.RawConn // for ReadOnReady, made when it is first used
	read readyRead
}

func (c *boundedConn) touch() { c.active.Store(time.Now().UnixNano()) }

func (c *boundedConn) got(n int) {
	if n > 0 {
		c.touch()
		c.received.Add(int64(n))
		if f := c.listener.inflow; f != nil {
			f.received(c, int64(n))
		}
	}
}

// RemoteAddr is net.Conn's. It leads back to the connection.
func (c *boundedConn) RemoteAddr() net.Addr { return remoteAddr{c.Conn.RemoteAddr(), c} }

// Read is net.Conn's.
func (c *boundedConn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	c.got(n)
	return n, err
}

// Write is net.Conn's.
func (c *boundedConn) Write(b []byte) (int, error) {
	n, err := c.Conn.Write(b)
	if n > 0 {
		c.touch()
	}
	return n, err
}

// Close is net.Conn's.
func (c *boundedConn) Close() error {
	c.listener.remove(c)
	return c.Conn.Close()
}

// abort closes the connection at once: what was not sent yet is dropped, which frees the kernel's buffers, too.
func (c *boundedConn) abort() {
	if tcp, ok := c.Conn.(*net.TCPConn); ok {
		_ = tcp.SetLinger(0)
	}
	_ = c.Close()
}

// readyRead is what ReadOnReady's callback reads into.
type readyRead struct {
	pool mem.BufferPool
	size int
	call func(fd uintptr) bool

	buffer *[]byte
	n      int
	err    error
}

// ReadOnReady waits until there is something to read and only then takes a buffer from the pool, so that an idle connection
// holds none. gRPC's transport looks for this method, which it has for a bare net.TCPConn by itself.
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

// readNow reads what there is. It reports false where there is nothing.
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

func (c *boundedConn) readBlocking(size int, pool mem.BufferPool) (*[]byte, int, error) {
	buffer := pool.Get(size)
	n, err := c.Read(*buffer)
	if err != nil {
		pool.Put(buffer)
		return nil, 0, err
	}
	return buffer, n, nil
}
