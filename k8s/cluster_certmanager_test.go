//go:build linux

package k8s

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"net/http"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"
)

const certManager = "github.com/cert-manager/cert-manager@v1.21.2"

// TestClusterCertManager runs cert-manager's controllers on the objects that
// the chart renders for them: they issue the webhook's certificate and set its
// caBundle, and pods are injected, also while the certificate is renewed.
func TestClusterCertManager(t *testing.T) {
	var controllers, definitions string
	if os.Getenv("SLUICE_LONG") != "" {
		controllers = certManagerBinary(t)
		definitions = filepath.Join(module(t, certManager), "deploy", "crds")
	}
	if !long(t) {
		return
	}
	c := cluster(t, "--enable-aggregator-routing=true")
	if out, err := c.kubectl(t, "", "create", "-f", definitions); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	start(t, nil, controllers, c.kubeconfig)
	r := install(t, c, "--set", "certManager.enabled=true")

	// A kubelet mounts a Secret as a symbolic link to a directory, and replaces
	// the link when the Secret changes.
	mounted := t.TempDir()
	secret := func() object {
		var s object
		if c.call(t.Context(), http.MethodGet, "/api/v1/namespaces/"+release+"/secrets/sluice-webhook-tls", nil,
			&s) != nil {
			return nil
		}
		return objectField(s, "data")
	}
	content := func(encoded any) []byte {
		t.Helper()
		text, err := base64.StdEncoding.DecodeString(encoded.(string))
		if err != nil {
			t.Fatal(err)
		}
		return text
	}
	mount := func() {
		t.Helper()
		dir, err := os.MkdirTemp(mounted, "data-")
		if err != nil {
			t.Fatal(err)
		}
		for name, text := range secret() {
			if err := os.WriteFile(filepath.Join(dir, name), content(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		link := filepath.Join(mounted, "link")
		if err := errors.Join(os.Symlink(dir, link), os.Rename(link, filepath.Join(mounted, "now"))); err != nil {
			t.Fatal(err)
		}
	}
	await(t, "the certificate", func() bool { return secret()["tls.crt"] != nil })
	mount()
	found := false
	for i, arg := range r.args {
		if strings.HasPrefix(arg, "--cert-dir=") {
			found, r.args[i] = true, "--cert-dir="+filepath.Join(mounted, "now")
		}
	}
	if !found {
		t.Fatalf("%q", r.args)
	}
	// The webhook does not call the API server, so that it needs no token.
	r.env = nil
	for i := range r.running {
		r.run(t, i, "--linger=0s", "--service-account=/nonexistent")
	}
	await(t, "caBundle", func() bool {
		all := bundles(t, c.API)
		return len(all) == 2 && len(all[0]) > 0 && reflect.DeepEqual(all[0], all[1])
	})
	namespace(t, c, "shop", object{injectLabel: "enabled"})
	made := 0
	create := func() {
		t.Helper()
		p := pod(t, strings.Replace(podText("", "{containers: [{name: envoy, SECURE}]}"), "{metadata: {",
			"{metadata: {generateName: r-, ", 1))
		var out object
		if err := c.call(t.Context(), http.MethodPost, "/api/v1/namespaces/shop/pods", p, &out); err != nil ||
			sidecarIndex(out) != 0 {
			t.Errorf("pod: %v", err)
		}
		made++
	}
	create()
	if t.Failed() {
		return
	}

	var wg sync.WaitGroup
	done := make(chan struct{})
	wg.Go(func() {
		for open(done) {
			create()
		}
	})
	ended := sync.OnceFunc(func() {
		close(done)
		wg.Wait()
	})
	defer ended()
	for range 3 { // as `cmctl renew` does
		before := secret()["tls.crt"]
		must(t, c.API, http.MethodPatch, "/apis/cert-manager.io/v1/namespaces/"+release+
			"/certificates/sluice-webhook/status", []any{
			object{"op": "add", "path": "/status/conditions/-", "value": object{
				"type": "Issuing", "status": "True", "reason": "ManuallyTriggered", "message": "",
				"lastTransitionTime": time.Now().UTC().Format(time.RFC3339),
			}},
		})
		await(t, "another certificate", func() bool { now := secret()["tls.crt"]; return now != nil && now != before })
		mount()
		for _, address := range addresses { // new connections get the new certificate
			roots := x509.NewCertPool()
			roots.AppendCertsFromPEM(bundles(t, c.API)[0])
			d := tls.Dialer{Config: &tls.Config{RootCAs: roots, ServerName: "sluice-webhook." + release + ".svc"}}
			connection, err := d.DialContext(t.Context(), "tcp", address+":8443")
			if err != nil {
				t.Errorf("%s: %v", address, err)
				continue
			}
			shown := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE",
				Bytes: connection.(*tls.Conn).ConnectionState().PeerCertificates[0].Raw})
			_ = connection.Close()
			if now := content(secret()["tls.crt"]); !bytes.HasPrefix(now, shown) {
				t.Errorf("%s shows\n%s, and the Secret is\n%s", address, shown, now)
			}
		}
	}
	ended()
	t.Logf("%d pods over three renewals", made)
	if made < 10 {
		t.Error("too few to show anything")
	}
}
