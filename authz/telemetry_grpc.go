package authz

import (
	"context"
	"strings"
	"sync"

	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// grpcMetrics counts gRPC calls under the metric names of go-grpc-prometheus. It
// keeps the counters of each method. That library looks their labels up at each
// call, which takes a microsecond, a thirtieth of a check.
type grpcMetrics struct {
	started, handled *prometheus.CounterVec
	methods          sync.Map // from a full method name to its *methodMetrics
	check            *methodMetrics
}

// methodMetrics has the counters of one method.
type methodMetrics struct {
	started prometheus.Counter
	handled [codes.Unauthenticated + 1]prometheus.Counter // by code
}

func newGRPCMetrics(metrics prometheus.Registerer) *grpcMetrics {
	labels := []string{"grpc_type", "grpc_service", "grpc_method"}
	g := &grpcMetrics{
		started: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "grpc_server_started_total", Help: "Total number of RPCs started on the server.",
		}, labels),
		handled: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "grpc_server_handled_total", Help: "Total number of RPCs completed on the server, by status code.",
		}, append(labels, "grpc_code")),
	}
	metrics.MustRegister(g.started, g.handled)
	g.check = g.forMethod("unary", authv3.Authorization_Check_FullMethodName)
	return g
}

// forMethod returns the counters of a method. gRPC calls interceptors only for
// methods that are registered, so no client can choose a label.
func (g *grpcMetrics) forMethod(kind, name string) *methodMetrics {
	if known, ok := g.methods.Load(name); ok {
		return known.(*methodMetrics)
	}
	service, method, _ := strings.Cut(strings.TrimPrefix(name, "/"), "/")
	m := &methodMetrics{started: g.started.WithLabelValues(kind, service, method)}
	for code := range m.handled {
		m.handled[code] = g.handled.WithLabelValues(kind, service, method, codes.Code(code).String())
	}
	known, _ := g.methods.LoadOrStore(name, m)
	return known.(*methodMetrics)
}

// completed counts a call that ended with err.
func (m *methodMetrics) completed(err error) {
	if code := int(status.Code(err)); code < len(m.handled) {
		m.handled[code].Inc()
	} else {
		m.handled[codes.Unknown].Inc()
	}
}

// unary is a grpc.UnaryServerInterceptor.
func (g *grpcMetrics) unary(
	ctx context.Context, request any, info *grpc.UnaryServerInfo, handle grpc.UnaryHandler,
) (any, error) {
	m := g.forMethod("unary", info.FullMethod)
	m.started.Inc()
	response, err := handle(ctx, request)
	m.completed(err)
	return response, err
}

// stream is a grpc.StreamServerInterceptor.
func (g *grpcMetrics) stream(
	server any, s grpc.ServerStream, info *grpc.StreamServerInfo, handle grpc.StreamHandler,
) error {
	kind := "bidi_stream"
	switch {
	case !info.IsClientStream:
		kind = "server_stream"
	case !info.IsServerStream:
		kind = "client_stream"
	}
	m := g.forMethod(kind, info.FullMethod)
	m.started.Inc()
	err := handle(server, s)
	m.completed(err)
	return err
}
