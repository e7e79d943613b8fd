package k8s

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"reflect"
	"regexp"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"
)

// directivesPattern matches the directives that may precede a document's ---
// line, such as %YAML 1.2, and the comments and blank lines around them.
var directivesPattern = regexp.MustCompile(`^([ \t]*(#[^\n]*)?\r?\n)*%[^\n]*\n((%[^\n]*|[ \t]*(#[^\n]*)?)\r?\n)*`)

// splitDocuments cuts a YAML stream into its documents, each with the
// directives and the --- line before it.
func splitDocuments(in []byte) [][]byte {
	var documents [][]byte
	start := 0
	for at := 0; at < len(in); {
		end := len(in)
		if i := bytes.IndexByte(in[at:], '\n'); i >= 0 {
			end = at + i + 1
		}
		line := strings.TrimRight(string(in[at:end]), "\r\n")
		begins := line == "---" || strings.HasPrefix(line, "--- ") || strings.HasPrefix(line, "---\t")
		if at > start && begins && len(directivesPattern.Find(in[start:at])) < at-start {
			documents = append(documents, in[start:at])
			start = at
		}
		at = end
	}
	return append(documents, in[start:])
}

// unreadableError is the error for a document that cannot be read.
type unreadableError struct{ error }

// injectYAML returns a YAML document after injection.
func injectYAML(document []byte, m *injector) ([]byte, error) {
	directives := directivesPattern.Find(document)
	body := document[len(directives):]
	node, err := parseYAML(body)
	if err != nil || node == nil {
		return document, err
	}
	if list, ok := splitYAMLList(node, body); ok {
		if written, ok, err := list.inject(m); ok || err != nil {
			return slices.Concat(directives, written), err
		}
		if node, err = parseYAML(body); err != nil { // again, as the List's nodes are gone
			return nil, err
		}
	}
	written, err := rewriteYAML(node, body, m.inject)
	return slices.Concat(directives, written), err
}

// parseYAML returns the root of a document, or nil if it is empty. Its errors
// are of type unreadableError.
func parseYAML(text []byte) (*yaml.Node, error) {
	d := yaml.NewDecoder(bytes.NewReader(text))
	var node yaml.Node
	if err := d.Decode(&node); errors.Is(err, io.EOF) {
		return nil, nil
	} else if err != nil {
		return nil, unreadableError{err}
	}
	if !errors.Is(d.Decode(new(yaml.Node)), io.EOF) {
		return nil, unreadableError{errors.New("contains a second document, for example after a line ...; " +
			"begin each document with a line ---")}
	}
	if err := checkKeys(&node); err != nil {
		return nil, unreadableError{err}
	}
	return &node, nil
}

// rewriteYAML returns text, which node is the root of, after inject, which
// returns a decoded document with the sidecar, or its argument if nothing
// changes. Then rewriteYAML returns text itself.
func rewriteYAML(node *yaml.Node, text []byte, inject func(any) any) ([]byte, error) {
	var root any
	if err := node.Decode(&root); err != nil {
		return nil, unreadableError{err}
	}
	root = stringifyKeys(root)
	changed := inject(root)
	if reflect.DeepEqual(root, changed) {
		return text, nil
	}
	written, ok := insertYAML(node, text, 1, root, changed, !indentsSequences(node))
	if ok && decodesTo(written, changed) {
		return written, nil
	}
	return replaceYAML(node, text, root, changed)
}

// replaceYAML encodes node, which is the root of text and has the value old,
// with the value changed.
func replaceYAML(node *yaml.Node, text []byte, old, changed any) ([]byte, error) {
	compact := !indentsSequences(node)
	if err := mergeNode(node, old, changed); err != nil {
		return nil, err
	}
	written, err := writeYAML(node, changed, compact, text)
	if err != nil {
		return nil, err
	}
	if bytes.HasPrefix(text, []byte("---")) {
		written = append([]byte("---\n"), written...)
	}
	if bytes.Contains(text, []byte("\r\n")) {
		written = bytes.ReplaceAll(written, []byte("\n"), []byte("\r\n"))
	}
	return written, nil
}

// checkKeys returns an error for the first duplicate key in a mapping. yaml.v3
// would report each pair of equal keys, using memory quadratic in their number.
func checkKeys(node *yaml.Node) (err error) {
	walkNodes(node, func(n *yaml.Node) {
		if n.Kind != yaml.MappingNode || err != nil {
			return
		}
		type key struct {
			kind  yaml.Kind
			value string
		}
		first := make(map[key]int, len(n.Content)/2)
		for i := 0; i+1 < len(n.Content); i += 2 {
			k := n.Content[i]
			if line, duplicate := first[key{k.Kind, k.Value}]; duplicate {
				err = fmt.Errorf("line %d: mapping key %s already defined at line %d", k.Line, quote(k.Value), line)
				return
			}
			first[key{k.Kind, k.Value}] = k.Line
		}
	})
	return err
}

// writeYAML encodes a node with the spacing of the original text. compact says
// that sequences are not indented below their key. The output is decoded again
// and compared with want, since yaml.v3's encoder makes mistakes.
func writeYAML(node *yaml.Node, want any, compact bool, original []byte) ([]byte, error) {
	// The encoder breaks some folded scalars, and values in flow style that are
	// left out. If it does, the second attempt writes literals and null.
	keepStyle := func(*yaml.Node) {}
	simplify := func(n *yaml.Node) {
		if n.Style&yaml.FoldedStyle != 0 {
			n.Style = n.Style&^yaml.FoldedStyle | yaml.LiteralStyle
		}
		if n.Kind == yaml.ScalarNode && n.Value == "" && n.ShortTag() == "!!null" {
			n.Value = "null"
		}
	}
	for _, restyle := range []func(*yaml.Node){keepStyle, simplify} {
		walkNodes(node, func(n *yaml.Node) {
			if n.Tag == "!!merge" { // the encoder would write the tag
				n.Tag = ""
			}
			restyle(n)
		})
		encoded, err := encodeYAML(node, compact)
		if err != nil {
			return nil, err
		}
		if text := restoreSpacing(encoded, original); decodesTo(text, want) {
			return text, nil
		}
		if decodesTo(encoded, want) {
			return encoded, nil
		}
	}
	return nil, errors.New("the sidecar cannot be added without changing other content; " +
		"simplify the YAML of this document")
}

// decodesTo reports whether the value of a YAML document is want.
func decodesTo(text []byte, want any) bool {
	var got any
	return yaml.Unmarshal(text, &got) == nil && equalJSON(stringifyKeys(got), want)
}

// encodeYAML encodes a node. compact is as for writeYAML.
func encodeYAML(node *yaml.Node, compact bool) ([]byte, error) {
	var b bytes.Buffer
	e := yaml.NewEncoder(&b)
	e.SetIndent(2)
	if compact {
		e.CompactSeqIndent()
	}
	err := errors.Join(e.Encode(node), e.Close())
	return b.Bytes(), err
}

// indentsSequences reports whether the first block sequence in a mapping is
// indented further than its key.
func indentsSequences(node *yaml.Node) bool {
	indents, found := false, false
	walkNodes(node, func(n *yaml.Node) {
		for i := 1; n.Kind == yaml.MappingNode && i < len(n.Content) && !found; i += 2 {
			key, v := n.Content[i-1], n.Content[i]
			if v.Kind == yaml.SequenceNode && v.Style&yaml.FlowStyle == 0 && v.Line > key.Line {
				indents, found = v.Column > key.Column, true
			}
		}
	})
	return indents
}

// walkNodes calls f with node and all nodes below it, parents first.
func walkNodes(node *yaml.Node, f func(*yaml.Node)) {
	f(node)
	for _, n := range node.Content {
		walkNodes(n, f)
	}
}

// stringifyKeys returns a decoded YAML value in which the keys of all mappings
// are strings, as in JSON.
func stringifyKeys(v any) any {
	switch v := v.(type) {
	case map[any]any:
		out := object{}
		for k, w := range v {
			out[fmt.Sprint(k)] = stringifyKeys(w)
		}
		return out
	case object:
		for k, w := range v {
			v[k] = stringifyKeys(w)
		}
	case []any:
		for i, w := range v {
			v[i] = stringifyKeys(w)
		}
	}
	return v
}
