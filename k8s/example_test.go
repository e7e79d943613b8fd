package k8s_test

import (
	"encoding/json"
	"fmt"

	"github.com/sluiceproxy/sluice/k8s"
)

// A pod with an Envoy gets sluice as a native sidecar.
func ExampleInject() {
	var pod map[string]any
	err := json.Unmarshal([]byte(`{
		"metadata": {
			"labels": {"sluice.dev/inject": "enabled"},
			"annotations": {"sluice.dev/redis-secret": "redis"}
		},
		"spec": {"containers": [{"name": "envoy", "image": "envoy"}, {"name": "app", "image": "app"}]}
	}`), &pod)
	if err != nil {
		fmt.Println(err)
		return
	}
	injected, skipped, err := k8s.Inject(pod, k8s.Options{Image: "sluice:v1", Version: "v1", Namespace: "shop", Workload: "web"})
	if err != nil || skipped != "" {
		fmt.Println(skipped, err)
		return
	}
	for _, container := range injected["spec"].(map[string]any)["initContainers"].([]any) {
		c := container.(map[string]any)
		fmt.Println(c["name"], c["image"], c["restartPolicy"])
	}
	// Output: sluice sluice:v1 Always
}
