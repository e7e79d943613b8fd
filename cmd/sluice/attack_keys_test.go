package main

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"

	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"google.golang.org/grpc"

	"github.com/sluiceproxy/sluice/limiter/redistest"
)

// TestAttackKeys checks that buckets in process stay within the memory of a
// sidecar if their keys are long, and if there are more than fit.
func TestAttackKeys(t *testing.T) {
	const most = 100 << 20 // of the container's 128 MiB
	for _, keys := range []struct {
		name, key string
		parts, n  int
	}{
		{"450 bytes", "[request.headers.a, request.headers.b, request.headers.c, request.headers.d, request.headers.e, " +
			"request.headers.f, request.headers.g, request.headers.h]",
			8, redistest.Scaled(1000, 12_000)},
		{"60 bytes", "request.headers.a", 1, redistest.Scaled(10_000, 300_000)},
	} {
		t.Run(keys.name, func(t *testing.T) {
			p := startShipped(
				t, "--config", file(t, "sluice.yaml", "limits: [{name: a, rate: 1/d, burst: 2, key: "+keys.key+"}]"),
			)
			var conns []*grpc.ClientConn
			for range 4 {
				conns = append(conns, dial(t, p.grpc))
			}
			var next atomic.Int64
			var wg sync.WaitGroup
			for caller := range 64 {
				wg.Go(func() {
					c := authv3.NewAuthorizationClient(conns[caller%len(conns)])
					for i := int(next.Add(1)); i <= keys.n; i = int(next.Add(1)) {
						headers := make(map[string]string, keys.parts)
						for part := range keys.parts {
							headers[string(rune('a'+part))] = fmt.Sprint("client ", i)
						}
						if _, err := c.Check(context.Background(), checkRequest("203.0.113.1", "GET", "/", headers)); err != nil {
							t.Error(err)
							return
						}
					}
				})
			}
			wg.Wait()
			p.wantWithin(t, most)
		})
	}
}
