//go:build linux

package k8s

import (
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

// Only clients with a certificate of the CA and an accepted name are answered.
// The CA is reread, and kept while its file is invalid.
func TestClientCA(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "ca.crt")
	write := func(text []byte) {
		t.Helper()
		if err := os.WriteFile(file, text, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	inPEM := func(c tls.Certificate) []byte {
		return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Certificate[0]})
	}
	authority := func(name string) tls.Certificate {
		return selfSigned(t, x509.Certificate{Subject: pkix.Name{CommonName: name}, KeyUsage: x509.KeyUsageCertSign})
	}
	ours, foreign := authority("ours"), authority("foreign")
	client := func(by tls.Certificate, name, dns string) []tls.Certificate {
		template := x509.Certificate{Subject: pkix.Name{CommonName: name},
			ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}
		if dns != "" {
			template.DNSNames = []string{dns}
		}
		return []tls.Certificate{signed(t, template, &by)}
	}
	serving := selfSigned(t, x509.Certificate{IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}})
	start := func(names ...string) (answered func([]tls.Certificate) bool) {
		t.Helper()
		ca := ClientCA{File: file, Names: names}
		config, err := ca.Require(&tls.Config{MinVersion: tls.VersionTLS12, Certificates: []tls.Certificate{serving}})
		if err != nil {
			t.Fatal(err)
		}
		server := httptest.NewUnstartedServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
		server.TLS = config
		server.Config.ErrorLog, _ = zap.NewStdLogAt(zap.NewNop(), zapcore.DebugLevel)
		server.StartTLS()
		t.Cleanup(server.Close)
		roots := x509.NewCertPool()
		roots.AddCert(serving.Leaf)
		return func(certificates []tls.Certificate) bool {
			c := http.Client{Transport: &http.Transport{DisableKeepAlives: true,
				TLSClientConfig: &tls.Config{RootCAs: roots, Certificates: certificates}}}
			response, err := c.Get(server.URL)
			if err != nil {
				return false
			}
			_ = response.Body.Close()
			return response.StatusCode == http.StatusOK
		}
	}
	if _, err := (&ClientCA{File: file}).Require(&tls.Config{MinVersion: tls.VersionTLS12}); err == nil {
		t.Error("no error for a missing file")
	}
	write([]byte("no certificate"))
	if _, err := (&ClientCA{File: file}).Require(&tls.Config{MinVersion: tls.VersionTLS12}); err == nil ||
		!strings.Contains(err.Error(), file) {
		t.Errorf("no certificate: %v", err)
	}
	write(inPEM(ours))
	anyName, named := start(), start("api", "api.example")
	for what, c := range map[string]struct {
		certificates []tls.Certificate
		any, named   bool
	}{
		"none":                   {nil, false, false},
		"a foreign CA's":         {client(foreign, "api", ""), false, false},
		"ours":                   {client(ours, "api", ""), true, true},
		"ours, by its DNS name":  {client(ours, "", "api.example"), true, true},
		"ours, with other names": {client(ours, "kubelet", "kubelet.example"), true, false},
		"ours, with no name":     {client(ours, "", ""), true, false},
	} {
		if got := anyName(c.certificates); got != c.any {
			t.Errorf("%s: answered %v", what, got)
		}
		if got := named(c.certificates); got != c.named {
			t.Errorf("%s, with accepted names: answered %v", what, got)
		}
	}
	write([]byte("broken"))
	if !anyName(client(ours, "api", "")) {
		t.Error("an invalid file replaces the CA")
	}
	write(inPEM(foreign))
	if anyName(client(ours, "api", "")) || !anyName(client(foreign, "api", "")) {
		t.Error("a new CA is not read")
	}
}
