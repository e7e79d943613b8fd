package doctor

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/sluiceproxy/sluice/limiter"
)

// maxCollect is how long Envoy may collect ends before it reports them: tokens
// that return after a longer time are missed by the client's next requests.
const maxCollect = 10 * time.Millisecond

// checkAccessLog looks whether Envoy tells sluice how requests have ended, if
// the config settles.
func (x *examination) checkAccessLog() {
	if x.config == nil || !x.config.Settles() {
		return
	}
	headers, trailers := x.config.SettleReads()
	for _, a := range x.asks {
		var log, entry node
		for _, l := range a.manager.at("access_log").list() {
			kind, m := l.at("typed_config").typed()
			cluster := m.at("common_config", "grpc_service", "envoy_grpc", "cluster_name").text()
			if kind == grpcLogType && (cluster == a.cluster || strings.Contains(cluster, "sluice") ||
				m.at("common_config", "log_name").text() == "sluice") {
				log, entry = m, l
			}
		}
		if !log.exists() {
			x.say(a.chain, "access log", limiter.Fail, mendAccessLog.of(a.plane),
				"no access log tells sluice how requests end: limits with settle do not settle, and what they take "+
					"stays held until settle_within")
			continue
		}
		x.checkLog(a, log, headers, trailers)
		x.checkLogFilter(a, entry.at("filter"))
	}
	x.ok("access log", "Envoy tells sluice when requests that hold tokens end")
}

// checkLog looks at the log that reports to sluice.
func (x *examination) checkLog(a *ask, log node, headers, trailers []string) {
	common := log.at("common_config")
	cluster := common.at("grpc_service", "envoy_grpc", "cluster_name").text()
	if cluster != a.cluster && a.plane == byHand {
		x.say(a.chain, "access log", limiter.Warn, "envoy_grpc: { cluster_name: "+printable(a.cluster)+" }",
			"it goes to cluster %s, but checks go to %s: without key_secret only the sluice that was asked can settle",
			printable(cluster), printable(a.cluster))
	}
	if v := common.at("transport_api_version"); v.text() != "V3" && v.number(0) != 2 {
		x.say(a.chain, "access log", limiter.Fail, "transport_api_version: V3",
			"transport_api_version is not V3: Envoy refuses the config, or reports by an API that sluice does not have")
	}
	interval := common.at("buffer_flush_interval")
	if interval.exists() && interval.duration(0) <= 0 {
		x.say(a.chain, "access log", limiter.Fail, "buffer_flush_interval: 0.010s",
			"buffer_flush_interval is no time above 0: Envoy refuses the config")
	}
	collects := interval.duration(time.Second)
	if common.at("buffer_size_bytes").number(-1) != 0 && collects > maxCollect &&
		a.plane != envoyGateway { // which has no field for either
		x.say(a.chain, "access log", limiter.Warn, "buffer_size_bytes: 0, or buffer_flush_interval: 0.010s",
			"Envoy collects ends for %v before it reports them: tokens return that late, and what is collected is lost "+
				"when Envoy ends", collects)
	}
	for _, fields := range []struct {
		field, gateway string
		names          []string
	}{
		{"additional_response_headers_to_log", "responseHeaders", headers},
		{"additional_response_trailers_to_log", "responseTrailers", trailers},
	} {
		for _, name := range fields.names {
			has := func(n node) bool { return strings.EqualFold(n.text(), name) }
			if !slices.ContainsFunc(log.at(fields.field).list(), has) {
				x.say(a.chain, "access log", limiter.Fail, mend{
					plain:   fields.field + ": [" + strings.Join(fields.names, ", ") + "]",
					gateway: "als: { http: { " + fields.gateway + ": [" + strings.Join(fields.names, ", ") + "] } }",
				}.of(a.plane), "%s leaves out %s, which settle reads: such requests cost what was reserved", fields.field, name)
			}
		}
	}
}

const endsFilter = "filter: { metadata_filter: { matcher: { filter: envoy.filters.http.ext_authz, " +
	"path: [{ key: settle }], value: { present_match: true } }, match_if_key_not_found: false } }"

// checkLogFilter looks whether the log reports the requests that hold tokens,
// and only these.
func (x *examination) checkLogFilter(a *ask, filter node) {
	all := func() {
		x.say(a.chain, "access log", limiter.Warn, endsFilter,
			"it reports every request instead of only those that hold tokens: needless work for Envoy and sluice")
	}
	m := filter.at("metadata_filter")
	switch {
	case !filter.exists():
		all()
	case m.exists():
		matcher := m.at("matcher")
		path := matcher.at("path").list()
		if matcher.at("filter").text() != extAuthzName || len(path) != 1 || path[0].at("key").text() != "settle" ||
			!matcher.at("value", "present_match").isTrue() || matcher.at("invert").isTrue() {
			x.say(a.chain, "access log", limiter.Fail, endsFilter,
				"its metadata_filter does not match the metadata settle of envoy.filters.http.ext_authz: requests that "+
					"hold tokens are not reported")
		} else if !m.at("match_if_key_not_found").isFalse() {
			all()
		}
	default:
		// A filter of another kind, such as an expression or several filters.
		text, err := json.Marshal(filter.value)
		if err == nil && !strings.Contains(string(text), "settle") {
			x.say(a.chain, "access log", limiter.Warn, endsFilter, "%s decides what it reports, and does not name the metadata "+
				"settle: requests that hold tokens may be missing", filterKind(filter))
		}
	}
}

func filterKind(filter node) string {
	for name := range filter.fields() {
		return fmt.Sprintf("a %s", printable(name))
	}
	return "a filter"
}
