package k8s

import (
	"strings"
	"testing"
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

func TestManifestJSON(t *testing.T) {
	in := `{"kind":"Pod","metadata":{"name":"x","annotations":{"sluice.dev/in-process":"true"}},"spec":{"containers":[{"name":"envoy","ports":[{"containerPort":8080}]}]}}`
	out, _, err := Manifest([]byte(in), options)
	if err != nil || !strings.Contains(string(out), `"containerPort": 8080`) || !strings.Contains(string(out), `"name": "sluice"`) {
		t.Errorf("%v %s", err, out)
	}
}

// Another group's kind of the same name is none of Kubernetes's own.
func TestManifestGroups(t *testing.T) {
	const job = "apiVersion: batch.volcano.sh/v1alpha1\nkind: Job\nmetadata: {name: x}\nspec: {tasks: []}\n"
	if out, _, err := Manifest([]byte(job), options); err != nil || string(out) != job {
		t.Errorf("%v\n%s", err, out)
	}
}

const onePod = "kind: Pod\nmetadata: {name: a, annotations: {sluice.dev/in-process: \"true\"}}\nspec: {containers: [{name: envoy}]}\n"

// Directives and line ends stay, where something changes and where nothing does.
func TestManifestKeepsItsForm(t *testing.T) {
	for in, begins := range map[string]string{
		"%YAML 1.2\n---\n" + onePod:                             "%YAML 1.2\n---\nkind: Pod\n",
		"# made by a tool\n%YAML 1.2\n# so\n---\n" + onePod:     "# made by a tool\n%YAML 1.2\n# so\n---\nkind: Pod\n",
		"%YAML 1.2\n---\nkind: ConfigMap\n---\n" + onePod:       "%YAML 1.2\n---\nkind: ConfigMap\n---\nkind: Pod\n",
		"---\r\n" + strings.ReplaceAll(onePod, "\n", "\r\n"):    "---\r\nkind: Pod\r\n",
		"a: 1\r\n---\n" + onePod:                                "a: 1\r\n---\nkind: Pod\nmeta",
		"---\n---\n" + onePod:                                   "---\n---\nkind: Pod\n",
		"%YAML 1.2\r\n---\r\nkind: ConfigMap\r\n---\n" + onePod: "%YAML 1.2\r\n---\r\nkind: ConfigMap\r\n---\nkind: Pod\n",
	} {
		out, _, err := Manifest([]byte(in), options)
		if err != nil || !strings.HasPrefix(string(out), begins) || !strings.Contains(string(out), "name: sluice") {
			t.Errorf("%q: %v\n%q", in, err, out)
			continue
		}
		if strings.Contains(in, "Pod\r\n") && strings.Count(string(out), "\r\n") != strings.Count(string(out), "\n") {
			t.Errorf("%q", out)
		}
		if again, _, err := Manifest(out, options); err != nil || string(again) != string(out) {
			t.Errorf("%v\nonce:\n%q\ntwice:\n%q", err, out, again)
		}
	}
}

// Whatever the text, it is refused or comes out as a manifest in which nothing is left to do.
func FuzzManifest(f *testing.F) {
	for _, text := range []string{manifest, onePod, "%YAML 1.2\n---\n" + onePod, "{\"kind\":\"Pod\"}", "a: &a [*a]", "---\n...\n", "- \n-\t- {", "kind: List\nitems: [1, {kind: Pod}]"} {
		f.Add([]byte(text))
	}
	f.Fuzz(func(t *testing.T, in []byte) {
		out, _, err := Manifest(in, options)
		if err != nil {
			if len(out) > 0 {
				t.Fatalf("%v, and yet %q", err, out)
			}
			return
		}
		again, _, err := Manifest(out, options)
		if err != nil || string(again) != string(out) {
			t.Fatalf("%v\nin:    %q\nonce:  %q\ntwice: %q", err, in, out, again)
		}
	})
}
