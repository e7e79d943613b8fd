package k8s

import (
	"encoding/json"
	"fmt"
	"reflect"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"
	"pgregory.net/rapid"
)

var options = Options{Image: "sluice:test", Version: "v1", Namespace: "shop", Workload: "web"}

func pod(t *testing.T, text string) object {
	t.Helper()
	var o object
	if err := yaml.Unmarshal([]byte(text), &o); err != nil {
		t.Fatal(err)
	}
	return o
}

func inject(t *testing.T, p object, o Options) object {
	t.Helper()
	before := fmt.Sprint(p)
	out, skipped, err := Inject(p, o)
	if err != nil || skipped != "" {
		t.Fatalf("skipped %q, %v", skipped, err)
	}
	if fmt.Sprint(p) != before {
		t.Fatal("Inject has modified its argument")
	}
	return out
}

// sidecarIndex returns the index of sluice among a pod's init containers, or
// -1.
func sidecarIndex(pod object) int {
	return indexByName(listField(objectField(pod, "spec"), "initContainers"), "sluice")
}

const withEnvoy = `
metadata:
  annotations: {sluice.dev/redis-secret: redis, sluice.dev/config: limits}
spec:
  initContainers: [{name: migrate, image: m}]
  containers: [{name: app, image: a}, {name: envoy, image: e}]
`

func TestInject(t *testing.T) {
	out := inject(t, pod(t, withEnvoy), options)
	spec := objectField(out, "spec")
	init := listField(spec, "initContainers")
	if len(init) != 2 || indexByName(init, "sluice") != 0 {
		t.Fatalf("init containers: %v", init)
	}
	env := map[string]any{}
	for _, e := range listField(init[0].(object), "env") {
		env[e.(object)["name"].(string)] = e
	}
	if v := env["SLUICE_DOMAIN"].(object)["value"]; v != "shop/web" {
		t.Errorf("domain %v", v)
	}
	for _, name := range []string{"POD_NAME", "POD_NAMESPACE", "GOMEMLIMIT", "SLUICE_REDIS", "SLUICE_CONFIG"} {
		if env[name] == nil {
			t.Errorf("no %s", name)
		}
	}
	containers := listField(spec, "containers")
	if indexByName(listField(containers[0].(object), "volumeMounts"), socketVolume) >= 0 {
		t.Error("the app has the socket")
	}
	mounts := listField(containers[1].(object), "volumeMounts")
	if len(mounts) != 1 || mounts[0].(object)["readOnly"] != true {
		t.Errorf("Envoy's mounts: %v", mounts)
	}
	if got := objectField(objectField(out, "metadata"), "annotations")[annotationInjected]; got != Stamp(options) ||
		!strings.HasPrefix(Stamp(options), "v1-") {
		t.Errorf("stamp %v", got)
	}
}

// Beside istio-proxy, sluice's container comes directly after it and listens on
// loopback TCP, and no socket is mounted.
func TestInjectIstio(t *testing.T) {
	out := inject(t, pod(t, `
metadata: {annotations: {sluice.dev/in-process: "true"}}
spec:
  initContainers: [{name: istio-init}, {name: istio-proxy, restartPolicy: Always}, {name: migrate}]
  containers: [{name: app}, {name: envoy}]
`), options)
	spec := objectField(out, "spec")
	if i := indexByName(listField(spec, "initContainers"), "sluice"); i != 2 {
		t.Errorf("sluice is at %d", i)
	}
	if text := fmt.Sprint(spec); strings.Contains(text, socketVolume) || !strings.Contains(text, "127.0.0.1:9001") {
		t.Error(text)
	}
}

func TestInjectSkipsAndRefuses(t *testing.T) {
	const (
		envoy   = "{containers: [{name: envoy}]}"
		redis   = "sluice.dev/redis-secret: r"
		enabled = "sluice.dev/inject: enabled"
	)
	for _, c := range []struct{ name, labels, annotations, spec, skipped, refused string }{
		{"disabled", "sluice.dev/inject: disabled", "", envoy, "", ""},
		{"no Envoy", "", redis, "{containers: [{name: app}]}", "no container is named istio-proxy or envoy", ""},
		{
			"no Envoy, enabled by label", enabled, redis, "{containers: [{name: app}]}",
			"", "no container is named istio-proxy or envoy",
		},
		{
			"an init container is no Envoy", "", redis,
			"{initContainers: [{name: envoy}], containers: [{name: app}]}", "no container is named", "",
		},
		{
			"the named container does not exist", "", redis + ", sluice.dev/envoy-container: proxy", envoy,
			"", `is named "proxy"`,
		},
		{"hostNetwork", "", redis, "{hostNetwork: true, containers: [{name: envoy}]}", "hostNetwork", ""},
		{
			"hostNetwork, with Envoy named", "", redis + ", sluice.dev/envoy-container: proxy",
			"{hostNetwork: true, containers: [{name: proxy}]}", "hostNetwork", "",
		},
		{"Windows", "", redis, "{os: {name: windows}, containers: [{name: envoy}]}", "Windows", ""},
		{
			"Windows, selected", enabled, redis,
			"{nodeSelector: {kubernetes.io/os: windows}, containers: [{name: envoy}]}", "", "Windows",
		},
		{
			"Windows, by its old name", "", redis,
			"{nodeSelector: {beta.kubernetes.io/os: windows}, containers: [{name: envoy}]}", "Windows", "",
		},
		{
			"Windows, by its options", "", redis,
			"{securityContext: {windowsOptions: {runAsUserName: u}}, containers: [{name: envoy}]}", "Windows", "",
		},
		{
			"Windows, by affinity", "", redis,
			"{affinity: {nodeAffinity: {requiredDuringSchedulingIgnoredDuringExecution: {nodeSelectorTerms: [" +
				"{matchExpressions: [{key: disk, operator: Exists}, " +
				"{key: kubernetes.io/os, operator: In, values: [windows]}]}]}}}, containers: [{name: envoy}]}",
			"Windows", "",
		},
		{
			"pod limit too low", "", redis,
			"{resources: {requests: {cpu: 100m}, limits: {cpu: 120m}}, " +
				"containers: [{name: envoy, resources: {requests: {cpu: 80m}}}]}",
			"spec.resources.limits.cpu is 120m, but with sluice its containers request 130m", "",
		},
		{
			"pod limit too low, no request", enabled, redis,
			"{resources: {limits: {cpu: 60m}}, containers: [{name: envoy, resources: {requests: {cpu: 30m}}}]}",
			"", "spec.resources.limits.cpu is 60m, but with sluice its containers request 80m",
		},
		{
			"pod limit too low, enabled by label", enabled, redis,
			"{resources: {requests: {memory: 32Mi}, limits: {memory: 32Mi}}, " +
				"containers: [{name: envoy, resources: {requests: {memory: 1}}}]}",
			"", "spec.resources.limits.memory is 32Mi, but with sluice its containers request 33554433",
		},
		{
			"other resources", "", redis + ", sluice.dev/resources: '{requests: {nvidia.com/gpu: 1}}'", envoy,
			"", "want cpu, memory or ephemeral-storage",
		},
		{"no Redis", "", "", envoy, "", "requires Redis"},
		{"Redis and in-process", "", redis + `, sluice.dev/in-process: "true"`, envoy, "", "mutually exclusive"},
		{
			"a port is in use", "", redis, "{containers: [{name: envoy, ports: [{containerPort: 9003}]}]}",
			"port 9003", "",
		},
		{
			"the container name is in use", "", redis, "{containers: [{name: envoy}, {name: sluice}]}",
			"already has a container named sluice", "",
		},
		{
			"a volume name is in use", "", redis, "{volumes: [{name: sluice-config}], containers: [{name: envoy}]}",
			"volume named sluice-config", "",
		},
		{"label", "sluice.dev/inject: 'yes'", redis, envoy, "", "must be enabled or disabled"},
		{"domain", "", redis + ", sluice.dev/domain: 'a b'", envoy, "", "annotation sluice.dev/domain"},
		{"resources", "", redis + ", sluice.dev/resources: '{limits: {memory: much}}'", envoy, "", "limits.memory"},
		{
			"request above limit", "", redis + ", sluice.dev/resources: '{requests: {cpu: 1}, limits: {cpu: 100m}}'",
			envoy, "", "must be at most limits.cpu",
		},
		{"no spec", "", redis, "{}", "", "missing spec"},
		{
			"volumes that are no list", "", redis, "{volumes: {a: {}}, containers: [{name: envoy}]}",
			"", "spec.volumes: an object: must be a list",
		},
		{
			"mounts that are no list", "", redis, "{containers: [{name: app}, {name: envoy, volumeMounts: x}]}",
			"", `spec.containers[1].volumeMounts: "x": must be a list`,
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := pod(t, fmt.Sprintf("{metadata: {labels: {%s}, annotations: {%s}}, spec: %s}", c.labels, c.annotations,
				c.spec))
			out, skipped, err := Inject(p, options)
			if c.refused != "" {
				if err == nil || !strings.Contains(err.Error(), c.refused) {
					t.Errorf("refused for %v, not for %q", err, c.refused)
				}
				return
			}
			if err != nil || !strings.Contains(skipped, c.skipped) || (c.skipped == "") != (skipped == "") ||
				!reflect.DeepEqual(out, p) {
				t.Errorf("%v, skipped %q, %v", out, skipped, err)
			}
		})
	}
}

// TestInjectResources has pods that only look as if they could have no sidecar,
// and the requests of pods that have resources of their own.
func TestInjectResources(t *testing.T) {
	const linuxOrWindows = "{affinity: {nodeAffinity: {requiredDuringSchedulingIgnoredDuringExecution: " +
		"{nodeSelectorTerms: [{matchExpressions: [{key: kubernetes.io/os, operator: In, values: [windows]}]}, " +
		"{matchExpressions: [{key: kubernetes.io/os, operator: In, values: [linux]}]}" +
		"]}}}, containers: [{name: envoy}]}"
	for _, c := range []struct{ spec, want string }{
		{"{hostNetwork: null, containers: [{name: envoy}]}", "null"},
		{linuxOrWindows, "null"},
		{
			"{resources: {requests: {cpu: 130m, memory: 72Mi}}, " +
				"containers: [{name: envoy, resources: {requests: {cpu: 80m, memory: 40Mi}}}]}",
			`{"requests":{"cpu":"130m","memory":"72Mi"}}`,
		},
		{
			"{resources: {requests: {cpu: 0.1, memory: 64Mi}}, " +
				"containers: [{name: envoy, resources: {requests: {cpu: 80m, memory: 40Mi}}}]}",
			`{"requests":{"cpu":"130m","memory":"72Mi"}}`,
		},
		{
			"{resources: {requests: {cpu: 100m}}, containers: [{name: envoy, resources: {limits: {cpu: 80m}}}]}",
			`{"requests":{"cpu":"130m"}}`,
		},
		{
			"{resources: {requests: {cpu: 100m}}, " +
				"initContainers: [{name: i, resources: {requests: {cpu: 51m}}}], containers: [{name: envoy}]}",
			`{"requests":{"cpu":"101m"}}`,
		},
		{
			"{resources: {requests: {cpu: 100m}, limits: {memory: 1Gi}}, " +
				"initContainers: [{name: i, resources: {requests: {cpu: 50m}}}], " +
				"containers: [{name: envoy, resources: {requests: {cpu: 50m}}}]}",
			`{"limits":{"memory":"1Gi"},"requests":{"cpu":"100m","memory":"1Gi"}}`,
		},
		// An invalid quantity is left for the API server to refuse.
		{"{resources: {requests: {cpu: nan}}, containers: [{name: envoy}]}", `{"requests":{"cpu":"nan"}}`},
		{
			"{resources: {limits: {cpu: 4, memory: 1Gi}}, " +
				"containers: [{name: envoy, resources: {requests: {memory: 50Mi}}}]}",
			`{"limits":{"cpu":4,"memory":"1Gi"},"requests":{"cpu":4}}`,
		},
	} {
		p := pod(t, "{metadata: {annotations: {sluice.dev/redis-secret: r}}, spec: "+c.spec+"}")
		out, skipped, err := Inject(p, options)
		if err != nil || skipped != "" || sidecarIndex(out) != 0 {
			t.Errorf("%s: %v, skipped %q", c.spec, err, skipped)
		}
		if got, _ := json.Marshal(objectField(out, "spec")["resources"]); string(got) != c.want {
			t.Errorf("%s: %s, want %s", c.spec, got, c.want)
		}
	}
}

func TestResources(t *testing.T) {
	for text, want := range map[string]string{
		"{limits: {memory: 16Mi}}":          `{"limits":{"memory":"16Mi"},"requests":{"cpu":"50m","memory":"16Mi"}}`,
		"{requests: {memory: 1Gi, cpu: 2}}": `{"limits":{"memory":"1Gi"},"requests":{"cpu":"2","memory":"1Gi"}}`,
		`{"limits": {"cpu": "1"}}`: `{"limits":{"cpu":"1","memory":"128Mi"},"requests":{"cpu":"50m",` +
			`"memory":"32Mi"}}`,
		"{limits: {cpu: 10m, memory: 500e6}}": `{"limits":{"cpu":"10m","memory":"500e6"},"requests":{"cpu":"10m",` +
			`"memory":"32Mi"}}`,
	} {
		r, err := ParseResources(text)
		if err != nil {
			t.Fatal(err)
		}
		if got, _ := json.Marshal(sidecarContainer(options, annotations{resources: r},
			false)["resources"]); string(got) != want {
			t.Errorf("%s: %s", text, got)
		}
	}
}

// randomPod generates pods in which each part may be missing.
var randomPod = rapid.Custom(func(t *rapid.T) object {
	container := func(name string) object {
		c := object{"name": name, "image": "registry.example/" + name + ":1"}
		if rapid.Bool().Draw(t, "mount") {
			c["volumeMounts"] = []any{object{"name": "data", "mountPath": "/data"}}
		}
		if rapid.Bool().Draw(t, "ports") {
			c["ports"] = []any{object{"containerPort": rapid.SampledFrom([]int{80, 8080, 9001, 9003}).Draw(t, "port")}}
		}
		if rapid.Bool().Draw(t, "env") {
			c["env"] = []any{object{"name": "A", "value": rapid.StringMatching(`[ -~]{0,8}`).Draw(t, "value")}}
		}
		return c
	}
	var init []any
	for _, name := range rapid.SliceOfNDistinct(rapid.SampledFrom([]string{"migrate", "istio-init", "istio-proxy",
		"logger"}), 0, 4, rapid.ID).Draw(t, "init") {
		c := container(name)
		if rapid.Bool().Draw(t, "native") {
			c["restartPolicy"] = "Always"
		}
		init = append(init, c)
	}
	containers := []any{container("app")}
	if rapid.IntRange(0, 9).Draw(t, "envoy") > 1 {
		containers = append(containers, container("envoy"))
	}
	spec := object{"containers": containers, "volumes": []any{object{"name": "data", "emptyDir": object{}}}}
	if len(init) > 0 {
		spec["initContainers"] = init
	}
	if rapid.Bool().Draw(t, "grace") {
		spec["terminationGracePeriodSeconds"] = rapid.IntRange(0, 60).Draw(t, "seconds")
	}
	a := object{}
	for name, values := range map[string][]string{
		annotationRedisSecret: {"redis"}, annotationConfig: {"limits"}, annotationDomain: {"a/b"},
		annotationInProcess: {"true", "false"}, annotationImage: {"other:2"},
		annotationUser:           {"1001", PlatformUser},
		annotationEnvoyContainer: {"envoy", "app", "gone"}, annotationResources: {"{limits: {memory: 64Mi}}",
			"{requests: {cpu: 1}}"},
	} {
		if rapid.Bool().Draw(t, name) {
			a[name] = rapid.SampledFrom(values).Draw(t, "value")
		}
	}
	metadata := object{"annotations": a, "labels": object{"app": "web"}, "name": "web", "namespace": "shop"}
	if rapid.IntRange(0, 3).Draw(t, "labelled") == 0 {
		metadata["labels"] = object{injectLabel: rapid.SampledFrom([]string{"enabled", "disabled"}).Draw(t, "label")}
	}
	return object{"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}
})

// Injecting a pod again changes nothing, also after it has been encoded as
// JSON, and Manifest has the same result as Inject.
func TestInjectTwice(t *testing.T) {
	changed := 0
	rapid.Check(t, func(t *rapid.T) {
		p := randomPod.Draw(t, "pod")
		o := Options{Image: "sluice:test", Version: "v1", Namespace: "shop", Workload: "web"}
		once, _, err := Inject(p, o)
		if err != nil {
			return
		}
		text, err := json.Marshal(once)
		if err != nil {
			t.Fatal(err)
		}
		var read object
		if err := json.Unmarshal(text, &read); err != nil {
			t.Fatal(err)
		}
		twice, _, err := Inject(read, o)
		if err != nil || !reflect.DeepEqual(twice, read) {
			t.Fatalf("%v\nonce:  %v\ntwice: %v", err, read, twice)
		}
		if !reflect.DeepEqual(once, p) {
			changed++
		}
		in, err := yaml.Marshal(p)
		if err != nil {
			t.Fatal(err)
		}
		out, _, err := Manifest(in, o)
		if err != nil {
			t.Fatal(err)
		}
		var filtered object
		if err := yaml.Unmarshal(out, &filtered); err != nil {
			t.Fatal(err)
		}
		if !equalJSON(filtered, once) {
			t.Fatalf("the manifest has %v\nand the pod %v", filtered, once)
		}
		if again, _, err := Manifest(out, o); err != nil || string(again) != string(out) {
			t.Fatalf("%v\nonce:\n%s\ntwice:\n%s", err, out, again)
		}
	})
	if changed == 0 {
		t.Error("no pod was injected")
	}
}

// What others have added to sluice's container is kept when it is injected
// again with other options.
func TestInjectKeepsWhatOthersAdded(t *testing.T) {
	added := inject(t, pod(t, withEnvoy), options)
	container := listField(objectField(added, "spec"), "initContainers")[0].(object)
	container["env"] = append(listField(container, "env"), object{"name": "OTEL_SERVICE_NAME", "value": "web"})
	container["volumeMounts"] = append(listField(container, "volumeMounts"),
		object{"name": "token", "mountPath": "/var/run/secrets"})
	objectField(objectField(container, "resources"), "limits")["cpu"] = "1" // as a LimitRange would
	objectField(container, "securityContext")["seLinuxOptions"] = object{"level": "s0:c1"}
	if out := inject(t, added, options); !reflect.DeepEqual(out, added) {
		t.Errorf("changed to %v\nfrom %v", out, added)
	}
	annotations := objectField(objectField(added, "metadata"), "annotations")
	delete(annotations, annotationConfig)
	annotations[annotationResources] = "{requests: {cpu: 2}, limits: {memory: 64Mi}}"
	out := inject(t, added, Options{Image: "sluice:next", Version: "v2"})
	c := listField(objectField(out, "spec"), "initContainers")[0].(object)
	env := listField(c, "env")
	if indexByName(env, "OTEL_SERVICE_NAME") < 0 || indexByName(env, "SLUICE_CONFIG") >= 0 ||
		indexByName(env, "SLUICE_REDIS") < 0 || c["image"] != "sluice:next" {
		t.Errorf("%v", c)
	}
	if mounts := listField(c, "volumeMounts"); len(mounts) != 2 || indexByName(mounts, "token") < 0 ||
		indexByName(mounts, socketVolume) < 0 {
		t.Errorf("mounts %v", mounts)
	}
	// A limit of 1 CPU is below the request.
	want := object{"requests": object{"cpu": "2", "memory": "32Mi"}, "limits": object{"memory": "64Mi", "cpu": "2"}}
	if !equalJSON(c["resources"], want) {
		t.Errorf("resources %v", c["resources"])
	}
	if objectField(c, "securityContext")["seLinuxOptions"] == nil ||
		objectField(c, "securityContext")["runAsUser"] != 65532 {
		t.Errorf("security context %v", c["securityContext"])
	}
}

// What others have changed since the same injection stays, as when an API server
// calls a webhook again. Only what is missing is added.
func TestInjectAgain(t *testing.T) {
	p := inject(t, pod(t, withEnvoy), options)
	spec := objectField(p, "spec")
	container := listField(spec, "initContainers")[0].(object)
	container["image"] = "mirror.example.com/sluice@sha256:1234"
	objectField(container, "securityContext")["runAsUser"] = 1000680000
	container["resources"] = object{"requests": object{"cpu": "1m"}, "limits": object{"memory": "1Gi", "cpu": "1"}}
	env := listField(container, "env")
	env[indexByName(env, "SLUICE_DOMAIN")] = object{"name": "SLUICE_DOMAIN", "value": "shop/other"}
	container["env"] = env
	volumes := listField(spec, "volumes")
	volumes[indexByName(volumes, socketVolume)].(object)["emptyDir"] = object{"medium": "Memory", "sizeLimit": "1Mi"}
	objectField(container, "resources")["requests"] = object{"cpu": "1m", "memory": "32Mi"}
	if out := inject(t, p, options); !reflect.DeepEqual(out, p) {
		t.Errorf("changed to %v\nfrom %v", out, p)
	}
	// Another webhook has removed a variable and a mount.
	container["env"] = removeByName(listField(container, "env"), "SLUICE_REDIS")
	container["volumeMounts"] = removeByName(listField(container, "volumeMounts"), configVolume)
	out := inject(t, p, options)
	c := listField(objectField(out, "spec"), "initContainers")[0].(object)
	if indexByName(listField(c, "env"), "SLUICE_REDIS") < 0 ||
		indexByName(listField(c, "volumeMounts"), configVolume) < 0 ||
		c["image"] != container["image"] {
		t.Errorf("%v", c)
	}
	// A probe is another's or ours, but no mixture.
	container["startupProbe"] = object{"httpGet": object{"path": "/", "port": 1}}
	if out := inject(t, p, options); !equalJSON(at(listField(objectField(out, "spec"), "initContainers")[0],
		"startupProbe"), container["startupProbe"]) {
		t.Errorf("%v", out)
	}
	// A template that was injected for other annotations is brought up to date.
	objectField(objectField(p, "metadata"), "annotations")[annotationConfig] = "other-limits"
	out = inject(t, p, options)
	volumes = listField(objectField(out, "spec"), "volumes")
	if v := volumes[indexByName(volumes, configVolume)]; at(v, "configMap", "name") != "other-limits" {
		t.Errorf("%v", v)
	}
	objectField(objectField(p, "metadata"), "annotations")[annotationDomain] = "shop/third"
	out = inject(t, p, options)
	c = listField(objectField(out, "spec"), "initContainers")[0].(object)
	if c["image"] != options.Image || !strings.Contains(fmt.Sprint(c["env"]), "shop/third") {
		t.Errorf("%v", c)
	}
}

// The sidecar's user and resources are those of the annotations, of the options,
// or the defaults.
func TestInjectUserAndResources(t *testing.T) {
	resources, err := ParseResources("{requests: {cpu: 10m}, limits: {cpu: 500m}}")
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		user, annotation string
		want             any
	}{
		{"", "", 65532}, {"1001", "", 1001}, {"1001", "1002", 1002}, {"platform", "", nil},
		{"platform", "1002", 1002}, {"1001", "platform", nil},
	} {
		o := options
		o.User, o.Resources = c.user, resources
		p := pod(t, withEnvoy)
		if c.annotation != "" {
			objectField(objectField(p, "metadata"), "annotations")[annotationUser] = c.annotation
		}
		// One that was injected as another user before is brought up to date.
		for _, before := range []object{p, inject(t, p, options)} {
			if c.annotation != "" {
				objectField(objectField(before, "metadata"), "annotations")[annotationUser] = c.annotation
			}
			container := listField(objectField(inject(t, before, o), "spec"), "initContainers")[0].(object)
			security := objectField(container, "securityContext")
			if security["runAsUser"] != c.want || security["runAsGroup"] != c.want || security["runAsNonRoot"] != true {
				t.Errorf("%+v: %v", c, security)
			}
			want := object{"requests": object{"cpu": "10m", "memory": "32Mi"},
				"limits": object{"cpu": "500m", "memory": "128Mi"}}
			if !equalJSON(container["resources"], want) {
				t.Errorf("%v", container["resources"])
			}
		}
	}
	for _, user := range []string{"0", "-1", "root", "2147483648", "01", "1e3"} {
		p := pod(t, withEnvoy)
		objectField(objectField(p, "metadata"), "annotations")[annotationUser] = user
		if _, _, err := Inject(p, options); err == nil || !strings.Contains(err.Error(), "must be a user ID from 1 to") {
			t.Errorf("%s: %v", user, err)
		}
	}
	if Stamp(options) == Stamp(Options{Image: options.Image, Version: options.Version, User: "1001"}) {
		t.Error("the stamp does not depend on the user")
	}
}

// The cluster autoscaler does not evict pods with files on the node's disk.
func TestInjectSocketInMemory(t *testing.T) {
	out := inject(t, pod(t, withEnvoy), options)
	volumes := listField(objectField(out, "spec"), "volumes")
	v := volumes[indexByName(volumes, socketVolume)].(object)
	if !reflect.DeepEqual(v["emptyDir"], object{"medium": "Memory"}) {
		t.Errorf("%v", v)
	}
}

// Another image has another stamp.
func TestStamp(t *testing.T) {
	if Stamp(Options{Image: "a", Version: "v1"}) == Stamp(Options{Image: "b", Version: "v1"}) {
		t.Error("the stamp does not depend on the image")
	}
}
