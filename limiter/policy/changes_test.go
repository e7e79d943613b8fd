package policy

import (
	"fmt"
	"testing"
)

// TestSince checks which limits and settings are said to have changed.
func TestSince(t *testing.T) {
	const a, b = "{name: a, rate: 1/s, key: client.ip}", "{name: b, rate: 1/s}"
	load := func(text string) *Config {
		t.Helper()
		return loadFiles(t, "sluice.yaml", text, "o.csv", "key,rate,burst\n10.0.0.1,1/s,\n",
			"moved.csv", "key,rate,burst\n10.0.0.2,2/s,\n10.0.0.1,1/s,\n", "same.csv", "Key,Rate,Burst\n\n10.0.0.1,1/s,\n")
	}
	limits := func(all string) string { return "limits: [" + all + "]" }
	for _, tt := range []struct{ old, new, want string }{
		{limits(a), "# a comment\n" + limits(" "+a), "{[] [] [] []}"},
		{limits(a), limits(a + ", " + b), "{[b] [] [] []}"},
		{limits(a + ", " + b), limits(b), "{[] [a] [] []}"},
		{limits(a + ", " + b), limits(b + ", " + a), "{[] [] [] []}"},
		{limits(b), limits("{name: c, rate: 1/s}"), "{[c] [b] [] []}"},
		{limits(b), limits("{name: b, rate: 2/s}"), "{[] [] [b] []}"},
		{limits(b), limits("{name: b, rate: 1/s, burst: 2}"), "{[] [] [b] []}"},
		{limits(b), limits("{name: b, rate: 1/s, match: {paths: [/a]}}"), "{[] [] [b] []}"},
		{limits(b), limits("{name: b, rate: 1/s, when: request.size > 1}"), "{[] [] [b] []}"},
		{limits(b), limits("{name: b, rate: 1/s, key: client.ip}"), "{[] [] [b] []}"},
		{limits(b), limits("{name: b, rate: 1/s, key: client.ip, absent: deny}"), "{[] [] [b] []}"},
		{limits(b), limits("{name: b, rate: 1/s, cost: request.size}"), "{[] [] [b] []}"},
		{limits(b), limits("{name: b, rate: 1/s, settle: 1}"), "{[] [] [b] []}"},
		{limits(b), limits("{name: b, rate: 1/s, group: g}"), "{[] [] [b] []}"},
		{limits(b), limits("{name: b, rate: 1/s, mode: shadow}"), "{[] [] [b] []}"},
		{limits(b), limits("{name: b, rate: 1/s, on_failure: allow}"), "{[] [] [b] []}"},
		{limits(b), limits("{name: b, rate: 1/s, domain: d}"), "{[] [] [b] []}"},
		{limits(a), limits("{name: a, rate: 1/s, key: client.ip, overrides_file: o.csv}"), "{[] [] [a] []}"},
		{
			limits("{name: a, rate: 1/s, key: client.ip, overrides_file: o.csv}"),
			limits("{name: a, rate: 1/s, key: client.ip, overrides_file: moved.csv}"), "{[] [] [a] []}",
		},
		{
			limits("{name: a, rate: 1/s, key: client.ip, overrides_file: o.csv}"),
			limits("{name: a, rate: 1/s, key: client.ip, overrides_file: same.csv}"), "{[] [] [] []}",
		},
		{limits(b), "mode: shadow\n" + limits(b), "{[] [] [b] []}"},
		{limits(b), "domain: d\n" + limits(b), "{[] [] [b] [domain]}"},
		{
			limits(b), "{failure_status: 502, headers: [], grace: 1s, log_level: warn, key_secret: a-secret-of-some-bytes, " +
				"exempt: [{match: {paths: [/a]}}], client_ip: {xff_from_right: 1}, routes: {limits: false}, " + limits(b) + "}",
			"{[] [] [] [client_ip exempt failure_status grace headers key_secret log_level routes]}",
		},
	} {
		if got := fmt.Sprint(load(tt.new).Since(load(tt.old))); got != tt.want {
			t.Errorf("%s\n%s\n got %s\nwant %s", tt.old, tt.new, got, tt.want)
		}
	}
}
