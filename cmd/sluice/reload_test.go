package main

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/fsnotify/fsnotify"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/sluiceproxy/sluice/limiter/policy"
)

// reloading is a reloader that watches a file, and the results of its reloads
// in order.
type reloading struct {
	t        *testing.T
	file     string
	reloader *reloader
	hangup   chan os.Signal
	done     chan string // "in force: <names of the limits>", or "refused: <why>"
}

func startReloading(t *testing.T, file string) *reloading {
	t.Helper()
	r := &reloading{t: t, file: file, hangup: make(chan os.Signal, 1), done: make(chan string, 100)}
	p := &program{getenv: func(string) (string, bool) { return "", false }}
	source := p.configFile(file, nil)
	cfg, inputs, err := source.load()
	if err != nil {
		t.Fatal(err)
	}
	log := zap.New(zapcore.NewNopCore()).
		WithOptions(zap.WrapCore(func(zapcore.Core) zapcore.Core { return refusals{r.done} }))
	r.reloader = newReloader(source, cfg, inputs, func(next *policy.Config) error {
		if err := next.Replaces(cfg, file); err != nil {
			return err
		}
		names := ""
		for _, l := range next.Limits() {
			names += " " + l.Name
		}
		r.done <- "in force:" + names
		return nil
	}, log, prometheus.NewRegistry())
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		r.reloader.run(ctx, r.hangup)
	}()
	t.Cleanup(func() {
		cancel()
		<-ended
	})
	return r
}

// refusals is a zapcore.Core that passes on why a config was rejected.
type refusals struct{ to chan<- string }

func (refusals) Enabled(l zapcore.Level) bool        { return l >= zapcore.ErrorLevel }
func (c refusals) With([]zapcore.Field) zapcore.Core { return c }
func (refusals) Sync() error                         { return nil }

func (c refusals) Check(e zapcore.Entry, to *zapcore.CheckedEntry) *zapcore.CheckedEntry {
	if c.Enabled(e.Level) {
		return to.AddCore(e, c)
	}
	return to
}

func (c refusals) Write(_ zapcore.Entry, fields []zapcore.Field) error {
	m := zapcore.NewMapObjectEncoder()
	for _, f := range fields {
		f.AddTo(m)
	}
	c.to <- fmt.Sprintf("refused: %v", m.Fields["mistakes"])
	return nil
}

// want waits for what the reloader does next.
func (r *reloading) want(want string) {
	r.t.Helper()
	select {
	case got := <-r.done:
		if got = strings.ReplaceAll(got, filepath.Dir(r.file), "DIR"); got != want {
			r.t.Fatalf("%s\nwant %s", got, want)
		}
	case <-time.After(within):
		r.t.Fatalf("nothing, want %s", want)
	}
}

// counted checks that there were no more reloads than the test has seen. A
// reload is counted after it is in force.
func (r *reloading) counted(success, failure int) {
	r.t.Helper()
	var s, f float64
	eventually(r.t, "the count of a reload", func() bool {
		s = testutil.ToFloat64(r.reloader.reloads.WithLabelValues("success"))
		f = testutil.ToFloat64(r.reloader.reloads.WithLabelValues("failure"))
		return int(s) >= success && int(f) >= failure
	})
	if int(s) != success || int(f) != failure || len(r.done) != 0 {
		r.t.Errorf("%v successes, %v failures and %d to come; want %d and %d", s, f, len(r.done), success, failure)
	}
}

func (r *reloading) do(err error) {
	r.t.Helper()
	if err != nil {
		r.t.Fatal(err)
	}
}

func (r *reloading) write(name, text string) {
	r.t.Helper()
	r.do(os.WriteFile(filepath.Join(filepath.Dir(r.file), name), []byte(text), 0o600))
}

func limit(names ...string) string {
	text := "limits:\n"
	for _, n := range names {
		text += "  - {name: " + n + ", rate: 1/s}\n"
	}
	return text
}

func TestReload(t *testing.T) {
	r := startReloading(t, file(t, "sluice.yaml", limit("a")))
	dir := filepath.Dir(r.file)

	// The file is written in place and in steps, as by some editors.
	r.write("sluice.yaml", limit("b"))
	r.want("in force: b")
	f, err := os.OpenFile(r.file, os.O_WRONLY|os.O_APPEND, 0)
	r.do(err)
	_, err = f.WriteString("  - {name: c, rate: 1/s}\n")
	r.do(err)
	r.do(f.Close())
	r.want("in force: b c")

	// The file is replaced by renaming, as by other editors.
	r.write("sluice.yaml.new", limit("d"))
	r.do(os.Rename(r.file+".new", r.file))
	r.want("in force: d")

	// After an error, an empty file and no file the previous config stays in
	// force.
	r.write("sluice.yaml", "limits: [{name: e}]\n")
	r.want("refused: [DIR/sluice.yaml:1:10: limits[0].rate: missing; a limit needs a name, and a rate, a quota or a plan]")
	r.write("sluice.yaml", " \n")
	r.want(
		"refused: [DIR/sluice.yaml: the file is empty (perhaps it is still being written); for a config without limits " +
			"write limits: []]",
	)
	r.do(os.Remove(r.file))
	r.want("refused: [DIR/sluice.yaml: no such file or directory]")
	r.write("sluice.yaml", "limits: []\n")
	r.want("in force:")

	// The directory is removed and created again.
	r.do(os.RemoveAll(dir))
	r.want("refused: [DIR/sluice.yaml: no such file or directory]")
	r.do(os.Mkdir(dir, 0o700))
	r.write("sluice.yaml", limit("f"))
	r.want("in force: f")

	// A change that needs a restart is rejected.
	r.write("sluice.yaml", "listen: {grpc: '127.0.0.1:1'}\nstore: {redis: {url: 'redis://h'}}\n"+limit("g"))
	r.want(
		"refused: [DIR/sluice.yaml: listen.grpc: changed; a restart is needed to apply it DIR/sluice.yaml: store.redis: " +
			"changed; a restart is needed to apply it]",
	)
	r.write("sluice.yaml", limit("f"))
	r.want("in force: f")

	// SIGHUP always reloads.
	r.hangup <- syscall.SIGHUP
	r.want("in force: f")
	r.counted(7, 5)

	// A write that changes nothing is no reload. The next real change comes
	// after it, so the test need not wait.
	now := time.Now()
	r.do(os.Chtimes(r.file, now, now))
	r.write("other.yaml", "x")
	r.write("sluice.yaml", limit("h"))
	r.want("in force: h")
	r.counted(8, 5)
}

// TestReloadOfAConfigMap checks a volume of Kubernetes, where the file is a
// link into ..data, which is a link that is replaced.
func TestReloadOfAConfigMap(t *testing.T) {
	dir := t.TempDir()
	r := &reloading{t: t}
	volume := func(version, text string) {
		r.do(os.Mkdir(filepath.Join(dir, version), 0o700))
		r.do(os.WriteFile(filepath.Join(dir, version, "sluice.yaml"), []byte(text), 0o600))
		r.do(os.Symlink(version, filepath.Join(dir, "..data_tmp")))
		r.do(os.Rename(filepath.Join(dir, "..data_tmp"), filepath.Join(dir, "..data")))
	}
	volume("..1", limit("a"))
	r.do(os.Symlink("..data/sluice.yaml", filepath.Join(dir, "sluice.yaml")))
	for name, path := range map[string]string{"mounted": dir, "linked": filepath.Join(t.TempDir(), "link")} {
		t.Run(name, func(t *testing.T) {
			if path != dir {
				r.do(os.Symlink(dir, path))
			}
			r := startReloading(t, filepath.Join(path, "sluice.yaml"))
			for i := range 3 {
				version := fmt.Sprintf("..%s-%d", name, i)
				volume(version, limit("b"+fmt.Sprint(i)))
				r.want("in force: b" + fmt.Sprint(i))
				if i > 0 {
					r.do(os.RemoveAll(filepath.Join(dir, fmt.Sprintf("..%s-%d", name, i-1))))
				}
			}
			r.counted(3, 0)
		})
	}
}

// TestReloadOfOtherFiles checks that the files that the config names are
// watched, and those that match its patterns later.
func TestReloadOfOtherFiles(t *testing.T) {
	path := file(t, "sluice.yaml", `
key_secret_file: secret
limits:
  - {name: a, rate: 1/s, key: request.method, overrides_file: "tenants/*.csv"}
`)
	dir := filepath.Dir(path)
	if err := os.WriteFile(filepath.Join(dir, "secret"), []byte("one"), 0o600); err != nil {
		t.Fatal(err)
	}
	r := startReloading(t, path)
	r.write("secret", "two")
	r.want("in force: a")
	r.do(os.Mkdir(filepath.Join(dir, "tenants"), 0o700))
	r.write("tenants/one.csv", "key,rate,burst\nGET,5/s,\n")
	r.want("in force: a")
	r.write("tenants/two.csv", "key,rate,burst\nGET,6/s,x\n")
	r.want(
		`refused: [DIR/tenants/two.csv:2:5: limits[0].overrides_file: invalid burst "x"; want a whole number from 1 to ` +
			`1000000000]`,
	)
	r.write("tenants/two.csv", "key,rate,burst\nPUT,6/s,\n")
	r.want("in force: a")
	r.do(os.Remove(filepath.Join(dir, "tenants/one.csv")))
	r.want("in force: a")
	r.do(os.Remove(filepath.Join(dir, "secret")))
	r.want("refused: [DIR/sluice.yaml:2:18: key_secret_file: DIR/secret: no such file or directory]")
}

// TestReloadUnderLoad checks that under load each answer is from one whole
// config and none is lost, while the file changes 50 times between two valid
// configs and an invalid one.
func TestReloadUnderLoad(t *testing.T) {
	const changes, requests = 50, 10_000
	version := func(n int) string {
		return fmt.Sprintf(
			"headers: [ratelimit]\nlimits:\n  - {name: one, rate: 1/d, burst: %d}\n  - {name: two, key: client.ip, rate: "+
				"1/d, burst: %[1]d}\n",
			n,
		)
	}
	texts := []string{version(30_000), version(20_000), "limits: [{name: one, rate: 1/d}, {name: two}]\n"}
	good := regexp.MustCompile(`^"one";q=(\d+);w=\d+, "two";q=(\d+);w=\d+$`)
	path := file(t, "sluice.yaml", texts[0])
	p := startSluice(t, "--config", path)
	up := startUpstream(t)
	addr := startEnvoy(t, p.grpc, up.Listener.Addr().String(), patiently(t))

	var answered atomic.Int64
	var versions [2]atomic.Int64
	done := make(chan struct{})
	var wg sync.WaitGroup
	for range 4 {
		c := client(t)
		wg.Go(func() {
			for {
				select {
				case <-done:
					return
				default:
				}
				r, _ := fetch(t, c, "http://"+addr+"/")
				policies := good.FindStringSubmatch(r.Header.Get("Ratelimit-Policy"))
				switch {
				case r.StatusCode != http.StatusOK || policies == nil || policies[1] != policies[2]:
					t.Errorf("%d %v", r.StatusCode, r.Header)
					return
				case policies[1] == "30000":
					versions[0].Add(1)
				default:
					versions[1].Add(1)
				}
				answered.Add(1)
			}
		})
	}
	reloads := func() (success, failure int) {
		_, metrics := get(t, "http://"+p.metrics+"/metrics")
		for result, n := range map[string]*int{"success": &success, "failure": &failure} {
			_, after, _ := strings.Cut(metrics, `sluice_config_reloads_total{result="`+result+`"} `)
			if _, err := fmt.Sscan(after, n); err != nil {
				t.Fatal(err)
			}
		}
		return success, failure
	}
	wantSuccess, wantFailure := 0, 0
	for i := 1; i <= changes && !t.Failed(); i++ {
		text := texts[i%3]
		if err := os.WriteFile(path+".new", []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(path+".new", path); err != nil {
			t.Fatal(err)
		}
		if i%3 == 2 {
			wantFailure++
		} else {
			wantSuccess++
		}
		eventually(t, "the reload", func() bool {
			s, f := reloads()
			if s > wantSuccess || f > wantFailure {
				t.Fatalf("%d successes and %d failures after %d changes; want %d and %d", s, f, i, wantSuccess, wantFailure)
			}
			return s == wantSuccess && f == wantFailure
		})
	}
	eventually(t, "answered requests", func() bool { return answered.Load() >= requests || t.Failed() })
	close(done)
	wg.Wait()
	t.Logf(
		"%d requests over %d reloads and %d refusals, %d and %d of the two versions", answered.Load(), wantSuccess,
		wantFailure, versions[0].Load(), versions[1].Load(),
	)
	if versions[0].Load() < 100 || versions[1].Load() < 100 {
		t.Error("too few of one version")
	}
}

// TestReloadKeepsBuckets checks that SIGHUP reloads the config of a real
// sidecar and that the buckets keep their tokens.
func TestReloadKeepsBuckets(t *testing.T) {
	path := file(t, "sluice.yaml", "limits: [{name: a, rate: 1/d, burst: 3}]\n")
	p := startSluice(t, "--config", path)
	conn := dial(t, p.grpc)
	for range 3 {
		if got := check(t, conn, from("203.0.113.1", "/")); got != "ok" {
			t.Fatal(got)
		}
	}
	if err := os.WriteFile(path, []byte("log_level: debug\nfailure_status: 502\nlimits: [{name: a, rate: 1/d, burst: "+
		"30}]\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := p.cmd.Process.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the reload", func() bool { return strings.Contains(p.logged(), "config reloaded") })
	if got := check(t, conn, from("203.0.113.1", "/")); got != "429" {
		t.Errorf("%s: a changed burst gave tokens", got)
	}
	eventually(t, "a log line at the new level", func() bool {
		return strings.Contains(p.logged(), `"msg":"request `+
			`limited"`)
	})
	_, metrics := get(t, "http://"+p.metrics+"/metrics")
	if n := strings.Count(metrics, "sluice_config_info{hash="); n != 1 {
		t.Errorf("%d hashes", n)
	}
}

// TestReloadMissesNothing checks changes that are easily missed: a file that
// moves between patterns, one that is truncated and then removed, links whose
// targets disappear and return, new contents with the same size and time, and a
// chain of links.
func TestReloadMissesNothing(t *testing.T) {
	path := file(t, "sluice.yaml", `
limits:
  - {name: gold, rate: 1/s, key: request.method, overrides_file: "gold/*.csv"}
  - {name: silver, rate: 1/s, key: request.method, overrides_file: "silver/*.csv"}
`)
	dir := filepath.Dir(path)
	for _, d := range []string{"gold", "silver", "elsewhere"} {
		if err := os.Mkdir(filepath.Join(dir, d), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	at := func(name string) string { return filepath.Join(dir, name) }
	if err := os.WriteFile(at("silver/a.csv"), []byte("key,rate,burst\nGET,5/s,\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	r := startReloading(t, path)
	const inForce = "in force: gold silver"
	r.do(os.Rename(at("silver/a.csv"), at("gold/a.csv")))
	r.want(inForce)

	r.write("gold/a.csv", "")
	r.want("refused: [DIR/gold/a.csv:1:1: limits[0].overrides_file: empty file; want a header row such as key,rate,burst]")
	r.do(os.Remove(at("gold/a.csv")))
	r.want(inForce)
	r.write("silver/b.csv", "")
	r.want(
		"refused: [DIR/silver/b.csv:1:1: limits[1].overrides_file: empty file; want a header row such as key,rate,burst]",
	)
	r.do(os.Remove(at("silver/b.csv")))
	r.want(inForce)

	r.write("elsewhere/c", "key,rate,burst\nGET,6/s,\n")
	r.do(os.Symlink("../elsewhere/c", at("gold/c.csv")))
	r.want(inForce)
	r.do(os.Remove(at("elsewhere/c")))
	r.want("refused: [DIR/sluice.yaml:3:66: limits[0].overrides_file: DIR/gold/c.csv: no such file or directory]")
	r.write("elsewhere/c", "key,rate,burst\nGET,7/s,\n")
	r.want(inForce)

	info, err := os.Stat(at("elsewhere/c"))
	r.do(err)
	r.write("elsewhere/d", "key,rate,burst\nGET,8/s,\n")
	r.do(os.Chtimes(at("elsewhere/d"), info.ModTime(), info.ModTime()))
	r.do(os.Rename(at("elsewhere/d"), at("elsewhere/c")))
	r.want(inForce)
	r.counted(6, 3)
}

func TestReloadThroughLinks(t *testing.T) {
	dir := t.TempDir()
	r := &reloading{t: t}
	at := func(name string) string { return filepath.Join(dir, name) }
	for _, release := range []string{"1", "2", "3"} {
		r.do(os.MkdirAll(at("releases/"+release), 0o700))
		r.do(os.WriteFile(at("releases/"+release+"/real.yaml"), []byte(limit("release-"+release)), 0o600))
		r.do(os.Symlink("real.yaml", at("releases/"+release+"/sluice.yaml")))
	}
	r.do(os.Mkdir(at("base"), 0o700))
	r.do(os.Symlink(at("releases/1"), at("base/current")))
	r.do(os.Mkdir(at("etc"), 0o700))
	r.do(os.Symlink("../base/current/sluice.yaml", at("etc/sluice.yaml")))
	r = startReloading(t, at("etc/sluice.yaml"))
	for _, release := range []string{"2", "3"} {
		r.do(os.Symlink(at("releases/"+release), at("base/next")))
		r.do(os.Rename(at("base/next"), at("base/current")))
		r.want("in force: release-" + release)
	}
	r.do(os.WriteFile(at("releases/3/real.yaml"), []byte(limit("in-place")), 0o600))
	r.want("in force: in-place")
	r.counted(3, 0)
}

// TestWatchRests checks that one directory with two names is watched once, and
// that watching it does not trigger reloads without end.
func TestWatchRests(t *testing.T) {
	dir := t.TempDir()
	r := &reloading{t: t}
	r.do(os.Mkdir(filepath.Join(dir, "conf"), 0o700))
	r.do(os.WriteFile(filepath.Join(dir, "conf/real.yaml"), []byte(limit("a")), 0o600))
	r.do(os.Symlink("real.yaml", filepath.Join(dir, "conf/sluice.yaml")))
	r.do(os.Symlink(dir, filepath.Join(dir, "link")))
	w, err := fsnotify.NewWatcher()
	r.do(err)
	defer func() { _ = w.Close() }()
	reloader := &reloader{
		log:    zap.NewNop(),
		inputs: policy.Inputs{Paths: []string{filepath.Join(dir, "link/conf/sluice.yaml")}},
	}
	if !reloader.watch(w) {
		t.Error("nothing is watched")
	}
	if reloader.watch(w) {
		t.Error("there is always more to watch")
	}
}

// TestReloadHasPatience checks that a file that never stops changing is still
// read after a while.
func TestReloadHasPatience(t *testing.T) {
	r := startReloading(t, file(t, "sluice.yaml", limit("a")))
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	began := time.Now()
	for i := 0; len(r.done) == 0; i++ {
		<-tick.C
		r.write("sluice.yaml.new", limit(fmt.Sprint("b", i)))
		r.do(os.Rename(r.file+".new", r.file))
		if time.Since(began) > within {
			t.Fatal("never")
		}
	}
	if took := time.Since(began); took > 4*maxDebounce {
		t.Errorf("read after %v", took)
	}
}
