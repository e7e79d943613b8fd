package k8s

import (
	"fmt"
	"reflect"
	"slices"
	"strconv"
)

// findEnvoy returns the name of the pod's Envoy container. If the pod cannot
// have a sidecar, reason says why. An error is a mistake in the annotations.
func findEnvoy(metadata, spec object, a annotations) (envoy, reason string, err error) {
	given := objectField(metadata, "annotations")
	_, injected := given[annotationInjected]
	if _, mirror := given["kubernetes.io/config.mirror"]; mirror {
		return "", "it is the mirror pod of a static pod", nil
	}
	if spec["hostNetwork"] == true {
		return "", "the pod uses the node's network (hostNetwork: true), where others could reach sluice's ports", nil
	}
	if runsOnWindows(spec) {
		return "", "the pod runs on Windows; sluice requires Linux", nil
	}
	init, containers := listField(spec, "initContainers"), listField(spec, "containers")
	running := slices.Clone(containers)
	for _, c := range init {
		if c, _ := c.(object); c != nil && isNativeSidecar(c) {
			running = append(running, c)
		}
	}
	for _, name := range []string{a.envoy, istioProxy, "envoy"} {
		if name != "" && name != containerName && indexByName(running, name) >= 0 {
			envoy = name
			break
		}
		if name != "" && name == a.envoy {
			return "", "", fmt.Errorf("annotation %s: no container or native sidecar is named %q",
				annotationEnvoyContainer, name)
		}
	}
	if envoy == "" {
		return "", fmt.Sprintf("no container is named istio-proxy or envoy; if another one is Envoy, name it in "+
			"annotation %s",
			annotationEnvoyContainer), nil
	}
	if indexByName(containers, containerName) >= 0 || !injected && indexByName(init, containerName) >= 0 {
		return "", "the pod already has a container named " + containerName, nil
	}
	if !injected {
		for _, name := range []string{configVolume, socketVolume} {
			if indexByName(listField(spec, "volumes"), name) >= 0 {
				return "", "the pod already has a volume named " + name, nil
			}
		}
	}
	return envoy, findConflict(running, envoy), nil
}

// findConflict returns the reason why sluice cannot run beside the containers
// that run as long as the pod does: a port or a mount path that sluice needs.
// It returns "" if there is none.
func findConflict(running []any, envoy string) string {
	ports := []int{adminPort, metricsPort}
	if envoy == istioProxy {
		ports = append(ports, grpcPort)
	}
	for _, c := range running {
		c, _ := c.(object)
		if c == nil || c["name"] == containerName {
			continue
		}
		for _, p := range listField(c, "ports") {
			p, _ := p.(object)
			n, err := strconv.Atoi(fmt.Sprint(p["containerPort"]))
			if err == nil && slices.Contains(ports, n) && (p["protocol"] == nil || p["protocol"] == "TCP") {
				return fmt.Sprintf("container %s uses port %d, which sluice needs", quote(c["name"]), n)
			}
		}
		for _, m := range listField(c, "volumeMounts") {
			m, _ := m.(object)
			if c["name"] == envoy && m["mountPath"] == socketDir && m["name"] != socketVolume {
				return fmt.Sprintf("container %q already mounts a volume at %s, which sluice needs", envoy, socketDir)
			}
		}
	}
	return ""
}

// runsOnWindows reports whether the spec says that the pod runs on Windows: by
// its os, node selector, security context or required node affinity.
func runsOnWindows(spec object) bool {
	const key, betaKey = "kubernetes.io/os", "beta.kubernetes.io/os"
	selector := objectField(spec, "nodeSelector")
	if objectField(spec, "os")["name"] == "windows" || selector[key] == "windows" || selector[betaKey] == "windows" ||
		len(objectField(objectField(spec, "securityContext"), "windowsOptions")) > 0 {
		return true
	}
	affinity := objectField(objectField(spec, "affinity"), "nodeAffinity")
	required := objectField(affinity, "requiredDuringSchedulingIgnoredDuringExecution")
	terms := listField(required, "nodeSelectorTerms")
	selectsWindows := func(term any) bool {
		o, _ := term.(object)
		return slices.ContainsFunc(listField(o, "matchExpressions"), func(expression any) bool {
			e, _ := expression.(object)
			return (e["key"] == key || e["key"] == betaKey) && e["operator"] == "In" &&
				reflect.DeepEqual(e["values"], []any{"windows"})
		})
	}
	// A node has to match only one of the terms.
	return len(terms) > 0 && !slices.ContainsFunc(terms, func(term any) bool { return !selectsWindows(term) })
}
