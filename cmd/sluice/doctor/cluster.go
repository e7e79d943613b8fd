package doctor

import (
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/sluiceproxy/sluice/limiter"
)

// eachCluster calls check once for each cluster that is asked and known.
func (x *examination) eachCluster(check func(a *ask, cluster node)) {
	seen := map[string]bool{}
	for _, a := range x.asks {
		if c, ok := x.envoy.cluster(a.cluster); ok && !seen[a.cluster] {
			seen[a.cluster] = true
			check(a, c)
		}
	}
}

// protocolOptions returns a cluster's HttpProtocolOptions.
func protocolOptions(cluster node) node {
	for _, config := range cluster.at("typed_extension_protocol_options").fields() {
		if kind, message := (node{config}).typed(); kind == http2Type {
			return message
		}
	}
	return node{}
}

// speaksHTTP2 reports whether Envoy uses HTTP/2 to a cluster, without TLS if it
// has none.
func speaksHTTP2(cluster node, isTLS bool) bool {
	options := protocolOptions(cluster)
	return cluster.at("http2_protocol_options").exists() || // deprecated
		options.at("explicit_http_config", "http2_protocol_options").exists() ||
		options.at("auto_config", "http2_protocol_options").exists() && isTLS
}

// checkClusters looks at the clusters by which sluice is asked.
func (x *examination) checkClusters() {
	for _, a := range x.asks {
		if _, ok := x.envoy.cluster(a.cluster); !ok && a.cluster != "" && !x.envoy.isPart {
			x.say(a.chain, "cluster", limiter.Fail, mendNoCluster.of(a.plane), "there is no cluster %s: no check reaches "+
				"sluice", printable(a.cluster))
		}
	}
	x.eachCluster(func(a *ask, c node) {
		name := printable(a.cluster)
		kind, tls := c.at("transport_socket", "typed_config").typed()
		isTLS := kind == tlsType
		isKnown := !c.at("transport_socket_matches").exists() // which decide for each endpoint
		if !speaksHTTP2(c, isTLS || !isKnown) {
			x.say(nil, "cluster", limiter.Fail, mendHTTP2.of(a.plane), "cluster %s has no HTTP/2, which gRPC needs: every "+
				"check fails", name)
		}
		if x.config != nil && isKnown {
			switch {
			case x.config.ListenTLS != nil && !isTLS:
				x.say(nil, "cluster", limiter.Fail, mendTLS.of(a.plane), "sluice's config has listen.tls, and cluster %s has "+
					"no TLS: every check fails", name)
			case x.config.ListenTLS == nil && isTLS && a.plane == byHand:
				x.say(nil, "cluster", limiter.Fail, "remove transport_socket, or set listen.tls in sluice's config",
					"cluster %s has TLS, and sluice's config has no listen.tls: every check fails", name)
			case x.config.ListenTLS != nil && x.config.ListenTLS.ClientCAs != nil && a.plane == byHand &&
				!hasCertificate(tls):
				x.say(nil, "cluster", limiter.Fail,
					"common_tls_context: { tls_certificates: [...] } as `sluice envoy plain --config FILE` prints it",
					"sluice's config has listen.tls.client_ca_file, and cluster %s shows no certificate: every check fails", name)
			}
		}
		if x.config != nil && a.plane == byHand {
			x.checkAddress(name, endpointsOf(c))
		}
	})
	x.ok("cluster", "%s has HTTP/2", printable(x.asks[0].cluster))
}

func hasCertificate(tls node) bool {
	common := tls.at("common_tls_context")
	return common.at("tls_certificates").exists() || common.at("tls_certificate_sds_secret_configs").exists() ||
		common.at("tls_certificate_provider_instance").exists()
}

// checkAddress compares where Envoy connects with where sluice listens, if both
// are on this machine.
func (x *examination) checkAddress(cluster string, endpoints []string) {
	listen := x.config.Listen.GRPC
	if host, port, err := net.SplitHostPort(listen); err == nil {
		if ip, err := netip.ParseAddr(host); host == "" || err == nil && ip.IsUnspecified() {
			listen = net.JoinHostPort("127.0.0.1", port)
		}
	}
	if len(endpoints) == 0 || !isLoopback(listen) || slices.ContainsFunc(endpoints, func(e string) bool {
		return !isLoopback(e) || e == listen || sameLoopbackPort(e, listen)
	}) {
		return
	}
	x.say(nil, "cluster", limiter.Warn, "give the cluster's endpoint the address of listen.grpc",
		"cluster %s connects to %s, and sluice's config listens on %s (unless run has --grpc)", cluster,
		printable(endpoints[0]), listen)
}

func sameLoopbackPort(a, b string) bool {
	_, portA, errA := net.SplitHostPort(a)
	_, portB, errB := net.SplitHostPort(b)
	return errA == nil && errB == nil && portA == portB && !strings.HasPrefix(a, "unix:") && !strings.HasPrefix(b, "unix:")
}

// defaultStoreTimeout is the default of store.redis.timeout.
const defaultStoreTimeout = 100 * time.Millisecond

// storeTimeout returns how long sluice waits for its store; 0 if it has none.
func (x *examination) storeTimeout() time.Duration {
	switch {
	case x.config == nil:
		return defaultStoreTimeout
	case x.config.Redis == nil:
		return 0
	}
	return x.config.Redis.Timeout
}

// checkTimeouts compares how long Envoy waits with how long sluice does.
func (x *examination) checkTimeouts() {
	const margin = 5 * time.Millisecond // which sluice leaves between the two
	const long = 5 * time.Second
	store := x.storeTimeout()
	for _, a := range x.asks {
		fix := mend{
			plain: "grpc_service: { timeout: 0.2s }", istio: "timeout: 0.2s in the extension provider",
			gateway: "extAuth: { timeout: 200ms } in the SecurityPolicy",
			contour: "responseTimeout: 200ms, beside extensionRef or in globalExtAuth",
		}.of(a.plane)
		if want := 2 * store; want > 200*time.Millisecond {
			fix = strings.NewReplacer("0.2s", want.String(), "200ms", want.String()).Replace(fix) +
				", or a shorter store.redis.timeout in sluice's config"
		}
		switch t := a.filterTimeout(); {
		case t == 0:
			x.say(a.chain, "timeout", limiter.Warn, fix, "the filter waits for ever: while sluice hangs, so do all requests")
		case store > 0 && t < store+margin:
			x.say(a.chain, "timeout", limiter.Warn, fix,
				"the filter waits for %v, which is not above sluice's store.redis.timeout of %v: Envoy decides about failures of "+
					"Redis, and not on_failure", t, store)
		case t >= max(long, 4*store):
			x.say(a.chain, "timeout", limiter.Warn, fix, "the filter waits for %v: while sluice hangs, each request does", t)
		}
	}
	x.ok("timeout", "the filter waits for %v", x.asks[0].filterTimeout())
}

// retriesText says what is retried where nothing is wrong.
func (x *examination) retriesText() string {
	a := x.asks[0]
	cluster, _ := x.envoy.cluster(a.cluster)
	own := a.filter().config.at("grpc_service", "retry_policy")
	if firstOf(own, protocolOptions(cluster).at("retry_policy")).exists() {
		return "only checks that sluice has not executed are retried"
	}
	return "no check is retried, as far as is known"
}

// safeTriggers are the conditions of retries in which sluice has not executed
// the check.
var safeTriggers = []string{"connect-failure", "refused-stream", "reset-before-request"}

// checkRetries looks at what Envoy does if a connection to sluice fails.
func (x *examination) checkRetries() {
	for _, a := range x.asks {
		cluster, isKnown := x.envoy.cluster(a.cluster)
		own := a.filter().config.at("grpc_service", "retry_policy")
		retries := firstOf(own, protocolOptions(cluster).at("retry_policy"))
		switch {
		case !isKnown && !retries.exists(), a.plane == contour && !retries.exists(): // it has no field
			continue
		case !retries.exists():
			x.say(a.chain, "retries", limiter.Warn, mendRetries.of(a.plane), "no check is retried: requests fail while "+
				"sluice restarts")
			continue
		}
		var unsafe []string
		for on := range strings.SplitSeq(retries.at("retry_on").text(), ",") {
			if on = strings.TrimSpace(on); on != "" && !slices.Contains(safeTriggers, on) {
				unsafe = append(unsafe, printable(on))
			}
		}
		safe := mendTriggers.of(a.plane)
		if unsafe != nil {
			x.say(a.chain, "retries", limiter.Warn, safe,
				"retry_on has %s: checks that sluice has already executed are sent again, and charged twice",
				strings.Join(unsafe, ", "))
		}
		if retries.at("retry_on").text() == "" {
			x.say(a.chain, "retries", limiter.Warn, safe, "retry_policy has no retry_on, and does nothing")
		}
		if own.exists() {
			back := own.at("retry_back_off")
			most := back.at("max_interval").duration(10 * back.at("base_interval").duration(25*time.Millisecond))
			if most <= x.storeTimeout() {
				x.say(a.chain, "retries", limiter.Warn, mendMaxInterval.of(a.plane),
					"the retry_policy of grpc_service has a max_interval of %v, which is also the timeout of each "+
						"try, and has to be above store.redis.timeout", most)
			}
		}
		if !isKnown {
			continue
		}
		const enough = 100
		most := 3.0 // Envoy's default
		for _, t := range cluster.at("circuit_breakers", "thresholds").list() {
			if p := t.at("priority").text(); p == "" || p == "DEFAULT" {
				most = t.at("max_retries").number(most)
			}
		}
		if most < enough {
			x.say(nil, "retries", limiter.Warn, mendMaxRetries.of(a.plane),
				"cluster %s allows %g retries at a time: during a restart of sluice every request is one, and others fail",
				printable(a.cluster), most)
		}
		const byDefault = 5 * time.Second
		if c, t := cluster.at("connect_timeout").duration(byDefault), a.filterTimeout(); t > 0 && c >= t {
			x.say(nil, "retries", limiter.Warn, mendConnectTimeout.of(a.plane), "cluster %s has a connect_timeout of %v, "+
				"which leaves no time for another try within the filter's %v",
				printable(a.cluster), c, t)
		}
	}
	x.ok("retries", "%s", x.retriesText())
}
