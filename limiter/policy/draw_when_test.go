package policy

import "testing"

// TestDrawWhen has conditions, with absent values and with mistakes.
func TestDrawWhen(t *testing.T) {
	checkDraws(t, 64, []drawSection{
		// A limit whose when is absent applies, so that omitting something
		// avoids no limit.
		{`limits: [{name: a, rate: 1/s, when: 'request.headers["x-beta"] != "on"'}, {name: b, rate: 1/s, when: ` +
			`'request.headers["x-beta"] == "on"'}]`, [][]string{
			{"GET h/", "a -", "a: it matches", `b: when is false: request.headers["x-beta"] == "on"`},
			{"GET h/ with x-beta=", "a -"},
			{"GET h/ with x-beta=off", "a -"},
			{"GET h/ with x-beta=on", "b -"},
		}},
		{`limits: [{name: nil, rate: 1/s, when: 'request.headers["a"] == null'}, {name: not-nil, rate: 1/s, when: 'null != ` +
			`request.headers["a"]'}, {name: same, rate: 1/s, when: 'request.headers["a"] == request.headers["b"]'}]`, [][]string{
			{"GET h/", "nil -, same -"},
			{"GET h/ with a=1", "not-nil -"},
			{"GET h/ with a=1 with b=1", "not-nil -, same -"},
		}},
		{`limits: [{name: in, rate: 1/s, when: 'request.headers["a"] in ["x", "y"]'}, {name: starts, rate: 1/s, when: ` +
			`'request.headers["a"].startsWith("x")'}, {name: not, rate: 1/s, when: '!(request.headers["a"] in ["x"])'}, {name: ` +
			`plus, rate: 1/s, when: 'request.headers["a"] + "" == "x"'}, {name: size, rate: 1/s, when: ` +
			`'size(request.headers["a"]) > 3'}]`, [][]string{
			{"GET h/", "in -, starts -, not -, plus -, size -", "in: it matches; when is absent, so it applies",
				"plus: it matches; when is absent, so it applies"},
			{"GET h/ with a=x", "in -, starts -, plus -"},
			{"GET h/ with a=z", "not -"},
			{"GET h/ with a=zzzz", "not -, size -"},
		}},
		{
			`limits: [{name: and, rate: 1/s, when: 'request.headers["a"].startsWith("x") && request.method == "POST"'}, {name: ` +
				`or, rate: 1/s, when: 'request.headers["a"].startsWith("x") || request.method == "POST"'}, {name: if, rate: 1/s, ` +
				`when: 'request.headers["a"].startsWith("x") ? false : false'}]`,
			[][]string{
				{"GET h/", "or -, if -",
					`and: when is false: request.headers["a"].startsWith("x") && request.method == "POST"`},
				{"POST h/", "and -, or -, if -"},
				{"GET h/ with a=y", ""},
			},
		},
		{`limits: [{name: has, rate: 1/s, when: 'has(request.headers.a)'}, {name: in, rate: 1/s, when: '"a" in ` +
			`request.headers'}, {name: optional, rate: 1/s, when: 'request.headers[?"a"].hasValue()'}, {name: or-value, rate: ` +
			`1/s, when: 'request.headers[?"a"].orValue("z") == "z"'}]`, [][]string{
			{"GET h/", "or-value -"},
			{"GET h/ with a=", "or-value -"},
			{"GET h/ with a=x", "has -, in -, optional -"},
		}},
		{`limits: [{name: any, rate: 1/s, when: '["a", "b"].exists(h, request.headers[h] == "x")'}, {name: all, rate: 1/s, ` +
			`when: '["a", "b"].all(h, request.headers[h].startsWith("x"))'}]`, [][]string{
			{"GET h/", "all -", `any: when is false: ["a", "b"].exists(h, request.headers[h] == "x")`},
			{"GET h/ with b=x", "any -, all -"},
			{"GET h/ with b=y", ""},
		}},
		{`limits: [{name: gold, rate: 1/s, when: 'metadata.filter_metadata["jwt"].payload.plan == "gold"'}, {name: rest, ` +
			`rate: 1/s, when: 'metadata.filter_metadata["jwt"].payload.plan != "gold"'}, {name: member, rate: 1/s, when: ` +
			`'metadata.filter_metadata.jwt.payload.org.member'}]`, [][]string{
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
		{`limits: [{name: a, rate: 1/s, when: 'context["tier"] == "beta"'}, {name: b, rate: 1/s, when: ` +
			`'context.tier.startsWith("b")'}]`, [][]string{
			{"GET h/", "b -"},
			{"GET h/ context tier=", "b -"},
			{"GET h/ context tier=beta", "a -, b -"},
		}},
		{`limits: [{name: large, rate: 1/s, when: request.size > 1000}, {name: known, rate: 1/s, when: request.size == 7}, ` +
			`{name: every, rate: 1/s, when: true}]`, [][]string{
			{"POST h/", "large -, every -"},
			{"POST h/ with content-length=7", "known -, every -"},
			{"POST h/ with content-length=70000", "large -, every -"},
			{"POST h/ with content-length=-1", "large -, every -"},
		}},
		{`limits: [{name: none, rate: 1/s, when: 'source.principal == ""'}, {name: some, rate: 1/s, when: ` +
			`source.principal.startsWith("spiffe://c/")}, {name: query, rate: 1/s, when: 'request.query == ""'}]`, [][]string{
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
		{
			`limits: [{name: a, rate: 1/s, mode: shadow, when: '{"x": true}[request.headers["a"]]'}, {name: b, rate: 1/s}]`,
			[][]string{
				{"GET h/ with a=x", "a -, b -"},
				{"GET h/", "a -, b -"},
				{"GET h/ with a=y", "limit a: when: evaluation failed: no such key, b -"},
			},
		},

		// A read of an absent value equals null; an expression that uses one is
		// absent.
		{`limits: [{name: lower, rate: 1/s, when: 'request.headers["a"].lowerAscii() == "on"'}, {name: not, rate: 1/s, ` +
			`when: 'request.headers["a"].startsWith("x") == false'}, {name: list, rate: 1/s, when: '[request.headers["a"]] == ` +
			`["x"]'}, {name: int, rate: 1/s, when: 'int(request.headers["a"]) != 3'}]`, [][]string{
			{"GET h/", "lower -, not -, list -, int -"},
			{"GET h/ with a=3", "not -"},
		}},
		// A mistake is reported although other values are absent.
		{`limits: [{name: a, rate: 99/s, cost: 'request.headers["bulk"] == "1" ? 10 : {"gold": 1, "free": ` +
			`50}[request.headers["plan"]]'}]`, [][]string{
			{"GET h/ with plan=free", "a - costs 50"},
			{"GET h/", "a -"},
			{"GET h/ with plan=bulk", "limit a: cost: evaluation failed: no such key"},
			{"GET h/ with plan=zzz with bulk=0", "limit a: cost: evaluation failed: no such key"},
			{"GET h/ with plan=zzz with bulk=1", "a - costs 10"},
		}},
		{`limits: [{name: a, rate: 9/s, absent: skip, key: 'request.headers[?"x-tenant"].hasValue() ? ` +
			`request.headers["x-tenant"] : {"gold": "g"}[request.headers["plan"]]'}, {name: b, rate: 9/s, when: ` +
			`'(has(request.headers.z) ? "q" : {"gold": "g"}[request.headers["plan"]]) == "g"'}]`, [][]string{
			{"GET h/ with plan=gold", "a #(g), b -"},
			{"GET h/ with plan=zzz",
				"limit a: key: evaluation failed: no such key, limit b: when: evaluation failed: no such key"},
			{"GET h/", "b -"},
		}},
		// Claims within lists, and iteration over what is present.
		{`limits: [{name: any, rate: 1/s, when: 'metadata.filter_metadata.jwt.payload.orgs.exists(o, o.plan == "gold")'}, ` +
			`{name: first, rate: 1/s, absent: skip, key: 'metadata.filter_metadata.jwt.payload.orgs[0].id'}, {name: through, ` +
			`rate: 1/s, when: 'request.headers.exists(k, k == "a")'}, {name: none, rate: 1/s, when: 'request.headers.size() == ` +
			`0 && metadata.filter_metadata.size() == 0'}]`, [][]string{
			{`GET h/ claim orgs=[{"id":"x","plan":"gold"}]`, "any -, first #(x)"},
			{`GET h/ claim orgs=[{"id":"","plan":null}]`, ""},
			{"GET h/ with a=", "any -, none -"},
			{"GET h/ with a=1", "any -, through -"},
		}},
		{`limits: [{name: whole, rate: 1/s, key: '"u:" + string(metadata.filter_metadata.jwt.payload.id)'}, {name: deep, ` +
			`rate: 1/s, when: has(metadata.filter_metadata.jwt.payload.org.id)}]`, [][]string{
			{"GET h/ claim id=1234567", "whole #(u:1234567)"},
			{"GET h/ claim id=1.5 claim org.id=1", "whole #(u:1.5), deep -"},
			{`GET h/ claim id=""`, "whole ~11.203.0.113.7"},
		}},
		{`limits: [{name: a, rate: 1/s, key: 'request.host.replace("a", "b").replace("b", "c").replace("c", ` +
			`"d").replace("d", "e").replace("e", "f").replace("f", "g").replace("g", "h").replace("h", "i").replace("i", "j", ` +
			`1)'}, {name: b, rate: 1/s, key: 'request.url_path.split("/").join("-")'}, {name: c, rate: 1/s, key: '["", ` +
			`"x"].join("+") + ["y"].join()'}]`, [][]string{
			{"GET aha/x/y", "a =3.jii, b =4.-x-y, c =3.+xy"},
		}},
		{`limits: [{name: a, rate: 1/s, when: 'context[?"tier"] == optional.of("x")'}, {name: b, rate: 1/s, when: ` +
			`'context.?tier.orValue("none") == "none"'}, {name: c, rate: 1/s, when: ` +
			`'metadata.filter_metadata.?jwt.payload.?plan.orValue("none") == "none"'}]`, [][]string{
			{"GET h/", "b -, c -"},
			{`GET h/ context tier=x claim plan="p"`, "a -"},
		}},
	})
}
