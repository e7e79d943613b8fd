package limiter

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"github.com/redis/go-redis/v9"
)

const (
	// nextAddressAfter is how long an address may keep a dial waiting until the
	// name's next one is tried beside it.
	nextAddressAfter = 50 * time.Millisecond
	// redialsAfter is how long all addresses may until they are tried once more:
	// the kernel repeats the first packet of a connection ever more rarely.
	redialsAfter = time.Second
)

// dialer dials servers and sentinels.
type dialer struct {
	servers, sentinels *TLS // nil: without
	hasSentinels       bool
}

// masterDial is the key of what marks, in the mode Sentinel, the context of a
// dial that leads to the master, and not to a sentinel.
type masterDial struct{}

// masterHook is for the library's client of a master that sentinels know.
type masterHook struct{}

// DialHook marks the dial. It gives a broken connection for its failure, as
// dial does.
func (masterHook) DialHook(next redis.DialHook) redis.DialHook {
	return func(ctx context.Context, network, addr string) (net.Conn, error) {
		conn, err := next(context.WithValue(ctx, masterDial{}, true), network, addr)
		if err != nil {
			return broken{err: newLinkError(addr, err)}, nil
		}
		return conn, nil
	}
}

// ProcessHook changes nothing.
func (masterHook) ProcessHook(next redis.ProcessHook) redis.ProcessHook { return next }

// ProcessPipelineHook changes nothing.
func (masterHook) ProcessPipelineHook(next redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return next
}

// dial makes a connection, with TLS if there is some. If that fails it returns
// a connection that is broken: of errors the library's pool keeps count, and
// after some it takes a second to see that a server is there again.
func (d dialer) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	files := d.servers
	if d.hasSentinels && ctx.Value(masterDial{}) == nil {
		files = d.sentinels
	}
	conn, err := dialAddresses(ctx, network, addr)
	if err == nil && files != nil {
		conn, err = speakTLS(ctx, conn, addr, files)
	}
	if err != nil {
		return broken{err: newLinkError(addr, err)}, nil
	}
	return newLink(conn, addr), nil
}

const noTLS = "write redis:// in store.redis.url, or remove tls"

// speakTLS makes TLS of a connection, which it closes if that fails.
func speakTLS(ctx context.Context, conn net.Conn, addr string, files *TLS) (net.Conn, error) {
	host, _, err := net.SplitHostPort(addr)
	if err != nil {
		host = addr
	}
	config, err := files.config(host)
	if err == nil {
		// A server that does not speak TLS waits for a line's end, which may
		// never come: there is no more to hear than silence.
		ctx, cancel := context.WithTimeout(ctx, connectTimeout/2)
		defer cancel()
		secure := tls.Client(conn, config)
		if err = secure.HandshakeContext(ctx); err == nil {
			return secure, nil
		}
		var notTLS tls.RecordHeaderError
		switch {
		case errors.As(err, &notTLS):
			err = &refusal{errors.New("the server does not speak TLS"), noTLS}
		case errors.Is(err, context.DeadlineExceeded):
			err = &refusal{fmt.Errorf("no answer to TLS: %w", err), "if the server does not speak TLS, " + noTLS}
		}
	}
	_ = conn.Close()
	return nil, err
}

// dialed is how the dial of one address ended.
type dialed struct {
	conn net.Conn
	err  error
}

// dialAddresses dials all addresses of a name, one beside the other, each
// nextAddressAfter the one before or as soon as that has failed.
func dialAddresses(ctx context.Context, network, addr string) (net.Conn, error) {
	var plain net.Dialer
	host, port, err := net.SplitHostPort(addr)
	if network == "unix" || err != nil {
		return plain.DialContext(ctx, network, addr)
	}
	addresses, err := lookup(ctx, host)
	if err != nil {
		return nil, fmt.Errorf("dial %s: %w", addr, err)
	}
	conn, err := dialFirst(ctx, addresses, port)
	if errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled) {
		err = fmt.Errorf("dial %s: %w", addr, err) // which does not name it
	}
	return conn, err
}

// dialFirst returns the first connection to one of the addresses.
func dialFirst(ctx context.Context, addresses []string, port string) (net.Conn, error) {
	var plain net.Dialer
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	results := make(chan dialed)
	next := time.NewTimer(0)
	defer next.Stop()
	var firstErr error
	for started, failed := 0, 0; ; {
		select {
		case <-next.C:
			to := net.JoinHostPort(addresses[started%len(addresses)], port)
			go func() {
				conn, err := plain.DialContext(ctx, "tcp", to)
				select {
				case results <- dialed{conn, err}:
				case <-ctx.Done():
					if conn != nil {
						_ = conn.Close()
					}
				}
			}()
			if started++; started%len(addresses) == 0 {
				next.Reset(redialsAfter)
			} else {
				next.Reset(nextAddressAfter)
			}
		case r := <-results:
			if r.err == nil {
				return r.conn, nil
			}
			if firstErr == nil {
				firstErr = r.err
			}
			if failed++; failed == started {
				if started >= len(addresses) {
					return nil, firstErr
				}
				next.Reset(0)
			}
		case <-ctx.Done():
			if firstErr == nil {
				firstErr = ctx.Err()
			}
			return nil, firstErr
		}
	}
}

// lookup returns a name's addresses, those of IPv6 and of IPv4 in turn.
func lookup(ctx context.Context, host string) ([]string, error) {
	if _, err := netip.ParseAddr(host); err == nil {
		return []string{host}, nil
	}
	found, err := net.DefaultResolver.LookupNetIP(ctx, "ip", host)
	if err != nil {
		return nil, err
	}
	var families [2][]string // first the one that the resolver prefers
	for _, a := range found {
		family := 0
		if a.Unmap().Is4() != found[0].Unmap().Is4() {
			family = 1
		}
		families[family] = append(families[family], a.Unmap().String())
	}
	var all []string
	for i := range max(len(families[0]), len(families[1])) {
		for _, f := range families {
			if i < len(f) {
				all = append(all, f[i])
			}
		}
	}
	return all, nil
}

// broken stands for a connection that could not be made. Every use of it fails
// with the reason.
type broken struct {
	net.Conn
	err error
}

func (b broken) Read([]byte) (int, error)       { return 0, b.err }
func (b broken) Write([]byte) (int, error)      { return 0, b.err }
func (broken) Close() error                     { return nil }
func (broken) LocalAddr() net.Addr              { return noAddr{} }
func (broken) RemoteAddr() net.Addr             { return noAddr{} }
func (broken) SetDeadline(time.Time) error      { return nil }
func (broken) SetReadDeadline(time.Time) error  { return nil }
func (broken) SetWriteDeadline(time.Time) error { return nil }

type noAddr struct{}

func (noAddr) Network() string { return "none" }
func (noAddr) String() string  { return "none" }
