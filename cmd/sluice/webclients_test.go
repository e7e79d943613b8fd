package main

import (
	"bytes"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/protobuf/proto"

	"github.com/sluiceproxy/sluice/envoy"
)

// replaced returns a change of a bootstrap that replaces texts, given as old,
// new, old, new. It fails the test if a text is not there.
func replaced(t testing.TB, pairs ...string) func(string) string {
	return func(bootstrap string) string {
		t.Helper()
		for i := 0; i < len(pairs); i += 2 {
			if !strings.Contains(bootstrap, pairs[i]) {
				t.Fatalf("the bootstrap has no %q", pairs[i])
			}
			bootstrap = strings.Replace(bootstrap, pairs[i], pairs[i+1], 1)
		}
		return bootstrap
	}
}

// withOrigin returns a change of a bootstrap that puts its commented CORS
// policy into force, for one origin.
func withOrigin(t testing.TB, origin string) func(string) string {
	return func(bootstrap string) string {
		t.Helper()
		before, policy, _ := strings.Cut(bootstrap, "              # typed_per_filter_config:\n")
		policy, after, ok := strings.Cut(policy, "              routes:\n")
		if !ok {
			t.Fatal("the bootstrap has no commented CORS policy")
		}
		policy = strings.ReplaceAll(policy, "              # ", "              ")
		return replaced(t, "https://app.example.com", origin)(
			before + "              typed_per_filter_config:\n" + policy + "              routes:\n" + after)
	}
}

// withGRPCWeb puts the printed grpc_web filter into force, as its comment says.
func withGRPCWeb(t testing.TB) func(string) string {
	return replaced(t, "            disabled: true\n", "",
		"use_downstream_protocol_config: { http2_protocol_options: {} }",
		"explicit_http_config: { http2_protocol_options: {} }")
}

// grpcWebLast returns a change of a bootstrap of withGRPCWeb that puts the
// filter after ext_authz.
func grpcWebLast(t testing.TB) func(string) string {
	const filter = `          - name: envoy.filters.http.grpc_web
            typed_config:
              "@type": type.googleapis.com/envoy.extensions.filters.http.grpc_web.v3.GrpcWeb
`
	const router = "          - name: envoy.filters.http.router\n"
	return replaced(t, filter, "", router, filter+router)
}

// patiently returns a change of a bootstrap that lets Envoy wait for sluice
// even on a busy machine.
func patiently(t testing.TB) func(string) string {
	return func(bootstrap string) string {
		// For Envoy 1.36 the interval bounds each try.
		bootstrap = strings.ReplaceAll(bootstrap, "max_interval: 0.2s", "max_interval: 20s")
		return replaced(t, "timeout: 0.2s", "timeout: 20s")(bootstrap)
	}
}

// aDay reports whether text is a wait in seconds for a token of a limit of 1/d
// that was used up just now.
func aDay(text string) bool {
	seconds, err := strconv.Atoi(text)
	return err == nil && 86400-int(within.Seconds()) < seconds && seconds <= 86400
}

// TestBrowserOnAnotherOrigin checks with a real browser that a page on another
// origin can read a denial, by fetch, and that preflights are not charged.
func TestBrowserOnAnotherOrigin(t *testing.T) {
	up := startUpstream(t)
	p := startSluice(t, "--config", file(t, "sluice.yaml", `
limits:
  - {name: api, rate: 1/d, burst: 2, match: {paths: ["/api/**"]}}
  - {name: calls, rate: 1/d, burst: 1, match: {paths: ["/grpc.health.v1.Health/Check"]}}
`))
	pages := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/html")
		_, _ = io.WriteString(w, "<!DOCTYPE html><link rel=icon href='data:,'><title>a page</title>")
	}))
	t.Cleanup(pages.Close)
	// The gRPC-Web calls need HTTP/2 to the upstream, which serves the others by
	// it, too.
	addr := startEnvoy(t, p.grpc, up.Listener.Addr().String(), withOrigin(t, pages.URL), withGRPCWeb(t), patiently(t))

	t.Run("a preflight", func(t *testing.T) {
		r, err := http.NewRequestWithContext(t.Context(), http.MethodOptions, "http://"+addr+"/api/0", nil)
		if err != nil {
			t.Fatal(err)
		}
		r.Header = http.Header{"Origin": {pages.URL}, "Access-Control-Request-Method": {"GET"},
			"Access-Control-Request-Headers": {"authorization"}}
		response, err := client(t).Do(r)
		if err != nil {
			t.Fatal(err)
		}
		_ = response.Body.Close()
		if response.StatusCode != http.StatusOK || response.Header.Get("Access-Control-Allow-Origin") != pages.URL ||
			about(response.Header) != "" {
			t.Errorf("%d %v", response.StatusCode, response.Header)
		}
	})

	b := startBrowser(t)
	b.open(pages.URL + "/")
	fetched := func(t *testing.T, expression string) (answer struct {
		Status  int
		Headers map[string]string
		Body    string
	}) {
		t.Helper()
		text, _ := b.eval(`(async () => {
			const r = await ` + expression + `;
			return JSON.stringify({Status: r.status, Headers: Object.fromEntries(r.headers),
				Body: btoa(String.fromCharCode(...new Uint8Array(await r.arrayBuffer())))});
		})().catch((e) => "" + e)`).(string)
		if err := json.Unmarshal([]byte(text), &answer); err != nil {
			t.Fatalf("%s: %s", expression, text)
		}
		body, err := base64.StdEncoding.DecodeString(answer.Body)
		if err != nil {
			t.Fatal(err)
		}
		answer.Body = string(body)
		return answer
	}
	t.Run("HTTP", func(t *testing.T) {
		for i, want := range []string{"200 1", "200 0", "429 0"} {
			// The browser sends a preflight for each path because of the
			// header.
			got := fetched(t, fmt.Sprintf("fetch('http://%s/api/%d', {headers: {authorization: 'x'}})", addr, i))
			if said := fmt.Sprint(got.Status, " ", got.Headers["x-ratelimit-remaining"]); said != want {
				t.Errorf("the page reads %q, want %q", said, want)
			}
			denied := got.Status == http.StatusTooManyRequests
			if wait := got.Headers["retry-after"]; aDay(wait) != denied ||
				strings.Contains(got.Body, `"retry_after":`+wait+`}`) != denied {
				t.Errorf("the page reads a retry-after of %q, and %q", wait, got.Body)
			}
		}
	})
	t.Run("gRPC-Web", func(t *testing.T) {
		for _, want := range []codes.Code{codes.OK, codes.ResourceExhausted} {
			got := fetched(t, fmt.Sprintf(`fetch('http://%s/grpc.health.v1.Health/Check', {method: 'POST',
				headers: {'content-type': 'application/grpc-web+proto', 'x-grpc-web': '1'}, body: new Uint8Array(5)})`,
				addr))
			header := http.Header{}
			for name, value := range got.Headers {
				header.Set(name, value)
			}
			code, message := grpcWebStatus(t, header, []byte(got.Body))
			if code != want {
				t.Errorf("the page reads %v %q, want %v", code, message, want)
			}
			if denied := want == codes.ResourceExhausted; got.Status != http.StatusOK ||
				isDenial(message, header) != denied || (got.Body == "") != denied {
				t.Errorf("the page reads %d %q %v %q", got.Status, message, header, got.Body)
			}
		}
	})
}

// isDenial reports whether a gRPC-Web response has the message and the
// retry-after of a denial by the limit calls, of 1/d.
func isDenial(message string, header http.Header) bool {
	wait := header.Get("Retry-After")
	return aDay(wait) && message == `Rate limit "calls" exceeded. Retry in `+wait+` s.`
}

// isProblem reports whether a response has the body of a 429 by the limit
// calls.
func isProblem(header http.Header, body []byte) bool {
	return header.Get("Content-Type") == "application/problem+json" &&
		strings.Contains(string(body), `"status":429`) && strings.Contains(string(body), `"limit":"calls"`)
}

// googleStatus returns the status of a gRPC-Web response as the npm package
// grpc-web (2.1.1) reads it.
func googleStatus(t *testing.T, status int, header http.Header, body []byte) (codes.Code, string) {
	t.Helper()
	contentType := header.Get("Content-Type")
	switch {
	case contentType != "" && !strings.HasPrefix(contentType, "application/grpc"):
		return codes.Unknown, "Unknown Content-type received."
	case status == http.StatusOK:
		return grpcWebStatus(t, header, body)
	case status == http.StatusTooManyRequests:
		return codes.ResourceExhausted, ""
	default:
		t.Fatalf("HTTP status %d", status)
		return codes.Unknown, ""
	}
}

// connectStatus returns the status of a gRPC-Web response as the npm package
// @connectrpc/connect-web (2.3.0) reads it.
func connectStatus(t *testing.T, status int, header http.Header, body []byte) (codes.Code, string) {
	t.Helper()
	switch status {
	case http.StatusOK:
		return grpcWebStatus(t, header, body)
	case http.StatusTooManyRequests:
		return codes.Unavailable, header.Get("Grpc-Message")
	default:
		t.Fatalf("HTTP status %d", status)
		return codes.Unknown, ""
	}
}

// grpcWebStatus returns the status of a gRPC-Web response from its headers or
// from the trailers in its body.
func grpcWebStatus(t *testing.T, header http.Header, body []byte) (codes.Code, string) {
	t.Helper()
	if header.Get("Grpc-Status") == "" {
		if strings.HasPrefix(header.Get("Content-Type"), "application/grpc-web-text") {
			text := body
			body = nil
			// A stream of text may have padding within it.
			for part := range strings.SplitAfterSeq(string(text), "=") {
				if strings.Trim(part, "=") == "" {
					continue
				}
				decoded, err := base64.RawStdEncoding.DecodeString(strings.TrimRight(part, "="))
				if err != nil {
					t.Fatalf("%q: %v", text, err)
				}
				body = append(body, decoded...)
			}
		}
		header = grpcWebTrailers(t, body)
	}
	code, err := strconv.ParseUint(header.Get("Grpc-Status"), 10, 32)
	if err != nil {
		t.Fatalf("no status in %v %q", header, body)
	}
	return codes.Code(code), header.Get("Grpc-Message")
}

// grpcWebTrailers returns the trailers of a gRPC-Web body. Before them is one
// health response at most, which has to be SERVING.
func grpcWebTrailers(t *testing.T, body []byte) http.Header {
	t.Helper()
	const trailers = 0x80 // the flag of their frame
	header := http.Header{}
	for frame := body; len(frame) > 0; {
		if len(frame) < 5 || int(binary.BigEndian.Uint32(frame[1:])) > len(frame)-5 {
			t.Fatalf("a frame of %q is cut", body)
		}
		end := 5 + int(binary.BigEndian.Uint32(frame[1:]))
		payload := frame[5:end]
		if frame[0]&trailers == 0 {
			var health grpc_health_v1.HealthCheckResponse
			if err := proto.Unmarshal(payload, &health); err != nil ||
				health.GetStatus() != grpc_health_v1.HealthCheckResponse_SERVING {
				t.Errorf("%v %v", &health, err)
			}
		} else {
			for line := range strings.SplitSeq(string(payload), "\r\n") {
				if name, value, ok := strings.Cut(line, ":"); ok {
					header.Add(strings.TrimSpace(name), strings.TrimSpace(value))
				}
			}
		}
		frame = frame[end:]
	}
	return header
}

// grpcWebCall makes a call to the health service by gRPC-Web, over HTTP/1.1.
func grpcWebCall(t *testing.T, addr, contentType string, headers ...string) (*http.Response, []byte) {
	t.Helper()
	message := make([]byte, 5) // an empty message
	if strings.HasPrefix(contentType, "application/grpc-web-text") {
		message = []byte(base64.StdEncoding.EncodeToString(message))
	}
	r, err := http.NewRequestWithContext(t.Context(), http.MethodPost,
		"http://"+addr+grpc_health_v1.Health_Check_FullMethodName, bytes.NewReader(message))
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("Content-Type", contentType)
	r.Header.Set("Accept", contentType)
	for i := 0; i < len(headers); i += 2 {
		r.Header.Set(headers[i], headers[i+1])
	}
	response, err := client(t).Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = response.Body.Close() }()
	body, err := io.ReadAll(response.Body)
	if err != nil {
		t.Fatal(err)
	}
	return response, body
}

// TestGRPCWeb checks what clients of gRPC-Web read from a denial, by where
// Envoy's grpc_web filter stands.
func TestGRPCWeb(t *testing.T) {
	up := startUpstream(t)
	type reading struct {
		httpStatus int
		problem    bool // the body
		// What clients read.
		google, connect codes.Code
	}
	asHTTP := reading{http.StatusTooManyRequests, true, codes.Unknown, codes.Unavailable}
	for name, test := range map[string]struct {
		change []func(string) string
		want   reading
		// bare is for a client that does not send x-grpc-web.
		bare reading
	}{
		"disabled, as printed": {nil, asHTTP, asHTTP},
		"before sluice": {
			[]func(string) string{withGRPCWeb(t)},
			reading{http.StatusOK, false, codes.ResourceExhausted, codes.ResourceExhausted},
			// grpc_web makes grpc-status 14, since sluice sees a gRPC call.
			reading{http.StatusTooManyRequests, false, codes.ResourceExhausted, codes.Unavailable},
		},
		"after sluice": {[]func(string) string{withGRPCWeb(t), grpcWebLast(t)}, asHTTP, asHTTP},
	} {
		t.Run(name, func(t *testing.T) {
			p := startSluice(t, "--config", file(t, "sluice.yaml", `
limits: [{name: calls, rate: 1/d, burst: 1, key: 'request.headers["x-who"]'}]
`))
			addr := startEnvoy(t, p.grpc, up.Listener.Addr().String(), append(test.change, patiently(t))...)
			check := func(contentType string, want reading, headers ...string) {
				t.Helper()
				response, body := grpcWebCall(t, addr, contentType, headers...)
				if test.change == nil {
					// An app that speaks gRPC-Web itself has to see it.
					if got := up.got().Get("Content-Type"); got != contentType {
						t.Errorf("%s: the upstream sees %q", contentType, got)
					}
				} else if code, message := connectStatus(t, response.StatusCode, response.Header, body); code != codes.OK {
					t.Errorf("%s: %v %s", contentType, code, message)
				}
				response, body = grpcWebCall(t, addr, contentType, headers...)
				google, _ := googleStatus(t, response.StatusCode, response.Header, body)
				connect, message := connectStatus(t, response.StatusCode, response.Header, body)
				got := reading{response.StatusCode, isProblem(response.Header, body), google, connect}
				if got != want || !isDenial(message, response.Header) {
					t.Errorf("%s: %+v %q, want %+v; %v %q", contentType, got, message, want, response.Header, body)
				}
				if got.problem && response.Header.Get("Grpc-Status") != "8" {
					t.Errorf("%s: no grpc-status: %v", contentType, response.Header)
				}
			}
			for _, contentType := range []string{
				"application/grpc-web", "application/grpc-web+proto", "application/grpc-web-text",
				"application/grpc-web-text+proto",
			} {
				check(contentType, test.want, "X-Who", contentType, "X-Grpc-Web", "1")
			}
			check("application/grpc-web", test.bare, "X-Who", "bare")
		})
	}
}

// TestPrintedJWT checks that the JWT filter that is printed as a comment stands
// where sluice sees the claims, and where refused requests are not charged.
func TestPrintedJWT(t *testing.T) {
	up := startUpstream(t)
	config := file(t, "sluice.yaml",
		`limits: [{name: a, rate: 1/d, key: 'metadata.filter_metadata["envoy.filters.http.jwt_authn"].payload.sub'}]`)
	p := startSluice(t, "--config", config)
	issuer := newIssuer(t)
	bootstrap, err := envoy.Plain(envoy.Options{Listener: "127.0.0.1:0", Admin: "127.0.0.1:0", Sluice: p.grpc,
		Upstream: up.Listener.Addr().String(), Metadata: true})
	if err != nil {
		t.Fatal(err)
	}
	text := replaced(t, "/etc/envoy/jwks.json", file(t, "jwks.json", issuer.keys()))(
		uncommented(t, string(bootstrap), "- name: envoy.filters.http.jwt_authn"))
	binary, err := envoy.Binary(t.Context(), func(s string) { t.Log(s) })
	if err != nil {
		t.Fatal(err)
	}
	addr := startEnvoyOn(t, binary, []byte(text), patiently(t))
	ask := func(token string) int {
		t.Helper()
		response, _ := fetch(t, client(t), "http://"+addr+"/", "authorization", token)
		return response.StatusCode
	}
	one := issuer.token(map[string]any{"sub": "one"})
	got := []int{ask(one + "x"), ask(one), ask(one), ask(issuer.token(map[string]any{"sub": "two"})), ask("")}
	if want := []int{401, 200, 429, 200, 401}; !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
}
