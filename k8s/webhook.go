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

type webhook struct {
	o       Options
	slots   *reviewSlots
	log     *zap.Logger
	counts  *prometheus.CounterVec
	seconds prometheus.Histogram
}

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

// Webhook answers admission reviews (admission.k8s.io/v1) of pods that are created: with what Inject makes of them, a warning where it
// skips one, a refusal where it refuses one. o's Namespace and Workload are taken from each pod.
//
// What reviews cost is bounded, whoever sends them: a pod of more than 4 MiB or 100,000 values of JSON is refused, and a review that gets
// no turn within two seconds is answered with status 429 and Retry-After, after which API servers ask again.
func Webhook(o Options, log *zap.Logger, metrics prometheus.Registerer) http.Handler {
	r := &webhook{
		o: o, log: log, slots: newReviewSlots(),
		counts:  prometheus.NewCounterVec(prometheus.CounterOpts{Name: "sluice_webhook_reviews_total", Help: "Total number of admission reviews, by result."}, []string{"result"}),
		seconds: prometheus.NewHistogram(prometheus.HistogramOpts{Name: "sluice_webhook_review_seconds", Help: "Duration of an admission review in seconds.", Buckets: []float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .5, 1, 5}}),
	}
	for _, result := range []string{"injected", "unchanged", "skipped", "refused", "invalid", "busy"} {
		r.counts.WithLabelValues(result)
	}
	metrics.MustRegister(r.counts, r.seconds)
	return r
}

func (r *webhook) ServeHTTP(w http.ResponseWriter, q *http.Request) {
	timer := prometheus.NewTimer(r.seconds)
	defer timer.ObserveDuration()
	if q.Method != http.MethodPost {
		r.fail(w, "invalid", "allowed is POST", http.StatusBadRequest)
		return
	}
	err := r.slots.readReview(w, q, func(in *admissionReview) {
		if in.Kind != "AdmissionReview" || in.APIVersion != "admission.k8s.io/v1" || in.Request == nil {
			r.fail(w, "invalid", "allowed is an AdmissionReview of admission.k8s.io/v1 with a request", http.StatusBadRequest)
			return
		}
		answer, result := r.respond(in.Request)
		r.write(w, answer, result)
	})
	tooLarge := (*tooLargeError)(nil)
	switch {
	case err == nil:
	case errors.Is(err, errBusy):
		w.Header().Set("Retry-After", "1")
		r.fail(w, "busy", err.Error(), http.StatusTooManyRequests)
	case errors.As(err, &tooLarge):
		if tooLarge.UID == "" { // no API server's
			r.fail(w, "invalid", err.Error(), http.StatusBadRequest)
			return
		}
		r.log.Info("refused", zap.String("namespace", tooLarge.Namespace), zap.Error(err))
		r.write(w, denied(tooLarge.UID, err), "refused")
	case errors.Is(err, io.EOF):
		r.fail(w, "invalid", "the body is empty", http.StatusBadRequest)
	default:
		r.fail(w, "invalid", err.Error(), http.StatusBadRequest)
	}
}

// write answers a review.
func (r *webhook) write(w http.ResponseWriter, answer *admissionResponse, result string) {
	r.counts.WithLabelValues(result).Inc()
	w.Header().Set("Content-Type", "application/json")
	_ = http.NewResponseController(w).SetWriteDeadline(time.Now().Add(r.slots.wait)) // who does not read it keeps others waiting
	_ = json.NewEncoder(w).Encode(admissionReview{APIVersion: "admission.k8s.io/v1", Kind: "AdmissionReview", Response: answer})
}

// fail answers what is no review, or none that was looked at.
func (r *webhook) fail(w http.ResponseWriter, result, message string, status int) {
	r.counts.WithLabelValues(result).Inc()
	http.Error(w, message, status)
}

// refusal is the answer that keeps a pod from being created.
func denied(uid string, why error) *admissionResponse {
	return &admissionResponse{UID: uid, Status: object{"code": http.StatusForbidden, "reason": "Forbidden", "message": "sluice: " + why.Error()}}
}

func (r *webhook) respond(q *admissionRequest) (*admissionResponse, string) {
	answer := &admissionResponse{UID: q.UID, Allowed: true}
	if q.Operation != "CREATE" || q.Resource.Group != "" || q.Resource.Resource != "pods" {
		return answer, "unchanged"
	}
	o := r.o
	o.Namespace, o.Workload = q.Namespace, workloadName(q.Object)
	log := r.log.With(zap.String("namespace", truncate(o.Namespace, maxName)), zap.String("workload", truncate(o.Workload, maxName)))
	injected, skipped, err := Inject(q.Object, o)
	switch {
	case err != nil:
		log.Info("refused", zap.Error(err))
		return denied(q.UID, err), "refused"
	case skipped != "":
		log.Info("skipped", zap.String("why", skipped))
		answer.Warnings = []string{"sluice is not injected: " + skipped}
		return answer, "skipped"
	}
	patch := jsonPatch(q.Object, injected)
	if len(patch) == 0 {
		return answer, "unchanged"
	}
	if answer.Patch, err = json.Marshal(patch); err != nil {
		panic(err) // it was JSON
	}
	answer.PatchType = "JSONPatch"
	log.Debug("injected")
	return answer, "injected"
}

// difference is the JSON patch of what Inject changes: fields of metadata and spec, each as a whole.
func jsonPatch(before, after object) []object {
	var patch []object
	for _, part := range []string{"metadata", "spec"} {
		was, is := objectField(before, part), objectField(after, part)
		var names []string
		for name := range is {
			names = append(names, name)
		}
		for name := range was {
			if _, stays := is[name]; !stays {
				names = append(names, name)
			}
		}
		slices.Sort(names)
		for _, name := range names {
			path := "/" + part + "/" + name // Kubernetes's own names, which need no escape
			if v, there := is[name]; !there {
				patch = append(patch, object{"op": "remove", "path": path})
			} else if !reflect.DeepEqual(was[name], v) {
				patch = append(patch, object{"op": "add", "path": path, "value": v})
			}
		}
	}
	return patch
}

// scheduled is what a CronJob adds to its name for a Job's.
var cronJobSuffix = regexp.MustCompile(`-[0-9]{8,}$`)

// cronJob is the name of the CronJob that a Job of this name looks to be of, since its pods do not say; else the Job's.
func cronJobName(job string) string { return cronJobSuffix.ReplaceAllString(job, "") }

// workload is the name of what a pod belongs to: its controller's, of a ReplicaSet the Deployment's and of a CronJob's Job the
// CronJob's; else its own.
func workloadName(pod object) string {
	metadata := objectField(pod, "metadata")
	for _, owner := range listField(metadata, "ownerReferences") {
		owner, _ := owner.(object)
		name, _ := owner["name"].(string)
		if owner["controller"] != true || name == "" {
			continue
		}
		switch owner["kind"] {
		case "ReplicaSet":
			if hash, _ := objectField(metadata, "labels")["pod-template-hash"].(string); hash != "" {
				return strings.TrimSuffix(name, "-"+hash)
			}
			if hash, _ := objectField(metadata, "labels")["rollouts-pod-template-hash"].(string); hash != "" {
				return strings.TrimSuffix(name, "-"+hash)
			}
		case "Job":
			return cronJobName(name)
		}
		return name
	}
	if name, _ := metadata["name"].(string); name != "" {
		return name
	}
	name, _ := metadata["generateName"].(string)
	return strings.TrimRight(name, "-")
}
