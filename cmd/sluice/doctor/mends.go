package doctor

import (
	"cmp"
	"strings"
)

// mend is what to write, by who writes Envoy's config. Where a control plane's
// own is empty, the line is Envoy's.
type mend struct{ plain, istio, gateway, contour string }

func (m mend) of(p plane) string {
	return cmp.Or([...]string{m.plain, m.istio, m.gateway, m.contour}[p], m.plain)
}

// What mends each finding, where it does not depend on more.
var (
	mendFilter = mend{
		plain: "add the http_filters, the router's upstream_http_filters and the cluster that `sluice envoy plain` prints",
		istio: "apply what `sluice envoy istio` prints (for a gateway istio-gateway, for a waypoint istio-waypoint), with " +
			"its extension provider in the mesh config; a sidecar's pod needs the label sluice.dev/inject: enabled",
		gateway: "apply what `sluice envoy envoy-gateway` prints; kubectl describe securitypolicy says whether it was " +
			"accepted",
		contour: "add `authorization` to the HTTPProxy's virtualhost, or globalExtAuth to Contour's config, as in " +
			"envoy/contour.yaml",
	}
	mendCORS = mend{
		plain: "move envoy.filters.http.cors before envoy.filters.http.ext_authz",
		istio: "insert envoy.filters.http.cors first, as the EnvoyFilter of `sluice envoy istio-gateway` does",
	}
	mendGRPCWeb = mend{
		plain: "move envoy.filters.http.grpc_web before envoy.filters.http.ext_authz",
		gateway: "filterOrder: [{ name: envoy.filters.http.grpc_web, before: envoy.filters.http.ext_authz }] " +
			"in the EnvoyProxy",
	}
	mendJWT = mend{
		plain: "move envoy.filters.http.jwt_authn before envoy.filters.http.ext_authz",
		istio: "print the EnvoyFilter with `sluice envoy istio --config FILE`, which asks after JWT where the config " +
			"reads metadata",
		gateway: "filterOrder: [{ name: envoy.filters.http.jwt_authn, before: envoy.filters.http.ext_authz }] " +
			"in the EnvoyProxy, and claims from headers",
	}
	mendRoute = mend{
		plain: "remove `disabled: true` from the route's typed_per_filter_config; to exempt it, use exempt in " +
			"sluice's config",
		gateway: "a route's own SecurityPolicy replaces the Gateway's: give it the same extAuth, or mergeType: " +
			"StrategicMerge",
		contour: "remove `authPolicy: {disabled: true}` from the route; to exempt it, use exempt in sluice's config",
	}
	mendNoCluster = mend{
		plain: "add the cluster that `sluice envoy plain` prints, or correct cluster_name",
		istio: "apply the ServiceEntry that `sluice envoy istio` prints; a Sidecar resource that narrows egress has to " +
			"allow istio-system/sluice.internal",
	}
	mendHTTP2 = mend{
		plain: "typed_extension_protocol_options: { envoy.extensions.upstreams.http.v3.HttpProtocolOptions: { \"@type\": " +
			"type.googleapis.com/" + http2Type + ", explicit_http_config: { http2_protocol_options: {} } } }",
		istio:   "protocol: GRPC for the port in the ServiceEntry, or appProtocol: grpc in the Service",
		gateway: "appProtocol: kubernetes.io/h2c for the port in the Service",
		contour: "protocol: h2c in the ExtensionService",
	}
	mendTLS = mend{
		plain:   "transport_socket as `sluice envoy plain --config FILE` prints it",
		istio:   "the DestinationRule that `sluice envoy istio-gateway --config FILE` prints",
		gateway: "the BackendTLSPolicy that `sluice envoy envoy-gateway --config FILE` prints",
		contour: "protocol: h2 and validation in the ExtensionService",
	}
	mendRetries = mend{
		plain: "retry_policy: { " + safeRetries + ", num_retries: 50, retry_back_off: { base_interval: 0.005s, " +
			"max_interval: 0.02s } } in the cluster's HttpProtocolOptions",
		istio:   "the EnvoyFilter that `sluice envoy istio` prints (istio-gateway, istio-waypoint)",
		gateway: "extAuth: { grpc: { backendSettings: { retry: ... } } } as `sluice envoy envoy-gateway` prints it",
	}
	mendTriggers = mend{plain: safeRetries,
		gateway: "retryOn: { triggers: [connect-failure, refused-stream, reset-before-request] }"}
	mendMaxInterval = mend{
		plain:   "move the retry_policy to the cluster's HttpProtocolOptions, or max_interval: 0.2s",
		gateway: "perRetry: { backOff: { maxInterval: 200ms } }",
	}
	mendMaxRetries = mend{
		plain: "circuit_breakers: { thresholds: [{ max_requests: 4096, max_pending_requests: 4096, max_retries: 4096 }] }",
		gateway: "circuitBreaker: { maxParallelRequests: 4096, maxPendingRequests: 4096, maxParallelRetries: 4096 } in " +
			"backendSettings",
	}
	mendConnectTimeout = mend{
		plain:   "connect_timeout: 0.05s",
		gateway: "timeout: { tcp: { connectTimeout: 50ms } } in backendSettings",
	}
	mendFailOpen = mend{plain: "failure_mode_allow: false", istio: "failOpen: false", gateway: "failOpen: false",
		contour: "failOpen: false"}
	mendStatus = mend{plain: "status_on_error: { code: ServiceUnavailable }", istio: `statusOnError: "503" in the ` +
		"extension provider", gateway: "extAuth: { statusOnError: 503 }"}
	mendBody = mend{plain: "remove with_request_body",
		istio:   "remove includeRequestBodyInCheck from the extension provider",
		gateway: "remove bodyToExtAuth from the SecurityPolicy", contour: "remove withRequestBody"}
	mendClientHeaders = mend{
		plain:   "the filter sluice.request-headers that `sluice envoy plain` prints, before ext_authz",
		istio:   "the EnvoyFilter that `sluice envoy istio` prints (istio-gateway, istio-waypoint)",
		gateway: "the ClientTrafficPolicy that `sluice envoy envoy-gateway` prints",
		contour: "requestHeadersPolicy: { remove: [" + strings.Join(limitHeaders, ", ") + "] }",
	}
	mendUpstreamHeaders = mend{
		plain:   "the router's upstream_http_filters that `sluice envoy plain` prints",
		istio:   "the EnvoyFilter that `sluice envoy istio` prints (istio-gateway, istio-waypoint)",
		contour: "responseHeadersPolicy: { remove: [" + strings.Join(limitHeaders, ", ") + "] }",
	}
	mendAccessLog = mend{
		plain:   "the access_log sluice.ends that `sluice envoy plain --config FILE` prints",
		istio:   "print the EnvoyFilter again with --config FILE: it has the access log where the config settles",
		gateway: "the accessLog that `sluice envoy envoy-gateway --config FILE` prints in the EnvoyProxy",
		contour: "remove settle from the config: Contour has no field for such a log",
	}
	mendCounters = mend{
		plain: "stats_config: { stats_matcher: ... } has to let http.*.ext_authz.* and cluster.*.upstream_* pass",
		istio: `proxyStatsMatcher: { inclusionRegexps: ["http\\..*\\.ext_authz\\..*", "cluster\\..*sluice.*"] } in ` +
			"the pod's annotation proxy.istio.io/config",
	}
	mendEndpoints = mend{
		plain:   "start sluice, or correct the cluster's endpoints",
		istio:   "kubectl get endpointslices says whether a pod of sluice is ready",
		gateway: "kubectl get endpointslices says whether a pod of sluice is ready",
		contour: "kubectl get endpointslices says whether a pod of sluice is ready",
	}
)

const safeRetries = "retry_on: connect-failure,refused-stream,reset-before-request"
