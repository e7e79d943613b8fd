package k8s

import (
	"bytes"
	"encoding/json"
	"fmt"
	"regexp"

	"go.yaml.in/yaml/v3"
)

// readJSON reads JSON as the node that YAML would have for it, whose fields keep their order.
func readJSON(text []byte) (*yaml.Node, error) {
	d := json.NewDecoder(bytes.NewReader(text))
	d.UseNumber()
	return readNode(d)
}

func readNode(d *json.Decoder) (*yaml.Node, error) {
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
			element, err := readNode(d)
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
		return &yaml.Node{Kind: yaml.ScalarNode, Tag: "!!float", Value: token.String()}, nil
	default:
		var node yaml.Node
		err := node.Encode(token)
		return &node, err
	}
}

// indentation is what JSON that has lines begins its second one with.
var indentation = regexp.MustCompile(`^\s*\{\r?\n([ \t]+)`)

// writeJSON writes a node that says no more than JSON can, in lines as like has them.
func writeJSON(node *yaml.Node, like []byte) ([]byte, error) {
	var compact, out bytes.Buffer
	if err := writeNode(&compact, node); err != nil {
		return nil, err
	}
	if m := indentation.FindSubmatch(like); m != nil {
		if err := json.Indent(&out, compact.Bytes(), "", string(m[1])); err != nil {
			return nil, err
		}
	} else {
		out = compact
	}
	if bytes.HasSuffix(like, []byte("\n")) {
		out.WriteByte('\n')
	}
	return out.Bytes(), nil
}

func writeNode(b *bytes.Buffer, node *yaml.Node) error {
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
		if err := writeNode(b, element); err != nil {
			return err
		}
	}
	b.WriteByte(ends[1])
	return nil
}
