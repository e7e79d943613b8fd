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
		`{rate: 5/m, key: 'request.host.matches("(x{100}){10}")'}`, "{rate: 1/s, match: {paths: [/a, '/**'], clients: [::/0]}}",
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
