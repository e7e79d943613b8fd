package k8s

import (
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"
)

// webhook is the handler that Webhook returns.
type webhook struct {
	o       Options
	slots   *reviewSlots
	log     *zap.Logger
	counts  *prometheus.CounterVec
	seconds prometheus.Histogram
}

// reviewVersion is the API version of the reviews that the webhook accepts.
const reviewVersion = "admission.k8s.io/v1"

// admissionReview is an AdmissionReview of reviewVersion, as far as the webhook
// reads and writes it.
type admissionReview struct {
	APIVersion string             `json:"apiVersion"`
	Kind       string             `json:"kind"`
	Request    *admissionRequest  `json:"request,omitempty"`
	Response   *admissionResponse `json:"response,omitempty"`
}

type admissionRequest struct {
	UID       string `json:"uid"`
	Operation string `json:"operation"`
	Namespace string `json:"namespace"`
	Resource  struct {
		Group    string `json:"group"`
		Resource string `json:"resource"`
	} `json:"resource"`
	Object object `json:"object"`
}

type admissionResponse struct {
	UID       string   `json:"uid"`
	Allowed   bool     `json:"allowed"`
	Status    object   `json:"status,omitempty"`
	Warnings  []string `json:"warnings,omitempty"`
	PatchType string   `json:"patchType,omitempty"`
	Patch     []byte   `json:"patch,omitempty"`
}

// Webhook returns a handler of admission reviews (admission.k8s.io/v1). It
// calls Inject for each pod that is created, and answers with a JSON patch, with
// a warning if the pod is skipped, or with a denial if Inject returns an
// error. It allows everything else unchanged. The Namespace and Workload of o
// are ignored; they are taken from each pod. Webhook registers its metrics with
// metrics, and panics if they are already registered. The handler is safe for
// concurrent use.
//
// The memory that reviews take is bounded. A pod whose review has more than
// 4 MiB, 100,000 JSON values or 100 levels is denied. A review that has to wait
// for longer than two seconds is answered with status 429 and Retry-After; API
// servers then retry.
func Webhook(o Options, log *zap.Logger, metrics prometheus.Registerer) http.Handler {
	h := &webhook{
		o: o, log: log, slots: newReviewSlots(),
		counts: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "sluice_webhook_reviews_total", Help: "Total number of admission reviews, by result.",
		}, []string{"result"}),
		seconds: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "sluice_webhook_review_seconds", Help: "Duration of an admission review in seconds.",
			Buckets: []float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .5, 1, 5},
		}),
	}
	for _, result := range []string{"injected", "unchanged", "skipped", "refused", "invalid", "busy"} {
		h.counts.WithLabelValues(result)
	}
	metrics.MustRegister(h.counts, h.seconds)
	return h
}

func (h *webhook) ServeHTTP(w http.ResponseWriter, q *http.Request) {
	timer := prometheus.NewTimer(h.seconds)
	defer timer.ObserveDuration()
	if q.Method != http.MethodPost {
		h.fail(w, "invalid", "method must be POST", http.StatusBadRequest)
		return
	}
	err := h.slots.readReview(w, q, func(in *admissionReview) {
		if in.Kind != "AdmissionReview" || in.APIVersion != reviewVersion || in.Request == nil {
			h.fail(w, "invalid", "body must be an AdmissionReview of "+reviewVersion+" with a request",
				http.StatusBadRequest)
			return
		}
		response, result := h.respond(in.Request)
		h.write(w, response, result)
	})
	tooLarge := (*tooLargeError)(nil)
	switch {
	case err == nil:
	case errors.Is(err, errBusy):
		w.Header().Set("Retry-After", "1")
		h.fail(w, "busy", err.Error(), http.StatusTooManyRequests)
	case errors.As(err, &tooLarge):
		if tooLarge.UID == "" { // not from an API server
			h.fail(w, "invalid", err.Error(), http.StatusBadRequest)
			return
		}
		h.log.Info("pod denied", zap.String("namespace", tooLarge.Namespace), zap.Error(err))
		h.write(w, denied(tooLarge.UID, err), "refused")
	case errors.Is(err, io.EOF):
		h.fail(w, "invalid", "body is empty", http.StatusBadRequest)
	default:
		h.fail(w, "invalid", err.Error(), http.StatusBadRequest)
	}
}

// write answers a review, and counts it.
func (h *webhook) write(w http.ResponseWriter, response *admissionResponse, result string) {
	h.counts.WithLabelValues(result).Inc()
	w.Header().Set("Content-Type", "application/json")
	// A client that does not read its answer must not keep its slot for long.
	_ = http.NewResponseController(w).SetWriteDeadline(time.Now().Add(h.slots.wait))
	review := admissionReview{APIVersion: reviewVersion, Kind: "AdmissionReview", Response: response}
	_ = json.NewEncoder(w).Encode(review)
}

// fail answers with an HTTP error, and counts it.
func (h *webhook) fail(w http.ResponseWriter, result, message string, status int) {
	h.counts.WithLabelValues(result).Inc()
	http.Error(w, message, status)
}

// denied returns the response with which the API server refuses to create the
// pod.
func denied(uid string, err error) *admissionResponse {
	return &admissionResponse{UID: uid, Status: object{
		"code": http.StatusForbidden, "reason": "Forbidden", "message": "sluice: " + err.Error(),
	}}
}

// respond returns the response to a request, and its result for the metrics.
func (h *webhook) respond(q *admissionRequest) (response *admissionResponse, result string) {
	response = &admissionResponse{UID: q.UID, Allowed: true}
	if q.Operation != "CREATE" || q.Resource.Group != "" || q.Resource.Resource != "pods" {
		return response, "unchanged"
	}
	o := h.o
	o.Namespace, o.Workload = q.Namespace, workloadName(q.Object)
	log := h.log.With(
		zap.String("namespace", truncate(o.Namespace, maxName)),
		zap.String("workload", truncate(o.Workload, maxName)),
	)
	injected, skipped, err := Inject(q.Object, o)
	switch {
	case err != nil:
		log.Info("pod denied", zap.Error(err))
		return denied(q.UID, err), "refused"
	case skipped != "":
		log.Info("pod skipped", zap.String("reason", skipped))
		response.Warnings = []string{"sluice is not injected: " + skipped}
		return response, "skipped"
	}
	patch := jsonPatch(q.Object, injected)
	if len(patch) == 0 {
		return response, "unchanged"
	}
	if response.Patch, err = json.Marshal(patch); err != nil {
		panic(err) // it was decoded from JSON
	}
	response.PatchType = "JSONPatch"
	log.Debug("pod injected")
	return response, "injected"
}

// jsonPatch returns the JSON patch (RFC 6902) from a pod to its injected copy.
// It replaces whole fields of metadata and spec, which is all that Inject
// changes.
func jsonPatch(before, after object) []object {
	var patch []object
	for _, part := range []string{"metadata", "spec"} {
		old, changed := objectField(before, part), objectField(after, part)
		var names []string
		for name := range changed {
			names = append(names, name)
		}
		for name := range old {
			if _, ok := changed[name]; !ok {
				names = append(names, name)
			}
		}
		slices.Sort(names)
		for _, name := range names {
			path := "/" + part + "/" + name // Kubernetes' field names need no escaping
			if v, ok := changed[name]; !ok {
				patch = append(patch, object{"op": "remove", "path": path})
			} else if !reflect.DeepEqual(old[name], v) {
				patch = append(patch, object{"op": "add", "path": path, "value": v})
			}
		}
	}
	return patch
}

// cronJobSuffix matches what a CronJob appends to its name for each Job.
var cronJobSuffix = regexp.MustCompile(`-[0-9]{8,}$`)

// cronJobName returns the name of the CronJob that a Job belongs to, judged by
// the Job's name, as its pods do not refer to the CronJob. It returns the Job's
// own name if it has no such suffix.
func cronJobName(job string) string { return cronJobSuffix.ReplaceAllString(job, "") }

// workloadName returns the name of the object that a pod belongs to: that of
// its controller, of the Deployment for a ReplicaSet, of the CronJob for a Job,
// and of Knative's Service for a pod of one of its revisions. A pod without a
// controller has its own name.
func workloadName(pod object) string {
	metadata := objectField(pod, "metadata")
	labels := objectField(metadata, "labels")
	if name, _ := labels["serving.knative.dev/service"].(string); name != "" {
		return name
	}
	for _, owner := range listField(metadata, "ownerReferences") {
		owner, _ := owner.(object)
		name, _ := owner["name"].(string)
		if owner["controller"] != true || name == "" {
			continue
		}
		switch owner["kind"] {
		case "ReplicaSet":
			for _, label := range []string{"pod-template-hash", "rollouts-pod-template-hash"} {
				if hash, _ := labels[label].(string); hash != "" {
					return strings.TrimSuffix(name, "-"+hash)
				}
			}
		case "Job":
			return cronJobName(name)
		}
		return name
	}
	if name, _ := metadata["name"].(string); name != "" {
		return name
	}
	generateName, _ := metadata["generateName"].(string)
	return strings.TrimRight(generateName, "-")
}
