package doctor

import (
	"slices"
	"strings"

	"github.com/sluiceproxy/sluice/limiter"
)

// The names under which filters put their metadata.
const (
	extAuthzName = "envoy.filters.http.ext_authz"
	jwtName      = "envoy.filters.http.jwt_authn"
)

// checkFailures looks at what Envoy does if sluice does not answer.
func (x *examination) checkFailures() {
	delegates := x.config != nil && slices.ContainsFunc(x.config.Limits(), func(l *limiter.Limit) bool {
		return l.OnFailure == limiter.Delegate || l.OnFailure == limiter.Allow
	})
	for _, a := range x.asks {
		config := a.filter().config
		if config.at("failure_mode_allow").isTrue() {
			if !delegates {
				x.say(a.chain, "failures", limiter.Warn, mendFailOpen.of(a.plane)+", or on_failure: allow in sluice's config, "+
					"if that is meant", "failure_mode_allow lets every request pass while sluice does not answer")
			}
			continue
		}
		switch status := config.at("status_on_error", "code"); {
		case a.plane == contour: // it has no field
		case !status.exists():
			x.say(a.chain, "failures", limiter.Warn, mendStatus.of(a.plane),
				"while sluice does not answer, clients get 403, as if the request were forbidden")
		case isClientError(status):
			x.say(a.chain, "failures", limiter.Warn, mendStatus.of(a.plane),
				"while sluice does not answer, status_on_error gives clients a 4xx, as if the request were wrong")
		}
	}
	x.ok("failures", "%s", failuresOf(x.asks[0]))
}

func failuresOf(a *ask) string {
	config := a.filter().config
	switch {
	case config.at("failure_mode_allow").isTrue():
		return "requests pass while sluice does not answer"
	case config.at("status_on_error", "code").exists():
		return "requests are refused with status_on_error while sluice does not answer"
	}
	return "requests are refused with 403 while sluice does not answer"
}

// isClientError reports whether a status code, by its number or its name in
// Envoy's API, is not a server's error.
func isClientError(code node) bool {
	if n := code.number(0); n > 0 {
		return n < 500
	}
	return !slices.Contains([]string{"InternalServerError", "NotImplemented", "BadGateway", "ServiceUnavailable",
		"GatewayTimeout", "HTTPVersionNotSupported", "VariantAlsoNegotiates", "InsufficientStorage", "LoopDetected",
		"NotExtended", "NetworkAuthenticationRequired"}, code.text())
}

// checkBody looks whether bodies are sent.
func (x *examination) checkBody() {
	for _, a := range x.asks {
		if a.filter().config.at("with_request_body").exists() {
			x.say(a.chain, "body", limiter.Warn, mendBody.of(a.plane),
				"with_request_body makes Envoy wait for bodies and send them: sluice reads none, and a check above 16 MiB fails")
		}
	}
	x.ok("body", "bodies are not sent")
}

// checkOptions looks at the filter's other fields.
func (x *examination) checkOptions() {
	for _, a := range x.asks {
		config := a.filter().config
		if a.plane == byHand || a.plane == istio { // the others have no fields for these
			where := ""
			if a.plane == istio {
				where = ", by the EnvoyFilter that `sluice envoy istio` prints (istio-gateway, istio-waypoint)"
			}
			for _, o := range []struct {
				name   string
				wrong  bool
				value  string
				effect string
			}{
				{"encode_raw_headers", !config.at("encode_raw_headers").isTrue(), "true",
					"Envoy joins the values of a repeated header, so each second value that a client makes up is a new bucket"},
				{"validate_mutations", !config.at("validate_mutations").isTrue(), "true",
					"Envoy does not refuse a header that would split a message"},
				{"charge_cluster_response_stats", !config.at("charge_cluster_response_stats").isFalse(), "false",
					"denials count as errors of the upstream"},
			} {
				if o.wrong {
					x.say(a.chain, "options", limiter.Warn, o.name+": "+o.value+where, "%s is not %s: %s", o.name, o.value, o.effect)
				}
			}
		}
		if allowed := config.at("allowed_headers", "patterns"); allowed.exists() {
			for _, name := range x.needs.Headers {
				if !anyMatches(allowed.list(), name) {
					x.say(a.chain, "options", limiter.Fail, "allowed_headers: { patterns: [{ exact: "+name+" }, ...] }, or remove it",
						"allowed_headers leaves out %s, which sluice's config reads: it is always absent", name)
				}
			}
		}
		for _, name := range x.needs.Headers {
			if anyMatches(config.at("disallowed_headers", "patterns").list(), name) {
				x.say(a.chain, "options", limiter.Fail, "remove "+name+" from disallowed_headers",
					"disallowed_headers withholds %s, which sluice's config reads: it is always absent", name)
			}
		}
		if config.at("enable_dynamic_metadata_ingestion").isFalse() {
			x.say(a.chain, "options", limiter.Warn, "remove enable_dynamic_metadata_ingestion: false",
				"Envoy drops sluice's metadata: access logs cannot say what was decided, and nothing settles")
		}
		if rules := config.at("decoder_header_mutation_rules"); rules.at("disallow_all").isTrue() {
			x.say(a.chain, "options", limiter.Warn, "remove disallow_all from decoder_header_mutation_rules",
				"Envoy ignores the headers that sluice adds and removes: the upstream cannot see x-sluice-shadow")
		}
		prefix := config.at("stat_prefix").text()
		for i, f := range a.filters {
			if f.kind == extAuthzType && i != a.at && a.plane == byHand && f.config.at("stat_prefix").text() == prefix &&
				!x.asksAt(a.chain, i) {
				x.say(a.chain, "options", limiter.Warn, "stat_prefix: sluice in the filter that asks sluice",
					"another ext_authz filter in the chain has the same stat_prefix: Envoy counts both as one")
			}
		}
	}
	x.ok("options", "the filter's other fields are as `sluice envoy` prints them")
}

func (x *examination) asksAt(c *chain, i int) bool {
	return slices.ContainsFunc(x.asks, func(a *ask) bool { return a.chain == c && a.at == i })
}

func anyMatches(matchers []node, name string) bool {
	return slices.ContainsFunc(matchers, func(m node) bool { return m.matches(name) })
}

// limitHeaders are the headers about limits that are to come from sluice alone.
var limitHeaders = []string{
	"x-ratelimit-limit", "x-ratelimit-remaining", "x-ratelimit-reset", "ratelimit", "ratelimit-policy",
	"x-envoy-ratelimited",
}

// removes reports whether one of the mutations removes a header.
func removes(mutations node, name string) bool {
	for _, m := range mutations.list() {
		if strings.EqualFold(m.at("remove").text(), name) || m.at("remove_on_match", "key_matcher").matches(name) {
			return true
		}
	}
	return false
}

// removedByRoutes reports whether a route, or what it is in, removes a header.
func (c *chain) removedByRoutes(field, name string) bool {
	return slices.ContainsFunc(c.allRoutes(), func(r route) bool {
		return slices.ContainsFunc(r.levels, func(level node) bool {
			return slices.ContainsFunc(level.at(field).list(), func(n node) bool { return strings.EqualFold(n.text(), name) })
		})
	})
}

// removedBefore reports whether a header of clients is removed before the filter
// at a position.
func (c *chain) removedBefore(at int, name string) bool {
	for _, early := range c.manager.at("early_header_mutation_extensions").list() {
		if kind, m := early.at("typed_config").typed(); kind == earlyType && removes(m.at("mutations"), name) {
			return true
		}
	}
	return slices.ContainsFunc(c.filters[:at], func(f filter) bool {
		return f.kind == mutationType && removes(f.config.at("mutations", "request_mutations"), name)
	})
}

// checkRemoval looks whether headers about limits that others send are removed.
func (x *examination) checkRemoval() {
	const shadow = "x-sluice-shadow"
	for _, a := range x.asks {
		var ofClients, ofUpstreams []string
		for _, name := range limitHeaders {
			if !a.removedBefore(len(a.filters), name) && !a.removedByRoutes("request_headers_to_remove", name) {
				ofClients = append(ofClients, name)
			}
			if !a.removedFromResponses(name) {
				ofUpstreams = append(ofUpstreams, name)
			}
		}
		if ofClients != nil {
			x.say(a.chain, "headers", limiter.Warn, mendClientHeaders.of(a.plane),
				"the upstream gets %s as clients send them", strings.Join(ofClients, ", "))
		}
		// The upstream's own are in the way only of those that sluice sends.
		if ofUpstreams != nil && (x.config == nil || x.config.Headers.XRateLimit || x.config.Headers.RateLimit) &&
			a.plane != envoyGateway { // of which only a route of the app's can remove them
			x.say(a.chain, "headers", limiter.Warn, mendUpstreamHeaders.of(a.plane),
				"clients get %s as the upstream sends them", strings.Join(ofUpstreams, ", "))
		}
		for i, f := range a.filters {
			if f.kind != mutationType {
				continue
			}
			if i < a.at && slices.ContainsFunc(limitHeaders, func(name string) bool {
				return removes(f.config.at("mutations", "response_mutations"), name)
			}) {
				x.say(a.chain, "headers", limiter.Fail, "remove them in the router's upstream_http_filters instead",
					"%s stands before ext_authz and removes sluice's own limit headers from responses", printable(f.name))
			}
			if i > a.at && removes(f.config.at("mutations", "request_mutations"), shadow) {
				x.say(a.chain, "headers", limiter.Warn, "move "+printable(f.name)+" before ext_authz",
					"%s stands after ext_authz, and removes the %s that sluice adds for the upstream", printable(f.name), shadow)
			}
		}
	}
	x.ok("headers", "limit headers of clients and upstreams are removed")
}

// removedFromResponses reports whether a header that the upstream sends is
// removed, and sluice's kept.
func (a *ask) removedFromResponses(name string) bool {
	if i := a.find(routerType); i >= 0 {
		for _, f := range a.filters[i].config.at("upstream_http_filters").list() {
			if kind, m := f.at("typed_config").typed(); kind == mutationType &&
				removes(m.at("mutations", "response_mutations"), name) {
				return true
			}
		}
	}
	// A filter after ext_authz sees a response before it.
	return slices.ContainsFunc(a.filters[a.at:], func(f filter) bool {
		return f.kind == mutationType && removes(f.config.at("mutations", "response_mutations"), name)
	}) || a.removedByRoutes("response_headers_to_remove", name)
}

// checkMetadata looks whether Envoy sends the metadata that the config reads.
func (x *examination) checkMetadata() {
	if x.config == nil {
		return
	}
	if !x.config.ReadsMetadata() {
		x.ok("metadata", "the config reads none")
		return
	}
	for _, a := range x.asks {
		config := a.filter().config
		has := func(field, name string) bool {
			return slices.ContainsFunc(config.at(field).list(), func(n node) bool { return n.text() == name })
		}
		for _, name := range x.needs.Metadata {
			fix := mend{
				plain: "metadata_context_namespaces: [" + printable(name) + "]",
				istio: "print the EnvoyFilter with `sluice envoy istio --config FILE`; gateways and waypoints send none",
				gateway: "take claims from headers, as the comments of `sluice envoy envoy-gateway` say: Envoy Gateway sends " +
					"no metadata",
				contour: "read headers instead: Contour sends no metadata",
			}.of(a.plane)
			switch {
			case has("metadata_context_namespaces", name):
			case has("typed_metadata_context_namespaces", name):
				x.say(a.chain, "metadata", limiter.Fail, fix,
					"typed_metadata_context_namespaces sends %s as typed metadata, which sluice does not read: it is always absent",
					printable(name))
			default:
				x.say(a.chain, "metadata", limiter.Fail, fix,
					"metadata_context_namespaces does not have %s, which sluice's config reads: it is always absent", printable(name))
			}
		}
		if slices.Contains(x.needs.Metadata, jwtName) && a.find(jwtType) < 0 && a.plane == byHand {
			x.say(a.chain, "metadata", limiter.Warn, "the filter envoy.filters.http.jwt_authn before ext_authz, as the "+
				"comments of `sluice envoy plain --config FILE` show it",
				"there is no filter envoy.filters.http.jwt_authn: the claims that sluice's config reads are always absent")
		}
		if i := a.find(jwtType); i >= 0 && i < a.at && slices.Contains(x.needs.Metadata, jwtName) &&
			!hasPayload(a.filters[i].config) {
			x.say(a.chain, "metadata", limiter.Fail, "payload_in_metadata: payload in each provider",
				"no provider of jwt_authn has payload_in_metadata: the claims that sluice's config reads are always absent")
		}
	}
	x.ok("metadata", "what the config reads is sent")
}

// hasPayload reports whether a provider puts claims into the metadata.
func hasPayload(jwt node) bool {
	for _, provider := range jwt.at("providers").fields() {
		if (node{provider}).at("payload_in_metadata").text() != "" {
			return true
		}
	}
	return !jwt.at("providers").exists()
}

// checkIdentity looks whether what says who the client is can be believed.
func (x *examination) checkIdentity() {
	if x.config == nil {
		return
	}
	withCertificates := slices.ContainsFunc(x.asks, func(a *ask) bool {
		_, tls := a.socket.at("typed_config").typed()
		common := tls.at("common_tls_context")
		return common.at("validation_context").exists() || common.at("validation_context_sds_secret_config").exists() ||
			common.at("combined_validation_context").exists()
	})
	if x.needs.Principals && !withCertificates {
		x.say(x.asks[0].chain, "identity", limiter.Warn,
			"common_tls_context: { validation_context: { trusted_ca: ... } } in the listener's transport_socket, with "+
				"require_client_certificate",
			"Envoy verifies no certificates of clients: the principals that sluice's config reads are always absent")
	}
	const external = "x-envoy-external-address"
	for _, a := range x.asks {
		if strings.EqualFold(x.needs.ClientHeader, external) && !a.manager.at("use_remote_address").isTrue() {
			x.say(a.chain, "identity", limiter.Fail, "use_remote_address: true in the connection manager",
				"client_ip reads %s, and without use_remote_address Envoy passes on what the client sends", external)
		}
		x.checkClaimHeaders(a)
	}
	x.ok("identity", "clients cannot choose the principals, addresses and claims that the config reads")
}

// claimHeaders returns the headers that a jwt_authn filter makes of claims and
// that the config reads.
func (x *examination) claimHeaders(jwt node) (names []string) {
	for _, provider := range jwt.at("providers").fields() {
		for _, claim := range (node{provider}).at("claim_to_headers").list() {
			if name := strings.ToLower(claim.at("header_name").text()); slices.Contains(x.needs.Headers, name) {
				names = append(names, name)
			}
		}
	}
	slices.Sort(names)
	return slices.Compact(names)
}

// checkClaimHeaders looks at headers that come from claims. Envoy before 1.40
// removes a client's own only where a token may be required.
func (x *examination) checkClaimHeaders(a *ask) {
	const cleans = 40 // of 1.x
	i := a.find(jwtType)
	v := strings.Split(x.envoy.version, ".")
	if i < 0 || i > a.at || len(v) > 1 && v[0] == "1" && atoi(v[1]) >= cleans {
		return
	}
	for _, name := range x.claimHeaders(a.filters[i].config) {
		if !a.removedBefore(i, name) {
			x.say(a.chain, "identity", limiter.Warn, mend{
				plain:   "request_mutations: [{ remove: " + printable(name) + " }] in a header_mutation filter before jwt_authn",
				gateway: "earlyRequestHeaders: { remove: [" + printable(name) + "] } in the ClientTrafficPolicy",
			}.of(a.plane), "%s comes from a claim, and is not removed from what clients send: before Envoy 1.40 a client can "+
				"invent it on routes that need no token", printable(name))
		}
	}
}
