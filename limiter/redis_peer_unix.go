//go:build linux || darwin || freebsd

package limiter

import (
	"net"
	"syscall"
)

// peer looks at the other end of a connection. It is not for concurrent use.
type peer struct {
	raw  syscall.RawConn // nil: it is not known
	look func(fd uintptr)
	over bool // what look has found
}

// newPeer looks beneath TLS.
func newPeer(conn net.Conn) *peer {
	if beneath, ok := conn.(interface{ NetConn() net.Conn }); ok {
		conn = beneath.NetConn()
	}
	p := &peer{}
	c, ok := conn.(syscall.Conn)
	if !ok {
		return p
	}
	raw, err := c.SyscallConn()
	if err != nil {
		return p
	}
	p.raw = raw
	var b [1]byte
	p.look = func(fd uintptr) { // made once, as each call would allocate it
		n, _, err := syscall.Recvfrom(int(fd), b[:], syscall.MSG_PEEK|syscall.MSG_DONTWAIT)
		p.over = n == 0 && err == nil ||
			err != nil && err != syscall.EAGAIN && err != syscall.EWOULDBLOCK && err != syscall.EINTR
	}
	return p
}

// hungUp reports whether the other end has closed the connection, without
// waiting and without reading what it has said.
func (p *peer) hungUp() bool {
	if p.raw == nil {
		return false
	}
	err := p.raw.Control(p.look)
	return p.over || err != nil
}
