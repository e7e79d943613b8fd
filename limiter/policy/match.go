package policy

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
)

// match says which requests a limit applies to: all that is given must hold, and within one, any.
type match struct {
	hosts      []string // in lower case; *.example.com is one label or more before it
	methods    []string
	paths      []pathPattern
	ignoreCase bool // of paths, whose patterns are then folded
	clients    []netip.Prefix
	principals []principalPattern
}

// subject is a request as matches and expressions see it: what is worked out from it is worked out once. It is for one goroutine.
type subject struct {
	*Request
	hosts     []string // the host's readings: as expressions see it, and those that differ from that
	sent      string   // the path without its query
	paths     []string // the path's readings: as sent, and those that differ from that
	query     string
	client    netip.Addr // invalid where it is unknown
	isTrusted bool       // the client's address is not the peer's for want of a better one

	onePath, oneHost [1]string    // what paths and hosts are in, where there is one reading, as of most requests
	foldedPaths      *[2][]string // see folded; nil until it is asked
	forKeys          *keySubject  // made where a key wants it
}

func newSubject(req *Request, ids *clientIP) *subject {
	s := &subject{Request: req}
	s.hosts = appendHosts(s.oneHost[:0], req.Host)
	s.client, s.isTrusted = ids.address(req)
	s.sent, s.query, _ = strings.Cut(req.Path, "?")
	s.paths = appendReadings(s.onePath[:0], s.sent)
	return s
}

// host is the request's host as expressions see it; empty where none is known.
func (s *subject) host() string {
	if len(s.hosts) == 0 {
		return ""
	}
	return s.hosts[0]
}

// reading says which readings of a host and of a path have to match.
type reading uint8

const (
	anyReading  reading = iota // a limit's: no spelling slips past it
	allReadings                // an exemption's: no spelling slips into it
)

// pathsFor is what a match's patterns are compared with.
func (s *subject) pathsFor(m *match, which reading) []string {
	if m.ignoreCase {
		return s.folded(which)
	}
	return s.paths
}

// folded are the path's readings without case, each in its place. They are made when they are first asked for.
func (s *subject) folded(which reading) []string {
	if s.foldedPaths == nil {
		s.foldedPaths = new([2][]string)
	}
	if s.foldedPaths[which] == nil {
		folded := make([]string, len(s.paths))
		for i, path := range s.paths {
			if which == allReadings {
				folded[i] = lowerASCII(path)
			} else {
				folded[i] = foldPath(path)
			}
		}
		s.foldedPaths[which] = folded
	}
	return s.foldedPaths[which]
}

// mismatch is the first of the match's fields that does not hold, or empty.
func (m *match) mismatch(s *subject, which reading) string {
	switch {
	case len(m.hosts) > 0 && !matchesReadings(m.hosts, s.hosts, which, hostMatches):
		return "hosts"
	case len(m.methods) > 0 && !anyOf(m.methods, s.Method, methodMatches):
		return "methods"
	case len(m.paths) > 0 && !matchesReadings(m.paths, s.pathsFor(m, which), which, pathPattern.matches):
		return "paths"
	}
	return m.whoMismatches(s, which)
}

// whoMismatches is mismatch for what an index does not answer. Nobody is exempt for the address of a peer that should have said another.
func (m *match) whoMismatches(s *subject, which reading) string {
	switch {
	case len(m.clients) > 0 && (!s.client.IsValid() || which == allReadings && !s.isTrusted || !anyOf(m.clients, s.client, netip.Prefix.Contains)):
		return "clients"
	case len(m.principals) > 0 && !anyOf(m.principals, s.Source.Principal, principalPattern.matches):
		return "principals"
	}
	return ""
}

// matchesReadings reports whether any reading is one of the patterns', or all are.
func matchesReadings[P any](patterns []P, readings []string, which reading, matches func(P, string) bool) bool {
	for _, reading := range readings {
		if anyOf(patterns, reading, matches) == (which == anyReading) {
			return which == anyReading
		}
	}
	return which == allReadings
}

// isEmpty reports whether the match holds for every request.
func (m *match) matchesAll() bool {
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

func methodMatches(pattern, method string) bool {
	return pattern == method || pattern == "GET" && method == "HEAD"
}

func parseMethod(s string) (string, error) {
	for i := 0; i < len(s); i++ {
		if c := s[i]; (c < 'A' || c > 'Z') && c != '-' && c != '_' {
			return "", fmt.Errorf("invalid method %q; want an upper-case name such as GET, which includes HEAD, or POST", s)
		}
	}
	if s == "" {
		return "", errors.New("empty method; want an upper-case name such as GET, which includes HEAD, or POST")
	}
	return s, nil
}

// parsePrefix reads a network, or an address as the network of it alone.
func parsePrefix(s string) (netip.Prefix, error) {
	const want = "want one such as 10.0.0.0/8 or 2001:db8::/32, or an address"
	p, err := netip.ParsePrefix(s)
	if err != nil {
		a, err := netip.ParseAddr(s)
		if err != nil || a.Zone() != "" {
			return netip.Prefix{}, fmt.Errorf("invalid network %q; %s", s, want)
		}
		a = a.Unmap()
		return netip.PrefixFrom(a, a.BitLen()), nil
	}
	if p.Addr().Is4In6() {
		return netip.Prefix{}, fmt.Errorf("%q is an IPv4-mapped network; write it as IPv4", s)
	}
	if p.Masked() != p {
		return netip.Prefix{}, fmt.Errorf("%q has bits outside its mask; write %v", s, p.Masked())
	}
	return p, nil
}

// principalPattern is a SPIFFE ID or another URI; a * in it is any text.
type principalPattern []string // what stands between the *s

func parsePrincipal(s string) (principalPattern, error) {
	if !strings.Contains(s, "://") {
		return nil, fmt.Errorf("invalid principal %q; want a URI such as spiffe://cluster.local/ns/web/sa/shop, with * for any text", s)
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
