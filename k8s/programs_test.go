//go:build linux

package k8s

import (
	"os"
	"testing"
)

// TestPrograms builds the programs that TestCluster…, TestNode… and TestMesh… run,
// which otherwise build what they lack. .ci/test has it run in the background of
// tests that leave the processors idle.
func TestPrograms(t *testing.T) {
	if os.Getenv("SLUICE_LONG") == "" {
		t.Skip("takes some ten minutes: SLUICE_LONG=1")
	}
	for _, program := range []struct {
		name  string
		build func(*testing.T) string
	}{
		{"Kubernetes", kubernetesBinaries},
		{"helm", helmBinary},
		{"cert-manager", certManagerBinary},
		{"CoreDNS", corednsBinary},
		{"Contour", contourBinary},
		{"istiod", istiodBinary},
	} {
		t.Run(program.name, func(t *testing.T) { program.build(t) })
	}
}
