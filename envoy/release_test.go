package envoy

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestParseRelease(t *testing.T) {
	for text, want := range map[string]Release{
		"1.36": {1, 36}, "1.36.4": {1, 36}, Version: {1, 40}, "1.100": {1, 100}, "2.0": {2, 0},
	} {
		if got, err := ParseRelease(text); err != nil || got != want {
			t.Errorf("%s: %v, %v, want %v", text, got, err, want)
		}
	}
	const form, age = "must be MAJOR.MINOR, such as 1.36", "must be 1.36 or newer"
	for text, want := range map[string]string{
		"": form, "1": form, "v1.40": form, "1.40.0.0": form, "1.40-dev": form, "1.99999": form, "1,40": form,
		"1.35": age, "1.35.9": age, "0.99": age,
	} {
		if got, err := ParseRelease(text); err == nil || err.Error() != want || got != (Release{}) {
			t.Errorf("%q: %v, %v, want %s", text, got, err, want)
		}
	}
}

// TestReleaseOf checks that a binary is asked for its release, and that one that
// cannot be used is reported in one line.
func TestReleaseOf(t *testing.T) {
	if r := release(t); r.before(oldest) {
		t.Errorf("%v", r)
	}
	for says, want := range map[string]string{
		"echo 'envoy  version: 84305a6/1.36.4/Clean/RELEASE/BoringSSL'":     "",
		"echo 'envoy  version: 84305a6/1.37.3-dev/Clean/RELEASE/BoringSSL'": "",
		"echo 'envoy  version: 84305a6/1.35.3-dev/Clean/RELEASE/BoringSSL'": "BINARY is Envoy 1.35.3-dev, which must be 1.36 or newer; ",
		"echo other; echo 1.40.0": `BINARY --version names no version of Envoy: "other\n1.40.0"; `,
		"exit 3":                  "BINARY --version: exit status 3; ",
	} {
		binary := filepath.Join(t.TempDir(), "envoy")
		if err := os.WriteFile(binary, []byte("#!/bin/sh\n"+says+"\n"), 0o700); err != nil {
			t.Fatal(err)
		}
		_, err := ReleaseOf(t.Context(), binary)
		if want == "" && err == nil {
			continue
		}
		want = strings.ReplaceAll(want, "BINARY", binary) + otherEnvoy
		if err == nil || err.Error() != want {
			t.Errorf("%s: %v, want %s", says, err, want)
		}
	}
}

// TestOldRelease checks that what is printed for Envoy 1.36 has its retries in
// the filter, since 1.36 refuses them at the cluster.
func TestOldRelease(t *testing.T) {
	for name, print := range map[string]func(Options) ([]byte, error){
		"plain": Plain, "istio": Istio, "istio-gateway": IstioGateway, "istio-waypoint": IstioWaypoint,
		"istio, claims": func(o Options) ([]byte, error) { o.Metadata = true; return Istio(o) },
	} {
		for release, atCluster := range map[Release]bool{{}: true, {1, 40}: true, {1, 37}: true, {1, 36}: false} {
			text, err := print(Options{Envoy: release})
			if err != nil {
				t.Fatal(err)
			}
			if got := strings.Contains(string(text), "max_interval: 0.02s"); got != atCluster {
				t.Errorf("%s for %v: retries at the cluster: %v", name, release, got)
			}
			if got := strings.Contains(string(text), "max_interval: 0.2s"); got == atCluster {
				t.Errorf("%s for %v: retries in the filter: %v", name, release, got)
			}
		}
	}
}
