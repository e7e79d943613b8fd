package main

import (
	"strings"
	"testing"
)

func TestInjectCommand(t *testing.T) {
	in := file(
		t,
		"pod.yaml",
		"kind: Pod\nmetadata: {name: a, annotations: {sluice.dev/in-process: \"true\"}}\nspec: {containers: [{name: "+
			"envoy}]}\n---\nkind: Pod\nmetadata: {name: b}\nspec: {containers: [{name: app}]}\n",
	)
	status, stdout, stderr := sluice(t, nil, "inject", "-f", in, "--image", "sluice:test")
	if status != 0 || !strings.Contains(stdout, "sluice:test") || !strings.HasPrefix(stderr, "warning: Pod b: ") {
		t.Errorf("%d\n%s\n%s", status, stdout, stderr)
	}
	if status, stdout, stderr := sluice(t, nil, "inject", "-f", in, "--strict"); status != 1 || stdout != "" ||
		!strings.HasPrefix(stderr, "warning: Pod b: ") {
		t.Errorf("--strict: %d\n%s\n%s", status, stdout, stderr)
	}
	status, stdout, stderr = sluice(
		t, nil, "inject", "-f", in, "--run-as-user", "platform", "--resources", "{limits: {cpu: 1}}",
	)
	if status != 0 || strings.Contains(stdout, "runAsUser") || !strings.Contains(stdout, "cpu: \"1\"") {
		t.Errorf("%d\n%s\n%s", status, stdout, stderr)
	}
	for _, args := range [][]string{
		{"--run-as-user", "root"}, {"--resources", "{limits: {cpu: many}}"}, {"--image", "a b"},
	} {
		if status, _, stderr := sluice(t, nil, append([]string{"inject", "-f", in}, args...)...); status != 2 ||
			!strings.Contains(stderr, args[0]) {
			t.Errorf("%q: %d %s", args, status, stderr)
		}
	}
	in = file(t, "refused.yaml", "kind: Pod\nmetadata: {name: a}\nspec: {containers: [{name: envoy}]}\n")
	if status, stdout, stderr := sluice(t, nil, "inject", "-f", in); status != 1 || stdout != "" ||
		!strings.Contains(stderr, "Pod a: sluice requires Redis") {
		t.Errorf("%d\n%s\n%s", status, stdout, stderr)
	}
}
