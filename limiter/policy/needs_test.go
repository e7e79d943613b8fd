package policy

import (
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestNeeds(t *testing.T) {
	none := Needs{}
	for text, want := range map[string]Needs{
		"": none,
		"limits: [{name: a, rate: 1/s, key: client.ip, when: 'request.path == \"source.principal\"'}]": none,
		`limits: [{name: a, rate: 1/s, key: ['metadata.filter_metadata["envoy.filters.http.jwt_authn"].payload.sub', ` +
			`'request.headers["x-key"]'], when: 'has(metadata.filter_metadata.mine)', cost: 'request.headers[?"x-cost"].` +
			`hasValue() ? 2 : 1'}]`: {Metadata: []string{"envoy.filters.http.jwt_authn", "mine"},
			Headers: []string{"x-cost", "x-key"}},
		`limits: [{name: a, rate: 1/s, key: 'metadata.filter_metadata[request.method].x'}]`: none, // a computed name
		"client_ip: {header: x-real-ip}":                                          {Headers: []string{"x-real-ip"}, ClientHeader: "x-real-ip"},
		"client_ip: {xff_from_right: 1, from: [\"spiffe://c/ns/a/*\"]}":           {Headers: []string{"x-forwarded-for"}, Principals: true},
		"exempt: [{match: {principals: [\"spiffe://c/ns/a/*\"]}}]":                {Principals: true},
		"limits: [{name: a, rate: 1/s, match: {principals: [\"spiffe://c/*\"]}}]": {Principals: true},
		"limits: [{name: a, rate: 1/s, key: source.principal}]":                   {Principals: true},
	} {
		if diff := cmp.Diff(want, parse(t, text).Needs()); diff != "" {
			t.Errorf("%s: -want +got:\n%s", text, diff)
		}
	}
}
