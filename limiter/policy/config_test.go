package policy

import (
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/sluiceproxy/sluice/limiter"
)

var update = flag.Bool("update", false, "write what is wrong with testdata/bad anew; look at the diff")

func TestGoodFiles(t *testing.T) {
	files, err := filepath.Glob("testdata/good/*.yaml")
	if err != nil || len(files) == 0 {
		t.Fatal(files, err)
	}
	for _, file := range files {
		if _, _, err := Load(file, env()); err != nil {
			t.Errorf("%v", err)
		}
	}
}

// TestBadFiles checks each file of testdata/bad against the mistakes that its
// comments list, in full and in order.
func TestBadFiles(t *testing.T) {
	files, err := filepath.Glob("testdata/bad/*.yaml")
	if err != nil || len(files) == 0 {
		t.Fatal(files, err)
	}
	const mark = "#! "
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		var body, want strings.Builder
		for line := range strings.Lines(string(text)) {
			if said, ok := strings.CutPrefix(line, mark); ok {
				want.WriteString(said)
			} else {
				body.WriteString(line)
			}
		}
		_, err = Parse(file, []byte(body.String()), env("SHOP", "shop", "EMPTY", ""))
		if err == nil {
			t.Errorf("%s: no mistake", file)
			continue
		}
		got := strings.ReplaceAll(err.Error()+"\n", file+":", "")
		if *update {
			for line := range strings.Lines(got) {
				body.WriteString(mark + line)
			}
			if err := os.WriteFile(file, []byte(body.String()), 0o644); err != nil {
				t.Fatal(err)
			}
		} else if got != want.String() {
			t.Errorf("%s says\n%swant\n%s", file, got, want.String())
		}
		if strings.Contains(got, "hunter2") {
			t.Errorf("%s tells a secret", file)
		}
		for _, m := range mistakes(t, err) {
			if m.Line < 1 || m.Column < 1 || m.Message == "" {
				t.Errorf("%s: without its place: %+v", file, m)
			}
		}
	}
}

func TestDefaults(t *testing.T) {
	for _, file := range []string{"", "testdata/good/nothing.yaml", "testdata/good/comment.yaml"} {
		c, _, err := Load(file, env())
		if err != nil {
			t.Fatal(err)
		}
		got := fmt.Sprintf("%s %+v %v %d %+v %v %s %v", c.Domain, c.Listen, c.Redis, c.FailureStatus, c.Headers,
			c.Grace, c.LogLevel, c.FailsClosed())
		want := "default {GRPC:127.0.0.1:9001 Admin:127.0.0.1:9002 Metrics:127.0.0.1:9003} <nil> 503 " +
			"{XRateLimit:true RetryAfter:true RateLimit:false} 10s info false"
		if got != want {
			t.Errorf("%q:\n%s\n%s", file, got, want)
		}
	}
}

func TestEverything(t *testing.T) {
	c, _, err := Load("testdata/good/everything.yaml", env())
	if err != nil {
		t.Fatal(err)
	}
	got := fmt.Sprintf("%s %+v %+v %d %+v %v %s %v", c.Domain, c.Listen, *c.Redis, c.FailureStatus, c.Headers, c.Grace,
		c.LogLevel, c.FailsClosed())
	want := "shop/checkout {GRPC:unix:///run/sluice/authz.sock Admin:127.0.0.1:19002 Metrics:0.0.0.0:9003} " +
		"{Mode: URL:redis://127.0.0.1:6379/0 Addresses:[] Master: Username:sluice Password:hunter2 TLS:<nil> " +
		"Sentinel:<nil> Timeout:80ms} 502 " +
		"{XRateLimit:false RetryAfter:false RateLimit:true} 3s debug false"
	if got != want {
		t.Errorf("\n%s\n%s", got, want)
	}
	limits := c.Limits()[1:]
	if got, want := *limits[0], (limiter.Limit{Domain: "shop/checkout", Name: "per-client",
		OnFailure: limiter.Allow}); got != want {
		t.Errorf("%+v, want %+v", got, want)
	}
	if got, want := *limits[1], (limiter.Limit{Domain: "shop", Name: "orders", Shadow: true,
		OnFailure: limiter.Delegate}); got != want {
		t.Errorf("%+v, want %+v", got, want)
	}
}

func TestFailsClosed(t *testing.T) {
	for text, want := range map[string]bool{
		"":                               false,
		"limits: [{name: a, rate: 1/s}]": true,
		"limits: [{name: a, rate: 1/s, on_failure: allow}]":                                        false,
		"limits: [{name: a, rate: 1/s, mode: shadow}]":                                             false,
		"{mode: shadow, limits: [{name: a, rate: 1/s}]}":                                           false,
		"limits: [{name: a, rate: none}, {name: b, rate: unlimited}]":                              false,
		"limits: [{name: a, rate: none, key: client.ip, overrides: [{key: 10.0.0.1, rate: 1/s}]}]": true,
		"limits: [{name: a, rate: 1/s, mode: shadow, key: client.ip, " +
			"overrides: [{key: 10.0.0.1, rate: 1/s, mode: enforce}]}]": true,
		"{on_failure: allow, limits: [{name: a, rate: 1/s}]}":                   false,
		"{on_failure: allow, limits: [{name: a, rate: 1/s, on_failure: deny}]}": true,
	} {
		if got := parse(t, text).FailsClosed(); got != want {
			t.Errorf("%s: %v", text, got)
		}
	}
}

func TestReadsMetadata(t *testing.T) {
	const plan = `'metadata.filter_metadata["envoy.filters.http.jwt_authn"].payload.plan`
	for text, want := range map[string]bool{
		"": false,
		`limits: [{name: a, rate: 1/s, key: [client.ip, 'request.headers["metadata"]']}]`:             false,
		`limits: [{name: a, rate: 1/s, when: 'request.path == "metadata.filter_metadata"', cost: 1}]`: false,
		"limits: [{name: a, rate: 1/s}, {name: b, rate: 1/s, key: [client.ip, " + plan + "']}]":       true,
		"limits: [{name: a, rate: 1/s, when: " + plan + " == \"gold\"'}]":                             true,
		"limits: [{name: a, rate: 1/s, cost: " + plan + " == \"gold\" ? 1 : 2'}]":                     true,
		"limits: [{name: a, rate: 1/s, mode: shadow, when: 'has(metadata.filter_metadata.x)'}]":       true,
	} {
		if got := parse(t, text).ReadsMetadata(); got != want {
			t.Errorf("%s: %v", text, got)
		}
	}
}

func TestSettings(t *testing.T) {
	text := []byte("{domain: file, listen: {grpc: \"127.0.0.1:1\"}, store: {redis: {url: \"redis://file\", timeout: " +
		"7ms}}}")
	c, err := Parse("f", text, env(),
		Setting{Field: "domain", Value: "environment", From: "SLUICE_DOMAIN"},
		Setting{Field: "domain", Value: "flag", From: "--domain"},
		Setting{Field: "listen.grpc", Value: "127.0.0.1:2", From: "demo", Weak: true},
		Setting{Field: "listen.admin", Value: "127.0.0.1:3", From: "demo", Weak: true},
		Setting{Field: "store.redis.url", Value: "redis://flag", From: "--redis"},
		Setting{Field: "grace", Value: "1m", From: "--grace"},
	)
	if err != nil {
		t.Fatal(err)
	}
	if c.Domain != "flag" || c.Listen.GRPC != "127.0.0.1:1" || c.Listen.Admin != "127.0.0.1:3" ||
		c.Grace != time.Minute ||
		c.Redis.URL != "redis://flag" || c.Redis.Timeout != 7*time.Millisecond {
		t.Errorf("%+v %+v", c, c.Redis)
	}

	_, err = Parse("f", nil, env(),
		Setting{Field: "listen.grpc", Value: "nowhere", From: "--grpc"},
		Setting{Field: "grace", Value: "soon", From: "SLUICE_GRACE"},
		Setting{Field: "log_level", Value: "loud", From: "--log-level"},
		Setting{Field: "domain", Value: "a b", From: "--domain"},
		Setting{Field: "store.redis.url", Value: "http://:hunter2@h", From: "--redis"},
		Setting{Field: "colour", Value: "red", From: "--colour"},
	)
	want := `--grpc: listen.grpc: invalid address "nowhere"; want host:port or unix:///absolute/path
SLUICE_GRACE: grace: invalid duration "soon"; want one from 0s to 1h, such as 500ms or 10s
--log-level: log_level: unknown value "loud"; want one of debug, info, warn, error
--domain: domain: invalid value "a b"; want 1 to 253 letters, digits and . _ / -
--redis: store.redis.url: invalid URL scheme; want redis://[user:password@]host:port[/database], the same with rediss://, or unix:///path/to/socket[?db=database]
--colour: colour: unknown setting`
	if err == nil || err.Error() != want {
		t.Errorf("%v\nwant\n%s", err, want)
	}
}

func TestLoadErrors(t *testing.T) {
	for file, want := range map[string]string{
		"no/such/file.yaml": "no/such/file.yaml: no such file or directory",
		"testdata":          "testdata: is a directory",
	} {
		if _, _, err := Load(file, env()); err == nil || err.Error() != want {
			t.Errorf("%v, want %s", err, want)
		}
	}
	if _, err := Parse("f", make([]byte, maxFile+1), env()); err == nil ||
		err.Error() != "f: the file exceeds the maximum of 1048576 bytes" {
		t.Error(err)
	}
}

func TestMistakeAsJSON(t *testing.T) {
	_, err := Parse("f.yaml", []byte("domain: a b\n"), env())
	got, jsonErr := json.Marshal(err)
	if want := `[{"file":"f.yaml","line":1,"column":9,"field":"domain","message":"invalid value \"a b\"; want 1 to 253 ` +
		`letters, digits and . _ / -"}]`; jsonErr != nil || string(got) != want {
		t.Errorf("%s, %v", got, jsonErr)
	}
}

// TestSentinelAccess checks the sentinels' own user, password and TLS.
func TestSentinelAccess(t *testing.T) {
	load := func(more string) (*Config, error) {
		c, _, err := Load(directory(t, "sluice.yaml", "store: {redis: {password: other, "+more+"}}", "secret",
			"hunter2\n"), env())
		return c, err
	}
	c, err := load("mode: sentinel, addresses: ['h:1'], master: m, sentinel: {username: u, password_file: secret, " +
		"tls: {server_name: s}}")
	if err != nil {
		t.Fatal(err)
	}
	want := limiter.SentinelOptions{Username: "u", Password: "hunter2", TLS: &limiter.TLS{ServerName: "s"}}
	if got := c.Redis.Sentinel; !reflect.DeepEqual(got, &want) || c.Redis.Password != "other" || c.Redis.TLS != nil {
		t.Errorf("%+v", c.Redis)
	}
	const sentinels = "mode: sentinel, addresses: ['h:1'], master: m, sentinel: "
	for more, want := range map[string]string{
		"url: 'redis://h', sentinel: {password: hunter2}": "sentinel requires mode sentinel",
		sentinels + "{password: hunter2, password_file: secret}": "store.redis.sentinel.password_file: " +
			"password and password_file are mutually exclusive",
		sentinels + "{pasword: hunter2}":         "store.redis.sentinel.pasword: unknown field; ",
		sentinels + "{tls: {cert_file: secret}}": "cert_file and key_file must be set together",
		sentinels + "{password: hunter2, tls: {ca_file: secret, server_name: []}}": "" +
			"store.redis.sentinel.tls.server_name: ",
	} {
		_, err := load(more)
		if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "hunter2") {
			t.Errorf("%s: %v", more, err)
		}
	}
}

// TestReplaces checks that a change of listeners or the store needs a restart,
// and a change of a password file does not.
func TestReplaces(t *testing.T) {
	load := func(text, secret string) *Config {
		t.Helper()
		if text == "" {
			text = "limits: []" // an empty file is an error
		}
		return loadFiles(t, "sluice.yaml", text, "secret", secret)
	}
	sentinels := func(access string) string {
		return "store: {redis: {mode: sentinel, addresses: ['h:1'], master: m, sentinel: " + access + "}}"
	}
	for _, tt := range []struct{ old, new, want string }{
		{"", "", ""},
		{"domain: a",
			"{domain: b, mode: shadow, limits: [{name: a, rate: 1/s}], key_secret: x, headers: [], grace: 1s}", ""},
		{"", "listen: {grpc: '127.0.0.1:1', admin: '127.0.0.1:2', metrics: '127.0.0.1:3'}",
			"f: listen.grpc: changed; a restart is needed to apply it\nf: listen.admin: changed; a restart is needed " +
				"to apply it\nf: listen.metrics: changed; a restart is needed to apply it"},
		{"", "store: {redis: {url: 'redis://h'}}", "f: store.redis: changed; a restart is needed to apply it"},
		{"store: {redis: {url: 'redis://h'}}", "", "f: store.redis: changed; a restart is needed to apply it"},
		{"store: {redis: {url: 'redis://h'}}", "store: {redis: {url: 'redis://i', timeout: 1s, key_prefix: p}}",
			"f: store.redis.url: changed; a restart is needed to apply it\nf: store.redis.timeout: changed; a " +
				"restart is needed to apply it\nf: store.redis.key_prefix: changed; a restart is needed to apply it"},
		{"store: {redis: {url: 'redis://h', username: a, password: x}}",
			"store: {redis: {url: 'redis://h', username: b, password: y}}",
			"f: store.redis.username: changed; a restart is needed to apply it\nf: store.redis.password: changed; a " +
				"restart is needed to apply it"},
		{"store: {redis: {url: 'redis://h', password_file: secret}}",
			"store: {redis: {url: 'redis://h', password_file: secret}}", ""},
		{"store: {redis: {url: 'redis://h', password: x}}", "store: {redis: {url: 'redis://h', password_file: secret}}",
			"f: store.redis.password: changed; a restart is needed to apply it"},
		{sentinels("{username: a, password_file: secret}"), sentinels("{username: b, password: two}"),
			"f: store.redis.sentinel: changed; a restart is needed to apply it"},
		{sentinels("{username: a, password_file: secret}"), sentinels("{username: a, password_file: secret}"), ""},
		{sentinels("{password: x}"), sentinels("{password_file: secret}"),
			"f: store.redis.sentinel: changed; a restart is needed to apply it"},
		{sentinels("{tls: {server_name: a}}"), sentinels("{tls: {server_name: b}}"),
			"f: store.redis.sentinel: changed; a restart is needed to apply it"},
		{sentinels("{tls: {server_name: a}, password: x}"), sentinels("{tls: {server_name: a}, password: x}"), ""},
	} {
		got := ""
		if err := load(tt.new, "two").Replaces(load(tt.old, "one"), "f"); err != nil {
			got = err.Error()
		}
		if got != tt.want {
			t.Errorf("%s\n%s\n got %s\nwant %s", tt.old, tt.new, got, tt.want)
		}
	}
}

func TestWarnings(t *testing.T) {
	const common = "local_share: 0.1\non_failure: local\nlimits:\n"
	for text, want := range map[string]string{
		"- {name: a, rate: 20/s, cost: 2}": "", // the local burst is 2
		"- {name: a, rate: 20/s, cost: 3}": "test.yaml:4:31: limits[0].cost: 3 exceeds the " +
			"burst of 2 that local_share leaves of 20: every request is denied while the store fails; raise burst or " +
			"local_share, or lower cost",
		"- {name: a, rate: 5/s, cost: 1 + 1}": "test.yaml:4:30: limits[0].cost: 2 exceeds the " +
			"burst of 1 that local_share leaves of 5: every request is denied while the store fails; raise burst or " +
			"local_share, or lower cost",
		"- {name: a, rate: 100/s, quota: 15/month, cost: 2}": "test.yaml:4:49: limits[0].cost: 2 exceeds the " +
			"quota of 1 that local_share leaves of 15: every request is denied while the store fails; raise quota or " +
			"local_share, or lower cost",
		"- {name: a, rate: 5/s, cost: int(source.port)}":     "", // unknown before there is a request
		"- {name: a, rate: 20/s, cost: 3, mode: shadow}":     "",
		"- {name: a, rate: 20/s, cost: 3, on_failure: deny}": "",
		"- {name: a, rate: unlimited, cost: 3}":              "",
		"- {name: a, rate: 5/s}\n- {name: b, rate: 5/s, cost: 2}": "test.yaml:5:30: limits[1].cost: 2 exceeds the " +
			"burst of 1 that local_share leaves of 5: every request is denied while the store fails; raise burst or " +
			"local_share, or lower cost",
		"- name: a\n  rate: 40/s\n  cost: 4\n  key: client.ip\n" +
			"  overrides: [{key: 10.0.0.1, rate: 30/s}, {key: 10.0.0.2, rate: 39/s}, {key: 10.0.0.3, rate: 40/s}, " +
			"{key: 10.0.0.4, rate: unlimited}]": "" +
			"test.yaml:6:9: limits[0].cost: 4 exceeds the burst that local_share leaves to 2 overrides: " +
			"their requests are denied while the store fails; raise their burst or local_share, or lower cost",
	} {
		if got := parse(t, common+text+"\n").Warnings.Error(); got != want {
			t.Errorf("%s\n%s\nwant\n%s", text, got, want)
		}
	}
}

// TestWarnsOfMemory checks the warning about a config that needs more memory
// than an injected sidecar has.
func TestWarnsOfMemory(t *testing.T) {
	for limits, want := range map[int]string{
		1_000: "",
		10_000: "test.yaml:2:1: limits: 10000 limits need about 149 MiB of memory, more than the 128 MiB of an " +
			"injected sidecar; raise its memory limit",
	} {
		var text strings.Builder
		text.WriteString("limits:\n")
		for i := range limits {
			fmt.Fprintf(&text, "- {name: l%d, rate: 1/s, key: client.ip}\n", i)
		}
		if got := parse(t, text.String()).Warnings.Error(); got != want {
			t.Errorf("%d limits: got %q, want %q", limits, got, want)
		}
	}
}

// TestConfigDoesNotKeepItsFile checks that a config does not keep the text and
// nodes of its file in memory.
func TestConfigDoesNotKeepItsFile(t *testing.T) {
	var text strings.Builder
	text.WriteString("limits:\n")
	const limits = 2_000
	for i := range limits {
		fmt.Fprintf(&text, "- {name: l%d, rate: 1/s, key: client.ip}\n", i)
	}
	heap := func() uint64 {
		for range 3 { // sync.Pools are emptied by the second collection
			runtime.GC()
		}
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	before := heap()
	c := parse(t, text.String())
	if each := (heap() - before) / limits; each > 1500 {
		t.Errorf("%d bytes a limit, want at most 1500", each)
	}
	runtime.KeepAlive(c)
}

// TestWarningsOfAbsence checks warnings about groups that do not limit all
// requests, and about costs of bodies without a size.
func TestWarningsOfAbsence(t *testing.T) {
	const (
		when  = `when: 'request.headers["a"] == "x"'`
		other = `when: 'request.headers["a"] == "y"'`
		group = "every limit of the group g has a when, so a request that fits none of them is not limited " +
			"by the group; end the group with a limit without when"
		size = `request.size is absent if a body has no content-length, as with chunked encoding, and the cost is then 1; ` +
			`state the cost, as in "content-length" in request.headers ? request.size : 1000`
	)
	for text, want := range map[string]string{
		"- {name: a, rate: 1/s, group: g, " + when +
			"}": "test.yaml:2:40: limits[0].when: " + group,
		"- {name: a, rate: 1/s, group: g, " + when + "}\n- {name: b, rate: unlimited, group: g, " + other +
			"}": "test.yaml:3:46: limits[1].when: " + group,
		"- {name: a, rate: 1/s, group: g, " + when +
			"}\n- {name: b, rate: 2/s, group: g}": "",
		"- {name: a, rate: 1/s, group: g, " + when +
			"}\n- {name: b, rate: 2/s, group: g, when: true}": "test.yaml:3:40: limits[1].when: is always true; omit when",
		"- {name: a, rate: 1/s, " + when +
			"}": "",
		"- {name: a, rate: 1/s, group: h}\n- {name: b, rate: 1/s, group: g, " + when +
			"}\n- {name: c, rate: 1/s, group: i}": "test.yaml:3:40: limits[1].when: " + group,
		`- {name: a, rate: 9/s, cost: request.size / 100}`:                                                       "test.yaml:2:30: limits[0].cost: " + size,
		`- {name: a, rate: 9/s, cost: 'request.method == "POST" ? request.size : 1'}`:                            "test.yaml:2:30: limits[0].cost: " + size,
		`- {name: a, rate: 9/s, burst: 1000, cost: '"content-length" in request.headers ? request.size : 1000'}`: "",
		`- {name: a, rate: 9/s, when: request.size > 100, key: request.size}`:                                    "",
	} {
		if got := parse(t, "limits:\n"+text+"\n").Warnings.Error(); got != want {
			t.Errorf("%s\n%s\nwant\n%s", text, got, want)
		}
	}
}

func TestByKey(t *testing.T) {
	c := parse(t, `
limits:
  - {name: a, rate: 1/s}
  - {name: b, rate: 1/s, key: client.ip}
  - {name: c, rate: 1/s, key: [client.ip, request.method]}
  - {name: d, rate: 1/s, key: client.ip, match: {methods: [GET]}}
  - {name: e, rate: 1/s, absent: skip}
  - {name: f, rate: 1/s, key: client.ip, absent: share}
  - {name: g, rate: unlimited, key: client.network}
  - {name: h, rate: unlimited, key: client.network, overrides: [{key: 10.0.0.1, rate: 1/s}]}
`)
	if got := fmt.Sprint(c.ByKey()); got != "[[a e] [b d] [c] [f] [h]]" {
		t.Error(got)
	}
}

func FuzzParse(f *testing.F) {
	for _, seed := range configs(f) {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		var c *Config
		var err error
		if cost := allocates(func() { c, err = Parse("fuzz.yaml", text, env()) }); cost > 64<<20 {
			t.Errorf("%q: %d bytes are allocated", text, cost)
		}
		if err != nil {
			for _, m := range mistakes(t, err) {
				if m.Message == "" {
					t.Fatalf("%+v", m)
				}
			}
			return
		}
		c.Draw(&Request{Method: "GET", Path: "/a", Headers: map[string]string{"x": "y"},
			Source: Peer{Address: "10.0.0.1"}})
	})
}
