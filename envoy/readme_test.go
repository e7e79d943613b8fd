package envoy

import (
	"os"
	"regexp"
	"strings"
	"testing"
)

// readmeSection returns a section of this directory's README, without its
// heading.
func readmeSection(t *testing.T, heading string) string {
	t.Helper()
	text, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, section, ok := strings.Cut(string(text), "\n## "+heading+"\n")
	if !ok {
		t.Fatalf("README.md has no section %q", heading)
	}
	section, _, _ = strings.Cut(section, "\n## ")
	return section
}

// Every part of the chain that the README explains is in the bootstrap, and
// every setting of ext_authz and of sluice's cluster is explained.
func TestREADMEChain(t *testing.T) {
	text, err := Plain(Options{})
	if err != nil {
		t.Fatal(err)
	}
	chain := string(text)
	section := readmeSection(t, "The filter chain")
	rows := regexp.MustCompile(`(?m)^\| ([^|]+) \|`).FindAllStringSubmatch(section, -1)
	explained := map[string]bool{}
	for _, row := range rows {
		for _, code := range regexp.MustCompile("`([^`]+)`").FindAllStringSubmatch(row[1], -1) {
			explained[strings.SplitN(code[1], ":", 2)[0]] = true
			if !strings.Contains(chain, code[1]) {
				t.Errorf("the README explains %q, which is not in plain.yaml", code[1])
			}
		}
	}
	_, filter, _ := strings.Cut(chain, "filters.http.ext_authz.v3.ExtAuthz\n")
	filter, _, _ = strings.Cut(filter, "          - name: envoy.filters.http.router\n")
	_, cluster, _ := strings.Cut(chain, "  - name: sluice\n")
	cluster, _, _ = strings.Cut(cluster, "    load_assignment:\n")
	settings := append(
		regexp.MustCompile(`(?m)^ {14}([a-z_]+):`).FindAllStringSubmatch(filter, -1),
		regexp.MustCompile(`(?m)^ {4}([a-z_]+):`).FindAllStringSubmatch(cluster, -1)...)
	if len(settings) < 10 {
		t.Fatalf("only %d settings were found", len(settings))
	}
	// What any cluster and any ext_authz filter has.
	for _, usual := range []string{"type", "transport_api_version", "typed_extension_protocol_options"} {
		explained[usual] = true
	}
	for _, setting := range settings {
		if !explained[setting[1]] {
			t.Errorf("the README does not explain %s", setting[1])
		}
	}
}

// The files of this directory that the README links to are there, and each YAML
// file is linked.
func TestREADMEFiles(t *testing.T) {
	text, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	linked := map[string]bool{}
	for _, link := range regexp.MustCompile(`\]\(([^)/#:]+)\)`).FindAllStringSubmatch(string(text), -1) {
		linked[link[1]] = true
		if _, err := os.Stat(link[1]); err != nil {
			t.Error(err)
		}
	}
	entries, err := os.ReadDir(".")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if strings.HasSuffix(e.Name(), ".yaml") && !linked[e.Name()] {
			t.Errorf("the README does not link to %s", e.Name())
		}
	}
}
