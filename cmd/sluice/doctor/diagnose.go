package doctor

import (
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/sluiceproxy/sluice/limiter"
	"github.com/sluiceproxy/sluice/limiter/policy"
)

// examination is an examination of an Envoy's config.
type examination struct {
	envoy  *Envoy
	config *policy.Config // nil: unknown
	needs  policy.Needs   // of config
	chains []*chain
	asks   []*ask
	said   []*said
}

// ask is a place where Envoy asks sluice.
type ask struct {
	*chain
	at      int    // position of the filter in the chain
	cluster string // of sluice; empty if the filter does not name one
	plane   plane  // which writes this filter
}

func (a *ask) filter() *filter { return &a.filters[a.at] }

// said is a finding, and the listeners that it is about.
type said struct {
	limiter.Finding
	places []string
}

// Diagnose says what is wrong with the way an Envoy asks sluice, and what to
// write instead. config is sluice's own; if it is nil, what depends on it is not
// looked at. Each finding has a detail that contains no secret. What is right has
// a finding of status OK for each part that was looked at.
func Diagnose(e *Envoy, config *policy.Config) []limiter.Finding {
	x := &examination{envoy: e, config: config, chains: e.chains()}
	if config != nil {
		x.needs = config.Needs()
	}
	x.checkEnvoy()
	if x.findAsks() {
		for _, check := range []func(){
			x.checkOrder, x.checkRoutes, x.checkClusters, x.checkTimeouts, x.checkRetries, x.checkFailures, x.checkBody,
			x.checkOptions, x.checkRemoval, x.checkMetadata, x.checkIdentity, x.checkAccessLog, x.checkCounters,
		} {
			check()
		}
	}
	all := make([]limiter.Finding, len(x.said))
	for i, s := range x.said {
		all[i] = s.Finding
		if len(s.places) > 0 {
			all[i].Detail = placesText(s.places) + ": " + s.Detail
		}
	}
	return all
}

// placesText returns "listener a", or "listeners a, b and 3 more".
func placesText(places []string) string {
	const most = 3
	if len(places) == 1 {
		return "listener " + places[0]
	}
	text := strings.Join(places[:min(len(places), most)], ", ")
	if n := len(places) - most; n > 0 {
		text += fmt.Sprintf(" and %d more", n)
	}
	return "listeners " + text
}

// say adds a finding, about a place if a is not nil. What was said of one place
// already is said of both.
func (x *examination) say(a *chain, name string, status limiter.FindingStatus, fix, format string, args ...any) {
	f := limiter.Finding{Name: name, Status: status, Detail: fmt.Sprintf(format, args...), Fix: fix}
	i := slices.IndexFunc(x.said, func(s *said) bool { return s.Finding == f })
	if i < 0 {
		i = len(x.said)
		x.said = append(x.said, &said{Finding: f})
	}
	if s := x.said[i]; a != nil && !slices.Contains(s.places, a.listener) {
		s.places = append(s.places, a.listener)
	}
}

// ok adds a finding that all is well, unless something else was said of it.
func (x *examination) ok(name, format string, args ...any) {
	if !slices.ContainsFunc(x.said, func(s *said) bool { return s.Name == name }) {
		x.say(nil, name, limiter.OK, "", format, args...)
	}
}

// planeOf returns what writes a filter that asks a cluster.
func planeOf(filter, cluster string) plane {
	switch {
	case strings.HasPrefix(cluster, "outbound|"):
		return istio
	case strings.HasPrefix(filter, "envoy.filters.http.ext_authz/"), strings.Contains(cluster, "/extauth/"):
		return envoyGateway
	case strings.HasPrefix(cluster, "extension/"):
		return contour
	}
	return byHand
}

const oldestEnvoy = 36 // of 1.x

func (x *examination) checkEnvoy() {
	e := x.envoy
	size := plural(len(e.listeners), "listener", "listeners") + ", " + plural(len(e.clusters), "cluster", "clusters")
	switch v := strings.Split(e.version, "."); {
	case e.version == "":
		x.say(nil, "envoy", limiter.OK, "", "%s", size)
	case len(v) > 1 && v[0] == "1" && atoi(v[1]) < oldestEnvoy:
		x.say(nil, "envoy", limiter.Warn, "run Envoy 1.36 or newer", "version %s, with which sluice is not tested", e.version)
	default:
		x.say(nil, "envoy", limiter.OK, "", "version %s, up for %s; %s", e.version,
			policy.RoughDuration(e.uptime), size)
	}
	for _, why := range e.refused {
		x.say(nil, "envoy", limiter.Fail, "mend that resource; until then Envoy keeps what it had before",
			"Envoy has refused a part of its config: %s", why)
	}
}

// plural returns a number with the word for one or for several.
func plural(n int, one, several string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %s", n, several)
}

func atoi(s string) int {
	n, err := strconv.Atoi(s)
	if err != nil {
		return -1
	}
	return n
}

// findAsks finds where Envoy asks sluice, and reports whether it does.
func (x *examination) findAsks() bool {
	var candidates []*ask
	found := false
	for _, c := range x.chains {
		for i, f := range c.filters {
			if f.kind != extAuthzType {
				continue
			}
			found = true
			if f.config.at("http_service").exists() {
				continue
			}
			cluster := f.config.at("grpc_service", "envoy_grpc", "cluster_name").text()
			p := planeOf(f.name, cluster)
			candidates = append(candidates, &ask{chain: c, at: i, cluster: cluster, plane: p})
		}
	}
	// Envoy may ask others, too. Where one of the services is recognizably
	// sluice, the rest is not looked at.
	x.asks = candidates
	if slices.ContainsFunc(candidates, x.isSluice) {
		x.asks = slices.DeleteFunc(candidates, func(a *ask) bool { return !x.isSluice(a) })
	}
	switch {
	case len(x.asks) > 0:
	case found:
		x.say(nil, "filter", limiter.Fail, "replace http_service by grpc_service: { envoy_grpc: { cluster_name: sluice } }",
			"ext_authz asks by HTTP, but sluice answers gRPC only")
	case len(x.chains) == 0 && x.envoy.isPart:
		x.say(nil, "filter", limiter.Warn, "ask the running Envoy: --envoy-admin http://127.0.0.1:9901",
			"the listeners are not in this file: Envoy gets them from a control plane")
	default:
		x.say(nil, "filter", limiter.Fail, mendFilter.of(x.envoy.plane),
			"the filter envoy.filters.http.ext_authz is in no HTTP connection manager (of %d): sluice is never asked",
			len(x.chains))
	}
	for _, a := range x.asks {
		x.checkFilter(a)
	}
	if len(x.asks) == 0 {
		return false
	}
	if x.envoy.plane == byHand && x.asks[0].plane == byHand {
		for _, c := range x.chains {
			if !c.outbound && !slices.ContainsFunc(x.asks, func(a *ask) bool { return a.chain == c }) {
				x.say(c, "filter", limiter.Warn, "add the filter envoy.filters.http.ext_authz there, too, or ignore this "+
					"if the listener serves no clients", "it does not ask sluice, and its requests are not limited")
			}
		}
	}
	x.ok("filter", "listener %s asks cluster %s", x.asks[0].listener, printable(x.asks[0].cluster))
	return true
}

// isSluice reports whether the service that a filter asks is sluice as far as
// its name or address shows.
func (x *examination) isSluice(a *ask) bool {
	if strings.Contains(a.cluster, "sluice") {
		return true
	}
	c, ok := x.envoy.cluster(a.cluster)
	return ok && x.config != nil && slices.Contains(endpointsOf(c), x.config.Listen.GRPC)
}

func (x *examination) checkFilter(a *ask) {
	f := a.filter()
	if v := f.config.at("transport_api_version"); v.text() != "V3" && v.number(0) != 2 { // 2 is the enum's number of V3
		x.say(a.chain, "filter", limiter.Fail, "transport_api_version: V3",
			"transport_api_version is not V3: Envoy refuses the config, or asks by an API that sluice does not have")
	}
	for i := range a.at {
		b := a.filters[i]
		if b.kind == extAuthzType && !b.disabled && !f.disabled && !b.conditional && !f.conditional &&
			b.config.at("grpc_service", "envoy_grpc", "cluster_name").text() == a.cluster {
			x.say(a.chain, "filter", limiter.Fail, "remove one of the two",
				"ext_authz asks cluster %s twice: each request is charged twice", printable(a.cluster))
		}
	}
	if f.conditional {
		x.say(a.chain, "filter", limiter.Warn, "use match in sluice's config instead",
			"a matcher decides which requests ext_authz sees; the others are not limited")
	}
	if v := f.config.at("filter_enabled", "default_value"); v.exists() {
		of := map[string]float64{"TEN_THOUSAND": 1e4, "MILLION": 1e6}[v.at("denominator").text()]
		if of == 0 {
			of = 100
		}
		if n := v.at("numerator").number(0); n < of {
			x.say(a.chain, "filter", limiter.Warn,
				"remove filter_enabled; for a first roll-out use mode: shadow in sluice's config",
				"filter_enabled has Envoy ask sluice about %g %% of the requests; the others are not limited", 100*n/of)
		}
	}
	// Istio selects by its CUSTOM policies in this way.
	if m := f.config.at("filter_enabled_metadata"); m.exists() && m.at("filter").text() != "envoy.filters.http.rbac" {
		x.say(a.chain, "filter", limiter.Warn, "remove filter_enabled_metadata",
			"filter_enabled_metadata decides which requests sluice is asked about; the others are not limited")
	}
	if f.config.at("grpc_service", "google_grpc").exists() {
		x.say(a.chain, "filter", limiter.Warn, "grpc_service: { envoy_grpc: { cluster_name: sluice } }",
			"google_grpc uses a client of its own, without the cluster's retries and limits")
	}
}

// checkOrder looks at the filter's place beside others.
func (x *examination) checkOrder() {
	for _, a := range x.asks {
		before := func(kind string) bool { i := a.find(kind); return i >= 0 && i < a.at }
		after := func(kind string) bool { return a.find(kind) > a.at && !before(kind) }
		if i := a.find(routerType); i >= 0 && i < a.at {
			x.say(a.chain, "order", limiter.Fail, "move envoy.filters.http.ext_authz before envoy.filters.http.router",
				"ext_authz stands after the router, which ends the chain: sluice is never asked")
		}
		if after(corsType) && (a.plane != istio || a.hasCORSPolicy()) {
			x.say(a.chain, "order", limiter.Warn, mendCORS.of(a.plane), "cors stands after ext_authz: preflights are "+
				"charged, and a page on another origin cannot read a 429")
		}
		if i := a.find(grpcWebType); after(grpcWebType) && !a.filters[i].disabled {
			x.say(a.chain, "order", limiter.Warn, mendGRPCWeb.of(a.plane),
				"grpc_web stands after ext_authz: clients of gRPC-Web read UNKNOWN or UNAVAILABLE from a denial, and not "+
					"RESOURCE_EXHAUSTED")
		}
		if i := a.find(jwtType); after(jwtType) {
			headers := x.claimHeaders(a.filters[i].config)
			status, effect := limiter.Fail, "the claims that sluice's config reads are absent in each check"
			switch {
			case slices.Contains(x.needs.Metadata, jwtName):
			case headers != nil:
				effect = "as " + printable(headers[0]) + " sluice reads what the client sends, and not the claim"
			case a.plane == byHand:
				status, effect = limiter.Warn, "requests with invalid tokens are charged, and sluice sees no claims"
			default:
				continue // it is the order of Istio and Envoy Gateway
			}
			x.say(a.chain, "order", status, mendJWT.of(a.plane), "jwt_authn stands after ext_authz: %s", effect)
		}
	}
	x.ok("order", "the filter's place beside cors, grpc_web, jwt_authn and router is right")
}

// hasCORSPolicy reports whether a route or virtual host answers pages on other
// origins.
func (c *chain) hasCORSPolicy() bool {
	for _, r := range c.allRoutes() {
		for _, level := range r.levels {
			for _, config := range level.at("typed_per_filter_config").fields() {
				kind, message := node{config}.typed()
				if kind == overrideType {
					kind, _ = message.at("config").typed()
				}
				if kind == corsRouteType {
					return true
				}
			}
		}
	}
	return false
}

// checkRoutes looks for routes about which sluice is not asked, and at what they
// say to it.
func (x *examination) checkRoutes() {
	for _, c := range x.chains {
		var asks []*ask
		for _, a := range x.asks {
			if a.chain == c {
				asks = append(asks, a)
			}
		}
		if len(asks) == 0 {
			continue
		}
		routes := c.allRoutes()
		var not []string
		for _, r := range routes {
			isAsked := false
			for _, a := range asks {
				kind, message, enabled := r.override(a.filter().name)
				isAsked = isAsked || enabled > 0 || enabled == 0 && !a.filter().disabled
				x.checkRoute(a, r, kind, message)
			}
			if !isAsked {
				not = append(not, r.name)
			}
		}
		switch name := asks[0].filter().name; {
		case len(routes) == 0 && asks[0].filter().disabled && c.routes.exists():
			x.say(c, "routes", limiter.Fail, "remove disabled: true from the filter "+printable(name),
				"the filter is disabled, and no route enables it")
		case len(not) > 0 && len(not) == len(routes):
			x.say(c, "routes", limiter.Fail, "remove `disabled: true` from the filter "+printable(name)+
				", and from typed_per_filter_config",
				"ext_authz is disabled for each route (of %d): sluice is never asked", len(not))
		case len(not) > 0:
			x.say(c, "routes", limiter.Warn, mendRoute.of(asks[0].plane), "ext_authz is disabled for %d of %d routes, which "+
				"are not limited: %s", len(not), len(routes),
				shorten(not))
		}
	}
	x.ok("routes", "sluice is asked for each known route")
}

// checkRoute looks at what a route says to ext_authz.
func (x *examination) checkRoute(a *ask, r route, kind string, message node) {
	for _, level := range r.levels {
		for name, config := range level.at("typed_per_filter_config").fields() {
			of, _ := node{config}.typed()
			if of == perRouteType && !slices.ContainsFunc(a.filters, func(f filter) bool { return f.name == name }) {
				x.say(a.chain, "routes", limiter.Warn, "typed_per_filter_config: { "+printable(a.filter().name)+": ... }",
					"%s has a config for the filter %s, and the chain has no filter of that name: it does nothing", r.name,
					printable(name))
			}
		}
	}
	if kind != perRouteType {
		return
	}
	settings := message.at("check_settings")
	if settings.at("with_request_body").exists() {
		x.say(a.chain, "body", limiter.Warn, "remove with_request_body",
			"%s sends bodies to sluice, which reads none", r.name)
	}
	if service := settings.at("grpc_service", "envoy_grpc", "cluster_name").text(); service != "" && service != a.cluster {
		x.say(a.chain, "routes", limiter.Warn, "remove grpc_service from the route's check_settings",
			"%s asks cluster %s instead of sluice", r.name, printable(service))
	}
	chosen := node{settings.at("context_extensions").fields()["sluice.limits"]}.text()
	if x.config == nil || chosen == "" || chosen == "[redacted]" { // as in a config dump
		return
	}
	for name := range strings.SplitSeq(chosen, ",") {
		if name = strings.TrimSpace(name); !slices.ContainsFunc(x.config.Limits(),
			func(l *limiter.Limit) bool { return l.Name == name }) {
			x.say(a.chain, "routes", limiter.Fail, "name limits of sluice's config in sluice.limits",
				"%s chooses the limit %s, which sluice's config does not have: each of its requests is refused", r.name,
				printable(name))
		}
	}
}

// shorten joins at most five names.
func shorten(names []string) string {
	const most = 5
	if n := len(names) - most; n > 0 {
		names = append(slices.Clip(names[:most]), fmt.Sprintf("%d more", n))
	}
	return strings.Join(names, "; ")
}

func joinHostPort(host string, port int) string { return net.JoinHostPort(host, strconv.Itoa(port)) }

// endpointsOf returns the addresses in a cluster itself. Those of EDS are not
// there.
func endpointsOf(cluster node) (all []string) {
	for _, locality := range cluster.at("load_assignment", "endpoints").list() {
		for _, e := range locality.at("lb_endpoints").list() {
			if a := addressOf(e.at("endpoint", "address")); a != "" {
				all = append(all, a)
			}
		}
	}
	return all
}

// isLoopback reports whether an address is of this machine: a unix socket, or a
// loopback address.
func isLoopback(addr string) bool {
	if strings.HasPrefix(addr, "unix://") {
		return true
	}
	host, _, err := net.SplitHostPort(addr)
	ip, ipErr := netip.ParseAddr(host)
	return err == nil && (host == "localhost" || ipErr == nil && ip.IsLoopback())
}

// filterTimeout returns how long Envoy waits for a check; 0 is for ever.
func (a *ask) filterTimeout() time.Duration {
	const byDefault = 200 * time.Millisecond
	return a.filter().config.at("grpc_service", "timeout").duration(byDefault)
}
