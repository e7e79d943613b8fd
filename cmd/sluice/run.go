package main

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/sluiceproxy/sluice/limiter/policy"
)

// settings are what the environment and the flags of run say over the config file.
var settings = []struct {
	flag, env, field, usage string
}{
	{"grpc", "SLUICE_GRPC", "listen.grpc", "`address` for Envoy's checks, host:port or unix:///path"},
	{"admin", "SLUICE_ADMIN", "listen.admin", "`address` for the operator's page and profiles"},
	{"metrics", "SLUICE_METRICS", "listen.metrics", "`address` for /metrics, /healthz and /readyz"},
	{"domain", "SLUICE_DOMAIN", "domain", "`name` of whose buckets these are"},
	{"redis", "SLUICE_REDIS", "store.redis.url", "`URL` of the Redis that keeps the buckets"},
	{"grace", "SLUICE_GRACE", "grace", "`duration` for what is in flight when the sidecar is told to stop"},
	{"log-level", "SLUICE_LOG_LEVEL", "log_level", "`level`: debug, info, warn or error"},
}

func (p *program) runCommand() *cobra.Command {
	var config string
	c := &cobra.Command{
		Use:   "run",
		Short: "Run the sidecar",
		Long: `Run the sidecar until SIGTERM or SIGINT; it then answers what is in flight and ends.

A flag is over its environment variable, which is over the config file. Without a config there are no limits, and
the buckets are in this process.`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			return p.runSidecar(c.Context(), config, p.overrides(c.Flags()))
		},
	}
	c.Flags().StringVar(&config, "config", "", "`file` with the limits (default $SLUICE_CONFIG)")
	for _, s := range settings {
		c.Flags().String(s.flag, "", s.usage+" ($"+s.env+")")
	}
	return c
}

// overrides are the settings that the environment and then the flags make.
func (p *program) overrides(flags *pflag.FlagSet) []policy.Override {
	var o []policy.Override
	for _, s := range settings {
		if v, ok := p.getenv(s.env); ok && v != "" {
			o = append(o, policy.Override{Field: s.field, Value: v, From: s.env})
		}
	}
	for _, s := range settings {
		if f := flags.Lookup(s.flag); f.Changed {
			o = append(o, policy.Override{Field: s.field, Value: f.Value.String(), From: "--" + s.flag})
		}
	}
	return o
}

func (p *program) runSidecar(ctx context.Context, config string, overrides []policy.Override) error {
	if config == "" {
		config, _ = p.getenv("SLUICE_CONFIG")
	}
	cfg, err := p.load(config, overrides...)
	if err != nil {
		return err
	}
	log, err := newLog(p.stderr, cfg.LogLevel)
	if err != nil {
		return err
	}
	tuneGC(p.getenv)
	s, err := newSidecar(cfg, log)
	if err != nil {
		return err
	}
	return s.serve(ctx)
}

// load reads a config, and says every mistake in it on a line of its own.
func (p *program) load(file string, overrides ...policy.Override) (*policy.Config, error) {
	cfg, err := policy.Load(file, p.getenv, overrides...)
	return cfg, p.sayMistakes(err)
}

// sayMistakes prints the mistakes of a config; the error that it returns needs no more words.
func (p *program) sayMistakes(err error) error {
	var mistakes policy.Mistakes
	if !errors.As(err, &mistakes) {
		return err
	}
	for _, m := range mistakes {
		_, _ = fmt.Fprintln(p.stderr, m)
	}
	return errNo
}

// tuneGC lets the heap grow to five times what is live before it is collected. A sidecar's live heap is a few megabytes, and
// Go's default of twice would collect hundreds of times a second under load, a fifth of all its processor time. GOGC is over
// this, and GOMEMLIMIT still holds: near it the collector runs as often as it takes.
func tuneGC(getenv func(string) (string, bool)) {
	if _, ok := getenv("GOGC"); !ok {
		debug.SetGCPercent(400)
	}
}
