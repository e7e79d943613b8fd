package main

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
)

// spelling is one way to write the target and the host of a request.
type spelling struct {
	target    string // of the request line, as it is sent
	host      string // the Host header, as it is sent
	authority string // the host that the request is for: the target's, if it has one
	edits     string // the names of the edits that made it, for a report
}

func (s spelling) String() string { return fmt.Sprintf("%q host %q", s.target, s.host) }

// edit changes one thing about a text. It returns the text unchanged where it
// does not apply.
type edit struct {
	name  string
	apply func(*rand.Rand, string) string
}

// spellingPaths are the paths that spellings start from: of limited routes
// mostly, of exempt ones, and of others.
var spellingPaths = []string{
	"/v1/orders/7", "/v1/orders/7", "/v1/orders/abc", "/public/admin", "/public/admin", "/admin", "/admin/x", "/admin/x/y",
	"/healthz", "/static", "/static/a.css", "/static/a/b", "/", "/v1/orders", "/v1/orders/7/items", "/other/path",
}

// pathEdits are the ways in which a path can be written so that some server
// may read it as another, or as the same.
var pathEdits = []edit{
	{"encode a byte", atByte(percent)},
	{"encode a byte twice", atByte(func(r *rand.Rand, c byte) string { return "%25" + percent(r, c)[1:] })},
	{"change a letter's case", atByte(func(_ *rand.Rand, c byte) string { return swapCase(string(c)) })},
	{"change all letters' case", func(_ *rand.Rand, s string) string { return swapCase(s) }},
	{
		"another slash",
		atSlash(
			`%2F`, `%2f`, `%5C`, `%5c`, `\`, `%252F`, `%255C`, `%c0%af`, `%u002f`, `//`, `%2F/`, `/%2F`, `%2F%2F`, `/%5C`,
		),
	},
	{
		"a segment more",
		atSlash(
			`/./`, `/%2e/`, `/.%2f`, `/.\`, `/;/`, `/;a=b/`, `/.;/`, `/.;a/`, `/%3b/`, `/%00/`, `/%20/`, `/%09/`, `/%0a/`,
			`/.../`,
		),
	},
	{
		"a segment and back",
		atSlash(
			`/x/../`, `/x/%2e%2e/`, `/x/.%2E/`, `/x/..%2F`, `/x%2F../`, `/x%2f..%2f`, `/x/..\`, `/x\..\`, `/x/..%5c`, `/x/..;/`,
			`/x/..;a=b/`, `/x;a/../`, `/x/..%3b/`, `/x/%252e%252e/`, `/x%2Fy/../`, `/x%2Fy/../../`, `/x/..%00/`, `/x/..%20/`,
		),
	},
	{
		"an empty segment and back",
		atSlash(`//../`, `//x/../../`, `/%2F../`, `//..%2F`, `//%2e%2e/`, `/%5C../`, `/\../`, `/;/../`, `///../`, `/./../`),
	},
	{"a step up", atSlash(`/../`, `/..%2f`, `/%2e%2e/`, `/..\`, `/..;/`, `/..%5C`)},
	{
		"a path before it",
		before(
			`/static/..`, `/static/%2e%2e`, `/static/..;`, `/static%2F..`, `/static/x/../..`, `/static/a%2Fb/../..`,
			`/static/a%2Fb/../../..`, `/healthz/..`, `/healthz/..;a`, `/healthz%2f..`, `/x/y/../..`, `/v1/orders/..%2f..`,
			`/static//..`, `/static//../..`, `/static/..%2f..`, `/static\..`,
		),
	},
	{
		"something before it",
		before(
			`/`, `//`, `/.`, `/..`, `/%2e`, `/%2e%2e`, `/;`, `/;a=b`, `\`, `/\`, `%2F`, `/%2F`, `/%5C`, `/%00`, `.`, `*`,
			`/x:80`, `//api.example.com`, `http:`,
		),
	},
	{
		"something after a segment",
		afterSegment(
			`;`, `;a=b`, `;a=/x`, `%3B`, `%3Ba=b`, `.`, `..`, `%2e`, `%00`, `%0a`, `%0d`, `%09`, `%20`, `+`, `,`, `:`, `~`, `*`,
			`%`, `%2`, `%zz`, `%ff`, "\xff", "\xc3\xa9", `%c3%a9`, `%2500`, `%250a`, `%e2%80%a8`, `%c2%85`, `%ef%bc%8f`, `!`,
			`'`, `"`, `<`, `|`, `^`, `[`, `%1f`, `%7f`,
		),
	},
	{
		"something at its end",
		after(
			`/`, `//`, `///`, `/.`, `/./`, `/..`, `/../`, `/x/..`, `/x/../`, `/%2e`, `/%2e%2e`, `%2F`, `%2f/`, `/%2F`, `%5C`,
			`\`, `/\`, `%5C/`, `?`, `?a=b`, `?/../..`, `??`, `%3F`, `%3Fa=b`, `/%3f`, `#`, `#a`, `%23`, `%23a`, `/;`, `/;a=b`,
			`;`, `;/`, `;a/b`, `&a=b`, `.json`, `%2Ejson`, `/index.html`, `%0A`, `/%0A`, `%0D%0A`, `%0A%0A`, `%00`, `%00.css`,
			`%20`, `/%20`, `%09`, " ", `%252F`, `%253F`, `%3b`, `%2500`,
		),
	},
	{
		"another last segment",
		lastSegment(
			`a%2Fb`, `a%2fb`, `a%5Cb`, `a\b`, `a%252Fb`, `a%2F`, `%2Fa`, `%2F`, `%5C`, `a%2Fb/`, `a%5cb/`, `a%2Fb%2Fc`, `a%2F..`,
			`a%2F..%2Fb`, `a%2F.`, ``, `.`, `..`, `...`, `%2e`, `%2E%2e`, `a;b`, `a%3Bb`, `a;b/`, `;a`, `%20`, `a%00b`, `a+b`,
			`a%25b`, `%257`, `{id}`, `%7Bid%7D`, `*`, `**`, `a%0ab`, "\xff", `%ff`, `admin`, `healthz`, `:id`, `a?b/c`, `a%3Fb`,
			`a%3Fb%2Fc`, `a%23b`, `a%2Fb%3Fc`,
		),
	},
}

// spellingDomains are the hosts of limited and exempt routes, as sluice's
// config and Envoy's virtual hosts name them.
var spellingDomains = []string{"api.example.com", "*.wild.example.com", "[2001:db8::1]"}

// spellingHosts are the hosts that spellings start from.
var spellingHosts = []string{
	"api.example.com", "api.example.com", "api.example.com", "api.example.com", "x.wild.example.com", "[2001:db8::1]",
	"other.example.com",
}

// hostEdits are the same for a host.
var hostEdits = []edit{
	{"a port", after(`:`, `:80`, `:8080`, `:443`, `:0`, `:00080`, `:65535`, `:65536`, `:99999999999`)},
	{
		"what is no port",
		after(
			`:x`, `:-1`, `:+80`, `:80a`, `:a80`, `:80:80`, `::`, `::80`, `:80:`, `:x:80`, `:80:x`, `: 80`, `:0x50`, `:%38%30`,
			`:.`, `:*`, `:80.`,
		),
	},
	{"a dot", after(`.`, `..`, `.:80`, `.:`, `..:80`, `.:x`, `. `)},
	{"change a letter's case", atByte(func(_ *rand.Rand, c byte) string { return swapCase(string(c)) })},
	{"change all letters' case", func(_ *rand.Rand, s string) string { return swapCase(s) }},
	{"encode a byte", atByte(percent)},
	{"something before it", before(`user@`, `user:80@`, `.`, `x.`, ` `, `@`, `//`, `http://`, `[`, `x:`, `:`, "\t", `*.`)},
	{
		"something after it",
		after(
			`/`, `/x`, `,`, `,other.example.com`, ` `, "\t", `#`, `?x`, `@`, `@other.example.com`, `%00`, `%20`, `]`, `;a`, `\`,
			`_`, `%2e`, "\xff",
		),
	},
	{"brackets", func(_ *rand.Rand, s string) string { return "[" + s + "]" }},
	{"another writing of an address", func(r *rand.Rand, s string) string {
		return strings.Replace(
			s,
			"[2001:db8::1]",
			pick(r, `[2001:DB8::1]`, `[2001:db8:0:0::1]`, `[2001:0db8::0001]`, `[2001:db8:0:0:0:0:0:1]`, `[2001:DB8:0:0::1]`,
				`2001:db8::1`, `[2001:db8::1`, `[2001:db8::1%25lo]`, `[2001:db8::0.0.0.1]`),
			1,
		)
	}},
	{"a label more", before(`x.`, `x.y.`, `X.`)},
}

// generateSpellings returns n spellings, which are the same in each run.
func generateSpellings(n int) []spelling {
	r := rand.New(rand.NewPCG(15, 2))
	all := make([]spelling, n)
	for i := range all {
		var names []string
		change := func(text string, edits []edit, times int) string {
			for range times {
				e := edits[r.IntN(len(edits))]
				if changed := e.apply(r, text); changed != text {
					text = changed
					names = append(names, e.name)
				}
			}
			return text
		}
		path := change(pick(r, spellingPaths...), pathEdits, pick(r, 0, 1, 1, 1, 1, 2, 2, 2, 3, 4))
		paths := len(names)
		host := change(pick(r, spellingHosts[:4]...), hostEdits, 0)
		if r.IntN(3) == 0 {
			host = change(pick(r, spellingHosts...), hostEdits, pick(r, 0, 1, 1, 1, 2))
			for i := range names[paths:] {
				names[paths+i] = "host: " + names[paths+i]
			}
		}
		// Each edit is named once.
		slices.Sort(names)
		names = slices.Compact(names)
		s := spelling{target: path, host: host, authority: host}
		if r.IntN(12) == 0 {
			s.target = pick(r, "http://", "http://", "HTTP://", "https://", "http:", "ftp://") + host + path
			s.host = pick(r, host, "api.example.com", "other.example.com", "")
			names = append(names, "absolute form")
		}
		s.edits = strings.Join(names, ", ")
		all[i] = s
	}
	return all
}

func pick[T any](r *rand.Rand, of ...T) T { return of[r.IntN(len(of))] }

func percent(r *rand.Rand, c byte) string { return fmt.Sprintf(pick(r, "%%%02X", "%%%02x"), c) }

func swapCase(s string) string {
	return strings.Map(func(c rune) rune {
		switch {
		case 'a' <= c && c <= 'z':
			return c - 'a' + 'A'
		case 'A' <= c && c <= 'Z':
			return c - 'A' + 'a'
		}
		return c
	}, s)
}

// atByte replaces one byte that is no slash.
func atByte(replace func(*rand.Rand, byte) string) func(*rand.Rand, string) string {
	return func(r *rand.Rand, s string) string {
		var at []int
		for i := range len(s) {
			if s[i] != '/' {
				at = append(at, i)
			}
		}
		if len(at) == 0 {
			return s
		}
		i := pick(r, at...)
		return s[:i] + replace(r, s[i]) + s[i+1:]
	}
}

// atSlash replaces one slash.
func atSlash(with ...string) func(*rand.Rand, string) string {
	return func(r *rand.Rand, s string) string {
		n := strings.Count(s, "/")
		if n == 0 {
			return s
		}
		i := -1
		for range 1 + r.IntN(n) {
			i += 1 + strings.IndexByte(s[i+1:], '/')
		}
		return s[:i] + pick(r, with...) + s[i+1:]
	}
}

func afterSegment(texts ...string) func(*rand.Rand, string) string {
	return func(r *rand.Rand, s string) string {
		segments := strings.Split(s, "/")
		segments[r.IntN(len(segments))] += pick(r, texts...)
		return strings.Join(segments, "/")
	}
}

func lastSegment(texts ...string) func(*rand.Rand, string) string {
	return func(r *rand.Rand, s string) string {
		return s[:strings.LastIndexByte(s, '/')+1] + pick(r, texts...)
	}
}

func before(texts ...string) func(*rand.Rand, string) string {
	return func(r *rand.Rand, s string) string { return pick(r, texts...) + s }
}

func after(texts ...string) func(*rand.Rand, string) string {
	return func(r *rand.Rand, s string) string { return s + pick(r, texts...) }
}
