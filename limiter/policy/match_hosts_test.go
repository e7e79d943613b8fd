package policy

import (
	"strings"
	"testing"
)

// TestHosts checks how expressions read a host.
func TestHosts(t *testing.T) {
	for sent, want := range map[string]string{
		"":                        "",
		"api.example.com":         "api.example.com",
		"API.Example.com":         "api.example.com",
		"api.example.com:8443":    "api.example.com",
		"api.example.com:":        "api.example.com",
		"api.example.com:x":       "api.example.com",
		"api.example.com:-1":      "api.example.com",
		"api.example.com:80a":     "api.example.com",
		"api.example.com:80:80":   "api.example.com",
		"api.example.com::":       "api.example.com",
		"api.example.com.":        "api.example.com",
		"api.example.com..":       "api.example.com",
		"api.example.com.:80":     "api.example.com",
		"api.example.com..:80.":   "api.example.com",
		":80":                     "",
		".":                       "",
		"10.0.0.1:80":             "10.0.0.1",
		"10.0.0.1.":               "10.0.0.1",
		"10.0.0.1:80:80":          "10.0.0.1",
		"2001:db8::1":             "2001:db8::1",
		"2001:DB8:0:0::1":         "2001:db8::1",
		"2001:db8::1:":            "2001:db8::1",
		"2001:db8::1:x":           "2001:db8::1",
		"[2001:DB8:0:0::1]":       "2001:db8::1",
		"[2001:db8::1]:80":        "2001:db8::1",
		"[2001:db8::1]:":          "2001:db8::1",
		"[2001:db8::1]:80:80":     "2001:db8::1",
		"[2001:db8::1].":          "2001:db8::1",
		"[2001:db8::1].:80":       "2001:db8::1",
		"[fe80::1%25eth0]:80":     "fe80::1",
		"[::ffff:10.0.0.1]:80":    "10.0.0.1",
		"[::FFFF:0a00:1]":         "10.0.0.1",
		"[api.example.com]:80":    "[api.example.com]",
		"[2001:db8::1]x":          "[2001:db8::1]x",
		"x]:80":                   "x]",
		"[":                       "[",
		"\u212aelvin.example.com": "\u212aelvin.example.com",
	} {
		s := newSubject(&Request{Host: sent}, &clientIP{})
		if got := s.host(); got != want {
			t.Errorf("%q: %q, want %q", sent, got, want)
		}
		if again := newSubject(&Request{Host: want}, &clientIP{}).host(); again != want {
			t.Errorf("%q is normal, and becomes %q", want, again)
		}
	}
}

// TestHostVariants checks that the limit of a host applies whatever follows a
// colon, and however an address is written.
func TestHostVariants(t *testing.T) {
	c := parse(t, `
limits:
  - {name: a, rate: 1/s, match: {hosts: [api.example.com]}}
  - {name: b, rate: 1/s, match: {hosts: ["*.example.com"]}}
  - {name: c, rate: 1/s, match: {hosts: ["2001:DB8:0::1", "[::ffff:10.0.0.1]"]}}
`)
	for want, hosts := range map[string][]string{
		"a -, b -": {
			"api.example.com", "api.example.com:", "api.example.com:x", "api.example.com:-1", "api.example.com:80a",
			"api.example.com:80:80",
			"API.example.com..:80", "[api.example.com]:", "[API.example.com]:80", "[api.example.com]:+80",
		},
		// A router may cut at the first colon, at the last, or at none. Some of
		// them route these hosts to *.example.com.
		"b -": {"x.api.example.com:", "x.api.example.com:80:80", "x.example.com.:y", "x:y.example.com",
			"x:y.example.com:80", "x:80.example.com:y"},
		"c -": {
			"[2001:DB8:0:0::1]", "[2001:db8::1]:", "[2001:db8::1]:80:80", "2001:db8::1", "10.0.0.1", "10.0.0.1:",
			"[::ffff:a00:1]:x",
		},
		"": {"example.com:", "api.example.org", "[api.example.com]", "apiexample.com", "[2001:db8::2]", ":80"},
	} {
		for _, host := range hosts {
			if got := drawn(t, c, "GET "+host+"/"); got != want {
				t.Errorf("%s: %q, want %q", host, got, want)
			}
		}
	}
}

// TestExemptHosts checks that a host is exempt only in all its readings:
// Envoy's own routes take others for a different host.
func TestExemptHosts(t *testing.T) {
	c := parse(t,
		`{exempt: [{match: {hosts: [free.example.com, "*.free.example.com", "2001:db8::1"]}}], limits: [{name: a, rate: `+
			`1/s}]}`)
	for host, want := range map[string]string{
		"free.example.com":        "exempt",
		"FREE.example.com:80":     "exempt",
		"x.free.example.com:80":   "exempt",
		"[2001:db8::1]":           "exempt",
		"[2001:DB8::1]:80":        "exempt",
		"free.example.com:":       "a -",
		"free.example.com:x":      "a -",
		"free.example.com:80:80":  "a -",
		"free.example.com.":       "a -",
		"[2001:db8:0::1]":         "a -",
		"[2001:db8::1]:x":         "a -",
		"x:y.free.example.com":    "a -",
		"x:y.free.example.com:80": "a -",
		"x.free.example.com:":     "a -",
		// Ports that Envoy does not strip, and that servers reject.
		"free.example.com:65535":       "exempt",
		"free.example.com:65536":       "a -",
		"free.example.com:99999999999": "a -",
		"free.example.com:00080":       "a -",
		"free.example.com:0":           "a -",
		"free.example.com:+80":         "a -",
		"@x.free.example.com":          "a -",
		"user@x.free.example.com:80":   "a -",
		"*.free.example.com":           "a -",
		"%78.free.example.com":         "a -",
		"x..free.example.com":          "a -",
		".free.example.com":            "a -",
		"x_1.y-2.free.example.com":     "exempt",
	} {
		if got := drawn(t, c, "GET "+host+"/"); got != want {
			t.Errorf("%s: %q, want %q", host, got, want)
		}
	}
}

// TestHostAsKey checks that a port does not make a second bucket.
func TestHostAsKey(t *testing.T) {
	c := parse(t, "limits: [{name: a, rate: 1/s, key: request.host}]")
	for _, host := range []string{"h", "H", "h:", "h:80", "h:80:80", "h:x", "h.", "h..:"} {
		if got := drawn(t, c, "GET "+host+"/"); got != "a =1.h" {
			t.Errorf("%s: %s", host, got)
		}
	}
}

func FuzzHosts(f *testing.F) {
	for _, seed := range []string{"", "a.b", "A:80", "[::1]:80", "::1", "[", "]:", "a:b:c", ".", "[::ffff:1.2.3.4].",
		"a.:1", " .:", "[!]:80:a"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, sent string) {
		var s *subject
		if cost := allocates(func() { s = newSubject(&Request{Host: sent}, &clientIP{}) }); cost > 16<<10+32*len(sent) {
			t.Errorf("%q: %d bytes are allocated", sent, cost)
		}
		// Four ways to read a host, and the empty reading of an invalid one.
		if len(s.hosts) < 1 || len(s.hosts) > 5 {
			t.Fatalf("%q: %q", sent, s.hosts)
		}
		host := s.host()
		if strings.HasSuffix(host, ".") || strings.ContainsAny(host, "ABCDEFGHIJKLMNOPQRSTUVWXYZ") {
			t.Fatalf("%q: %q", sent, host)
		}
		if !strings.ContainsAny(sent, "[]:") {
			for _, same := range []string{sent + ":", sent + ":80", sent + ":80:80", sent + ":x", sent + "."} {
				if got := newSubject(&Request{Host: same}, &clientIP{}).host(); got != host {
					t.Fatalf("%q is %q, but %q is %q", sent, host, same, got)
				}
			}
		}
	})
}
