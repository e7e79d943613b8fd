package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/sluiceproxy/sluice/limiter/redistest"
)

const runbook = "cmd/sluice/observability/RUNBOOK.md"

// site is what an operator of the runbook has: a directory with the config and the
// logs, and sluice on PATH.
type site struct {
	dir     string
	sidecar *process
}

// startSite starts sluice, a real Envoy and a real Redis, has tenants exceed
// limits, and writes the logs. The tenant acme asks four times, and tenant-0 and so
// on, of which there are so many, thrice. Each has an API key, of which a limit
// denies the second request.
func startSite(t *testing.T, tenants int) *site {
	t.Helper()
	dir := t.TempDir()
	redis := redistest.Start(t)
	config := filepath.Join(dir, "sluice.yaml")
	if err := os.WriteFile(config, []byte(`
store: {redis: {url: '`+redis.URL()+`', timeout: 20s}}
limits:
  - {name: per-tenant, rate: 2/d, key: 'request.headers["x-tenant"]', readable: true}
  - {name: per-key, rate: 100/d, key: 'request.headers["x-api-key"]', match: {paths: ["/v1/**"]}}
  - {name: keyed, rate: 1/d, key: ['request.headers["x-api-key"]', request.method], match: {paths: [/keyed]}}
  - {name: trial, rate: 1/d, key: 'request.headers["x-tenant"]', readable: true, mode: shadow}
`), 0o600); err != nil {
		t.Fatal(err)
	}
	s := &site{dir: dir, sidecar: startSluice(t, "--config", config)}
	up := startUpstream(t)
	addr, stop := startLoggingEnvoy(
		t, filepath.Join(dir, "envoy.log"), s.sidecar.grpc, up.Listener.Addr().String(), patiently(t),
	)
	c := client(t)
	ask := func(path, tenant, key string) {
		request, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+addr+path, nil)
		if err != nil {
			t.Error(err)
			return
		}
		if tenant != "" {
			request.Header.Set("x-tenant", tenant)
		}
		request.Header.Set("x-api-key", key)
		response, err := c.Do(request)
		if err != nil {
			t.Error(err)
			return
		}
		_ = response.Body.Close()
	}
	for i := range 4 {
		ask(fmt.Sprintf("/v1/orders?token=s3cr3t-%d", i), "acme", "key-acme")
	}
	var wg sync.WaitGroup
	for w := range 8 {
		wg.Go(func() {
			for i := w; i < tenants; i += 8 {
				for range 3 {
					ask("/v1/orders?token=s3cr3t", fmt.Sprint("tenant-", i), fmt.Sprint("key-", i))
				}
				ask("/keyed", fmt.Sprint("other-", i), fmt.Sprint("key-", i))
				ask("/keyed", fmt.Sprint("another-", i), fmt.Sprint("key-", i))
			}
		})
	}
	wg.Wait()
	stop() // flushes the access log
	text := s.sidecar.logged() + "\n"
	if err := os.WriteFile(filepath.Join(dir, "sluice.log"), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	self, err := filepath.Abs(executable)
	if err != nil {
		t.Fatal(err)
	}
	script := "#!/bin/sh\n" + execEnv + "=sluice exec '" + self + "' \"$@\"\n"
	if err := os.WriteFile(filepath.Join(dir, "sluice"), []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
	return s
}

// run runs commands in a shell as an operator does, and returns what they print.
func (s *site) run(t *testing.T, commands string) string {
	t.Helper()
	c := exec.CommandContext(t.Context(), "sh", "-euc", commands)
	c.Dir = s.dir
	c.Env = append(
		os.Environ(), "PATH="+s.dir+":"+os.Getenv("PATH"), "SLUICE_GRPC="+s.sidecar.grpc, "GORACE=atexit_sleep_ms=0",
	)
	var out, errs bytes.Buffer
	c.Stdout, c.Stderr = &out, &errs
	if err := c.Run(); err != nil {
		t.Errorf("%s: %v\n%s%s", commands, err, out.String(), errs.String())
	}
	return out.String()
}

// TestRunbookWalk runs the commands of the runbook's walk-through on a site with
// many limited keys, and checks that they print what it shows.
func TestRunbookWalk(t *testing.T) {
	s := startSite(t, 150) // 300 limited keys
	varying := regexp.MustCompile(`\d{4}-\d\d-\d\dT[0-9:.]+Z|[0-9a-f]{8}-[0-9a-f-]{27}|` +
		`[0-9a-f]{8}-…|\b\d+(\.\d+)?(ms|us)\b|full in \d+[dhms]( \d+[hms])?|"retry_after":[0-9.]+|` +
		`(192\.0\.2\.7|127\.0\.0\.1)|(shop\.example\.com|127\.0\.0\.1(:\d+)?)`)
	plain := func(text string) string {
		return regexp.MustCompile(`_:\d+`).ReplaceAllString(varying.ReplaceAllString(text, "_"), "_")
	}
	for _, heading := range []string{
		"## Why was this customer limited an hour ago?", "## Who asks so much?", "## Is the limiter well?",
	} {
		text := section(t, runbook, heading)
		shown := regexp.MustCompile("(?ms)^```sh\n(.*?)^```\n(?:```text\n(.*?)^```\n)?").FindAllStringSubmatch(text, -1)
		if len(shown) == 0 {
			t.Errorf("%s has no commands", heading)
		}
		for _, m := range shown {
			said := s.run(t, m[1])
			for line := range strings.Lines(m[2]) {
				if strings.HasPrefix(line, "      3 ") { // any of many
					line = "      3 =9.tenant-"
				}
				if !strings.Contains(plain(said), plain(strings.TrimSuffix(line, "\n"))) {
					t.Errorf("%s\nprints\n%s\nwithout\n%s", m[1], plain(said), plain(line))
				}
			}
		}
	}
}

// TestOneSearchFindsAKey checks that one text finds a key, and no other, in Envoy's
// access log, in sluice's, on the page, and in what explain and bucket print.
func TestOneSearchFindsAKey(t *testing.T) {
	s := startSite(t, 45) // so that all denied keys are in the list of denials
	config := filepath.Join(s.dir, "sluice.yaml")
	for _, tt := range []struct {
		limit, header, path string
		parts               []string
		key                 string // empty: whatever bucket prints
		requests, logged    int    // lines in Envoy's access log and in sluice's
		denied              string // by the limit, on the page
	}{
		{"per-tenant", "x-tenant=acme", "/v1/orders", []string{"acme"}, "=4.acme", 4, 2, "limited"},
		{"per-tenant", "x-tenant=tenant-5", "/v1/orders", []string{"tenant-5"}, "=8.tenant-5", 3, 2, "limited"},
		{"trial", "x-tenant=tenant-5", "/v1/orders", []string{"tenant-5"}, "=8.tenant-5", 3, 2, "shadow_limited"},
		{"keyed", "x-api-key=key-7", "/keyed", []string{"key-7", "GET"}, "", 2, 1, "limited"},
	} {
		get := []string{"bucket", "get", "-o", "json", "--config", config, "--limit", tt.limit}
		args := slices.Clone(get)
		for _, part := range tt.parts {
			args = append(args, "--key", part)
		}
		var bucket struct {
			Key    string
			Exists bool
			Tokens int
		}
		status, out, errs := sluice(t, nil, args...)
		if err := json.Unmarshal([]byte(out), &bucket); err != nil || status != 0 || !bucket.Exists || bucket.Tokens != 0 {
			t.Fatalf("%v: %d %s%s, %v", args, status, out, errs, err)
		}
		key := bucket.Key
		if tt.key == "" && !regexp.MustCompile(`^#43\.[\w-]{43}=3\.GET$`).MatchString(key) || tt.key != "" && key != tt.key {
			t.Errorf("bucket prints the key %s, want %s", key, tt.key)
		}
		// By the text itself bucket finds the same bucket.
		_, again, _ := sluice(t, nil, append(get, "--key-hash", key)...)
		if same := regexp.MustCompile(`"reset": \d+`); same.ReplaceAllString(again, "") != same.ReplaceAllString(out, "") {
			t.Errorf("by the text from the log: %s, want %s", again, out)
		}
		_, explained, _ := sluice(t, nil, "explain", "--config", config, "--path", tt.path, "--header", tt.header)
		if !strings.Contains(explained, "key "+key+"\n") {
			t.Errorf("explain prints\n%s\nwithout %s", explained, key)
		}
		all := s.run(t, "grep -F -- '"+key+"' envoy.log sluice.log")
		of := fmt.Sprintf("%s: %s", tt.limit, key)
		if n := strings.Count(all, "envoy.log:"); n != tt.requests {
			t.Errorf("%s: %d lines of Envoy, want %d\n%s", of, n, tt.requests, all)
		}
		if n := strings.Count(all, "sluice.log:"); n != tt.logged {
			t.Errorf("%s: %d lines of sluice, want %d\n%s", of, n, tt.logged, all)
		}
		if !strings.Contains(all, ` 429 UAEX `) || !strings.Contains(all, ` "GET `+tt.path+` HTTP/1.1" `) ||
			!strings.Contains(all, `"path":"`+tt.path+`"`) || !strings.Contains(all, `"client":"127.0.0.1"`) ||
			!strings.Contains(all, " client=127.0.0.1 ") {
			t.Errorf("%s:\n%s", of, all)
		}
		if strings.Contains(all, "s3cr3t") || strings.Contains(all, "key-7") {
			t.Errorf("%s: a secret is in the logs:\n%s", of, all)
		}
		isShadow := tt.denied == "shadow_limited"
		if isShadow != strings.Contains(all, `"decision":"shadow_limited","limit":"`+tt.limit) {
			t.Errorf("%s:\n%s", of, all)
		}
		var denials []struct {
			Limit, Key, Decision, Path, Host, Client string
			Shadow                                   bool
		}
		r, body := fetch(t, client(t), "http://"+s.sidecar.admin+"/api/denials")
		if err := json.Unmarshal([]byte(body), &denials); err != nil || r.StatusCode != http.StatusOK {
			t.Fatalf("%d %s", r.StatusCode, body)
		}
		found := 0
		for _, d := range denials {
			if d.Key == key && d.Limit == tt.limit {
				found++
				if d.Decision != tt.denied || d.Shadow != isShadow || d.Path != tt.path || d.Client != "127.0.0.1" || d.Host == "" {
					t.Errorf("%s: %+v", of, d)
				}
			}
		}
		if found != 1 {
			t.Errorf("%s: %d entries in the list of denials", of, found)
		}
	}
}
