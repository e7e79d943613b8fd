//go:build linux

package k8s

import (
	"path/filepath"
	"testing"

	"github.com/sluiceproxy/sluice/k8s/testenv"
)

// TestPrograms builds the programs that TestCluster…, TestNode… and TestMesh… run.
func TestPrograms(t *testing.T) {
	testenv.BuildAhead(t, []testenv.Build{
		{Name: "Kubernetes", Run: kubernetesBinaries},
		{Name: "helm", Run: helmBinary},
		{Name: "cert-manager", Run: certManagerBinary},
		{Name: "CoreDNS", Run: corednsBinary},
		{Name: "Contour", Run: contourBinary},
		{Name: "istiod", Run: istiodBinary},
	})
}

// certManagerBinary returns the path of cert-manager's controllers.
func certManagerBinary(t *testing.T) string {
	t.Helper()
	return testenv.LocalProgram(t, filepath.Join("testdata", "certmanager"))
}

// contourBinary returns the path of Contour.
func contourBinary(t *testing.T) string {
	t.Helper()
	return testenv.Program(t, "github.com/projectcontour/contour/cmd/contour", contourVersion)
}

// istiodBinary returns the path of istiod.
func istiodBinary(t *testing.T) string {
	t.Helper()
	return testenv.Program(t, "istio.io/istio/pilot/cmd/pilot-discovery", istioVersion)
}

// corednsBinary returns the path of CoreDNS.
func corednsBinary(t *testing.T) string {
	t.Helper()
	return testenv.Program(t, "github.com/coredns/coredns", "v1.13.1")
}
