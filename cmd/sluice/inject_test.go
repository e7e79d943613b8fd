package main

import (
	"strings"
	"testing"
)

func TestInjectCommand(t *testing.T) {
	in := file(t, "pod.yaml", "kind: Pod\nmetadata: {name: a, annotations: {sluice.dev/in-process: \"true\"}}\nspec: {containers: [{name: envoy}]}\n---\nkind: Pod\nmetadata: {name: b}\nspec: {containers: [{name: app}]}\n")
	status, stdout, stderr := sluice(t, nil, "inject", "-f", in, "--image", "sluice:test")
	if status != 0 || !strings.Contains(stdout, "sluice:test") || !strings.HasPrefix(stderr, "warning: Pod b: ") {
		t.Errorf("%d\n%s\n%s", status, stdout, stderr)
	}
	in = file(t, "refused.yaml", "kind: Pod\nmetadata: {name: a}\nspec: {containers: [{name: envoy}]}\n")
	if status, stdout, stderr := sluice(t, nil, "inject", "-f", in); status != 1 || stdout != "" || !strings.Contains(stderr, "Pod a: sluice requires Redis") {
		t.Errorf("%d\n%s\n%s", status, stdout, stderr)
	}
}
