package policy

import (
	"reflect"
	"slices"
	"strings"
	"testing"

	"google.golang.org/protobuf/types/known/structpb"
)

// The tests named TestDraw are the specification of which limits apply to a
// request, with which keys and costs, and why.

// drawSection is a config, and what requests draw from it.
type drawSection struct {
	config string
	// Each row is a request, what it draws and, for some limits, the reason
	// that Explain gives: "name: reason".
	rows [][]string
}

// checkDraws checks sections of at least least rows in all.
func checkDraws(t *testing.T, least int, sections []drawSection) {
	t.Helper()
	rows := 0
	for _, section := range sections {
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
	if rows < least {
		t.Errorf("only %d rows", rows)
	}
}

// TestDrawKeys has the keys of buckets, with absent parts.
func TestDrawKeys(t *testing.T) {
	checkDraws(t, 47, []drawSection{
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
		{`limits: [{name: a, rate: 1/s, key: [request.scheme, request.protocol, source.address, source.principal, ` +
			`'source.port']}]`, [][]string{
			{"GET h/ by spiffe://a/ns/b", "a =5.https=6.HTTP/2=11.203.0.113.7=15.spiffe://a/ns/b=1.0"},
			{"GET h/", "a =5.https=6.HTTP/2=11.203.0.113.7~11.203.0.113.7=1.0"},
		}},
		{`limits: [{name: a, rate: 1/s, key: ['"x"', 'request.method.lowerAscii()', '1.5e13', '12u', 'true', '3.25']}]`,
			[][]string{
				{"GET h/", "a =1.x=3.get=14.15000000000000=2.12=4.true=4.3.25"},
			}},
		{`limits: [{name: a, rate: 1/s, key: 'context["plan"]'}, {name: b, rate: 1/s, key: 'request.headers["a"] + ` +
			`request.method'}, {name: c, rate: 1/s, key: request.headers.a}]`, [][]string{
			{"GET h/ context plan=k with a=k", "a #(k), b #(kGET), c #(k)"},
			{"GET h/", "a ~11.203.0.113.7, b ~11.203.0.113.7, c ~11.203.0.113.7"},
		}},
		{`limits: [{name: a, rate: 1/s, key: 'request.headers["a"] == "x"'}, {name: b, rate: 1/s, key: ` +
			`'request.headers["a"] != "x"'}, {name: c, rate: 1/s, key: '"a" in request.headers'}]`, [][]string{
			{"GET h/ with a=x", "a #(true), b #(false), c #(true)"},
		}},
		{`limits: [{name: a, rate: 1/s, key: 'request.headers["a"] != null'}, {name: b, rate: 1/s, key: ` +
			`'request.headers[?"a"]'}]`, [][]string{
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

		// Absent parts of keys, at each position, with each value of absent.
		{`limits: [{name: a, rate: 9/s, absent: client, key: ['metadata.filter_metadata.jwt.payload.org.id', ` +
			`'context.team']}, {name: b, rate: 9/s, absent: share, key: ['metadata.filter_metadata.jwt.payload.org.id', ` +
			`'context.team']}, {name: c, rate: 9/s, absent: skip, key: ['metadata.filter_metadata.jwt.payload.org.id', ` +
			`'context.team']}, {name: d, rate: 9/s, absent: deny, key: ['metadata.filter_metadata.jwt.payload.org.id', ` +
			`'context.team']}]`, [][]string{
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
		{`limits: [{name: a, rate: 9/s, key: request.size}, {name: b, rate: 9/s, key: source.principal}, {name: c, rate: ` +
			`9/s, key: 'request.headers[?"a"].optMap(v, v + "!")'}, {name: d, rate: 9/s, key: request.host}]`, [][]string{
			{"GET /", "a ~11.203.0.113.7, b ~11.203.0.113.7, c ~11.203.0.113.7, d ~11.203.0.113.7"},
			{"GET h/ by spiffe://c/x with a=1 with content-length=12", "a =2.12, b =12.spiffe://c/x, c #(1!), d =1.h"},
		}},
	})
}

// TestDrawCost has costs, constant and computed.
func TestDrawCost(t *testing.T) {
	checkDraws(t, 15, []drawSection{
		{`limits: [{name: a, rate: 100/s, cost: 5}, {name: b, rate: 100/s, cost: 0}, {name: c, rate: 100/s, cost: 1.2}, ` +
			`{name: d, rate: 100/s, cost: '2 * 3'}, {name: e, rate: 100/s, cost: "7"}]`, [][]string{
			{"GET h/", "a - costs 5, b - costs 0, c - costs 2, d - costs 6, e - costs 7"},
		}},
		{`limits: [{name: a, rate: 100/s, cost: 'request.method == "POST" ? 5 : 1'}, {name: b, rate: 100/s, cost: ` +
			`'request.size / 100'}, {name: c, rate: 100/s, cost: 'double(request.size) / 100.0'}]`, [][]string{
			{"GET h/ with content-length=250", "a -, b - costs 2, c - costs 3"},
			{"POST h/ with content-length=0", "a - costs 5, b - costs 0, c - costs 0"},
			{"GET h/", "a -, b -, c -"},
			{"GET h/ with content-length=99999", "a -, b - costs 999, c - costs 1000"},
			{"GET h/ with content-length=9223372036854775807", "a -, b - costs 1000000001, c - costs 1000000001"},
		}},
		{`limits: [{name: a, rate: 100/s, cost: 'int(request.headers["n"])'}, {name: b, rate: 100/s, cost: ` +
			`'metadata.filter_metadata.jwt.payload.weight'}]`, [][]string{
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
	})
}

// TestDrawGroups has groups, and limits with the rate unlimited.
func TestDrawGroups(t *testing.T) {
	checkDraws(t, 18, []drawSection{
		// group: only the first limit of a group that applies.
		{`limits: [{name: gold, rate: 9/s, group: plan, when: 'request.headers["plan"] == "gold"'}, {name: keyed, rate: ` +
			`9/s, group: plan, absent: skip, key: request.headers.k}, {name: always, rate: 9/s}, {name: rest, rate: 9/s, ` +
			`group: plan}, {name: other, rate: 9/s, group: other}]`, [][]string{
			{"GET h/ with plan=gold with k=1", "gold -, always -, other -", "keyed: gold comes first in the group plan",
				"rest: gold comes first in the group plan"},
			{"GET h/ with k=1", "keyed #(1), always -, other -", "rest: keyed comes first in the group plan"},
			{"GET h/", "always -, rest -, other -",
				"keyed: its key part request.headers.k is absent, and the limit has absent: skip"},
		}},
		{`limits: [{name: a, rate: 9/s, group: g, when: 'int(request.headers["n"]) > 1'}, {name: b, rate: 9/s, group: g}, ` +
			`{name: c, rate: unlimited, group: h}, {name: d, rate: 9/s, group: h}]`, [][]string{
			{"GET h/ with n=x", "c unlimited, limit a: when: evaluation failed: type conversion error, b -"},
			{"GET h/ with n=2", "c unlimited, a -", "d: c comes first in the group h"},
		}},

		// A request that omits something gets neither the first place in a
		// group nor an unlimited limit.
		{`limits: [{name: internal, group: g, rate: unlimited, when: 'request.headers["x-team"] in ["ops"]'}, {name: beta, ` +
			`group: g, rate: 99/s, when: 'request.headers["x-beta"].startsWith("o")'}, {name: rest, group: g, rate: 1/s}]`, [][]string{
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
		{`limits: [{name: a, rate: unlimited, when: 'int(request.headers["level"]) > 5'}, {name: b, rate: unlimited, when: ` +
			`'metadata.filter_metadata.jwt.payload.admin'}, {name: c, rate: unlimited, when: 'request.headers.exists(k, ` +
			`request.headers[k].contains("x"))'}]`, [][]string{
			{"GET h/", "",
				`a: when is absent, and an unlimited limit does not apply then: int(request.headers["level"]) > 5`},
			{"GET h/ with level=9 claim admin=true", "a unlimited, b unlimited"},
		}},
		// An override belongs to a key that is present, so the limit applies as
		// it does to other keys.
		{`limits: [{name: a, rate: 1/s, key: request.headers.k, when: 'request.headers["a"].startsWith("x")', overrides: ` +
			`[{key: ours, rate: unlimited}]}]`, [][]string{
			{"GET h/ with k=ours", "a unlimited",
				"a: it matches; when is absent, so it applies; its rate is from overrides[0]"},
			{"GET h/ with k=other", "a #(other)"},
			{"GET h/", "a ~11.203.0.113.7"},
		}},

		// unlimited
		{`limits: [{name: a, rate: unlimited, match: {clients: [10.0.0.0/8]}}, {name: b, rate: unlimited, key: ` +
			`request.headers.k, absent: share, cost: 5}]`, [][]string{
			{"GET h/", "b unlimited"},
			{"GET h/ from 10.1.1.1", "a unlimited, b unlimited", "a: it matches"},
		}},
	})
}

// TestDrawOverrides has keys with a rate of their own.
func TestDrawOverrides(t *testing.T) {
	checkDraws(t, 8, []drawSection{
		{`limits: [{name: a, rate: 60/m, key: ['request.headers["x-api-key"]', request.method], overrides: [{key: [gold, ` +
			`POST], rate: 600/m, burst: 100}, {key: ` +
			`["sha256:2c26b46b68ffc68ff99b453c1d30413413422d706483bfa0f98a5e886266e7ae", GET], rate: unlimited}, {key: [gold, ` +
			`"sha256:6cd0e0de70b0e6a4e8f6b1a5b1e6a0a5a06a0f8b1d29b7bfbe5b1e6d5e6a0a5a"], rate: 1/s}]}]`, [][]string{
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
		{
			`limits: [{name: a, rate: 60/m, key: request.headers.k, overrides: [{key: 203.0.113.7, rate: 1/s}, {key: 42, rate: ` +
				`2/s}]}]`,
			[][]string{
				{"GET h/", "a ~11.203.0.113.7",
					"a: it applies to every request; its key part request.headers.k is absent: the client's network is " +
						"used instead"},
				{"GET h/ with k=203.0.113.7", "a #(203.0.113.7)",
					"a: it applies to every request; its rate is from overrides[0]"},
				{"GET h/ with k=42", "a #(42)", "a: it applies to every request; its rate is from overrides[1]"},
			},
		},
	})
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
