package policy

import (
	"fmt"
	"net/netip"
	"regexp"
	"strconv"
	"strings"
)

// appendHosts appends the readings of a request's host, in lower case. Envoy and the servers behind it disagree about what of it is a
// port: they cut it at the first colon, at the last, or only where digits follow. The first reading is the one that expressions see, see
// normalHost; most hosts have no other, and then nothing is allocated.
func appendHosts(readings []string, sent string) []string {
	if isNormalHost(sent) {
		return append(readings, sent)
	}
	lower := lowerASCII(sent)
	for _, host := range [...]string{normalHost(lower), withoutBrackets(withoutPort(lower)), withoutBrackets(beforeLastColon(lower)), inBrackets(lower)} {
		known := false
		for _, other := range readings {
			known = known || other == host
		}
		if !known {
			readings = append(readings, host)
		}
	}
	if !isName(readings[0]) && !strings.Contains(readings[0], ":") {
		// A server may read nothing in what is no host. No pattern matches
		// this, so that no exemption by host holds.
		readings = append(readings, "")
	}
	return readings
}

// isNormalHost reports whether a host is surely its only reading.
func isNormalHost(host string) bool {
	return host == "" || isName(host)
}

// isName reports whether a host is labels of a to z, 0 to 9, - and _ with
// dots between them, as a name in lower case or an IPv4 address is.
func isName(host string) bool {
	dot := true // before the first label, as behind each
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

// normalHost is a host in lower case without its port, which is all from the first colon on, and without final dots. An address is in
// its canonical form, without brackets.
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

// hostAddress is the address that a host is, with a port or not. One of IPv6 without brackets, which is no host by RFC 3986, is an
// address all the same, and what follows its last colon then its port where it would be none with it.
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
		return "", false // a name, or an IPv4 address, which has one form
	}
	a, err := netip.ParseAddr(address)
	if err != nil {
		if a, err = netip.ParseAddr(beforeLastColon(address)); err != nil {
			return "", false
		}
	}
	return canonical(a), a.Is6()
}

// canonical is an address's one spelling: without a zone, and IPv4 in IPv6 as IPv4.
func canonical(a netip.Addr) string { return a.Unmap().WithZone("").String() }

// withoutPort is a host without its port, where that is a number from 1 to
// 65535 without leading zeros.
func withoutPort(host string) string {
	if i := strings.LastIndexByte(host, ':'); i >= 0 && isPort(host[i+1:]) && (strings.IndexByte(host, ':') == i || host[i-1] == ']') {
		return host[:i]
	}
	return host
}

// withoutBrackets is an IPv6 address as it was sent, without its brackets.
func withoutBrackets(host string) string {
	if inner, ok := strings.CutPrefix(host, "["); ok && strings.HasSuffix(inner, "]") {
		if a, err := netip.ParseAddr(inner[:len(inner)-1]); err == nil && a.Is6() {
			return inner[:len(inner)-1]
		}
	}
	return host
}

// inBrackets is what stands in brackets before a port, since Go's
// net.SplitHostPort drops them from a name, too; or else the normal host.
func inBrackets(host string) string {
	if inner, ok := strings.CutPrefix(host, "["); ok {
		if inner, after, closed := strings.Cut(inner, "]"); closed && strings.HasPrefix(after, ":") {
			return inner
		}
	}
	return normalHost(host)
}

// beforeLastColon is a host without the last colon that is not in brackets, and what follows it.
func beforeLastColon(host string) string {
	if i := strings.LastIndexByte(host, ':'); i >= afterBrackets(host) {
		return host[:i]
	}
	return host
}

// afterBrackets is where the last bracket of a host has ended.
func afterBrackets(host string) int { return strings.LastIndexByte(host, ']') + 1 }

func hostMatches(pattern, host string) bool {
	if suffix, ok := strings.CutPrefix(pattern, "*"); ok {
		return len(host) > len(suffix) && strings.HasSuffix(host, suffix)
	}
	return pattern == host
}

var hostPattern = regexp.MustCompile(`^[A-Za-z0-9_]([A-Za-z0-9._-]*[A-Za-z0-9_])?$`)

// parseHost reads a host of a match.
func parseHost(s string) (string, error) {
	name, isWild := strings.CutPrefix(s, "*.")
	if a, err := netip.ParseAddr(strings.TrimSuffix(strings.TrimPrefix(s, "["), "]")); err == nil {
		return canonical(a), nil
	}
	if !hostPattern.MatchString(name) || strings.Contains(name, "..") {
		return "", fmt.Errorf("invalid host %q; want a name such as api.example.com or *.example.com, or an address, without a port", s)
	}
	if isWild {
		return "*." + lowerASCII(name), nil
	}
	return lowerASCII(name), nil
}

// lowerASCII lowers nothing else: hosts that differ in other letters are others.
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

// isPort reports whether s is a port as servers write it.
func isPort(s string) bool {
	_, err := strconv.ParseUint(s, 10, 16)
	return err == nil && s[0] != '0'
}
