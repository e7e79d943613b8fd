package main

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/sluiceproxy/sluice/limiter"
)

// diagnoseEnvoy runs doctor with these flags, without the store's checks, and
// returns its status and what is not well.
func diagnoseEnvoy(t *testing.T, args ...string) (status int, found []diagnosed) {
	t.Helper()
	var stdout, stderr bytes.Buffer
	status = run(t.Context(), append([]string{"doctor", "-o", "json"}, args...), os.LookupEnv, &stdout, &stderr)
	var d diagnosis
	if err := json.Unmarshal(stdout.Bytes(), &d); err != nil {
		t.Fatalf("%d %v %s%s", status, err, &stdout, &stderr)
	}
	for _, c := range d.Checks {
		if c.Status != limiter.OK && c.Name != "store" {
			found = append(found, c)
		}
	}
	return status, found
}

// printedPlain returns what `sluice envoy plain` prints.
func printedPlain(t *testing.T, args ...string) string {
	t.Helper()
	var stdout, stderr bytes.Buffer
	if status := run(t.Context(), append([]string{"envoy", "plain"}, args...), os.LookupEnv, &stdout, &stderr); status != 0 {
		t.Fatal(&stderr)
	}
	return stdout.String()
}

// uncommented returns a printed file in which a line and the rest of its block
// are no longer comments.
func uncommented(t *testing.T, printed, line string) string {
	t.Helper()
	var out []string
	found, margin := false, ""
	for text := range strings.Lines(printed) {
		before, after, is := strings.Cut(text, "# ")
		switch {
		case is && after == line+"\n":
			found, margin = true, before
			text = before + after
		case found && is && before == margin && (strings.HasPrefix(after, " ") || strings.HasPrefix(after, "- ")):
			text = before + after
		default:
			margin = "none"
		}
		out = append(out, text)
	}
	if !found {
		t.Fatalf("no %q", line)
	}
	return strings.Join(out, "")
}

// change is one mistake in an Envoy's config.
type change func(t *testing.T, config string) string

// swap replaces all that is old.
func swap(old, with string) change {
	return func(t *testing.T, config string) string {
		t.Helper()
		if !strings.Contains(config, old) {
			t.Fatalf("no %q", old)
		}
		return strings.ReplaceAll(config, old, with)
	}
}

// cut removes what a pattern matches, but for its group, if it has one.
func cut(pattern string) change {
	return func(t *testing.T, config string) string {
		t.Helper()
		without := regexp.MustCompile(pattern).ReplaceAllString(config, "$1")
		if without == config {
			t.Fatalf("no %s", pattern)
		}
		return without
	}
}

func together(all ...change) change {
	return func(t *testing.T, config string) string {
		t.Helper()
		for _, e := range all {
			config = e(t, config)
		}
		return config
	}
}

// filterBlocks splits a config at its HTTP filters.
func filterBlocks(t *testing.T, config string) (before string, filters []string, after string) {
	t.Helper()
	const begin, end, item = "          http_filters:\n", "          route_config:\n", "          - name: "
	before, rest, ok := strings.Cut(config, begin)
	rest, after, isFollowed := strings.Cut(rest, end)
	if !ok || !isFollowed {
		t.Fatal("no filters")
	}
	for i, block := range strings.Split("\n"+rest, "\n"+item) {
		if i == 0 {
			before += begin + strings.TrimPrefix(block+"\n", "\n")
			continue
		}
		filters = append(filters, item+strings.TrimSuffix(block, "\n")+"\n")
	}
	return before, filters, end + after
}

// move puts an HTTP filter before another, or, if that is empty, at the end.
func move(name, beforeName string) change {
	return func(t *testing.T, config string) string {
		t.Helper()
		before, filters, after := filterBlocks(t, config)
		position := func(name string) int {
			return slices.IndexFunc(filters, func(f string) bool { return strings.HasPrefix(f, "          - name: "+name+"\n") })
		}
		i := position(name)
		if i < 0 {
			t.Fatalf("no filter %s", name)
		}
		moved := filters[i]
		filters = slices.Delete(filters, i, i+1)
		to := len(filters)
		if beforeName != "" {
			to = position(beforeName)
		}
		return before + strings.Join(slices.Insert(filters, to, moved), "") + after
	}
}

// remove removes an HTTP filter.
func remove(name string) change {
	return func(t *testing.T, config string) string {
		t.Helper()
		before, filters, after := filterBlocks(t, move(name, "")(t, config))
		return before + strings.Join(filters[:len(filters)-1], "") + after
	}
}

// twice repeats an HTTP filter.
func twice(name string) change {
	return func(t *testing.T, config string) string {
		t.Helper()
		before, filters, after := filterBlocks(t, move(name, "envoy.filters.http.router")(t, config))
		return before + strings.Join(slices.Insert(filters, len(filters)-1, filters[len(filters)-2]), "") + after
	}
}

const (
	extAuthzName = "envoy.filters.http.ext_authz"
	rawHeaders   = "              encode_raw_headers: true\n"
	aRoute       = "                route: { cluster: upstream }\n"
	perRoute     = "                typed_per_filter_config:\n                  envoy.filters.http.ext_authz:\n" +
		"                    \"@type\": type.googleapis.com/envoy.extensions.filters.http.ext_authz.v3.ExtAuthzPerRoute\n" +
		"                    "
)

// withJWT removes the comment signs of the JWT filter that is printed where the
// config reads metadata.
var withJWT = change(func(t *testing.T, config string) string {
	return uncommented(t, config, "- name: envoy.filters.http.jwt_authn")
})

// withClaimHeader adds a JWT filter that makes a header of a claim.
var withClaimHeader = swap("          # Put authentication here", "          - name: jwt\n            typed_config:\n"+
	"              \"@type\": type.googleapis.com/envoy.extensions.filters.http.jwt_authn.v3.JwtAuthentication\n"+
	"              providers: { a: { claim_to_headers: [{ header_name: x-plan, claim_name: plan }] } }\n"+
	"          # Put authentication here")

// Configs of sluice for the tests below.
const (
	plainLimits    = "listen: {grpc: '127.0.0.1:9001'}\nlimits: [{name: orders, rate: 10/s}]\n"
	claimLimits    = "limits: [{name: a, rate: 1/s, key: 'metadata.filter_metadata[\"envoy.filters.http.jwt_authn\"].payload.sub'}]\n"
	settlingLimits = "limits: [{name: a, rate: 10/s, settle: 'int(response.headers[\"x-used\"]) + " +
		"int(response.trailers[\"x-more\"])'}]\n"
	headerLimits    = "limits: [{name: a, rate: 10/s, key: 'request.headers[\"x-plan\"]'}]\n"
	principalLimits = "limits: [{name: a, rate: 10/s, match: {principals: ['spiffe://cluster.local/ns/web/*']}}]\n"
	externalClient  = "client_ip: {header: x-envoy-external-address}\n" + plainLimits
)

// TestDoctorFindsNothingWrong checks that doctor has nothing to say of what
// `sluice envoy plain` prints, with each of its options, in YAML, and in JSON
// with the names that protobuf's own printer uses.
func TestDoctorFindsNothingWrong(t *testing.T) {
	ca := newAuthority(t)
	tls := func(more string) string {
		path := file(t, "sluice.yaml", "listen: {grpc: '0.0.0.0:9001', tls: {cert_file: server.crt, key_file: server.key"+more+
			"}}\n"+headerLimits)
		cert, key := ca.sign("sluice-gateway.sluice-system.svc", time.Now().Add(time.Hour))
		for name, text := range map[string][]byte{"server.crt": cert, "server.key": key, "ca.crt": pemOf("CERTIFICATE", ca.cert.Raw)} {
			if err := os.WriteFile(filepath.Join(filepath.Dir(path), name), text, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		return path
	}
	for name, tt := range map[string]struct {
		config string // sluice's
		args   string
		change change
	}{
		"defaults":       {file(t, "sluice.yaml", plainLimits), "", nil},
		"for Envoy 1.36": {file(t, "sluice.yaml", plainLimits), "--envoy-version 1.36", nil},
		"a unix socket":  {file(t, "sluice.yaml", "listen: {grpc: 'unix:///run/sluice/authz.sock'}\n"), "", nil},
		"all addresses":  {file(t, "sluice.yaml", "listen: {grpc: ':9001'}\n"+headerLimits), "", nil},
		"claims":         {file(t, "sluice.yaml", claimLimits), "", withJWT},
		"settle":         {file(t, "sluice.yaml", settlingLimits), "", nil},
		"settle, collected": {file(t, "sluice.yaml", settlingLimits), "",
			swap("buffer_size_bytes: 0", "buffer_flush_interval: 0.010s")},
		"settle, on 1.36":   {file(t, "sluice.yaml", settlingLimits), "--envoy-version 1.36", nil},
		"an address header": {file(t, "sluice.yaml", externalClient), "", nil},
		"TLS":               {tls(""), "", nil},
		"mutual TLS":        {tls(", client_ca_file: ca.crt, client_names: ['spiffe://c/*']"), "", nil},
		"delegated failures": {file(t, "sluice.yaml", "on_failure: delegate\n"+plainLimits), "",
			swap("failure_mode_allow: false", "failure_mode_allow: true")},
		"a CORS policy": {file(t, "sluice.yaml", plainLimits), "", func(t *testing.T, config string) string {
			return uncommented(t, config, "typed_per_filter_config:")
		}},
		"limits of a route": {file(t, "sluice.yaml", plainLimits), "", swap(aRoute, aRoute+perRoute+
			"check_settings: { context_extensions: { sluice.limits: orders } }\n")},
	} {
		t.Run(name, func(t *testing.T) {
			text := printedPlain(t, append([]string{"--config", tt.config}, strings.Fields(tt.args)...)...)
			if tt.change != nil {
				text = tt.change(t, text)
			}
			for _, of := range []string{file(t, "envoy.yaml", text), file(t, "envoy.json", inJSON(t, text))} {
				for _, args := range [][]string{{"--config", tt.config}, nil} {
					if name == "delegated failures" && args == nil {
						continue // what is meant is not known
					}
					if status, found := diagnoseEnvoy(t, append(args, "--envoy-config", of)...); status != 0 || found != nil {
						t.Errorf("%s: %d %+v", of, status, found)
					}
				}
			}
		})
	}
}

// TestDoctorNamesEachMistake makes one mistake at a time in what `sluice envoy
// plain` prints. doctor names it, and nothing else, with a line that mends it.
func TestDoctorNamesEachMistake(t *testing.T) {
	const cluster = "    load_assignment:\n      cluster_name: sluice\n"
	headerMutation := func(name, list string) string {
		return "          - name: " + name + "\n            typed_config:\n              \"@type\": type.googleapis.com/" +
			"envoy.extensions.filters.http.header_mutation.v3.HeaderMutation\n              mutations: { " + list + " }\n"
	}
	for name, tt := range map[string]struct {
		config string // sluice's; empty: plainLimits
		change change
		status limiter.FindingStatus
		check  string
		detail string
		fix    string
	}{
		"no filter": {"", remove(extAuthzName), limiter.Fail, "filter", "is in no HTTP connection manager (of 1)", "sluice envoy plain"},
		"no version": {"", cut(`(v3\.ExtAuthz\n) +transport_api_version: V3\n`), limiter.Fail, "filter",
			"transport_api_version is not V3", "transport_api_version: V3"},
		"an old version": {"", swap("              transport_api_version: V3", "              transport_api_version: V2"), limiter.Fail,
			"filter", "transport_api_version is not V3", "transport_api_version: V3"},
		"by HTTP": {"", together(swap("envoy_grpc: { cluster_name: sluice }", "x: y"), swap("              grpc_service:\n",
			"              http_service:\n")), limiter.Fail, "filter", "asks by HTTP", "grpc_service"},
		"asked twice": {"", twice(extAuthzName), limiter.Fail, "filter", "each request is charged twice", "remove one"},
		"a fraction": {"", swap(rawHeaders, rawHeaders+"              filter_enabled: { default_value: { numerator: 50 } }\n"),
			limiter.Warn, "filter", "about 50 % of the requests", "remove filter_enabled"},
		"after the router": {"", move(extAuthzName, ""), limiter.Fail, "order", "after the router", "before envoy.filters.http.router"},
		"before cors": {"", move(extAuthzName, "envoy.filters.http.cors"), limiter.Warn, "order", "preflights are charged",
			"move envoy.filters.http.cors before"},
		"before grpc_web": {"", together(swap("            disabled: true\n", ""), move(extAuthzName, "envoy.filters.http.grpc_web")),
			limiter.Warn, "order", "clients of gRPC-Web read UNKNOWN", "move envoy.filters.http.grpc_web before"},
		"before JWT": {claimLimits, together(withJWT, move(extAuthzName, "envoy.filters.http.jwt_authn")), limiter.Fail, "order",
			"the claims that sluice's config reads are absent", "move envoy.filters.http.jwt_authn before"},
		"no JWT": {claimLimits, nil, limiter.Warn, "metadata", "no filter envoy.filters.http.jwt_authn", "jwt_authn before ext_authz"},
		"no payload": {claimLimits, together(withJWT, cut(" +payload_in_metadata: payload\n")), limiter.Fail, "metadata",
			"no provider of jwt_authn has payload_in_metadata", "payload_in_metadata: payload"},
		"no metadata": {claimLimits, together(withJWT, cut(" +metadata_context_namespaces.*\n")), limiter.Fail, "metadata",
			"metadata_context_namespaces does not have envoy.filters.http.jwt_authn",
			"metadata_context_namespaces: [envoy.filters.http.jwt_authn]"},
		"typed metadata": {claimLimits, together(withJWT, swap(" metadata_context_namespaces", " typed_metadata_context_namespaces")),
			limiter.Fail, "metadata", "as typed metadata, which sluice does not read", "metadata_context_namespaces: ["},
		"without HTTP/2": {"", swap("explicit_http_config: { http2_protocol_options: {} }", "explicit_http_config: { "+
			"http_protocol_options: {} }"), limiter.Fail, "cluster", "has no HTTP/2", "http2_protocol_options: {}"},
		"a missing cluster": {"", swap("cluster_name: sluice }", "cluster_name: sluise }"), limiter.Fail, "cluster",
			"there is no cluster sluise", "cluster_name"},
		"TLS on one side": {"", swap(cluster, "    transport_socket:\n      name: tls\n      typed_config: { \"@type\": type.googleapis.com/"+
			"envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext }\n"+cluster), limiter.Fail, "cluster",
			"sluice's config has no listen.tls", "remove transport_socket"},
		"another port": {"", swap("port_value: 9001", "port_value: 9011"), limiter.Warn, "cluster",
			"connects to 127.0.0.1:9011, and sluice's config listens on 127.0.0.1:9001", "listen.grpc"},
		"a short timeout": {"store: {redis: {url: 'redis://127.0.0.1:1', timeout: 250ms}}\n" + plainLimits, nil, limiter.Warn, "timeout",
			"200ms, which is not above sluice's store.redis.timeout of 250ms", "timeout: 500ms"},
		"a long timeout": {"", swap("timeout: 0.2s", "timeout: 600s"), limiter.Warn, "timeout", "the filter waits for 10m0s",
			"timeout: 0.2s"},
		"no timeout":                  {"", swap("timeout: 0.2s", "timeout: 0s"), limiter.Warn, "timeout", "for ever", "timeout: 0.2s"},
		"no retries":                  {"", cut(` +retry_policy:\n.*\n.*\n.*\n`), limiter.Warn, "retries", "no check is retried", "retry_policy: {"},
		"retries without a condition": {"", cut(" +retry_on: .*\n"), limiter.Warn, "retries", "does nothing", "retry_on: connect-failure"},
		"retries of executed checks": {"", swap("reset-before-request\n", "reset-before-request,5xx,unavailable\n"), limiter.Warn,
			"retries", "5xx, unavailable: checks that sluice has already executed are sent again", "retry_on: connect-failure"},
		"few retries at a time": {"", swap(", max_retries: 4096", ""), limiter.Warn, "retries", "3 retries at a time", "max_retries: 4096"},
		"a slow connect": {"", swap("connect_timeout: 0.05s", "connect_timeout: 5s"), limiter.Warn, "retries",
			"leaves no time for another try", "connect_timeout: 0.05s"},
		"open failures": {"", swap("failure_mode_allow: false", "failure_mode_allow: true"), limiter.Warn, "failures",
			"lets every request pass", "failure_mode_allow: false"},
		"no status": {"", cut(" +status_on_error.*\n"), limiter.Warn, "failures", "clients get 403",
			"code: ServiceUnavailable"},
		"a client's status": {"", swap("code: ServiceUnavailable", "code: TooManyRequests"), limiter.Warn, "failures",
			"status_on_error gives clients a 4xx", "code: ServiceUnavailable"},
		"bodies": {"", swap(rawHeaders, rawHeaders+"              with_request_body: { max_request_bytes: 8192 }\n"), limiter.Warn, "body",
			"sluice reads none", "remove with_request_body"},
		"joined headers": {"", cut(" +encode_raw_headers.*\n"), limiter.Warn, "options", "encode_raw_headers is not true",
			"encode_raw_headers: true"},
		"unchecked mutations": {"", cut(" +validate_mutations.*\n"), limiter.Warn, "options", "validate_mutations is not true",
			"validate_mutations: true"},
		"denials as errors": {"", cut(" +charge_cluster_response_stats.*\n"), limiter.Warn, "options", "errors of the upstream",
			"charge_cluster_response_stats: false"},
		"few headers": {headerLimits, swap(rawHeaders, rawHeaders+"              allowed_headers: { patterns: [{ exact: x-other }] }\n"),
			limiter.Fail, "options", "allowed_headers leaves out x-plan", "exact: x-plan"},
		"kept headers": {headerLimits, swap(rawHeaders, rawHeaders+"              disallowed_headers: { patterns: [{ prefix: x- }] }\n"),
			limiter.Fail, "options", "disallowed_headers withholds x-plan", "x-plan"},
		"no metadata of sluice's": {"", swap(rawHeaders, rawHeaders+"              enable_dynamic_metadata_ingestion: false\n"),
			limiter.Warn, "options", "drops sluice's metadata", "enable_dynamic_metadata_ingestion"},
		"another service's counters": {"", func(t *testing.T, config string) string {
			before, filters, after := filterBlocks(t, config)
			other := strings.ReplaceAll(filters[len(filters)-2], "cluster_name: sluice", "cluster_name: upstream")
			return before + strings.Join(slices.Insert(filters, 1, other), "") + after
		}, limiter.Warn, "options", "the same stat_prefix", "stat_prefix: sluice"},
		"clients' limit headers": {"", remove("sluice.request-headers"), limiter.Warn, "headers",
			"the upstream gets x-ratelimit-limit, ", "sluice.request-headers"},
		"one of clients' headers": {"", swap("                - remove: x-envoy-ratelimited\n                request_trailers", "                request_trailers"),
			limiter.Warn, "headers", "the upstream gets x-envoy-ratelimited as clients", "sluice.request-headers"},
		"upstreams' limit headers": {"", cut(` +upstream_http_filters:\n(?s:.*)UpstreamCodec\n`), limiter.Warn, "headers",
			"clients get x-ratelimit-limit, ", "upstream_http_filters"},
		"sluice's own headers": {"", swap("          - name: envoy.filters.http.cors\n", headerMutation("late",
			"response_mutations: [{ remove_on_match: { key_matcher: { prefix: X-RateLimit-, ignore_case: true } } }]")+
			"          - name: envoy.filters.http.cors\n"), limiter.Fail, "headers",
			"removes sluice's own limit headers", "upstream_http_filters"},
		"sluice's shadow header": {"", move("sluice.request-headers", "envoy.filters.http.router"), limiter.Warn, "headers",
			"removes the x-sluice-shadow", "before ext_authz"},
		"principals without TLS": {principalLimits, nil, limiter.Warn, "identity", "Envoy verifies no certificates of clients",
			"require_client_certificate"},
		"an address that clients send": {externalClient, swap("use_remote_address: true", "use_remote_address: false"), limiter.Fail,
			"identity", "passes on what the client sends", "use_remote_address: true"},
		"a claim's header that clients send": {headerLimits, withClaimHeader, limiter.Warn, "identity",
			"x-plan comes from a claim", "remove: x-plan"},
		"a claim's header of a client": {headerLimits, together(withClaimHeader, move(extAuthzName, "jwt")), limiter.Fail, "order",
			"as x-plan sluice reads what the client sends", "move envoy.filters.http.jwt_authn before"},
		"invalid tokens": {"", together(withClaimHeader, move(extAuthzName, "jwt")), limiter.Warn, "order",
			"requests with invalid tokens are charged", "move envoy.filters.http.jwt_authn before"},
		"a route without sluice": {"", swap(aRoute, aRoute+perRoute+"disabled: true\n              - match: { prefix: /other }\n"+aRoute),
			limiter.Warn, "routes", "disabled for 1 of 2 routes, which are not limited: all, prefix /", "exempt in sluice's config"},
		"no route with sluice": {"", swap(aRoute, aRoute+perRoute+"disabled: true\n"), limiter.Fail, "routes", "for each route (of 1)",
			"typed_per_filter_config"},
		"a disabled filter": {"", swap("          - name: envoy.filters.http.ext_authz\n", "          - name: envoy.filters.http.ext_authz\n"+
			"            disabled: true\n"), limiter.Fail, "routes", "sluice is never asked", "remove `disabled: true` from the filter"},
		"a route's config of another name": {"", swap(aRoute, aRoute+strings.Replace(perRoute, "http.ext_authz:", "http.authz:", 1)+
			"check_settings: {}\n"), limiter.Warn, "routes", "the chain has no filter of that name", extAuthzName},
		"a route's unknown limit": {"", swap(aRoute, aRoute+perRoute+"check_settings: { context_extensions: { sluice.limits: \"orders,"+
			"order\" } }\n"), limiter.Fail, "routes", "chooses the limit order, which", "sluice.limits"},
		"a route's bodies": {"", swap(aRoute, aRoute+perRoute+"check_settings: { with_request_body: { max_request_bytes: 9 } }\n"),
			limiter.Warn, "body", "sends bodies", "remove with_request_body"},
		"no log": {settlingLimits, cut(` +- name: sluice.ends\n(?s:.*?)\n( +http_filters)`), limiter.Fail, "access log",
			"no access log tells sluice", "sluice.ends"},
		"another log": {settlingLimits, swap("v3.HttpGrpcAccessLogConfig", "v3.TcpGrpcAccessLogConfig"), limiter.Fail, "access log",
			"no access log tells sluice", "sluice.ends"},
		"a log of every request": {settlingLimits, cut(` +filter:\n +metadata_filter:\n(?s:.*?)not_found: false\n`), limiter.Warn,
			"access log", "every request", "match_if_key_not_found: false"},
		"a log of what has no metadata": {settlingLimits, cut(" +match_if_key_not_found: false\n"), limiter.Warn, "access log",
			"every request", "match_if_key_not_found: false"},
		"a log of other metadata": {settlingLimits, swap("{ key: settle }", "{ key: decision }"), limiter.Fail, "access log",
			"does not match the metadata settle of envoy.filters.http.ext_authz", "key: settle"},
		"a late log": {settlingLimits, cut(" +buffer_size_bytes: 0\n"), limiter.Warn, "access log", "collects ends",
			"buffer_size_bytes: 0"},
		"a log that is late by its interval": {settlingLimits, swap("buffer_size_bytes: 0", "buffer_flush_interval: 0.02s"),
			limiter.Warn, "access log", "collects ends for 20ms", "buffer_flush_interval: 0.010s"},
		"a log that collects for no time": {settlingLimits, swap("buffer_size_bytes: 0", "buffer_flush_interval: 0s"),
			limiter.Fail, "access log", "no time above 0", "buffer_flush_interval: 0.010s"},
		"a log without a header": {settlingLimits, cut(" +additional_response_headers_to_log.*\n"), limiter.Fail, "access log",
			"leaves out x-used", "additional_response_headers_to_log: [x-used]"},
		"a log without a trailer": {settlingLimits, swap(`["x-more"]`, `["x-less"]`), limiter.Fail, "access log", "leaves out x-more",
			"additional_response_trailers_to_log: [x-more]"},
	} {
		t.Run(name, func(t *testing.T) {
			if tt.config == "" {
				tt.config = plainLimits
			}
			config := file(t, "sluice.yaml", tt.config)
			text := printedPlain(t, "--config", config)
			if tt.change != nil {
				text = tt.change(t, text)
			}
			status, found := diagnoseEnvoy(t, "--config", config, "--envoy-config", file(t, "envoy.yaml", text))
			found = slices.DeleteFunc(found, func(f diagnosed) bool { return f.Name == "reachable" }) // the Redis of one row
			if len(found) != 1 || found[0].Status != tt.status || found[0].Name != tt.check ||
				!strings.Contains(found[0].Detail, tt.detail) || !strings.Contains(found[0].Fix, tt.fix) {
				t.Errorf("%+v, want %s %s: ...%s... → ...%s...", found, tt.status, tt.check, tt.detail, tt.fix)
			}
			if failed := tt.status == limiter.Fail || strings.Contains(tt.config, "redis"); (status == 1) != failed {
				t.Errorf("status %d", status)
			}
		})
	}
}

// TestDoctorAsksEnvoy checks what doctor says of a real Envoy, by its admin
// interface, while sluice answers, is never asked, and does not answer.
func TestDoctorAsksEnvoy(t *testing.T) {
	_, release := envoyBinary(t)
	up := startUpstream(t)
	var config string
	start := func(t *testing.T, sluiceAt string, change ...func(string) string) (admin string, ask func(string) int) {
		t.Helper()
		config = file(t, "sluice.yaml", "listen: {grpc: '"+sluiceAt+"'}\nlimits: [{name: few, rate: 2/h, match: {paths: [/few]}}]\n")
		binary, bootstrap := plainEnvoy(t, sluiceAt, up.Listener.Addr().String())
		p, addr := runEnvoy(t, binary, bootstrap, change...)
		admin, err := p.Admin()
		if err != nil {
			t.Fatal(err)
		}
		c := client(t)
		return "http://" + admin, func(path string) int {
			r, _ := fetch(t, c, "http://"+addr+path)
			return r.StatusCode
		}
	}
	says := func(t *testing.T, admin string, status int, level limiter.FindingStatus, detail, fix string) {
		t.Helper()
		var stdout, stderr bytes.Buffer
		got := run(t.Context(), []string{"doctor", "--config", config, "--envoy-admin", admin, "-o", "json"}, os.LookupEnv, &stdout,
			&stderr)
		var d diagnosis
		if err := json.Unmarshal(stdout.Bytes(), &d); err != nil {
			t.Fatalf("%v %s%s", err, &stdout, &stderr)
		}
		for _, c := range d.Checks {
			switch {
			case c.Name == "checks":
				if c.Status != level || !strings.Contains(c.Detail, detail) || !strings.Contains(c.Fix, fix) {
					t.Errorf("%+v, want %s: ...%s... → ...%s...", c, level, detail, fix)
				}
			case c.Name == "envoy" && !strings.Contains(c.Detail, "version "+release.String()+"."),
				c.Status != limiter.OK && c.Name != "store":
				t.Errorf("%+v", c)
			}
		}
		if got != status || !strings.Contains(stdout.String(), `"checks",`) {
			t.Errorf("status %d, want %d; checks looked at: %v", got, status, strings.Contains(stdout.String(), `"checks",`))
		}
	}
	t.Run("it answers", func(t *testing.T) {
		p := startSluice(t, "--config", file(t, "run.yaml", "limits: [{name: few, rate: 2/h, match: {paths: [/few]}}]\n"))
		admin, ask := start(t, p.grpc)
		says(t, admin, 0, limiter.Warn, "never asked: Envoy has had no request", "send a request")
		for _, want := range []int{200, 200, 429} {
			if got := ask("/few"); got != want {
				t.Fatalf("%d, want %d", got, want)
			}
		}
		says(t, admin, 0, limiter.OK, "2 allowed, 1 denied, none failed", "")
	})
	t.Run("no route", func(t *testing.T) {
		admin, ask := start(t, "127.0.0.1:1", func(b string) string {
			return strings.Replace(b, "match: { prefix: / }", "match: { prefix: /other }", 1)
		})
		if got := ask("/"); got != 404 {
			t.Fatal(got)
		}
		says(t, admin, 0, limiter.Warn, "asked about none of 1 request since", "a path that has a route")
	})
	t.Run("disabled at run time", func(t *testing.T) {
		// What disables the filter is in the runtime, and not in the config.
		admin, ask := start(t, "127.0.0.1:1", func(b string) string {
			return strings.Replace(b, rawHeaders, rawHeaders+
				"              filter_enabled: { runtime_key: ask, default_value: { numerator: 100 } }\n", 1) +
				"layered_runtime: { layers: [{ name: a, static_layer: { ask: 0 } }] }\n"
		})
		if got := ask("/"); got != 200 {
			t.Fatal(got)
		}
		says(t, admin, 1, limiter.Fail, "1 request went to an upstream since Envoy started", "filter_enabled")
	})
	t.Run("it is down", func(t *testing.T) {
		admin, ask := start(t, "127.0.0.1:1")
		if got := ask("/"); got != 503 {
			t.Fatal(got)
		}
		says(t, admin, 1, limiter.Fail, "connections to 127.0.0.1:1 failed", "sluice healthcheck --grpc 127.0.0.1:1")
	})
	t.Run("it hangs", func(t *testing.T) {
		p := startSluice(t)
		admin, ask := start(t, p.grpc)
		if err := p.cmd.Process.Signal(syscall.SIGSTOP); err != nil {
			t.Fatal(err)
		}
		defer func() { _ = p.cmd.Process.Signal(syscall.SIGCONT) }()
		if got := ask("/"); got != 503 {
			t.Fatal(got)
		}
		says(t, admin, 1, limiter.Fail, "were not answered within the filter's 200ms", "sluice_check_seconds")
	})
	t.Run("something else is there", func(t *testing.T) {
		admin, ask := start(t, up.Listener.Addr().String())
		if got := ask("/"); got != 503 {
			t.Fatal(got)
		}
		says(t, admin, 1, limiter.Fail, "1 of 1 check failed", "")
	})
}

// TestDoctorReadsEnvoy checks where doctor reads Envoy's config from, and what
// it says if it cannot.
func TestDoctorReadsEnvoy(t *testing.T) {
	for name, tt := range map[string]struct {
		args   []string
		status int
		want   string // in what it prints
	}{
		"no config of sluice's": {[]string{"--envoy-config", file(t, "e.yaml", printedPlain(t))}, 0, "ok    config        none: give --config"},
		"no file":               {[]string{"--envoy-config", "/nowhere"}, 1, "sluice: --envoy-config /nowhere: no such file"},
		"not Envoy's":           {[]string{"--envoy-config", file(t, "e.yaml", "limits: []\n")}, 1, "e.yaml: want a bootstrap (with static_resources)"},
		"not YAML":              {[]string{"--envoy-config", file(t, "e.yaml", "a: [\n")}, 1, "e.yaml: yaml: line "},
		"not JSON":              {[]string{"--envoy-config", file(t, "e.json", `{"configs": [}`)}, 1, "e.json: "},
		"listeners elsewhere": {[]string{"--envoy-config", file(t, "e.yaml", "{node: {id: a}, dynamic_resources: {lds_config: {ads: {}}}}")},
			0, "warn  filter        the listeners are not in this file"},
		"nobody there": {[]string{"--envoy-admin", "http://u:hunter2@127.0.0.1:1"}, 1,
			"fail  envoy         http://127.0.0.1:1: /config_dump: dial tcp 127.0.0.1:1: "},
		"not a URL": {[]string{"--envoy-admin", "u:hunter2@127.0.0.1"}, 2, "sluice: --envoy-admin: want a URL such as"},
		"both":      {[]string{"--envoy-admin", "http://h", "--envoy-config", "f"}, 2, "mutually exclusive"},
	} {
		t.Run(name, func(t *testing.T) {
			var out bytes.Buffer
			status := run(t.Context(), append([]string{"doctor"}, tt.args...), os.LookupEnv, &out, &out)
			if status != tt.status || !strings.Contains(out.String(), tt.want) || strings.Contains(out.String(), "hunter2") {
				t.Errorf("%d, want %d and %q:\n%s", status, tt.status, tt.want, &out)
			}
		})
	}
	t.Run("stdin", func(t *testing.T) {
		p := start(t, "sluice", nil, "doctor", "--envoy-config", "-")
		p.cmd.Stdin = strings.NewReader(printedPlain(t))
		out, err := p.cmd.CombinedOutput()
		if err != nil || !strings.Contains(string(out), "ok    filter        listener ingress asks cluster sluice\n") {
			t.Errorf("%v\n%s", err, out)
		}
	})
}
