package policy

import (
	"fmt"
	"net/netip"
	"regexp"
	"strconv"
	"strings"
)

// appendHosts appends the readings of a request's host, in lower case. A host
// has several readings if Envoy and the servers behind it may disagree about
// its port: some cut at the first colon, some at the last, some only if digits
// follow. The first reading is normalHost, which expressions read. Most hosts
// have a single reading, for which nothing is allocated.
func appendHosts(readings []string, sent string) []string {
	if isNormalHost(sent) {
		return append(readings, sent)
	}
	lower := lowerASCII(sent)
	for _, host := range [...]string{normalHost(lower), withoutBrackets(withoutPort(lower)),
		withoutBrackets(beforeLastColon(lower)), inBrackets(lower)} {
		known := false
		for _, other := range readings {
			known = known || other == host
		}
		if !known {
			readings = append(readings, host)
		}
	}
	if !isName(readings[0]) && !strings.Contains(readings[0], ":") {
		// A server may read an invalid host as empty. The empty reading matches
		// no pattern, so that no exemption by host holds.
		readings = append(readings, "")
	}
	return readings
}

// isNormalHost reports whether a host is known to have no other reading.
func isNormalHost(host string) bool {
	return host == "" || isName(host)
}

// isName reports whether a host consists of labels of a-z, 0-9, - and _ with
// dots between them, as lower-case names and IPv4 addresses do.
func isName(host string) bool {
	dot := true // at the start of a label
	for i := 0; i < len(host); i++ {
		switch c := host[i]; {
		case 'a' <= c && c <= 'z', '0' <= c && c <= '9', c == '-', c == '_':
			dot = false
		case c == '.' && !dot:
			dot = true
		default:
			return false
		}
	}
	return !dot
}

// normalHost returns a host, given in lower case, without its port and without
// trailing dots. The port is everything from the first colon on. An IPv6
// address is returned in its canonical form, without brackets.
func normalHost(host string) string {
	name := host
	if a, ok := hostAddress(host); ok {
		return a
	} else if i := strings.IndexByte(host[afterBrackets(host):], ':'); i >= 0 {
		name = host[:afterBrackets(host)+i]
	}
	name = strings.TrimRight(name, ".")
	if a, ok := hostAddress(name); ok {
		return a // [::1].:80
	}
	return name
}

// hostAddress returns the IPv6 address of a host, with or without a port. An
// address without brackets is not a host by RFC 3986 but is accepted; what
// follows its last colon is a port if the whole is not an address.
func hostAddress(host string) (string, bool) {
	address := host
	switch {
	case strings.HasPrefix(host, "["):
		inside, after, closed := strings.Cut(host[1:], "]")
		if !closed || after != "" && after[0] != ':' {
			return "", false
		}
		address = inside
	case strings.Count(host, ":") < 2:
		return "", false // a name or an IPv4 address, which needs no normalization
	}
	a, err := netip.ParseAddr(address)
	if err != nil {
		if a, err = netip.ParseAddr(beforeLastColon(address)); err != nil {
			return "", false
		}
	}
	return canonical(a), a.Is6()
}

// canonical returns an address without its zone, and an IPv4-mapped one as
// IPv4.
func canonical(a netip.Addr) string { return a.Unmap().WithZone("").String() }

// withoutPort returns a host without its port, if that is a number from 1 to
// 65535 without leading zeros.
func withoutPort(host string) string {
	if i := strings.LastIndexByte(host, ':'); i >= 0 && isPort(host[i+1:]) &&
		(strings.IndexByte(host, ':') == i || host[i-1] == ']') {
		return host[:i]
	}
	return host
}

// withoutBrackets returns an IPv6 address as sent, but without its brackets.
func withoutBrackets(host string) string {
	if inner, ok := strings.CutPrefix(host, "["); ok && strings.HasSuffix(inner, "]") {
		if a, err := netip.ParseAddr(inner[:len(inner)-1]); err == nil && a.Is6() {
			return inner[:len(inner)-1]
		}
	}
	return host
}

// inBrackets returns the text in brackets before a port, since Go's
// net.SplitHostPort removes brackets from names as well. It returns normalHost
// if there is none.
func inBrackets(host string) string {
	if inner, ok := strings.CutPrefix(host, "["); ok {
		if inner, after, closed := strings.Cut(inner, "]"); closed && strings.HasPrefix(after, ":") {
			return inner
		}
	}
	return normalHost(host)
}

// beforeLastColon returns a host up to its last colon outside brackets.
func beforeLastColon(host string) string {
	if i := strings.LastIndexByte(host, ':'); i >= afterBrackets(host) {
		return host[:i]
	}
	return host
}

// afterBrackets returns the index after the last closing bracket, or 0.
func afterBrackets(host string) int { return strings.LastIndexByte(host, ']') + 1 }

func hostMatches(pattern, host string) bool {
	if suffix, ok := strings.CutPrefix(pattern, "*"); ok {
		return len(host) > len(suffix) && strings.HasSuffix(host, suffix)
	}
	return pattern == host
}

var hostPattern = regexp.MustCompile(`^[A-Za-z0-9_]([A-Za-z0-9._-]*[A-Za-z0-9_])?$`)

// parseHost parses a host of a match.
func parseHost(s string) (string, error) {
	name, isWild := strings.CutPrefix(s, "*.")
	if a, err := netip.ParseAddr(strings.TrimSuffix(strings.TrimPrefix(s, "["), "]")); err == nil {
		return canonical(a), nil
	}
	if !hostPattern.MatchString(name) || strings.Contains(name, "..") {
		return "", &advice{fmt.Sprintf("invalid host %q", s), mendHost(s),
			"want a name such as api.example.com or *.example.com, or an address, without a port"}
	}
	if isWild {
		return "*." + lowerASCII(name), nil
	}
	return lowerASCII(name), nil
}

// lowerASCII lowers A to Z and nothing else: hosts that differ in other letters
// are different hosts.
func lowerASCII(s string) string {
	for i := 0; i < len(s); i++ {
		if 'A' <= s[i] && s[i] <= 'Z' {
			b := []byte(s)
			for ; i < len(b); i++ {
				if c := b[i]; 'A' <= c && c <= 'Z' {
					b[i] = c + 'a' - 'A'
				}
			}
			return string(b)
		}
	}
	return s
}

func isDigits(s string) bool {
	for i := 0; i < len(s); i++ {
		if s[i] < '0' || s[i] > '9' {
			return false
		}
	}
	return s != ""
}

// isPort reports whether s is a port number without leading zeros.
func isPort(s string) bool {
	_, err := strconv.ParseUint(s, 10, 16)
	return err == nil && s[0] != '0'
}
