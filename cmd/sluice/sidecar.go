package main

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/signal"
	"sync/atomic"
	"syscall"
	"time"

	group "github.com/oklog/run"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"go.opentelemetry.io/otel/trace"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"google.golang.org/grpc"

	"github.com/sluiceproxy/sluice/authz"
	"github.com/sluiceproxy/sluice/cmd/sluice/page"
	"github.com/sluiceproxy/sluice/limiter"
	"github.com/sluiceproxy/sluice/limiter/policy"
)

// sidecar is the process of `sluice run`.
type sidecar struct {
	cfg      atomic.Pointer[policy.Config] // in force
	log      *zap.Logger
	level    zap.AtomicLevel // of the log
	reload   *reloader
	hangup   chan os.Signal // receives SIGHUP
	checks   *authz.Server
	memory   *limiter.Memory   // nil if the buckets are in Redis
	redis    *limiter.Redis    // nil if the buckets are in this process
	fallback *limiter.Fallback // wraps redis; nil without it
	ceiling  *limiter.Ceiling  // wraps fallback; nil without it
	leases   *limiter.Leases   // wraps ceiling; nil without it
	outages  *outages          // of redis; nil without it
	traces   *traces           // nil disables tracing

	grpc, metrics, admin net.Listener
	registry, stores     *prometheus.Registry // stores has the metrics of the store

	// answered is true once Redis has answered, or if readiness does not need
	// its answer.
	answered atomic.Bool
	// refused is why Redis did not answer the last ping of the start; nil before.
	refused  atomic.Pointer[error]
	draining atomic.Bool
}

// newSidecar reads the config and binds all listeners, so that everything that
// can fail at the start has failed when it returns. The caller must call serve,
// which closes the sidecar.
func newSidecar(source configSource, stderr io.Writer) (*sidecar, error) {
	hangup := make(chan os.Signal, 1)
	// First, because a SIGHUP that is not handled would end the process.
	signal.Notify(hangup, syscall.SIGHUP)
	cfg, inputs, err := source.loadStable()
	if err != nil {
		return nil, err
	}
	log, level, err := newLog(stderr, cfg.LogLevel)
	if err != nil {
		return nil, err
	}
	s := &sidecar{
		log: log, level: level, hangup: hangup,
		registry: prometheus.NewRegistry(), stores: prometheus.NewRegistry(),
	}
	s.cfg.Store(cfg)
	s.registry.MustRegister(
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	build := prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "sluice_build_info", Help: "Always 1, with the version of sluice.",
		ConstLabels: prometheus.Labels{"version": buildVersion()},
	})
	build.Set(1)
	s.registry.MustRegister(build, prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "sluice_ready", Help: "Whether /readyz is 200: 1 or 0.",
	}, func() float64 {
		if s.isReady() {
			return 1
		}
		return 0
	}))
	s.reload = newReloader(source, cfg, inputs, s.apply, log, s.registry)
	if s.traces, err = newTraces(log); err != nil {
		return nil, err
	}
	var tracer trace.Tracer
	traced := func(store limiter.Store, _ string) limiter.Store { return store }
	if s.traces != nil {
		tracer = s.traces.tracer
		traced = func(store limiter.Store, name string) limiter.Store { return tracedStore{store, tracer, name} }
	}
	var store limiter.Store
	var settler authz.Settler
	if cfg.Redis != nil {
		redis, err := limiter.NewRedis(*cfg.Redis, log, s.stores)
		if err != nil {
			return nil, fmt.Errorf("store.redis: %w", err)
		}
		s.redis, s.fallback = redis, limiter.NewFallback(redis, log, s.stores)
		s.ceiling = limiter.NewCeiling(traced(s.fallback, "redis"), s.registry)
		s.leases = limiter.NewLeases(s.ceiling, redis, s.registry)
		s.leases.SetLimits(cfg.BucketLimits())
		store, settler = s.leases, s.fallback
	} else {
		s.memory = limiter.NewMemory(limiter.MemoryBudget(), log, s.stores)
		store, settler = traced(s.memory, "memory"), s.memory
	}
	s.answered.Store(s.redis == nil || !cfg.FailsClosed())
	s.checks = authz.New(authz.Options{
		Config: cfg, Store: store, Settler: settler, Log: log, Metrics: s.registry, Tracer: tracer,
	})

	if s.redis != nil {
		s.outages = &outages{log: log, unreachable: s.redis.Unreachable, checks: func() map[limiter.Outcome]uint64 {
			return s.checks.Totals().Checks
		}}
	}

	for _, l := range []struct {
		field, addr string
		to          *net.Listener
	}{
		{"listen.grpc", cfg.Listen.GRPC, &s.grpc},
		{"listen.metrics", cfg.Listen.Metrics, &s.metrics},
		{"listen.admin", cfg.Listen.Admin, &s.admin},
	} {
		if *l.to, err = listen(l.addr, log); err != nil {
			s.close()
			return nil, fmt.Errorf("%s: %w", l.field, err)
		}
	}
	return s, nil
}

// startSidecar is newSidecar, except that it returns nil and the error of ctx
// when ctx ends: a config from a pipe, or the lock on a socket's directory, can
// take any time.
func startSidecar(ctx context.Context, source configSource, stderr io.Writer) (*sidecar, error) {
	return unlessDone(ctx, func() (*sidecar, error) { return newSidecar(source, stderr) })
}

// unlessDone returns what f returns or, if ctx ends first, its error. In that
// case f is abandoned, and may run until the process ends.
func unlessDone[T any](ctx context.Context, f func() (T, error)) (T, error) {
	type result struct {
		value T
		err   error
	}
	done := make(chan result, 1)
	go func() {
		value, err := f()
		done <- result{value, err}
	}()
	select {
	case r := <-done:
		return r.value, r.err
	case <-ctx.Done():
		var none T
		return none, ctx.Err()
	}
}

// apply puts cfg in force. It fails if the change needs a restart.
func (s *sidecar) apply(cfg *policy.Config) error {
	if err := cfg.Replaces(s.cfg.Load(), s.reload.source.file); err != nil {
		return err
	}
	level, err := zapcore.ParseLevel(cfg.LogLevel)
	if err != nil {
		return err
	}
	if s.redis != nil {
		if err := s.redis.SetCredentials(*cfg.Redis); err != nil {
			return fmt.Errorf("store.redis: %w", err)
		}
	}
	if cfg.SentinelPasswordChanged(s.cfg.Load()) {
		s.log.Warn("store.redis.sentinel.password_file changed: restart to use the new password")
	}
	s.level.SetLevel(level)
	if !cfg.FailsClosed() {
		s.answered.Store(true) // readiness no longer needs Redis
	}
	s.cfg.Store(cfg)
	if s.leases != nil {
		s.leases.SetLimits(cfg.BucketLimits())
	}
	s.checks.SetConfig(cfg)
	return nil
}

// close closes what newSidecar opened.
func (s *sidecar) close() {
	signal.Stop(s.hangup)
	for _, l := range []net.Listener{s.grpc, s.metrics, s.admin} {
		if l != nil {
			_ = l.Close()
		}
	}
	if s.redis != nil {
		_ = s.redis.Close()
	}
	if s.traces != nil {
		s.traces.close()
	}
}

// serve runs the sidecar until ctx ends. It then drains: health and /readyz
// report it, and the checks in flight are answered within the config's grace
// period. serve returns nil after a drain, and an error if a listener failed.
func (s *sidecar) serve(ctx context.Context) error {
	defer s.close()
	background, cancel := context.WithCancel(context.Background())
	defer cancel()

	// The first actor that ends interrupts all, in this order: gRPC drains while
	// /readyz and /metrics still answer.
	var all group.Group
	stopped := make(chan struct{})
	all.Add(func() error {
		select {
		case <-ctx.Done():
			s.log.Info("draining", zap.Duration("grace", s.cfg.Load().Grace))
		case <-stopped:
		}
		return nil
	}, func(error) { close(stopped) })
	grpcListener := bounded(s.grpc, grpcConnections())
	calls := newInflow(grpcListener, s.storeTimeout(), s.log, s.registry)
	lowerMemoryLimit() // everything that is sized by GOMEMLIMIT exists now
	options := []grpc.ServerOption{grpc.InTapHandle(calls.begin), grpc.ChainStreamInterceptor(readLogs)}
	if s.cfg.Load().ListenTLS != nil {
		options = append(options, grpc.Creds(newLoggedTLS(serverTLS(s.cfg.Load), s.log)))
	}
	server := s.checks.GRPC(options...)
	all.Add(func() error { return server.Serve(grpcListener) }, func(error) {
		s.draining.Store(true)
		s.checks.Drain()
		s.returnLeases()
		s.stopGracefully(server)
	})
	settling, settled := context.WithCancel(context.Background()) // after the last end has arrived
	all.Add(func() error { s.checks.Run(settling); return nil }, func(error) { settled() })
	s.addHTTP(&all, s.metrics, s.metricsHandler())
	operators := s.page()
	s.addHTTP(&all, s.admin, operators)
	all.Add(func() error { calls.run(background); return nil }, func(error) { cancel() })
	all.Add(func() error { operators.Run(background); return nil }, func(error) { cancel() })
	if s.memory != nil {
		all.Add(func() error { s.memory.Run(background); return nil }, func(error) { cancel() })
	} else {
		all.Add(func() error { s.redis.Run(background); return nil }, func(error) { cancel() })
		all.Add(func() error { s.fallback.Run(background); return nil }, func(error) { cancel() })
		all.Add(func() error { s.ceiling.Run(background); return nil }, func(error) { cancel() })
		all.Add(func() error { s.outages.run(background); return nil }, func(error) { cancel() })
	}
	all.Add(func() error { s.reload.run(background, s.hangup); return nil }, func(error) { cancel() })
	if s.redis != nil {
		all.Add(func() error { s.awaitStore(background); <-background.Done(); return nil }, func(error) { cancel() })
	}
	store := "in process"
	if s.redis != nil {
		store = "redis"
	}
	s.log.Info("serving", append([]zap.Field{
		zap.String("version", buildVersion()), zap.String("domain", s.cfg.Load().Domain), zap.String("store", store),
		zap.Stringer("grpc", s.grpc.Addr()), zap.Stringer("metrics", s.metrics.Addr()),
		zap.Stringer("admin", s.admin.Addr()), zap.String("config", cmp.Or(s.reload.source.file, "none")),
	}, describeConfig(s.cfg.Load())...)...)
	err := all.Run()
	s.log.Info("stopped", zap.Error(err))
	return err
}

// storeTimeout returns the longest time that a check waits for the store.
func (s *sidecar) storeTimeout() time.Duration {
	if redis := s.cfg.Load().Redis; redis != nil {
		return redis.Timeout
	}
	return 0
}

// returnLeases gives back what is leased, so that others find it at once.
func (s *sidecar) returnLeases() {
	if s.leases == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), s.storeTimeout())
	defer cancel()
	s.leases.Close(ctx)
}

// stopper is the part of a gRPC server that stopGracefully uses.
type stopper interface {
	GracefulStop()
	Stop()
}

// stopGracefully stops the server when the calls in flight have ended, at the
// latest after the grace period.
func (s *sidecar) stopGracefully(server stopper) {
	grace := s.cfg.Load().Grace
	over := time.AfterFunc(grace, func() {
		s.log.Warn("grace period expired, closing connections", zap.Duration("grace", grace))
		server.Stop()
	})
	server.GracefulStop()
	over.Stop()
}

// addHTTP adds an HTTP server on l to the group.
func (s *sidecar) addHTTP(all *group.Group, l net.Listener, h http.Handler) {
	server := newServer(l, h, s.log, bounds{})
	all.Add(server.run, func(error) { _ = server.Close() })
}

// page returns the operator's page of this sidecar.
func (s *sidecar) page() *page.Page {
	o := page.Options{
		Server: s.checks, Config: s.cfg.Load, StoreMetrics: s.stores, State: s.state,
		Version: buildVersion(), ConfigFile: s.reload.source.file, GRPC: s.grpc.Addr().String(),
	}
	if s.redis != nil {
		o.Buckets, o.Leases = s.redis.ReadOnly(), s.leases.Totals
	} else {
		o.Buckets = s.memory.ReadOnly()
	}
	return page.New(o)
}

// isReady reports whether /readyz is 200.
func (s *sidecar) isReady() bool { return s.answered.Load() && !s.draining.Load() }

// state returns what the operator's page shows of the process.
func (s *sidecar) state() page.State {
	state := page.State{Ready: s.isReady(), Draining: s.draining.Load(), LogLevel: s.level.String()}
	if last := s.reload.last.Load(); last != nil {
		state.Reloaded, state.ReloadErrors = last.at, last.errors
	}
	if refused := s.refused.Load(); refused != nil && !s.answered.Load() {
		state.StoreError = (*refused).Error()
	}
	if s.outages != nil {
		state.Outage = s.outages.last.Load()
	}
	return state
}

// metricsHandler serves /metrics, /healthz and /readyz.
func (s *sidecar) metricsHandler() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", scrapeHandler(prometheus.Gatherers{s.registry, s.stores}, s.log, promhttp.HandlerOpts{
		EnableOpenMetrics: true, // has exemplars
	}))
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { writeStatus(w, http.StatusOK, "ok") })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		switch {
		case s.draining.Load():
			writeStatus(w, http.StatusServiceUnavailable, "draining")
		case !s.answered.Load():
			writeStatus(w, http.StatusServiceUnavailable, "waiting for Redis")
		default:
			writeStatus(w, http.StatusOK, "ok")
		}
	})
	return mux
}

// writeStatus answers with a status and a line of text.
func writeStatus(w http.ResponseWriter, status int, text string) {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.WriteHeader(status)
	_, _ = fmt.Fprintln(w, text)
}

// awaitStore pings Redis until it has answered once, because a sidecar that
// would refuse every request is not ready. A later outage does not change its
// readiness: no other sidecar would do better. Then awaitStore logs what is
// wrong with the way Redis is run.
func (s *sidecar) awaitStore(ctx context.Context) {
	const every = 250 * time.Millisecond
	tick := time.NewTicker(every)
	defer tick.Stop()
	for logged := false; ; logged = true {
		ping, cancel := context.WithTimeout(ctx, max(every, s.cfg.Load().Redis.Timeout))
		err := s.redis.Ping(ping)
		cancel()
		if err == nil {
			break
		}
		s.refused.Store(&err)
		if !logged && ctx.Err() == nil {
			message := "Redis does not answer"
			if kind := limiter.KindOf(err); kind != limiter.KindTimeout && kind != limiter.KindConnection {
				message = "Redis answers with an error"
			}
			s.log.Warn(message, zap.Bool("ready", s.answered.Load()), zap.Error(err))
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
	if !s.answered.Swap(true) {
		s.log.Info("Redis answers, ready")
	}
	cfg := s.cfg.Load()
	for _, f := range s.redis.Diagnose(ctx, cfg.KeyPrefix()+":"+cfg.Domain, 0) {
		if f.Status != limiter.OK && !f.Unknown && ctx.Err() == nil {
			s.log.Warn("Redis: "+f.Name, zap.String("detail", f.Detail), zap.String("fix", f.Fix))
		}
	}
}
