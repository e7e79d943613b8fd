package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"
)

// TestInjectMemory holds the peak memory of sluice inject for a List of 2,000
// Deployments, as kubectl prints them.
func TestInjectMemory(t *testing.T) {
	if isRace {
		t.Skip("the race detector takes several times the memory; .ci/test runs this without")
	}
	const deployment = `{"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"annotations":
{"deployment.kubernetes.io/revision": "1"}, "creationTimestamp": "2026-01-01T00:00:00Z", "generation": 1,
"labels": {"app": "web"}, "name": "web-%d", "namespace": "shop", "resourceVersion": "123456",
"uid": "01234567-89ab-cdef-0123-456789abcdef"}, "spec": {"progressDeadlineSeconds": 600, "replicas": 3,
"revisionHistoryLimit": 10, "selector": {"matchLabels": {"app": "web"}}, "strategy": {"rollingUpdate":
{"maxSurge": "25%%", "maxUnavailable": "25%%"}, "type": "RollingUpdate"}, "template": {"metadata": {"annotations":
{"sluice.dev/config": "limits", "sluice.dev/redis-secret": "redis"}, "labels": {"app": "web"}}, "spec": {"containers":
[{"env": [{"name": "A", "value": "b"}, {"name": "C", "value": "d"}], "image": "web:1", "imagePullPolicy":
"IfNotPresent", "name": "web", "ports": [{"containerPort": 8080, "protocol": "TCP"}], "resources": {},
"terminationMessagePath": "/dev/termination-log", "terminationMessagePolicy": "File"}, {"image": "envoy:1",
"imagePullPolicy": "IfNotPresent", "name": "envoy", "resources": {"limits": {"cpu": "1"}}, "terminationMessagePath":
"/dev/termination-log", "terminationMessagePolicy": "File", "volumeMounts": [{"mountPath": "/etc/envoy", "name":
"envoy"}]}], "dnsPolicy": "ClusterFirst", "restartPolicy": "Always", "schedulerName": "default-scheduler",
"securityContext": {}, "terminationGracePeriodSeconds": 30, "volumes": [{"configMap": {"defaultMode": 420, "name":
"envoy"}, "name": "envoy"}]}}}, "status": {"availableReplicas": 3, "conditions": [{"lastTransitionTime":
"2026-01-01T00:00:00Z", "lastUpdateTime": "2026-01-01T00:00:00Z", "message": "Deployment has minimum availability.",
"reason": "MinimumReplicasAvailable", "status": "True", "type": "Available"}], "observedGeneration": 1,
"readyReplicas": 3, "replicas": 3, "updatedReplicas": 3}}`
	// About 140 MiB are used; a busy machine collects garbage later.
	const n, most = 2000, 165 << 20
	items := make([]any, n)
	for i := range items {
		if err := json.Unmarshal(fmt.Appendf(nil, deployment, i), &items[i]); err != nil {
			t.Fatal(err)
		}
	}
	list := map[string]any{"apiVersion": "v1", "items": items, "kind": "List", "metadata": map[string]any{}}
	inYAML, errYAML := yaml.Marshal(list)
	inLine, errLine := json.Marshal(list)
	indented, errIndented := json.MarshalIndent(list, "", "    ")
	if err := errors.Join(errYAML, errLine, errIndented); err != nil {
		t.Fatal(err)
	}
	for name, in := range map[string][]byte{"YAML": inYAML, "JSON on one line": inLine, "JSON over lines": indented} {
		t.Run(name, func(t *testing.T) {
			p := start(t, "sluice", nil, "inject", "-f", file(t, "list", string(in)))
			stdout, err := p.cmd.StdoutPipe()
			if err := errors.Join(err, p.cmd.Start()); err != nil {
				t.Fatal(err)
			}
			defer time.AfterFunc(4*within, func() { _ = p.cmd.Process.Kill() }).Stop()
			// After its first byte the process waits until the pipe takes the rest.
			first := make([]byte, 1)
			if _, err := io.ReadFull(stdout, first); err != nil {
				t.Fatal(err)
			}
			got := peak(t, p.cmd.Process.Pid)
			t.Logf("%d MiB for %d kB", got>>20, len(in)>>10)
			if got > most {
				t.Errorf("%d MiB, at most %d", got>>20, most>>20)
			}
			out, err := io.ReadAll(stdout)
			if err := errors.Join(err, p.cmd.Wait()); err != nil {
				t.Fatal(err)
			}
			if count := bytes.Count(out, []byte("sluice-metrics")); count != n {
				t.Errorf("%d Deployments have a sidecar", count)
			}
		})
	}
}
