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
		var brace firstByte
		err := d.Decode(&brace)
		if errors.Is(err, io.EOF) {
			break
		} else if err != nil || brace != '{' {
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

// firstByte is decoded from the first byte of any JSON value.
type firstByte byte

// UnmarshalJSON implements json.Unmarshaler.
func (b *firstByte) UnmarshalJSON(text []byte) error {
	*b = firstByte(text[0])
	return nil
}

// injectJSON returns a JSON object, with the white space around it, after
// injection.
func injectJSON(text []byte, m *injector) ([]byte, error) {
	body := bytes.TrimSpace(bytes.TrimPrefix(text, byteOrderMark))
	before, after, _ := bytes.Cut(text, body)
	var w jsonWriter
	w.out.Write(before)
	if m := indentPattern.FindSubmatch(body); m != nil {
		w.indent = string(m[1])
	}
	var changed bool
	var err error
	if list, ok := parseJSONList(body); ok {
		changed, err = list.inject(&w, m)
	} else {
		changed, err = w.rewrite(body, 0, m.inject)
	}
	if err != nil {
		return nil, err
	}
	if !changed {
		return text, nil
	}
	written := w.out.Bytes()
	if bytes.Contains(body, []byte("\r\n")) {
		written = slices.Concat(before, bytes.ReplaceAll(written[len(before):], []byte("\n"), []byte("\r\n")))
	}
	return append(written, after...), nil
}

// jsonWriter writes JSON.
type jsonWriter struct {
	out, compact bytes.Buffer
	// indent is what each level is indented by. If it is empty, there is no white
	// space.
	indent string
}

// breakLine begins a line at this level, if there are lines.
func (w *jsonWriter) breakLine(level int) {
	if w.indent != "" {
		w.out.WriteString("\n" + strings.Repeat(w.indent, level))
	}
}

// write writes a node at this level.
func (w *jsonWriter) write(node *yaml.Node, level int) error {
	w.compact.Reset()
	if err := writeJSONNode(&w.compact, node); err != nil {
		return err
	}
	if w.indent == "" {
		w.out.Write(w.compact.Bytes())
		return nil
	}
	return json.Indent(&w.out, w.compact.Bytes(), strings.Repeat(w.indent, level), w.indent)
}

// rewrite writes a JSON value at this level after inject, which returns the
// decoded value with the sidecar, or its argument if nothing changes.
func (w *jsonWriter) rewrite(text []byte, level int, inject func(any) any) (changed bool, err error) {
	node, err := parseJSON(text)
	if err != nil {
		return false, unreadableError{err}
	}
	old, err := decodeJSON(text)
	if err != nil {
		return false, unreadableError{err}
	}
	injected := inject(old)
	if reflect.DeepEqual(old, injected) {
		return false, w.write(node, level)
	}
	if err := mergeNode(node, old, injected); err != nil {
		return false, err
	}
	if err := w.write(node, level); err != nil {
		return false, err
	}
	if got, err := decodeJSON(w.compact.Bytes()); err != nil || !equalJSON(got, injected) {
		return false, errors.New("the sidecar cannot be added without changing other content; simplify the JSON")
	}
	return true, nil
}

// jsonList is a List in JSON. Each item is injected by itself, so that a List of
// thousands takes little memory besides its text.
type jsonList struct {
	kind, apiVersion string // as those of yamlList
	fields           []jsonField
}

// jsonField is a field of a jsonList and the text of its value, or of each
// element if the field is items.
type jsonField struct {
	name   string
	values [][]byte
}

// parseJSONList returns false if a JSON object is not a List, has no items or has
// a field twice.
func parseJSONList(text []byte) (jsonList, bool) {
	var l jsonList
	var isList, hasItems bool
	d := json.NewDecoder(bytes.NewReader(text))
	var raw json.RawMessage // shares its memory
	value := func() []byte {
		if err := d.Decode(&raw); err != nil {
			return nil
		}
		end := int(d.InputOffset())
		return text[end-len(raw) : end]
	}
	if brace, err := d.Token(); err != nil || brace != json.Delim('{') {
		return l, false
	}
	for d.More() {
		token, err := d.Token()
		name, ok := token.(string)
		if err != nil || !ok || slices.ContainsFunc(l.fields, func(f jsonField) bool { return f.name == name }) {
			return l, false
		}
		field := jsonField{name: name}
		if name == "items" {
			if bracket, err := d.Token(); err != nil || bracket != json.Delim('[') {
				return l, false
			}
			for d.More() {
				field.values = append(field.values, value())
			}
			if _, err := d.Token(); err != nil {
				return l, false
			}
			hasItems = len(field.values) > 0
		} else {
			field.values = [][]byte{value()}
		}
		l.fields = append(l.fields, field)
		switch name {
		case "kind":
			l.kind, isList = strings.CutSuffix(jsonText(field.values[0]), "List")
		case "apiVersion":
			l.apiVersion = jsonText(field.values[0])
		}
	}
	return l, isList && hasItems
}

// jsonText returns the value of a JSON string, or an empty string for another
// value.
func jsonText(text []byte) string {
	v, _ := decodeJSON(text)
	s, _ := v.(string)
	return s
}

// inject writes the List after injection of its items. If it fails, m has
// collected nothing.
func (l jsonList) inject(w *jsonWriter, m *injector) (changed bool, err error) {
	keep := func(v any) any { return v }
	own := injector{options: m.options}
	delimiter := byte('{')
	for _, field := range l.fields {
		w.out.WriteByte(delimiter)
		delimiter = ','
		w.breakLine(1)
		if err := w.write(&yaml.Node{Kind: yaml.ScalarNode, Tag: "!!str", Value: field.name}, 1); err != nil {
			return false, err
		}
		w.out.WriteByte(':')
		if w.indent != "" {
			w.out.WriteByte(' ')
		}
		if field.name != "items" {
			if _, err := w.rewrite(field.values[0], 1, keep); err != nil {
				return false, err
			}
			continue
		}
		delimiter := byte('[')
		for i, item := range field.values {
			w.out.WriteByte(delimiter)
			delimiter = ','
			w.breakLine(2)
			injected, err := w.rewrite(item, 2, func(v any) any { return own.injectItem(v, l.kind, l.apiVersion, i) })
			if err != nil {
				return false, err
			}
			changed = changed || injected
		}
		w.breakLine(1)
		w.out.WriteByte(']')
	}
	w.breakLine(0)
	w.out.WriteByte('}')
	m.skipped, m.refused = append(m.skipped, own.skipped...), append(m.refused, own.refused...)
	return changed, nil
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
		return stringNode(token)
	case bool:
		return &yaml.Node{Kind: yaml.ScalarNode, Value: strconv.FormatBool(token)}, nil
	default:
		return &yaml.Node{Kind: yaml.ScalarNode, Value: "null"}, nil
	}
}

// stringNode returns a node whose value is a string.
func stringNode(s string) (*yaml.Node, error) {
	if isSimple(s) {
		return &yaml.Node{Kind: yaml.ScalarNode, Tag: "!!str", Value: s}, nil
	}
	var node yaml.Node
	err := node.Encode(s)           // quotes what YAML 1.1 or 1.2 would not read as a string
	if node.ShortTag() != "!!str" { // except <<, the merge key
		node.Tag, node.Style = "!!str", yaml.DoubleQuotedStyle
	}
	return &node, err
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

// writeJSONNode appends the JSON encoding of a node, which must consist of what
// JSON has, without white space.
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
