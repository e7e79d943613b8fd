package policy

import (
	"bytes"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/goccy/go-yaml"
)

// place is where a value of a config is: a field of a mapping, or an item of a
// list.
type place struct {
	field  string // as mistakes name it
	name   string // of the field; empty for an item
	set    func(any)
	rename func(string) // of the field; nil for an item
	value  any
}

// places returns all places of a config.
func places(field string, v any) (all []place) {
	switch v := v.(type) {
	case map[string]any:
		for _, name := range slices.Sorted(maps.Keys(v)) {
			p := place{field: join(field, name), name: name, value: v[name], set: func(to any) { v[name] = to }}
			p.rename = func(to string) {
				v[to] = v[name]
				delete(v, name)
			}
			all = append(append(all, p), places(p.field, v[name])...)
		}
	case []any:
		for i := range v {
			p := place{field: fmt.Sprintf("%s[%d]", field, i), value: v[i], set: func(to any) { v[i] = to }}
			all = append(append(all, p), places(p.field, v[i])...)
		}
	}
	return all
}

// TestOneMessageForOneMistake takes the value of each field of good configs and of
// each item of a list, gives it an empty one, and misspells each field. Each time
// there is one message, about that field: what only seems to be missing because of
// the mistake is not reported, too.
func TestOneMessageForOneMistake(t *testing.T) {
	files, err := filepath.Glob("testdata/good/*.yaml")
	if err != nil {
		t.Fatal(err)
	}
	limitAt := regexp.MustCompile(`^limits\[(\d+)\](.*)`)
	changed := 0
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		read := func() (all []place, root any) {
			if err := yaml.Unmarshal(text, &root); err != nil {
				t.Fatal(file, err)
			}
			return places("", root), root
		}
		const nothing = "-no value-"
		// check checks that a config has one mistake, of a field. If optional is true
		// it may have none, or one of a larger field.
		check := func(what, field string, root any, optional bool) {
			changed++
			if m := limitAt.FindStringSubmatch(field); m != nil { // the others take time
				at, _ := strconv.Atoi(m[1])
				config := root.(map[string]any)
				config["limits"] = config["limits"].([]any)[at : at+1]
				field = "limits[0]" + m[2]
			}
			encoded, err := yaml.Marshal(root)
			if err != nil {
				t.Fatal(err)
			}
			_, err = Parse(file, bytes.ReplaceAll(encoded, []byte(nothing), nil), env())
			all, _ := err.(Mistakes) //nolint:errorlint // as Parse promises
			if len(all) > 1 || !optional && (len(all) == 0 || all[0].Field != field) {
				t.Errorf("%s: %s %s:\n%v", filepath.Base(file), field, what, err)
			}
		}
		first, _ := read()
		for i := range first {
			isField := first[i].rename != nil
			without := any(nothing)
			if !isField {
				without = nil // as null: without a value an item is what is on the next line
			}
			for what, value := range map[string]any{"has no value": without, "is empty": ""} {
				all, root := read()
				all[i].set(value)
				check(what, all[i].field, root, what == "is empty")
			}
			if !isField || strings.HasPrefix(first[i].field, "plans.") && strings.Count(first[i].field, ".") == 1 {
				continue // a plan's name is free
			}
			all, root := read()
			all[i].rename(all[i].name + "x")
			check("is misspelled", all[i].field+"x", root, false)
		}
	}
	if changed < 500 {
		t.Errorf("only %d changes", changed)
	}
}

// TestOneMessageForOneCell does the same with each cell of an overrides file.
func TestOneMessageForOneCell(t *testing.T) {
	header := []string{"tenant", "method", "rate", "burst", "quota", "plan", "starts", "mode"}
	rows := [][]string{
		{"a", "GET", "1/s", "5", "10/month", "", "2026-01-14", "shadow"},
		{"b", "GET", "", "", "10/month", "", "2026-01-14", "shadow"},
		{"c", "GET", "", "", "", "gold", "", ""},
	}
	// mayBeEmpty has the cells that need no value, by row.
	mayBeEmpty := []string{"rate burst quota starts mode", "starts mode", ""}
	for i, row := range rows {
		for j := range header {
			if row[j] == "" {
				continue
			}
			cells := slices.Clone(row)
			cells[j] = ""
			want := 1
			if slices.Contains(strings.Fields(mayBeEmpty[i]), header[j]) {
				want = 0
			}
			if i == 0 && header[j] == "rate" || i == 0 && header[j] == "quota" {
				want = 1 // of the burst, or the day to start on
			}
			_, _, err := Load(directory(t, "sluice.yaml", "{plans: {gold: {rate: 5/s}}, limits: [{name: a, rate: 1/s, "+
				"key: [request.headers.a, request.method], overrides_file: a.csv}]}", "a.csv",
				strings.Join(header, ",")+"\n"+strings.Join(cells, ",")+"\n"), env())
			if all, _ := err.(Mistakes); len(all) != want { //nolint:errorlint // as Load promises
				t.Errorf("%v:\n%v", cells, err)
			}
		}
	}
	_, _, err := Load(directory(t, "sluice.yaml", "{planz: {gold: {rate: 5/s}}, limits: [{name: a, rate: 1/s, "+
		"time_zone: UTC, key: client.ip, overrides_file: a.csv}]}", "a.csv", "ip,rate,plan\n10.0.0.1,,gold\n"), env())
	if all, _ := err.(Mistakes); len(all) != 1 || all[0].Field != "planz" { //nolint:errorlint // as Load promises
		t.Errorf("the plan of a cell may only seem to be missing:\n%v", err)
	}
	for j := range header {
		cells := slices.Clone(header)
		cells[j] = ""
		_, _, err := Load(directory(t, "sluice.yaml", "limits: [{name: a, rate: 1/s, key: [request.headers.a, "+
			"request.method], overrides_file: a.csv}]", "a.csv", strings.Join(cells, ",")+"\n"), env())
		if all, _ := err.(Mistakes); len(all) != 1 && j > 1 || len(all) > 1 { //nolint:errorlint // as Load promises
			t.Errorf("%v:\n%v", cells, err)
		}
	}
}
