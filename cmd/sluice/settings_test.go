package main

import (
	"strings"
	"syscall"
	"testing"
)

// TestWrongSettings checks that an invalid value of a flag is wrong usage, and
// one of the environment or the file an invalid config.
func TestWrongSettings(t *testing.T) {
	long := "unix:///" + strings.Repeat("x", 107)
	for _, tt := range []struct {
		args   []string
		status int
		stderr string
	}{
		{[]string{"run", "--grpc", "nowhere"}, 2, `--grpc: listen.grpc: invalid address "nowhere"; want host:port`},
		{[]string{"run", "--grpc", ""}, 2, `--grpc: listen.grpc: invalid address ""; want host:port`},
		{[]string{"run", "--grace", "soon"}, 2, `--grace: grace: invalid duration "soon"; want one from`},
		{[]string{"run", "--log-level", "loud"}, 2, `--log-level: log_level: unknown value "loud"; want one of debug`},
		{[]string{"run", "--domain", "a b"}, 2, `--domain: domain: invalid value "a b"; want`},
		{[]string{"run", "--redis", "http://h"}, 2, `--redis: store.redis.url: `},
		{[]string{"run", "--grpc", long}, 2, `: the path has 108 bytes; the maximum for a unix socket is 107`},
		{[]string{"demo", "--redis", "http://h"}, 2, `--redis: store.redis.url: `},
		{[]string{"webhook", "--client-name", "api"}, 2, `--client-name requires --client-ca-file`},
		{[]string{"webhook", "--image", "a b"}, 2, `--image "a b": must be an image reference of at most 512 bytes`},
		{[]string{"healthcheck", "--grpc", long}, 2, `: the path has 108 bytes; the maximum for a unix socket is 107`},
		{
			[]string{"run", "--config", file(t, "sluice.yaml", "listen: {grpc: '"+long+"'}\n")}, 1,
			`: the path has 108 bytes; the maximum for a unix socket is 107`,
		},
		{
			[]string{"run", "--config", file(t, "sluice.yaml", "mode: x\n")}, 1,
			`mode: unknown value "x"; want one of enforce, shadow`,
		},
	} {
		if status, stdout, stderr := sluice(t, nil, tt.args...); status != tt.status || stdout != "" ||
			!strings.Contains(stderr, tt.stderr) {
			t.Errorf("%v: %d %s%s\nwant %d %s", tt.args, status, stdout, stderr, tt.status, tt.stderr)
		}
	}
	if status, _, stderr := sluice(t, []string{"SLUICE_GRACE=soon"}, "run"); status != 1 ||
		!strings.HasPrefix(stderr, "SLUICE_GRACE: grace: ") {
		t.Errorf("%d %s", status, stderr)
	}
}

// TestUnknownVariables checks that the sidecar logs misspelt environment
// variables at its start.
func TestUnknownVariables(t *testing.T) {
	// Misspelt, unknown, named by the config, and known ones.
	p := start(t, "sluice", []string{
		"SLUICE_GRCP=127.0.0.1:1", "SLUICE_ONFAILURE=allow", "SLUICE_SHOP=shop", "SLUICE_DOMAIN=known",
		"SLUICE_PORT=tcp://10.0.0.1:9001", "SLUICE_SERVICE_HOST=10.0.0.1", "SLUICE_SERVICE_PORT_GRPC=9001",
		"SLUICE_PORT_9001_TCP_ADDR=10.0.0.1", "SLUICE_WEB_SERVICE_PORT=80",
	}, "run", "--config", file(t, "sluice.yaml", freePorts+"store: {redis: {url: 'redis://127.0.0.1:1', key_prefix: "+
		"'${SLUICE_SHOP}'}}\n"))
	l := startLines(t, p)
	eventually(t, "the start", func() bool { return l.count(`"serving"`) == 1 })
	if l.count(`"variables":["SLUICE_GRCP","SLUICE_ONFAILURE"]`) != 1 {
		t.Errorf("%s", l.text())
	}
	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	<-p.done
}
