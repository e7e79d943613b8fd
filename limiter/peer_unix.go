//go:build linux || darwin || freebsd

package limiter

import (
	"net"
	"syscall"
)

// peer looks at the other end of a connection.
type peer struct{ raw syscall.RawConn } // nil: it is not known

// newPeer looks beneath TLS.
func newPeer(conn net.Conn) peer {
	if beneath, ok := conn.(interface{ NetConn() net.Conn }); ok {
		conn = beneath.NetConn()
	}
	if c, ok := conn.(syscall.Conn); ok {
		if raw, err := c.SyscallConn(); err == nil {
			return peer{raw}
		}
	}
	return peer{}
}

// hungUp reports whether the other end has closed the connection, without
// waiting and without reading what it has said.
func (p peer) hungUp() bool {
	if p.raw == nil {
		return false
	}
	over := false
	err := p.raw.Control(func(fd uintptr) {
		var b [1]byte
		n, _, err := syscall.Recvfrom(int(fd), b[:], syscall.MSG_PEEK|syscall.MSG_DONTWAIT)
		over = n == 0 && err == nil || err != nil && err != syscall.EAGAIN && err != syscall.EWOULDBLOCK && err != syscall.EINTR
	})
	return over || err != nil
}
