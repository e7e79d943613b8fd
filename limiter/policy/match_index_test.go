package policy

import (
	"flag"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

// setRapidChecks sets the number of rapid's checks for this test.
func setRapidChecks(t *testing.T, n int) {
	t.Helper()
	f := flag.Lookup("rapid.checks")
	before := f.Value.String()
	if err := f.Value.Set(strconv.Itoa(n)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Value.Set(before) })
}

// TestIndex compares the index with a look at each match in turn.
func TestIndex(t *testing.T) {
	of := func(all ...string) *rapid.Generator[[]string] {
		return rapid.SliceOfNDistinct(rapid.SampledFrom(all), 0, 3, rapid.ID)
	}
	hosts := of("a.com", "b.a.com", "*.a.com", "*.com", "*.b.a.com", "1.2.3.4", "::1")
	methods := of("GET", "HEAD", "POST")
	paths := of("/", "/**", "/a", "/a/b", "/a/{x}", "/{x}/b", "/{x}/{y}", "/a/**", "/{x}/**", "/a/{x}/c/**", "/a/b/c/d",
		"/A/b", "/K/{x}")
	ignoreCase := rapid.Bool()
	clients := of("10.0.0.0/8", "203.0.113.7", "::/0")
	matches := rapid.Custom(func(t *rapid.T) *match {
		m := &match{}
		add := func(text string, err error) string {
			if err != nil {
				t.Fatal(err)
			}
			return text
		}
		for _, s := range hosts.Draw(t, "hosts") {
			m.hosts = append(m.hosts, add(parseHost(s)))
		}
		m.methods = methods.Draw(t, "methods")
		for _, s := range paths.Draw(t, "paths") {
			p, err := parsePath(s)
			add("", err)
			m.paths = append(m.paths, p)
		}
		if m.ignoreCase = ignoreCase.Draw(t, "ignore_case"); m.ignoreCase {
			for i, p := range m.paths {
				m.paths[i] = p.folded()
			}
		}
		for _, s := range clients.Draw(t, "clients") {
			p, err := parsePrefix(s)
			add("", err)
			m.clients = append(m.clients, p)
		}
		return m
	})
	var ids clientIP
	found := 0
	setRapidChecks(t, 3000)
	rapid.Check(t, func(t *rapid.T) {
		all := rapid.SliceOfN(matches, 0, 150).Draw(t, "matches")
		x := newIndex(all)
		for range 5 {
			s := newSubject(&Request{
				Method: rapid.SampledFrom([]string{"GET", "HEAD", "POST", "PUT", ""}).Draw(t, "method"),
				Host: rapid.SampledFrom([]string{"a.com", "A.com:80", "b.a.com", "c.b.a.com", ".a.com", "..a.com",
					"com", "[::1]:80", "", "x.", ".", "1.2.3.4", "a.com:", "a.com:x", "x:b.a.com", "x:y.a.com:80",
					"a.com..", "[0:0::1]:x"}).Draw(t, "host"),
				Path: strings.Join(rapid.SliceOfN(rapid.SampledFrom([]string{"/", "a", "b", "c", "/a", "/b", "..",
					"%2f", "%61", ";x", "?q", "d", "A", "/B", "%41", "k", "\u212a"}), 0, 9).Draw(t, "path"), ""),
				Source: Peer{Address: rapid.SampledFrom([]string{"10.1.1.1", "203.0.113.7", "::2", ""}).Draw(t,
					"source")},
			}, &ids)
			for _, which := range []reading{anyReading, allReadings} {
				var want []int
				for i, m := range all {
					if m.mismatch(s, which) == "" {
						want = append(want, i)
					}
				}
				got := slices.Collect(x.find(s, which))
				if !slices.Equal(got, want) {
					t.Fatalf("%s %q %q, reading %d: found %v, want %v", s.Method, s.Host, s.Path, which, got, want)
				}
				found += len(got)
			}
		}
	})
	if found < 10_000 {
		t.Errorf("only %d matches were found in all: the test tests too little", found)
	}
}

// TestIndexIsBounded checks that a host with thousands of dots, or a path with
// thousands of segments, is looked up quickly.
func TestIndexIsBounded(t *testing.T) {
	x := newIndex([]*match{{hosts: []string{"*.example.com"}},
		{paths: []pathPattern{{segments: []string{"a", "", "b"}, rest: true}}}})
	s := newSubject(&Request{Host: strings.Repeat(".", 60_000) + "a.example.com",
		Path: strings.Repeat("/a", 30_000) + strings.Repeat("/..", 100)}, &clientIP{})
	if got := testing.Benchmark(func(b *testing.B) {
		for b.Loop() {
			if n := len(slices.Collect(x.find(s, anyReading))); n != 1 {
				b.Fatal(n)
			}
		}
	}).NsPerOp(); got > 100_000 {
		t.Errorf("%d ns", got)
	}
}

// manyLimits returns a config of n limits of which three apply to benchRequest:
// the n-th of everything, hosts, paths and methods.
func manyLimits(n int) string {
	var b strings.Builder
	b.WriteString("limits:\n")
	for i := range n - 3 {
		switch i % 4 {
		case 0:
			fmt.Fprintf(&b, "  - {name: l%d, rate: 1/s, match: {hosts: [h%d.example.com], paths: [\"/v1/**\"]}}\n", i,
				i)
		case 1:
			fmt.Fprintf(&b,
				"  - {name: l%d, rate: 1/s, match: {hosts: [shop.example.com], paths: [\"/v1/thing-%d/{id}\", "+
					"\"/v2/thing-%d\"]}}\n", i, i, i)
		case 2:
			fmt.Fprintf(&b, "  - {name: l%d, rate: 1/s, match: {hosts: [\"*.h%d.example.com\"], methods: [GET]}}\n", i,
				i)
		case 3:
			fmt.Fprintf(&b,
				"  - {name: l%d, rate: 1/s, match: {paths: [\"/{v}/thing-%d/**\"], methods: [POST, PUT]}, key: "+
					"'request.headers[\"x-api-key\"]'}\n", i, i)
		}
	}
	b.WriteString(`  - {name: a, rate: 1/s, key: client.ip}
  - {name: b, rate: 1/s, key: 'request.headers["x-api-key"]'}
  - {name: c, rate: 1/s, match: {hosts: [shop.example.com], paths: ["/v1/orders/{id}"], methods: [GET]}}
`)
	return b.String()
}

const benchRequest = "GET shop.example.com/v1/orders/7?page=2 with x-api-key=k"

// BenchmarkDraw measures a request before the store is asked:
//
//	go test ./limiter/policy -run '^$' -bench Draw
func BenchmarkDraw(b *testing.B) {
	for _, config := range []struct{ name, text, want string }{
		{"by-network", "limits: [{name: a, rate: 1/s, key: client.network}]", "a =11.203.0.113.7"},
		{"by-header", `limits: [{name: a, rate: 1/s, key: 'request.headers["x-api-key"]'}]`, "a #(k)"},
		{"by-cel", `limits: [{name: a, rate: 1/s, key: 'request.headers["x-api-key"].upperAscii()'}]`, "a #(K)"},
		{"when", `limits: [{name: a, rate: 1/s, when: 'request.headers["x-beta"] != "on"'}]`, "a -"},
		{"cost", `limits: [{name: a, rate: 9/s, cost: 'request.method == "GET" ? 5 : 1'}]`, "a - costs 5"},
		{"3-of-10", manyLimits(10), "a =11.203.0.113.7, b #(k), c -"},
		{"3-of-1000", manyLimits(1000), "a =11.203.0.113.7, b #(k), c -"},
		{"3-of-10000", manyLimits(10_000), "a =11.203.0.113.7, b #(k), c -"},
	} {
		b.Run(config.name, func(b *testing.B) {
			c := parse(b, config.text)
			if got := drawn(b, c, benchRequest); got != withHashes(config.want) {
				b.Fatal(got)
			}
			req := request(b, benchRequest)
			b.ReportAllocs()
			for b.Loop() {
				c.Draw(req)
			}
		})
	}
}

// TestDrawGrowsLittle checks that three limits of 1,000 apply in at most 1.5
// times the time of three of 10, and with few allocations. Both are measured in
// turn, so that a busy machine slows both.
func TestDrawGrowsLittle(t *testing.T) {
	if testing.Short() {
		t.Skip("measures")
	}
	few, many := parse(t, manyLimits(10)), parse(t, manyLimits(1000))
	req := request(t, benchRequest)
	if got := testing.AllocsPerRun(100, func() { many.Draw(req) }); got > 10+raceAllocations {
		t.Errorf("%v allocations", got)
	}
	measure := func(c *Config) int64 {
		return testing.Benchmark(func(b *testing.B) {
			for b.Loop() {
				c.Draw(req)
			}
		}).NsPerOp()
	}
	var ratio float64
	for range 5 {
		a, b := measure(few), measure(many)
		if ratio = float64(b) / float64(a); ratio <= 1.5 {
			t.Logf("10 limits %d ns, 1,000 limits %d ns", a, b)
			return
		}
	}
	t.Errorf("1,000 limits take %.2f times as long as 10", ratio)
}
