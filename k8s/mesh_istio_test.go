//go:build linux

package k8s

import (
	"crypto/hmac"
	"crypto/sha256"
	"crypto/tls"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.yaml.in/yaml/v3"

	"github.com/sluiceproxy/sluice/envoy"
	"github.com/sluiceproxy/sluice/k8s/testenv"
)

const istioVersion = "v0.0.0-20260827124520-eed52ebb66ad" // the module has no tags

// istioValues are values for istiod's chart. The Envoys here are not of Istio's
// build, and have no certificates.
const istioValues = `
autoscaleEnabled: false
env: {PILOT_ENABLE_ALPN_FILTER: "false", PILOT_ENABLE_METADATA_EXCHANGE: "false", PILOT_DISABLE_MX_ALPN: "true"}
meshConfig:
  enablePrometheusMerge: false
  enableAutoMtls: false
  defaultProviders: {metrics: []}
`

// istioPod is the pod that the Envoy belongs to.
const istioPod = `
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: default, namespace: istio-system}
spec: {mtls: {mode: DISABLE}}
---
apiVersion: v1
kind: Node
metadata: {name: node}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec: {selector: {app: web}, ports: [{name: http, port: 80, targetPort: 8080}]}
---
apiVersion: v1
kind: Pod
metadata:
  name: web
  namespace: shop
  labels: {app: web, sluice.dev/inject: enabled}
  annotations: {sluice.dev/in-process: "true", sidecar.istio.io/nativeSidecar: "true"}
spec:
  nodeName: node
  initContainers: [{name: migrate, image: x}]
  containers: [{name: app, image: x, ports: [{containerPort: 8080}]}]
`

// istioBootstrap is the bootstrap config of an Istio proxy of pod POD, as far
// as an Envoy without Istio's agent supports it.
const istioBootstrap = `
node:
  id: KIND~ADDRESS~POD.shop~shop.svc.cluster.local
  cluster: POD.shop
  metadata:
    {NAMESPACE: shop, NAME: POD, CLUSTER_ID: Kubernetes, INTERCEPTION_MODE: REDIRECT, INSTANCE_IPS: ADDRESS,
     LABELS: {MARKS}}
admin: {address: {socket_address: {address: 127.0.0.1, port_value: 15000}}}
bootstrap_extensions:
- name: envoy.bootstrap.internal_listener
  typed_config: {"@type": type.googleapis.com/envoy.extensions.bootstrap.internal_listener.v3.InternalListener}
dynamic_resources:
  ads_config: {api_type: GRPC, transport_api_version: V3, grpc_services: [{envoy_grpc: {cluster_name: xds-grpc}}]}
  lds_config: {ads: {}, resource_api_version: V3}
  cds_config: {ads: {}, resource_api_version: V3}
static_resources:
  clusters:
  - name: xds-grpc
    type: STATIC
    typed_extension_protocol_options: &http2
      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
        "@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
        explicit_http_config: {http2_protocol_options: {}}
    load_assignment:
      cluster_name: xds-grpc
      endpoints: [{lb_endpoints: [{endpoint: {address: {socket_address: {address: 127.0.0.1, port_value: 15012}}}}]}]
    transport_socket:
      name: tls
      typed_config:
        "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext
        common_tls_context:
          tls_certificates: [{certificate_chain: {filename: "DIR/tls.crt"}, private_key: {filename: "DIR/tls.key"}}]
          validation_context: {trusted_ca: {filename: "DIR/ca.crt"}}
  - name: sds-grpc # certificates, for who asks for them
    type: STATIC
    typed_extension_protocol_options: *http2
    load_assignment:
      cluster_name: sds-grpc
      endpoints: [{lb_endpoints: [{endpoint: {address: {socket_address: {address: 127.0.0.1, port_value: 15999}}}}]}]
`

// istioAdmin is the admin interface of such a proxy.
const istioAdmin = "http://127.0.0.1:15000"

// istioPodOf is a pod in namespace shop for which an Istio proxy runs.
type istioPodOf struct{ kind, name, account, labels, address string }

// startProxy starts an Envoy as the Istio proxy of a pod. Istiod knows its
// service account by a certificate of istiod's own CA.
func (p istioParts) startProxy(t *testing.T, c *controlPlane, pod istioPodOf) {
	t.Helper()
	dir := t.TempDir()
	write := writeIn(t, dir)
	secret := objectField(must(t, c.API, http.MethodGet, "/api/v1/namespaces/istio-system/secrets/istio-ca-secret", nil),
		"data")
	decoded := func(name string) []byte {
		text, err := base64.StdEncoding.DecodeString(secret[name].(string))
		if err != nil {
			t.Fatal(err)
		}
		return text
	}
	ca, err := tls.X509KeyPair(decoded("ca-cert.pem"), decoded("ca-key.pem"))
	if err != nil {
		t.Fatal(err)
	}
	write("ca.crt", string(decoded("ca-cert.pem")))
	for name, text := range inPEM(t, signed(t, identity("/ns/shop/sa/"+pod.account), &ca)) {
		write(name, string(text))
	}
	bootstrap := write("bootstrap.yaml", strings.NewReplacer("KIND", pod.kind, "ADDRESS", pod.address, "POD", pod.name,
		"MARKS", pod.labels, "DIR", dir).Replace(istioBootstrap))
	start(t, nil, p.proxy, "--config-path", bootstrap, "--disable-hot-restart", "--concurrency", "1")
}

// running sets the status of a pod in namespace shop, as a kubelet would.
func running(t *testing.T, c *controlPlane, name, address string) {
	t.Helper()
	c.do(t, "", "patch", "pod", name, "--namespace", "shop", "--subresource", "status", "--type", "merge", "--patch",
		fmt.Sprintf(`{"status": {"phase": "Running", "podIP": "%s", "podIPs": [{"ip": "%[1]s"}], "conditions": `+
			`[{"type": "Ready", "status": "True"}]}}`, address))
}

// istioRedirect are the rules of istio-init: connections to the app's port go
// to Envoy, except those from Envoy itself.
const istioRedirect = `table ip istio {
  chain output {
    type nat hook output priority -100;
    ip daddr ADDRESS ip saddr != 127.0.0.6 tcp dport 8080 redirect to :15006
  }
}`

// istioParts are the paths of what tests with Istio need: istiod, its charts,
// and an Envoy.
type istioParts struct{ pilot, charts, proxy string }

func prepareIstio(t *testing.T) istioParts {
	t.Helper()
	if os.Getenv("SLUICE_LONG") == "" {
		t.Skip("builds Kubernetes and istiod, which takes minutes: SLUICE_LONG=1")
	}
	kubernetesBinaries(t)
	helmBinary(t)
	proxy, err := envoy.Binary(t.Context(), func(said string) { t.Log(said) })
	if err != nil {
		t.Fatal(err)
	}
	return istioParts{
		pilot:  istiodBinary(t),
		charts: filepath.Join(module(t, "istio.io/istio@"+istioVersion), "manifests", "charts"),
		proxy:  proxy,
	}
}

// startIstiod runs istiod with the objects and arguments of its own chart, and
// with the extension provider that a printed file has in its comments.
func (p istioParts) startIstiod(t *testing.T, c *controlPlane, printed string, more ...string) {
	t.Helper()
	_, provider, ok := strings.Cut(printed, "# meshConfig:\n")
	provider, _, end := strings.Cut(provider, "\n#\n")
	if !ok || !end {
		t.Fatal("no provider")
	}
	values := filepath.Join(t.TempDir(), "values.yaml")
	if err := os.WriteFile(values, []byte(istioValues+strings.ReplaceAll("\n"+provider, "\n# ", "\n")+"\n"),
		0o600); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{
		{"istio-base", filepath.Join(p.charts, "base"), "--create-namespace"},
		{"istiod", filepath.Join(p.charts, "istio-control", "istio-discovery"), "--values", values},
	} {
		if out, err := helm(t, append([]string{"install", "--kubeconfig", c.kubeconfig, "--namespace", "istio-system"},
			args...)...); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
	}
	deployment := must(t, c.API, http.MethodGet, "/apis/apps/v1/namespaces/istio-system/deployments/istiod", nil)
	container := at(deployment, "spec", "template", "spec", "containers").([]any)[0]
	args := []string{}
	for _, a := range at(container, "args").([]any) {
		args = append(args, a.(string))
	}
	env := append([]string{"POD_NAME=istiod", "POD_NAMESPACE=istio-system", "SERVICE_ACCOUNT=istiod"}, more...)
	for _, v := range listField(container.(object), "env") {
		if value, ok := at(v, "value").(string); ok && at(v, "name") != "KUBECONFIG" {
			env = append(env, at(v, "name").(string)+"="+value)
		}
	}
	// Istiod looks for files in its working directory.
	startIn(t, t.TempDir(), env, p.pilot, append(args, "--kubeconfig", c.kubeconfig, "--httpAddr",
		"127.0.0.1:15080")...)
	endpoints(t, c.API, "istio-system", "istiod", "https-webhook", 15017, endpoint(home, true))
	await(t, "istiod", func() bool { return get(t.Context(), "http://127.0.0.1:15080/ready").status == http.StatusOK })
	await(t, "its caBundle", func() bool {
		configuration := must(t, c.API, http.MethodGet,
			"/apis/admissionregistration.k8s.io/v1/mutatingwebhookconfigurations/istio-sidecar-injector", nil)
		return !slices.ContainsFunc(listField(configuration, "webhooks"),
			func(v any) bool { return at(v, "clientConfig", "caBundle") == nil })
	})
}

// TestMeshIstio runs a real istiod, from its own chart, on a real API server.
// It configures a real Envoy in front of an app from what `sluice envoy istio`
// prints, and its injector works on the pod beside sluice's.
func TestMeshIstio(t *testing.T) {
	istio := prepareIstio(t)
	const address = "192.0.2.5" // the pod's address
	if !testenv.Network(t, append(addresses, home, address)...) {
		return
	}
	dir := t.TempDir()
	write := writeIn(t, dir)
	c := cluster(t, "--enable-aggregator-routing=true")
	r := install(t, c)
	printed := func(t *testing.T, config string) string {
		t.Helper()
		out, err := exec.CommandContext(t.Context(), r.binary, "envoy", "istio", "--config",
			write("sluice.yaml", config)).CombinedOutput()
		if err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		return string(out)
	}

	const probe = "{name: probe, match: {paths: [/probe]}, rate: 1000000/s}, " + settledLimit
	const byAddress = "limits: [{name: few, match: {paths: [/few]}, rate: 3/h}, " + probe + "]\n"
	istio.startIstiod(t, c, printed(t, byAddress))
	for i := range r.running {
		r.run(t, i, "--linger=0s")
	}
	heard := listen(c.API)
	sidecar := istioPodOf{"sidecar", "web", "default", "app: web, sluice.dev/inject: enabled", address}

	t.Run("injection", func(t *testing.T) {
		namespace(t, c, "shop", object{"istio-injection": "enabled"})
		c.do(t, istioPod, "apply", "-f", "-")
		got := must(t, c.API, http.MethodGet, "/api/v1/namespaces/shop/pods/web", nil)
		injected(t, got, 2, "shop/web")
		var names []string
		init := listField(objectField(got, "spec"), "initContainers")
		for _, v := range init {
			names = append(names, v.(object)["name"].(string))
		}
		if diff := cmp.Diff([]string{"istio-init", "istio-proxy", "sluice", "migrate"}, names); diff != "" {
			t.Fatalf("-want +got:\n%s", diff)
		}
		// If istio-proxy is not a native sidecar, all init containers run
		// before it.
		var old object
		if err := yaml.Unmarshal([]byte(istioPod[strings.LastIndex(istioPod, "---")+3:]), &old); err != nil {
			t.Fatal(err)
		}
		objectField(old, "metadata")["name"] = "old"
		objectField(old, "metadata")["annotations"] = map[string]any{"sluice.dev/in-process": "true",
			"sidecar.istio.io/nativeSidecar": "false"}
		old = must(t, c.API, http.MethodPost, "/api/v1/namespaces/shop/pods?dryRun=All", old)
		if spec := objectField(old, "spec"); indexByName(listField(spec, "initContainers"), "sluice") != 0 ||
			indexByName(listField(spec, "containers"), istioProxy) < 0 {
			t.Errorf("%v", spec)
		}
		// Inject again, as for a pod restored from a backup.
		again := plain(t, got)
		metadata := objectField(again, "metadata")
		metadata["name"] = "again"
		delete(objectField(again, "spec"), "nodeName")
		if got := must(t, c.API, http.MethodPost, "/api/v1/namespaces/shop/pods?dryRun=All",
			again); len(listField(objectField(got, "spec"), "initContainers")) != 4 {
			t.Errorf("%v", got)
		}
		if said := heard.take(); said != "" {
			t.Errorf("warned: %s", said)
		}
	})
	if t.Failed() {
		return
	}
	c.do(t, "", "config", "set-context", "--current", "--namespace=shop") // as the file assumes
	running(t, c, "web", address)

	seen := startApp(t, address+":8080")
	nft := exec.CommandContext(t.Context(), "nft", "-f", "-")
	nft.Stdin = strings.NewReader(strings.ReplaceAll(istioRedirect, "ADDRESS", address))
	if out, err := nft.CombinedOutput(); err != nil {
		t.Fatalf("nft: %v\n%s", err, out)
	}
	ask := func(t *testing.T, method, path, token string) (status int, header http.Header) {
		t.Helper()
		request, err := http.NewRequestWithContext(t.Context(), method, "http://"+address+":8080"+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		request.Header.Set("X-Ratelimit-Remaining", "99")
		if token != "" {
			request.Header.Set("Authorization", "Bearer "+token)
		}
		request.Close = true
		response, err := http.DefaultClient.Do(request)
		if err != nil {
			t.Fatal(err)
		}
		_ = response.Body.Close()
		return response.StatusCode, response.Header
	}
	key := []byte("a key of thirty-two bytes, or more")
	token := func(sub string) string {
		encode := base64.RawURLEncoding.EncodeToString
		signed := encode([]byte(`{"alg":"HS256","kid":"k"}`)) + "." +
			encode(fmt.Appendf(nil, `{"iss":"shop","sub":%q}`, sub))
		mac := hmac.New(sha256.New, key)
		mac.Write([]byte(signed))
		return signed + "." + encode(mac.Sum(nil))
	}
	authentication := fmt.Sprintf(`---
apiVersion: security.istio.io/v1
kind: RequestAuthentication
metadata: {name: shop, namespace: shop}
spec:
  selector: {matchLabels: {app: web}}
  jwtRules: [{issuer: shop, jwks: '{"keys":[{"kty":"oct","alg":"HS256","kid":"k","k":"%s"}]}'}]
`, base64.RawURLEncoding.EncodeToString(key))

	for _, row := range []struct {
		name, config, more string
		example            bool     // use the file's example of a port's own limits
		asks               []string // the token's sub, the status, and the remaining tokens
	}{
		{"an AuthorizationPolicy", byAddress, "", false, []string{" 200 2", " 200 1", "a 200 0", " 429 0"}},
		{
			"an EnvoyFilter, for claims",
			`limits: [{name: few, match: {paths: [/few]}, key: ` +
				`'metadata.filter_metadata["envoy.filters.http.jwt_authn"].payload.sub', rate: 2/h}, ` + probe + "]\n",
			authentication, false, []string{"a 200 1", "a 200 0", "a 429 0", "b 200 1", "b 200 0", "b 429 0", " 200 1"},
		},
		{"a port's own limits", byAddress, "", true, []string{" 200 4", " 200 3", " 200 2", " 200 1", " 200 0",
			" 429 0"}},
	} {
		t.Run(row.name, func(t *testing.T) {
			file, method := printed(t, row.config), http.MethodGet
			if row.example {
				file, method = example(t, file), http.MethodPost
			}
			if said := c.do(t, file+row.more, "apply", "-f", "-"); strings.Contains(said, "Warning: unknown") {
				t.Errorf("%s", said)
			}
			run := func() *process {
				return start(t, nil, r.binary, "run", "--config", filepath.Join(dir, "sluice.yaml"))
			}
			limiter := run()
			istio.startProxy(t, c, sidecar)
			await(t, "a limited answer", func() bool {
				connection, err := net.Dial("tcp", "127.0.0.1:15006")
				if err != nil {
					return false
				}
				_ = connection.Close()
				status, header := ask(t, http.MethodGet, "/probe", "")
				if status != http.StatusOK || header.Get("X-Ratelimit-Limit") != "1000000" {
					return false
				}
				if row.more != "" { // the RequestAuthentication may take effect after sluice's filter
					status, _ = ask(t, http.MethodGet, "/probe", token("c")+"x")
					return status == http.StatusUnauthorized
				}
				return true
			})
			for _, want := range row.asks {
				sub, _, _ := strings.Cut(want, " ")
				bearer := ""
				if sub != "" {
					bearer = token(sub)
				}
				status, header := ask(t, method, "/few", bearer)
				if got := fmt.Sprint(sub, " ", status, " ", header.Get("X-Ratelimit-Remaining")); got != want {
					t.Errorf("%q, want %q", got, want)
				}
			}
			if status, header := ask(t, http.MethodGet, "/unlimited", ""); status != http.StatusOK ||
				header.Get("X-Ratelimit-Limit") != "" {
				t.Errorf("the client receives rate limit headers of the app: %d %v", status, header)
			}
			if seen().Get("X-Ratelimit-Remaining") != "" {
				t.Errorf("the app receives rate limit headers of the client: %v", seen())
			}
			took(t)
			if !row.example { // whose port has limits of its own only
				settles(t, "127.0.0.1:9003", func() int { status, _ := ask(t, http.MethodGet, "/settled", ""); return status })
			}
			isWell(t, r.binary, filepath.Join(dir, "sluice.yaml"), istioAdmin)
			// No request is lost while sluice restarts.
			restarted := newTally()
			stop := clients(t, 3, asking(t, "http://"+address+":8080/probe"), func(a answer) {
				a.pod = "web" // the app's answers do not name the pod
				restarted.add(a, true)
				if a.err == nil && a.status != http.StatusOK {
					restarted.add(answer{err: errors.New(strconv.Itoa(a.status))}, true)
				}
			})
			quick, longest := 0, time.Duration(0)
			for i := 0; i < 50 && quick < 5; i++ {
				await(t, "answers", func() bool { return restarted.answered() > 20*i })
				began := time.Now()
				_ = limiter.Process.Signal(syscall.SIGTERM)
				<-limiter.exited
				limiter = run()
				await(t, "sluice", func() bool {
					response, err := http.Get("http://127.0.0.1:9003/readyz")
					if err != nil {
						return false
					}
					_ = response.Body.Close()
					return response.StatusCode == http.StatusOK
				})
				away := time.Since(began)
				if longest = max(longest, away); away < 150*time.Millisecond { // Envoy retries for 200 ms
					quick++
				}
			}
			stop()
			t.Logf("restarts, the longest of %v: %v", longest, restarted.status)
			if len(restarted.wrong) > 0 && longest < 150*time.Millisecond || quick == 0 {
				t.Errorf("%v; %d wrong, such as %q", restarted.status, len(restarted.wrong),
					restarted.wrong[:min(3, len(restarted.wrong))])
			}
			_ = limiter.Process.Kill()
			<-limiter.exited
			if status, _ := ask(t, http.MethodGet, "/probe", ""); status != http.StatusServiceUnavailable {
				t.Errorf("without sluice: %d", status)
			}
			c.do(t, file+row.more, "delete", "-f", "-")
		})
	}
	// The sidecar trusts x-forwarded-for from a gateway with this certificate,
	// and from no other client.
	t.Run("client_ip by a gateway's certificate", func(t *testing.T) {
		file := printed(t, `client_ip: {xff_from_right: 1, from: ["spiffe://cluster.local/ns/ingress/sa/edge"]}
limits: [{name: few, match: {paths: [/few]}, when: 'client.ip == "203.0.113.9"', rate: 3/h}, `+probe+"]\n")
		strict := "---\napiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: strict, " +
			"namespace: shop}\nspec: {mtls: {mode: STRICT}}\n"
		c.do(t, file+strict, "apply", "-f", "-")
		authority := startAgent(t, "/ns/shop/sa/default")
		start(t, nil, r.binary, "run", "--config", filepath.Join(dir, "sluice.yaml"))
		istio.startProxy(t, c, sidecar)
		asks := func(account, path string) string {
			q, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "https://"+address+":8080"+path, nil)
			if err != nil {
				t.Fatal(err)
			}
			q.Header.Set("X-Forwarded-For", "198.51.100.1, 203.0.113.9")
			a := send(&http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{
				Certificates:       []tls.Certificate{signed(t, identity(account), &authority)},
				InsecureSkipVerify: true, //nolint:gosec // only the client's certificate is tested
				NextProtos:         []string{"istio-http/1.1"},
			}}}, q)
			return fmt.Sprint(a.status, " ", a.remaining)
		}
		await(t, "a limited answer", func() bool {
			return strings.HasPrefix(asks("/ns/shop/sa/other", "/probe"), "200 9")
		})
		for _, want := range []struct{ account, said string }{
			{"/ns/ingress/sa/edge", "200 2"}, {"/ns/ingress/sa/edge", "200 1"}, {"/ns/ingress/sa/edge", "200 0"},
			{"/ns/ingress/sa/edge", "429 0"}, {"/ns/shop/sa/other", "200 "},
		} {
			if got := asks(want.account, "/few"); got != want.said {
				t.Errorf("%s: %q, want %q", want.account, got, want.said)
			}
		}
	})
}

// settledLimit is a limit of one request at a time, each of which is free once it
// has ended.
const settledLimit = "{name: settled, match: {paths: [/settled]}, rate: 1/h, settle: 0}"

// settles checks that requests which ask sends one after the other are settled,
// by sluice's metrics.
func settles(t *testing.T, metrics string, ask func() int) {
	t.Helper()
	for n := 1; n <= 3; n++ {
		if status := ask(); status != http.StatusOK {
			t.Errorf("request %d of those that are settled: %d", n, status)
			return
		}
		await(t, "a settlement", func() bool {
			response, err := http.Get("http://" + metrics + "/metrics")
			if err != nil {
				return false
			}
			defer func() { _ = response.Body.Close() }()
			text, err := io.ReadAll(response.Body)
			return err == nil && strings.Contains(string(text), fmt.Sprintf("sluice_tokens_returned_total{limit=\"settled\"} %d\n", n))
		})
	}
}

// took checks in the proxy's config dump what it has accepted of a printed
// file, field by field.
func took(t *testing.T) {
	t.Helper()
	response, err := http.Get("http://127.0.0.1:15000/config_dump")
	if err != nil {
		t.Fatal(err)
	}
	dump, err := io.ReadAll(response.Body)
	_ = response.Body.Close()
	if err != nil {
		t.Fatal(err)
	}
	filters := extAuthz(t, dump)
	if len(filters) == 0 {
		t.Fatal("no ext_authz filter")
	}
	for _, f := range filters {
		got := []any{at(f, "grpc_service", "timeout"), at(f, "failure_mode_allow"), at(f, "status_on_error", "code"),
			at(f, "validate_mutations"), at(f, "charge_cluster_response_stats"), at(f, "encode_raw_headers")}
		if diff := cmp.Diff([]any{"0.200s", nil, "ServiceUnavailable", true, false, true}, got); diff != "" {
			t.Errorf("-want +got:\n%s", diff)
		}
	}
	for _, want := range []string{`"num_retries": 50`, `"connect_timeout": "0.050s"`} {
		if !strings.Contains(string(dump), want) {
			t.Errorf("no %s", want)
		}
	}
}

// example returns a printed file with its example of routes' own limits
// uncommented.
func example(t *testing.T, file string) string {
	t.Helper()
	before, text, ok := strings.Cut(file, "  # - applyTo: VIRTUAL_HOST\n")
	if !ok {
		t.Fatal("no VIRTUAL_HOST")
	}
	return before + "  - applyTo: VIRTUAL_HOST\n" + strings.ReplaceAll(text, "  #   ", "    ")
}

// extAuthz returns the ext_authz filters in a config dump.
func extAuthz(t *testing.T, dump []byte) []any {
	t.Helper()
	var all any
	if err := yaml.Unmarshal(dump, &all); err != nil {
		t.Fatal(err)
	}
	var found []any
	var walk func(any)
	walk = func(v any) {
		switch v := v.(type) {
		case map[string]any:
			if kind, _ := v["@type"].(string); strings.HasSuffix(kind, "http.ext_authz.v3.ExtAuthz") {
				found = append(found, v)
			}
			for _, w := range v {
				walk(w)
			}
		case []any:
			for _, w := range v {
				walk(w)
			}
		}
	}
	walk(all)
	return found
}
