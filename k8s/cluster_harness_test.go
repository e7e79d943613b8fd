//go:build linux

package k8s

import (
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/sluiceproxy/sluice/k8s/testenv"
)

// The chart's release is installed by helm. The replicas of its Deployment run
// as processes of the test, with the Deployment's arguments, service account
// and addresses. The API server finds them by the Service and its
// EndpointSlice, and verifies their certificates by the caBundle that they have
// set.
const (
	release       = "sluice-system" // the namespace
	configuration = "sluice-injector." + release
	configPath    = "/apis/admissionregistration.k8s.io/v1/mutatingwebhookconfigurations/" + configuration
)

var addresses = []string{"192.0.2.1", "192.0.2.2"} // loopback addresses are invalid in an EndpointSlice

// long starts each test in a cluster. It returns false in the parent process,
// and skips the test without SLUICE_LONG.
func long(t *testing.T) bool {
	t.Helper()
	if os.Getenv("SLUICE_LONG") == "" {
		t.Skip("builds Kubernetes, which takes minutes: SLUICE_LONG=1")
	}
	kubernetesBinaries(t)
	helmBinary(t)
	return testenv.Network(t, append(addresses, home)...)
}

// program builds sluice and returns its path.
func program(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "sluice")
	build := exec.CommandContext(t.Context(), "go", "build", "-o", path, "../cmd/sluice")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return path
}

// must makes a call that must succeed.
func must(t *testing.T, a *API, method, path string, in any) object {
	t.Helper()
	out := object{}
	if err := a.call(t.Context(), method, path, in, &out); err != nil {
		t.Fatal(err)
	}
	return out
}

// namespace creates a namespace, and waits for its service account, without
// which it accepts no pods.
func namespace(t *testing.T, c *controlPlane, name string, labels object) {
	t.Helper()
	must(t, c.API, http.MethodPost, "/api/v1/namespaces", object{"metadata": object{"name": name, "labels": labels}})
	await(t, "service account of "+name, func() bool {
		return c.call(t.Context(), http.MethodGet, "/api/v1/namespaces/"+name+"/serviceaccounts/default", nil,
			&object{}) == nil
	})
}

// warnings records the warnings of an API server.
type warnings struct {
	http.RoundTripper
	mu   sync.Mutex
	said []string
}

func listen(a *API) *warnings {
	w := &warnings{RoundTripper: a.client.Transport}
	a.client.Transport = w
	return w
}

func (w *warnings) RoundTrip(q *http.Request) (*http.Response, error) {
	r, err := w.RoundTripper.RoundTrip(q)
	if err == nil {
		w.mu.Lock()
		w.said = append(w.said, r.Header.Values("Warning")...)
		w.mu.Unlock()
	}
	return r, err
}

// take returns the warnings since the last call.
func (w *warnings) take() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	said := strings.Join(w.said, "\n")
	w.said = nil
	return said
}

// replicas are the replicas of the chart's webhook.
type replicas struct {
	c         *controlPlane
	binary    string
	args, env []string
	within    *testenv.MemoryGroup // for the replicas started next; nil for no limit
	running   [2]*process
	ready     [2]atomic.Bool
}

// install installs the chart with helm, and prepares what a kubelet would for
// its webhook's pods, without starting them.
func install(t *testing.T, c *controlPlane, args ...string) *replicas {
	t.Helper()
	args = append([]string{"install", "sluice", chartDir, "--kubeconfig", c.kubeconfig, "--namespace", release,
		"--create-namespace"}, args...)
	if out, err := helm(t, args...); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return asPods(t, c)
}

// asPods is install for an existing release.
func asPods(t *testing.T, c *controlPlane) *replicas {
	t.Helper()
	deployment := must(t, c.API, http.MethodGet, "/apis/apps/v1/namespaces/"+release+"/deployments/sluice-webhook", nil)
	pod := at(deployment, "spec", "template", "spec")
	r := &replicas{c: c, binary: program(t)}
	for _, a := range at(listField(pod.(object), "containers")[0], "args").([]any) {
		r.args = append(r.args, a.(string))
	}
	account := t.TempDir()
	token := must(t, c.API, http.MethodPost, "/api/v1/namespaces/"+release+"/serviceaccounts/"+
		at(pod, "serviceAccountName").(string)+"/token",
		object{"spec": object{"expirationSeconds": 3600}})
	ca, err := os.ReadFile(filepath.Join(c.account, "ca.crt"))
	if err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{"token": at(token, "status", "token").(string), "ca.crt": string(ca),
		"namespace": release} {
		if err := os.WriteFile(filepath.Join(account, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	r.args = append(r.args, "--service-account="+account)
	for _, name := range []string{"KUBERNETES_SERVICE_HOST", "KUBERNETES_SERVICE_PORT"} {
		v, _ := c.env(name)
		r.env = append(r.env, name+"="+v)
	}
	return r
}

// run starts the i-th replica, and adds it to the endpoints once it is ready.
func (r *replicas) run(t *testing.T, i int, args ...string) {
	t.Helper()
	a := addresses[i]
	name, args := r.binary, slices.Concat(r.args, []string{"--listen=" + a + ":8443", "--metrics=" + a + ":9003"}, args)
	if r.within != nil {
		name = r.within.Launcher(t, name)
	}
	p := start(t, r.env, name, args...)
	await(t, "the webhook's /readyz", func() bool {
		select {
		case <-p.exited:
			t.Fatalf("it ended:\n%s", p.logged())
		default:
		}
		response, err := http.Get("http://" + a + ":9003/readyz")
		if err != nil {
			return false
		}
		_ = response.Body.Close()
		return response.StatusCode == http.StatusOK
	})
	r.running[i] = p
	r.ready[i].Store(true)
	r.publish(t)
}

// stop acts as a rollout does: it removes the endpoint and stops the process at
// the same time.
func (r *replicas) stop(t *testing.T, i int) {
	t.Helper()
	if err := r.running[i].Process.Signal(syscall.SIGTERM); err != nil {
		t.Error(err)
	}
	r.ready[i].Store(false)
	r.publish(t)
	<-r.running[i].exited
	if state := r.running[i].ProcessState; !state.Success() {
		t.Errorf("stopped: %v\n%s", state, r.running[i].logged())
	}
}

// publish acts as the EndpointSlice controller would if there were nodes.
func (r *replicas) publish(t *testing.T) {
	t.Helper()
	var all []any
	for i := range r.ready {
		all = append(all, endpoint(addresses[i], r.ready[i].Load()))
	}
	endpoints(t, r.c.API, release, "sluice-webhook", "https", 8443, all...)
}

// endpoint returns an endpoint of a Service.
func endpoint(address string, ready bool) object {
	return object{"addresses": []any{address}, "conditions": object{"ready": ready}}
}

// endpoints sets the endpoints of a Service's port, in place of the controller.
func endpoints(t *testing.T, a *API, namespace, service, port string, number int, all ...any) {
	t.Helper()
	path, name := "/apis/discovery.k8s.io/v1/namespaces/"+namespace+"/endpointslices", service+"-here"
	slice := object{
		"metadata":    object{"name": name, "labels": object{"kubernetes.io/service-name": service}},
		"addressType": "IPv4",
		"endpoints":   all, "ports": []any{object{"name": port, "port": number, "protocol": "TCP"}},
	}
	err := a.call(t.Context(), http.MethodPut, path+"/"+name, slice, &object{})
	if hasStatus(err, http.StatusNotFound) {
		err = a.call(t.Context(), http.MethodPost, path, slice, &object{})
	}
	if err != nil {
		t.Fatal(err)
	}
}

// bundles returns the caBundles of the webhook's configuration.
func bundles(t *testing.T, a *API) [][]byte {
	t.Helper()
	var configuration struct {
		Webhooks []struct{ ClientConfig struct{ CABundle []byte } }
	}
	if err := a.call(t.Context(), http.MethodGet, configPath, nil, &configuration); err != nil {
		t.Fatal(err)
	}
	var all [][]byte
	for _, w := range configuration.Webhooks {
		all = append(all, w.ClientConfig.CABundle)
	}
	return all
}

// injected checks that a stored pod has sluice as the init container with this
// index, and with this domain.
func injected(t *testing.T, pod object, index int, domain string) {
	t.Helper()
	init := listField(objectField(pod, "spec"), "initContainers")
	i := indexByName(init, "sluice")
	if i != index {
		t.Fatalf("sluice is init container %d, want %d:\n%v", i, index, pod)
	}
	env := listField(init[i].(object), "env")
	if d := indexByName(env, "SLUICE_DOMAIN"); d < 0 || at(env[d], "value") != domain {
		t.Errorf("domain: %v, want %s", env, domain)
	}
	if stamp, _ := at(pod, "metadata", "annotations", annotationInjected).(string); stamp == "" {
		t.Error("no stamp")
	}
	if metadata := at(pod, "metadata").(object); metadata["uid"] == nil {
		t.Errorf("it is not stored: %v", metadata)
	}
}
