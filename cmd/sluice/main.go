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
	// The first signal ends ctx, and the command stops in its own way; stop puts the default back, so that a second one kills.
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop)
	os.Exit(run(ctx, os.Args[1:], os.LookupEnv, os.Stdout, os.Stderr))
}
