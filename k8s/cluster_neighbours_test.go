//go:build linux

package k8s

import (
	"encoding/json"
	"net/http"
	"strings"
	"testing"
)

// patching returns the handler of a webhook that changes each pod by the JSON
// patch which patch returns for its spec; a nil one changes nothing.
func patching(patch func(spec object) []object) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		var in admissionReview
		if err := json.NewDecoder(q.Body).Decode(&in); err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		answer := &admissionResponse{UID: in.Request.UID, Allowed: true}
		if changes := patch(objectField(in.Request.Object, "spec")); changes != nil {
			answer.PatchType = "JSONPatch"
			answer.Patch, _ = json.Marshal(changes)
		}
		_ = json.NewEncoder(w).Encode(admissionReview{APIVersion: in.APIVersion, Kind: in.Kind, Response: answer})
	})
}

// istiod registers a webhook that acts like Istio's with native sidecars on
// pods of namespaces with the label NAME=enabled: it puts istio-init and
// istio-proxy first.
func istiod(t *testing.T, a *API, name string) {
	t.Helper()
	handler := patching(func(spec object) []object {
		init := listField(spec, "initContainers")
		if indexByName(init, istioProxy) >= 0 {
			return nil
		}
		init = append([]any{
			object{"name": "istio-init", "image": "proxyv2", "securityContext": object{
				"capabilities": object{"add": []any{"NET_ADMIN", "NET_RAW"}}, "runAsUser": 0,
			}},
			object{
				"name": istioProxy, "image": "proxyv2", "restartPolicy": "Always",
				"ports":           []any{object{"containerPort": 15090, "name": "http-envoy-prom"}},
				"startupProbe":    object{"httpGet": object{"path": "/healthz/ready", "port": 15021}},
				"securityContext": object{"runAsUser": 1337},
				"volumeMounts":    []any{object{"name": "istio-envoy", "mountPath": "/etc/istio/proxy"}},
			},
		}, init...)
		volumes := append(listField(spec, "volumes"),
			object{"name": "istio-envoy", "emptyDir": object{"medium": "Memory"}})
		return []object{
			{"op": "add", "path": "/spec/initContainers", "value": init},
			{"op": "add", "path": "/spec/volumes", "value": volumes},
		}
	})
	serveWebhook(t, a, name, handler, object{name: "enabled"}, "Never")
}

// rewriter registers a webhook that, on pods of namespaces with the label
// NAME=enabled, takes all images from a mirror and lowers all requests of CPU.
func rewriter(t *testing.T, a *API, name, reinvocation string) {
	t.Helper()
	handler := patching(func(spec object) (patch []object) {
		for _, field := range []string{"initContainers", "containers"} {
			list := listField(spec, field)
			for i, v := range list {
				image, _ := v.(object)["image"].(string)
				c := withField(v.(object), "image", "mirror.example.com/"+strings.TrimPrefix(image, "mirror.example.com/"))
				list[i] = withField(c, "resources", mergeResources(objectField(c, "resources"),
					object{"requests": object{"cpu": "7m"}}))
			}
			if len(list) > 0 {
				patch = append(patch, object{"op": "add", "path": "/spec/" + field, "value": list})
			}
		}
		return patch
	})
	serveWebhook(t, a, name, handler, object{name: "enabled"}, reinvocation)
}

// besideRewriters creates pods beside webhooks that rewrite all containers. What
// they change stays, sluice is there once, and a second creation of the same pod
// changes nothing.
func besideRewriters(t *testing.T, c *controlPlane) {
	t.Helper()
	for _, row := range []struct {
		name, reinvocation string
		sees               bool // sluice's container
	}{
		{"aa-mirror", "Never", false},
		{"aa-mirror", "IfNeeded", true},
		{"zz-mirror", "Never", true},
		{"zz-mirror", "IfNeeded", true},
	} {
		what := row.name + ", " + row.reinvocation
		rewriter(t, c.API, row.name, row.reinvocation)
		where := row.name + "-" + strings.ToLower(row.reinvocation)
		namespace(t, c, where, object{injectLabel: "enabled", row.name: "enabled"})
		p := pod(t, strings.Replace(podText("", "{containers: [{name: envoy, SECURE}]}"), "{metadata: {",
			"{metadata: {name: once, ", 1))
		once := must(t, c.API, http.MethodPost, "/api/v1/namespaces/"+where+"/pods", p)
		again := plain(t, once)
		objectField(again, "metadata")["name"] = "again"
		again = must(t, c.API, http.MethodPost, "/api/v1/namespaces/"+where+"/pods", again)
		for _, got := range []object{once, again} {
			init, containers := listField(objectField(got, "spec"), "initContainers"),
				listField(objectField(got, "spec"), "containers")
			if len(init) != 1 || sidecarIndex(got) != 0 || len(containers) != 1 {
				t.Fatalf("%s: %v", what, objectField(got, "spec"))
			}
			rewritten := func(container any) bool {
				image, _ := at(container, "image").(string)
				return strings.HasPrefix(image, "mirror.example.com/") && at(container, "resources", "requests", "cpu") == "7m"
			}
			if !rewritten(containers[0]) || row.sees && !rewritten(init[0]) {
				t.Errorf("%s: Envoy's container %v\nand sluice's %v", what, containers[0], init[0])
			}
		}
		must(t, c.API, http.MethodDelete, "/apis/admissionregistration.k8s.io/v1/mutatingwebhookconfigurations/"+
			row.name, nil)
	}
}

// drained evicts an injected pod with kubectl drain, as an upgrade of its node
// does. kubectl asks for --delete-emptydir-data whatever an emptyDir's medium is.
func drained(t *testing.T, c *controlPlane) {
	t.Helper()
	must(t, c.API, http.MethodPost, "/api/v1/nodes", object{"metadata": object{"name": "upgraded"}})
	namespace(t, c, "drained", object{injectLabel: "enabled"})
	p := pod(t, strings.Replace(podText("", "{nodeName: upgraded, containers: [{name: envoy, SECURE}]}"), "{metadata: {",
		"{metadata: {name: web, ", 1))
	if got := must(t, c.API, http.MethodPost, "/api/v1/namespaces/drained/pods", p); sidecarIndex(got) != 0 {
		t.Fatalf("not injected: %v", got)
	}
	out, err := c.kubectl(t, "", "drain", "upgraded", "--force", "--delete-emptydir-data", "--grace-period=0",
		"--timeout=20s")
	if err != nil || !strings.Contains(out, "evict") {
		t.Errorf("%v\n%s", err, out)
	}
}

// underQuota creates pods where a ResourceQuota has limits.cpu: they need a limit
// for sluice, by their own annotation or the webhook's default. restart restarts
// the webhook with these options.
func underQuota(t *testing.T, c *controlPlane, restart func(args ...string)) {
	t.Helper()
	namespace(t, c, "quota", object{injectLabel: "enabled"})
	must(t, c.API, http.MethodPost, "/api/v1/namespaces/quota/resourcequotas", object{
		"metadata": object{"name": "cpu"}, "spec": object{"hard": object{"limits.cpu": "10"}},
		"status": object{"hard": object{"limits.cpu": "10"}},
	})
	create := func(name, annotation string) error {
		text := podText("", "{containers: [{name: envoy, resources: {limits: {cpu: 1}}, SECURE}]}")
		p := pod(t, strings.Replace(text, "{metadata: {", "{metadata: {name: "+name+", ", 1))
		if annotation != "" {
			objectField(objectField(p, "metadata"), "annotations")[annotationResources] = annotation
		}
		return c.call(t.Context(), http.MethodPost, "/api/v1/namespaces/quota/pods", p, &object{})
	}
	if err := create("without", ""); !hasStatus(err, http.StatusForbidden) ||
		!strings.Contains(err.Error(), "limits.cpu") {
		t.Errorf("without a limit: %v", err)
	}
	if err := create("annotated", "{limits: {cpu: 200m}}"); err != nil {
		t.Error(err)
	}
	restart("--resources={limits: {cpu: 500m}}")
	if err := create("by-default", ""); err != nil {
		t.Error(err)
	}
}
