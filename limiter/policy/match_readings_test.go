package policy

import (
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// TestPathReadings checks readings: each row is a path as sent, a server that
// reads it as another path, and that path.
func TestPathReadings(t *testing.T) {
	for _, tt := range []struct{ sent, server, read string }{
		// Encoded slashes that stay in their segment, in a path that is not
		// normal.
		{"/v1/orders/a%2Fb/", "Express", "/v1/orders/a%2Fb"},
		{"/v1/%6frders/a%2Fb", "Go's ServeMux", "/v1/orders/a%2Fb"},
		{"/v1/%6Frders/a%5Cb", "Go's ServeMux", "/v1/orders/a%5Cb"},
		{"/v1/./orders//a%2fb;x=1/", "one that keeps encoded slashes", "/v1/orders/a%2fb"},
		{"/v1/orders/%2e%2e", "Go's ServeMux", "/v1/orders/.."},
		{"/v1/%6frders/%2E%2e", "Go's ServeMux", "/v1/orders/.."},
		{"/v1/%6frders/a\\b", "Fastify", `/v1/orders/a\b`},
		{"/v1/%6frders/..;", "Go's ServeMux", "/v1/orders/..;"},
		{"/v1/%6frders/;x", "Express 5 with a decoding proxy", "/v1/orders/;x"},
		{"/v1/orders/;x/", "Express", "/v1/orders/;x"},
		{"/v1/orders/../", "Express", "/v1/orders/.."},
		{`/v1/orders/a\b/`, "Express", `/v1/orders/a\b`},
		{"/v1/orders%2f..", "Flask", "/v1/orders/.."},
		{"/v1%2Forders", "Flask", "/v1/orders"},

		// Dot segments before and after decoding, and next to doubled slashes.
		{"/public//../admin", "RFC 3986", "/public/admin"},
		{"/public//../%61dmin", "RFC 3986", "/public/admin"},
		{"/public//../%61dmin", "nginx", "/admin"},
		{"/public/%2f../admin", "nginx with merge_slashes off", "/public/admin"},
		{"/x/a%2fb/../../admin", "Jetty", "/admin"},
		{"/x/a%2fb/../../admin", "nginx", "/x/admin"},
		{"/x/../v1/orders/%2e%2e", "what decodes segments of a clean path", "/v1/orders/.."},
		{"/v1/orders/x/..", "nginx", "/v1/orders"},
		{"/../v1/orders", "nginx", "/v1/orders"},
		{"/v1/%2e/orders", "a WHATWG URL", "/v1/orders"},
		{`/v1\x\..\orders`, "a WHATWG URL", "/v1/orders"},

		// Parameters.
		{"/v1;a=b/orders;c", "Spring", "/v1/orders"},
		{"/v1/orders/a%3Bb", "Spring", "/v1/orders/a;b"},
		{"/v1;a/%6frders/%3bx", "Spring", "/v1/orders/;x"},
		{"/v1;a%2fb/orders", "Tomcat", "/v1/orders"},
		{"/x/..;/v1/orders", "Tomcat", "/v1/orders"},
		{"/v1/orders;/7/pay", "Fastify 4", "/v1/orders"},
		{"/v1/orders;/../../x", "Fastify 4", "/v1/orders"},

		// Fragments and blanks, which are not part of the path for every
		// server.
		{"/v1/orders#x", "Node's url.parse", "/v1/orders"},
		{"/v1/orders#/../x", "Flask", "/v1/orders"},
		{"/v1/orders%23x", "who decodes and parses again", "/v1/orders"},
		{"/v1/orders%3Fx=1", "who decodes and parses again", "/v1/orders"},
		{"/v1/orders%00.png", "who ends texts with a NUL", "/v1/orders"},
		{"/v1/orders%0a", "Starlette", "/v1/orders"},
		{"/v1/orders\xa0", "Node's url.parse", "/v1/orders"},
		{"/static/a%0ab", "Starlette's {name:path}", "/"},
		{"/v1/ord\ters", "Python's urlsplit", "/v1/orders"},
		{"//h/v1/orders", "new URL(path, base)", "/v1/orders"},
		{`/\h/v1/orders`, "new URL(path, base)", "/v1/orders"},
		{"http://h/v1/orders", "new URL(path)", "/v1/orders"},
		{"http://h", "new URL(path)", "/"},

		// Escapes.
		{"/%76%31/orders", "Flask", "/v1/orders"},
		{"/v1/orders/%zz", "Flask", "/v1/orders/%zz"},
		{"/v1/%6frders/%4", "Flask", "/v1/orders/%4"},
		{"/v1/%6frders/%ff%c0%af", "Flask", "/v1/orders/\xff\xc0\xaf"},
		{"/v1/%256frders", "all", "/v1/%6frders"}, // decoded once
		{"*", "all", "/*"},
		{"", "all", "/"},
		{"v1/orders", "all", "/v1/orders"},
	} {
		readings := appendReadings(nil, tt.sent)
		if readings[0] != tt.sent {
			t.Errorf("%q: the first reading is %q", tt.sent, readings[0])
		}
		if !slices.Contains(readings, tt.read) {
			t.Errorf("%q is %q for %s, and no reading: %q", tt.sent, tt.read, tt.server, readings)
		}
		if want := normalizePath(tt.sent); want != tt.sent && readings[1] != want {
			t.Errorf("%q: the second reading is %q, the normal form %q", tt.sent, readings[1], want)
		}
	}
}

// TestPlainPaths checks that a path which all servers read alike has one
// reading and costs no allocation.
func TestPlainPaths(t *testing.T) {
	var few [3]string
	for _, path := range []string{"/", "/v1/orders/7", "/a.b/c-d_e~f", "/a:b@c!$&'()*+,=d", "/v1/é", "/..a", "/a.."} {
		if got := appendReadings(nil, path); len(got) != 1 || got[0] != path {
			t.Errorf("%q: %q", path, got)
		}
		if strings.HasPrefix(path, "/.") {
			continue // not plain
		}
		if n := testing.AllocsPerRun(10, func() { appendReadings(few[:0], path) }); n != 0 {
			t.Errorf("%q: %v allocations", path, n)
		}
	}
}

// pathPieces are the pieces of generated paths.
var pathPieces = []string{
	"/", "/", "/", "//", "a", "b", "v1", ".", "..", "/.", "/..", "\\", ";", ";x", "#", "%", "%2f", "%2F", "%5c", "%5C",
	"%2e", "%2E", "%3b", "%61", "%25", "%00", "%0a",
	"%3f", "%23", "%zz", "%4", "\t", "\n", " ", "\xa0", "\xff", "é", "://", "\x00", "A", "%4F",
}

// checkReadings compares the readings of a path with those of all servers,
// without the shortcuts of appendReadings.
func checkReadings(t interface {
	Helper()
	Fatalf(string, ...any)
}, path string) {
	t.Helper()
	got := appendReadings(nil, path)
	want := map[string]bool{path: true}
	for _, server := range servers {
		r := readPath(path, server)
		want[r] = true
		if r == "" || r[0] != '/' || r != "/" && strings.HasSuffix(r, "/") || strings.Contains(r, "//") ||
			len(r) > len(path)+1 {
			t.Fatalf("%q, read with %b: %q", path, server, r)
		}
	}
	if len(got) != len(want) {
		t.Fatalf("%q: %d readings %q, want %d: %v", path, len(got), got, len(want), want)
	}
	for _, r := range got {
		if !want[r] {
			t.Fatalf("%q: %q is no server's", path, r)
		}
	}
}

// TestHabitsThatMatter checks that the habits which relevantHabits leaves out
// change nothing.
func TestHabitsThatMatter(t *testing.T) {
	setRapidChecks(t, 20_000)
	rapid.Check(t, func(t *rapid.T) {
		checkReadings(t, strings.Join(rapid.SliceOfN(rapid.SampledFrom(pathPieces), 0, 10).Draw(t, "path"), ""))
	})
}

func FuzzPathReadings(f *testing.F) {
	for _, seed := range []string{"", "/", "//", "/a", "/a/", "/a/../b", "/%2e%2e/a", "/a;b/c", "\\a", "/%", "/%4",
		"/\xff", "/a%2fb/", "/.a", "..;/x", "/a#b", "//h/x", "/a\t", "http://h/x", "/\u0097", "/%c2%97"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, sent string) {
		path, _, _ := strings.Cut(sent, "?")
		if cost := allocates(func() { appendReadings(nil, path) }); cost > 32<<10+512*len(path) {
			t.Errorf("%q: %d bytes are allocated", path, cost)
		}
		checkReadings(t, path)
	})
}

// TestReadingsAreBounded checks that reading a path of ten times the length
// takes about ten times as long. Both are measured in turn, and the least time
// counts, so that a busy machine does not matter.
func TestReadingsAreBounded(t *testing.T) {
	for _, piece := range pathPieces {
		short, long := "/"+strings.Repeat(piece, 6_000/len(piece)), "/"+strings.Repeat(piece, 60_000/len(piece))
		measure := func(path string) time.Duration {
			began := time.Now()
			appendReadings(nil, path)
			return time.Since(began)
		}
		a, b := time.Hour, time.Hour
		for range 50 {
			if a, b = min(a, measure(short)), min(b, measure(long)); b < 30*a {
				break
			}
		}
		if b >= 30*a {
			t.Errorf("%q: %v for 6 kB, %v for 60 kB", piece, a, b)
		}
	}
}

// TestPathVariants checks that every spelling of a path meets the limit of the
// plain path.
func TestPathVariants(t *testing.T) {
	c := parse(t, `limits: [{name: a, rate: 1/s, match: {hosts: [shop.example.com], paths: [/v1/orders]}}]`)
	for _, path := range []string{
		"/v1/orders", "//v1/orders", "/v1//orders", "/v1/orders/", "/v1/orders//", "/./v1/orders", "/v1/./orders",
		"/v1/orders/.",
		"/v1/x/../orders", "/../v1/orders", "/v1/orders/x/..", "/%76%31/orders", "/v1/%6frders", "/v1/%6Frders",
		"/v1%2forders",
		"/v1%2Forders", "/%2e/v1/orders", "/v1/%2e%2e/v1/orders", "/v1\\orders", "\\v1\\orders", "/v1%5corders",
		"/v1/orders;v=1",
		"/v1;a=b/orders", "/v1/orders;", "/v1/orders%3bv=1", "/v1/orders?", "/v1/orders?x=/../..", "/v1/orders/?x",
		"/v1/orders;a/?x",
	} {
		for _, host := range []string{"shop.example.com", "SHOP.example.COM", "shop.example.com:8080",
			"shop.example.com."} {
			if got := drawn(t, c, "GET "+host+"/x from 10.0.0.1"); got != "" {
				t.Fatal(got)
			}
			req := request(t, "GET "+host+"/")
			req.Path = path
			if d := c.Draw(req); len(d.Charges) != 1 {
				t.Errorf("%s%s slips past: %v", host, path, d)
			}
		}
	}
	for _, path := range []string{"/v1/order", "/v1/orders/x", "/v1/orders/%2e%2e", "/v1/%256frders", "/v1", "",
		"v1/orders2"} {
		req := request(t, "GET shop.example.com/")
		req.Path = path
		if d := c.Draw(req); len(d.Charges) != 0 {
			t.Errorf("%s is limited: %v", path, d)
		}
	}
}

func FuzzNormalPath(f *testing.F) {
	for _, seed := range []string{"", "/", "//", "/a", "/a/", "/a/../b", "/%2e%2e/a", "/a;b/c", "\\a", "/%", "/%4",
		"/%zz", "/\xff", "/a%2fb", "/.a", "/a/..", "..;/x"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, path string) {
		var got string
		if cost := allocates(func() { got = normalizePath(path) }); cost > 16<<10+16*len(path) {
			t.Errorf("%q: %d bytes are allocated", path, cost)
		}
		if got == "" || got[0] != '/' || got != "/" && strings.HasSuffix(got, "/") || len(got) > len(path)+1 {
			t.Fatalf("%q: %q", path, got)
		}
		for segment := range strings.SplitSeq(got[1:], "/") {
			if segment == "." || segment == ".." || segment == "" && got != "/" || strings.ContainsAny(segment, ";\\") {
				t.Fatalf("%q: %q has the segment %q", path, got, segment)
			}
		}
		// Only the spelling may change.
		if strings.HasPrefix(path, "/") {
			for _, same := range []string{path + "/", "/" + path, "/." + path, "/x/.." + path, path + "/."} {
				if normalizePath(same) != got {
					t.Fatalf("%q is %q, but %q is %q", path, got, same, normalizePath(same))
				}
			}
		}
		if !strings.Contains(got, "%") && normalizePath(got) != got {
			t.Fatalf("%q is normal, but is not its own normal form: %q", got, normalizePath(got))
		}
	})
}
