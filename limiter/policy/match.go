package policy

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
)

// match is the match of a limit or an exemption. It holds if each field that is
// given holds; a field holds if any of its values matches.
type match struct {
	// hosts are in lower case. *.example.com matches any name with at least one
	// more label, and not example.com itself.
	hosts   []string
	methods []string
	paths   []pathPattern
	// ignoreCase compares paths without case; paths then hold folded patterns.
	ignoreCase bool
	clients    []netip.Prefix
	principals []principalPattern
}

// subject is a request as matches and expressions read it. It caches values
// that are derived from the request. It is not safe for concurrent use.
type subject struct {
	*Request
	// hosts are the readings of the host: see appendHosts.
	hosts []string
	sent  string // path as sent, without the query
	// paths are the readings of sent: see appendReadings.
	paths  []string
	query  string
	client netip.Addr // invalid if unknown
	// isTrusted is false if client is the peer's address only because the
	// header that should name the client does not. See clientIP.address.
	isTrusted bool

	// onePath and oneHost are the storage of paths and hosts, which have one
	// element for most requests.
	onePath, oneHost [1]string
	// foldedPaths caches folded. It is nil until it is needed.
	foldedPaths *[2][]string
	// found has the first values that were looked up.
	found []found
	// forKeys caches keySubject.
	forKeys *keySubject
	// ip and network cache clientIP and clientNetwork, which several limits read.
	// They are empty until they are needed.
	ip, network string
}

// clientIP returns the client's address, or "" if it is unknown.
func (s *subject) clientIP() string {
	if s.ip == "" {
		s.ip = addressText(s.client)
	}
	return s.ip
}

// clientNetwork returns the client's network, or "" if it is unknown.
func (s *subject) clientNetwork() string {
	if s.network == "" {
		s.network = network(s.client)
	}
	return s.network
}

func newSubject(req *Request, ids *clientIP) *subject {
	s := &subject{Request: req}
	s.hosts = appendHosts(s.oneHost[:0], req.Host)
	s.client, s.isTrusted = ids.address(req)
	s.sent, s.query, _ = strings.Cut(req.Path, "?")
	s.paths = appendReadings(s.onePath[:0], s.sent)
	return s
}

// host returns the host as expressions read it, or "" if it is unknown.
func (s *subject) host() string {
	if len(s.hosts) == 0 {
		return ""
	}
	return s.hosts[0]
}

// reading says which readings of a host and a path must match.
type reading uint8

const (
	anyReading  reading = iota // for limits: no spelling of a path avoids a limit
	allReadings                // for exemptions: no spelling becomes exempt
)

// pathsFor returns the paths that m's patterns are compared with.
func (s *subject) pathsFor(m *match, which reading) []string {
	if m.ignoreCase {
		return s.folded(which)
	}
	return s.paths
}

// folded returns the readings of the path, in the same order, without case.
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

// mismatch returns the name of the first field that does not hold, or "" if the
// match holds.
func (m *match) mismatch(s *subject, which reading) string {
	switch {
	case len(m.hosts) > 0 && !matchesReadings(m.hosts, s.hosts, which, hostMatches):
		return "hosts"
	case len(m.methods) > 0 && !anyOf(m.methods, s.Method, methodMatches):
		return "methods"
	case len(m.paths) > 0 && !matchesReadings(m.paths, s.pathsFor(m, which), which, pathPattern.matches):
		return "paths"
	}
	return m.callerMismatch(s, which)
}

// callerMismatch is mismatch for the fields that index.find does not look up:
// clients and principals. For an exemption, clients does not hold if the
// client's address is not trusted.
func (m *match) callerMismatch(s *subject, which reading) string {
	switch {
	case len(m.clients) > 0 && (!s.client.IsValid() || which == allReadings && !s.isTrusted ||
		!anyOf(m.clients, s.client, netip.Prefix.Contains)):
		return "clients"
	case len(m.principals) > 0 && !anyOf(m.principals, s.Source.Principal, principalPattern.matches):
		return "principals"
	}
	return ""
}

// matchesReadings reports whether any reading, or each of them, matches one of
// the patterns.
func matchesReadings[P any](patterns []P, readings []string, which reading, matches func(P, string) bool) bool {
	for _, reading := range readings {
		if anyOf(patterns, reading, matches) == (which == anyReading) {
			return which == anyReading
		}
	}
	return which == allReadings
}

// matchesAll reports whether the match holds for every request.
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
			a := &advice{what: fmt.Sprintf("invalid method %q", s),
				want: "want an upper-case name such as GET, which includes HEAD, or POST"}
			if upper := strings.ToUpper(s); methodPattern.MatchString(upper) {
				a.mend = "write " + upper
			}
			return "", a
		}
	}
	if s == "" {
		return "", errors.New("empty method; want an upper-case name such as GET, which includes HEAD, or POST")
	}
	return s, nil
}

// parsePrefix parses a network, or an address, which becomes a network of one.
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

// principalPattern is a SPIFFE ID or another URI, in which * matches any text.
// It holds the literal texts between the asterisks.
type principalPattern []string

func parsePrincipal(s string) (principalPattern, error) {
	if !strings.Contains(s, "://") {
		return nil, fmt.Errorf("invalid principal %q; want a URI such as spiffe://cluster.local/ns/web/sa/shop, with "+
			"* for any text", s)
	}
	return strings.Split(s, "*"), nil
}

func (p principalPattern) matches(principal string) bool {
	if len(p) == 1 {
		return principal == p[0]
	}
	first, last := p[0], p[len(p)-1]
	if len(principal) < len(first)+len(last) || !strings.HasPrefix(principal, first) ||
		!strings.HasSuffix(principal, last) {
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
