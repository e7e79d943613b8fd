//go:build linux

package k8s

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// crds are the CustomResourceDefinitions of other projects that the chart's
// objects need, as files of these modules.
var crds = map[string][]string{
	certManager: {"deploy/crds/cert-manager.io_certificates.yaml", "deploy/crds/cert-manager.io_issuers.yaml"},
	"github.com/prometheus-operator/prometheus-operator@v0.85.0": {
		"example/prometheus-operator-crd/monitoring.coreos.com_servicemonitors.yaml",
	},
}

// module returns the directory of a module's files.
func module(t *testing.T, version string) string {
	t.Helper()
	download := exec.CommandContext(t.Context(), "go", "mod", "download", "-json", version)
	download.Dir = t.TempDir() // outside the product's module
	out, err := download.Output()
	var answer struct{ Dir, Error string }
	if json.Unmarshal(out, &answer) != nil || err != nil || answer.Dir == "" {
		t.Fatalf("%s: %v %s", version, err, out)
	}
	return answer.Dir
}

// TestClusterChart has a real API server validate each field that the chart
// renders: for every set of options, and with every value once set to another
// than its default.
func TestClusterChart(t *testing.T) {
	var definitions []string
	if os.Getenv("SLUICE_LONG") != "" {
		for version, files := range crds {
			for _, file := range files {
				definitions = append(definitions, "-f", filepath.Join(module(t, version), file))
			}
		}
	}
	if !long(t) {
		return
	}
	var documents []string
	add := func(text string, err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		for document := range strings.SplitSeq(text, "\n---\n") {
			if strings.Contains(document, "\nkind: ") && !strings.Contains(document, "\nkind: Namespace\n") &&
				!slices.Contains(documents, document) {
				documents = append(documents, document)
			}
		}
	}
	for _, args := range sets {
		add(rendered(t, args...))
	}
	base, others := otherValues()
	for path, other := range others {
		add(rendered(t, withOther(base, path, other)...))
	}
	for _, file := range []string{"sluice.yaml", "trial-redis.yaml"} {
		text, err := os.ReadFile(filepath.Join("manifests", file))
		add(string(text), err)
	}

	c := cluster(t)
	if out, err := c.kubectl(t, "", append([]string{"create"}, definitions...)...); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	// Both labels also make the API server warn about Deployments whose pods
	// would be refused.
	standard := object{"pod-security.kubernetes.io/enforce": "restricted",
		"pod-security.kubernetes.io/warn": "restricted"}
	for _, name := range []string{release, "a"} { // a is the other value of tests.namespace
		namespace(t, c, name, standard)
	}
	out, err := c.kubectl(t, strings.Join(documents, "\n---\n"), "apply", "--dry-run=server", "--validate=strict",
		"-f", "-")
	// webhook.hostNetwork is what no standard but privileged allows.
	out = strings.Replace(out, `Warning: would violate PodSecurity "restricted:latest": host namespaces `+
		"(hostNetwork=true)\n", "", 1)
	if err != nil || strings.Contains(out, "Warning") {
		t.Errorf("%v\n%s", err, out)
	}
	if n := strings.Count(out, "(server dry run)"); n != len(documents) {
		t.Errorf("%d of %d objects were validated", n, len(documents))
	} else {
		t.Logf("%d objects", n)
	}
	// The API server does reject unknown fields.
	wrong := strings.Replace(documents[0], "\nmetadata:", "\nmetadatum: {}\nmetadata:", 1)
	if out, err := c.kubectl(t, wrong, "apply", "--dry-run=server", "--validate=strict", "-f", "-"); err == nil {
		t.Errorf("an unknown field is accepted: %s", out)
	}
}
