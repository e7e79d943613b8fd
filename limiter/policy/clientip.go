package policy

import (
	"net/netip"
	"strings"
)

// clientIP says which address is the client's.
type clientIP struct {
	xffFromRight int    // the Nth address from the right of X-Forwarded-For; 0: not by it
	header       string // or the address in this header; empty: not by one
	networks     []netip.Prefix
	principals   []principalPattern
	anyone       bool // neither networks nor principals are given: every peer is believed
}

// byHeader reports whether a header says which address it is.
func (c *clientIP) byHeader() bool { return c.xffFromRight > 0 || c.header != "" }

// of returns the client's address: the peer's, unless the config takes it from a header and believes this peer. It is invalid where
// not even the peer is known. It is not sure where the header, which should have said it, does not: the address is then the peer's for
// want of a better one, and nobody is exempt for it. A peer that is not believed is the client for sure.
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
	return c.anyone || peer.IsValid() && anyOf(c.networks, peer, netip.Prefix.Contains) || anyOf(c.principals, principal, principalPattern.matches)
}

// fromRight is the nth of a list's elements from its right end, or empty. An empty element counts as one, as in Envoy: who adds an element adds
// an address, so that an empty one says that the list is not what the config takes it for.
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

// parseAddr reads an address as proxies write it: bare, in brackets, with a port. All spellings of one address give one: without
// a zone, and IPv4 in IPv6 as IPv4. What is no address gives the invalid one.
func parseAddr(s string) netip.Addr {
	s = strings.TrimSpace(s)
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

// The prefixes of IPv4 addresses that a NAT64 gateway translated, which have one /64 for all clients.
var (
	nat64      = netip.MustParsePrefix("64:ff9b::/96")   // RFC 6052: the IPv4 address is the last 32 bits
	nat64Local = netip.MustParsePrefix("64:ff9b:1::/48") // RFC 8215: where it is depends on the gateway
)

// network is what has one client's addresses: an IPv4 address, or an IPv6 address's /64, since who has one address of that has them all. An
// address that a NAT64 gateway translated is the IPv4 address within it, and with a prefix of the gateway's own is by itself.
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
		return "" // an IPv6 address has a /64
	}
	return p.String()
}

func addressText(a netip.Addr) string {
	if !a.IsValid() {
		return ""
	}
	return a.String()
}

// bareAddress is an address in its one spelling, or empty.
func bareAddress(s string) string { return addressText(parseAddr(s)) }
