package policy

import (
	"fmt"
	"runtime"
	"strings"
	"testing"
)

// What is too large, too deep or made to grow ends in an error within a tenth of a second and 50 MB.
func TestConfigBombs(t *testing.T) {
	expression := func(text string) string {
		return "limits: [{name: a, rate: 1/s, when: '" + text + "'}]\n"
	}
	aliases := "a: &a [x, x, x, x, x, x, x, x, x]\n"
	for c := 'b'; c < 'k'; c++ {
		aliases += fmt.Sprintf("%c: &%c [*%c, *%c, *%c, *%c, *%c, *%c, *%c, *%c, *%c]\n", c, c, c-1, c-1, c-1, c-1, c-1, c-1, c-1, c-1, c-1)
	}
	for name, text := range map[string]string{
		"aliases":                aliases,
		"brackets":               strings.Repeat("[", 1<<20),
		"braces":                 strings.Repeat("{a: ", 1<<17),
		"dashes":                 strings.Repeat("- ", 1<<19),
		"indentation":            deep(2000),
		"too large":              strings.Repeat("#", 1<<20+1),
		"a megabyte of one":      "domain: " + strings.Repeat("x", 1<<20-100),
		"a megabyte of fields":   strings.Repeat("x: 1\n", 1<<17),
		"the same field":         strings.Repeat("domain: a\n", 1<<16),
		"a megabyte expression":  expression(strings.Repeat("x", 1<<20-100)),
		"brackets within":        expression(strings.Repeat("(", 2000) + strings.Repeat(")", 2000)),
		"a long sum":             expression(strings.Repeat("1+", 2000) + "1 == 2"),
		"a megabyte of maps":     "limits:\n" + strings.Repeat("- x: 1\n", 1<<17),
		"a line of fields":       "{" + strings.Repeat("x: 1,", 1<<17) + "}",
		"a line of values":       "domain: [" + strings.Repeat("x,", 1<<18) + "]",
		"a list of lines":        "domain:\n" + strings.Repeat("- x\n", 1<<18-10),
		"quoted fields":          strings.Repeat("\"x\": 1\n", 1<<16),
		"a bracket in a comment": "# [\n" + strings.Repeat("x: 1\n", 1<<17),
		"a bracket in quotes":    "x: '['\n" + strings.Repeat("x: 1\n", 1<<17),
		"an open quote":          "x: \"[\n" + strings.Repeat("x: 1\n", 1<<17),
		"comments in brackets":   strings.Repeat("[ # ]\n", 1<<16),
		"wrong expressions":      wrongExpressions(2000),
		"one wrong expression":   "limits:\n" + strings.Repeat("- {name: a, rate: 1/s, when: x == 1}\n", 2000),
		"questions":              strings.Repeat("? x\n: y\n", 1<<16),
		"a mixed expression":     expression(strings.Repeat("request.headers[\"a\"] == 1 || ", 1<<15-100)),
		"a large pattern":        expression(`request.host.matches("((((((((a{100}){100}){100}){100}){100}){100}){100}){100})")`),
		"patterns in patterns":   expression(`request.host.matches("(((a*)*)*)*(((b+)+)+)+{1000}{1000}")`),
		"lists in lists":         expression(strings.Repeat("[", 500) + strings.Repeat("]", 500)),
		"macros in macros":       expression(strings.Repeat("[1].all(x, ", 100) + "true" + strings.Repeat(")", 100)),
		"too many limits":        "limits:\n" + strings.Repeat("- {}\n", maxLimits+1),
		"too many parts":         "limits: [{name: a, rate: 1/s, key: [" + strings.Repeat("'1',", 1000) + "]}]",
		"variables in variables": "domain: " + strings.Repeat("${A:-", 1000) + strings.Repeat("}", 1000) + "\n",
	} {
		var err error
		allocated := allocates(func() { _, err = Parse("bomb.yaml", []byte(text), env()) })
		if err == nil {
			t.Errorf("%s: no error", name)
			continue
		}
		took := leastTime(bombTime, func() { _, _ = Parse("bomb.yaml", []byte(text), env()) })
		if took > bombTime || allocated > 50<<20 {
			t.Errorf("%s: %v, %d MB: %.200s", name, took, allocated>>20, err)
		} else {
			t.Logf("%s: %v, %d kB: %.100s", name, took, allocated>>10, err)
		}
	}
}

func wrongExpressions(n int) string {
	var b strings.Builder
	b.WriteString("limits:\n")
	for i := range n {
		fmt.Fprintf(&b, "- {name: l%d, rate: 1/s, when: x%d == 1}\n", i, i)
	}
	return b.String()
}

// What looks large, and is not, is read.
func TestNotOutgrown(t *testing.T) {
	for name, text := range map[string]string{
		"brackets in quotes": "limits:\n" + strings.Repeat("  - {name: NAME, rate: 1/s, key: 'request.path.split(\"{\")[0]'}\n", 200),
		"in plain texts":     "limits:\n" + strings.Repeat("  - name: NAME\n    rate: 1/s\n    when: request.path.contains(\"[\") # a { in a comment, don't mind\n", 200),
		"block lists":        "limits:\n" + strings.Repeat("  - name: NAME\n    rate: 1/s\n    match:\n      hosts:\n        - a.example.com\n        - b.example.com\n", 5000),
		"JSON on many lines": "{\"limits\": [\n" + strings.Repeat("  {\n    \"name\": \"NAME\",\n    \"rate\": \"1/s\"\n  },\n", 5000) + "  {\"name\": \"last\", \"rate\": \"1/s\"}\n]}\n",
		"JSON on one":        "{\"limits\": [" + strings.Repeat("{\"name\": \"NAME\", \"rate\": \"1/s\"},", 5000) + "{\"name\": \"last\", \"rate\": \"1/s\"}]}\n",
		"many addresses":     "exempt:\n  - match:\n      clients:\n" + strings.Repeat("        - 10.0.0.1\n", 15_000),
	} {
		n := 0
		for strings.Contains(text, "NAME") && n < 200 {
			text = strings.Replace(text, "NAME", fmt.Sprintf("l%d", n), 1)
			n++
		}
		text, same := strings.ReplaceAll(text, "NAME", "same"), 0
		_, err := Parse("f", []byte(text), env())
		if err != nil {
			for _, m := range mistakes(t, err) {
				if strings.HasPrefix(m.Message, "a second limit") { // which says that it was read
					same++
				} else {
					t.Errorf("%s: %v", name, m)
				}
			}
		}
		t.Logf("%s: %d bytes, %d names twice", name, len(text), same)
	}
}

// deep is n mappings in each other.
func deep(n int) string {
	var b strings.Builder
	for i := range n {
		if b.Len() > 1<<20-n {
			break
		}
		b.WriteString(strings.Repeat(" ", i) + "a:\n")
	}
	return b.String()
}

// What looks as if it could take for ever when it is evaluated does not: CEL's patterns take linear time, and the rest is bounded by its
// cost.
func TestEvaluationIsBounded(t *testing.T) {
	long := strings.Repeat("a", 60_000)
	for _, text := range []string{
		`request.headers["a"].matches("(a*)*b")`,
		`request.headers["a"].matches("(a|aa)+$")`,
		`request.headers["a"].split("").all(x, request.headers["a"].split("").all(y, x == y))`,
		`request.headers["a"].split("").join(request.headers["a"]).size() > 1`,
		`request.path.split("").join(request.path).size() > 1`,
		`request.headers["a"].replace("a", request.headers["a"]).size() > 1`,
		`request.headers["a"].split("").map(x, request.headers["a"]).size() > 1`,
		`[1, 2, 3, 4, 5, 6, 7, 8, 9].all(a, [1, 2, 3, 4, 5, 6, 7, 8, 9].all(b, [1, 2, 3, 4, 5, 6, 7, 8, 9].all(c, [1, 2, 3, 4, 5, 6, 7, 8, 9].all(d, [1, 2, 3, 4, 5, 6, 7, 8, 9].all(e, [1, 2, 3, 4, 5, 6, 7, 8, 9].all(f, [1, 2, 3, 4, 5, 6, 7, 8, 9].all(g, a + b + c + d + e + f + g + request.path.size() > 0)))))))`,
		`(request.headers["a"] + request.headers["a"] + request.headers["a"]).size() > request.headers["a"].lowerAscii().reverse().size()`,
	} {
		c := parse(t, "limits: [{name: a, rate: 1/s, when: '"+text+"'}]")
		r := &Request{Path: long, Headers: map[string]string{"a": long}}
		took := leastTime(bombTime, func() { c.Draw(r) })
		if took > bombTime {
			t.Errorf("%s: %v", text, took)
		} else {
			t.Logf("%v: %s", took, text)
		}
	}
}

// A route's texts are parsed once, and few enough are kept.
func TestRouteTable(t *testing.T) {
	c := parse(t, "limits: [{name: a, rate: 1/s}]")
	one := &Request{Context: map[string]string{"sluice.limit.b": "{rate: 5/m, when: 'request.headers.x == \"y\"'}"}}
	c.Draw(one)
	first := c.routes.entry(c, routeText{"sluice.limit.b", one.Context["sluice.limit.b"]})
	if second := c.routes.entry(c, routeText{"sluice.limit.b", one.Context["sluice.limit.b"]}); first.rule == nil || first != second {
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
	if !d.Invalid || d.Mistakes[0].Error() != "context_extensions: 8192 bytes under a key that begins with sluice.; allowed are 8192" && len(c.routes.entries) != before {
		t.Errorf("%+v", d)
	}
	d = c.Draw(&Request{Context: map[string]string{"sluice.limit.b": "{rate: 5/m, overrides_file: x.csv}"}})
	if !d.Invalid || !strings.Contains(d.Mistakes[0].Error(), "overrides_file: unknown field") {
		t.Errorf("%+v", d)
	}
}

// FuzzExpression compiles any text for all purposes, and evaluates what is one: nothing panics, and no error tells what a client sent.
func FuzzExpression(f *testing.F) {
	for _, seed := range []string{
		`request.headers["a"] == "x"`, `request.headers["a"].startsWith("x") ? 1 : 2`, `has(context.x) && context.x in ["a"]`,
		`metadata.filter_metadata["jwt"].payload.n * 2.5`, `request.path.split("/")[1]`, `[1, 2].map(x, x * request.size)`,
		`request.headers[?"a"].orValue("z")`, `string(request.time)`, `{"a": 1}[request.headers.b]`, `dyn(null) == context.y`,
		`request.headers.all(k, request.headers[k] != "")`, `optional.none()`, `type(request.size)`, `b"x" == b"y"`, `1/0`, `"a".matches("(")`,
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		const secret = "s3cr3t-v4lue"
		if strings.Contains(text, secret) {
			return
		}
		r := request(t, "POST h.example.com/a/b?q="+secret+" with a="+secret+" context x="+secret+` claim n="`+secret+`"`)
		for _, p := range []purpose{forKey, forWhen, forCost} {
			e, mistakes := compile(text, p)
			if (e == nil) == (mistakes == nil) {
				t.Fatalf("%q: %v and %v", text, e, mistakes)
			}
			if e == nil {
				continue
			}
			s := newSubject(r, &clientIP{})
			var err error
			switch p {
			case forKey:
				_, err = e.part(s)
			case forWhen:
				_, _, err = e.holds(s)
			case forCost:
				var tokens int64
				if tokens, err = e.tokens(s); err == nil && tokens < 0 {
					t.Fatalf("%q costs %d", text, tokens)
				}
			}
			if err != nil && strings.Contains(err.Error(), secret) {
				t.Fatalf("%q: %v", text, err)
			}
		}
	})
}

// What is kept of the texts of routes is bounded by the memory that it takes,
// whatever they say.
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
		"patterns":  "{rate: 5/m, when: '" + strings.Repeat("request.host.matches(\"N(x{100}){10}\") || ", 10) + "true'}",
		"paths":     "{rate: 5/m, match: {paths: [/N" + strings.Repeat(", /a", 100) + "]}}",
		"mistakes":  "{aN: 1" + strings.Repeat(", a: 1", 80) + "}",
		"overrides": "{rate: 5/m, key: request.host, overrides: [{key: 'N', rate: 1/s}" + strings.Repeat(", {key: b, rate: 1/h}", 20) + "]}",
	} {
		c := parse(t, "limits: [{name: a, rate: 1/s}]")
		before, entered := used(), 0
		for ; len(c.routes.entries) == entered && entered < 40; entered++ {
			// The texts of a check are parts of it, and it must not be kept for them.
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
	if _, wrong := compile(strings.Repeat(`request.host.matches("(x{100}){10}") || `, 20)+"true", forWhen); wrong == nil ||
		wrong[0].message != "regular expressions of more than 16384 instructions together" {
		t.Errorf("many large patterns: %v", wrong)
	}
}

// allocates returns how many bytes a function allocates in all.
func allocates(f func()) int {
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	f()
	runtime.ReadMemStats(&after)
	return int(after.TotalAlloc - before.TotalAlloc)
}

// FuzzRoute bounds what the decoding of a route's text allocates. What an entry
// of the table is said to take fits the table.
func FuzzRoute(f *testing.F) {
	for _, seed := range []string{
		"off", "{rate: 10/m, key: client.network}", "{rate: 5/m, when: 'request.headers.x == \"y\"', burst: 3, group: g, absent: deny}",
		`{rate: 5/m, key: 'request.host.matches("(x{100}){10}")'}`, "{rate: 1/s, match: {paths: [/a, '/**'], clients: [::/0]}}",
		"{rate: 1/s, key: request.host, overrides: [{key: a, rate: 2/s}]}", "{<<: [&a {rate: 1/s}, *a, *a]}", strings.Repeat("[", 100), strings.Repeat("a: 1\n", 50),
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
