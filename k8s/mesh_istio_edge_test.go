//go:build linux

package k8s

import (
	gotls "crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tls "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	sds "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/sluiceproxy/sluice/k8s/testenv"
)

const gatewayAPI = "sigs.k8s.io/gateway-api@v1.6.0"

// istioEdges are an ingress gateway and a waypoint of the Gateway API in front
// of an app, and their pods. Istiod creates Deployments for them, too, but
// nothing here runs these.
const istioEdges = `
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: default, namespace: istio-system}
spec: {mtls: {mode: DISABLE}}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop, labels: {istio.io/use-waypoint: waypoint}}
spec: {ports: [{name: http, port: 80, targetPort: 8080}]}
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: edge, namespace: shop}
spec: {gatewayClassName: istio, listeners: [{name: http, port: 80, protocol: HTTP}]}
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: web, namespace: shop}
spec:
  parentRefs: [{name: edge}]
  hostnames: [shop.example.com]
  rules:
  - backendRefs: [{name: web, port: 80}]
    filters: [{type: CORS, cors: {allowOrigins: ["` + pageOrigin + `"], allowMethods: [GET]}}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: waypoint, namespace: shop, labels: {istio.io/waypoint-for: service}}
spec: {gatewayClassName: istio-waypoint, listeners: [{name: mesh, port: 15008, protocol: HBONE}]}
---
apiVersion: v1
kind: Node
metadata: {name: node}
---
apiVersion: v1
kind: Pod
metadata: {name: edge, namespace: shop, labels: {gateway.networking.k8s.io/gateway-name: edge}}
spec: {nodeName: node, containers: [{name: istio-proxy, image: x}]}
---
apiVersion: v1
kind: Pod
metadata: {name: waypoint, namespace: shop, labels: {gateway.networking.k8s.io/gateway-name: waypoint}}
spec: {nodeName: node, containers: [{name: istio-proxy, image: x}]}
`

// istioOnly removes what only Istio's own build of Envoy has: filters that
// identify the peer for telemetry, and a field of tunnels from other networks.
// It keeps what the same filter says about the ends of the tunnel.
const istioOnly = `
apiVersion: networking.istio.io/v1alpha3
kind: EnvoyFilter
metadata: {name: plain-envoy, namespace: shop}
spec:
  targetRefs: [{group: gateway.networking.k8s.io, kind: Gateway, name: waypoint}]
  configPatches:
  - applyTo: HTTP_FILTER
    match: {listener: {filterChain: {filter: {name: envoy.filters.network.http_connection_manager,
      subFilter: {name: waypoint_downstream_peer_metadata}}}}}
    patch: {operation: REMOVE}
  - applyTo: HTTP_FILTER
    match: {listener: {filterChain: {filter: {name: envoy.filters.network.http_connection_manager,
      subFilter: {name: waypoint_upstream_peer_metadata}}}}}
    patch: {operation: REMOVE}
  - applyTo: HTTP_FILTER
    match: {listener: {name: connect_terminate,
      filterChain: {filter: {name: envoy.filters.network.http_connection_manager,
      subFilter: {name: envoy.filters.http.router}}}}}
    patch:
      operation: INSERT_BEFORE
      value:
        name: ends
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.http.set_filter_state.v3.Config
          on_request_headers:
          - {object_key: envoy.filters.listener.original_dst.local_ip, shared_with_upstream: ONCE,
             format_string: {text_format_source: {inline_string: "%REQ(:AUTHORITY)%"}}}
          - {object_key: envoy.filters.listener.original_dst.remote_ip, shared_with_upstream: ONCE,
             format_string: {text_format_source: {inline_string: "%DOWNSTREAM_REMOTE_ADDRESS%"}}}
  - applyTo: HTTP_FILTER
    match: {listener: {name: connect_terminate,
      filterChain: {filter: {name: envoy.filters.network.http_connection_manager,
      subFilter: {name: connect_authority}}}}}
    patch: {operation: REMOVE}
`

// hboneClient is an Envoy that acts as ztunnel does for a pod: it tunnels
// connections to the waypoint WAYPOINT, for the service SERVICE.
const hboneClient = `
static_resources:
  listeners:
  - address: {socket_address: {address: 127.0.0.1, port_value: 18080}}
    filter_chains:
    - filters:
      - name: envoy.filters.network.tcp_proxy
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy
          stat_prefix: hbone
          cluster: waypoint
          tunneling_config: {hostname: "SERVICE:80"}
  clusters:
  - name: waypoint
    type: STATIC
    upstream_bind_config: {source_address: {address: CLIENT, port_value: 0}}
    typed_extension_protocol_options:
      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
        "@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
        explicit_http_config: {http2_protocol_options: {}}
    load_assignment:
      cluster_name: waypoint
      endpoints: [{lb_endpoints: [{endpoint: {address: {socket_address: {address: WAYPOINT, port_value: 15008}}}}]}]
    transport_socket:
      name: tls
      typed_config:
        "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext
        common_tls_context:
          tls_params: {tls_maximum_protocol_version: TLSv1_3}
          alpn_protocols: [h2]
          tls_certificates: [{certificate_chain: {filename: DIR/hbone-tls.crt}, private_key: {filename: DIR/hbone-tls.key}}]
          validation_context: {trusted_ca: {filename: DIR/hbone-tls.crt}}
`

// secrets is the part of Istio's agent that serves certificates (SDS).
type secrets struct {
	sds.UnimplementedSecretDiscoveryServiceServer
	certificate, key []byte // in PEM; certificate is also the CA
}

func (s *secrets) StreamSecrets(stream sds.SecretDiscoveryService_StreamSecretsServer) error {
	for version := 0; ; version++ {
		request, err := stream.Recv()
		if err != nil {
			return err
		}
		if request.GetVersionInfo() != "" { // an acknowledgement
			continue
		}
		response := &discovery.DiscoveryResponse{VersionInfo: "1", Nonce: fmt.Sprint(version),
			TypeUrl: request.GetTypeUrl()}
		for _, name := range request.GetResourceNames() {
			inline := func(text []byte) *core.DataSource {
				return &core.DataSource{Specifier: &core.DataSource_InlineBytes{InlineBytes: text}}
			}
			answer := &tls.Secret{Name: name}
			if name == "ROOTCA" {
				answer.Type = &tls.Secret_ValidationContext{
					ValidationContext: &tls.CertificateValidationContext{TrustedCa: inline(s.certificate)},
				}
			} else {
				answer.Type = &tls.Secret_TlsCertificate{TlsCertificate: &tls.TlsCertificate{
					CertificateChain: inline(s.certificate), PrivateKey: inline(s.key),
				}}
			}
			resource, err := anypb.New(answer)
			if err != nil {
				return err
			}
			response.Resources = append(response.Resources, resource)
		}
		if err := stream.Send(response); err != nil {
			return err
		}
	}
}

// identity returns the template of a certificate with this SPIFFE identity.
func identity(path string) x509.Certificate {
	return x509.Certificate{Subject: pkix.Name{CommonName: path},
		URIs: []*url.URL{{Scheme: "spiffe", Host: "cluster.local", Path: path}}}
}

// inPEM returns a certificate and its key as PEM files, by file name.
func inPEM(t *testing.T, certificate gotls.Certificate) map[string][]byte {
	t.Helper()
	key, err := x509.MarshalPKCS8PrivateKey(certificate.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	return map[string][]byte{
		"tls.crt": pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: certificate.Certificate[0]}),
		"tls.key": pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key}),
	}
}

// startAgent serves a certificate, which is also the CA, to Istio's proxies,
// and returns it.
func startAgent(t *testing.T, account string) gotls.Certificate {
	t.Helper()
	certificate := selfSigned(t, identity(account))
	text := inPEM(t, certificate)
	server := grpc.NewServer()
	sds.RegisterSecretDiscoveryServiceServer(server, &secrets{certificate: text["tls.crt"], key: text["tls.key"]})
	listener, err := net.Listen("tcp", "127.0.0.1:15999")
	if err != nil {
		t.Fatal(err)
	}
	go func() { _ = server.Serve(listener) }()
	t.Cleanup(server.Stop)
	return certificate
}

// The addresses of the pods in the tests of gateways and waypoints.
const edgeApp, edgeGateway, edgeWaypoint, edgeClient = "192.0.2.5", "192.0.2.6", "192.0.2.7", "192.0.2.8"

// edges is a mesh with an ingress gateway and a waypoint in front of an app.
// Neither proxy runs yet.
type edges struct {
	istio  istioParts
	c      *controlPlane
	sluice string             // the program
	config string             // sluice's
	seen   func() http.Header // of the latest request to the app
	dir    string
}

// edge is one of the proxies of edges.
type edge struct {
	kind string // as `sluice envoy` names it
	pod  istioPodOf
	// ask sends a request through the proxy to the app. The client's address is
	// edgeClient.
	ask asker
}

// startEdges runs istiod on a real API server, with sluice's chart installed
// with these values. The test runs in a network of its own with the addresses
// above. files are written beside sluice's config.
func startEdges(t *testing.T, istio istioParts, values, config string, files map[string][]byte) *edges {
	t.Helper()
	e := &edges{istio: istio, sluice: program(t), dir: t.TempDir()}
	write := writeIn(t, e.dir)
	for name, text := range files {
		write(name, string(text))
	}
	e.configure(t, config)
	e.c = cluster(t, "--enable-aggregator-routing=true")
	e.c.do(t, "", "create", "-f", filepath.Join(module(t, gatewayAPI), "config", "crd", "standard"))
	if out, err := helm(t, "install", "sluice", chartDir, "--kubeconfig", e.c.kubeconfig, "--namespace", release,
		"--create-namespace", "--set", "webhook.enabled=false,gateway.enabled=true,trialRedis.enabled=true"+values,
	); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	namespace(t, e.c, "shop", nil)
	istio.startIstiod(t, e.c, e.printed(t, "istio-gateway"), "PILOT_ENABLE_AMBIENT=true")
	e.c.do(t, istioEdges+"---"+istioOnly, "apply", "-f", "-")
	running(t, e.c, "edge", edgeGateway)
	running(t, e.c, "waypoint", edgeWaypoint)
	endpoints(t, e.c.API, release, "sluice-gateway", "grpc", 9001, endpoint(addresses[0], true))
	endpoints(t, e.c.API, "shop", "web", "http", 8080, endpoint(edgeApp, true))
	e.c.do(t, "", "config", "set-context", "--current", "--namespace=shop") // as the files assume
	e.seen = startApp(t, edgeApp+":8080")
	return e
}

// configure writes sluice's config.
func (e *edges) configure(t *testing.T, config string) {
	t.Helper()
	e.config = writeIn(t, e.dir)("sluice.yaml", config)
}

// printed returns what `sluice envoy` prints for the config.
func (e *edges) printed(t *testing.T, kind string) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), e.sluice, "envoy", kind, "--config", e.config).CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return string(out)
}

// all returns the gateway, and the waypoint behind a client that acts as
// ztunnel does.
func (e *edges) all(t *testing.T) []edge {
	t.Helper()
	asking := func(client *http.Client, url string) asker {
		return func(t *testing.T, method, path string, headers ...string) answer {
			q, err := http.NewRequestWithContext(t.Context(), method, url+path, nil)
			if err != nil {
				return answer{err: err}
			}
			q.Host = "shop.example.com"
			q.Header.Set("X-Ratelimit-Remaining", "99")
			for i := 0; i < len(headers); i += 2 {
				q.Header.Set(headers[i], headers[i+1])
			}
			return send(client, q)
		}
	}
	// Istio's agent, for the tunnel.
	write := writeIn(t, e.dir)
	for name, text := range inPEM(t, startAgent(t, "/ns/shop/sa/default")) {
		write("hbone-"+name, string(text))
	}
	service := e.c.do(t, "", "get", "service", "web", "--output", "jsonpath={.spec.clusterIP}")
	text := strings.NewReplacer("SERVICE", service, "WAYPOINT", edgeWaypoint, "CLIENT", edgeClient, "DIR",
		e.dir).Replace(hboneClient)
	start(t, nil, e.istio.proxy, "--config-path", write("client.yaml", text), "--disable-hot-restart",
		"--concurrency", "1")
	dialer := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(edgeClient)}}
	from := &http.Client{Transport: &http.Transport{DialContext: dialer.DialContext}}
	const label = "gateway.networking.k8s.io/gateway-name: "
	return []edge{
		{"istio-gateway", istioPodOf{"router", "edge", "edge-istio", label + "edge", edgeGateway},
			asking(from, "http://"+edgeGateway)},
		{"istio-waypoint", istioPodOf{"waypoint", "waypoint", "waypoint", label + "waypoint", edgeWaypoint},
			asking(http.DefaultClient, "http://127.0.0.1:18080")},
	}
}

// run starts sluice with the config, as the chart's Deployment does.
func (e *edges) run(t *testing.T) *process {
	t.Helper()
	return start(t, nil, e.sluice, "run", "--config", e.config, "--grpc", addresses[0]+":9001", "--metrics",
		addresses[0]+":9003")
}

// istioEdgeLimits are limits for the tests of gateways and waypoints. A waypoint
// sees the caller's address, but no certificate.
const istioEdgeLimits = `
limits:
- {name: few, match: {paths: [/few]}, when: 'client.ip == "` + edgeClient + `"', rate: 3/h}
- {name: page, match: {paths: [/page]}, rate: 1/h}
- {name: call, match: {paths: [/shop.Web/Call]}, rate: 1/h}
- {name: certified, match: {principals: ["spiffe://*"]}, rate: 1/h}
- {name: probe, match: {paths: [/probe]}, rate: 1000000/s}
- ` + settledLimit + "\n"

// fewLimited sends requests until the limit few denies one.
func (e edge) fewLimited(t *testing.T) {
	t.Helper()
	await(t, "a limited answer", func() bool {
		a := e.ask(t, http.MethodGet, "/probe")
		return a.status == http.StatusOK && a.remaining != ""
	})
	// Doctor counts failed checks. Those before the proxy was ready say nothing.
	response, err := http.Post(istioAdmin+"/reset_counters", "", nil)
	if err != nil {
		t.Fatal(err)
	}
	_ = response.Body.Close()
	var got []string
	for range 4 {
		a := e.ask(t, http.MethodGet, "/few")
		got = append(got, fmt.Sprint(a.status, " ", a.limit, " ", a.remaining))
	}
	if diff := cmp.Diff([]string{"200 3 2", "200 3 1", "200 3 0", "429 3 0"}, got); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

// TestMeshIstioEdge applies what `sluice envoy istio-gateway` and
// istio-waypoint print to a real istiod. It configures real Envoys in front of
// an app: an ingress gateway, and a waypoint that is reached through a tunnel
// of ambient mode.
func TestMeshIstioEdge(t *testing.T) {
	istio := prepareIstio(t)
	if !testenv.Network(t, append(addresses, home, edgeApp, edgeGateway, edgeWaypoint, edgeClient)...) {
		return
	}
	mesh := startEdges(t, istio, "", istioEdgeLimits, nil)
	for _, e := range mesh.all(t) {
		t.Run(e.kind, func(t *testing.T) {
			file := mesh.printed(t, e.kind)
			if said := mesh.c.do(t, file, "apply", "-f", "-"); strings.Contains(said, "Warning: unknown") {
				t.Errorf("%s", said)
			}
			limiter := mesh.run(t)
			istio.startProxy(t, mesh.c, e.pod)
			e.fewLimited(t)
			if a := e.ask(t, http.MethodGet, "/unlimited"); a.status != http.StatusOK || a.limit != "" {
				t.Errorf("the client receives rate limit headers of the app: %+v", a)
			}
			if mesh.seen().Get("X-Ratelimit-Remaining") != "" {
				t.Errorf("the app receives rate limit headers of the client: %v", mesh.seen())
			}
			took(t)
			settles(t, addresses[0]+":9003", func() int { return e.ask(t, http.MethodGet, "/settled").status })
			e.ask.byGRPCWeb(t, http.StatusTooManyRequests)
			// The limit certified never matches, as the proxies verify no certificate.
			isWell(t, mesh.sluice, mesh.config, istioAdmin, "identity")
			if e.kind == "istio-gateway" { // the waypoint's file has no example
				e.ask.fromPage(t)
				mesh.c.do(t, example(t, file), "apply", "-f", "-")
				await(t, "the host's own limit", func() bool { return e.ask(t, http.MethodPost, "/").remaining == "4" })
			}
			_ = limiter.Process.Kill()
			<-limiter.exited
			if a := e.ask(t, http.MethodGet, "/probe"); a.status != http.StatusServiceUnavailable {
				t.Errorf("without sluice: %+v", a)
			}
		})
	}
}
