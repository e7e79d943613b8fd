// Package built gives tests programs that the product's go.mod knows nothing of.
package built

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
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
	return once(t, path.Base(pkg), version, func(part string) *exec.Cmd {
		install := exec.CommandContext(t.Context(), "go", "install", "-trimpath", "-ldflags", "-s -w", pkg+"@"+version)
		install.Dir = part // outside the product's module
		install.Env = append(os.Environ(), "GOBIN="+part)
		return install
	})
}

// Own is Program, of the program in a directory with a go.mod of its own: the directory's last name, as of what its files say.
func Own(t *testing.T, dir string) string {
	t.Helper()
	hash := sha256.New()
	for _, pattern := range []string{"*.go", "go.*"} {
		files, err := filepath.Glob(filepath.Join(dir, pattern))
		if err != nil || len(files) == 0 {
			t.Fatalf("%s: no %s: %v", dir, pattern, err)
		}
		for _, file := range files {
			text, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			hash.Write(text)
		}
	}
	return once(t, filepath.Base(dir), hex.EncodeToString(hash.Sum(nil)[:6]), func(part string) *exec.Cmd {
		build := exec.CommandContext(t.Context(), "go", "build", "-trimpath", "-ldflags", "-s -w", "-o", part+"/", ".")
		build.Dir = dir
		build.Env = append(os.Environ(), "GOWORK=off")
		return build
	})
}

// once is the path of a program of a version in the user's cache, where the command that build returns puts it into a directory first.
func once(t *testing.T, name, version string, build func(part string) *exec.Cmd) string {
	t.Helper()
	cache, err := os.UserCacheDir()
	if err != nil {
		t.Fatal(err)
	}
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
	t.Logf("building %s %s into %s; this happens once", name, version, home)
	c := build(part)
	c.Env = append(c.Env, "CGO_ENABLED=0", "GOFLAGS=")
	if out, err := c.CombinedOutput(); err != nil {
		t.Fatalf("%s %s: %v\n%s", name, version, err, out)
	}
	if err := os.Rename(filepath.Join(part, name), program); err != nil {
		t.Fatal(err)
	}
	return program
}

// Packages returns a directory in the user's cache that holds what an
// installer made of files, which pin the versions. The installer runs once
// for each content of files, in an empty directory that has a copy of them.
// Its first run takes up to some minutes, and the network.
func Packages(t *testing.T, files []string, command ...string) string {
	t.Helper()
	hash := sha256.New()
	for _, arg := range command {
		_, _ = fmt.Fprintf(hash, "%q", arg)
	}
	texts := map[string][]byte{}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		_, _ = fmt.Fprintf(hash, "%q%q", filepath.Base(file), text)
		texts[filepath.Base(file)] = text
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		t.Fatal(err)
	}
	home := filepath.Join(cache, "sluice", fmt.Sprintf("packages-%s-%x", filepath.Base(filepath.Dir(files[0])), hash.Sum(nil)[:6]))
	if info, err := os.Stat(home); err == nil && info.IsDir() {
		return home
	}
	if err := os.MkdirAll(filepath.Dir(home), 0o755); err != nil {
		t.Fatal(err)
	}
	part, err := os.MkdirTemp(filepath.Dir(home), "installing-") // so that what is there under its name is whole
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = os.RemoveAll(part) }()
	for name, text := range texts {
		if err := os.WriteFile(filepath.Join(part, name), text, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("installing %s with %s; this happens once", home, command[0])
	install := exec.CommandContext(t.Context(), command[0], command[1:]...)
	install.Dir = part
	if out, err := install.CombinedOutput(); err != nil {
		t.Fatalf("%q: %v\n%s", command, err, out)
	}
	if err := os.Rename(part, home); err != nil {
		if _, there := os.Stat(home); there == nil { // another process was faster
			return home
		}
		t.Fatal(err)
	}
	return home
}
