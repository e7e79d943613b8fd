package policy

import (
	"strings"
	"testing"
	"time"
)

func TestLease(t *testing.T) {
	const redis = "store: {redis: {url: \"redis://127.0.0.1\"}}\n"
	for _, tt := range []struct {
		store, lease string
		want         time.Duration
		warning      string
	}{
		{redis, ", lease: 200ms", 200 * time.Millisecond, ""},
		{redis, ", lease: 10ms", 10 * time.Millisecond, ""},
		{redis, ", lease: 5s", 5 * time.Second, ""},
		{redis, "", 0, ""},
		{"", ", lease: 200ms", 200 * time.Millisecond, "limits[0].lease: has no effect, as without store.redis"},
	} {
		c, err := Parse("a.yaml", []byte(tt.store+"limits: [{name: a, rate: 1000/s"+tt.lease+"}]"), env())
		if err != nil {
			t.Fatal(err)
		}
		if got := c.Limits()[0].Lease; got != tt.want {
			t.Errorf("%q: %v, want %v", tt.lease, got, tt.want)
		}
		var warnings []string
		for _, w := range c.Warnings {
			warnings = append(warnings, w.String())
		}
		if got := strings.Join(warnings, "\n"); tt.warning == "" && got != "" || !strings.Contains(got, tt.warning) {
			t.Errorf("%q: %q", tt.lease, got)
		}
	}
}
