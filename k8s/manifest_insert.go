package k8s

import (
	"bytes"
	"cmp"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"unicode/utf8"

	"go.yaml.in/yaml/v3"
)

// insertion collects what is inserted into the text of a document in YAML or
// JSON, so that all else in it stays byte for byte.
type insertion struct {
	lines [][]byte
	// firstLine is the number that nodes give the first of lines.
	firstLine int
	newline   string
	compact   bool // as for writeYAML
	// unit is what a level is indented by where neighbours do not show it.
	unit string
	// writeMember writes a field of a mapping in flow style, or an element of a
	// sequence if key is nil.
	writeMember func(out *bytes.Buffer, key, value *yaml.Node, l flowLayout) error
	edits       []edit
}

// edit replaces the bytes from start to end, both counted from the start of a
// line, with text.
type edit struct {
	line, start, end int
	text             []byte
}

// newInsertion returns an insertion into text, a part of a document. firstLine is
// the number of the first line of text in the document.
func newInsertion(text []byte, firstLine int) *insertion {
	p := &insertion{lines: splitLines(text), firstLine: firstLine, newline: "\n", unit: "  "}
	if bytes.Contains(text, []byte("\r\n")) {
		p.newline = "\r\n"
	}
	return p
}

// insertYAML returns text, a part of a document in which node stands, with what
// changed has in addition to old, which is the value of node. It returns false as
// insertion.insert does.
func insertYAML(node *yaml.Node, text []byte, firstLine int, old, changed any, compact bool) ([]byte, bool) {
	p := newInsertion(text, firstLine)
	p.compact, p.writeMember = compact, writeYAMLMember
	return p.insert(node, old, changed)
}

// insert returns the text with what changed has in addition to old, which is the
// value of node. It returns false if more is to be done than to insert, or if it
// does not know where. The caller has to check that the result has the value
// changed.
func (p *insertion) insert(node *yaml.Node, old, changed any) ([]byte, bool) {
	if !p.merge(node, old, changed, len(p.lines)) {
		return nil, false
	}
	p.stripLastScalar(node)
	slices.SortStableFunc(p.edits, func(a, b edit) int {
		return cmp.Or(cmp.Compare(a.line, b.line), cmp.Compare(a.start, b.start))
	})
	size := 0
	for _, line := range p.lines {
		size += len(line)
	}
	for _, e := range p.edits {
		size += len(e.text)
	}
	out := bytes.NewBuffer(make([]byte, 0, size+len(p.newline)))
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

// stripLastScalar marks a block scalar at the end of the text, if lines follow it
// now: it has no newline at its end so far, and would get one.
func (p *insertion) stripLastScalar(node *yaml.Node) {
	for len(node.Content) > 0 {
		node = node.Content[len(node.Content)-1]
	}
	at, ok := p.lineOf(node)
	isLast := func(e edit) bool { return e.line == len(p.lines) }
	if !ok || node.Style&(yaml.LiteralStyle|yaml.FoldedStyle) == 0 || strings.HasSuffix(node.Value, "\n") ||
		bytes.HasSuffix(p.lines[len(p.lines)-1], []byte("\n")) || !slices.ContainsFunc(p.edits, isLast) {
		return
	}
	line := p.lines[at]
	column := byteColumn(line, node.Column)
	header := blockHeader.Find(line[column:])
	if column += len(header); len(header) > 0 && !bytes.HasPrefix(line[column:], []byte("-")) {
		p.edits = append(p.edits, edit{at, column, column, []byte("-")})
	}
}

// blockHeader matches the header of a block scalar up to where it may say which
// newlines are kept.
var blockHeader = regexp.MustCompile(`^[|>][1-9]?`)

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
		if len(value.Content) == 0 {
			if !p.fill(node, key, value, v) {
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

// fill gives a key of a mapping whose value is empty another value.
func (p *insertion) fill(mapping, key, value *yaml.Node, v any) bool {
	added, err := newNode(v)
	if err != nil || value.Anchor != "" || len(added.Content) == 0 {
		return false
	}
	if mapping.Style&yaml.FlowStyle != 0 {
		return p.fillFlow(mapping, key, value, added)
	}
	at, ok := p.lineOf(key)
	if !ok {
		return false
	}
	if value.Kind != yaml.ScalarNode || value.Value != "" {
		start, end, ok := p.findEmpty(value)
		if !ok || start.line != at || end.line != at {
			return false
		}
		column := len(bytes.TrimRight(p.lines[at][:start.column], " "))
		p.edits = append(p.edits, edit{at, column, end.column, nil})
	} else if value.ShortTag() != "!!null" {
		return false
	}
	indent := key.Column - 1
	if added.Kind == yaml.MappingNode || !p.compact {
		indent += 2
	}
	return p.insertBlock(at+1, indent, added)
}

// findEmpty returns where the text of an empty mapping or sequence or of null
// begins and ends, or false if a node is none of these or has no text.
func (p *insertion) findEmpty(node *yaml.Node) (start, end position, ok bool) {
	switch {
	case node.Kind == yaml.MappingNode || node.Kind == yaml.SequenceNode:
		f, ok := p.findFlow(node)
		f.close.column++
		return f.open, f.close, ok && len(node.Content) == 0
	case node.Kind == yaml.ScalarNode && node.ShortTag() == "!!null" && node.Value != "":
		if start.line, ok = p.lineOf(node); !ok {
			return start, end, false
		}
		line := p.lines[start.line]
		start.column = byteColumn(line, node.Column)
		end = position{start.line, start.column + len(node.Value)}
		return start, end, bytes.HasPrefix(line[start.column:], []byte(node.Value))
	}
	return start, end, false
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
			stop, _ = p.dashOf(node, next)
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
	added := &yaml.Node{Kind: yaml.SequenceNode, Content: elements}
	if node.Style&yaml.FlowStyle != 0 {
		return p.insertBeforeFlow(node, node.Content[i], added)
	}
	at, ok := p.dashOf(node, i)
	return ok && p.insertBlock(p.aboveComments(at), node.Column-1, added)
}

// dashOf returns the line of the dash of the i-th element of a block sequence. It
// may be above the element, with nothing but comments in between. If it is not
// there, dashOf returns 0, before which nothing ends, and false.
func (p *insertion) dashOf(node *yaml.Node, i int) (at int, ok bool) {
	at, ok = p.lineOf(node.Content[i])
	indent := node.Column - 1
	for ok && !isDash(p.lines[at], indent) {
		if at--; at < 0 {
			return 0, false
		}
		line := p.lines[at]
		ok = isDash(line, indent) || isComment(line) || len(bytes.TrimSpace(line)) == 0
	}
	if !ok {
		return 0, false
	}
	return at, true
}

// aboveComments returns the line of the first of the comments directly above a
// line that are indented as it is, or at if there is none.
func (p *insertion) aboveComments(at int) int {
	for indent := indentOf(p.lines[at]); at > 0 && isComment(p.lines[at-1]) && indentOf(p.lines[at-1]) == indent; {
		at--
	}
	return at
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
