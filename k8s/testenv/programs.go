// Package testenv provides what tests need of the machine that they run on:
// programs that are not dependencies of the product's go.mod, and network
// namespaces. Programs are kept in the directory sluice of the user's cache
// directory ([os.UserCacheDir]). All functions fail the test on an error.
package testenv

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"syscall"
	"testing"
)

// Program installs a main package at a version of its module, as go install
// does, and returns the path of the executable, whose name is the last element
// of pkg. The first call takes up to some minutes and needs the network; later
// calls return the cached executable.
func Program(t *testing.T, pkg, version string) string {
	t.Helper()
	return build(t, path.Base(pkg), version, func(dir string) *exec.Cmd {
		install := exec.CommandContext(t.Context(), "go", "install", "-trimpath", "-ldflags", "-s -w", pkg+"@"+version)
		install.Dir = dir // outside the product's module
		install.Env = append(os.Environ(), "GOBIN="+dir)
		return install
	})
}

// LocalProgram builds the main package in a directory that has its own go.mod,
// and returns the path of the executable, whose name is the last element of
// dir. It builds again when a Go file or the module's requirements change.
func LocalProgram(t *testing.T, dir string) string {
	t.Helper()
	hash := sha256.New()
	for _, pattern := range []string{"*.go", "go.*"} {
		files, err := filepath.Glob(filepath.Join(dir, pattern))
		if err != nil || len(files) == 0 {
			t.Fatalf("no %s in %s: %v", pattern, dir, err)
		}
		for _, file := range files {
			text, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			hash.Write(text)
		}
	}
	return build(t, filepath.Base(dir), hex.EncodeToString(hash.Sum(nil)[:6]), func(out string) *exec.Cmd {
		c := exec.CommandContext(t.Context(), "go", "build", "-trimpath", "-ldflags", "-s -w", "-o", out+"/", ".")
		c.Dir = dir
		c.Env = append(os.Environ(), "GOWORK=off")
		return c
	})
}

// build returns the path of a version of a program in the cache. If it is not
// there, build runs the command that command returns, which must write the
// program into dir under its name.
func build(t *testing.T, name, version string, command func(dir string) *exec.Cmd) string {
	t.Helper()
	cache, err := os.UserCacheDir()
	if err != nil {
		t.Fatal(err)
	}
	home := filepath.Join(cache, "sluice", name+"-"+version)
	program := filepath.Join(home, name)
	isBuilt := func() bool {
		info, err := os.Stat(program)
		return err == nil && info.Mode().IsRegular()
	}
	if isBuilt() {
		return program
	}
	defer Lock(t, home)()
	if isBuilt() {
		return program
	}
	// The final name appears only once the program is complete. A build may have
	// been killed.
	temporary := filepath.Join(home, "building")
	if err := errors.Join(os.RemoveAll(temporary), os.MkdirAll(temporary, 0o755)); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = os.RemoveAll(temporary) }()
	t.Logf("building %s %s into %s (only once)", name, version, home)
	c := command(temporary)
	c.Env = append(c.Env, "CGO_ENABLED=0", "GOFLAGS=")
	if out, err := c.CombinedOutput(); err != nil {
		t.Fatalf("%s %s: %v\n%s", name, version, err, out)
	}
	if err := os.Rename(filepath.Join(temporary, name), program); err != nil {
		t.Fatal(err)
	}
	return program
}

// Build is a function that builds a program if the cache does not have it.
type Build struct {
	Name string
	Run  func(*testing.T) string
}

// BuildAhead builds programs, each in a subtest of its own, so that one that fails
// keeps no other from being built. The tests that run them would build what they
// lack; .ci/test has it done in the background of tests that leave the processors
// idle. Without SLUICE_LONG it skips the test.
func BuildAhead(t *testing.T, programs []Build) {
	t.Helper()
	if os.Getenv("SLUICE_LONG") == "" {
		t.Skip("takes some ten minutes: SLUICE_LONG=1")
	}
	for _, program := range programs {
		t.Run(program.Name, func(t *testing.T) { program.Run(t) })
	}
}

// Lock waits until no other process builds what is kept at a path of the cache,
// and keeps others waiting until release is called.
func Lock(t *testing.T, path string) (release func()) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	lock, err := os.Create(path + ".lock")
	if err != nil {
		t.Fatal(err)
	}
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	return func() { _ = lock.Close() }
}

// Packages runs an installer such as npm or pip, and returns the directory of
// the cache in which it ran. files are its inputs, which must pin the versions;
// the installer runs in a directory that contains only copies of them, once for
// each content of files. The first run takes up to some minutes and needs the
// network.
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
	home := filepath.Join(cache, "sluice", fmt.Sprintf("packages-%s-%x", filepath.Base(filepath.Dir(files[0])),
		hash.Sum(nil)[:6]))
	if info, err := os.Stat(home); err == nil && info.IsDir() {
		return home
	}
	if err := os.MkdirAll(filepath.Dir(home), 0o755); err != nil {
		t.Fatal(err)
	}
	// The final name appears only once everything is installed.
	temporary, err := os.MkdirTemp(filepath.Dir(home), "installing-")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = os.RemoveAll(temporary) }()
	for name, text := range texts {
		if err := os.WriteFile(filepath.Join(temporary, name), text, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("installing %s with %s (only once)", home, command[0])
	install := exec.CommandContext(t.Context(), command[0], command[1:]...)
	install.Dir = temporary
	if out, err := install.CombinedOutput(); err != nil {
		t.Fatalf("%q: %v\n%s", command, err, out)
	}
	if err := os.Rename(temporary, home); err != nil {
		if _, missing := os.Stat(home); missing == nil { // another process was faster
			return home
		}
		t.Fatal(err)
	}
	return home
}
