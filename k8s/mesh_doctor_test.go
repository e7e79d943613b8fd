//go:build linux

package k8s

import (
	"encoding/json"
	"os/exec"
	"slices"
	"testing"
)

// isWell checks that `sluice doctor` finds nothing wrong with the Envoy at an
// admin interface, which sluice with this config is asked by, except for
// warnings of these names.
func isWell(t *testing.T, sluice, config, admin string, except ...string) {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), sluice, "doctor", "--config", config, "--envoy-admin", admin, "-o",
		"json").Output()
	var d struct {
		Checks []struct{ Name, Status, Detail, Fix string }
	}
	if jsonErr := json.Unmarshal(out, &d); jsonErr != nil || err != nil {
		t.Errorf("doctor: %v\n%s", err, out)
		return
	}
	asked := false
	for _, c := range d.Checks {
		asked = asked || c.Name == "checks"
		if c.Status != "ok" && c.Name != "store" && !slices.Contains(except, c.Name) { // the store is in process
			t.Errorf("doctor says %s: %s: %s → %s", c.Status, c.Name, c.Detail, c.Fix)
		}
	}
	if !asked {
		t.Errorf("doctor did not look at the counters: %s", out)
	}
}
