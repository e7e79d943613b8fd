package policy

import (
	"fmt"
	"strings"
	"testing"
	"time"
)

// warned is a config and the only warning that it has, without the file's name.
// The warning is empty if it must have none.
type warned struct{ text, want string }

// beside is a limit that bounds clients who make up the keys of others.
const beside = "\n- {name: beside, rate: 100/s, key: client.network}"

// TestLint checks the warnings about what is hardly meant: for each, configs that
// must have it, and configs that must not.
func TestLint(t *testing.T) {
	for name, rows := range map[string][]warned{
		"a group's member that is never reached": {
			{"limits:\n- {name: a, rate: 1/s, group: g}\n- {name: b, rate: 1/s, group: g}",
				"3:3: limits[1]: is never reached: the limit a before it in the group g applies to every request that this one " +
					"matches; put this one first"},
			{"limits:\n- {name: a, rate: 1/s, group: g}\n- {name: b, rate: 1/s, group: g, when: request.size > 1}", "3:3: limits[1]: is never"},
			{"limits:\n- {name: a, rate: 1/s, group: g, match: {paths: [/a/**]}}\n- {name: b, rate: 1/s, group: g, match: {paths: ['/a/{id}'], methods: [GET]}}",
				"3:3: limits[1]: is never"},
			{"limits:\n- {name: c, rate: 9/s, group: g, when: request.size > 1}\n- {name: a, rate: 1/s, group: g, when: request.size > 1}\n- {name: b, rate: 1/s, group: g}",
				"3:3: limits[1]: is never"},
			{"limits:\n- {name: a, rate: 1/s, group: g, when: request.size > 1}\n- {name: b, rate: 1/s, group: g}", ""},
			{"limits:\n- {name: a, rate: 1/s, group: g, match: {paths: [/a]}}\n- {name: b, rate: 1/s, group: g}", ""},
			{"limits:\n- {name: a, rate: 1/s, group: g}\n- {name: b, rate: 1/s, group: h}\n- {name: c, rate: 1/s}", ""},
			{"limits:\n- {name: a, rate: 1/s, group: g, key: source.principal, absent: skip}\n- {name: b, rate: 1/s, group: g}", ""},
		},
		"a secret that is readable": {
			{"limits:\n- {name: a, rate: 1/s, readable: true, key: 'request.headers[\"x-api-key\"]'}" + beside,
				`2:45: limits[0].key: request.headers["x-api-key"] is likely to be a secret, ` +
					"and readable: true shows it in clear"},
			{`limits:
- {name: a, rate: 1/s, readable: true, key: 'request.headers["authorization"].split(" ")[1]'}` + beside,
				`limits[0].key: request.headers["authorization"] is likely`},
			{`limits:
- {name: a, rate: 1/s, readable: true, key: 'request.headers["cookie"]'}` + beside,
				`limits[0].key: request.headers["cookie"] is likely`},
			{`limits:
- {name: a, rate: 1/s, readable: true, key: 'request.headers["x-auth-token"]'}` + beside,
				`limits[0].key: request.headers["x-auth-token"] is likely`},
			{`limits:
- {name: a, rate: 1/s, readable: true, key: 'request.query'}` + beside,
				`limits[0].key: request.query is likely`},
			{`limits:
- {name: a, rate: 1/s, readable: true, key: 'request.headers["x-tenant"]'}` + beside,
				``},
			{`limits:
- {name: a, rate: 1/s, readable: true, key: 'request.headers["x-author"]'}` + beside,
				``},
			{`limits:
- {name: a, rate: 1/s, readable: true, key: 'client.network'}` + beside,
				`limits[0].readable: has no effect: no part of the key is hashed; remove it`},
			{`limits:
- {name: a, rate: 1/s, key: 'request.headers["cookie"]'}` + beside, ``},
		},
		"an exemption of everything": {
			{"exempt: [{match: {paths: [/**]}}]", "1:10: exempt[0]: exempts every request, whatever it is, so that no limit applies"},
			{"exempt: [{match: {clients: [0.0.0.0/0, '::/0']}}]", "1:10: exempt[0]: exempts every request, whatever it is, so"},
			{"exempt: [{match: {clients: [0.0.0.0/0]}}]", "1:10: exempt[0]: exempts every request of IPv4 clients, so that"},
			{"exempt: [{match: {clients: [0.0.0.0/0], paths: [/healthz]}}]", ""},
			{"exempt: [{match: {paths: [/**], principals: ['spiffe://a/*']}}]", ""},
			{"exempt: [{match: {clients: [10.0.0.0/8]}}]", ""},
		},
		"a when that is constant": {
			{"limits: [{name: a, rate: 1/s, when: true}]", "1:37: limits[0].when: is always true; omit when"},
			{"limits: [{name: a, rate: 1/s, when: '1 == 2'}]", "1:37: limits[0].when: is always false, so the limit never applies"},
			{`limits: [{name: a, rate: 1/s, when: 'request.method != "GET" || request.method != "HEAD"'}]`,
				`limits[0].when: always true, as request.method cannot be both "GET" and "HEAD"; write && instead of ||`},
			{`limits: [{name: a, rate: 1/s, when: 'request.host == "a" || request.size > 1 && request.host == "b" && request.host == "c"'}]`,
				`limits[0].when: always false, as request.host cannot be both "b" and "c"; write || instead of &&`},
			{`limits: [{name: a, rate: 1/s, when: 'request.method != "GET" && request.method != "HEAD"'}]`, ""},
			{`limits: [{name: a, rate: 1/s, when: 'request.method == "GET" || request.method == "HEAD"'}]`, ""},
			{`limits: [{name: a, rate: 1/s, when: 'request.headers["a"] != "x" || request.headers["b"] != "y"'}]`, ""},
			{`limits: [{name: a, rate: 1/s, when: '"a" in request.headers'}]`, ""},
		},
		"a comparison with what no request has": {
			{`limits: [{name: a, rate: 1/s, when: 'request.method == "get"'}]`, `limits[0].when: methods are in upper case, so none is "get"; write "GET"`},
			{`limits: [{name: a, rate: 1/s, when: '"Get" != request.method'}]`, `limits[0].when: methods are in upper case, so none is "Get"; write "GET"`},
			{`limits: [{name: a, rate: 1/s, when: 'request.method in ["GET", "post"]'}]`, `limits[0].when: methods are in upper case, so none is "post"; write "POST"`},
			{`limits: [{name: a, rate: 9/s, cost: 'request.method.startsWith("p") ? 2 : 1'}]`, `limits[0].cost: methods are in upper case, so none has "p"; write "P"`},
			{`limits: [{name: a, rate: 1/s, when: 'request.method.matches("^(put|post)$")'}]`, `limits[0].when: methods are in upper case`},
			{`limits: [{name: a, rate: 1/s, when: 'request.host == "API.example.com"'}]`, `limits[0].when: request.host is never "API.example.com"; write "api.example.com"`},
			{`limits: [{name: a, rate: 1/s, when: 'request.host == "a.example.com:8080"'}]`,
				`limits[0].when: request.host is never "a.example.com:8080": a host has no port here; write it without one`},
			{`limits: [{name: a, rate: 1/s, when: 'client.network == "10.0.0.0/8"'}]`,
				`limits[0].when: client.network is one address, and never "10.0.0.0/8"; compare with networks in match.clients`},
			{`limits: [{name: a, rate: 1/s, when: 'request.scheme == "HTTPS"'}]`, `limits[0].when: request.scheme is never "HTTPS": `},
			{`limits: [{name: a, rate: 1/s, when: 'request.method.lowerAscii() == "get"'}]`, ""},
			{`limits: [{name: a, rate: 1/s, when: 'request.method in ["GET", "POST"] && request.host == "a.example.com"'}]`, ""},
			{`limits: [{name: a, rate: 1/s, when: 'request.method.matches("^(?i)post$") || request.method.matches("^P[a-zA-Z]+$")'}]`, ""},
			{`limits: [{name: a, rate: 1/s, when: 'source.principal != "" && client.network == "2001:db8::/64"'}]`, ""},
			{`limits: [{name: a, rate: 1/s, when: 'request.headers["x-method"] == "get"'}]`, ""},
		},
		"a key that is constant": {
			{`limits: [{name: a, rate: 1/s, key: '"all"'}]`, "1:36: limits[0].key: is constant, so all requests share one bucket; omit key if"},
			{`limits: [{name: a, rate: 1/s, key: [client.ip, '"v1"']}]`, "1:48: limits[0].key[1]: is the same for all requests, so this part of the key has no effect; omit it"},
			{"limits: [{name: a, rate: 1/s, key: client.ip}]", ""},
			{"limits: [{name: a, rate: 1/s}]", ""},
		},
		"a key that differs for each request": {
			{"limits: [{name: a, rate: 1/s, key: request.id}]",
				"1:36: limits[0].key: request.id differs for each request, so each gets a full bucket of its own and the " +
					"limit never denies; write what " +
					"identifies the client, such as client.network"},
			{"limits: [{name: a, rate: 1/s, key: 'request.headers[\"traceparent\"]'}]", `limits[0].key: request.headers["traceparent"] differs`},
			{"limits: [{name: a, rate: 1/s, key: [client.ip, source.port]}]", "1:48: limits[0].key[1]: source.port differs for each connection"},
			{"limits: [{name: a, rate: 1/s, key: 'client.ip + \":\" + string(source.port)'}]", "source.port differs for each connection"},
			{"limits: [{name: a, rate: 1/s, key: string(request.time)}]", "request.time differs for each request"},
			{"limits: [{name: a, rate: 1/s, key: [client.ip, request.time.getHours()]}]", ""},
			{"limits: [{name: a, rate: 1/s, key: [client.ip, source.port == 80]}]", ""},
		},
		"an override that cannot be met": {
			{"limits: [{name: a, rate: 1/s, match: {methods: [POST]}, key: request.method, overrides: [{key: GET, rate: 2/s}]}]",
				"1:96: limits[0].overrides[0].key: no request has this key: the limit's match.methods excludes it"},
			{"limits: [{name: a, rate: 1/s, match: {clients: [10.0.0.0/8]}, key: client.network, overrides: [{key: 192.0.2.1, rate: 2/s}]}]",
				"match.clients excludes it"},
			{"limits: [{name: a, rate: 1/s, match: {hosts: ['*.a.com']}, key: request.host, overrides: [{key: a.com, rate: 2/s}]}]",
				"match.hosts excludes it"},
			{"limits: [{name: a, rate: 1/s, match: {paths: [/a/**]}, key: request.url_path, overrides: [{key: /b, rate: 2/s}]}, {name: b, rate: 1/s}]",
				"match.paths excludes it"},
			{"limits: [{name: a, rate: 1/s, match: {principals: ['spiffe://a/*']}, key: source.principal, overrides: [{key: 'spiffe://b/c', rate: 2/s}]}]",
				"match.principals excludes it"},
			{"limits: [{name: a, rate: 1/s, key: 'request.size > 100', overrides: [{key: large, rate: 2/s}]}]",
				"no request has this key: the part is always one of true, false"},
			{"limits: [{name: a, rate: 1/s, key: 'request.method == \"GET\" ? \"read\" : \"write\"', overrides: [{key: reads, rate: 2/s}]}]",
				"no request has this key: the part is always one of read, write"},
			{"limits: [{name: a, rate: 1/s, match: {methods: [GET]}, key: request.method, overrides: [{key: HEAD, rate: 2/s}]}]", ""},
			{"limits: [{name: a, rate: 1/s, match: {clients: [10.0.0.0/8]}, key: client.network, overrides: [{key: 10.1.2.3, rate: 2/s}]}]", ""},
			{"limits: [{name: a, rate: 1/s, match: {clients: ['2001:db8::1']}, key: client.network, overrides: [{key: '2001:db8::/64', rate: 2/s}]}]", ""},
			{"limits: [{name: a, rate: 1/s, match: {paths: [/A/**], ignore_case: true}, key: request.path, overrides: [{key: '/a/B?c', rate: 2/s}]}, {name: b, rate: 1/s}]", ""},
			{"limits: [{name: a, rate: 1/s, key: 'request.size > 100', overrides: [{key: 'true', rate: 2/s}]}]", ""},
			{"limits: [{name: a, rate: 1/s, match: {methods: [POST]}, key: request.method, overrides: [{key: 'sha256:" + strings.Repeat("0", 64) + "', rate: 2/s}]}]", ""},
		},
		"a cost of 0 without settle": {
			{"limits: [{name: a, rate: 1/s, cost: 0}]", "1:37: limits[0].cost: a limit that takes no tokens never denies; give it a cost above 0, or a settle"},
			{"limits: [{name: a, rate: 1/s, cost: 1 - 1}]", "limits[0].cost: a limit that takes no tokens never denies"},
			{"limits: [{name: a, rate: 1/s, cost: 0, settle: response.code}]", ""},
			{"limits: [{name: a, rate: 1/s, cost: 'request.method == \"GET\" ? 0 : 1'}]", ""},
			{"limits: [{name: a, rate: unlimited, cost: 0}]", ""},
		},
		"a burst below the cost": {
			{"limits: [{name: a, rate: 10/s, cost: 'request.method == \"POST\" ? 50 : 1'}]",
				"limits[0].cost: may be 50, above the burst of 10: such a request is always denied; raise burst to at least 50"},
			{"limits: [{name: a, rate: 10/s, cost: 'request.method == \"POST\" ? 5.0 : request.method == \"PUT\" ? 10.5 : 1.0'}]",
				"limits[0].cost: may be 11, above the burst of 10"},
			{"limits: [{name: a, rate: 10/s, key: client.ip, cost: 'request.method == \"POST\" ? 5 : 1', overrides: [{key: 10.0.0.1, rate: 2/s}, {key: 10.0.0.2, rate: 4/s}]}]",
				"limits[0].cost: may be 5, above the burst of 2 overrides (the smallest is 2): such"},
			{"limits: [{name: a, rate: 10/s, burst: 50, cost: 'request.method == \"POST\" ? 50 : 1'}]", ""},
			{"limits: [{name: a, rate: 10/s, cost: int(request.headers.n) + 100}]", ""},
		},
		"listeners on one port": {
			{"listen: {grpc: '127.0.0.1:9002'}",
				"1:16: listen.grpc: 127.0.0.1:9002 is also the port of listen.admin (127.0.0.1:9002), so sluice cannot start; give each listener a port of its own"},
			{"listen: {metrics: '0.0.0.0:9001'}", "1:19: listen.metrics: 0.0.0.0:9001 is also the port of listen.grpc"},
			{"listen: {grpc: 'localhost:9000', admin: '127.0.0.1:9000'}", "1:41: listen.admin: 127.0.0.1:9000 is also the port of listen.grpc"},
			{"listen: {grpc: '127.0.0.1:0', admin: '127.0.0.1:0', metrics: '127.0.0.1:0'}", ""},
			{"listen: {grpc: '10.0.0.1:9002', admin: '127.0.0.1:9002'}", ""},
			{"listen: {grpc: unix:///run/sluice.sock}", ""},
		},
		"an admin listener on all addresses": {
			{"listen: {admin: '0.0.0.0:9002'}", "1:17: listen.admin: 0.0.0.0:9002 is open to everyone"},
			{"listen: {admin: '10.0.0.1:9002', metrics: '0.0.0.0:9003'}", ""},
		},
		"a client-chosen key without another limit beside it": {
			{"limits:\n- {name: a, rate: 1/s, key: 'request.headers[\"x-api-key\"]'}",
				"2:29: limits[0].key: request.headers[\"x-api-key\"] is chosen by the client: a client that makes up values gets a full bucket for each; " +
					"add a limit with key: client.network for the same requests, or have Envoy verify the value before it asks sluice"},
			{"limits:\n- {name: a, rate: 1/s, key: [client.ip, request.url_path]}", "2:41: limits[0].key[1]: request.url_path is chosen by the client"},
			{"limits:\n- {name: a, rate: 1/s, key: 'request.headers[\"authorization\"].substring(7)'}", `request.headers["authorization"] is chosen`},
			{"limits:\n- {name: a, rate: 1/s, key: request.query}\n- {name: b, rate: 1/s, key: request.path}\n- {name: c, rate: 1/s, key: request.path}",
				"limits[0].key: request.query is chosen by the client (so are the keys of b and 1 more): a client"},
			{"limits:\n- {name: a, rate: 1/s, key: request.query}\n- {name: b, rate: 1/s, key: client.ip, match: {paths: [/login]}}", "request.query is chosen"},
			{"limits:\n- {name: a, rate: 1/s, key: request.query}\n- {name: b, rate: 1/s, key: client.ip, mode: shadow}", "request.query is chosen"},
			{"limits:\n- {name: a, rate: 1/s, key: request.query, group: g, when: request.size > 1}\n- {name: b, rate: 1/s, key: client.ip, group: g}", "request.query is chosen"},
			{"limits:\n- {name: a, rate: 1/s, key: 'request.headers[\"x-api-key\"]'}" + beside, ""},
			{"limits:\n- {name: a, rate: 1/s, key: request.query, match: {paths: [/a/b]}}\n- {name: b, rate: 1/s, match: {paths: [/a/**]}}", ""},
			{"limits:\n- {name: a, rate: 1/s, key: 'request.headers[\"x-api-key\"]', absent: skip}", ""},
			{"limits:\n- {name: a, rate: unlimited, key: 'request.headers[\"x-api-key\"]'}", ""},
			{"limits:\n- {name: a, rate: 1/s, key: [request.url_path, request.method], match: {paths: [/a, /b]}}", ""},
			{"limits:\n- {name: a, rate: 1/s, key: 'request.headers[\"x-plan\"] == \"gold\" ? \"gold\" : \"free\"'}", ""},
			{"limits:\n- {name: a, rate: 1/s, key: metadata.filter_metadata.jwt.payload.sub}", ""},
			{"mode: shadow\nlimits:\n- {name: a, rate: 1/s, key: request.query}\n- {name: b, rate: 1/s, key: client.ip}", ""},
		},
		"of what stands in one place the warning points at it": {
			{"limits:\n- name: a\n  rate: 1/s\n  when: request.size > 1 && request.method == \"get\"", "4:44: limits[0].when: methods are in upper case"},
		},
	} {
		for _, row := range rows {
			got := strings.ReplaceAll(parse(t, row.text).Warnings.Error(), "test.yaml:", "")
			if row.want == "" && got != "" || row.want != "" && !strings.Contains(got, row.want) || strings.Contains(got, "\n") {
				t.Errorf("%s:\n%s\n got %s\nwant %s", name, row.text, got, row.want)
			}
		}
	}
}

// TestLintOfSettings checks that a warning of what a flag or the environment says
// names it.
func TestLintOfSettings(t *testing.T) {
	c, err := Parse("test.yaml", []byte("listen: {metrics: '127.0.0.1:9003'}"), env(),
		Setting{Field: "listen.admin", Value: "0.0.0.0:9003", From: "SLUICE_ADMIN"})
	if err != nil {
		t.Fatal(err)
	}
	want := "SLUICE_ADMIN: listen.admin: 0.0.0.0:9003 is open to everyone who can reach this machine; listen on 127.0.0.1 and " +
		"use kubectl port-forward\ntest.yaml:1:19: listen.metrics: 127.0.0.1:9003 is also the port of listen.admin " +
		"(0.0.0.0:9003), so sluice cannot start; give each listener a port of its own"
	if got := c.Warnings.Error(); got != want {
		t.Errorf("%s\nwant\n%s", got, want)
	}
}

// TestWarningsFor checks the warning of a store that may answer later than Envoy
// waits.
func TestWarningsFor(t *testing.T) {
	for text, want := range map[string]string{
		"store: {redis: {url: 'redis://h', timeout: 200ms}}": "test.yaml:1:44: store.redis.timeout: 200ms is not below the timeout of " +
			"Envoy's ext_authz filter (200ms), so Envoy decides about failures instead of on_failure; lower it, or " +
			"raise the filter's timeout and pass it as --envoy-timeout",
		"store: {redis: {url: 'redis://h', timeout: 199ms}}": "",
		"store: {redis: {url: 'redis://h'}}":                 "",
		"limits: []":                                         "",
	} {
		if got := parse(t, text).WarningsFor(200 * time.Millisecond).Error(); got != want {
			t.Errorf("%s\n got %s\nwant %s", text, got, want)
		}
	}
}

// TestLintIsBounded checks that the number of comparisons is bounded, so that the
// warnings of a large config do not delay its reload.
func TestLintIsBounded(t *testing.T) {
	var text strings.Builder
	text.WriteString("limits:\n")
	const limits = 4000
	for i := range limits {
		fmt.Fprintf(&text, "- {name: a%d, rate: 1/s, group: g, key: request.path, match: {paths: [/a/%d, /b/%[1]d]}}\n", i, i)
	}
	for i := range limits {
		fmt.Fprintf(&text, "- {name: b%d, rate: 1/s, key: client.ip, match: {paths: [/a/%d, /b/%[1]d/c]}}\n", i, i)
	}
	start := time.Now()
	c := parse(t, text.String())
	t.Logf("%v, %d warnings", time.Since(start), len(c.Warnings))
	cr := configReader{limitReader: limitReader{}, config: &Config{}}
	l := linter{configReader: &cr, comparisons: maxComparisons}
	if l.covers(&match{}, &match{}) {
		t.Error("patterns are compared beyond the bound")
	}
}

// TestDoubtfulOverridesAreCounted checks that a limit with many overrides that
// cannot be met has a few warnings, and one with the number of the others.
func TestDoubtfulOverridesAreCounted(t *testing.T) {
	var rows strings.Builder
	rows.WriteString("key,rate,burst\n")
	for i := range 1000 {
		fmt.Fprintf(&rows, "192.0.%d.%d,1/s,\n", i/250, i%250)
	}
	c := loadFiles(t, "sluice.yaml",
		"limits: [{name: a, rate: 1/s, match: {clients: [10.0.0.0/8]}, key: client.ip, overrides_file: o.csv}]",
		"o.csv", rows.String())
	if n := len(c.Warnings); n != maxDoubtful+1 || c.Warnings[0].Message != "995 more overrides like this one" {
		t.Errorf("%d: %v", n, c.Warnings)
	}
}

// TestMatchCovers checks matches that hold wherever another one does.
func TestMatchCovers(t *testing.T) {
	read := func(text string) *match {
		return &parse(t, "limits: [{name: a, rate: 1/s, match: "+text+"}]").rules[0].match
	}
	for _, row := range []struct {
		a, b string
		want bool
	}{
		{"{methods: [GET]}", "{methods: [HEAD]}", true},
		{"{methods: [HEAD]}", "{methods: [GET]}", false},
		{"{methods: [GET, POST]}", "{methods: [POST], hosts: [a]}", true},
		{"{methods: [POST], hosts: [a]}", "{methods: [POST]}", false},
		{"{hosts: ['*.com']}", "{hosts: ['*.a.com', b.com]}", true},
		{"{hosts: ['*.a.com']}", "{hosts: ['*.com']}", false},
		{"{hosts: ['*.a.com']}", "{hosts: [a.com]}", false},
		{"{hosts: [x.a.com]}", "{hosts: ['*.a.com']}", false},
		{"{paths: ['/a/{x}/c']}", "{paths: [/a/b/c]}", true},
		{"{paths: [/a/b/c]}", "{paths: ['/a/{x}/c']}", false},
		{"{paths: ['/a/**']}", "{paths: ['/a/b/**', /a]}", true},
		{"{paths: ['/a/{x}']}", "{paths: ['/a/**']}", false},
		{"{paths: [/a], ignore_case: true}", "{paths: [/A]}", true},
		{"{paths: [/a]}", "{paths: [/a], ignore_case: true}", false},
		{"{paths: [/A], ignore_case: true}", "{paths: [/a], ignore_case: true}", true},
		{"{clients: [10.0.0.0/8]}", "{clients: [10.1.0.0/16]}", true},
		{"{clients: [10.1.0.0/16]}", "{clients: [10.0.0.0/8]}", false},
		{"{clients: ['::/0']}", "{clients: [10.0.0.0/8]}", false},
		{"{principals: ['spiffe://a/*']}", "{principals: ['spiffe://a/*/b']}", true},
		{"{principals: ['spiffe://a/*/b']}", "{principals: ['spiffe://a/*']}", false},
	} {
		if got := read(row.a).covers(read(row.b)); got != row.want {
			t.Errorf("%s covers %s: %v", row.a, row.b, got)
		}
	}
}
