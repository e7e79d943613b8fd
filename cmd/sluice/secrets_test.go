package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/sluiceproxy/sluice/limiter/redistest"
)

// canary stands for every secret that an operator gives sluice.
const canary = "c4n4ry"

// secretURLs are URLs of a Redis that does not answer, and what people make of
// them who mistype.
var secretURLs = []string{
	"redis://:c4n4ry@127.0.0.1:1/0",
	"redis://user:c4n4ry@127.0.0.1:1/0",
	"rediss://user:c4n4ry@127.0.0.1:1/0",
	"unix://user:c4n4ry@/nowhere/redis.sock",
	"redis://c4n4ry@127.0.0.1:1",
	"redis://user:c4n4ry/x@127.0.0.1:1/0",
	"redis://:12/c4n4ry@127.0.0.1:1/0",
	"redis://user:6379/c4n4ry@127.0.0.1:1/0",
	"redis://user:pw@127.0.0.1:1/c4n4ry",
	"unix:///nowhere/redis.sock?db=c4n4ry",
	"redis://user:c4n4ry?x@127.0.0.1:1/0",
	"redis://user:c4n4ry#x@127.0.0.1:1/0",
	"redis://user:c4n4ry%zz@127.0.0.1:1/0",
	"redis://user:c4n4ry x@127.0.0.1:1/0",
	"redis://user:c4n4ry@x@127.0.0.1:1/0",
	"redis://user:c4n4ry@127.0.0.1:port/0",
	"redis://user:c4n4ry@127.0.0.1:1/zero",
	"redis://user:c4n4ry@127.0.0.1:1/-1",
	"redis://user:c4n4ry@[::1",
	"redis://user:c4n4ry@",
	"redis://user:c4n4ry",
	"redis:user:c4n4ry@127.0.0.1:1",
	"user:c4n4ry@127.0.0.1:1",
	"http://user:c4n4ry@127.0.0.1:1",
	"redis://127.0.0.1:1/0?password=c4n4ry",
	"redis://127.0.0.1:1/0#c4n4ry",
}

// secretConfigs are configs that contain a secret; most have an error on its
// line or next to it.
var secretConfigs = []string{
	"store: {redis: {url: 'redis://127.0.0.1:1', password: c4n4ry}}",
	"store: {redis: {url: 'redis://127.0.0.1:1', password: [c4n4ry]}}",
	"store: {redis: {url: 'redis://127.0.0.1:1', password: {a: c4n4ry}}}",
	"store: {redis: {url: 'redis://127.0.0.1:1', password: {c4n4ry: a}}}",
	"store: {redis: {url: 'redis://127.0.0.1:1', password: !!int c4n4ry}}",
	"store: {redis: {url: 'redis://127.0.0.1:1', pasword: c4n4ry}}",
	"store: {redis: {url: 'redis://127.0.0.1:1', password: a, password: c4n4ry}}",
	"store: {redis: {url: 'redis://127.0.0.1:1', password: c4n4ry, password_file: secret}}",
	"store: {redis: {url: 'redis://127.0.0.1:1', password_file: secret}}",
	"store: {redis: {url: 'redis://127.0.0.1:1', password_file: lines}}",
	"store: {redis: {url: 'redis://127.0.0.1:1', password_file: large}}",
	"store: {redis: {url: 'rediss://127.0.0.1:1', tls: {ca_file: secret}}}",
	"store: {redis: {url: 'rediss://127.0.0.1:1', tls: {cert_file: secret, key_file: secret}}}",
	"store: {redis: {mode: cluster, addresses: ['user:c4n4ry@127.0.0.1:1']}}",
	"store: {redis: {mode: cluster, addresses: ['c4n4ry@127.0.0.1:1']}}",
	"store: {redis: {mode: cluster, addresses: ['redis://user:c4n4ry@127.0.0.1:1']}}",
	"store: {redis: {mode: sentinel, master: m, addresses: ['127.0.0.1:1'], password: c4n4ry}}",
	"store: {redis: {mode: cluster, url: 'redis://user:c4n4ry@127.0.0.1:1/3'}}",
	"store:\n  redis:\n    url: redis://127.0.0.1:1\n    password: \"c4n4ry\n",
	"store:\n  redis:\n    url: redis://127.0.0.1:1\n    password: 'c4n4ry's'\n",
	"store:\n  redis:\n    url: redis://127.0.0.1:1\n    password: \"c4n\"4ry c4n4ry\"\n",
	"store:\n  redis:\n    url: redis://127.0.0.1:1\n    password: *c4n4ry\n",
	"store:\n  redis:\n    url: redis://127.0.0.1:1\n    password: &c4n4ry\n",
	"store:\n  redis:\n    url: redis://127.0.0.1:1\n    password: !c4n4ry x\n",
	"store:\n  redis:\n    url: redis://127.0.0.1:1\n    password: @c4n4ry\n",
	"store:\n  redis:\n    url: redis://127.0.0.1:1\n    password: `c4n4ry`\n",
	"store:\n  redis:\n    url: redis://127.0.0.1:1\n    password: %c4n4ry\n",
	"store:\n  redis:\n    url: redis://127.0.0.1:1\n    password: {c4n4ry\n",
	"store:\n  redis:\n    url: redis://127.0.0.1:1\n    password: ]c4n4ry\n",
	"store:\n  redis:\n    url: redis://127.0.0.1:1\n    password: c4n4ry: x\n",
	"store:\n  redis:\n    url: redis://127.0.0.1:1\n    password:\n      c4n4ry\n     x\n",
	"store:\n  redis:\n    url: redis://127.0.0.1:1\n    password: |\n      c4n4ry\n    \tx\n",
	"store:\n  redis:\n    url: redis://127.0.0.1:1\n    password: \"\\q c4n4ry\"\n",
	"store:\n  redis:\n    url: redis://127.0.0.1:1\n    password: ${A:-c4n4ry\n",
	"store: {redis: {url: 'redis://127.0.0.1:1', password: '${SECRET}', username: [1]}}",
	"store: {redis: {url: '${SECRET}'}}",
	"key_secret: c4n4ry",
	"key_secret: [c4n4ry]",
	"key_secret: c4n4ry\nkey_secret_file: secret",
	"key_secret_file: lines",
	"key_secret_file: large",
	"key_secret: *c4n4ry",
	"key_sceret: c4n4ry",
	"listen: {tls: {cert_file: secret, key_file: secret}}",
	"limits: [{name: a, rate: 1/s, key: client.ip, overrides_file: secret}]",
	"limits: [{name: a, rate: 1/s, key: client.ip, overrides_file: lines}]",
}

// untilServing collects a sidecar's stderr, and calls end once the sidecar
// serves.
type untilServing struct {
	end func()

	mu   sync.Mutex
	text bytes.Buffer
}

// Write implements io.Writer.
func (u *untilServing) Write(b []byte) (int, error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if bytes.Contains(b, []byte(`"serving"`)) {
		u.end()
	}
	return u.text.Write(b)
}

func (u *untilServing) String() string {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.text.String()
}

// TestCommandsSayNoSecret checks that no command prints a secret, whatever is
// wrong with the config, the environment or the command line.
func TestCommandsSayNoSecret(t *testing.T) {
	if len(secretURLs)+len(secretConfigs) < 40 {
		t.Fatal("too few are tried")
	}
	dir := t.TempDir()
	write(t, filepath.Join(dir, "secret"), []byte(canary))
	write(t, filepath.Join(dir, "lines"), []byte(canary+"\n"+canary+",1/s\n"))
	write(t, filepath.Join(dir, "large"), []byte(strings.Repeat(canary, 1000)))
	config := filepath.Join(dir, "sluice.yaml")
	said, served := 0, 0
	try := func(input string, env map[string]string, args ...string) {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), within)
		defer cancel()
		var stdout bytes.Buffer
		stderr := untilServing{end: cancel}
		run(ctx, args, func(name string) (string, bool) {
			v, ok := env[name]
			return v, ok
		}, &stdout, &stderr)
		for name, text := range map[string]string{"stdout": stdout.String(), "stderr": stderr.String()} {
			if strings.Contains(text, canary) {
				t.Errorf("%s: %v says on %s:\n%s", input, args, name, text)
			}
		}
		said += stdout.Len() + len(stderr.String())
		if strings.Contains(stderr.String(), `"serving"`) {
			served++
		}
	}
	all := func(input string, env map[string]string, flags ...string) {
		t.Helper()
		env["SLUICE_CONFIG"], env["GOGC"] = config, "100"
		free := []string{"run", "--grpc", "127.0.0.1:0", "--metrics", "127.0.0.1:0", "--admin", "127.0.0.1:0"}
		try(input, env, append(free, flags...)...)
		for _, args := range [][]string{
			{"explain"}, {"explain", "-o", "json"}, {"doctor", "-o", "json"},
			{"bucket", "get", "a", "x"}, {"envoy", "plain", "--config", config}, {"envoy", "istio", "--config", config},
			{"healthcheck"},
		} {
			try(input, env, args...)
		}
	}
	for _, text := range secretConfigs {
		write(t, config, []byte(text))
		try(text, nil, "validate", config)
		try(text, nil, "validate", "-o", "json", config)
		all(text, map[string]string{"SECRET": canary})
	}
	for _, url := range secretURLs {
		write(t, config, fmt.Appendf(nil, "store: {redis: {url: %q}}", url))
		try(url, nil, "validate", config)
		write(t, config, []byte("limits: [{name: a, rate: 1/s, key: client.ip}]"))
		all(url, map[string]string{"SLUICE_REDIS": url})
		try(url, nil, "run", "--config", config, "--redis", url, "--grace", "wrong")
		pod := filepath.Join(dir, "pod.yaml")
		write(t, pod, fmt.Appendf(nil, `
apiVersion: v1
kind: Pod
metadata: {name: a, labels: {sluice.dev/inject: enabled}, annotations: {sluice.dev/config: c, sluice.dev/redis-secret: %q}}
spec: {containers: [{name: envoy, image: envoy}]}
`, url))
		try(url, nil, "inject", "--file", pod)
	}
	if said < 50_000 || served < 10 {
		t.Errorf("all said only %d bytes, and %d sidecars served", said, served)
	}
}

// TestSidecarSaysNoSecret checks that a running sidecar exposes no secret in
// its log, pages, metrics, profiles or crash dump.
func TestSidecarSaysNoSecret(t *testing.T) {
	redis := redistest.Start(t, "--requirepass", canary)
	url := "unix://:" + canary + "@" + strings.TrimPrefix(redis.URL(), "unix://")
	config := file(t, "sluice.yaml", "")
	const limits = "key_secret: c4n4ry-of-more-than-16-bytes\nlog_level: debug\n" +
		"limits: [{name: a, rate: 1/d, key: request.headers.k, on_failure: deny}]\n"
	good := freePorts + "store: {redis: {url: '${SECRET}', timeout: 10s}}\n" + limits
	write(t, config, []byte(good))
	p := start(t, "sluice", []string{
		"SECRET=" + url, "SLUICE_SECERT=" + canary, "OTEL_EXPORTER_OTLP_ENDPOINT=http://user:" + canary + "@127.0.0.1:1",
		"OTEL_EXPORTER_OTLP_HEADERS=api-key=" + canary, "OTEL_BSP_SCHEDULE_DELAY=10",
	}, "run", "--config", config)
	l := startLines(t, p)
	eventually(t, "the start", func() bool { return l.count(`"serving"`) == 1 })
	for line := range strings.Lines(l.text()) {
		var at struct{ Msg, Grpc, Metrics, Admin string }
		if json.Unmarshal([]byte(line), &at) == nil && at.Msg == "serving" {
			p.grpc, p.metrics, p.admin = at.Grpc, at.Metrics, at.Admin
		}
	}
	conn := dial(t, p.grpc)
	ask := func() string {
		return check(t, conn, checkRequest("203.0.113.1", "GET", "/", map[string]string{"k": "x"}))
	}
	if first, second := ask(), ask(); first != "ok" || second == "ok" {
		t.Fatalf("the buckets are not in Redis: %s, %s\n%s", first, second, l.text())
	}
	eventually(t, "a failed export", func() bool { return l.count("traces are not sent") > 0 })
	client := redis.Client()
	if err := client.Do(t.Context(), "AUTH", canary).Err(); err != nil {
		t.Fatal(err)
	}
	for _, command := range [][]any{{"CONFIG", "SET", "requirepass", "another"}, {"CLIENT", "KILL", "TYPE", "normal"}} {
		if err := client.Do(t.Context(), command...).Err(); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "a failed login", func() bool { ask(); return l.count("WRONGPASS") > 0 })
	for i, wrong := range []string{
		"limits: [\nkey_secret: *c4n4ry",
		"store: {redis: {url: 'redis://user:c4n4ry?x@h'}}",
		good + "key_secret: c4n4ry-another",
	} {
		write(t, config, []byte(wrong))
		eventually(t, "a failed reload", func() bool { return l.count("config reload failed") == i+1 })
	}
	var pages strings.Builder
	for _, page := range []string{
		p.metrics + "/metrics", p.metrics + "/readyz", p.admin + "/", p.admin + "/api/status",
		p.admin + "/api/history", p.admin + "/api/limits", p.admin + "/api/top?limit=a",
		p.admin + "/api/denials", p.admin + "/api/explain?header=k=x", p.admin + "/debug/pprof/",
		p.admin + "/debug/pprof/goroutine?debug=2", p.admin + "/debug/pprof/heap?debug=1",
		p.admin + "/debug/pprof/cmdline",
	} {
		_, body := get(t, "http://"+page)
		fmt.Fprintf(&pages, "%s\n%s\n", page, body)
	}
	if err := p.cmd.Process.Signal(syscall.SIGQUIT); err != nil {
		t.Fatal(err)
	}
	<-p.done
	log := l.text()
	for _, want := range []string{"WRONGPASS", "goroutine 1 ", "SLUICE_SECERT"} {
		if !strings.Contains(log, want) {
			t.Errorf("the log does not have %q:\n%s", want, log)
		}
	}
	for _, want := range []string{`"mistakes":["`, "sluice_config_info", `"limits"`, "goroutine 1 "} {
		if !strings.Contains(pages.String(), want) {
			t.Errorf("the pages do not have %q", want)
		}
	}
	for name, text := range map[string]string{"the log": log, "a page": pages.String()} {
		for line := range strings.Lines(text) {
			if strings.Contains(line, canary) {
				t.Errorf("%s has a secret: %s", name, line)
			}
		}
	}
}
