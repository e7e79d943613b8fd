package policy

import (
	"net/url"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

// TestLookups looks up parameters and cookies: absent where several differ.
func TestLookups(t *testing.T) {
	const differs = "(differs)"
	for _, tt := range []struct{ query, want string }{
		{"x=1", "1"},
		{"", ""},
		{"x", ""},
		{"x=", ""},
		{"xx=1&y=x", ""},
		{"X=1", ""},
		{"a=b&x=1&c", "1"},
		{"x=a%20b+c%2B%3d", "a b c+="},
		{"x=%zz%4", "%zz%4"},
		{"%78=1", "1"},
		{"x=a=b", "a=b"},
		{"x=a;x=b", "a;x=b"},
		{"x=1&x=1", "1"},
		{"x=a&%78=%61", "a"},
		{"x=1&x=2", differs},
		{"x=1&x=", differs},
		{"x=1&x", differs},
		{"x=\u00e4&x=%c3%a4", "\u00e4"},
		{strings.Repeat("a=b&", 10_000) + "x=1", "1"},
		{strings.Repeat("a=b&", 17_000) + "x=1", ""}, // longer than 64 KiB
	} {
		value, differ := findParam(tt.query, "x")
		if differ {
			value += differs
		}
		if value != tt.want {
			t.Errorf("?%.40s: %q, want %q", tt.query, value, tt.want)
		}
	}
	for _, tt := range []struct{ header, want string }{
		{"x=1", "1"},
		{"", ""},
		{"x", ""},
		{"a=b; x=1;c=d", "1"},
		{" x = 1 ", "1"},
		{`x="a b"`, "a b"},
		{`x="`, `"`},
		{"x=a%20b+c", "a b+c"},
		{"%78=1", ""},
		{"X=1", ""},
		{"x=a=b", "a=b"},
		{"x=1; x=1", "1"},
		{"x=1; x=2", differs},
		{strings.Repeat("a=b;", 17_000) + "x=1", ""},
	} {
		value, differ := findCookie(tt.header, "x")
		if differ {
			value += differs
		}
		if value != tt.want {
			t.Errorf("cookie %.40s: %q, want %q", tt.header, value, tt.want)
		}
	}
}

// TestParamsAsGoReadsThem compares with net/url, which reads what browsers write.
func TestParamsAsGoReadsThem(t *testing.T) {
	text := rapid.StringOf(rapid.SampledFrom([]rune{'a', 'b', '%', '+', '=', '&', ' ', '\u00e4', '\x00'}))
	rapid.Check(t, func(t *rapid.T) {
		values := url.Values{}
		for range rapid.IntRange(0, 4).Draw(t, "n") {
			values.Add(text.Draw(t, "name"), text.Draw(t, "value"))
		}
		for name, all := range values {
			all := slices.Sorted(slices.Values(all))
			want := ""
			if len(slices.Compact(all)) == 1 {
				want = all[0]
			}
			if got, _ := findParam(values.Encode(), name); got != want {
				t.Fatalf("%s: %q is %q, want %q", values.Encode(), name, got, want)
			}
		}
	})
}

// TestDrawLookups has limits by parameters and cookies, in every field that has
// expressions.
func TestDrawLookups(t *testing.T) {
	c := parse(t, `
limits:
  - {name: token, key: 'request.params["token"]', rate: 9/s, overrides: [{key: gold one, rate: 99/s}]}
  - {name: session, key: [request.cookies.sid, request.method], rate: 9/s}
  - {name: beta, when: 'request.params["beta"] == "on"', rate: 9/s, cost: 'int(request.params["n"])'}
  - {name: absent, when: 'request.cookies["a"] != "b"', rate: 9/s, key: 'request.cookies["sid"].lowerAscii()'}
`)
	for _, tt := range []struct{ request, want string }{
		{"GET h/?token=a%20b&n=3", "token #(a b), session ~11.203.0.113.7=3.GET, absent ~11.203.0.113.7"},
		{"GET h/?token=a&token=b&beta=on&n=3", "token ~11.203.0.113.7, session ~11.203.0.113.7=3.GET, beta - costs 3, " +
			"absent ~11.203.0.113.7"},
		{"GET h/?beta=on&beta=off with cookie=a=b;%20sid=S", "token ~11.203.0.113.7, session #(S)=3.GET"},
		{"GET h/ with cookie=sid=S", "token ~11.203.0.113.7, session #(S)=3.GET, absent #(s)"},
		{"GET h/?beta=on&n=x", "limit beta: cost: evaluation failed: type conversion error, token ~11.203.0.113.7, " +
			"session ~11.203.0.113.7=3.GET, absent ~11.203.0.113.7"},
	} {
		if got, want := drawn(t, c, tt.request), withHashes(tt.want); got != want {
			t.Errorf("%s:\n%s\nwant\n%s", tt.request, got, want)
		}
	}
	l := c.Explain(request(t, "GET h/?token=gold+one with cookie=sid=a;sid=b")).Limits
	for i, want := range []string{
		"it applies to every request; its rate is from overrides[0]",
		"it applies to every request; its key part request.cookies.sid is absent (there are several cookies of this name): " +
			"the client's network is used instead",
	} {
		if l[i].Reason != want {
			t.Errorf("%s, want %s", l[i].Reason, want)
		}
	}
	if got, want := c.Needs().Headers, []string{"cookie"}; !slices.Equal(got, want) {
		t.Errorf("needs the headers %v, want %v", got, want)
	}
	reads := []string{`request.params["beta"]`, `request.params["n"]`}
	if got := c.Describe()[2].Reads; !slices.Equal(got, reads) {
		t.Errorf("reads %v, want %v", got, reads)
	}
	if len(c.Warnings) != 0 { // beta bounds what clients make up
		t.Error(c.Warnings)
	}
	for text, of := range map[string]string{
		"request.params.size()":                  "request.params",
		`request.cookies[request.method]`:        "request.cookies",
		`request.params.exists(k, k == "x")`:     "request.params",
		`[request.params].size() > 0 ? "a": "b"`: "request.params",
	} {
		want := of + " must be used with a constant name, as in " + of + `["name"]`
		if _, mistakes := compile(text, forKey); len(mistakes) != 1 || mistakes[0].message != want {
			t.Errorf("%s: %v", text, mistakes)
		}
	}
	c = parse(t, "limits: [{name: a, rate: 1/s, key: request.cookies.sid}]")
	if got := c.Warnings.Error(); !strings.Contains(got, `request.cookies["sid"] is chosen by the client`) {
		t.Error(got)
	}
}

// TestLookupsAllocateNothing holds the fast path: a key that is a parameter or a
// cookie is read without CEL and without an allocation.
func TestLookupsAllocateNothing(t *testing.T) {
	for _, text := range []string{"request.params.x", "request.cookies.x"} {
		e, _ := compile(text, forKey)
		var ids clientIP
		req := request(t, "GET h/?a=b&x=1 with cookie=a=b;x=1")
		s := newSubject(req, &ids)
		if n := testing.AllocsPerRun(100, func() {
			s.found = s.found[:0]
			if v, err := e.keyPart(s); v != "1" || err != nil {
				t.Fatal(v, err)
			}
		}); n > 0 {
			t.Errorf("%s: %v allocations", text, n)
		}
	}
}

func BenchmarkLookup(b *testing.B) {
	long := strings.Repeat("abc=def&", 7_500) + "x=1" // 60 KiB
	for name, query := range map[string]string{
		"short": "a=b&x=1", "60 KiB": long, "60 KiB of pairs": strings.Repeat("&", 60_000) + "x=1",
	} {
		b.Run(name, func(b *testing.B) {
			for b.Loop() {
				if v, _ := findParam(query, "x"); v != "1" {
					b.Fatal(v)
				}
			}
		})
	}
}
