package policy

import (
	"reflect"
	"slices"
	"strings"
	"testing"

	"google.golang.org/protobuf/types/known/structpb"
)

// TestDraw is the specification of which limits apply to a request, with which
// keys and costs, and why.
func TestDraw(t *testing.T) {
	rows := 0
	for _, section := range []struct {
		config string
		// Each row is a request, what it draws and, for some limits, the reason
		// that Explain gives: "name: reason".
		rows [][]string
	}{
		{"", [][]string{
			{"GET h/", ""},
		}},
		{"limits: [{name: all, rate: 1/s}]", [][]string{
			{"GET h/", "all -"},
			{"POST other/x from nowhere", "all -"},
		}},
		{"limits: [{name: a, rate: 1/s, key: client.ip}, {name: b, rate: 1/s, key: client.network}]", [][]string{
			{"GET h/", "a =11.203.0.113.7, b =11.203.0.113.7"},
			{"GET h/ from 2001:db8:0:1::7", "a =15.2001:db8:0:1::7, b =17.2001:db8:0:1::/64"},
			{"GET h/ from 2001:DB8:0000:1:0:0:0:7", "a =15.2001:db8:0:1::7, b =17.2001:db8:0:1::/64"},
			{"GET h/ from ::ffff:10.0.0.1", "a =8.10.0.0.1, b =8.10.0.0.1"},
			{"GET h/ from fe80::1%25eth0", "a =7.fe80::1, b =9.fe80::/64"},
			// Addresses that a NAT64 gateway translated are not one network.
			{"GET h/ from 64:ff9b::203.0.113.7", "a =18.64:ff9b::cb00:7107, b =11.203.0.113.7"},
			{"GET h/ from 64:ff9b::203.0.113.8", "a =18.64:ff9b::cb00:7108, b =11.203.0.113.8"},
			{"GET h/ from 64:ff9b:1:fffe::203.0.113.7",
				"a =25.64:ff9b:1:fffe::cb00:7107, b =25.64:ff9b:1:fffe::cb00:7107"},
			{"GET h/ from 64:ff9b:0:1::203.0.113.7", "a =22.64:ff9b:0:1::cb00:7107, b =16.64:ff9b:0:1::/64"},
			{"GET h/ from nowhere", "a ~0., b ~0."},
			{"GET h/ from 10.0.0.1 with x-forwarded-for=1.2.3.4", "a =8.10.0.0.1, b =8.10.0.0.1"},
		}},
		{`limits: [{name: a, rate: 1/s, key: 'request.headers["x-api-key"]'}]`, [][]string{
			{"GET h/ with x-api-key=k", "a #(k)"},
			{"GET h/", "a ~11.203.0.113.7"},
			{"GET h/ with x-api-key=", "a ~11.203.0.113.7"},
			{"GET h/ from 2001:db8::1", "a ~13.2001:db8::/64"},
			{"GET h/ from nowhere", "a ~0."},
			// No client can send the replacement of an absent value.
			{"GET h/ with x-api-key=~11.203.0.113.7", "a #(~11.203.0.113.7)"},
		}},
		{`limits: [{name: a, rate: 1/s, absent: share, key: 'request.headers["x-api-key"]'}]`, [][]string{
			{"GET h/", "a ~0."},
			{"GET h/ with x-api-key=k", "a #(k)"},
		}},
		{`limits: [{name: a, rate: 1/s, absent: skip, key: 'request.headers["x-api-key"]'}, {name: b, rate: 1/s}]`,
			[][]string{
				{"GET h/", "b -"},
				{"GET h/ with x-api-key=k", "a #(k), b -"},
			}},
		{`limits: [{name: a, rate: 7/s, absent: deny, key: 'request.headers["x-api-key"]'}]`, [][]string{
			{"GET h/", "a ~0. refused"},
			{"GET h/ with x-api-key=k", "a #(k)"},
		}},
		{`limits: [{name: a, rate: 1/s, key: [request.method, request.host, request.url_path]}]`, [][]string{
			{"GET API.example.com:443/v1/a?token=s3cret", "a =3.GET=15.api.example.com=5./v1/a"},
			{"GET h/{a}%20b", "a =3.GET=1.h=14./%7Ba%7D%2520b"},
			{"GET h/\"\r\n\x00\xff", "a =3.GET=1.h=16./%22%0D%0A%00%FF"},
		}},
		{`limits: [{name: a, rate: 1/s, key: request.path}]`, [][]string{
			{"GET h/v1/a", "a =5./v1/a"},
			{"GET h/v1/a?token=s3cret", "a #(/v1/a?token=s3cret)"},
		}},
		{`limits: [{name: a, rate: 1/s, key: ['request.query', 'request.path.split("?")[1]']}]`, [][]string{
			{"GET h/?k", "a #(k)#(k)"},
			{"GET h/", "limit a: key: evaluation failed: index out of bounds"},
		}},
		{`limits: [{name: a, rate: 1/s, key: [request.scheme, request.protocol, source.address, source.principal, 'source.port']}]`, [][]string{
			{"GET h/ by spiffe://a/ns/b", "a =5.https=6.HTTP/2=11.203.0.113.7=15.spiffe://a/ns/b=1.0"},
			{"GET h/", "a =5.https=6.HTTP/2=11.203.0.113.7~11.203.0.113.7=1.0"},
		}},
		{`limits: [{name: a, rate: 1/s, key: ['"x"', 'request.method.lowerAscii()', '1.5e13', '12u', 'true', '3.25']}]`,
			[][]string{
				{"GET h/", "a =1.x=3.get=14.15000000000000=2.12=4.true=4.3.25"},
			}},
		{`limits: [{name: a, rate: 1/s, key: 'context["plan"]'}, {name: b, rate: 1/s, key: 'request.headers["a"] + request.method'}, {name: c, rate: 1/s, key: request.headers.a}]`, [][]string{
			{"GET h/ context plan=k with a=k", "a #(k), b #(kGET), c #(k)"},
			{"GET h/", "a ~11.203.0.113.7, b ~11.203.0.113.7, c ~11.203.0.113.7"},
		}},
		{`limits: [{name: a, rate: 1/s, key: 'request.headers["a"] == "x"'}, {name: b, rate: 1/s, key: 'request.headers["a"] != "x"'}, {name: c, rate: 1/s, key: '"a" in request.headers'}]`, [][]string{
			{"GET h/ with a=x", "a #(true), b #(false), c #(true)"},
		}},
		{`limits: [{name: a, rate: 1/s, key: 'request.headers["a"] != null'}, {name: b, rate: 1/s, key: 'request.headers[?"a"]'}]`, [][]string{
			{"GET h/ with a=x", "a #(true), b #(x)"},
			{"GET h/ with a=", "a #(false), b ~11.203.0.113.7"},
			{"GET h/", "a #(false), b ~11.203.0.113.7"},
		}},
		{`limits: [{name: a, rate: 1/s, key: 'metadata.filter_metadata["envoy.filters.http.jwt_authn"].payload.sub'}]`,
			[][]string{
				{"GET h/", "a ~11.203.0.113.7"},
			}},
		{`limits: [{name: a, rate: 1/s, domain: shared}, {name: b, rate: 1/s}]`, [][]string{
			{"GET h/", "a -, b -"},
		}},
		{`limits: [{name: a, rate: 1/s, match: {hosts: [api.example.com, "*.example.org", "[::1]"]}}]`, [][]string{
			{"GET api.example.com/", "a -"},
			{"GET API.Example.COM/", "a -"},
			{"GET api.example.com:8443/", "a -"},
			{"GET api.example.com./", "a -"},
			{"GET x.api.example.com/", ""},
			{"GET example.com/", ""},
			{"GET a.example.org/", "a -"},
			{"GET a.b.example.org:80/", "a -"},
			{"GET example.org/", ""},
			{"GET .example.org/", ""},
			{"GET aexample.org/", ""},
			{"GET [::1]:80/", "a -"},
			{"GET /", ""},
		}},
		{`limits: [{name: a, rate: 1/s, match: {methods: [GET, PROPFIND]}}]`, [][]string{
			{"GET h/", "a -"},
			{"HEAD h/", "a -"},
			{"PROPFIND h/", "a -"},
			{"POST h/", ""},
			{"get h/", ""},
		}},
		{`limits: [{name: a, rate: 1/s, match: {methods: [HEAD]}}]`, [][]string{
			{"HEAD h/", "a -"},
			{"GET h/", ""},
		}},
		{`limits: [{name: a, rate: 1/s, match: {paths: [/v1/orders, "/v1/orders/{id}/pay", "/v2/**"]}}]`, [][]string{
			{"GET h/v1/orders", "a -"},
			{"GET h/v1/orders?x=1", "a -"},
			{"GET h/v1/orders/", "a -"},
			{"GET h/v1/Orders", ""},
			{"GET h/v1/orders/7", ""},
			{"GET h/v1/orders/7/pay", "a -"},
			{"GET h/v1/orders/7/8/pay", ""},
			{"GET h/v1/orders//pay", ""},
			{"GET h/v2", "a -"},
			{"GET h/v2/", "a -"},
			{"GET h/v2/x/y", "a -"},
			{"GET h/v2x", ""},
			{"GET h/v1", ""},
			{"GET h/", ""},
		}},
		// ignore_case is for upstreams that route paths without case.
		{`limits: [{name: a, rate: 1/s, match: {ignore_case: true, paths: [/V1/Orders, "/v1/orders/{id}/pay", "/v2/**", "/Kilo/é"]}}, {name: b, rate: 1/s, match: {paths: [/v1/orders]}}, {name: c, rate: 1/s, match: {ignore_case: false, paths: [/V1/orders]}}]`, [][]string{
			{"GET h/v1/orders", "a -, b -"},
			{"GET h/V1/ORDERS", "a -"},
			{"GET h/V1/orders/", "a -, c -"},
			{"GET h/v1/%4frders", "a -"},
			{"GET h/v1/%4frders/A%2FB/PAY/", "a -"},
			{"GET h/V2/x", "a -"},
			{"GET h/v1/ORDER", "", `a: path "/v1/ORDER" matches none of match.paths`},
			// Some servers fold more letters than A to Z.
			{"GET h/%E2%84%AAilo/%C3%89", "a -"},
			{"GET h/v1/order%C5%BF", "a -"},
			{"GET h/kilo/\xc9", ""},
		}},
		{`{exempt: [{match: {ignore_case: true, paths: [/Kilo, "/public/**"]}}], limits: [{name: a, rate: 1/s}]}`,
			[][]string{
				{"GET h/kilo", "exempt"},
				{"GET h/KILO", "exempt"},
				{"GET h/PUBLIC/x", "exempt"},
				{"GET h/PUBLIC/../x", "a -"},
				{"GET h/PUBLIC/%2E%2E/x", "a -"},
				{"GET h/\u212ailo", "a -"},
			}},
		{`limits: [{name: root, rate: 1/s, match: {paths: [/]}}, {name: every, rate: 1/s, match: {paths: ["/**"]}}]`,
			[][]string{
				{"GET h/", "root -, every -"},
				{"GET h/?x", "root -, every -"},
				{"GET h//", "root -, every -"},
				{"GET h/a", "every -"},
			}},
		{`limits: [{name: a, rate: 1/s, match: {clients: [203.0.113.0/24, 10.1.2.3, "2001:db8::/32"]}}]`, [][]string{
			{"GET h/ from 203.0.113.255", "a -"},
			{"GET h/ from 203.0.114.0", ""},
			{"GET h/ from 10.1.2.3", "a -"},
			{"GET h/ from 10.1.2.4", ""},
			{"GET h/ from ::ffff:10.1.2.3", "a -"},
			{"GET h/ from 2001:db8:ffff::1", "a -"},
			{"GET h/ from 2001:db9::1", ""},
			{"GET h/ from nowhere", ""},
		}},
		{`limits: [{name: a, rate: 1/s, match: {principals: ["spiffe://c/ns/web/*", "spiffe://c/ns/*/sa/admin", "spiffe://c/x"]}}]`, [][]string{
			{"GET h/ by spiffe://c/ns/web/sa/shop", "a -"},
			{"GET h/ by spiffe://c/ns/app/sa/admin", "a -"},
			{"GET h/ by spiffe://c/ns/app/sa/user", ""},
			{"GET h/ by spiffe://c/x", "a -"},
			{"GET h/ by spiffe://c/xx", ""},
			{"GET h/ by spiffe://d/ns/web/sa/shop", ""},
			{"GET h/", ""},
		}},
		{`limits: [{name: a, rate: 1/s, match: {hosts: [h], methods: [POST], paths: [/x]}}, {name: b, rate: 1/s, match: {methods: [POST]}}]`, [][]string{
			{"POST h/x", "a -, b -"},
			{"POST i/x", "b -"},
			{"POST h/y", "b -"},
			{"GET h/x", ""},
		}},
		// A limit whose when is absent applies, so that omitting something
		// avoids no limit.
		{`limits: [{name: a, rate: 1/s, when: 'request.headers["x-beta"] != "on"'}, {name: b, rate: 1/s, when: 'request.headers["x-beta"] == "on"'}]`, [][]string{
			{"GET h/", "a -", "a: it matches", `b: when is false: request.headers["x-beta"] == "on"`},
			{"GET h/ with x-beta=", "a -"},
			{"GET h/ with x-beta=off", "a -"},
			{"GET h/ with x-beta=on", "b -"},
		}},
		{`limits: [{name: nil, rate: 1/s, when: 'request.headers["a"] == null'}, {name: not-nil, rate: 1/s, when: 'null != request.headers["a"]'}, {name: same, rate: 1/s, when: 'request.headers["a"] == request.headers["b"]'}]`, [][]string{
			{"GET h/", "nil -, same -"},
			{"GET h/ with a=1", "not-nil -"},
			{"GET h/ with a=1 with b=1", "not-nil -, same -"},
		}},
		{`limits: [{name: in, rate: 1/s, when: 'request.headers["a"] in ["x", "y"]'}, {name: starts, rate: 1/s, when: 'request.headers["a"].startsWith("x")'}, {name: not, rate: 1/s, when: '!(request.headers["a"] in ["x"])'}, {name: plus, rate: 1/s, when: 'request.headers["a"] + "" == "x"'}, {name: size, rate: 1/s, when: 'size(request.headers["a"]) > 3'}]`, [][]string{
			{"GET h/", "in -, starts -, not -, plus -, size -", "in: it matches; when is absent, so it applies",
				"plus: it matches; when is absent, so it applies"},
			{"GET h/ with a=x", "in -, starts -, plus -"},
			{"GET h/ with a=z", "not -"},
			{"GET h/ with a=zzzz", "not -, size -"},
		}},
		{`limits: [{name: and, rate: 1/s, when: 'request.headers["a"].startsWith("x") && request.method == "POST"'}, {name: or, rate: 1/s, when: 'request.headers["a"].startsWith("x") || request.method == "POST"'}, {name: if, rate: 1/s, when: 'request.headers["a"].startsWith("x") ? false : false'}]`, [][]string{
			{"GET h/", "or -, if -",
				`and: when is false: request.headers["a"].startsWith("x") && request.method == "POST"`},
			{"POST h/", "and -, or -, if -"},
			{"GET h/ with a=y", ""},
		}},
		{`limits: [{name: has, rate: 1/s, when: 'has(request.headers.a)'}, {name: in, rate: 1/s, when: '"a" in request.headers'}, {name: optional, rate: 1/s, when: 'request.headers[?"a"].hasValue()'}, {name: or-value, rate: 1/s, when: 'request.headers[?"a"].orValue("z") == "z"'}]`, [][]string{
			{"GET h/", "or-value -"},
			{"GET h/ with a=", "or-value -"},
			{"GET h/ with a=x", "has -, in -, optional -"},
		}},
		{`limits: [{name: any, rate: 1/s, when: '["a", "b"].exists(h, request.headers[h] == "x")'}, {name: all, rate: 1/s, when: '["a", "b"].all(h, request.headers[h].startsWith("x"))'}]`, [][]string{
			{"GET h/", "all -", `any: when is false: ["a", "b"].exists(h, request.headers[h] == "x")`},
			{"GET h/ with b=x", "any -, all -"},
			{"GET h/ with b=y", ""},
		}},
		{`limits: [{name: gold, rate: 1/s, when: 'metadata.filter_metadata["jwt"].payload.plan == "gold"'}, {name: rest, rate: 1/s, when: 'metadata.filter_metadata["jwt"].payload.plan != "gold"'}, {name: member, rate: 1/s, when: 'metadata.filter_metadata.jwt.payload.org.member'}]`, [][]string{
			{"GET h/", "rest -, member -", "member: it matches; when is absent, so it applies"},
			{`GET h/ claim plan="gold"`, "gold -, member -"},
			{`GET h/ claim plan=""`, "rest -, member -"},
			{`GET h/ claim plan=null`, "rest -, member -"},
			{`GET h/ claim plan=5`, "rest -, member -"},
			{`GET h/ claim org.member=false`, "rest -"},
			{`GET h/ claim org.member="yes"`, "limit member: when: must be a boolean, not string, rest -",
				"member: config mistake: when: must be a boolean, not string"},
			{`GET h/ claim org="acme"`, "limit member: when: evaluation failed: no such key, rest -"},
		}},
		{`limits: [{name: a, rate: 1/s, when: 'context["tier"] == "beta"'}, {name: b, rate: 1/s, when: 'context.tier.startsWith("b")'}]`, [][]string{
			{"GET h/", "b -"},
			{"GET h/ context tier=", "b -"},
			{"GET h/ context tier=beta", "a -, b -"},
		}},
		{`limits: [{name: large, rate: 1/s, when: request.size > 1000}, {name: known, rate: 1/s, when: request.size == 7}, {name: every, rate: 1/s, when: true}]`, [][]string{
			{"POST h/", "large -, every -"},
			{"POST h/ with content-length=7", "known -, every -"},
			{"POST h/ with content-length=70000", "large -, every -"},
			{"POST h/ with content-length=-1", "large -, every -"},
		}},
		{`limits: [{name: none, rate: 1/s, when: 'source.principal == ""'}, {name: some, rate: 1/s, when: source.principal.startsWith("spiffe://c/")}, {name: query, rate: 1/s, when: 'request.query == ""'}]`, [][]string{
			{"GET h/", "none -, query -"},
			{"GET h/?x by spiffe://c/x", "some -"},
		}},
		// An expression that fails is a config mistake, and the request is
		// refused. A mistake of a shadow limit is only counted.
		{`limits: [{name: a, rate: 1/s, when: 'int(request.headers["a"]) > 1'}, {name: b, rate: 1/s}]`, [][]string{
			{"GET h/ with a=2", "a -, b -"},
			{"GET h/ with a=1", "b -"},
			{"GET h/", "a -, b -"},
			{"GET h/ with a=s3cret", "limit a: when: evaluation failed: type conversion error, b -",
				"a: config mistake: when: evaluation failed: type conversion error"},
		}},
		{`limits: [{name: a, rate: 1/s, mode: shadow, when: '{"x": true}[request.headers["a"]]'}, {name: b, rate: 1/s}]`, [][]string{
			{"GET h/ with a=x", "a -, b -"},
			{"GET h/", "a -, b -"},
			{"GET h/ with a=y", "limit a: when: evaluation failed: no such key, b -"},
		}},

		// A read of an absent value equals null; an expression that uses one is
		// absent.
		{`limits: [{name: lower, rate: 1/s, when: 'request.headers["a"].lowerAscii() == "on"'}, {name: not, rate: 1/s, when: 'request.headers["a"].startsWith("x") == false'}, {name: list, rate: 1/s, when: '[request.headers["a"]] == ["x"]'}, {name: int, rate: 1/s, when: 'int(request.headers["a"]) != 3'}]`, [][]string{
			{"GET h/", "lower -, not -, list -, int -"},
			{"GET h/ with a=3", "not -"},
		}},
		// A mistake is reported although other values are absent.
		{`limits: [{name: a, rate: 99/s, cost: 'request.headers["bulk"] == "1" ? 10 : {"gold": 1, "free": 50}[request.headers["plan"]]'}]`, [][]string{
			{"GET h/ with plan=free", "a - costs 50"},
			{"GET h/", "a -"},
			{"GET h/ with plan=bulk", "limit a: cost: evaluation failed: no such key"},
			{"GET h/ with plan=zzz with bulk=0", "limit a: cost: evaluation failed: no such key"},
			{"GET h/ with plan=zzz with bulk=1", "a - costs 10"},
		}},
		{`limits: [{name: a, rate: 9/s, absent: skip, key: 'request.headers[?"x-tenant"].hasValue() ? request.headers["x-tenant"] : {"gold": "g"}[request.headers["plan"]]'}, {name: b, rate: 9/s, when: '(has(request.headers.z) ? "q" : {"gold": "g"}[request.headers["plan"]]) == "g"'}]`, [][]string{
			{"GET h/ with plan=gold", "a #(g), b -"},
			{"GET h/ with plan=zzz",
				"limit a: key: evaluation failed: no such key, limit b: when: evaluation failed: no such key"},
			{"GET h/", "b -"},
		}},
		// Claims within lists, and iteration over what is present.
		{`limits: [{name: any, rate: 1/s, when: 'metadata.filter_metadata.jwt.payload.orgs.exists(o, o.plan == "gold")'}, {name: first, rate: 1/s, absent: skip, key: 'metadata.filter_metadata.jwt.payload.orgs[0].id'}, {name: through, rate: 1/s, when: 'request.headers.exists(k, k == "a")'}, {name: none, rate: 1/s, when: 'request.headers.size() == 0 && metadata.filter_metadata.size() == 0'}]`, [][]string{
			{`GET h/ claim orgs=[{"id":"x","plan":"gold"}]`, "any -, first #(x)"},
			{`GET h/ claim orgs=[{"id":"","plan":null}]`, ""},
			{"GET h/ with a=", "any -, none -"},
			{"GET h/ with a=1", "any -, through -"},
		}},
		{`limits: [{name: whole, rate: 1/s, key: '"u:" + string(metadata.filter_metadata.jwt.payload.id)'}, {name: deep, rate: 1/s, when: has(metadata.filter_metadata.jwt.payload.org.id)}]`, [][]string{
			{"GET h/ claim id=1234567", "whole #(u:1234567)"},
			{"GET h/ claim id=1.5 claim org.id=1", "whole #(u:1.5), deep -"},
			{`GET h/ claim id=""`, "whole ~11.203.0.113.7"},
		}},
		{`limits: [{name: a, rate: 1/s, key: 'request.host.replace("a", "b").replace("b", "c").replace("c", "d").replace("d", "e").replace("e", "f").replace("f", "g").replace("g", "h").replace("h", "i").replace("i", "j", 1)'}, {name: b, rate: 1/s, key: 'request.url_path.split("/").join("-")'}, {name: c, rate: 1/s, key: '["", "x"].join("+") + ["y"].join()'}]`, [][]string{
			{"GET aha/x/y", "a =3.jii, b =4.-x-y, c =3.+xy"},
		}},
		{`limits: [{name: a, rate: 1/s, when: 'context[?"tier"] == optional.of("x")'}, {name: b, rate: 1/s, when: 'context.?tier.orValue("none") == "none"'}, {name: c, rate: 1/s, when: 'metadata.filter_metadata.?jwt.payload.?plan.orValue("none") == "none"'}]`, [][]string{
			{"GET h/", "b -, c -"},
			{`GET h/ context tier=x claim plan="p"`, "a -"},
		}},

		// cost
		{`limits: [{name: a, rate: 100/s, cost: 5}, {name: b, rate: 100/s, cost: 0}, {name: c, rate: 100/s, cost: 1.2}, {name: d, rate: 100/s, cost: '2 * 3'}, {name: e, rate: 100/s, cost: "7"}]`, [][]string{
			{"GET h/", "a - costs 5, b - costs 0, c - costs 2, d - costs 6, e - costs 7"},
		}},
		{`limits: [{name: a, rate: 100/s, cost: 'request.method == "POST" ? 5 : 1'}, {name: b, rate: 100/s, cost: 'request.size / 100'}, {name: c, rate: 100/s, cost: 'double(request.size) / 100.0'}]`, [][]string{
			{"GET h/ with content-length=250", "a -, b - costs 2, c - costs 3"},
			{"POST h/ with content-length=0", "a - costs 5, b - costs 0, c - costs 0"},
			{"GET h/", "a -, b -, c -"},
			{"GET h/ with content-length=99999", "a -, b - costs 999, c - costs 1000"},
			{"GET h/ with content-length=9223372036854775807", "a -, b - costs 1000000001, c - costs 1000000001"},
		}},
		{`limits: [{name: a, rate: 100/s, cost: 'int(request.headers["n"])'}, {name: b, rate: 100/s, cost: 'metadata.filter_metadata.jwt.payload.weight'}]`, [][]string{
			{"GET h/", "a -, b -"},
			{"GET h/ with n=3", "a - costs 3, b -"},
			{"GET h/ with n=-3", "limit a: cost: must be a number >= 0, b -"},
			{"GET h/ with n=three", "limit a: cost: evaluation failed: type conversion error, b -"},
			{"GET h/ claim weight=2.5", "a -, b - costs 3"},
			{"GET h/ claim weight=1e300", "a -, b - costs 1000000001"},
			{`GET h/ claim weight="2"`, "limit b: cost: must be a number, not string, a -"},
			{`GET h/ claim weight=null`, "a -, b -"},
		}},
		{`limits: [{name: a, rate: 100/s, cost: '0.0 / double(request.headers["n"])'}]`, [][]string{
			{"GET h/ with n=0", "limit a: cost: must be a number >= 0"},
		}},

		// Absent parts of keys, at each position, with each value of absent.
		{`limits: [{name: a, rate: 9/s, absent: client, key: ['metadata.filter_metadata.jwt.payload.org.id', 'context.team']}, {name: b, rate: 9/s, absent: share, key: ['metadata.filter_metadata.jwt.payload.org.id', 'context.team']}, {name: c, rate: 9/s, absent: skip, key: ['metadata.filter_metadata.jwt.payload.org.id', 'context.team']}, {name: d, rate: 9/s, absent: deny, key: ['metadata.filter_metadata.jwt.payload.org.id', 'context.team']}]`, [][]string{
			{`GET h/ claim org.id="x" context team=y`, "a #(x)#(y), b #(x)#(y), c #(x)#(y), d #(x)#(y)"},
			{`GET h/ claim org.id=7 context team=y`, "a #(7)#(y), b #(7)#(y), c #(7)#(y), d #(7)#(y)"},
			{`GET h/ claim org.id="x"`, "a #(x)~11.203.0.113.7, b #(x)~0., d #(x)~0. refused",
				"a: it applies to every request; its key part context.team is absent: the client's network is used " +
					"instead",
				"b: it applies to every request; its key part context.team is absent: all such requests share a bucket",
				"c: its key part context.team is absent, and the limit has absent: skip",
				"d: it applies to every request; its key part context.team is absent: the request is denied"},
			{`GET h/ claim org.id=null context team=y`, "a ~11.203.0.113.7#(y), b ~0.#(y), d ~0.#(y) refused"},
			{`GET h/ context team=`, "a ~11.203.0.113.7~11.203.0.113.7, b ~0.~0., d ~0.~0. refused"},
		}},
		{`limits: [{name: a, rate: 9/s, key: request.size}, {name: b, rate: 9/s, key: source.principal}, {name: c, rate: 9/s, key: 'request.headers[?"a"].optMap(v, v + "!")'}, {name: d, rate: 9/s, key: request.host}]`, [][]string{
			{"GET /", "a ~11.203.0.113.7, b ~11.203.0.113.7, c ~11.203.0.113.7, d ~11.203.0.113.7"},
			{"GET h/ by spiffe://c/x with a=1 with content-length=12", "a =2.12, b =12.spiffe://c/x, c #(1!), d =1.h"},
		}},

		// group: only the first limit of a group that applies.
		{`limits: [{name: gold, rate: 9/s, group: plan, when: 'request.headers["plan"] == "gold"'}, {name: keyed, rate: 9/s, group: plan, absent: skip, key: request.headers.k}, {name: always, rate: 9/s}, {name: rest, rate: 9/s, group: plan}, {name: other, rate: 9/s, group: other}]`, [][]string{
			{"GET h/ with plan=gold with k=1", "gold -, always -, other -", "keyed: gold comes first in the group plan",
				"rest: gold comes first in the group plan"},
			{"GET h/ with k=1", "keyed #(1), always -, other -", "rest: keyed comes first in the group plan"},
			{"GET h/", "always -, rest -, other -",
				"keyed: its key part request.headers.k is absent, and the limit has absent: skip"},
		}},
		{`limits: [{name: a, rate: 9/s, group: g, when: 'int(request.headers["n"]) > 1'}, {name: b, rate: 9/s, group: g}, {name: c, rate: unlimited, group: h}, {name: d, rate: 9/s, group: h}]`, [][]string{
			{"GET h/ with n=x", "c unlimited, limit a: when: evaluation failed: type conversion error, b -"},
			{"GET h/ with n=2", "c unlimited, a -", "d: c comes first in the group h"},
		}},

		// A request that omits something gets neither the first place in a
		// group nor an unlimited limit.
		{`limits: [{name: internal, group: g, rate: unlimited, when: 'request.headers["x-team"] in ["ops"]'}, {name: beta, group: g, rate: 99/s, when: 'request.headers["x-beta"].startsWith("o")'}, {name: rest, group: g, rate: 1/s}]`, [][]string{
			{"GET h/", "rest -",
				`internal: when is absent, and a limit in a group does not apply then: request.headers["x-team"] in ["ops"]`,
				`beta: when is absent, and a limit in a group does not apply then: request.headers["x-beta"].startsWith("o")`},
			{"GET h/ with x-team=", "rest -"},
			{"GET h/ with x-team=ops", "internal unlimited"},
			{"GET h/ with x-team=dev", "rest -", `internal: when is false: request.headers["x-team"] in ["ops"]`},
			{"GET h/ with x-beta=on", "beta -"},
			{"GET h/ context sluice.limit.big={rate:_unlimited,_group:_h,_when:_'context.tier.startsWith(\"g\")'} " +
				"context sluice.limit.slow={rate:_1/s,_group:_h}", "rest -, slow -",
				`big: when is absent, and a limit in a group does not apply then: context.tier.startsWith("g")`},
		}},
		{`limits: [{name: a, rate: unlimited, when: 'int(request.headers["level"]) > 5'}, {name: b, rate: unlimited, when: 'metadata.filter_metadata.jwt.payload.admin'}, {name: c, rate: unlimited, when: 'request.headers.exists(k, request.headers[k].contains("x"))'}]`, [][]string{
			{"GET h/", "",
				`a: when is absent, and an unlimited limit does not apply then: int(request.headers["level"]) > 5`},
			{"GET h/ with level=9 claim admin=true", "a unlimited, b unlimited"},
		}},
		// An override belongs to a key that is present, so the limit applies as
		// it does to other keys.
		{`limits: [{name: a, rate: 1/s, key: request.headers.k, when: 'request.headers["a"].startsWith("x")', overrides: [{key: ours, rate: unlimited}]}]`, [][]string{
			{"GET h/ with k=ours", "a unlimited",
				"a: it matches; when is absent, so it applies; its rate is from overrides[0]"},
			{"GET h/ with k=other", "a #(other)"},
			{"GET h/", "a ~11.203.0.113.7"},
		}},

		// unlimited
		{`limits: [{name: a, rate: unlimited, match: {clients: [10.0.0.0/8]}}, {name: b, rate: unlimited, key: request.headers.k, absent: share, cost: 5}]`, [][]string{
			{"GET h/", "b unlimited"},
			{"GET h/ from 10.1.1.1", "a unlimited, b unlimited", "a: it matches"},
		}},

		// exempt: only if all readings of the path are exempt.
		{`{exempt: [{match: {paths: [/healthz, "/public/**"]}}, {match: {clients: [10.1.0.0/16], principals: ["spiffe://c/ns/ops/*"]}}, {match: {hosts: [free.example.com, kelvin.example.com], methods: [GET]}}], limits: [{name: a, rate: 1/s}]}`, [][]string{
			{"GET h/healthz", "exempt", "a: the request is exempt"},
			{"GET h/healthz?x=1", "exempt"},
			{"GET h/healthz/", "a -"},
			{"GET h//healthz", "a -"},
			{"GET h/healthz;x=1", "a -"},
			{"GET h/%68ealthz", "a -"},
			{"GET h/public/../v1/orders", "a -"},
			{"GET h/public/%2e%2e/v1/orders", "a -"},
			{"GET h/public/..%2fv1/orders", "a -"},
			{"GET h/v1/../healthz", "a -"},
			{"GET h/public/a//b", "exempt"},
			{"GET h/v1/orders/1%2f..%2f..%2f..%2fhealthz", "a -"},
			{"GET h/x from 10.1.2.3", "a -"},
			{"GET h/x from 10.1.2.3 by spiffe://c/ns/ops/sa/x", "exempt"},
			{"GET h/x from 10.2.2.3 by spiffe://c/ns/ops/sa/x", "a -"},
			{"HEAD FREE.example.com:80/x", "exempt"},
			{"POST free.example.com/x", "a -"},
			// A server that resolves dots before it decodes serves /v1/orders.
			{"GET h/public/a%2fb%2fc/../../v1/orders", "a -"},
			{"GET h/public/a;%2fb%2fc/../../v1/orders", "a -"},
			{"GET h/public/a%5cb%5cc/../../v1/orders", "a -"},
			{"GET h/public/a%20b", "exempt"},
			// Envoy's own routes do not match these with free.example.com.
			{"GET [free.example.com]/x", "a -"},
			{"GET [free.example.com/x", "a -"},
			{"GET free.example.com]:80/x", "a -"},
			{"GET free.example.com:x/x", "a -"},
			{"GET free.example.com./x", "a -"},
			{"GET \u212aelvin.example.com/x", "a -"},
		}},

		// A request is not exempt by the address of a proxy that should have
		// named the client.
		{"{client_ip: {header: x-real-ip}, exempt: [{match: {clients: [10.0.0.0/8]}}], limits: [{name: a, key: " +
			"client.ip, rate: 1/s}]}", [][]string{
			{"GET h/ from 10.0.0.1 with x-real-ip=10.0.0.2", "exempt"},
			{"GET h/ from 9.9.9.9 with x-real-ip=10.0.0.2", "exempt"},
			{"GET h/ from 10.0.0.1", "a =8.10.0.0.1"},
			{"GET h/ from 10.0.0.1 with x-real-ip=", "a =8.10.0.0.1"},
			{"GET h/ from 10.0.0.1 with x-real-ip=%20", "a =8.10.0.0.1"},
			{"GET h/ from 10.0.0.1 with x-real-ip=junk", "a =8.10.0.0.1"},
			{"GET h/ from 10.0.0.1 with x-real-ip=9.9.9.9,8.8.8.8", "a =8.10.0.0.1"},
		}},
		{"{client_ip: {xff_from_right: 2}, exempt: [{match: {clients: [10.0.0.0/8]}}], limits: [{name: a, key: " +
			"client.ip, rate: 1/s}]}", [][]string{
			{"GET h/ from 10.0.0.1 with x-forwarded-for=10.0.0.2,9.9.9.9", "exempt"},
			{"GET h/ from 10.0.0.1 with x-forwarded-for=junk,9.9.9.9", "a =8.10.0.0.1"},
			{"GET h/ from 10.0.0.1 with x-forwarded-for=9.9.9.9", "a =8.10.0.0.1"},
			{"GET h/ from 10.0.0.1 with x-forwarded-for=,9.9.9.9", "a =8.10.0.0.1"},
			{"GET h/ from 10.0.0.1 with x-forwarded-for=9.9.9.9,", "a =7.9.9.9.9"}, // an empty element counts
			{"GET h/ from 10.0.0.1", "a =8.10.0.0.1"},
		}},
		{"{client_ip: {xff_from_right: 1}, exempt: [{match: {clients: [10.0.0.0/8]}}], limits: [{name: a, key: " +
			"client.ip, rate: 1/s}]}", [][]string{
			{"GET h/ from 10.0.0.1 with x-forwarded-for=9.9.9.9,10.0.0.2", "exempt"},
			{"GET h/ from 10.0.0.1 with x-forwarded-for=10.0.0.2,", "a =8.10.0.0.1"},
			{"GET h/ from 10.0.0.1 with x-forwarded-for=10.0.0.2,%20", "a =8.10.0.0.1"},
		}},
		// A peer that is not trusted is the client, whatever it claims.
		{"{client_ip: {xff_from_right: 1, from: [10.9.0.0/16]}, exempt: [{match: {clients: [10.0.0.0/8]}}], limits: " +
			"[{name: a, key: client.ip, rate: 1/s}]}", [][]string{
			{"GET h/ from 10.1.0.1", "exempt"},
			{"GET h/ from 10.1.0.1 with x-forwarded-for=9.9.9.9", "exempt"},
			{"GET h/ from 9.9.9.9 with x-forwarded-for=10.0.0.2", "a =7.9.9.9.9"},
			{"GET h/ from 10.9.0.1 with x-forwarded-for=10.0.0.2", "exempt"},
			{"GET h/ from 10.9.0.1", "a =8.10.9.0.1"},
			{"GET h/ from nowhere with x-forwarded-for=10.0.0.2", "a ~0."},
		}},
		{`limits: [{name: a, rate: 1/s, match: {paths: [/v1/orders]}}, {name: b, rate: 1/s, match: {hosts: ["[::1]", 10.0.0.1, h_1.example.com]}}]`, [][]string{
			{"GET h/x%2fy/../v1/orders", "a -"},
			{"GET [::1]:80/", "b -"},
			{"GET [0:0::1]/", "b -"},
			{"GET 10.0.0.1:80/", "b -"},
			{"GET H_1.example.com.:80/", "b -"},
		}},

		// overrides
		{`limits: [{name: a, rate: 60/m, key: ['request.headers["x-api-key"]', request.method], overrides: [{key: [gold, POST], rate: 600/m, burst: 100}, {key: ["sha256:2c26b46b68ffc68ff99b453c1d30413413422d706483bfa0f98a5e886266e7ae", GET], rate: unlimited}, {key: [gold, "sha256:6cd0e0de70b0e6a4e8f6b1a5b1e6a0a5a06a0f8b1d29b7bfbe5b1e6d5e6a0a5a"], rate: 1/s}]}]`, [][]string{
			{"POST h/ with x-api-key=gold", "a #(gold)=4.POST",
				"a: it applies to every request; its rate is from overrides[0]"},
			{"GET h/ with x-api-key=gold", "a #(gold)=3.GET", "a: it applies to every request"},
			{"GET h/ with x-api-key=foo", "a unlimited",
				"a: it applies to every request; its rate is from overrides[1]"},
			{"POST h/ with x-api-key=foo", "a #(foo)=4.POST"},
			{"POST h/", "a ~11.203.0.113.7=4.POST"},
		}},
		// No client can send a key that equals the replacement of an absent
		// one.
		{`limits: [{name: a, rate: 60/m, key: request.headers.k, overrides: [{key: 203.0.113.7, rate: 1/s}, {key: 42, rate: 2/s}]}]`, [][]string{
			{"GET h/", "a ~11.203.0.113.7",
				"a: it applies to every request; its key part request.headers.k is absent: the client's network is " +
					"used instead"},
			{"GET h/ with k=203.0.113.7", "a #(203.0.113.7)",
				"a: it applies to every request; its rate is from overrides[0]"},
			{"GET h/ with k=42", "a #(42)", "a: it applies to every request; its rate is from overrides[1]"},
		}},

		// context_extensions of Envoy's routes.
		{"", [][]string{
			{"GET h/ context sluice.limit.a={rate:_5/m}", "a -", "a: it applies to every request"},
			{"GET h/ context sluice.limit.b={rate:_5/m,_key:_client.ip} context " +
				"sluice.limit.a={rate:_1/s,_match:_{methods:_[POST]}}", "b =11.203.0.113.7", `a: method "GET" matches none of match.methods`},
			{"GET h/ context sluice.limit.a=off", ""},
			{"GET h/ context sluice.limit.a={rate:_5/m,_key:_'request.headers[\"k\"]',_cost:_2,_absent:_share} with k=v", "a #(v) costs 2"},
			{"GET h/ context sluice.limit.a={rate:_5/x}",
				`limit a: context_extensions: sluice.limit.a:1:8: rate: invalid rate "5/x"; want tokens/period such as 10/s, 100/m, 5000/24h, 10/7d or 3/250ms (units: us, ms, s, m, h, d), or unlimited`},
			{"GET h/ context sluice.limit.a={rate:_5/m,_name:_b}",
				"limit a: context_extensions: sluice.limit.a:1:13: name: unknown field; want one of absent, burst, " +
					"cost, domain, group, key, match, mode, on_failure, overrides, rate, when"},
			{"GET h/ context sluice.limit.a={rate:_5/m,_overrides-file:_x}",
				"limit a: context_extensions: sluice.limit.a:1:13: overrides-file: unknown field; want one of " +
					"absent, burst, cost, domain, group, key, match, mode, on_failure, overrides, rate, when"},
			{"GET h/ context sluice.limit.a={rate:_'${RATE}'}",
				"limit a: context_extensions: sluice.limit.a:1:8: rate: variables (${...}) are replaced in the " +
					"config file only; write the value out"},
			{"GET h/ context sluice.limit.a=",
				`limit a: context_extensions: empty value; want a limit such as {rate: 10/m, key: client.network}, or "off"`},
			{"GET h/ context sluice.limit.A={rate:_5/m}",
				`context_extensions: sluice.limit.: invalid name "A"; want 1 to 63 characters of a-z, 0-9 and -`},
			{"GET h/ context sluice.limits=a", `context_extensions: sluice.limits: unknown limit "a"`},
			{"GET h/ context sluice.limit=a",
				`context_extensions: unknown key "sluice.limit"; want sluice.limits or sluice.limit.<name>`},
			{"GET h/ context sluicer=a", ""},
			{"GET h/ context sluice.limit.a={rate:_5/m,_overrides:_[{key:_gold,_rate:_9/s}],_key:_request.headers.k} " +
				"with k=gold", "a #(gold)", "a: it applies to every request; its rate is from overrides[0]"},
		}},
		{"limits: [{name: a, rate: 1/s}, {name: b, rate: 1/s, group: g}, {name: c, rate: 1/s, domain: shop}]",
			[][]string{
				{"GET h/ context sluice.limits=a", "a -", "b: the route's sluice.limits does not name it"},
				{"GET h/ context sluice.limits=c,_a", "a -, c -"},
				{"GET h/ context sluice.limits=", `context_extensions: sluice.limits: unknown limit "", a -, b -, c -`},
				{"GET h/ context sluice.limits=a,d", `context_extensions: sluice.limits: unknown limit "d", a -, b -, c -`},
				{"GET h/ context sluice.limit.a=off", "b -, c -", "a: the route turns it off: sluice.limit.a"},
				{"GET h/ context sluice.limit.a={rate:_5/m,_cost:_2}", "b -, c -, a - costs 2"},
				{"GET h/ context sluice.limit.a={rate:_5/m,_cost:_2} context sluice.limits=b", "b -, a - costs 2",
					"c: the route's sluice.limits does not name it"},
				{"GET h/ context sluice.limit.d={rate:_5/m,_group:_g}", "a -, b -, c -", "d: b comes first in the group g"},
				{"GET h/ context sluice.limit.d={rate:_5/m,_group:_g} context sluice.limit.b=off", "a -, c -, d -",
					"b: the route turns it off: sluice.limit.b"},
			}},
		{"{mode: shadow, domain: team, exempt: [{match: {methods: [GET]}}]}", [][]string{
			{"GET h/ context sluice.limit.a={rate:_5/x}", "exempt"},
			{"POST h/ context sluice.limit.a={rate:_1/s}", "a -"},
		}},
	} {
		c := parse(t, section.config)
		for _, row := range section.rows {
			rows++
			if got, want := drawn(t, c, row[0]), withHashes(row[1]); got != want {
				t.Errorf("%s\n%s\n got %s\nwant %s", section.config, row[0], got, want)
			}
			req := request(t, row[0])
			x := c.Explain(req)
			if d := c.Draw(req); !reflect.DeepEqual(x.Draw, d) {
				t.Errorf("%s\n%s\nexplained %+v\ndrawn     %+v", section.config, row[0], x.Draw, d)
			}
			for _, why := range row[2:] {
				name, want, _ := strings.Cut(why, ": ")
				for _, l := range x.Limits {
					if l.Limit.Name == name && l.Reason != want {
						t.Errorf("%s\n%s\n%s: %s\nwant %s", section.config, row[0], name, l.Reason, want)
					}
				}
				if !slices.ContainsFunc(x.Limits, func(l Explained) bool { return l.Limit.Name == name }) {
					t.Errorf("%s\n%s: nothing of %s", section.config, row[0], name)
				}
			}
		}
	}
	if rows < 200 {
		t.Errorf("only %d rows", rows)
	}
}

// TestDrawByClaim reads a claim from Envoy's dynamic metadata.
func TestDrawByClaim(t *testing.T) {
	c := parse(t,
		`limits: [{name: a, rate: 1/s, key: 'metadata.filter_metadata["envoy.filters.http.jwt_authn"].payload.sub'}]`)
	req := request(t, "GET h/")
	claims, err := structpb.NewStruct(map[string]any{"payload": map[string]any{"sub": "k"}})
	if err != nil {
		t.Fatal(err)
	}
	req.Metadata = map[string]*structpb.Struct{"envoy.filters.http.jwt_authn": claims}
	d := c.Draw(req)
	if d.Charges[0].Key != "sluice:default:a:{"+hashed("k")+"}" {
		t.Errorf("%+v", d)
	}
}
