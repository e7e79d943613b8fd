package k8s

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"strings"
)

// podTemplatePaths maps each kind that Manifest injects into, with its API
// group, to the path of its pod template. A kind without a group is one of
// workloadGroups.
var podTemplatePaths = map[string][]string{
	"Pod":                   {},
	"PodTemplate":           {"template"},
	"Deployment":            {"spec", "template"},
	"ReplicaSet":            {"spec", "template"},
	"StatefulSet":           {"spec", "template"},
	"DaemonSet":             {"spec", "template"},
	"ReplicationController": {"spec", "template"},
	"Job":                   {"spec", "template"},
	"CronJob":               {"spec", "jobTemplate", "spec", "template"},

	"Rollout.argoproj.io":                {"spec", "template"},
	"CloneSet.apps.kruise.io":            {"spec", "template"},
	"StatefulSet.apps.kruise.io":         {"spec", "template"},
	"DaemonSet.apps.kruise.io":           {"spec", "template"},
	"BroadcastJob.apps.kruise.io":        {"spec", "template"},
	"Service.serving.knative.dev":        {"spec", "template"},
	"DeploymentConfig.apps.openshift.io": {"spec", "template"},
}

// workloadGroups are the API groups of the kinds in podTemplatePaths that have
// none there; the core group is empty.
var workloadGroups = []string{"", "apps", "batch", "extensions"}

// podTemplatePath returns the path of the pod template in an object of this kind
// and API version. It returns false for a kind that Manifest does not know. An
// object without an API version is one of workloadGroups.
func podTemplatePath(kind, apiVersion string) ([]string, bool) {
	group, _, grouped := strings.Cut(apiVersion, "/")
	if !grouped {
		group = ""
	}
	if slices.Contains(workloadGroups, group) {
		path, ok := podTemplatePaths[kind]
		return path, ok
	}
	path, ok := podTemplatePaths[kind+"."+group]
	return path, ok
}

// Manifest injects the sidecar into every pod and pod template of a manifest,
// which is a stream of YAML documents or of JSON objects; Lists are searched
// too. It treats each pod as if its namespace were labelled, so that only the
// pod's own label turns injection off.
//
// Documents that do not change are copied byte for byte. The others get the
// sidecar inserted into their text, in the layout of the place. If more has to be
// done than to insert, as when a value has to be replaced, a document or the item
// of a List is encoded again, and its order, in YAML also comments and spacing,
// are kept where possible. Injecting the output again does not change it. out may
// share the memory of in.
//
// skipped names each object that can have no sidecar, and says why: those of a
// kind that is not known, too, if their pods have a label or an annotation of
// sluice, and documents that cannot be read but do not mention sluice. If any
// object is refused, or another document cannot be read, out is nil and err says
// what is wrong and where; it joins the errors of all refused objects. Manifest
// is safe for concurrent use.
func Manifest(in []byte, o Options) (out []byte, skipped []string, err error) {
	m := injector{options: o}
	documents, injectDocument := splitDocuments(in), injectYAML
	if objects, ok := splitJSON(in); ok {
		documents, injectDocument = objects, injectJSON
	}
	parts := make([][]byte, 0, len(documents))
	for i, text := range documents {
		out, err := injectDocument(text, &m)
		if errors.As(err, new(unreadableError)) && !bytes.Contains(text, []byte(namePrefix)) {
			m.skipped = append(m.skipped, fmt.Sprintf("document %d: copied as it is, since it cannot be read: %v", i+1, err))
			out, err = text, nil
		}
		if err != nil {
			return nil, m.skipped, fmt.Errorf("document %d: %w", i+1, err)
		}
		parts = append(parts, out)
	}
	if len(m.refused) > 0 {
		return nil, m.skipped, errors.Join(m.refused...)
	}
	if len(parts) == 1 { // a large List is not copied once more
		return parts[0], m.skipped, nil
	}
	return slices.Concat(parts...), m.skipped, nil
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
		apiVersion, _ := o["apiVersion"].(string)
		return withField(o, "items", m.injectItems(items, strings.TrimSuffix(kind, "List"), apiVersion))
	}
	apiVersion, _ := o["apiVersion"].(string)
	path, ok := podTemplatePath(kind, apiVersion)
	where := prefix + kind + " " + name
	if !ok {
		if asksForSidecar(v) {
			m.skipped = append(m.skipped, fmt.Sprintf("%s: pods of this kind (apiVersion %s) are injected by the webhook only",
				where, quote(apiVersion)))
		}
		return v
	}
	pod := o
	for _, field := range path {
		pod = objectField(pod, field)
	}
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

// injectItems returns the items of a List of objects of this kind and API
// version after injection. Items of a DeploymentList, for example, need not say
// theirs.
func (m *injector) injectItems(items []any, kind, apiVersion string) []any {
	items = slices.Clone(items)
	for i, item := range items {
		items[i] = m.injectItem(item, kind, apiVersion, i)
	}
	return items
}

// injectItem is injectItems for the i-th item.
func (m *injector) injectItem(v any, kind, apiVersion string, i int) any {
	prefix := fmt.Sprintf("item %d: ", i+1)
	item, _ := v.(object)
	if _, typed := item["kind"]; item == nil || typed {
		return m.injectObject(v, prefix)
	}
	injected := m.injectObject(merged(object{"kind": kind, "apiVersion": apiVersion}, item), prefix).(object)
	delete(injected, "kind")
	if _, versioned := item["apiVersion"]; !versioned {
		delete(injected, "apiVersion")
	}
	return injected
}

// asksForSidecar reports whether a value contains a pod or pod template with a
// label or an annotation of sluice.
func asksForSidecar(v any) bool {
	switch v := v.(type) {
	case []any:
		return slices.ContainsFunc(v, asksForSidecar)
	case object:
		if len(listField(objectField(v, "spec"), "containers")) > 0 {
			metadata := objectField(v, "metadata")
			for _, field := range []string{"labels", "annotations"} {
				for name := range objectField(metadata, field) {
					if strings.HasPrefix(name, namePrefix) {
						return true
					}
				}
			}
		}
		for _, field := range v {
			if asksForSidecar(field) {
				return true
			}
		}
	}
	return false
}

// withFieldAt returns a copy of o in which the field at path has another value.
func withFieldAt(o object, path []string, value object) object {
	if len(path) == 0 {
		return value
	}
	return withField(o, path[0], withFieldAt(objectField(o, path[0]), path[1:], value))
}
