package main

import (
	"encoding/base64"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/sluiceproxy/sluice/k8s/testenv"
)

// gatewayTLSServer is the name in sluice's certificate.
const gatewayTLSServer = "sluice-gateway.sluice-system.svc"

// gatewayTLSConfig requires a client certificate with a name.
const gatewayTLSConfig = `
listen:
  grpc: 0.0.0.0:9001
  tls:
    cert_file: server.crt
    key_file: server.key
    client_ca_file: clients.crt
    client_names: ["spiffe://cluster.local/ns/gateways/*"]
limits: [{name: per-client, key: client.network, rate: 1/h, burst: 2}]
`

// gatewayLocal makes of the printed Service of sluice a Backend on the loopback
// address: without Kubernetes Envoy Gateway knows no Services.
var gatewayLocal = strings.NewReplacer(
	"{ name: sluice-gateway, namespace: sluice-system, port: 9001 }",
	"{ group: gateway.envoyproxy.io, kind: Backend, name: sluice-gateway }",
	`{ group: "", kind: Service, name: sluice-gateway }`,
	"{ group: gateway.envoyproxy.io, kind: Backend, name: sluice-gateway }",
	"  namespace: sluice-system\n", "", // nor ReferenceGrants, so that all is in one namespace
)

const gatewayBackend = `---
apiVersion: gateway.envoyproxy.io/v1alpha1
kind: Backend
metadata: {name: sluice-gateway}
spec: {endpoints: [{ip: {address: 127.0.0.1, port: 9001}}]}
`

// gatewaySecrets returns the ConfigMap and the Secret that the printed comments
// tell the user to create.
func gatewaySecrets(ca *authority, certificate, key []byte) string {
	text := base64.StdEncoding.EncodeToString
	return fmt.Sprintf(`---
apiVersion: v1
kind: ConfigMap
metadata: {name: sluice-ca}
data:
  ca.crt: %q
---
apiVersion: v1
kind: Secret
metadata: {name: sluice-tls}
type: kubernetes.io/tls
data: {tls.crt: %s, tls.key: %s}
`, pemOf("CERTIFICATE", ca.cert.Raw), text(certificate), text(key))
}

// gatewayTLSFiles writes a config with listen.tls and its files, and returns
// its path. Sluice's certificate is signed by servers, those of clients by
// clients.
func gatewayTLSFiles(t *testing.T, servers, clients *authority) string {
	t.Helper()
	dir := t.TempDir()
	certificate, key := servers.sign(gatewayTLSServer, time.Now().Add(time.Hour))
	write(t, filepath.Join(dir, "server.crt"), certificate)
	write(t, filepath.Join(dir, "server.key"), key)
	write(t, filepath.Join(dir, "clients.crt"), pemOf("CERTIFICATE", clients.cert.Raw))
	config := filepath.Join(dir, "sluice.yaml")
	write(t, config, []byte(gatewayTLSConfig))
	return config
}

// without returns a text without the part from one line to another, which
// stays.
func without(t *testing.T, text, from, to string) string {
	t.Helper()
	before, rest, ok := strings.Cut(text, from)
	_, after, found := strings.Cut(rest, to)
	if !ok || !found {
		t.Fatalf("no %q, and then %q, in\n%s", from, to, text)
	}
	return before + to + after
}

// TestMeshEnvoyGatewayTLS runs a sluice with listen.tls behind a real Envoy
// Gateway. With the printed objects requests are limited. Without one of them,
// or with a certificate that one side refuses, every request gets 503.
func TestMeshEnvoyGatewayTLS(t *testing.T) {
	gateway, proxy := gatewayPrograms(t)
	if !testenv.Network(t) {
		return
	}
	servers, clients, foreign := newAuthority(t), newAuthority(t), newAuthority(t)
	hour := time.Now().Add(time.Hour)
	config := gatewayTLSFiles(t, servers, clients)
	status, printed, stderr := sluice(t, nil, "envoy", "envoy-gateway", "--config", config)
	if status != 0 || stderr != "" {
		t.Fatalf("%d %s", status, stderr)
	}
	printed = gatewayLocal.Replace(printed)

	const named = "spiffe://cluster.local/ns/gateways/sa/edge"
	secrets := func(ca, signer *authority, client string) string {
		certificate, key := signer.sign(client, hour)
		return gatewayBackend + gatewaySecrets(ca, certificate, key)
	}
	good := secrets(servers, clients, named)
	limited := []int{http.StatusOK, http.StatusOK, http.StatusTooManyRequests}
	refused := slices.Repeat([]int{http.StatusServiceUnavailable}, 3)
	broken := slices.Repeat([]int{http.StatusInternalServerError}, 3) // Envoy Gateway's for an invalid policy
	for _, row := range []struct {
		name      string
		resources string
		want      []int
		logged    string // by sluice
	}{
		{"as printed", printed + good, limited, ""},
		{"no BackendTLSPolicy", without(t, printed, "# TLS to sluice", "# This removes") + good, refused,
			"first record does not look like a TLS handshake"},
		{"no ConfigMap", printed + strings.Replace(good, "name: sluice-ca", "name: other", 1), broken, ""},
		{"no Secret", printed + strings.Replace(good, "name: sluice-tls", "name: other", 1), broken, ""},
		{"no client certificate", without(t, printed, "  backendTLS:\n", "  provider:\n") + good, refused,
			"client didn't provide a certificate"},
		{"a client certificate of another name", printed + secrets(servers, clients, "spiffe://cluster.local/ns/web/sa/shop"),
			refused, "listen.tls.client_names"},
		{"a client certificate of another CA", printed + secrets(servers, foreign, named), refused,
			"certificate signed by unknown authority"},
		{"a server certificate of another CA", printed + secrets(foreign, clients, named), refused,
			"unknown certificate authority"},
		{"a server certificate of another name", strings.ReplaceAll(printed, gatewayTLSServer, "sluice.example") + good,
			refused, `tls: unknown certificate"`},
	} {
		t.Run(row.name, func(t *testing.T) {
			limiter := startSluice(t, "--config", config, "--grpc", "127.0.0.1:9001")
			upstream := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
			defer upstream.Close()
			startGateway(t, gateway, proxy, row.resources, upstream)
			ask := func() int {
				r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+gatewayAddress, nil)
				if err != nil {
					t.Fatal(err)
				}
				r.Close = true // config that comes later closes connections
				response, err := http.DefaultClient.Do(r)
				if err != nil {
					t.Fatal(err)
				}
				_ = response.Body.Close()
				return response.StatusCode
			}
			if got := []int{ask(), ask(), ask()}; !slices.Equal(got, row.want) {
				t.Errorf("%v, want %v", got, row.want)
			}
			eventually(t, "the log of a refusal", func() bool { // sluice logs one failed handshake in 10 s
				return strings.Contains(limiter.logged(), row.logged) || ask() != row.want[0]
			})
			if log := limiter.logged(); !strings.Contains(log, row.logged) {
				t.Errorf("the log does not say %q:\n%s", row.logged, log)
			}
		})
	}
}

// TestMeshEnvoyGatewayServiceTLS checks that Envoy Gateway's own translator
// takes what is printed for the Service of a sluice with listen.tls, and that
// Envoy then verifies sluice's name and CA and shows the client certificate.
func TestMeshEnvoyGatewayServiceTLS(t *testing.T) {
	if os.Getenv("SLUICE_LONG") == "" {
		t.Skip("builds egctl, which takes minutes: SLUICE_LONG=1")
	}
	servers, clients := newAuthority(t), newAuthority(t)
	status, printed, stderr := sluice(t, nil, "envoy", "envoy-gateway", "--config", gatewayTLSFiles(t, servers, clients))
	if status != 0 || stderr != "" {
		t.Fatalf("%d %s", status, stderr)
	}
	certificate, key := clients.sign("spiffe://cluster.local/ns/gateways/sa/edge", time.Now().Add(time.Hour))
	secrets := strings.NewReplacer("{name: sluice-ca}", "{name: sluice-ca, namespace: sluice-system}", "{name: sluice-tls}",
		"{name: sluice-tls, namespace: shop}").
		Replace(gatewaySecrets(servers, certificate, key))
	const app = "https" // the chart's for a sluice with TLS
	_, policy, ok := strings.Cut(translated(t, printed+secrets, app, "gateway-api"), "\nsecurityPolicies:\n")
	if !ok || !strings.Contains(policy, "Policy has been accepted.") {
		t.Errorf("the policy: %s", policy)
	}
	xds := translated(t, printed+secrets, app, "xds")
	for _, want := range []string{
		"sni: " + gatewayTLSServer, "exact: " + gatewayTLSServer, "UpstreamTlsContext", "name: shop/sluice-tls", "name: sluice/sluice-system-ca",
	} {
		if !strings.Contains(xds, want) {
			t.Errorf("no %q in\n%s", want, xds)
		}
	}
}

// TestEnvoyTLS checks what `sluice envoy` says of a listen.tls for which it
// prints nothing.
func TestEnvoyTLS(t *testing.T) {
	servers := newAuthority(t)
	config := gatewayTLSFiles(t, servers, servers)
	for kind, want := range map[string]string{
		"plain": "", "istio-gateway": "", "istio-waypoint": "", "envoy-gateway": "",
		"istio": "warning: " + config + " has listen.tls, for which nothing is printed: sluice in a pod is asked on the " +
			"loopback address, without TLS; remove listen.tls from the config of injected pods, or every request is answered with 503\n",
	} {
		status, _, stderr := sluice(t, []string{"SLUICE_GRPC=127.0.0.1:9001"}, "envoy", kind, "--config", config)
		if status != 0 || stderr != want {
			t.Errorf("%s: %d %q", kind, status, stderr)
		}
	}
	certificate, key := servers.sign("spiffe://cluster.local/ns/sluice-system/sa/sluice", time.Now().Add(time.Hour))
	write(t, filepath.Join(filepath.Dir(config), "server.crt"), certificate)
	write(t, filepath.Join(filepath.Dir(config), "server.key"), key)
	status, out, stderr := sluice(t, nil, "envoy", "istio-gateway", "--config", config)
	if want := config + ": listen.tls: the certificate has no DNS name; issue one with a name such as " + gatewayTLSServer +
		"\n"; status == 0 || out != "" ||
		!strings.HasSuffix(stderr, want) {
		t.Errorf("%d %q, want %q", status, stderr, want)
	}
}
