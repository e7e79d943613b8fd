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

// settings are the fields of the config that the environment and the flags of
// run override.
var settings = []struct {
	flag, env, field, usage string
}{
	{"grpc", "SLUICE_GRPC", "listen.grpc", "`address` for Envoy's checks, host:port or unix:///path"},
	{"admin", "SLUICE_ADMIN", "listen.admin", "`address` for the operator's page and profiles"},
	{"metrics", "SLUICE_METRICS", "listen.metrics", "`address` for /metrics, /healthz and /readyz"},
	{"domain", "SLUICE_DOMAIN", "domain", "`name` that the keys of all buckets begin with"},
	{"redis", "SLUICE_REDIS", "store.redis.url", "`URL` of the Redis that keeps the buckets"},
	{"grace", "SLUICE_GRACE", "grace", "`duration` that checks in flight have to finish on shutdown"},
	{"log-level", "SLUICE_LOG_LEVEL", "log_level", "`level`: debug, info, warn or error"},
}

func (p *program) runCommand() *cobra.Command {
	var config string
	c := &cobra.Command{
		Use:   "run",
		Short: "Run the sidecar",
		Long: `Run the sidecar until SIGTERM or SIGINT. It then answers the checks in flight and exits.

Flags override environment variables, which override the config file. Without a config file, all limits come from
Envoy's routes and the buckets are in this process.

The config's files are reloaded when they change, and on SIGHUP. A config with an error is rejected as a whole, and the
previous one stays in force. A change of listen or store needs a restart.`,
		Args: noArguments,
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

// settings returns what the environment sets, and then what flags set. flags
// may be nil.
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
	used, getenv := make(map[string]bool), p.getenv
	recording := *p
	recording.getenv = func(name string) (string, bool) {
		used[name] = true
		return getenv(name)
	}
	source := p.configFile(config, settings)
	source.load = recording.configFile(config, settings).load
	s, err := startSidecar(ctx, source, p.stderr)
	switch {
	case ctx.Err() != nil && s == nil:
		return nil // stopped before there was anything to shut down
	case err != nil:
		return p.printErrors(err)
	}
	if unknown := p.unknownVariables(used); len(unknown) > 0 {
		s.log.Warn("unknown environment variables, ignored", zap.Strings("variables", unknown))
	}
	return s.serve(ctx)
}

// load reads a config, and prints every error in it on a line of its own.
func (p *program) load(file string, settings ...policy.Setting) (*policy.Config, error) {
	cfg, _, err := policy.Load(file, p.getenv, settings...)
	return cfg, p.printErrors(err)
}

// printErrors prints the errors of a config and returns errNo, or errUsage if
// one is in a flag. It returns any other error as it is.
func (p *program) printErrors(err error) error {
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

// unknownVariables returns the names of environment variables that begin with
// SLUICE_ and have no meaning: they are probably misspelt. It leaves out used,
// those that the config refers to, and those that Kubernetes and Docker set for
// a Service named sluice.
func (p *program) unknownVariables(used map[string]bool) []string {
	known := map[string]bool{"SLUICE_CONFIG": true}
	for _, s := range settings {
		known[s.env] = true
	}
	var unknown []string
	for _, v := range p.environ() {
		name, value, _ := strings.Cut(v, "=")
		if !strings.HasPrefix(name, "SLUICE_") || known[name] || used[name] {
			continue
		}
		if !serviceVariable.MatchString(name) && !strings.Contains(value, "://") {
			unknown = append(unknown, name)
		}
	}
	slices.Sort(unknown)
	return unknown
}

// serviceVariable matches the variables that Kubernetes and Docker set for
// Services and links, except for SLUICE_PORT, whose value is a URL.
var serviceVariable = regexp.MustCompile(
	`_SERVICE_(HOST|PORT)(_[A-Z0-9_]+)?$|_PORT_[0-9]+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?$`)

// tuneGC lets the heap grow to three times its live size before it is collected.
// A sidecar's live heap is a few megabytes; with Go's default of twice that, it
// would be collected hundreds of times a second under load, which takes a fifth
// of the process' CPU time. Near GOMEMLIMIT the collector still runs as often as
// it has to.
func tuneGC(getenv func(string) (string, bool)) { setGC(getenv, 200) }

// setGC sets the garbage collector's target percentage. GOGC takes precedence.
func setGC(getenv func(string) (string, bool), percent int) {
	if _, ok := getenv("GOGC"); !ok {
		debug.SetGCPercent(percent)
	}
}

// lowerMemoryLimit lowers the memory limit of the Go runtime, at most to a half.
// As shipped, GOMEMLIMIT is the container's limit. The runtime does not count
// the pages of the program's file, nor what the kernel uses for the process,
// such as socket buffers; a fifth is reserved for the latter.
func lowerMemoryLimit() {
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
