package policy

import (
	"errors"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/lexer"
	"github.com/goccy/go-yaml/parser"
	"github.com/goccy/go-yaml/token"
)

// Bounds of a config file. A thousand limits take about 200 kB.
const (
	maxFile     = 1 << 20 // bytes
	maxDepth    = 64      // of nested brackets, or of dashes on one line
	maxFields   = 1000    // in one mapping
	maxValues   = 20_000  // in one list
	maxText     = 8192    // bytes of one string
	maxSecret   = 4096    // bytes of a file with a secret
	maxMistakes = 200     // that are reported
)

// reader reads YAML strictly. It continues after a mistake, to find all.
type reader struct {
	file     string
	dir      string                      // directory that relative file names start from
	getenv   func(string) (string, bool) // nil: variables are not allowed
	mistakes Mistakes
	// variables are the environment variables that the config uses, by name.
	variables map[string]string
	tokens    token.Tokens // of the document
}

// node is a value of the config, and the field that it belongs to.
type node struct {
	ast.Node
	field string // such as limits[2].rate
}

// at records a mistake at the position of a token.
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

// wrong records a mistake in a value. If the value uses environment variables,
// which may be secrets, their names replace their values in the quoted parts of
// the message. The rest of the message does not come from the value.
func (r *reader) wrong(n node, format string, args ...any) {
	r.at(start(n.Node), n.field, "%s", r.hideVariables(n.Node, fmt.Sprintf(format, args...)))
}

// start returns the first token of a value.
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

// document parses the only document of a config. It returns nil if there is
// none, or after a mistake.
func (r *reader) document(text []byte) *node {
	if len(text) > maxFile {
		r.at(nil, "", "the file exceeds the maximum of %d bytes", maxFile)
		return nil
	}
	if line, column, message := checkBounds(text); message != "" {
		r.mistakes = append(r.mistakes, Mistake{File: r.file, Line: line, Column: column, Message: message})
		return nil
	}
	r.tokens = lexer.Tokenize(string(text))
	file, err := parser.Parse(r.tokens, 0, parser.AllowDuplicateMapKey())
	if err != nil {
		if syntax, ok := errors.AsType[yaml.Error](err); ok {
			r.at(syntax.GetToken(), "", "%s", "")
			last := &r.mistakes[len(r.mistakes)-1]
			last.Message = mendSyntax(text, last.Line, syntax.GetMessage())
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

// mapping reads a mapping, each field by its function. It records a mistake for
// a value that is not a mapping, for an unknown field, a duplicate one, and one
// without a value. It reports whether there was no such mistake. Otherwise a field
// may only seem to be missing, because it is misspelled or has no value.
func (r *reader) mapping(n node, fields map[string]func(node)) (complete bool) {
	values, ok := entries(n.Node)
	if !ok {
		r.wrong(n, "must be a mapping, not %s; its fields are %s", describe(n.Node), fieldNames(fields))
		return false
	}
	complete = true
	seen := make(map[string]bool)
	for _, v := range values {
		key, ok := v.Key.(*ast.StringNode)
		if !ok {
			r.at(v.Key.GetToken(), n.field, "a field name must be a string, not %s; want one of %s", describe(v.Key),
				fieldNames(fields))
			complete = false
			continue
		}
		value := node{v.Value, join(n.field, key.Value)}
		read, known := fields[key.Value]
		switch {
		case !known:
			complete = false
			r.at(key.GetToken(), value.field, "%s", unknownField(n.field, key.Value, slices.Sorted(maps.Keys(fields))))
		case seen[key.Value]:
			complete = false
			r.at(key.GetToken(), value.field, "duplicate field; remove one")
		default:
			seen[key.Value] = true
			if r.checkValue(value) {
				read(value)
			} else {
				complete = false
			}
		}
	}
	return complete
}

func join(field, name string) string {
	if field == "" {
		return name
	}
	return field + "." + name
}

func fieldNames(fields map[string]func(node)) string {
	return strings.Join(slices.Sorted(maps.Keys(fields)), ", ")
}

// entries returns the entries of a mapping. goccy/go-yaml has a separate type
// for a mapping of one entry.
func entries(n ast.Node) ([]*ast.MappingValueNode, bool) {
	switch n := n.(type) {
	case *ast.MappingNode:
		return n.Values, true
	case *ast.MappingValueNode:
		return []*ast.MappingValueNode{n}, true
	}
	return nil, false
}

// noValue is the mistake of a field that is empty.
const noValue = "no value; give it one or omit the field"

// checkValue reports whether a value is present, and of a kind that configs
// use. Otherwise it records a mistake.
func (r *reader) checkValue(n node) bool {
	switch v := n.Node.(type) {
	case nil, *ast.NullNode:
		r.at(nullToken(n.Node), n.field, noValue)
	case *ast.TagNode:
		r.wrong(n, "a value that begins with ! is a YAML tag, which is not allowed; quote the expression")
	case *ast.AnchorNode, *ast.AliasNode, *ast.MergeKeyNode:
		r.wrong(n, "anchors, aliases and merge keys are not allowed; write the value out")
	case *ast.StringNode, *ast.LiteralNode, *ast.IntegerNode, *ast.FloatNode, *ast.BoolNode, *ast.MappingNode,
		*ast.MappingValueNode, *ast.SequenceNode:
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

// describe returns the kind of a value. It does not quote the value, which may
// be a secret in the wrong place.
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

// each reads the values of a list. A single value counts as a list of one.
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

// readStrings reads a list of strings and parses each of them. An empty list is a
// mistake: it would mean "none", while omitting the field means "all".
func readStrings[T any](r *reader, n node, into *[]T, parse func(string) (T, error)) {
	values, ok := n.Node.(*ast.SequenceNode)
	if !ok {
		r.wrong(n, "must be a list, not %s%s", describe(n.Node), mendList(n))
		return
	}
	if len(values.Values) == 0 {
		r.wrong(n, "empty list; give it values or omit the field")
		return
	}
	r.each(n, func(n node) {
		if s, ok := r.text(n); ok {
			if v, err := parse(s); err != nil {
				r.wrongError(n, err)
			} else {
				*into = append(*into, v)
			}
		}
	})
}

// text reads a string, with its variables replaced.
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

// scalar reads a string or a number, and returns it as a string.
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

// checked returns a function that reads a string which check accepts.
func (r *reader) checked(into *string, check func(string) error) func(node) {
	return func(n node) {
		s, ok := r.text(n)
		if !ok {
			return
		}
		if err := check(s); err != nil {
			r.wrongError(n, err)
			return
		}
		*into = s
	}
}

// oneOf reads one of the allowed strings.
func (r *reader) oneOf(n node, into *string, allowed ...string) {
	s, ok := r.text(n)
	if !ok {
		return
	}
	if !slices.Contains(allowed, s) {
		r.wrongError(n, unknownValue(s, allowed))
		return
	}
	*into = s
}

// integer reads a whole number from a range.
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

// boolean reads true or false, also as a string, which is what a variable is.
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

// duration reads a Go duration from a range.
func (r *reader) duration(n node, into *time.Duration, from, to time.Duration) {
	s, ok := r.scalar(n) // a number is reported as a duration without a unit
	if !ok {
		return
	}
	d, err := time.ParseDuration(s)
	if err != nil || d < from || d > to {
		a := &advice{what: fmt.Sprintf("invalid duration %q", s),
			want: fmt.Sprintf("want one from %s to %s, written like 100ms, 1.5s or 2m", DurationText(from), DurationText(to))}
		if err != nil {
			a.mend = mendDuration(s, from, to)
		}
		r.wrongError(n, a)
		return
	}
	*into = d
}

// path returns the path of a file that the config names.
func (r *reader) path(name string) string {
	if filepath.IsAbs(name) {
		return name
	}
	return filepath.Join(r.dir, name)
}
