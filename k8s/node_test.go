//go:build linux

package k8s

import (
	"context"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// web is a Deployment of an app that is reached only through its Envoy. Both
// keep serving until all clients know that the endpoint is gone.
var web = strings.NewReplacer("APP", appImage, "ENVOY", envoyImage).Replace(`
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec: {selector: {app: web}, ports: [{port: 80, targetPort: 8080}]}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: web, namespace: shop}
spec:
  replicas: 2
  strategy: {rollingUpdate: {maxUnavailable: 0, maxSurge: 1}}
  selector: {matchLabels: {app: web}}
  template:
    metadata:
      labels: {app: web}
      annotations: {sluice.dev/config: limits, sluice.dev/redis-secret: redis}
    spec:
      securityContext: {runAsNonRoot: true, runAsUser: 1000, seccompProfile: {type: RuntimeDefault}}
      containers:
      - name: app
        image: APP
        securityContext: {allowPrivilegeEscalation: false, capabilities: {drop: [ALL]}}
        lifecycle: {preStop: {sleep: {seconds: 5}}}
      - name: envoy
        image: ENVOY
        args: [--config-path, /etc/envoy/envoy.yaml, --concurrency, "1"]
        securityContext: {allowPrivilegeEscalation: false, capabilities: {drop: [ALL]}}
        lifecycle: {preStop: {sleep: {seconds: 4}}}
        readinessProbe: {httpGet: {path: /healthz, port: 8080}, periodSeconds: 1}
        volumeMounts: [{name: envoy, mountPath: /etc/envoy}]
      volumes: [{name: envoy, configMap: {name: envoy}}]
`)

// limits is the app's config. As the buckets hardly refill, their levels tell
// how many tokens were taken. The timeout is longer than its default, so that a
// slow machine loses no request during a rollout.
const limits = `
store: {redis: {url: "${SLUICE_REDIS:-redis://localhost}", timeout: 5s}}
listen: {grpc: "unix:///run/sluice/authz.sock"}
exempt: [{match: {paths: [/healthz]}}]
limits:
- {name: few, match: {paths: [/few]}, rate: 3/8784h}
- {name: many, match: {paths: [/many]}, rate: 20000/8784h, burst: 1000000}
- {name: open, match: {paths: [/open]}, rate: 1/h, burst: 100, on_failure: allow}
`

// answer is the response that a client receives.
type answer struct {
	status           int
	pod              string // as the app's response names it
	limit, remaining string
	origin           string // access-control-allow-origin
	grpcStatus       string // in its headers
	said             string // the start of the body, unless the app answered
	err              error
}

// get sends a GET request.
func get(ctx context.Context, url string) answer {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return answer{err: err}
	}
	return send(http.DefaultClient, request)
}

// send sends a request on a connection of its own.
func send(client *http.Client, request *http.Request) answer {
	request.Close = true
	response, err := client.Do(request)
	if err != nil {
		return answer{err: err}
	}
	body, err := io.ReadAll(response.Body)
	_ = response.Body.Close()
	h := response.Header
	a := answer{
		status: response.StatusCode, pod: h.Get("X-Pod"),
		limit: h.Get("X-Ratelimit-Limit"), remaining: h.Get("X-Ratelimit-Remaining"),
		origin: h.Get("Access-Control-Allow-Origin"), grpcStatus: h.Get("Grpc-Status"), err: err,
	}
	if a.pod == "" {
		a.said = string(body[:min(len(body), 200)])
	}
	return a
}

// tally counts answers by status and pod, and collects the wrong ones.
type tally struct {
	mu     sync.Mutex
	status map[int]int
	pods   map[string]int // by name of the app's pod
	wrong  []string
}

func (y *tally) add(a answer, lossless bool) {
	y.mu.Lock()
	defer y.mu.Unlock()
	if a.err == nil {
		y.status[a.status]++
	}
	if a.pod != "" {
		y.pods[a.pod]++
	}
	if a.pod != "" && a.remaining == "" || lossless && (a.err != nil || a.pod == "") {
		y.wrong = append(y.wrong, fmt.Sprintf("%s: %d of %q, %q left, %q, %v",
			time.Now().Format("05.000"), a.status, a.pod, a.remaining, a.said, a.err))
	}
}

// answered returns the number of answers.
func (y *tally) answered() int {
	y.mu.Lock()
	defer y.mu.Unlock()
	n := 0
	for _, of := range y.status {
		n += of
	}
	return n
}

func newTally() *tally { return &tally{status: map[int]int{}, pods: map[string]int{}} }

// asking returns get of a URL, for clients.
func asking(t *testing.T, url string) func() answer {
	return func() answer { return get(t.Context(), url) }
}

// clients sends requests continuously from n clients until the returned
// function is called, which waits for their last answers.
func clients(t *testing.T, n int, ask func() answer, each func(answer)) func() {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	for range n {
		wg.Go(func() {
			for ctx.Err() == nil {
				each(ask()) // a request under way is not canceled
			}
		})
	}
	return func() {
		cancel()
		wg.Wait()
	}
}

// TestNode runs sluice as its users do: in pods on a real node, from the image
// that the Dockerfile builds, installed by helm.
func TestNode(t *testing.T) {
	n, inside := machine(t)
	if !inside {
		return
	}
	sluice := program(t)
	config := filepath.Join(t.TempDir(), "sluice.yaml")
	if err := os.WriteFile(config, []byte(limits), 0o600); err != nil {
		t.Fatal(err)
	}
	ip := func(service, namespace string) string {
		t.Helper()
		return n.do(t, "", "get", "service", service, "--namespace", namespace, "--output",
			"jsonpath={.spec.clusterIP}")
	}
	redis := func() []string { // the environment of sluice's commands
		return append(os.Environ(), "SLUICE_DOMAIN=shop/web", "SLUICE_REDIS=redis://"+
			net.JoinHostPort(ip("sluice-trial-redis", release), "6379"))
	}
	// held returns the number of tokens in the bucket of a limit.
	held := func(limit string) float64 {
		t.Helper()
		c := exec.CommandContext(t.Context(), sluice, "bucket", "get", "--config", config,
			"--limit", limit, "-o", "json")
		c.Env = redis()
		out, err := c.Output()
		_, after, ok := strings.Cut(string(out), `"tokens":`)
		tokens, notNumber := strconv.ParseFloat(strings.TrimSpace(after[:max(0, strings.IndexAny(after, ",}"))]), 64)
		if err != nil || !ok || notNumber != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		return tokens
	}
	type podState struct{ name, ip, phase string }
	pods := func() []podState {
		t.Helper()
		var all []podState
		for _, v := range listField(must(t, n.API, http.MethodGet,
			"/api/v1/namespaces/shop/pods?labelSelector=app%3Dweb", nil), "items") {
			p := podState{name: at(v, "metadata", "name").(string)}
			p.ip, _ = at(v, "status", "podIP").(string)
			p.phase, _ = at(v, "status", "phase").(string)
			all = append(all, p)
		}
		return all
	}
	getPod := func(p podState, path string) answer { return get(t.Context(), "http://"+p.ip+":8080"+path) }
	rolled := func() { n.do(t, "", "rollout", "status", "deployment/web", "--namespace", "shop", "--timeout", "3m") }

	for _, arch := range []string{"amd64", "arm64"} {
		t.Run("the image for "+arch, func(t *testing.T) {
			compressed, said := readImage(t, filepath.Join(n.dir, arch))
			t.Logf("%.1f MB", float64(compressed)/1e6)
			if compressed > 30e6 || compressed < 1e6 {
				t.Errorf("%d bytes", compressed)
			}
			config := objectField(said, "config")
			if config["User"] != "65532:65532" || fmt.Sprint(config["Entrypoint"],
				config["Cmd"]) != "[/sluice] [run]" || fmt.Sprint(said["os"], said["architecture"]) != "linux"+arch {
				t.Errorf("%v", said)
			}
			for _, label := range []string{"title", "description", "source", "licenses"} {
				if v, _ := at(config, "Labels", "org.opencontainers.image."+label).(string); v == "" {
					t.Errorf("no label %s: %v", label, config)
				}
			}
			if v := at(config, "Labels", "org.opencontainers.image.version"); v != "v0.1.0" {
				t.Errorf("version %v", v)
			}
		})
	}
	t.Run("arm64", func(t *testing.T) { // the program runs in an emulator
		program, socket := filepath.Join(n.dir, "sluice-arm64"), "unix://"+filepath.Join(t.TempDir(), "s")
		version := exec.CommandContext(t.Context(), "qemu-aarch64", program, "version")
		if out, err := version.CombinedOutput(); err != nil || !strings.Contains(string(out), "v0.1.0") {
			t.Fatalf("%v\n%s", err, out)
		}
		start(t, nil, "qemu-aarch64", program, "run", "--grpc", socket)
		await(t, "its health", func() bool {
			return exec.CommandContext(t.Context(), sluice, "healthcheck", "--grpc", socket).Run() == nil
		})
	})
	t.Run("install", func(t *testing.T) {
		namespace(t, n.controlPlane, "shop", object{"pod-security.kubernetes.io/enforce": "restricted"})
		began := time.Now()
		said := n.readme(t, "Install")
		t.Logf("installed after %v", time.Since(began))
		if !strings.Contains(said, "Phase:          Succeeded") {
			t.Errorf("helm test of the gateway's release:\n%s", said)
		}
	})
	t.Run("the gateway is tested before its pods are ready", func(t *testing.T) {
		scale := func(replicas string) {
			n.do(t, "", "scale", "deployment", "edge-sluice-gateway", "--namespace", "edge", "--replicas", replicas)
		}
		scale("0")
		n.do(t, "", "wait", "--for=delete", "pod", "--namespace", "edge", "--selector",
			"app.kubernetes.io/component=gateway", "--timeout=60s")
		test := exec.CommandContext(t.Context(), helmBinary(t), "test", "edge", "--namespace", "edge")
		test.Env = append(os.Environ(), "KUBECONFIG="+n.kubeconfig)
		var said strings.Builder
		test.Stdout, test.Stderr = &said, &said
		if err := test.Start(); err != nil {
			t.Fatal(err)
		}
		await(t, "its first failure", func() bool {
			return n.do(t, "", "get", "pod", "edge-sluice-test-gateway", "--namespace", "edge", "--ignore-not-found",
				"--output", "jsonpath={.status.containerStatuses[0].restartCount}") == "1"
		})
		scale("2")
		if err := test.Wait(); err != nil {
			t.Errorf("%v\n%s", err, said.String())
		}
	})
	if t.Failed() {
		return
	}
	ask := func(t *testing.T, path string) []string {
		t.Helper()
		var got []string
		for range 5 {
			a := get(t.Context(), "http://"+ip("web", "shop")+path)
			got = append(got, fmt.Sprint(a.status, " ", a.remaining, " ", a.pod != ""))
		}
		return got
	}
	t.Run("shadow mode", func(t *testing.T) {
		printed, err := exec.CommandContext(t.Context(), sluice, "envoy", "plain", "--config", config).CombinedOutput()
		if err != nil {
			t.Fatalf("%v\n%s", err, printed)
		}
		// As in limits, the timeout is longer than its default.
		shipped, long := "timeout: 0.2s", "timeout: 10s"
		if !strings.Contains(string(printed), shipped) {
			t.Fatalf("no %q in\n%s", shipped, printed)
		}
		bootstrap := strings.ReplaceAll(string(printed), shipped, long)
		n.do(t, web, "apply", "-f", "-")
		n.do(t, "", "create", "configmap", "limits", "--namespace", "shop",
			"--from-literal", "sluice.yaml=mode: shadow\n"+limits)
		n.do(t, "", "create", "configmap", "envoy", "--namespace", "shop", "--from-literal", "envoy.yaml="+bootstrap)
		began := time.Now()
		rolled()
		t.Logf("two pods ready after %v", time.Since(began))
		if got := ask(t, "/few"); slices.ContainsFunc(got,
			func(said string) bool { return !strings.HasPrefix(said, "200 ") || !strings.HasSuffix(said, " true") }) {
			t.Errorf("%q", got)
		}
		if left := held("few"); left > 0.01 {
			t.Errorf("%v tokens are left", left)
		}
	})
	if t.Failed() {
		return
	}
	t.Run("enforced", func(t *testing.T) {
		began := time.Now()
		replaced := n.do(t, "", "create", "configmap", "limits", "--namespace", "shop", "--from-literal",
			"sluice.yaml="+limits, "--dry-run=client", "--output", "yaml")
		n.do(t, replaced, "replace", "-f", "-")
		for _, p := range pods() {
			await(t, "the new config", func() bool {
				return getPod(p, "/few").status == http.StatusTooManyRequests
			})
		}
		t.Logf("enforced after %v, without a restart", time.Since(began))
		reset := exec.CommandContext(t.Context(), sluice, "bucket", "reset", "--config", config, "--limit", "few")
		reset.Env = redis()
		if out, err := reset.CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		for _, p := range pods() { // takes two of the three tokens, once both pods have the config
			await(t, "the reset", func() bool {
				return getPod(p, "/few").status == http.StatusOK
			})
		}
		got := ask(t, "/few")
		if want := []string{"200 0 true", "429 0 false", "429 0 false", "429 0 false",
			"429 0 false"}; !slices.Equal(got, want) {
			t.Errorf("%q", got)
		}
	})
	t.Run("verify", func(t *testing.T) {
		said := n.readme(t, "Verify")
		for _, want := range []string{"web-", " v0.1.0-", `"msg":"serving"`, "the script runs", "no       few"} {
			if !strings.Contains(said, want) {
				t.Errorf("no %q in\n%s", want, said)
			}
		}
		if !strings.Contains(said, "Phase:          Succeeded") {
			t.Errorf("helm test:\n%s", said)
		}
	})
	if t.Failed() {
		return
	}
	t.Run("rolled under load", func(t *testing.T) {
		service, before := "http://"+ip("web", "shop")+"/many", held("many")
		all, direct := newTally(), newTally()
		stop := clients(t, 3, asking(t, service), func(a answer) { all.add(a, true) })
		// Each pod is called from when it has an address until it is gone,
		// whether or not it is ready.
		var wg sync.WaitGroup
		ctx, cancel := context.WithCancel(t.Context())
		asked := map[string]bool{}
		wg.Go(func() {
			for ctx.Err() == nil {
				for _, p := range pods() {
					if p.ip == "" || asked[p.name] {
						continue
					}
					asked[p.name] = true
					pace := time.NewTicker(5 * time.Millisecond)
					wg.Go(func() {
						defer pace.Stop()
						for ctx.Err() == nil {
							<-pace.C
							within, done := context.WithTimeout(t.Context(), 2*time.Second)
							direct.add(get(within, "http://"+p.ip+":8080/many"), false)
							done()
						}
					})
				}
				<-time.After(20 * time.Millisecond)
			}
		})
		for range 3 {
			n.do(t, "", "rollout", "restart", "deployment/web", "--namespace", "shop")
			rolled()
		}
		await(t, "the end of the old pods", func() bool { return len(pods()) == 2 })
		stop()
		cancel()
		wg.Wait()
		through := 0
		for _, y := range []*tally{all, direct} {
			t.Logf("answers by status %v, the app's by pod %v", y.status, slices.Sorted(maps.Values(y.pods)))
			through += y.status[http.StatusOK]
			for _, wrong := range y.wrong[:min(10, len(y.wrong))] {
				t.Error(wrong)
			}
			if len(y.wrong) > 0 {
				t.Errorf("%d wrong", len(y.wrong))
			}
		}
		drawn := before - held("many")
		t.Logf("%d pods; %d requests passed, %.3f tokens drawn", len(asked), through, drawn)
		if len(asked) != 8 || len(all.pods) != 8 {
			t.Errorf("%d pods were seen, of which %d had requests", len(asked), len(all.pods))
		}
		// An Envoy that ends before it gets sluice's answer takes a token
		// without a request.
		if float64(through) > drawn+0.1 || float64(through) < drawn-50 {
			t.Errorf("%d requests passed, and %.3f tokens were drawn", through, drawn)
		}
	})
	t.Run("sluice killed", func(t *testing.T) {
		p, before := pods()[0], held("many")
		id := func() string {
			full := n.do(t, "", "get", "pod", p.name, "--namespace", "shop", "--output",
				`jsonpath={.status.initContainerStatuses[?(@.name=="sluice")].containerID}`)
			return strings.TrimPrefix(full, "containerd://")
		}
		killed := id()
		all := newTally()
		stop := clients(t, 2, asking(t, "http://"+p.ip+":8080/many"), func(a answer) { all.add(a, false) })
		await(t, "answers", func() bool { return all.answered() > 20 })
		if out, err := ctr(t, "tasks", "kill", "--signal", "SIGKILL", killed); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		await(t, "another container", func() bool { return id() != killed })
		await(t, "an answer of the app's", func() bool {
			return getPod(p, "/many").pod != ""
		})
		stop()
		through, drawn := all.status[http.StatusOK]+1, before-held("many")
		t.Logf("answers by status %v, %.3f tokens drawn", all.status, drawn)
		for status := range all.status {
			if status != http.StatusOK && status != http.StatusServiceUnavailable {
				t.Errorf("%d", status)
			}
		}
		if len(all.wrong) > 0 || float64(through) > drawn+0.1 {
			t.Errorf("%d passed, %q", through, all.wrong)
		}
	})
	t.Run("without Redis", func(t *testing.T) {
		old := pods()
		n.do(t, "", "scale", "deployment/sluice-trial-redis", "--namespace", release, "--replicas", "0")
		n.do(t, "", "wait", "pod", "--namespace", release, "--selector", "app.kubernetes.io/component=trial-redis",
			"--for", "delete", "--timeout", "1m")
		n.do(t, "", "delete", "pod", old[0].name, "--namespace", "shop")
		rolled()
		var fresh podState
		for _, p := range pods() {
			if !slices.ContainsFunc(old, func(o podState) bool { return o.name == p.name }) {
				fresh = p
			}
		}
		for path, want := range map[string]string{"few": "503 false", "many": "503 false", "open": "200 true",
			"healthz": "200 true"} {
			if a := get(t.Context(), "http://"+fresh.ip+":8080/"+path); fmt.Sprint(a.status, " ",
				a.pod == fresh.name) != want {
				t.Errorf("/%s: %+v, want %s", path, a, want)
			}
		}
		n.do(t, "", "scale", "deployment/sluice-trial-redis", "--namespace", release, "--replicas", "1")
		await(t, "Redis", func() bool {
			return get(t.Context(), "http://"+fresh.ip+":8080/many").status == http.StatusOK
		})
	})
	t.Run("upgrade", func(t *testing.T) {
		image := func() string {
			return n.do(t, "", "get", "pods", "--namespace", "shop", "--selector", "app=web", "--output",
				`jsonpath={.items[*].spec.initContainers[?(@.name=="sluice")].image}`)
		}
		// Pods are created meanwhile.
		ctx, cancel := context.WithCancel(t.Context())
		made := 0
		var wg sync.WaitGroup
		wg.Go(func() {
			for ctx.Err() == nil {
				p := pod(t, strings.Replace(podText("", "{containers: [{name: envoy, SECURE}]}"), "{metadata: {",
					"{metadata: {generateName: r-, ", 1))
				if err := n.call(t.Context(), http.MethodPost, "/api/v1/namespaces/shop/pods?dryRun=All", p,
					&object{}); err != nil {
					t.Errorf("pod: %v", err)
				}
				made++
			}
		})
		stamps := func() []string {
			return strings.Fields(n.do(t, "", "get", "pods", "--namespace", "shop", "--selector", "app=web",
				"--output", `jsonpath={.items[*].metadata.annotations.sluice\.dev/injected}`))
		}
		before := stamps()
		n.readme(t, "Upgrade")
		cancel()
		wg.Wait()
		t.Logf("%d pods were made meanwhile", made)
		if made < 20 {
			t.Error("too few to show anything")
		}
		rolled()
		await(t, "the end of the old pods", func() bool { return len(pods()) == 2 })
		if got := image(); got != upgradedImage+" "+upgradedImage {
			t.Errorf("%s", got)
		}
		if after := stamps(); len(after) != 2 || after[0] != after[1] || slices.Contains(before, after[0]) {
			t.Errorf("stamps %q, and before %q", after, before)
		}
	})
	t.Run("uninstall", func(t *testing.T) {
		printed := n.do(t, "", "get", "configmap", "envoy", "--namespace", "shop", "--output",
			`jsonpath={.data.envoy\.yaml}`)
		before, filter, _ := strings.Cut(printed, "          - name: envoy.filters.http.ext_authz\n")
		_, after, ok := strings.Cut(filter, "          - name: envoy.filters.http.router\n")
		if !ok {
			t.Fatalf("no filter in\n%s", printed)
		}
		without := before + "          - name: envoy.filters.http.router\n" + after
		n.do(t, n.do(t, "", "create", "configmap", "envoy", "--namespace", "shop", "--from-literal", "envoy.yaml="+
			without, "--dry-run=client", "--output", "yaml"), "replace", "-f", "-")
		n.readme(t, "Uninstall")
		rolled()
		await(t, "the end of the old pods", func() bool { return len(pods()) == 2 })
		for _, said := range ask(t, "/few") {
			if said != "200  true" {
				t.Errorf("%s", said)
			}
		}
		if left := n.do(t, "", "get", "pods", "--namespace", "shop", "--output",
			"jsonpath={.items[*].spec.initContainers}"); left != "" {
			t.Errorf("%s", left)
		}
		n.do(t, "", "delete", "namespace", "shop", "--wait")
		kinds := strings.Fields(n.do(t, "", "api-resources", "--verbs", "list", "--output", "name"))
		kinds = slices.DeleteFunc(kinds, func(kind string) bool { return strings.HasPrefix(kind, "events") })
		left := n.do(t, "", "get", strings.Join(kinds, ","), "--all-namespaces", "--output", "name")
		for name := range strings.Lines(left) {
			if strings.Contains(name, "sluice") {
				t.Errorf("left: %s", name)
			}
		}
	})
}
