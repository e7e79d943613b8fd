package policy

import "testing"

// TestDrawMatch has the match of limits.
func TestDrawMatch(t *testing.T) {
	checkDraws(t, 63, []drawSection{
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
		{`limits: [{name: a, rate: 1/s, match: {ignore_case: true, paths: [/V1/Orders, "/v1/orders/{id}/pay", "/v2/**", ` +
			`"/Kilo/é"]}}, {name: b, rate: 1/s, match: {paths: [/v1/orders]}}, {name: c, rate: 1/s, match: {ignore_case: ` +
			`false, paths: [/V1/orders]}}]`, [][]string{
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
		{`limits: [{name: a, rate: 1/s, match: {principals: ["spiffe://c/ns/web/*", "spiffe://c/ns/*/sa/admin", ` +
			`"spiffe://c/x"]}}]`, [][]string{
			{"GET h/ by spiffe://c/ns/web/sa/shop", "a -"},
			{"GET h/ by spiffe://c/ns/app/sa/admin", "a -"},
			{"GET h/ by spiffe://c/ns/app/sa/user", ""},
			{"GET h/ by spiffe://c/x", "a -"},
			{"GET h/ by spiffe://c/xx", ""},
			{"GET h/ by spiffe://d/ns/web/sa/shop", ""},
			{"GET h/", ""},
		}},
		{`limits: [{name: a, rate: 1/s, match: {hosts: [h], methods: [POST], paths: [/x]}}, {name: b, rate: 1/s, match: ` +
			`{methods: [POST]}}]`, [][]string{
			{"POST h/x", "a -, b -"},
			{"POST i/x", "b -"},
			{"POST h/y", "b -"},
			{"GET h/x", ""},
		}},
	})
}

// TestDrawExempt has exemptions.
func TestDrawExempt(t *testing.T) {
	checkDraws(t, 54, []drawSection{
		// exempt: only if all readings of the path are exempt.
		{`{exempt: [{match: {paths: [/healthz, "/public/**"]}}, {match: {clients: [10.1.0.0/16], principals: ` +
			`["spiffe://c/ns/ops/*"]}}, {match: {hosts: [free.example.com, kelvin.example.com], methods: [GET]}}], limits: ` +
			`[{name: a, rate: 1/s}]}`, [][]string{
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
		{`limits: [{name: a, rate: 1/s, match: {paths: [/v1/orders]}}, {name: b, rate: 1/s, match: {hosts: ["[::1]", ` +
			`10.0.0.1, h_1.example.com]}}]`, [][]string{
			{"GET h/x%2fy/../v1/orders", "a -"},
			{"GET [::1]:80/", "b -"},
			{"GET [0:0::1]/", "b -"},
			{"GET 10.0.0.1:80/", "b -"},
			{"GET H_1.example.com.:80/", "b -"},
		}},
	})
}
