package main

import (
	"encoding/json"
	"io/fs"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/goccy/go-yaml"
)

// odd is a config with a warning.
const odd = "limits: [{name: a, rate: 20/s, cost: 0}]\n"

const oddWarning = ":1:38: limits[0].cost: a limit that takes no tokens never denies; give it a cost above 0, or a " +
	"settle that charges each request when its response ends\n"

func TestValidate(t *testing.T) {
	good, bad := file(t, "good.yaml", perClient), file(t, "bad.yaml", "limits:\n  - name: orders\n    rate: fast\n")
	odd := file(t, "odd.yaml", odd)
	slow := file(t, "slow.yaml", "store: {redis: {url: 'redis://h', timeout: 300ms}}\n")
	const late = ":1:44: store.redis.timeout: 300ms is not below the timeout of Envoy's ext_authz filter (200ms), "
	for _, tt := range []struct {
		args           []string
		status         int
		stdout, stderr string // patterns
	}{
		{[]string{good}, 0, `^GOOD: ok\n$`, `^$`},
		{[]string{"--strict", good}, 0, `^GOOD: ok\n$`, `^$`},
		{[]string{good, bad}, 1, `^GOOD: ok\nBAD:3:11: limits\[0\]\.rate: .*\n$`, `^$`},
		// A warning is not part of the result.
		{[]string{odd}, 0, `^ODD: ok\n$`, `^warning: ODD` + regexp.QuoteMeta(oddWarning) + `$`},
		{[]string{"--strict", odd}, 1, `^ODD` + regexp.QuoteMeta(oddWarning) + `$`, `^$`},
		{[]string{"--strict", odd, good}, 1, `(?s)^ODD.*\nGOOD: ok\n$`, `^$`},
		{[]string{slow}, 0, `^SLOW: ok\n$`, `^warning: SLOW` + regexp.QuoteMeta(late)},
		{[]string{"--envoy-timeout", "500ms", "--strict", slow}, 0, `^SLOW: ok\n$`, `^$`},
		{[]string{"--envoy-timeout", "0s", slow}, 2, `^$`, `^sluice: --envoy-timeout 0s: must be above 0\n`},
	} {
		status, stdout, stderr := sluice(t, nil, append([]string{"validate"}, tt.args...)...)
		names := strings.NewReplacer(good, "GOOD", bad, "BAD", odd, "ODD", slow, "SLOW")
		stdout, stderr = names.Replace(stdout), names.Replace(stderr)
		if status != tt.status || !regexp.MustCompile(tt.stdout).MatchString(stdout) ||
			!regexp.MustCompile(tt.stderr).MatchString(stderr) {
			t.Errorf("%s: %d\n%s\n%s", names.Replace(strings.Join(tt.args, " ")), status, stdout, stderr)
		}
	}
}

// TestValidateJSON checks that the errors and warnings of all files are one list.
func TestValidateJSON(t *testing.T) {
	good, bad := file(t, "good.yaml", perClient), file(t, "bad.yaml", "limits:\n  - name: orders\n    rate: fast\n")
	odd := file(t, "odd.yaml", odd)
	type entry struct {
		File           string
		Line, Column   int
		Field, Message string
		Severity       string
	}
	validate := func(want int, args ...string) (all []entry) {
		t.Helper()
		status, stdout, stderr := sluice(t, nil, append([]string{"validate", "-o", "json"}, args...)...)
		if err := json.Unmarshal([]byte(stdout), &all); err != nil || status != want || stderr != "" {
			t.Fatalf("%v: %d, %v\n%s%s", args, status, err, stdout, stderr)
		}
		for i := range all {
			if all[i].Message == "" {
				t.Errorf("%+v has no message", all[i])
			}
			all[i].Message = ""
		}
		return all
	}
	if all := validate(0, good); all == nil || len(all) != 0 {
		t.Errorf("%v", all)
	}
	wrong := entry{bad, 3, 11, "limits[0].rate", "", "error"}
	doubtful := entry{odd, 1, 38, "limits[0].cost", "", "warning"}
	if all := validate(1, odd, bad); !slices.Equal(all, []entry{doubtful, wrong}) {
		t.Errorf("%+v", all)
	}
	if all := validate(0, odd); !slices.Equal(all, []entry{doubtful}) {
		t.Errorf("%+v", all)
	}
	doubtful.Severity = "error"
	if all := validate(1, "--strict", odd); !slices.Equal(all, []entry{doubtful}) {
		t.Errorf("%+v", all)
	}
}

// TestValidateStdin checks that - is stdin, whose files are relative to the
// working directory.
func TestValidateStdin(t *testing.T) {
	for _, tt := range []struct {
		text           string
		status         int
		stdout, stderr string
	}{
		{perClient, 0, "<stdin>: ok\n", ""},
		{odd, 0, "<stdin>: ok\n", "warning: <stdin>" + oddWarning},
		{"domain: a b\n", 1, "<stdin>:1:9: domain: invalid value \"a b\"; want 1 to 253 letters, digits and . _ / -\n", ""},
		{"key_secret_file: none\n", 1, "<stdin>:1:18: key_secret_file: none: no such file or directory\n", ""},
		{"", 1, "<stdin>: the file is empty (perhaps it is still being written); for a config without limits write limits: []\n", ""},
	} {
		status, stdout, stderr := sluiceWith(t, tt.text, nil, "validate", "-")
		if status != tt.status || stdout != tt.stdout || stderr != tt.stderr {
			t.Errorf("%q: %d\n%s\n%s", tt.text, status, stdout, stderr)
		}
	}
}

// shown are the configs of a document: its YAML blocks, and their parts that are
// ConfigMaps' sluice.yaml.
func shown(text string) (configs []string) {
	for _, b := range blocks(text, "yaml") {
		for d := range strings.SplitSeq(b, "\n---\n") {
			var v map[string]any
			if yaml.Unmarshal([]byte(d), &v) != nil {
				continue
			}
			if data, ok := v["data"].(map[string]any); ok {
				if inner, ok := data["sluice.yaml"].(string); ok {
					configs = append(configs, inner)
				}
			}
			isConfig := v["limits"] != nil || v["exempt"] != nil
			for _, other := range []string{"apiVersion", "static_resources", "services"} {
				isConfig = isConfig && v[other] == nil
			}
			if isConfig {
				configs = append(configs, d)
			}
		}
	}
	return configs
}

// TestNoFalseAlarms checks that validate warns of no config that is shown or
// shipped, except for what is meant there.
func TestNoFalseAlarms(t *testing.T) {
	// meant has the warnings of documents, as parts of them.
	meant := map[string][]string{
		// Each field is shown once, and so no group is complete.
		policyReadme: {
			"every limit of the group plan has a when", "without key_secret only the process", "no file matches this pattern",
		},
		// These examples do what those of other limiters do, which let clients
		// choose keys, too.
		envoyReadme: {"every limit of the group user has a when", "is chosen by the client"},
	}
	texts := make(map[string][]string)
	root := filepath.Join("..", "..")
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name, err := filepath.Rel(root, path)
		name = filepath.ToSlash(name)
		switch {
		case err != nil:
			return err
		case d.IsDir() && (d.Name() == "testdata" || d.Name() == ".git" || d.Name() == "dist"):
			return filepath.SkipDir
		case strings.HasSuffix(name, ".md"):
			texts[name] = shown(document(t, name))
		case name == "cmd/sluice/demo.yaml" || strings.HasPrefix(name, "cmd/") && d.Name() == "sluice.yaml":
			texts[name] = []string{document(t, name)}
		case name == "k8s/chart/values.yaml":
			var values struct{ Gateway struct{ Config string } }
			if err := yaml.Unmarshal([]byte(document(t, name)), &values); err != nil || values.Gateway.Config == "" {
				t.Errorf("%s: %v, %+v", name, err, values)
			}
			texts[name] = []string{values.Gateway.Config}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for name, least := range map[string]int{
		"README.md": 1, policyReadme: 14, envoyReadme: 15, "cmd/sluice/demo.yaml": 1, "cmd/sluice/systemd/sluice.yaml": 1,
		"cmd/sluice/compose/sluice/sluice.yaml": 1, "k8s/chart/values.yaml": 1,
	} {
		if len(texts[name]) < least {
			t.Errorf("%s shows %d configs, want at least %d", name, len(texts[name]), least)
		}
	}
	for name, configs := range texts {
		for _, config := range configs {
			status, stdout, stderr := sluiceWith(t, config, []string{"REDIS_URL=redis://h", "RATE=1/s"}, "validate", "-")
			for line := range strings.Lines(stderr) {
				if !slices.ContainsFunc(meant[name], func(part string) bool { return strings.Contains(line, part) }) {
					t.Errorf("%s has\n%s\nvalidate says %s", name, config, line)
				}
			}
			if status != 0 && !strings.Contains(stdout, "no such file or directory") { // secrets and certificates
				t.Errorf("%s has\n%s\nvalidate says %s", name, config, stdout)
			}
		}
	}
}
