package policy

import (
	"fmt"
	"net/netip"
	"regexp"
	"strings"
)

// match says which requests a limit applies to: all that is given must hold, and within one, any.
type match struct {
	hosts      []string // in lower case; *.example.com is one label or more before it
	methods    []string
	paths      []pathPattern
	clients    []netip.Prefix
	principals []principalPattern
}

// subject is a request as matches and expressions see it: what is worked out from it is worked out once. It is for one goroutine.
type subject struct {
	*Request
	host      string   // normalised
	exactHost string   // the same, but for a final dot, which Envoy's own matching keeps
	sent      string   // the path without its query
	readings  []string // of the path: as sent, and those that differ from that
	query     string
	client    netip.Addr // invalid where it is unknown
	isSure    bool       // the client's address is not the peer's for want of a better one

	few [3]string

	forKeys *keySubject // made where a key wants it
}

func newSubject(r *Request, ids *clientIP) *subject {
	s := &subject{Request: r, exactHost: normalHost(r.Host)}
	s.host = strings.TrimSuffix(s.exactHost, ".")
	s.client, s.isSure = ids.of(r)
	s.sent, s.query, _ = strings.Cut(r.Path, "?")
	s.readings = appendReadings(s.few[:0], s.sent)
	return s
}

// reading says which of a path's readings have to match.
type reading uint8

const (
	anyReading  reading = iota // a limit's: no spelling slips past it
	allReadings                // an exemption's: no spelling slips into it
)

// hostOf is the host that a match sees. An exemption's is the one that Envoy's own routes see.
func (s *subject) hostOf(r reading) string {
	if r == allReadings {
		return s.exactHost
	}
	return s.host
}

// mismatch is the first of the match's fields that does not hold, or empty.
func (m *match) mismatch(s *subject, r reading) string {
	switch {
	case len(m.hosts) > 0 && !anyOf(m.hosts, s.hostOf(r), hostMatches):
		return "hosts"
	case len(m.methods) > 0 && !anyOf(m.methods, s.Method, methodMatches):
		return "methods"
	case len(m.paths) > 0 && !m.path(s, r):
		return "paths"
	}
	return m.whoMismatches(s, r)
}

// whoMismatches is mismatch for what an index does not answer. Nobody is exempt for the address of a peer that should have said another.
func (m *match) whoMismatches(s *subject, r reading) string {
	switch {
	case len(m.clients) > 0 && (!s.client.IsValid() || r == allReadings && !s.isSure || !anyOf(m.clients, s.client, netip.Prefix.Contains)):
		return "clients"
	case len(m.principals) > 0 && !anyOf(m.principals, s.Source.Principal, principalPattern.matches):
		return "principals"
	}
	return ""
}

func (m *match) path(s *subject, r reading) bool {
	for _, path := range s.readings {
		if anyOf(m.paths, path, pathPattern.matches) == (r == anyReading) {
			return r == anyReading
		}
	}
	return r == allReadings
}

// isEmpty reports whether the match holds for every request.
func (m *match) isEmpty() bool {
	return len(m.hosts)+len(m.methods)+len(m.paths)+len(m.clients)+len(m.principals) == 0
}

func anyOf[P, V any](patterns []P, v V, matches func(P, V) bool) bool {
	for _, p := range patterns {
		if matches(p, v) {
			return true
		}
	}
	return false
}

func hostMatches(pattern, host string) bool {
	if suffix, ok := strings.CutPrefix(pattern, "*"); ok {
		return len(host) > len(suffix) && strings.HasSuffix(host, suffix)
	}
	return pattern == host
}

func methodMatches(pattern, method string) bool {
	return pattern == method || pattern == "GET" && method == "HEAD"
}

// normalHost is a host in lower case, without its port. What is no host stays what it is.
func normalHost(host string) string {
	if i := strings.LastIndexByte(host, ':'); i >= 0 && isDigits(host[i+1:]) && (strings.IndexByte(host, ':') == i || host[i-1] == ']') {
		host = host[:i]
	}
	if inner, ok := strings.CutPrefix(host, "["); ok {
		if a, err := netip.ParseAddr(strings.TrimSuffix(inner, "]")); err == nil && a.Is6() && strings.HasSuffix(inner, "]") {
			host = inner[:len(inner)-1]
		}
	}
	for i := 0; i < len(host); i++ {
		if c := host[i]; 'A' <= c && c <= 'Z' {
			return lowerASCII(host)
		}
	}
	return host
}

// lowerASCII lowers nothing else: hosts that differ in other letters are others.
func lowerASCII(s string) string {
	b := []byte(s)
	for i, c := range b {
		if 'A' <= c && c <= 'Z' {
			b[i] = c + 'a' - 'A'
		}
	}
	return string(b)
}

func isDigits(s string) bool {
	for i := 0; i < len(s); i++ {
		if s[i] < '0' || s[i] > '9' {
			return false
		}
	}
	return s != ""
}

var hostOfName = regexp.MustCompile(`^[A-Za-z0-9_]([A-Za-z0-9._-]*[A-Za-z0-9_])?$`)

func parseHost(s string) (string, error) {
	const allowed = "allowed are names such as api.example.com and *.example.com, and addresses, without a port"
	name, isWild := strings.CutPrefix(s, "*.")
	if a, err := netip.ParseAddr(strings.TrimSuffix(strings.TrimPrefix(s, "["), "]")); err == nil {
		return a.String(), nil
	}
	if !hostOfName.MatchString(name) || strings.Contains(name, "..") {
		return "", fmt.Errorf("%q is no host; %s", s, allowed)
	}
	if isWild {
		return "*." + lowerASCII(name), nil
	}
	return lowerASCII(name), nil
}

func parseMethod(s string) (string, error) {
	for i := 0; i < len(s); i++ {
		if c := s[i]; (c < 'A' || c > 'Z') && c != '-' && c != '_' {
			return "", fmt.Errorf("%q is no method; allowed are upper-case names such as GET, which includes HEAD, and POST", s)
		}
	}
	if s == "" {
		return "", fmt.Errorf("empty; allowed are upper-case names such as GET, which includes HEAD, and POST")
	}
	return s, nil
}

// parsePrefix reads a network, or an address as the network of it alone.
func parsePrefix(s string) (netip.Prefix, error) {
	const allowed = "allowed are networks such as 10.0.0.0/8 and 2001:db8::/32, and addresses"
	p, err := netip.ParsePrefix(s)
	if err != nil {
		a, err := netip.ParseAddr(s)
		if err != nil || a.Zone() != "" {
			return netip.Prefix{}, fmt.Errorf("%q is no network; %s", s, allowed)
		}
		a = a.Unmap()
		return netip.PrefixFrom(a, a.BitLen()), nil
	}
	if p.Addr().Is4In6() {
		return netip.Prefix{}, fmt.Errorf("%q is IPv4 in IPv6; write the IPv4 network", s)
	}
	if p.Masked() != p {
		return netip.Prefix{}, fmt.Errorf("%q has bits outside of its mask; write %v", s, p.Masked())
	}
	return p, nil
}

// principalPattern is a SPIFFE ID or another URI; a * in it is any text.
type principalPattern []string // what stands between the *s

func parsePrincipal(s string) (principalPattern, error) {
	if !strings.Contains(s, "://") {
		return nil, fmt.Errorf("%q is no principal; allowed are URIs such as spiffe://cluster.local/ns/web/sa/shop, with * for any text", s)
	}
	return strings.Split(s, "*"), nil
}

func (p principalPattern) matches(principal string) bool {
	if len(p) == 1 {
		return principal == p[0]
	}
	first, last := p[0], p[len(p)-1]
	if len(principal) < len(first)+len(last) || !strings.HasPrefix(principal, first) || !strings.HasSuffix(principal, last) {
		return false
	}
	between := principal[len(first) : len(principal)-len(last)]
	for _, part := range p[1 : len(p)-1] {
		i := strings.Index(between, part)
		if i < 0 {
			return false
		}
		between = between[i+len(part):]
	}
	return true
}
