package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spf13/cobra"

	"github.com/sluiceproxy/sluice/limiter"
	"github.com/sluiceproxy/sluice/limiter/policy"
)

// defaultEnvoyTimeout is the timeout of Envoy's ext_authz filter where its
// config says none, and in the chains that sluice envoy prints.
const defaultEnvoyTimeout = 200 * time.Millisecond

func (p *program) doctorCommand() *cobra.Command {
	var config, output string
	var of envoyFlags
	var envoyTimeout time.Duration
	c := &cobra.Command{
		Use:   "doctor",
		Short: "Diagnose the Redis store, and how Envoy asks sluice",
		Long: `Diagnose the Redis store and how it is run, and with --envoy-admin or --envoy-config how Envoy asks sluice.

doctor checks reachability, round-trip time, permissions, the Lua script, the clock, eviction, persistence, replication,
a cluster's slots, and the timeout compared with Envoy's. It takes one token, from a bucket of its own.

--envoy-config FILE reads a bootstrap of Envoy's, in YAML or JSON, or a saved /config_dump. --envoy-admin URL asks a
running Envoy for that and for its counters, without changing anything; its admin interface is, for example,

  http://127.0.0.1:9901    a plain Envoy (admin in its bootstrap)
  http://127.0.0.1:15000   Istio: kubectl port-forward POD 15000
  http://127.0.0.1:19000   Envoy Gateway: kubectl port-forward POD 19000
  unix:///admin/admin.sock Contour, in Envoy's pod

Then doctor looks at the ext_authz filter and its place beside cors, grpc_web, jwt_authn and router; routes that disable
it; the cluster (HTTP/2, TLS, address); timeout, retries, and what happens while sluice does not answer; bodies; headers
about limits that others send; metadata, principals and headers that the config reads; the access log for settle; and,
with --envoy-admin, whether sluice is asked, whether checks fail, and why. Each finding has the line that mends it.
With --config it compares Envoy's config with sluice's own; without, only that of Envoy is looked at.

Exit status 1: a check failed. Warnings do not change it.`,
		Example: `  sluice doctor --config sluice.yaml
  sluice doctor --config sluice.yaml --envoy-admin http://127.0.0.1:9901
  curl -s http://127.0.0.1:9901/config_dump >dump.json && sluice doctor --config sluice.yaml --envoy-config dump.json`,
		Args: noArguments,
		RunE: func(c *cobra.Command, _ []string) error {
			asJSON, err := isJSON(output)
			if err != nil {
				return err
			}
			if envoyTimeout <= 0 {
				return usageError{fmt.Errorf("--envoy-timeout %v: must be above 0", envoyTimeout)}
			}
			if err := of.check(); err != nil {
				return err
			}
			if of.given() && !c.Flags().Changed("envoy-timeout") {
				envoyTimeout = 0 // the filter's own is looked at
			}
			return p.doctor(c.Context(), config, &of, c.InOrStdin(), envoyTimeout, asJSON)
		},
	}
	c.Flags().StringVar(&config, "config", "", "`file` with the store (default $SLUICE_CONFIG)")
	c.Flags().DurationVar(&envoyTimeout, "envoy-timeout", defaultEnvoyTimeout,
		"`duration` that Envoy's ext_authz filter waits for sluice; read from Envoy with --envoy-admin or --envoy-config")
	c.Flags().StringVar(&of.admin, "envoy-admin", "", "`URL` of Envoy's admin interface")
	c.Flags().StringVar(&of.file, "envoy-config", "", "`file` with Envoy's config, or - for stdin")
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

func (p *program) doctor(
	ctx context.Context, config string, of *envoyFlags, stdin io.Reader, envoyTimeout time.Duration, asJSON bool,
) error {
	config, err := p.configOrVariable(config)
	if err != nil && !of.given() {
		return err
	}
	var d diagnosis
	var cfg *policy.Config
	if config == "" && of.given() {
		d.add(limiter.Finding{Name: "config", Status: limiter.OK,
			Detail: "none: give --config to compare Envoy's config with sluice's, and to check the store"})
	} else {
		if cfg, err = p.load(config, p.settings(nil)...); err != nil {
			return err
		}
		if err := d.addStore(ctx, cfg, envoyTimeout); err != nil {
			return err
		}
	}
	if of.given() {
		if err := d.addEnvoy(ctx, of, stdin, cfg); err != nil {
			return err
		}
	}
	failed := slices.ContainsFunc(d.Checks, func(c diagnosed) bool { return c.Status == limiter.Fail })
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

func (d *diagnosis) add(f limiter.Finding) {
	d.Checks = append(d.Checks, diagnosed{f.Name, f.Status, f.Detail, f.Fix})
}

// addStore adds what is found about a config and its store.
func (d *diagnosis) addStore(ctx context.Context, cfg *policy.Config, envoyTimeout time.Duration) error {
	limits := "1 limit"
	if n := len(cfg.Limits()); n != 1 {
		limits = fmt.Sprintf("%d limits", n)
	}
	d.add(limiter.Finding{Name: "config", Status: limiter.OK, Detail: limits})
	if cfg.Redis == nil {
		d.add(limiter.Finding{Name: "store", Status: limiter.Warn,
			Detail: "in process: each sidecar has its own buckets, and they are full after a restart",
			Fix:    "set store.redis, if several sidecars have to share their limits"})
		return nil
	}
	redis, err := limiter.NewRedis(*cfg.Redis, nil, prometheus.NewRegistry())
	if err != nil {
		return fmt.Errorf("store.redis: %w", err)
	}
	defer func() { _ = redis.Close() }()
	for _, f := range redis.Diagnose(ctx, cfg.KeyPrefix()+":"+cfg.Domain, envoyTimeout) {
		d.add(f)
	}
	if cfg.Redis.Mode == limiter.Cluster {
		d.add(limiter.Finding{Name: "slots", Status: limiter.OK, Detail: slotsOf(cfg.ByKey())})
	}
	d.Checks = append(d.Checks, longLeases(cfg.Describe())...)
	return nil
}

// longLeases warns of leases that may hold more than a bucket has. While a lease
// is renewed, its sidecar holds up to twice what it uses in one, so at the full
// rate all of them hold up to 2·lease·rate.
func longLeases(limits []policy.Described) (warnings []diagnosed) {
	for _, l := range limits {
		if lease := l.Limit.Lease; lease > l.FillTime/2 {
			warnings = append(warnings, diagnosed{"lease", limiter.Warn,
				fmt.Sprintf("%s: a lease of %v is long for a burst that refills in %v: "+
					"tokens that one sidecar holds are missing at the others", l.Limit.Name, lease, l.FillTime),
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
