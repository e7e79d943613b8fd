package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spf13/cobra"

	"github.com/sluiceproxy/sluice/limiter"
	"github.com/sluiceproxy/sluice/limiter/policy"
)

func (p *program) doctorCommand() *cobra.Command {
	var config, output string
	var envoyTimeout time.Duration
	c := &cobra.Command{
		Use:   "doctor",
		Short: "Diagnose the Redis store and how it is run",
		Long: `Diagnose the Redis store and how it is run.

doctor checks reachability, round-trip time, permissions, the Lua script, the clock, eviction, persistence, replication,
a cluster's slots, and the timeout compared with Envoy's. It takes one token, from a bucket of its own.

Exit status 1: a check failed. Warnings do not change it.`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			asJSON, err := isJSON(output)
			if err != nil {
				return err
			}
			if envoyTimeout <= 0 {
				return usageError{fmt.Errorf("--envoy-timeout %v: must be above 0", envoyTimeout)}
			}
			return p.doctor(c.Context(), config, envoyTimeout, asJSON)
		},
	}
	c.Flags().StringVar(&config, "config", "", "`file` with the store (default $SLUICE_CONFIG)")
	c.Flags().DurationVar(&envoyTimeout, "envoy-timeout", 200*time.Millisecond,
		"timeout of Envoy's ext_authz filter, a `duration`")
	outputFlag(c, &output)
	return c
}

// diagnosis is the result of doctor, as -o json prints it.
type diagnosis struct {
	Checks []diagnosed `json:"checks"`
}

type diagnosed struct {
	Name   string                `json:"name"`
	Status limiter.FindingStatus `json:"status"`
	Detail string                `json:"detail"`
	Fix    string                `json:"fix"`
}

func (p *program) doctor(ctx context.Context, config string, envoyTimeout time.Duration, asJSON bool) error {
	if config == "" {
		config, _ = p.getenv("SLUICE_CONFIG")
	}
	cfg, err := p.load(config, p.settings(nil)...)
	if err != nil {
		return err
	}
	limits := "1 limit"
	if n := len(cfg.Limits()); n != 1 {
		limits = fmt.Sprintf("%d limits", n)
	}
	d := diagnosis{Checks: []diagnosed{{"config", limiter.OK, limits, ""}}}
	if cfg.Redis == nil {
		d.Checks = append(d.Checks, diagnosed{"store", limiter.Warn,
			"in process: each sidecar has its own buckets, and they are full after a restart",
			"set store.redis, if several sidecars have to share their limits"})
	} else {
		redis, err := limiter.NewRedis(*cfg.Redis, nil, prometheus.NewRegistry())
		if err != nil {
			return fmt.Errorf("store.redis: %w", err)
		}
		defer func() { _ = redis.Close() }()
		for _, f := range redis.Diagnose(ctx, cfg.KeyPrefix()+":"+cfg.Domain, envoyTimeout) {
			d.Checks = append(d.Checks, diagnosed{f.Name, f.Status, f.Detail, f.Fix})
		}
		if cfg.Redis.Mode == limiter.Cluster {
			d.Checks = append(d.Checks, diagnosed{"slots", limiter.OK, slotsOf(cfg.ByKey()), ""})
		}
		d.Checks = append(d.Checks, longLeases(cfg.Describe())...)
	}
	failed := false
	for _, c := range d.Checks {
		failed = failed || c.Status == limiter.Fail
	}
	if asJSON {
		err = p.printJSON(d)
	} else {
		err = p.printDiagnosis(d)
	}
	if err == nil && failed {
		err = errNo
	}
	return err
}

// longLeases warns of leases that may hold more than a bucket has. While a lease
// is renewed, its sidecar holds up to twice what it uses in one, so at the full
// rate all of them hold up to 2·lease·rate.
func longLeases(limits []policy.Described) (warnings []diagnosed) {
	for _, l := range limits {
		if lease := l.Limit.Lease; lease > l.FillTime/2 {
			warnings = append(warnings, diagnosed{"lease", limiter.Warn,
				fmt.Sprintf("%s: a lease of %v is long for a burst that the rate brings in %v: what some sidecars hold, others lack",
					l.Limit.Name, lease, l.FillTime),
				fmt.Sprintf("set lease to %v at most, or raise burst", l.FillTime/2)})
		}
	}
	return warnings
}

// slotsOf describes which limits share a hash slot of a cluster.
func slotsOf(byKey [][]string) string {
	if len(byKey) < 2 {
		return "all limits of a request share a hash slot, and so one call"
	}
	const most = 10 // groups, and names in a group
	shorten := func(s []string, by string) string {
		if len(s) > most {
			s = append(slices.Clip(s[:most]), fmt.Sprintf("%d more", len(s)-most))
		}
		return strings.Join(s, by)
	}
	groups := make([]string, len(byKey))
	for i, names := range byKey {
		groups[i] = shorten(names, ", ")
	}
	return "limits with different keys are in different hash slots; each slot needs a call of its own: " +
		shorten(groups, " | ")
}

// printDiagnosis prints the result as text.
func (p *program) printDiagnosis(d diagnosis) error {
	var errs []error
	for _, c := range d.Checks {
		_, err := fmt.Fprintf(p.stdout, "%-4s  %-12s  %s\n", c.Status, c.Name, c.Detail)
		errs = append(errs, err)
		if c.Fix != "" {
			_, err = fmt.Fprintf(p.stdout, "%20s%s\n", "", "→ "+c.Fix)
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}
