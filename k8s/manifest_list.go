package k8s

import (
	"bytes"
	"reflect"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"go.yaml.in/yaml/v3"
)

// manifestList is the text of a List, cut around its items. Each is injected by
// itself, so that a List of thousands takes time and memory in proportion.
type manifestList struct {
	// kind is the List's without the suffix List, and apiVersion the List's: the
	// items of a DeploymentList, for example, need not have their own.
	kind, apiVersion string
	before           []byte
	items            []listItem
}

// listItem is an item of a manifestList.
type listItem struct {
	// rewrite returns the item's text after inject, which returns its decoded value
	// with the sidecar, or its argument if nothing changes. It returns false if an
	// item that changes cannot be cut out of the text.
	rewrite func(inject func(any) any) (written []byte, ok bool, err error)
	// after is the text up to the next item, or to the end.
	after []byte
}

// inject returns the text of the List after injection of its items, as many at a
// time as there are processors. It returns false if an item that changes cannot be
// cut out of the text. Then, and if there is an error, m has collected nothing.
func (l manifestList) inject(m *injector) (out []byte, ok bool, err error) {
	type result struct {
		injector
		text []byte
		ok   bool
		err  error
	}
	results := make([]result, len(l.items))
	var next atomic.Int64
	var wg sync.WaitGroup
	for range min(runtime.GOMAXPROCS(0), len(l.items)) {
		wg.Go(func() {
			for i := int(next.Add(1)) - 1; i < len(l.items); i = int(next.Add(1)) - 1 {
				r := &results[i]
				r.options = m.options
				r.text, r.ok, r.err = l.items[i].rewrite(func(v any) any { return r.injectItem(v, l.kind, l.apiVersion, i) })
				if !r.ok || r.err != nil {
					next.Store(int64(len(l.items))) // those before it are all under way
				}
			}
		})
	}
	wg.Wait()
	if i := slices.IndexFunc(results, func(r result) bool { return !r.ok || r.err != nil }); i >= 0 {
		return nil, results[i].ok, results[i].err
	}
	parts := [][]byte{l.before}
	for i, r := range results {
		m.skipped, m.refused = append(m.skipped, r.skipped...), append(m.refused, r.refused...)
		parts = append(parts, r.text, l.items[i].after)
	}
	return slices.Concat(parts...), true, nil
}

// yamlItem is an item of a List in YAML.
type yamlItem struct {
	indent int        // of its dash, in spaces
	line   int        // of its dash in the document, from 0
	text   []byte     // from the dash on
	node   *yaml.Node // in the document
}

// keptNewlines matches the header of a block scalar to which the blank lines
// after it belong.
var keptNewlines = regexp.MustCompile(`[|>][0-9]?\+`)

// otherBreaks matches what YAML 1.1 takes for the end of a line besides \n and
// \r\n.
var otherBreaks = regexp.MustCompile("\r[^\n]|\r$|\u0085|\u2028|\u2029")

// splitYAMLList cuts the text of a document, whose root is node, around its items.
// It returns false if the document is not a List, or has to be injected as a
// whole: if it has anchors or flow style, for example.
func splitYAMLList(node *yaml.Node, body []byte) (manifestList, bool) {
	var l manifestList
	root := node.Content[0]
	if root.Kind != yaml.MappingNode || root.Style&yaml.FlowStyle != 0 || keptNewlines.Match(body) ||
		otherBreaks.Match(body) {
		return l, false
	}
	var items, next *yaml.Node // next is the key after the items
	isList := false
	for i := 0; i+1 < len(root.Content); i += 2 {
		key, value := root.Content[i], root.Content[i+1]
		if items != nil && next == nil {
			next = key
		}
		switch key.Value {
		case "kind":
			l.kind, isList = strings.CutSuffix(value.Value, "List")
		case "apiVersion":
			l.apiVersion = value.Value
		case "items":
			items = value
		}
	}
	if !isList || items == nil || items.Kind != yaml.SequenceNode || items.Style&yaml.FlowStyle != 0 ||
		len(items.Content) == 0 || hasAnchors(node) {
		return l, false
	}
	lines := splitLines(body)
	offsets := make([]int, 1, len(lines)+1)
	for i, line := range lines {
		offsets = append(offsets, offsets[i]+len(line))
	}
	end := len(lines) // of the items
	if next != nil {
		end = min(end, next.Line-1)
	}
	indent := items.Column - 1
	at := -1
	for i, n := range items.Content {
		start := n.Line - 1
		stop := end
		if i+1 < len(items.Content) {
			stop = items.Content[i+1].Line - 1
		}
		if start <= at || start >= stop || stop > len(lines) || !isDash(lines[start], indent) {
			return l, false
		}
		at = start
		last := stop
		for last > start+1 && separates(lines[last-1], indent) {
			last--
		}
		if i == 0 {
			l.before = body[:offsets[start]]
		}
		if i+1 == len(items.Content) {
			stop = len(lines)
		}
		item := yamlItem{indent: indent, line: start, text: body[offsets[start]:offsets[last]], node: n}
		l.items = append(l.items, listItem{rewrite: item.rewrite, after: body[offsets[last]:offsets[stop]]})
	}
	return l, true
}

// parse parses the item by itself. It returns false if the result differs from
// the item's node in the document: then the cut has taken a part of the item for
// a comment, for example.
func (item *yamlItem) parse() (list *yaml.Node, unindented []byte, ok bool) {
	text, ok := unindent(item.text, item.indent)
	if !ok {
		return nil, nil, false
	}
	node, err := parseYAML(text)
	if err != nil || node == nil {
		return nil, nil, false
	}
	list = node.Content[0]
	return node, text, list.Kind == yaml.SequenceNode && len(list.Content) == 1 && equalNodes(list.Content[0], item.node)
}

// equalNodes reports whether two nodes have the same value.
func equalNodes(a, b *yaml.Node) bool {
	return a.Kind == b.Kind && a.Tag == b.Tag && a.Value == b.Value &&
		slices.EqualFunc(a.Content, b.Content, equalNodes)
}

// splitLines cuts a text into its lines, each with the newline that ends it.
func splitLines(text []byte) [][]byte {
	lines := bytes.SplitAfter(text, []byte("\n"))
	if len(lines[len(lines)-1]) == 0 {
		lines = lines[:len(lines)-1]
	}
	return lines
}

// isDash reports whether a line begins an item whose dash has this indentation.
func isDash(line []byte, indent int) bool {
	return len(line) > indent && line[indent] == '-' && len(bytes.TrimLeft(line[:indent], " ")) == 0
}

// separates reports whether a line is not part of the item above it, whose dash
// has this indentation: a blank line, a comment or the end of the document.
func separates(line []byte, indent int) bool {
	text := bytes.TrimLeft(line, " ")
	comment := len(text) > 0 && text[0] == '#' && len(line)-len(text) <= indent
	return comment || len(bytes.TrimSpace(line)) == 0 || bytes.HasPrefix(line, []byte("..."))
}

// hasAnchors reports whether a node or one below it has an anchor or is an
// alias.
func hasAnchors(node *yaml.Node) (found bool) {
	walkNodes(node, func(n *yaml.Node) { found = found || n.Anchor != "" || n.Kind == yaml.AliasNode })
	return found
}

// rewrite is listItem.rewrite for an item of a List in YAML. It frees the memory
// of its node.
func (item *yamlItem) rewrite(inject func(any) any) (written []byte, ok bool, err error) {
	defer func() { *item.node = yaml.Node{} }()
	var old any
	if err := item.node.Decode(&old); err != nil {
		return nil, true, unreadableError{err}
	}
	old = stringifyKeys(old)
	changed := inject(old)
	if reflect.DeepEqual(old, changed) {
		return item.text, true, nil
	}
	line, column := item.line+1, item.indent+1
	list := &yaml.Node{Kind: yaml.SequenceNode, Content: []*yaml.Node{item.node}, Line: line, Column: column}
	written, inserted := insertYAML(list, item.text, line, []any{old}, []any{changed}, !indentsSequences(item.node))
	if inserted && decodesTo(written, []any{changed}) {
		return written, true, nil
	}
	list, unindented, ok := item.parse()
	if !ok {
		return nil, false, nil
	}
	walkNodes(list, func(n *yaml.Node) { n.Line += item.line }) // for errors
	written, err = replaceYAML(list, unindented, []any{old}, []any{changed})
	return indentLines(written, item.indent), true, err
}

// unindent removes indent spaces from the start of each line. It returns false
// if a line that is not blank has fewer.
func unindent(text []byte, indent int) ([]byte, bool) {
	prefix := bytes.Repeat([]byte(" "), indent)
	out := make([]byte, 0, len(text))
	for _, line := range splitLines(text) {
		rest, ok := bytes.CutPrefix(line, prefix)
		if !ok {
			if rest = bytes.TrimLeft(line, " "); len(bytes.TrimSpace(rest)) > 0 {
				return nil, false
			}
		}
		out = append(out, rest...)
	}
	return out, true
}

// indentLines adds indent spaces to the start of each line that is not blank.
func indentLines(text []byte, indent int) []byte {
	prefix := bytes.Repeat([]byte(" "), indent)
	var out []byte
	for _, line := range splitLines(text) {
		if len(bytes.TrimSpace(line)) > 0 {
			out = append(out, prefix...)
		}
		out = append(out, line...)
	}
	return out
}
