package main

import (
	"fmt"
	"net"
	"net/netip"

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

func (p *program) envoyCommand() *cobra.Command {
	var config string
	c := &cobra.Command{
		Use:   "envoy [plain]",
		Short: "Print the Envoy config that asks sluice",
		Long: `Print a complete Envoy bootstrap with sluice in its filter chain, for a listener on port 8080 and an upstream on
127.0.0.1:8081. Run it with: envoy -c <(sluice envoy plain)`,
		ValidArgs: []string{"plain"},
		Args:      cobra.MatchAll(cobra.MaximumNArgs(1), cobra.OnlyValidArgs),
		RunE: func(*cobra.Command, []string) error {
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
			}
			bootstrap, err := envoy.Plain(o)
			if err != nil {
				return fmt.Errorf("%s: listen.grpc: %w", config, err)
			}
			_, err = p.stdout.Write(bootstrap)
			return err
		},
	}
	c.Flags().StringVar(&config, "config", "", "sluice's config `file`, whose listen.grpc is where Envoy asks, and whose limits a route can choose from")
	return c
}
