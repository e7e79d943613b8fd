package policy

import (
	"net/netip"
	"strings"
	"testing"
)

func TestClientIP(t *testing.T) {
	for _, section := range []struct {
		config string
		rows   [][2]string // a request, and its client
	}{
		{"", [][2]string{
			{"GET h/ from 10.0.0.1 with x-forwarded-for=1.2.3.4", "10.0.0.1"},
		}},
		{"client_ip: {xff_from_right: 1}", [][2]string{
			{"GET h/ from 10.0.0.1 with x-forwarded-for=1.1.1.1,2.2.2.2", "2.2.2.2"},
			{"GET h/ from 10.0.0.1 with x-forwarded-for=forged,%202.2.2.2", "2.2.2.2"},
			{"GET h/ from 10.0.0.1", "10.0.0.1"},
			{"GET h/ from 10.0.0.1 with x-forwarded-for=garbage", "10.0.0.1"},
			{"GET h/ from 10.0.0.1 with x-forwarded-for=2.2.2.2,", "10.0.0.1"},
			{"GET h/ from 10.0.0.1 with x-forwarded-for=2.2.2.2:4711", "2.2.2.2"},
			{"GET h/ from 10.0.0.1 with x-forwarded-for=[2001:DB8::1]:4711", "2001:db8::1"},
			{"GET h/ from 10.0.0.1 with x-forwarded-for=[2001:db8::1]", "2001:db8::1"},
			{"GET h/ from 10.0.0.1 with x-forwarded-for=::ffff:2.2.2.2", "2.2.2.2"},
			{"GET h/ from 10.0.0.1 with x-forwarded-for=2001:db8:0:0:0:0:0:1", "2001:db8::1"},
			{"GET h/ from 10.0.0.1 with x-forwarded-for=[2001:0db8:1111:1111:1111:1111:255.255.255.255%25fifteen.letters]:65535",
				"2001:db8:1111:1111:1111:1111:ffff:ffff"},
		}},
		{"client_ip: {xff_from_right: 2}", [][2]string{
			{"GET h/ from 10.0.0.1 with x-forwarded-for=1.1.1.1,2.2.2.2,3.3.3.3", "2.2.2.2"},
			{"GET h/ from 10.0.0.1 with x-forwarded-for=3.3.3.3", "10.0.0.1"},
		}},
		{"client_ip: {header: x-envoy-external-address}", [][2]string{
			{"GET h/ from 10.0.0.1 with x-envoy-external-address=9.9.9.9", "9.9.9.9"},
			{"GET h/ from 10.0.0.1 with x-envoy-external-address=9.9.9.9,8.8.8.8", "10.0.0.1"},
			{"GET h/ from 10.0.0.1", "10.0.0.1"},
		}},
		{`client_ip: {xff_from_right: 1, from: [10.0.0.0/8, "spiffe://c/gateway*"]}`, [][2]string{
			{"GET h/ from 10.0.0.1 with x-forwarded-for=2.2.2.2", "2.2.2.2"},
			{"GET h/ from 11.0.0.1 with x-forwarded-for=2.2.2.2", "11.0.0.1"},
			{"GET h/ from 11.0.0.1 by spiffe://c/gateway-1 with x-forwarded-for=2.2.2.2", "2.2.2.2"},
			{"GET h/ from 11.0.0.1 by spiffe://c/app with x-forwarded-for=2.2.2.2", "11.0.0.1"},
			{"GET h/ from nowhere with x-forwarded-for=2.2.2.2", ""},
		}},
	} {
		c := parse(t, section.config)
		for _, row := range section.rows {
			if got := c.Client(request(t, row[0])); got != row[1] {
				t.Errorf("%s\n%s: %q, want %q", section.config, row[0], got, row[1])
			}
		}
	}
}

func FuzzParseAddr(f *testing.F) {
	for _, seed := range []string{"10.0.0.1", "[::1]:80", "::ffff:1.2.3.4", "fe80::1%eth0", "[::1", "1.2.3.4:x",
		" 1.2.3.4 ", "64:ff9b::1.2.3.4", "64:ff9b:1::1.2.3.4", "1:" + strings.Repeat("\xf4", 60<<10)} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, s string) {
		var a netip.Addr
		if cost := allocates(func() { a = parseAddr(s) }); cost > 16<<10 {
			t.Errorf("%.1000q: %d bytes are allocated", s, cost)
		}
		if a.Is4In6() || a.Zone() != "" || a.IsValid() && parseAddr(a.String()) != a {
			t.Fatalf("%q: %v", s, a)
		}
		if n := network(a); a.IsValid() {
			p, err := netip.ParsePrefix(n)
			switch {
			case err == nil && p.Bits() == 64 && p.Contains(a), n == a.String():
			case nat64.Contains(a) && "64:ff9b::"+n != a.String() && netip.MustParseAddr("64:ff9b::"+n) == a:
			default:
				t.Fatalf("%q: %s", s, n)
			}
		}
	})
}
