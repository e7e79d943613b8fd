package k8s

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

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
func injectJSON(text []byte, m *injector) (written []byte, err error) {
	body := bytes.TrimSpace(bytes.TrimPrefix(text, byteOrderMark))
	before, after, _ := bytes.Cut(text, body)
	if l, ok := splitJSONList(body); ok {
		written, _, err = l.inject(m)
	} else {
		written, err = rewriteJSON(body, m.inject)
	}
	if err != nil {
		return nil, err
	}
	return slices.Concat(before, written, after), nil
}

// rewriteJSON returns a JSON value after inject, which returns the decoded value
// with the sidecar, or its argument if nothing changes. Then rewriteJSON returns
// text itself.
func rewriteJSON(text []byte, inject func(any) any) ([]byte, error) {
	node, err := parseJSON(text)
	if err != nil {
		return nil, unreadableError{err}
	}
	old, err := decodeJSON(text)
	if err != nil {
		return nil, unreadableError{err}
	}
	changed := inject(old)
	if reflect.DeepEqual(old, changed) {
		return text, nil
	}
	p := newInsertion(text, 1)
	p.writeMember = writeJSONMember
	l := p.rootLayout(node)
	p.unit = l.unit
	written, ok := p.insert(node, old, changed)
	if ok && isJSON(written, changed) {
		return written, nil
	}
	if err := mergeNode(node, old, changed); err != nil {
		return nil, err
	}
	var b bytes.Buffer
	if err := writeJSON(&b, node, l); err != nil {
		return nil, err
	}
	if !isJSON(b.Bytes(), changed) {
		return nil, errors.New("the sidecar cannot be added without changing other content; simplify the JSON")
	}
	return b.Bytes(), nil
}

// isJSON reports whether the value of JSON text is want.
func isJSON(text []byte, want any) bool {
	got, err := decodeJSON(text)
	return err == nil && equalJSON(got, want)
}

// splitJSONList cuts a List in JSON around its items. It returns false if an
// object is not a List, has no items or has a field twice.
func splitJSONList(text []byte) (manifestList, bool) {
	var l manifestList
	d := json.NewDecoder(bytes.NewReader(text))
	var raw json.RawMessage // shares its memory
	value := func() (start, end int) {
		if err := d.Decode(&raw); err != nil {
			return 0, 0
		}
		end = int(d.InputOffset())
		return end - len(raw), end
	}
	if brace, err := d.Token(); err != nil || brace != json.Delim('{') {
		return l, false
	}
	isList := false
	at := 0 // the end of the item before
	var names []string
	for d.More() {
		token, err := d.Token()
		name, ok := token.(string)
		if err != nil || !ok || slices.Contains(names, name) {
			return l, false
		}
		names = append(names, name)
		if name != "items" {
			start, end := value()
			field := text[start:end]
			if _, err := parseJSON(field); err != nil {
				return l, false
			}
			switch name {
			case "kind":
				l.kind, isList = strings.CutSuffix(jsonText(field), "List")
			case "apiVersion":
				l.apiVersion = jsonText(field)
			}
			continue
		}
		if bracket, err := d.Token(); err != nil || bracket != json.Delim('[') {
			return l, false
		}
		for d.More() {
			start, end := value()
			if n := len(l.items); n > 0 {
				l.items[n-1].after = text[at:start]
			} else {
				l.before = text[:start]
			}
			item := text[start:end]
			l.items = append(l.items, listItem{rewrite: func(inject func(any) any) ([]byte, bool, error) {
				written, err := rewriteJSON(item, inject)
				return written, true, err
			}})
			at = end
		}
		if _, err := d.Token(); err != nil {
			return l, false
		}
	}
	if !isList || len(l.items) == 0 {
		return l, false
	}
	l.items[len(l.items)-1].after = text[at:]
	return l, true
}

// jsonText returns the value of a JSON string, or an empty string for another
// value.
func jsonText(text []byte) string {
	v, _ := decodeJSON(text)
	s, _ := v.(string)
	return s
}

// decodeJSON decodes JSON and keeps numbers as they are written.
func decodeJSON(text []byte) (any, error) {
	d := json.NewDecoder(bytes.NewReader(text))
	d.UseNumber()
	var v any
	err := d.Decode(&v)
	return v, err
}

// parseJSON parses JSON into a YAML node in flow style, which keeps the order of
// fields and has the lines and columns.
func parseJSON(text []byte) (*yaml.Node, error) {
	p := jsonParser{d: json.NewDecoder(bytes.NewReader(text)), text: text, line: 1, column: 1}
	p.d.UseNumber()
	return p.parse()
}

// jsonParser parses JSON text with d. line and column are those of at, which is
// the end of the token before.
type jsonParser struct {
	d                *json.Decoder
	text             []byte
	at, line, column int
}

// parse parses the next value.
func (p *jsonParser) parse() (*yaml.Node, error) {
	token, line, column, err := p.next()
	if err != nil {
		return nil, err
	}
	node := &yaml.Node{Kind: yaml.ScalarNode}
	switch token := token.(type) {
	case json.Delim:
		node.Kind, node.Tag, node.Style = yaml.SequenceNode, "!!seq", yaml.FlowStyle
		if token == '{' {
			node.Kind, node.Tag = yaml.MappingNode, "!!map"
		}
		fields := map[string]bool{}
		for p.d.More() { // in an object the decoder and YAML have keys and values by turns
			element, err := p.parse()
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
		_, _, _, err = p.next() // the closing delimiter
	case json.Number:
		node = literalNode(token.String())
	case string:
		node, err = stringNode(token)
	case bool:
		node = literalNode(strconv.FormatBool(token))
	default:
		node = literalNode("null")
	}
	if err != nil {
		return nil, err
	}
	node.Line, node.Column = line, column
	return node, nil
}

// next returns the next token and where it begins.
func (p *jsonParser) next() (token json.Token, line, column int, err error) {
	if token, err = p.d.Token(); err != nil {
		return nil, 0, 0, err
	}
	for bytes.IndexByte([]byte(" \t\r\n,:"), p.text[p.at]) >= 0 {
		p.column++
		if p.text[p.at] == '\n' {
			p.line, p.column = p.line+1, 1
		}
		p.at++
	}
	line, column = p.line, p.column
	end := int(p.d.InputOffset())
	p.column += utf8.RuneCount(p.text[p.at:end])
	p.at = end
	return token, line, column, nil
}

// literalNode returns a node whose value is a number, a boolean or null, which text
// is in JSON.
func literalNode(text string) *yaml.Node {
	node := &yaml.Node{Kind: yaml.ScalarNode, Value: text}
	if node.ShortTag() == "!!str" { // yaml.v3 takes a number that is too large for a string
		node.Tag = "!!float"
	}
	return node
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
// encoder gives a node of type !!str: a line of ASCII that may be none of YAML 1.1's
// names of booleans, such as on, none of its numbers of base 60, such as 1:30, and
// neither << nor =.
func isSimple(s string) bool {
	if s == "" {
		return false
	}
	begins := func(with string) bool { return strings.IndexByte(with, s[0]) >= 0 }
	if begins("yYnNoO") && len(s) <= len("off") || begins("+-0123456789") && strings.Contains(s, ":") || begins("<= ") {
		return false
	}
	for i := range len(s) {
		if c := s[i]; c < ' ' || c > '~' {
			return false
		}
	}
	return true
}

// writeJSON appends the JSON encoding of a node, which must consist of what JSON
// has.
func writeJSON(b *bytes.Buffer, node *yaml.Node, l flowLayout) error {
	delimiters, step := "[]", 1
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
		delimiters, step = "{}", 2
	}
	inner := l
	inner.indent += l.unit
	b.WriteByte(delimiters[0])
	for i := 0; i < len(node.Content); i += step {
		if i > 0 {
			b.WriteString(inner.separator())
		} else if l.newline != "" {
			b.WriteString(l.newline + inner.indent)
		}
		var key *yaml.Node
		if step == 2 {
			key = node.Content[i]
		}
		if err := writeJSONMember(b, key, node.Content[i+step-1], inner); err != nil {
			return err
		}
	}
	if l.newline != "" && len(node.Content) > 0 {
		b.WriteString(l.newline + l.indent)
	}
	b.WriteByte(delimiters[1])
	return nil
}

// writeJSONMember writes a member in JSON.
func writeJSONMember(b *bytes.Buffer, key, value *yaml.Node, l flowLayout) error {
	if key != nil {
		if err := writeJSON(b, key, l); err != nil {
			return err
		}
		b.WriteString(l.colon)
	}
	return writeJSON(b, value, l)
}
