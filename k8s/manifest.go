package k8s

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"reflect"
	"regexp"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"
)

// groups are the API groups of the kinds in templates, the core's empty one among them: another group's Job is none of these.
var workloadGroups = []string{"", "apps", "batch", "extensions", "argoproj.io"}

// podTemplatePaths say where a kind has its pod template. What is not here, and no list, has none.
var podTemplatePaths = map[string][]string{
	"Pod":                   {},
	"PodTemplate":           {"template"},
	"Deployment":            {"spec", "template"},
	"ReplicaSet":            {"spec", "template"},
	"StatefulSet":           {"spec", "template"},
	"DaemonSet":             {"spec", "template"},
	"ReplicationController": {"spec", "template"},
	"Rollout":               {"spec", "template"}, // Argo's
	"Job":                   {"spec", "template"},
	"CronJob":               {"spec", "jobTemplate", "spec", "template"},
}

// Manifest injects into every pod template of a manifest: YAML, of any number of documents, or JSON; Lists too. It counts as labelled,
// so that only a pod's own label can opt out. Documents that do not change come out byte for byte; in others comments and order stay.
// skipped says where nothing was injected, and why; the error every refusal.
func Manifest(in []byte, o Options) (out []byte, skipped []string, err error) {
	var mistakes []error
	inject := func(root any) any {
		return injectObject(root, "", o, func(s string) { skipped = append(skipped, s) }, func(err error) { mistakes = append(mistakes, err) })
	}
	if objects, ok := splitJSON(in); ok {
		var b bytes.Buffer
		for _, text := range objects {
			out, err := injectJSON(text, inject)
			if err != nil {
				return nil, skipped, err
			}
			b.Write(out)
		}
		if len(mistakes) > 0 {
			return nil, skipped, errors.Join(mistakes...)
		}
		return b.Bytes(), skipped, nil
	}
	var b bytes.Buffer
	for i, document := range splitDocuments(in) {
		directives := directivesPattern.Find(document)
		body := document[len(directives):]
		d := yaml.NewDecoder(bytes.NewReader(body))
		var node yaml.Node
		if err := d.Decode(&node); errors.Is(err, io.EOF) {
			b.Write(document)
			continue
		} else if err != nil {
			return nil, nil, fmt.Errorf("document %d: %w", i+1, err)
		}
		if !errors.Is(d.Decode(new(yaml.Node)), io.EOF) {
			return nil, nil, fmt.Errorf("document %d: another begins within it without a line ---, as after a line ...; begin each with ---", i+1)
		}
		if err := checkKeys(&node); err != nil {
			return nil, nil, fmt.Errorf("document %d: %w", i+1, err)
		}
		var root any
		if err := node.Decode(&root); err != nil {
			return nil, nil, fmt.Errorf("document %d: %w", i+1, err)
		}
		root = stringifyKeys(root)
		changed := inject(root)
		if reflect.DeepEqual(root, changed) {
			b.Write(document)
			continue
		}
		compact := !indentsSequences(&node) // as it was read
		if err := mergeNode(&node, root, changed); err != nil {
			return nil, nil, fmt.Errorf("document %d: %w", i+1, err)
		}
		written, err := writeYAML(&node, changed, compact, body)
		if err != nil {
			return nil, nil, fmt.Errorf("document %d: %w", i+1, err)
		}
		b.Write(directives)
		if bytes.HasPrefix(body, []byte("---")) {
			written = append([]byte("---\n"), written...)
		}
		if bytes.Contains(body, []byte("\r\n")) {
			written = bytes.ReplaceAll(written, []byte("\n"), []byte("\r\n"))
		}
		b.Write(written)
	}
	if len(mistakes) > 0 {
		return nil, skipped, errors.Join(mistakes...)
	}
	return b.Bytes(), skipped, nil
}

// checkKeys reports the first key that stands twice in a mapping. yaml.v3 would
// report each pair of equal ones, in memory that grows with their square.
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
			if line, twice := first[key{k.Kind, k.Value}]; twice {
				err = fmt.Errorf("line %d: mapping key %s already defined at line %d", k.Line, quote(k.Value), line)
				return
			}
			first[key{k.Kind, k.Value}] = k.Line
		}
	})
	return err
}

// directives are the lines such as %YAML 1.2 that a document may have before the --- that begins it, with the comments among them.
var directivesPattern = regexp.MustCompile(`^([ \t]*(#[^\n]*)?\r?\n)*%[^\n]*\n((%[^\n]*|[ \t]*(#[^\n]*)?)\r?\n)*`)

// writeYAML writes a node, which has to say changed, with the spacing of what it was read from.
func writeYAML(node *yaml.Node, changed any, compact bool, like []byte) ([]byte, error) {
	says := func(text []byte) bool {
		var back any
		return yaml.Unmarshal(text, &back) == nil && equalJSON(stringifyKeys(back), changed)
	}
	// The encoder has its faults, so that what it writes is read again. Of a folded scalar's lines it gets some wrong: it stays a block.
	for _, plainer := range []func(*yaml.Node){func(*yaml.Node) {}, func(n *yaml.Node) {
		if n.Style&yaml.FoldedStyle != 0 {
			n.Style = n.Style&^yaml.FoldedStyle | yaml.LiteralStyle
		}
	}} {
		walkNodes(node, func(n *yaml.Node) {
			if n.Tag == "!!merge" { // it would be written
				n.Tag = ""
			}
			plainer(n)
		})
		var b bytes.Buffer
		e := yaml.NewEncoder(&b)
		e.SetIndent(2)
		if compact {
			e.CompactSeqIndent()
		}
		if err := errors.Join(e.Encode(node), e.Close()); err != nil {
			return nil, err
		}
		if text := restoreSpacing(b.Bytes(), like); says(text) {
			return text, nil
		}
		if says(b.Bytes()) {
			return b.Bytes(), nil
		}
	}
	return nil, errors.New("it cannot be written with the sidecar without changing something else; write it more plainly")
}

// indented says that a list, the first in a node that is below its key, is further in than the key.
func indentsSequences(node *yaml.Node) bool {
	is, decided := false, false
	walkNodes(node, func(n *yaml.Node) {
		for i := 1; n.Kind == yaml.MappingNode && i < len(n.Content) && !decided; i += 2 {
			if key, v := n.Content[i-1], n.Content[i]; v.Kind == yaml.SequenceNode && v.Style&yaml.FlowStyle == 0 && v.Line > key.Line {
				is, decided = v.Column > key.Column, true
			}
		}
	})
	return is
}

func walkNodes(node *yaml.Node, each func(*yaml.Node)) {
	each(node)
	for _, n := range node.Content {
		walkNodes(n, each)
	}
}

// stringKeys is a value with every mapping's keys texts, as they are in JSON.
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

// documents cuts a stream before each line that begins a document, directives before it included.
func splitDocuments(in []byte) [][]byte {
	var all [][]byte
	start := 0
	for at := 0; at < len(in); {
		end := len(in)
		if i := bytes.IndexByte(in[at:], '\n'); i >= 0 {
			end = at + i + 1
		}
		if line := strings.TrimRight(string(in[at:end]), "\r\n"); at > start && (line == "---" || strings.HasPrefix(line, "--- ") || strings.HasPrefix(line, "---\t")) && len(directivesPattern.Find(in[start:at])) < at-start {
			all = append(all, in[start:at])
			start = at
		}
		at = end
	}
	return append(all, in[start:])
}

// walk returns what becomes of an object and all that it bears.
func injectObject(root any, where string, o Options, skip func(string), refuse func(error)) any {
	top, _ := root.(object)
	kind, _ := top["kind"].(string)
	metadata := objectField(top, "metadata")
	name, _ := metadata["name"].(string)
	if name == "" {
		generate, _ := metadata["generateName"].(string)
		name = strings.TrimRight(generate, "-")
	}
	where += kind + " " + name
	if items, ok := top["items"].([]any); ok && strings.HasSuffix(kind, "List") {
		items = slices.Clone(items)
		for i := range items {
			item, _ := items[i].(object)
			if _, typed := item["kind"]; item != nil && !typed { // a DeploymentList's need not say what they are
				typed := object{"kind": strings.TrimSuffix(kind, "List")}
				for k, v := range item {
					typed[k] = v
				}
				done := injectObject(typed, fmt.Sprintf("item %d: ", i+1), o, skip, refuse).(object)
				delete(done, "kind")
				items[i] = done
				continue
			}
			items[i] = injectObject(items[i], fmt.Sprintf("item %d: ", i+1), o, skip, refuse)
		}
		return withField(top, "items", items)
	}
	path, ok := podTemplatePaths[kind]
	version, _ := top["apiVersion"].(string)
	group, _, hasGroup := strings.Cut(version, "/")
	if !ok || hasGroup && !slices.Contains(workloadGroups, group) {
		return root
	}
	if o.Workload = name; name == "" {
		o.Workload = strings.ToLower(kind)
	}
	if kind == "Job" {
		o.Workload = cronJobName(name)
	}
	o.Namespace, _ = metadata["namespace"].(string)
	pod := top
	for _, p := range path {
		pod = objectField(pod, p)
	}
	if pod == nil && kind == "Rollout" && objectField(top, "spec")["workloadRef"] != nil { // it has its pods of a Deployment
		return root
	}
	if pod == nil {
		refuse(fmt.Errorf("%s: it has no %s", where, strings.Join(path, ".")))
		return root
	}
	injected, skipped, err := Inject(pod, o)
	if err != nil {
		refuse(fmt.Errorf("%s: %w", where, err))
		return root
	}
	if skipped != "" {
		skip(where + ": " + skipped)
	}
	return withFieldAt(top, path, injected)
}

func withFieldAt(o object, path []string, value object) object {
	if len(path) == 0 {
		return value
	}
	return withField(o, path[0], withFieldAt(objectField(o, path[0]), path[1:], value))
}

// with is a copy of an object with another field.
func withField(o object, name string, value any) object {
	out := make(object, len(o))
	for k, v := range o {
		out[k] = v
	}
	out[name] = value
	return out
}

// merge makes a node, which says old, say changed, and touches nothing that stays.
func mergeNode(node *yaml.Node, old, changed any) error {
	if reflect.DeepEqual(old, changed) {
		return nil
	}
	if node.Anchor != "" { // an alias elsewhere would change with it
		return fmt.Errorf("line %d: the anchor &%s stands where the sidecar is added; write out what refers to it", node.Line, node.Anchor)
	}
	switch node.Kind {
	case yaml.DocumentNode:
		return mergeNode(node.Content[0], old, changed)
	case yaml.AliasNode: // what is written once stands for others too, which must not change with it
		fresh, err := newNode(changed)
		if err == nil {
			*node = *fresh
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
	fresh, err := newNode(changed)
	if err != nil {
		return err
	}
	fresh.HeadComment, fresh.LineComment, fresh.FootComment = node.HeadComment, node.LineComment, node.FootComment
	*node = *fresh
	return nil
}

// fresh is a node that says v.
func newNode(v any) (*yaml.Node, error) {
	text, err := json.Marshal(v) // yaml's own way makes texts of JSON's numbers
	if err != nil {
		return nil, err
	}
	return parseJSON(text)
}

func mergeMapping(node *yaml.Node, old, changed object) error {
	for i := 0; i+1 < len(node.Content); i += 2 {
		key := node.Content[i].Value
		if v, ok := changed[key]; ok {
			if err := mergeNode(node.Content[i+1], old[key], v); err != nil {
				return err
			}
		} else if _, was := old[key]; was {
			node.Content = slices.Delete(node.Content, i, i+2)
			i -= 2
		}
	}
	there := map[string]bool{}
	for i := 0; i+1 < len(node.Content); i += 2 {
		there[node.Content[i].Value] = true
	}
	var added []string
	for key := range changed {
		if !there[key] && !reflect.DeepEqual(old[key], changed[key]) {
			added = append(added, key)
		}
	}
	slices.Sort(added)
	for _, key := range added {
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

// mergeList finds the old elements again: those that are the same, else by their names, which may stand several times as those of mounts
// do, else, of a list whose elements have none, by their places.
func mergeSequence(node *yaml.Node, old, changed []any) error {
	used := make([]bool, len(old))
	find := func(is func(i int) bool) int {
		for i := range old {
			if !used[i] && is(i) {
				used[i] = true
				return i
			}
		}
		return -1
	}
	from := make([]int, len(changed))
	for at, v := range changed { // at its own place first: a list may have thousands, of which few change
		if from[at] = -1; at < len(old) && reflect.DeepEqual(old[at], v) {
			from[at], used[at] = at, true
		}
	}
	// What has no name, in a list of the same length, is found by its place.
	byPlace := func(v any) bool {
		o, _ := v.(object)
		_, ok := o["name"].(string)
		return !ok && len(old) == len(changed)
	}
	for at, v := range changed {
		if from[at] < 0 && !byPlace(v) {
			from[at] = find(func(i int) bool { return reflect.DeepEqual(old[i], v) })
		}
	}
	for at, v := range changed {
		if from[at] >= 0 {
			continue
		}
		o, _ := v.(object)
		if name, ok := o["name"].(string); ok {
			from[at] = find(func(i int) bool { o, _ := old[i].(object); return o["name"] == name })
		} else if byPlace(v) && !used[at] {
			from[at], used[at] = at, true
		}
	}
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
