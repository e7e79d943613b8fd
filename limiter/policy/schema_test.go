package policy

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/goccy/go-yaml"
	"github.com/santhosh-tekuri/jsonschema/v6"
	"pgregory.net/rapid"
)

// schema compiles the schema, which checks that it is valid.
func schema(t testing.TB) *jsonschema.Schema {
	t.Helper()
	doc, err := jsonschema.UnmarshalJSON(bytes.NewReader(Schema))
	if err != nil {
		t.Fatal(err)
	}
	c := jsonschema.NewCompiler()
	if err := c.AddResource("schema.json", doc); err != nil {
		t.Fatal(err)
	}
	s, err := c.Compile("schema.json")
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// asJSON returns a YAML text as an editor passes it to the schema. ok is false
// if it is not YAML.
func asJSON(t testing.TB, text []byte) (v any, ok bool) {
	t.Helper()
	if err := yaml.Unmarshal(text, &v); err != nil {
		return nil, false
	}
	if v == nil {
		return map[string]any{}, true // an empty file
	}
	encoded, err := json.Marshal(v)
	if err != nil {
		return nil, false
	}
	v, err = jsonschema.UnmarshalJSON(bytes.NewReader(encoded))
	return v, err == nil
}

// TestSchemaAgrees checks that the schema and the reader agree on the good and
// bad files, except for what only the reader can check.
func TestSchemaAgrees(t *testing.T) {
	s := schema(t)
	// beyond has what only the reader can check.
	beyond := map[string]string{
		"anchor_and_alias.yaml": "an editor resolves them", "merge_key.yaml": "an editor resolves it",
		"bad_cel.yaml": "CEL", "constants.yaml": "CEL", "environment.yaml": "the environment",
		"names_of_entries.yaml": "CEL",
		"missing_files.yaml":    "files",
		"same_name_twice.yaml":  "names are unique", "cluster_without_addresses.yaml": "the environment may say one",
		"tls_files.yaml": "files", "local_without_share.yaml": "one field against another",
		"second_document.yaml": "each document by itself",
		"costs.yaml":           "costs against bursts", "redis_without_url.yaml": "the environment may say it",
	}
	for _, dir := range []string{"good", "bad"} {
		files, err := filepath.Glob("testdata/" + dir + "/*.yaml")
		if err != nil || len(files) == 0 {
			t.Fatal(files, err)
		}
		for _, file := range files {
			text, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			v, isYAML := asJSON(t, text)
			if !isYAML {
				continue // an editor reports that itself
			}
			name := filepath.Base(file)
			switch err := s.Validate(v); {
			case dir == "good" && err != nil:
				t.Errorf("%s: %v", file, err)
			case dir == "bad" && err == nil && beyond[name] == "":
				t.Errorf("%s: the schema lets it through", file)
			case dir == "bad" && err != nil && beyond[name] != "":
				t.Errorf("%s: the schema refuses it, and this test says that it cannot", file)
			}
		}
	}
}

// TestSchemaAgreesOnChanges changes one thing in a good config. The reader must
// reject what the schema rejects, and the other way round if a field is unknown
// or has the wrong type.
func TestSchemaAgreesOnChanges(t *testing.T) {
	s := schema(t)
	text, err := os.ReadFile("testdata/good/everything.yaml")
	if err != nil {
		t.Fatal(err)
	}
	refused := 0
	rapid.Check(t, func(t *rapid.T) {
		var v any
		if err := yaml.Unmarshal(text, &v); err != nil {
			t.Fatal(err)
		}
		structural := false
		v = change(t, v, &structural)
		changed, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		doc, err := jsonschema.UnmarshalJSON(bytes.NewReader(changed))
		if err != nil {
			t.Fatal(err)
		}
		bySchema := s.Validate(doc)
		_, byReader := Parse("testdata/good/x.json", changed, env())
		if bySchema != nil && byReader == nil {
			t.Fatalf("the schema refuses what the reader takes: %v\n%s", bySchema, changed)
		}
		if structural && bySchema == nil && byReader != nil {
			t.Fatalf("the reader refuses what the schema takes: %v\n%s", byReader, changed)
		}
		if bySchema != nil {
			refused++
		}
	})
	if refused < 20 {
		t.Errorf("only %d changes were refused: the test tests too little", refused)
	}
}

// change changes one thing somewhere in a value.
func change(t *rapid.T, v any, structural *bool) any {
	switch v := v.(type) {
	case map[string]any:
		keys := slices.Sorted(maps.Keys(v))
		if len(keys) == 0 || rapid.IntRange(0, 5).Draw(t, "here") == 0 {
			*structural = true
			v[rapid.SampledFrom([]string{"nonsense", "Domain", "limit"}).Draw(t, "field")] = 1
			return v
		}
		k := rapid.SampledFrom(keys).Draw(t, "key")
		v[k] = change(t, v[k], structural)
		return v
	case []any:
		if len(v) > 0 && rapid.IntRange(0, 3).Draw(t, "into") > 0 {
			i := rapid.IntRange(0, len(v)-1).Draw(t, "index")
			v[i] = change(t, v[i], structural)
			return v
		}
		*structural = true
		return map[string]any{"a": 1}
	}
	if rapid.Bool().Draw(t, "mapping") {
		*structural = true
		return map[string]any{"a": 1}
	}
	return rapid.SampledFrom([]any{"", "x", "10/s", "10s", 5, -1, 1.5, true, "GET", "/a", "${", 600}).Draw(t, "scalar")
}

// TestSchemaFields checks that the schema has the reader's fields and defaults.
func TestSchemaFields(t *testing.T) {
	var doc struct {
		Properties map[string]any
		Defs       map[string]any `json:"$defs"`
	}
	if err := json.Unmarshal(Schema, &doc); err != nil {
		t.Fatal(err)
	}
	at := func(path ...string) map[string]any {
		m := map[string]any{"properties": doc.Properties, "$defs": doc.Defs}
		for _, p := range path {
			next, ok := m[p].(map[string]any)
			if !ok {
				t.Fatalf("the schema has no %v", path)
			}
			m = next
		}
		return m
	}
	for field, path := range map[string][]string{
		"":            {"properties"},
		"listen":      {"properties", "listen", "properties"},
		"store":       {"properties", "store", "properties"},
		"store.redis": {"properties", "store", "properties", "redis", "properties"},
		"store.redis.sentinel": {"properties", "store", "properties", "redis", "properties", "sentinel",
			"properties"},
		"client_ip":              {"properties", "client_ip", "properties"},
		"plans.p":                {"properties", "plans", "additionalProperties", "properties"},
		"exempt[0]":              {"properties", "exempt", "items", "properties"},
		"limits[0]":              {"properties", "limits", "items", "properties"},
		"limits[0].match":        {"$defs", "match", "properties"},
		"limits[1].overrides[0]": {"properties", "limits", "items", "properties", "overrides", "items", "properties"},
	} {
		const text = `{"?": 1, plans: {p: {"?": 1}}, listen: {"?": 1}, client_ip: {"?": 1}, exempt: [{"?": 1}],
  store: {"?": 1, redis: {"?": 1, sentinel: {"?": 1}}},
  limits: [{"?": 1, match: {"?": 1}}, {name: a, rate: 1/s, key: request.method, overrides: [{"?": 1}]}]}`
		_, err := Parse("f", []byte(text), env())
		want := ""
		for _, m := range mistakes(t, err) {
			if m.Field == join(field, "?") {
				want = m.Message
			}
		}
		got := "unknown field; want one of " + strings.Join(slices.Sorted(maps.Keys(at(path...))), ", ")
		if got != want {
			t.Errorf("%s: the schema's\n%s\nthe reader's\n%s", field, got, want)
		}
	}
	c := parse(t, "{store: {redis: {url: 'redis://h'}}, limits: [{name: a, rate: 9/s, key: request.method}]}")
	for path, want := range map[string]any{
		"domain": c.Domain, "listen.grpc": c.Listen.GRPC, "listen.admin": c.Listen.Admin,
		"listen.metrics":      c.Listen.Metrics,
		"store.redis.timeout": c.Redis.Timeout.String(), "store.redis.key_prefix": c.inherited.keyPrefix,
		"mode":       c.inherited.mode,
		"on_failure": c.inherited.onFailure, "failure_status": float64(c.FailureStatus), "grace": c.Grace.String(),
		"log_level": c.LogLevel,
		"headers":   []any{"x-ratelimit", "retry-after"},
	} {
		names := append([]string{"properties"}, strings.Split(strings.ReplaceAll(path, ".", ".properties."), ".")...)
		if got := at(names...)["default"]; fmt.Sprint(got) != fmt.Sprint(want) {
			t.Errorf("%s: the schema's default is %v, the program's %v", path, got, want)
		}
	}
	if n := len(regexp.MustCompile(`"description": "`).FindAllIndex(Schema, -1)); n < 50 {
		t.Errorf("only %d descriptions", n)
	}
}
