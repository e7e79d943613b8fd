package policy

import (
	"fmt"
	"runtime"
	"strings"
	"testing"
)

// TestRouteTable checks that texts of routes are parsed once, and that the
// table's number of entries is bounded.
func TestRouteTable(t *testing.T) {
	c := parse(t, "limits: [{name: a, rate: 1/s}]")
	one := &Request{Context: map[string]string{"sluice.limit.b": "{rate: 5/m, when: 'request.headers.x == \"y\"'}"}}
	c.Draw(one)
	first := c.routes.entry(c, routeText{"sluice.limit.b", one.Context["sluice.limit.b"]})
	if second := c.routes.entry(c, routeText{"sluice.limit.b", one.Context["sluice.limit.b"]}); first.rule == nil ||
		first != second {
		t.Errorf("parsed twice: %p, %p", first, second)
	}
	for i := range maxRouteTexts + 10 {
		c.Draw(&Request{Context: map[string]string{fmt.Sprintf("sluice.limit.l%d", i): "off"}})
	}
	if n := len(c.routes.entries); n > maxRouteTexts || n < 1 {
		t.Errorf("%d are kept", n)
	}
	before := len(c.routes.entries)
	d := c.Draw(&Request{Context: map[string]string{"sluice.limit.b": strings.Repeat(" ", maxRouteText)}})
	if !d.Invalid ||
		d.Mistakes[0].Error() != "context_extensions: a sluice. key and its value have 8206 bytes; the maximum is "+
			"8192" || len(c.routes.entries) != before {
		t.Errorf("%+v", d)
	}
	d = c.Draw(&Request{Context: map[string]string{"sluice.limit.b": "{rate: 5/m, overrides_file: x.csv}"}})
	if !d.Invalid || !strings.Contains(d.Mistakes[0].Error(), "overrides_file: unknown field") {
		t.Errorf("%+v", d)
	}
}

// TestRouteTableMemory checks that the table's memory is bounded, whatever the
// texts are.
func TestRouteTableMemory(t *testing.T) {
	used := func() int {
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return int(m.HeapAlloc)
	}
	for name, text := range map[string]string{
		"short":     "{rate: 5/m, when: 'request.headers.x == \"N\"'}",
		"lists":     "{rate: 5/m, when: 'request.headers.x == \"N\"" + strings.Repeat(" || [1,1] == []", 25) + "'}",
		"a pattern": "{rate: 5/m, when: 'request.host.matches(\"N(x{100}){10}\")'}",
		"patterns": "{rate: 5/m, when: '" + strings.Repeat("request.host.matches(\"N(x{100}){10}\") || ", 10) +
			"true'}",
		"paths":    "{rate: 5/m, match: {paths: [/N" + strings.Repeat(", /a", 100) + "]}}",
		"mistakes": "{aN: 1" + strings.Repeat(", a: 1", 80) + "}",
		"overrides": "{rate: 5/m, key: request.host, overrides: [{key: 'N', rate: 1/s}" +
			strings.Repeat(", {key: b, rate: 1/h}", 20) + "]}",
	} {
		c := parse(t, "limits: [{name: a, rate: 1/s}]")
		before, entered := used(), 0
		for ; len(c.routes.entries) == entered && entered < 40; entered++ {
			// The texts are parts of a larger buffer, which must not be kept.
			text := strings.ReplaceAll(text, "N", fmt.Sprint(entered))
			check := text + "sluice.limit.b" + strings.Repeat(" ", 100<<10)
			name := check[len(text):][:len("sluice.limit.b")]
			c.Draw(&Request{Context: map[string]string{name: check[:len(text)]}})
		}
		kept := len(c.routes.entries)
		took, said := max(used()-before, 0), c.routes.memory
		t.Logf("%s: %d of %d kept, %d kB, said to be %d kB", name, kept, entered, took>>10, said>>10)
		if took > said+said/2 || said > maxRouteMemory {
			t.Errorf("%s: %d kB are said to be %d kB", name, took>>10, said>>10)
		}
		runtime.KeepAlive(c)
	}
	if _, wrong := compile(strings.Repeat(`request.host.matches("(x{100}){10}") || `, 20)+"true",
		forWhen); wrong == nil ||
		wrong[0].message != "regular expressions of more than 16384 instructions in total" {
		t.Errorf("many large patterns: %v", wrong)
	}
}

// allocates returns how many bytes a function allocates.
func allocates(f func()) int {
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	f()
	runtime.ReadMemStats(&after)
	return int(after.TotalAlloc - before.TotalAlloc)
}

// FuzzRoute checks that parsing a route's text allocates a bounded amount, and
// that the estimated memory of an entry fits the table.
func FuzzRoute(f *testing.F) {
	for _, seed := range []string{
		"off", "{rate: 10/m, key: client.network}", "{rate: 5/m, when: 'request.headers.x == \"y\"', burst: 3, " +
			"group: g, absent: deny}",
		`{rate: 5/m, key: 'request.host.matches("(x{100}){10}")'}`,
		"{rate: 1/s, match: {paths: [/a, '/**'], clients: [::/0]}}",
		"{rate: 1/s, key: request.host, overrides: [{key: a, rate: " +
			"2/s}]}", "{<<: [&a {rate: 1/s}, *a, *a]}", strings.Repeat("[", 100), strings.Repeat("a: 1\n", 50),
	} {
		f.Add("b", seed)
	}
	f.Add("", "a, b")
	c := parse(f, "limits: [{name: a, rate: 1/s}]")
	f.Fuzz(func(t *testing.T, name, value string) {
		text := routeText{routeLimit + name, value}
		if name == "" {
			text.key = routeLimits
		}
		var e *routeEntry
		if cost := allocates(func() { e = c.readRoute(text) }); cost > 64<<20 {
			t.Errorf("%q: %d bytes are allocated", text, cost)
		}
		if len(text.key)+len(text.value) <= maxRouteText && e.memory > maxRouteMemory {
			t.Errorf("%q: %d bytes", text, e.memory)
		}
	})
}

// TestRoutesSwitch checks routes.limits and routes.domains.
func TestRoutesSwitch(t *testing.T) {
	ask := func(config, key, value string) string {
		t.Helper()
		c, err := Parse("sluice.yaml", []byte(config), nil)
		if err != nil {
			t.Fatal(err)
		}
		d := c.Draw(&Request{Method: "GET", Path: "/", Context: map[string]string{key: value}})
		if d.Invalid {
			return d.Mistakes[0].Error()
		}
		var names []string
		for _, charge := range d.Charges {
			names = append(names, charge.Limit.Domain+":"+charge.Limit.Name)
		}
		return strings.Join(names, " ")
	}
	const limits = "domain: shop\nlimits: [{name: a, rate: 1/s}]\n"
	for _, row := range []struct{ config, key, value, want string }{
		{limits, "sluice.limit.b", "{rate: 1/s}", "shop:a shop:b"},
		{limits + "routes: {limits: true}", "sluice.limit.b", "{rate: 1/s}", "shop:a shop:b"},
		{limits + "routes: {limits: false}", "sluice.limit.b", "{rate: 1/s}", "routes.limits is false"},
		{limits + "routes: {limits: false}", "sluice.limit.a", "off", "routes.limits is false"},
		{limits + "routes: {limits: false}", "sluice.limits", "a", "shop:a"},
		{limits + "routes: {domains: [shop]}", "sluice.limit.b", "{rate: 1/s}", "shop:a shop:b"},
		{limits + "routes: {domains: [shop]}", "sluice.limit.b", "{rate: 1/s, domain: bank}",
			`domain "bank" is not allowed for routes; want one of routes.domains: shop`},
		{limits + "routes: {domains: [bank]}", "sluice.limit.b", "{rate: 1/s}",
			`domain "shop" is not allowed for routes; want one of routes.domains: bank`},
		{limits + "routes: {domains: [bank]}", "sluice.limit.a", "off", ""},
	} {
		if got := ask(row.config, row.key, row.value); !strings.Contains(got, row.want) || row.want == "" && got != "" {
			t.Errorf("%s, %s: %q: %q; want %q", row.config, row.key, row.value, got, row.want)
		}
	}
}

// TestDrawRoutes has what context_extensions of Envoy's routes change.
func TestDrawRoutes(t *testing.T) {
	checkDraws(t, 16, []drawSection{
		{"", [][]string{
			{"GET h/ context sluice.limit.a={rate:_5/m}", "a -", "a: it applies to every request"},
			{"GET h/ context sluice.limit.b={rate:_5/m,_key:_client.ip} context " +
				"sluice.limit.a={rate:_1/s,_match:_{methods:_[POST]}}", "b =11.203.0.113.7",
				`a: method "GET" matches none of match.methods`},
			{"GET h/ context sluice.limit.a=off", ""},
			{"GET h/ context sluice.limit.a={rate:_5/m,_key:_'request.headers[\"k\"]',_cost:_2,_absent:_share} with k=v",
				"a #(v) costs 2"},
			{"GET h/ context sluice.limit.a={rate:_5/x}",
				`limit a: context_extensions: sluice.limit.a:1:8: rate: invalid rate "5/x"; want tokens/period such as 10/s, ` +
					`100/m, 5000/24h, 10/7d or 3/250ms (units: us, ms, s, m, h, d), or unlimited or none`},
			{"GET h/ context sluice.limit.a={rate:_5/m,_name:_b}",
				"limit a: context_extensions: sluice.limit.a:1:13: name: unknown field; want one of absent, burst, " +
					"cost, domain, group, key, match, max_rate, mode, on_failure, overrides, plan, quota, rate, " +
					"rate_from, readable, starts, time_zone, when"},
			{"GET h/ context sluice.limit.a={rate:_5/m,_overrides-file:_x}",
				"limit a: context_extensions: sluice.limit.a:1:13: overrides-file: unknown field; want one of " +
					"absent, burst, cost, domain, group, key, match, max_rate, mode, on_failure, overrides, plan, quota, rate, " +
					"rate_from, readable, starts, time_zone, when"},
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
				{"GET h/ context sluice.limits=a,d",
					`context_extensions: sluice.limits: unknown limit "d", a -, b -, c -`},
				{"GET h/ context sluice.limit.a=off", "b -, c -", "a: the route turns it off: sluice.limit.a"},
				{"GET h/ context sluice.limit.a={rate:_5/m,_cost:_2}", "b -, c -, a - costs 2"},
				{"GET h/ context sluice.limit.a={rate:_5/m,_cost:_2} context sluice.limits=b", "b -, a - costs 2",
					"c: the route's sluice.limits does not name it"},
				{"GET h/ context sluice.limit.d={rate:_5/m,_group:_g}", "a -, b -, c -",
					"d: b comes first in the group g"},
				{"GET h/ context sluice.limit.d={rate:_5/m,_group:_g} context sluice.limit.b=off", "a -, c -, d -",
					"b: the route turns it off: sluice.limit.b"},
			}},
		{"{mode: shadow, domain: team, exempt: [{match: {methods: [GET]}}]}", [][]string{
			{"GET h/ context sluice.limit.a={rate:_5/x}", "exempt"},
			{"POST h/ context sluice.limit.a={rate:_1/s}", "a -"},
		}},
	})
}
