package main

import (
	"context"
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"

	"github.com/sluiceproxy/sluice/limiter/redistest"
)

// BenchmarkReload renames 10,000 limits while a client sends one check after
// another:
//
//	go test ./cmd/sluice -run '^$' -bench Reload -benchtime 1x
//
// It reports the time from the change of the file until the new config is in
// force, the processor time, and the slowest check in the second before the
// change and during the reload.
func BenchmarkReload(b *testing.B) {
	executable = build(b)
	b.Cleanup(func() { executable = os.Args[0] })
	limits := manyLimits(10_000)
	path := file(b, "sluice.yaml", limits)
	p := startSluice(b, "--config", path)
	client := authv3.NewAuthorizationClient(dial(b, p.grpc))

	var mu sync.Mutex
	var slowest time.Duration
	took := func() time.Duration {
		mu.Lock()
		defer mu.Unlock()
		d := slowest
		slowest = 0
		return d
	}
	done := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			select {
			case <-done:
				return
			default:
			}
			began := time.Now()
			_, err := client.Check(context.Background(), checkRequest("203.0.113.1", "GET", "/5", nil))
			if err != nil {
				b.Error(err)
				return
			}
			mu.Lock()
			slowest = max(slowest, time.Since(began))
			mu.Unlock()
		}
	})
	reloads := 0
	for b.Loop() {
		b.StopTimer()
		took()
		<-time.After(time.Second) // what is measured
		quiet, before := took(), redistest.ProcessTime(b, p.cmd.Process.Pid)
		reloads++
		renamed := strings.ReplaceAll(limits, "name: limit-", fmt.Sprintf("name: renamed-%d-", reloads))
		if err := os.WriteFile(path+".new", []byte(renamed), 0o600); err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
		if err := os.Rename(path+".new", path); err != nil {
			b.Fatal(err)
		}
		eventually(b, "the reload", func() bool { return strings.Count(p.logged(), `"config reloaded"`) == reloads })
		b.StopTimer()
		b.ReportMetric(float64((redistest.ProcessTime(b, p.cmd.Process.Pid) - before).Milliseconds()), "cpu-ms")
		b.ReportMetric(float64(quiet.Milliseconds()), "slowest-quiet-ms")
		b.ReportMetric(float64(took().Milliseconds()), "slowest-ms")
		b.StartTimer()
	}
	close(done)
	wg.Wait()
}
