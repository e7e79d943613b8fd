package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// TestPrograms builds the programs that TestCompose, TestRelease and TestMesh… run,
// which otherwise build what they lack. .ci/test has it run in the background of
// tests that leave the processors idle.
func TestPrograms(t *testing.T) {
	if os.Getenv("SLUICE_LONG") == "" {
		t.Skip("takes some ten minutes: SLUICE_LONG=1")
	}
	composeReader(t)
	tools := exec.CommandContext(t.Context(), "bash", filepath.Join("..", "..", ".ci", "release-tools"))
	if out, err := tools.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, build := range []func(*testing.T) string{istioctlBinary, envoyGatewayBinary, egctlBinary} {
		build(t)
	}
}
