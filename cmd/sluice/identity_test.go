package main

import (
	"bytes"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"

	"github.com/sluiceproxy/sluice/limiter/redistest"
)

// TestIdentityThroughEnvoy checks that a client cannot choose its identity,
// through a real Envoy.
func TestIdentityThroughEnvoy(t *testing.T) {
	s := serveRecipe(t, `
client_ip: {xff_from_right: 1, from: ["10.0.0.0/8"]}    # and the peer, here 127.0.0.1, is none of these
headers: [ratelimit]
limits:
  - {name: address, match: {paths: [/address]}, key: client.ip, rate: 1/d, burst: 5}
  - {name: key, match: {paths: [/key]}, key: 'request.headers["x-api-key"]', rate: 1/d, burst: 5}
  - {name: network, match: {paths: [/key]}, key: client.network, rate: 1/d, burst: 30}
`, nil)
	s.want(5, 5, "GET /address")
	for _, xff := range []string{
		"1.1.1.1", "10.0.0.1", "1.1.1.1, 10.0.0.1", "garbage", "", "1.1.1.1:80", "[::1]:80", "127.0.0.1,",
	} {
		s.want(0, 1, "GET /address", "x-forwarded-for", xff)
	}
	// The case of a header's name does not matter. With several headers of that
	// name the key is absent, and the client's network takes its place. A value
	// with a comma is a key.
	s.want(2, 2, "GET /key", "x-api-key", "one")
	s.want(2, 2, "GET /key", "X-API-KEY", "one")
	s.want(1, 2, "GET /key", "X-Api-Key", "one")
	s.want(5, 6, "GET /key", "x-api-key", "one", "x-api-key", "two")
	s.want(0, 1, "GET /key", "x-api-key", "one", "x-api-key", "three")
	s.want(1, 1, "GET /key", "x-api-key", "one,two")
	// A client gets a bucket for each key that it makes up, but the bucket of
	// its network limits it.
	passed := 11
	for i := range 300 {
		passed += s.asks(1, "GET /key", "x-api-key", fmt.Sprint("made-up-", i))
	}
	if passed != 30 {
		t.Errorf("%d passed of a network's 30", passed)
	}
}

// TestIdentity checks the same with checks that no Envoy sends: 10,000 keys
// from one address, and every spelling of an IPv6 address.
func TestIdentity(t *testing.T) {
	p := startSluice(t, "--config", file(t, "sluice.yaml", `
client_ip: {xff_from_right: 1, from: ["10.0.0.0/8", "spiffe://cluster.local/gateway"]}
limits:
  - {name: key, match: {paths: [/key]}, key: 'request.headers["x-api-key"]', rate: 1/d, burst: 5}
  - {name: network, key: client.network, rate: 1/d, burst: 100}
`))
	conn := dial(t, p.grpc)
	ask := func(ip, principal, path string, headers map[string]string) bool {
		t.Helper()
		r := checkRequest(ip, "GET", path, headers)
		r.Attributes.Source.Principal = principal
		switch got := check(t, conn, r); got {
		case "ok":
			return true
		case "429":
		default:
			t.Fatal(got)
		}
		return false
	}
	passed := 0
	for i := range 10_000 {
		if ask("203.0.113.1", "", "/key", map[string]string{"x-api-key": fmt.Sprint(i)}) {
			passed++
		}
	}
	if passed != 100 {
		t.Errorf("%d of 10,000 made-up keys passed a network's 100", passed)
	}
	// All spellings are one network, from peers that are trusted to name the
	// client.
	passed = 0
	for _, address := range []string{
		"2001:db8::1", "2001:DB8::1", "2001:db8:0:0:0:0:0:1", "2001:0db8:0000:0000:0000:0000:0000:0001", "[2001:db8::1]",
		"[2001:db8::1]:443", "2001:db8::2",
		"2001:db8::ffff:ffff", "2001:db8:0:0:ffff:ffff:ffff:ffff", " 2001:db8::1 ", "2001:db8::192.0.2.1",
		"1.1.1.1, 2001:db8::1", "forged,, 2001:db8::7",
	} {
		for range 20 {
			if ask("10.0.0.1", "", "/", map[string]string{"x-forwarded-for": address}) {
				passed++
			}
			if ask("172.16.0.1", "spiffe://cluster.local/gateway", "/", map[string]string{"x-forwarded-for": address}) {
				passed++
			}
		}
	}
	if passed != 100 {
		t.Errorf("%d passed of the /64's 100", passed)
	}
	if !ask("10.0.0.1", "", "/", map[string]string{"x-forwarded-for": "2001:db8:0:1::1"}) {
		t.Error("another /64 is held by this one's bucket")
	}
	// From a peer that is not trusted, the client is the peer.
	for range 100 {
		ask("172.16.0.1", "spiffe://cluster.local/other", "/", map[string]string{"x-forwarded-for": "198.51.100.1"})
	}
	if ask("172.16.0.1", "", "/", map[string]string{"x-forwarded-for": "198.51.100.2"}) ||
		!ask("10.0.0.1", "", "/", map[string]string{"x-forwarded-for": "198.51.100.1"}) {
		t.Error("a peer that may not say who its client is was believed")
	}
}

// TestSecretsStayHidden checks that a secret of a client appears nowhere: not
// in Redis, in the commands to it, in the log, the metrics, the pages, the
// responses or the output of explain.
func TestSecretsStayHidden(t *testing.T) {
	const canary = "c4n4ry-s3cr3t"
	redis := redistest.Start(t)
	config := file(t, "sluice.yaml", `
log_level: debug
headers: [x-ratelimit, retry-after, ratelimit]
limits:
  - {name: key, rate: 1/d, burst: 2, key: 'request.headers["x-api-key"]'}
  - {name: parts, rate: 1/d, burst: 2, key: ['request.headers.cookie', 'request.query', 'request.path', 'request.id', 'context.token']}
  - {name: claim, rate: 1/d, burst: 2, key: 'metadata.filter_metadata["envoy.filters.http.jwt_authn"].payload.sub', overrides: [{key: other, rate: 1/h}]}
  - {name: derived, rate: 1/d, burst: 2, key: 'request.headers["x-api-key"].upperAscii() + "|" + request.method'}
  - {name: mistake, match: {paths: [/mistake]}, rate: 1/d, burst: 2, key: 'int(request.headers["x-api-key"])'}
  - {name: shadow-mistake, mode: shadow, rate: 1/d, burst: 2, when: 'request.headers["x-api-key"].split("-")[7] == ""'}
`)
	p := startSluice(t, "--config", config, "--redis", redis.URL())
	wire := monitor(t, strings.TrimPrefix(redis.URL(), "unix://"))
	conn := dial(t, p.grpc)
	var answers bytes.Buffer
	for _, path := range []string{"/a?token=" + canary, "/a?token=" + canary, "/a?token=" + canary, "/mistake?" + canary} {
		r := checkRequest("203.0.113.1", "GET", path, map[string]string{
			"x-api-key": canary, "cookie": "session=" + canary, "x-request-id": canary + "!",
			"authorization": "Bearer " + canary, "x-sluice-shadow": canary,
		})
		r.Attributes.ContextExtensions = map[string]string{"token": canary}
		answer, err := authv3.NewAuthorizationClient(conn).Check(t.Context(), r)
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintln(&answers, answer)
	}
	if !strings.Contains(answers.String(), "code:429") && !strings.Contains(answers.String(), "TooManyRequests") {
		t.Errorf("nothing was limited: %s", answers.String())
	}
	client := redis.Client()
	if err := client.Save(t.Context()).Err(); err != nil {
		t.Fatal(err)
	}
	dir := client.ConfigGet(t.Context(), "dir").Val()["dir"]
	rdb, err := os.ReadFile(filepath.Join(dir, client.ConfigGet(t.Context(), "dbfilename").Val()["dbfilename"]))
	if err != nil {
		t.Fatal(err)
	}
	if err := client.Echo(t.Context(), "the-end").Err(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the last command", func() bool { return strings.Contains(wire(), "the-end") })
	_, metrics := get(t, "http://"+p.metrics+"/metrics")
	_, stacks := get(t, "http://"+p.admin+"/debug/pprof/goroutine?debug=2")
	status, explained, stderr := sluice(
		t, nil, "explain", "--config", config, "--path", "/a?token="+canary, "--header", "x-api-key="+canary, "--context",
		"token="+canary,
	)
	_, explainedJSON, _ := sluice(
		t, nil, "explain", "--config", config, "--path", "/mistake", "--header", "x-api-key="+canary, "-o", "json",
	)
	if status != 0 {
		t.Errorf("explain: %d %s", status, stderr)
	}
	_, explained, _ = strings.Cut(explained, "\n") // the first line repeats the request
	for name, text := range map[string]string{
		"the RDB file": string(rdb), "Redis's wire": wire(), "the log": p.logged(), "the metrics": metrics,
		"the stacks": stacks, "the answers": answers.String(),
		"explain": explained, "explain in JSON": explainedJSON,
	} {
		if len(text) < 100 {
			t.Errorf("%s: only %q", name, text)
		}
		if strings.Contains(strings.ToLower(text), canary) {
			t.Errorf("%s has the secret", name)
		}
	}
	for _, want := range []string{"sluice:default:key:{#43.", "sluice:default:claim:{~11.203.0.113.1}"} {
		if !strings.Contains(wire(), want) {
			t.Errorf("Redis's wire does not have %s", want)
		}
	}
}

// monitor returns a function that returns all commands that Redis received
// since, by MONITOR.
func monitor(t *testing.T, socket string) func() string {
	t.Helper()
	conn, err := net.Dial("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	var seen bytes.Buffer
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		b := make([]byte, 4096)
		for {
			n, err := conn.Read(b)
			mu.Lock()
			seen.Write(b[:n])
			mu.Unlock()
			if err != nil {
				return
			}
		}
	}()
	t.Cleanup(func() {
		_ = conn.Close()
		<-ended
	})
	if _, err := conn.Write([]byte("MONITOR\r\n")); err != nil {
		t.Fatal(err)
	}
	read := func() string {
		mu.Lock()
		defer mu.Unlock()
		return seen.String()
	}
	eventually(t, "an answer of Redis", func() bool { return strings.HasPrefix(read(), "+OK") })
	return read
}

// TestREADMEPage checks the custom page for a 429 in authz/README.md.
func TestREADMEPage(t *testing.T) {
	page := block(t, section(t, authzReadme, "## Pages of your own"), "yaml")
	s := serveRecipe(t, "limits: [{name: a, rate: 1/d}]\n", nil, func(b string) string {
		return strings.Replace(b, "          stat_prefix: ingress\n", "          stat_prefix: ingress\n"+indent(page, 10), 1)
	})
	s.want(1, 1, "GET /")
	r, body := fetch(t, s.c, "http://"+s.addr+"/")
	if r.StatusCode != http.StatusTooManyRequests || body != "Slow down, please.\n" || r.Header.Get("Retry-After") == "" {
		t.Errorf("%d %v %q", r.StatusCode, r.Header, body)
	}
}
