package main

import (
	"os"
	"os/exec"
	"strings"
	"testing"
)

const istioctl = "v0.0.0-20260827124520-eed52ebb66ad" // the tags are not available

// everyFilter is what istioctl reports for every EnvoyFilter.
const everyFilter = "\t* EnvoyFilter//sluice: EnvoyFilter exposes internal implementation details that may change " +
	"at any time. " +
	"Prefer other APIs if possible, and exercise extreme caution, especially around upgrades.\n"

// TestMeshIstioctl checks that istioctl, which reads typed_config, reports
// nothing about the printed files, with their comments as they are and
// uncommented.
func TestMeshIstioctl(t *testing.T) {
	if os.Getenv("SLUICE_LONG") == "" {
		t.Skip("builds istioctl, which takes minutes: SLUICE_LONG=1")
	}
	binary := istioctlBinary(t)
	validate := func(text string) string {
		t.Helper()
		out, err := exec.CommandContext(t.Context(), binary, "validate", "-f", file(t, "istio.yaml", text)).CombinedOutput()
		if err != nil {
			t.Errorf("%v\n%s", err, out)
		}
		_, said, _ := strings.Cut(string(out), " has warnings: \n")
		return strings.TrimSpace(strings.ReplaceAll(said, everyFilter, ""))
	}
	for name, config := range map[string]string{
		"defaults": "limits: []",
		"socket":   "listen: {grpc: unix:///run/sluice/authz.sock}",
		"a name":   `listen: {grpc: "localhost:9001"}`,
		"limits":   "limits: [{name: a, rate: 1/s}, {name: b, rate: 1/s}]",
		"claims": `limits: [{name: a, rate: 1/s, key: ` +
			`'metadata.filter_metadata["envoy.filters.http.jwt_authn"].payload.sub'}]`,
	} {
		status, printed, stderr := sluice(t, nil, "envoy", "istio", "--config", file(t, "sluice.yaml", config+"\n"))
		if status != 0 {
			t.Fatal(stderr)
		}
		before, example, ok := strings.Cut(printed, "  # - applyTo: VIRTUAL_HOST\n")
		if !ok {
			t.Fatal("no VIRTUAL_HOST")
		}
		with := before + "  - applyTo: VIRTUAL_HOST\n" + strings.ReplaceAll(example, "  #   ", "    ")
		if said := validate(printed); said != "" {
			t.Errorf("%s: %s", name, said)
		}
		if said := validate(with); said != "" {
			t.Errorf("%s with its example: %s", name, said)
		}
		if wrong := strings.Replace(with, "validate_mutations:", "validate_mutation:", 1); validate(wrong) == "" {
			t.Error("istioctl says nothing of a field that is not there")
		}
		if _, provider, ok := strings.Cut(printed, "# meshConfig:\n"); ok {
			provider, _, _ = strings.Cut(provider, "\n#\n")
			operator := "apiVersion: install.istio.io/v1alpha1\nkind: IstioOperator\nmetadata: {name: mesh}\nspec:\n  " +
				"meshConfig:\n" +
				strings.ReplaceAll(
					"\n"+provider, "\n# ", "\n  ",
				) + "\n"
			if said := validate(operator); said != "" {
				t.Errorf("%s: the provider: %s", name, said)
			}
		} else if name != "claims" {
			t.Errorf("%s: no provider", name)
		}
	}
	authority := newAuthority(t)
	secured := gatewayTLSFiles(t, authority, authority)
	for _, args := range [][]string{
		{"istio-gateway"}, {"istio-waypoint"}, {"istio-gateway", "--config", secured}, {"istio-waypoint", "--config", secured},
	} {
		kind := strings.Join(args, " ")
		status, printed, stderr := sluice(t, nil, append([]string{"envoy"}, args...)...)
		if status != 0 {
			t.Fatal(stderr)
		}
		printed = strings.ReplaceAll(
			strings.ReplaceAll(printed, "  # - applyTo: VIRTUAL_HOST\n", "  - applyTo: VIRTUAL_HOST\n"), "  #   ", "    ",
		)
		known := strings.TrimSpace(strings.Replace(everyFilter, "//sluice:", "//sluice-gateway:", 1))
		if said := strings.ReplaceAll(validate(printed), known, ""); said != "" {
			t.Errorf("%s: %s", kind, said)
		}
	}
	// This is the access log of envoy/README.md. istioctl does not check the
	// fields of its provider in the mesh config.
	_, telemetry, ok := strings.Cut(document(t, envoyReadme), "---\napiVersion: telemetry.istio.io/v1\n")
	if !ok {
		t.Fatal("envoy/README.md has no Telemetry")
	}
	telemetry, _, _ = strings.Cut(telemetry, "```")
	if said := validate("apiVersion: telemetry.istio.io/v1\n" + telemetry); said != "" {
		t.Errorf("the Telemetry: %s", said)
	}
}
