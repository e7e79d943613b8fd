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

// web is a Deployment of an Envoy before an app that only it can reach. Both go on until the endpoints' news has arrived everywhere.
const web = `
apiVersion: v1
kind: Namespace
metadata:
  name: shop
  labels: {sluice.dev/inject: enabled, pod-security.kubernetes.io/enforce: restricted}
---
apiVersion: v1
kind: Secret
metadata: {name: redis, namespace: shop}
stringData: {url: "redis://sluice-trial-redis.sluice-system.svc:6379/0"}
---
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
`

// limits are those of the app. What is in a bucket that hardly refills tells what was drawn from it.
const limits = `
listen: {grpc: "unix:///run/sluice/authz.sock"}
exempt: [{match: {paths: [/healthz]}}]
limits:
- {name: few, match: {paths: [/few]}, rate: 3/8784h}
- {name: many, match: {paths: [/many]}, rate: 20000/8784h, burst: 1000000}
- {name: open, match: {paths: [/open]}, rate: 1/h, burst: 100, on_failure: allow}
`

// answer is what a client sees.
type answer struct {
	status    int
	pod       string // which the app said
	remaining string
	err       error
}

// get asks once, on a connection of its own.
func get(ctx context.Context, url string) answer {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return answer{err: err}
	}
	request.Close = true
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		return answer{err: err}
	}
	_, err = io.Copy(io.Discard, response.Body)
	_ = response.Body.Close()
	return answer{response.StatusCode, response.Header.Get("X-Pod"), response.Header.Get("X-Ratelimit-Remaining"), err}
}

// tally counts answers of the same kind, and keeps what must not be.
type tally struct {
	mu     sync.Mutex
	status map[int]int
	pods   map[string]int // of the app
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
		y.wrong = append(y.wrong, fmt.Sprintf("%s: %d of %q, %q left, %v", time.Now().Format("05.000"), a.status, a.pod, a.remaining, a.err))
	}
}

// answered is how many answers there are.
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

// clients ask url without pause until the function that they return is called, which is when they have ended.
func clients(t *testing.T, n int, url string, each func(answer)) func() {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	for range n {
		wg.Go(func() {
			for ctx.Err() == nil {
				each(get(t.Context(), url)) // what has been asked is answered
			}
		})
	}
	return func() {
		cancel()
		wg.Wait()
	}
}

// TestNode is the product as its user has it: pods on a real node, of the image that the Dockerfile makes, installed by helm.
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
		return n.do(t, "", "get", "service", service, "--namespace", namespace, "--output", "jsonpath={.spec.clusterIP}")
	}
	// held is what is in the bucket of a limit.
	held := func(limit string) float64 {
		t.Helper()
		c := exec.CommandContext(t.Context(), sluice, "bucket", "get", "--config", config, "--limit", limit, "-o", "json")
		c.Env = append(os.Environ(), "SLUICE_DOMAIN=shop/web", "SLUICE_REDIS=redis://"+net.JoinHostPort(ip("sluice-trial-redis", release), "6379"))
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
		for _, v := range list(must(t, n.API, http.MethodGet, "/api/v1/namespaces/shop/pods?labelSelector=app%3Dweb", nil), "items") {
			p := podState{name: at(v, "metadata", "name").(string)}
			p.ip, _ = at(v, "status", "podIP").(string)
			p.phase, _ = at(v, "status", "phase").(string)
			all = append(all, p)
		}
		return all
	}
	rolled := func() { n.do(t, "", "rollout", "status", "deployment/web", "--namespace", "shop", "--timeout", "3m") }

	t.Run("the image", func(t *testing.T) {
		compressed, said := readImage(t, filepath.Join(n.dir, "oci"))
		t.Logf("%.1f MB", float64(compressed)/1e6)
		if compressed > 30e6 || compressed < 1e6 {
			t.Errorf("%d bytes", compressed)
		}
		config := child(said, "config")
		if config["User"] != "65532:65532" || fmt.Sprint(config["Entrypoint"], config["Cmd"]) != "[/sluice] [run]" {
			t.Errorf("%v", config)
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
	t.Run("install", func(t *testing.T) {
		began := time.Now()
		n.helm(t, "install", "sluice", chartDir, "--create-namespace", "--wait", "--timeout", "3m", "--set", "trialRedis.enabled=true,gateway.enabled=true")
		t.Logf("helm install --wait: %v", time.Since(began))
	})
	if t.Failed() {
		return
	}
	t.Run("helm test", func(t *testing.T) {
		if out := n.helm(t, "test", "sluice", "--timeout", "2m"); strings.Count(out, "Phase:          Succeeded") != 2 {
			t.Errorf("%s", out)
		}
	})
	t.Run("limited", func(t *testing.T) {
		printed, err := exec.CommandContext(t.Context(), sluice, "envoy", "plain", "--config", config).CombinedOutput()
		if err != nil {
			t.Fatalf("%v\n%s", err, printed)
		}
		n.do(t, web1, "apply", "-f", "-")
		n.do(t, "", "create", "configmap", "limits", "--namespace", "shop", "--from-literal", "sluice.yaml="+limits)
		n.do(t, "", "create", "configmap", "envoy", "--namespace", "shop", "--from-literal", "envoy.yaml="+string(printed))
		began := time.Now()
		rolled()
		t.Logf("two pods ready after %v", time.Since(began))
		var got []string
		for range 5 {
			a := get(t.Context(), "http://"+ip("web", "shop")+"/few")
			got = append(got, fmt.Sprint(a.status, " ", a.remaining, " ", a.pod != ""))
		}
		if want := []string{"200 2 true", "200 1 true", "200 0 true", "429 0 false", "429 0 false"}; !slices.Equal(got, want) {
			t.Errorf("%q", got)
		}
		if left := held("few"); left > 0.01 {
			t.Errorf("%v tokens are left", left)
		}
	})
	if t.Failed() {
		return
	}
	t.Run("rolled under load", func(t *testing.T) {
		service, before := "http://"+ip("web", "shop")+"/many", held("many")
		all, direct := newTally(), newTally()
		stop := clients(t, 3, service, func(a answer) { all.add(a, true) })
		// Each pod is asked from when it has an address until it has none, ready or not.
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
		// A draw whose answer found its Envoy gone is one without a request.
		if float64(through) > drawn+0.1 || float64(through) < drawn-50 {
			t.Errorf("%d requests passed, and %.3f tokens were drawn", through, drawn)
		}
	})
	t.Run("without Redis", func(t *testing.T) {
		old := pods()
		n.do(t, "", "scale", "deployment/sluice-trial-redis", "--namespace", release, "--replicas", "0")
		n.do(t, "", "wait", "pod", "--namespace", release, "--selector", "app.kubernetes.io/component=trial-redis", "--for", "delete", "--timeout", "1m")
		n.do(t, "", "delete", "pod", old[0].name, "--namespace", "shop")
		rolled()
		var fresh podState
		for _, p := range pods() {
			if !slices.ContainsFunc(old, func(o podState) bool { return o.name == p.name }) {
				fresh = p
			}
		}
		for path, want := range map[string]string{"few": "503 false", "many": "503 false", "open": "200 true", "healthz": "200 true"} {
			if a := get(t.Context(), "http://"+fresh.ip+":8080/"+path); fmt.Sprint(a.status, " ", a.pod == fresh.name) != want {
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
			return n.do(t, "", "get", "pods", "--namespace", "shop", "--selector", "app=web", "--output", `jsonpath={.items[*].spec.initContainers[?(@.name=="sluice")].image}`)
		}
		// Pods are made all the while.
		ctx, cancel := context.WithCancel(t.Context())
		made := 0
		var wg sync.WaitGroup
		wg.Go(func() {
			for ctx.Err() == nil {
				p := pod(t, strings.Replace(podText("", "{containers: [{name: envoy, SECURE}]}"), "{metadata: {", "{metadata: {generateName: r-, ", 1))
				if err := n.call(t.Context(), http.MethodPost, "/api/v1/namespaces/shop/pods?dryRun=All", p, &object{}); err != nil {
					t.Errorf("pod: %v", err)
				}
				made++
			}
		})
		n.helm(t, "upgrade", "sluice", chartDir, "--wait", "--timeout", "3m", "--reuse-values", "--set", "image.tag=v0.1.1")
		// The old ones answer on for as long as an API server may ask them.
		await(t, "the end of the old webhooks", func() bool {
			left := n.do(t, "", "get", "pods", "--namespace", release, "--selector", "app.kubernetes.io/component=webhook", "--output", "name")
			return strings.Count(left, "\n") == 2
		})
		cancel()
		wg.Wait()
		t.Logf("%d pods were made meanwhile", made)
		if made < 20 {
			t.Error("that is too little to show anything")
		}
		if got := image(); got != sluiceImage+" "+sluiceImage {
			t.Errorf("an upgrade touches pods: %s", got)
		}
		n.do(t, "", "rollout", "restart", "deployment/web", "--namespace", "shop")
		rolled()
		await(t, "the end of the old pods", func() bool { return len(pods()) == 2 })
		if got := image(); got != upgradedImage+" "+upgradedImage {
			t.Errorf("%s", got)
		}
	})
	t.Run("uninstall", func(t *testing.T) {
		n.helm(t, "uninstall", "sluice", "--wait", "--timeout", "2m")
		n.do(t, "", "delete", "namespace", release, "--wait")
		for _, p := range pods() { // they go on as they are; their Redis is gone with the rest
			if a := get(t.Context(), "http://"+p.ip+":8080/open"); a.status != http.StatusOK {
				t.Errorf("%+v", a)
			}
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

var web1 = strings.NewReplacer("APP", appImage, "ENVOY", envoyImage).Replace(web)
