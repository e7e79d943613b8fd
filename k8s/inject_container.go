package k8s

import (
	"cmp"
	"maps"
	"slices"
	"strconv"
)

// sidecarContainer returns sluice's container. With tcp Envoy reaches sluice
// by loopback TCP, else by a unix socket.
//
// Fields that Kubernetes would set to a default are set here, so that a pod
// that the API server has stored equals the one that was sent.
func sidecarContainer(o Options, a annotations, tcp bool) object {
	image, domain := cmp.Or(a.image, o.Image), a.domain
	if domain == "" {
		namespace := o.Namespace
		if namespace == "" {
			namespace = "$(POD_NAMESPACE)" // the kubelet expands it
		}
		domain = namespace + "/" + o.Workload
	}
	grpc := "unix://" + socketDir + "/authz.sock"
	if tcp {
		grpc = "127.0.0.1:" + strconv.Itoa(grpcPort)
	}
	fieldRef := func(name, path string) any {
		return object{"name": name, "valueFrom": object{"fieldRef": object{"apiVersion": "v1", "fieldPath": path}}}
	}
	env := []any{
		fieldRef("POD_NAME", "metadata.name"),
		fieldRef("POD_NAMESPACE", "metadata.namespace"),
		object{"name": "SLUICE_DOMAIN", "value": domain},
		object{"name": "SLUICE_GRPC", "value": grpc},
		object{"name": "SLUICE_METRICS", "value": "0.0.0.0:" + strconv.Itoa(metricsPort)},
		object{"name": "GOMEMLIMIT", "valueFrom": object{"resourceFieldRef": object{
			"containerName": containerName, "resource": "limits.memory", "divisor": "0",
		}}},
	}
	var mounts []any
	if a.config != "" {
		env = append(env, object{"name": "SLUICE_CONFIG", "value": configDir + "/sluice.yaml"})
		mounts = append(mounts, object{"name": configVolume, "mountPath": configDir, "readOnly": true})
	}
	if a.redis != "" {
		env = append(env, object{"name": "SLUICE_REDIS", "valueFrom": object{"secretKeyRef": object{
			"name": a.redis, "key": "url", "optional": false,
		}}})
	}
	if !tcp {
		mounts = append(mounts, object{"name": socketVolume, "mountPath": socketDir})
	}
	defaultResources := object{
		"requests": object{"cpu": "50m", "memory": "32Mi"},
		"limits":   object{"memory": "128Mi"},
	}
	c := object{
		"name":          containerName,
		"image":         image,
		"args":          []any{"run"},
		"restartPolicy": "Always",
		"env":           env,
		"ports":         []any{object{"name": "sluice-metrics", "containerPort": metricsPort, "protocol": "TCP"}},
		"resources":     mergeResources(mergeResources(defaultResources, o.Resources), a.resources),
		"startupProbe": object{
			"exec":          object{"command": []any{"/sluice", "healthcheck"}},
			"periodSeconds": 1, "timeoutSeconds": 1, "successThreshold": 1, "failureThreshold": 60,
		},
	}
	security := object{
		"runAsNonRoot": true, "readOnlyRootFilesystem": true, "allowPrivilegeEscalation": false, "privileged": false,
		"capabilities": object{"drop": []any{"ALL"}}, "seccompProfile": object{"type": "RuntimeDefault"},
	}
	if user := cmp.Or(a.user, o.User, DefaultUser); user != PlatformUser {
		id, _ := strconv.Atoi(user) // CheckUser has accepted it
		security["runAsUser"], security["runAsGroup"] = id, id
	}
	c["securityContext"] = security
	if len(mounts) > 0 {
		c["volumeMounts"] = mounts
	}
	return c
}

// mergeContainer updates a container from an earlier injection to ours. The
// fields that sidecarContainer sets take its values. What others have added
// since is kept: environment variables and mounts of other webhooks, the mount
// of a service account token, resources from a LimitRange, and defaults of
// Kubernetes.
//
// So a resource that the annotation set at an earlier injection is kept as well
// after the annotation is gone.
func mergeContainer(existing, ours object) object {
	fields := maps.Clone(ours)
	// All the names that sidecarContainer can write, to tell its own entries
	// from those that others have added.
	all := sidecarContainer(Options{}, allAnnotations, false)
	for _, field := range []string{"env", "volumeMounts"} {
		added := slices.DeleteFunc(listField(existing, field), func(v any) bool {
			o, _ := v.(object)
			name, _ := o["name"].(string)
			return indexByName(listField(all, field), name) >= 0
		})
		if list := append(listField(ours, field), added...); len(list) > 0 {
			fields[field] = list
		}
	}
	fields["resources"] = mergeResources(objectField(existing, "resources"), objectField(ours, "resources"))
	security := merged(objectField(existing, "securityContext"), nil)
	delete(security, "runAsUser") // left to the platform unless ours has it
	delete(security, "runAsGroup")
	fields["securityContext"] = merged(security, objectField(ours, "securityContext"))
	out := maps.Clone(existing)
	for name, v := range fields {
		if !equalJSON(out[name], v) {
			out[name] = v
		}
	}
	if _, ok := fields["volumeMounts"]; !ok {
		delete(out, "volumeMounts")
	}
	return out
}

// completeContainer returns a container that an injection of the same has made,
// and that others have changed since, with what it lacks of ours.
func completeContainer(existing, ours object) object {
	out := maps.Clone(existing)
	for name, v := range ours {
		switch name {
		case "env", "volumeMounts", "ports":
			list := listField(existing, name)
			for _, element := range v.([]any) {
				list = insert(list, element.(object))
			}
			out[name] = list
		case "resources":
			out[name] = mergeResources(v.(object), objectField(existing, name))
		case "securityContext":
			out[name] = merged(v.(object), objectField(existing, name))
		default:
			if _, ok := existing[name]; !ok {
				out[name] = v
			}
		}
		if equalJSON(out[name], existing[name]) {
			out[name] = existing[name]
		}
	}
	return out
}

// isNativeSidecar reports whether an init container is a native sidecar, which
// runs as long as the pod does.
func isNativeSidecar(container object) bool { return container["restartPolicy"] == "Always" }
