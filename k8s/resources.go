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

// quantityPattern is of amounts, as Kubernetes has them.
var quantityPattern = regexp.MustCompile(`^[0-9]+(\.[0-9]*)?([numkMGTPE]|[KMGTPE]i|[eE][0-9]+)?$`)

// readResources reads a container's resources, as {requests: {cpu: 50m}, limits: {memory: 128Mi}}, in YAML or JSON.
func readResources(text string) (object, error) {
	var given map[string]map[string]string // amounts as they are written
	if err := yaml.Unmarshal([]byte(text), &given); err != nil || len(given) == 0 {
		return nil, fmt.Errorf("%s: allowed is a mapping such as {requests: {cpu: 50m}, limits: {memory: 128Mi}}", quote(text))
	}
	resources := object{}
	for kind, amounts := range given {
		if kind != "requests" && kind != "limits" {
			return nil, fmt.Errorf("%s: allowed are requests and limits", quote(kind))
		}
		of := object{}
		for name, amount := range amounts {
			if !slices.Contains(resourceNames, name) {
				return nil, fmt.Errorf("%s: %s: allowed are cpu, memory and ephemeral-storage", kind, quote(name))
			}
			if !quantityPattern.MatchString(amount) {
				return nil, fmt.Errorf("%s.%s: %s: allowed is a quantity such as 50m or 128Mi", kind, name, quote(amount))
			}
			of[name] = amount
		}
		resources[kind] = of
	}
	for name, request := range objectField(resources, "requests") {
		if limit, ok := objectField(resources, "limits")[name]; ok && quantityValue(request) > quantityValue(limit) {
			return nil, fmt.Errorf("requests.%s is %s, above limits.%s, which is %s", name, quote(request), name, quote(limit))
		}
	}
	return resources, nil
}

// units are what a quantity's suffix multiplies by.
var quantitySuffixes = map[string]float64{
	"": 1, "n": 1e-9, "u": 1e-6, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18,
	"Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30, "Ti": 1 << 40, "Pi": 1 << 50, "Ei": 1 << 60,
}

// amount returns a quantity that matches quantityPattern as a number, and 0
// for an object or a list, which are none.
func quantityValue(quantity any) float64 {
	switch quantity.(type) {
	case object, []any:
		return 0
	}
	text := fmt.Sprint(quantity)
	if f, err := strconv.ParseFloat(text, 64); err == nil { // an exponent, perhaps
		return f
	}
	number := strings.TrimRight(text, "numkMGTPEi")
	f, _ := strconv.ParseFloat(number, 64)
	return f * quantitySuffixes[text[len(number):]]
}

// raisePodRequests raises what a pod that has resources of its own requests, as pods may since Kubernetes 1.34, to what its containers do with sluice, where
// that is more: the API server takes no less. It returns the pod's resources, or why that cannot be.
func raisePodRequests(spec object) (resources object, why string) {
	resources = objectField(spec, "resources")
	requests, limits := merged(objectField(resources, "requests"), nil), objectField(resources, "limits")
	of := func(c any, name string) float64 {
		o, _ := c.(object)
		v, ok := objectField(objectField(o, "resources"), "requests")[name]
		if !ok {
			v, ok = objectField(objectField(o, "resources"), "limits")[name] // the API server's default
		}
		if !ok {
			return 0
		}
		return quantityValue(v)
	}
	// A pod whose containers request nothing has its limits for requests, which it is to keep though sluice's container requests something.
	for _, name := range resourceNames { // sluice's container changes nothing of others
		limit, limited := limits[name]
		if _, ok := requests[name]; ok || !limited || slices.ContainsFunc(append(listField(spec, "initContainers"), listField(spec, "containers")...), func(c any) bool {
			o, _ := c.(object)
			return o["name"] != containerName && of(c, name) > 0
		}) {
			continue
		}
		requests[name] = limit
	}
	for _, name := range resourceNames {
		var want, running float64 // init containers run beside the native sidecars before them, and the others beside all
		for _, c := range listField(spec, "initContainers") {
			if o, _ := c.(object); isNativeSidecar(o) {
				running += of(c, name)
			} else {
				want = max(want, running+of(c, name))
			}
		}
		for _, c := range listField(spec, "containers") {
			running += of(c, name)
		}
		want = max(want, running)
		above := func(of object) bool { // where there is such an amount
			has, ok := of[name]
			text := fmt.Sprint(has)
			return ok && len(text) <= maxQuote && quantityPattern.MatchString(text) && want > quantityValue(has)*(1+1e-9)
		}
		if above(limits) {
			return nil, fmt.Sprintf("spec.resources.limits.%s is %v, and with sluice its containers request %s: raise it, or lower sluice's by annotation %s", name, limits[name], formatQuantity(name, want), annotationResources)
		}
		if above(requests) { // where there is none, the API server makes it of what the containers request
			requests[name] = formatQuantity(name, want)
		}
	}
	if len(requests) == 0 {
		return resources, ""
	}
	return withField(resources, "requests", requests), ""
}

// quantity is an amount as Kubernetes has it, rounded up.
func formatQuantity(name string, amount float64) string {
	if name == "cpu" {
		return strconv.FormatFloat(math.Ceil(amount*1000-1e-6), 'f', -1, 64) + "m"
	}
	amount = math.Ceil(amount - 1e-6)
	for _, suffix := range []string{"Mi", "Ki"} {
		if math.Mod(amount, quantitySuffixes[suffix]) == 0 {
			return strconv.FormatFloat(amount/quantitySuffixes[suffix], 'f', -1, 64) + suffix
		}
	}
	return strconv.FormatFloat(amount, 'f', -1, 64)
}

// mergeResources is over, of amounts. Where a request would be above its limit, ours stands and the other becomes the same.
func mergeResources(there, ours object) object {
	requests, limits := merged(objectField(there, "requests"), objectField(ours, "requests")), merged(objectField(there, "limits"), objectField(ours, "limits"))
	for name, limit := range limits {
		if request, ok := requests[name]; !ok || quantityValue(request) <= quantityValue(limit) {
			continue
		}
		if _, is := objectField(ours, "limits")[name]; is {
			requests[name] = limit
		} else {
			limits[name] = requests[name]
		}
	}
	out := merged(there, ours)
	out["requests"], out["limits"] = requests, limits
	return out
}
