package main

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/goccy/go-yaml"

	"github.com/sluiceproxy/sluice/limiter/policy"
	"github.com/sluiceproxy/sluice/limiter/redistest"
)

func readme(t *testing.T) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("..", "..", "README.md"))
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// unique is what a pattern's first group finds, sorted, each once.
func unique(text, pattern string) []string {
	var found []string
	for _, m := range regexp.MustCompile(pattern).FindAllStringSubmatch(text, -1) {
		found = append(found, m[1])
	}
	slices.Sort(found)
	return slices.Compact(found)
}

// readmeConfig is the README's reference of the config.
func readmeConfig(t *testing.T) string {
	t.Helper()
	_, rest, _ := strings.Cut(readme(t), "## The config")
	_, rest, _ = strings.Cut(rest, "```yaml\n")
	config, _, _ := strings.Cut(rest, "```")
	return config
}

// The README's config is a good one, also with what stands in comments there.
func TestREADMEConfig(t *testing.T) {
	config := readmeConfig(t)
	for _, text := range []string{config, strings.Replace(strings.Replace(config, "  xff_from_right: 1 ", "  # ", 1), "# header:", "header:", 1)} {
		if status, stdout, stderr := sluice(t, nil, "validate", file(t, "sluice.yaml", text)); status != 0 {
			t.Errorf("%s%s", stdout, stderr)
		}
	}
}

// The README's reference has the schema's fields, with the schema's defaults, and none besides. The schema is held to the program by
// the policy's tests.
func TestREADMEReference(t *testing.T) {
	config := readmeConfig(t)
	var schema, values map[string]any
	if err := json.Unmarshal(policy.Schema, &schema); err != nil {
		t.Fatal(err)
	}
	if err := yaml.Unmarshal([]byte(config), &values); err != nil {
		t.Fatal(err)
	}
	fields, defaults := 0, 0
	// walk compares what the schema says of a value with the value, of which a list's first and last stand for all.
	var walk func(path string, s map[string]any, value any)
	walk = func(path string, s map[string]any, value any) {
		if r, ok := s["$ref"].(string); ok {
			s = schema["$defs"].(map[string]any)[filepath.Base(r)].(map[string]any)
		}
		if items, ok := s["items"].(map[string]any); ok {
			if list, ok := value.([]any); ok {
				value = list[len(list)-1]
			}
			walk(path+"[]", items, value)
		}
		if all, ok := s["allOf"].([]any); ok {
			walk(path, all[0].(map[string]any), value)
		}
		properties, _ := s["properties"].(map[string]any)
		mapping, _ := value.(map[string]any)
		for name, p := range properties {
			fields++
			at := strings.TrimPrefix(path+"."+name, ".")
			v, given := mapping[name]
			if !given && !regexp.MustCompile(`(?m)^.*#.*\b`+name+`\b`).MatchString(config) && !regexp.MustCompile(`\b`+name+`:`).MatchString(config) {
				t.Errorf("the README's reference does not have %s", at)
			}
			if d, ok := p.(map[string]any)["default"]; ok && given && at != "domain" && at != "limits[].cost" {
				if defaults++; fmt.Sprint(d) != fmt.Sprint(v) {
					t.Errorf("%s: the README says %v, the schema %v", at, v, d)
				}
			}
			walk(at, p.(map[string]any), v)
		}
	}
	walk("", schema, values)
	if fields < 50 || defaults < 10 {
		t.Errorf("only %d fields and %d defaults were looked at", fields, defaults)
	}
}

// The README's commands and flags are the program's.
func TestREADMECommands(t *testing.T) {
	text := readme(t)
	_, help, _ := sluice(t, nil, "--help")
	commands := unique(help, `(?m)^  ([a-z]+) +[A-Z]`)
	named := unique(text, "(?m)^\\| `sluice ([a-z]+)")
	for _, c := range commands {
		if c != "help" && c != "completion" && !slices.Contains(named, c) {
			t.Errorf("the README does not have the command %s", c)
		}
	}
	all := ""
	for _, c := range named {
		status, help, stderr := sluice(t, nil, c, "--help")
		if status != 0 {
			t.Errorf("sluice %s: %s", c, stderr)
		}
		all += help
	}
	_, help, _ = sluice(t, nil, "bucket", "get", "--help")
	flags := unique(all+help, ` --([a-z-]+) `)
	for _, f := range unique(text, "`(?:[^`\n|]* )?--([a-z][a-z-]+)") {
		if !slices.Contains(flags, f) {
			t.Errorf("no command has the README's flag --%s", f)
		}
	}
	_, run, _ := sluice(t, nil, "run", "--help")
	for _, f := range unique(run, ` --([a-z-]+) `) {
		if !strings.Contains(text, "`--"+f+"`") && f != "help" {
			t.Errorf("the README does not have run's flag --%s", f)
		}
	}
	for _, e := range unique(text, "`(SLUICE_[A-Z_]+)`") {
		if !strings.Contains(run, "$"+e) {
			t.Errorf("run does not have the README's variable %s", e)
		}
	}
}

// The README's metrics are those that are exported.
func TestREADMEMetrics(t *testing.T) {
	config := file(t, "sluice.yaml", "limits: [{name: a, rate: 1/s}, {name: b, rate: 1/s, key: 'request.path.split(\"?\")[1]', match: {paths: [/bad]}}]\n")
	var exported []string
	for _, args := range [][]string{nil, {"--redis", redistest.Start(t).URL()}} {
		p := startSluice(t, append([]string{"--config", config}, args...)...)
		conn := dial(t, p.grpc)
		check(t, conn, from("203.0.113.1", "/"))
		check(t, conn, from("203.0.113.1", "/bad"))
		_, metrics := get(t, "http://"+p.metrics+"/metrics")
		exported = append(exported, unique(metrics, `(?m)^# TYPE (sluice_[a-z_]+) `)...)
	}
	slices.Sort(exported)
	exported = slices.Compact(exported)
	_, section, _ := strings.Cut(readme(t), "## Watching it")
	section, _, _ = strings.Cut(section, "\n## ")
	if named := unique(section, "`(sluice_[a-z_]+)"); !slices.Equal(named, exported) {
		t.Errorf("the README names\n%v\nexported are\n%v", named, exported)
	}
}
