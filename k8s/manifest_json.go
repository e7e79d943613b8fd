package k8s

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"
)

// byteOrderMark may precede JSON text in a file.
var byteOrderMark = []byte("\ufeff")

// splitJSON cuts a stream of JSON objects into the objects, each with the white
// space before it, and the last one also with the white space after it. It
// returns false if text is not such a stream.
func splitJSON(text []byte) ([][]byte, bool) {
	body := bytes.TrimPrefix(text, byteOrderMark)
	d := json.NewDecoder(bytes.NewReader(body))
	var ends []int64
	for {
		var raw json.RawMessage
		err := d.Decode(&raw)
		if errors.Is(err, io.EOF) {
			break
		} else if err != nil || raw[0] != '{' {
			return nil, false
		}
		ends = append(ends, d.InputOffset()+int64(len(text)-len(body)))
	}
	if len(ends) == 0 {
		return nil, false
	}
	ends[len(ends)-1] = int64(len(text))
	var objects [][]byte
	start := int64(0)
	for _, end := range ends {
		objects = append(objects, text[start:end])
		start = end
	}
	return objects, true
}

// injectJSON returns a JSON object, with the white space around it, after
// injection.
func injectJSON(text []byte, m *injector) ([]byte, error) {
	body := bytes.TrimSpace(bytes.TrimPrefix(text, byteOrderMark))
	node, err := parseJSON(body)
	if err != nil {
		return nil, unreadableError{err}
	}
	root, err := decodeJSON(body)
	if err != nil {
		return nil, unreadableError{err}
	}
	changed := m.inject(root)
	if reflect.DeepEqual(root, changed) {
		return text, nil
	}
	if err := mergeNode(node, root, changed); err != nil {
		return nil, err
	}
	written, err := writeJSON(node, body)
	if err != nil {
		return nil, err
	}
	if got, err := decodeJSON(written); err != nil || !equalJSON(got, changed) {
		return nil, errors.New("the sidecar cannot be added without changing other content; simplify the JSON")
	}
	if bytes.Contains(body, []byte("\r\n")) {
		written = bytes.ReplaceAll(written, []byte("\n"), []byte("\r\n"))
	}
	before, after, _ := bytes.Cut(text, body)
	return slices.Concat(before, written, after), nil
}

// decodeJSON decodes JSON and keeps numbers as they are written.
func decodeJSON(text []byte) (any, error) {
	d := json.NewDecoder(bytes.NewReader(text))
	d.UseNumber()
	var v any
	err := d.Decode(&v)
	return v, err
}

// parseJSON parses JSON into a YAML node, which keeps the order of fields.
func parseJSON(text []byte) (*yaml.Node, error) {
	d := json.NewDecoder(bytes.NewReader(text))
	d.UseNumber()
	return parseJSONNode(d)
}

// parseJSONNode parses the next value of d.
func parseJSONNode(d *json.Decoder) (*yaml.Node, error) {
	token, err := d.Token()
	if err != nil {
		return nil, err
	}
	switch token := token.(type) {
	case json.Delim:
		node := &yaml.Node{Kind: yaml.SequenceNode, Tag: "!!seq"}
		if token == '{' {
			node.Kind, node.Tag = yaml.MappingNode, "!!map"
		}
		fields := map[string]bool{}
		for d.More() { // in an object the decoder and YAML have keys and values by turns
			element, err := parseJSONNode(d)
			if err != nil {
				return nil, err
			}
			if node.Kind == yaml.MappingNode && len(node.Content)%2 == 0 {
				if fields[element.Value] {
					return nil, fmt.Errorf("duplicate field %q in an object", element.Value)
				}
				fields[element.Value] = true
			}
			node.Content = append(node.Content, element)
		}
		_, err := d.Token() // the closing delimiter
		return node, err
	case json.Number:
		node := &yaml.Node{Kind: yaml.ScalarNode, Value: token.String()}
		if node.ShortTag() == "!!str" { // yaml.v3 takes a number that is too large for a string
			node.Tag = "!!float"
		}
		return node, nil
	case string:
		if isSimple(token) {
			return &yaml.Node{Kind: yaml.ScalarNode, Tag: "!!str", Value: token}, nil
		}
		var node yaml.Node
		err := node.Encode(token)       // quotes what YAML 1.1 or 1.2 would not read as a string
		if node.ShortTag() != "!!str" { // except <<, the merge key
			node.Tag, node.Style = "!!str", yaml.DoubleQuotedStyle
		}
		return &node, err
	case bool:
		return &yaml.Node{Kind: yaml.ScalarNode, Value: strconv.FormatBool(token)}, nil
	default:
		return &yaml.Node{Kind: yaml.ScalarNode, Value: "null"}, nil
	}
}

// isSimple reports whether a string needs no other style than that which the
// encoder gives a node of type !!str: a line of ASCII that begins with a letter, / or
// $, and is none of YAML 1.1's names of booleans, such as on.
func isSimple(s string) bool {
	if s == "" || len(s) <= len("off") && strings.ContainsRune("yYnNoO", rune(s[0])) {
		return false
	}
	for i := range len(s) {
		if c := s[i]; c < ' ' || c > '~' {
			return false
		}
	}
	return 'A' <= s[0] && s[0] <= 'Z' || 'a' <= s[0] && s[0] <= 'z' || s[0] == '/' || s[0] == '$'
}

// indentPattern matches the start of an object whose fields are on lines of
// their own, and captures the indentation.
var indentPattern = regexp.MustCompile(`^\s*\{\r?\n([ \t]+)`)

// writeJSON encodes a node, which must consist of what JSON has, indented like
// the original text.
func writeJSON(node *yaml.Node, original []byte) ([]byte, error) {
	var compact, out bytes.Buffer
	if err := writeJSONNode(&compact, node); err != nil {
		return nil, err
	}
	if m := indentPattern.FindSubmatch(original); m != nil {
		if err := json.Indent(&out, compact.Bytes(), "", string(m[1])); err != nil {
			return nil, err
		}
	} else {
		out = compact
	}
	return out.Bytes(), nil
}

// writeJSONNode appends the JSON encoding of a node, without white space.
func writeJSONNode(b *bytes.Buffer, node *yaml.Node) error {
	delimiters, separators := "[]", ",,"
	switch {
	case node.Kind == yaml.ScalarNode && node.ShortTag() != "!!str":
		b.WriteString(node.Value)
		return nil
	case node.Kind == yaml.ScalarNode:
		e := json.NewEncoder(b)
		e.SetEscapeHTML(false)
		err := e.Encode(node.Value)
		b.Truncate(b.Len() - 1) // the newline that Encode adds
		return err
	case node.Kind == yaml.MappingNode:
		delimiters, separators = "{}", ",:"
	}
	b.WriteByte(delimiters[0])
	for i, element := range node.Content {
		if i > 0 {
			b.WriteByte(separators[i%2])
		}
		if err := writeJSONNode(b, element); err != nil {
			return err
		}
	}
	b.WriteByte(delimiters[1])
	return nil
}
