//go:build linux

package k8s

import (
	"fmt"
	"net/http"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// pageOrigin is the origin of pages that call the app.
const pageOrigin = "https://app.example.com"

// asker sends a request through a proxy to the app. headers are name, value,
// name, value.
type asker func(t *testing.T, method, path string, headers ...string) answer

// fromPage checks that a page on pageOrigin can read a denial, and that its
// preflight is not charged. sluice allows one GET of /page.
func (ask asker) fromPage(t *testing.T) {
	t.Helper()
	var got []string
	for _, a := range []answer{
		ask(t, http.MethodOptions, "/page", "Origin", pageOrigin, "Access-Control-Request-Method", http.MethodGet),
		ask(t, http.MethodGet, "/page", "Origin", pageOrigin),
		ask(t, http.MethodGet, "/page", "Origin", pageOrigin),
	} {
		got = append(got, fmt.Sprint(a.status, " ", a.remaining, " ", a.origin))
	}
	if diff := cmp.Diff([]string{"200  " + pageOrigin, "200 0 " + pageOrigin, "429 0 " + pageOrigin}, got); diff != "" {
		t.Errorf("a page on another origin: -want +got:\n%s", diff)
	}
}

// byGRPCWeb checks the HTTP status of a denied gRPC-Web call, and that its
// grpc-status is RESOURCE_EXHAUSTED. The HTTP status is 200 if Envoy's grpc_web
// filter stands before sluice, and 429 otherwise. sluice allows one POST of
// /shop.Web/Call.
func (ask asker) byGRPCWeb(t *testing.T, status int) {
	t.Helper()
	call := func() answer {
		return ask(t, http.MethodPost, "/shop.Web/Call", "Content-Type", "application/grpc-web+proto", "X-Grpc-Web", "1")
	}
	call() // allowed; the app does not know the protocol
	if a := call(); a.status != status || a.grpcStatus != "8" || a.remaining != "0" {
		t.Errorf("a gRPC-Web call: %+v", a)
	}
}
