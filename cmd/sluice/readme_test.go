package main

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/goccy/go-yaml"

	"github.com/sluiceproxy/sluice/limiter/policy"
	"github.com/sluiceproxy/sluice/limiter/redistest"
)

// The documents that these tests hold to the program, from the repository's
// top.
const (
	topReadme     = "README.md"
	policyReadme  = "limiter/policy/README.md"
	limiterReadme = "limiter/README.md"
	authzReadme   = "authz/README.md"
	envoyReadme   = "envoy/README.md"
	programReadme = "cmd/sluice/README.md"
)

// document returns the text of a document. name is relative to the top of the
// repository.
func document(t *testing.T, name string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("..", "..", filepath.FromSlash(name)))
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// section returns what a document says under a heading, such as "## Install",
// up to the next heading of the same or a higher level.
func section(t *testing.T, name, heading string) string {
	t.Helper()
	_, text, ok := strings.Cut(document(t, name), "\n"+heading+"\n")
	if !ok {
		t.Fatalf("%s has no %q", name, heading)
	}
	end := regexp.MustCompile("^#{1," + strconv.Itoa(strings.Index(heading, " ")) + "} ")
	var lines strings.Builder
	inCode := false
	for line := range strings.Lines(text) {
		if strings.HasPrefix(strings.TrimSpace(line), "```") {
			inCode = !inCode
		}
		if !inCode && end.MatchString(line) {
			break
		}
		lines.WriteString(line)
	}
	return lines.String()
}

// blocks returns the code blocks of a language in a text.
func blocks(text, language string) []string {
	var found []string
	for _, m := range regexp.MustCompile("(?ms)^ *```"+language+"\n(.*?)^ *```$").FindAllStringSubmatch(text, -1) {
		found = append(found, m[1])
	}
	return found
}

// block returns the first code block of a language in a text.
func block(t *testing.T, text, language string) string {
	t.Helper()
	all := blocks(text, language)
	if len(all) == 0 {
		t.Fatalf("no %s block in %q", language, text)
	}
	return all[0]
}

// unique returns the matches of the first group of a pattern, sorted and
// without duplicates.
func unique(text, pattern string) []string {
	var found []string
	for _, m := range regexp.MustCompile(pattern).FindAllStringSubmatch(text, -1) {
		found = append(found, m[1])
	}
	slices.Sort(found)
	return slices.Compact(found)
}

// readmeConfig returns the config reference.
func readmeConfig(t *testing.T) string {
	t.Helper()
	return block(t, section(t, policyReadme, "## Reference"), "yaml")
}

// TestREADMEConfig checks that the config of the reference is valid, also with
// the fields that are comments there.
func TestREADMEConfig(t *testing.T) {
	config := readmeConfig(t)
	for _, text := range []string{
		config, strings.Replace(strings.Replace(config, "  xff_from_right: 1 ", "  # ", 1), "# header:", "header:", 1),
	} {
		if status, stdout, stderr := sluice(t, nil, "validate", file(t, "sluice.yaml", text)); status != 0 {
			t.Errorf("%s%s", stdout, stderr)
		}
	}
}

// TestREADMEReference checks that the config reference has exactly the fields
// and defaults of the schema. The tests of policy check the schema.
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
	// walk compares a value with its schema. Of a list it compares the first
	// and the last item.
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
			if !given && !regexp.MustCompile(`(?m)^.*#.*\b`+name+`\b`).MatchString(config) &&
				!regexp.MustCompile(`\b`+name+`:`).MatchString(config) {
				t.Errorf("the reference does not have %s", at)
			}
			if d, ok := p.(map[string]any)["default"]; ok && given && at != "domain" && at != "limits[].cost" {
				if defaults++; fmt.Sprint(d) != fmt.Sprint(v) {
					t.Errorf("%s: the reference says %v, the schema %v", at, v, d)
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

// TestREADMECommands checks that the commands and flags of the documents exist.
func TestREADMECommands(t *testing.T) {
	text := document(t, programReadme)
	_, rootHelp, _ := sluice(t, nil, "--help")
	commands := unique(rootHelp, `(?m)^  ([a-z]+) +[A-Z]`)
	named := unique(text, "(?m)^\\| `sluice ([a-z]+)")
	for _, c := range commands {
		if c != "help" && c != "completion" && !slices.Contains(named, c) {
			t.Errorf("the document does not have the command %s", c)
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
	_, help, _ := sluice(t, nil, "bucket", "get", "--help")
	flags := unique(rootHelp+all+help, ` --([a-z-]+) `)
	for _, name := range []string{topReadme, policyReadme, limiterReadme, authzReadme, envoyReadme, programReadme} {
		for _, f := range unique(document(t, name), "`(?:[^`\n|]* )?--([a-z][a-z-]+)") {
			if !slices.Contains(flags, f) {
				t.Errorf("no command has the flag --%s of %s", f, name)
			}
		}
	}
	_, run, _ := sluice(t, nil, "run", "--help")
	for _, f := range unique(run, ` --([a-z-]+) `) {
		if !strings.Contains(text, "`--"+f+"`") && f != "help" {
			t.Errorf("the document does not have run's flag --%s", f)
		}
	}
	variables := unique(text, "`(SLUICE_[A-Z_]+)`")
	for _, e := range variables {
		if !strings.Contains(run, "$"+e) {
			t.Errorf("run does not have the document's variable %s", e)
		}
	}
	if all := unique(run, `\$(SLUICE_[A-Z_]+)`); !slices.Equal(variables, all) {
		t.Errorf("the document names %v, want %v", variables, all)
	}
}

// TestREADMEMetrics checks that cmd/sluice/README.md has exactly the exported
// metrics.
func TestREADMEMetrics(t *testing.T) {
	config := file(
		t, "sluice.yaml",
		"limits: [{name: a, rate: 1/s, settle: 1}, {name: c, rate: 1/s, lease: 1s}, {name: b, rate: 1/s, key: 'request.path.split(\"?\")[1]', match: {paths: [/bad]}}]\n",
	)
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
	if named := unique(section(t, programReadme, "## Watching it"), "`(sluice_[a-z_]+)"); !slices.Equal(named, exported) {
		t.Errorf("the document names\n%v\nexported are\n%v", named, exported)
	}
}

// TestREADMESteps checks that the config of README.md's first steps is valid.
func TestREADMESteps(t *testing.T) {
	config := file(t, "sluice.yaml", block(t, section(t, topReadme, "## Use it"), "yaml"))
	if status, stdout, stderr := sluice(t, nil, "validate", config); status != 0 ||
		stderr != "" {
		t.Errorf("%s%s", stdout, stderr)
	}
}
