package k8s

import (
	"bytes"
	"cmp"
	"reflect"
	"slices"
	"unicode/utf8"

	"go.yaml.in/yaml/v3"
)

// insertion collects what is inserted into the text of a YAML document, so that
// all else in it stays byte for byte.
type insertion struct {
	lines [][]byte
	// firstLine is the number that nodes give the first of lines.
	firstLine int
	compact   bool // as for writeYAML
	newline   string
	edits     []edit
}

// edit replaces the bytes from start to end, both counted from the start of a
// line, with text.
type edit struct {
	line, start, end int
	text             []byte
}

// insertYAML returns text, a part of a document in which node stands, with what
// changed has in addition to old, which is the value of node. firstLine is the
// number of the first line of text in the document. It returns false if more is
// to be done than to insert, or if it does not know where. The caller has to
// check that the result has the value changed.
func insertYAML(node *yaml.Node, text []byte, firstLine int, old, changed any, compact bool) ([]byte, bool) {
	p := insertion{lines: splitLines(text), firstLine: firstLine, compact: compact, newline: "\n"}
	if bytes.Contains(text, []byte("\r\n")) {
		p.newline = "\r\n"
	}
	if !p.merge(node, old, changed, len(p.lines)) {
		return nil, false
	}
	slices.SortStableFunc(p.edits, func(a, b edit) int {
		return cmp.Or(cmp.Compare(a.line, b.line), cmp.Compare(a.start, b.start))
	})
	var out bytes.Buffer
	edits := p.edits
	for i := 0; i <= len(p.lines); i++ {
		at := 0
		for ; len(edits) > 0 && edits[0].line == i; edits = edits[1:] {
			e := edits[0]
			switch {
			case i < len(p.lines) && e.start >= at && e.end <= len(p.lines[i]):
				out.Write(p.lines[i][at:e.start])
			case i < len(p.lines):
				return nil, false
			case !bytes.HasSuffix(out.Bytes(), []byte("\n")):
				out.WriteString(p.newline)
			}
			out.Write(e.text)
			at = e.end
		}
		if i < len(p.lines) {
			out.Write(p.lines[i][at:])
		}
	}
	return out.Bytes(), true
}

// lineOf returns the index in p.lines of the line where a node begins, or false
// if it is not there.
func (p *insertion) lineOf(node *yaml.Node) (int, bool) {
	at := node.Line - p.firstLine
	return at, at >= 0 && at < len(p.lines)
}

// merge is mergeNode for the text of a node, which ends before the line end.
func (p *insertion) merge(node *yaml.Node, old, changed any, end int) bool {
	if reflect.DeepEqual(old, changed) {
		return true
	}
	if node.Kind == yaml.DocumentNode {
		return p.merge(node.Content[0], old, changed, end)
	}
	if node.Anchor != "" || len(node.Content) == 0 {
		return false
	}
	switch c := changed.(type) {
	case object:
		if o, ok := old.(object); ok && node.Kind == yaml.MappingNode {
			return p.mergeMapping(node, o, c, end)
		}
	case []any:
		if o, ok := old.([]any); ok && node.Kind == yaml.SequenceNode {
			return p.mergeSequence(node, o, c, end)
		}
	}
	return false
}

// mergeMapping is merge for a mapping that is not empty.
func (p *insertion) mergeMapping(node *yaml.Node, old, changed object, end int) bool {
	flow := node.Style&yaml.FlowStyle != 0
	for i := 0; i+1 < len(node.Content); i += 2 {
		key, value := node.Content[i], node.Content[i+1]
		v, kept := changed[key.Value]
		if _, there := old[key.Value]; there && !kept {
			return false
		} else if !kept || reflect.DeepEqual(old[key.Value], v) {
			continue
		}
		stop := end
		if i+2 < len(node.Content) && !flow {
			stop = node.Content[i+2].Line - p.firstLine
		}
		if len(value.Content) == 0 && !flow {
			if !p.fill(key, value, v) {
				return false
			}
		} else if !p.merge(value, old[key.Value], v, stop) {
			return false
		}
	}
	added := &yaml.Node{Kind: yaml.MappingNode}
	for _, name := range addedFields(node, old, changed) {
		k, errKey := newNode(name)
		v, errValue := newNode(changed[name])
		if errKey != nil || errValue != nil {
			return false
		}
		added.Content = append(added.Content, k, v)
	}
	if len(added.Content) == 0 {
		return true
	}
	if flow {
		return p.appendFlow(node, added)
	}
	return p.appendBlock(node, added, end)
}

// fill gives a key of a block mapping whose value is empty another value.
func (p *insertion) fill(key, value *yaml.Node, v any) bool {
	at, ok := p.lineOf(key)
	added, err := newNode(v)
	if !ok || err != nil || value.Anchor != "" || len(added.Content) == 0 {
		return false
	}
	line := p.lines[at]
	switch {
	case value.Kind == yaml.ScalarNode && value.Value == "" && value.ShortTag() == "!!null":
	case value.Style&yaml.FlowStyle != 0 && value.Line == key.Line:
		start := byteColumn(line, value.Column)
		if start+2 > len(line) || !slices.Contains([]string{"{}", "[]"}, string(line[start:start+2])) {
			return false
		}
		p.edits = append(p.edits, edit{at, len(bytes.TrimRight(line[:start], " ")), start + 2, nil})
	default:
		return false
	}
	indent := key.Column - 1
	if added.Kind == yaml.MappingNode || !p.compact {
		indent += 2
	}
	return p.insertBlock(at+1, indent, added)
}

// mergeSequence is merge for a sequence that is not empty.
func (p *insertion) mergeSequence(node *yaml.Node, old, changed []any, end int) bool {
	flow := node.Style&yaml.FlowStyle != 0
	next := 0 // in old
	var before []*yaml.Node
	for at, i := range matchElements(old, changed) {
		if i < 0 {
			element, err := newNode(changed[at])
			if err != nil {
				return false
			}
			before = append(before, element)
			continue
		}
		if i != next {
			return false
		}
		next++
		stop := end
		if next < len(node.Content) && !flow {
			stop = node.Content[next].Line - p.firstLine
		}
		if len(before) > 0 && !p.insertBefore(node, i, before) || !p.merge(node.Content[i], old[i], changed[at], stop) {
			return false
		}
		before = nil
	}
	if next < len(old) {
		return false
	}
	if len(before) == 0 {
		return true
	}
	added := &yaml.Node{Kind: yaml.SequenceNode, Content: before}
	if flow {
		return p.appendFlow(node, added)
	}
	return p.appendBlock(node, added, end)
}

// insertBefore inserts elements before the i-th of a sequence and the comment on
// it.
func (p *insertion) insertBefore(node *yaml.Node, i int, elements []*yaml.Node) bool {
	at, ok := p.lineOf(node.Content[i])
	if !ok {
		return false
	}
	added := &yaml.Node{Kind: yaml.SequenceNode, Content: elements}
	if node.Style&yaml.FlowStyle != 0 {
		text, ok := encodeFlow(added)
		start := byteColumn(p.lines[at], node.Content[i].Column)
		p.edits = append(p.edits, edit{at, start, start, append(text, ", "...)})
		return ok
	}
	indent := node.Column - 1
	if !isDash(p.lines[at], indent) {
		return false
	}
	for at > 0 && isComment(p.lines[at-1]) && indentOf(p.lines[at-1]) == indent {
		at--
	}
	return p.insertBlock(at, indent, added)
}

// appendBlock inserts added at the end of a block mapping or sequence, whose text
// ends before the line end: before blank lines and comments that stand further
// out than it or belong to what follows.
func (p *insertion) appendBlock(node, added *yaml.Node, end int) bool {
	start, ok := p.lineOf(node)
	if !ok || end <= start || end > len(p.lines) {
		return false
	}
	indent := node.Column - 1
	next := -1
	if end < len(p.lines) {
		next = indentOf(p.lines[end])
	}
	// A line in a block scalar may look like a comment.
	last, scalarIndent := node, len(p.lines[start])
	for len(last.Content) > 0 {
		n := last.Content[len(last.Content)-1]
		if n.Style&(yaml.LiteralStyle|yaml.FoldedStyle) != 0 {
			scalarIndent = last.Column - 1
		}
		last = n
	}
	for end > start+1 {
		line := p.lines[end-1]
		comment := isComment(line) && (indentOf(line) < indent || indentOf(line) <= next) && indentOf(line) <= scalarIndent
		if len(bytes.TrimSpace(line)) > 0 && !comment && !bytes.HasPrefix(line, []byte("...")) {
			break
		}
		end--
	}
	return p.insertBlock(end, indent, added)
}

// insertBlock inserts a mapping or sequence in block style before a line.
func (p *insertion) insertBlock(at, indent int, added *yaml.Node) bool {
	text, err := encodeYAML(added, p.compact)
	text = bytes.ReplaceAll(indentLines(text, indent), []byte("\n"), []byte(p.newline))
	p.edits = append(p.edits, edit{line: at, text: text})
	return err == nil
}

// appendFlow inserts added at the end of a mapping or sequence in flow style that
// is not empty.
func (p *insertion) appendFlow(node, added *yaml.Node) bool {
	at, column, hasComma, ok := p.closingBracket(node)
	text, encoded := encodeFlow(added)
	if !ok || !encoded {
		return false
	}
	line := p.lines[at]
	start := len(bytes.TrimRight(line[:column], " \t"))
	separator := ", "
	if hasComma {
		separator = " "
	}
	if start == 0 { // the bracket is on a line of its own, and so is what is added
		indent := bytes.Repeat([]byte(" "), indentOf(line)+2)
		text = slices.Concat(indent, bytes.TrimLeft([]byte(separator), " "), text, []byte(p.newline))
	} else {
		text = slices.Concat([]byte(separator), text)
	}
	p.edits = append(p.edits, edit{at, start, start, text})
	return true
}

// closingBracket returns where the bracket stands that closes a mapping or sequence
// in flow style, and whether a comma is before it. It returns false if it finds
// none.
func (p *insertion) closingBracket(node *yaml.Node) (at, column int, hasComma, ok bool) {
	at, ok = p.lineOf(node)
	if !ok {
		return 0, 0, false, false
	}
	depth := 0
	var quote, last byte // last is the last byte of what is no comment and no space
	for column = byteColumn(p.lines[at], node.Column); at < len(p.lines); at, column = at+1, 0 {
		line := p.lines[at]
		for ; column < len(line); column++ {
			c := line[column]
			isSpaced := column == 0 || line[column-1] == ' ' || line[column-1] == '\t'
			if quote == 0 && c == '#' && isSpaced {
				break
			}
			before := last
			if c > ' ' {
				last = c
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
			case c == '{' || c == '[':
				depth++
			case c == '}' || c == ']':
				if depth--; depth == 0 {
					return at, column, before == ',', true
				}
			}
		}
	}
	return 0, 0, false, false
}

// encodeFlow returns the text of a mapping or sequence in flow style, without
// its brackets.
func encodeFlow(node *yaml.Node) ([]byte, bool) {
	node.Style |= yaml.FlowStyle
	text, err := encodeYAML(node, true)
	text = bytes.TrimSpace(text)
	if err != nil || len(text) < 2 || bytes.IndexByte(text, '\n') >= 0 {
		return nil, false
	}
	return text[1 : len(text)-1], true
}

// byteColumn returns the index of a column, which counts characters from 1.
func byteColumn(line []byte, column int) int {
	at := 0
	for ; column > 1 && at < len(line); column-- {
		_, size := utf8.DecodeRune(line[at:])
		at += size
	}
	return at
}

// indentOf returns the number of spaces at the start of a line.
func indentOf(line []byte) int { return len(line) - len(bytes.TrimLeft(line, " ")) }

// isComment reports whether there is nothing but a comment on a line.
func isComment(line []byte) bool { return bytes.HasPrefix(bytes.TrimLeft(line, " "), []byte("#")) }
