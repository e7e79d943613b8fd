package main

import (
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const module = "github.com/sluiceproxy/sluice"

// arrows lists what each package may import of the others. A request goes from
// authz to policy to limiter, and no import goes back.
var arrows = map[string][]string{
	"limiter":              {},
	"limiter/redistest":    {},
	"limiter/policy":       {"limiter"},
	"authz":                {"limiter", "limiter/policy"},
	"envoy":                {"limiter/policy"},
	"k8s":                  {},
	"k8s/testenv":          {},
	"cmd/sluice/page":      {"authz", "limiter", "limiter/policy"},
	"cmd/sluice/accesslog": {"limiter/policy"},
	"cmd/sluice/backtest":  {"authz", "cmd/sluice/accesslog", "limiter", "limiter/policy"},
	"cmd/sluice/doctor":    {"limiter", "limiter/policy"},
	"cmd/sluice": {
		"authz", "cmd/sluice/accesslog", "cmd/sluice/backtest", "cmd/sluice/doctor", "cmd/sluice/page", "envoy", "k8s",
		"limiter", "limiter/policy",
	},
}

// testArrows lists what the tests of every package may import besides, and
// nodeArrows what those of k8s may: they run an Envoy.
var (
	testArrows = []string{"limiter/redistest", "k8s/testenv"}
	nodeArrows = []string{"envoy"}
)

// extAuthz is the package of the ext_authz messages. Only authz and tests may
// import it.
const extAuthz = "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"

func TestArrows(t *testing.T) {
	root := filepath.Join("..", "..")
	seen := map[string]bool{}
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		// As for the go command, testdata has no packages. Programs there are
		// run by tests.
		if d.IsDir() && (strings.HasPrefix(d.Name(), ".") && path != root || d.Name() == "testdata") {
			return fs.SkipDir
		}
		if filepath.Ext(path) != ".go" {
			return nil
		}
		rel, err := filepath.Rel(root, path)
		if err != nil {
			return err
		}
		room, isTest := filepath.ToSlash(filepath.Dir(rel)), strings.HasSuffix(path, "_test.go")
		allowed, ok := arrows[room]
		if !ok {
			t.Errorf("%s: no such room: %s", rel, room)
			return nil
		}
		if isTest {
			allowed = slices.Concat(allowed, testArrows, []string{room}) // an example imports its own package
		}
		if isTest && room == "k8s" {
			allowed = append(allowed, nodeArrows...)
		}
		seen[room] = true
		f, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.ImportsOnly)
		if err != nil {
			return err
		}
		for _, i := range f.Imports {
			name, err := strconv.Unquote(i.Path.Value)
			if err != nil {
				return err
			}
			if name == extAuthz && room != "authz" && !isTest {
				t.Errorf("%s imports %s", rel, name)
			}
			if ours, ok := strings.CutPrefix(name, module+"/"); ok && !slices.Contains(allowed, ours) {
				t.Errorf("%s imports %s; allowed are %v", rel, ours, allowed)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if !seen["authz"] || !seen["limiter/policy"] {
		t.Errorf("the rooms are not where this test looks: %v", seen)
	}
}

// TestTopLevel checks that the top level has only the packages and the files
// that tools look for there.
func TestTopLevel(t *testing.T) {
	allowed := []string{
		"cmd", "authz", "limiter", "envoy", "k8s", "Dockerfile", "go.mod", "go.sum", "README.md", "LICENSE",
		"CHANGELOG.md", ".ci", ".dockerignore", ".git", ".github", ".gitignore", ".golangci.yml",
		".goreleaser.yaml", "dist", ".release", // the last two are made by .ci/release, and ignored
	}
	entries, err := os.ReadDir(filepath.Join("..", ".."))
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if !slices.Contains(allowed, e.Name()) {
			t.Errorf("%s stands on the top level", e.Name())
		}
	}
}
