package k8s

import (
	"bytes"
	"errors"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"
)

// flowLayout is how what is inserted into flow style is laid out. JSON is flow
// style, too.
type flowLayout struct {
	// newline is empty if all is on one line.
	newline string
	// indent is the indentation of the line on which a value begins, and unit that
	// of the lines of its members below it.
	indent, unit string
	// colon and comma have the spaces around them on a line.
	colon, comma string
}

// separator returns what is between two members that are indented like l.
func (l flowLayout) separator() string {
	if l.newline == "" {
		return l.comma
	}
	return "," + l.newline + l.indent
}

// flowText is where the text of a mapping or sequence in flow style stands.
type flowText struct {
	open, end, close position
	// hasComma says that the byte before end is a comma.
	hasComma bool
	// colon and comma are the first ones with the spaces around them.
	colon, comma string
}

// position is a byte in the lines of an insertion. The end of a flowText is
// after the last byte before the closing bracket that is no space or comment.
type position struct{ line, column int }

// findFlow returns where a mapping or sequence in flow style stands, or false if
// it finds no end.
func (p *insertion) findFlow(node *yaml.Node) (f flowText, ok bool) {
	at, ok := p.lineOf(node)
	if !ok {
		return f, false
	}
	depth := 0
	var quote byte
	for column := byteColumn(p.lines[at], node.Column); at < len(p.lines); at, column = at+1, 0 {
		line := p.lines[at]
		for ; column < len(line); column++ {
			c := line[column]
			isSpaced := column == 0 || line[column-1] == ' ' || line[column-1] == '\t'
			if quote == 0 && c == '#' && isSpaced {
				break
			}
			switch {
			case quote == '"' && c == '\\':
				column++
			case quote == '\'' && bytes.HasPrefix(line[column:], []byte("''")):
				column++
			case quote != 0:
				if c == quote {
					quote = 0
				}
			case (c == '"' || c == '\'') && (isSpaced || bytes.IndexByte([]byte(",[{:"), line[column-1]) >= 0):
				quote = c
			case c == ':' && f.colon == "":
				f.colon = withSpaces(line, column)
			case c == ',' && f.comma == "":
				f.comma = withSpaces(line, column)
			case c == '{' || c == '[':
				if depth++; depth == 1 {
					f.open = position{at, column}
				}
			case c == '}' || c == ']':
				if depth--; depth == 0 {
					f.close = position{at, column}
					return f, true
				}
			}
			if c > ' ' {
				f.end, f.hasComma = position{at, column + 1}, quote == 0 && c == ','
			}
		}
	}
	return f, false
}

// withSpaces returns the byte at a column of a line with the spaces around it,
// or with a space after it if the line ends there.
func withSpaces(line []byte, column int) string {
	start, end := len(bytes.TrimRight(line[:column], " ")), column+1
	for end < len(line) && line[end] == ' ' {
		end++
	}
	if end == len(line) || line[end] == '\r' || line[end] == '\n' {
		return string(line[start:column+1]) + " "
	}
	return string(line[start:end])
}

// layout returns the layout of a member, which begins at child, of a mapping or
// sequence, and the place of child. ownLine says that members have lines of their
// own.
func (p *insertion) layout(f flowText, child *yaml.Node) (l flowLayout, at position, ownLine, ok bool) {
	at.line, ok = p.lineOf(child)
	if !ok {
		return l, at, false, false
	}
	at.column = byteColumn(p.lines[at.line], child.Column)
	l = flowLayout{newline: p.newline, unit: p.unit, colon: f.colon, comma: f.comma}
	if l.colon == "" {
		l.colon = ": "
	}
	if l.comma == "" && strings.HasSuffix(l.colon, " ") {
		l.comma = ", "
	} else if l.comma == "" {
		l.comma = ","
	}
	before, closing := p.lines[at.line][:at.column], p.lines[f.close.line][:f.close.column]
	l.indent = string(leadingSpace(closing))
	switch {
	case len(bytes.TrimSpace(before)) == 0:
		ownLine = true
		if unit, ok := strings.CutPrefix(string(before), l.indent); ok && unit != "" && len(l.indent) == len(closing) {
			l.unit = unit
		}
		l.indent = string(before)
	case f.open.line == f.close.line:
		l.newline = ""
	}
	return l, at, ownLine, true
}

// rootLayout returns the layout of the value of the whole text. It is on one line
// unless its first member has a line of its own.
func (p *insertion) rootLayout(root *yaml.Node) flowLayout {
	f, ok := p.findFlow(root)
	if !ok || len(root.Content) == 0 {
		return flowLayout{unit: p.unit, colon: ":", comma: ","}
	}
	l, _, ownLine, _ := p.layout(f, root.Content[0])
	if l.indent = string(leadingSpace(p.lines[f.close.line])); !ownLine {
		l.newline = ""
	}
	return l
}

// members writes the members of a mapping or sequence.
func (p *insertion) members(added *yaml.Node, l flowLayout) ([][]byte, error) {
	var members [][]byte
	for i := 0; i < len(added.Content); i++ {
		var key *yaml.Node
		if added.Kind == yaml.MappingNode {
			key = added.Content[i]
			i++
		}
		var b bytes.Buffer
		if err := p.writeMember(&b, key, added.Content[i], l); err != nil {
			return nil, err
		}
		members = append(members, b.Bytes())
	}
	return members, nil
}

// appendFlow inserts added at the end of a mapping or sequence in flow style that
// is not empty.
func (p *insertion) appendFlow(node, added *yaml.Node) bool {
	f, ok := p.findFlow(node)
	if !ok {
		return false
	}
	last := node.Content[len(node.Content)-1]
	if node.Kind == yaml.MappingNode {
		last = node.Content[len(node.Content)-2]
	}
	l, _, ownLine, ok := p.layout(f, last)
	members, err := p.members(added, l)
	if !ok || err != nil {
		return false
	}
	at, separator := f.end.column, l.comma
	if ownLine {
		if separator = l.separator(); f.end.line < f.close.line { // a comment may follow the last member
			at = len(bytes.TrimRight(p.lines[f.end.line], "\r\n"))
		}
	}
	text := slices.Concat([]byte(separator[strings.IndexByte(separator, ',')+1:]), bytes.Join(members, []byte(separator)))
	if f.hasComma {
		text = append(text, ',')
	} else {
		p.edits = append(p.edits, edit{f.end.line, f.end.column, f.end.column, []byte(",")})
	}
	p.edits = append(p.edits, edit{f.end.line, at, at, text})
	return true
}

// insertBeforeFlow inserts added before an element of a sequence in flow style
// and the comment on it.
func (p *insertion) insertBeforeFlow(node, element, added *yaml.Node) bool {
	f, ok := p.findFlow(node)
	if !ok {
		return false
	}
	l, at, ownLine, ok := p.layout(f, element)
	members, err := p.members(added, l)
	if !ok || err != nil {
		return false
	}
	separator := []byte(l.comma)
	if ownLine {
		separator = []byte(l.separator())
		at = position{p.aboveComments(at.line), len(l.indent)}
	}
	text := append(bytes.Join(members, separator), separator...)
	p.edits = append(p.edits, edit{at.line, at.column, at.column, text})
	return true
}

// fillFlow is fill for a mapping in flow style.
func (p *insertion) fillFlow(mapping, key, value, added *yaml.Node) bool {
	f, ok := p.findFlow(mapping)
	if !ok {
		return false
	}
	l, _, _, ok := p.layout(f, key)
	if !ok {
		return false
	}
	start, end := "", ""
	if l.newline != "" {
		end = l.newline + l.indent
		l.indent += l.unit
		start = l.newline + l.indent
	}
	members, err := p.members(added, l)
	if err != nil {
		return false
	}
	text := slices.Concat([]byte(start), bytes.Join(members, []byte(l.separator())), []byte(end))
	from, to, ok := p.findEmpty(value)
	if !ok {
		return false
	}
	switch {
	case value.Kind != yaml.ScalarNode:
		from.column++ // the opening bracket
		to = from
	case added.Kind == yaml.MappingNode:
		text = slices.Concat([]byte("{"), text, []byte("}"))
	default:
		text = slices.Concat([]byte("["), text, []byte("]"))
	}
	p.edits = append(p.edits, edit{from.line, from.column, to.column, text})
	return true
}

// writeYAMLMember writes a member in YAML on one line.
func writeYAMLMember(out *bytes.Buffer, key, value *yaml.Node, _ flowLayout) error {
	node := &yaml.Node{Kind: yaml.SequenceNode, Style: yaml.FlowStyle, Content: []*yaml.Node{value}}
	if key != nil {
		node.Kind, node.Content = yaml.MappingNode, []*yaml.Node{key, value}
	}
	text, err := encodeYAML(node, true)
	text = bytes.TrimSpace(text)
	if err != nil || len(text) < 2 || bytes.IndexByte(text, '\n') >= 0 {
		return errors.Join(err, errors.New("the value cannot be written on one line"))
	}
	out.Write(text[1 : len(text)-1])
	return nil
}

// leadingSpace returns the spaces and tabs at the start of a line.
func leadingSpace(line []byte) []byte { return line[:len(line)-len(bytes.TrimLeft(line, " \t"))] }
