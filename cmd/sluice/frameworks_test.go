package main

import (
	"bufio"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"os"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/goccy/go-yaml"

	"github.com/sluiceproxy/sluice/envoy"
)

// frameworkLimits limits and exempts the routes that every framework under test
// has, on HOSTS. PATHS and MATCH extend the match of the limit. Nothing is ever
// denied, so that the framework answers every request.
const frameworkLimits = `
exempt:
  - match: {hosts: HOSTS, paths: [/healthz, "/static/**"]}
limits:
  - name: limited
    match: {hosts: HOSTS, paths: ["/v1/orders/{id}", /public/admin, "/admin/**"PATHS]MATCH}
    rate: 1000000/s
    burst: 1000000000
`

// framework is an application whose responses name the handler that ran, in
// x-handler: limited and exempt for the paths and hosts of frameworkLimits,
// else other. A request that is refused before any handler runs has no such
// header.
type framework struct {
	name string
	// hosts are the hosts of frameworkLimits that the framework's router
	// supports; nil means all of spellingDomains.
	hosts []string
	// paths and match extend the limit's match by what, according to the
	// README, the framework reads differently.
	paths, match string
	habit        habit
	// start returns the host:port where the application listens until the
	// test ends.
	start func(*testing.T) string
}

// TestFrameworksServeMux is TestFrameworks with net/http's own router only.
func TestFrameworksServeMux(t *testing.T) {
	n := 3000
	if os.Getenv("SLUICE_LONG") != "" {
		n = 20000
	}
	tryFramework(
		t, framework{name: "ServeMux", hosts: spellingDomains[:1], habit: hostCase, start: startServeMux},
		generateSpellings(n), 0,
	)
}

// TestFrameworks checks, for many spellings of path and host, that what a
// framework routes to a limited handler was charged, and that what was exempt
// went to the exempt handler.
func TestFrameworks(t *testing.T) {
	if os.Getenv("SLUICE_LONG") == "" {
		t.Skip("installs frameworks, and takes minutes: SLUICE_LONG=1")
	}
	const ignoreCase = ", ignore_case: true"
	all := generateSpellings(20000)
	for i, f := range []framework{
		{name: "Express 5", match: ignoreCase, start: node("express.js", "express")},
		{name: "Express 4", match: ignoreCase, start: node("express.js", "express4")},
		{name: "Fastify", paths: ", /v1/orders", start: node("fastify.js", "strict")},
		{name: "Fastify, lenient", match: ignoreCase, start: node("fastify.js", "lenient")},
		{name: "Flask on Waitress", habit: emptySegment, start: python("flask_app.py", "waitress")},
		{name: "Flask on Werkzeug", habit: emptySegment, start: python("flask_app.py", "werkzeug")},
		{
			name: "Starlette on Uvicorn, h11", hosts: spellingDomains[:2], habit: hostCase,
			start: python("starlette_app.py", "h11"),
		},
		{
			name: "Starlette on Uvicorn, httptools", hosts: spellingDomains[:2], habit: hostCase,
			start: python("starlette_app.py", "httptools"),
		},
		{name: "Javalin", start: java("javalin")},
		{name: "Spring", start: java("spring")},
	} {
		t.Run(f.name, func(t *testing.T) { tryFramework(t, f, all, i) })
	}
}

// habit is a behaviour of an application that lets requests slip into an
// exemption, unless it is configured as the README says.
type habit int

const (
	_ habit = iota
	// hostCase takes a host in upper case for a different one. Routing by host
	// in Envoy prevents that.
	hostCase
	// emptySegment does not route /static//a like /static/a. If Envoy merges
	// slashes, including encoded ones, that is prevented.
	emptySegment
)

// envoyVariant is a way to set up the shipped filter chain's
// HttpConnectionManager.
type envoyVariant struct {
	name   string
	change func(manager map[string]any, hosts []string)
	hosts  hostRouting
	merged bool // no slashes follow each other in what it passes on, encoded ones included
}

// hostRouting is who routes by host.
type hostRouting int

const (
	frameworkRoutes   hostRouting = iota // the framework, by what Envoy passes on
	envoyRoutes                          // Envoy
	envoyRoutesByPort                    // Envoy, for which a host with a port is another, or one with two
)

// excuses reports whether the README says that an exemption may apply here to
// what is routed elsewhere, and which setting prevents that.
func (f framework) excuses(s spelling, v envoyVariant) bool {
	switch {
	case v.hosts == envoyRoutesByPort && strings.LastIndexByte(s.authority, ':') > strings.LastIndexByte(s.authority, ']'):
		return true
	case f.habit == hostCase:
		return v.hosts == frameworkRoutes && strings.ToLower(s.authority) != s.authority
	case f.habit == emptySegment:
		return !v.merged && emptySegments.MatchString(s.target)
	}
	return false
}

// emptySegments matches consecutive slashes, encoded or not.
var emptySegments = regexp.MustCompile(`(?i)(/|%2f|\\|%5c){2}`)

// envoyVariants are settings that change how Envoy, or what is behind it, reads
// a path or a host.
var envoyVariants = []envoyVariant{
	{name: "as shipped", change: set()},
	{name: "as is", change: set("normalize_path", false, "merge_slashes", false)},
	{name: "slashes not merged", change: set("merge_slashes", false)},
	{name: "escaped slashes kept", change: set("path_with_escaped_slashes_action", "KEEP_UNCHANGED")},
	{name: "escaped slashes refused", change: set("path_with_escaped_slashes_action", "REJECT_REQUEST"), merged: true},
	{
		name:   "escaped slashes redirected",
		change: set("path_with_escaped_slashes_action", "UNESCAPE_AND_REDIRECT"),
		merged: true,
	},
	{
		name:   "escaped slashes unescaped",
		change: set("path_with_escaped_slashes_action", "UNESCAPE_AND_FORWARD"),
		merged: true,
	},
	{
		name: "as is, escaped slashes unescaped",
		change: set(
			"normalize_path", false, "merge_slashes", false, "path_with_escaped_slashes_action", "UNESCAPE_AND_FORWARD",
		),
	},
	{name: "ports stripped", change: set("strip_any_host_port", true)},
	{name: "final dots stripped", change: set("strip_any_host_port", true, "strip_trailing_host_dot", true)},
	{name: "by host", change: byHost, hosts: envoyRoutesByPort},
	{name: "by host, ports ignored", change: func(m map[string]any, hosts []string) {
		byHost(m, hosts)
		routes(m)["ignore_port_in_host_matching"] = true
	}, hosts: envoyRoutes},
	{name: "by host, ports stripped", change: byHostAnd("strip_any_host_port", true), hosts: envoyRoutesByPort},
	{name: "by host, as is", change: byHostAnd("normalize_path", false, "merge_slashes", false), hosts: envoyRoutesByPort},
}

func set(fields ...any) func(map[string]any, []string) {
	return func(m map[string]any, _ []string) {
		for i := 0; i < len(fields); i += 2 {
			m[fields[i].(string)] = fields[i+1]
		}
	}
}

func routes(manager map[string]any) map[string]any { return manager["route_config"].(map[string]any) }

// byHost makes Envoy's virtual hosts route by host, so that the framework
// learns of the host only what Envoy took it for.
func byHost(manager map[string]any, hosts []string) {
	virtual := func(name, rewritten string, domains ...string) map[string]any {
		return map[string]any{"name": name, "domains": domains, "routes": []any{map[string]any{
			"match": map[string]any{"prefix": "/"},
			"route": map[string]any{"cluster": "upstream", "host_rewrite_literal": rewritten},
		}}}
	}
	routes(manager)["virtual_hosts"] = []any{
		virtual("ours", "api.example.com", hosts...),
		virtual("others", "other.example.com", "*"),
	}
}

func byHostAnd(fields ...any) func(map[string]any, []string) {
	return func(m map[string]any, hosts []string) {
		byHost(m, hosts)
		set(fields...)(m, hosts)
	}
}

// startVariants starts one Envoy with a listener for each of envoyVariants, and
// returns their addresses. Its responses have the decision of sluice in
// x-decision.
func startVariants(t *testing.T, sluice, upstream string, hosts []string) []string {
	t.Helper()
	binary, err := envoy.Binary(t.Context(), func(s string) { t.Log(s) })
	if err != nil {
		t.Fatal(err)
	}
	// On a busy machine Envoy must not answer by itself.
	const timeout = "10s"
	plain, err := envoy.Plain(
		envoy.Options{Listener: "127.0.0.1:0", Admin: "127.0.0.1:0", Sluice: sluice, Upstream: upstream},
	)
	if err != nil {
		t.Fatal(err)
	}
	var bootstrap map[string]any
	var listeners []any
	for _, v := range envoyVariants {
		bootstrap = nil
		if err := yaml.Unmarshal(plain, &bootstrap); err != nil {
			t.Fatal(err)
		}
		listener := bootstrap["static_resources"].(map[string]any)["listeners"].([]any)[0].(map[string]any)
		listener["name"] = v.name
		filter := listener["filter_chains"].([]any)[0].(map[string]any)["filters"].([]any)[0].(map[string]any)
		manager := filter["typed_config"].(map[string]any)
		v.change(manager, hosts)
		for _, f := range manager["http_filters"].([]any) {
			if f := f.(map[string]any); f["name"] == "envoy.filters.http.ext_authz" {
				f["typed_config"].(map[string]any)["grpc_service"].(map[string]any)["timeout"] = timeout
			}
		}
		routes(manager)["response_headers_to_add"] = []any{map[string]any{
			"header": map[string]any{"key": "x-decision", "value": "%DYNAMIC_METADATA(envoy.filters.http.ext_authz:decision)%"},
		}}
		listeners = append(listeners, listener)
	}
	resources := bootstrap["static_resources"].(map[string]any)
	resources["listeners"] = listeners
	for _, cluster := range resources["clusters"].([]any) {
		cluster.(map[string]any)["connect_timeout"] = timeout
	}
	text, err := json.Marshal(bootstrap) // which is YAML, too
	if err != nil {
		t.Fatal(err)
	}
	p, err := envoy.Start(context.WithoutCancel(t.Context()), binary, text, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Stop)
	admin, err := p.Admin()
	if err != nil {
		t.Fatal(err)
	}
	_, list := get(t, "http://"+admin+"/listeners")
	addresses := map[string]string{}
	for line := range strings.Lines(list) {
		name, address, _ := strings.Cut(strings.TrimSpace(line), "::")
		addresses[name] = address
	}
	var all []string
	for _, v := range envoyVariants {
		all = append(all, addresses[v.name])
	}
	return all
}

// tryFramework sends spellings through Envoy and sluice to a framework, each
// through one of envoyVariants in turn, beginning at first.
func tryFramework(t *testing.T, f framework, all []spelling, first int) {
	upstream := f.start(t)
	if f.hosts == nil {
		f.hosts = spellingDomains
	}
	hosts, err := json.Marshal(f.hosts) // which is YAML, too
	if err != nil {
		t.Fatal(err)
	}
	p := startSluice(
		t,
		"--config",
		file(
			t, "sluice.yaml",
			strings.NewReplacer("HOSTS", string(hosts), "PATHS", f.paths, "MATCH", f.match).Replace(frameworkLimits),
		),
	)
	addresses := startVariants(t, p.grpc, upstream, f.hosts)

	var next atomic.Int64
	var mu sync.Mutex
	counts := map[string]int{}
	slips := map[string][]slip{}
	var workers sync.WaitGroup
	for range 16 {
		workers.Go(func() {
			conns := make([]rawClient, len(addresses))
			defer func() {
				for _, c := range conns {
					c.close()
				}
			}()
			for {
				i := int(next.Add(1)) - 1
				if i >= len(all) || t.Failed() {
					return
				}
				v := (i + first) % len(addresses)
				conns[v].address = addresses[v]
				a, err := conns[v].ask(all[i])
				if err != nil {
					t.Errorf("%s, %s: %v", envoyVariants[v].name, all[i], err)
					return
				}
				mu.Lock()
				counts[cmp.Or(a.handler, "none")+"/"+a.decision]++
				if a.handler == "limited" && a.decision != "allowed" ||
					a.decision == "exempt" && a.handler != "exempt" && a.handler != "" && !f.excuses(all[i], envoyVariants[v]) {
					slips[all[i].edits] = append(slips[all[i].edits], slip{all[i], envoyVariants[v].name, a})
				}
				mu.Unlock()
			}
		})
	}
	workers.Wait()

	t.Logf("handler/decision: %v", counts)
	// Without enough requests at the handlers the test proves nothing.
	if counts["limited/allowed"] < len(all)/10 || counts["exempt/exempt"] < len(all)/20 {
		t.Errorf("of %d spellings too few came to the limited and exempt handlers: %v", len(all), counts)
	}
	var kinds []string
	byLength := func(a, b string) int { return cmp.Or(cmp.Compare(len(a), len(b)), cmp.Compare(a, b)) }
	for _, edits := range slices.SortedFunc(maps.Keys(slips), byLength) {
		// Only the spellings with the fewest edits are reported.
		if !slices.ContainsFunc(kinds, func(k string) bool { return isSubset(k, edits) }) {
			kinds = append(kinds, edits)
		}
	}
	for _, edits := range kinds {
		kind := slips[edits]
		shortest := slices.MinFunc(
			kind,
			func(a, b slip) int { return cmp.Compare(len(a.target+a.host), len(b.target+b.host)) },
		)
		t.Errorf("%d slipped by [%s], as %s through Envoy %s: the %s handler ran, and sluice's decision was %s",
			len(kind), edits, shortest.spelling, shortest.variant, shortest.handler, shortest.decision)
	}
}

// isSubset reports whether the edits of b have all those of a.
func isSubset(a, b string) bool {
	all := strings.Split(b, ", ")
	return !slices.ContainsFunc(strings.Split(a, ", "), func(name string) bool { return !slices.Contains(all, name) })
}

// slip is a spelling that slipped past the limit or into the exemption.
type slip struct {
	spelling
	variant string
	routed
}

// routed is what became of a request.
type routed struct {
	handler  string // of the framework that ran; empty if none did
	decision string // of sluice, or empty if it was not asked
}

// rawClient sends requests exactly as they are written, which no HTTP client
// does. It uses one connection as long as it is open.
type rawClient struct {
	address string
	conn    net.Conn
	in      *bufio.Reader
}

func (c *rawClient) close() {
	if c.conn != nil {
		_ = c.conn.Close()
		c.conn = nil
	}
}

// ask returns what became of a request. It tries once more where a connection
// ended before the answer: Envoy may close one that it has just answered on,
// and so may the framework.
func (c *rawClient) ask(s spelling) (routed, error) {
	var err error
	for range 5 {
		var a routed
		var status int
		a, status, err = c.once(s)
		if err == nil && (status != http.StatusServiceUnavailable && status != http.StatusGatewayTimeout || a.handler != "") {
			return a, nil
		}
		if err == nil {
			err = fmt.Errorf("status %d", status)
		}
	}
	return routed{}, err
}

func (c *rawClient) once(s spelling) (a routed, status int, err error) {
	if c.conn == nil {
		if c.conn, err = net.DialTimeout("tcp", c.address, within); err != nil {
			return routed{}, 0, err
		}
		c.in = bufio.NewReader(c.conn)
	}
	if err := c.conn.SetDeadline(time.Now().Add(within)); err != nil {
		return routed{}, 0, err
	}
	defer func() {
		if err != nil {
			c.close()
		}
	}()
	if _, err := fmt.Fprintf(c.conn, "GET %s HTTP/1.1\r\nhost: %s\r\n\r\n", s.target, s.host); err != nil {
		return routed{}, 0, err
	}
	r, err := http.ReadResponse(c.in, nil)
	if err != nil {
		return routed{}, 0, err
	}
	if _, err := io.Copy(io.Discard, r.Body); err != nil {
		return routed{}, 0, err
	}
	if r.Close {
		c.close()
	}
	return routed{r.Header.Get("x-handler"), r.Header.Get("x-decision")}, r.StatusCode, nil
}
