package policy

import (
	"slices"
	"strings"
	"testing"
	"time"

	"cel.dev/cel-go/common/types/ref"
	"pgregory.net/rapid"
)

// TestEvaluationIsBounded checks expressions that look as if they took forever:
// CEL's patterns take linear time, and the rest is bounded by its cost.
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
		`[1, 2, 3, 4, 5, 6, 7, 8, 9].all(a, [1, 2, 3, 4, 5, 6, 7, 8, 9].all(b, [1, 2, 3, 4, 5, 6, 7, 8, 9].all(c, [1, 2, 3, ` +
			`4, 5, 6, 7, 8, 9].all(d, [1, 2, 3, 4, 5, 6, 7, 8, 9].all(e, [1, 2, 3, 4, 5, 6, 7, 8, 9].all(f, [1, 2, 3, 4, 5, 6, ` +
			`7, 8, 9].all(g, a + b + c + d + e + f + g + request.path.size() > 0)))))))`,
		`(request.headers["a"] + request.headers["a"] + request.headers["a"]).size() > ` +
			`request.headers["a"].lowerAscii().reverse().size()`,
	} {
		c := parse(t, "limits: [{name: a, rate: 1/s, when: '"+text+"'}]")
		req := &Request{Path: long, Headers: map[string]string{"a": long}}
		took := leastTime(bombTime, func() { c.Draw(req) })
		if took > bombTime {
			t.Errorf("%s: %v", text, took)
		} else {
			t.Logf("%v: %s", took, text)
		}
	}
}

// FuzzExpression compiles any text for each purpose, and evaluates it if it
// compiles. Nothing may panic, and no error may quote the client.
func FuzzExpression(f *testing.F) {
	for _, seed := range []string{
		`request.headers["a"] == "x"`, `request.headers["a"].startsWith("x") ? 1 : 2`,
		`has(context.x) && context.x in ["a"]`,
		`metadata.filter_metadata["jwt"].payload.n * 2.5`, `request.path.split("/")[1]`,
		`[1, 2].map(x, x * request.size)`,
		`request.headers[?"a"].orValue("z")`, `string(request.time)`, `{"a": 1}[request.headers.b]`,
		`dyn(null) == context.y`,
		`request.headers.all(k, request.headers[k] != "")`, `optional.none()`, `type(request.size)`, `b"x" == b"y"`,
		`1/0`, `"a".matches("(")`,
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		const secret = "s3cr3t-v4lue"
		if strings.Contains(text, secret) {
			return
		}
		req := request(t,
			"POST h.example.com/a/b?q="+secret+" with a="+secret+" context x="+secret+` claim n="`+secret+`"`)
		end := &End{Path: "/a/b?q=" + secret, Headers: map[string]string{"a": secret}, Trailers: map[string]string{"a": secret}}
		for _, p := range []purpose{forKey, forWhen, forCost, forRate, forSettle} {
			var e *expression
			var mistakes []expressionError
			if cost := allocates(func() { e, mistakes = compile(text, p) }); cost > 32<<20 {
				t.Errorf("%q: %d bytes are allocated", text, cost)
			}
			if (e == nil) == (mistakes == nil) {
				t.Fatalf("%q: %v and %v", text, e, mistakes)
			}
			if e == nil {
				continue
			}
			s := newSubject(req, &clientIP{})
			var err error
			switch p {
			case forKey:
				_, err = e.keyPart(s)
			case forWhen:
				_, _, err = e.condition(s)
			case forCost:
				var tokens int64
				if tokens, err = e.tokens(s, 1, maxCost); err == nil && tokens < 0 {
					t.Fatalf("%q costs %d", text, tokens)
				}
			case forRate:
				var b broughtRate
				r := rateFrom{expression: e, tokens: 10, period: time.Second, own: time.Second}
				if b, err = r.evaluate(s); err == nil && b.tokens != 0 && exceeds(b.tokens, b.period, 10, time.Second) {
					t.Fatalf("%q brings %d", text, b.tokens)
				}
			case forSettle:
				var tokens int64
				if tokens, err = e.tokens(&endSubject{end, 1}, 1, maxSettled); err == nil && tokens < 0 {
					t.Fatalf("%q settles %d", text, tokens)
				}
			}
			if err != nil && strings.Contains(err.Error(), secret) {
				t.Fatalf("%q: %v", text, err)
			}
		}
	})
}

// TestDirectReads checks that reads without CEL return what CEL returns.
func TestDirectReads(t *testing.T) {
	texts := []string{`request.headers["x-a"]`, "request.headers.host", `request.params["x"]`, "request.cookies.x"}
	for name, a := range attributes {
		if a.kind.String() == "string" {
			texts = append(texts, name)
		}
	}
	slices.Sort(texts)
	value := rapid.SampledFrom([]string{
		"", "a", "10.0.0.1", "[::1]:80", "Shop.Example.com:80", "/v1?x=y", "/?x=%79&x=y&%78=y", "/?x=1&x=2", "\xff", "{}",
	})
	var ids clientIP
	rapid.Check(t, func(t *rapid.T) {
		s := newSubject(&Request{
			Method: value.Draw(t, "method"), Scheme: value.Draw(t, "scheme"), Host: value.Draw(t,
				"host"), Path: value.Draw(t, "path"),
			Protocol: value.Draw(t, "protocol"),
			Headers: map[string]string{
				"cookie": "a=b; x=" + value.Draw(t, "cookie"), "x-a": value.Draw(t, "x-a"),
				"host": value.Draw(t, "host header"), "x-request-id": value.Draw(t, "id"),
			},
			Source: Peer{Address: value.Draw(t, "source"), Principal: value.Draw(t, "principal")},
		}, &ids)
		for _, text := range texts {
			e, mistakes := compile(text, forKey)
			if mistakes != nil || e.direct == nil {
				t.Fatalf("%s: no direct read (%v)", text, mistakes)
			}
			direct, err := e.keyPart(s)
			var v ref.Val
			if err == nil {
				v, err = e.eval(s)
			}
			if err != nil {
				t.Fatalf("%s: %v", text, err)
			}
			byCEL := ""
			if v != nil {
				byCEL = v.Value().(string)
			}
			if byCEL != direct {
				t.Fatalf("%s: read directly %q, by CEL %q (%v)", text, direct, byCEL, err)
			}
		}
	})
}

func TestExpressionsAreBounded(t *testing.T) {
	c := parse(t,
		`limits: [{name: a, rate: 1/s, key: 'request.url_path.split("").map(a, request.url_path.split("").map(b, a + `+
			`b)).size()'}]`)
	req := request(t, "GET h/")
	req.Path = "/" + strings.Repeat("x", 10_000)
	if d := c.Draw(req); !d.Invalid ||
		d.Mistakes[0].Error() != "limit a: key: evaluation failed: operation cancelled: actual cost limit exceeded" {
		t.Error(d)
	}
	if _, mistakes := compile(strings.Repeat("(", 2000)+"1"+strings.Repeat(")", 2000), forKey); mistakes == nil {
		t.Error("2000 brackets are no mistake")
	}
	if _, mistakes := compile(strings.Repeat("x", maxExpression+1), forKey); mistakes == nil {
		t.Error("a long one is no mistake")
	}
}
