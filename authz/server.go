// Package authz implements Envoy's external authorization service (ext_authz
// v3). It decodes a CheckRequest, has the policy and the limiter decide, and
// encodes a CheckResponse. No other package knows these messages.
package authz

import (
	"context"
	"errors"
	"math/rand/v2"
	"net/netip"
	"sync/atomic"
	"time"

	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"github.com/prometheus/client_golang/prometheus"
	"go.opentelemetry.io/otel/trace"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/reflection"
	"google.golang.org/grpc/status"

	"github.com/sluiceproxy/sluice/limiter"
	"github.com/sluiceproxy/sluice/limiter/policy"
)

// Bounds of what a client of the gRPC server may send. By default Envoy accepts
// request headers of up to 60 KiB; a check is somewhat larger. With
// with_request_body Envoy adds a body to it, see withoutBody.
const (
	maxMessage = 16 << 20 // bytes of a check
	maxHeaders = 16 << 10 // bytes of the headers of a gRPC call
	// maxStreams is the number of concurrent checks on one connection. Envoy
	// opens another connection for more.
	maxStreams = 4096

	// streamWindow is the flow-control window of one call in bytes. gRPC
	// extends it for a longer message when the message is read.
	streamWindow = 64 << 10
	// connWindow is the flow-control window of a connection in bytes.
	connWindow = 1 << 20

	handshakeTimeout = 5 * time.Second
)

// streamWorkers is the number of goroutines that gRPC keeps for calls. A new
// goroutine would first have to grow its stack. gRPC starts more if all are
// busy. Each worker of an Envoy keeps one busy with its access log.
const streamWorkers = 16

// Options configures a Server. Config, Store and Metrics are required.
type Options struct {
	Config  *policy.Config
	Store   limiter.Store
	Settler Settler     // of Store; nil if no limit ever settles
	Log     *zap.Logger // nil disables logging
	Metrics prometheus.Registerer
	Tracer  trace.Tracer // nil disables tracing
}

// Server answers Envoy's checks. It is safe for concurrent use.
type Server struct {
	config  atomic.Pointer[policy.Config]
	store   limiter.Store
	report  *report
	metrics *grpcMetrics
	tracer  trace.Tracer // nil disables tracing
	health  *health.Server
	sealer  *sealer
	// settling settles requests whose responses have ended.
	settling *settling
	// elements counts the elements of the checks in flight that have more than
	// fewElements.
	elements atomic.Int64
	// jitter returns the retry-after of a refused request in seconds, 1 to 10.
	jitter func() int
}

// New returns a Server that decides by the config and the store of o. It
// registers its metrics with o.Metrics, and panics if they are registered
// already.
func New(o Options) *Server {
	log := o.Log
	if log == nil {
		log = zap.NewNop()
	}
	s := &Server{
		store:   o.Store,
		report:  newReport(log, o.Metrics),
		metrics: newGRPCMetrics(o.Metrics),
		tracer:  o.Tracer,
		health:  health.NewServer(),
		sealer:  newSealer(),
		// At random, so that clients do not all retry at once.
		jitter: func() int { return 1 + rand.IntN(10) },
	}
	s.settling = newSettling(o.Settler, s.report, o.Tracer)
	s.SetConfig(o.Config)
	return s
}

// SetConfig replaces the config for all checks that begin afterwards. A check
// that has begun ends with the config that it began with.
func (s *Server) SetConfig(config *policy.Config) {
	s.report.setConfig(config)
	s.config.Store(config)
}

// GRPC returns a gRPC server with the ext_authz, health and reflection
// services. Their health is SERVING. options, such as credentials, take
// precedence over the server's own.
func (s *Server) GRPC(options ...grpc.ServerOption) *grpc.Server {
	own := append(serverOptions(), grpc.UnaryInterceptor(s.metrics.unary), grpc.StreamInterceptor(s.metrics.stream))
	g := grpc.NewServer(append(own, options...)...)
	g.RegisterService(&service, s)
	g.RegisterService(&logService, s)
	healthv1.RegisterHealthServer(g, s.health)
	reflection.Register(g)
	for _, service := range []string{"", authv3.Authorization_ServiceDesc.ServiceName} {
		s.health.SetServingStatus(service, healthv1.HealthCheckResponse_SERVING)
	}
	return g
}

// serverOptions returns the codec and the bounds of the gRPC server.
func serverOptions() []grpc.ServerOption {
	return []grpc.ServerOption{
		grpc.MaxRecvMsgSize(maxMessage),
		grpc.MaxHeaderListSize(maxHeaders),
		grpc.MaxConcurrentStreams(maxStreams),
		grpc.NumStreamWorkers(streamWorkers),
		grpc.StaticStreamWindowSize(streamWindow),
		grpc.StaticConnWindowSize(connWindow),
		grpc.ConnectionTimeout(handshakeTimeout),
		grpc.ForceServerCodecV2(newCodec()),
		// Closes connections whose peer is gone.
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: time.Minute, Timeout: 20 * time.Second}),
		// By default grpc-go closes a connection on which Envoy sends
		// keepalive pings.
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 5 * time.Second, PermitWithoutStream: true}),
	}
}

// Run settles requests that have ended until ctx ends, and then those whose ends
// have arrived.
func (s *Server) Run(ctx context.Context) { s.settling.run(ctx) }

// Drain sets the health to NOT_SERVING for good, and ends the streams of Envoy's
// access log as soon as they are quiet, or within a second. Checks are still
// answered. It must be called once.
func (s *Server) Drain() {
	s.health.Shutdown()
	close(s.settling.draining)
}

// service is the generated description of the service, except that Check gets
// and returns encoded messages.
var service = grpc.ServiceDesc{
	ServiceName: authv3.Authorization_ServiceDesc.ServiceName,
	HandlerType: (*any)(nil),
	Methods:     []grpc.MethodDesc{{MethodName: "Check", Handler: handleCheck}},
	Metadata:    authv3.Authorization_ServiceDesc.Metadata,
}

// handleCheck handles a call of Check. It counts the call itself, since an
// interceptor would allocate for each call.
func handleCheck(
	server any, ctx context.Context, decode func(any) error, _ grpc.UnaryServerInterceptor,
) (any, error) {
	s := server.(*Server)
	s.metrics.check.started.Inc()
	raw := new(rawRequest)
	if err := decode(raw); err != nil {
		s.report.notRead(err)
		s.metrics.check.completed(err)
		return nil, err
	}
	response, err := s.check(ctx, raw)
	s.metrics.check.completed(err)
	return response, err
}

// check answers one check. It returns an error, a gRPC status, only if raw is
// not a CheckRequest, if a limit delegates its failures to Envoy, or if the
// caller is gone. It recovers from panics.
func (s *Server) check(ctx context.Context, raw *rawRequest) (response *rawResponse, err error) {
	began := time.Now()
	check := checkState{config: s.config.Load(), wire: raw.wire}
	defer func() {
		if p := recover(); p != nil {
			check = checkState{
				config: check.config, request: check.request, wire: check.wire, span: check.span,
				decision: limiter.Decision{Outcome: limiter.FailedClosed, Strictest: -1},
			}
			s.report.panicked("check", p)
			response, err = s.answer(&check)
		}
		s.report.checked(&check, began)
	}()
	if err := s.decide(ctx, began, &check); err != nil {
		return nil, err
	}
	return s.answer(&check)
}

// checkState is what is known of a check when it is answered.
type checkState struct {
	config    *policy.Config  // the config in force when the check began
	request   *policy.Request // nil if the check has no HTTP request
	wire      string          // the encoded check, of which request's texts are parts
	elements  int             // of request
	client    netip.Addr      // that the config takes for the client's; invalid if unknown
	decision  limiter.Decision
	unlimited []*limiter.Limit // limits that apply and have no bucket
	mistakes  []error          // errors in the config that the check revealed
	span      trace.Span       // nil if tracing is disabled
}

// decide sets the fields of check from its wire. It returns a gRPC status if
// that is not a CheckRequest.
func (s *Server) decide(ctx context.Context, began time.Time, check *checkState) error {
	check.decision = limiter.Decision{Outcome: limiter.Invalid, Strictest: -1}
	request, count, err := parse(check.wire)
	if err != nil {
		check.mistakes = []error{err}
		if errors.Is(err, errNoCheck) {
			return status.Error(codes.Internal, errNoCheck.Error())
		}
		return nil
	}
	check.request, check.elements = request, count
	if n := int64(count); n > fewElements {
		if s.elements.Add(n) > maxAllElements {
			s.elements.Add(-n)
			check.decision.Outcome = limiter.FailedClosed
			s.report.throttled.Warn("check refused: " + errTooManyChecks.Error())
			return nil
		}
		defer s.elements.Add(-n)
	}
	if s.tracer != nil {
		ctx, check.span = startSpan(ctx, s.tracer, request, began)
	}
	draw := check.config.Draw(request)
	check.client = draw.Client
	for _, m := range draw.Mistakes {
		check.mistakes = append(check.mistakes, m)
	}
	if !draw.Invalid {
		check.unlimited = draw.Unlimited
	}
	check.decision = decideDraw(ctx, s.store, &draw)
	return nil
}

// decideDraw decides a request by what it draws from the store. Explain decides
// by it, too.
func decideDraw(ctx context.Context, store limiter.Store, draw *policy.Draw) limiter.Decision {
	switch {
	case draw.Exempt:
		return limiter.Decision{Outcome: limiter.Exempt, Strictest: -1}
	case draw.Invalid:
		return limiter.Decision{Outcome: limiter.Invalid, Strictest: -1}
	}
	d := limiter.Decide(ctx, store, draw.Charges)
	if d.Outcome == limiter.Unmatched && len(draw.Unlimited) > 0 {
		d.Outcome = limiter.Allowed
	}
	return d
}
