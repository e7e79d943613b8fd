package k8s

import (
	"fmt"
	"math"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"
)

// resourceNames are the resources that sluice's container may request.
var resourceNames = []string{"cpu", "memory", "ephemeral-storage"}

// quantityPattern matches the quantities of Kubernetes that are not negative.
var quantityPattern = regexp.MustCompile(`^[0-9]+(\.[0-9]*)?([numkMGTPE]|[KMGTPE]i|[eE][0-9]+)?$`)

// ParseResources parses a container's resources in YAML or JSON, such as
// {requests: {cpu: 50m}, limits: {memory: 128Mi}}. It returns an error if text
// is longer than 512 bytes, has other fields than requests and limits of cpu,
// memory and ephemeral-storage, or a request that exceeds its limit.
func ParseResources(text string) (map[string]any, error) {
	if len(text) > maxAnnotation {
		return nil, fmt.Errorf("%s is %d bytes long; the maximum is %d", quote(text), len(text), maxAnnotation)
	}
	var given map[string]map[string]string // strings keep quantities as they are written
	if err := yaml.Unmarshal([]byte(text), &given); err != nil || len(given) == 0 {
		return nil, fmt.Errorf("%s: must be a mapping such as {requests: {cpu: 50m}, limits: {memory: 128Mi}}",
			quote(text))
	}
	resources := object{}
	for kind, quantities := range given {
		if kind != "requests" && kind != "limits" {
			return nil, fmt.Errorf("unknown field %s; want requests or limits", quote(kind))
		}
		valid := object{}
		for name, q := range quantities {
			if !slices.Contains(resourceNames, name) {
				return nil, fmt.Errorf("%s: unknown resource %s; want cpu, memory or ephemeral-storage", kind,
					quote(name))
			}
			if !quantityPattern.MatchString(q) {
				return nil, fmt.Errorf("%s.%s: %s: must be a quantity such as 50m or 128Mi", kind, name, quote(q))
			}
			valid[name] = q
		}
		resources[kind] = valid
	}
	for name, request := range objectField(resources, "requests") {
		limit, ok := objectField(resources, "limits")[name]
		if ok && quantityValue(request) > quantityValue(limit) {
			return nil, fmt.Errorf("requests.%s: %s: must be at most limits.%s, which is %s",
				name, quote(request), name, quote(limit))
		}
	}
	return resources, nil
}

// quantitySuffixes are the factors of a quantity's suffixes.
var quantitySuffixes = map[string]float64{
	"": 1, "n": 1e-9, "u": 1e-6, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18,
	"Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30, "Ti": 1 << 40, "Pi": 1 << 50, "Ei": 1 << 60,
}

// quantityValue returns the value of a quantity that matches quantityPattern,
// in cores or bytes. It returns 0 for an object or a list.
func quantityValue(quantity any) float64 {
	switch quantity.(type) {
	case object, []any:
		return 0
	}
	text := fmt.Sprint(quantity)
	if f, err := strconv.ParseFloat(text, 64); err == nil { // no suffix, or an exponent
		return f
	}
	number := strings.TrimRight(text, "numkMGTPEi")
	f, _ := strconv.ParseFloat(number, 64)
	return f * quantitySuffixes[text[len(number):]]
}

// formatQuantity formats a value in cores or bytes as a quantity, rounded up to
// a millicore or a byte.
func formatQuantity(name string, value float64) string {
	if name == "cpu" {
		return strconv.FormatFloat(math.Ceil(value*1000-1e-6), 'f', -1, 64) + "m"
	}
	value = math.Ceil(value - 1e-6)
	for _, suffix := range []string{"Mi", "Ki"} {
		if math.Mod(value, quantitySuffixes[suffix]) == 0 {
			return strconv.FormatFloat(value/quantitySuffixes[suffix], 'f', -1, 64) + suffix
		}
	}
	return strconv.FormatFloat(value, 'f', -1, 64)
}

// containerRequest returns what a container requests of a resource, in cores or
// bytes. Like the API server it takes the limit if there is no request.
func containerRequest(container any, name string) float64 {
	c, _ := container.(object)
	resources := objectField(c, "resources")
	v, ok := objectField(resources, "requests")[name]
	if !ok {
		v, ok = objectField(resources, "limits")[name]
	}
	if !ok {
		return 0
	}
	return quantityValue(v)
}

// podRequest returns what the containers of a pod request of a resource, in
// cores or bytes, by the rule of the API server: each init container runs
// beside the native sidecars before it, and all native sidecars run beside the
// containers.
func podRequest(spec object, name string) float64 {
	var most, running float64
	for _, c := range listField(spec, "initContainers") {
		if o, _ := c.(object); isNativeSidecar(o) {
			running += containerRequest(c, name)
		} else {
			most = max(most, running+containerRequest(c, name))
		}
	}
	for _, c := range listField(spec, "containers") {
		running += containerRequest(c, name)
	}
	return max(most, running)
}

// raisePodRequests returns the resources of a pod that has resources of its own
// (spec.resources, since Kubernetes 1.34), with requests that are at least what
// its containers request with sluice; the API server refuses a pod with less.
// If the pod's limits are too low for that, reason says so.
func raisePodRequests(spec object) (resources object, reason string) {
	resources = objectField(spec, "resources")
	requests, limits := merged(objectField(resources, "requests"), nil), objectField(resources, "limits")
	others := slices.DeleteFunc(append(listField(spec, "initContainers"), listField(spec, "containers")...),
		func(c any) bool { return hasName(c, containerName) })
	for _, name := range resourceNames {
		// If the containers request nothing, the pod requests its limit. That
		// has to be written out, as sluice's container now requests something.
		limit, limited := limits[name]
		_, requested := requests[name]
		if limited && !requested &&
			!slices.ContainsFunc(others, func(c any) bool { return containerRequest(c, name) > 0 }) {
			requests[name] = limit
		}
	}
	for _, name := range resourceNames {
		want := podRequest(spec, name)
		exceeds := func(quantities object) bool {
			v, ok := quantities[name]
			text := fmt.Sprint(v)
			return ok && len(text) <= maxQuote && quantityPattern.MatchString(text) && want > quantityValue(v)*(1+1e-9)
		}
		if exceeds(limits) {
			return nil, fmt.Sprintf("spec.resources.limits.%s is %v, but with sluice its containers request %s: "+
				"raise the limit, or lower what sluice requests in annotation %s",
				name, limits[name], formatQuantity(name, want), annotationResources)
		}
		// If the pod requests nothing, the API server fills in what its
		// containers request.
		if exceeds(requests) {
			requests[name] = formatQuantity(name, want)
		}
	}
	if len(requests) == 0 {
		return resources, ""
	}
	return withField(resources, "requests", requests), ""
}

// mergeResources returns base with the requests and limits of ours in its
// place. If a request then exceeds its limit, the one that ours does not set
// gives way.
func mergeResources(base, ours object) object {
	requests := merged(objectField(base, "requests"), objectField(ours, "requests"))
	limits := merged(objectField(base, "limits"), objectField(ours, "limits"))
	for name, limit := range limits {
		if request, ok := requests[name]; !ok || quantityValue(request) <= quantityValue(limit) {
			continue
		}
		if _, given := objectField(ours, "limits")[name]; given {
			requests[name] = limit
		} else {
			limits[name] = requests[name]
		}
	}
	return merged(base, merged(ours, object{"requests": requests, "limits": limits}))
}
