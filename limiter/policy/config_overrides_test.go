package policy

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"
)

// directory writes files, given as name, text, name, text, and returns the path
// of the first.
func directory(t testing.TB, files ...string) string {
	t.Helper()
	dir := t.TempDir()
	for i := 0; i < len(files); i += 2 {
		path := filepath.Join(dir, files[i])
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(files[i+1]), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return filepath.Join(dir, files[0])
}

// loadFiles returns the config of files, given as for directory. It must be valid.
func loadFiles(t testing.TB, files ...string) *Config {
	t.Helper()
	c, _, err := Load(directory(t, files...), env())
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// wantRate is what the message about an invalid rate ends with.
const wantRate = "want tokens/period such as 10/s, 100/m, 5000/24h, 10/7d or 3/250ms (units: us, ms, s, m, h, d), or " +
	"unlimited or none"

// wantColumns is what the message about columns that cannot be ends with.
const wantColumns = "want 1 for the key's parts, and then some of rate, burst, quota, plan, starts, mode, " +
	"as in key,rate,burst"

// inFile begins a mistake in the file of overrides of the first limit.
var inFile = regexp.MustCompile(`(?m)^o\.csv:(\d+:\d+): limits\[0\]\.overrides_file: `)

// overrideMistakes returns what is wrong with a config whose first limit has the
// overrides_file o.csv with the text csv, as "line:column: message" for what is
// wrong in that file, one mistake a line. It is empty if all is valid.
func overrideMistakes(t testing.TB, config, csv string) string {
	t.Helper()
	file := directory(t, "c.yaml", config, "o.csv", csv)
	_, _, err := Load(file, env())
	if err == nil {
		return ""
	}
	return inFile.ReplaceAllString(strings.ReplaceAll(err.Error(), filepath.Dir(file)+"/", ""), "$1: ")
}

// inHex writes a part of a key by its SHA-256.
func inHex(part string) string {
	sum := sha256.Sum256([]byte(part))
	return "sha256:" + hex.EncodeToString(sum[:])
}

func TestOverrideFiles(t *testing.T) {
	file := directory(
		t,
		"sluice.yaml",
		`
key_secret: pepper
limits:
  - name: a
    key: [request.headers.k, request.method]
    rate: 60/m
    overrides_file: tenants/*.csv
    overrides:
      - {key: [both, GET], rate: 7/m}
`,
		"tenants/a.csv",
		"api key,method,rate,burst\n\"gold, \"\"our "+
			"best\"\"\",GET,600/m,100\n"+inHex("secret")+",GET,1000/h,\nboth,GET,8/m,\n",
		"tenants/b.csv",
		"\ufeffkey,method,rate,burst\r\n\r\nfree,"+strings.ToUpper(
			inHex("GET")[7:],
		)+",1/s,1\r\nfree,"+inHex(
			"GET",
		)+",unlimited,\r\n\u00e9 ,GET,2/s,\r\n",
		"tenants/c.txt",
		"not read",
	)
	c, inputs, err := Load(file, env())
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Dir(file)
	for _, tt := range []struct{ key, rate, reason string }{
		{`gold, "our best"`, "600/m", "it applies to every request; its rate is from " + dir + "/tenants/a.csv:2"},
		{"secret", "1000/h", "it applies to every request; its rate is from " + dir + "/tenants/a.csv:3"},
		{"both", "7/m", "it applies to every request; its rate is from overrides[0], which takes precedence over " +
			dir + "/tenants/a.csv:4"},
		{"free", "unlimited", "it applies to every request; its rate is from " + dir + "/tenants/b.csv:4"},
		{"\u00e9 ", "2/s", "it applies to every request; its rate is from " + dir + "/tenants/b.csv:5"},
		{"\u00e9", "60/m", "it applies to every request"},
		{"gold", "60/m", "it applies to every request"},
	} {
		req := request(t, "GET h/")
		req.Headers["k"] = tt.key
		if l := c.Explain(req).Limits[0]; l.Rate != tt.rate || l.Reason != tt.reason {
			t.Errorf("%s: %s, %s; want %s, %s", tt.key, l.Rate, l.Reason, tt.rate, tt.reason)
		}
	}
	want := []string{file, dir + "/tenants", dir + "/tenants/a.csv", dir + "/tenants/b.csv"}
	if fmt.Sprint(inputs.Paths) != fmt.Sprint(want) {
		t.Errorf("read from %v, want %v", inputs.Paths, want)
	}
}

// TestOverrideMistakes checks that an error names the row and what to write,
// and quotes nothing of a key.
func TestOverrideMistakes(t *testing.T) {
	for _, tt := range []struct {
		config string // of the limit a, besides its name
		csv    string
		want   string // of overrideMistakes
	}{
		{"key: request.method, rate: 9/s, cost: 3", `key,rate,burst
GET,ten,
GET,10/s,0
PUT,10/s,x
PUT,unlimited,5
POST,10/s
,10/s,
sha256:12,1/s,
hunter2,1/s,
POST,10/s,
"POST",11/s,
` + inHex("POST") + `,12/s,
`, `2:5: invalid rate "ten"; ` + wantRate + `
3:5: a burst is 1 to 1000000000 tokens, not 0
4:5: invalid burst "x"; want a whole number from 1 to 1000000000
5:5: burst 5 needs a bucket, but the rate is unlimited; omit burst
6:1: row of 2 columns; want 3, as the header row has
7:1: empty key part; a request's empty part counts as absent
8:1: want sha256: and 64 hex digits, not 2 characters
9:1: the limit's cost of 3 exceeds the burst of 1, so every request would be denied
11:1: duplicate key; want one override for each key
12:1: duplicate key; want one override for each key`},
		{"key: request.method, rate: 9/s", "GET,10/s,\n",
			`1:1: no header row; add one as the first line: key,rate,burst`},
		{"key: [request.method, request.host], rate: 9/s", "key,rate,burst\n",
			"1:1: column 2 is named rate, but must be a part of the key; " +
				"want a header row such as part1,part2,rate,burst"},
		{"key: request.method, rate: 9/s", "",
			`1:1: empty file; want a header row such as key,rate,burst`},
		{"key: request.method, rate: 9/s", "key,rate,burst\nGET,1/s,\nPU\"T,1/s,\n",
			`3:3: bare " in non-quoted-field`},
		{"rate: 9/s", "key,rate,burst\n",
			`c.yaml:1:47: limits[0].overrides_file: requires key; a limit without one has a single bucket`},
	} {
		got := overrideMistakes(t, "limits: [{name: a, "+tt.config+", overrides_file: o.csv}]\n", tt.csv)
		if got != tt.want {
			t.Errorf("%s\n got %s\nwant %s", tt.csv, got, tt.want)
		}
	}
	file := directory(t, "sluice.yaml",
		"limits: [{name: a, key: request.method, rate: 9/s, overrides_file: none.csv}, {name: b, key: "+
			"request.method, rate: 9/s, overrides_file: '[.csv'}]\n")
	_, _, err := Load(file, env())
	want := file + ":1:68: limits[0].overrides_file: " + filepath.Dir(file) +
		"/none.csv: no such file or directory\n" +
		file + ":1:137: limits[1].overrides_file: invalid file name pattern \"[.csv\": syntax error in pattern"
	if err == nil || err.Error() != want {
		t.Errorf("%v\nwant\n%s", err, want)
	}
}

// manyOverrides returns a config whose limit has n overrides in a file.
func manyOverrides(t testing.TB, n int) string {
	var b strings.Builder
	b.WriteString("key,rate,burst\n")
	for i := range n {
		fmt.Fprintf(&b, "tenant-%d,%d/m,%d\n", i, i%50+1, i%100+1)
	}
	return directory(t, "sluice.yaml",
		"limits: [{name: a, key: request.headers.k, rate: 5/s, overrides_file: t.csv}]\n", "t.csv", b.String())
}

func TestOverridesAreReadQuickly(t *testing.T) {
	file := manyOverrides(t, 100_000)
	took := leastTime(time.Second, func() {
		c, _, err := Load(file, env())
		if err != nil || len(c.rules[0].overrides.file) != 100_000 {
			t.Fatal(err)
		}
	})
	if took >= time.Second {
		t.Errorf("100,000 rows took %v", took)
	} else {
		t.Logf("100,000 rows in %v", took)
	}
}

// BenchmarkOverrides measures Draw for a limit with few and with many
// overrides:
//
//	go test ./limiter/policy -run '^$' -bench Overrides
func BenchmarkOverrides(b *testing.B) {
	for _, n := range []int{10, 100_000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			c, _, err := Load(manyOverrides(b, n), env())
			if err != nil {
				b.Fatal(err)
			}
			req := request(b, fmt.Sprintf("GET h/ with k=tenant-%d", n-1))
			if d := c.Draw(req); d.Charges[0].Bucket.Burst() != int64((n-1)%100+1) {
				b.Fatal(d)
			}
			b.ReportAllocs()
			for b.Loop() {
				c.Draw(req)
			}
		})
	}
}

// TestDigestsInYAML checks sha256: parts in all of YAML's notations.
func TestDigestsInYAML(t *testing.T) {
	for _, part := range []string{"gold", "7", "a", "silver", "x1"} {
		for _, key := range []string{"%s", "[%s]", `"%s"`, `["%s"]`, "\n          - %s", "\n          %s"} {
			for _, form := range []string{"[{key: KEY, rate: 1/s}]", "\n      - key: KEY\n        rate: 1/s"} {
				if strings.Contains(key, "\n") && strings.HasPrefix(form, "[") {
					continue
				}
				text := "limits:\n  - name: a\n    rate: 5/s\n    key: request.headers.k\n    overrides: " +
					strings.ReplaceAll(form, "KEY", fmt.Sprintf(key, inHex(part))) + "\n"
				c, err := Parse("f", []byte(text), env())
				if err != nil {
					t.Errorf("%v\n%s", err, text)
					continue
				}
				if l := c.Explain(request(t, "GET h/ with k="+part)).Limits[0]; l.Rate != "1/s" {
					t.Errorf("%s: not overridden\n%s", part, text)
				}
			}
		}
	}
}

// TestPatterns checks that Inputs have the directories in which files of a
// pattern may appear, and that the config's own directory is not a pattern.
func TestPatterns(t *testing.T) {
	base := filepath.Join(t.TempDir(), "[x]*?")
	for _, name := range []string{"a/one.csv", "b/two.csv", "b/three.txt"} {
		path := filepath.Join(base, "t", name)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte("key,rate,burst\n"+name+",1/s,\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for pattern, want := range map[string]string{
		"t/*/*.csv":     "2 overrides from t t/a t/a/one.csv t/b t/b/two.csv",
		"t/a/*.csv":     "1 overrides from t/a t/a/one.csv",
		"t/?/two.csv":   "1 overrides from t t/a t/b t/b/two.csv",
		"none/*/*.csv":  "0 overrides from none",
		"*.csv":         "0 overrides from .",
		"../*/t/a/*csv": "1 overrides from .. . t t/a t/a/one.csv",
		"t/b/two.csv":   "1 overrides from t/b t/b/two.csv",
	} {
		config := filepath.Join(base, "sluice.yaml")
		text := "limits: [{name: a, rate: 1/s, key: request.headers.k, overrides_file: '" + pattern + "'}]\n"
		if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		c, inputs, err := Load(config, env())
		if err != nil {
			t.Errorf("%s: %v", pattern, err)
			continue
		}
		got := fmt.Sprintf("%d overrides from", len(c.rules[0].overrides.file))
		for _, path := range inputs.Paths {
			if path == config {
				continue
			}
			rel, err := filepath.Rel(base, path)
			if err != nil {
				t.Fatal(err)
			}
			got += " " + rel
		}
		if got != want {
			t.Errorf("%s\n got %s\nwant %s", pattern, got, want)
		}
	}
}

// TestInputsTellFilesApart checks that moving a file from one limit to another
// changes the config's hash.
func TestInputsTellFilesApart(t *testing.T) {
	const config = "limits: [{name: a, rate: 1/s, key: request.method, overrides_file: 'a/*.csv'}, {name: b, rate: " +
		"1/s, key: request.method, overrides_file: 'b/*.csv'}]\n"
	const rows = "key,rate,burst\nGET,1/s,\n"
	dir := filepath.Dir(directory(t, "sluice.yaml", config, "a/x.csv", rows, "b/none", ""))
	load := func() Inputs {
		_, in, err := Load(filepath.Join(dir, "sluice.yaml"), env())
		if err != nil {
			t.Fatal(err)
		}
		return in
	}
	before := load()
	if err := os.Rename(filepath.Join(dir, "a/x.csv"), filepath.Join(dir, "b/x.csv")); err != nil {
		t.Fatal(err)
	}
	if after := load(); after.Hash == before.Hash {
		t.Error("the same hash")
	}
}

// TestPartsOfAttributes checks that parts which are attributes are accepted in
// any spelling of a value that requests have, and that other values are errors.
func TestPartsOfAttributes(t *testing.T) {
	const notNetwork = " is not a client network (an IPv4 address or an IPv6 /64); write "
	for _, tt := range []struct {
		key, part, line string // a request that has the part, or
		wrong           string // the error
	}{
		{"client.network", "203.0.113.7", "GET h/ from 203.0.113.7", ""},
		{"client.network", " 203.0.113.7 ", "GET h/ from 203.0.113.7", ""},
		{"client.network", "203.0.113.7/32", "GET h/ from 203.0.113.7", ""},
		{"client.network", "::ffff:203.0.113.7", "GET h/ from 203.0.113.7", ""},
		{"client.network", "2001:db8::/64", "GET h/ from 2001:db8::5", ""},
		{"client.network", "2001:0DB8:0:0::/64", "GET h/ from 2001:db8::5", ""},
		{"client.network", "2001:db8::1", "", "2001:db8::1" + notNetwork + "2001:db8::/64"},
		{"client.network", "2001:db8::1/64", "", "2001:db8::1/64" + notNetwork + "2001:db8::/64"},
		{"client.network", "2001:db8::/32", "", "2001:db8::/32" + notNetwork + "2001:db8::/64"},
		{"client.network", "10.0.0.0/8", "", "10.0.0.0/8" + notNetwork + "10.0.0.0"},
		{"client.network", "gold", "",
			"invalid client network; want an address such as 203.0.113.7, or an IPv6 /64 such as 2001:db8::/64"},
		{"client.ip", "2001:DB8::1", "GET h/ from 2001:db8::1", ""},
		{"client.ip", "2001:db8::/64", "", "invalid address; want one such as 203.0.113.7 or 2001:db8::1"},
		{"source.address", "10.0.0.1:80", "", "invalid address; want one such as 203.0.113.7 or 2001:db8::1"},
		{"request.method", "GET ", "GET h/", ""},
		{"request.method", "get", "", "invalid method; want an upper-case name such as GET or POST"},
		{"request.method", "GET POST", "", "invalid method; want an upper-case name such as GET or POST"},
		{"request.host", "Shop.Example.COM", "GET shop.example.com/", ""},
		{"request.host", "shop.example.com.", "GET shop.example.com/", ""},
		{"request.host", "shop.example.com:443", "", "a host has no port here; write it without one"},
		{"request.host", "*.example.com", "", "patterns are not allowed; want one host"},
		{"request.host", "https://shop.example.com", "",
			"invalid host; want a name such as api.example.com, or an address, without a port"},
		{"request.url_path", "/a", "GET h/a?b=c", ""},
		{"request.url_path", "/a?b=c", "", "request.url_path has no query; write the path without it"},
		{"request.url_path", "a", "", "invalid path; want one that begins with /"},
		{"request.scheme", "HTTPS", "", "unknown scheme; want http or https"},
		{"request.protocol", "HTTP/2.0", "", "unknown protocol; want HTTP/1.0, HTTP/1.1, HTTP/2 or HTTP/3"},
		{"source.port", "0443", "", ""},
		{"source.port", "https", "", "must be a whole number >= 0"},
		{"source.principal", "spiffe://a/*", "", "patterns are not allowed; want one principal"},
		{"source.principal", "shop", "", "invalid principal; want a URI such as spiffe://cluster.local/ns/web/sa/shop"},
		{"request.host + request.method", "anything at all", "", ""},
	} {
		for _, file := range []bool{false, true} {
			overrides := fmt.Sprintf("overrides: [{key: %q, rate: 7/s}]", tt.part)
			if file {
				overrides = "overrides_file: o.csv"
			}
			config := directory(t, "sluice.yaml",
				fmt.Sprintf("limits: [{name: a, rate: 1/s, key: %s, %s}]\n", tt.key, overrides),
				"o.csv", fmt.Sprintf("Key,Rate,Burst\n%q,7/s,\n", tt.part))
			c, _, err := Load(config, env())
			got := ""
			if err != nil {
				got = mistakes(t, err)[0].Message
			}
			if got != tt.wrong {
				t.Errorf("%s under %s: %s\nwant %s", tt.part, tt.key, got, tt.wrong)
			}
			if err == nil && tt.line != "" {
				if l := c.Explain(request(t, tt.line)).Limits[0]; l.Rate != "7/s" {
					t.Errorf("%s under %s is not for %s", tt.part, tt.key, tt.line)
				}
				if _, err := c.Bucket(BucketName{Limit: "a", Parts: []string{tt.part}}); err != nil {
					t.Errorf("%s under %s: %v", tt.part, tt.key, err)
				}
			}
		}
	}
}

// TestByteOrderMarks checks that byte order marks are ignored.
func TestByteOrderMarks(t *testing.T) {
	const bom = "\ufeff"
	c := loadFiles(t, "sluice.yaml",
		bom+"key_secret_file: secret\nlimits: [{name: a, rate: 1/s, key: request.headers.k, overrides_file: o.csv}]\n",
		"secret", bom+"pepper\r\n", "o.csv", bom+"\"key\",rate,burst\ngold,7/s,\n")
	if string(c.hasher.secret) != "pepper" {
		t.Errorf("%q", c.hasher.secret)
	}
	if l := c.Explain(request(t, "GET h/ with k=gold")).Limits[0]; l.Rate != "7/s" {
		t.Error(l.Rate)
	}
}

// TestOverrideWarnings checks warnings about parts that no request is likely to
// have. They name the overrides file.
func TestOverrideWarnings(t *testing.T) {
	config := directory(t, "sluice.yaml",
		"limits: [{name: a, rate: 1/s, key: request.headers.k, overrides: [{key: ' x', rate: 1/s}], overrides_file: "+
			"[o.csv, 'none/*.csv']}, {name: b, rate: 1/s}]\n",
		"o.csv", "key,rate,burst\ngold ,7/s,\nsilver,7/s,\n")
	c, _, err := Load(config, env())
	if err != nil {
		t.Fatal(err)
	}
	want := "DIR/sluice.yaml:1:73: limits[0].overrides[0].key: " + spacedWarning + "\n" +
		"DIR/sluice.yaml:1:116: limits[0].overrides_file[1]: no file matches this pattern yet; until one does, every key " +
		"has the limit's own rate\n" +
		"DIR/o.csv:2:1: limits[0].overrides_file[0]: " + spacedWarning
	if got := strings.ReplaceAll(c.Warnings.Error(), filepath.Dir(config), "DIR"); got != want {
		t.Errorf("%s\nwant\n%s", got, want)
	}
}

// FuzzOverridesFile checks that a CSV file of any content is read or refused,
// and allocates at most a multiple of its size.
func FuzzOverridesFile(f *testing.F) {
	for _, seed := range []string{
		"", "\ufeffclient.ip,rate,burst\n203.0.113.7,5/s,10\n",
		"client.ip,rate\n203.0.113.7,unlimited\n203.0.113.7,1/s\n",
		"client.ip,rate\n\"203.0.113.7\",\"1/s\"\n", "client.ip\n\"a", "rate,client.ip\r\n1/s,::1\r\n", strings.Repeat(",", 1000),
		"client.ip,rate\n" + strings.Repeat("x,1/s\n", 200), "client.ip,rate\n" + strings.Repeat("\n", 1000),
	} {
		f.Add([]byte(seed))
	}
	const config = "limits: [{name: a, rate: 1/s, key: client.ip, overrides_file: rows.csv}]"
	name := filepath.Join(f.TempDir(), "test.yaml")
	f.Fuzz(func(t *testing.T, rows []byte) {
		if err := os.WriteFile(filepath.Join(filepath.Dir(name), "rows.csv"), rows, 0o600); err != nil {
			t.Fatal(err)
		}
		var c *Config
		var err error
		if cost := allocates(func() { c, err = Parse(name, []byte(config), env()) }); cost > 1<<20+512*len(rows) {
			t.Errorf("%d bytes are allocated for %d", cost, len(rows))
		}
		if (c == nil) == (err == nil) {
			t.Errorf("%v and %v", c, err)
		}
	})
}
