package policy

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// certificate writes a self-signed certificate and its key into dir.
func certificate(t *testing.T, dir, name string, until time.Time) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, NotBefore: time.Now().Add(-48 * time.Hour),
		NotAfter: until, DNSNames: []string{name},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	for file, block := range map[string]*pem.Block{
		name + ".crt": {Type: "CERTIFICATE", Bytes: der}, name + ".key": {Type: "PRIVATE KEY", Bytes: keyDER},
	} {
		if err := os.WriteFile(filepath.Join(dir, file), pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// TestListenTLS checks the errors of listen.tls and routes.
func TestListenTLS(t *testing.T) {
	dir := t.TempDir()
	certificate(t, dir, "a", time.Now().Add(time.Hour))
	certificate(t, dir, "old", time.Now().Add(-time.Hour))
	if err := os.WriteFile(filepath.Join(dir, "no.pem"), []byte("no certificate"), 0o600); err != nil {
		t.Fatal(err)
	}
	parse := func(text string) (*Config, error) {
		return Parse(filepath.Join(dir, "sluice.yaml"), []byte(text), nil)
	}
	for text, want := range map[string]string{
		`listen: {tls: {cert_file: a.crt}}`:                                          "cert_file and key_file are both required",
		`listen: {tls: {cert_file: a.crt, key_file: old.key}}`:                       "are not a certificate and its key",
		`listen: {tls: {cert_file: none.crt, key_file: a.key}}`:                      "no such file",
		`listen: {tls: {cert_file: a.crt, key_file: a.key, client_names: [x]}}`:      "client_names requires client_ca_file",
		`listen: {tls: {cert_file: a.crt, key_file: a.key, client_ca_file: no.pem}}`: "contains no PEM certificate",
		`listen: {tls: {cert_file: a.crt, key_file: a.key, client_ca_file: a.crt, client_names: ["a b"]}}`: `invalid client ` +
			`name "a b"`,
		`listen: {grpc: "unix:///s.sock", tls: {cert_file: a.crt, key_file: a.key}}`: "TLS requires listen.grpc to be host:port",
		`routes: {limits: "no"}`:   "must be true or false",
		`routes: {domains: []}`:    "empty list",
		`routes: {domains: [a b]}`: "want 1 to 253",
	} {
		if _, err := parse(text); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v; want %s", text, err, want)
		}
	}
	c, err := parse(`listen: {tls: {cert_file: old.crt, key_file: old.key}}`)
	if err != nil || len(c.Warnings) != 1 || !strings.Contains(c.Warnings[0].Message, "expired") {
		t.Errorf("an old certificate: %v", err)
	}
	c, err = parse(`listen: {tls: {cert_file: a.crt, key_file: a.key, client_ca_file: a.crt, client_names: ` +
		`["spiffe://cluster.local/ns/gateways/*", "*.example.com"]}}`)
	if err != nil {
		t.Fatal(err)
	}
	spiffe := func(s string) []*url.URL {
		u, err := url.Parse(s)
		if err != nil {
			t.Fatal(err)
		}
		return []*url.URL{u}
	}
	for _, allowed := range []*x509.Certificate{
		{URIs: spiffe("spiffe://cluster.local/ns/gateways/sa/envoy")}, {DNSNames: []string{"other", "gw.example.com"}},
	} {
		if err := c.ListenTLS.AllowsClient(allowed); err != nil {
			t.Error(err)
		}
	}
	for _, refused := range []*x509.Certificate{
		{}, {URIs: spiffe("spiffe://cluster.local/ns/web/sa/envoy")}, {DNSNames: []string{"example.com"}},
		{Subject: pkix.Name{CommonName: "gw.example.com"}},
	} {
		if err := c.ListenTLS.AllowsClient(refused); err == nil {
			t.Errorf("%v %v is allowed", refused.URIs, refused.DNSNames)
		}
	}
}

// TestHashHoldsNoSecret checks that a config's hash, which is a metric, does
// not depend on its secrets, and differs between configs.
func TestHashHoldsNoSecret(t *testing.T) {
	hash := func(secret, rest string) string {
		t.Helper()
		text := "key_secret: " + secret + "\nstore: {redis: {url: 'redis://user:" + secret + "@127.0.0.1:6379/0'}}\n" + rest
		c, err := Parse("sluice.yaml", []byte(text), nil)
		if err != nil {
			t.Fatal(err)
		}
		return c.Hash
	}
	password := func(secret string) string {
		text := "store: {redis: {url: 'redis://127.0.0.1', password: " + secret + "}}\nkey_secret: |\n  " + secret + "\n"
		c, err := Parse("sluice.yaml", []byte(text), nil)
		if err != nil {
			t.Fatal(err)
		}
		return c.Hash
	}
	first := hash("one-secret-of-many", "")
	if other := hash("another-secret-of-many", ""); other != first {
		t.Errorf("%s and %s: another secret, another hash", first, other)
	}
	if other := hash("one-secret-of-many", "domain: other"); other == first {
		t.Error("another config has the same hash")
	}
	if password("one-secret-of-many") != password("another-secret-of-many") {
		t.Error("another password, another hash")
	}
}

// TestSecurityWarnings checks warnings about valid settings that expose
// something.
func TestSecurityWarnings(t *testing.T) {
	dir := t.TempDir()
	for name, mode := range map[string]os.FileMode{"open": 0o644, "closed": 0o640} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte("a-secret-of-some-bytes"), mode); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(filepath.Join(dir, name), mode); err != nil {
			t.Fatal(err)
		}
	}
	const exempt = "exempt: [{match: {clients: [10.0.0.0/8]}}]\n"
	for text, want := range map[string]string{
		exempt + "client_ip: {xff_from_right: 1}":                     "without from",
		exempt + "client_ip: {header: x-real-ip}":                     "without from",
		exempt + "client_ip: {xff_from_right: 1, from: [10.0.0.0/8]}": "",
		exempt:                               "",
		"client_ip: {xff_from_right: 1}":     "",
		"key_secret: short":                  "a secret of 5 bytes",
		"key_secret: a-secret-of-some-bytes": "",
		"key_secret_file: open":              "open is readable by every user (mode 0644)",
		"key_secret_file: closed":            "",
		"listen: {admin: ':9002'}":           "open to everyone",
		"listen: {admin: '0.0.0.0:9002'}":    "open to everyone",
		"listen: {admin: '[::]:9002'}":       "open to everyone",
		"listen: {admin: '10.0.0.1:9002'}":   "",
	} {
		c, err := Parse(filepath.Join(dir, "sluice.yaml"), []byte(text), nil)
		if err != nil {
			t.Fatal(err)
		}
		switch {
		case want == "" && len(c.Warnings) > 0:
			t.Errorf("%s: %v", text, c.Warnings)
		case want != "" && (len(c.Warnings) != 1 || !strings.Contains(c.Warnings[0].Message, want)):
			t.Errorf("%s: %v; want %s", text, c.Warnings, want)
		}
		for _, w := range c.Warnings {
			if strings.Contains(w.Message, "short\"") || strings.Contains(w.Message, "a-secret") {
				t.Errorf("a warning quotes the secret: %s", w.Message)
			}
		}
	}
}
