package main

import (
	"fmt"
	"strconv"
	"strings"
	"testing"
	"time"

	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"

	"github.com/sluiceproxy/sluice/limiter/redistest"
)

// BenchmarkGrowth prints how sluice's cost grows: with the number of limits,
// with keys, with sidecars that share one Redis, and on a Redis Cluster of
// three masters. By 64 callers, each row beside the first of its kind.
//
//	go test ./cmd/sluice -run '^$' -bench Growth -benchtime 1x
func BenchmarkGrowth(b *testing.B) {
	const each, rounds = 30_000, 3
	store := redistest.Start(b)
	config := func(limits int, redis string) string {
		var text strings.Builder
		text.WriteString(redis + "limits:\n  - {name: per-client, key: client.ip, rate: 1000000000/s}\n")
		for i := range limits - 1 {
			fmt.Fprintf(&text, "  - {name: l%d, match: {paths: [/elsewhere/%d]}, rate: 1/s}\n", i, i)
		}
		return file(b, "sluice.yaml", text.String())
	}
	keys := func(n int) []*authv3.CheckRequest {
		all := make([]*authv3.CheckRequest, n)
		for i := range all {
			all[i] = from(fmt.Sprintf("10.%d.%d.%d", i>>16, i>>8&255, i&255), "/v1/orders?page=2")
		}
		return all
	}
	show := func(what string, s *measured, sidecars []*measured) {
		for range rounds {
			before := make([]time.Duration, len(sidecars))
			for i, o := range sidecars {
				before[i] = redistest.ProcessTime(b, o.process.cmd.Process.Pid)
			}
			s.round(b, store, 64, each, true)
			for i, o := range sidecars {
				s.cpu += redistest.ProcessTime(b, o.process.cmd.Process.Pid) - before[i]
			}
		}
		fmt.Printf("%-28s %10.1f %10.1f %10.0f\n", what, s.server(), s.ofRedis(), s.throughput())
	}
	for b.Loop() {
		fmt.Printf("\n%-28s %10s %10s %10s\n", "", "server µs", "Redis µs", "checks/s")
		for _, limits := range []int{1, 10, 100, 1000, 10_000} {
			s := &measured{name: "limits", process: startSluice(b, "--config", config(limits, "")), requests: keys(1000)}
			s.start(b)
			show(fmt.Sprint(limits, " limits, in process"), s, nil)
			s.process.stop()
		}
		for _, n := range []int{1, 1000, 100_000, 1_000_000} {
			s := &measured{
				name:     "keys",
				process:  startSluice(b, "--config", config(1, ""), "--redis", store.URL(), "--domain", fmt.Sprint("keys-", n)),
				requests: keys(min(n, rounds*each)),
			}
			s.start(b)
			if n > len(s.requests) { // the others are in Redis before
				fill(b, store, n-len(s.requests))
			}
			show(fmt.Sprint(n, " keys, on Redis"), s, nil)
			s.process.stop()
		}
		// As many servers that decide nothing are measured, too, because so many
		// processes compete for few cores.
		for _, n := range []int{1, 10, 50} {
			for _, kind := range []struct {
				name  string
				start func() *process
				stop  func(*process)
			}{
				{
					"constant answers", func() *process { return startBaseline(b, "constant", nil, "tuned") },
					func(p *process) { _ = p.cmd.Process.Kill() },
				},
				{"sidecars on one Redis", func() *process {
					return startSluice(b, "--config", config(1, ""), "--redis", store.URL(), "--domain", fmt.Sprint("many-", n))
				}, func(p *process) { p.stop() }},
			} {
				all := &measured{name: kind.name, requests: keys(1000)}
				var servers []*measured
				for range n {
					s := &measured{name: kind.name, process: kind.start(), requests: all.requests}
					s.start(b)
					servers = append(servers, s)
					all.conns = append(all.conns, s.conns[0])
				}
				all.process = servers[0].process
				show(fmt.Sprint(n, " ", kind.name), all, servers[1:])
				for _, s := range servers {
					kind.stop(s.process)
				}
			}
		}
		nodes := redistest.StartCluster(b, 3)
		var addresses []string
		for _, node := range nodes {
			addresses = append(addresses, strconv.Quote(node.Addr))
		}
		s := &measured{name: "cluster", process: startSluice(b, "--config", config(1,
			"store: {redis: {mode: cluster, addresses: ["+strings.Join(addresses, ", ")+"]}}\n")), requests: keys(1000)}
		s.start(b)
		show("a cluster of 3 masters", s, nil) // Redis's time is not that of store
		s.process.stop()
	}
}

// fill stores n keys that nobody reads.
func fill(b *testing.B, store *redistest.Server, n int) {
	b.Helper()
	client, text := store.Client(), strings.Repeat("x", 37)
	for at := 0; at < n; {
		p := client.Pipeline()
		for range min(10_000, n-at) {
			p.Set(b.Context(), fmt.Sprintf("sluice:fill:per-client:{%d}", at), text, time.Hour)
			at++
		}
		if _, err := p.Exec(b.Context()); err != nil {
			b.Fatal(err)
		}
	}
}
