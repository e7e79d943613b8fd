//go:build linux

package k8s

import (
	gotls "crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"io"
	"net/http"
	"strings"
	"testing"

	"github.com/sluiceproxy/sluice/k8s/testenv"
)

// istioTLSName is the name in sluice's certificate.
const istioTLSName = "sluice-gateway.sluice-system.svc"

// istioTLSConfig requires a client certificate with a name.
const istioTLSConfig = `
listen:
  tls:
    cert_file: server.crt
    key_file: server.key
    client_ca_file: clients.crt
    client_names: ["spiffe://cluster.local/ns/gateways/*"]
` + istioEdgeLimits

// istioTLSSimple requires no client certificate.
const istioTLSSimple = `
listen: {tls: {cert_file: server.crt, key_file: server.key}}
` + istioEdgeLimits

// withoutKind returns YAML documents without those of a kind.
func withoutKind(t *testing.T, text, kind string) string {
	t.Helper()
	var kept []string
	all := strings.Split(text, "\n---\n")
	for _, document := range all {
		if !strings.Contains(document, "\nkind: "+kind+"\n") {
			kept = append(kept, document)
		}
	}
	if len(kept) == len(all) {
		t.Fatalf("no %s", kind)
	}
	return strings.Join(kept, "\n---\n")
}

// TestMeshIstioEdgeTLS runs a sluice with listen.tls behind a gateway and a
// waypoint of a real istiod, which sends them the certificates of a Secret.
// With the printed objects requests are limited. Without one of them, or with a
// certificate that one side refuses, every request gets 503.
func TestMeshIstioEdgeTLS(t *testing.T) {
	istio := prepareIstio(t)
	if !testenv.Network(t, append(addresses, home, edgeApp, edgeGateway, edgeWaypoint, edgeClient)...) {
		return
	}
	authority := func(name string) gotls.Certificate {
		return selfSigned(t, x509.Certificate{Subject: pkix.Name{CommonName: name}})
	}
	servers, clients, foreign := authority("servers"), authority("clients"), authority("foreign")
	server := inPEM(t, signed(t, x509.Certificate{DNSNames: []string{istioTLSName}}, &servers))
	mesh := startEdges(t, istio, `,gateway.tls.secret=mine,gateway.tls.clientNames={spiffe://cluster.local/ns/gateways/*}`,
		istioTLSConfig, map[string][]byte{
			"server.crt": server["tls.crt"], "server.key": server["tls.key"], "clients.crt": inPEM(t, clients)["tls.crt"],
		})
	// apply creates the Secret as the printed comment says, then the objects. It
	// returns a function that deletes all.
	apply := func(t *testing.T, objects string, ca, signer gotls.Certificate, account string) (remove func()) {
		t.Helper()
		dir := t.TempDir()
		write := writeIn(t, dir)
		write("ca.crt", string(inPEM(t, ca)["tls.crt"]))
		for name, text := range inPEM(t, signed(t, identity(account), &signer)) {
			write(name, string(text))
		}
		_, command, ok := strings.Cut(mesh.printed(t, "istio-gateway"), "#   kubectl create secret ")
		command, _, end := strings.Cut(command, "\n")
		if !ok || !end {
			t.Fatal("the comments do not say how to create the Secret")
		}
		args := []string{"create", "secret"}
		for word := range strings.FieldsSeq(command) {
			args = append(args, strings.Replace(word, "--from-file=", "--from-file="+dir+"/", 1))
		}
		mesh.c.do(t, "", args...)
		mesh.c.do(t, objects, "apply", "-f", "-")
		return func() {
			mesh.c.do(t, "", "delete", "secret", "sluice-tls")
			mesh.c.do(t, objects, "delete", "-f", "-")
		}
	}
	const named = "/ns/gateways/sa/edge"
	for _, e := range mesh.all(t) {
		t.Run(e.kind, func(t *testing.T) {
			printed := mesh.printed(t, e.kind)
			for _, row := range []struct {
				name       string
				objects    string
				ca, signer gotls.Certificate
				account    string
				refusal    string // in sluice's log
			}{
				{"no DestinationRule", withoutKind(t, printed, "DestinationRule"), servers, clients, named,
					"first record does not look like a TLS handshake"},
				{"a client certificate of another name", printed, servers, clients, "/ns/web/sa/shop",
					"listen.tls.client_names"},
				{"a client certificate of another CA", printed, servers, foreign, named,
					"certificate signed by unknown authority"},
				{"a server certificate of another CA", printed, foreign, clients, named,
					"unknown certificate authority"},
				{"a server certificate of another name", strings.ReplaceAll(printed, `"`+istioTLSName+`"`, "sluice.example"),
					servers, clients, named, `tls: unknown certificate"`},
			} {
				t.Run(row.name, func(t *testing.T) {
					defer apply(t, row.objects, row.ca, row.signer, row.account)()
					limiter := mesh.run(t)
					istio.startProxy(t, mesh.c, e.pod)
					awaitFilter(t)
					await(t, "a refusal by TLS", func() bool {
						a := e.ask(t, http.MethodGet, "/probe")
						if a.status == http.StatusOK {
							t.Fatalf("a request passed: %+v", a)
						}
						return a.status == http.StatusServiceUnavailable && strings.Contains(limiter.logged(), row.refusal)
					})
				})
			}
			// waits runs the proxy until it waits for a key and refuses requests.
			waits := func(t *testing.T, pod istioPodOf) {
				mesh.run(t)
				istio.startProxy(t, mesh.c, pod)
				awaitFilter(t)
				await(t, "a refusal without a key", func() bool {
					a := e.ask(t, http.MethodGet, "/probe")
					if a.status == http.StatusOK {
						t.Fatalf("a request passed: %+v", a)
					}
					return a.status == http.StatusServiceUnavailable
				})
				if got := warming(t); !strings.Contains(got, `"kubernetes://sluice-tls"`) {
					t.Errorf("the proxy waits for no key: %s", got)
				}
			}
			t.Run("no Secret", func(t *testing.T) {
				mesh.c.do(t, printed, "apply", "-f", "-")
				defer mesh.c.do(t, printed, "delete", "-f", "-")
				waits(t, e.pod)
			})
			t.Run("no right to list Secrets", func(t *testing.T) {
				defer apply(t, printed, servers, clients, named)()
				other := e.pod
				other.account = "other" // istiod remembers for a minute what an account may do
				waits(t, other)
			})
			for name, config := range map[string]string{
				"as printed": istioTLSConfig, "no client certificates": istioTLSSimple,
			} {
				t.Run(name, func(t *testing.T) {
					mesh.configure(t, config)
					defer mesh.configure(t, istioTLSConfig)
					defer apply(t, mesh.printed(t, e.kind), servers, clients, named)()
					mesh.run(t)
					istio.startProxy(t, mesh.c, e.pod)
					awaitFilter(t)
					e.fewLimited(t)
					took(t)
					isWell(t, mesh.sluice, mesh.config, istioAdmin, "identity")
				})
			}
		})
	}
}

// warming returns the secrets that an Istio proxy waits for.
func warming(t *testing.T) string {
	t.Helper()
	text, err := configDump("dynamic_warming_secrets")
	if err != nil {
		t.Fatal(err)
	}
	return text
}

// awaitFilter waits until an Istio proxy asks sluice. Istiod first sends it what it
// knew before the objects that were applied a moment ago.
func awaitFilter(t *testing.T) {
	t.Helper()
	await(t, "a listener with sluice's filter", func() bool {
		text, err := configDump("dynamic_listeners")
		return err == nil && strings.Contains(text, "http.ext_authz.v3.ExtAuthz") &&
			!strings.Contains(text, `"warming_state"`)
	})
}

// configDump returns a part of an Istio proxy's configuration.
func configDump(resource string) (string, error) {
	response, err := http.Get(istioAdmin + "/config_dump?resource=" + resource)
	if err != nil {
		return "", err
	}
	defer func() { _ = response.Body.Close() }()
	text, err := io.ReadAll(response.Body)
	return string(text), err
}
