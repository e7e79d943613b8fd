package main

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"regexp"
	"runtime/debug"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"go.uber.org/zap"

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

A flag is over its environment variable, which is over the config file. Without a config every limit comes from Envoy's filter chain,
and the buckets are in this process.

The config's files are watched, and reread on SIGHUP: a new config takes the place of the old one whole or, where it has a mistake, not
at all. listen and store take a restart.`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			ctx, stop := untilSignal(c.Context())
			defer stop()
			return p.runSidecar(ctx, config, p.settings(c.Flags()))
		},
	}
	c.Flags().StringVar(&config, "config", "", "`file` with the limits (default $SLUICE_CONFIG)")
	for _, s := range settings {
		c.Flags().String(s.flag, "", s.usage+" ($"+s.env+")")
	}
	return c
}

// settings are what the environment and then the flags say; flags may be nil.
func (p *program) settings(flags *pflag.FlagSet) []policy.Setting {
	var all []policy.Setting
	for _, s := range settings {
		if v, ok := p.getenv(s.env); ok && v != "" {
			all = append(all, policy.Setting{Field: s.field, Value: v, From: s.env})
		}
	}
	if flags == nil {
		return all
	}
	for _, s := range settings {
		if f := flags.Lookup(s.flag); f.Changed {
			all = append(all, policy.Setting{Field: s.field, Value: f.Value.String(), From: "--" + s.flag})
		}
	}
	return all
}

func (p *program) runSidecar(ctx context.Context, config string, settings []policy.Setting) error {
	if config == "" {
		config, _ = p.getenv("SLUICE_CONFIG")
	}
	tuneGC(p.getenv)
	taken, getenv := make(map[string]bool), p.getenv
	recording := *p
	recording.getenv = func(name string) (string, bool) {
		taken[name] = true
		return getenv(name)
	}
	source := p.configFile(config, settings)
	source.load = recording.configFile(config, settings).load
	s, err := startSidecar(ctx, source, p.stderr)
	switch {
	case ctx.Err() != nil && s == nil:
		return nil // told to stop before there was anything to stop
	case err != nil:
		return p.sayMistakes(err)
	}
	if unknown := p.unknownVariables(taken); len(unknown) > 0 {
		s.log.Warn("unknown environment variables, which mean nothing to sluice", zap.Strings("variables", unknown))
	}
	return s.serve(ctx)
}

// load reads a config, and says every mistake in it on a line of its own.
func (p *program) load(file string, settings ...policy.Setting) (*policy.Config, error) {
	cfg, _, err := policy.Load(file, p.getenv, settings...)
	return cfg, p.sayMistakes(err)
}

// sayMistakes prints the mistakes of a config; the error that it returns needs
// no more words. A wrong flag is wrong usage.
func (p *program) sayMistakes(err error) error {
	var mistakes policy.Mistakes
	if !errors.As(err, &mistakes) {
		return err
	}
	result := errNo
	for _, m := range mistakes {
		_, _ = fmt.Fprintln(p.stderr, m)
		if strings.HasPrefix(m.File, "--") {
			result = errUsage
		}
	}
	return result
}

// unknownVariables are the names of environment variables that look as if they
// were sluice's and mean nothing: they are misspelt. What Kubernetes and Docker
// make of a Service's name is none of them, and neither is what the config
// takes.
func (p *program) unknownVariables(taken map[string]bool) []string {
	known := map[string]bool{"SLUICE_CONFIG": true}
	for _, s := range settings {
		known[s.env] = true
	}
	var unknown []string
	for _, v := range p.environ() {
		name, value, _ := strings.Cut(v, "=")
		if strings.HasPrefix(name, "SLUICE_") && !known[name] && !taken[name] && !serviceVariable.MatchString(name) && !strings.Contains(value, "://") {
			unknown = append(unknown, name)
		}
	}
	slices.Sort(unknown)
	return unknown
}

// serviceVariable are the variables that Kubernetes and Docker set for
// Services and links. SLUICE_PORT, which is one, has a URL for a value.
var serviceVariable = regexp.MustCompile(`_SERVICE_(HOST|PORT)(_[A-Z0-9_]+)?$|_PORT_[0-9]+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?$`)

// tuneGC lets the heap grow to three times what is live before it is collected. A sidecar's live heap is a few megabytes, and
// Go's default of twice would collect hundreds of times a second under load, a fifth of all its processor time. GOGC is over
// this, and GOMEMLIMIT still holds: near it the collector runs as often as it takes.
func tuneGC(getenv func(string) (string, bool)) {
	if _, ok := getenv("GOGC"); !ok {
		debug.SetGCPercent(200)
	}
}

// leaveRoom lowers the memory limit of the Go runtime, at most to a half.
// GOMEMLIMIT is, as shipped, all that the container may use, and the runtime
// counts neither the pages of the program's file nor what the kernel uses for
// the process, such as socket buffers. A fifth is left for the latter.
func leaveRoom() {
	limit := debug.SetMemoryLimit(-1)
	if limit == math.MaxInt64 {
		return
	}
	room := limit / 5
	if path, err := os.Executable(); err == nil {
		if file, err := os.Stat(path); err == nil {
			room += file.Size()
		}
	}
	debug.SetMemoryLimit(limit - min(room, limit/2))
}
