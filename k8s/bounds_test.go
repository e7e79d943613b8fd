package k8s

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"
	"go.yaml.in/yaml/v3"
)

// allocates returns the number of bytes that f allocates, freed ones included.
func allocates(f func()) uint64 {
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	f()
	runtime.ReadMemStats(&after)
	return after.TotalAlloc - before.TotalAlloc
}

// reviewOf returns the review that an API server sends for the creation of a
// pod.
func reviewOf(namespace, pod string) string {
	return `{"kind":"AdmissionReview","apiVersion":"admission.k8s.io/v1","request":{"uid":"u","kind":{"group":"",` +
		`"version":"v1","kind":"Pod"},"resource":{"group":"","version":"v1","resource":"pods"},"namespace":"` +
		namespace + `","operation":"CREATE","userInfo":{"username":"me","groups":["a","b"]},"object":` + pod +
		`,"oldObject":null,"dryRun":false}}`
}

// podWith returns a pod that would be injected, with this env list of its
// Envoy.
func podWith(env string) string {
	return `{"metadata":{"name":"web","annotations":{"sluice.dev/in-process":"true"}},` +
		`"spec":{"containers":[{"name":"envoy","env":[` + env + `]}]}}`
}

// many returns the elements of a list: n times the same.
func many(n int, element string) string { return strings.Repeat(element+",", n-1) + element }

func testWebhook() *webhook {
	return Webhook(Options{Image: "sluice:test", Version: "v1"}, zap.NewNop(), prometheus.NewRegistry()).(*webhook)
}

// A review of any content allocates at most a fixed amount of memory, and the
// client is told why its pod is denied.
func TestReviewCost(t *testing.T) {
	// Total allocations; not all of them are live at a time. With -race a
	// sync.Pool drops a quarter of what it is given, at random, and up to 69 MiB
	// were seen.
	const most = 80 << 20
	h := testWebhook()
	for _, c := range []struct{ name, pod, refused string }{
		{"as an API server has 330,000 empty variables", podWith(many(330_000, `{"name":""}`)),
			"more than 100000 values"},
		{"one field each", podWith(many(500_000, `{"a":0}`)), "more than 100000 values"},
		{"empty objects", podWith(many(1_300_000, `{}`)), "more than 100000 values"},
		{"numbers", podWith(many(2_000_000, `0`)), "more than 100000 values"},
		{"labels", `{"metadata":{"labels":{` + many(400_000, `"a":""`) + `}}}`, "more than 100000 values"},
		{"depth", podWith(strings.Repeat("[", 200) + strings.Repeat("]", 200)), "more than 100 levels"},
		{"depth that does not end", podWith(strings.Repeat(`{"a":`, 800_000)), "more than 100 levels"},
		{"bytes", podWith(`{"name":"` + strings.Repeat("x", maxReview) + `"}`), "more than 4194304 bytes"},
		{"bytes of many pods", podWith(`{"name":"` + strings.Repeat("x", 40<<20) + `"}`), "more than 4194304 bytes"},
		{"the most values", podWith(many(33_000, `{"a":0}`)), ""},
		{"the most bytes", podWith(`{"name":"` + strings.Repeat("x", maxReview-2000) + `"}`), ""},
		{"both", podWith(many(33_000, `{"a":0}`) + `,{"name":"` + strings.Repeat("x", maxReview-300_000) + `"}`), ""},
		{"quotes and braces in a text", podWith(`{"name":"` + strings.Repeat(`\"{[,:\\`, 100_000) + `"}`), ""},
		{"a large pod", podWith(many(5_000, `{"name":"NAME","value":"some value"}`)), ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			body := reviewOf("shop", c.pod)
			w := httptest.NewRecorder()
			w.Body.Grow(2 * len(body)) // not counted
			q := httptest.NewRequest(http.MethodPost, "/inject", strings.NewReader(body))
			cost := allocates(func() { h.ServeHTTP(w, q) })
			if cost > most {
				t.Errorf("%d MiB for %d bytes", cost>>20, len(body))
			}
			var r admissionReview
			if err := json.Unmarshal(w.Body.Bytes(), &r); err != nil || r.Response == nil || r.Response.UID != "u" {
				t.Fatalf("%d: %.300s", w.Code, w.Body)
			}
			if message, _ := r.Response.Status["message"].(string); r.Response.Allowed != (c.refused == "") ||
				!strings.Contains(message, c.refused) || len(message) > 300 {
				t.Errorf("allowed %v: %.400q", r.Response.Allowed, message)
			}
		})
	}
}

// started sends a review and returns once the webhook has read the start of it.
// The returned function sends the rest and returns the answer.
func started(t *testing.T, url, text string) (end func() (int, http.Header)) {
	t.Helper()
	reader, writer := io.Pipe()
	answered := make(chan *http.Response, 1)
	go func() {
		response, err := http.Post(url, "application/json", reader)
		if err != nil {
			t.Error(err)
		}
		answered <- response
	}()
	half := len(text) - 10
	if _, err := io.WriteString(writer, text[:half]); err != nil {
		t.Fatal(err)
	}
	return func() (int, http.Header) {
		_, _ = io.WriteString(writer, text[half:])
		_ = writer.Close()
		response := <-answered
		if response == nil {
			return 0, nil
		}
		_, _ = io.Copy(io.Discard, response.Body)
		_ = response.Body.Close()
		return response.StatusCode, response.Header
	}
}

// While a large review is decoded, large ones of other namespaces wait, further
// ones of the same namespace are told to retry, and small ones are answered.
func TestLargeReviewsWait(t *testing.T) {
	h := testWebhook()
	h.slots.wait = time.Minute
	server := httptest.NewServer(h)
	defer server.Close()
	large := podWith(many(20_000, `{"name":"a"}`))
	post := func(namespace, pod string) (int, http.Header) {
		return started(t, server.URL, reviewOf(namespace, pod))()
	}
	first := started(t, server.URL, reviewOf("greedy", large))
	await := func(what string, there func() bool) {
		t.Helper()
		for deadline := time.Now().Add(time.Minute); !there(); runtime.Gosched() {
			if time.Now().After(deadline) {
				t.Fatal(what)
			}
		}
	}
	waiting := func() int {
		h.slots.mu.Lock()
		defer h.slots.mu.Unlock()
		return len(h.slots.largeNamespaces)
	}
	await("the first large review has no slot", func() bool { return waiting() == 1 })
	if status, header := post("greedy", large); status != http.StatusTooManyRequests ||
		header.Get("Retry-After") != "1" {
		t.Errorf("another of the same namespace: status %d, %v", status, header)
	}
	for range 20 {
		if status, _ := post("shop", podWith(`{"name":"A"}`)); status != http.StatusOK {
			t.Fatalf("a small one: %d", status)
		}
	}
	other := make(chan int, 1)
	go func() {
		status, _ := post("shop", large)
		other <- status
	}()
	await("the other namespace's does not wait", func() bool { return waiting() == 2 })
	select {
	case status := <-other:
		t.Errorf("it did not wait: %d", status)
	default:
	}
	if status, _ := first(); status != http.StatusOK {
		t.Errorf("the first: %d", status)
	}
	if status := <-other; status != http.StatusOK {
		t.Errorf("the other namespace's: %d", status)
	}
	await("the slots are not released", func() bool { return waiting() == 0 && len(h.slots.large) == 0 })
	if status, _ := post("greedy", large); status != http.StatusOK {
		t.Errorf("again: %d", status)
	}
}

// A slow client holds its slot for a limited time, and no review waits forever.
func TestReviewTimeouts(t *testing.T) {
	h := testWebhook()
	h.slots.wait = 50 * time.Millisecond
	server := httptest.NewServer(h)
	defer server.Close()
	for _, pod := range []string{podWith(`{"name":"A"}`), podWith(many(20_000, `{"name":"a"}`))} {
		reader, writer := io.Pipe()
		go func() { _, _ = io.WriteString(writer, reviewOf("shop", pod)[:len(pod)-100]) }()
		response, err := http.Post(server.URL, "application/json", reader)
		if err != nil {
			t.Fatal(err)
		}
		_ = response.Body.Close()
		_ = writer.Close()
		if response.StatusCode != http.StatusBadRequest {
			t.Errorf("half a body: %d", response.StatusCode)
		}
	}
	for _, room := range []chan struct{}{h.slots.small, h.slots.bodies} {
		for range cap(room) {
			room <- struct{}{}
		}
		status, header := started(t, server.URL, reviewOf("shop", podWith("{}")))()
		if status != http.StatusTooManyRequests || header.Get("Retry-After") != "1" {
			t.Errorf("no slot: %d %v", status, header)
		}
		for range cap(room) {
			<-room
		}
	}
	if n := len(h.slots.bodies) + len(h.slots.small) + len(h.slots.large); n > 0 {
		t.Errorf("%d slots are not released", n)
	}
}

// The head of a review is read even if the rest is missing or malformed.
func TestReviewHead(t *testing.T) {
	for text, want := range map[string]reviewHead{
		reviewOf("shop", "{}"):                                                      {"u", "shop"},
		`{"request":{"namespace":"a","uid":"b","object":{`:                          {"b", "a"},
		`{"x":{"request":{"uid":"c"}},"request":{"y":{"uid":"d"},"uid":"e"`:         {"e", ""},
		`{"request":{"object":{"uid":"a"},"uid":"b"}}`:                              {},
		`{"request":{"uid":1,"namespace":"` + strings.Repeat("a", 300) + `","z":[]`: {},
		`[{"request"`: {}, "": {}, `{"request":[{"uid":"a"}]}`: {}, `{"request":{"uid":"\ud800"`: {"\ufffd", ""},
	} {
		if got := parseReviewHead([]byte(text)); got != want {
			t.Errorf("%.60q: %+v, want %+v", text, got, want)
		}
	}
}

// The length of annotations is checked before they are parsed, and messages
// quote only a part of long values.
func TestAnnotationsAreBounded(t *testing.T) {
	const most = 1 << 20
	long := strings.Repeat("a: 1, ", 120_000)
	annotate := func(name, value string) object {
		return object{
			"metadata": object{"annotations": object{annotationInProcess: "true", name: value}, "labels": object{}},
			"spec":     object{"containers": []any{object{"name": "envoy"}}},
		}
	}
	var all []string
	for _, name := range []string{annotationConfig, annotationRedisSecret, annotationDomain, annotationImage,
		annotationResources, annotationEnvoyContainer, annotationInProcess, annotationUser} {
		all = append(all, name)
		for _, value := range []string{"{limits: {" + long + "}}", strings.Repeat("a", 700_000),
			strings.Repeat("a", maxAnnotation+1), "\xff" + strings.Repeat("é", 400)} {
			var err error
			var out object
			cost := allocates(func() { out, _, err = Inject(annotate(name, value), options) })
			if err == nil {
				t.Errorf("%s of %d bytes is accepted: %.300s", name, len(value), fmt.Sprint(out))
				continue
			}
			if !strings.Contains(err.Error(), name) || len(err.Error()) > 400 {
				t.Errorf("%s: %.500s", name, err)
			}
			if cost > most {
				t.Errorf("%s: %d bytes are allocated for %d", name, cost, len(value))
			}
		}
	}
	if slices.Sort(all); len(all) != 8 {
		t.Error(all)
	}
	large := make([]any, 100_000)
	for i := range large {
		large[i] = object{"name": "x"}
	}
	long = strings.Repeat("x", 1_000_000)
	for name, p := range map[string]object{
		"label": {"metadata": object{"labels": object{injectLabel: long}},
			"spec": object{"containers": []any{}}},
		"label, a list": {"metadata": object{"labels": object{injectLabel: large}},
			"spec": object{"containers": []any{}}},
		"hostNetwork": {"spec": object{"hostNetwork": long, "containers": []any{}}},
		"resources": {"metadata": object{"annotations": object{annotationInProcess: "true",
			annotationResources: large}}, "spec": object{"containers": []any{object{"name": "envoy"}}}},
		"container's name": {"metadata": object{"annotations": object{annotationInProcess: "true"},
			"labels": object{injectLabel: "enabled"}},
			"spec": object{"containers": []any{object{"name": "envoy"},
				object{"name": long, "ports": []any{object{"containerPort": 9002}}}}}},
	} {
		var err error
		cost := allocates(func() { _, _, err = Inject(p, options) })
		if err == nil || len(err.Error()) > 400 {
			t.Errorf("%s: %.500s", name, err)
		}
		if cost > most {
			t.Errorf("%s: %d bytes are allocated", name, cost)
		}
	}
	p := annotate(annotationConfig, "limits")
	if _, _, err := Inject(p, Options{Image: "i", Namespace: "shop",
		Workload: strings.Repeat("w", 250)}); err == nil || !strings.Contains(err.Error(), annotationDomain) {
		t.Errorf("a default domain that is too long: %v", err)
	}
	if _, _, err := Inject(p, Options{Image: "i", Namespace: "shop",
		Workload: strings.Repeat("w", 254)}); err == nil || len(err.Error()) > 400 {
		t.Errorf("a name that is too long for Kubernetes: %.500v", err)
	}
	if err := CheckImage(strings.Repeat("a", 1000)); err == nil || len(err.Error()) > 400 {
		t.Errorf("image: %.500v", err)
	}
}

// Names in the log are at most as long as Kubernetes names.
func TestReviewLog(t *testing.T) {
	core, logged := observer.New(zapcore.DebugLevel)
	h := Webhook(Options{Image: "sluice:test", Version: "v1"}, zap.New(core), prometheus.NewRegistry())
	long := strings.Repeat("n", 100_000)
	for _, p := range []string{
		`{"metadata":{"name":"` + long + `"},"spec":{"containers":[{"name":"envoy"}]}}`,
		`{"metadata":{"generateName":"` + long + `","labels":{"sluice.dev/inject":"` + long[:20_000] +
			`"}},"spec":{"containers":[{"name":"envoy"}]}}`,
		`{"metadata":{"name":"a","ownerReferences":[{"controller":true,"kind":"Job","name":"` + long +
			`"}]},"spec":{"containers":[{"name":"app"}]}}`,
	} {
		ask(t, h, reviewOf("shop", p))
	}
	if logged.Len() != 3 {
		t.Errorf("%d lines", logged.Len())
	}
	for _, entry := range logged.All() {
		if text := fmt.Sprint(entry.ContextMap()); len(text) > 1000 {
			t.Errorf("%d bytes: %.200s", len(text), text)
		}
	}
}

// Raising a pod's own requests takes memory linear in the size of the pod, not
// quadratic.
func TestPodResourcesOfManyNames(t *testing.T) {
	limits := object{}
	for i := range 20_000 {
		limits[fmt.Sprint("example.com/", i)] = "1"
	}
	containers := []any{object{"name": "envoy"}}
	for i := range 10_000 {
		containers = append(containers, object{"name": fmt.Sprint("c", i)})
	}
	p := object{"metadata": object{"annotations": object{annotationInProcess: "true"}},
		"spec": object{"resources": object{"limits": limits}, "containers": containers}}
	// Copying the containers for each name takes 6 GB.
	if cost := allocates(func() { inject(t, p, options) }); cost > 64<<20 {
		t.Errorf("%d MiB", cost>>20)
	}
}

// An error in a manifest is reported once, however many places have it.
func TestManifestWithEqualKeys(t *testing.T) {
	in := "a:\n" + strings.Repeat("  k: 1\n", 4000) + "# sluice.dev/\n"
	var err error
	// Reporting each pair of lines takes 3.5 GB.
	if cost := allocates(func() { _, _, err = Manifest([]byte(in), options) }); cost > 64<<20 {
		t.Errorf("%d MiB", cost>>20)
	}
	if err == nil || !strings.Contains(err.Error(), `document 1: line 3: mapping key "k" already defined at line 2`) ||
		len(err.Error()) > 400 {
		t.Errorf("%.500v", err)
	}
}

// Merging a long list takes time and memory linear in its length.
func TestManifestOfMany(t *testing.T) {
	old, changed := make([]any, 2000), make([]any, 2000)
	node := &yaml.Node{Kind: yaml.SequenceNode}
	for i := range old {
		old[i] = object{"metadata": object{"name": fmt.Sprint(i)}}
		changed[i] = object{"metadata": object{"name": fmt.Sprint(i), "labels": object{"a": "b"}}}
		element, err := newNode(old[i])
		if err != nil {
			t.Fatal(err)
		}
		node.Content = append(node.Content, element)
	}
	if cost := allocates(func() {
		if err := mergeSequence(node, old, changed); err != nil {
			t.Error(err)
		}
	}); cost > 128<<20 { // comparing all pairs takes twice as much, and 20 s
		t.Errorf("%d MiB", cost>>20)
	}
	var got []any
	if err := node.Decode(&got); err != nil || !equalJSON(got, changed) {
		t.Errorf("%v: the merged value differs", err)
	}
}

// FuzzReview checks that a review allocates at most a multiple of its size.
func FuzzReview(f *testing.F) {
	for _, p := range []string{podWith(`{"name":"A"}`), podWith(many(1000, `{"a":0}`)),
		`{"metadata":{"labels":{"sluice.dev/inject":"enabled"}},"spec":{"containers":[{"name":"app"}]}}`,
		podWith(strings.Repeat("[", 200)), "[]", "null"} {
		f.Add([]byte(reviewOf("shop", p)))
	}
	f.Add([]byte(`{"request":`))
	h := testWebhook()
	f.Fuzz(func(t *testing.T, body []byte) {
		w := httptest.NewRecorder()
		w.Body.Grow(1<<16 + 4*len(body))
		q := httptest.NewRequest(http.MethodPost, "/inject", strings.NewReader(string(body)))
		if cost, most := allocates(func() { h.ServeHTTP(w, q) }), uint64(2<<20+256*len(body)); cost > most {
			t.Errorf("%d bytes are allocated for %d", cost, len(body))
		}
		if w.Code != http.StatusOK && w.Code != http.StatusBadRequest {
			t.Errorf("%d: %s", w.Code, w.Body)
		}
	})
}

// FuzzAnnotation checks that an annotation allocates a bounded amount of
// memory, and that the message about it is short.
func FuzzAnnotation(f *testing.F) {
	names := []string{annotationConfig, annotationRedisSecret, annotationDomain, annotationImage, annotationResources,
		annotationEnvoyContainer, annotationInProcess, annotationUser}
	for i := range names {
		for _, value := range []string{"a", "true", "{requests: {cpu: 50m}, limits: {memory: 128Mi}}",
			"{limits: &a {cpu: *a}}", "{<<: [&a {limits: {cpu: 1}}, *a, *a]}", strings.Repeat("k: 1\n", 100),
			strings.Repeat("[", 500)} {
			f.Add(byte(i), value)
		}
	}
	f.Fuzz(func(t *testing.T, i byte, value string) {
		p := object{
			"metadata": object{"annotations": object{names[int(i)%len(names)]: value}},
			"spec":     object{"containers": []any{object{"name": "envoy"}}},
		}
		var err error
		if cost := allocates(func() { _, _, err = Inject(p, options) }); cost > 4<<20 {
			t.Errorf("%d bytes are allocated for %d", cost, len(value))
		}
		if err != nil && len(err.Error()) > 1000 {
			t.Errorf("%d bytes: %.300s", len(err.Error()), err)
		}
	})
}
