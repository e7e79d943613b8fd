package k8s

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/goccy/go-yaml"
	"github.com/google/go-cmp/cmp"

	"github.com/sluiceproxy/sluice/k8s/testenv"
)

const (
	chartDir    = "chart"
	helmVersion = "v3.22.0"
	kubeVersion = "v1.34.4"
)

var update = flag.Bool("update", false, "write the plain manifests anew")

// helmBinary returns the path of helm.
func helmBinary(t *testing.T) string {
	t.Helper()
	return testenv.Program(t, "helm.sh/helm/v3/cmd/helm", helmVersion)
}

// helm runs helm without the user's settings, and returns what it prints to
// stdout; the error has its stderr.
func helm(t *testing.T, args ...string) (string, error) {
	t.Helper()
	c := exec.CommandContext(context.Background(), helmBinary(t), args...)
	home := t.TempDir()
	c.Env = append(os.Environ(), "HELM_CACHE_HOME="+home, "HELM_CONFIG_HOME="+home, "HELM_DATA_HOME="+home,
		"KUBECONFIG="+filepath.Join(home, "none"))
	var stdout, stderr bytes.Buffer
	c.Stdout, c.Stderr = &stdout, &stderr
	if err := c.Run(); err != nil {
		return stdout.String(), fmt.Errorf("helm %s: %w\n%s", strings.Join(args, " "), err, stderr.String())
	}
	return stdout.String(), nil
}

// rendered returns the chart rendered as release sluice in namespace
// sluice-system, with its tests.
func rendered(t *testing.T, args ...string) (string, error) {
	t.Helper()
	return helm(t, append([]string{"template", "sluice", chartDir, "--namespace", "sluice-system", "--kube-version",
		kubeVersion}, args...)...)
}

// render is rendered, decoded.
func render(t *testing.T, args ...string) []object {
	t.Helper()
	text, err := rendered(t, args...)
	if err != nil {
		t.Fatal(err)
	}
	var all []object
	d := yaml.NewDecoder(strings.NewReader(text))
	for {
		var o object
		if err := d.Decode(&o); errors.Is(err, io.EOF) {
			return all
		} else if err != nil {
			t.Fatalf("%v\n%s", err, text)
		}
		if len(o) > 0 {
			all = append(all, o)
		}
	}
}

// at returns the field at a path of nested maps, or nil if there is none.
func at(v any, path ...string) any {
	for _, name := range path {
		m, _ := v.(map[string]any)
		v = m[name]
	}
	return v
}

// id returns an object's kind and name as "Kind/name".
func id(o object) string { return fmt.Sprintf("%v/%v", o["kind"], at(o, "metadata", "name")) }

func ids(all []object) []string {
	var s []string
	for _, o := range all {
		s = append(s, id(o))
	}
	return s
}

func find(t *testing.T, all []object, want string) object {
	t.Helper()
	i := slices.IndexFunc(all, func(o object) bool { return id(o) == want })
	if i < 0 {
		t.Fatalf("there is no %s in %v", want, ids(all))
	}
	return all[i]
}

// sets are sets of options that together render every branch of every template.
var sets = map[string][]string{
	"default": nil,
	"all": {
		"--set", "gateway.enabled=true,gateway.redis.secret=buckets,trialRedis.enabled=true," +
			"networkPolicy.enabled=true,serviceMonitor.enabled=true",
		"--set", "imagePullSecrets[0].name=pull,image.digest=sha256:" + strings.Repeat("ab", 32),
		"--set", "serviceMonitor.labels.team=edge,fullnameOverride=limits,webhook.excludedNamespaces={ops}",
		"--set", "webhook.priorityClassName=p,webhook.nodeSelector.a=b,webhook.tolerations[0].operator=Exists," +
			"webhook.affinity.nodeAffinity=null,webhook.podAnnotations.a=b",
		"--set", "gateway.priorityClassName=p,gateway.nodeSelector.a=b,gateway.tolerations[0].operator=Exists," +
			"gateway.podAnnotations.a=b",
		"--set-json", `webhook.affinity={"podAntiAffinity":{}}`, "--set-json",
		`gateway.affinity={"podAntiAffinity":{}}`,
	},
	"cert-manager": {"--set", "certManager.enabled=true"},
	"cert-manager with issuer": {"--set", "certManager.enabled=true,certManager.issuerRef.name=ours," +
		"certManager.issuerRef.kind=ClusterIssuer"},
	"gateway and trial Redis": {
		"--set", "gateway.enabled=true,trialRedis.enabled=true,gateway.existingConfigMap=limits",
	},
	"single replicas": {"--set", "gateway.enabled=true,gateway.redis.url=redis://buckets:6379," +
		"gateway.replicas=1,webhook.replicas=1"},
	"only the trial Redis": {"--set", "trialRedis.enabled=true,networkPolicy.enabled=true"},
	"a gateway alone": {"--set", "webhook.enabled=false,gateway.enabled=true,gateway.redis.url=redis://r," +
		"networkPolicy.enabled=true"},
	"certificates of clients": {
		"--set", "gateway.enabled=true,gateway.redis.url=redis://r,gateway.tls.issuerRef.name=ours," +
			"gateway.tls.clientNames={spiffe://cluster.local/ns/gateways/*}",
		"--set", "webhook.clientCA.configMap=api,webhook.clientCA.names={api},networkPolicy.enabled=true",
		"--set-json",
		`networkPolicy.from=[{"namespaceSelector":{"matchLabels":{"kubernetes.io/metadata.name":"gateways"}}}]`,
		"--set-json", `networkPolicy.metricsFrom=[{"ipBlock":{"cidr":"10.0.0.0/8"}}]`, "--set-json",
		`networkPolicy.webhookFrom=[{"ipBlock":{"cidr":"192.0.2.3/32"}}]`,
		"--set-json", `gateway.config="# ours\nlisten: {admin: 127.0.0.1:9002}\nlimits:\n  - {name: all, rate: 1/s, ` +
			`key: 'request.headers[\"a\"]'}\n"`,
	},
	"no budgets": {"--set", "gateway.enabled=true,gateway.redis.url=redis://r," +
		"gateway.podDisruptionBudget.enabled=false,webhook.podDisruptionBudget.enabled=false"},
}

func TestChartLint(t *testing.T) {
	for name, args := range sets {
		t.Run(name, func(t *testing.T) {
			args := append([]string{"lint", "--strict", "--kube-version", kubeVersion, "--namespace", "sluice-system",
				chartDir}, args...)
			if out, err := helm(t, args...); err != nil {
				t.Errorf("%v\n%s", err, out)
			}
		})
	}
}

func TestChartObjects(t *testing.T) {
	ours := []string{
		"ServiceAccount/sluice-webhook", "Secret/sluice-webhook-ca", "Role/sluice-webhook",
		"RoleBinding/sluice-webhook",
		"ClusterRole/sluice-injector.sluice-system", "ClusterRoleBinding/sluice-injector.sluice-system",
		"Service/sluice-webhook",
		"Deployment/sluice-webhook", "MutatingWebhookConfiguration/sluice-injector.sluice-system",
		"Pod/sluice-test-inject",
	}
	managed := []string{
		"ServiceAccount/sluice-webhook", "Service/sluice-webhook", "Deployment/sluice-webhook",
		"PodDisruptionBudget/sluice-webhook",
		"MutatingWebhookConfiguration/sluice-injector.sluice-system", "Pod/sluice-test-inject",
		"Certificate/sluice-webhook",
	}
	gateway := []string{"Service/sluice-gateway", "Deployment/sluice-gateway", "Pod/sluice-test-gateway"}
	redis := []string{"Service/sluice-trial-redis", "Deployment/sluice-trial-redis"}
	for name, want := range map[string][]string{
		"default": append([]string{"PodDisruptionBudget/sluice-webhook"}, ours...),
		"cert-manager": append([]string{"Issuer/sluice-webhook-self-signed",
			"Certificate/sluice-webhook-issuer", "Issuer/sluice-webhook-issuer"}, managed...),
		"cert-manager with issuer": managed,
		"gateway and trial Redis": slices.Concat(ours, gateway, redis, []string{"PodDisruptionBudget/sluice-webhook",
			"PodDisruptionBudget/sluice-gateway"}),
		"certificates of clients": slices.Concat(ours, gateway[:2], []string{
			"ConfigMap/sluice-gateway", "Certificate/sluice-gateway", "PodDisruptionBudget/sluice-webhook",
			"PodDisruptionBudget/sluice-gateway",
			"NetworkPolicy/sluice-webhook", "NetworkPolicy/sluice-gateway",
		}),
		"single replicas": slices.Concat(ours, gateway, []string{"ConfigMap/sluice-gateway"}),
		"a gateway alone": append([]string{"ConfigMap/sluice-gateway", "PodDisruptionBudget/sluice-gateway",
			"NetworkPolicy/sluice-gateway"}, gateway...),
		"no budgets": slices.Concat(ours, gateway, []string{"ConfigMap/sluice-gateway"}),
		"only the trial Redis": slices.Concat(ours, redis, []string{
			"PodDisruptionBudget/sluice-webhook", "NetworkPolicy/sluice-webhook", "NetworkPolicy/sluice-trial-redis",
		}),
	} {
		t.Run(name, func(t *testing.T) {
			got := ids(render(t, sets[name]...))
			slices.Sort(got)
			slices.Sort(want)
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("objects (-want +got):\n%s", diff)
			}
		})
	}
}

// Names that YAML would read as another type are quoted.
func TestChartQuotes(t *testing.T) {
	text, err := helm(t, append([]string{"template", "true", chartDir, "--namespace", "123", "--kube-version",
		kubeVersion}, sets["all"]...)...)
	if err != nil {
		t.Fatal(err)
	}
	for _, wrong := range []string{"namespace: 123", "instance: true"} {
		if strings.Contains(text, wrong) {
			t.Errorf("%s", wrong)
		}
	}
	if !strings.Contains(text, `namespace: "123"`) || !strings.Contains(text, `instance: "true"`) {
		t.Errorf("%s", text)
	}
}

func TestChartRendersEveryTemplate(t *testing.T) {
	text := ""
	for _, args := range sets {
		out, err := rendered(t, args...)
		if err != nil {
			t.Fatal(err)
		}
		text += out
	}
	err := filepath.WalkDir(filepath.Join(chartDir, "templates"), func(path string, d fs.DirEntry, err error) error {
		if err == nil && filepath.Ext(path) == ".yaml" &&
			!strings.Contains(text, "# Source: sluice/"+strings.TrimPrefix(filepath.ToSlash(path), chartDir+"/")+"\n") {
			t.Errorf("no set of options renders %s", path)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// Every pod meets the restricted Pod Security Standard, and has requests,
// limits and probes.
func TestChartPods(t *testing.T) {
	for name, args := range sets {
		t.Run(name, func(t *testing.T) {
			for _, o := range render(t, args...) {
				spec := at(o, "spec", "template", "spec")
				if o["kind"] == "Pod" {
					spec = o["spec"]
				}
				if spec == nil {
					continue
				}
				if at(spec, "securityContext", "runAsNonRoot") != true ||
					at(spec, "securityContext", "seccompProfile", "type") != "RuntimeDefault" {
					t.Errorf("%s: securityContext is %v", id(o), at(spec, "securityContext"))
				}
				for _, c := range at(spec, "containers").([]any) {
					security := at(c, "securityContext")
					if at(security, "allowPrivilegeEscalation") != false ||
						at(security, "readOnlyRootFilesystem") != true ||
						!cmp.Equal(at(security, "capabilities", "drop"), []any{"ALL"}) {
						t.Errorf("%s: the container's securityContext is %v", id(o), security)
					}
					if at(c, "resources", "requests", "cpu") == nil ||
						at(c, "resources", "requests", "memory") == nil ||
						at(c, "resources", "limits", "memory") == nil {
						t.Errorf("%s: resources are %v", id(o), at(c, "resources"))
					}
					if o["kind"] == "Deployment" && (at(c, "readinessProbe") == nil || at(c, "livenessProbe") == nil) {
						t.Errorf("%s: a probe is missing", id(o))
					}
				}
				token := at(spec, "automountServiceAccountToken")
				if want := id(o) == "Deployment/sluice-webhook" && !strings.HasPrefix(name, "cert-manager") ||
					id(o) == "Deployment/limits-webhook"; token != want {
					t.Errorf("%s: automountServiceAccountToken is %v, want %v", id(o), token, want)
				}
			}
		})
	}
}

func TestChartWebhookConfiguration(t *testing.T) {
	config := find(t, render(t, "--set", "webhook.excludedNamespaces={ops}"),
		"MutatingWebhookConfiguration/sluice-injector.sluice-system")
	if name := at(config, "metadata", "name").(string); name < "istio-\xff" {
		t.Errorf("%s does not sort after istio-", name)
	}
	type expression = map[string]any
	namespaces := expression{"key": "kubernetes.io/metadata.name", "operator": "NotIn",
		"values": []any{"kube-system", "kube-node-lease", "sluice-system", "ops"}}
	enabled := func(operator string) expression {
		return expression{"key": "sluice.dev/inject", "operator": operator, "values": []any{"enabled"}}
	}
	exists := expression{"key": "sluice.dev/inject", "operator": "Exists"}
	notDisabled := expression{"key": "sluice.dev/inject", "operator": "NotIn", "values": []any{"disabled"}}
	want := func(name string, namespace expression, pod ...any) any {
		return map[string]any{
			"name":                    name + ".inject.sluice.dev",
			"admissionReviewVersions": []any{"v1"},
			"clientConfig": map[string]any{"service": map[string]any{
				"name": "sluice-webhook", "namespace": "sluice-system", "path": "/inject", "port": uint64(443),
			}},
			"rules": []any{map[string]any{
				"apiGroups": []any{""}, "apiVersions": []any{"v1"}, "operations": []any{"CREATE"},
				"resources": []any{"pods"}, "scope": "Namespaced",
			}},
			"namespaceSelector": map[string]any{"matchExpressions": []any{namespace, namespaces}},
			"objectSelector":    map[string]any{"matchExpressions": pod},
			"matchConditions": []any{map[string]any{
				"name": "not-a-mirror-pod",
				"expression": "!has(object.metadata.annotations) || !('kubernetes.io/config.mirror' in " +
					"object.metadata.annotations)",
			}},
			"failurePolicy": "Fail", "matchPolicy": "Equivalent", "reinvocationPolicy": "IfNeeded",
			"sideEffects": "None", "timeoutSeconds": uint64(5),
		}
	}
	// In labelled namespaces every pod is injected unless its label says no;
	// elsewhere only pods with the label are.
	all := []any{want("namespace", enabled("In"), notDisabled), want("pod", enabled("NotIn"), exists, notDisabled)}
	if diff := cmp.Diff(all, config["webhooks"]); diff != "" {
		t.Errorf("webhooks (-want +got):\n%s", diff)
	}
}

func TestChartRights(t *testing.T) {
	all := render(t)
	rules := map[string]any{}
	for _, o := range all {
		if o["rules"] != nil {
			rules[id(o)] = o["rules"]
		}
	}
	want := map[string]any{
		"Role/sluice-webhook": []any{map[string]any{
			"apiGroups": []any{""}, "resources": []any{"secrets"}, "resourceNames": []any{"sluice-webhook-ca"},
			"verbs": []any{"get", "update"},
		}},
		"ClusterRole/sluice-injector.sluice-system": []any{map[string]any{
			"apiGroups": []any{"admissionregistration.k8s.io"}, "resources": []any{"mutatingwebhookconfigurations"},
			"resourceNames": []any{"sluice-injector.sluice-system"}, "verbs": []any{"get", "patch"},
		}},
	}
	if diff := cmp.Diff(want, rules); diff != "" {
		t.Errorf("rights (-want +got):\n%s", diff)
	}
	// A template with data would reset what the webhook has stored at each
	// upgrade.
	if secret := find(t, all, "Secret/sluice-webhook-ca"); secret["data"] != nil || secret["stringData"] != nil {
		t.Error("the CA's Secret is not empty")
	}
}

// The values for TLS set certificates, client certificates and network
// policies.
func TestChartCertificates(t *testing.T) {
	all := render(t, sets["certificates of clients"]...)
	var config any
	if err := yaml.Unmarshal([]byte(at(find(t, all, "ConfigMap/sluice-gateway"), "data", "sluice.yaml").(string)),
		&config); err != nil {
		t.Fatal(err)
	}
	want := map[string]any{
		"listen": map[string]any{"admin": "127.0.0.1:9002", "tls": map[string]any{
			"cert_file": "/etc/sluice-tls/tls.crt", "key_file": "/etc/sluice-tls/tls.key",
			"client_ca_file": "/etc/sluice-tls/ca.crt",
			"client_names":   []any{"spiffe://cluster.local/ns/gateways/*"},
		}},
		"limits": []any{map[string]any{"name": "all", "rate": "1/s", "key": `request.headers["a"]`}},
	}
	if diff := cmp.Diff(want, config); diff != "" {
		t.Errorf("the config (-want +got):\n%s", diff)
	}
	pod := func(deployment string) any { return at(find(t, all, deployment), "spec", "template", "spec") }
	mounted := func(pod any, name, path string, volume any) {
		t.Helper()
		container := at(pod, "containers").([]any)[0]
		mounts, volumes := at(container, "volumeMounts").([]any), at(pod, "volumes").([]any)
		i, j := indexByName(mounts, name), indexByName(volumes, name)
		if i < 0 || j < 0 {
			t.Fatalf("no %s: %v, %v", name, mounts, volumes)
		}
		if diff := cmp.Diff([]any{map[string]any{"name": name, "mountPath": path, "readOnly": true}, volume},
			[]any{mounts[i], volumes[j]}); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
	}
	mounted(pod("Deployment/sluice-gateway"), "tls", "/etc/sluice-tls",
		map[string]any{"name": "tls", "secret": map[string]any{"secretName": "sluice-gateway-tls",
			"defaultMode": uint64(0o444)}})
	mounted(pod("Deployment/sluice-webhook"), "client-ca", "/etc/sluice-client-ca",
		map[string]any{"name": "client-ca", "configMap": map[string]any{"name": "api"}})
	args := fmt.Sprint(at(at(pod("Deployment/sluice-webhook"), "containers").([]any)[0], "args"))
	if !strings.Contains(args, "--client-ca-file=/etc/sluice-client-ca/ca.crt") ||
		!strings.Contains(args, "--client-name=api") {
		t.Errorf("%s", args)
	}
	if secret := at(find(t, all, "Certificate/sluice-gateway"), "spec", "secretName"); secret != "sluice-gateway-tls" {
		t.Errorf("cert-manager writes %v", secret)
	}
	port := at(find(t, all, "Service/sluice-gateway"), "spec", "ports").([]any)[0]
	if protocol := at(port, "appProtocol"); protocol != "https" {
		t.Errorf("appProtocol is %v", protocol)
	}
	metrics := map[string]any{"ports": []any{map[string]any{"port": uint64(9003), "protocol": "TCP"}},
		"from": []any{map[string]any{"ipBlock": map[string]any{"cidr": "10.0.0.0/8"}}}}
	for policy, first := range map[string]any{
		"NetworkPolicy/sluice-gateway": map[string]any{
			"ports": []any{map[string]any{"port": uint64(9001), "protocol": "TCP"}},
			"from": []any{map[string]any{"namespaceSelector": map[string]any{
				"matchLabels": map[string]any{"kubernetes.io/metadata.name": "gateways"},
			}}},
		},
		"NetworkPolicy/sluice-webhook": map[string]any{
			"ports": []any{map[string]any{"port": uint64(8443), "protocol": "TCP"}},
			"from":  []any{map[string]any{"ipBlock": map[string]any{"cidr": "192.0.2.3/32"}}},
		},
	} {
		if diff := cmp.Diff([]any{first, metrics}, at(find(t, all, policy), "spec", "ingress")); diff != "" {
			t.Errorf("%s (-want +got):\n%s", policy, diff)
		}
	}
	// The user's own Secret, and a config that sets listen.tls itself.
	all = render(t, "--set", "gateway.enabled=true,gateway.redis.url=redis://r,gateway.tls.secret=mine,"+
		"gateway.existingConfigMap=limits")
	mounted(pod("Deployment/sluice-gateway"), "tls", "/etc/sluice-tls",
		map[string]any{"name": "tls", "secret": map[string]any{"secretName": "mine", "defaultMode": uint64(0o444)}})
	// TLS without client certificates.
	all = render(t, "--set", "gateway.enabled=true,gateway.redis.url=redis://r,gateway.tls.secret=mine,"+
		"gateway.tls.clientCertificates=false")
	if text := fmt.Sprint(at(find(t, all, "ConfigMap/sluice-gateway"), "data")); !strings.Contains(text, "tls.crt") ||
		strings.Contains(text, "client") {
		t.Errorf("%s", text)
	}
}

func TestManifestsAreTheChart(t *testing.T) {
	const namespace = `apiVersion: v1
kind: Namespace
metadata:
  name: sluice-system
  labels:
    pod-security.kubernetes.io/enforce: restricted
`
	for file, c := range map[string]struct {
		first string
		args  []string
	}{
		"sluice.yaml": {namespace, nil},
		"trial-redis.yaml": {"", []string{"--show-only", "templates/trial-redis.yaml", "--set",
			"trialRedis.enabled=true"}},
	} {
		chart, err := rendered(t, append([]string{"--no-hooks"}, c.args...)...)
		if err != nil {
			t.Fatal(err)
		}
		want := "# Generated from the chart by `go test ./k8s -run TestManifests -update`.\n" + c.first +
			regexp.MustCompile(`(?m)^# Source: .*\n`).ReplaceAllString(chart, "")
		want = regexp.MustCompile(`\n\n+`).ReplaceAllString(want, "\n")
		path := filepath.Join("manifests", file)
		if *update {
			if err := os.WriteFile(path, []byte(want), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		got, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, string(got)); diff != "" {
			t.Errorf("%s is not the chart's; see its first line (-chart +file):\n%s", path, diff)
		}
	}
}
