package authz

import (
	"maps"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/sluiceproxy/sluice/limiter"
)

// readmeRows returns the rows of the table in a section of the README: by the
// name in code in the first cell, the names in code in the others.
func readmeRows(t *testing.T, section string) map[string][]string {
	t.Helper()
	text, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(text), "\n## "+section+"\n")
	rest, _, _ = strings.Cut(rest, "\n## ")
	inCode := regexp.MustCompile("`([^`]+)`")
	rows := make(map[string][]string)
	for line := range strings.Lines(rest) {
		name, cells, ok := strings.Cut(strings.TrimPrefix(line, "| `"), "` |")
		if !ok || !strings.HasPrefix(line, "| `") {
			continue
		}
		rows[name] = nil
		for _, m := range inCode.FindAllStringSubmatch(cells, -1) {
			rows[name] = append(rows[name], m[1])
		}
	}
	return rows
}

// The README has the fields of the metadata, and the values of decision.
func TestREADMEMetadata(t *testing.T) {
	decisions := make(map[string]bool)
	fields := make(map[string]bool)
	for _, c := range []struct {
		config  string
		verdict limiter.Verdict
	}{
		{"limits: []", ok(1, 0, 0)},
		{"limits: [{name: a, rate: 1/s}]", ok(1, 0, 0)},
		{"limits: [{name: a, rate: 1/s}]", no(0, time.Second, time.Second, time.Second)},
		{"exempt: [{match: {methods: [GET]}}]\nlimits: [{name: a, rate: 1/s}]", ok(1, 0, 0)},
		{"on_failure: allow\nlimits: [{name: a, rate: 1/s}]", failed},
		{"limits: [{name: a, rate: 1/s}]", failed},
		{"limits: [{name: a, rate: 1/s, mode: shadow}]", no(0, time.Second, time.Second, time.Second)},
		{"limits: [{name: a, rate: 1/s, cost: 'int(request.method)'}]", ok(1, 0, 0)},
	} {
		s, _, _ := newServer(t, c.config, said{c.verdict})
		answer, err := s.Check(t.Context(), checkOf())
		if err != nil {
			t.Fatal(err)
		}
		metadata := answer.GetDynamicMetadata().GetFields()
		decisions[metadata["decision"].GetStringValue()] = true
		for name := range metadata {
			fields[name] = true
		}
	}
	if newSettlingServer(t, settlingLimits).check() != "" { // whose store holds what it takes
		fields[settleField] = true
	}
	rows := readmeRows(t, "Dynamic metadata")
	if got, want := slices.Sorted(maps.Keys(rows)), slices.Sorted(maps.Keys(fields)); !slices.Equal(got, want) {
		t.Errorf("README has the fields %v, want %v", got, want)
	}
	got, want := slices.Sorted(slices.Values(rows["decision"])), slices.Sorted(maps.Keys(decisions))
	if !slices.Equal(got, want) {
		t.Errorf("README has the decisions %v, want %v", got, want)
	}
}
