package policy

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"

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
	r.at(start(n.Node), n.field, "%s", r.hide(n.Node, fmt.Sprintf(format, args...)))
}

// hide puts the names of the variables that a value takes in the place of
// their values, where a message quotes them.
func (r *reader) hide(n ast.Node, message string) string {
	names := r.replacer(n)
	if names == nil {
		return message
	}
	var b strings.Builder
	for rest := message; rest != ""; {
		i := strings.IndexByte(rest, '"')
		if i < 0 {
			b.WriteString(rest)
			break
		}
		b.WriteString(rest[:i])
		rest = rest[i:]
		quoted, err := strconv.QuotedPrefix(rest)
		if err != nil {
			b.WriteByte('"')
			rest = rest[1:]
			continue
		}
		rest = rest[len(quoted):]
		if text, err := strconv.Unquote(quoted); err == nil {
			if named := names.Replace(text); named != text {
				quoted = strconv.Quote(named)
			}
		}
		b.WriteString(quoted)
	}
	return b.String()
}

// replacer replaces the values of the variables that a value takes by their
// names; nil where it takes none.
func (r *reader) replacer(n ast.Node) *strings.Replacer {
	taken := make(map[string]string)
	var look func(ast.Node)
	look = func(n ast.Node) {
		if entries, ok := entries(n); ok {
			for _, e := range entries {
				look(e.Value)
			}
			return
		}
		if list, ok := n.(*ast.SequenceNode); ok {
			for _, v := range list.Values {
				look(v)
			}
			return
		}
		for _, found := range variable.FindAllStringSubmatch(written(n), -1) {
			name, _, _ := strings.Cut(found[1], ":-")
			if value := r.variables[name]; value != "" {
				taken[value] = name
			}
		}
	}
	if len(r.variables) > 0 {
		look(n)
	}
	if len(taken) == 0 {
		return nil
	}
	values := slices.SortedFunc(maps.Keys(taken), func(a, b string) int { return len(b) - len(a) })
	pairs := make([]string, 0, 2*len(values))
	for _, value := range values {
		pairs = append(pairs, value, "${"+taken[value]+"}")
	}
	return strings.NewReplacer(pairs...)
}

// written is a text as it stands in the file: with the names of variables, and
// not their values. It is empty for what is no text.
func written(n ast.Node) string {
	switch v := n.(type) {
	case *ast.StringNode:
		return v.Value
	case *ast.LiteralNode:
		return v.Value.Value
	}
	return ""
}

// takesVariables reports whether a value takes environment variables.
func takesVariables(n node) bool { return strings.Contains(written(n.Node), "${") }

// shown is a scalar's text for a message that does not quote it: as it stands
// in the file where it takes variables.
func shown(n node, text string) string {
	if takesVariables(n) {
		return written(n.Node)
	}
	return text
}

// wrongFile notes that a file that a value names cannot be read.
func (r *reader) wrongFile(n node, err error) {
	var path *os.PathError
	if takesVariables(n) && errors.As(err, &path) {
		r.wrong(n, "%s: %v", written(n.Node), path.Err)
		return
	}
	r.wrong(n, "%v", err)
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
		r.at(nil, "", "the file has more than the %d bytes that are allowed", maxFile)
		return nil
	}
	if line, column, message := outgrown(text); message != "" {
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
			r.at(start(d.Body), "", "a second document; allowed is one")
			break
		}
		root = &node{Node: d.Body}
	}
	return root
}

// outgrown finds where a text is larger than any config, before a parser that recurses, and takes quadratic time for some of it, sees it:
// too many levels, fields of one mapping, or values of one list. It knows YAML roughly, and counts rather too much than too little:
// quotes count as such where they end on their line.
func outgrown(text []byte) (line, column int, message string) {
	var flow []bracket  // that are open
	var block []outline // the block mappings and lists that are open, by their columns
	for number, rest := 1, text; len(rest) > 0; number++ {
		var row []byte
		row, rest, _ = bytes.Cut(rest, []byte{'\n'})
		row = withoutComment(row)
		if column, message = outgrownBlock(row, &block); message != "" {
			return number, column, message
		}
		since := 0 // the last character that is not of a plain text
		for i := 0; i < len(row); i++ {
			if i-since > 2*maxText {
				return number, since + 1, fmt.Sprintf("a text of more than %d bytes; allowed are %d", 2*maxText, maxText)
			}
			c := row[i]
			if strings.IndexByte("[]{},:'\"", c) >= 0 {
				since = i
			}
			switch c {
			case '\'', '"':
				if end := closing(row, i); end-i <= maxText {
					i, since = end, end
				}
			case '[', '{':
				flow = append(flow, bracket{open: c})
				if len(flow) > maxDepth {
					return number, i + 1, tooDeep
				}
			case ']', '}':
				flow = flow[:max(0, len(flow)-1)]
			case ',':
				if len(flow) == 0 {
					continue
				}
				in := &flow[len(flow)-1]
				if in.commas++; in.open == '{' && in.commas > maxFields {
					return number, i + 1, tooManyFields
				} else if in.commas > maxValues {
					return number, i + 1, tooManyValues
				}
			}
		}
	}
	return 0, 0, ""
}

// closing is where the quote at i ends on its line; i where it does not, or where it opens nothing, as in don't.
func closing(row []byte, i int) int {
	if i > 0 && (isDigits(string(row[i-1:i])) || unicode.IsLetter(rune(row[i-1]))) {
		return i
	}
	for j := i + 1; j < len(row); j++ {
		switch {
		case row[j] == '\\' && row[i] == '"':
			j++
		case row[j] == row[i]:
			return j
		}
	}
	return i
}

// withoutComment is a line up to its comment, which begins at a # that is first or behind a space, and not within quotes.
func withoutComment(row []byte) []byte {
	for i := 0; i < len(row); i++ {
		switch c := row[i]; {
		case c == '\'' || c == '"':
			i = closing(row, i)
		case c == '#' && (i == 0 || row[i-1] == ' ' || row[i-1] == '\t'):
			return row[:i]
		}
	}
	return row
}

var (
	tooDeep       = fmt.Sprintf("more than %d levels of nesting", maxDepth)
	tooManyFields = fmt.Sprintf("more than %d fields in one mapping", maxFields)
	tooManyValues = fmt.Sprintf("more than %d values in one list", maxValues)
)

// bracket is a flow mapping or list.
type bracket struct {
	open   byte
	commas int
}

// outline is a block mapping or list that begins at a column.
type outline struct{ column, entries int }

// outgrownBlock counts what one line adds to block mappings and lists.
func outgrownBlock(row []byte, block *[]outline) (column int, message string) {
	add := func(column, most int, message string) string {
		open := *block
		for len(open) > 0 && open[len(open)-1].column > column {
			open = open[:len(open)-1]
		}
		if len(open) == 0 || open[len(open)-1].column < column {
			open = append(open, outline{column: column})
		}
		*block = open
		last := &open[len(open)-1]
		if last.entries++; last.entries > most {
			return message
		}
		return ""
	}
	column, dashes := 0, 0
	for ; column < len(row); column++ {
		switch c := row[column]; {
		case c == ' ' || c == '\t':
		case (c == '-' || c == '?') && (column+1 == len(row) || row[column+1] == ' '):
			if dashes++; dashes > maxDepth {
				return column + 1, tooDeep
			}
			if m := add(column, maxValues, tooManyValues); m != "" {
				return column + 1, m
			}
		default:
			content := bytes.TrimSpace(row[column:])
			switch {
			case c == '[' || c == '{':
				return column + 1, add(column, maxValues, tooManyValues)
			case bytes.Contains(content, []byte(": ")) || bytes.HasSuffix(content, []byte(":")):
				return column + 1, add(column, maxFields, tooManyFields)
			}
			return 0, ""
		}
	}
	return 0, ""
}

// mapping reads a value's fields, each by its own reader. What is no mapping, a field that is not among them, and one that is there twice are
// mistakes. It reports whether n is a mapping at all.
func (r *reader) mapping(n node, fields map[string]func(node)) bool {
	values, ok := entries(n.Node)
	if !ok {
		r.wrong(n, "%s; wanted is a mapping with %s", describe(n.Node), list(fields))
		return false
	}
	seen := make(map[string]bool)
	for _, v := range values {
		key, ok := v.Key.(*ast.StringNode)
		if !ok {
			r.at(v.Key.GetToken(), n.field, "%s as a field's name; allowed are %s", describe(v.Key), list(fields))
			continue
		}
		value := node{v.Value, join(n.field, key.Value)}
		read, known := fields[key.Value]
		switch {
		case !known:
			r.at(key.GetToken(), value.field, "unknown field; allowed are %s", list(fields))
		case seen[key.Value]:
			r.at(key.GetToken(), value.field, "given twice")
		default:
			seen[key.Value] = true
			if r.plain(value) {
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

func list(fields map[string]func(node)) string {
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
func (r *reader) plain(n node) bool {
	switch v := n.Node.(type) {
	case nil, *ast.NullNode:
		r.at(nullToken(n.Node), n.field, "no value; leave the field out, or give it one")
	case *ast.TagNode:
		r.wrong(n, "a value that begins with ! is a YAML tag, which is not allowed; quote the expression")
	case *ast.AnchorNode, *ast.AliasNode, *ast.MergeKeyNode:
		r.wrong(n, "anchors, aliases and merges are not allowed; write the value out")
	case *ast.StringNode, *ast.LiteralNode, *ast.IntegerNode, *ast.FloatNode, *ast.BoolNode, *ast.MappingNode, *ast.MappingValueNode, *ast.SequenceNode:
		return true
	default:
		r.wrong(n, "%v is not allowed here", v.Type())
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
		return "a text"
	}
	return "no plain value"
}

// each reads a list's values, or the one value that stands for a list of it.
func (r *reader) each(n node, read func(node)) {
	values, ok := n.Node.(*ast.SequenceNode)
	if !ok {
		read(n)
		return
	}
	for i, v := range values.Values {
		if item := (node{v, fmt.Sprintf("%s[%d]", n.field, i)}); r.plain(item) {
			read(item)
		}
	}
}

// texts reads a list of texts, each checked by parse. An empty list is a mistake: it would say "none", where leaving
// the field out says "all".
func texts[T any](r *reader, n node, into *[]T, parse func(string) (T, error)) {
	values, ok := n.Node.(*ast.SequenceNode)
	if !ok {
		r.wrong(n, "%s; wanted is a list", describe(n.Node))
		return
	}
	if len(values.Values) == 0 {
		r.wrong(n, "an empty list; leave the field out, or give it values")
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
		r.wrong(n, "%s; wanted is a text: quote it", describe(n.Node))
		return "", false
	}
	if len(s) > maxText {
		r.wrong(n, "a text of %d bytes; allowed are %d", len(s), maxText)
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
	r.wrong(n, "%s; wanted is a number or a text", describe(n.Node))
	return "", false
}

var variable = regexp.MustCompile(`\$\$\{|\$\{([^}]*)\}?`)

var variableName = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*$`)

const variableForms = "allowed are ${NAME} and ${NAME:-default}, and $${ for a literal ${"

// expand puts environment variables into a scalar: ${NAME}, and
// ${NAME:-default}, whose default counts where the variable is not set or
// empty, as in a shell. $${ is a literal ${.
func (r *reader) expand(n node, s string) (string, bool) {
	if !strings.Contains(s, "${") {
		return s, true
	}
	if r.getenv == nil {
		r.wrong(n, "${...} stands for a variable in the config file only")
		return "", false
	}
	good := true
	wrong := func(format string, args ...any) string {
		good = false
		r.wrong(n, format, args...)
		return ""
	}
	s = variable.ReplaceAllStringFunc(s, func(found string) string {
		if found == "$${" {
			return "${"
		}
		name, fallback, has := strings.Cut(strings.TrimSuffix(found[2:], "}"), ":-")
		switch {
		case !strings.HasSuffix(found, "}"):
			return wrong("a variable without its closing brace; %s", variableForms)
		case !variableName.MatchString(name):
			if i := strings.IndexAny(name, ":=?+-"); i > 0 {
				name = name[:i] // what follows may be a secret, as in ${NAME:=secret}
			}
			return wrong("%q is no variable's name; %s", name, variableForms)
		case strings.Contains(fallback, "${"):
			return wrong("a variable in the default of %s; a default is a plain text", name)
		}
		v, isSet := r.getenv(name)
		switch {
		case has && v == "":
			return fallback
		case !isSet:
			return wrong("the environment variable %s is not set; ${%s:-default} gives it a default", name, name)
		}
		if r.variables == nil {
			r.variables = make(map[string]string)
		}
		r.variables[name] = v
		return v
	})
	return s, good
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
		r.wrong(n, "%q; allowed are %s", s, strings.Join(allowed, ", "))
		return
	}
	*into = s
}

// whole reads a whole number in a range.
func (r *reader) whole(n node, into *int64, from, to int64) {
	s, ok := r.scalar(n)
	if !ok {
		return
	}
	v, err := strconv.ParseInt(s, 10, 64)
	if err != nil || v < from || v > to {
		r.wrong(n, "%s; allowed are whole numbers from %d to %d", shown(n, s), from, to)
		return
	}
	*into = v
}

// boolean reads true or false. A variable's value is a text, which may say it, too.
func (r *reader) boolean(n node, into *bool) {
	const allowed = "allowed are true and false"
	switch v := n.Node.(type) {
	case *ast.BoolNode:
		*into = v.Value
	case *ast.StringNode, *ast.LiteralNode:
		if s, ok := r.text(n); ok && s != "true" && s != "false" {
			r.wrong(n, "%q; %s", s, allowed)
		} else {
			*into = s == "true"
		}
	default:
		r.wrong(n, "%s; %s", describe(n.Node), allowed)
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
		r.wrong(n, "%q; allowed are durations such as 100ms, 1.5s and 2m, from %v to %v", s, from, to)
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
