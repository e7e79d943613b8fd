package main

import (
	"bufio"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
)

// echoing accepts connections and echoes what they receive.
func echoing(t *testing.T, most int) *boundedListener {
	t.Helper()
	raw, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l := bounded(raw, most)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for c, err := l.Accept(); err == nil; c, err = l.Accept() {
			go func() {
				_, _ = io.Copy(c, c)
				_ = c.Close()
			}()
		}
	}()
	t.Cleanup(func() {
		_ = l.Close()
		<-done
	})
	return l
}

// dialFrom connects from a loopback address. It returns nil if the connection
// is refused.
func dialFrom(t *testing.T, address string, to net.Addr) net.Conn {
	t.Helper()
	c, err := (&net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(address)}}).Dial("tcp", to.String())
	if errors.Is(err, syscall.ECONNRESET) {
		return nil // closed by the listener at once
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	_ = c.SetDeadline(time.Now().Add(within))
	return c
}

// echoes reports whether what is written on a connection comes back.
func echoes(c net.Conn) bool {
	if c == nil {
		return false
	}
	if _, err := c.Write([]byte("x")); err != nil {
		return false
	}
	_, err := io.ReadFull(c, make([]byte, 1))
	return err == nil
}

// TestBoundedListener checks that a client with all connections makes room for
// another address, even if all of them are busy, and for itself only if one is
// silent.
func TestBoundedListener(t *testing.T) {
	l := echoing(t, 4)
	var many []net.Conn
	accepted := func() int {
		l.mu.Lock()
		defer l.mu.Unlock()
		return len(l.conns)
	}
	for i := range 4 {
		many = append(many, dialFrom(t, "127.0.0.1", l.Addr()))
		eventually(t, "an accepted connection", func() bool { return accepted() == i+1 })
	}
	// shift moves the times of the listener's connections, so that the test
	// does not depend on the speed of the machine.
	shift := func(d time.Duration) {
		l.mu.Lock()
		defer l.mu.Unlock()
		for c := range l.conns {
			c.active.Add(d.Nanoseconds())
		}
	}
	shift(time.Hour)
	if echoes(dialFrom(t, "127.0.0.1", l.Addr())) {
		t.Error("a fifth connection was let in while four of its address are busy")
	}
	for _, address := range []string{"127.0.0.2", "127.0.0.3"} {
		if !echoes(dialFrom(t, address, l.Addr())) {
			t.Errorf("%s has no place although another address holds most of them", address)
		}
	}
	if echoes(many[0]) || echoes(many[1]) {
		t.Error("others than those that were silent for longest were closed")
	}
	if !echoes(many[2]) || !echoes(many[3]) {
		t.Error("more were closed than there had to be")
	}
	// A silent connection makes room for its own address. This is tried
	// repeatedly, because a connection can become busy again just after its
	// answer.
	eventually(t, "room for another connection", func() bool {
		shift(-time.Hour)
		return echoes(dialFrom(t, "127.0.0.1", l.Addr()))
	})
	_ = many[3].Close()
	eventually(t, "removal from the listener", func() bool {
		l.mu.Lock()
		defer l.mu.Unlock()
		return len(l.conns) <= 4 && len(l.held) <= 3
	})
}

// TestScrapeEncodings checks that a scrape is the same with gzip and without.
func TestScrapeEncodings(t *testing.T) {
	for header, want := range map[string]bool{
		"": false, "gzip": true, "deflate, gzip;q=0.5": true, "gzip;q=0": false, "gzip; q=0.0": false, "identity": false,
		"gzip;q=x": false, "br,gzip": true,
	} {
		if got := acceptsGzip(http.Header{"Accept-Encoding": {header}}); got != want {
			t.Errorf("%q: %v", header, got)
		}
	}
	registry := prometheus.NewRegistry()
	registry.MustRegister(prometheus.NewCounter(prometheus.CounterOpts{Name: "a_total", Help: "Total number of a."}))
	h := scrapeHandler(registry, zap.NewNop(), promhttp.HandlerOpts{})
	for accepted, encoding := range map[string]string{"": "", "gzip": "gzip"} {
		r := httptest.NewRequest(http.MethodGet, "/metrics", nil)
		r.Header.Set("Accept-Encoding", accepted)
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		var body io.Reader = w.Body
		if encoding != "" {
			var err error
			if body, err = gzip.NewReader(w.Body); err != nil {
				t.Fatal(err)
			}
		}
		text, err := io.ReadAll(body)
		if err != nil || w.Header().Get("Content-Encoding") != encoding || !strings.Contains(string(text), "\na_total 0\n") {
			t.Errorf("%q: %v, %v, %s", accepted, err, w.Header(), text)
		}
	}
}

// Of the lines that peers can cause, one in a while is logged, with how many
// there were before.
func TestSeldomLog(t *testing.T) {
	core, logged := observer.New(zap.WarnLevel)
	s := &throttledLog{log: zap.New(core)}
	for i := range 100 {
		_, _ = fmt.Fprintf(s, "http: TLS handshake error from 10.0.0.1:%d: EOF\n", i)
	}
	_, _ = io.WriteString(s, "http: something else\n")
	if got := logged.All(); len(got) != 2 || got[0].Message != "http: TLS handshake error from 10.0.0.1:0: EOF" {
		t.Fatalf("%v", got)
	}
	s.handshakes.next = time.Time{} // ten seconds later
	_, _ = io.WriteString(s, "http: TLS handshake error from 10.0.0.1:1: EOF\n")
	if got := logged.All(); len(got) != 3 || got[2].ContextMap()["omitted_before"] != int64(99) {
		t.Errorf("%v", got)
	}
}

// TestServerTimes checks the timeouts of a request header, a request body and a
// response that nobody reads.
func TestServerTimes(t *testing.T) {
	raw, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	const short = 200 * time.Millisecond
	answering := make(chan bool, 1)
	s := newServer(raw, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if _, err := io.Copy(io.Discard, r.Body); err != nil {
			return
		}
		answering <- true
		for range 64 {
			if _, err := w.Write(make([]byte, 1<<20)); err != nil {
				return
			}
		}
	}), zap.NewNop(), bounds{read: short, write: short, idle: short})
	served := make(chan error, 1)
	go func() { served <- s.run() }()
	t.Cleanup(func() {
		_ = s.Close()
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
	for name, text := range map[string]string{
		"nothing":       "",
		"half a header": "GET / HTTP/1.1\r\nHost:",
		"half a body":   "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nhalf",
		"unread":        "GET / HTTP/1.1\r\nHost: x\r\n\r\n",
	} {
		c := dialFrom(t, "127.0.0.1", raw.Addr())
		_, _ = io.WriteString(c, text)
		l := s.listener.(*boundedListener)
		isRemoved := func() bool {
			l.mu.Lock()
			defer l.mu.Unlock()
			return len(l.conns) == 0
		}
		if name == "unread" {
			select {
			case <-answering:
			case <-time.After(within):
				t.Fatal("nothing is answered")
			}
			eventually(t, "removal from the listener", isRemoved)
			if n, err := io.Copy(io.Discard, bufio.NewReader(c)); err == nil && n >= 64<<20 {
				t.Error("all of an answer that nobody read was kept")
			}
			continue
		}
		if err := c.SetReadDeadline(time.Now().Add(within)); err != nil {
			t.Fatal(err)
		}
		if _, err := io.Copy(io.Discard, c); errors.Is(err, os.ErrDeadlineExceeded) { // the server closes it
			t.Errorf("%s: the connection stays", name)
		}
		eventually(t, "removal from the listener", isRemoved)
	}
}
