package k8s

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"
)

// ask sends a review of a pod's creation, and returns the status and the
// response.
func ask(t *testing.T, h http.Handler, body string) (int, *admissionResponse) {
	t.Helper()
	w := httptest.NewRecorder()
	h.ServeHTTP(w, httptest.NewRequest(http.MethodPost, "/inject", strings.NewReader(body)))
	if w.Code != http.StatusOK {
		return w.Code, nil
	}
	var r admissionReview
	if err := json.Unmarshal(w.Body.Bytes(), &r); err != nil || r.Response == nil ||
		r.APIVersion != "admission.k8s.io/v1" {
		t.Fatalf("%v: %s", err, w.Body)
	}
	return w.Code, r.Response
}

func TestWebhook(t *testing.T) {
	h := Webhook(Options{Image: "sluice:test", Version: "v1"}, zap.NewNop(), prometheus.NewRegistry())
	review := func(p string) string {
		return `{"apiVersion":"admission.k8s.io/v1","kind":"AdmissionReview","request":{"uid":"u",` +
			`"operation":"CREATE","namespace":"shop","resource":{"group":"","version":"v1","resource":"pods"},` +
			`"object":` + p + `}}`
	}
	_, r := ask(t, h, review(`{"metadata":{"generateName":"web-","annotations":{"sluice.dev/in-process":"true"}},`+
		`"spec":{"containers":[{"name":"envoy"}]}}`))
	if !r.Allowed || r.UID != "u" || r.PatchType != "JSONPatch" || !strings.Contains(string(r.Patch), `"shop/web"`) {
		t.Errorf("%+v %s", r, r.Patch)
	}
	if _, r = ask(t, h, review(`{"metadata":{},"spec":{"containers":[{"name":"app"}]}}`)); !r.Allowed ||
		len(r.Warnings) != 1 || r.Patch != nil {
		t.Errorf("%+v", r)
	}
	if _, r = ask(t, h, review(`{"metadata":{"labels":{"sluice.dev/inject":"enabled"}},`+
		`"spec":{"containers":[{"name":"app"}]}}`)); r.Allowed ||
		!strings.Contains(r.Status["message"].(string), "no container is named") {
		t.Errorf("%+v", r)
	}
	for _, body := range []string{"", "{", "{}", `{"apiVersion":"admission.k8s.io/v1","kind":"AdmissionReview"}`,
		strings.Repeat(" ", maxReview+1)} {
		if code, _ := ask(t, h, body); code != http.StatusBadRequest {
			t.Errorf("%.20q: %d", body, code)
		}
	}
}

func TestWorkload(t *testing.T) {
	for text, want := range map[string]string{
		"name: a": "a", "generateName: a-": "a",
		"labels: {pod-template-hash: 5d}, ownerReferences: [{kind: ReplicaSet, name: web-5d, CONTROLLER}]": "web",
		"ownerReferences: [{kind: ReplicaSet, name: web-5d, CONTROLLER}]":                                  "web-5d",
		"ownerReferences: [{kind: Job, name: nightly-29381234, CONTROLLER}]":                               "nightly",
		"ownerReferences: [{kind: Job, name: once, CONTROLLER}]":                                           "once",
		"name: x, ownerReferences: [{kind: StatefulSet, name: db, CONTROLLER}]":                            "db",
		"labels: {serving.knative.dev/service: hello, pod-template-hash: 5d}, " +
			"ownerReferences: [{kind: ReplicaSet, name: hello-00001-deployment-5d, CONTROLLER}]": "hello",
	} {
		text = "{metadata: {" + strings.ReplaceAll(text, "CONTROLLER", "controller: true") + "}}"
		if got := workloadName(pod(t, text)); got != want {
			t.Errorf("%s: %q", text, got)
		}
	}
}

// A CA is replaced in steps before it expires. At each step the CA that signs
// is among those that are trusted.
func TestCA(t *testing.T) {
	c := NewCerts(nil, CertOptions{Service: "s", Namespace: "n", Lifetime: 100 * time.Hour}, zap.NewNop())
	s := &secret{}
	step := func(want bool) {
		t.Helper()
		if due, err := c.advanceRotation(s); err != nil || due != want {
			t.Fatalf("due %v, %v", due, err)
		}
	}
	later := func() { s.Data[rotatedKey] = []byte(time.Now().Add(-2 * c.o.Overlap).Format(time.RFC3339Nano)) }
	step(true)
	step(false)
	var err error
	if s.Data[caCertKey], s.Data[caPrivateKey], err = newCA(time.Now().Add(-90*time.Hour), c.o.Lifetime); err != nil {
		t.Fatal(err)
	}
	first := string(s.Data[caCertKey])
	step(true)
	next := string(s.Data[nextCertKey])
	if step(false); next == "" || string(s.Data[caCertKey]) != first {
		t.Error("the next CA signs before it is trusted")
	}
	later()
	step(true)
	if string(s.Data[caCertKey]) != next || string(s.Data[oldCertKey]) != first || len(s.Data[nextPrivateKey]) > 0 {
		t.Error("the next CA does not sign, or the old one is no longer trusted")
	}
	step(false)
	later()
	step(true)
	if len(s.Data[oldCertKey]) > 0 {
		t.Error("the old CA is not removed")
	}
	step(false)

	// Faults: an invalid next CA, a time of the last step in the future, and a
	// CA that has expired while no webhook was running.
	aged := func(age time.Duration) {
		t.Helper()
		if s.Data[caCertKey], s.Data[caPrivateKey], err = newCA(time.Now().Add(-age), c.o.Lifetime); err != nil {
			t.Fatal(err)
		}
	}
	aged(90 * time.Hour)
	s.Data[nextCertKey], s.Data[nextPrivateKey] = []byte("broken"), []byte("broken")
	later()
	step(true)
	if string(s.Data[nextCertKey]) == "broken" || len(s.Data[oldCertKey]) > 0 {
		t.Errorf("an invalid CA is used: %s", s.Data)
	}
	s.Data[rotatedKey] = []byte(time.Now().Add(1000 * time.Hour).Format(time.RFC3339Nano))
	step(true)
	step(false)
	later()
	step(true)
	if len(s.Data[oldCertKey]) == 0 {
		t.Error("a time in the future delays the next CA")
	}
	aged(101 * time.Hour)
	ended := string(s.Data[caCertKey])
	step(true)
	if string(s.Data[caCertKey]) == ended || len(s.Data[oldCertKey]) > 0 {
		t.Error("an expired CA still signs")
	}
	step(false)
	s.Data[caCertKey] = []byte("broken")
	if _, err := c.advanceRotation(s); err == nil || !strings.Contains(err.Error(), "Secret n/") {
		t.Errorf("a broken Secret: %v", err)
	}
}
