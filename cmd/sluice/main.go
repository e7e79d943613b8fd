// Command sluice is a token-bucket rate limiter for Envoy: a sidecar that answers ext_authz checks from buckets which all
// sidecars share through Redis. See the README.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"
	_ "time/tzdata" // expressions name time zones, and an image may have none
)

func main() {
	os.Exit(run(context.Background(), os.Args[1:], os.LookupEnv, os.Stdout, os.Stderr))
}

// untilSignal returns a context that ends with the first SIGINT or SIGTERM,
// for a command that then stops in its own way. A second Ctrl-C kills; a
// second SIGTERM does not, because timeout(1) and some supervisors send two at
// once, and the grace bounds the stop anyway. A command that does not call it
// ends with the first signal, whatever it waits for.
func untilSignal(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, stop := signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, func() { signal.Reset(os.Interrupt) })
	return ctx, stop
}
