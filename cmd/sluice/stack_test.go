package main

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"sync"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"

	"github.com/sluiceproxy/sluice/envoy"
)

// upstream is the server behind Envoy. It sends rate-limit headers that it
// should not, and remembers what it received.
type upstream struct {
	*httptest.Server
	mu   sync.Mutex
	last http.Header
}

func startUpstream(t testing.TB) *upstream {
	t.Helper()
	calls := grpc.NewServer()
	grpc_health_v1.RegisterHealthServer(calls, health.NewServer())
	u := &upstream{}
	mux := http.NewServeMux()
	mux.HandleFunc(
		"/missing",
		func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "no such thing", http.StatusNotFound) },
	)
	mux.HandleFunc(
		"/moved",
		func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, "/elsewhere", http.StatusFound) },
	)
	mux.HandleFunc("/busy", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Retry-After", "120")
		w.WriteHeader(http.StatusServiceUnavailable)
	})
	mux.HandleFunc("/socket", echoSocket)
	mux.HandleFunc("/", func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "hello") })
	u.Server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		u.mu.Lock()
		u.last = r.Header.Clone()
		u.mu.Unlock()
		if strings.HasPrefix(r.Header.Get("Content-Type"), "application/grpc") {
			calls.ServeHTTP(w, r)
			return
		}
		for _, name := range []string{
			"X-Ratelimit-Limit", "X-Ratelimit-Foo", "Ratelimit", "Ratelimit-Policy", "Ratelimit-Bar", "X-Envoy-Ratelimited",
		} {
			w.Header().Add(name, "the upstream's")
		}
		mux.ServeHTTP(w, r)
	}))
	u.Config.Protocols = new(http.Protocols)
	u.Config.Protocols.SetHTTP1(true)
	u.Config.Protocols.SetUnencryptedHTTP2(true)
	u.Start()
	t.Cleanup(u.Close)
	return u
}

// got returns the headers of the latest request.
func (u *upstream) got() http.Header {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.last
}

// forget forgets the latest request.
func (u *upstream) forget() {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.last = http.Header{}
}

// echoSocket hijacks the connection, as for a websocket, sends one line back, and
// waits until the client closes.
func echoSocket(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Connection", "Upgrade")
	w.Header().Set("Upgrade", "websocket")
	w.WriteHeader(http.StatusSwitchingProtocols)
	conn, both, err := http.NewResponseController(w).Hijack()
	if err != nil {
		return
	}
	defer func() { _ = conn.Close() }()
	if line, err := both.ReadString('\n'); err == nil {
		_, _ = both.WriteString("you said " + line)
		_ = both.Flush()
		_, _ = both.ReadByte()
	}
}

// envoyBinary returns a real Envoy, and its release.
func envoyBinary(t testing.TB) (string, envoy.Release) {
	t.Helper()
	binary, err := envoy.Binary(t.Context(), func(s string) { t.Log(s) })
	if err != nil {
		t.Fatal(err)
	}
	release, err := envoy.ReleaseOf(t.Context(), binary)
	if err != nil {
		t.Fatal(err)
	}
	return binary, release
}

// plainEnvoy returns a real Envoy's program, and the shipped bootstrap before the
// upstream.
func plainEnvoy(t testing.TB, sluice, upstream string) (binary string, bootstrap []byte) {
	t.Helper()
	binary, release := envoyBinary(t)
	bootstrap, err := envoy.Plain(envoy.Options{
		Listener: "127.0.0.1:0", Admin: "127.0.0.1:0", Sluice: sluice, Upstream: upstream, Envoy: release,
	})
	if err != nil {
		t.Fatal(err)
	}
	return binary, bootstrap
}

// startEnvoy starts a real Envoy with the shipped bootstrap before the
// upstream, and returns its address.
func startEnvoy(t testing.TB, sluice, upstream string, change ...func(string) string) string {
	t.Helper()
	binary, bootstrap := plainEnvoy(t, sluice, upstream)
	return startEnvoyOn(t, binary, bootstrap, change...)
}

// startLoggingEnvoy is startEnvoy for an Envoy that writes its log and the access
// log to a file. stop stops Envoy, which flushes them, and returns the file's text.
func startLoggingEnvoy(
	t testing.TB, path, sluice, upstream string, change ...func(string) string,
) (addr string, stop func() string) {
	t.Helper()
	log, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = log.Close() })
	binary, bootstrap := plainEnvoy(t, sluice, upstream)
	p, addr := runEnvoyTo(t, log, binary, bootstrap, change...)
	return addr, func() string {
		t.Helper()
		p.Stop()
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		return string(text)
	}
}

// startEnvoyOn is startEnvoy for any bootstrap.
func startEnvoyOn(t testing.TB, binary string, bootstrap []byte, change ...func(string) string) string {
	t.Helper()
	_, addr := runEnvoy(t, binary, bootstrap, change...)
	return addr
}

// runEnvoy starts a real Envoy with a bootstrap, and returns it and its address.
func runEnvoy(
	t testing.TB, binary string, bootstrap []byte, change ...func(string) string,
) (*envoy.Process, string) {
	t.Helper()
	return runEnvoyTo(t, io.Discard, binary, bootstrap, change...)
}

// runEnvoyTo is runEnvoy with a place for Envoy's log.
func runEnvoyTo(
	t testing.TB, log io.Writer, binary string, bootstrap []byte, change ...func(string) string,
) (*envoy.Process, string) {
	t.Helper()
	for _, c := range change {
		changed := c(string(bootstrap))
		if changed == string(bootstrap) {
			t.Fatal("a change of the bootstrap changed nothing")
		}
		bootstrap = []byte(changed)
	}
	p, err := envoy.Start(context.WithoutCancel(t.Context()), binary, bootstrap, log)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Stop)
	addr, err := p.Listener(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return p, addr
}

// client is an HTTP client with connections of its own that follows no
// redirect.
func client(t testing.TB) *http.Client {
	t.Helper()
	transport := &http.Transport{MaxIdleConnsPerHost: 100}
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{
		Transport:     transport,
		Timeout:       within,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
}

// fetch asks for a path, with headers given as name, value, name, value. The
// body is read.
func fetch(t testing.TB, c *http.Client, url string, headers ...string) (*http.Response, string) {
	t.Helper()
	return send(t, c, http.MethodGet, url, headers...)
}

// send is fetch with any method.
func send(t testing.TB, c *http.Client, method, url string, headers ...string) (*http.Response, string) {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), method, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i < len(headers); i += 2 {
		r.Header.Add(headers[i], headers[i+1])
	}
	response, err := c.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = response.Body.Close() }()
	body, err := io.ReadAll(response.Body)
	if err != nil {
		t.Fatal(err)
	}
	return response, string(body)
}

// rawGet requests a target exactly as it is given, on a connection of its own.
func rawGet(t testing.TB, addr, host, target string) *http.Response {
	t.Helper()
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	if _, err := fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n\r\n", target, host); err != nil {
		t.Fatal(err)
	}
	response, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		t.Fatalf("%s: %v", target, err)
	}
	defer func() { _ = response.Body.Close() }()
	return response
}
