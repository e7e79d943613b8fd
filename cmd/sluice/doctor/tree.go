package doctor

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"
)

// node is a value in a config of Envoy's, in the JSON form of protobuf. The zero
// node is an absent value. Fields are found by path, and not decoded into Envoy's
// messages: a config has messages of many extensions, which this program does
// not contain.
type node struct{ value any }

// at returns the value of a field of a field. Names are those of the proto
// files; the config may also have them in lowerCamelCase.
func (n node) at(path ...string) node {
	for _, name := range path {
		fields, _ := n.value.(map[string]any)
		value, ok := fields[name]
		if !ok {
			value = fields[camelCase(name)]
		}
		n = node{value}
	}
	return n
}

// camelCase returns the JSON name of a field.
func camelCase(name string) string {
	var b strings.Builder
	for i, word := range strings.Split(name, "_") {
		if i > 0 && word != "" {
			word = strings.ToUpper(word[:1]) + word[1:]
		}
		b.WriteString(word)
	}
	return b.String()
}

func (n node) exists() bool { return n.value != nil }

// list returns the elements of a list; nil if the value is none.
func (n node) list() []node {
	values, _ := n.value.([]any)
	all := make([]node, len(values))
	for i, v := range values {
		all[i] = node{v}
	}
	return all
}

// fields returns the entries of a map; nil if the value is none.
func (n node) fields() map[string]any {
	fields, _ := n.value.(map[string]any)
	return fields
}

// text returns a string, or "".
func (n node) text() string {
	s, _ := n.value.(string)
	return s
}

// isTrue reports whether the value is true, also as Envoy reads it from YAML.
func (n node) isTrue() bool {
	return n.value == true || slices.Contains([]string{"true", "yes", "on", "y"}, strings.ToLower(n.text()))
}

// isFalse reports whether the value is given and false.
func (n node) isFalse() bool {
	return n.value == false || slices.Contains([]string{"false", "no", "off", "n"}, strings.ToLower(n.text()))
}

// number returns a number, or otherwise if the value is none. 64-bit numbers are
// strings in JSON.
func (n node) number(otherwise float64) float64 {
	switch v := n.value.(type) {
	case float64:
		return v
	case string:
		if f, err := strconv.ParseFloat(v, 64); err == nil {
			return f
		}
	}
	return otherwise
}

// duration returns a duration such as "0.2s", or otherwise if the value is none.
func (n node) duration(otherwise time.Duration) time.Duration {
	if d, err := time.ParseDuration(n.text()); err == nil {
		return d
	}
	return otherwise
}

// typed returns the name of the message in an Any, and its fields. A message
// that a control plane has not linked comes in a TypedStruct.
func (n node) typed() (name string, message node) {
	name, message = typeName(n.at("@type").text()), n
	if name == "udpa.type.v1.TypedStruct" || name == "xds.type.v3.TypedStruct" {
		return typeName(n.at("type_url").text()), n.at("value")
	}
	return name, message
}

func typeName(url string) string { return url[strings.LastIndexByte(url, '/')+1:] }

// matches reports whether a StringMatcher matches s. An expression that cannot
// be read matches.
func (n node) matches(s string) bool {
	fold := func(s string) string { return s }
	if n.at("ignore_case").isTrue() {
		fold = strings.ToLower
	}
	s = fold(s)
	for kind, holds := range map[string]func(string, string) bool{
		"exact": func(s, v string) bool { return s == v }, "prefix": strings.HasPrefix, "suffix": strings.HasSuffix,
		"contains": strings.Contains,
	} {
		if v := n.at(kind); v.exists() {
			return holds(s, fold(v.text()))
		}
	}
	if text := n.at("safe_regex", "regex"); text.exists() {
		r, err := regexp.Compile("^(?:" + text.text() + ")$")
		return err != nil || r.MatchString(s)
	}
	return false
}

// decode decodes a JSON value.
func decode(text []byte) (node, error) {
	var n node
	err := json.Unmarshal(text, &n.value)
	return n, err
}

// asJSON returns a config as JSON. What is not JSON is taken for YAML.
func asJSON(text []byte) ([]byte, error) {
	text = bytes.TrimPrefix(text, []byte("\xef\xbb\xbf"))
	if json.Valid(text) {
		return text, nil
	}
	var value any
	if err := yaml.Unmarshal(text, &value); err != nil {
		return nil, errors.New(strings.Join(strings.Fields(err.Error()), " "))
	}
	if _, ok := value.(map[string]any); !ok {
		return nil, errors.New("want a mapping, such as a bootstrap's")
	}
	encoded, err := json.Marshal(value)
	if err != nil {
		return nil, fmt.Errorf("want what JSON can hold: %w", err)
	}
	return encoded, nil
}
