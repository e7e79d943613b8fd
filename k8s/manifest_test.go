package k8s

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.yaml.in/yaml/v3"
)

// Documents stay separate, whatever follows --- on its line.
func TestManifestSeparator(t *testing.T) {
	const one = "kind: Pod\nmetadata: {name: a, annotations: {sluice.dev/in-process: \"true\"}}\n" +
		"spec: {containers: [{name: envoy}]}\n"
	out, _, err := Manifest([]byte(one+"--- # two\n"+one), options)
	if err != nil || len(splitDocuments(out)) != 2 {
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
  spec: {jobTemplate: {spec: {template: {metadata: {annotations: {sluice.dev/in-process: "true"}},
    spec: {containers: [{name: envoy}]}}}}}
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
	if !strings.HasPrefix(text, first+"---\n# the shop\napiVersion: apps/v1\nkind: Deployment\nmetadata:\n  name: "+
		"web # its name\n") {
		t.Errorf("what does not change has changed:\n%s", text)
	}
	for _, want := range []string{"# the proxy\n", "image: e # pinned", "value: shop/web\n",
		"$(POD_NAMESPACE)/nightly", "name: envoy"} {
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

// Pods of every supported kind are injected.
func TestManifestKinds(t *testing.T) {
	for kind, path := range podTemplatePaths {
		var text strings.Builder
		kind, group, _ := strings.Cut(kind, ".")
		if group != "" {
			group += "/"
		}
		text.WriteString("{apiVersion: " + group + "v1, kind: " + kind + ", metadata: {name: x}, ")
		if len(path) == 0 {
			text.Reset()
			text.WriteString("{kind: Pod, ")
		}
		for _, p := range path {
			text.WriteString(p + ": {")
		}
		text.WriteString(`metadata: {name: x, annotations: {sluice.dev/in-process: "true"}}, spec: {containers: ` +
			`[{name: envoy}]}}` + strings.Repeat("}", len(path)))
		out, _, err := Manifest([]byte(text.String()), options)
		if err != nil || !strings.Contains(string(out), "name: sluice") {
			t.Errorf("%s: %v\n%s\n%s", kind, err, text.String(), out)
		}
	}
}

func TestManifestRefused(t *testing.T) {
	for in, want := range map[string]string{
		"a: [ # sluice.dev/inject": "document 1",
		"kind: ConfigMap\n...\nkind: Pod\nmetadata: {labels: {sluice.dev/inject: enabled}}\n": "document 1: contains a " +
			"second document",
		"kind: Pod\nmetadata: {name: x, annotations: {sluice.dev/in-process: \"true\"}}\nspec:\n  containers:\n" +
			"  - name: envoy\n    volumeMounts: &m [{name: a, mountPath: /a}]\n  - {name: app, volumeMounts: *m}\n" +
			"  volumes: [{name: a, emptyDir: {}}]\n": "line 6: cannot add the sidecar to the value of anchor &m",
		"kind: Pod\nmetadata: {name: x, annotations: {sluice.dev/in-process: \"true\"}}\n" +
			"spec: {hostNetwork: yes, containers: [{name: envoy}]}\n": "hostNetwork",
		"kind: Deployment\nmetadata: {name: x}": "Deployment x: missing spec.template",
		"kind: Pod\nmetadata: {name: x}\nspec: {containers: [{name: envoy}]}\n---\nkind: Pod\nmetadata: {name: y}\n" +
			"spec: {containers: [{name: envoy}]}": "Pod y: sluice requires Redis",
	} {
		if out, _, err := Manifest([]byte(in), options); err == nil || !strings.Contains(err.Error(), want) ||
			len(out) > 0 {
			t.Errorf("%q: %v, %q", in, err, out)
		}
	}
}

// JSON is kept byte for byte, and what is added has the layout of its place.
func TestManifestJSON(t *testing.T) {
	const pod = `{
   "kind" : "Pod",
   "apiVersion": "v1",
   "metadata": {"name": "x", "annotations": {"z": "<a & b>\u0007\ud83d\ude00\/", "sluice.dev/in-process": "true"}},
   "spec": {
      "priority": 12345678901234567890,   "x": [1.50, 1e3, null, true, {}, []],
      "containers": [{"name": "envoy", "ports": [{"protocol": "TCP", "containerPort": 8080}]}]
   }
}
`
	out, _, err := Manifest([]byte(pod), options)
	if err != nil {
		t.Fatal(err)
	}
	rest := string(out)
	for _, want := range []string{
		`{
   "kind" : "Pod",
   "apiVersion": "v1",
   "metadata": {"name": "x", "annotations": {"z": "<a & b>\u0007\ud83d\ude00\/", "sluice.dev/in-process": "true"`,
		`, "sluice.dev/injected": "`, `", "sluice.dev/injected-container": "`, `"}},
   "spec": {
      "priority": 12345678901234567890,   "x": [1.50, 1e3, null, true, {}, []],
      "containers": [{"name": "envoy", "ports": [{"protocol": "TCP", "containerPort": 8080}], "volumeMounts": ` +
			`[{"mountPath": "/run/sluice", "name": "sluice-socket", "readOnly": true}]}],
      "initContainers": [
         {
            "args": [
               "run"
            ],
`, `
         }
      ],
      "volumes": [
         {
            "emptyDir": {
               "medium": "Memory"
            },
            "name": "sluice-socket"
         }
      ]
   }
}
`} {
		_, after, found := strings.Cut(rest, want)
		if !found {
			t.Fatalf("no %s in\n%s", want, rest)
		}
		rest = after
	}
	if rest != "" {
		t.Errorf("after the end: %s", rest)
	}
	if again, _, err := Manifest(out, options); err != nil || string(again) != string(out) {
		t.Errorf("%v: the second time it changed:\n%s", err, again)
	}
	// The same pod in YAML has the same result.
	var fromJSON, fromYAML any
	// YAML has no such escape.
	unescape := strings.NewReplacer(`\ud83d\ude00`, "😀", `\/`, "/")
	flow, _, err := Manifest([]byte("---\n"+unescape.Replace(pod)), options)
	if err := errors.Join(err, yaml.Unmarshal([]byte(unescape.Replace(string(out))), &fromJSON),
		yaml.Unmarshal(flow, &fromYAML)); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(fromYAML, fromJSON); diff != "" {
		t.Errorf("-YAML +JSON:\n%s", diff)
	}
	if crlf, _, err := Manifest([]byte(strings.ReplaceAll(pod, "\n", "\r\n")), options); err != nil ||
		string(crlf) != strings.ReplaceAll(string(out), "\n", "\r\n") {
		t.Errorf("%v: with other line ends:\n%q", err, crlf)
	}
	// JSON on a single line stays on one line.
	var line bytes.Buffer
	if err := json.Compact(&line, []byte(pod)); err != nil {
		t.Fatal(err)
	}
	if out, _, err := Manifest(line.Bytes(), options); err != nil || bytes.ContainsAny(out, "\n") ||
		!bytes.HasPrefix(out, []byte(`{"kind":"Pod","apiVersion":"v1",`)) {
		t.Errorf("%v\n%s", err, out)
	}
	if _, _, err := Manifest([]byte(`{"kind": "Pod", "spec": {}, "spec": {"sluice.dev/": 1}}`), options); err == nil ||
		!strings.Contains(err.Error(), `duplicate field "spec"`) {
		t.Errorf("%v", err)
	}
}

// around is the start of a pod's manifest, up to its spec.
const around = "kind: Pod\nmetadata:\n  name: x\n  annotations: {sluice.dev/in-process: \"true\"}\nspec:\n"

// stale is around with the stamp of another version. It has to be replaced, so
// that the document is encoded as a whole.
var stale = strings.Replace(around, `"true"`, `"true", sluice.dev/injected: v0`, 1)

// An injected document differs from what it was by additions only: each of its
// lines is still there, in the same order.
func TestManifestAdds(t *testing.T) {
	for name, in := range map[string]string{
		"lists further in": around + "    containers:\n      - name: envoy\n        args:\n        - a\n" +
			"    tolerations:\n        - operator: Exists\n",
		"long lines": around + "  containers:\n  - name: envoy\n    args:\n    - a b\n      c\n    - >-\n" +
			"      d\n      e\n    - \"f\n      g\"\n",
		"comments": "#a\n" + around + "  containers:\n\n  # the proxy\n  - name: envoy\n    # tty: true\n" +
			"  # hostPID: true\n#b\n\n# c\nstatus: {}\n#d\n",
		"a text like a comment": around + "  containers:\n  - name: envoy\n    args:\n    - |\n      a\n      # b\n#c\n",
		"no newline":            around + "  containers:\n  - name: envoy",
		"a text without a newline": around + "    containers:\n      - name: envoy\n        args:\n        - >2\n" +
			"            a\n          b",
		"dashes of their own lines": around + "  initContainers:\n  # first\n  -\n    # a\n    name: a\n  -\n" +
			"    name: b\n  containers:\n    -\n\n      name: envoy\n    -\n      name: app\n",
		"an end":                "---\n" + around + "  containers:\n  - name: envoy\n...\n",
		"other init containers": around + "  initContainers:\n  # first\n  - name: a\n  containers:\n  - name: envoy\n",
		"istio-proxy": around + "  initContainers:\n  - {name: istio-proxy, restartPolicy: Always}\n  # then\n" +
			"  - name: a\n  containers:\n  - name: app\n",
		"empty values": around + "  volumes: [] # none\n  initContainers:\n  containers:\n  - name: envoy\n" +
			"    volumeMounts: []\n",
		"flow style over lines": around + "  containers: [\n    {name: envoy,  args: [\"]\"]}\n  ]\n" +
			"  volumes: [{\n    name: a\n  }]\n",
		"commas at ends, and comments": around + "  containers: [\n    {name: app}, # ]\n" +
			"    {name: envoy,  args: ['it''s ]',],},\n  ]\n  volumes: [\n    {name: a}, # its own\n  ]\n",
	} {
		for _, in := range []string{in, strings.ReplaceAll(in, "\n", "\r\n"),
			"kind: List\nitems:\n- " + strings.ReplaceAll(strings.TrimPrefix(strings.TrimPrefix(in, "---\n"), "#a\n"),
				"\n", "\n  ") + "\n"} {
			if name == "an end" && strings.HasPrefix(in, "kind") {
				continue
			}
			out, skipped, err := Manifest([]byte(in), options)
			if err != nil || len(skipped) > 0 || !strings.Contains(string(out), "name: sluice") {
				t.Fatalf("%s: %v %q\n%s", name, err, skipped, out)
			}
			rest := string(out)
			for line := range strings.Lines(in) {
				line = strings.TrimRight(line, "\r\n")
				if strings.Contains(line, "annotations: {") || strings.Contains(line, "name: envoy, ") ||
					strings.TrimSpace(line) == "}]" || strings.Contains(line, ": []") {
					continue // it gets more
				}
				_, after, found := strings.Cut(rest, line)
				if !found {
					t.Fatalf("%s: no %q in\n%s", name, line, out)
				}
				rest = after
			}
			if strings.Contains(in, "\r\n") && strings.Count(string(out), "\r\n") != strings.Count(string(out), "\n") {
				t.Errorf("%s: %q", name, out)
			}
			if again, _, err := Manifest(out, options); err != nil || string(again) != string(out) {
				t.Errorf("%s: %v: the second time it changed:\n%s", name, err, again)
			}
		}
	}
}

// Content that does not change stays as it is written.
func TestManifestKeeps(t *testing.T) {
	for name, c := range map[string]struct {
		in   string
		want []string
	}{
		"a List's items": {
			"kind: List\nitems:\n# first\n- kind: Pod # a pod\n  metadata:\n    name: x\n" +
				"    annotations: {sluice.dev/in-process: \"true\"}\n  spec:\n" +
				"    enableServiceLinks: no # YAML 1.1's\n    containers:\n    - name: envoy # the proxy\n" +
				"      tty: yes\n",
			[]string{"# first\n- kind: Pod # a pod\n  metadata:\n    name: x\n",
				"enableServiceLinks: no # YAML 1.1's\n", "- name: envoy # the proxy\n", "tty: yes\n"},
		},
		"mounts of one volume": {
			around + "  containers:\n  - name: envoy\n    volumeMounts:\n" +
				"    - {name: c, mountPath: /a, subPath: a} # one\n    - mountPath: /b # two\n      name: c\n" +
				"      readOnly: yes\n  volumes:\n  - {name: c, configMap: {name: c}}\n",
			[]string{"- {name: c, mountPath: /a, subPath: a} # one\n", "- mountPath: /b # two\n", "readOnly: yes\n",
				"mountPath: /run/sluice\n"},
		},
		"a folded scalar": {
			stale + "  containers:\n  - name: envoy\n    args:\n    - >-\n" +
				"      exec envoy \\\n        --a \\\n        --b\n      and more\n",
			[]string{"- |-\n      exec envoy \\\n        --a \\\n"},
		},
		"a good folded scalar": {stale + "  containers:\n  - name: envoy\n    args:\n    - >-\n      a\n      b\n",
			[]string{"- >-\n      a b\n"}},
		"a text that is a boolean elsewhere": {
			"kind: Pod\nmetadata: {name: x, annotations: {sluice.dev/in-process: \"true\", sluice.dev/domain: " +
				"\"yes\"}}\nspec: {containers: [{name: envoy}]}\n",
			[]string{"name: SLUICE_DOMAIN, value: \"yes\""},
		},
		"spacing": {
			"# one\n\n\nkind: Pod   # two\n\nmetadata:\n  name:  x\n\n  annotations:\n" +
				"    sluice.dev/in-process: \"true\"\nspec:\n\n  containers:\n  # three\n\n  - name: envoy\n" +
				"    args:\n    - |\n      a\n\n       b   c\n\n\n---\nkind: ConfigMap\n",
			[]string{
				"# one\n\n\nkind: Pod   # two\n\nmetadata:\n  name:  x\n\n  annotations:\n" +
					"    sluice.dev/in-process: \"true\"\n    sluice.dev/injected:",
				"\nspec:\n\n  containers:\n  # three\n\n  - name: envoy\n    args:\n    - |\n      a\n\n       b   c\n",
				"name: sluice-socket\n\n\n---\nkind: ConfigMap\n",
			},
		},
		"lists further in": {
			stale + "    containers:\n      - name: envoy\n        args:\n          - a\n    tolerations:\n" +
				"      - operator: Exists\n",
			[]string{"containers:\n    - name: envoy\n      args:\n        - a\n",
				"\n  initContainers:\n    - args:\n        - run\n"},
		},
		"merged mappings": {"base: &base {a: 1}\n" + around +
			"  containers:\n  - name: envoy\n    resources:\n      <<: *base\n", []string{"\n      <<: *base\n"}},
		"a tab after a line": {around + "  containers: [{name: envoy}]\n---\t# two\nkind: Pod # 2\n" +
			"metadata: {name: y, annotations: {sluice.dev/in-process: \"true\"}}\n" +
			"spec: {containers: [{name: envoy}]}\n",
			[]string{"kind: Pod # 2\n"}},
	} {
		t.Run(name, func(t *testing.T) {
			out, skipped, err := Manifest([]byte(c.in), options)
			if err != nil || len(skipped) > 0 || !strings.Contains(string(out), "name: sluice") {
				t.Fatalf("%v %q\n%s", err, skipped, out)
			}
			for _, want := range c.want {
				if !strings.Contains(string(out), want) {
					t.Errorf("no %q in\n%s", want, out)
				}
			}
			if again, _, err := Manifest(out, options); err != nil || string(again) != string(out) {
				t.Errorf("%v: the second time it changed:\n%s", err, again)
			}
		})
	}
}

// What is inserted into JSON has the layout of its place, and all else stays byte
// for byte.
func TestInsertJSON(t *testing.T) {
	for name, c := range map[string]struct{ in, want string }{
		"on one line": {`{"a":[{"b":1}],"c":{"d":""}}`, `{"a":[{"b":1},{"b":2}],"c":{"d":"","e":[3]},"f":{"g":4}}`},
		"on one line with spaces": {`{ "a": [ {"b": 1} ],  "c": {"d": "x,:]}"} }`,
			`{ "a": [ {"b": 1}, {"b": 2} ],  "c": {"d": "x,:]}", "e": [3]},  "f": {"g": 4} }`},
		"over lines": {"{\n\t\"a\" : [\n\t\t{\n\t\t\t\"b\" : 1\n\t\t}\n\t]\n}",
			"{\n\t\"a\" : [\n\t\t{\n\t\t\t\"b\" : 1\n\t\t},\n\t\t{\n\t\t\t\"b\" : 2\n\t\t}\n\t],\n" +
				"\t\"c\" : [\n\t\t{}\n\t]\n}"},
		"one line in several": {"{\n    \"a\": {\"b\":1},\n    \"c\": {\"name\": \"ü\\\\\\\"\"}\n}\n",
			"{\n    \"a\": {\"b\":1,\"d\":2},\n    \"c\": {\"name\": \"ü\\\\\\\"\", \"d\": 2},\n" +
				"    \"d\": {\n        \"e\": 3\n    }\n}\n"},
		"brackets on one line":     {"{\"a\": [{\n  \"b\": 1\n}]}", "{\"a\": [{\n  \"b\": 1\n}, {\n  \"b\": 2\n}]}"},
		"the end on the last line": {"{\"a\": 1,\n \"b\": 2}", "{\"a\": 1,\n \"b\": 2,\n \"c\": [\n   3\n ]}"},
		"before an element": {"{\n  \"a\": [\n    {\"name\": \"y\"}\n  ],\n  \"b\": [{\"name\": \"y\"}]\n}",
			"{\n  \"a\": [\n    {\n      \"name\": \"x\"\n    },\n    {\"name\": \"y\"}\n  ],\n" +
				"  \"b\": [{\"name\": \"x\"}, {\"name\": \"y\"}]\n}"},
		"empty values": {"{\n  \"a\": [],\n  \"b\": { },\n  \"c\": null,\n  \"d\": {\"e\": [], \"f\": null}\n}",
			"{\n  \"a\": [\n    1\n  ],\n  \"b\": {\n    \"g\": 2\n   },\n  \"c\": [\n    3\n  ],\n" +
				"  \"d\": {\"e\": [4], \"f\": {\"g\": 5}}\n}"},
		// A value that is not empty is replaced: all is written again. This is an
		// item of a List, without the indentation of its first line.
		"replaced": {"{\n      \"a\": 1, \"b\": {}, \"c\": 2\n    }",
			"{\n      \"a\": 1,\n      \"b\": {},\n      \"c\": 3\n    }"},
		"replaced on one line": {`{ "a": 1, "b": [2] }`, `{"a": 1, "b": [3]}`},
	} {
		for _, newline := range []string{"\n", "\r\n"} {
			in, want := strings.ReplaceAll(c.in, "\n", newline), strings.ReplaceAll(c.want, "\n", newline)
			changed, err := decodeJSON([]byte(want))
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			got, err := rewriteJSON([]byte(in), func(any) any { return changed })
			if diff := cmp.Diff(want, string(got)); err != nil || diff != "" {
				t.Errorf("%s: %v: -want +got:\n%s", name, err, diff)
			}
		}
	}
}

// Numbers in the output of kubectl stay numbers.
func TestManifestJSONList(t *testing.T) {
	const item = `{"kind":"Deployment","metadata":{"name":"x"},"spec":{"replicas":3,` +
		`"template":{"metadata":{"annotations":{"sluice.dev/in-process":"true"}},` +
		`"spec":{"containers":[{"name":"envoy","ports":[{"containerPort":8080}]}]}}}}`
	for _, in := range []string{
		`{"kind":"List", "x":{}, "items": [ ` + item + `,` + item + ` ]}`,
		// Strings with a meaning in YAML.
		strings.ReplaceAll(item, `"envoy"`, `"envoy","args":["<<"],"env":[{"name":"<<","value":"="}]`) + item,
		"\ufeff" + item + "\n" + item + "\n", // after a byte order mark, on several lines
	} {
		out, _, err := Manifest([]byte(in), options)
		text := string(out)
		if err != nil || strings.Count(text, `"replicas":3`) != 2 ||
			strings.Count(text, `"containerPort":8080`) != 2 || strings.Count(text, `"name":"sluice"`) != 2 {
			t.Errorf("%v %s", err, out)
		}
		if !isSubsequence(in, text) {
			t.Errorf("more than additions: %s", out)
		}
		for d := json.NewDecoder(bytes.NewReader(bytes.TrimPrefix(out, byteOrderMark))); ; {
			if err := d.Decode(new(any)); errors.Is(err, io.EOF) {
				break
			} else if err != nil {
				t.Fatalf("%v\n%s", err, out)
			}
		}
		if strings.Contains(in, "<<") && !strings.Contains(text, `"args":["<<"],"env":[{"name":"<<","value":"="}]`) {
			t.Errorf("%s", out)
		}
		if strings.HasPrefix(in, "\ufeff") != strings.HasPrefix(text, "\ufeff") ||
			strings.HasSuffix(in, "\n") != strings.HasSuffix(text, "}\n") {
			t.Errorf("%q", out)
		}
	}
}

// isSubsequence reports whether all bytes of a are in b in the same order.
func isSubsequence(a, b string) bool {
	for i := 0; i < len(b) && a != ""; i++ {
		if a[0] == b[i] {
			a = a[1:]
		}
	}
	return a == ""
}

// The items of an indented List are written as those of a List on one line, with
// its indentation.
func TestManifestJSONListIndented(t *testing.T) {
	const in = `{"apiVersion":"v1","x":{},"items":[{"kind":"Pod","metadata":{"name":"x","annotations":` +
		`{"sluice.dev/in-process":"true"}},"spec":{"containers":[{"name":"envoy"}]}},{"kind":"ConfigMap","data":{}},{},` +
		`null,[]],"kind":"List","metadata":{"resourceVersion":""}}`
	want, _, err := Manifest([]byte(in), options)
	if err != nil || !bytes.Contains(want, []byte(`"name":"sluice"`)) {
		t.Fatalf("%v %s", err, want)
	}
	for _, indent := range []string{"\t", "    "} {
		var indented, wantIndented bytes.Buffer
		if err := errors.Join(json.Indent(&indented, []byte(in), "", indent),
			json.Indent(&wantIndented, want, "", indent)); err != nil {
			t.Fatal(err)
		}
		for _, newline := range []string{"\n", "\r\n"} {
			lines := func(b bytes.Buffer) string { return strings.ReplaceAll("\ufeff"+b.String()+"\n", "\n", newline) }
			got, _, err := Manifest([]byte(lines(indented)), options)
			if diff := cmp.Diff(lines(wantIndented), string(got)); err != nil || diff != "" {
				t.Errorf("%v: -want +got:\n%s", err, diff)
			}
		}
	}
}

// Objects without a pod of their own, or whose pod opts out, are not changed.
func TestManifestPasses(t *testing.T) {
	for _, in := range []string{
		"apiVersion: argoproj.io/v1alpha1\nkind: Rollout\nmetadata: {name: r}\n" +
			"spec: {workloadRef: {kind: Deployment, name: d}}\n",
		"kind: Pod\nmetadata: {name: x, labels: {1: a, sluice.dev/inject: disabled}}\n" +
			"spec: {containers: [{name: envoy}]}\n",
	} {
		if out, skipped, err := Manifest([]byte(in), options); err != nil || len(skipped) > 0 || string(out) != in {
			t.Errorf("%v %q\n%s", err, skipped, out)
		}
	}
}

// A kind of the same name in another API group is not changed.
func TestManifestGroups(t *testing.T) {
	const job = "apiVersion: batch.volcano.sh/v1alpha1\nkind: Job\nmetadata: {name: x}\nspec: {tasks: []}\n"
	if out, _, err := Manifest([]byte(job), options); err != nil || string(out) != job {
		t.Errorf("%v\n%s", err, out)
	}
}

const onePod = "kind: Pod\nmetadata: {name: a, annotations: {sluice.dev/in-process: \"true\"}}\n" +
	"spec: {containers: [{name: envoy}]}\n"

// Directives and line endings are kept, whether or not the document changes.
func TestManifestKeepsItsForm(t *testing.T) {
	for in, begins := range map[string]string{
		"%YAML 1.2\n---\n" + onePod:                          "%YAML 1.2\n---\nkind: Pod\n",
		"# made by a tool\n%YAML 1.2\n# so\n---\n" + onePod:  "# made by a tool\n%YAML 1.2\n# so\n---\nkind: Pod\n",
		"%YAML 1.2\n---\nkind: ConfigMap\n---\n" + onePod:    "%YAML 1.2\n---\nkind: ConfigMap\n---\nkind: Pod\n",
		"---\r\n" + strings.ReplaceAll(onePod, "\n", "\r\n"): "---\r\nkind: Pod\r\n",
		"a: 1\r\n---\n" + onePod:                             "a: 1\r\n---\nkind: Pod\nmeta",
		"---\n---\n" + onePod:                                "---\n---\nkind: Pod\n",
		"%YAML 1.2\r\n---\r\nkind: ConfigMap\r\n---\n" +
			onePod: "%YAML 1.2\r\n---\r\nkind: ConfigMap\r\n---\nkind: Pod\n",
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

// FuzzManifest checks that any text is either refused, or injected in such a
// way that injecting it again changes nothing, and that it allocates at most a
// multiple of its size.
func FuzzManifest(f *testing.F) {
	for _, text := range []string{manifest, onePod, "%YAML 1.2\n---\n" + onePod, "{\"kind\":\"Pod\"}", "a: &a [*a]",
		"---\n...\n", "- \n-\t- {", "kind: List\nitems: [1, {kind: Pod}]",
		around + "  containers:\n  - name: envoy\n    args:\n    - >-\n      a \\\n        b\n" +
			"  - {name: app, volumeMounts: &m [{name: a, mountPath: /a}, {name: a, mountPath: /b}]}\n",
		"1: &b {a: 1}\n<<: *b\n" +
			onePod,
		`{"kind":"List","items":[{"kind":"Pod","metadata":{"annotations":{"sluice.dev/in-process":"true"}},` +
			`"spec":{"priority":1e3,"containers":[{"name":"envoy"}]}}]}{}`,
	} {
		f.Add([]byte(text))
	}
	f.Fuzz(func(t *testing.T, in []byte) {
		var out []byte
		var err error
		if cost, most := allocates(func() { out, _, err = Manifest(in, options) }), uint64(2<<20+2048*len(in)); cost > most {
			t.Errorf("%d bytes are allocated for %d", cost, len(in))
		}
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
