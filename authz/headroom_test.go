package authz

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
)

// An allow adds no header to a request that has no room for it in Envoy, which
// would answer 500. The metadata still names the shadow limits, and the
// client's x-sluice-* headers are removed.
func TestHeadersThatDoNotFit(t *testing.T) {
	const config = "headers: []\nlimits: [{name: a, rate: 1/s, mode: shadow}, {name: b, rate: 1/s, mode: shadow}]"
	denies := said{no(0, time.Second, time.Second, 1), no(0, time.Second, time.Second, 1)}
	const added = len("x-sluice-shadow") + len("a,b")

	lines := func(n int, more ...string) *authv3.CheckRequest {
		check := checkOf()
		check.Attributes.Request.Http.HeaderMap = &corev3.HeaderMap{}
		for i := range n - len(more) {
			more = append(more, fmt.Sprintf("x-%d", i))
		}
		for _, name := range more {
			headers := &check.Attributes.Request.Http.HeaderMap.Headers
			*headers = append(*headers, &corev3.HeaderValue{Key: name, RawValue: []byte("1")})
		}
		return check
	}
	large := func(n int) *authv3.CheckRequest {
		check := lines(1)
		check.Attributes.Request.Http.HeaderMap.Headers[0].RawValue = []byte(strings.Repeat("a", n-len("x-0")))
		return check
	}
	joined := func(n, commas int) *authv3.CheckRequest {
		all := []string{"commas", strings.Repeat(",", commas)}
		for i := range n - 1 {
			all = append(all, fmt.Sprintf("x-%d", i), "1")
		}
		return checkOf(all...)
	}
	for name, tt := range map[string]struct {
		check *authv3.CheckRequest
		want  string
	}{
		"the last line":               {lines(99), "upstream x-sluice-shadow: a,b"},
		"no line left":                {lines(100), ""},
		"more than Envoy's bound":     {lines(105), ""},
		"the last byte":               {large(60<<10 - added), "upstream x-sluice-shadow: a,b"},
		"no byte left":                {large(60<<10 - added + 1), ""},
		"joined":                      {joined(90, 9), "upstream x-sluice-shadow: a,b"},
		"joined, perhaps of too many": {joined(90, 10), ""},
		"forged, and replaced":        {lines(99, "x-sluice-shadow"), "upstream x-sluice-shadow: a,b"},
		"forged, and removed": {
			lines(100, "x-sluice-shadow", "x-sluice-other"),
			"remove x-sluice-other\nremove x-sluice-shadow",
		},
		"no name": {lines(5, "x-sluice-\r\n"), "upstream x-sluice-shadow: a,b"},
	} {
		s, _, _ := newServer(t, config, denies)
		got := strings.Split(spell(s.Check(t.Context(), tt.check)), "\n")
		slices.Sort(got[2 : len(got)-2])
		want := strings.ReplaceAll("status 0\nallow\n"+tt.want+"\n", "\n\n", "\n")
		if g := strings.Join(got[:len(got)-2], "\n") + "\n"; g != want {
			t.Errorf("%s\n got %s\nwant %s", name, g, want)
		}
		if metadata := got[len(got)-2]; !strings.Contains(metadata, "shadow=[a b]") {
			t.Errorf("%s: %s", name, metadata)
		}
	}
}
