package main

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"

	"github.com/sluiceproxy/sluice/limiter/redistest"
)

// dashboard has the parts of a Grafana dashboard that tests read.
type dashboard struct {
	Panels []struct {
		ID      int
		Type    string
		Title   string
		GridPos struct{ X, Y, W, H int }
		Targets []struct{ Expr string }
	}
}

func readDashboard(t testing.TB) (d dashboard) {
	t.Helper()
	text, err := os.ReadFile("observability/dashboard.json")
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(text, &d); err != nil {
		t.Fatal(err)
	}
	return d
}

// tool runs a program that must succeed.
func tool(t testing.TB, directory, name string, args ...string) {
	t.Helper()
	cmd := exec.Command(name, args...)
	cmd.Dir = directory
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%s %v: %v\n%s", name, args, err, out)
	}
}

// TestAlertsAndDashboard checks that each alert fires when it should, and only
// then, and that no panel hides another.
func TestAlertsAndDashboard(t *testing.T) {
	tool(t, "observability", "promtool", "check", "rules", "alerts.yaml")
	tool(t, "observability", "promtool", "test", "rules", "alerts_test.yaml")
	rules, err := os.ReadFile("observability/alerts.yaml")
	if err != nil {
		t.Fatal(err)
	}
	tests, err := os.ReadFile("observability/alerts_test.yaml")
	if err != nil {
		t.Fatal(err)
	}
	runbook, err := os.ReadFile("observability/RUNBOOK.md")
	if err != nil {
		t.Fatal(err)
	}
	alerts := regexp.MustCompile(`- alert: (\w+)\n(?s:.*?)runbook: "(.*)"`)
	for _, names := range alerts.FindAllStringSubmatch(string(rules), -1) {
		if _, section, ok := strings.Cut(string(runbook), "\n## "+names[2]+"\n"); !ok ||
			!strings.Contains(strings.SplitN(section, "\n", 2)[0], names[1]) {
			t.Errorf("the runbook has no %q that names %s", names[2], names[1])
		}
	}
	for _, alert := range regexp.MustCompile(`- alert: (\w+)`).FindAllStringSubmatch(string(rules), -1) {
		name := "alertname: " + alert[1]
		if n := strings.Count(string(tests), name+"\n") + strings.Count(string(tests), name+"}"); n < 2 {
			t.Errorf("%s is tried %d times, want firing and silent", alert[1], n)
		}
	}
	panels := readDashboard(t).Panels
	for i, p := range panels {
		for _, q := range panels[:i] {
			if a, b := p.GridPos, q.GridPos; p.ID == q.ID || a.X < b.X+b.W && b.X < a.X+a.W && a.Y < b.Y+b.H && b.Y < a.Y+a.H ||
				a.X+a.W > 24 {
				t.Errorf("%q lies on %q", p.Title, q.Title)
			}
		}
	}
}

// TestPrometheus scrapes a running demo under load with a real Prometheus. It
// checks that each query of the dashboard returns data, and that each rule can
// be evaluated.
func TestPrometheus(t *testing.T) {
	config := file(t, "sluice.yaml", patientStore+`
limits:
  - {name: per-client, key: client.ip, rate: 20/s, match: {paths: [/]}}
  - {name: shadow, mode: shadow, rate: 1/s}
  - {name: settling, rate: 1000/s, cost: 2, settle: 'response.code == 200 ? 1 : 3'}
  - {name: leased, rate: 100000/s, lease: 1s}
  - {name: bad, match: {paths: [/bad]}, rate: 1/s, key: 'request.path.split("?")[1]'}
`)
	d := startDemo(t, "--config", config, "--redis", redistest.Start(t).URL())
	underLoad(t, d.url, func(i int, r *http.Request) { r.URL.Path = []string{"/", "/", "/bad"}[i%3] })

	// Its Envoy has no admin interface. This one does, and asks the same sidecar.
	binary, bootstrap := plainEnvoy(t, d.grpc, startUpstream(t).Listener.Addr().String())
	proxy, addr := runEnvoy(t, binary, bootstrap)
	view, err := proxy.Admin()
	if err != nil {
		t.Fatal(err)
	}
	fetch(t, client(t), "http://"+addr+"/")

	rules, err := filepath.Abs("observability/alerts.yaml")
	if err != nil {
		t.Fatal(err)
	}
	scraped := strings.TrimPrefix(d.metrics, "http://")
	settings := file(t, "prometheus.yml", fmt.Sprintf(`
global: {scrape_interval: 500ms, evaluation_interval: 500ms}
rule_files: [%q]
scrape_configs:
- {job_name: sluice, static_configs: [{targets: [%q]}]}
- {job_name: envoy, metrics_path: /stats/prometheus, static_configs: [{targets: [%q]}]}
`, rules, scraped, view))
	addr = fmt.Sprintf("127.0.0.1:%d", freePort(t))
	server := exec.Command(
		"prometheus", "--config.file="+settings, "--storage.tsdb.path="+t.TempDir(), "--web.listen-address="+addr,
	)
	var log strings.Builder
	server.Stderr = &log
	server.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := server.Start(); err != nil {
		t.Fatalf("prometheus (.ci/test installs it): %v", err)
	}
	t.Cleanup(func() {
		_ = server.Process.Signal(syscall.SIGTERM)
		_ = server.Wait()
		if t.Failed() {
			t.Log(log.String())
		}
	})
	c := client(t)
	ask := func(path string, into any) bool {
		response, err := c.Get("http://" + addr + path)
		if err != nil {
			return false
		}
		defer func() { _ = response.Body.Close() }()
		return json.NewDecoder(response.Body).Decode(into) == nil && response.StatusCode == 200
	}
	// value returns the first value of a query that is a number.
	value := func(query string) (first string) {
		var r struct {
			Data struct{ Result []struct{ Value [2]any } }
		}
		if !ask("/api/v1/query?query="+url.QueryEscape(query), &r) {
			return ""
		}
		for _, one := range r.Data.Result {
			if one.Value[1] != "NaN" {
				return fmt.Sprint(one.Value[1])
			}
		}
		return ""
	}
	eventually(t, "Prometheus", func() bool { return ask("/-/ready", new(any)) || value("up") == "1" })

	var page string
	eventually(t, "the first mistake in the metrics", func() bool { // the last metric exists after the first mistake
		_, page = get(t, "http://"+scraped+"/metrics")
		return strings.Contains(page, "sluice_config_mistakes_total")
	})
	exported := make(map[string]bool)
	for _, m := range regexp.MustCompile(`(?m)^# TYPE (\S+)`).FindAllStringSubmatch(page, -1) {
		exported[m[1]] = true
	}
	_, page = get(t, "http://"+view+"/stats/prometheus")
	for _, m := range regexp.MustCompile(`(?m)^# TYPE (\S+)`).FindAllStringSubmatch(page, -1) {
		exported[m[1]] = true
	}
	filled := strings.NewReplacer("$__rate_interval", "3s", "$job", ".*", "$domain", ".*", "$limit", ".*")
	names := regexp.MustCompile(`\b(?:sluice|grpc_server|process|go|envoy_http|envoy_cluster_upstream)_\w+`)
	queries := 0
	for _, p := range readDashboard(t).Panels {
		for _, q := range p.Targets {
			queries++
			for _, name := range names.FindAllString(q.Expr, -1) {
				if !exported[family(name)] {
					t.Errorf("%q asks for %s, which is not exported", p.Title, name)
				}
			}
			eventually(
				t, fmt.Sprintf("data for %q: %s", p.Title, q.Expr), func() bool { return value(filled.Replace(q.Expr)) != "" },
			)
		}
	}
	if queries < 40 {
		t.Errorf("only %d queries", queries)
	}

	text, err := os.ReadFile(rules)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range names.FindAllString(string(text), -1) {
		if !exported[family(name)] {
			t.Errorf("a rule asks for %s, which is not exported", name)
		}
	}
	var evaluated struct {
		Data struct {
			Groups []struct {
				Rules []struct{ Name, Health, LastError string }
			}
		}
	}
	eventually(t, "the evaluation of the rules", func() bool {
		if !ask("/api/v1/rules", &evaluated) || len(evaluated.Data.Groups) != 1 {
			return false
		}
		for _, r := range evaluated.Data.Groups[0].Rules {
			if r.Health == "unknown" {
				return false
			}
		}
		return true
	})
	for _, r := range evaluated.Data.Groups[0].Rules {
		if r.Health != "ok" {
			t.Errorf("%s: %s %s", r.Name, r.Health, r.LastError)
		}
	}
}
