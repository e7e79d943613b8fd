package policy

import (
	"errors"
	"fmt"
	"net/netip"
	"regexp"
	"strconv"
	"strings"
)

// canonicalPart returns a part of a key, as a user wrote it, in the spelling
// that requests have, if the part is an attribute. It returns an error that says
// what to write if no request can have such a value. Parts that are other
// expressions are returned unchanged.
func (e *expression) canonicalPart(part string) (string, error) {
	if e.canonical != nil {
		return e.canonical(strings.TrimSpace(part))
	}
	return part, nil
}

// canonicalParts are the spellings of attributes that requests have only one of.
var canonicalParts = map[string]func(string) (string, error){
	"client.network":        canonicalNetwork,
	"client.ip":             canonicalAddress,
	"source.address":        canonicalAddress,
	"destination.address":   canonicalAddress,
	"source.port":           canonicalNumber,
	"destination.port":      canonicalNumber,
	"request.size":          canonicalNumber,
	"request.method":        canonicalMethod,
	"request.host":          canonicalHost,
	"request.scheme":        canonicalScheme,
	"request.protocol":      canonicalProtocol,
	"request.path":          canonicalPath,
	"request.url_path":      canonicalURLPath,
	"source.principal":      canonicalPrincipal,
	"destination.principal": canonicalPrincipal,
}

func canonicalAddress(s string) (string, error) {
	a, err := netip.ParseAddr(s)
	if err != nil {
		return "", errors.New("invalid address; want one such as 203.0.113.7 or 2001:db8::1")
	}
	return bareAddress(a.String()), nil
}

func canonicalNetwork(s string) (string, error) {
	a, err := netip.ParseAddr(s)
	prefix, prefixErr := netip.ParsePrefix(s)
	if prefixErr == nil {
		a, err = prefix.Addr(), nil
	}
	if err != nil {
		return "", errors.New("invalid client network; want an address such as 203.0.113.7, or an IPv6 /64 such as " +
			"2001:db8::/64")
	}
	network := network(parseAddr(a.String()))
	same := bareAddress(a.String()) == network // the client's network is its address
	if prefixErr == nil {
		same = prefix.Masked().String() == network || same && prefix.IsSingleIP()
		same = same && prefix.Masked() == prefix
	}
	if !same {
		return "", fmt.Errorf("%s is not a client network (an IPv4 address or an IPv6 /64); write %s", s, network)
	}
	return network, nil
}

func canonicalNumber(s string) (string, error) {
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil || n < 0 {
		return "", errors.New("must be a whole number >= 0")
	}
	return strconv.FormatInt(n, 10), nil
}

func canonicalMethod(s string) (string, error) {
	if !methodPattern.MatchString(s) {
		return "", errors.New("invalid method; want an upper-case name such as GET or POST")
	}
	return s, nil
}

// methodPattern is a token of RFC 9110 without lower-case letters, which no
// method has.
var methodPattern = regexp.MustCompile("^[A-Z0-9!#$%&'*+.^_`|~-]+$")

func canonicalHost(s string) (string, error) {
	const noHost = "invalid host; want a name such as api.example.com, or an address, without a port"
	if strings.Contains(s, "/") { // a URL: its colon does not begin a port
		return "", errors.New(noHost)
	}
	host := strings.TrimSuffix(normalHost(s), ".")
	switch parsed, err := parseHost(host); {
	case err != nil:
		return "", errors.New(noHost)
	case strings.HasPrefix(host, "*"):
		return "", errors.New("patterns are not allowed; want one host")
	case strings.TrimSuffix(lowerASCII(s), ".") != parsed && strings.Trim(lowerASCII(s), "[]") != parsed:
		return "", errors.New("a host has no port here; write it without one")
	default:
		return parsed, nil
	}
}

func canonicalScheme(s string) (string, error) {
	if s != "http" && s != "https" {
		return "", errors.New("unknown scheme; want http or https")
	}
	return s, nil
}

func canonicalProtocol(s string) (string, error) {
	switch s {
	case "HTTP/1.0", "HTTP/1.1", "HTTP/2", "HTTP/3":
		return s, nil
	}
	return "", errors.New("unknown protocol; want HTTP/1.0, HTTP/1.1, HTTP/2 or HTTP/3")
}

func canonicalPath(s string) (string, error) {
	if !strings.HasPrefix(s, "/") && s != "*" {
		return "", errors.New("invalid path; want one that begins with /")
	}
	return s, nil
}

func canonicalURLPath(s string) (string, error) {
	if strings.Contains(s, "?") {
		return "", errors.New("request.url_path has no query; write the path without it")
	}
	return canonicalPath(s)
}

func canonicalPrincipal(s string) (string, error) {
	switch {
	case strings.Contains(s, "*"):
		return "", errors.New("patterns are not allowed; want one principal")
	case !strings.Contains(s, ":"):
		return "", errors.New("invalid principal; want a URI such as spiffe://cluster.local/ns/web/sa/shop")
	}
	return s, nil
}

// spacedPart returns the index of the first part of a key with a leading or
// trailing space, which requests could have but hardly do, or -1.
func spacedPart(key []*expression, parts []string) int {
	for i, part := range parts {
		if i < len(key) && key[i].canonical == nil && strings.TrimSpace(part) != part {
			return i
		}
	}
	return -1
}

const spacedWarning = "a leading or trailing space is part of the key; header values never have one"
