package policy

import (
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/parser"
	"github.com/goccy/go-yaml/token"
)

// The bounds of a config file. A thousand limits take some 200 kB.
const (
	maxFile     = 1 << 20 // bytes
	maxDepth    = 64      // of brackets, or of dashes on a line, in each other
	maxFields   = 1000    // of one mapping
	maxValues   = 20_000  // of one list
	maxText     = 8192    // bytes of one text
	maxSecret   = 4096    // bytes of a secret's file
	maxMistakes = 200     // that are told
)

// reader reads a config's YAML strictly, and goes on after a mistake to find them all.
type reader struct {
	file     string
	dir      string                      // that the files it names are relative to
	getenv   func(string) (string, bool) // nil: no variables
	mistakes Mistakes
	// variables are the values of the environment variables that the config
	// takes, by their names.
	variables map[string]string
}

// node is one value of the config, and where it stands.
type node struct {
	ast.Node
	field string // such as limits[2].rate
}

// at notes a mistake at a token.
func (r *reader) at(t *token.Token, field, format string, args ...any) {
	m := Mistake{File: r.file, Field: field, Message: fmt.Sprintf(format, args...)}
	if t != nil && t.Position != nil {
		m.Line, m.Column = t.Position.Line, t.Position.Column
	}
	r.add(m)
}

func (r *reader) add(m Mistake) {
	if len(r.mistakes) < maxMistakes {
		r.mistakes = append(r.mistakes, m)
	}
}

// wrong notes a mistake in a value. Where the value takes environment
// variables, which may be secrets, the message has their names instead: in
// what it quotes, so that no word of its own is cut out.
func (r *reader) wrong(n node, format string, args ...any) {
	r.at(start(n.Node), n.field, "%s", r.hideVariables(n.Node, fmt.Sprintf(format, args...)))
}

// start is a value's first token.
func start(n ast.Node) *token.Token {
	switch n := n.(type) {
	case nil:
		return nil
	case *ast.MappingNode:
		if !n.IsFlowStyle && len(n.Values) > 0 {
			return n.Values[0].Key.GetToken()
		}
	case *ast.MappingValueNode:
		return n.Key.GetToken()
	}
	return n.GetToken()
}

// document parses the one document of a config. Without any it returns nil.
func (r *reader) document(text []byte) *node {
	if len(text) > maxFile {
		r.at(nil, "", "the file exceeds the maximum of %d bytes", maxFile)
		return nil
	}
	if line, column, message := checkBounds(text); message != "" {
		r.mistakes = append(r.mistakes, Mistake{File: r.file, Line: line, Column: column, Message: message})
		return nil
	}
	file, err := parser.ParseBytes(text, 0, parser.AllowDuplicateMapKey())
	if err != nil {
		var syntax yaml.Error
		if errors.As(err, &syntax) {
			r.at(syntax.GetToken(), "", "%s", syntax.GetMessage())
		} else {
			r.at(nil, "", "%v", err)
		}
		return nil
	}
	var root *node
	for _, d := range file.Docs {
		if d.Body == nil {
			continue
		}
		if root != nil {
			r.at(start(d.Body), "", "second document; a config is one YAML document")
			break
		}
		root = &node{Node: d.Body}
	}
	return root
}

// mapping reads a value's fields, each by its own reader. What is no mapping, a field that is not among them, and one that is there twice are
// mistakes. It reports whether n is a mapping at all.
func (r *reader) mapping(n node, fields map[string]func(node)) bool {
	values, ok := entries(n.Node)
	if !ok {
		r.wrong(n, "must be a mapping, not %s; its fields are %s", describe(n.Node), fieldNames(fields))
		return false
	}
	seen := make(map[string]bool)
	for _, v := range values {
		key, ok := v.Key.(*ast.StringNode)
		if !ok {
			r.at(v.Key.GetToken(), n.field, "a field name must be a string, not %s; want one of %s", describe(v.Key), fieldNames(fields))
			continue
		}
		value := node{v.Value, join(n.field, key.Value)}
		read, known := fields[key.Value]
		switch {
		case !known:
			r.at(key.GetToken(), value.field, "unknown field; want one of %s", fieldNames(fields))
		case seen[key.Value]:
			r.at(key.GetToken(), value.field, "duplicate field")
		default:
			seen[key.Value] = true
			if r.checkValue(value) {
				read(value)
			}
		}
	}
	return true
}

func join(field, name string) string {
	if field == "" {
		return name
	}
	return field + "." + name
}

func fieldNames(fields map[string]func(node)) string {
	names := make([]string, 0, len(fields))
	for name := range fields {
		names = append(names, name)
	}
	slices.Sort(names)
	return strings.Join(names, ", ")
}

// entries are a mapping's. goccy/go-yaml has another type for one with a single entry.
func entries(n ast.Node) ([]*ast.MappingValueNode, bool) {
	switch n := n.(type) {
	case *ast.MappingNode:
		return n.Values, true
	case *ast.MappingValueNode:
		return []*ast.MappingValueNode{n}, true
	}
	return nil, false
}

// plain reports whether a value is there and is made of nothing that a config has no use for; else it notes the mistake.
func (r *reader) checkValue(n node) bool {
	switch v := n.Node.(type) {
	case nil, *ast.NullNode:
		r.at(nullToken(n.Node), n.field, "no value; give it one or omit the field")
	case *ast.TagNode:
		r.wrong(n, "a value that begins with ! is a YAML tag, which is not allowed; quote the expression")
	case *ast.AnchorNode, *ast.AliasNode, *ast.MergeKeyNode:
		r.wrong(n, "anchors, aliases and merge keys are not allowed; write the value out")
	case *ast.StringNode, *ast.LiteralNode, *ast.IntegerNode, *ast.FloatNode, *ast.BoolNode, *ast.MappingNode, *ast.MappingValueNode, *ast.SequenceNode:
		return true
	default:
		r.wrong(n, "a YAML value of type %v is not allowed", v.Type())
	}
	return false
}

func nullToken(n ast.Node) *token.Token {
	if n == nil {
		return nil
	}
	return n.GetToken()
}

// describe says what a value is, and not which: it may be a secret in the wrong place.
func describe(n ast.Node) string {
	switch n.(type) {
	case *ast.MappingNode, *ast.MappingValueNode:
		return "a mapping"
	case *ast.SequenceNode:
		return "a list"
	case *ast.IntegerNode, *ast.FloatNode, *ast.InfinityNode, *ast.NanNode:
		return "a number"
	case *ast.BoolNode:
		return "a boolean"
	case *ast.StringNode, *ast.LiteralNode:
		return "a string"
	}
	return "an unsupported value"
}

// each reads a list's values, or the one value that stands for a list of it.
func (r *reader) each(n node, read func(node)) {
	values, ok := n.Node.(*ast.SequenceNode)
	if !ok {
		read(n)
		return
	}
	for i, v := range values.Values {
		if item := (node{v, fmt.Sprintf("%s[%d]", n.field, i)}); r.checkValue(item) {
			read(item)
		}
	}
}

// texts reads a list of texts, each checked by parse. An empty list is a mistake: it would say "none", where leaving
// the field out says "all".
func texts[T any](r *reader, n node, into *[]T, parse func(string) (T, error)) {
	values, ok := n.Node.(*ast.SequenceNode)
	if !ok {
		r.wrong(n, "must be a list, not %s", describe(n.Node))
		return
	}
	if len(values.Values) == 0 {
		r.wrong(n, "empty list; give it values or omit the field")
		return
	}
	r.each(n, func(n node) {
		if s, ok := r.text(n); ok {
			if v, err := parse(s); err != nil {
				r.wrong(n, "%v", err)
			} else {
				*into = append(*into, v)
			}
		}
	})
}

// text reads a text, with the environment's values put in.
func (r *reader) text(n node) (string, bool) {
	var s string
	switch v := n.Node.(type) {
	case *ast.StringNode:
		s = v.Value
	case *ast.LiteralNode:
		s = v.Value.Value
	default:
		quote := ""
		switch n.Node.(type) {
		case *ast.IntegerNode, *ast.FloatNode, *ast.BoolNode:
			quote = "; quote it"
		}
		r.wrong(n, "must be a string, not %s%s", describe(n.Node), quote)
		return "", false
	}
	if len(s) > maxText {
		r.wrong(n, "string of %d bytes; the maximum is %d", len(s), maxText)
		return "", false
	}
	return r.expand(n, s)
}

// scalar reads a text or a number, as text.
func (r *reader) scalar(n node) (string, bool) {
	switch n.Node.(type) {
	case *ast.IntegerNode, *ast.FloatNode:
		return n.GetToken().Value, true
	case *ast.StringNode, *ast.LiteralNode:
		return r.text(n)
	}
	r.wrong(n, "must be a number or a string, not %s", describe(n.Node))
	return "", false
}

// checked reads a text that check accepts.
func (r *reader) checked(into *string, check func(string) error) func(node) {
	return func(n node) {
		s, ok := r.text(n)
		if !ok {
			return
		}
		if err := check(s); err != nil {
			r.wrong(n, "%v", err)
			return
		}
		*into = s
	}
}

// oneOf reads a text that is one of a few.
func (r *reader) oneOf(n node, into *string, allowed ...string) {
	s, ok := r.text(n)
	if !ok {
		return
	}
	if !slices.Contains(allowed, s) {
		r.wrong(n, "unknown value %q; want one of %s", s, strings.Join(allowed, ", "))
		return
	}
	*into = s
}

// whole reads a whole number in a range.
func (r *reader) integer(n node, into *int64, from, to int64) {
	s, ok := r.scalar(n)
	if !ok {
		return
	}
	v, err := strconv.ParseInt(s, 10, 64)
	if err != nil || v < from || v > to {
		r.wrong(n, "must be a whole number from %d to %d, not %s", from, to, displayText(n, s))
		return
	}
	*into = v
}

// boolean reads true or false. A variable's value is a text, which may say it, too.
func (r *reader) boolean(n node, into *bool) {
	switch v := n.Node.(type) {
	case *ast.BoolNode:
		*into = v.Value
	case *ast.StringNode, *ast.LiteralNode:
		if s, ok := r.text(n); ok && s != "true" && s != "false" {
			r.wrong(n, "must be true or false, not %q", s)
		} else {
			*into = s == "true"
		}
	default:
		r.wrong(n, "must be true or false, not %s", describe(n.Node))
	}
}

// duration reads a Go duration in a range.
func (r *reader) duration(n node, into *time.Duration, from, to time.Duration) {
	s, ok := r.scalar(n) // a number lacks its unit, and is told so
	if !ok {
		return
	}
	d, err := time.ParseDuration(s)
	if err != nil || d < from || d > to {
		r.wrong(n, "invalid duration %q; want one from %v to %v, such as 100ms, 1.5s or 2m", s, from, to)
		return
	}
	*into = d
}

// path is a file's that the config names: relative to the config.
func (r *reader) path(name string) string {
	if filepath.IsAbs(name) {
		return name
	}
	return filepath.Join(r.dir, name)
}
