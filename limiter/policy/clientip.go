package policy

import (
	"net/netip"
	"strings"
)

// clientIP says how a request's client address is determined.
type clientIP struct {
	xffFromRight int    // position from the right in X-Forwarded-For; 0: unused
	header       string // header with the address; empty: unused
	networks     []netip.Prefix
	principals   []principalPattern
	anyone       bool // no from: every peer is trusted
}

// byHeader reports whether a header gives the client's address.
func (c *clientIP) byHeader() bool { return c.xffFromRight > 0 || c.header != "" }

// address returns the address of the client. This is the peer's address, unless
// the config takes it from a header and trusts this peer to set it. It is
// invalid if the peer's is unknown, too.
//
// isTrusted is false if the peer is trusted but the header has no valid
// address. The address is then the peer's for lack of a better one, and does
// not match an exemption. A peer that is not trusted is the client itself, so
// its address is trusted.
func (c *clientIP) address(req *Request) (client netip.Addr, isSure bool) {
	peer := parseAddr(req.Source.Address)
	if c.xffFromRight == 0 && c.header == "" || !c.believes(peer, req.Source.Principal) {
		return peer, true
	}
	said := req.Headers[c.header]
	if c.header == "" {
		said = fromRight(req.Headers["x-forwarded-for"], c.xffFromRight)
	}
	if a := parseAddr(said); a.IsValid() {
		return a, true
	}
	return peer, false
}

func (c *clientIP) believes(peer netip.Addr, principal string) bool {
	return c.anyone || peer.IsValid() && anyOf(c.networks, peer, netip.Prefix.Contains) ||
		anyOf(c.principals, principal, principalPattern.matches)
}

// fromRight returns the element at position n from the right of a list, or "".
// Empty elements count, as in Envoy: every proxy adds an address, so an empty
// element shows that the list is not what the config expects.
func fromRight(list string, n int) string {
	for ; n > 1; n-- {
		i := strings.LastIndexByte(list, ',')
		if i < 0 {
			return ""
		}
		list = list[:i]
	}
	return strings.TrimSpace(list[strings.LastIndexByte(list, ',')+1:])
}

// longestAddr bounds the text of an address, in bytes. The longest on Linux has
// 69: IPv6 with an embedded IPv4 address, an interface's name as its zone,
// brackets and a port.
const longestAddr = 128

// parseAddr parses an address as proxies write it: bare, in brackets, or with a
// port. The result has no zone, and an IPv4-mapped address is IPv4. It is
// invalid if s is not an address.
func parseAddr(s string) netip.Addr {
	s = strings.TrimSpace(s)
	if len(s) > longestAddr {
		return netip.Addr{} // netip would quote all of it in an error, twice
	}
	a, err := netip.ParseAddr(strings.TrimSuffix(strings.TrimPrefix(s, "["), "]"))
	if err != nil {
		ap, err := netip.ParseAddrPort(s)
		if err != nil {
			return netip.Addr{}
		}
		a = ap.Addr()
	}
	return a.Unmap().WithZone("")
}

// Prefixes of IPv4 addresses that a NAT64 gateway translated. All clients of a
// gateway share a /64.
var (
	nat64      = netip.MustParsePrefix("64:ff9b::/96")   // RFC 6052: the last 32 bits are the IPv4 address
	nat64Local = netip.MustParsePrefix("64:ff9b:1::/48") // RFC 8215: the gateway decides where the IPv4 address is
)

// network returns the network that one client controls: an IPv4 address, or the
// /64 of an IPv6 address. For an address that a NAT64 gateway translated, it is
// the embedded IPv4 address or, with a local-use prefix, the whole address.
func network(a netip.Addr) string {
	switch {
	case !a.IsValid():
		return ""
	case a.Is4(), nat64Local.Contains(a):
		return a.String()
	case nat64.Contains(a):
		all := a.As16()
		return netip.AddrFrom4([4]byte(all[12:])).String()
	}
	p, err := a.Prefix(64)
	if err != nil {
		return "" // cannot happen: an IPv6 address has a /64
	}
	return p.String()
}

func addressText(a netip.Addr) string {
	if !a.IsValid() {
		return ""
	}
	return a.String()
}

// bareAddress returns an address in its canonical spelling, or "" if s is not
// one.
func bareAddress(s string) string { return addressText(parseAddr(s)) }
