package k8s

import (
	"cmp"
	"errors"
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"unicode/utf8"
)

// Annotations of a pod that configure its sidecar.
const (
	annotationConfig         = "sluice.dev/config"
	annotationRedisSecret    = "sluice.dev/redis-secret"
	annotationDomain         = "sluice.dev/domain"
	annotationImage          = "sluice.dev/image"
	annotationResources      = "sluice.dev/resources"
	annotationUser           = "sluice.dev/run-as-user"
	annotationEnvoyContainer = "sluice.dev/envoy-container"
	annotationInProcess      = "sluice.dev/in-process"
)

// Maximum lengths of what a pod contains, in bytes.
const (
	// maxAnnotation is the maximum length of an annotation that sluice parses.
	// The longest useful one is an image with a digest.
	maxAnnotation = 512
	// maxName is the maximum length of a Kubernetes name.
	maxName = 253
	// maxDomain is the maximum length of a domain of sluice run.
	maxDomain = 253
	// maxQuote is the maximum length of a value that a message quotes.
	maxQuote = 80
)

var (
	domainPattern = regexp.MustCompile(`^[A-Za-z0-9._/-]+$`)
	namePattern   = regexp.MustCompile(`^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$`)
)

// annotations are the decoded annotations of a pod. A string is empty, and
// resources nil, if the pod does not have the annotation.
type annotations struct {
	config, redis, domain, image, user, envoy string
	resources                                 object
	inProcess                                 bool
}

// allAnnotations makes sidecarContainer write every field that it can write.
var allAnnotations = annotations{config: "config", redis: "redis"}

// readAnnotations decodes a pod's annotations. It returns an error for the
// first invalid one.
func readAnnotations(metadata object) (annotations, error) {
	var a annotations
	given := objectField(metadata, "annotations")
	for _, f := range []struct {
		name    string
		to      *string
		max     int
		pattern *regexp.Regexp
		want    string
	}{
		{annotationConfig, &a.config, maxName, namePattern, "must be the name of a ConfigMap"},
		{annotationRedisSecret, &a.redis, maxName, namePattern, "must be the name of a Secret"},
		{annotationDomain, &a.domain, maxDomain, domainPattern, "must consist of A-Z a-z 0-9 . _ / and -"},
		{annotationImage, &a.image, maxAnnotation, imagePattern, "must be an image reference"},
		{annotationEnvoyContainer, &a.envoy, maxName, namePattern, "must be the name of a container"},
	} {
		v, ok := given[f.name]
		if !ok {
			continue
		}
		text, _ := v.(string)
		if f.name == annotationRedisSecret && (len(text) > f.max || !f.pattern.MatchString(text)) {
			// The value is not quoted: it may be the URL itself, with its password.
			return a, fmt.Errorf("annotation %s: %s whose key url is the Redis URL", f.name, f.want)
		}
		if len(text) > f.max {
			return a, tooLong(f.name, text, f.max)
		}
		if !f.pattern.MatchString(text) {
			return a, fmt.Errorf("annotation %s: %s: %s", f.name, quote(v), f.want)
		}
		*f.to = text
	}
	if v, ok := given[annotationUser]; ok {
		text, ok := v.(string)
		if !ok {
			return a, fmt.Errorf("annotation %s: %s: must be a string; quote it", annotationUser, quote(v))
		}
		if err := CheckUser(text); err != nil || text == "" {
			return a, fmt.Errorf("annotation %s: %w", annotationUser, cmp.Or(err, errors.New("is empty")))
		}
		a.user = text
	}
	if v, ok := given[annotationInProcess]; ok {
		if v != "true" && v != "false" {
			return a, fmt.Errorf(`annotation %s: %s: must be "true" or "false"`, annotationInProcess, quote(v))
		}
		a.inProcess = v == "true"
	}
	if a.inProcess && a.redis != "" {
		return a, fmt.Errorf("annotations %s and %s are mutually exclusive", annotationInProcess, annotationRedisSecret)
	}
	if v, ok := given[annotationResources]; ok {
		text, ok := v.(string)
		if !ok {
			return a, fmt.Errorf("annotation %s: %s: must be a string; quote it", annotationResources, quote(v))
		}
		var err error
		if a.resources, err = ParseResources(text); err != nil {
			return a, fmt.Errorf("annotation %s: %w", annotationResources, err)
		}
	}
	return a, nil
}

// checkRequired returns an error if the annotations do not say where the
// buckets are, or if the pod's default domain is too long.
func (a annotations) checkRequired(o Options) error {
	if a.redis == "" && !a.inProcess {
		return fmt.Errorf("sluice requires Redis: set annotation %s to the name of a Secret whose key url is the "+
			"Redis URL, "+
			`or set annotation %s: "true" to give each pod its own buckets`, annotationRedisSecret, annotationInProcess)
	}
	if len(o.Workload) > maxName {
		return fmt.Errorf("name %s is %d bytes long; the maximum is %d", quote(o.Workload), len(o.Workload), maxName)
	}
	if a.domain != "" {
		return nil
	}
	if n := len(o.Namespace) + len("/") + len(o.Workload); n > maxDomain {
		return fmt.Errorf("the default domain, <namespace>/<workload>, is %d bytes long; the maximum is %d: set "+
			"annotation %s",
			n, maxDomain, annotationDomain)
	}
	return nil
}

// tooLong returns the error for an annotation of more than maximum bytes.
func tooLong(name, text string, maximum int) error {
	return fmt.Errorf("annotation %s: %s is %d bytes long; the maximum is %d", name, quote(text), len(text), maximum)
}

// quote formats a decoded value for a message, whatever its type and size: it
// quotes at most maxQuote bytes, of a URL, which may hold a password, only the
// scheme, and only names the kind of an object or list.
func quote(v any) string {
	var text string
	switch v := v.(type) {
	case object:
		return "an object"
	case []any:
		return "a list"
	case string:
		text = v
	default: // a number, which may be long too, a boolean or null
		text = fmt.Sprint(v)
	}
	start := truncate(text, maxQuote)
	if scheme, _, isURL := strings.Cut(start, "://"); isURL {
		start = scheme + "://"
	}
	if len(start) < len(text) {
		return strconv.Quote(start) + "..."
	}
	return strconv.Quote(text)
}

// truncate returns the longest prefix of text that has at most maximum bytes
// and does not split a UTF-8 sequence.
func truncate(text string, maximum int) string {
	if len(text) <= maximum {
		return text
	}
	for maximum > 0 && !utf8.RuneStart(text[maximum]) {
		maximum--
	}
	return text[:maximum]
}
