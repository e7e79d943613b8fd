package doctor

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/sluiceproxy/sluice/limiter"
	"github.com/sluiceproxy/sluice/limiter/policy"
)

// plainConfig is the bootstrap that `sluice envoy plain` prints.
func plainConfig(t testing.TB) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("..", "..", "..", "envoy", "plain.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// problems returns what Diagnose says of a config, but for what is well.
func problems(t *testing.T, text string) (all []limiter.Finding) {
	t.Helper()
	e, err := Parse([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range Diagnose(e, nil) {
		if f.Status != limiter.OK {
			all = append(all, f)
		}
	}
	return all
}

// A message that a control plane does not know comes in a TypedStruct. Envoy
// also reads yes and on for true, and YAML with anchors. Messages that nobody
// knows are ignored.
func TestSpellingsOfAConfig(t *testing.T) {
	const extAuthz = "\"@type\": type.googleapis.com/envoy.extensions.filters.http.ext_authz.v3.ExtAuthz\n"
	plain := plainConfig(t)
	typedStruct := strings.NewReplacer(
		extAuthz, "\"@type\": type.googleapis.com/xds.type.v3.TypedStruct\n              type_url: type.googleapis.com/"+
			"envoy.extensions.filters.http.ext_authz.v3.ExtAuthz\n              value:\n",
	).Replace(plain)
	_, filter, _ := strings.Cut(typedStruct, "              value:\n")
	filter, _, _ = strings.Cut(filter, "          - name: envoy.filters.http.router")
	typedStruct = strings.Replace(typedStruct, filter, "  "+strings.ReplaceAll(filter, "\n", "\n  "), 1)
	typedStruct = strings.Replace(typedStruct, "            - name: envoy.filters.http.router", "          - name: envoy.filters.http.router", 1)
	for name, text := range map[string]string{
		"as printed":    plain,
		"a TypedStruct": typedStruct,
		"yes and on": strings.NewReplacer("encode_raw_headers: true", "encode_raw_headers: yes", "validate_mutations: true",
			"validate_mutations: on").Replace(plain),
		"numbers of enums":       strings.Replace(plain, "transport_api_version: V3", "transport_api_version: 2", 1),
		"a status by its number": strings.Replace(plain, "code: ServiceUnavailable", "code: 503", 1),
		"an unknown filter": strings.Replace(plain, "          http_filters:\n", "          http_filters:\n          - name: of.a.later.Envoy\n"+
			"            typed_config: { \"@type\": type.googleapis.com/of.a.later.Envoy, x: [1] }\n", 1),
	} {
		if name != "as printed" && text == plain {
			t.Errorf("%s: nothing changed", name)
		}
		if found := problems(t, text); found != nil {
			t.Errorf("%s: %+v", name, found)
		}
	}
	if found := problems(t, strings.Replace(typedStruct, "V3", "V2", 1)); len(found) != 1 || found[0].Name != "filter" {
		t.Errorf("a mistake in a TypedStruct: %+v", found)
	}
}

// TestManyListeners checks that what is the same of many listeners is said once.
func TestManyListeners(t *testing.T) {
	plain := strings.Replace(plainConfig(t), "              encode_raw_headers: true\n", "", 1)
	before, listener, _ := strings.Cut(plain, "  - name: ingress\n")
	listener, after, _ := strings.Cut(listener, "  clusters:\n")
	text := before
	for _, name := range []string{"a", "b", "c", "d", "e"} {
		text += "  - name: " + name + "\n" + listener
	}
	found := problems(t, text+"  clusters:\n"+after)
	if len(found) != 1 || !strings.HasPrefix(found[0].Detail, "listeners a, b, c and 2 more: encode_raw_headers is not true") {
		t.Errorf("%+v", found)
	}
	// One of them does not ask.
	text = strings.Replace(text, "name: envoy.filters.http.ext_authz\n", "name: gone\n", 1)
	_, rest, _ := strings.Cut(text, "name: gone\n")
	rest = strings.Replace(rest, "ext_authz.v3.ExtAuthz\n", "other.v3.Other\n", 1)
	text, _, _ = strings.Cut(text, "name: gone\n")
	found = problems(t, text+"name: gone\n"+rest+"  clusters:\n"+after)
	if len(found) != 2 || found[0].Detail != "listener a: it does not ask sluice, and its requests are not limited" {
		t.Errorf("%+v", found)
	}
}

// FuzzDiagnose checks that no config makes doctor panic, and that what it says
// cannot mislead on a terminal.
func FuzzDiagnose(f *testing.F) {
	f.Add(plainConfig(f))
	f.Add(aDump)
	f.Add(`{"configs": [{"@type": "x/envoy.admin.v3.ClustersConfigDump", "static_clusters": [{"cluster": {"name": 1}}, 2, null]}]}`)
	f.Add(`{"static_resources": {"listeners": [{"filter_chains": [{"filters": [{"typed_config": {"@type": "` + managerType +
		`", "http_filters": [{"name": "\u001b[2J", "typed_config": {"@type": "` + extAuthzType + `", "grpc_service": "x"}}]}}]}]}]}}`)
	config, err := policy.Parse("f", []byte(`limits: [{name: a, rate: 1/s, settle: 1, key: 'request.headers["x"]', `+
		`when: 'has(metadata.filter_metadata["envoy.filters.http.jwt_authn"].x)', match: {principals: ["spiffe://a/*"]}}]`),
		func(string) (string, bool) { return "", false })
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, text string) {
		e, err := Parse([]byte(text))
		if err != nil {
			return
		}
		e.counters = map[string]float64{}
		for _, c := range []*policy.Config{nil, config} {
			for _, finding := range Diagnose(e, c) {
				if said := finding.Detail + finding.Fix; strings.ContainsFunc(said, func(r rune) bool { return r < ' ' || r == 0x7f }) {
					t.Errorf("%q", said)
				}
			}
		}
	})
}
