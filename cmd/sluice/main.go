// Command sluice is a token-bucket rate limiter for Envoy: a sidecar that
// answers ext_authz checks from buckets that all sidecars share through Redis.
// See the README.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"
	_ "time/tzdata" // for expressions that name time zones; an image may have none
)

func main() {
	os.Exit(run(context.Background(), os.Args[1:], os.LookupEnv, os.Stdout, os.Stderr))
}

// untilSignal returns a context that ends with the first SIGINT or SIGTERM, for
// a command that shuts down by itself. A second SIGINT kills the process. A
// second SIGTERM does not, because timeout(1) and some supervisors send two at
// once; the grace period bounds the shutdown anyway. A command that does not
// call untilSignal is killed by the first signal.
func untilSignal(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, stop := signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, func() { signal.Reset(os.Interrupt) })
	return ctx, stop
}
