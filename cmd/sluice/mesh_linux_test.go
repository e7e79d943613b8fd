package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/sluiceproxy/sluice/envoy"
	"github.com/sluiceproxy/sluice/k8s/testenv"
)

const envoyGateway = "v1.9.1"

// gatewayConfig is Envoy Gateway's config for a machine without Kubernetes. DIR
// and ENVOY are replaced by the test.
const gatewayConfig = `
apiVersion: gateway.envoyproxy.io/v1alpha1
kind: EnvoyGateway
gateway: {controllerName: gateway.envoyproxy.io/gatewayclass-controller}
provider:
  type: Custom
  custom:
    resource: {type: File, file: {paths: [DIR/resources]}}
    infrastructure:
      type: Host
      host: {configHome: DIR/config, dataHome: DIR/data, stateHome: DIR/state, runtimeDir: DIR/run}
extensionApis: {enableBackend: true}
`

// gatewayResources are a Gateway with the EnvoyProxy's settings PROXY, and a
// route to the upstream UPSTREAM with the filter REMOVAL that the printed file
// has in a comment.
const gatewayResources = `
apiVersion: gateway.networking.k8s.io/v1
kind: GatewayClass
metadata: {name: eg}
spec:
  controllerName: gateway.envoyproxy.io/gatewayclass-controller
  parametersRef: {group: gateway.envoyproxy.io, kind: EnvoyProxy, name: host, namespace: envoy-gateway-system}
---
apiVersion: gateway.envoyproxy.io/v1alpha1
kind: EnvoyProxy
metadata: {name: host}
spec:
  provider: {type: Host, host: {envoyVersion: "VERSION"}}
PROXY
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: edge}
spec:
  gatewayClassName: eg
  listeners: [{name: http, protocol: HTTP, port: 8888}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: app}
spec:
  parentRefs: [{name: edge}]
  rules:
  - backendRefs: [{group: gateway.envoyproxy.io, kind: Backend, name: app}]
    filters:
REMOVAL
---
apiVersion: gateway.envoyproxy.io/v1alpha1
kind: Backend
metadata: {name: app}
spec: {endpoints: [{ip: {address: 127.0.0.1, port: UPSTREAM}}]}
`

// gatewayAddress is the address of the Gateway, in a network namespace of its
// own.
const gatewayAddress = "127.0.0.1:8888"

// startGateway runs an Envoy Gateway with what sluice printed for it, in front
// of an upstream, and waits until its Envoy listens. It returns the address of
// Envoy's admin interface.
func startGateway(t *testing.T, program, proxy, printed string, upstream *httptest.Server) (admin string) {
	t.Helper()
	dir := t.TempDir()
	_, removal, _ := strings.Cut(printed, "#   - type: ResponseHeaderModifier\n")
	removal, _, ok := strings.Cut(removal, "# That keeps")
	if !ok {
		t.Fatal("no ResponseHeaderModifier")
	}
	removal = "    - type: ResponseHeaderModifier\n" + strings.ReplaceAll(removal, "#   ", "    ")
	_, settings, ok := strings.Cut(printed, "\nkind: EnvoyProxy\nmetadata:\n  name: sluice\nspec:\n")
	settings, _, isProvider := strings.Cut(settings, "  provider:\n")
	if !ok || !isProvider {
		t.Fatal("no EnvoyProxy")
	}
	_, port, err := net.SplitHostPort(upstream.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	put := func(text string, path ...string) string {
		t.Helper()
		name := filepath.Join(append([]string{dir}, path...)...)
		if err := os.MkdirAll(filepath.Dir(name), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return name
	}
	fill := strings.NewReplacer("DIR", dir, "VERSION", envoy.Version, "UPSTREAM", port, "REMOVAL\n", removal,
		"PROXY\n", settings)
	put(printed, "resources", "sluice.yaml")
	put(fill.Replace(gatewayResources), "resources", "gateway.yaml")
	own := put(fill.Replace(gatewayConfig), "gateway.yaml")
	linked := filepath.Join(dir, "data", "envoy-versions", envoy.Version, "bin", "envoy")
	if err := os.MkdirAll(filepath.Dir(linked), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(proxy, linked); err != nil {
		t.Fatal(err)
	}
	certgen := exec.CommandContext(t.Context(), program,
		"certgen", "--local", "--config-home", filepath.Join(dir, "config"))
	if out, err := certgen.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	log, err := os.Create(filepath.Join(dir, "log"))
	if err != nil {
		t.Fatal(err)
	}
	server := exec.CommandContext(context.WithoutCancel(t.Context()), program, "server", "--config-path", own)
	server.Stdout, server.Stderr = log, log
	server.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := server.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = server.Process.Signal(syscall.SIGTERM) // it stops its Envoy
		_ = server.Wait()
		if text, err := os.ReadFile(log.Name()); err == nil && t.Failed() {
			t.Logf("Envoy Gateway said:\n%s", text)
		}
	})
	eventually(t, "the gateway", func() bool {
		c, err := (&net.Dialer{}).DialContext(t.Context(), "tcp", gatewayAddress)
		if err == nil {
			_ = c.Close()
		}
		return err == nil
	})
	err = filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		if filepath.Base(path) == "admin-address.txt" {
			address, readErr := os.ReadFile(path)
			admin, err = strings.TrimSpace(string(address)), errors.Join(err, readErr)
		}
		return err
	})
	if err != nil || admin == "" {
		t.Fatalf("no address of Envoy's admin interface: %v", err)
	}
	return admin
}

// gatewayPrograms returns Envoy Gateway, which it builds if necessary, and the
// Envoy that it runs.
func gatewayPrograms(t *testing.T) (gateway, proxy string) {
	t.Helper()
	if os.Getenv("SLUICE_LONG") == "" {
		t.Skip("builds Envoy Gateway, which takes minutes: SLUICE_LONG=1")
	}
	gateway = envoyGatewayBinary(t)
	proxy, err := envoy.Binary(t.Context(), func(s string) { t.Log(s) })
	if err != nil {
		t.Fatal(err)
	}
	return gateway, proxy
}

// TestMeshEnvoyGateway checks that a real Envoy Gateway limits by the printed
// policy: by the limit of the config and the one in contextExtensions.
func TestMeshEnvoyGateway(t *testing.T) {
	gateway, proxy := gatewayPrograms(t)
	if !testenv.Network(t) {
		return
	}
	socket := "unix://" + t.TempDir() + "/s"
	config := file(
		t, "sluice.yaml",
		"listen: {grpc: \""+socket+"\"}\nlimits: [{name: per-client, key: client.network, rate: 1/m, burst: 3, "+
			"match: {paths: [/]}}, {name: settled, match: {paths: [/settled]}, rate: 1/h, settle: 0}]\n",
	)
	p := startSluice(t, "--config", config, "--grpc", socket)
	var seen http.Header // by the upstream; read after the answer
	upstream := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		seen = r.Header
		w.Header().Set("x-ratelimit-limit", "a lie")
		w.Header().Set("ratelimit-policy", "a lie")
	}))
	defer upstream.Close()

	status, printed, stderr := sluice(t, nil, "envoy", "envoy-gateway", "--config", config)
	if status != 0 {
		t.Fatal(stderr)
	}
	// The parts that are comments are accepted, too: the limits of a route, and
	// the filter that removes an upstream's headers.
	before, example, ok := strings.Cut(printed, "    # contextExtensions:\n")
	if !ok {
		t.Fatal("no contextExtensions")
	}
	example = strings.NewReplacer("    # - name: sluice.limit.login", "    - name: sluice.limit.login",
		"    #   type: Value", "      type: Value", "    #   value: ", "      value: ").Replace(example)
	example = strings.Replace(example, "rate: 5/m", "rate: 1/m", 1)
	admin := startGateway(t, gateway, proxy, before+"    contextExtensions:\n"+uncommented(t, example, "cors:"), upstream)

	askFor := func(method, path string, headers ...string) (*http.Response, string) {
		r, err := http.NewRequestWithContext(t.Context(), method, "http://"+gatewayAddress+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		r.Close = true // config that comes later closes connections
		r.Header.Set("x-sluice-shadow", "a lie")
		r.Header.Set("x-ratelimit-limit", "a lie")
		for i := 0; i < len(headers); i += 2 {
			r.Header.Set(headers[i], headers[i+1])
		}
		response, err := http.DefaultClient.Do(r)
		if err != nil {
			return nil, ""
		}
		body, _ := io.ReadAll(response.Body)
		_ = response.Body.Close()
		return response, string(body)
	}
	ask := func(method string, headers ...string) (*http.Response, string) {
		return askFor(method, "/", headers...)
	}
	for _, want := range []struct{ method, limit, remaining string }{
		{http.MethodPost, "1", "0"}, {http.MethodGet, "3", "1"}, {http.MethodGet, "3", "0"},
	} {
		response, _ := ask(want.method)
		if response == nil || response.StatusCode != http.StatusOK || response.Header.Get("ratelimit-policy") != "" ||
			strings.Join(response.Header.Values("x-ratelimit-limit"), ",") != want.limit ||
			strings.Join(response.Header.Values("x-ratelimit-remaining"), ",") != want.remaining {
			t.Fatalf("%+v: %+v", want, response)
		}
		if seen.Get("x-sluice-shadow") != "" || seen.Get("x-ratelimit-limit") != "" {
			t.Errorf("the upstream was told what a client made up: %v", seen)
		}
	}
	response, body := ask(http.MethodGet)
	if response.StatusCode != http.StatusTooManyRequests || response.Header.Get("retry-after") == "" ||
		!strings.Contains(body, `"limit":"per-client"`) {
		t.Errorf("%+v %s", response, body)
	}
	// A page on another origin can read this, and its preflight is not charged:
	// a charged one would be denied, too.
	const origin = "https://app.example.com"
	for method, want := range map[string]int{http.MethodOptions: http.StatusOK, http.MethodGet: http.StatusTooManyRequests} {
		response, body := ask(method, "origin", origin, "access-control-request-method", http.MethodGet)
		if response == nil || response.StatusCode != want || response.Header.Get("access-control-allow-origin") != origin {
			t.Errorf("%s: %+v %s", method, response, body)
		}
	}
	response, _ = ask(http.MethodGet, "content-type", "application/grpc-web+proto")
	// This Gateway has no GRPCRoute, and so no grpc_web filter.
	if response == nil || response.StatusCode != http.StatusTooManyRequests || response.Header.Get("grpc-status") != "8" {
		t.Errorf("by gRPC-Web: %+v", response)
	}
	if status, found := diagnoseEnvoy(t, "--config", config, "--envoy-admin", "http://"+admin); status != 0 ||
		found != nil {
		t.Errorf("doctor: %d %+v", status, found)
	}
	// One request at a time passes, and is free once it has ended.
	for n := 1; n <= 3; n++ {
		if response, body := askFor(http.MethodGet, "/settled"); response == nil || response.StatusCode != http.StatusOK {
			t.Fatalf("request %d of those that are settled: %+v %s", n, response, body)
		}
		eventually(t, "a settlement", func() bool {
			_, metrics := get(t, "http://"+p.metrics+"/metrics")
			return strings.Contains(metrics, fmt.Sprintf("sluice_tokens_returned_total{limit=\"settled\"} %d\n", n))
		})
	}
}

// gatewayInShop is a Gateway before an app in one namespace, and the Service of
// the chart's Deployment in another.
const gatewayInShop = `
apiVersion: gateway.networking.k8s.io/v1
kind: GatewayClass
metadata: {name: eg}
spec: {controllerName: gateway.envoyproxy.io/gatewayclass-controller}
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: edge, namespace: shop}
spec:
  gatewayClassName: eg
  listeners: [{name: http, protocol: HTTP, port: 8888}]
  infrastructure: {parametersRef: {group: gateway.envoyproxy.io, kind: EnvoyProxy, name: sluice}}
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: app, namespace: shop}
spec: {parentRefs: [{name: edge}], rules: [{backendRefs: [{name: web, port: 80}]}]}
---
apiVersion: gateway.networking.k8s.io/v1
kind: GRPCRoute
metadata: {name: calls, namespace: shop}
spec: {parentRefs: [{name: edge}], hostnames: [calls.example.com], rules: [{backendRefs: [{name: web, port: 80}]}]}
---
apiVersion: v1
kind: Service
metadata: {name: sluice-gateway, namespace: sluice-system}
spec: {clusterIP: 192.0.2.9, ports: [{name: grpc, port: 9001, protocol: TCP, appProtocol: APP}]}
---
`

// translated returns what Envoy Gateway's own translator makes of what sluice
// printed, for the gateway above. app is the appProtocol of sluice's Service.
func translated(t *testing.T, printed, app, to string) string {
	t.Helper()
	// kubectl's own namespace is that of what names none.
	printed = strings.ReplaceAll(printed, "\n  name: sluice\nspec:", "\n  name: sluice\n  namespace: shop\nspec:")
	in := file(t, "resources.yaml", strings.Replace(gatewayInShop, "APP", app, 1)+printed)
	out, err := exec.CommandContext(t.Context(), egctlBinary(t), "x", "translate", "--from", "gateway-api",
		"--to", to, "--output", "yaml", "--file", in).CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return string(out)
}

// TestMeshEnvoyGatewayService checks that Envoy Gateway's translator accepts
// the default output, for sluice as a Deployment in another namespace, with the
// printed ReferenceGrant and not without it. Without Kubernetes the server of
// Envoy Gateway has no Services.
func TestMeshEnvoyGatewayService(t *testing.T) {
	if os.Getenv("SLUICE_LONG") == "" {
		t.Skip("builds egctl, which takes minutes: SLUICE_LONG=1")
	}
	const cleartext = "kubernetes.io/h2c"
	status, printed, stderr := sluice(t, nil, "envoy", "envoy-gateway")
	if status != 0 {
		t.Fatal(stderr)
	}
	policy := func(printed string) string {
		_, status, _ := strings.Cut(translated(t, printed, cleartext, "gateway-api"), "\nsecurityPolicies:\n")
		_, status, _ = strings.Cut(status, "\n  status:\n")
		status, _, _ = strings.Cut(status, "controllerName")
		return strings.Join(strings.Fields(status), " ")
	}
	if said := policy(printed); !strings.Contains(said, "Policy has been accepted.") {
		t.Errorf("the policy: %s", said)
	}
	if xds := translated(t, printed, cleartext, "xds"); !strings.Contains(xds, "address: 192.0.2.9") ||
		!strings.Contains(xds, "extensions.filters.http.ext_authz.v3.ExtAuthz") {
		t.Errorf("sluice is not asked:\n%s", xds)
	}
	// The filters stand in the order in which a page on another origin can read
	// a denial, and a client of gRPC-Web reads RESOURCE_EXHAUSTED.
	filters := regexp.MustCompile(`name: envoy\.filters\.http\.(cors|grpc_web|ext_authz)\b`).FindAllStringSubmatch(
		translated(t, uncommented(t, printed, "cors:"), cleartext, "xds"), -1)
	var order []string
	for _, f := range filters {
		order = append(order, f[1])
	}
	if want := []string{"cors", "grpc_web", "ext_authz"}; !slices.Equal(order, want) {
		t.Errorf("the order of filters is %v, want %v", order, want)
	}
	before, grant, _ := strings.Cut(printed, "# This lets the Gateway's policy")
	_, after, ok := strings.Cut(grant, "\n---\n")
	if !ok {
		t.Fatal("no grant")
	}
	if said := policy(before + after); !strings.Contains(said, "not permitted by any ReferenceGrant") {
		t.Errorf("without the grant: %s", said)
	}
}

// TestMeshEnvoyGatewayRestart checks that behind a real Envoy Gateway with the
// printed retries quick restarts of sluice lose no request.
func TestMeshEnvoyGatewayRestart(t *testing.T) {
	gateway, proxy := gatewayPrograms(t)
	if !testenv.Network(t) {
		return
	}
	socket := "unix://" + t.TempDir() + "/s"
	config := file(t, "sluice.yaml", "listen: {grpc: \""+socket+"\"}\nlimits: [{name: all, rate: 1000000/s}]\n")
	limiter := startSluice(t, "--config", config, "--grpc", socket)
	upstream := httptest.NewServer(http.NotFoundHandler())
	defer upstream.Close()
	status, printed, stderr := sluice(t, nil, "envoy", "envoy-gateway", "--config", config)
	if status != 0 {
		t.Fatal(stderr)
	}
	startGateway(t, gateway, proxy, printed, upstream)
	ask := func() string {
		r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+gatewayAddress, nil)
		if err != nil {
			t.Fatal(err)
		}
		r.Close = true
		response, err := http.DefaultClient.Do(r)
		if err != nil {
			return err.Error()
		}
		_ = response.Body.Close()
		return fmt.Sprint(response.StatusCode, " ", response.Header.Get("x-ratelimit-limit"))
	}
	const passed = "404 1000000" // the upstream's, with sluice's headers
	eventually(t, "a request that passes", func() bool { return ask() == passed })
	var answered [3]atomic.Int64
	var lost atomic.Int64
	done := make(chan struct{})
	var clients sync.WaitGroup
	for i := range answered {
		clients.Go(func() {
			for {
				select {
				case <-done:
					return
				default:
				}
				if said := ask(); said != passed {
					lost.Add(1)
					t.Logf("lost: %s", said)
				}
				answered[i].Add(1)
			}
		})
	}
	// more waits until each client has sent a new request and has its answer.
	// Envoy may wait between its tries for as long as a check may take, and a
	// request during two restarts, or during a long one, may be lost.
	more := func() {
		for i := range answered {
			now := answered[i].Load()
			eventually(t, "two more answers", func() bool { return answered[i].Load() > now+1 })
		}
	}
	const quick = 50 * time.Millisecond
	more()
	for tried, slow := 0, 0; tried < 5 && slow < 50; {
		before, began := lost.Load(), time.Now()
		limiter.stop()
		limiter = startSluice(t, "--config", config, "--grpc", socket)
		away := time.Since(began)
		more()
		if away > quick { // on a busy machine
			slow++
			continue
		}
		tried++
		if now := lost.Load(); now > before {
			t.Errorf("a restart of %v lost %d", away, now-before)
		}
	}
	close(done)
	clients.Wait()
	t.Logf("%d requests, %d lost", answered[0].Load()+answered[1].Load()+answered[2].Load(), lost.Load())
}

// TestMeshEnvoyGatewayClaims checks that behind a real Envoy Gateway a claim
// can be the key of a limit, as the comments of the printed file say: each plan
// has a bucket of its own, and a client that sends the claim's header itself
// gains nothing.
func TestMeshEnvoyGatewayClaims(t *testing.T) {
	gateway, proxy := gatewayPrograms(t)
	if !testenv.Network(t) {
		return
	}
	i := newIssuer(t)
	socket := "unix://" + t.TempDir() + "/s"
	text := "listen: {grpc: \"" + socket + "\"}\nlimits:\n- {name: per-plan, key: " +
		"'request.headers[?\"x-jwt-plan\"].orValue(\"none\")', rate: 1/h, burst: 2}\n"
	config := file(t, "sluice.yaml", text)
	startSluice(t, "--config", config, "--grpc", socket)
	upstream := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	defer upstream.Close()

	status, printed, stderr := sluice(t, nil, "envoy", "envoy-gateway", "--config", config)
	if status != 0 {
		t.Fatal(stderr)
	}
	printed = uncommented(t, uncommented(t, printed, "jwt:"),
		"- { name: envoy.filters.http.jwt_authn, before: envoy.filters.http.ext_authz }")
	for old, with := range map[string]string{
		"remoteJWKS: { uri: https://issuer.example.com/jwks.json }": "localJWKS: { type: Inline, inline: '" + i.keys() + "' }",
		"  jwt:\n": "  jwt:\n    optional: true\n",
		"remove: [x-envoy-ratelimited] # add the headers of claims, such as x-jwt-plan": "remove: [x-envoy-ratelimited, x-jwt-plan]",
	} {
		if !strings.Contains(printed, old) {
			t.Fatalf("no %q in\n%s", old, printed)
		}
		printed = strings.Replace(printed, old, with, 1)
	}
	startGateway(t, gateway, proxy, printed, upstream)
	for at, ask := range []struct{ plan, madeUp, want string }{
		// The plan is the token's, whatever the header says.
		{"gold", "", "200 1"}, {"gold", "fresh", "200 0"}, {"gold", "fresh", "429 0"},
		{"silver", "", "200 1"},
		{"", "silver", "200 1"}, {"", "fresh", "200 0"}, {"", "silver", "429 0"}, // without a token there is no plan
		{"silver", "", "200 0"},
	} {
		r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+gatewayAddress, nil)
		if err != nil {
			t.Fatal(err)
		}
		r.Close = true // config that comes later closes connections
		if ask.plan != "" {
			r.Header.Set("authorization", i.token(map[string]any{"plan": ask.plan}))
		}
		if ask.madeUp != "" {
			r.Header.Set("x-jwt-plan", ask.madeUp)
		}
		response, err := http.DefaultClient.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		_ = response.Body.Close()
		if got := fmt.Sprint(response.StatusCode, " ", response.Header.Get("x-ratelimit-remaining")); got != ask.want {
			t.Errorf("request %d, %+v: %s", at, ask, got)
		}
	}
}
