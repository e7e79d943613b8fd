// Package k8s adds the sluice sidecar to Kubernetes pods. Inject is a pure
// function from a pod to a pod; Webhook calls it for each pod that is created
// in a cluster, and Manifest for each pod template in a manifest.
package k8s

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"reflect"
	"regexp"
	"slices"
	"strconv"
)

// namePrefix begins all labels and annotations of sluice.
const namePrefix = "sluice.dev/"

// injectLabel is the label of a namespace or a pod that turns injection on or
// off: enabled or disabled. The pod's label takes precedence.
const injectLabel = "sluice.dev/inject"

// Annotations that Inject writes: the Stamp, and a hash of the container that it
// made for this pod. With the hash a later injection can tell whether it would
// make the same container, and then keeps what others have changed in it.
const (
	annotationInjected  = "sluice.dev/injected"
	annotationContainer = "sluice.dev/injected-container"
)

// Names and paths that Inject writes into pods.
const (
	containerName = "sluice"
	configVolume  = "sluice-config"
	socketVolume  = "sluice-socket"
	socketDir     = "/run/sluice"
	configDir     = "/etc/sluice"
)

// istioProxy is the name of Istio's container. An Envoy of this name reaches
// sluice by loopback TCP, any other one by the unix socket in socketDir.
const istioProxy = "istio-proxy"

// Ports that sluice listens on in a pod. It listens on grpcPort only if Envoy
// is istioProxy.
const (
	grpcPort    = 9001
	adminPort   = 9002
	metricsPort = 9003
)

// Options are the inputs of an injection besides the pod.
type Options struct {
	// Image is sluice's image. A pod's annotation takes precedence.
	Image string
	// User is the user ID of the sidecar, from 1 to 2147483647, or PlatformUser.
	// If it is empty, it is DefaultUser. A pod's annotation takes precedence.
	User string
	// Resources are the sidecar's resources, as ParseResources returns them. What
	// they do not set has its default; so does everything if they are nil. A pod's
	// annotation takes precedence.
	Resources map[string]any
	// Version is the version of this program, for the Stamp.
	Version string
	// Namespace is the pod's namespace. If it is empty, the kubelet fills it in
	// when the pod starts.
	Namespace string
	// Workload is the name of the Deployment or other object that the pod
	// belongs to. The default domain is Namespace/Workload.
	Workload string
}

// PlatformUser leaves the sidecar's user ID to the platform, such as an OpenShift
// cluster, which assigns one by its security context constraints.
const PlatformUser = "platform"

// DefaultUser is the user ID of sluice's image, and by default of the sidecar.
const DefaultUser = "65532"

// CheckUser returns an error if user is not one that Options can have.
func CheckUser(user string) error {
	if user == "" || user == PlatformUser {
		return nil
	}
	if n, err := strconv.ParseInt(user, 10, 32); err != nil || n < 1 || strconv.FormatInt(n, 10) != user {
		return fmt.Errorf("%s: must be a user ID from 1 to 2147483647, or %s", quote(user), PlatformUser)
	}
	return nil
}

var imagePattern = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._:/@-]*$`)

// CheckImage returns an error if image is not an image reference that a pod can
// have, or is longer than 512 bytes.
func CheckImage(image string) error {
	if len(image) > maxAnnotation || !imagePattern.MatchString(image) {
		return fmt.Errorf("%s: must be an image reference of at most %d bytes, such as registry.example.com/sluice:v1",
			quote(image), maxAnnotation)
	}
	return nil
}

// Inject returns a copy of a pod with the sluice sidecar added. pod is a Pod or
// a pod template, decoded from JSON or YAML; it is not modified, but the copy
// shares unchanged parts with it. Injecting a pod again brings sluice's part of
// it up to date, and changes nothing if the options are the same.
//
// Inject returns pod itself if there is nothing to change. If the pod cannot
// have a sidecar, skipped is the reason; it is empty if the pod's label turns
// injection off. An error means that the pod must not start without a sidecar:
// its label asks for one that it cannot have, or one of its annotations is
// invalid. Inject is safe for concurrent use.
func Inject(pod map[string]any, o Options) (injected map[string]any, skipped string, err error) {
	metadata, spec := objectField(pod, "metadata"), objectField(pod, "spec")
	if len(spec) == 0 {
		return nil, "", errors.New("missing spec")
	}
	required := false
	switch v, given := objectField(metadata, "labels")[injectLabel]; {
	case !given:
	case v == "enabled":
		required = true
	case v == "disabled":
		return pod, "", nil
	default:
		return nil, "", fmt.Errorf("label %s: %s: must be enabled or disabled", injectLabel, quote(v))
	}
	if v := spec["hostNetwork"]; v != nil {
		// YAML 1.1 reads yes and on as true, YAML 1.2 as strings.
		if _, ok := v.(bool); !ok {
			return nil, "", fmt.Errorf("spec.hostNetwork: %s: must be true or false", quote(v))
		}
	}
	a, err := readAnnotations(metadata)
	if err != nil {
		return nil, "", err
	}
	skip := func(reason string) (map[string]any, string, error) {
		if required {
			return nil, "", fmt.Errorf("sluice cannot be injected: %s", reason)
		}
		return pod, reason, nil
	}
	envoy, reason, err := findEnvoy(metadata, spec, a)
	if err != nil {
		return nil, "", err
	}
	if reason != "" {
		return skip(reason)
	}
	if err := a.checkRequired(o); err != nil {
		return nil, "", err
	}
	if err := checkLists(spec, envoy); err != nil {
		return nil, "", err
	}

	tcp := envoy == istioProxy
	out, metadata, spec := maps.Clone(pod), maps.Clone(metadata), maps.Clone(spec)
	out["metadata"], out["spec"] = metadata, spec
	container := sidecarContainer(o, a, tcp)
	made := hash(container, object{"config": a.config}) // the name is in a volume only
	// API servers call a webhook again after others have changed the pod, for
	// example sluice's image to that of a mirror. What they have changed stays.
	merge, put := mergeContainer, upsert
	if objectField(metadata, "annotations")[annotationContainer] == made {
		merge, put = completeContainer, insert
	}
	setContainer(spec, container, merge)
	if len(objectField(spec, "resources")) > 0 {
		resources, reason := raisePodRequests(spec)
		if reason != "" {
			return skip(reason)
		}
		spec["resources"] = resources
	}
	setVolumes(spec, a, tcp, put)
	setSocketMounts(spec, envoy, tcp, put)
	annotations := maps.Clone(objectField(metadata, "annotations"))
	if annotations == nil {
		annotations = object{}
	}
	annotations[annotationInjected] = Stamp(o)
	annotations[annotationContainer] = made
	metadata["annotations"] = annotations
	if reflect.DeepEqual(out, pod) {
		return pod, "", nil
	}
	return out, "", nil
}

// checkLists returns an error for the first field that Inject adds to and that is
// not a list.
func checkLists(spec object, envoy string) error {
	check := func(o object, field, path string) error {
		v := o[field]
		if _, ok := v.([]any); v == nil || ok {
			return nil
		}
		return fmt.Errorf("%s.%s: %s: must be a list", path, field, quote(v))
	}
	for _, field := range []string{"initContainers", "containers", "volumes"} {
		if err := check(spec, field, "spec"); err != nil {
			return err
		}
		for i, c := range listField(spec, field) {
			c, _ := c.(object)
			if c["name"] != envoy {
				continue
			}
			if err := check(c, "volumeMounts", fmt.Sprintf("spec.%s[%d]", field, i)); err != nil {
				return err
			}
		}
	}
	return nil
}

// setContainer puts sluice's container directly after a native istio-proxy,
// or else first among the init containers, so that sluice is ready before the
// app starts and stops after it. merge returns what becomes of one that the pod
// already has: it is mergeContainer or completeContainer.
func setContainer(spec, container object, merge func(existing, ours object) object) {
	init := listField(spec, "initContainers")
	if i := indexByName(init, containerName); i >= 0 {
		container = merge(init[i].(object), container)
		init = slices.Delete(init, i, i+1)
	}
	at := 0
	if i := indexByName(init, istioProxy); i >= 0 && isNativeSidecar(init[i].(object)) {
		at = i + 1
	}
	spec["initContainers"] = slices.Insert(init, at, any(container))
}

// setVolumes adds the volumes that sluice's container mounts, and removes
// those that an earlier injection has added and that are not needed any more. put
// is upsert or insert.
func setVolumes(spec object, a annotations, tcp bool, put func(list []any, o object) []any) {
	volumes := listField(spec, "volumes")
	if a.config != "" {
		volumes = put(volumes, object{
			"name":      configVolume,
			"configMap": object{"name": a.config, "optional": false, "defaultMode": 0o644},
		})
	} else {
		volumes = removeByName(volumes, configVolume)
	}
	if tcp {
		volumes = removeByName(volumes, socketVolume)
	} else {
		// In memory: the cluster autoscaler does not evict pods with files on the
		// node's disk.
		volumes = put(volumes, object{"name": socketVolume, "emptyDir": object{"medium": "Memory"}})
	}
	if len(volumes) > 0 {
		spec["volumes"] = volumes
	} else if len(listField(spec, "volumes")) > 0 { // all were sluice's
		delete(spec, "volumes")
	}
}

// setSocketMounts mounts the directory of the unix socket, read-only, in
// Envoy's container, and in no other container but sluice's own. With tcp no
// container mounts it. put is upsert or insert.
func setSocketMounts(spec object, envoy string, tcp bool, put func(list []any, o object) []any) {
	for _, field := range []string{"initContainers", "containers"} {
		containers := listField(spec, field)
		for i, c := range containers {
			c, _ := c.(object)
			if c == nil || c["name"] == containerName {
				continue
			}
			mounts := listField(c, "volumeMounts")
			switch {
			case !tcp && c["name"] == envoy:
				mounts = put(mounts, object{"name": socketVolume, "mountPath": socketDir, "readOnly": true})
			case indexByName(mounts, socketVolume) >= 0:
				mounts = removeByName(mounts, socketVolume)
			default:
				continue
			}
			c = maps.Clone(c)
			if c["volumeMounts"] = mounts; len(mounts) == 0 {
				delete(c, "volumeMounts")
			}
			containers[i] = c
		}
		if len(containers) > 0 {
			spec[field] = containers
		}
	}
}

// Stamp returns the value of the annotation sluice.dev/injected: the version,
// a hyphen, and a hash of everything in sluice's container that does not depend
// on the pod. A pod with another stamp was injected by another version or with
// another image.
func Stamp(o Options) string {
	o.Namespace, o.Workload = "", ""
	return o.Version + "-" + hash(sidecarContainer(o, allAnnotations, false), sidecarContainer(o, allAnnotations, true))
}

// hash returns a short hash of containers.
func hash(containers ...object) string {
	h := sha256.New()
	if err := json.NewEncoder(h).Encode(containers); err != nil {
		panic(err) // they consist of strings and numbers
	}
	return hex.EncodeToString(h.Sum(nil)[:5])
}
