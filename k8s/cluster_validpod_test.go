//go:build linux

package k8s

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"pgregory.net/rapid"
)

// shape generates the parts of a pod that the API server accepts. Names and
// ports are unique.
type shape struct {
	t       *rapid.T
	ports   int
	volumes []string
}

func (s *shape) maybe() bool { return rapid.Bool().Draw(s.t, "there") }

// rarely returns true once in 2^bits calls.
func (s *shape) rarely(bits int) bool {
	for range bits {
		if !s.maybe() {
			return false
		}
	}
	return true
}

func (s *shape) one(of ...any) any { return rapid.SampledFrom(of).Draw(s.t, "one") }

func (s *shape) number(from, to int) int { return rapid.IntRange(from, to).Draw(s.t, "number") }

// text returns a string that a user may write where anything is allowed.
// Unquoted, YAML parsers would read most of these as something else.
func (s *shape) text() string {
	return rapid.OneOf(
		rapid.SampledFrom([]string{
			"", " ", "yes", "No", "on", "OFF", "y", "n", "true", "null", "~", "0x1f", "0o17", "017", "1e3", "1_000",
			".5", ".inf", "-.NaN", "2001-01-01", "12:30:45", "<<", "=",
			"- a", "a: b", "# a", "a #b", "a\nb\n", "\n\na", "a\n  b\n", "\ta\t", "a\\n", "'", `"`, "%a", "@a", "`",
			"!a", "&a", "*a", "[a", "{a", "|", ">", "---", "...", "$(POD_NAME)", "${A}", "é日本🎉",
			" \u00a0a", "\u2028", "\u0085", "\ufeffa", "a\r\nb", strings.Repeat("long words ", 30),
		}),
		rapid.StringMatching(`[ -~]{0,20}`),
	).Draw(s.t, "text")
}

func (s *shape) texts() []any {
	var all []any
	for range s.number(1, 3) {
		all = append(all, s.text())
	}
	return all
}

// some returns an object in which each of the fields may be missing.
func (s *shape) some(fields map[string]func() any) object {
	o := object{}
	for _, name := range slices.Sorted(maps.Keys(fields)) { // rapid needs a fixed order
		if s.maybe() {
			o[name] = fields[name]()
		}
	}
	return o
}

func (s *shape) oneOf(of ...any) func() any { return func() any { return s.one(of...) } }

func (s *shape) env() any {
	var all []any
	for i := range s.number(1, 4) {
		o := object{"name": fmt.Sprintf("%v_%d", s.one("A", "PATH", "a.b", "x-y"), i)}
		switch s.number(0, 6) {
		case 0:
			o["valueFrom"] = object{"fieldRef": object{"fieldPath": s.one("metadata.name", "status.podIP",
				"metadata.labels['app']", "spec.nodeName")}}
		case 1:
			o["valueFrom"] = object{"resourceFieldRef": s.one(object{"resource": "limits.cpu", "divisor": "1m"},
				object{"resource": "requests.memory", "divisor": "1Mi"}, object{"resource": "limits.memory"})}
		case 2:
			o["valueFrom"] = object{"secretKeyRef": object{"name": "s", "key": "k", "optional": s.maybe()}}
		case 3:
			o["valueFrom"] = object{"configMapKeyRef": object{"name": "c", "key": "k.txt"}}
		default:
			o["value"] = s.text()
		}
		all = append(all, o)
	}
	return all
}

func (s *shape) resources() any {
	requests, limits := object{}, object{}
	for _, name := range []string{"cpu", "ephemeral-storage", "memory"} {
		amounts := map[string][]any{"cpu": {"100m", "0.5", 2}, "memory": {"32Mi", "1e8", "1Gi"},
			"ephemeral-storage": {"1M", 1000000000, "2Gi"}}[name]
		low := s.number(0, 2)
		if s.maybe() {
			requests[name] = amounts[low]
		}
		if s.maybe() {
			limits[name] = amounts[s.number(low, 2)]
		}
	}
	return object{"requests": requests, "limits": limits}
}

func (s *shape) handler() object {
	switch s.number(0, 3) {
	case 0:
		return object{"httpGet": object{"path": s.one("/", "/healthz?x=%20y"), "port": s.one(8080, "http-not-named"),
			"scheme": s.one("HTTP", "HTTPS"), "httpHeaders": []any{object{"name": "X-A", "value": s.text()}}}}
	case 1:
		return object{"tcpSocket": object{"port": 8080}}
	default:
		return object{"exec": object{"command": s.texts()}}
	}
}

func (s *shape) probe() any {
	p := s.some(map[string]func() any{
		"initialDelaySeconds": func() any { return s.number(0, 9) },
		"periodSeconds":       func() any { return s.number(1, 9) },
		"timeoutSeconds":      func() any { return s.number(1, 9) },
		"failureThreshold":    func() any { return s.number(1, 9) },
	})
	maps.Copy(p, s.handler())
	if s.rarely(2) {
		for _, k := range []string{"httpGet", "tcpSocket", "exec"} {
			delete(p, k)
		}
		p["grpc"] = object{"port": 9000}
	}
	return p
}

func (s *shape) containerSecurity() any {
	o := s.some(map[string]func() any{
		"runAsUser": func() any { return s.number(0, 65535) }, "runAsGroup": func() any { return s.number(0, 65535) },
		"runAsNonRoot":           func() any { return s.maybe() },
		"readOnlyRootFilesystem": func() any { return s.maybe() },
		"capabilities":           func() any { return object{"drop": []any{"ALL"}, "add": []any{"NET_BIND_SERVICE"}} },
		"seccompProfile": func() any {
			return s.one(object{"type": "RuntimeDefault"}, object{"type": "Unconfined"},
				object{"type": "Localhost", "localhostProfile": "a.json"})
		},
		"seLinuxOptions":           func() any { return object{"level": "s0:c123,c456"} },
		"allowPrivilegeEscalation": func() any { return s.maybe() },
	})
	if o["allowPrivilegeEscalation"] != false && s.rarely(2) {
		o["privileged"] = true
	}
	return o
}

func (s *shape) portList() any {
	var all []any
	for range s.number(1, 3) {
		s.ports++
		number := 8000 + s.ports
		if s.rarely(6) {
			number = []int{9001, 9002, 9003}[s.ports%3] // a port that sluice may need
		}
		o := object{"containerPort": number}
		if s.maybe() {
			o["name"] = fmt.Sprintf("p-%d", s.ports)
		}
		if s.maybe() {
			o["protocol"] = s.one("TCP", "UDP", "SCTP")
		}
		if s.rarely(3) {
			o["hostPort"] = number
		}
		all = append(all, o)
	}
	return all
}

func (s *shape) mounts() any {
	var all []any
	for i, name := range s.volumes {
		if !s.maybe() {
			continue
		}
		o := object{"name": name, "mountPath": fmt.Sprintf("/%v/%d", s.one("data", "etc/a b", "var/run"), i)}
		if s.rarely(4) && len(all) == 0 {
			o["mountPath"] = s.one("/run/sluice", "/etc/sluice", "/run")
		}
		if s.maybe() {
			o["readOnly"] = s.maybe()
		}
		switch s.number(0, 4) {
		case 0:
			o["subPath"] = "a/b"
		case 1:
			o["subPathExpr"] = "$(POD)/x"
		case 2:
			o["mountPropagation"] = s.one("None", "HostToContainer")
		}
		all = append(all, o)
	}
	if all == nil {
		return []any{}
	}
	return all
}

func (s *shape) container(name string, init bool) object {
	native := init && s.maybe()
	fields := map[string]func() any{
		"command": func() any { return s.texts() }, "args": func() any { return s.texts() },
		"workingDir": func() any { return "/w d" },
		"env":        s.env, "resources": s.resources, "securityContext": s.containerSecurity, "ports": s.portList,
		"volumeMounts": s.mounts,
		"envFrom": func() any {
			return []any{object{"prefix": "P_", "configMapRef": object{"name": "c", "optional": true}},
				object{"secretRef": object{"name": "s"}}}
		},
		"imagePullPolicy":          s.oneOf("Always", "Never", "IfNotPresent"),
		"terminationMessagePath":   s.oneOf("/dev/termination-log", "/t"),
		"terminationMessagePolicy": s.oneOf("File", "FallbackToLogsOnError"),
		"stdin":                    func() any { return s.maybe() }, "stdinOnce": func() any { return s.maybe() },
		"tty": func() any { return s.maybe() },
	}
	if !init || native {
		fields["livenessProbe"], fields["readinessProbe"], fields["startupProbe"] = s.probe, s.probe, s.probe
		fields["lifecycle"] = func() any {
			return object{"postStart": object{"exec": object{"command": s.texts()}},
				"preStop": s.one(object{"sleep": object{"seconds": 1}}, object{"httpGet": object{"port": 8080}})}
		}
	}
	if !init {
		fields["resizePolicy"] = func() any {
			return []any{object{"resourceName": "cpu", "restartPolicy": "NotRequired"}}
		}
	}
	c := s.some(fields)
	c["name"], c["image"] = name, s.one("a", "registry.example:5000/a/b:c@sha256:"+strings.Repeat("ab", 32))
	if native {
		c["restartPolicy"] = "Always"
	}
	return c
}

func (s *shape) volume(name string) object {
	sources := []func() object{
		func() object { return object{"emptyDir": object{"medium": s.one("", "Memory"), "sizeLimit": "1Gi"}} },
		func() object { return object{"emptyDir": object{}} },
		func() object {
			return object{"configMap": object{"name": "c", "defaultMode": s.one(420, 0o400, 0),
				"items": []any{object{"key": "k", "path": "a/k"}}, "optional": s.maybe()}}
		},
		func() object { return object{"secret": object{"secretName": "s", "optional": s.maybe()}} },
		func() object { return object{"hostPath": object{"path": "/a", "type": s.one("", "Directory")}} },
		func() object { return object{"persistentVolumeClaim": object{"claimName": "p", "readOnly": s.maybe()}} },
		func() object {
			return object{"downwardAPI": object{"items": []any{object{"path": "l",
				"fieldRef": object{"fieldPath": "metadata.labels"}}}}}
		},
		func() object {
			return object{"projected": object{"sources": []any{object{"serviceAccountToken": object{"path": "t",
				"expirationSeconds": 3600, "audience": s.text()}}, object{"configMap": object{"name": "c"}}}}}
		},
		func() object {
			return object{"csi": object{"driver": "d.example", "volumeAttributes": object{"a": s.text()}}}
		},
		func() object {
			claim := object{
				"accessModes": []any{"ReadWriteOnce"}, "resources": object{"requests": object{"storage": "1Gi"}},
			}
			return object{"ephemeral": object{"volumeClaimTemplate": object{"spec": claim}}}
		},
		func() object { return object{"nfs": object{"server": "n", "path": "/n"}} },
	}
	v := rapid.SampledFrom(sources).Draw(s.t, "source")()
	v["name"] = name
	return v
}

func (s *shape) podSpec(containers, init []string) object {
	for _, name := range []string{"data", "cache", "tokens"} {
		if s.maybe() {
			s.volumes = append(s.volumes, name)
		}
	}
	if s.rarely(5) {
		s.volumes = append(s.volumes, s.one(configVolume, socketVolume).(string))
	}
	selector := object{"matchExpressions": []any{object{"key": "k", "operator": s.one("In", "NotIn"),
		"values": []any{s.one("a", "yes", "1")}}}}
	spec := s.some(map[string]func() any{
		"restartPolicy":                 s.oneOf("Always", "OnFailure", "Never"),
		"terminationGracePeriodSeconds": func() any { return s.number(2, 60) },
		"activeDeadlineSeconds":         func() any { return s.number(1, 60) },
		"dnsPolicy":                     s.oneOf("ClusterFirst", "Default"),
		"dnsConfig": func() any {
			return object{"nameservers": []any{"192.0.2.53"}, "options": []any{object{"name": "ndots", "value": "2"}}}
		},
		"nodeSelector": func() any {
			return object{"kubernetes.io/arch": "amd64",
				"a": s.one("yes", "1", "")}
		},
		"serviceAccountName":           func() any { return "default" },
		"automountServiceAccountToken": func() any { return s.maybe() },
		"shareProcessNamespace":        func() any { return s.maybe() },
		"imagePullSecrets":             func() any { return []any{object{"name": "pull"}} },
		"hostname":                     func() any { return "h" }, "subdomain": func() any { return "s" },
		"schedulerName":      func() any { return "other" },
		"hostAliases":        func() any { return []any{object{"ip": "192.0.2.9", "hostnames": []any{"a.example"}}} },
		"readinessGates":     func() any { return []any{object{"conditionType": "a.example/b"}} },
		"enableServiceLinks": func() any { return s.maybe() },
		"preemptionPolicy":   func() any { return "PreemptLowerPriority" },
		"setHostnameAsFQDN":  func() any { return s.maybe() },
		"securityContext": func() any {
			return s.some(map[string]func() any{
				"runAsUser":           func() any { return s.number(0, 65535) },
				"fsGroup":             func() any { return s.number(0, 65535) },
				"supplementalGroups":  func() any { return []any{1, 2000} },
				"fsGroupChangePolicy": s.oneOf("Always", "OnRootMismatch"),
				"runAsNonRoot":        func() any { return s.maybe() },
				"sysctls": func() any {
					return []any{object{"name": "net.ipv4.ip_local_port_range",
						"value": "1024 65535"}}
				},
			})
		},
		"affinity": func() any {
			return object{
				"nodeAffinity": object{"preferredDuringSchedulingIgnoredDuringExecution": []any{object{
					"weight":     s.number(1, 100),
					"preference": object{"matchExpressions": []any{object{"key": "k", "operator": "Exists"}}},
				}}},
				"podAntiAffinity": object{"requiredDuringSchedulingIgnoredDuringExecution": []any{
					object{"topologyKey": "kubernetes.io/hostname", "labelSelector": selector},
				}},
			}
		},
		"tolerations": func() any {
			return []any{object{"operator": "Exists"}, object{"key": "k", "value": s.one("true", "v"),
				"effect": "NoExecute", "tolerationSeconds": s.number(0, 600)}}
		},
		"topologySpreadConstraints": func() any {
			return []any{object{"maxSkew": 1, "topologyKey": "zone",
				"whenUnsatisfiable": s.one("DoNotSchedule", "ScheduleAnyway"), "labelSelector": selector}}
		},
		"schedulingGates": func() any { return []any{object{"name": "a.example/gate"}} },
	})
	switch {
	case s.rarely(5):
		spec["hostNetwork"] = true
		delete(objectField(spec, "securityContext"), "sysctls") // not allowed with hostNetwork
	case s.rarely(4):
		spec["nodeSelector"] = object{"kubernetes.io/os": "windows"}
	case s.maybe():
		spec["os"] = object{"name": "linux"}
	}
	var all, first []any
	for _, name := range containers {
		all = append(all, s.container(name, false))
	}
	for _, name := range init {
		first = append(first, s.container(name, true))
	}
	if spec["containers"] = all; first != nil {
		spec["initContainers"] = first
	}
	if s.rarely(2) { // resources of its own, which must be sufficient
		own := object{"requests": object{"cpu": s.one("10", "100m"), "memory": s.one("10Gi", "33Mi")}}
		if s.maybe() {
			own["limits"] = object{"cpu": "11", "memory": "11Gi"}
		} else if s.rarely(2) {
			own = object{"requests": object{"cpu": "100m", "memory": "33Mi"},
				"limits": object{"cpu": "170m", "memory": "80Mi"}}
		}
		if s.maybe() {
			delete(own, "requests") // the API server's default is then the sum of its containers
		}
		with := maps.Clone(spec)
		if with["resources"] = own; len(own) > 0 {
			if fitting, why := raisePodRequests(with); why == "" {
				spec["resources"] = fitting
			}
		}
	}
	var volumes []any
	for _, name := range s.volumes {
		volumes = append(volumes, s.volume(name))
	}
	if volumes != nil {
		spec["volumes"] = volumes
	}
	return spec
}

// validPod generates pods that the API server accepts, with most of the fields
// that there are.
var validPod = rapid.Custom(func(t *rapid.T) object {
	s := &shape{t: t}
	containers := []string{"app"}
	switch {
	case s.rarely(4):
	case s.rarely(2):
		containers = append(containers, istioProxy)
	case s.rarely(2):
		containers = append([]string{"proxy"}, containers...)
	default:
		containers = append(containers, "envoy")
	}
	if s.rarely(5) {
		containers = append(containers, containerName)
	}
	all := []string{"migrate", "istio-init", "log", containerName}
	if !slices.Contains(containers, istioProxy) {
		all = append(all, istioProxy)
	}
	if slices.Contains(containers, containerName) || !s.rarely(4) {
		all = slices.DeleteFunc(all, func(name string) bool { return name == containerName })
	}
	init := rapid.SliceOfNDistinct(rapid.SampledFrom(all), 0, 3, rapid.ID).Draw(t, "init")
	spec := s.podSpec(containers, init)

	a := object{annotationRedisSecret: "redis"}
	if s.rarely(2) {
		a = object{annotationInProcess: "true"}
	}
	if s.rarely(5) {
		a = object{"other": s.text()}
	}
	maps.Copy(a, s.some(map[string]func() any{
		annotationConfig: s.oneOf("limits", "limits.v2"), annotationDomain: s.oneOf("a/b", "on", "1e3", "0x1f"),
		annotationImage: s.oneOf("other:2", "r.example:5000/s@sha256:"+strings.Repeat("0", 64)),
		annotationResources: s.oneOf("{limits: {memory: 64Mi}}", "{requests: {cpu: 1}}",
			`{"requests": {"memory": "1Gi", "ephemeral-storage": "1Gi"}}`, "limits:\n  cpu: 500m\n  memory: 1e8\n"),
	}))
	if slices.Contains(containers, "proxy") && !s.rarely(3) {
		a[annotationEnvoyContainer] = "proxy"
	} else if s.rarely(4) {
		a[annotationEnvoyContainer] = s.one("proxy", "envoy", "app")
	}
	if s.maybe() {
		a["example.com/words"] = s.text()
	}
	metadata := object{"annotations": a, "labels": object{"app": s.one("web", "1", "yes", "")}}
	if s.rarely(3) {
		objectField(metadata, "labels")[injectLabel] = s.one("enabled", "disabled")
	}
	return object{"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}
})
