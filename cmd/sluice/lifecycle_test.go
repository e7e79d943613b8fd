package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health/grpc_health_v1"

	"github.com/sluiceproxy/sluice/limiter/redistest"
)

const perClient = `
limits:
  - name: per-client
    key: client.ip
    rate: 1/h
    burst: 5
`

// dial connects to the gRPC address of a sluice.
func dial(t testing.TB, addr string) *grpc.ClientConn {
	t.Helper()
	if filepath.IsAbs(addr) {
		addr = "unix://" + addr
	} else {
		addr = "passthrough:///" + addr
	}
	conn, err := grpc.NewClient(addr, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

// from returns a check of GET path by the client ip.
func from(ip, path string) *authv3.CheckRequest {
	return checkRequest(ip, "GET", path, nil)
}

// check sends a check and returns "ok" or the HTTP status of the denial.
func check(t testing.TB, conn *grpc.ClientConn, r *authv3.CheckRequest) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), within)
	defer cancel()
	answer, err := authv3.NewAuthorizationClient(conn).Check(ctx, r)
	if err != nil {
		return err.Error()
	}
	if denied := answer.GetDeniedResponse(); denied != nil && answer.GetStatus().GetCode() != int32(codes.OK) {
		return fmt.Sprint(int(denied.GetStatus().GetCode()))
	}
	return "ok"
}

// get requests a URL of one of the HTTP listeners.
func get(t testing.TB, url string) (status int, body string) {
	t.Helper()
	c := http.Client{Timeout: within}
	r, err := c.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = r.Body.Close() }()
	b, err := io.ReadAll(r.Body)
	if err != nil {
		t.Fatal(err)
	}
	return r.StatusCode, strings.TrimSpace(string(b))
}

func TestRun(t *testing.T) {
	p := startSluice(t, "--config", file(t, "sluice.yaml", perClient))
	conn := dial(t, p.grpc)
	for i, want := range []string{"ok", "ok", "ok", "ok", "ok", "429", "429"} {
		if got := check(t, conn, from("203.0.113.1", "/")); got != want {
			t.Errorf("check %d: %s, want %s", i+1, got, want)
		}
	}
	if got := check(t, conn, from("203.0.113.2", "/")); got != "ok" {
		t.Errorf("another client: %s", got)
	}
	for path, want := range map[string]string{"/healthz": "200 ok", "/readyz": "200 ok", "/metrics": "200", "/": "404"} {
		if status, body := get(t, "http://"+p.metrics+path); !strings.HasPrefix(fmt.Sprint(status, " ", body), want) {
			t.Errorf("%s: %d %s", path, status, body)
		}
	}
	if status, body := get(t, "http://"+p.metrics+"/debug/pprof/"); status != 404 {
		t.Errorf("profiles for strangers: %d %s", status, body)
	}
	if status, _ := get(t, "http://"+p.admin+"/debug/pprof/symbol"); status != 200 {
		t.Errorf("profiles: %d", status)
	}
	_, metrics := get(t, "http://"+p.metrics+"/metrics")
	for _, want := range []string{
		`sluice_checks_total{decision="allowed"} 6`,
		`sluice_checks_total{decision="limited"} 2`,
		`sluice_checks_total{decision="failed_closed"} 0`,
		`sluice_limit_decisions_total{decision="limited",limit="per-client"} 2`,
		`sluice_rejections_total{limit="per-client"} 2`,
		`sluice_tokens_taken_total{limit="per-client"} 6`,
		`sluice_janitor_entries{table="buckets"} 2`,
		`sluice_check_seconds_count 8`,
		`go_goroutines`, `process_resident_memory_bytes`,
	} {
		if !strings.Contains(metrics, want) {
			t.Errorf("no %s in /metrics", want)
		}
	}
	if status, stdout, stderr := sluice(t, nil, "healthcheck", "--grpc", p.grpc); status != 0 || stdout+stderr != "" {
		t.Errorf("healthcheck: %d %s%s", status, stdout, stderr)
	}
}

// TestRunWithoutConfig checks that every request passes without a config.
func TestRunWithoutConfig(t *testing.T) {
	p := startSluice(t)
	if got := check(t, dial(t, p.grpc), from("203.0.113.1", "/")); got != "ok" {
		t.Error(got)
	}
	if _, metrics := get(t, "http://"+p.metrics+"/metrics"); !strings.Contains(
		metrics,
		`sluice_checks_total{decision="unmatched"} 1`,
	) {
		t.Error("not counted as unmatched")
	}
}

func TestRunOnUnixSocket(t *testing.T) {
	path := filepath.Join(t.TempDir(), "authz.sock")
	p := startSluice(t, "--grpc", "unix://"+path, "--config", file(t, "sluice.yaml", perClient))
	if got := check(t, dial(t, path), from("203.0.113.1", "/")); got != "ok" {
		t.Error(got)
	}
	if status, _, stderr := sluice(t, []string{"SLUICE_GRPC=unix://" + path}, "healthcheck"); status != 0 {
		t.Errorf("healthcheck: %d %s", status, stderr)
	}
	status, _, stderr := sluice(t, nil, "run", "--grpc", "unix://"+path)
	if want := "sluice: listen.grpc: listen unix " + path + ": address already in use\n"; status != 1 || stderr != want {
		t.Errorf("a second one: %d %s", status, stderr)
	}
	p.stop()
	if got := check(t, dial(t, startSluice(t, "--grpc", "unix://"+path).grpc), from("203.0.113.1", "/")); got != "ok" {
		t.Errorf("its successor: %s", got)
	}
}

// TestDrain checks that on SIGTERM health reports it first, then the calls in
// flight are answered, and then the process ends.
func TestDrain(t *testing.T) {
	server := redistest.Start(t)
	p := startSluice(t, "--redis", server.URL(), "--config", file(t, "sluice.yaml", perClient+`
on_failure: deny
store: {redis: {url: "redis://replaced", timeout: 5s}}
`))
	conn := dial(t, p.grpc)
	if got := check(t, conn, from("203.0.113.1", "/")); got != "ok" {
		t.Fatal(got)
	}
	watch, err := grpc_health_v1.NewHealthClient(conn).Watch(t.Context(), &grpc_health_v1.HealthCheckRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if got, err := watch.Recv(); err != nil || got.Status != grpc_health_v1.HealthCheckResponse_SERVING {
		t.Fatal(got, err)
	}
	redis := server.Client()
	if err := redis.Do(t.Context(), "CLIENT", "PAUSE", "60000", "WRITE").Err(); err != nil {
		t.Fatal(err)
	}
	answer := make(chan string, 1)
	go func() { answer <- check(t, conn, from("203.0.113.1", "/")) }()
	eventually(t, "the check to be in flight", func() bool {
		return strings.Contains(redis.ClientList(t.Context()).Val(), "flags=bU ")
	})

	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if got, err := watch.Recv(); err != nil || got.Status != grpc_health_v1.HealthCheckResponse_NOT_SERVING {
		t.Errorf("health while draining: %v, %v", got, err)
	}
	if status, body := get(t, "http://"+p.metrics+"/readyz"); status != 503 || body != "draining" {
		t.Errorf("/readyz: %d %s", status, body)
	}
	if status, _ := get(t, "http://"+p.metrics+"/healthz"); status != 200 {
		t.Errorf("/healthz: %d", status)
	}
	// timeout(1) sends two SIGTERMs. The calls in flight are still answered.
	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := redis.Do(t.Context(), "CLIENT", "UNPAUSE").Err(); err != nil {
		t.Fatal(err)
	}
	if got := <-answer; got != "ok" {
		t.Errorf("in flight: %s", got)
	}
	<-p.done
	if _, err := net.DialTimeout("tcp", p.grpc, time.Second); err == nil {
		t.Error("still listening")
	}
}

// TestGrace checks that a call that does not end is closed after the grace
// period.
func TestGrace(t *testing.T) {
	p := startSluice(t, "--grace", "200ms")
	watch, err := grpc_health_v1.NewHealthClient(dial(t, p.grpc)).Watch(t.Context(), &grpc_health_v1.HealthCheckRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := watch.Recv(); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	if status := p.stop(); status != 0 {
		t.Errorf("status %d", status)
	}
	if took := time.Since(began); took < 200*time.Millisecond || took > 5*time.Second {
		t.Errorf("took %v", took)
	}
}

// TestReadyWithRedis checks that a sidecar that fails closed is ready once
// Redis has answered, and stays ready if Redis goes away.
func TestReadyWithRedis(t *testing.T) {
	server := redistest.Start(t)
	server.Shutdown()
	closed := startSluice(t, "--redis", server.URL(), "--config", file(t, "sluice.yaml", perClient))
	open := startSluice(t, "--redis", server.URL(), "--config", file(t, "sluice.yaml", perClient+"on_failure: allow\n"))
	ready := func(p *process) int {
		status, _ := get(t, "http://"+p.metrics+"/readyz")
		if gauge := p.counted("sluice_ready"); gauge != map[int]int{200: 1}[status] {
			if again, _ := get(t, "http://"+p.metrics+"/readyz"); again == status { // it may have changed in between
				t.Errorf("/readyz is %d, and sluice_ready %d", status, gauge)
			}
		}
		return status
	}
	if got := ready(closed); got != 503 {
		t.Errorf("fails closed, without Redis: %d", got)
	}
	if got := ready(open); got != 200 {
		t.Errorf("fails open, without Redis: %d", got)
	}
	if got := check(t, dial(t, closed.grpc), from("203.0.113.1", "/")); got != "503" {
		t.Errorf("fails closed: %s", got)
	}
	if got := check(t, dial(t, open.grpc), from("203.0.113.1", "/")); got != "ok" {
		t.Errorf("fails open: %s", got)
	}
	server.Restart()
	eventually(t, "ready with Redis", func() bool { return ready(closed) == 200 })
	server.Kill()
	if got := ready(closed); got != 200 {
		t.Errorf("an outage took it out of service: %d", got)
	}
}

// TestStartErrors checks that each error at the start is one clear line.
func TestStartErrors(t *testing.T) {
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = taken.Close() }()
	addr := taken.Addr().String()
	bad := file(t, "bad.yaml", "limits:\n  - name: Orders\n    rate: fast\n")

	for _, tt := range []struct {
		args   string
		env    string
		status int
		want   string // of stderr, as a regular expression
	}{
		{"run --grpc " + addr, "", 1, `sluice: listen\.grpc: listen tcp .*: address already in use`},
		{"run --grpc 127.0.0.1:0 --metrics " + addr, "", 1, `sluice: listen\.metrics: listen tcp .*: address already in use`},
		{"run --config " + bad, "", 1, `.*bad\.yaml:2:11: .*name.*\n.*bad\.yaml:3:11: .*rate.*`},
		{"run --config /no/such/file.yaml", "", 1, `/no/such/file\.yaml: .*no such file or directory`},
		{"run --grpc nowhere", "", 2, `--grpc: listen\.grpc: .*`},
		{"run", "SLUICE_GRACE=soon", 1, `SLUICE_GRACE: grace: .*`},
		{"run", "SLUICE_LOG_LEVEL=loud", 1, `SLUICE_LOG_LEVEL: log_level: .*`},
		{"run --redis http://:hunter2@h", "", 2, `--redis: store\.redis\.url: .*`},
		{"run now", "", 2, `sluice: unexpected argument "now"; sluice run takes only flags\nSee 'sluice run --help'\.`},
		{"run --colour red", "", 2, `sluice: unknown flag: --colour\nSee 'sluice run --help'\.`},
		{"walk", "", 2, `(?s)sluice: unknown command "walk" for "sluice".*See 'sluice --help'\.`},
		{"", "", 2, `sluice: missing command\nSee 'sluice --help'\.`},
		{"validate", "", 2, `sluice: missing file; want the config files to validate, such as sluice\.yaml, or - for stdin\n.*`},
		{"validate -o xml f", "", 2, `sluice: -o "xml": must be text or json\n.*`},
		{"healthcheck --grpc " + addr, "", 1, `sluice: ` + addr + ` does not answer: .*`},
		{"healthcheck --grpc 127.0.0.1:1", "", 1,
			`sluice: 127\.0\.0\.1:1 does not answer: dial tcp 127\.0\.0\.1:1: connect: connection refused`},
		{"healthcheck --grpc nowhere", "", 2, `sluice: "nowhere": must be .*\n.*`},
	} {
		var env []string
		if tt.env != "" {
			env = []string{tt.env}
		}
		status, stdout, stderr := sluice(t, env, strings.Fields(tt.args)...)
		if status != tt.status || stdout != "" || !regexp.MustCompile(`^`+tt.want+`\n$`).MatchString(stderr) {
			t.Errorf("sluice %s: status %d, want %d\n%s%s", tt.args, status, tt.status, stdout, stderr)
		}
		if strings.Contains(stderr, "hunter2") || strings.Contains(stderr, "goroutine") {
			t.Errorf("sluice %s says too much:\n%s", tt.args, stderr)
		}
	}
}

func TestVersion(t *testing.T) {
	status, stdout, stderr := sluice(t, nil, "version")
	if status != 0 || !regexp.MustCompile(`^sluice \S+ \(go\S+, \w+/\w+\)\n$`).MatchString(stdout) || stderr != "" {
		t.Errorf("%d %s%s", status, stdout, stderr)
	}
	status, flag, stderr := sluice(t, nil, "--version")
	if status != 0 || flag != stdout || stderr != "" {
		t.Errorf("--version: %d %s%s, want %s", status, flag, stderr, stdout)
	}
}
