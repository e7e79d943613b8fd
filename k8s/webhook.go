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

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"
)

// maxReview bounds what is read of an admission review; etcd takes no object above 1.5 MiB.
const maxReview = 4 << 20

type reviews struct {
	o       Options
	log     *zap.Logger
	counts  *prometheus.CounterVec
	seconds prometheus.Histogram
}

type review struct {
	APIVersion string    `json:"apiVersion"`
	Kind       string    `json:"kind"`
	Request    *request  `json:"request,omitempty"`
	Response   *response `json:"response,omitempty"`
}

type request struct {
	UID       string `json:"uid"`
	Operation string `json:"operation"`
	Namespace string `json:"namespace"`
	Resource  struct {
		Group    string `json:"group"`
		Resource string `json:"resource"`
	} `json:"resource"`
	Object object `json:"object"`
}

type response struct {
	UID       string   `json:"uid"`
	Allowed   bool     `json:"allowed"`
	Status    object   `json:"status,omitempty"`
	Warnings  []string `json:"warnings,omitempty"`
	PatchType string   `json:"patchType,omitempty"`
	Patch     []byte   `json:"patch,omitempty"`
}

// Webhook answers admission reviews (admission.k8s.io/v1) of pods that are created: with what Inject makes of them, a warning where it
// skips one, a refusal where it refuses one. o's Namespace and Workload are taken from each pod.
func Webhook(o Options, log *zap.Logger, metrics prometheus.Registerer) http.Handler {
	r := &reviews{
		o: o, log: log,
		counts:  prometheus.NewCounterVec(prometheus.CounterOpts{Name: "sluice_webhook_reviews_total", Help: "Admission reviews, by what became of the pod."}, []string{"result"}),
		seconds: prometheus.NewHistogram(prometheus.HistogramOpts{Name: "sluice_webhook_review_seconds", Help: "A whole admission review.", Buckets: []float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .5, 1, 5}}),
	}
	for _, result := range []string{"injected", "unchanged", "skipped", "refused", "invalid"} {
		r.counts.WithLabelValues(result)
	}
	metrics.MustRegister(r.counts, r.seconds)
	return r
}

func (r *reviews) ServeHTTP(w http.ResponseWriter, q *http.Request) {
	timer := prometheus.NewTimer(r.seconds)
	defer timer.ObserveDuration()
	var in review
	decoder := json.NewDecoder(http.MaxBytesReader(w, q.Body, maxReview))
	decoder.UseNumber()
	err := decoder.Decode(&in)
	switch {
	case q.Method != http.MethodPost:
		err = errors.New("allowed is POST")
	case errors.Is(err, io.EOF):
		err = errors.New("the body is empty")
	case err == nil && (in.Kind != "AdmissionReview" || in.APIVersion != "admission.k8s.io/v1" || in.Request == nil):
		err = errors.New("allowed is an AdmissionReview of admission.k8s.io/v1 with a request")
	}
	if err != nil {
		r.counts.WithLabelValues("invalid").Inc()
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	answer, result := r.answer(in.Request)
	r.counts.WithLabelValues(result).Inc()
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(review{APIVersion: in.APIVersion, Kind: in.Kind, Response: answer})
}

func (r *reviews) answer(q *request) (*response, string) {
	answer := &response{UID: q.UID, Allowed: true}
	if q.Operation != "CREATE" || q.Resource.Group != "" || q.Resource.Resource != "pods" {
		return answer, "unchanged"
	}
	o := r.o
	o.Namespace, o.Workload = q.Namespace, workload(q.Object)
	log := r.log.With(zap.String("namespace", o.Namespace), zap.String("workload", o.Workload))
	injected, skipped, err := Inject(q.Object, o)
	switch {
	case err != nil:
		log.Info("refused", zap.Error(err))
		answer.Allowed = false
		answer.Status = object{"code": http.StatusForbidden, "reason": "Forbidden", "message": "sluice: " + err.Error()}
		return answer, "refused"
	case skipped != "":
		log.Info("skipped", zap.String("why", skipped))
		answer.Warnings = []string{"sluice is not injected: " + skipped}
		return answer, "skipped"
	}
	patch := difference(q.Object, injected)
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
func difference(before, after object) []object {
	var patch []object
	for _, part := range []string{"metadata", "spec"} {
		was, is := child(before, part), child(after, part)
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
var scheduled = regexp.MustCompile(`-[0-9]{8,}$`)

// cronJob is the name of the CronJob that a Job of this name looks to be of, since its pods do not say; else the Job's.
func cronJob(job string) string { return scheduled.ReplaceAllString(job, "") }

// workload is the name of what a pod belongs to: its controller's, of a ReplicaSet the Deployment's and of a CronJob's Job the
// CronJob's; else its own.
func workload(pod object) string {
	metadata := child(pod, "metadata")
	for _, owner := range list(metadata, "ownerReferences") {
		owner, _ := owner.(object)
		name, _ := owner["name"].(string)
		if owner["controller"] != true || name == "" {
			continue
		}
		switch owner["kind"] {
		case "ReplicaSet":
			if hash, _ := child(metadata, "labels")["pod-template-hash"].(string); hash != "" {
				return strings.TrimSuffix(name, "-"+hash)
			}
			if hash, _ := child(metadata, "labels")["rollouts-pod-template-hash"].(string); hash != "" {
				return strings.TrimSuffix(name, "-"+hash)
			}
		case "Job":
			return cronJob(name)
		}
		return name
	}
	if name, _ := metadata["name"].(string); name != "" {
		return name
	}
	name, _ := metadata["generateName"].(string)
	return strings.TrimRight(name, "-")
}
