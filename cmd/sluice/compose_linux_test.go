package main

import (
	"encoding/json"
	"fmt"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/goccy/go-yaml"

	"github.com/sluiceproxy/sluice/envoy"
	"github.com/sluiceproxy/sluice/k8s/testenv"
)

// composeNetwork is the address of all containers in TestCompose. As in a
// network of Docker's, what listens on a container's loopback is not reached
// there.
const composeNetwork = "192.0.2.10"

// composeProject has the parts of a compose file that TestCompose runs, as
// Docker Compose understands them.
type composeProject struct {
	Services map[string]composeService
	Volumes  map[string]struct {
		DriverOpts map[string]string `json:"driver_opts"`
	}
}

type composeService struct {
	Image       string
	Command     []string
	Environment map[string]string
	NetworkMode string `json:"network_mode"`
	Volumes     []struct {
		Type, Source, Target string
		ReadOnly             bool `json:"read_only"`
	}
	Ports []struct {
		HostIP    string `json:"host_ip"`
		Published string
		Target    int
	}
	HealthCheck struct{ Test []string }
	DependsOn   map[string]struct{ Condition string } `json:"depends_on"`
}

// image returns the name of the service's image without its tag.
func (s composeService) image() string { return s.Image[:strings.LastIndex(s.Image, ":")] }

// loadCompose reads a compose file as Docker Compose does.
func loadCompose(t *testing.T, path string) (composeProject, error) {
	t.Helper()
	var p composeProject
	c := exec.CommandContext(t.Context(), composeReader(t), path)
	var stderr strings.Builder
	c.Stderr = &stderr
	out, err := c.Output()
	if err != nil {
		return p, fmt.Errorf("%w: %s", err, stderr.String())
	}
	return p, json.Unmarshal(out, &p)
}

// composeOrder returns the names of the services so that each comes after those
// that it depends on.
func composeOrder(services map[string]composeService) []string {
	var order []string
	var add func(name string)
	add = func(name string) {
		if slices.Contains(order, name) {
			return
		}
		for other := range services[name].DependsOn {
			add(other)
		}
		order = append(order, name)
	}
	for name := range services {
		add(name)
	}
	return order
}

// TestCompose checks the compose file by the Compose Specification, and runs the
// command of each container as a process that sees only the container's files
// and has its user: Envoy, the app, sluice, Redis and Prometheus. Grafana is not
// to be had outside its image; its files are read instead.
func TestCompose(t *testing.T) {
	if os.Getenv("SLUICE_LONG") == "" {
		t.Skip("needs root, and builds a reader of compose files: set SLUICE_LONG=1")
	}
	dir, inside := testenv.Machine(t, func(dir string) {
		if err := os.Rename(build(t), filepath.Join(dir, "sluice")); err != nil {
			t.Fatal(err)
		}
		if _, err := envoy.Binary(t.Context(), func(s string) { t.Log(s) }); err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{"compose", "observability"} {
			if err := os.CopyFS(filepath.Join(dir, name), os.DirFS(name)); err != nil {
				t.Fatal(err)
			}
		}
		checkComposeSchema(t, dir)
	}, composeNetwork)
	if !inside {
		return
	}
	project, err := loadCompose(t, filepath.Join(dir, "compose", "compose.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	startCompose(t, dir, project)

	app := "http://" + composeNetwork + ":8080/"
	c := client(t)
	eventually(t, "a request that passes", func() bool {
		r, err := c.Get(app)
		return err == nil && r.Body.Close() == nil && r.StatusCode == 200
	})
	r, body := fetch(t, c, app)
	if body != "Hello from the app.\n" || r.Header.Get("X-Ratelimit-Limit") != "20" {
		t.Errorf("%v %s", r.Header, body)
	}
	eventually(t, "a request that is limited", func() bool {
		r, _ := fetch(t, c, app)
		return r.StatusCode == 429 && r.Header.Get("Retry-After") != ""
	})

	// An editor replaces the config.
	config := filepath.Join(dir, "compose", "sluice", "sluice.yaml")
	text, err := os.ReadFile(config)
	if err != nil {
		t.Fatal(err)
	}
	changed := strings.Replace(string(text), "burst: 20", "burst: 7", 1)
	if err := os.WriteFile(config+"~", []byte(changed), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(config+"~", config); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the new config", func() bool {
		r, _ := fetch(t, c, app)
		return r.Header.Get("X-Ratelimit-Limit") == "7"
	})

	// Prometheus has sluice's metrics under the job, and evaluates the alerts.
	prometheus := "http://" + composeNetwork + ":9090/api/v1/"
	eventually(t, "sluice's metrics in Prometheus", func() bool {
		_, said := get(t, prometheus+"query?query="+url.QueryEscape(`sum by (job) (sluice_checks_total) > 0`))
		return strings.Contains(said, `"metric":{"job":"sluice"}`)
	})
	eventually(t, "the alerts", func() bool {
		_, said := get(t, prometheus+"rules")
		return strings.Contains(said, `"health":"ok"`) && !strings.Contains(said, `"health":"unknown"`)
	})
	if _, said := get(t, prometheus+"rules"); strings.Contains(said, `"health":"err"`) {
		t.Errorf("%s", said)
	}
	checkGrafana(t, dir, project)
}

// checkComposeSchema checks that the compose file is valid, that a misspelt one
// is not, and that only Envoy's port is open to other machines.
func checkComposeSchema(t *testing.T, dir string) {
	t.Helper()
	path := filepath.Join(dir, "compose", "compose.yaml")
	project, err := loadCompose(t, path)
	if err != nil {
		t.Fatal(err)
	}
	for name, s := range project.Services {
		for _, p := range s.Ports {
			if (p.HostIP != "127.0.0.1") != (name == "envoy") || p.Published != strconv.Itoa(p.Target) {
				t.Errorf("%s: port %+v", name, p)
			}
		}
	}
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for right, wrong := range map[string]string{
		"    restart: always\n":                "    restrat: always\n",
		"- socket:/run/sluice":                 "- sockte:/run/sluice",
		"sluice: {condition: service_healthy}": "sluise: {condition: service_healthy}",
		"condition: service_healthy":           "condition: healthy",
	} {
		bad := filepath.Join(dir, "compose", "bad.yaml")
		if !strings.Contains(string(text), right) {
			t.Fatalf("the compose file has no %q", right)
		}
		if err := os.WriteFile(bad, []byte(strings.Replace(string(text), right, wrong, 1)), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := loadCompose(t, bad); err == nil {
			t.Errorf("%q is taken for valid", wrong)
		}
	}
}

// startCompose runs the command of each container, and waits as depends_on says.
func startCompose(t *testing.T, dir string, project composeProject) {
	t.Helper()
	proxy, err := envoy.Binary(t.Context(), func(s string) { t.Log(s) })
	if err != nil {
		t.Fatal(err)
	}
	entry := unique(document(t, "Dockerfile"), `(?m)^ENTRYPOINT \["(.*)"\]$`)
	user := unique(document(t, "Dockerfile"), `(?m)^USER (\d+):`)
	if len(entry) != 1 || len(user) != 1 {
		t.Fatalf("entry point %q, user %q", entry, user)
	}
	id, err := strconv.ParseUint(user[0], 10, 32)
	if err != nil {
		t.Fatal(err)
	}
	// What the images have: a program, the user, the working directory, the entry
	// point, and arguments that stand for how the program was built.
	images := map[string]struct {
		program, target string
		user            uint32
		dir             string
		entry, more     []string
	}{
		"envoyproxy/envoy": {program: proxy, target: "/bin/envoy", user: 101, dir: "/"},
		"prom/prometheus": {program: "prometheus", target: "/bin/prometheus", user: 65534, dir: "/prometheus",
			entry: []string{"prometheus"}},
		"redis": {program: "redis-server", target: "/bin/redis-server", user: 999, dir: "/data",
			more: []string{"--protected-mode", "no"}},
		"ghcr.io/sluiceproxy/sluice": {program: filepath.Join(dir, "sluice"), target: entry[0], user: uint32(id), dir: "/",
			entry: entry},
	}
	hosts := "127.0.0.1 localhost\n"
	for name := range project.Services {
		hosts += composeNetwork + " " + name + "\n"
	}
	volumes := map[string]string{}
	healthy := map[string]func() bool{}
	for _, name := range composeOrder(project.Services) {
		s := project.Services[name]
		for other, d := range s.DependsOn {
			if d.Condition == "service_healthy" {
				eventually(t, other, healthy[other])
			}
		}
		if s.image() == "grafana/grafana" {
			continue // see checkGrafana
		}
		image, ok := images[s.image()]
		if !ok {
			t.Fatalf("%s: the test does not know the image %s", name, s.Image)
		}
		if !strings.Contains(image.program, "/") {
			if image.program, err = exec.LookPath(image.program); err != nil {
				t.Fatalf("%v: install what .ci/test does", err)
			}
		}
		c := newContainer(t, dir, image.user, hosts)
		c.dir = image.dir
		c.install(image.program, image.target)
		for key, value := range s.Environment {
			c.env = append(c.env, key+"="+value)
		}
		for _, v := range s.Volumes {
			source := v.Source
			if v.Type == "volume" {
				if volumes[source] == "" {
					volumes[source] = composeVolume(t, dir, project.Volumes[source].DriverOpts, image.user)
				}
				source = volumes[source]
			}
			c.bind(source, v.Target, v.ReadOnly)
		}
		p := c.start(slices.Concat(image.entry, s.Command, image.more)...)
		healthy[name] = func() bool {
			select {
			case <-p.done:
				t.Fatalf("%s ended:\n%s", name, p.printed())
			default:
			}
			status, _ := c.run(s.HealthCheck.Test[1:]...)
			return status == 0
		}
	}
	for name, s := range project.Services {
		for _, p := range s.Ports {
			if s.image() == "grafana/grafana" {
				continue
			}
			eventually(t, fmt.Sprintf("%s on port %d", name, p.Target), func() bool {
				connection, err := net.Dial("tcp", net.JoinHostPort(composeNetwork, strconv.Itoa(p.Target)))
				return err == nil && connection.Close() == nil
			})
		}
	}
}

// composeVolume makes a named volume. Docker gives one without options the owner
// of the directory in the image.
func composeVolume(t *testing.T, dir string, options map[string]string, owner uint32) string {
	t.Helper()
	path, err := os.MkdirTemp(dir, "volume-")
	if err != nil {
		t.Fatal(err)
	}
	if options == nil {
		err = os.Chown(path, int(owner), int(owner))
	} else {
		err = syscall.Mount(options["device"], path, options["type"], 0, options["o"])
	}
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// checkGrafana checks that Grafana's files have the fields that its
// documentation names, that the data source is the compose file's Prometheus,
// and that the dashboard is where its files say.
func checkGrafana(t *testing.T, dir string, project composeProject) {
	t.Helper()
	grafana := project.Services["grafana"]
	mounted := map[string]string{}
	for _, v := range grafana.Volumes {
		mounted[v.Target] = v.Source
	}
	read := func(target string, into any) {
		t.Helper()
		text, err := os.ReadFile(mounted[target])
		if err == nil {
			err = yaml.UnmarshalWithOptions(text, into, yaml.Strict())
		}
		if err != nil {
			t.Fatalf("%s: %v", target, err)
		}
	}
	var sources struct {
		APIVersion  int `yaml:"apiVersion"`
		Datasources []struct {
			Name, UID, Type, Access, URL string
			IsDefault                    bool `yaml:"isDefault"`
			JSONData                     struct {
				TimeInterval string `yaml:"timeInterval"`
			} `yaml:"jsonData"`
		}
	}
	read("/etc/grafana/provisioning/datasources/sluice.yaml", &sources)
	var providers struct {
		APIVersion int `yaml:"apiVersion"`
		Providers  []struct {
			Name, Type string
			Options    struct{ Path string }
		}
	}
	read("/etc/grafana/provisioning/dashboards/sluice.yaml", &providers)
	var scraping struct {
		Global struct {
			Interval string `yaml:"scrape_interval"`
		}
	}
	text, err := os.ReadFile(filepath.Join(dir, "compose", "prometheus.yaml"))
	if err == nil {
		err = yaml.Unmarshal(text, &scraping)
	}
	if err != nil {
		t.Fatal(err)
	}
	if s := sources.Datasources; sources.APIVersion != 1 || len(s) != 1 || s[0].Type != "prometheus" || !s[0].IsDefault ||
		s[0].Access != "proxy" || s[0].URL != "http://prometheus:9090" ||
		s[0].JSONData.TimeInterval != scraping.Global.Interval {
		t.Errorf("data sources %+v, want one at the service prometheus, which scrapes each %s", sources,
			scraping.Global.Interval)
	}
	home := grafana.Environment["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
	if p := providers.Providers; providers.APIVersion != 1 || len(p) != 1 || p[0].Type != "file" ||
		p[0].Options.Path != filepath.Dir(home) || filepath.Base(mounted[home]) != "dashboard.json" {
		t.Errorf("providers %+v, and the home dashboard %s is %q", providers, home, mounted[home])
	}
}
