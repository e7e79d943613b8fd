package policy

import (
	"fmt"
	"strings"
	"testing"
)

// TestConfigBombs checks that configs that are too large, too deep or expand
// end in an error within a tenth of a second and 50 MB.
func TestConfigBombs(t *testing.T) {
	expression := func(text string) string {
		return "limits: [{name: a, rate: 1/s, when: '" + text + "'}]\n"
	}
	aliases := "a: &a [x, x, x, x, x, x, x, x, x]\n"
	for c := 'b'; c < 'k'; c++ {
		aliases += fmt.Sprintf("%c: &%c [*%c, *%c, *%c, *%c, *%c, *%c, *%c, *%c, *%c]\n", c, c, c-1, c-1, c-1, c-1, c-1,
			c-1, c-1, c-1, c-1)
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

// TestNotOutgrown checks that configs which only look too large are read.
func TestNotOutgrown(t *testing.T) {
	for name, text := range map[string]string{
		"brackets in quotes": "limits:\n" +
			strings.Repeat("  - {name: NAME, rate: 1/s, key: 'request.path.split(\"{\")[0]'}\n", 200),
		"in plain texts": "limits:\n" +
			strings.Repeat("  - name: NAME\n    rate: 1/s\n    when: request.path.contains(\"[\") # a { in a "+
				"comment, don't mind\n", 200),
		"block lists": "limits:\n" +
			strings.Repeat("  - name: NAME\n    rate: 1/s\n    match:\n      hosts:\n        - a.example.com\n       "+
				" - b.example.com\n", 5000),
		"JSON on many lines": "{\"limits\": [\n" +
			strings.Repeat("  {\n    \"name\": \"NAME\",\n    \"rate\": \"1/s\"\n  },\n", 5000) +
			"  {\"name\": \"last\", \"rate\": \"1/s\"}\n]}\n",
		"JSON on one": "{\"limits\": [" + strings.Repeat("{\"name\": \"NAME\", \"rate\": \"1/s\"},", 5000) +
			"{\"name\": \"last\", \"rate\": \"1/s\"}]}\n",
		"many addresses": "exempt:\n  - match:\n      clients:\n" + strings.Repeat("        - 10.0.0.1\n", 15_000),
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
				if strings.HasPrefix(m.Message, "duplicate name") { // which shows that it was read
					same++
				} else {
					t.Errorf("%s: %v", name, m)
				}
			}
		}
		t.Logf("%s: %d bytes, %d names twice", name, len(text), same)
	}
}

// deep returns n nested mappings.
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
