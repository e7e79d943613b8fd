package k8s

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"strings"
)

// podTemplatePaths maps each kind that Manifest injects into to the path of its
// pod template. Other kinds, except lists of these, have no pods.
var podTemplatePaths = map[string][]string{
	"Pod":                   {},
	"PodTemplate":           {"template"},
	"Deployment":            {"spec", "template"},
	"ReplicaSet":            {"spec", "template"},
	"StatefulSet":           {"spec", "template"},
	"DaemonSet":             {"spec", "template"},
	"ReplicationController": {"spec", "template"},
	"Rollout":               {"spec", "template"}, // Argo Rollouts
	"Job":                   {"spec", "template"},
	"CronJob":               {"spec", "jobTemplate", "spec", "template"},
}

// workloadGroups are the API groups of the kinds in podTemplatePaths; the core
// group is empty. A Job of another group, for example, is another kind.
var workloadGroups = []string{"", "apps", "batch", "extensions", "argoproj.io"}

// Manifest injects the sidecar into every pod and pod template of a manifest,
// which is a stream of YAML documents or of JSON objects; Lists are searched
// too. It treats each pod as if its namespace were labelled, so that only the
// pod's own label turns injection off.
//
// Documents that do not change are copied byte for byte. In the others
// comments, order and spacing are kept where possible. Injecting the output
// again does not change it.
//
// skipped names each object that can have no sidecar, and says why. If any
// object is refused, or the manifest cannot be parsed, out is nil and err says
// what is wrong and where; it joins the errors of all refused objects. Manifest
// is safe for concurrent use.
func Manifest(in []byte, o Options) (out []byte, skipped []string, err error) {
	m := injector{options: o}
	var b bytes.Buffer
	if objects, ok := splitJSON(in); ok {
		for _, text := range objects {
			out, err := injectJSON(text, m.inject)
			if err != nil {
				return nil, m.skipped, err
			}
			b.Write(out)
		}
	} else {
		for i, text := range splitDocuments(in) {
			out, err := injectYAML(text, m.inject)
			if err != nil {
				return nil, nil, fmt.Errorf("document %d: %w", i+1, err)
			}
			b.Write(out)
		}
	}
	if len(m.refused) > 0 {
		return nil, m.skipped, errors.Join(m.refused...)
	}
	return b.Bytes(), m.skipped, nil
}

// injector injects with these options, and collects what happens to the objects
// of a manifest.
type injector struct {
	options Options
	skipped []string
	refused []error
}

// inject returns a copy of a decoded document with the sidecar added to each of
// its pods, or the document itself if nothing changes.
func (m *injector) inject(document any) any { return m.injectObject(document, "") }

// injectObject is inject for an object that messages locate by prefix.
func (m *injector) injectObject(v any, prefix string) any {
	o, _ := v.(object)
	kind, _ := o["kind"].(string)
	metadata := objectField(o, "metadata")
	name, _ := metadata["name"].(string)
	if name == "" {
		generateName, _ := metadata["generateName"].(string)
		name = strings.TrimRight(generateName, "-")
	}
	if items, ok := o["items"].([]any); ok && strings.HasSuffix(kind, "List") {
		return withField(o, "items", m.injectItems(items, strings.TrimSuffix(kind, "List")))
	}
	path, ok := podTemplatePaths[kind]
	apiVersion, _ := o["apiVersion"].(string)
	group, _, hasGroup := strings.Cut(apiVersion, "/")
	if !ok || hasGroup && !slices.Contains(workloadGroups, group) {
		return v
	}
	pod := o
	for _, field := range path {
		pod = objectField(pod, field)
	}
	where := prefix + kind + " " + name
	if pod == nil {
		// A Rollout may refer to a Deployment for its pods.
		if kind != "Rollout" || objectField(o, "spec")["workloadRef"] == nil {
			m.refused = append(m.refused, fmt.Errorf("%s: missing %s", where, strings.Join(path, ".")))
		}
		return v
	}
	options := m.options
	if options.Workload = name; name == "" {
		options.Workload = strings.ToLower(kind)
	}
	if kind == "Job" {
		options.Workload = cronJobName(name)
	}
	options.Namespace, _ = metadata["namespace"].(string)
	injected, skipped, err := Inject(pod, options)
	if err != nil {
		m.refused = append(m.refused, fmt.Errorf("%s: %w", where, err))
		return v
	}
	if skipped != "" {
		m.skipped = append(m.skipped, where+": "+skipped)
	}
	return withFieldAt(o, path, injected)
}

// injectItems returns the items of a List of objects of this kind after
// injection. Items of a DeploymentList, for example, need not say their kind.
func (m *injector) injectItems(items []any, kind string) []any {
	items = slices.Clone(items)
	for i := range items {
		prefix := fmt.Sprintf("item %d: ", i+1)
		item, _ := items[i].(object)
		if _, typed := item["kind"]; item == nil || typed {
			items[i] = m.injectObject(items[i], prefix)
			continue
		}
		injected := m.injectObject(merged(object{"kind": kind}, item), prefix).(object)
		delete(injected, "kind")
		items[i] = injected
	}
	return items
}

// withFieldAt returns a copy of o in which the field at path has another value.
func withFieldAt(o object, path []string, value object) object {
	if len(path) == 0 {
		return value
	}
	return withField(o, path[0], withFieldAt(objectField(o, path[0]), path[1:], value))
}
