package policy

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"cel.dev/cel-go/common/types/ref"
	"pgregory.net/rapid"
)

// parts makes a key of a few values: each open, hashed, or absent with a stand-in.
func parts(h *hasher, values []string, kinds []int) string {
	var key []byte
	for i, v := range values {
		switch kinds[i] {
		case 0:
			key = h.appendOpen(key, v)
		case 1:
			key = h.appendHash(key, v)
		default:
			key = h.appendAbsent(key, v)
		}
	}
	return string(key)
}

// Different parts make different keys: a million pairs of what separates, escapes, quotes, counts and tags.
func TestKeysDoNotCollide(t *testing.T) {
	pieces := []string{"", "a", "1", ".", "=", "#", "~", ":", "{", "}", "%", "%41", "A", "\x00", "\xff", "é", "/", "=1.a", "#43.", "~0.", "11.", "?"}
	random := rand.New(rand.NewPCG(1, 2))
	h := &hasher{}
	seen := make(map[string]string)
	for range 1_000_000 {
		n := random.IntN(4)
		values, kinds := make([]string, n), make([]int, n)
		for i := range values {
			for range random.IntN(4) {
				values[i] += pieces[random.IntN(len(pieces))]
			}
			if kinds[i] = random.IntN(3); kinds[i] == 2 {
				values[i] = []string{"", "10.0.0.1", "2001:db8::/64"}[random.IntN(3)]
			} else if values[i] == "" {
				values[i] = "x" // an empty value is absent
			}
			if kinds[i] == 0 && strings.Contains(values[i], "?") {
				kinds[i] = 1 // as appendOpen does
			}
		}
		key, of := parts(h, values, kinds), fmt.Sprintf("%q %v", values, kinds)
		if other, ok := seen[key]; ok && other != of {
			t.Fatalf("%s and %s both make %q", of, other, key)
		}
		seen[key] = of
		if strings.ContainsAny(key, "{}\" \r\n\x00") {
			t.Fatalf("%s makes %q", of, key)
		}
	}
}

func TestKeySecret(t *testing.T) {
	keys := map[string]bool{}
	for _, secret := range []string{"", "key_secret: one", "key_secret: two"} {
		c := parse(t, secret+"\nlimits:\n  - {name: a, rate: 1/s, key: 'request.headers[\"x-api-key\"]'}\n")
		key := drawn(t, c, "GET h/ with x-api-key=canary")
		if strings.Contains(key, "canary") || keys[key] {
			t.Errorf("%q: %s", secret, key)
		}
		keys[key] = true
	}
}

// A key holds at most some hundred bytes a part, whatever a client sends.
func TestKeysAreBounded(t *testing.T) {
	c := parse(t, `limits: [{name: a, rate: 1/s, key: [request.url_path, request.host]}]`)
	r := request(t, "GET h/")
	r.Path, r.Host = "/"+strings.Repeat("é", 50_000), strings.Repeat("h", 50_000)
	d := c.Draw(r)
	if len(d.Charges[0].Key) > 150 {
		t.Errorf("%d bytes", len(d.Charges[0].Key))
	}
}

// A read past CEL gives what CEL gives.
func TestDirectReads(t *testing.T) {
	texts := []string{`request.headers["x-a"]`, "request.headers.host"}
	for name, a := range attributes {
		if a.kind.String() == "string" {
			texts = append(texts, name)
		}
	}
	slices.Sort(texts)
	value := rapid.SampledFrom([]string{"", "a", "10.0.0.1", "[::1]:80", "Shop.Example.com:80", "/v1?x=y", "\xff", "{}"})
	var ids clientIP
	rapid.Check(t, func(t *rapid.T) {
		s := newSubject(&Request{
			Method: value.Draw(t, "method"), Scheme: value.Draw(t, "scheme"), Host: value.Draw(t, "host"), Path: value.Draw(t, "path"),
			Protocol: value.Draw(t, "protocol"),
			Headers:  map[string]string{"x-a": value.Draw(t, "x-a"), "host": value.Draw(t, "host header"), "x-request-id": value.Draw(t, "id")},
			Source:   Peer{Address: value.Draw(t, "source"), Principal: value.Draw(t, "principal")},
		}, &ids)
		for _, text := range texts {
			e, mistakes := compile(text, forKey)
			if mistakes != nil || e.direct == nil {
				t.Fatalf("%s: no direct read (%v)", text, mistakes)
			}
			direct, err := e.part(s)
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
	c := parse(t, `limits: [{name: a, rate: 1/s, key: 'request.url_path.split("").map(a, request.url_path.split("").map(b, a + b)).size()'}]`)
	r := request(t, "GET h/")
	r.Path = "/" + strings.Repeat("x", 10_000)
	if d := c.Draw(r); !d.Invalid || d.Mistakes[0].Error() != "limit a: key: the expression fails: operation cancelled: actual cost limit exceeded" {
		t.Error(d)
	}
	if _, mistakes := compile(strings.Repeat("(", 2000)+"1"+strings.Repeat(")", 2000), forKey); mistakes == nil {
		t.Error("2000 brackets are no mistake")
	}
	if _, mistakes := compile(strings.Repeat("x", maxExpression+1), forKey); mistakes == nil {
		t.Error("a long one is no mistake")
	}
}

func FuzzNormalPath(f *testing.F) {
	for _, seed := range []string{"", "/", "//", "/a", "/a/", "/a/../b", "/%2e%2e/a", "/a;b/c", "\\a", "/%", "/%4", "/%zz", "/\xff", "/a%2fb", "/.a", "/a/..", "..;/x"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, path string) {
		got := normalPath(path)
		if got == "" || got[0] != '/' || got != "/" && strings.HasSuffix(got, "/") || len(got) > len(path)+1 {
			t.Fatalf("%q: %q", path, got)
		}
		for segment := range strings.SplitSeq(got[1:], "/") {
			if segment == "." || segment == ".." || segment == "" && got != "/" || strings.ContainsAny(segment, ";\\") {
				t.Fatalf("%q: %q has the segment %q", path, got, segment)
			}
		}
		// What changes nothing but the spelling changes nothing.
		if strings.HasPrefix(path, "/") {
			for _, same := range []string{path + "/", "/" + path, "/." + path, "/x/.." + path, path + "/."} {
				if normalPath(same) != got {
					t.Fatalf("%q is %q, but %q is %q", path, got, same, normalPath(same))
				}
			}
		}
		if !strings.Contains(got, "%") && normalPath(got) != got {
			t.Fatalf("%q is normal, but is not its own normal form: %q", got, normalPath(got))
		}
	})
}

func FuzzParse(f *testing.F) {
	for _, seed := range configs(f) {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		c, err := Parse("fuzz.yaml", text, env())
		if err != nil {
			for _, m := range mistakes(t, err) {
				if m.Message == "" {
					t.Fatalf("%+v", m)
				}
			}
			return
		}
		c.Draw(&Request{Method: "GET", Path: "/a", Headers: map[string]string{"x": "y"}, Source: Peer{Address: "10.0.0.1"}})
	})
}

func FuzzParseAddr(f *testing.F) {
	for _, seed := range []string{"10.0.0.1", "[::1]:80", "::ffff:1.2.3.4", "fe80::1%eth0", "[::1", "1.2.3.4:x", " 1.2.3.4 ", "64:ff9b::1.2.3.4", "64:ff9b:1::1.2.3.4"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, s string) {
		a := parseAddr(s)
		if a.Is4In6() || a.Zone() != "" || a.IsValid() && parseAddr(a.String()) != a {
			t.Fatalf("%q: %v", s, a)
		}
		if n := network(a); a.IsValid() {
			p, err := netip.ParsePrefix(n)
			switch {
			case err == nil && p.Bits() == 64 && p.Contains(a), n == a.String():
			case nat64.Contains(a) && "64:ff9b::"+n != a.String() && netip.MustParseAddr("64:ff9b::"+n) == a:
			default:
				t.Fatalf("%q: %s", s, n)
			}
		}
	})
}
