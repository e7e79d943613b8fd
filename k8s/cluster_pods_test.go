//go:build linux

package k8s

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.yaml.in/yaml/v3"
)

// tokens matches the names that the API server generates for the volumes of
// service account tokens.
var tokens = regexp.MustCompile(`kube-api-access-[a-z0-9]{5}`)

// plain returns a pod from the API server without generated names and times.
func plain(t *testing.T, pod object) object {
	t.Helper()
	text, err := json.Marshal(pod)
	if err != nil {
		t.Fatal(err)
	}
	out := object{}
	if err := json.Unmarshal(tokens.ReplaceAll(text, []byte("kube-api-access-drawn")), &out); err != nil {
		t.Fatal(err)
	}
	for _, field := range []string{"uid", "creationTimestamp", "managedFields", "resourceVersion", "generation"} {
		delete(objectField(out, "metadata"), field)
	}
	delete(out, "status")
	return out
}

// sorted returns a pod with volumes and mounts sorted by name. The API server
// adds those of a service account token at a place that depends on the order of
// the webhooks and has no meaning.
func sorted(pod object) object {
	by := func(l []any) []any {
		slices.SortStableFunc(l, func(a, b any) int {
			return strings.Compare(a.(object)["name"].(string), b.(object)["name"].(string))
		})
		return l
	}
	spec := objectField(pod, "spec")
	spec["volumes"] = by(listField(spec, "volumes"))
	// The same quantity may be written in another way.
	for name, v := range objectField(objectField(spec, "resources"), "requests") {
		objectField(objectField(spec, "resources"), "requests")[name] = formatQuantity(name, quantityValue(v))
	}
	for _, field := range []string{"containers", "initContainers"} {
		for _, c := range listField(spec, field) {
			c := c.(object)
			c["volumeMounts"] = by(listField(c, "volumeMounts"))
		}
	}
	return pod
}

// TestClusterRandomPods has a real API server accept many injected pods. It
// checks that sluice inject and the webhook have the same result for each, and
// that injecting it again changes nothing.
func TestClusterRandomPods(t *testing.T) {
	if !long(t) {
		return
	}
	const count = 500
	c := cluster(t, "--enable-aggregator-routing=true")
	heard := listen(c.API)
	namespace(t, c, "shop", nil)
	const dry = "/api/v1/namespaces/shop/pods?dryRun=All&fieldValidation=Strict"
	create := func(p object) (object, error) {
		var out object
		err := c.call(t.Context(), http.MethodPost, dry, p, &out)
		return out, err
	}

	type one struct {
		pod              object
		skipped, refused string // returned by Inject
	}
	var all []one
	counts := map[string]int{}
	for seed := range count {
		p := validPod.Example(seed)
		name := fmt.Sprintf("pod-%d", seed)
		p["metadata"].(object)["name"], p["metadata"].(object)["namespace"] = name, "shop"
		if _, err := create(p); err != nil {
			t.Errorf("the API server refuses a generated pod: %v", err)
		}
		o := one{pod: p}
		_, skipped, err := Inject(p, Options{Image: "x", Version: "v", Namespace: "shop", Workload: name})
		switch o.skipped = skipped; {
		case err != nil:
			o.refused = err.Error()
			counts["refused"]++
		case skipped != "":
			counts["skipped"]++
		default:
			counts["taken"]++
		}
		all = append(all, o)
	}
	t.Logf("%v", counts)
	if counts["taken"] < count/2 || counts["skipped"] < count/50 || counts["refused"] < count/50 {
		t.Error("too few to show anything")
	}

	// First by sluice inject, as a user would.
	const image = "registry.example/sluice:1"
	sluice := program(t)
	inject := func(which func(one) bool) (string, string, error) {
		var in bytes.Buffer
		e := yaml.NewEncoder(&in)
		e.SetIndent(2) // with the default of 4 it cannot read strings that begin with a space again
		for _, o := range all {
			if which(o) {
				if err := e.Encode(o.pod); err != nil {
					t.Fatal(err)
				}
			}
		}
		run := exec.CommandContext(t.Context(), sluice, "inject", "--image", image)
		var stdout, stderr bytes.Buffer
		run.Stdin, run.Stdout, run.Stderr = &in, &stdout, &stderr
		err := run.Run()
		return stdout.String(), stderr.String(), err
	}
	accepted := func(o one) bool { return o.refused == "" }
	manifest, said, err := inject(accepted)
	if err != nil {
		t.Fatalf("%v\n%s", err, said)
	}
	for _, o := range all {
		name := at(o.pod, "metadata", "name")
		if o.skipped != "" && !strings.Contains(said, fmt.Sprintf("Pod %v: %s\n", name, o.skipped)) {
			t.Errorf("%v is skipped without a warning that says %q", name, o.skipped)
		}
	}
	_, said, err = inject(func(o one) bool { return !accepted(o) })
	if err == nil {
		t.Error("sluice inject refuses nothing")
	}
	for _, o := range all {
		if name := at(o.pod, "metadata", "name"); !accepted(o) &&
			!strings.Contains(said, fmt.Sprintf("Pod %v: %s", name, o.refused)) {
			t.Errorf("%v is refused for %q; sluice inject says\n%s", name, o.refused, said)
		}
	}
	out, err := c.kubectl(t, manifest, "create", "--dry-run=server", "--validate=strict",
		"--output=json", "--filename=-")
	if err != nil {
		t.Fatalf("%v\n%s", err, out[max(0, len(out)-4000):])
	}
	out = regexp.MustCompile(`(?m)^Warning: .*\n`).ReplaceAllString(out, "") // random pods cause warnings
	applied := map[any]object{}
	for d := json.NewDecoder(strings.NewReader(out)); ; {
		var p object
		if err := d.Decode(&p); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		if items, ok := p["items"].([]any); ok {
			for _, item := range items {
				applied[at(item, "metadata", "name")] = item.(object)
			}
			continue
		}
		applied[at(p, "metadata", "name")] = p
	}

	// Then by the webhook.
	r := install(t, c, "--set", "webhook.sidecarImage="+image)
	for i := range r.running {
		r.run(t, i)
	}
	must(t, c.API, http.MethodPatch, "/api/v1/namespaces/shop",
		[]any{object{"op": "add", "path": "/metadata/labels/" + strings.ReplaceAll(injectLabel, "/", "~1"),
			"value": "enabled"}})
	await(t, "the label to count", func() bool {
		got, err := create(pod(t, "{metadata: {name: probe, annotations: {sluice.dev/in-process: 'true'}}, spec: "+
			"{containers: [{name: envoy, image: x}]}}"))
		return err == nil && len(listField(objectField(got, "spec"), "initContainers")) == 1
	})
	for _, o := range all {
		name := at(o.pod, "metadata", "name")
		heard.take()
		got, err := create(o.pod)
		said := heard.take()
		if !accepted(o) {
			if !hasStatus(err, http.StatusForbidden) || !strings.Contains(err.Error(), "sluice: "+o.refused) {
				t.Errorf("%v is refused for %q by the manifest, and by the webhook: %v", name, o.refused, err)
			}
			continue
		}
		if err != nil {
			t.Errorf("%v: %v", name, err)
			continue
		}
		if (o.skipped != "") != strings.Contains(said, "sluice is not injected: ") {
			t.Errorf("%v: skipped for %q, warned %q", name, o.skipped, said)
		}
		got = plain(t, got)
		again, err := create(got)
		if err != nil {
			t.Errorf("%v, again: %v", name, err)
			continue
		}
		if diff := cmp.Diff(got, plain(t, again)); diff != "" {
			t.Errorf("%v changes when it is injected again (-once +twice):\n%s", name, diff)
		}
		if applied[name] == nil {
			t.Errorf("%v is not in what sluice inject prints", name)
		} else if diff := cmp.Diff(sorted(plain(t, applied[name])), sorted(got)); diff != "" {
			t.Errorf("%v (-manifest +webhook):\n%s", name, diff)
		}
	}
}
