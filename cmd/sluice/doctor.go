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
)

func (p *program) doctorCommand() *cobra.Command {
	var config, output string
	var envoyTimeout time.Duration
	c := &cobra.Command{
		Use:   "doctor",
		Short: "Check what goes wrong in practice",
		Long: `Check the store for what goes wrong in practice: whether it can be reached and in what time, rights, the script, the clock, eviction,
persistence, replication, a cluster's slots, and the timeouts against Envoy's. One take, from a bucket of its own, is tried. Exit status 1: a check failed; warnings do not count.`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			asJSON, err := isJSON(output)
			if err != nil {
				return err
			}
			if envoyTimeout <= 0 {
				return usageError{fmt.Errorf("--envoy-timeout %v: allowed are durations above 0", envoyTimeout)}
			}
			return p.doctor(c.Context(), config, envoyTimeout, asJSON)
		},
	}
	c.Flags().StringVar(&config, "config", "", "`file` with the store (default $SLUICE_CONFIG)")
	c.Flags().DurationVar(&envoyTimeout, "envoy-timeout", 200*time.Millisecond, "the timeout of Envoy's ext_authz filter")
	outputFlag(c, &output)
	return c
}

// diagnosis is doctor's result, as JSON has it.
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
	d := diagnosis{Checks: []diagnosed{{"config", limiter.OK, fmt.Sprintf("%d limits", len(cfg.Limits())), ""}}}
	if cfg.Redis == nil {
		d.Checks = append(d.Checks, diagnosed{"store", limiter.Warn, "in process: each sidecar has buckets of its own, and a restart fills them",
			"store.redis, where several sidecars shall share their limits"})
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

// slotsOf says which limits share a cluster's hash slot.
func slotsOf(byKey [][]string) string {
	if len(byKey) < 2 {
		return "all limits of a request share a hash slot, and so a call"
	}
	const most = 10 // of the groups, and of the names of one
	more := func(s []string, by string) string {
		if len(s) > most {
			s = append(slices.Clip(s[:most]), fmt.Sprintf("%d more", len(s)-most))
		}
		return strings.Join(s, by)
	}
	groups := make([]string, len(byKey))
	for i, names := range byKey {
		groups[i] = more(names, ", ")
	}
	return "a request takes from these in calls of their own, as their keys differ and so their hash slots: " + more(groups, " | ")
}

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
