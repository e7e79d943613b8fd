package main

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/sluiceproxy/sluice/k8s/testenv"
)

// shipped is the memory limit of the container that `sluice inject` adds, which
// is also its GOMEMLIMIT.
const shipped = 128 << 20

// shippedProcess is a sluice with the memory of a sidecar.
type shippedProcess struct {
	*process
	group *testenv.MemoryGroup // nil without SLUICE_LONG
}

// startShipped starts sluice with the GOMEMLIMIT of an injected sidecar. With
// SLUICE_LONG=1 it is the program of the image, in a control group that has the
// memory limit of the sidecar's container.
func startShipped(t *testing.T, args ...string) shippedProcess {
	t.Helper()
	t.Setenv("GOMEMLIMIT", strconv.Itoa(shipped))
	if os.Getenv("SLUICE_LONG") == "" {
		return shippedProcess{startSluice(t, args...), nil}
	}
	group := testenv.NewMemoryGroup(t, "sidecar", shipped)
	executable = group.Launcher(t, build(t))
	t.Cleanup(func() { executable = os.Args[0] })
	return shippedProcess{startSluice(t, args...), group}
}

// wantWithin fails the test if the process has ever held more memory than most,
// in bytes, or was killed for it. Without SLUICE_LONG=1 it only logs: the
// test's own program is twice as large.
func (p shippedProcess) wantWithin(t *testing.T, most int) {
	t.Helper()
	used := peak(t, p.cmd.Process.Pid)
	t.Logf("%d MiB at most", used>>20)
	if p.group == nil {
		return
	}
	if used > most {
		t.Errorf("it held %d MiB; want at most %d", used>>20, most>>20)
	}
	if p.group.Killed(t) {
		t.Error("it was killed for want of memory")
	}
}

// manyLimits returns a config with n limits, whose metrics make a scrape large.
func manyLimits(n int) string {
	var b strings.Builder
	b.WriteString("limits:\n")
	for i := range n {
		fmt.Fprintf(&b, "  - {name: limit-%d, match: {paths: [/%d]}, key: client.network, rate: 1000000/s}\n", i, i)
	}
	return b.String()
}

// hold opens n connections from 127.0.0.1, writes text on each, and keeps them
// until the test ends without reading a byte.
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

// scraper returns an HTTP client that connects from an address.
func scraper(address string) *http.Client {
	dialer := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(address)}, Timeout: within}
	return &http.Client{
		Timeout:   within,
		Transport: &http.Transport{DialContext: dialer.DialContext, DisableKeepAlives: true},
	}
}

// TestAttackHTTP checks that idle connections, incomplete requests and unread
// responses neither fill the memory nor keep others out.
func TestAttackHTTP(t *testing.T) {
	idle, unread := 1000, 200
	if os.Getenv("SLUICE_LONG") != "" {
		idle, unread = 10_000, 1000
	}
	p := startShipped(t, "--config", file(t, "sluice.yaml", manyLimits(200)))
	conn := dial(t, p.grpc)
	for i := range 200 { // so that all limits have metrics
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
	p.wantWithin(t, shipped)
}
