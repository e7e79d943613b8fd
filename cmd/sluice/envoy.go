package main

import (
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/sluiceproxy/sluice/envoy"
)

// reachable is where a sidecar that listens on addr can be asked by who runs beside it: an address that stands for all is none to
// connect to.
func reachable(addr string) string {
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return addr // a unix socket's
	}
	if ip, err := netip.ParseAddr(host); host == "" || err == nil && ip.IsUnspecified() {
		return net.JoinHostPort("127.0.0.1", port)
	}
	return addr
}

// Where sluice listens in a cluster, over what its config says.
const (
	injectedBesideIstio = "127.0.0.1:9001" // injected, where Envoy is istio-proxy
	chartPort           = "9001"           // of the chart's Deployment
)

// chains are the kinds of what `sluice envoy` prints.
var chains = map[string]func(envoy.Options) ([]byte, error){
	"plain":          envoy.Plain,
	"istio":          envoy.Istio,
	"istio-gateway":  envoy.IstioGateway,
	"istio-waypoint": envoy.IstioWaypoint,
	"envoy-gateway":  envoy.Gateway,
}

func (p *program) envoyCommand() *cobra.Command {
	var config string
	c := &cobra.Command{
		Use:   "envoy [plain|istio|istio-gateway|istio-waypoint|envoy-gateway]",
		Short: "Print the Envoy config that asks sluice",
		Long: `Print the filter chain that fits a config, with comments that say why each line is there:

plain           a complete Envoy bootstrap, for a listener on port 8080 and an upstream on 127.0.0.1:8081.
                Run it with: envoy -c <(sluice envoy plain)
istio           for pods in an Istio mesh. Apply it with: sluice envoy istio | kubectl apply -f -
istio-gateway   for an ingress gateway of Istio's, with sluice as a Deployment
istio-waypoint  for a waypoint of Istio's ambient mode, likewise
envoy-gateway   for a Gateway of Envoy Gateway's. Apply it with kubectl, too`,
		ValidArgs: slices.Sorted(maps.Keys(chains)),
		Args:      cobra.MatchAll(cobra.MaximumNArgs(1), cobra.OnlyValidArgs),
		RunE: func(_ *cobra.Command, args []string) error {
			kind := append(args, "plain")[0]
			o := envoy.Options{}
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
				if t := cfg.ListenTLS; t != nil {
					o.TLS = &envoy.TLS{Name: t.DNSName(), ClientCert: t.ClientCAs != nil}
				}
			}
			chain, err := chains[kind](o)
			if err != nil {
				return fmt.Errorf("%s: listen.grpc: %w", config, err)
			}
			warn := func(why string) { _, _ = fmt.Fprintf(p.stderr, "warning: %s %s\n", config, why) }
			edge := kind == "istio-gateway" || kind == "istio-waypoint"
			if o.Metadata && kind == "envoy-gateway" {
				warn("reads metadata, which Envoy Gateway sends to no ext_authz service: take claims from headers, as the comments say")
			}
			if o.Metadata && edge {
				warn("reads metadata, which Istio has its gateways and waypoints send to no ext_authz service: it is always absent")
			}
			if o.TLS != nil && kind != "plain" && (kind != "istio" || !o.Metadata) {
				warn("has listen.tls, for which nothing is printed here: in a mesh say it by a DestinationRule, behind Envoy Gateway by a BackendTLSPolicy")
			}
			switch _, port, _ := net.SplitHostPort(o.Sluice); {
			case config == "":
			case kind == "istio" && o.Sluice != injectedBesideIstio:
				warn(fmt.Sprintf("says listen.grpc: %s, which is printed; but sluice that is injected beside istio-proxy listens on %s, whatever the file says", o.Sluice, injectedBesideIstio))
			case (edge || kind == "envoy-gateway") && port != chartPort && !strings.HasPrefix(o.Sluice, "unix://"):
				warn(fmt.Sprintf("says listen.grpc: %s, whose port is printed; but the chart's Deployment listens on %s, whatever the file says", o.Sluice, chartPort))
			}
			_, err = p.stdout.Write(chain)
			return err
		},
	}
	c.Flags().StringVar(&config, "config", "", "sluice's config `file`, whose listen.grpc is where Envoy asks, and whose limits a route can choose from")
	return c
}
