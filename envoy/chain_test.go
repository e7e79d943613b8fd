package envoy

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	typev3 "github.com/envoyproxy/go-control-plane/envoy/type/v3"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

// within is the timeout of every wait in these tests.
const within = 20 * time.Second

// authorizer stands in for sluice with constant answers. It denies paths with
// "denied" and the gRPC method Watch. It allows all else, with one rate-limit
// header for the client, in which /split has a line break, and one header for
// the upstream.
type authorizer struct {
	authv3.UnimplementedAuthorizationServer
	checks atomic.Int64
	claims atomic.Pointer[map[string]string] // the headers of the last check
}

func (a *authorizer) Check(_ context.Context, r *authv3.CheckRequest) (*authv3.CheckResponse, error) {
	a.checks.Add(1)
	request := r.GetAttributes().GetRequest().GetHttp()
	headers := make(map[string]string)
	for _, h := range request.GetHeaderMap().GetHeaders() {
		headers[h.GetKey()] = string(h.GetRawValue())
	}
	a.claims.Store(&headers)
	set := func(name, value string) *corev3.HeaderValueOption {
		return &corev3.HeaderValueOption{
			Header:       &corev3.HeaderValue{Key: name, Value: value},
			AppendAction: corev3.HeaderValueOption_OVERWRITE_IF_EXISTS_OR_ADD,
		}
	}
	limit := "5"
	if request.GetPath() == "/split" {
		limit += "\r\nx-ratelimit-split: 1"
	}
	if !strings.Contains(request.GetPath(), "denied") && !strings.HasSuffix(request.GetPath(), "/Watch") {
		return &authv3.CheckResponse{HttpResponse: &authv3.CheckResponse_OkResponse{OkResponse: &authv3.OkHttpResponse{
			Headers:              []*corev3.HeaderValueOption{set("x-sluice-shadow", "a,b")},
			ResponseHeadersToAdd: []*corev3.HeaderValueOption{set("x-ratelimit-limit", limit)},
		}}}, nil
	}
	denied := &authv3.DeniedHttpResponse{
		Status: &typev3.HttpStatus{Code: typev3.StatusCode_TooManyRequests},
		Headers: []*corev3.HeaderValueOption{
			set("x-ratelimit-limit", "5"),
			set("retry-after", "7"),
			set("x-envoy-ratelimited", "true"),
		},
		Body: "too many",
	}
	if strings.HasPrefix(headers["content-type"], "application/grpc") {
		denied.Headers = append(denied.Headers, set("grpc-status", "8"))
	}
	return &authv3.CheckResponse{
		Status:       &rpcstatus.Status{Code: int32(codes.ResourceExhausted)},
		HttpResponse: &authv3.CheckResponse_DeniedResponse{DeniedResponse: denied},
	}, nil
}

// listen serves a on addr, the path of a unix socket or IP:port, until stop is
// called.
func (a *authorizer) listen(t *testing.T, addr string) (at string, stop func()) {
	t.Helper()
	network := "tcp"
	if filepath.IsAbs(addr) {
		network = "unix"
	}
	l, err := net.Listen(network, addr)
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer()
	authv3.RegisterAuthorizationServer(server, a)
	served := make(chan error, 1)
	go func() { served <- server.Serve(l) }()
	stop = sync.OnceFunc(func() {
		server.GracefulStop()
		if err := <-served; err != nil {
			t.Errorf("the authorizer ended: %v", err)
		}
	})
	t.Cleanup(stop)
	return l.Addr().String(), stop
}

// lies has rate-limit headers that an upstream should not send.
var lies = []string{
	"X-Ratelimit-Limit",
	"X-RateLimit-Foo",
	"Ratelimit",
	"RateLimit-Policy",
	"Ratelimit-Bar",
	"X-Envoy-Ratelimited",
}

// upstream sends lies in its headers and trailers, over HTTP/1.1, HTTP/2 and
// gRPC.
type upstream struct {
	*httptest.Server
	last     atomic.Pointer[http.Header] // the headers of the last request
	trailers atomic.Pointer[http.Header] // and its trailers
}

func startUpstream(t *testing.T) *upstream {
	t.Helper()
	calls := grpc.NewServer(grpc.UnaryInterceptor(
		func(ctx context.Context, r any, _ *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
			md := metadata.MD{"x-kept": {"yes"}}
			for _, name := range lies {
				md.Append(name, "a lie")
			}
			_ = grpc.SetHeader(ctx, md)
			_ = grpc.SetTrailer(ctx, md)
			return next(ctx, r)
		}))
	grpc_health_v1.RegisterHealthServer(calls, health.NewServer())
	u := &upstream{}
	u.Server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		headers := r.Header.Clone()
		u.last.Store(&headers)
		if r.ProtoMajor == 2 && strings.HasPrefix(r.Header.Get("Content-Type"), "application/grpc") {
			calls.ServeHTTP(w, r)
			return
		}
		_, _ = io.Copy(io.Discard, r.Body)
		trailers := r.Trailer.Clone()
		u.trailers.Store(&trailers)
		for _, name := range lies {
			w.Header().Add(name, "a lie")
			w.Header().Add(http.TrailerPrefix+name, "a lie")
		}
		switch r.URL.Path {
		case "/socket":
			switchProtocols(w)
		case "/busy":
			w.Header().Set("Retry-After", "120")
			w.WriteHeader(http.StatusServiceUnavailable)
		default:
			code, err := strconv.Atoi(strings.TrimPrefix(r.URL.Path, "/"))
			if err != nil {
				code = http.StatusOK
			}
			w.WriteHeader(code)
		}
	}))
	u.Config.Protocols = new(http.Protocols)
	u.Config.Protocols.SetHTTP1(true)
	u.Config.Protocols.SetUnencryptedHTTP2(true)
	u.Start()
	t.Cleanup(u.Close)
	return u
}

// switchProtocols answers an upgrade with 101, and closes when the client does.
func switchProtocols(w http.ResponseWriter) {
	w.Header().Set("Connection", "Upgrade")
	w.Header().Set("Upgrade", "websocket")
	w.WriteHeader(http.StatusSwitchingProtocols)
	conn, _, err := http.NewResponseController(w).Hijack()
	if err != nil {
		return
	}
	defer func() { _ = conn.Close() }()
	_, _ = io.Copy(io.Discard, conn)
}

// startEnvoy starts an Envoy with the shipped filter chain and returns it and
// its address. routes precede the chain's own. replace has pairs of texts, old
// and new, to replace in the bootstrap.
func startEnvoy(t *testing.T, o Options, routes string, replace ...string) (*Process, string) {
	t.Helper()
	o.Listener, o.Admin, o.Envoy = "127.0.0.1:0", "127.0.0.1:0", release(t)
	bootstrap, err := Plain(o)
	if err != nil {
		t.Fatal(err)
	}
	const first = "              routes:\n"
	if !strings.Contains(string(bootstrap), first) {
		t.Fatal("the bootstrap has no routes")
	}
	text := strings.NewReplacer(append(replace, first, first+routes)...).Replace(string(bootstrap))
	p, err := Start(context.WithoutCancel(t.Context()), binary(t), []byte(text), io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Stop)
	addr, err := p.Listener(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return p, addr
}

// about returns the headers about limits, in lower case and sorted.
func about(headers map[string][]string) string {
	var all []string
	for name, values := range headers {
		if name = strings.ToLower(name); strings.Contains(name, "ratelimit") || strings.Contains(name, "sluice") ||
			name == "retry-after" {
			for _, v := range values {
				all = append(all, name+"="+v)
			}
		}
	}
	slices.Sort(all)
	return strings.Join(all, " ")
}

// Envoy removes what a client or an upstream says about limits and passes on
// what sluice says, on every kind of answer.
func TestChain(t *testing.T) {
	up := startUpstream(t)
	auth := &authorizer{}
	sluice, stop := auth.listen(t, "127.0.0.1:0")
	proxy, addr := startEnvoy(t, Options{Sluice: sluice, Upstream: up.Listener.Addr().String()}, `
              - match: { path: /direct }
                direct_response: { status: 418 }
              - match: { path: /redirect }
                redirect: { path_redirect: /elsewhere }
`)
	one, two := new(http.Protocols), new(http.Protocols)
	one.SetHTTP1(true)
	two.SetUnencryptedHTTP2(true)

	ask := func(t *testing.T, protocols *http.Protocols, path string) *http.Response {
		t.Helper()
		transport := &http.Transport{Protocols: protocols}
		defer transport.CloseIdleConnections()
		r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+addr+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		if protocols == two {
			r.Body, r.ContentLength = io.NopCloser(strings.NewReader("a body, for trailers come after one")), -1
			r.Trailer = http.Header{"X-Mine": {"kept"}, "X-Sluice-Shadow": {"forged"}}
			for _, name := range lies {
				r.Trailer.Set(name, "forged")
			}
		}
		r.Header = http.Header{
			"X-Mine":          {"kept"},
			"Te":              {"trailers"},
			"X-Sluice-Shadow": {"forged"},
			"X-Sluice-Other":  {"forged"},
		}
		for _, name := range lies {
			r.Header[name] = []string{"forged", "forged twice"}
		}
		if path == "/socket" {
			r.Header.Set("Connection", "Upgrade")
			r.Header.Set("Upgrade", "websocket")
		}
		up.last.Store(nil)
		noRedirects := func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
		response, err := (&http.Client{Transport: transport, Timeout: within, CheckRedirect: noRedirects}).Do(r)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = response.Body.Close() }()
		if response.StatusCode != http.StatusSwitchingProtocols {
			if _, err := io.Copy(io.Discard, response.Body); err != nil {
				t.Fatal(err)
			}
		}
		return response
	}
	const allowed = "x-ratelimit-limit=5"
	for _, tt := range []struct {
		path      string
		status    int
		about     string
		forwarded bool // to the upstream
	}{
		{"/200", 200, allowed, true},
		{"/304", 304, allowed, true},
		{"/404", 404, allowed, true},
		{"/500", 500, allowed, true},
		{"/busy", 503, "retry-after=120 " + allowed, true},
		{"/socket", 101, allowed, true},
		{"/direct", 418, allowed, false},
		{"/redirect", 301, allowed, false},
		{"/denied", 429, "retry-after=7 x-envoy-ratelimited=true " + allowed, false},
		{"/split", 500, "", false}, // Envoy refuses a header that would split the answer
	} {
		for name, protocols := range map[string]*http.Protocols{"HTTP/1.1": one, "HTTP/2": two} {
			if tt.path == "/socket" && protocols == two {
				continue // an upgrade is HTTP/1.1's
			}
			t.Run(name+tt.path, func(t *testing.T) {
				checks := auth.checks.Load()
				r := ask(t, protocols, tt.path)
				if got := about(r.Header); r.StatusCode != tt.status || got != tt.about {
					t.Errorf("the client got %d %s, want %d %s", r.StatusCode, got, tt.status, tt.about)
				}
				if got := about(r.Trailer); got != "" {
					t.Errorf("the client got trailers: %s", got)
				}
				if n := auth.checks.Load() - checks; n != 1 {
					t.Errorf("checked %d times", n)
				}
				for name := range *auth.claims.Load() {
					if strings.Contains(name, "ratelimit") || strings.Contains(name, "sluice") {
						t.Errorf("sluice was told the client's %s", name)
					}
				}
				switch got := up.last.Load(); {
				case (got != nil) != tt.forwarded:
					t.Errorf("forwarded: %v", got)
				case got != nil && (about(*got) != "x-sluice-shadow=a,b" || got.Get("X-Mine") != "kept"):
					t.Errorf("the upstream got %v", *got)
				case got != nil && protocols == two && (about(*up.trailers.Load()) != "" || up.trailers.Load().Get("X-Mine") != "kept"):
					t.Errorf("the upstream got trailers %v", *up.trailers.Load())
				}
			})
		}
	}

	t.Run("what sluice is told", func(t *testing.T) {
		conn, err := net.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = conn.Close() }()
		// A raw connection, since net/http would normalise the path.
		_, err = io.WriteString(
			conn,
			"GET /x/.././/200 HTTP/1.1\r\nHost: h\r\nConnection: close\r\nX-Forwarded-For: 198.51.100.1\r\nX-Envoy-External-Address: 198.51.100.2\r\n\r\n",
		)
		if err != nil {
			t.Fatal(err)
		}
		if answer, err := io.ReadAll(conn); err != nil || !strings.HasPrefix(string(answer), "HTTP/1.1 200 ") {
			t.Errorf("%v, %s", err, answer)
		}
		told := *auth.claims.Load()
		// For a peer on the loopback Envoy appends the machine's own address to x-forwarded-for.
		if told[":path"] != "/200" || !strings.HasPrefix(told["x-forwarded-for"], "198.51.100.1,") ||
			told["x-envoy-external-address"] != "127.0.0.1" {
			t.Errorf("%v", told)
		}
	})
	t.Run("a denial is no error of the upstream's", func(t *testing.T) {
		before := counter(t, proxy, "cluster.upstream.upstream_rq_429")
		ask(t, one, "/denied")
		if n := counter(t, proxy, "cluster.upstream.upstream_rq_429"); n != before {
			t.Errorf("%d of them", n-before)
		}
	})

	conn, err := grpc.NewClient("passthrough:///"+addr, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	t.Run("gRPC", func(t *testing.T) {
		var header, trailer metadata.MD
		ctx := metadata.AppendToOutgoingContext(t.Context(), "x-ratelimit-foo", "forged", "x-mine", "kept")
		_, err := grpc_health_v1.NewHealthClient(conn).
			Check(ctx, &grpc_health_v1.HealthCheckRequest{}, grpc.Header(&header), grpc.Trailer(&trailer))
		if err != nil || about(header) != allowed || about(trailer) != "" || len(trailer["x-kept"]) != 1 {
			t.Errorf("%v; header %v, trailer %v", err, header, trailer)
		}
		if got := up.last.Load(); about(*got) != "x-sluice-shadow=a,b" || got.Get("X-Mine") != "kept" {
			t.Errorf("the upstream got %v", *got)
		}
	})
	t.Run("gRPC, an error without a body", func(t *testing.T) {
		var header, trailer metadata.MD
		_, err := grpc_health_v1.NewHealthClient(conn).
			Check(t.Context(), &grpc_health_v1.HealthCheckRequest{Service: "unknown"},
				grpc.Header(&header), grpc.Trailer(&trailer))
		if got := about(metadata.Join(header, trailer)); status.Code(err) != codes.NotFound || got != allowed {
			t.Errorf("%v; %s", err, got)
		}
	})
	t.Run("gRPC denied", func(t *testing.T) {
		checks := auth.checks.Load()
		stream, err := grpc_health_v1.NewHealthClient(conn).Watch(t.Context(), &grpc_health_v1.HealthCheckRequest{})
		if err == nil {
			_, err = stream.Recv()
		}
		if status.Code(err) != codes.ResourceExhausted || status.Convert(err).Message() != "too many" {
			t.Errorf("%v", err)
		}
		if n := auth.checks.Load() - checks; n != 1 {
			t.Errorf("checked %d times", n)
		}
	})
	t.Run("no upstream", func(t *testing.T) {
		up.Close()
		if r := ask(t, one, "/200"); r.StatusCode != 503 || about(r.Header) != allowed {
			t.Errorf("%d %s", r.StatusCode, about(r.Header))
		}
	})
	t.Run("no sluice", func(t *testing.T) {
		stop()
		if r := ask(t, one, "/direct"); r.StatusCode != 503 || about(r.Header) != "" {
			t.Errorf("%d %s", r.StatusCode, about(r.Header))
		}
	})
}

// A restart of sluice under load loses no request: each waits for the new
// process and is checked once.
func TestChainRestart(t *testing.T) {
	const clients, restarts = 64, 3
	up := startUpstream(t)
	auth := &authorizer{}
	socket := filepath.Join(t.TempDir(), "s.sock")
	// The timeouts are longer than the shipped ones, since this test is about
	// what is retried: on a busy machine a restart may take longer than 0.2 s.
	envoy, addr := startEnvoy(t, Options{Sluice: "unix://" + socket, Upstream: up.Listener.Addr().String()}, "",
		"timeout: 0.2s", "timeout: 15s", "max_interval: 0.2s", "max_interval: 15s", "num_retries: 50", "num_retries: 5000")
	transport := &http.Transport{MaxIdleConnsPerHost: clients}
	defer transport.CloseIdleConnections()
	client := &http.Client{Transport: transport, Timeout: within}
	get := func() (int, error) {
		r, err := client.Get("http://" + addr + "/200")
		if err != nil {
			return 0, err
		}
		defer func() { _ = r.Body.Close() }()
		_, err = io.Copy(io.Discard, r.Body)
		return r.StatusCode, err
	}
	_, stop := auth.listen(t, socket)
	var sent, lost atomic.Int64
	end := make(chan struct{})
	var wg sync.WaitGroup
	for range clients {
		wg.Go(func() {
			for {
				select {
				case <-end:
					return
				default:
				}
				sent.Add(1)
				if code, err := get(); code != http.StatusOK || err != nil {
					lost.Add(1)
					t.Errorf("lost: %d, %v", code, err)
				}
			}
		})
	}
	for range restarts {
		before := auth.checks.Load()
		until(t, "checks", func() bool { return auth.checks.Load() > before+clients })
		refused := counter(t, envoy, connectFailures)
		stop()
		until(t, "refused connections", func() bool { return counter(t, envoy, connectFailures) > refused })
		_, stop = auth.listen(t, socket)
	}
	before := auth.checks.Load()
	until(t, "checks", func() bool { return auth.checks.Load() > before+clients })
	close(end)
	wg.Wait()
	if n := auth.checks.Load(); n != sent.Load() {
		t.Errorf("%d checks of %d requests", n, sent.Load())
	}
	t.Logf("%d of %d requests lost over %d restarts", lost.Load(), sent.Load(), restarts)
}

// until waits until is reports true.
func until(t *testing.T, what string, is func() bool) {
	t.Helper()
	late := time.After(within)
	poll := time.NewTicker(time.Millisecond)
	defer poll.Stop()
	for !is() {
		select {
		case <-poll.C:
		case <-late:
			t.Fatalf("no %s within %v", what, within)
		}
	}
}

// connectFailures counts Envoy's connections to sluice that failed.
const connectFailures = "cluster.sluice.upstream_cx_connect_fail"

// counter returns the value of one of Envoy's counters.
func counter(t *testing.T, p *Process, name string) (n int) {
	t.Helper()
	text := page(t, p, "/stats?filter=^"+name+"$")
	if _, err := fmt.Sscanf(text, name+": %d", &n); err != nil && text != "" { // what was never counted is not there
		t.Fatalf("%q, %v", text, err)
	}
	return n
}

// page returns a page of Envoy's admin interface.
func page(t *testing.T, p *Process, path string) string {
	t.Helper()
	admin, err := p.Admin()
	if err != nil {
		t.Fatal(err)
	}
	r, err := http.Get("http://" + admin + path)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = r.Body.Close() }()
	body, err := io.ReadAll(r.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(body)
}

// Envoy resolves names to IPv4 first, where sluice and most upstreams listen.
func TestChainNames(t *testing.T) {
	p, _ := startEnvoy(t, Options{Upstream: "localhost:8081", Sluice: "localhost:9001"}, "")
	clusters := page(t, p, "/clusters")
	for _, want := range []string{"upstream::127.0.0.1:8081::", "sluice::127.0.0.1:9001::"} {
		if !strings.Contains(clusters, want) {
			t.Errorf("no %s in:\n%s", want, clusters)
		}
	}
}
