package main

import (
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

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

// The README's config is a good one, also with what stands in comments there.
func TestREADMEConfig(t *testing.T) {
	_, rest, _ := strings.Cut(readme(t), "## The config")
	_, rest, _ = strings.Cut(rest, "```yaml\n")
	config, _, _ := strings.Cut(rest, "```")
	for _, text := range []string{config, strings.Replace(strings.Replace(config, "  xff_from_right: 1 ", "  # ", 1), "# header:", "header:", 1)} {
		if status, stdout, stderr := sluice(t, nil, "validate", file(t, "sluice.yaml", text)); status != 0 {
			t.Errorf("%s%s", stdout, stderr)
		}
	}
	// A config without the file's own values is the same as the README's defaults; what validate knows, the README has.
	_, stdout, _ := sluice(t, nil, "validate", file(t, "sluice.yaml", "?: 1\nlimits: [{?: 1, match: {?: 1}}]\nlisten: {?: 1}\nstore: {redis: {?: 1}}\nclient_ip: {?: 1}\n"))
	fields := unique(strings.Join(unique(stdout, `allowed are ([a-z_, ]+)\n`), ", ")+", ", `([a-z_]+), `)
	if len(fields) < 30 {
		t.Errorf("only %d fields: %v\n%s", len(fields), fields, stdout)
	}
	for _, f := range fields {
		if !regexp.MustCompile(`\b` + f + `\b`).MatchString(config) {
			t.Errorf("the README's config does not have the field %s", f)
		}
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
	flags := unique(all, ` --([a-z-]+) `)
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
