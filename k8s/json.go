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

	"go.yaml.in/yaml/v3"
)

var byteOrderMark = []byte("\ufeff")

// jsonObjects are the objects that JSON text holds, one after the other, each with the space before it and the last with what is after it;
// false where it is none.
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

// injectJSON returns what becomes of one of the objects, with the space around it.
func injectJSON(text []byte, inject func(any) any) ([]byte, error) {
	body := bytes.TrimSpace(bytes.TrimPrefix(text, byteOrderMark))
	node, err := parseJSON(body)
	if err != nil {
		return nil, err
	}
	root, err := decodeJSON(body)
	if err != nil {
		return nil, err
	}
	changed := inject(root)
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
	if back, err := decodeJSON(written); err != nil || !equalJSON(back, changed) { // as writeYAML does
		return nil, errors.New("it cannot be written with the sidecar without changing something else")
	}
	if bytes.Contains(body, []byte("\r\n")) {
		written = bytes.ReplaceAll(written, []byte("\n"), []byte("\r\n"))
	}
	before, after, _ := bytes.Cut(text, body)
	return slices.Concat(before, written, after), nil
}

// numbered is what JSON says, with its numbers as they are written.
func decodeJSON(text []byte) (any, error) {
	d := json.NewDecoder(bytes.NewReader(text))
	d.UseNumber()
	var v any
	err := d.Decode(&v)
	return v, err
}

// readJSON reads JSON as the node that YAML would have for it, whose fields keep their order.
func parseJSON(text []byte) (*yaml.Node, error) {
	d := json.NewDecoder(bytes.NewReader(text))
	d.UseNumber()
	return parseJSONNode(d)
}

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
		for d.More() { // an object's are keys and values in turn, as YAML's are
			element, err := parseJSONNode(d)
			if err != nil {
				return nil, err
			}
			if node.Kind == yaml.MappingNode && len(node.Content)%2 == 0 {
				if fields[element.Value] {
					return nil, fmt.Errorf("field %q stands twice in one object", element.Value)
				}
				fields[element.Value] = true
			}
			node.Content = append(node.Content, element)
		}
		_, err := d.Token() // its end
		return node, err
	case json.Number:
		node := &yaml.Node{Kind: yaml.ScalarNode, Value: token.String()}
		if node.ShortTag() == "!!str" { // too large for YAML's
			node.Tag = "!!float"
		}
		return node, nil
	case string:
		var node yaml.Node // with quotes where YAML, also of version 1.1, would read something else
		err := node.Encode(token)
		if node.ShortTag() != "!!str" { // as it has it of <<
			node.Tag, node.Style = "!!str", yaml.DoubleQuotedStyle
		}
		return &node, err
	case bool:
		return &yaml.Node{Kind: yaml.ScalarNode, Value: strconv.FormatBool(token)}, nil
	default:
		return &yaml.Node{Kind: yaml.ScalarNode, Value: "null"}, nil
	}
}

// indentation is what JSON that has lines begins its second one with.
var indentPattern = regexp.MustCompile(`^\s*\{\r?\n([ \t]+)`)

// writeJSON writes a node that says no more than JSON can, in lines as like has them.
func writeJSON(node *yaml.Node, like []byte) ([]byte, error) {
	var compact, out bytes.Buffer
	if err := writeJSONNode(&compact, node); err != nil {
		return nil, err
	}
	if m := indentPattern.FindSubmatch(like); m != nil {
		if err := json.Indent(&out, compact.Bytes(), "", string(m[1])); err != nil {
			return nil, err
		}
	} else {
		out = compact
	}
	return out.Bytes(), nil
}

func writeJSONNode(b *bytes.Buffer, node *yaml.Node) error {
	ends, separators := "[]", ",,"
	switch {
	case node.Kind == yaml.ScalarNode && node.ShortTag() != "!!str":
		b.WriteString(node.Value)
		return nil
	case node.Kind == yaml.ScalarNode:
		e := json.NewEncoder(b)
		e.SetEscapeHTML(false)
		err := e.Encode(node.Value)
		b.Truncate(b.Len() - 1) // its line end
		return err
	case node.Kind == yaml.MappingNode:
		ends, separators = "{}", ",:"
	}
	b.WriteByte(ends[0])
	for i, element := range node.Content {
		if i > 0 {
			b.WriteByte(separators[i%2])
		}
		if err := writeJSONNode(b, element); err != nil {
			return err
		}
	}
	b.WriteByte(ends[1])
	return nil
}
