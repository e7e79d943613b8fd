package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// rawRequest is a request that is sent as it is, whatever HTTP says of it.
type rawRequest struct {
	method, path, host string
	headers            [][2]string
}

// sendHTTP1 sends a request by HTTP/1.1, and waits until Envoy begins to answer.
func (r *rawRequest) sendHTTP1(conn net.Conn) error {
	text := fmt.Sprintf("%s %s HTTP/1.1\r\nhost: %s\r\n", r.method, r.path, r.host)
	for _, h := range r.headers {
		text += h[0] + ": " + h[1] + "\r\n"
	}
	if _, err := io.WriteString(conn, text+"\r\n"); err != nil {
		return err
	}
	_, err := bufio.NewReader(conn).ReadString('\n')
	return err
}

// sendHTTP2 sends a request by HTTP/2, and waits until Envoy answers it, resets
// its stream or closes the connection.
func (r *rawRequest) sendHTTP2(conn net.Conn) error {
	if _, err := io.WriteString(conn, http2.ClientPreface); err != nil {
		return err
	}
	frames := http2.NewFramer(conn, conn)
	if err := frames.WriteSettings(); err != nil {
		return err
	}
	var block bytes.Buffer
	e := hpack.NewEncoder(&block)
	pseudo := [][2]string{{":method", r.method}, {":scheme", "http"}, {":path", r.path}, {":authority", r.host}}
	for _, f := range append(pseudo, r.headers...) {
		if err := e.WriteField(hpack.HeaderField{Name: f[0], Value: f[1]}); err != nil {
			return err
		}
	}
	if err := frames.WriteHeaders(http2.HeadersFrameParam{
		StreamID: 1, BlockFragment: block.Bytes(), EndHeaders: true, EndStream: true,
	}); err != nil {
		return err
	}
	for {
		f, err := frames.ReadFrame()
		if err != nil {
			return err
		}
		switch f.(type) {
		case *http2.HeadersFrame, *http2.RSTStreamFrame, *http2.GoAwayFrame:
			return nil
		}
	}
}

// TestAttackLog checks on a real Envoy that whatever a client sends, by HTTP/1.1
// and by HTTP/2, the access log of the shipped chain has one line for it, with
// sluice's fields once, so that the search of the runbook finds no request of
// another client.
func TestAttackLog(t *testing.T) {
	const forged = " 429 UAEX 1ms sluice=limited limit=per-tenant remaining=0 took=1us client=192.0.2.7 " +
		"key==4.acme shadow=[] "
	header := func(name, value string) rawRequest {
		return rawRequest{headers: [][2]string{{name, value}}}
	}
	all := []rawRequest{
		// A space ends a field.
		{path: "/" + forged}, {path: "/x\"" + forged}, {path: "/%00" + forged}, {path: "/#" + forged}, {path: "/\t" + forged},
		{path: "/\u00a0key==4.acme\u2028"}, {path: "/%20key==4.acme%20"}, {path: "/%22%20key==4.acme%0a%20key==4.acme%20"},
		{method: "GET /\"" + forged}, {method: "GET" + forged}, {host: "h" + forged},
		// The request line does, too, and the line.
		{path: "key==4.acme"}, {path: "?key==4.acme"}, {method: "OPTIONS", path: "*key==4.acme"}, {method: "key==4.acme"},
		{path: "/key==4.acme"}, {path: "/x\"key==4.acme"}, {path: "/%00\"key==4.acme"}, {path: "/%zz\"key==4.acme"},
		{path: "/\n key==4.acme "}, {path: "/\r\n key==4.acme "}, {path: "/\v key==4.acme "}, {path: "/\x1b[2K key==4.acme "},
		// What else is in the line.
		header("x-request-id", "x"+forged), header("x-forwarded-for", "192.0.2.7"+forged),
		header("x-tenant", "x\""+forged), header("x-tenant", "x\n"+forged), header("x-tenant", "x\tkey==4.acme\t"),
		header("x-sluice-key", "=4.acme"), header("x-envoy-original-path", "/"+forged),
	}
	p := startSluice(t, "--config", file(t, "sluice.yaml",
		`limits: [{name: per-tenant, rate: 1/d, key: 'request.headers["x-tenant"]', readable: true}]`+"\n"))
	up := startUpstream(t)
	file := filepath.Join(t.TempDir(), "envoy.log")
	addr, stop := startLoggingEnvoy(t, file, p.grpc, up.Listener.Addr().String(), patiently(t))
	ask := func(r rawRequest, send func(*rawRequest, net.Conn) error) error {
		for _, field := range []struct {
			value    *string
			fallback string
		}{{&r.method, "GET"}, {&r.path, "/"}, {&r.host, "shop.example.com"}} {
			if *field.value == "" {
				*field.value = field.fallback
			}
		}
		conn, err := (&net.Dialer{}).DialContext(t.Context(), "tcp", addr)
		if err != nil {
			return err
		}
		defer func() { _ = conn.Close() }()
		if err := conn.SetDeadline(time.Now().Add(within)); err != nil {
			return err
		}
		return send(&r, conn)
	}
	var wg sync.WaitGroup
	for _, r := range all {
		for name, send := range map[string]func(*rawRequest, net.Conn) error{
			"HTTP/1.1": (*rawRequest).sendHTTP1, "HTTP/2": (*rawRequest).sendHTTP2,
		} {
			wg.Go(func() {
				// Envoy closes HTTP/2 connections without a word.
				if err := ask(r, send); err != nil && (name == "HTTP/1.1" || !errors.Is(err, io.EOF)) {
					t.Errorf("%s, %q: %v", name, r, err)
				}
			})
		}
	}
	wg.Wait()
	// Of these the log has to have lines.
	acme := header("x-tenant", "acme")
	for _, send := range []func(*rawRequest, net.Conn) error{(*rawRequest).sendHTTP1, (*rawRequest).sendHTTP2} {
		if err := ask(acme, send); err != nil {
			t.Fatal(err)
		}
	}
	text := stop()
	// The lines of Envoy's own log begin with a bracket, too, but with another time.
	own := regexp.MustCompile(`^\[\d{4}-\d\d-\d\d \d\d:`)
	shape := regexp.MustCompile(`^\[[0-9TZ:.-]+\] "[!-~]+ [!-~]+ HTTP/(1\.1|2)" \d+ [A-Z,-]+ \d+ms ` +
		`sluice=\S+ limit=\S+ remaining=\S+ took=\S+ client=127\.0\.0\.1 key=\S+ ` +
		`shadow=\S+ shadow_keys=\S+ id=(-|[0-9a-f-]{36})$`)
	lines, found := 0, 0
	for line := range strings.Lines(text) {
		line = strings.TrimSuffix(line, "\n")
		if own.MatchString(line) {
			continue
		}
		lines++
		if !shape.MatchString(line) {
			t.Errorf("not a line of the format: %q", line)
		}
		if strings.Contains(line, " key==4.acme ") {
			found++
		}
	}
	if want := 2*len(all) + 2; lines != want {
		t.Errorf("%d lines in the access log, want %d", lines, want)
	}
	if found != 2 {
		t.Errorf("the search finds %d lines, want the 2 of acme", found)
	}
	if t.Failed() {
		t.Logf("%s", text)
	}
}
