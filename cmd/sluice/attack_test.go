package main

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"testing"
	"time"
)

// shipped is the memory limit of the container that `sluice inject` adds, which is also its GOMEMLIMIT.
const shipped = 128 << 20

// startShipped runs sluice as the image has it, with the memory that a sidecar has.
func startShipped(t *testing.T, args ...string) *process {
	t.Helper()
	t.Setenv("GOMEMLIMIT", fmt.Sprint(shipped))
	if os.Getenv("SLUICE_LONG") != "" {
		executable = build(t)
		t.Cleanup(func() { executable = os.Args[0] })
	}
	return startSluice(t, args...)
}

// wantWithin fails the test if a process has ever held more memory than the sidecar's container may. Pages of the program's file do not
// count: they stay in memory only while there is room. With -race it says nothing, as everything is several times larger then, nor of a
// test's own program, which is twice as large.
func (p *process) wantWithin(most int) {
	p.t.Helper()
	pid := p.cmd.Process.Pid
	files := memory(p.t, pid, "RssFile")
	used := peak(p.t, pid) - files
	p.t.Logf("%d MiB at most, and %d MiB of its file", used>>20, files>>20)
	if os.Getenv("SLUICE_LONG") != "" && !race && used > most {
		p.t.Errorf("it held %d MiB; want at most %d", used>>20, most>>20)
	}
}

// manyLimits is a config with so many limits, whose metrics make a scrape large.
func manyLimits(n int) string {
	var b strings.Builder
	b.WriteString("limits:\n")
	for i := range n {
		fmt.Fprintf(&b, "  - {name: limit-%d, match: {paths: [/%d]}, key: client.network, rate: 1000000/s}\n", i, i)
	}
	return b.String()
}

// hold opens n connections from 127.0.0.1, writes text on each, and keeps them until the test ends without reading a byte.
func hold(t *testing.T, n int, addr, text string) {
	t.Helper()
	var mu sync.Mutex
	var all []net.Conn
	t.Cleanup(func() {
		for _, c := range all {
			_ = c.Close()
		}
	})
	var wg sync.WaitGroup
	for range 16 {
		wg.Go(func() {
			for range n / 16 {
				c, err := net.Dial("tcp", addr)
				if err != nil {
					continue // refused, as it may be
				}
				_ = c.(*net.TCPConn).SetReadBuffer(4096)
				_, _ = io.WriteString(c, text) // it may be closed already
				mu.Lock()
				all = append(all, c)
				mu.Unlock()
			}
		})
	}
	wg.Wait()
}

// scraper is a client with an address of its own.
func scraper(address string) *http.Client {
	dialer := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(address)}, Timeout: within}
	return &http.Client{Timeout: within, Transport: &http.Transport{DialContext: dialer.DialContext, DisableKeepAlives: true}}
}

// Connections that do nothing, requests that are sent by halves, and answers that nobody reads neither fill the memory nor keep others
// out.
func TestAttackHTTP(t *testing.T) {
	idle, unread := 1000, 200
	if os.Getenv("SLUICE_LONG") != "" {
		idle, unread = 10_000, 1000
	}
	p := startShipped(t, "--config", file(t, "sluice.yaml", manyLimits(200)))
	conn := dial(t, p.grpc)
	for i := range 200 { // so that all limits have something to tell
		check(t, conn, checkRequest("203.0.113.1", "GET", fmt.Sprint("/", i), nil))
	}
	for _, l := range []struct{ addr, path string }{{p.metrics, "/metrics"}, {p.admin, "/api/limits?n=1000"}} {
		hold(t, idle/2, l.addr, "")
		hold(t, idle/4, l.addr, "GET "+l.path+" HTTP/1.1\r\nHost: localhost\r\n")
		hold(t, unread/2, l.addr, strings.Repeat("GET "+l.path+" HTTP/1.1\r\nHost: localhost\r\n\r\n", 10))
		honest := scraper("127.0.0.2")
		for _, path := range []string{l.path, "/metrics", "/healthz"} {
			if path != l.path && l.addr != p.metrics {
				continue
			}
			began := time.Now()
			r, body := fetch(t, honest, "http://"+l.addr+path)
			if r.StatusCode != http.StatusOK || path == l.path && !strings.Contains(body, "limit-199") {
				t.Errorf("%s: %d, %d bytes", path, r.StatusCode, len(body))
			}
			t.Logf("%s%s after %v", l.addr, path, time.Since(began))
		}
	}
	if got := check(t, conn, checkRequest("203.0.113.1", "GET", "/1", nil)); got != "ok" {
		t.Errorf("a check: %s", got)
	}
	p.wantWithin(shipped)
}
