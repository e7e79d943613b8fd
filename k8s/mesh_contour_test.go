//go:build linux

package k8s

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/sluiceproxy/sluice/envoy"
	"github.com/sluiceproxy/sluice/k8s/testenv"
)

const contourVersion = "v1.33.8"

// contourPlain is a virtual host without TLS.
const contourPlain = `apiVersion: projectcontour.io/v1
kind: HTTPProxy
metadata: {name: plain, namespace: shop}
spec:
  virtualhost: {fqdn: plain.example.com}
  routes: [{services: [{name: web, port: 80}]}]
`

// TestMeshContour runs a real Contour on a real API server, which configures a
// real Envoy in front of an app from envoy/contour.yaml.
func TestMeshContour(t *testing.T) {
	if os.Getenv("SLUICE_LONG") == "" {
		t.Skip("builds Kubernetes and Contour, which takes minutes: SLUICE_LONG=1")
	}
	kubernetesBinaries(t)
	helmBinary(t)
	contour := contourBinary(t)
	definitions := filepath.Join(module(t, "github.com/projectcontour/contour@"+contourVersion),
		"examples", "contour", "01-crds.yaml")
	proxy, err := envoy.Binary(t.Context(), func(said string) { t.Log(said) })
	if err != nil {
		t.Fatal(err)
	}
	const app = "192.0.2.5"
	if !testenv.Network(t, append(addresses, home, app)...) {
		return
	}
	text, err := os.ReadFile("../envoy/contour.yaml")
	if err != nil {
		t.Fatal(err)
	}
	file := string(text)
	dir := t.TempDir()
	write := writeIn(t, dir)
	c := cluster(t)
	do := func(stdin string, args ...string) {
		t.Helper()
		if out, err := c.kubectl(t, stdin, args...); err != nil || strings.Contains(out, "Warning") {
			t.Fatalf("kubectl %s: %v\n%s", strings.Join(args, " "), err, out)
		}
	}
	do("", "create", "-f", definitions)
	do("", "create", "namespace", "projectcontour")
	namespace(t, c, "shop", nil)
	certificate := selfSigned(t, x509.Certificate{DNSNames: []string{"shop.example.com"}})
	for name, text := range inPEM(t, certificate) {
		write(name, string(text))
	}
	do("", "create", "secret", "tls", "shop-tls", "--namespace", "shop", "--cert", filepath.Join(dir, "tls.crt"),
		"--key", filepath.Join(dir, "tls.key"))

	// Endpoints of the chart's Service and of the app's, which have no pods
	// here.
	if out, err := helm(t, "install", "sluice", chartDir, "--kubeconfig", c.kubeconfig, "--namespace", release,
		"--create-namespace", "--set", "gateway.enabled=true,trialRedis.enabled=true"); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	config := write("sluice.yaml", "limits: [{name: few, match: {paths: [/few]}, rate: 3/h}, {name: probe, match: "+
		"{paths: [/probe]}, rate: 1000000/s}, {name: page, match: {paths: [/page]}, rate: 1/h}, {name: call, match: "+
		"{paths: [/shop.Web/Call]}, rate: 1/h}]\n")
	sluice := program(t)
	run := func(t *testing.T, address string) *process {
		t.Helper()
		p := start(t, nil, sluice, "run", "--config", config, "--grpc", address+":9001", "--metrics", address+":9003",
			"--admin", address+":9002")
		await(t, "sluice", func() bool {
			return get(t.Context(), "http://"+address+":9003/readyz").status == http.StatusOK
		})
		return p
	}
	endpoints(t, c.API, release, "sluice-gateway", "grpc", 9001, endpoint(addresses[0], true))
	do(`{apiVersion: v1, kind: Service, metadata: {name: web, namespace: shop}, spec: {ports: [{name: http, port: `+
		`80, targetPort: 8081}]}}`, "create", "-f", "-")
	endpoints(t, c.API, "shop", "web", "http", 8081, endpoint(app, true))
	// Envoy listens on port 8080 of all addresses.
	seen := startApp(t, app+":8081")

	roots := x509.NewCertPool()
	roots.AddCert(certificate.Leaf)
	ask := func(method, url string, headers ...string) answer {
		t.Helper()
		q, err := http.NewRequestWithContext(t.Context(), method, url, nil)
		if err != nil {
			t.Fatal(err)
		}
		port := map[string]string{"http": "8080", "https": "8443"}[q.URL.Scheme]
		q.Host, q.URL.Host = q.URL.Host, "127.0.0.1:"+port
		q.Header.Set("X-Ratelimit-Remaining", "99")
		for i := 0; i < len(headers); i += 2 {
			q.Header.Set(headers[i], headers[i+1])
		}
		return send(&http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots,
			ServerName: q.Host}}}, q)
	}
	admin := filepath.Join(dir, "admin.sock") // of Envoy
	clusters := func(t *testing.T) string {
		t.Helper()
		client := http.Client{Transport: &http.Transport{DialContext: func(
			ctx context.Context, _, _ string,
		) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", admin)
		}, DisableKeepAlives: true}}
		response, err := client.Get("http://envoy/clusters")
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = response.Body.Close() }()
		text, err := io.ReadAll(response.Body)
		if err != nil {
			t.Fatal(err)
		}
		return string(text)
	}
	// front starts a Contour with this config, and its Envoy.
	front := func(t *testing.T, config string) {
		start(t, nil, contour, "serve", "--kubeconfig", c.kubeconfig, "--config-path", write("contour.yaml", config),
			"--insecure", "--xds-address", "127.0.0.1", "--xds-port", "8001", "--disable-leader-election")
		bootstrap := filepath.Join(dir, "bootstrap.json")
		if out, err := exec.CommandContext(t.Context(), contour, "bootstrap", bootstrap, "--xds-address", "127.0.0.1",
			"--xds-port", "8001", "--admin-address", admin).CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		start(t, nil, proxy, "--config-path", bootstrap, "--service-cluster", "shop", "--service-node", "node",
			"--disable-hot-restart", "--concurrency", "1")
	}

	t.Run("a virtual host with TLS", func(t *testing.T) {
		before, example, ok := strings.Cut(file, "    # authPolicy:\n")
		if !ok {
			t.Fatal("no authPolicy")
		}
		with := before + "    authPolicy:\n" + strings.ReplaceAll(example, "    # ", "    ")
		before, policy, ok := strings.Cut(with, "    # corsPolicy:\n")
		policy, after, isFollowed := strings.Cut(policy, "  routes:\n")
		if !ok || !isFollowed {
			t.Fatal("no corsPolicy")
		}
		with = before + "    corsPolicy:\n" + strings.ReplaceAll(policy, "    # ", "    ") + "  routes:\n" + after
		with = strings.Replace(with, "  - conditions: ", "  - permitInsecure: true\n    conditions: ", 1)
		do(with, "apply", "-f", "-")
		limiter := run(t, addresses[0])
		front(t, "")
		await(t, "a limited answer", func() bool {
			a := ask(http.MethodGet, "https://shop.example.com/probe")
			return a.status == http.StatusOK && a.remaining != ""
		})
		for i, want := range []string{"200 3 2", "200 3 1", "200 3 0", "429 3 0"} {
			a := ask(http.MethodGet, "https://shop.example.com/few")
			if got := fmt.Sprint(a.status, " ", a.limit, " ", a.remaining); got != want || a.err != nil {
				t.Errorf("request %d: %+v, want %s", i, a, want)
			}
		}
		if a := ask(http.MethodGet, "https://shop.example.com/unlimited"); a.status != http.StatusOK || a.limit != "" {
			t.Errorf("the client receives rate limit headers of the app: %+v", a)
		}
		if a := ask(http.MethodPost, "https://shop.example.com/"); a.remaining != "4" { // the route's own limit
			t.Errorf("%+v", a)
		}
		page := asker(func(_ *testing.T, method, path string, headers ...string) answer {
			return ask(method, "https://shop.example.com"+path, headers...)
		})
		page.fromPage(t)
		page.byGRPCWeb(t, http.StatusOK)
		isWell(t, sluice, config, "unix://"+admin)
		await(t, "the plain port, which is not limited", func() bool { // the known pitfall of permitInsecure
			a := ask(http.MethodGet, "http://shop.example.com/few")
			return a.status == http.StatusOK && a.remaining == ""
		})
		if seen().Get("X-Ratelimit-Remaining") != "" {
			t.Errorf("the app receives rate limit headers of the client: %v", seen())
		}
		// A rollout: the new sluice is added to the endpoints, the old one is
		// removed, and then it is stopped.
		all := newTally()
		stop := clients(t, 3, func() answer { return ask(http.MethodGet, "https://shop.example.com/probe") },
			func(a answer) { all.add(a, true) })
		await(t, "answers", func() bool { return all.answered() > 20 })
		_ = run(t, addresses[1])
		endpoints(t, c.API, release, "sluice-gateway", "grpc", 9001, endpoint(addresses[0], false),
			endpoint(addresses[1], true))
		await(t, "the end of checks", func() bool { return !strings.Contains(clusters(t), addresses[0]+":9001") })
		_ = limiter.Process.Signal(syscall.SIGTERM)
		<-limiter.exited
		n := all.answered()
		await(t, "answers", func() bool { return all.answered() > n+20 })
		stop()
		if len(all.wrong) > 0 {
			t.Errorf("%v; %d wrong, such as %q", all.status, len(all.wrong), all.wrong[:min(3, len(all.wrong))])
		}
		t.Logf("a rollout: %v", all.status)
	})
	t.Run("without sluice", func(t *testing.T) {
		do(file, "apply", "-f", "-")
		front(t, "")
		await(t, "a refusal", func() bool {
			return ask(http.MethodGet, "https://shop.example.com/probe").status == http.StatusForbidden
		})
	})
	t.Run("every virtual host", func(t *testing.T) {
		_, global, _ := strings.Cut(file, "#     globalExtAuth:\n")
		global, _, ok := strings.Cut(global, "# - If sluice")
		if !ok {
			t.Fatal("no globalExtAuth")
		}
		do(contourPlain, "apply", "-f", "-")
		run(t, addresses[1])
		front(t, "globalExtAuth:\n"+strings.ReplaceAll(global, "#     ", ""))
		await(t, "a limited answer", func() bool {
			a := ask(http.MethodGet, "http://plain.example.com/probe")
			return a.status == http.StatusOK && a.remaining != ""
		})
		var got []string
		for range 4 {
			a := ask(http.MethodGet, "http://plain.example.com/few")
			got = append(got, fmt.Sprint(a.status, " ", a.remaining))
		}
		if diff := cmp.Diff([]string{"200 2", "200 1", "200 0", "429 0"}, got); diff != "" {
			t.Errorf("-want +got:\n%s", diff)
		}
		// This virtual host's route does not remove what others send as limits.
		isWell(t, sluice, config, "unix://"+admin, "headers")
	})
}
