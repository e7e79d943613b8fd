package policy

import (
	"net/netip"
	"slices"
	"strings"
)

// covers reports whether m holds for every request for which other holds. It may
// be false although that is so, if several patterns of m together cover one of
// other.
func (m *match) covers(other *match) bool {
	if len(m.paths) > 0 && other.ignoreCase && !m.ignoreCase {
		return false
	}
	paths := other.paths
	if m.ignoreCase && !other.ignoreCase {
		paths = make([]pathPattern, len(other.paths))
		for i, p := range other.paths {
			paths[i] = p.folded()
		}
	}
	return coversAll(m.hosts, other.hosts, hostCovers) &&
		coversAll(m.methods, other.methods, methodMatches) &&
		coversAll(m.paths, paths, pathPattern.covers) &&
		coversAll(m.clients, other.clients, networkCovers) &&
		coversAll(m.principals, other.principals, principalPattern.covers)
}

func networkCovers(a, b netip.Prefix) bool { return a.Contains(b.Addr()) && a.Bits() <= b.Bits() }

// covers reports whether p matches every principal that other matches: it does if
// it matches other's text, as only its own asterisks can match an asterisk.
func (p principalPattern) covers(other principalPattern) bool {
	return p.matches(strings.Join(other, "*"))
}

// coversAll reports whether each of b's patterns is covered by one of a's. No
// patterns stand for everything.
func coversAll[P any](a, b []P, covers func(a, b P) bool) bool {
	if len(a) == 0 {
		return true
	}
	for _, pattern := range b {
		if !slices.ContainsFunc(a, func(p P) bool { return covers(p, pattern) }) {
			return false
		}
	}
	return len(b) > 0
}

// hostCovers is hostMatches for two patterns.
func hostCovers(a, b string) bool {
	if suffix, ok := strings.CutPrefix(b, "*"); ok && strings.HasPrefix(a, "*") {
		return strings.HasSuffix(suffix, a[1:])
	}
	return hostMatches(a, b)
}

// matchesAll reports whether the pattern is /**.
func (p pathPattern) matchesAll() bool { return p.rest && len(p.segments) == 0 }

// covers reports whether p matches every path that other matches.
func (p pathPattern) covers(other pathPattern) bool {
	if len(p.segments) > len(other.segments) || !p.rest && (other.rest || len(p.segments) != len(other.segments)) {
		return false
	}
	for i, segment := range p.segments {
		if segment != "" && segment != other.segments[i] {
			return false
		}
	}
	return true
}

// fixesPath reports whether the match leaves only the paths that it names.
func (m *match) fixesPath() bool {
	return len(m.paths) > 0 && !slices.ContainsFunc(m.paths, func(p pathPattern) bool {
		return p.rest || slices.Contains(p.segments, "")
	})
}

// excludes returns the field of the match that holds for no request with this
// value of an attribute, or "". The value is in canonical form.
func (m *match) excludes(attribute, value string) (field string) {
	excluded := false
	switch attribute {
	case "request.method":
		field, excluded = "methods", len(m.methods) > 0 && !anyOf(m.methods, value, methodMatches)
	case "request.host":
		field, excluded = "hosts", len(m.hosts) > 0 && !anyOf(m.hosts, value, hostMatches)
	case "source.principal":
		field, excluded = "principals", len(m.principals) > 0 && !anyOf(m.principals, value, principalPattern.matches)
	case "request.path", "request.url_path":
		path, _, _ := strings.Cut(value, "?")
		s := subject{paths: appendReadings(nil, path)}
		field, excluded = "paths", len(m.paths) > 0 &&
			!matchesReadings(m.paths, s.pathsFor(m, anyReading), anyReading, pathPattern.matches)
	case "client.ip", "client.network":
		p, err := netip.ParsePrefix(value)
		if err != nil {
			p, err = parsePrefix(value)
		}
		field, excluded = "clients", err == nil && len(m.clients) > 0 && !anyOf(m.clients, p, netip.Prefix.Overlaps)
	}
	if !excluded {
		return ""
	}
	return field
}
