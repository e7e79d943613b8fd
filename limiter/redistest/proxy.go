//go:build linux

package redistest

import (
	"errors"
	"net"
	"sync"
	"testing"
	"time"
)

// Proxy forwards connections to a server and injects faults. The faults apply
// to open connections and to new ones.
type Proxy struct {
	Addr string // host:port

	server   string
	dialer   net.Dialer // to the server
	listener net.Listener
	wg       sync.WaitGroup

	mu     sync.Mutex
	faults faults
	conns  map[net.Conn]bool // the open connections, of both sides
	opened int
	most   int // the most client connections that were open at once
}

// faults are the faults that a proxy injects. mended is closed when they end.
type faults struct {
	delay     time.Duration
	rate      int // in bytes a second; 0 means unlimited
	cut, hold bool
	mended    chan struct{}
}

// StartProxy starts a proxy before a server on host:port, and stops it when the
// test ends.
func StartProxy(t testing.TB, server string) *Proxy {
	t.Helper()
	return StartProxyFrom(t, server, "127.0.0.1")
}

// StartProxyFrom is StartProxy with an address from which the server is
// dialled.
func StartProxyFrom(t testing.TB, server, from string) *Proxy {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	p := &Proxy{Addr: l.Addr().String(), server: server, listener: l, conns: map[net.Conn]bool{}}
	p.dialer.LocalAddr = &net.TCPAddr{IP: net.ParseIP(from)}
	p.faults.mended = make(chan struct{})
	p.wg.Go(p.accept)
	t.Cleanup(func() {
		_ = l.Close()
		p.Mend()
		p.mu.Lock()
		for c := range p.conns {
			_ = c.Close()
		}
		p.mu.Unlock()
		p.wg.Wait()
	})
	return p
}

// Server returns the address of the proxy's server, as host:port.
func (p *Proxy) Server() string { return p.server }

// Delay delays everything that the server sends by d, which is then the round
// trip.
func (p *Proxy) Delay(d time.Duration) { p.change(func(f *faults) { f.delay = d }) }

// Throttle lets so many kilobytes a second through to the server, on each
// connection.
func (p *Proxy) Throttle(kilobytes int) { p.change(func(f *faults) { f.rate = 1000 * kilobytes }) }

// Cut closes each connection when the server next sends something, and drops
// what it sent.
func (p *Proxy) Cut() { p.change(func(f *faults) { f.cut = true }) }

// Hold withholds everything that the server sends. Mend then closes the
// connections of which something was withheld.
func (p *Proxy) Hold() { p.change(func(f *faults) { f.hold = true }) }

// Mend ends all faults.
func (p *Proxy) Mend() {
	p.mu.Lock()
	defer p.mu.Unlock()
	close(p.faults.mended)
	p.faults = faults{mended: make(chan struct{})}
}

// Opened returns how many connections there have been.
func (p *Proxy) Opened() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.opened
}

// Most returns the largest number of client connections that were open at once.
func (p *Proxy) Most() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.most
}

func (p *Proxy) change(by func(*faults)) {
	p.mu.Lock()
	defer p.mu.Unlock()
	by(&p.faults)
}

func (p *Proxy) now() faults {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.faults
}

func (p *Proxy) accept() {
	for {
		client, err := p.listener.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			continue
		}
		p.wg.Go(func() {
			server, err := p.dialer.Dial("tcp", p.server)
			if err != nil {
				_ = client.Close()
				return
			}
			p.mu.Lock()
			p.conns[client], p.conns[server] = true, true
			p.opened++
			p.most = max(p.most, len(p.conns)/2)
			p.mu.Unlock()
			end := func() { // of both ways at once
				p.mu.Lock()
				defer p.mu.Unlock()
				for _, c := range []net.Conn{client, server} {
					_ = c.Close()
					delete(p.conns, c)
				}
			}
			p.wg.Go(func() { defer end(); p.toServer(server, client) })
			p.wg.Go(func() { defer end(); p.toClient(client, server) })
		})
	}
}

func (p *Proxy) toServer(server, client net.Conn) {
	b := make([]byte, 1024) // small, so that a throttled one comes in many parts
	for {
		n, err := client.Read(b)
		if f := p.now(); n > 0 && f.rate > 0 {
			select {
			case <-time.After(time.Duration(n) * time.Second / time.Duration(f.rate)):
			case <-f.mended:
			}
		}
		if _, failed := server.Write(b[:n]); err != nil || failed != nil {
			return
		}
	}
}

// said is what a server said, and when.
type said struct {
	bytes []byte
	at    time.Time
}

func (p *Proxy) toClient(client, server net.Conn) {
	queue := make(chan said, 1024)
	p.wg.Go(func() {
		defer close(queue)
		for {
			b := make([]byte, 16<<10)
			n, err := server.Read(b)
			if n > 0 {
				queue <- said{b[:n], time.Now()}
			}
			if err != nil {
				return
			}
		}
	})
	defer func() {
		_ = server.Close()
		for range queue { // until its reader has noticed
		}
	}()
	for s := range queue {
		f := p.now()
		if wait := time.Until(s.at.Add(f.delay)); wait > 0 {
			select {
			case <-time.After(wait):
			case <-f.mended:
			}
			f = p.now()
		}
		if f.hold {
			<-f.mended
			return
		}
		if f.cut {
			return
		}
		if _, err := client.Write(s.bytes); err != nil {
			return
		}
	}
}
