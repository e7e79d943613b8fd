package k8s

import (
	"fmt"
	"strings"
	"testing"
)

// listOf returns a List of n Deployments, whose dashes have this indentation.
func listOf(n, indent int) string {
	var b strings.Builder
	b.WriteString("apiVersion: v1\nkind: List\nitems:\n")
	for i := range n {
		item := fmt.Sprintf(`# number %d

- apiVersion: apps/v1
  kind: Deployment # of many
  metadata: {name: web-%[1]d,   namespace: shop}
  spec:
    template:
      metadata:
        annotations:
          sluice.dev/redis-secret: redis
      spec:
        containers:
        - name: envoy
          args:
          - |
            a

            b
          image: envoy:1
`, i)
		b.Write(indentLines([]byte(item), indent))
	}
	return b.String()
}

// What does not change in a List stays byte for byte, wherever its items stand.
func TestManifestList(t *testing.T) {
	const bare = "- kind: Pod\n  metadata:  {name: bare}\n  spec: {containers: [{name: app}]}\n\n# after it\n"
	const rest = "metadata: {resourceVersion: ''}\n# the end\n"
	for name, in := range map[string]string{
		"at the margin":     listOf(3, 0) + bare + rest,
		"indented":          listOf(3, 2) + "  - kind: ConfigMap\n    data:   {}\n" + rest,
		"after a separator": "---\n# it\n" + listOf(2, 0) + "...\n",
		"with CRLF":         strings.ReplaceAll(listOf(2, 4)+rest, "\n", "\r\n"),
		"without a newline": strings.TrimSuffix(listOf(2, 0), "\n"),
		"its kind last":     strings.Replace(listOf(2, 0), "kind: List\n", "", 1) + "kind: List\n",
		"of one kind": strings.NewReplacer("kind: List", "kind: DeploymentList", "  kind: Deployment # of many\n", "").
			Replace(listOf(2, 0)),
	} {
		t.Run(name, func(t *testing.T) {
			out, _, err := Manifest([]byte(in), options)
			if err != nil {
				t.Fatal(err)
			}
			if got, want := strings.Count(string(out), "name: sluice-socket"), 3*strings.Count(in, "name: envoy"); got != want {
				t.Errorf("the socket is named %d times, want %d", got, want)
			}
			// Each line of the input is in the output, in the same order.
			rest := string(out)
			for line := range strings.Lines(in) {
				_, after, found := strings.Cut(rest, strings.TrimRight(line, "\r\n"))
				if !found {
					t.Fatalf("no %q in\n%s", line, rest)
				}
				rest = after
			}
			if again, _, err := Manifest(out, options); err != nil || string(again) != string(out) {
				t.Errorf("%v: the second time it changed:\n%s", err, again)
			}
		})
	}
}

// A List with an anchor is injected as a whole.
func TestManifestListWithAnchor(t *testing.T) {
	in := strings.Replace(listOf(2, 0), "    template:\n", "    x: &x 1\n    y: *x\n    template:\n", 1)
	out, _, err := Manifest([]byte(in), options)
	if err != nil || strings.Count(string(out), "name: sluice-socket") != 6 || !strings.Contains(string(out), "y: *x\n") {
		t.Errorf("%v\n%s", err, out)
	}
}

// Items that cannot be cut out of the text by its lines are read in the whole
// document.
func TestManifestListAsAWhole(t *testing.T) {
	const deployment = "kind: Deployment\nmetadata: {name: web}\nspec: {template: {metadata: {annotations: " +
		"{sluice.dev/in-process: \"true\"}}, spec: {containers: [{name: envoy}]}}}\n"
	item := func(indent int) string {
		text := string(indentLines([]byte(deployment), indent+2))
		return text[:indent] + "-" + text[indent+1:]
	}
	for name, in := range map[string]string{
		"other line breaks":     "- kind: ConfigMap\n  data: {a: \"x" + strings.Repeat("\u2028", 60) + "y\"}\n" + item(0),
		"a comment further out": "  - kind: ConfigMap\n# old\n    data: {a: b}\n" + item(2),
		"text further out":      "  - kind: ConfigMap\n    data: {a: \"x\n y\"}\n" + item(2),
		"a brace further out":   "  - kind: ConfigMap\n    data: {a: x\n}\n" + item(2),
		"text like a comment":   "- kind: ConfigMap\n  data: {a: \"x\n# y\"}\n" + item(0),
		"text like a separator": "  - kind: ConfigMap\n    data: {a: \"x\n  --- y\"}\n" + item(2),
		"text like an item":     "- kind: ConfigMap\n  data: {a: \"x\n- y\"}\n" + item(0),
		"items that are none":   "- null\n-\n- 1\n- [a]\n" + item(0),
	} {
		out, skipped, err := Manifest([]byte("kind: List\nitems:\n"+in), options)
		if err != nil || len(skipped) > 0 || !strings.Contains(string(out), "name: sluice") {
			t.Errorf("%s: %v, skipped %q\n%s", name, err, skipped, out)
		}
	}
}

// The items of a typed List are of its kind and API version.
func TestManifestTypedList(t *testing.T) {
	const items = "items:\n- metadata: {name: r}\n  spec: {template: {metadata: {annotations: {sluice.dev/in-process: " +
		"\"true\"}}, spec: {containers: [{name: envoy}]}}}\n"
	for _, list := range []string{"apiVersion: argoproj.io/v1alpha1\nkind: RolloutList\n",
		"apiVersion: apps.kruise.io/v1alpha1\nkind: CloneSetList\n"} {
		for _, text := range []string{list + items, "---\n" + items + list} {
			out, _, err := Manifest([]byte(text), options)
			if err != nil || !strings.Contains(string(out), "name: sluice") || strings.Count(string(out), "apiVersion: a") != 1 {
				t.Errorf("%v\n%s", err, out)
			}
		}
	}
}

// Errors in a List name the item and the line in the document.
func TestManifestListRefused(t *testing.T) {
	anchored := "kind: List\nitems:\n- kind: ConfigMap\n- kind: Pod\n  metadata: {name: x, annotations: " +
		"{sluice.dev/in-process: \"true\"}}\n  spec:\n    containers:\n    - name: envoy\n      volumeMounts: &m " +
		"[{name: a, mountPath: /a}]\n    - {name: app, volumeMounts: *m}\n"
	for in, want := range map[string]string{
		strings.ReplaceAll(listOf(2, 2), "redis-secret: redis", "domain: x y"): "item 1: Deployment web-0: annotation " +
			"sluice.dev/domain: \"x y\": must consist of",
		anchored: "document 1: line 9: cannot add the sidecar to the value of anchor &m",
	} {
		if out, _, err := Manifest([]byte(in), options); err == nil || !strings.Contains(err.Error(), want) || out != nil {
			t.Errorf("%v, want %q", err, want)
		}
	}
}

// A List takes memory in proportion to its items.
func TestManifestListIsLinear(t *testing.T) {
	cost := func(n int) uint64 {
		in := []byte(listOf(n, 0))
		return allocates(func() {
			if _, _, err := Manifest(in, options); err != nil {
				t.Error(err)
			}
		})
	}
	if few, many := cost(20), cost(200); many > 15*few {
		t.Errorf("20 items take %d kB and 200 take %d kB", few>>10, many>>10)
	}
}

// A document that cannot be read is copied, with a warning, if it does not
// mention sluice. Those after it are injected.
func TestManifestUnreadable(t *testing.T) {
	for in, want := range map[string]string{
		"kind: ConfigMap\na: 1\na: 2\n---\n": "document 1: copied as it is, since it cannot be read: line 3: mapping key " +
			"\"a\" already defined at line 2",
		"a:\n\tb: 1\n---\n": "document 1: copied as it is, since it cannot be read: yaml: ",
	} {
		out, skipped, err := Manifest([]byte(in+onePod), options)
		if err != nil || len(skipped) != 1 || !strings.HasPrefix(skipped[0], want) ||
			!strings.HasPrefix(string(out), in) || !strings.Contains(string(out), "name: sluice") {
			t.Errorf("%v, skipped %q\n%s", err, skipped, out)
		}
	}
	const twice = `{"kind": "ConfigMap", "a": 1, "a": 2}`
	const refused = `{"kind": "Deployment", "spec": {}}` // without a template
	for _, in := range []string{twice, `{"kind": "List", "items": [` + refused + `, ` + twice + `]}`,
		`{"kind": "List", "items": [` + twice + `, ` + refused + `]}`} {
		if out, skipped, err := Manifest([]byte(in), options); err != nil || string(out) != in || len(skipped) != 1 {
			t.Errorf("%v, skipped %q: %s", err, skipped, out)
		}
	}
}

// A value that is left out in flow style is written as null if it has to be.
func TestManifestMissingValue(t *testing.T) {
	in := stale + "  containers: [{name: envoy}]\n  volumes: [{name: tmp, emptyDir: }]\n"
	out, _, err := Manifest([]byte(in), options)
	if err != nil || !strings.Contains(string(out), "{name: tmp, emptyDir: null}") {
		t.Errorf("%v\n%s", err, out)
	}
}

// A kind that is not known is copied, with a warning if its pods ask for sluice.
func TestManifestOtherKinds(t *testing.T) {
	const workload = "apiVersion: batch.example.com/v1\nkind: Workflow\nmetadata: {name: w}\nspec:\n  tasks:\n" +
		"  - template: {metadata: {labels: {LABEL: enabled}}, spec: {containers: [{name: envoy}]}}\n"
	asks := strings.Replace(workload, "LABEL", injectLabel, 1)
	out, skipped, err := Manifest([]byte(asks), options)
	if err != nil || string(out) != asks || len(skipped) != 1 ||
		skipped[0] != `Workflow w: pods of this kind (apiVersion "batch.example.com/v1") are injected by the webhook only` {
		t.Errorf("%v, skipped %q\n%s", err, skipped, out)
	}
	if _, skipped, err := Manifest([]byte(workload), options); err != nil || len(skipped) > 0 {
		t.Errorf("%v, skipped %q", err, skipped)
	}
}
