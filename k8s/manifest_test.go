package k8s

import (
	"bytes"
	"encoding/json"
	"errors"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.yaml.in/yaml/v3"
)

// Documents stay apart, whatever follows the line between them.
func TestManifestSeparator(t *testing.T) {
	const one = "kind: Pod\nmetadata: {name: a, annotations: {sluice.dev/in-process: \"true\"}}\nspec: {containers: [{name: envoy}]}\n"
	out, _, err := Manifest([]byte(one+"--- # two\n"+one), options)
	if err != nil || len(documents(out)) != 2 {
		t.Errorf("%v\n%s", err, out)
	}
}

const manifest = `# what stands here stays
apiVersion: v1
kind: ConfigMap
metadata: {name:   limits}   # odd spaces too
data:
    a: "yes"
---
# the shop
apiVersion: apps/v1
kind: Deployment
metadata:
  name: web # its name
  namespace: shop
spec:
  replicas: 2
  template:
    metadata:
      annotations:
        sluice.dev/redis-secret: redis
    spec:
      containers:
      # the proxy
      - name: envoy
        image: e # pinned
---
apiVersion: v1
kind: List
items:
- apiVersion: batch/v1
  kind: CronJob
  metadata: {name: nightly}
  spec: {jobTemplate: {spec: {template: {metadata: {annotations: {sluice.dev/in-process: "true"}}, spec: {containers: [{name: envoy}]}}}}}
- apiVersion: v1
  kind: Pod
  metadata: {name: bare}
  spec: {containers: [{name: app}]}
`

func TestManifest(t *testing.T) {
	out, skipped, err := Manifest([]byte(manifest), options)
	if err != nil {
		t.Fatal(err)
	}
	text := string(out)
	first, _, _ := strings.Cut(manifest, "---\n")
	if !strings.HasPrefix(text, first+"---\n# the shop\napiVersion: apps/v1\nkind: Deployment\nmetadata:\n  name: web # its name\n") {
		t.Errorf("what does not change has changed:\n%s", text)
	}
	for _, want := range []string{"# the proxy\n", "image: e # pinned", "value: shop/web\n", "$(POD_NAMESPACE)/nightly", "name: envoy"} {
		if !strings.Contains(text, want) {
			t.Errorf("no %q in:\n%s", want, text)
		}
	}
	if len(skipped) != 1 || !strings.HasPrefix(skipped[0], "item 2: Pod bare: no container is named") {
		t.Errorf("skipped: %q", skipped)
	}
	if again, _, err := Manifest(out, options); err != nil || string(again) != text {
		t.Errorf("%v: the second time it changed:\n%s", err, again)
	}
}

// Every kind that bears pods.
func TestManifestKinds(t *testing.T) {
	for kind, path := range templates {
		var text strings.Builder
		text.WriteString("{kind: " + kind + ", metadata: {name: x}, ")
		if len(path) == 0 {
			text.Reset()
			text.WriteString("{kind: Pod, ")
		}
		for _, p := range path {
			text.WriteString(p + ": {")
		}
		text.WriteString(`metadata: {name: x, annotations: {sluice.dev/in-process: "true"}}, spec: {containers: [{name: envoy}]}}` + strings.Repeat("}", len(path)))
		out, _, err := Manifest([]byte(text.String()), options)
		if err != nil || !strings.Contains(string(out), "name: sluice") {
			t.Errorf("%s: %v\n%s\n%s", kind, err, text.String(), out)
		}
	}
}

func TestManifestRefused(t *testing.T) {
	for in, want := range map[string]string{
		"a: [":                              "document 1",
		"kind: ConfigMap\n...\nkind: Pod\n": "document 1: another begins within it",
		"kind: Pod\nmetadata: {name: x, annotations: {sluice.dev/in-process: \"true\"}}\nspec:\n  containers:\n  - name: envoy\n    volumeMounts: &m [{name: a, mountPath: /a}]\n  - {name: app, volumeMounts: *m}\n  volumes: [{name: a, emptyDir: {}}]\n": "line 6: the anchor &m",
		"kind: Pod\nmetadata: {name: x, annotations: {sluice.dev/in-process: \"true\"}}\nspec: {hostNetwork: yes, containers: [{name: envoy}]}\n":                                                                                                           "hostNetwork",
		"kind: Deployment\nmetadata: {name: x}": "Deployment x: it has no spec.template",
		"kind: Pod\nmetadata: {name: x}\nspec: {containers: [{name: envoy}]}\n---\nkind: Pod\nmetadata: {name: y}\nspec: {containers: [{name: envoy}]}": "Pod y: sluice needs a Redis",
	} {
		if out, _, err := Manifest([]byte(in), options); err == nil || !strings.Contains(err.Error(), want) || len(out) > 0 {
			t.Errorf("%q: %v, %q", in, err, out)
		}
	}
}

// JSON comes out as it went in, with the sidecar in its place.
func TestManifestJSON(t *testing.T) {
	const pod = `{
   "kind": "Pod",
   "apiVersion": "v1",
   "metadata": {"name": "x", "annotations": {"z": "<a & b>\u0007\ud83d\ude00", "sluice.dev/in-process": "true"}},
   "spec": {
      "priority": 12345678901234567890, "x": [1.50, 1e3, null, true, {}, []],
      "containers": [{"name": "envoy", "ports": [{"protocol": "TCP", "containerPort": 8080}]}]
   }
}
`
	out, _, err := Manifest([]byte(pod), options)
	if err != nil {
		t.Fatal(err)
	}
	var order []string
	for _, m := range regexp.MustCompile(`(?m)^ {3}(?: {3})?"(\w+)":`).FindAllStringSubmatch(string(out), -1) {
		order = append(order, m[1])
	}
	if want := "kind apiVersion metadata name annotations spec priority x containers initContainers volumes"; strings.Join(order, " ") != want {
		t.Errorf("%s, want %s", order, want)
	}
	for _, want := range []string{"12345678901234567890", "1.50", "1e3", "null", `"<a & b>\u0007😀"`, `"name": "sluice"`, `"containerPort": 9003`, "\n}\n"} {
		if !strings.Contains(string(out), want) {
			t.Errorf("no %s in\n%s", want, out)
		}
	}
	if again, _, err := Manifest(out, options); err != nil || string(again) != string(out) {
		t.Errorf("%v: the second time it changed:\n%s", err, again)
	}
	// It says what YAML's does.
	var fromJSON, fromYAML any
	flow, _, err := Manifest([]byte("---\n"+strings.Replace(pod, `\ud83d\ude00`, "😀", 1)), options) // which YAML cannot say
	if err := errors.Join(err, yaml.Unmarshal(out, &fromJSON), yaml.Unmarshal(flow, &fromYAML)); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(fromYAML, fromJSON); diff != "" {
		t.Errorf("-YAML +JSON:\n%s", diff)
	}
	// On one line too.
	var line bytes.Buffer
	if err := json.Compact(&line, []byte(pod)); err != nil {
		t.Fatal(err)
	}
	if out, _, err := Manifest(line.Bytes(), options); err != nil || bytes.ContainsAny(out, "\n") || !bytes.HasPrefix(out, []byte(`{"kind":"Pod","apiVersion":"v1",`)) {
		t.Errorf("%v\n%s", err, out)
	}
	if _, _, err := Manifest([]byte(`{"kind": "Pod", "spec": {}, "spec": {}}`), options); err == nil || !strings.Contains(err.Error(), `"spec" stands twice`) {
		t.Errorf("%v", err)
	}
}
