package k8s

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"reflect"
	"slices"

	"go.yaml.in/yaml/v3"
)

// mergeNode changes a node whose value is old so that its value is changed. It
// leaves nodes whose value stays the same as they are, with their comments.
func mergeNode(node *yaml.Node, old, changed any) error {
	if reflect.DeepEqual(old, changed) {
		return nil
	}
	if node.Anchor != "" { // its aliases elsewhere would change as well
		return fmt.Errorf("line %d: cannot add the sidecar to the value of anchor &%s: "+
			"write out the value instead of each alias", node.Line, node.Anchor)
	}
	switch node.Kind {
	case yaml.DocumentNode:
		return mergeNode(node.Content[0], old, changed)
	case yaml.AliasNode:
		// The anchor's value has to stay the same, so that the alias becomes a
		// value of its own.
		value, err := newNode(changed)
		if err == nil {
			*node = *value
		}
		return err
	}
	switch c := changed.(type) {
	case object:
		if o, ok := old.(object); ok && node.Kind == yaml.MappingNode {
			return mergeMapping(node, o, c)
		}
	case []any:
		if o, ok := old.([]any); ok && node.Kind == yaml.SequenceNode {
			return mergeSequence(node, o, c)
		}
	}
	value, err := newNode(changed)
	if err != nil {
		return err
	}
	value.HeadComment, value.LineComment, value.FootComment = node.HeadComment, node.LineComment, node.FootComment
	*node = *value
	return nil
}

// newNode returns a node whose value is v.
func newNode(v any) (*yaml.Node, error) {
	switch v := v.(type) {
	case string:
		return stringNode(v)
	case []any:
		node := &yaml.Node{Kind: yaml.SequenceNode, Tag: "!!seq"}
		for _, element := range v {
			n, err := newNode(element)
			if err != nil {
				return nil, err
			}
			node.Content = append(node.Content, n)
		}
		return node, nil
	case object:
		node := &yaml.Node{Kind: yaml.MappingNode, Tag: "!!map"}
		for _, name := range slices.Sorted(maps.Keys(v)) {
			key, errKey := stringNode(name)
			value, errValue := newNode(v[name])
			if err := errors.Join(errKey, errValue); err != nil {
				return nil, err
			}
			node.Content = append(node.Content, key, value)
		}
		return node, nil
	}
	text, err := json.Marshal(v) // yaml.v3 would encode a json.Number as a string
	if err != nil {
		return nil, err
	}
	if bytes.IndexByte([]byte(`"[{`), text[0]) < 0 {
		return literalNode(string(text)), nil
	}
	return parseJSON(text)
}

// mergeMapping is mergeNode for a mapping. New fields are appended in the order
// of their names.
func mergeMapping(node *yaml.Node, old, changed object) error {
	for i := 0; i+1 < len(node.Content); i += 2 {
		key := node.Content[i].Value
		if v, ok := changed[key]; ok {
			if err := mergeNode(node.Content[i+1], old[key], v); err != nil {
				return err
			}
		} else if _, removed := old[key]; removed {
			node.Content = slices.Delete(node.Content, i, i+2)
			i -= 2
		}
	}
	for _, key := range addedFields(node, old, changed) {
		k, errKey := newNode(key)
		v, errValue := newNode(changed[key])
		if err := errors.Join(errKey, errValue); err != nil {
			return err
		}
		if len(node.Content) == 0 {
			node.Style &^= yaml.FlowStyle
		}
		node.Content = append(node.Content, k, v)
	}
	return nil
}

// addedFields returns the names of the fields that a mapping gets, in order.
func addedFields(node *yaml.Node, old, changed object) []string {
	present := map[string]bool{}
	for i := 0; i+1 < len(node.Content); i += 2 {
		present[node.Content[i].Value] = true
	}
	var added []string
	for key := range changed {
		// A field that is not present and does not change is of a merge key.
		if !present[key] && !reflect.DeepEqual(old[key], changed[key]) {
			added = append(added, key)
		}
	}
	slices.Sort(added)
	return added
}

// mergeSequence is mergeNode for a sequence.
func mergeSequence(node *yaml.Node, old, changed []any) error {
	from := matchElements(old, changed)
	content := make([]*yaml.Node, 0, len(changed))
	for at, v := range changed {
		var element *yaml.Node
		var err error
		if i := from[at]; i >= 0 {
			element = node.Content[i]
			err = mergeNode(element, old[i], v)
		} else {
			element, err = newNode(v)
		}
		if err != nil {
			return err
		}
		content = append(content, element)
	}
	if len(node.Content) == 0 {
		node.Style &^= yaml.FlowStyle
	}
	node.Content = content
	return nil
}

// matchElements returns for each element of changed the index of the same
// element in old, or -1 if it is new. An element is first looked for by
// its value, then by its name, which several may have, as two mounts of a
// volume do. If the number of elements is the same, those without a name are
// matched by position.
func matchElements(old, changed []any) []int {
	used := make([]bool, len(old))
	find := func(match func(i int) bool) int {
		for i := range old {
			if !used[i] && match(i) {
				used[i] = true
				return i
			}
		}
		return -1
	}
	from := make([]int, len(changed))
	// Most elements have not moved. Looking there first makes the search linear
	// for a list of thousands of elements.
	for at, v := range changed {
		if from[at] = -1; at < len(old) && reflect.DeepEqual(old[at], v) {
			from[at], used[at] = at, true
		}
	}
	byPosition := func(v any) bool {
		o, _ := v.(object)
		_, named := o["name"].(string)
		return !named && len(old) == len(changed)
	}
	for at, v := range changed {
		if from[at] < 0 && !byPosition(v) {
			from[at] = find(func(i int) bool { return reflect.DeepEqual(old[i], v) })
		}
	}
	for at, v := range changed {
		if from[at] >= 0 {
			continue
		}
		o, _ := v.(object)
		if name, ok := o["name"].(string); ok {
			from[at] = find(func(i int) bool { return hasName(old[i], name) })
		} else if byPosition(v) && !used[at] {
			from[at], used[at] = at, true
		}
	}
	return from
}
