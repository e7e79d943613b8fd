package policy

import (
	"slices"
	"testing"
)

func TestReads(t *testing.T) {
	cfg := parse(t, `
client_ip: {header: x-real-ip}
limits:
  - {name: a, rate: 1/s}
  - {name: b, rate: 1/s, key: client.network}
  - name: c
    rate: 1/s
    key: ['request.headers["x-api-key"]', request.method]
    when: '"x-beta" in request.headers && context["plan"] == "gold" && request.url_path.startsWith("/v1")'
    match: {hosts: [a.example.com], paths: [/v1/**]}
  - {name: d, rate: 9/s, settle: 'response.code == 200 ? int(response.headers["x-cost"]) : 0'}
  - {name: e, rate: 9/s, key: 'metadata.filter_metadata["envoy.filters.http.jwt_authn"].payload.sub'}
`)
	for i, want := range [][]string{
		nil,
		{`request.headers["x-real-ip"]`},
		{
			`context["plan"]`, "request.headers[\"x-api-key\"]", "request.headers[\"x-beta\"]", "request.host", "request.method",
			"request.path", "request.url_path",
		},
		{"request.duration", "response.code", `response.headers["x-cost"]`},
		{`metadata.filter_metadata["envoy.filters.http.jwt_authn"]`},
	} {
		if got := cfg.Describe()[i].Reads; !slices.Equal(got, want) {
			t.Errorf("limit %d reads %q, want %q", i, got, want)
		}
	}
}
