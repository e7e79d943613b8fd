package main

import (
	"regexp"
	"slices"
	"strings"
	"testing"
)

const contributing = ".github/CONTRIBUTING.md"

// TestContributingStages checks that CONTRIBUTING.md names the long tests that
// .ci/test runs, with their packages, and no other.
func TestContributingStages(t *testing.T) {
	stages := func(text string) []string {
		// A stage is the pattern of -run with the packages, whichever of them
		// comes first in the command.
		var all []string
		for _, command := range unique(text, `SLUICE_LONG=1 (go test [^\n`+"`"+`]+)`) {
			pattern := unique(command, `-run '([^']+)'`)
			all = append(all, strings.Join(append(pattern, unique(command, `(\./[a-z0-9/]+)`)...), " "))
		}
		slices.Sort(all)
		return all
	}
	want := stages(document(t, ".ci/test"))
	if len(want) < 6 {
		t.Fatalf("only %d stages were found: %v", len(want), want)
	}
	if got := stages(strings.ReplaceAll(document(t, contributing), `\|`, "|")); !slices.Equal(got, want) {
		t.Errorf("%s has\n%s\n.ci/test runs\n%s", contributing, strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

// TestContributingArrows checks that CONTRIBUTING.md has the packages and their
// imports.
func TestContributingArrows(t *testing.T) {
	rows := regexp.MustCompile("(?m)^\\| `([a-z0-9/]+)` \\|[^|]+\\| ([^|]+) \\|$").
		FindAllStringSubmatch(document(t, contributing), -1)
	said := map[string][]string{}
	for _, row := range rows {
		said[row[1]] = unique(row[2], "`([a-z0-9/]+)`")
		if row[2] == "all" {
			for room := range arrows {
				if room != row[1] && !strings.Contains(room, "k8s/") && room != "limiter/redistest" {
					said[row[1]] = append(said[row[1]], room)
				}
			}
			slices.Sort(said[row[1]])
		}
	}
	for room, imports := range arrows {
		if room == "limiter/redistest" || strings.HasPrefix(room, "k8s/") {
			continue // of tests only
		}
		if got, ok := said[room]; !ok || !slices.Equal(got, imports) {
			t.Errorf("%s: %s has %v, want %v", room, contributing, got, imports)
		}
	}
}

// TestWorkflow checks that the workflow runs .ci/test.
func TestWorkflow(t *testing.T) {
	if workflow := document(t, ".github/workflows/test.yaml"); !strings.Contains(
		workflow,
		"\n    - run: bash .ci/test\n",
	) {
		t.Errorf("the workflow does not run .ci/test:\n%s", workflow)
	}
}
