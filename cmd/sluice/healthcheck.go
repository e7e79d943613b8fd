package main

import (
	"context"
	"fmt"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
)

// healthTimeout is below the second that Kubernetes gives a probe by default.
const healthTimeout = 900 * time.Millisecond

func (p *program) healthcheckCommand() *cobra.Command {
	var addr string
	c := &cobra.Command{
		Use:   "healthcheck",
		Short: "Ask the running sidecar's gRPC health service, for exec probes",
		Args:  cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			if addr == "" {
				addr = defaultGRPC
				if env, ok := p.getenv("SLUICE_GRPC"); ok && env != "" {
					addr = env
				}
			}
			return healthcheck(c.Context(), addr)
		},
	}
	c.Flags().StringVar(&addr, "grpc", "", "the sidecar's gRPC `address`, host:port or unix:///path (default $SLUICE_GRPC, else "+defaultGRPC+")")
	return c
}

func healthcheck(ctx context.Context, addr string) error {
	target := addr
	if _, _, err := splitAddress(addr); err != nil {
		return usageError{err}
	} else if addr[0] != 'u' {
		target = "passthrough:///" + addr
	}
	ctx, cancel := context.WithTimeout(ctx, healthTimeout)
	defer cancel()
	conn, err := grpc.NewClient(target, grpc.WithTransportCredentials(insecure.NewCredentials()))
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
