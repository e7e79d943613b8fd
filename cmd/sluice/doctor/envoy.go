// Package doctor says what is wrong with the way an Envoy asks sluice: from
// Envoy's config, and from its counters.
package doctor

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"
)

// Envoy is the config of an Envoy, and what it counts. It is immutable once it
// is read.
type Envoy struct {
	listeners []node
	// clusters and routes have the entries of a dump, by the resource's name. They
	// are decoded when they are looked up.
	clusters map[string]json.RawMessage
	routes   map[string]json.RawMessage
	filters  map[string]node // typed_config of filters that come by ECDS, by name
	refused  []string        // resources that Envoy has refused, and why
	// isPart says that a control plane sends the rest, so that what is missing
	// here may exist.
	isPart bool
	plane  plane

	// counters are Envoy's, and gauges, by their names; nil if only a file was
	// read. version and uptime are empty and 0 then.
	counters map[string]float64
	version  string
	uptime   time.Duration
}

// plane is what writes an Envoy's config, and where it is mended.
type plane int

const (
	byHand plane = iota
	istio
	envoyGateway
	contour
)

// ErrNoConfig reports text that is no config of an Envoy's.
var ErrNoConfig = errors.New(`want a bootstrap (with static_resources) or a config dump (with configs), ` +
	`as the admin interface has at /config_dump`)

// Parse reads the config of an Envoy: a bootstrap in YAML or JSON, or what the
// admin interface has at /config_dump. Messages that it does not know are
// ignored. The error does not quote the config.
func Parse(text []byte) (*Envoy, error) {
	text, err := asJSON(text)
	if err != nil {
		return nil, err
	}
	e := &Envoy{clusters: map[string]json.RawMessage{}, routes: map[string]json.RawMessage{}, filters: map[string]node{}}
	var dump struct {
		Configs json.RawMessage `json:"configs"`
	}
	if err := json.Unmarshal(text, &dump); err != nil {
		return nil, ErrNoConfig
	}
	if dump.Configs == nil {
		return e, e.readBootstrap(text)
	}
	var sections []json.RawMessage
	if err := json.Unmarshal(dump.Configs, &sections); err != nil {
		return nil, fmt.Errorf("configs: %w", err)
	}
	for _, s := range sections {
		if err := e.readSection(s); err != nil {
			return nil, fmt.Errorf("configs: %w", err)
		}
	}
	return e, nil
}

// readBootstrap reads the file that Envoy starts with.
func (e *Envoy) readBootstrap(text json.RawMessage) error {
	root, err := decode(text)
	if err != nil {
		return fmt.Errorf("not a config of Envoy's: %w", err)
	}
	static := root.at("static_resources")
	if !static.exists() && !root.at("dynamic_resources").exists() && !root.at("node").exists() {
		return ErrNoConfig
	}
	e.recognize(root)
	e.isPart = root.at("dynamic_resources").exists()
	e.listeners = static.at("listeners").list()
	for _, c := range static.at("clusters").list() {
		text, err := json.Marshal(map[string]any{"cluster": c.value}) // as in a dump
		if err != nil {
			return err
		}
		e.clusters[c.at("name").text()] = text
	}
	return nil
}

// recognize finds out which control plane an Envoy has, by its bootstrap.
func (e *Envoy) recognize(bootstrap node) {
	for _, c := range bootstrap.at("static_resources", "clusters").list() {
		switch c.at("name").text() {
		case "xds-grpc":
			e.plane = istio
		case "xds_cluster":
			e.plane = envoyGateway
		case "contour":
			e.plane = contour
		}
	}
}

// readSection reads one of the configs of a dump.
func (e *Envoy) readSection(text json.RawMessage) error {
	var kind struct {
		Type string `json:"@type"`
	}
	if err := json.Unmarshal(text, &kind); err != nil {
		return err
	}
	switch typeName(kind.Type) {
	case "envoy.admin.v3.BootstrapConfigDump":
		root, err := decode(text)
		e.recognize(root.at("bootstrap"))
		return err
	case "envoy.admin.v3.ListenersConfigDump":
		return eachEntry(text, func(entry json.RawMessage) {
			n, _ := decode(entry) // an entry of a valid document is valid
			if l := firstOf(n.at("listener"), n.at("active_state", "listener"), n.at("warming_state", "listener")); l.exists() {
				e.listeners = append(e.listeners, l)
			}
			e.noteRefusal("listener", n.at("name").text(), n)
		})
	case "envoy.admin.v3.ClustersConfigDump":
		return e.keep(text, "cluster", e.clusters)
	case "envoy.admin.v3.RoutesConfigDump":
		return e.keep(text, "route_config", e.routes)
	case "envoy.admin.v3.EcdsConfigDump":
		return eachEntry(text, func(entry json.RawMessage) {
			n, _ := decode(entry)
			f := n.at("ecds_filter")
			e.filters[f.at("name").text()] = f.at("typed_config")
		})
	}
	return nil
}

// noteRefusal notes that Envoy has refused a resource.
func (e *Envoy) noteRefusal(kind, name string, entry node) {
	const most = 10
	if why := entry.at("error_state", "details").text(); why != "" && len(e.refused) < most {
		e.refused = append(e.refused, fmt.Sprintf("%s %s: %s", kind, printable(name), printable(why)))
	}
}

// eachEntry calls add with each entry of each list in a section.
func eachEntry(text json.RawMessage, add func(json.RawMessage)) error {
	var section map[string]json.RawMessage
	if err := json.Unmarshal(text, &section); err != nil {
		return err
	}
	for _, name := range slices.Sorted(maps.Keys(section)) {
		var list []json.RawMessage
		if json.Unmarshal(section[name], &list) != nil {
			continue // a text, such as version_info
		}
		for _, entry := range list {
			add(entry)
		}
	}
	return nil
}

// keep keeps the entries of a section that have a cluster or a route config, by
// its name, and decodes no more of them: a mesh has thousands.
func (e *Envoy) keep(text json.RawMessage, kind string, in map[string]json.RawMessage) error {
	type named struct {
		Name string `json:"name"`
	}
	return eachEntry(text, func(entry json.RawMessage) {
		var resource struct {
			Cluster      named           `json:"cluster"`
			RouteConfig  named           `json:"route_config"`
			RouteConfig2 named           `json:"routeConfig"`
			ErrorState   json.RawMessage `json:"error_state"`
		}
		if json.Unmarshal(entry, &resource) != nil {
			return // not what Envoy writes
		}
		name := resource.Cluster.Name + resource.RouteConfig.Name + resource.RouteConfig2.Name
		if resource.ErrorState != nil {
			n, _ := decode(entry)
			e.noteRefusal(kind, name, n)
		}
		if name != "" {
			in[name] = entry
		}
	})
}

func firstOf(nodes ...node) node {
	for _, n := range nodes {
		if n.exists() {
			return n
		}
	}
	return node{}
}

// cluster returns a cluster by its name.
func (e *Envoy) cluster(name string) (node, bool) { return lookup(e.clusters, "cluster", name) }

func lookup(in map[string]json.RawMessage, field, name string) (node, bool) {
	text, ok := in[name]
	if !ok {
		return node{}, false
	}
	n, err := decode(text)
	return n.at(field), err == nil
}

// chain is the filters of an HTTP connection manager.
type chain struct {
	listener string
	outbound bool // of a sidecar: for requests of the app
	manager  node
	filters  []filter
	routes   node // the route config; absent if it is unknown
	socket   node // the transport socket of the filter chain
}

// filter is an HTTP filter.
type filter struct {
	name, kind string
	config     node
	disabled   bool // unless a route enables it
	// conditional says that a matcher decides for which requests it runs.
	conditional bool
}

// The names of the messages that are looked at.
const (
	managerType   = "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager"
	extAuthzType  = "envoy.extensions.filters.http.ext_authz.v3.ExtAuthz"
	perRouteType  = "envoy.extensions.filters.http.ext_authz.v3.ExtAuthzPerRoute"
	corsType      = "envoy.extensions.filters.http.cors.v3.Cors"
	corsRouteType = "envoy.extensions.filters.http.cors.v3.CorsPolicy"
	grpcWebType   = "envoy.extensions.filters.http.grpc_web.v3.GrpcWeb"
	jwtType       = "envoy.extensions.filters.http.jwt_authn.v3.JwtAuthentication"
	routerType    = "envoy.extensions.filters.http.router.v3.Router"
	mutationType  = "envoy.extensions.filters.http.header_mutation.v3.HeaderMutation"
	earlyType     = "envoy.extensions.http.early_header_mutation.header_mutation.v3.HeaderMutation"
	grpcLogType   = "envoy.extensions.access_loggers.grpc.v3.HttpGrpcAccessLogConfig"
	matcherType   = "envoy.extensions.common.matching.v3.ExtensionWithMatcher"
	overrideType  = "envoy.config.route.v3.FilterConfig"
	tlsType       = "envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext"
	http2Type     = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
)

// chains returns the HTTP filter chains of all listeners.
func (e *Envoy) chains() (all []*chain) {
	for _, l := range e.listeners {
		filterChains := l.at("filter_chains").list()
		if d := l.at("default_filter_chain"); d.exists() {
			filterChains = append(filterChains, d)
		}
		if api := l.at("api_listener", "api_listener"); api.exists() {
			filterChains = append(filterChains, node{map[string]any{"filters": []any{
				map[string]any{"typed_config": api.value}}}})
		}
		for _, fc := range filterChains {
			for _, f := range fc.at("filters").list() {
				kind, manager := f.at("typed_config").typed()
				if kind == managerType {
					c := e.chain(manager)
					c.listener, c.socket = listenerName(l), fc.at("transport_socket")
					c.outbound = l.at("traffic_direction").text() == "OUTBOUND"
					all = append(all, c)
				}
			}
		}
	}
	return all
}

func listenerName(l node) string {
	if name := l.at("name").text(); name != "" {
		return printable(name)
	}
	return printable(addressOf(l.at("address")))
}

// addressOf returns an address as host:port or unix:///path, or "".
func addressOf(a node) string {
	if path := a.at("pipe", "path").text(); path != "" {
		return "unix://" + path
	}
	s := a.at("socket_address")
	if !s.exists() {
		return ""
	}
	return joinHostPort(s.at("address").text(), int(s.at("port_value").number(0)))
}

// chain reads a connection manager.
func (e *Envoy) chain(manager node) *chain {
	c := &chain{manager: manager, routes: manager.at("route_config")}
	if name := manager.at("rds", "route_config_name").text(); name != "" {
		c.routes, _ = lookup(e.routes, "route_config", name)
	}
	for _, f := range manager.at("http_filters").list() {
		name := f.at("name").text()
		config := f.at("typed_config")
		if f.at("config_discovery").exists() {
			config = e.filters[name]
		}
		kind, message := config.typed()
		isConditional := kind == matcherType
		if isConditional {
			kind, message = message.at("extension_config", "typed_config").typed()
		}
		c.filters = append(c.filters, filter{name: name, kind: kind, config: message,
			disabled: f.at("disabled").isTrue(), conditional: isConditional})
	}
	return c
}

// find returns the position of the first filter of a kind, or -1.
func (c *chain) find(kind string) int {
	return slices.IndexFunc(c.filters, func(f filter) bool { return f.kind == kind })
}

// route is a route of a chain that goes to an upstream.
type route struct {
	name   string // for people
	levels []node // the route config, the virtual host and the route
}

// allRoutes returns the routes of a chain that go to an upstream.
func (c *chain) allRoutes() (all []route) {
	for _, host := range c.routes.at("virtual_hosts").list() {
		for _, r := range host.at("routes").list() {
			if r.at("route").exists() {
				all = append(all, route{routeName(host, r), []node{c.routes, host, r}})
			}
		}
	}
	return all
}

func routeName(host, r node) string {
	name := r.at("name").text()
	for _, kind := range []string{"prefix", "path", "path_separated_prefix"} {
		if v := r.at("match", kind).text(); name == "" && v != "" {
			name = kind + " " + v
		}
	}
	if name == "" {
		return printable(host.at("name").text())
	}
	return printable(host.at("name").text() + ", " + name)
}

// override returns what the most specific level of a route says about a filter,
// and whether it disables it: 0 if no level says so, -1 for disabled, 1 for
// enabled.
func (r route) override(name string) (kind string, message node, enabled int) {
	for _, level := range r.levels {
		config := level.at("typed_per_filter_config").fields()[name]
		if config == nil {
			config = level.at("typedPerFilterConfig").fields()[name]
		}
		if config == nil {
			continue
		}
		enabled = 1
		kind, message = node{config}.typed()
		if kind == overrideType {
			if message.at("disabled").isTrue() {
				enabled = -1
			}
			kind, message = message.at("config").typed()
		}
		if kind == perRouteType && message.at("disabled").isTrue() {
			enabled = -1
		}
	}
	return kind, message, enabled
}

// printable returns s with spaces for control characters, which could mislead on
// a terminal, and at most 200 bytes of it.
func printable(s string) string {
	const most = 200
	s = strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f || r >= 0x80 && r < 0xa0 {
			return ' '
		}
		return r
	}, strings.ToValidUTF8(s, "?"))
	if len(s) > most {
		s = strings.ToValidUTF8(s[:most], "") + "..."
	}
	return s
}
