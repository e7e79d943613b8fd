package policy

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// mended is a config with a mistake that people make, and the message, which says
// where the mistake is, what is wrong, and what to write instead.
type mended struct{ text, want string }

// checkMends checks messages about configs in a directory, which they do not name.
func checkMends(t *testing.T, dir string, all []mended) {
	t.Helper()
	for _, tt := range all {
		_, err := Parse(filepath.Join(dir, "c.yaml"), []byte(tt.text), env())
		if err == nil {
			t.Errorf("%s\nis valid, want %s", tt.text, tt.want)
			continue
		}
		got := strings.ReplaceAll(strings.ReplaceAll(err.Error(), dir+"/c.yaml:", ""), dir+"/", "")
		if got != tt.want {
			t.Errorf("%s\n got %s\nwant %s", tt.text, got, tt.want)
		}
	}
}

// TestMends checks mistakes in YAML, in fields and in values that are no expressions.
func TestMends(t *testing.T) {
	dir := t.TempDir()
	for name, text := range map[string]string{
		"nohdr.csv": "10.0.0.1,10/s,20\n10.0.0.2,1/s,\n",
		"semi.csv":  "key;rate;burst\n10.0.0.1;10/s;20\n",
		"cols.csv":  "ip,rps,burst\n10.0.0.1,10/s,20\n",
		"rate.csv":  "key,rate,burst\n10.0.0.1,10,20\n10.0.0.3,1/s\n",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	checkMends(t, dir, []mended{
		// YAML
		{
			"limits: [{name: a, rate: 1/s, key: request.headers[\"x-api-key\"]}]\n",
			`1:51: inside { } or [ ], an expression with brackets needs quotes; write 'request.headers["x-api-key"]'`,
		},
		{
			"limits:\n  - name: a\n    rate: 10/m\n    key: [request.headers[\"x-api-key\"], request.method]\n",
			`4:26: inside { } or [ ], an expression with brackets needs quotes; write 'request.headers["x-api-key"]'`,
		},
		{
			"limits:\n  - name: a\n    rate: 10/m\n    cost: request.method == \"POST\" ? 5 : 1\n",
			`4:11: a value with ": " in it needs quotes; quote the expression: cost: 'request.method == "POST" ? 5 : 1'`,
		},
		{
			"limits:\n  - name: a\n    rate: 10/m\n    when: \"a\" in request.headers\n",
			`4:15: the value ends at its closing ", but more text follows; quote the expression: when: '"a" in request.headers'`,
		},
		{
			"limits:\n  - name: a\n    rate: 10/m\n    when: 'request.path == 'a''\n",
			`4:29: the value ends at its closing ', but more text follows; quote the expression, and write each ' inside it as ''`,
		},
		{
			"limits:\n  - name: a\n    rate: 10/m\n    when: [\"GET\"].exists(m, m == request.method)\n",
			`4:18: a value that begins with [ is a list or a mapping; quote the expression: when: '["GET"].exists(m, m == request.method)'`,
		},
		{
			"limits:\n  - name: a\n    rate: 10/m\n    key: {request.method}\n",
			`4:10: limits[0].key: must be an expression such as request.headers["x-api-key"], not a mapping; one that begins with { or [ needs quotes`,
		},
		{
			"limits:\n  - name: a\n    rate: 10/m\n    when: !request.path.startsWith(\"/a\")\n",
			`4:11: limits[0].when: a value that begins with ! is a YAML tag, which is not allowed; quote the expression`,
		},
		{
			"limits:\n  - name: a\n    rate: 10/m\n    key: @request.method\n",
			`4:10: a value that begins with @ needs quotes`,
		},
		{
			"limits:\n  - name: a\n    rate: 10/m\n    key: *\n",
			`4:10: a value that begins with * needs quotes`,
		},
		{
			"limits:\n  - name: a\n    rate: 10/m\n    when: request.path == \"/a #b\"\n",
			`4:27: limits[0].when: a string is not closed; add its quote, or quote the whole expression if the string has " #" in it, which begins a comment`,
		},
		{
			"store: {redis: {url: ${REDIS_URL}}}\n",
			`1:23: inside { } or [ ], a variable needs quotes; write "${REDIS_URL}"`,
		},
		{
			"store:\n  redis:\n    url: {{ .Values.redis }}\n",
			`3:11: {{ }} is not replaced here; an environment variable is written "${NAME}"`,
		},
		{
			"limits:\n\t- name: a\n",
			`2:1: a tab; indent with spaces`,
		},
		{
			"limits:\n  - name: a\n   rate: 10/m\n",
			`3:4: indented unlike the lines above it; align the fields of a limit`,
		},
		{
			"limits:\n  - name: a\n      rate: 10/m\n",
			`2:11: the next line is indented deeper than this one, as if it were part of its value; align the fields of a limit`,
		},
		{
			"limits:\n- name: a\nrate: 10/m\n",
			"2:3: limits[0].rate: missing; a limit needs a name, and a rate, a quota or a plan\n" +
				"3:1: rate: unknown field; it belongs to a limit; indent it like the limit's name",
		},
		{
			"limits:\n  - name:a\n    rate: 10/m\n",
			`2:5: no space after the colon; write name: ...`,
		},
		{
			"limits:\n  -name: a\n   rate: 10/m\n",
			`2:10: no space after the dash; write - name: ...`,
		},
		{
			"limits\n  - name: a\n",
			`1:1: no colon after the field's name; write limits:`,
		},
		{
			"limits: [{name: a, rate: 1/s}\n",
			`1:9: the bracket that opens here is not closed; add ] or }`,
		},
		{
			"limits:\n  - name: \"a\n    rate: 10/m\n",
			`2:11: the quote that opens here is not closed`,
		},
		{
			"limits:\n  - name:\u00a0a\n    rate: 1/s\n",
			`2:5: a no-break space, which YAML does not accept; replace it by a space`,
		},
		{
			"limits:\n  - name: a\n    rate: 10/m\n---\nlimits:\n  - name: a\n    rate: 10/m\n",
			`5:1: second document; a config is one YAML document`,
		},
		{
			"- name: a\n  rate: 10/m\n",
			`1:1: a config is a mapping, not a list; write the limits under limits:`,
		},
		{
			"apiVersion: v1\nkind: ConfigMap\nmetadata: {name: x}\ndata:\n  sluice.yaml: |\n    limits: []\n",
			`1:1: this is a Kubernetes manifest; use the text under its data: sluice.yaml instead`,
		},
		// rates
		{
			"limits:\n  - name: a\n    rate: 10/min\n    burst: 5\n",
			`3:11: limits[0].rate: invalid rate "10/min"; write 10/m`,
		},
		{
			"limits:\n  - name: a\n    rate: 10\n    burst: 5\n",
			`3:11: limits[0].rate: invalid rate "10"; a rate needs a period; write 10/s or 10/m`,
		},
		{
			"limits:\n  - name: a\n    rate: 1000/month\n    burst: 5\n",
			`3:11: limits[0].rate: invalid rate "1000/month"; write quota: 1000/month`,
		},
		{
			"limits:\n  - name: a\n    rate: 10/week\n    burst: 5\n",
			`3:11: limits[0].rate: invalid rate "10/week"; a rate's longest unit is d; write 10/7d`,
		},
		{
			"limits:\n  - name: a\n    rate: 0.5/s\n    burst: 5\n",
			`3:11: limits[0].rate: invalid rate "0.5/s"; write 1/2s`,
		},
		{
			"limits:\n  - name: a\n    rate: 10 / m\n    burst: 5\n",
			`3:11: limits[0].rate: invalid rate "10 / m"; write 10/m`,
		},
		{
			"limits:\n  - name: a\n    rate: 10 per minute\n    burst: 5\n",
			`3:11: limits[0].rate: invalid rate "10 per minute"; write 10/m`,
		},
		{
			"limits:\n  - name: a\n    rate: 10rps\n    burst: 5\n",
			`3:11: limits[0].rate: invalid rate "10rps"; write 10/s`,
		},
		{
			"limits:\n  - name: a\n    rate: 1k/s\n    burst: 5\n",
			`3:11: limits[0].rate: invalid rate "1k/s"; write 1000/s`,
		},
		{
			"limits:\n  - name: a\n    rate: 1,000/s\n    burst: 5\n",
			`3:11: limits[0].rate: invalid rate "1,000/s"; write 1000/s`,
		},
		{
			"limits:\n  - name: a\n    rate: 10/M\n    burst: 5\n",
			`3:11: limits[0].rate: invalid rate "10/M"; write 10/m`,
		},
		{
			"limits:\n  - name: a\n    rate: 10/60\n    burst: 5\n",
			`3:11: limits[0].rate: invalid rate "10/60"; write 10/60s`,
		},
		{
			"limits:\n  - name: a\n    rate: 10/1.5d\n    burst: 5\n",
			`3:11: limits[0].rate: invalid rate "10/1.5d"; write 10/36h`,
		},
		{
			"limits:\n  - name: a\n    rate: 0/s\n    burst: 5\n",
			`3:11: limits[0].rate: invalid rate "0/s"; write none to deny every request`,
		},
		{
			"limits:\n  - name: a\n    rate: 10%\n    burst: 5\n",
			`3:11: limits[0].rate: invalid rate "10%"; ` + wantRate,
		},
		{
			"limits:\n  - name: a\n    rate: {tokens: 10, per: minute}\n    burst: 5\n",
			`3:11: limits[0].rate: must be tokens/period such as 10/m, not a mapping`,
		},
		{
			"limits:\n  - name: a\n    rate: Unlimited\n    key: client.ip\n",
			`3:11: limits[0].rate: invalid rate "Unlimited"; write unlimited`,
		},
		{
			"limits:\n  - name: a\n    rate:\n    burst: 5\n",
			`3:10: limits[0].rate: no value; give it one or omit the field`,
		},
		{
			"limits:\n  - name: a\n    rate: 10/m\n    burst: 0\n",
			`4:12: limits[0].burst: must be a whole number from 1 to 1000000000, not 0; omit burst for as many tokens as the rate has`,
		},
		{
			"limits:\n  - name: a\n    rate: 10/m\n    burst: 200%\n",
			`4:12: limits[0].burst: must be a whole number from 1 to 1000000000, not 200%; omit burst for as many tokens as the rate has`,
		},
		// fields
		{
			"limit:\n  - name: a\n    rate: 10/m\n",
			`1:1: limit: unknown field; did you mean limits?`,
		},
		{
			"rate_limits:\n  - name: a\n    rate: 10/m\n",
			`1:1: rate_limits: unknown field; did you mean limits?`,
		},
		{
			"limits:\n  - name: a\n    rate: 10/m\n    burts: 5\n",
			`4:5: limits[0].burts: unknown field; did you mean burst?`,
		},
		{
			"limits:\n  - name: a\n    rate: 10/m\n    onFailure: allow\n",
			`4:5: limits[0].onFailure: unknown field; did you mean on_failure?`,
		},
		{
			"limits:\n  - name: a\n    rate: 10/m\n    keys: [client.ip]\n",
			`4:5: limits[0].keys: unknown field; did you mean key?`,
		},
		{
			"limits:\n  - name: a\n    rate: 10/m\n    paths: [/a]\n",
			`4:5: limits[0].paths: unknown field; write match: {paths: ...}`,
		},
		{
			"limits:\n  - name: a\n    rate: 10/m\n    match: {headers: {x: y}}\n",
			`4:13: limits[0].match.headers: unknown field; write when: request.headers["x-name"] == "value" in the limit`,
		},
		{
			"limits:\n  - name: a\n    rate: 10/m\n    match: {path: [/a]}\n",
			`4:13: limits[0].match.path: unknown field; did you mean paths?`,
		},
		{
			"redis: {url: \"redis://h\"}\n",
			`1:1: redis: unknown field; write store: {redis: {url: ...}}`,
		},
		{
			"store: {url: \"redis://h\"}\n",
			`1:9: store.url: unknown field; write redis: {url: ...}`,
		},
		{
			"store: {redis: \"redis://h\"}\n",
			`1:16: store.redis: must be a mapping, not a string; write redis: {url: ...}`,
		},
		{
			"limits:\n  a:\n    rate: 10/m\n",
			`2:3: limits: must be a list of limits such as {name: per-client, key: client.network, rate: 10/m}, not a mapping`,
		},
		{
			"limits:\n  - name: a\n",
			`2:5: limits[0].rate: missing; a limit needs a name, and a rate, a quota or a plan`,
		},
		{
			"limits:\n  - rate: 10/m\n",
			`2:5: limits[0].name: missing; a limit needs a name, and a rate, a quota or a plan`,
		},
		{
			"limits:\n  - name: Per Client\n    rate: 10/m\n",
			`2:11: limits[0].name: invalid name "Per Client"; want 1 to 63 characters of a-z, 0-9 and -`,
		},
		{
			"limits:\n  - name: a\n    rate: 10/m\n    rate: 5/m\n",
			`4:5: limits[0].rate: duplicate field; remove one`,
		},
		{
			"limits:\n  - name: a\n    rate: 10/m\n  - name: a\n    rate: 10/m\n",
			`4:11: limits[1].name: duplicate name "a"; want a different name for each limit`,
		},
		{
			"domain: d\ndescriptors:\n  - key: a\n    rate_limit: {unit: minute, requests_per_unit: 10}\n",
			`2:1: descriptors: unknown field; this is a config of envoyproxy/ratelimit; write limits, as envoy/README.md shows under Migrating`,
		},
		// values
		{
			"store: {redis: {url: \"redis://h\", timeout: 100}}\n",
			`1:44: store.redis.timeout: invalid duration "100"; a duration needs a unit; write 100ms`,
		},
		{
			"store: {redis: {url: \"redis://h\", timeout: 100 ms}}\n",
			`1:44: store.redis.timeout: invalid duration "100 ms"; write 100ms`,
		},
		{
			"store: {redis: {url: \"redis://h\", timeout: 2min}}\n",
			`1:44: store.redis.timeout: invalid duration "2min"; want one from 1ms to 1m, written like 100ms, 1.5s or 2m`,
		},
		{
			"grace: 1d\n",
			`1:8: grace: invalid duration "1d"; want one from 0s to 1h, written like 100ms, 1.5s or 2m`,
		},
		{
			"local_share: 10%\n",
			`1:14: local_share: must be a number from 0.000001 to 1, not 10%; write 0.1 for 10 %`,
		},
		{
			"failure_status: 429\n",
			`1:17: failure_status: must be a whole number from 500 to 599, not 429`,
		},
		{
			"mode: dry-run\n",
			`1:7: mode: unknown value "dry-run"; did you mean shadow? (want one of enforce, shadow)`,
		},
		{
			"on_failure: fail_open\n",
			`1:13: on_failure: unknown value "fail_open"; did you mean allow? (want one of deny, allow, local, delegate)`,
		},
		{
			"log_level: warning\n",
			`1:12: log_level: unknown value "warning"; did you mean warn? (want one of debug, info, warn, error)`,
		},
		{
			"headers: x-ratelimit\n",
			`1:10: headers: must be a list of x-ratelimit, retry-after and ratelimit, not a string; write [x-ratelimit]`,
		},
		{
			"listen: {grpc: 9001}\n",
			`1:16: listen.grpc: must be host:port, not a number; write 127.0.0.1:9001`,
		},
		{
			"listen: {grpc: localhost}\n",
			`1:16: listen.grpc: invalid address "localhost"; want host:port or unix:///absolute/path`,
		},
		{
			"limits:\n  - name: a\n    rate: 10/m\n    match: {methods: [get]}\n",
			`4:23: limits[0].match.methods[0]: invalid method "get"; write GET`,
		},
		{
			"limits:\n  - name: a\n    rate: 10/m\n    match: {methods: GET}\n",
			`4:22: limits[0].match.methods: must be a list, not a string; write [GET]`,
		},
		{
			"limits:\n  - name: a\n    rate: 10/m\n    match: {paths: [api]}\n",
			`4:21: limits[0].match.paths[0]: path "api" does not begin with /; want one such as /v1/orders, /v1/orders/{id}/pay or /v2/**`,
		},
		{
			"limits:\n  - name: a\n    rate: 10/m\n    match: {paths: [\"/api/*\"]}\n",
			`4:21: limits[0].match.paths[0]: path "/api/*": segment "*" is not a literal, {x}, or ** at the end; write /api/** for any number of segments, or /api/{x} for one`,
		},
		{
			"limits:\n  - name: a\n    rate: 10/m\n    match: {paths: [\"^/api/.*$\"]}\n",
			`4:21: limits[0].match.paths[0]: path "^/api/.*$" does not begin with /; paths are not regular expressions; want one such as /v1/orders, /v1/orders/{id}/pay or /v2/**`,
		},
		{
			"limits:\n  - name: a\n    rate: 10/m\n    match: {hosts: [\"a.com:80\"]}\n",
			`4:21: limits[0].match.hosts[0]: invalid host "a.com:80"; write a.com`,
		},
		{
			"limits:\n  - name: a\n    rate: 10/m\n    match: {hosts: [\"*\"]}\n",
			`4:21: limits[0].match.hosts[0]: invalid host "*"; omit hosts for all`,
		},
		{
			"limits:\n  - name: a\n    rate: 10/m\n    match: {clients: [10.0.0.1/8]}\n",
			`4:23: limits[0].match.clients[0]: "10.0.0.1/8" has bits outside its mask; write 10.0.0.0/8`,
		},
		{
			"limits:\n  - name: a\n    rate: 10/m\n    match: {clients: [localhost]}\n",
			`4:23: limits[0].match.clients[0]: invalid network "localhost"; want one such as 10.0.0.0/8 or 2001:db8::/32, or an address`,
		},
		{
			"exempt: [{paths: [/healthz]}]\n",
			`1:11: exempt[0].paths: unknown field; write match: {paths: ...}`,
		},
		{
			"client_ip: x-forwarded-for\n",
			`1:12: client_ip: must be a mapping, not a string; its fields are from, header, xff_from_right`,
		},
		{
			"client_ip: {header: X-Real-IP}\n",
			`1:21: client_ip.header: invalid header name "X-Real-IP"; want one in lower case, such as x-real-ip`,
		},
		{
			"store: {redis: {url: \"${REDIS_URL}\"}}\n",
			`1:22: store.redis.url: environment variable REDIS_URL is not set; write ${REDIS_URL:-default} for a default`,
		},
		{
			"store:\n  redis:\n    url: $REDIS_URL\n",
			`3:10: store.redis.url: an environment variable is written ${REDIS_URL}`,
		},
		{
			"store: {redis: {url: \"localhost:6379\"}}\n",
			`1:22: store.redis.url: URL without a scheme: write redis:// before it; want redis://[user:password@]host:port[/database], the same with rediss://, or unix:///path/to/socket[?db=database]`,
		},
		{
			"store: {redis: {mode: cluster, addresses: [a]}}\n",
			`1:44: store.redis.addresses[0]: invalid address "a"; want host:port`,
		},
		// overrides
		{
			"limits:\n  - name: a\n    rate: 10/m\n    overrides: [{key: a, rate: 1/s}]\n",
			`4:16: limits[0].overrides: requires key; a limit without one has a single bucket`,
		},
		{
			"limits:\n  - name: a\n    rate: 10/m\n    key: client.ip\n    overrides: {a: 1/s}\n",
			`5:16: limits[0].overrides: must be a list of overrides such as {key: gold, rate: 100/m}, not a mapping`,
		},
		{
			"limits:\n  - name: a\n    rate: 10/m\n    key: client.ip\n    overrides: [{key: 10.0.0.1}]\n",
			`5:17: limits[0].overrides[0]: missing rate, quota or plan; an override needs one`,
		},
		{
			"limits:\n  - name: a\n    rate: 10/m\n    key: client.network\n    overrides: [{key: 10.0.0.0/8, rate: 1/s}]\n",
			`5:23: limits[0].overrides[0].key: 10.0.0.0/8 is not a client network (an IPv4 address or an IPv6 /64); write 10.0.0.0`,
		},
		{
			"limits:\n  - name: a\n    rate: 10/m\n    key: client.ip\n    overrides_file: t.csv\n",
			`5:21: limits[0].overrides_file: t.csv: no such file or directory`,
		},
		{
			"limits:\n  - name: a\n    rate: 10/m\n    key: client.ip\n    overrides_file: nohdr.csv\n",
			`nohdr.csv:1:1: limits[0].overrides_file: no header row; add one as the first line: key,rate,burst`,
		},
		{
			"limits:\n  - name: a\n    rate: 10/m\n    key: client.ip\n    overrides_file: semi.csv\n",
			`semi.csv:1:1: limits[0].overrides_file: columns separated by ";"; separate them by commas, as in key,rate,burst`,
		},
		{
			"limits:\n  - name: a\n    rate: 10/m\n    key: client.ip\n    overrides_file: cols.csv\n",
			"cols.csv:1:1: limits[0].overrides_file: column 2 has an unknown name; " + wantColumns,
		},
		{
			"limits:\n  - name: a\n    rate: 10/m\n    key: client.ip\n    overrides_file: rate.csv\n",
			"rate.csv:2:10: limits[0].overrides_file: invalid rate \"10\"; a rate needs a period; write 10/s or 10/m\n" +
				"rate.csv:3:1: limits[0].overrides_file: row of 2 columns; want 3, as the header row has",
		},
	})
}

// TestMendsTellNoSecret checks that what is said about a line of YAML that cannot
// be read does not quote what may be a secret in it.
func TestMendsTellNoSecret(t *testing.T) {
	for _, line := range []string{
		"password: hunter2: x", "password: [hunter2", "password: {{ hunter2 }}", "password: \"hunter2\" x", "password: @hunter2",
		"password:hunter2", "key_secret: hunter2: x", "url: redis://:hunter2: @h", "- {key: hunter2[\"a\"], rate: 1/s",
		"- key: hunter2: x", "key: hunter2: request", "key: 'hunter2' x", "{a: x[\"hunter2\"]}", "hunter2", "hunter2\n  a: b",
		"\t hunter2", "password: *hunter2", "password: %hunter2", "password: |hunter2", "password: !hunter2 [a",
	} {
		for _, before := range []string{"", "store:\n  redis:\n    ", "limits:\n- name: a\n  "} {
			_, err := Parse("f", []byte(before+line+"\n"), env())
			if err != nil && strings.Contains(err.Error(), "hunter2") && !strings.Contains(err.Error(), "unknown field") {
				t.Errorf("%q: %v", before+line, err)
			}
		}
	}
}

// TestDistance checks the number of letters that differ.
func TestDistance(t *testing.T) {
	for _, tt := range []struct {
		a, b string
		want int
	}{
		{"", "", 0}, {"a", "", 1}, {"burts", "burst", 2}, {"limit", "limits", 1}, {"kitten", "sitting", 3}, {"ab", "ab", 0},
	} {
		if got := distance(tt.a, tt.b); got != tt.want {
			t.Errorf("%q and %q: %d, want %d", tt.a, tt.b, got, tt.want)
		}
	}
}

// TestMendedRatesAreRates checks that what is said to be written is a rate.
func TestMendedRatesAreRates(t *testing.T) {
	for text, want := range map[string]string{
		"0.25/s": "1/4s", "2.5/m": "5/2m", "1/2weeks": "1/14d", "3/0.5h": "", "100e9/s": "", "5k per hour": "5000/h",
		"1.5/1.5s": "3/3s", "20 requests per second": "20/s", "10p/s": "", "/": "", "999999999999999999999/s": "",
		"0.0000000001/s": "", "10/5000years": "", "10 a day": "10/d", "1e9/s": "1000000000/s", "7/0d": "",
	} {
		got := mendRate(text)
		if _, rate, ok := strings.Cut(got, "write "); ok {
			if _, _, err := parseRate(rate); err != nil {
				t.Errorf("%s: write %s: %v", text, rate, err)
			}
			got = rate
		}
		if got != want {
			t.Errorf("%s: %q, want %q", text, got, want)
		}
	}
}
