// Command sluice is a token-bucket rate limiter for Envoy: a sidecar that answers ext_authz checks from buckets which all
// sidecars share through Redis. See the README.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"
)

func main() {
	// The first signal ends ctx, and the command stops in its own way. A second Ctrl-C then kills; a second SIGTERM does not, as timeout(1) and
	// some supervisors send two at once, and the grace bounds the stop anyway.
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, func() { signal.Reset(os.Interrupt) })
	status := run(ctx, os.Args[1:], os.LookupEnv, os.Stdout, os.Stderr)
	stop()
	os.Exit(status)
}
