package main

import (
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"testing"

	"github.com/sluiceproxy/sluice/k8s/testenv"
)

// TestFrameworksGRPCWeb checks in a real browser what the npm packages grpc-web
// and @connectrpc/connect-web read from a denial, by where Envoy's grpc_web
// filter stands.
func TestFrameworksGRPCWeb(t *testing.T) {
	if os.Getenv("SLUICE_LONG") == "" {
		t.Skip("installs clients: SLUICE_LONG=1")
	}
	dir := filepath.Join(frameworkDir, "grpcweb")
	home := testenv.Packages(t, []string{filepath.Join(dir, "package.json"), filepath.Join(dir, "package-lock.json")},
		"npm", "ci", "--no-audit", "--no-fund")
	files := http.NewServeMux()
	files.Handle("/node_modules/", http.FileServer(http.Dir(home)))
	files.Handle("/clients.js", http.FileServer(http.Dir(dir)))
	files.HandleFunc("/{$}", func(w http.ResponseWriter, _ *http.Request) {
		_, _ = io.WriteString(w, `<!DOCTYPE html><link rel=icon href="data:,"><title>a page</title>
<script type=importmap>{"imports": {
	"grpc-web": "/node_modules/grpc-web/index.esm.js",
	"@connectrpc/connect-web": "/node_modules/@connectrpc/connect-web/dist/esm/index.js",
	"@connectrpc/connect": "/node_modules/@connectrpc/connect/dist/esm/index.js",
	"@connectrpc/connect/protocol": "/node_modules/@connectrpc/connect/dist/esm/protocol/index.js",
	"@connectrpc/connect/protocol-connect": "/node_modules/@connectrpc/connect/dist/esm/protocol-connect/index.js",
	"@connectrpc/connect/protocol-grpc-web": "/node_modules/@connectrpc/connect/dist/esm/protocol-grpc-web/index.js",
	"@bufbuild/protobuf": "/node_modules/@bufbuild/protobuf/dist/esm/index.js",
	"@bufbuild/protobuf/codegenv2": "/node_modules/@bufbuild/protobuf/dist/esm/codegenv2/index.js",
	"@bufbuild/protobuf/wire": "/node_modules/@bufbuild/protobuf/dist/esm/wire/index.js",
	"@bufbuild/protobuf/wkt": "/node_modules/@bufbuild/protobuf/dist/esm/wkt/index.js"
}}</script>
`)
	})
	pages := httptest.NewServer(files)
	t.Cleanup(pages.Close)
	b := startBrowser(t)
	b.open(pages.URL + "/")
	up := startUpstream(t)

	const (
		denial    = `Rate limit "calls" exceeded\. Retry in \d+ s\.`
		exhausted = `8 ` + denial
	)
	for name, test := range map[string]struct {
		change []func(string) string
		// What the packages read, as code and message.
		google, connect string
	}{
		"disabled, as printed": {nil, `2 Unknown Content-type received\.`, `14 ` + denial},
		"before sluice":        {[]func(string) string{withGRPCWeb(t)}, exhausted, exhausted},
		"after sluice": {
			[]func(string) string{withGRPCWeb(t), grpcWebLast(t)}, `2 Unknown Content-type received\.`, `14 ` + denial,
		},
	} {
		t.Run(name, func(t *testing.T) {
			p := startSluice(t, "--config", file(t, "sluice.yaml", `limits: [{name: calls, rate: 1/d, burst: 3}]`))
			addr := startEnvoy(t, p.grpc, up.Listener.Addr().String(),
				append(test.change, withOrigin(t, pages.URL), patiently(t))...)
			calls := []struct{ function, argument, denied string }{
				{"google", ", 'binary'", test.google},
				{"google", ", 'text'", test.google},
				{"connect", "", test.connect},
			}
			call := func(function, argument string) string {
				return fmt.Sprint(b.eval(fmt.Sprintf("import('/clients.js').then((c) => c.%s('%s'%s))",
					function, addr, argument)))
			}
			for _, c := range calls {
				// Without the filter the upstream does not know gRPC-Web.
				if got := call(c.function, c.argument); test.change != nil && got != "0 " {
					t.Errorf("%s%s reads %q from an answer", c.function, c.argument, got)
				}
			}
			for _, c := range calls {
				if got := call(c.function, c.argument); !regexp.MustCompile("^" + c.denied + "$").MatchString(got) {
					t.Errorf("%s%s reads %q from a denial, want %s", c.function, c.argument, got, c.denied)
				}
			}
		})
	}
}
