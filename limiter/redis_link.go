package limiter

import (
	"errors"
	"net"
	"strings"
	"time"
)

// link is a network connection to a Redis server. Its errors name the server,
// and it sends nothing to a server that has closed the connection.
type link struct {
	net.Conn
	peer *peer
	addr string
	said bool // the server has sent something
	// refusal is the error with which Redis refused the connection: an error
	// that came before any other answer.
	refusal   string
	greeted   bool // there was another answer
	speaksTLS bool
}

// errNotSent marks, by wrapping, an error of a write of which nothing was sent,
// so that it may be sent again.
var errNotSent = errors.New("the server had closed the connection")

func newLink(conn net.Conn, addr string) *link {
	return &link{Conn: conn, peer: newPeer(conn), addr: addr}
}

// NetConn returns the underlying connection, for the library's own check.
func (l *link) NetConn() net.Conn { return l.Conn }

func (l *link) SetWriteDeadline(t time.Time) error { return l.notSent(l.Conn.SetWriteDeadline(t)) }

func (l *link) Write(b []byte) (int, error) {
	if l.said && l.peer.hungUp() {
		return 0, l.notSent(errNotSent)
	}
	n, err := l.Conn.Write(b)
	switch {
	case err == nil:
		return n, nil
	case n == 0 && errors.Is(err, net.ErrClosed):
		return 0, l.notSent(err)
	case !l.said: // it may have said why it hung up
		l.hear()
	}
	return n, l.wrap(err)
}

func (l *link) Read(b []byte) (int, error) {
	n, err := l.Conn.Read(b)
	if n > 0 && !l.greeted {
		first := !l.said
		l.note(b[:n])
		if first && l.speaksTLS {
			return 0, l.wrap(errSpeaksTLS)
		}
	}
	if err == nil {
		return n, nil
	}
	if !l.said && !isTimeout(err) {
		err = errSilent
	}
	return n, l.wrap(err)
}

// note looks at what the server says.
func (l *link) note(said []byte) {
	if !l.said {
		l.said, l.speaksTLS = true, said[0] == tlsAlert || said[0] == tlsHandshake
	}
	if l.greeted = l.greeted || said[0] != '-'; !l.greeted {
		l.refusal, _, _ = strings.Cut(string(said[1:]), "\r\n")
	}
}

// hear reads what a server has said before it hung up.
func (l *link) hear() {
	_ = l.SetReadDeadline(time.Now().Add(time.Second))
	var b [1024]byte
	if n, _ := l.Conn.Read(b[:]); n > 0 {
		l.note(b[:n])
	}
}

const (
	tlsAlert     = 0x15 // the first byte of a TLS record
	tlsHandshake = 0x16
)

var (
	errSpeaksTLS error = &refusal{errors.New("the server speaks TLS"), "write rediss:// in store.redis.url, or set tls"}
	errSilent    error = &refusal{
		errors.New("the server closed the connection without a reply"),
		"if it speaks TLS, write rediss:// in store.redis.url, or set tls; " +
			"if it is a proxy such as twemproxy, connect to Redis itself",
	}
)

// answer is an error that Redis answered, as the library has it.
type answer string

func (a answer) Error() string { return string(a) }
func (answer) RedisError()     {}

func (l *link) notSent(err error) error {
	switch {
	case err == nil:
		return nil
	case l.refusal != "" && !l.greeted:
		return newLinkError(l.addr, answer(l.refusal))
	}
	return newLinkError(l.addr, errNotSent)
}

func (l *link) wrap(err error) error {
	switch {
	case isTimeout(err):
	case l.speaksTLS:
		err = errSpeaksTLS
	case l.refusal != "" && !l.greeted:
		err = answer(l.refusal)
	}
	return newLinkError(l.addr, err)
}

// newLinkError wraps an error twice: the library's pool unwraps one that it
// gets while it makes a connection.
func newLinkError(addr string, err error) error { return &linkError{addr, &linkError{addr, err}} }

// linkError is an error of a connection.
type linkError struct {
	addr string
	err  error
}

func (e *linkError) Error() string {
	text := e.err.Error()
	if text == "EOF" {
		text = "EOF: the server closed the connection"
	}
	if strings.Contains(text, e.addr) {
		return text
	}
	return e.addr + ": " + text
}
func (e *linkError) Unwrap() error   { return e.err }
func (e *linkError) Timeout() bool   { return isTimeout(e.err) }
func (e *linkError) Temporary() bool { return false }

func isTimeout(err error) bool {
	var network net.Error
	return errors.As(err, &network) && network.Timeout()
}
