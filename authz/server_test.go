package authz

import (
	"bytes"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"
	reflectionv1 "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/sluiceproxy/sluice/limiter"
)

// serve serves s and returns a connection to it. The test fails if the server
// does not stop cleanly.
func serve(t testing.TB, s *Server, network, addr string) *grpc.ClientConn {
	t.Helper()
	l, err := net.Listen(network, addr)
	if err != nil {
		t.Fatal(err)
	}
	g := s.GRPC()
	served := make(chan error, 1)
	go func() { served <- g.Serve(l) }()
	target := "passthrough:///" + l.Addr().String()
	if network == "unix" {
		target = "unix://" + addr
	}
	conn, err := grpc.NewClient(target, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 10 * time.Second, PermitWithoutStream: true}))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = conn.Close()
		g.GracefulStop()
		if err := <-served; err != nil {
			t.Errorf("the server ended: %v", err)
		}
	})
	return conn
}

func TestOverTheWire(t *testing.T) {
	for network, addr := range map[string]string{"tcp": "127.0.0.1:0", "unix": filepath.Join(t.TempDir(), "s.sock")} {
		t.Run(network, func(t *testing.T) {
			s, _, logs := newServer(t, "limits: [{name: a, rate: 1/h, burst: 2, key: client.ip}]",
				limiter.NewMemory(1<<20, nil, prometheus.NewRegistry()))
			warned := make(chan struct{}, 10)
			s.report.throttled = s.report.throttled.WithOptions(zap.Hooks(func(zapcore.Entry) error {
				warned <- struct{}{}
				return nil
			}))
			conn := serve(t, s, network, addr)
			client := authv3.NewAuthorizationClient(conn)
			for i, want := range []codes.Code{codes.OK, codes.OK, codes.ResourceExhausted} {
				r, err := client.Check(t.Context(), checkOf())
				if err != nil || codes.Code(r.GetStatus().GetCode()) != want {
					t.Errorf("check %d: %v, %v", i, r, err)
				}
			}

			health := healthv1.NewHealthClient(conn)
			for _, service := range []string{"", "envoy.service.auth.v3.Authorization"} {
				r, err := health.Check(t.Context(), &healthv1.HealthCheckRequest{Service: service})
				if err != nil || r.Status != healthv1.HealthCheckResponse_SERVING {
					t.Errorf("%q is %v, %v", service, r, err)
				}
			}
			stream, err := reflectionv1.NewServerReflectionClient(conn).ServerReflectionInfo(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			list := &reflectionv1.ServerReflectionRequest{
				MessageRequest: &reflectionv1.ServerReflectionRequest_ListServices{},
			}
			if err := stream.Send(list); err != nil {
				t.Fatal(err)
			}
			services, err := stream.Recv()
			if err != nil || !strings.Contains(services.String(), "envoy.service.auth.v3.Authorization") {
				t.Errorf("reflection: %v, %v", services, err)
			}
			if err := stream.CloseSend(); err != nil {
				t.Error(err)
			}

			large := checkOf("x-large", strings.Repeat("x", maxMessage))
			if _, err := client.Check(t.Context(), large); status.Code(err) != codes.ResourceExhausted {
				t.Errorf("a check of more than %d bytes: %v", maxMessage, err)
			}
			// gRPC answers before it returns the error, which is then counted and
			// logged.
			select {
			case <-warned:
			case <-time.After(30 * time.Second):
				t.Fatal("no warning")
			}
			if n := testutil.ToFloat64(s.report.tooLarge); n != 1 || logs.FilterLevelExact(zap.WarnLevel).Len() != 1 {
				t.Errorf("%v counted; logged %v", n, logs.All())
			}
			// A check with a large body is answered, and nothing of the body is
			// kept.
			body := checkOf("x-mine", "kept")
			http := body.Attributes.Request.Http
			http.Body, http.RawBody = strings.Repeat("b", 7<<20), bytes.Repeat([]byte("\xff"), 7<<20)
			r, err := client.Check(t.Context(), body)
			if err != nil || codes.Code(r.GetStatus().GetCode()) != codes.ResourceExhausted {
				t.Errorf("a check with a large body: %v, %v", r, err)
			}
			if kept := s.report.denials.list()[0].request; kept == nil || kept.Headers["x-mine"] != "kept" {
				t.Errorf("kept %+v", kept)
			}
			s.Drain()
			state, err := health.Check(t.Context(), &healthv1.HealthCheckRequest{})
			if err != nil || state.Status != healthv1.HealthCheckResponse_NOT_SERVING {
				t.Errorf("draining: %v, %v", state, err)
			}
			r, err = client.Check(t.Context(), checkOf())
			if err != nil || codes.Code(r.GetStatus().GetCode()) != codes.ResourceExhausted {
				t.Errorf("a check while draining: %v, %v", r, err)
			}
		})
	}
}

// FuzzCheck sends any valid check. The answer must be one that Envoy reads as
// intended, and there must be no panic.
func FuzzCheck(f *testing.F) {
	raw := checkOf()
	raw.Attributes.Request.Http.HeaderMap = &corev3.HeaderMap{Headers: []*corev3.HeaderValue{
		{Key: "X-Api-Key", RawValue: []byte("a\r\nb")},
	}}
	grpcCall := checkOf("content-type", "application/grpc", "x-sluice-shadow", "x", "x-forwarded-for", "1.2.3.4, ::1")
	grpcCall.Attributes.Source = address("2001:db8::1%eth0", 1)
	// This one is denied, and was a gRPC-Web call before Envoy's grpc_web filter.
	translated := checkOf("content-type", "application/grpc", "x-grpc-web", "1")
	translated.Attributes.Request.Http.Path = "/grpc.health.v1.Health/Check"
	for _, seed := range []*authv3.CheckRequest{{}, checkOf(), raw, grpcCall, translated} {
		b, err := proto.Marshal(seed)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	s, _, _ := newServer(f, `
client_ip: {xff_from_right: 1}
headers: [x-ratelimit, retry-after, ratelimit]
limits:
  - name: a
    rate: 1/s
    burst: 3
    key: [client.network, 'request.headers["x-api-key"]', request.url_path, request.method]
  - {name: b, rate: 1/m, key: 'metadata.filter_metadata["x"].y', mode: shadow}
  - {name: c, rate: 1/s, match: {paths: ["/{a}/**"], hosts: ["*.example.com"]}, absent: deny, key: 'context["plan"]'}
`, limiter.NewMemory(1<<20, nil, prometheus.NewRegistry()))
	s.report.log = zap.NewNop() // the observer would keep every line
	f.Fuzz(func(t *testing.T, b []byte) {
		var check authv3.CheckRequest
		if proto.Unmarshal(b, &check) != nil {
			return
		}
		var r *authv3.CheckResponse
		var err error
		// What the context_extensions say may be a limit, with expressions.
		if cost := allocates(func() { r, err = s.Check(t.Context(), &check) }); cost > 64<<20 {
			t.Errorf("%d bytes are allocated for %d", cost, len(b))
		}
		if err != nil {
			t.Fatal(err)
		}
		if n := testutil.ToFloat64(s.report.panics); n != 0 {
			t.Fatal("it panicked")
		}
		allowed := codes.Code(r.GetStatus().GetCode()) == codes.OK
		if allowed != (r.GetOkResponse() != nil) || allowed == (r.GetDeniedResponse() != nil) {
			t.Fatalf("of two minds: %v", r)
		}
		if d := r.GetDeniedResponse(); d != nil {
			isGRPCStatus := func(h *corev3.HeaderValueOption) bool { return h.GetHeader().GetKey() == "grpc-status" }
			switch d.GetStatus().GetCode() {
			case 429, 503:
			case 200:
				// Only grpc-status says that it is a denial.
				if d.GetBody() != "" || !slices.ContainsFunc(d.GetHeaders(), isGRPCStatus) {
					t.Fatalf("%v", r)
				}
			default:
				t.Fatalf("%v", r)
			}
		}
		all := append(r.GetOkResponse().GetResponseHeadersToAdd(), r.GetOkResponse().GetHeaders()...)
		for _, h := range append(all, r.GetDeniedResponse().GetHeaders()...) {
			if v := h.GetHeader().GetValue(); v == "" || strings.ContainsAny(v, "\r\n\x00") {
				t.Fatalf("%s: %q", h.GetHeader().GetKey(), v)
			}
		}
		for _, name := range r.GetOkResponse().GetHeadersToRemove() {
			if !strings.HasPrefix(name, "x-sluice-") {
				t.Fatalf("removes %q", name)
			}
		}
		if _, err := proto.Marshal(r); err != nil {
			t.Fatal(err)
		}
	})
}

// BenchmarkCheck measures a check in process and over a connection.
//
//	go test ./authz -run '^$' -bench Check
func BenchmarkCheck(b *testing.B) {
	const config = "limits: [{name: per-client, rate: 1000000000/s, key: client.ip}]"
	check := checkOf("user-agent", "curl", "accept", "*/*")
	good := func(b *testing.B, r *authv3.CheckResponse, err error) {
		b.Helper()
		if err != nil || len(r.GetOkResponse().GetResponseHeadersToAdd()) != 3 {
			b.Fatal(r, err)
		}
	}
	b.Run("in-process", func(b *testing.B) {
		s, _, _ := newServer(b, config, limiter.NewMemory(1<<20, nil, prometheus.NewRegistry()))
		r, err := s.Check(b.Context(), check)
		good(b, r, err)
		wire, err := proto.Marshal(check)
		if err != nil {
			b.Fatal(err)
		}
		raw := &rawRequest{string(wire)}
		b.ReportAllocs()
		for b.Loop() {
			if _, err := s.check(b.Context(), raw); err != nil {
				b.Fatal(err)
			}
		}
	})
	for network, addr := range map[string]string{"tcp": "127.0.0.1:0", "unix": filepath.Join(b.TempDir(), "s.sock")} {
		s, _, _ := newServer(b, config, limiter.NewMemory(1<<20, nil, prometheus.NewRegistry()))
		client := authv3.NewAuthorizationClient(serve(b, s, network, addr))
		b.Run(network+"/serial", func(b *testing.B) {
			for b.Loop() {
				r, err := client.Check(b.Context(), check)
				good(b, r, err)
			}
		})
		b.Run(network+"/64-callers", func(b *testing.B) {
			b.SetParallelism(64)
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					r, err := client.Check(b.Context(), check)
					good(b, r, err)
				}
			})
		})
	}
}
