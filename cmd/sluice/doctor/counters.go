package doctor

import (
	"cmp"
	"fmt"
	"strings"

	"github.com/sluiceproxy/sluice/limiter"
	"github.com/sluiceproxy/sluice/limiter/policy"
)

// count returns a counter or gauge; 0 if Envoy does not have it.
func (e *Envoy) count(format string, args ...any) int {
	return int(e.counters[fmt.Sprintf(format, args...)])
}

// statName returns a name as it is in the names of counters.
func statName(name string) string { return strings.ReplaceAll(name, ":", "_") }

// prefixes returns the names with which the counters of the connection managers
// that ask sluice begin, and those of their ext_authz filters.
func (x *examination) prefixes() (managers, filters []string) {
	seen := map[string]bool{}
	add := func(to *[]string, name string) {
		if !seen[name] {
			seen[name] = true
			*to = append(*to, name)
		}
	}
	for _, a := range x.asks {
		manager := "http." + statName(a.manager.at("stat_prefix").text())
		add(&managers, manager)
		filter := manager + ".ext_authz"
		if p := a.filter().config.at("stat_prefix").text(); p != "" {
			filter += "." + statName(p)
		}
		add(&filters, filter)
	}
	return managers, filters
}

// tally sums counters over the places that ask sluice.
type tally struct{ ok, denied, failed, disabled, routed, requests int }

func (x *examination) tally() (t tally, isKept bool) {
	managers, filters := x.prefixes()
	for _, f := range filters {
		t.ok += x.envoy.count("%s.ok", f)
		t.denied += x.envoy.count("%s.denied", f)
		t.failed += x.envoy.count("%s.error", f)
		t.disabled += x.envoy.count("%s.disabled", f)
		_, has := x.envoy.counters[f+".ok"]
		isKept = isKept || has
	}
	for _, m := range managers {
		t.routed += x.envoy.count("%s.rq_total", m) - x.envoy.count("%s.no_route", m)
		t.requests += x.envoy.count("%s.downstream_rq_total", m)
	}
	return t, isKept
}

// checkCounters looks whether sluice is asked, and answers.
func (x *examination) checkCounters() {
	if x.envoy.counters == nil {
		return
	}
	since := "since Envoy started"
	if x.envoy.uptime > 0 {
		since += fmt.Sprintf(" %s ago", policy.RoughDuration(x.envoy.uptime))
	}
	t, isKept := x.tally()
	switch asked := t.ok + t.denied + t.failed; {
	case !isKept:
		x.say(nil, "checks", limiter.Warn, mendCounters.of(cmp.Or(x.envoy.plane, x.asks[0].plane)),
			"Envoy keeps no counters of ext_authz: whether sluice is asked is not known")
	case asked == 0 && t.routed > 0:
		x.say(nil, "checks", limiter.Fail,
			"look at the findings on the filter and the routes; `disabled` and filter_enabled keep sluice from being asked",
			"%s to an upstream %s, but sluice was asked about none",
			plural(t.routed, "request went", "requests went"), since)
	case asked == 0 && t.requests > 0:
		x.say(nil, "checks", limiter.Warn, "ask for a path that has a route",
			"sluice was asked about none of %s %s, as none had a route", plural(t.requests, "request", "requests"), since)
	case asked == 0:
		x.say(nil, "checks", limiter.Warn, "send a request through Envoy, and run this again",
			"sluice was never asked: Envoy has had no request %s", since)
	case t.failed == 0:
		x.say(nil, "checks", limiter.OK, "", "%s %s: %d allowed, %d denied, none failed",
			plural(asked, "check", "checks"), since, t.ok, t.denied)
	default:
		status := limiter.Warn
		if t.failed*100 >= asked { // 1 %
			status = limiter.Fail
		}
		why, fix := x.why()
		x.say(nil, "checks", status, fix, "%d of %s failed %s: %s", t.failed, plural(asked, "check", "checks"), since, why)
	}
	x.eachCluster(func(a *ask, c node) {
		name := statName(cmp.Or(c.at("alt_stat_name").text(), a.cluster))
		total, has := x.envoy.counters["cluster."+name+".membership_total"]
		if has && x.envoy.count("cluster.%s.membership_healthy", name) == 0 {
			x.say(nil, "endpoints", limiter.Fail, mendEndpoints.of(a.plane), "cluster %s has %.0f endpoints, and none is "+
				"healthy: every check fails", printable(a.cluster), total)
		}
	})
}

// why says why checks have failed, and what to do.
func (x *examination) why() (why, fix string) {
	var reasons, fixes []string
	x.eachCluster(func(a *ask, c node) {
		name := statName(cmp.Or(c.at("alt_stat_name").text(), a.cluster))
		count := func(counter string) int { return x.envoy.count("cluster.%s.%s", name, counter) }
		to := "cluster " + printable(a.cluster)
		if at := endpointsOf(c); len(at) > 0 {
			to = printable(at[0])
		}
		connects := count("upstream_cx_connect_fail")
		tls := count("ssl.connection_error") + count("ssl.fail_verify_error") + count("ssl.fail_verify_san") +
			count("ssl.fail_verify_cert_hash")
		for _, r := range []struct {
			n         int
			text, fix string
		}{
			{tls, "%d TLS handshakes with " + to + " failed",
				"listen.tls in sluice's config and the cluster's transport_socket have " +
					"to fit: both or neither, the CA, the name, the client's certificate"},
			{connects - tls, "%d connections to " + to + " failed",
				"see that sluice runs and listens there: sluice healthcheck --grpc " +
					to + ", and listen.grpc in its config"},
			{count("upstream_cx_connect_timeout"), "%d connections to " + to + " were not accepted in time",
				"see that nothing drops packets between Envoy and sluice"},
			{count("upstream_cx_protocol_error"), "%d connections to " + to + " do not speak HTTP/2",
				"http2_protocol_options for the cluster, and no other server at that address"},
			{count("upstream_rq_pending_overflow") + count("upstream_rq_retry_overflow"),
				"%d exceeded the circuit breakers of " + to,
				"circuit_breakers: { thresholds: [{ max_requests: 4096, max_pending_requests: 4096, max_retries: 4096 }] }"},
		} {
			if r.n > 0 {
				reasons, fixes = append(reasons, fmt.Sprintf(r.text, r.n)), append(fixes, r.fix)
			}
		}
		if n := count("upstream_rq_timeout") + count("upstream_rq_per_try_timeout"); n > 0 && len(reasons) == 0 {
			reasons = append(reasons, fmt.Sprintf("%d were not answered within the filter's %v", n, a.filterTimeout()))
			fixes = append(fixes, "compare sluice_check_seconds and sluice_store_seconds in sluice's metrics; sluice "+
				"doctor --config FILE measures the store")
		}
		if n := count("upstream_cx_destroy_remote_with_active_rq"); n > 0 && len(reasons) == 0 {
			reasons = append(reasons, fmt.Sprintf("%s closed %d connections with checks under way", to, n))
			fixes = append(fixes, "see sluice's log, and whether it was killed")
		}
	})
	if len(reasons) == 0 {
		return "sluice answered with a gRPC error",
			"see sluice's log, and sluice_checks_total with decision delegated or invalid; a server that is not sluice " +
				"answers UNIMPLEMENTED"
	}
	return strings.Join(reasons, "; "), strings.Join(fixes, "; ")
}
