package main

import (
	"context"
	"fmt"
	"net"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
)

// healthTimeout is less than Kubernetes' default timeout of a probe, a second.
const healthTimeout = 900 * time.Millisecond

func (p *program) healthcheckCommand() *cobra.Command {
	var addr, cert, key string
	c := &cobra.Command{
		Use:   "healthcheck",
		Short: "Check the health of the running sidecar, for exec probes",
		Long: `Check the running sidecar by its gRPC health service, for exec probes.

If the config has listen.tls, set --tls-cert and --tls-key to its cert_file and key_file. The probe presents this
certificate, which the server always accepts, and expects the same certificate from the server.`,
		Args: noArguments,
		RunE: func(c *cobra.Command, _ []string) error {
			if addr == "" {
				addr = defaultGRPC
				if env, ok := p.getenv("SLUICE_GRPC"); ok && env != "" {
					addr = env
				}
			}
			secure := insecure.NewCredentials()
			if cert != "" || key != "" {
				config, err := ownTLS(cert, key)
				if err != nil {
					return fmt.Errorf("--tls-cert and --tls-key: %w", err)
				}
				secure = credentials.NewTLS(config)
			}
			return healthcheck(c.Context(), addr, secure)
		},
	}
	c.Flags().StringVar(&addr, "grpc", "",
		"the sidecar's gRPC `address`, host:port or unix:///path (default $SLUICE_GRPC, else "+defaultGRPC+")")
	c.Flags().StringVar(&cert, "tls-cert", "", "`file` with the server's own certificate, if the config has listen.tls")
	c.Flags().StringVar(&key, "tls-key", "", "`file` with the key of --tls-cert")
	c.MarkFlagsRequiredTogether("tls-cert", "tls-key")
	return c
}

func healthcheck(ctx context.Context, addr string, secure credentials.TransportCredentials) error {
	network, address, err := splitAddress(addr)
	if err != nil {
		return usageError{err}
	}
	target := addr
	if network != "unix" {
		target = "passthrough:///" + addr
	}
	ctx, cancel := context.WithTimeout(ctx, healthTimeout)
	defer cancel()
	// Dialed here, as gRPC wraps the error of its own dialing in three others.
	var dialer net.Dialer
	dialed, err := dialer.DialContext(ctx, network, address)
	if err != nil {
		return fmt.Errorf("%s does not answer: %w", addr, err)
	}
	defer func() { _ = dialed.Close() }()
	conn, err := grpc.NewClient(target, grpc.WithTransportCredentials(secure),
		grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) { return dialed, nil }))
	if err != nil {
		return fmt.Errorf("%s: %w", addr, err)
	}
	defer func() { _ = conn.Close() }()
	answer, err := grpc_health_v1.NewHealthClient(conn).Check(ctx, &grpc_health_v1.HealthCheckRequest{})
	if err != nil {
		return fmt.Errorf("%s does not answer: %s", addr, status.Convert(err).Message())
	}
	if answer.Status != grpc_health_v1.HealthCheckResponse_SERVING {
		return fmt.Errorf("%s is %v", addr, answer.Status)
	}
	return nil
}
