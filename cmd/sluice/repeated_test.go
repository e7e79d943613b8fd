package main

import (
	"fmt"
	"strings"
	"testing"
)

// TestHeaderSentTwice checks that a client that sends its key header twice does
// not get a bucket for each second value, through the real Envoy as shipped, in
// both orders and protocols: the upstream gets both, and may read either.
func TestHeaderSentTwice(t *testing.T) {
	const limits = `
limits:
  - {name: per-key, key: 'request.headers["x-api-key"]', rate: 5/d}
`
	for name, order := range map[string][2]string{"the key first": {"real", "j%d"}, "the key last": {"j%d", "real"}} {
		t.Run(name, func(t *testing.T) {
			s := serveRecipe(t, limits, nil)
			passed := 0
			for i := range 12 {
				first, second := order[0], order[1]
				headers := []string{"x-api-key", first, "X-API-Key", second}
				for at := range headers {
					headers[at] = strings.ReplaceAll(headers[at], "%d", fmt.Sprint(i))
				}
				passed += s.asks(1, "GET /", headers...)
			}
			if passed != 5 {
				t.Errorf("%d of 12 passed, want the network's 5", passed)
			}
			if got := s.up.got().Values("X-Api-Key"); len(got) != 2 {
				t.Errorf("the upstream got %q", got)
			}
			s.want(5, 7, "GET /", "x-api-key", "real") // its own bucket is untouched
		})
	}
}
