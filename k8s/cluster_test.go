//go:build linux

package k8s

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"net"
	"net/http"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

const secure = `image: x, securityContext: {allowPrivilegeEscalation: false, runAsNonRoot: true, runAsUser: 1000, ` +
	`capabilities: {drop: [ALL]}, seccompProfile: {type: RuntimeDefault}}`

// podText returns a pod with the annotations for Redis and limits, with these
// labels and this spec. SECURE in it stands for what the restricted Pod
// Security Standard requires of a container.
func podText(labels, spec string) string {
	return fmt.Sprintf(`{metadata: {labels: {app: x, %s}, annotations: {sluice.dev/redis-secret: redis, `+
		`sluice.dev/config: limits}}, spec: %s}`,
		labels, strings.ReplaceAll(spec, "SECURE", secure))
}

// TestCluster runs the chart's webhook behind a real API server.
func TestCluster(t *testing.T) {
	if !long(t) {
		return
	}
	c := cluster(t, "--enable-aggregator-routing=true") // to call Services by their EndpointSlices, without kube-proxy
	heard := listen(c.API)
	r := install(t, c)
	for i := range r.running {
		r.run(t, i, "--linger=0s")
	}
	restricted := object{injectLabel: "enabled", "pod-security.kubernetes.io/enforce": "restricted"}
	namespace(t, c, "shop", restricted)
	heard.take()
	const pods = "/api/v1/namespaces/shop/pods"
	create := func(t *testing.T, path, name, text string) object {
		t.Helper()
		p := pod(t, text)
		metadata := objectField(p, "metadata")
		if metadata == nil {
			metadata = object{}
			p["metadata"] = metadata
		}
		metadata["name"] = name
		return must(t, c.API, http.MethodPost, path, p)
	}

	t.Run("caBundle", func(t *testing.T) {
		all := bundles(t, c.API)
		if len(all) != 2 || len(all[0]) == 0 || !reflect.DeepEqual(all[0], all[1]) {
			t.Errorf("%d entries: %s", len(all), all)
		}
	})
	t.Run("bare pod", func(t *testing.T) {
		heard.take()
		got := create(t, pods, "bare", podText("", "{containers: [{name: app, SECURE}, {name: envoy, SECURE}]}"))
		injected(t, got, 0, "shop/bare")
		if said := heard.take(); said != "" {
			t.Errorf("warned: %s", said)
		}
	})
	t.Run("init containers", func(t *testing.T) {
		got := create(t, pods, "inits", podText("",
			"{initContainers: [{name: migrate, SECURE}, {name: log, restartPolicy: Always, SECURE}], containers: "+
				"[{name: envoy, SECURE}]}"))
		injected(t, got, 0, "shop/inits")
		if init := listField(objectField(got, "spec"), "initContainers"); len(init) != 3 ||
			indexByName(init, "migrate") != 1 || indexByName(init, "log") != 2 {
			t.Errorf("%v", init)
		}
	})
	// Pods that controllers create from a template have the domain of the
	// object that they belong to.
	const apps, batch = "/apis/apps/v1/namespaces/shop/", "/apis/batch/v1/namespaces/shop/"
	template := "selector: {matchLabels: {app: NAME}}, template: " +
		strings.Replace(podText("", "{containers: [{name: envoy, SECURE}]}"), "app: x", "app: NAME", 1)
	job := "template: " + strings.Replace(podText("", "{restartPolicy: Never, containers: [{name: envoy, SECURE}]}"),
		"app: x", "app: NAME", 1)
	must(t, c.API, http.MethodPost, "/api/v1/nodes", object{"metadata": object{"name": "node"}}) // for the DaemonSet
	for path, text := range map[string]string{
		apps + "deployments": "{spec: {replicas: 2, " + template + "}}",
		apps + "daemonsets":  "{spec: {" + template + "}}",
		apps + "replicasets": "{spec: {" + template + "}}",
		// A StatefulSet creates the second pod only once the first one is
		// ready.
		apps + "statefulsets": "{spec: {serviceName: db, " + template + "}}",
		batch + "jobs":        "{spec: {" + job + "}}",
		batch + "cronjobs":    `{spec: {schedule: "* * * * *", jobTemplate: {spec: {` + job + "}}}}",
	} {
		kind := filepath.Base(path)
		t.Run(kind, func(t *testing.T) {
			create(t, path, kind, strings.ReplaceAll(text, "NAME", kind))
			if kind == "cronjobs" { // makes a Job due now
				must(t, c.API, http.MethodPatch, path+"/"+kind+"/status", []any{
					object{"op": "add", "path": "/status", "value": object{
						"lastScheduleTime": time.Now().Add(-90 * time.Second).UTC().Format(time.RFC3339),
					}},
				})
			}
			var got []any
			await(t, "pods of "+kind, func() bool {
				got = listField(must(t, c.API, http.MethodGet, pods+"?labelSelector=app%3D"+kind, nil), "items")
				return len(got) > 0 && (kind != "deployments" || len(got) == 2)
			})
			for _, p := range got {
				injected(t, p.(object), 0, "shop/"+kind)
			}
		})
	}
	t.Run("opted out", func(t *testing.T) {
		heard.take()
		got := create(t, pods, "out", podText("sluice.dev/inject: disabled", "{containers: [{name: envoy, SECURE}]}"))
		if said := heard.take(); len(listField(objectField(got, "spec"), "initContainers")) > 0 || said != "" {
			t.Errorf("injected, or warned %q", said)
		}
		got = create(t, "/api/v1/namespaces/default/pods", "elsewhere",
			podText("", "{containers: [{name: envoy, SECURE}]}"))
		if len(listField(objectField(got, "spec"), "initContainers")) > 0 {
			t.Error("injected in a namespace without the label")
		}
		got = create(t, "/api/v1/namespaces/default/pods", "asks",
			podText("sluice.dev/inject: enabled", "{containers: [{name: envoy, SECURE}]}"))
		injected(t, got, 0, "default/asks")
	})
	t.Run("skipped", func(t *testing.T) {
		for name, why := range map[string]string{
			"{containers: [{name: app, SECURE}]}": "no container is named",
			"{os: {name: windows}, securityContext: {runAsNonRoot: true}, containers: [{name: envoy, image: x, " +
				"securityContext: {runAsNonRoot: true}}]}": "Windows",
		} {
			heard.take()
			got := create(t, pods, fmt.Sprintf("skipped-%d", len(why)), podText("", name))
			if said := heard.take(); len(listField(objectField(got, "spec"), "initContainers")) > 0 ||
				!strings.Contains(said, "sluice is not injected: ") || !strings.Contains(said, why) {
				t.Errorf("%s: warned %q", why, said)
			}
		}
	})
	t.Run("refused", func(t *testing.T) {
		for _, namespace := range []string{"shop", "default"} {
			var out object
			err := c.call(t.Context(), http.MethodPost, "/api/v1/namespaces/"+namespace+"/pods",
				pod(t, strings.Replace(podText("sluice.dev/inject: enabled", "{containers: [{name: app, SECURE}]}"),
					"{metadata: {", "{metadata: {name: no, ", 1)), &out)
			if !hasStatus(err, http.StatusForbidden) ||
				!strings.Contains(err.Error(), "sluice cannot be injected: no container is named") {
				t.Errorf("%s: %v", namespace, err)
			}
		}
		// The owner of a Deployment finds the reason in its status.
		text := strings.ReplaceAll("{spec: {"+template+"}}", "NAME", "refused")
		create(t, apps+"deployments", "refused", strings.Replace(text, "sluice.dev/redis-secret: redis, ", "", 1))
		var said string
		await(t, "the Deployment's condition", func() bool {
			deployment := must(t, c.API, http.MethodGet, apps+"deployments/refused", nil)
			for _, condition := range at(deployment, "status").(object) {
				conditions, _ := condition.([]any)
				for _, v := range conditions {
					if at(v, "type") == "ReplicaFailure" {
						said, _ = at(v, "message").(string)
					}
				}
			}
			return said != ""
		})
		if !strings.Contains(said, "sluice: sluice requires Redis") {
			t.Errorf("%q", said)
		}
	})
	t.Run("beside istiod", func(t *testing.T) {
		// One webhook is called before sluice's, as Istio's own is, the other
		// after.
		for name, before := range map[string]bool{"istio-sidecar-injector": true, "zz-istio-sidecar-injector": false} {
			istiod(t, c.API, name)
			namespace(t, c, name, object{injectLabel: "enabled", name: "enabled"})
			heard.take()
			path := "/api/v1/namespaces/" + name + "/pods"
			got := create(t, path, "web", podText("",
				"{initContainers: [{name: migrate, image: x}], containers: [{name: app, image: x}]}"))
			injected(t, got, 2, name+"/web")
			var names []string
			for _, v := range listField(objectField(got, "spec"), "initContainers") {
				names = append(names, v.(object)["name"].(string))
			}
			if diff := cmp.Diff([]string{"istio-init", "istio-proxy", "sluice", "migrate"}, names); diff != "" {
				t.Errorf("%s (-want +got):\n%s", name, diff)
			}
			if said := heard.take(); before && said != "" {
				t.Errorf("warned: %s", said)
			} else {
				t.Logf("%s: warned %q", name, said)
			}
			must(t, c.API, http.MethodDelete, "/apis/admissionregistration.k8s.io/v1/mutatingwebhookconfigurations/"+
				name, nil)
		}
	})
	t.Run("under a LimitRange", func(t *testing.T) { // its values are kept when the pod is injected again
		namespace(t, c, "limited", object{injectLabel: "enabled"})
		must(t, c.API, http.MethodPost, "/api/v1/namespaces/limited/limitranges", object{
			"metadata": object{"name": "cpu"}, "spec": object{"limits": []any{object{"type": "Container",
				"default": object{"cpu": "750m"}, "defaultRequest": object{"cpu": "10m"}}}},
		})
		limits := func(pod object) any {
			return at(listField(objectField(pod, "spec"), "initContainers")[0], "resources", "limits", "cpu")
		}
		once := create(t, "/api/v1/namespaces/limited/pods", "once",
			podText("", "{containers: [{name: envoy, SECURE}]}"))
		injected(t, once, 0, "limited/once")
		must(t, c.API, http.MethodDelete, "/api/v1/namespaces/limited/limitranges/cpu", nil)
		again := plain(t, once)
		objectField(again, "metadata")["name"] = "again"
		again = must(t, c.API, http.MethodPost, "/api/v1/namespaces/limited/pods", again)
		injected(t, again, 0, "limited/again")
		if limits(once) != "750m" || limits(again) != "750m" {
			t.Errorf("limits.cpu %v, and again %v", limits(once), limits(again))
		}
	})
	t.Run("beside webhooks that rewrite containers", func(t *testing.T) { besideRewriters(t, c) })
	t.Run("drained", func(t *testing.T) { drained(t, c) })
	restart := func(args ...string) {
		for i := range r.running {
			r.stop(t, i)
			r.run(t, i, args...)
		}
	}
	t.Run("under a ResourceQuota", func(t *testing.T) { underQuota(t, c, restart) })
	t.Run("upgrade", func(t *testing.T) { // keeps what the webhook has stored
		before := bundles(t, c.API)
		if out, err := helm(t, "upgrade", "sluice", chartDir, "--kubeconfig", c.kubeconfig, "--namespace", release,
			"--set", "webhook.excludedNamespaces={ops}"); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		data := objectField(must(t, c.API, http.MethodGet, "/api/v1/namespaces/"+release+"/secrets/sluice-webhook-ca",
			nil), "data")
		if after := bundles(t, c.API); !reflect.DeepEqual(after, before) || data[caCertKey] == nil {
			t.Errorf("an upgrade resets what the webhook has stored: %s", after)
		}
		got := create(t, pods, "upgraded", podText("", "{containers: [{name: envoy, SECURE}]}"))
		injected(t, got, 0, "shop/upgraded")
	})
	t.Run("no replica", func(t *testing.T) { // then no pod starts without its limits
		for i := range r.running {
			r.stop(t, i)
		}
		var out object
		err := c.call(t.Context(), http.MethodPost, pods,
			pod(t, strings.Replace(podText("", "{containers: [{name: envoy, SECURE}]}"), "{metadata: {",
				"{metadata: {name: gone, ", 1)), &out)
		if !hasStatus(err, http.StatusInternalServerError) ||
			!strings.Contains(err.Error(), "namespace.inject.sluice.dev") {
			t.Errorf("%v", err)
		}
		must(t, c.API, http.MethodPost, "/api/v1/namespaces/default/pods",
			pod(t, "{metadata: {name: fine}, spec: {containers: [{name: envoy, image: x}]}}"))
	})
	t.Run("uninstalled", func(t *testing.T) {
		if out, err := helm(t, "uninstall", "sluice", "--kubeconfig", c.kubeconfig, "--namespace",
			release); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		var left string
		await(t, "nothing", func() bool { // the Deployment's pods are deleted after it
			var err error
			left, err = c.kubectl(t, "", "get", "all,secrets,serviceaccounts,roles,rolebindings,pdb,clusterroles,"+
				"clusterrolebindings,mutatingwebhookconfigurations", "--all-namespaces",
				"--selector", "app.kubernetes.io/name=sluice", "--output", "name")
			if err != nil {
				t.Fatalf("%v\n%s", err, left)
			}
			return left == ""
		})
		got := create(t, pods, "after", podText("", "{containers: [{name: envoy, SECURE}]}"))
		if len(listField(objectField(got, "spec"), "initContainers")) > 0 {
			t.Error("injected")
		}
	})
}

// serveWebhook has the API server call a handler in this process for pods in
// namespaces with these labels.
func serveWebhook(t *testing.T, a *API, name string, handler http.Handler, namespaces object, reinvocation string) {
	t.Helper()
	certificate := selfSigned(t, x509.Certificate{IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}})
	listener, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{Certificates: []tls.Certificate{certificate}})
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: handler, ReadHeaderTimeout: time.Minute}
	go func() { _ = server.Serve(listener) }()
	t.Cleanup(func() { _ = server.Close() })
	must(t, a, http.MethodPost, "/apis/admissionregistration.k8s.io/v1/mutatingwebhookconfigurations", object{
		"metadata": object{"name": name},
		"webhooks": []any{object{
			"name": "sidecar.istio.io", "admissionReviewVersions": []any{"v1"}, "sideEffects": "None",
			"failurePolicy": "Fail", "reinvocationPolicy": reinvocation,
			"clientConfig": object{"url": "https://" + listener.Addr().String() + "/inject",
				"caBundle": pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: certificate.Certificate[0]})},
			"namespaceSelector": object{"matchLabels": namespaces},
			"rules": []any{object{"apiGroups": []any{""}, "apiVersions": []any{"v1"},
				"operations": []any{"CREATE"}, "resources": []any{"pods"}}},
		}},
	})
}

// TestClusterRotation creates pods continuously while the CA is replaced and
// the replicas are restarted, and checks that caBundle always verifies the
// certificate of each replica.
func TestClusterRotation(t *testing.T) {
	if !long(t) {
		return
	}
	c := cluster(t, "--enable-aggregator-routing=true")
	r := install(t, c)
	quick := []string{"--ca-life=20s", "--ca-overlap=1s", "--ca-check=200ms"}
	for i := range r.running {
		r.run(t, i, quick...)
	}
	namespace(t, c, "shop", object{injectLabel: "enabled"})

	var wg sync.WaitGroup
	done := make(chan struct{})
	var made, failed, shaken, distrusted atomic.Int64
	for range 3 {
		wg.Go(func() {
			for open(done) {
				var out object
				p := pod(t, strings.Replace(podText("", "{containers: [{name: envoy, SECURE}]}"), "{metadata: {",
					"{metadata: {generateName: r-, ", 1))
				err := c.call(t.Context(), http.MethodPost, "/api/v1/namespaces/shop/pods", p, &out)
				if made.Add(1); err != nil || sidecarIndex(out) != 0 {
					failed.Add(1)
					t.Errorf("pod: %v", err)
				}
			}
		})
	}
	// The API server keeps its connections; these are the new ones that it
	// could open at any time.
	issuers := map[string]bool{}
	wg.Go(func() {
		pace := time.NewTicker(5 * time.Millisecond) // leaves processor time to the others
		defer pace.Stop()
		for i := 0; open(done); i++ {
			<-pace.C
			roots := x509.NewCertPool()
			roots.AppendCertsFromPEM(bundles(t, c.API)[0])
			d := tls.Dialer{Config: &tls.Config{RootCAs: roots, ServerName: "sluice-webhook." + release + ".svc"}}
			connection, err := d.DialContext(t.Context(), "tcp", addresses[i%2]+":8443")
			if err != nil && !r.ready[i%2].Load() {
				continue // it is being restarted
			}
			if shaken.Add(1); err != nil {
				distrusted.Add(1)
				t.Errorf("handshake: %v", err)
				continue
			}
			issuers[connection.(*tls.Conn).ConnectionState().PeerCertificates[0].Issuer.CommonName] = true
			_ = connection.Close()
		}
	})
	deadline := time.Now().Add(40 * time.Second)
	rolls := 0
	for i := 0; time.Now().Before(deadline); i++ {
		r.stop(t, i%2)
		r.run(t, i%2, quick...)
		rolls++
	}
	close(done)
	wg.Wait()
	t.Logf("%d pods, %d handshakes, %d CAs, %d replicas rolled", made.Load(), shaken.Load(), len(issuers), rolls)
	if made.Load() < 200 || shaken.Load() < 200 || len(issuers) < 3 || rolls < 2 {
		t.Error("too few to show anything")
	}
}

func open(done chan struct{}) bool {
	select {
	case <-done:
		return false
	default:
		return true
	}
}

// TestClusterRights runs the webhook with the rights that the plain manifests
// grant, and checks that it needs each of them.
func TestClusterRights(t *testing.T) {
	if !long(t) {
		return
	}
	c := cluster(t)
	apply := func() {
		t.Helper()
		if out, err := c.kubectl(t, "", "apply", "-f", "manifests/sluice.yaml"); err != nil ||
			strings.Contains(out, "Warning") {
			t.Fatalf("%v\n%s", err, out)
		}
	}
	apply()
	r := asPods(t, c)
	const secrets, roles = "/api/v1/namespaces/" + release + "/secrets", "/apis/rbac.authorization.k8s.io/v1/"
	role, clusterRole := roles+"namespaces/"+release+"/roles/sluice-webhook", roles+"clusterroles/"+configuration
	for _, path := range []string{role, clusterRole} {
		whole := must(t, c.API, http.MethodGet, path, nil)
		verbs := at(listField(whole, "rules")[0], "verbs").([]any)
		set := func(verbs []any) {
			t.Helper()
			must(t, c.API, http.MethodPatch, path, []any{object{"op": "replace", "path": "/rules/0/verbs",
				"value": verbs}})
		}
		for i, verb := range verbs {
			// The state before the webhook has run.
			must(t, c.API, http.MethodPatch, secrets+"/sluice-webhook-ca",
				[]any{object{"op": "add", "path": "/data", "value": nil}})
			must(t, c.API, http.MethodPatch, configPath, []any{
				object{"op": "add", "path": "/webhooks/0/clientConfig/caBundle", "value": nil},
				object{"op": "add", "path": "/webhooks/1/clientConfig/caBundle", "value": nil},
			})
			set(slices.Delete(slices.Clone(verbs), i, i+1))
			p := start(t, r.env, r.binary, append(slices.Clone(r.args), "--listen=192.0.2.1:8443",
				"--metrics=192.0.2.1:9003")...)
			select {
			case <-p.exited:
			case <-time.After(10 * time.Second):
				t.Errorf("%s: it runs without %v", path, verb)
				_ = p.Process.Kill()
				<-p.exited
				continue
			}
			if said := p.logged(); !strings.Contains(said, "forbidden") ||
				!strings.Contains(said, fmt.Sprintf("cannot %v resource", verb)) {
				t.Errorf("%s without %v: %s", path, verb, said)
			}
		}
		set(verbs)
	}
	r.run(t, 0)
	filled := func() (object, [][]byte) {
		t.Helper()
		return objectField(must(t, c.API, http.MethodGet, secrets+"/sluice-webhook-ca", nil), "data"), bundles(t, c.API)
	}
	data, all := filled()
	if len(all) != 2 || len(all[0]) == 0 || !reflect.DeepEqual(all[0], all[1]) || data[caCertKey] == nil ||
		data[caPrivateKey] == nil {
		t.Fatalf("not filled: %v\n%s", data, all)
	}
	// Applying the manifests again keeps what the webhook has stored.
	apply()
	again, still := filled()
	if !reflect.DeepEqual(again, data) || !reflect.DeepEqual(still, all) {
		t.Error("applying the manifests again resets what the webhook has stored")
	}
}
