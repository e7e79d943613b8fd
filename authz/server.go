// Package authz speaks Envoy's ext_authz: a CheckRequest comes in, the policy and the limiter decide, and a CheckResponse goes out. It is the
// only place that knows those messages.
package authz

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime/debug"
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

// The bounds of what a connection may send. Envoy's headers are at most 60 kB by default, and some more in a check; with_request_body
// adds as much of the body as it says, which is not kept (withoutBody).
const (
	maxMessage = 16 << 20 // bytes of a check
	maxHeaders = 16 << 10 // bytes of the gRPC call's own headers
	maxStreams = 4096     // checks at once on one connection; Envoy then opens another

	streamWindow = 64 << 10 // bytes of one call that nobody has read yet; of a longer message all is asked for as it is read
	connWindow   = 1 << 20  // bytes on their way on one connection
	handshake    = 5 * time.Second
)

// streamWorkers is how many goroutines take checks as they come, so that a check rarely needs one of its own, whose stack would have to
// grow first. More are started when all are busy.
const streamWorkers = 8

// Options are what a Server is made of. All but Log and Tracer are required.
type Options struct {
	Config  *policy.Config
	Store   limiter.Store
	Log     *zap.Logger // nil logs nothing
	Metrics prometheus.Registerer
	Tracer  trace.Tracer // nil traces nothing
}

// Server answers Envoy's checks. It is safe for concurrent use.
type Server struct {
	config atomic.Pointer[policy.Config]
	store  limiter.Store
	report *report
	calls  *calls
	tracer trace.Tracer // nil: none
	health *health.Server
	// elements are those of the checks under way that have more than fewElements.
	elements atomic.Int64
	jitter   func() int // seconds, 1 to 10, that a client is told to wait where the store failed
}

// New returns a server that answers by the config and the store.
func New(o Options) *Server {
	log := o.Log
	if log == nil {
		log = zap.NewNop()
	}
	s := &Server{
		store:  o.Store,
		report: newReport(log, o.Metrics),
		calls:  newCalls(o.Metrics),
		tracer: o.Tracer,
		health: health.NewServer(),
		// Spread, so that clients do not all come back at once.
		jitter: func() int { return 1 + rand.IntN(10) },
	}
	s.Use(o.Config)
	return s
}

// Use makes the server answer by another config from the next check on. A check that is under way ends by the one that it began with.
func (s *Server) Use(config *policy.Config) {
	s.report.setConfig(config)
	s.config.Store(config)
}

// GRPC returns a gRPC server with the checks, health and reflection on it. Its health is SERVING. options are how it is reached, such as
// credentials, and are over its own.
func (s *Server) GRPC(options ...grpc.ServerOption) *grpc.Server {
	own := append(transport(), grpc.UnaryInterceptor(s.calls.unary), grpc.StreamInterceptor(s.calls.stream))
	g := grpc.NewServer(append(own, options...)...)
	g.RegisterService(&service, s)
	healthv1.RegisterHealthServer(g, s.health)
	reflection.Register(g)
	for _, service := range []string{"", authv3.Authorization_ServiceDesc.ServiceName} {
		s.health.SetServingStatus(service, healthv1.HealthCheckResponse_SERVING)
	}
	return g
}

// transport is how checks are carried, whatever becomes of them.
func transport() []grpc.ServerOption {
	return []grpc.ServerOption{
		grpc.MaxRecvMsgSize(maxMessage),
		grpc.MaxHeaderListSize(maxHeaders),
		grpc.MaxConcurrentStreams(maxStreams),
		grpc.NumStreamWorkers(streamWorkers),
		grpc.StaticStreamWindowSize(streamWindow),
		grpc.StaticConnWindowSize(connWindow),
		grpc.ConnectionTimeout(handshake),
		grpc.ForceServerCodecV2(newCodec()),
		// Envoy's keepalive pings are at intervals that grpc-go would by default answer by closing the connection.
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: time.Minute, Timeout: 20 * time.Second}), // finds peers that are gone
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 5 * time.Second, PermitWithoutStream: true}),
	}
}

// Drain makes health say NOT_SERVING for good. Checks are still answered.
func (s *Server) Drain() { s.health.Shutdown() }

// service is the generated service, but that its messages are read and written here.
var service = grpc.ServiceDesc{
	ServiceName: authv3.Authorization_ServiceDesc.ServiceName,
	HandlerType: (*any)(nil),
	Methods: []grpc.MethodDesc{{
		MethodName: "Check",
		// It counts its calls itself: an interceptor would cost each check a closure and a description of the method.
		Handler: func(s any, ctx context.Context, decode func(any) error, _ grpc.UnaryServerInterceptor) (any, error) {
			calls := s.(*Server).calls.check
			calls.started.Inc()
			asked := new(question)
			if err := decode(asked); err != nil {
				s.(*Server).report.notRead(err)
				calls.ended(err)
				return nil, err
			}
			answer, err := s.(*Server).check(ctx, asked)
			calls.ended(err)
			return answer, err
		},
	}},
	Metadata: authv3.Authorization_ServiceDesc.Metadata,
}

// check answers one check: never an error but where a limit leaves its failures to Envoy or where what came is no check, and never a
// panic.
func (s *Server) check(ctx context.Context, asked *question) (answer *reply, err error) {
	began := time.Now()
	v := verdict{config: s.config.Load(), wire: asked.wire}
	defer func() {
		if p := recover(); p != nil {
			v = verdict{config: v.config, request: v.request, wire: v.wire, span: v.span, decision: limiter.Decision{Outcome: limiter.FailedClosed, Telling: -1}}
			s.report.panicked(fmt.Sprintf("%T", p), debug.Stack())
			answer, err = s.answer(&v)
		}
		s.report.checked(&v, began)
	}()
	if err := s.decide(ctx, asked, began, &v); err != nil {
		return nil, err
	}
	return s.answer(&v)
}

// verdict is all that is known of a check when it is answered.
type verdict struct {
	config    *policy.Config  // by which it is answered, whatever comes after
	request   *policy.Request // nil where the check held none
	wire      string          // the check, which its request's texts are parts of
	decision  limiter.Decision
	unlimited []*limiter.Limit // that apply, and have no bucket
	mistakes  []error          // of the config, that the check shows
	span      trace.Span       // nil where there is none
}

// decide fills v. Its error is a gRPC status, of what is no check.
func (s *Server) decide(ctx context.Context, asked *question, began time.Time, v *verdict) error {
	v.decision = limiter.Decision{Outcome: limiter.Invalid, Telling: -1}
	request, err := parse(asked.wire)
	if err != nil {
		v.mistakes = []error{err}
		switch {
		case errors.Is(err, errTooMany):
			return status.Error(codes.ResourceExhausted, err.Error())
		case !errors.Is(err, errNoHTTP):
			return status.Error(codes.Internal, errNoCheck.Error())
		}
		return nil
	}
	if n := int64(elements(request)); n > fewElements {
		if s.elements.Add(n) > maxAllElements {
			s.elements.Add(-n)
			v.mistakes = []error{errTooManyChecks}
			return status.Error(codes.ResourceExhausted, errTooManyChecks.Error())
		}
		defer s.elements.Add(-n)
	}
	v.request = request
	if s.tracer != nil {
		ctx, v.span = startSpan(ctx, s.tracer, request, began)
	}
	draw := v.config.Draw(request)
	for _, m := range draw.Mistakes {
		v.mistakes = append(v.mistakes, m)
	}
	switch {
	case draw.Invalid:
		return nil
	case draw.Exempt:
		v.decision.Outcome = limiter.Exempt
		return nil
	}
	v.unlimited = draw.Unlimited
	v.decision = limiter.Decide(ctx, s.store, draw.Charges)
	if v.decision.Outcome == limiter.Unmatched && len(draw.Unlimited) > 0 {
		v.decision.Outcome = limiter.Allowed
	}
	return nil
}
