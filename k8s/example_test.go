package k8s_test

import (
	"fmt"
	"strings"

	"github.com/sluiceproxy/sluice/k8s"
)

func ExampleInject() {
	pod := map[string]any{
		"metadata": map[string]any{"annotations": map[string]any{"sluice.dev/redis-secret": "redis"}},
		"spec": map[string]any{"containers": []any{
			map[string]any{"name": "app"},
			map[string]any{"name": "envoy"},
		}},
	}
	injected, skipped, err := k8s.Inject(pod, k8s.Options{
		Image: "ghcr.io/sluiceproxy/sluice:v0.1.0", Version: "v0.1.0", Namespace: "shop", Workload: "web",
	})
	if err != nil || skipped != "" {
		fmt.Println(err, skipped)
		return
	}
	init := injected["spec"].(map[string]any)["initContainers"].([]any)
	sidecar := init[0].(map[string]any)
	fmt.Println(sidecar["name"], sidecar["image"], sidecar["restartPolicy"])
	// Output: sluice ghcr.io/sluiceproxy/sluice:v0.1.0 Always
}

func ExampleManifest() {
	pod := `kind: Pod
metadata: {name: web}
spec:
  containers:
  - name: app # without an Envoy
`
	out, skipped, err := k8s.Manifest([]byte(pod), k8s.Options{Image: "sluice:v0.1.0", Version: "v0.1.0"})
	fmt.Println(string(out) == pod, err)
	reason, _, _ := strings.Cut(skipped[0], ";")
	fmt.Println(reason)
	// Output:
	// true <nil>
	// Pod web: no container is named istio-proxy or envoy
}
