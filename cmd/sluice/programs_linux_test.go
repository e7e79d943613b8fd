package main

import (
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/sluiceproxy/sluice/k8s/testenv"
)

// TestPrograms builds the programs that TestCompose, TestRelease and TestMesh… run.
func TestPrograms(t *testing.T) {
	testenv.BuildAhead(t, []testenv.Build{
		{Name: "the reader of compose files", Run: composeReader},
		{Name: "the tools of a release", Run: releaseTools},
		{Name: "istioctl", Run: istioctlBinary},
		{Name: "Envoy Gateway", Run: envoyGatewayBinary},
		{Name: "egctl", Run: egctlBinary},
	})
}

// composeReader returns the path of a program that reads compose files.
func composeReader(t *testing.T) string {
	t.Helper()
	return testenv.LocalProgram(t, filepath.Join("testdata", "compose"))
}

// istioctlBinary returns the path of istioctl.
func istioctlBinary(t *testing.T) string {
	t.Helper()
	return testenv.Program(t, "istio.io/istio/istioctl/cmd/istioctl", istioctl)
}

// envoyGatewayBinary returns the path of Envoy Gateway.
func envoyGatewayBinary(t *testing.T) string {
	t.Helper()
	return testenv.Program(t, "github.com/envoyproxy/gateway/cmd/envoy-gateway", envoyGateway)
}

// egctlBinary returns the path of Envoy Gateway's command-line tool.
func egctlBinary(t *testing.T) string {
	t.Helper()
	return testenv.Program(t, "github.com/envoyproxy/gateway/cmd/egctl", envoyGateway)
}

// releaseTools builds what .ci/release needs, and returns what it prints.
func releaseTools(t *testing.T) string {
	t.Helper()
	tools := exec.CommandContext(t.Context(), "bash", filepath.Join("..", "..", ".ci", "release-tools"))
	out, err := tools.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return string(out)
}
