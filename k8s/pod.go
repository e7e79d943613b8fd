// Package k8s puts sluice into pods: one pure function, pod in and pod out, which an admission webhook and a filter over manifests
// share.
package k8s

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"maps"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"
)

// The names that users write, and find in their pods.
const (
	label         = "sluice.dev/inject" // on a namespace or a pod: enabled or disabled
	stampName     = "sluice.dev/injected"
	containerName = "sluice"
	configVolume  = "sluice-config"
	socketVolume  = "sluice-socket"
	socketDir     = "/run/sluice"
	configDir     = "/etc/sluice"
	istioProxy    = "istio-proxy"
)

// The annotations that users write.
const (
	aConfig    = "sluice.dev/config"
	aRedis     = "sluice.dev/redis-secret"
	aDomain    = "sluice.dev/domain"
	aImage     = "sluice.dev/image"
	aResources = "sluice.dev/resources"
	aEnvoy     = "sluice.dev/envoy-container"
	aInProcess = "sluice.dev/in-process"
)

// Bounds on what others write, in bytes.
const (
	// longestAnnotation bounds each annotation that sluice reads, before it is
	// parsed. The longest that makes sense is an image with a digest.
	longestAnnotation = 512
	// longestName is the longest name that Kubernetes allows.
	longestName = 253
	// longestDomain is the longest domain that sluice run takes.
	longestDomain = 253
	// longestQuote bounds what a message quotes of a value.
	longestQuote = 80
)

// The ports that sluice binds in a pod. The first only where Envoy is istio-proxy, which is asked by loopback TCP.
const (
	grpcPort    = 9001
	adminPort   = 9002
	metricsPort = 9003
)

// Options are what an injection knows besides the pod.
type Options struct {
	Image     string // sluice's; a pod's annotation is over it
	Version   string // sluice's own, for the stamp
	Namespace string // the pod's; empty where only the cluster will know it
	Workload  string // the name of what the pod belongs to, for the default domain
}

// CheckImage reports an image that no pod can have.
func CheckImage(image string) error {
	if len(image) > longestAnnotation || !imagePattern.MatchString(image) {
		return fmt.Errorf("%s: allowed is an image of at most %d bytes, such as registry.example.com/sluice:v1", quote(image), longestAnnotation)
	}
	return nil
}

// object is JSON's, and what pods are read into: not a struct, since that would lose the fields that it does not know.
type object = map[string]any

var (
	domainPattern = regexp.MustCompile(`^[A-Za-z0-9._/-]+$`)
	imagePattern  = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._:/@-]*$`)
	namePattern   = regexp.MustCompile(`^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$`)
)

// Inject returns the pod with sluice in it, as a copy; pod, a Pod or a pod template as read from JSON or YAML, is not changed.
// Where the pod is not to have one it returns pod itself, and in skipped why, unless that is because the pod says so. An error is a
// refusal: the pod asks for what it cannot have, and must not start without it. Injecting twice is injecting once.
func Inject(pod map[string]any, o Options) (injected map[string]any, skipped string, err error) {
	metadata, spec := child(pod, "metadata"), child(pod, "spec")
	if len(spec) == 0 {
		return nil, "", fmt.Errorf("it has no spec")
	}
	explicit := false
	switch v, given := child(metadata, "labels")[label]; {
	case !given:
	case v == "enabled":
		explicit = true
	case v == "disabled":
		return pod, "", nil
	default:
		return nil, "", fmt.Errorf("label %s: %s: allowed are enabled and disabled", label, quote(v))
	}
	if v := spec["hostNetwork"]; v != nil {
		if _, ok := v.(bool); !ok { // YAML 1.1's yes and on are texts to some readers and true to others
			return nil, "", fmt.Errorf("spec.hostNetwork: %s: allowed are true and false", quote(v))
		}
	}
	a, err := readAnnotations(metadata)
	if err != nil {
		return nil, "", err
	}
	skip := func(why string) (map[string]any, string, error) {
		if explicit {
			return nil, "", fmt.Errorf("sluice cannot be injected: %s", why)
		}
		return pod, why, nil
	}
	envoy, why, err := fits(metadata, spec, a)
	if err != nil {
		return nil, "", err
	}
	if why != "" {
		return skip(why)
	}
	if a.redis == "" && !a.inProcess {
		return nil, "", fmt.Errorf("sluice needs a Redis, or each pod would have buckets of its own: name a Secret with the key url in annotation %s, or set %s: \"true\"", aRedis, aInProcess)
	}

	if len(o.Workload) > longestName {
		return nil, "", fmt.Errorf("the name %s has %d bytes; allowed are %d", quote(o.Workload), len(o.Workload), longestName)
	}
	if n := len(o.Namespace) + len("/") + len(o.Workload); a.domain == "" && n > longestDomain {
		return nil, "", fmt.Errorf("the default domain, namespace/workload, has %d bytes, and sluice takes at most %d: set annotation %s", n, longestDomain, aDomain)
	}

	tcp := envoy == istioProxy
	container := template(o, a, tcp)
	out, metadata, spec := maps.Clone(pod), maps.Clone(metadata), maps.Clone(spec)
	out["metadata"], out["spec"] = metadata, spec

	init := list(spec, "initContainers")
	if i := named(init, containerName); i >= 0 {
		container = overlay(init[i].(object), container)
		init = slices.Delete(init, i, i+1)
	}
	at := 0
	if i := named(init, istioProxy); i >= 0 && isNative(init[i].(object)) {
		at = i + 1
	}
	spec["initContainers"] = slices.Insert(init, at, any(container))
	if len(child(spec, "resources")) > 0 {
		resources, why := fit(spec)
		if why != "" {
			return skip(why)
		}
		spec["resources"] = resources
	}

	volumes := list(spec, "volumes")
	if a.config != "" {
		volumes = put(volumes, object{"name": configVolume, "configMap": object{"name": a.config, "optional": false, "defaultMode": 420}})
	} else {
		volumes = without(volumes, configVolume)
	}
	if tcp {
		volumes = without(volumes, socketVolume)
	} else {
		volumes = put(volumes, object{"name": socketVolume, "emptyDir": object{}})
	}
	if len(volumes) > 0 {
		spec["volumes"] = volumes
	} else {
		delete(spec, "volumes")
	}
	for _, field := range []string{"initContainers", "containers"} {
		containers := list(spec, field)
		for i, c := range containers {
			c, _ := c.(object)
			if c == nil || c["name"] == containerName {
				continue
			}
			mounts := list(c, "volumeMounts")
			switch {
			case !tcp && c["name"] == envoy:
				mounts = put(mounts, object{"name": socketVolume, "mountPath": socketDir, "readOnly": true})
			case named(mounts, socketVolume) >= 0:
				mounts = without(mounts, socketVolume)
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
	annotations := maps.Clone(child(metadata, "annotations"))
	if annotations == nil {
		annotations = object{}
	}
	annotations[stampName] = Stamp(o)
	metadata["annotations"] = annotations
	if reflect.DeepEqual(out, pod) {
		return pod, "", nil
	}
	return out, "", nil
}

// Stamp is what pods that are injected with these options are marked with: the version, and a hash of all that does not depend on
// the pod. A pod with another stamp is stale.
func Stamp(o Options) string {
	h := sha256.New()
	for _, tcp := range []bool{false, true} {
		if err := json.NewEncoder(h).Encode(template(Options{Image: o.Image}, everything, tcp)); err != nil {
			panic(err) // it is made of strings and numbers
		}
	}
	return o.Version + "-" + hex.EncodeToString(h.Sum(nil)[:5])
}

// annotations are what a pod says of how it wants sluice.
type annotations struct {
	config, redis, domain, image, envoy string
	resources                           object
	inProcess                           bool
}

// everything is what makes template write each field that it can, over both of its forms.
var everything = annotations{config: "config", redis: "redis"}

func readAnnotations(metadata object) (annotations, error) {
	var a annotations
	given := child(metadata, "annotations")
	for _, f := range []struct {
		name    string
		to      *string
		longest int
		pattern *regexp.Regexp
		allowed string
	}{
		{aConfig, &a.config, longestName, namePattern, "a ConfigMap's name"},
		{aRedis, &a.redis, longestName, namePattern, "a Secret's name"},
		{aDomain, &a.domain, longestDomain, domainPattern, "A-Z a-z 0-9 . _ / -"},
		{aImage, &a.image, longestAnnotation, imagePattern, "an image"},
		{aEnvoy, &a.envoy, longestName, namePattern, "a container's name"},
	} {
		v, ok := given[f.name]
		if !ok {
			continue
		}
		text, _ := v.(string)
		if f.name == aRedis && (len(text) > f.longest || !f.pattern.MatchString(text)) {
			// Not quoted: it may be the URL itself, with its password.
			return a, fmt.Errorf("annotation %s: allowed is %s, whose key url says where Redis is", f.name, f.allowed)
		}
		if len(text) > f.longest {
			return a, tooLong(f.name, text, f.longest)
		}
		if !f.pattern.MatchString(text) {
			return a, fmt.Errorf("annotation %s: %s: allowed is %s", f.name, quote(v), f.allowed)
		}
		*f.to = text
	}
	if v, ok := given[aInProcess]; ok {
		if v != "true" && v != "false" {
			return a, fmt.Errorf("annotation %s: %s: allowed are \"true\" and \"false\"", aInProcess, quote(v))
		}
		a.inProcess = v == "true"
	}
	if a.inProcess && a.redis != "" {
		return a, fmt.Errorf("annotations %s and %s say different things: keep one", aInProcess, aRedis)
	}
	if v, ok := given[aResources]; ok {
		text, ok := v.(string)
		if !ok {
			return a, fmt.Errorf("annotation %s: %s: allowed is a string; quote it", aResources, quote(v))
		}
		if len(text) > longestAnnotation {
			return a, tooLong(aResources, text, longestAnnotation)
		}
		var err error
		if a.resources, err = readResources(text); err != nil {
			return a, fmt.Errorf("annotation %s: %w", aResources, err)
		}
	}
	return a, nil
}

// tooLong reports an annotation of more bytes than are allowed.
func tooLong(name, text string, allowed int) error {
	return fmt.Errorf("annotation %s: %s has %d bytes; allowed are %d", name, quote(text), len(text), allowed)
}

// quote returns what a pod or a manifest says, quoted and short enough for a
// message, whatever its type and size: at most longestQuote bytes of a text,
// of a URL, which may hold a password, only the scheme, and only the kind of an
// object or a list.
func quote(v any) string {
	var text string
	switch v := v.(type) {
	case object:
		return "an object"
	case []any:
		return "a list"
	case string:
		text = v
	default: // a number, whose text may be long too, a boolean or null
		text = fmt.Sprint(v)
	}
	start := cut(text, longestQuote)
	if scheme, _, isURL := strings.Cut(start, "://"); isURL {
		start = scheme + "://"
	}
	if len(start) < len(text) {
		return strconv.Quote(start) + "..."
	}
	return strconv.Quote(text)
}

// cut returns the text, or what whole runes of it fit into so many bytes.
func cut(text string, most int) string {
	if len(text) <= most {
		return text
	}
	for most > 0 && !utf8.RuneStart(text[most]) {
		most--
	}
	return text[:most]
}

// onWindows says that a pod is to run there, so far as it says so.
func onWindows(spec object) bool {
	const key, old = "kubernetes.io/os", "beta.kubernetes.io/os"
	selector := child(spec, "nodeSelector")
	if child(spec, "os")["name"] == "windows" || selector[key] == "windows" || selector[old] == "windows" || len(child(child(spec, "securityContext"), "windowsOptions")) > 0 {
		return true
	}
	terms := list(child(child(child(spec, "affinity"), "nodeAffinity"), "requiredDuringSchedulingIgnoredDuringExecution"), "nodeSelectorTerms")
	return len(terms) > 0 && !slices.ContainsFunc(terms, func(term any) bool { // one of which has to hold
		o, _ := term.(object)
		return !slices.ContainsFunc(list(o, "matchExpressions"), func(expression any) bool {
			e, _ := expression.(object)
			return (e["key"] == key || e["key"] == old) && e["operator"] == "In" && reflect.DeepEqual(e["values"], []any{"windows"})
		})
	})
}

// fits returns the name of the pod's Envoy, or why the pod can have no sluice. An error is a mistake of the annotations'.
func fits(metadata, spec object, a annotations) (envoy, why string, err error) {
	given := child(metadata, "annotations")
	_, ours := given[stampName]
	if _, mirror := given["kubernetes.io/config.mirror"]; mirror {
		return "", "the pod is a static pod's mirror", nil
	}
	if spec["hostNetwork"] == true {
		return "", "the pod is in the node's network (hostNetwork), where its ports would be everybody's", nil
	}
	if onWindows(spec) {
		return "", "the pod runs on Windows, and sluice on Linux", nil
	}
	init, containers := list(spec, "initContainers"), list(spec, "containers")
	running := slices.Clone(containers)
	for _, c := range init {
		if c, _ := c.(object); c != nil && isNative(c) {
			running = append(running, c)
		}
	}
	for _, name := range []string{a.envoy, istioProxy, "envoy"} {
		if name != "" && name != containerName && named(running, name) >= 0 {
			envoy = name
			break
		}
		if name != "" && name == a.envoy {
			return "", "", fmt.Errorf("annotation %s: no container that keeps running is named %q", aEnvoy, name)
		}
	}
	if envoy == "" {
		return "", fmt.Sprintf("no container is named istio-proxy or envoy; annotation %s can name another", aEnvoy), nil
	}
	if named(containers, containerName) >= 0 || !ours && named(init, containerName) >= 0 {
		return "", "the pod has a container named sluice already", nil
	}
	if !ours {
		for _, name := range []string{configVolume, socketVolume} {
			if named(list(spec, "volumes"), name) >= 0 {
				return "", "the pod has a volume named " + name + " already", nil
			}
		}
	}
	ports := []int{adminPort, metricsPort}
	if envoy == istioProxy {
		ports = append(ports, grpcPort)
	}
	for _, c := range running {
		c, _ := c.(object)
		if c == nil || c["name"] == containerName {
			continue
		}
		for _, p := range list(c, "ports") {
			p, _ := p.(object)
			if n, err := strconv.Atoi(fmt.Sprint(p["containerPort"])); err == nil && slices.Contains(ports, n) && (p["protocol"] == nil || p["protocol"] == "TCP") {
				return "", fmt.Sprintf("container %s has port %d, which sluice needs", quote(c["name"]), n), nil
			}
		}
		for _, m := range list(c, "volumeMounts") {
			if m, _ := m.(object); c["name"] == envoy && m["mountPath"] == socketDir && m["name"] != socketVolume {
				return "", fmt.Sprintf("container %s has something else mounted at %s", envoy, socketDir), nil
			}
		}
	}
	return envoy, "", nil
}

// template is sluice's container. Defaults of Kubernetes are written out where it would write them into what it stores: what comes
// back is then what was sent.
func template(o Options, a annotations, tcp bool) object {
	image, domain := o.Image, a.domain
	if a.image != "" {
		image = a.image
	}
	if domain == "" {
		namespace := o.Namespace
		if namespace == "" {
			namespace = "$(POD_NAMESPACE)" // Kubernetes fills it in
		}
		domain = namespace + "/" + o.Workload
	}
	grpc := "unix://" + socketDir + "/authz.sock"
	if tcp {
		grpc = "127.0.0.1:" + strconv.Itoa(grpcPort)
	}
	field := func(name, path string) any {
		return object{"name": name, "valueFrom": object{"fieldRef": object{"apiVersion": "v1", "fieldPath": path}}}
	}
	env := []any{
		field("POD_NAME", "metadata.name"),
		field("POD_NAMESPACE", "metadata.namespace"),
		object{"name": "SLUICE_DOMAIN", "value": domain},
		object{"name": "SLUICE_GRPC", "value": grpc},
		object{"name": "SLUICE_METRICS", "value": "0.0.0.0:" + strconv.Itoa(metricsPort)},
		object{"name": "GOMEMLIMIT", "valueFrom": object{"resourceFieldRef": object{"containerName": containerName, "resource": "limits.memory", "divisor": "0"}}},
	}
	var mounts []any
	if a.config != "" {
		env = append(env, object{"name": "SLUICE_CONFIG", "value": configDir + "/sluice.yaml"})
		mounts = append(mounts, object{"name": configVolume, "mountPath": configDir, "readOnly": true})
	}
	if a.redis != "" {
		env = append(env, object{"name": "SLUICE_REDIS", "valueFrom": object{"secretKeyRef": object{"name": a.redis, "key": "url", "optional": false}}})
	}
	if !tcp {
		mounts = append(mounts, object{"name": socketVolume, "mountPath": socketDir})
	}
	resources := overlayResources(object{"requests": object{"cpu": "50m", "memory": "32Mi"}, "limits": object{"memory": "128Mi"}}, a.resources)
	c := object{
		"name":          containerName,
		"image":         image,
		"args":          []any{"run"},
		"restartPolicy": "Always",
		"env":           env,
		"ports":         []any{object{"name": "sluice-metrics", "containerPort": metricsPort, "protocol": "TCP"}},
		"resources":     resources,
		"startupProbe": object{
			"exec":          object{"command": []any{"/sluice", "healthcheck"}},
			"periodSeconds": 1, "timeoutSeconds": 1, "successThreshold": 1, "failureThreshold": 60,
		},
		"securityContext": object{
			"runAsNonRoot": true, "runAsUser": 65532, "runAsGroup": 65532, "readOnlyRootFilesystem": true,
			"allowPrivilegeEscalation": false, "privileged": false, "capabilities": object{"drop": []any{"ALL"}},
			"seccompProfile": object{"type": "RuntimeDefault"},
		},
	}
	if len(mounts) > 0 {
		c["volumeMounts"] = mounts
	}
	return c
}

// overlay is the container that ours makes of the one that is there already. Ours is over what template can say; what others have added
// since stays: other webhooks' variables and mounts, the mount of a service account's token, what a LimitRange gave it, the defaults of
// Kubernetes. So a resource that the annotation named once and names no more stays too, where a template was injected with it.
func overlay(there, ours object) object {
	merged := maps.Clone(ours)
	most := template(Options{}, everything, false)
	for _, field := range []string{"env", "volumeMounts"} {
		theirs := slices.DeleteFunc(list(there, field), func(v any) bool {
			o, _ := v.(object)
			name, _ := o["name"].(string)
			return named(list(most, field), name) >= 0
		})
		if all := append(list(ours, field), theirs...); len(all) > 0 {
			merged[field] = all
		}
	}
	merged["resources"] = overlayResources(child(there, "resources"), child(ours, "resources"))
	merged["securityContext"] = over(child(there, "securityContext"), child(ours, "securityContext"))
	out := maps.Clone(there)
	for k, v := range merged {
		if !same(out[k], v) {
			out[k] = v
		}
	}
	if _, ok := merged["volumeMounts"]; !ok {
		delete(out, "volumeMounts")
	}
	return out
}

// over is ours, and what else there is.
func over(there, ours object) object {
	out := object{}
	maps.Copy(out, there)
	maps.Copy(out, ours)
	return out
}

// same compares as JSON does, to which 1 is 1 whatever Go's type.
func same(a, b any) bool {
	x, errX := json.Marshal(a)
	y, errY := json.Marshal(b)
	return errX == nil && errY == nil && string(x) == string(y)
}

// child is an object's field that is an object; nil, which can be read, where it is none.
func child(o object, name string) object {
	c, _ := o[name].(object)
	return c
}

// list is a copy of an object's field that is a list.
func list(o object, name string) []any {
	l, _ := o[name].([]any)
	return slices.Clone(l)
}

// named is the index of the list's object of that name, or -1.
func named(l []any, name string) int {
	return slices.IndexFunc(l, func(v any) bool { o, _ := v.(object); return o["name"] == name })
}

// put puts an object where the one of its name is, or at the end. One that says the same stays as it is.
func put(l []any, o object) []any {
	name, _ := o["name"].(string)
	i := named(l, name)
	if i < 0 {
		return append(l, o)
	}
	if !same(l[i], o) {
		l[i] = o
	}
	return l
}

func without(l []any, name string) []any {
	return slices.DeleteFunc(l, func(v any) bool { o, _ := v.(object); return o["name"] == name })
}

func isNative(container object) bool { return container["restartPolicy"] == "Always" }
