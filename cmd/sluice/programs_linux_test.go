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
	for _, program := range []struct {
		name  string
		build func(*testing.T) string
	}{
		{"the reader of compose files", composeReader},
		{"the tools of a release", releaseTools},
		{"istioctl", istioctlBinary},
		{"Envoy Gateway", envoyGatewayBinary},
		{"egctl", egctlBinary},
	} {
		t.Run(program.name, func(t *testing.T) { program.build(t) })
	}
}

// releaseTools builds what .ci/release needs, and returns what it prints.
func releaseTools(t *testing.T) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), "bash", filepath.Join("..", "..", ".ci", "release-tools")).CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return string(out)
}
