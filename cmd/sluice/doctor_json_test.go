package main

import (
	"encoding/json"
	"regexp"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"
)

// inJSON returns a config in JSON, with field names in lowerCamelCase.
func inJSON(t *testing.T, text string) string {
	t.Helper()
	var value any
	if err := yaml.Unmarshal([]byte(text), &value); err != nil {
		t.Fatal(err)
	}
	field := regexp.MustCompile(`^[a-z0-9]+(_[a-z0-9]+)+$`)
	var rename func(any) any
	rename = func(v any) any {
		switch v := v.(type) {
		case map[string]any:
			renamed := map[string]any{}
			for name, value := range v {
				if field.MatchString(name) {
					words := strings.Split(name, "_")
					for i := 1; i < len(words); i++ {
						words[i] = strings.ToUpper(words[i][:1]) + words[i][1:]
					}
					name = strings.Join(words, "")
				}
				renamed[name] = rename(value)
			}
			return renamed
		case []any:
			for i := range v {
				v[i] = rename(v[i])
			}
		}
		return v
	}
	encoded, err := json.MarshalIndent(rename(value), "", " ")
	if err != nil {
		t.Fatal(err)
	}
	return string(encoded)
}
