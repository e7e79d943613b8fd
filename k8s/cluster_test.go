//go:build linux

package k8s

import (
	"net/http"
	"os"
	"testing"
)

// The harness is what it says: a real API server of the release that is named, with its controllers.
func TestClusterIsReal(t *testing.T) {
	if os.Getenv("SLUICE_LONG") == "" {
		t.Skip("builds Kubernetes, which takes minutes: SLUICE_LONG=1")
	}
	kubernetesBinaries(t)
	if !ownNetwork(t, "192.0.2.1", "192.0.2.2") {
		return
	}
	c := cluster(t, "--enable-aggregator-routing=true")
	var out object
	if err := c.call(t.Context(), http.MethodGet, "/version", nil, &out); err != nil || out["gitVersion"] != kubeVersion {
		t.Errorf("%v %v", out, err)
	}
}
