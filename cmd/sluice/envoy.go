package main

import (
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/sluiceproxy/sluice/envoy"
	"github.com/sluiceproxy/sluice/limiter/policy"
)

// reachable returns the address at which an Envoy on the same machine reaches a
// sidecar that listens on addr. For an unspecified address, such as 0.0.0.0, it
// returns loopback.
func reachable(addr string) string {
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return addr // a unix socket
	}
	if ip, err := netip.ParseAddr(host); host == "" || err == nil && ip.IsUnspecified() {
		return net.JoinHostPort("127.0.0.1", port)
	}
	return addr
}

// Where sluice listens in a cluster, whatever its config says.
const (
	injectedBesideIstio = "127.0.0.1:9001" // as a sidecar beside istio-proxy
	chartPort           = "9001"           // as the chart's Deployment
)

// chains renders the configurations that `sluice envoy` prints, by their names.
var chains = map[string]func(envoy.Options) ([]byte, error){
	"plain":          envoy.Plain,
	"istio":          envoy.Istio,
	"istio-gateway":  envoy.IstioGateway,
	"istio-waypoint": envoy.IstioWaypoint,
	"envoy-gateway":  envoy.Gateway,
}

func (p *program) envoyCommand() *cobra.Command {
	var config, version string
	c := &cobra.Command{
		Use:   "envoy [plain|istio|istio-gateway|istio-waypoint|envoy-gateway]",
		Short: "Print the Envoy configuration for sluice",
		Long: `Print the Envoy configuration for sluice, with comments that explain each line:

plain           a complete Envoy bootstrap, with a listener on port 8080 and an upstream on 127.0.0.1:8081 (default).
                Run it with: envoy -c <(sluice envoy plain)
istio           for pods in an Istio mesh, with sluice as their sidecar
istio-gateway   for an Istio ingress gateway, with sluice as a Deployment
istio-waypoint  for a waypoint of Istio's ambient mode, with sluice as a Deployment
envoy-gateway   for a Gateway of Envoy Gateway, with sluice as a Deployment

All but plain are Kubernetes objects. Apply them with, for example: sluice envoy istio | kubectl apply -f -

With --config the configuration fits a config of sluice: where it listens, with which TLS, and what its limits read of
other filters and of responses.`,
		ValidArgs: slices.Sorted(maps.Keys(chains)),
		Args:      oneChain,
		RunE: func(_ *cobra.Command, args []string) error {
			kind := append(args, "plain")[0]
			release, err := envoy.ParseRelease(version)
			if err != nil {
				return usageError{fmt.Errorf("--envoy-version %q: %w", version, err)}
			}
			o := envoy.Options{Envoy: release}
			if config != "" {
				cfg, err := p.load(config, p.settings(nil)...)
				if err != nil {
					return err
				}
				o.Sluice = reachable(cfg.Listen.GRPC)
				for _, l := range cfg.Limits() {
					o.Limits = append(o.Limits, l.Name)
				}
				o.Metadata = cfg.ReadsMetadata()
				o.Settle = settleOf(cfg)
				if t := cfg.ListenTLS; t != nil {
					o.TLS = &envoy.TLS{Name: t.DNSName(), ClientCert: t.ClientCAs != nil}
				}
			}
			chain, err := chains[kind](o)
			switch {
			case errors.Is(err, envoy.ErrNoName):
				return fmt.Errorf("%s: %w", config, err)
			case err != nil:
				return fmt.Errorf("%s: listen.grpc: %w", config, err)
			}
			for _, w := range chainWarnings(kind, config, &o) {
				_, _ = fmt.Fprintf(p.stderr, "warning: %s %s\n", config, w)
			}
			_, err = p.stdout.Write(chain)
			return err
		},
	}
	c.Flags().StringVar(&config, "config", "",
		"sluice's config `file`, which the configuration then fits")
	c.Flags().StringVar(&version, "envoy-version", envoy.Version,
		"version of the Envoy that reads the configuration, `MAJOR.MINOR`, 1.36 or newer")
	return c
}

// oneChain is the Args of envoy.
func oneChain(c *cobra.Command, args []string) error {
	switch {
	case len(args) == 0 || len(args) == 1 && chains[args[0]] != nil:
		return nil
	case isConfig(args[len(args)-1]):
		return fmt.Errorf("unexpected argument %q; write --config %s", args[len(args)-1], args[len(args)-1])
	case len(args) > 1:
		return fmt.Errorf("unexpected argument %q; want one configuration", args[1])
	}
	return fmt.Errorf("unknown configuration %q; want one of %s", args[0], strings.Join(c.ValidArgs, ", "))
}

// settleOf returns what Envoy has to report of the ends of requests; nil if no
// limit of the config settles.
func settleOf(cfg *policy.Config) *envoy.Settle {
	if !cfg.Settles() {
		return nil
	}
	headers, trailers := cfg.SettleReads()
	return &envoy.Settle{Headers: headers, Trailers: trailers}
}

// chainWarnings returns what does not work as the config says in the
// configuration of a kind, each without its subject, which is the config.
func chainWarnings(kind, config string, o *envoy.Options) (all []string) {
	edge := kind == "istio-gateway" || kind == "istio-waypoint"
	if o.Metadata && kind == "envoy-gateway" {
		all = append(all, "reads metadata, which Envoy Gateway does not send to an ext_authz service: "+
			"use claims from headers instead, as the comments show")
	}
	if o.Metadata && edge {
		all = append(all, "reads metadata, which Istio's gateways and waypoints do not send to an ext_authz service: "+
			"it is always absent")
	}
	if o.TLS != nil && kind == "istio" && !o.Metadata {
		all = append(all, "has listen.tls, for which nothing is printed: "+
			"sluice in a pod is asked on the loopback address, without TLS; "+
			"remove listen.tls from the config of injected pods, or every request is answered with 503")
	}
	if config == "" {
		return all
	}
	_, port, _ := net.SplitHostPort(o.Sluice)
	switch {
	case kind == "istio" && o.Sluice != injectedBesideIstio:
		all = append(all, fmt.Sprintf("has listen.grpc: %s, which is printed; "+
			"but a sidecar beside istio-proxy always listens on %s", o.Sluice, injectedBesideIstio))
	case (edge || kind == "envoy-gateway") && port != chartPort && !strings.HasPrefix(o.Sluice, "unix://"):
		all = append(all, fmt.Sprintf("has listen.grpc: %s, whose port is printed; "+
			"but the chart's Deployment always listens on port %s", o.Sluice, chartPort))
	}
	return all
}
