package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"github.com/sluiceproxy/sluice/envoy"
)

// authority is a CA.
type authority struct {
	t    *testing.T
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	a := &authority{t: t, key: newKey(t)}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(
			time.Now().UnixNano(),
		), Subject: pkix.Name{CommonName: "CA"}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, a.key.Public(), a.key)
	if err != nil {
		t.Fatal(err)
	}
	if a.cert, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	return a
}

func pemOf(kind string, der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
}

// sign returns a certificate with a DNS name or a URI, and its key, as PEM.
func (a *authority) sign(name string, until time.Time) (cert, key []byte) {
	a.t.Helper()
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), NotBefore: time.Now().Add(-2 * time.Hour), NotAfter: until,
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
	}
	if u, err := url.Parse(name); err == nil && u.Scheme != "" {
		template.URIs = []*url.URL{u}
	} else {
		template.DNSNames = []string{name}
	}
	own := newKey(a.t)
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, own.Public(), a.key)
	if err != nil {
		a.t.Fatal(err)
	}
	text, err := x509.MarshalPKCS8PrivateKey(own)
	if err != nil {
		a.t.Fatal(err)
	}
	return pemOf("CERTIFICATE", der), pemOf("PRIVATE KEY", text)
}

// client is how a client with a certificate asks, or one without where cert is
// nil.
func (a *authority) client(cert, key []byte) credentials.TransportCredentials {
	a.t.Helper()
	c := &tls.Config{RootCAs: x509.NewCertPool(), ServerName: "sluice.example"}
	c.RootCAs.AddCert(a.cert)
	if cert != nil {
		pair, err := tls.X509KeyPair(cert, key)
		if err != nil {
			a.t.Fatal(err)
		}
		// The client presents its certificate whichever CAs the server names.
		c.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &pair, nil }
	}
	return credentials.NewTLS(c)
}

func write(t *testing.T, path string, text []byte) {
	t.Helper()
	// The files are replaced at once, as by Kubernetes.
	if err := os.WriteFile(path+".new", text, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
}

// TestMutualTLS checks that only clients with a certificate from the right CA
// and with the right name are served, and that files are reloaded without an
// interruption.
func TestMutualTLS(t *testing.T) {
	dir, servers, clients, foreign := t.TempDir(), newAuthority(t), newAuthority(t), newAuthority(t)
	hour := time.Now().Add(time.Hour)
	at := func(name string) string { return filepath.Join(dir, name) }
	rotate := func() {
		cert, key := servers.sign("sluice.example", hour)
		// Two files cannot change at the same time. The mismatched pair in
		// between changes nothing.
		write(t, at("tls.crt"), cert)
		write(t, at("tls.key"), key)
	}
	rotate()
	write(t, at("ca.crt"), pemOf("CERTIFICATE", clients.cert.Raw))
	write(t, at("sluice.yaml"), []byte(`
listen: {tls: {cert_file: tls.crt, key_file: tls.key, client_ca_file: ca.crt, client_names: ["spiffe://cluster.local/ns/gateways/*"]}}
limits: [{name: a, key: client.network, rate: 1000000/s}]
`))
	p := startSluice(t, "--config", at("sluice.yaml"))
	ask := func(c credentials.TransportCredentials) string {
		t.Helper()
		conn, err := grpc.NewClient("passthrough:///"+p.grpc, grpc.WithTransportCredentials(c))
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = conn.Close() }()
		return check(t, conn, checkRequest("203.0.113.1", "GET", "/", nil))
	}
	const gateway = "spiffe://cluster.local/ns/gateways/sa/envoy"
	cert, key := clients.sign(gateway, hour)
	good := servers.client(cert, key)
	if got := ask(good); got != "ok" {
		t.Fatalf("a good client: %s\n%s", got, p.logged())
	}
	refused := map[string]credentials.TransportCredentials{"no certificate": servers.client(nil, nil)}
	cert, key = foreign.sign(gateway, hour)
	refused["a foreign CA's"] = servers.client(cert, key)
	cert, key = clients.sign("spiffe://cluster.local/ns/web/sa/shop", hour)
	refused["another name"] = servers.client(cert, key)
	cert, key = clients.sign(gateway, time.Now().Add(-time.Hour))
	refused["an expired one"] = servers.client(cert, key)
	cert, key = servers.sign(gateway, hour)
	refused["one of the server's CA"] = servers.client(cert, key)
	for name, c := range refused {
		if got := ask(c); !strings.Contains(got, "Unavailable") {
			t.Errorf("%s: %s", name, got)
		}
	}
	if n := strings.Count(p.logged(), "TLS handshake error"); n != 1 {
		t.Errorf("%d lines of failed handshakes; want 1:\n%s", n, p.logged())
	}
	if got := check(t, dial(t, p.grpc), checkRequest("203.0.113.1", "GET", "/", nil)); got == "ok" {
		t.Error("cleartext is answered")
	}
	status, _, stderr := sluice(
		t, nil, "healthcheck", "--grpc", p.grpc, "--tls-cert", at("tls.crt"), "--tls-key", at("tls.key"),
	)
	if status != 0 {
		t.Errorf("healthcheck: %d %s", status, stderr)
	}
	if status, _, _ := sluice(t, nil, "healthcheck", "--grpc", p.grpc); status == 0 {
		t.Error("healthcheck without a certificate is good")
	}

	// The server's certificate is replaced three times under load. Each new
	// connection uses the one in force.
	var asked, lost atomic.Int64
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for range 2 {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				if got := ask(good); got != "ok" {
					t.Errorf("while rotating: %s", got)
					lost.Add(1)
					return
				}
				asked.Add(1)
			}
		})
	}
	shown := func() string {
		raw, err := tls.Dial("tcp", p.grpc, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}})
		if err != nil {
			return err.Error()
		}
		defer func() { _ = raw.Close() }()
		return fmt.Sprint(raw.ConnectionState().PeerCertificates[0].SerialNumber)
	}
	for range 3 {
		before := shown()
		rotate()
		eventually(t, "the new certificate", func() bool { return shown() != before })
	}
	close(stop)
	wg.Wait()
	if lost.Load() > 0 || asked.Load() == 0 {
		t.Errorf("%d of %d lost", lost.Load(), asked.Load())
	}

	// The client CA is replaced.
	write(t, at("ca.crt"), pemOf("CERTIFICATE", foreign.cert.Raw))
	eventually(t, "the new client CA", func() bool { return ask(refused["a foreign CA's"]) == "ok" })
	if got := ask(good); !strings.Contains(got, "Unavailable") {
		t.Errorf("a client of the CA that is no more: %s", got)
	}
}

// TestMutualTLSThroughEnvoy checks that a real Envoy connects with what `sluice
// envoy` prints for listen.tls.
func TestMutualTLSThroughEnvoy(t *testing.T) {
	dir, servers, clients := t.TempDir(), newAuthority(t), newAuthority(t)
	at := func(name string) string { return filepath.Join(dir, name) }
	pair := func(a *authority, name, as string) {
		cert, key := a.sign(name, time.Now().Add(time.Hour))
		write(t, at(as+".crt"), cert)
		write(t, at(as+".key"), key)
	}
	pair(servers, "sluice.example", "server")
	pair(clients, "spiffe://cluster.local/ns/gateways/sa/envoy", "tls")
	write(t, at("clients.crt"), pemOf("CERTIFICATE", clients.cert.Raw))
	write(t, at("ca.crt"), pemOf("CERTIFICATE", servers.cert.Raw))
	write(t, at("sluice.yaml"), []byte(`
listen: {tls: {cert_file: server.crt, key_file: server.key, client_ca_file: clients.crt, client_names: ["spiffe://cluster.local/ns/gateways/*"]}}
limits: [{name: a, key: client.network, rate: 1/h, burst: 2}]
`))
	p := startSluice(t, "--config", at("sluice.yaml"))
	status, printed, stderr := sluice(
		t, []string{"SLUICE_GRPC=" + p.grpc}, "envoy", "plain", "--config", at("sluice.yaml"),
	)
	if status != 0 || !strings.Contains(printed, "envoy.transport_sockets.tls") ||
		!strings.Contains(printed, `exact: "sluice.example"`) {
		t.Fatalf("%d %s\n%s", status, stderr, printed)
	}
	binary, release := envoyBinary(t)
	up := startUpstream(t)
	bootstrap, err := envoy.Plain(envoy.Options{
		Listener: "127.0.0.1:0", Admin: "127.0.0.1:0", Sluice: p.grpc, Upstream: strings.TrimPrefix(up.URL, "http://"),
		TLS: &envoy.TLS{Name: "sluice.example", ClientCert: true}, Envoy: release,
	})
	if err != nil {
		t.Fatal(err)
	}
	addr := startEnvoyOn(
		t, binary, bootstrap, func(b string) string { return strings.ReplaceAll(b, "/etc/envoy/sluice/", dir+"/") },
	)
	for i, want := range []int{200, 200, 429} {
		if r, body := fetch(t, client(t), "http://"+addr+"/"); r.StatusCode != want {
			t.Errorf("request %d: %d %s\n%s", i, r.StatusCode, body, p.logged())
		}
	}
}
