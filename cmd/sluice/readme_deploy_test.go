package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/goccy/go-yaml"

	"github.com/sluiceproxy/sluice/limiter/redistest"
)

// TestUnit checks that the systemd unit uses existing flags, that systemd knows
// all its settings, and that the config beside it is valid.
func TestUnit(t *testing.T) {
	if status, stdout, stderr := sluice(t, nil, "validate", "systemd/sluice.yaml"); status != 0 || stderr != "" {
		t.Errorf("%s%s", stdout, stderr)
	}
	unit := document(t, "cmd/sluice/systemd/sluice.service")
	commands := unique(unit, `(?m)^ExecStart=/usr/local/bin/sluice (.*)$`)
	if len(commands) != 1 {
		t.Fatalf("the unit's commands are %q", commands)
	}
	// The config does not exist here, but flags are parsed before it is read.
	status, _, stderr := sluice(t, nil, strings.Fields(commands[0])...)
	if status != statusNo || !strings.Contains(stderr, "/etc/sluice/sluice.yaml") {
		t.Errorf("%d %s", status, stderr)
	}
	if _, err := exec.LookPath("systemd-analyze"); err != nil {
		t.Fatalf("systemd-analyze is missing: install systemd: %v", err)
	}
	path := file(t, "sluice.service", strings.Replace(unit, "/usr/local/bin/sluice", build(t), 1))
	said, err := exec.CommandContext(t.Context(), "systemd-analyze", "verify", path).CombinedOutput()
	for line := range strings.Lines(string(said)) {
		if strings.Contains(line, "sluice") { // and not of other units of the machine
			t.Errorf("systemd-analyze: %s", line)
		}
	}
	if err != nil {
		t.Errorf("systemd-analyze: %v %s", err, said)
	}
}

// TestComposeFiles checks that the commands of the compose file exist, that its
// config is valid for the shared socket, that its Envoy has what sluice prints,
// and that its Redis is set up as limiter/README.md says. TestCompose runs it.
func TestComposeFiles(t *testing.T) {
	var compose struct {
		Services map[string]struct {
			Image       string
			Command     []string
			Volumes     []string
			HealthCheck struct{ Test []string }
		}
		Volumes map[string]struct {
			DriverOpts map[string]string `yaml:"driver_opts"`
		}
	}
	if err := yaml.Unmarshal([]byte(document(t, "cmd/sluice/compose/compose.yaml")), &compose); err != nil {
		t.Fatal(err)
	}
	for name, s := range compose.Services {
		for _, v := range s.Volumes {
			from, _, _ := strings.Cut(v, ":")
			if _, ok := compose.Volumes[from]; !strings.HasPrefix(from, ".") {
				if !ok {
					t.Errorf("%s: there is no volume %s", name, from)
				}
			} else if _, err := os.Stat(filepath.Join("compose", from)); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		}
	}
	// The socket of the config is in the volume that both containers mount. The
	// owner of the volume is the image's user.
	const socket = "unix:///run/sluice/authz.sock"
	for _, name := range []string{"envoy", "sluice"} {
		if !slices.Contains(compose.Services[name].Volumes, "socket:/run/sluice") {
			t.Errorf("%s does not have the socket", name)
		}
	}
	user := unique(document(t, "Dockerfile"), `(?m)^USER (\d+):`)
	if len(user) != 1 || !strings.HasPrefix(compose.Volumes["socket"].DriverOpts["o"], "uid="+user[0]+",") {
		t.Errorf("the socket's volume is %v, and the image's user %v", compose.Volumes["socket"], user)
	}
	config := filepath.Join("compose", "sluice", "sluice.yaml")
	if status, stdout, stderr := sluice(t, nil, "validate", config); status != 0 || stderr != "" {
		t.Errorf("%s%s", stdout, stderr)
	}
	status, bootstrap, stderr := sluice(t, nil, "envoy", "plain", "--config", config)
	if path := strings.TrimPrefix(socket, "unix://"); status != 0 ||
		!strings.Contains(bootstrap, fmt.Sprintf("pipe: { path: %q }", path)) {
		t.Errorf("Envoy does not ask at %s: %s", path, stderr)
	}
	if bootstrap != document(t, "cmd/sluice/compose/envoy.yaml") {
		t.Errorf("compose/envoy.yaml is not what `sluice envoy plain --config %s` prints", config)
	}
	version := unique(document(t, "k8s/chart/Chart.yaml"), `(?m)^appVersion: (\S+)$`)
	if len(version) != 1 || !strings.HasSuffix(compose.Services["sluice"].Image, ":"+version[0]+"}") {
		t.Errorf("the image is %s, and the chart's version %v", compose.Services["sluice"].Image, version)
	}
	// The commands are run without the paths that exist only in the container.
	s := compose.Services["sluice"]
	if status, _, stderr := sluice(t, nil, s.Command...); status != statusNo ||
		!strings.Contains(stderr, "/etc/sluice/sluice.yaml") {
		t.Errorf("%v: %d %s", s.Command, status, stderr)
	}
	entry := unique(document(t, "Dockerfile"), `(?m)^ENTRYPOINT \["(.*)"\]$`)
	probe := s.HealthCheck.Test
	if len(entry) != 1 || len(probe) < 3 || probe[0] != "CMD" || probe[1] != entry[0] || probe[len(probe)-1] != socket {
		t.Fatalf("the probe is %q", probe)
	}
	at := "unix://" + filepath.Join(t.TempDir(), "a.sock")
	startSluice(t, "--config", config, "--redis", redistest.Start(t).URL(), "--grpc", at)
	probe[len(probe)-1] = at
	if status, _, stderr := sluice(t, nil, probe[2:]...); status != 0 {
		t.Errorf("%v: %s", probe, stderr)
	}
	// Redis
	command := compose.Services["redis"].Command
	if len(command) == 0 || command[0] != "redis-server" {
		t.Fatalf("the Redis runs %q", command)
	}
	redis := redistest.Start(t, append(command[1:], "--maxmemory", "100mb")...) // without one nothing is evicted anyway
	status, stdout, stderr := sluice(
		t, nil, "doctor", "--config",
		file(t, "doctor.yaml", fmt.Sprintf("store: {redis: {url: %q}}\nlimits: []\n", redis.URL())),
	)
	if status != 0 || strings.Contains(stdout, "fail  ") || strings.Contains(stdout, "warn  eviction") ||
		strings.Contains(stdout, "warn  persistence") {
		t.Errorf("%d %s%s", status, stdout, stderr)
	}
}
