package k8s

import (
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/goccy/go-yaml"
	"github.com/google/go-cmp/cmp"
)

func TestChartRefuses(t *testing.T) {
	for name, c := range map[string]struct{ set, want string }{
		"unknown value":         {"webhok.replicas=2", "webhok"},
		"no replicas":           {"webhook.replicas=0", "replicas"},
		"name that is too long": {"fullnameOverride=" + strings.Repeat("a", 41), "fullnameOverride"},
		"tag as digest":         {"image.digest=v1", "digest"},
		"gateway without Redis": {"gateway.enabled=true", "gateway.redis.secret"},
		"two Redis URLs": {"gateway.enabled=true,gateway.redis.url=redis://a,gateway.redis.secret=b",
			"mutually exclusive"},
		"no Redis URL":                     {"gateway.redis.url=http://a", "url"},
		"no memory limit":                  {"webhook.resources.limits.memory=null", "memory"},
		"tests in the release's namespace": {"tests.namespace=sluice-system", "tests.namespace"},
		"tests in an excluded namespace":   {"webhook.excludedNamespaces={default}", "tests.namespace"},
		"issuer without a name":            {"certManager.issuerRef.kind=ClusterIssuer", "issuerRef"},
		"invalid port":                     {"networkPolicy.apiServerPorts={70000}", "apiServerPorts"},
		"interval without its unit":        {"serviceMonitor.interval=30", "interval"},
		"two certificates": {"gateway.enabled=true,gateway.redis.url=redis://a," +
			"gateway.tls.secret=a,gateway.tls.issuerRef.name=b", "mutually exclusive"},
		"names without TLS": {"gateway.enabled=true,gateway.redis.url=redis://a," +
			"gateway.tls.clientNames={a}", "clientNames"},
		"names without client certificates": {"gateway.enabled=true,gateway.redis.url=redis://a," +
			"gateway.tls.secret=a,gateway.tls.clientCertificates=false,gateway.tls.clientNames={a}", "clientNames"},
		"listen.tls twice": {"gateway.enabled=true,gateway.redis.url=redis://a,gateway.tls.secret=a," +
			"gateway.config=listen: {tls: {cert_file: x}}", "gateway.config"},
		"invalid YAML": {"gateway.enabled=true,gateway.redis.url=redis://a,gateway.tls.secret=a," +
			"gateway.config=a: b: c", "gateway.config"},
		"names without a CA": {"webhook.clientCA.names={a}", "webhook.clientCA"},
		"root":               {"runAsUser=0", "runAsUser"},
		"name of a user":     {"runAsUser=nobody", "runAsUser"},
		"one port twice":     {"webhook.port=9003", "webhook.metricsPort"},
		"other resources":    {"webhook.sidecarResources.claims=x", "sidecarResources"},
		"invalid peer":       {"networkPolicy.from[0]=a", "from"},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := rendered(t, "--set", c.set); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("--set %s: %v, want an error with %q", c.set, err, c.want)
			}
		})
	}
}

// otherValues returns for each value of the chart, as JSON, one that is not its
// default, and the options with which all of them have an effect.
func otherValues() (base []string, others map[string]string) {
	for _, group := range []string{"gateway", "trialRedis", "networkPolicy", "serviceMonitor", "certManager"} {
		base = append(base, "--set-json", group+".enabled=true") // --set would take precedence over later options
	}
	base = append(base, "--set-json", `gateway.tls.secret="tls"`, "--set-json", `webhook.clientCA.configMap="ca"`)
	place := func(group string) map[string]string {
		return map[string]string{
			group + ".replicas": `3`, group + ".resources.requests.cpu": `"1"`, group +
				".resources.requests.memory": `"96Mi"`, group + ".resources.limits.memory": `"1Gi"`,
			group + ".priorityClassName": `"p"`, group + ".nodeSelector": `{"a":"b"}`, group +
				".tolerations": `[{"operator":"Exists"}]`,
			group + ".affinity": `{"podAntiAffinity":{}}`, group + ".podAnnotations": `{"a":"b"}`, group +
				".podDisruptionBudget.enabled": `false`,
		}
	}
	others = map[string]string{
		"fullnameOverride": `"other"`, "image.repository": `"other"`, "image.tag": `"other"`,
		"image.digest":     `"sha256:` + strings.Repeat("0", 64) + `"`,
		"image.pullPolicy": `"Never"`, "imagePullSecrets": `[{"name":"a"}]`, "webhook.enabled": `false`,
		"runAsUser": `"platform"`, "webhook.port": `8444`, "webhook.metricsPort": `9004`, "webhook.hostNetwork": `true`,
		"webhook.sidecarResources": `{"limits":{"cpu":"1"}}`,
		"webhook.sidecarImage":     `"other"`, "webhook.excludedNamespaces": `["a"]`,
		"certManager.enabled": `false`, "certManager.issuerRef": `{"name":"a"}`, "gateway.enabled": `false`,
		"gateway.config":            `"domain: a"`,
		"gateway.existingConfigMap": `"a"`, "gateway.domain": `"a"`, "gateway.redis.url": `"redis://a"`,
		"gateway.redis.secret": `"a"`,
		"trialRedis.enabled":   `false`, "trialRedis.image": `"a"`, "trialRedis.pullPolicy": `"Never"`,
		"trialRedis.resources.requests.cpu":    `"1"`,
		"trialRedis.resources.requests.memory": `"96Mi"`, "trialRedis.resources.limits.memory": `"1Gi"`,
		"networkPolicy.enabled": `false`, "networkPolicy.apiServerPorts": `[8443]`,
		"networkPolicy.from":        `[{"podSelector":{}}]`,
		"networkPolicy.metricsFrom": `[{"podSelector":{}}]`, "networkPolicy.webhookFrom": `[{"podSelector":{}}]`,
		"gateway.tls.secret": `"a"`, "gateway.tls.issuerRef": `{"name":"a"}`,
		"gateway.tls.clientCertificates": `false`, "gateway.tls.clientNames": `["a"]`,
		"webhook.clientCA.configMap": `"a"`, "webhook.clientCA.names": `["a"]`,
		"serviceMonitor.enabled": `false`, "serviceMonitor.interval": `"1m"`, "serviceMonitor.labels": `{"a":"b"}`,
		"tests.namespace": `"a"`,
	}
	maps.Copy(others, place("webhook"))
	maps.Copy(others, place("gateway"))
	return base, others
}

// withOther returns the options with another value, and with the options that
// it requires.
func withOther(base []string, path, other string) []string {
	args := append(slices.Clone(base), "--set-json", path+"="+other)
	switch path {
	case "trialRedis.enabled":
		args = append(args, "--set", "gateway.redis.url=redis://a")
	case "gateway.tls.issuerRef":
		args = append(args, "--set", "gateway.tls.secret=")
	}
	return args
}

// Every value has an effect on the rendering.
func TestChartValuesAreUsed(t *testing.T) {
	base, others := otherValues()
	text, err := os.ReadFile(filepath.Join(chartDir, "values.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	var values map[string]any
	if err := yaml.Unmarshal(text, &values); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(slices.Sorted(maps.Keys(others)),
		slices.Sorted(slices.Values(leaves("", values)))); diff != "" {
		t.Fatalf("values (-this test +values.yaml):\n%s", diff)
	}
	before, err := rendered(t, base...)
	if err != nil {
		t.Fatal(err)
	}
	for path, other := range others {
		args := withOther(base, path, other)
		if after, err := rendered(t, args...); err != nil {
			t.Errorf("%s: %v", path, err)
		} else if after == before {
			t.Errorf("%s changes nothing", path)
		}
	}
}

// A user ID stays the number that it is, and is that of all pods.
func TestChartUser(t *testing.T) {
	for set, want := range map[string]string{"runAsUser=1000680000": "1000680000", "runAsUser=platform": "", "runAsUser=null": "65532"} {
		text, err := rendered(t, "--set", set, "--set", "gateway.enabled=true,trialRedis.enabled=true")
		if err != nil {
			t.Fatal(err)
		}
		user := want
		if user == "" {
			user = PlatformUser
		}
		if !strings.Contains(text, "--run-as-user="+user+"\n") {
			t.Errorf("%s: sidecars have another user", set)
		}
		if got := regexp.MustCompile(`runAs(User|Group): (.*)`).FindAllStringSubmatch(text, -1); (len(got) == 0) != (want == "") ||
			slices.ContainsFunc(got, func(m []string) bool { return m[2] != want }) {
			t.Errorf("%s: %q", set, got)
		}
	}
}

// leaves returns the paths of all values that are not mappings, or are empty
// ones.
func leaves(prefix string, v map[string]any) []string {
	var all []string
	for name, v := range v {
		if m, ok := v.(map[string]any); ok && len(m) > 0 {
			all = append(all, leaves(prefix+name+".", m)...)
		} else {
			all = append(all, prefix+name)
		}
	}
	return all
}

// Every value has a comment above it, except those that have their meaning from
// Kubernetes or from the comment on their group.
func TestChartValuesAreDocumented(t *testing.T) {
	plain := []string{
		"enabled", "image", "repository", "pullPolicy", "replicas", "resources", "requests", "limits", "redis",
		"priorityClassName", "nodeSelector", "tolerations", "affinity", "podAnnotations",
	}
	text, err := os.ReadFile(filepath.Join(chartDir, "values.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	key, above := regexp.MustCompile(`^( *)([A-Za-z]+):`), ""
	for line := range strings.Lines(string(text)) {
		if m := key.FindStringSubmatch(line); m != nil && !strings.HasPrefix(strings.TrimSpace(above), "#") &&
			(m[1] == "" || !slices.Contains(plain, m[2])) {
			t.Errorf("%s%s has no comment above it", m[1], m[2])
		}
		above = line
	}
}
