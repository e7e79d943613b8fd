package envoy

import (
	"errors"
	"flag"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "write the files anew that people copy")

// chartTLS fits the certificate that the chart has cert-manager issue, and its
// default gateway.tls.clientCertificates.
var chartTLS = &TLS{Name: "sluice-gateway.sluice-system.svc", ClientCert: true}

// The YAML files in this directory are what the functions print.
func TestFiles(t *testing.T) {
	const socket = "unix:///run/sluice/authz.sock"
	for name, tt := range map[string]struct {
		print func(Options) ([]byte, error)
		o     Options
	}{
		"plain.yaml":                 {Plain, Options{}},
		"istio.yaml":                 {Istio, Options{}},
		"istio-claims.yaml":          {Istio, Options{Metadata: true}},
		"istio-gateway.yaml":         {IstioGateway, Options{}},
		"istio-waypoint.yaml":        {IstioWaypoint, Options{}},
		"envoy-gateway.yaml":         {Gateway, Options{}},
		"envoy-gateway-sidecar.yaml": {Gateway, Options{Sluice: socket}},
		"istio-gateway-tls.yaml":     {IstioGateway, Options{TLS: chartTLS}},
		"istio-waypoint-tls.yaml":    {IstioWaypoint, Options{TLS: chartTLS}},
		"envoy-gateway-tls.yaml":     {Gateway, Options{TLS: chartTLS}},
	} {
		got, err := tt.print(tt.o)
		if err != nil {
			t.Fatal(err)
		}
		if *update {
			if err := os.WriteFile(name, got, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		if want, err := os.ReadFile(name); err != nil || string(want) != string(got) {
			t.Errorf("%s is not what is printed (%v): go test ./envoy -run TestFiles -update", name, err)
		}
	}
}

// A real Envoy accepts every bootstrap that Plain returns.
func TestPlainIsAccepted(t *testing.T) {
	envoy := binary(t)
	for name, o := range map[string]Options{
		"defaults":     {},
		"unix socket":  {Sluice: "unix:///run/sluice/authz.sock"},
		"names":        {Upstream: "app.default.svc.cluster.local:80", Sluice: "sluice.local:9001"},
		"IPv6":         {Listener: "[::]:8443", Upstream: "[::1]:1", Sluice: "[::1]:9001", Admin: "[::1]:0"},
		"longest path": {Sluice: "unix://" + socket(107)},
		"odd but good": {Sluice: `unix:///run/a "quoted": {path}#x`},
		"1.36":         {Envoy: Release{1, 36}},
		"limits":       {Limits: []string{"per-client", "orders"}},
		"many limits":  {Limits: strings.Split(strings.Repeat("l,", 99)+"l", ",")},
	} {
		if o.Envoy == (Release{}) {
			o.Envoy = release(t)
		}
		bootstrap, err := Plain(o)
		if err != nil {
			t.Fatal(err)
		}
		// Envoy also accepts the commented example for a route.
		before, comment, ok := strings.Cut(string(bootstrap), "                # typed_per_filter_config:\n")
		if !ok {
			t.Fatal("the bootstrap does not show what a route may say")
		}
		bootstrap = []byte(
			before + "                typed_per_filter_config:\n" + strings.ReplaceAll(
				comment,
				"                #   ",
				"                  ",
			),
		)
		if o.Limits != nil &&
			!strings.Contains(string(bootstrap), "\n                        sluice.limits: \""+o.Limits[0]+",") {
			t.Errorf("%s: a route's choice of limits is not shown:\n%s", name, bootstrap)
		}
		file := filepath.Join(t.TempDir(), "envoy.yaml")
		if err := os.WriteFile(file, bootstrap, 0o600); err != nil {
			t.Fatal(err)
		}
		if out, err := exec.Command(envoy, "--mode", "validate", "-c", file, "-l", "error").CombinedOutput(); err != nil {
			t.Errorf("%s: %v\n%s", name, err, out)
		}
	}
}

// socket returns a path of n bytes.
func socket(n int) string { return "/" + strings.Repeat("s", n-1) }

func TestPlainRefuses(t *testing.T) {
	const unix = "want host:port, or unix:///absolute/path of at most 107 bytes"
	for want, o := range map[string]Options{
		`listener address "localhost:80": want IP:port`:        {Listener: "localhost:80"},
		`listener address "0.0.0.0": want IP:port`:             {Listener: "0.0.0.0"},
		`listener address "unix:///x": want IP:port`:           {Listener: "unix:///x"},
		`admin address "admin": want IP:port`:                  {Admin: "admin"},
		`upstream address "h:99999": want host:port`:           {Upstream: "h:99999"},
		`upstream address "h:0": want host:port`:               {Upstream: "h:0"},
		`upstream address ":80": want host:port`:               {Upstream: ":80"},
		`upstream address "h,:80": want host:port`:             {Upstream: "h,:80"},
		`upstream address "unix:///x": want host:port`:         {Upstream: "unix:///x"},
		`sluice address "127.0.0.1:0": ` + unix:                {Sluice: "127.0.0.1:0"},
		`sluice address "unix://x": ` + unix:                   {Sluice: "unix://x"},
		`sluice address "unix:///a\nb": ` + unix:               {Sluice: "unix:///a\nb"},
		`sluice address "unix:///\xff": ` + unix:               {Sluice: "unix:///\xff"},
		`sluice address "h\" }\nx: {:1": ` + unix:              {Sluice: "h\" }\nx: {:1"},
		`sluice address "unix://` + socket(108) + `": ` + unix: {Sluice: "unix://" + socket(108)},
	} {
		if _, err := Plain(o); err == nil || err.Error() != want {
			t.Errorf("%+v: %v, want %s", o, err, want)
		}
	}
}

// What is printed for TLS names the certificate and what verifies it.
func TestTLS(t *testing.T) {
	for name, tt := range map[string]struct {
		print func(Options) ([]byte, error)
		tls   TLS
		want  []string
		not   string
	}{
		"istio-gateway": {IstioGateway, TLS{Name: "a.example"},
			[]string{"mode: SIMPLE", `sni: "a.example"`, `subjectAltNames: ["a.example"]`}, "kind: Role"},
		"istio-waypoint": {IstioWaypoint, TLS{Name: "a.example", ClientCert: true},
			[]string{"mode: MUTUAL", "name: waypoint }"}, "mode: SIMPLE"},
		"envoy-gateway": {Gateway, TLS{Name: "a.example"},
			[]string{"kind: BackendTLSPolicy", `hostname: "a.example"`}, "backendTLS"},
		"a wildcard": {Gateway, TLS{Name: "*.sluice-system.svc", ClientCert: true},
			[]string{`hostname: "sluice-gateway.sluice-system.svc"`, "backendTLS:\n    clientCertificateRef"}, "*.sluice"},
		"istio": {Istio, TLS{}, []string{"kind: ServiceEntry"}, "DestinationRule"},
	} {
		got, err := tt.print(Options{TLS: &tt.tls})
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
		for _, want := range tt.want {
			if !strings.Contains(string(got), want) {
				t.Errorf("%s does not say %q", name, want)
			}
		}
		if strings.Contains(string(got), tt.not) {
			t.Errorf("%s says %q", name, tt.not)
		}
	}
	for _, print := range []func(Options) ([]byte, error){IstioGateway, IstioWaypoint, Gateway} {
		if _, err := print(Options{TLS: &TLS{}}); !errors.Is(err, ErrNoName) {
			t.Errorf("%v, want %v", err, ErrNoName)
		}
	}
}
