// Package built gives tests programs that the product's go.mod knows nothing of.
package built

import (
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"testing"
)

// Program is the path of a program that is built from its module, once, into the user's cache: the package's last name, as of that version.
// The first call takes up to some minutes, and the network.
func Program(t *testing.T, pkg, version string) string {
	t.Helper()
	cache, err := os.UserCacheDir()
	if err != nil {
		t.Fatal(err)
	}
	name := path.Base(pkg)
	home := filepath.Join(cache, "sluice", name+"-"+version)
	program := filepath.Join(home, name)
	if info, err := os.Stat(program); err == nil && info.Mode().IsRegular() {
		return program
	}
	if err := os.MkdirAll(home, 0o755); err != nil {
		t.Fatal(err)
	}
	part, err := os.MkdirTemp(home, "building-") // so that what is there under its name is whole
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = os.RemoveAll(part) }()
	t.Logf("building %s@%s into %s; this happens once", pkg, version, home)
	install := exec.CommandContext(t.Context(), "go", "install", "-trimpath", "-ldflags", "-s -w", pkg+"@"+version)
	install.Dir = part // outside the product's module
	install.Env = append(os.Environ(), "GOBIN="+part, "CGO_ENABLED=0", "GOFLAGS=")
	if out, err := install.CombinedOutput(); err != nil {
		t.Fatalf("%s %s: %v\n%s", name, version, err, out)
	}
	if err := os.Rename(filepath.Join(part, name), program); err != nil {
		t.Fatal(err)
	}
	return program
}
