package main

import (
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"testing"
	"time"

	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"

	"github.com/sluiceproxy/sluice/limiter/redistest"
)

// BenchmarkLease prints what a check costs with a lease of 200 ms or 1 s: of one
// key, of a thousand keys of which few are busy (Zipf, exponent 1), and of keys
// that are used once. The servers take turns, forwards and back; before each turn
// that is measured is one that is not, so that there are leases. "far" has 2 ms
// between the sidecar and Redis.
//
//	go test ./cmd/sluice -run '^$' -bench Lease -benchtime 1x -timeout 30m
func BenchmarkLease(b *testing.B) {
	const rounds, each = 9, 30_000
	const limit = "limits: [{name: per-client, key: client.ip, rate: 1000000000/s%s}]\n" +
		"store: {redis: {url: '%s', timeout: 5s}}\ndomain: %s\n"
	node := redistest.StartNode(b)
	store, url := node.Server, "redis://"+node.Addr
	far := redistest.StartProxy(b, node.Addr)
	far.Delay(time.Millisecond) // each way
	servers := []*measured{{name: "constant answer", process: startBaseline(b, "constant", nil)}}
	executable = build(b)
	b.Cleanup(func() { executable = os.Args[0] })
	add := func(name, config string) *measured {
		s := &measured{name: name, process: startSluice(b, "--config", file(b, name+".yaml", config))}
		servers = append(servers, s)
		return s
	}
	inProcess := add("in process", "limits: [{name: per-client, key: client.ip, rate: 1000000000/s}]")
	none := add("no lease", fmt.Sprintf(limit, "", url, "none"))
	leased := add("lease", fmt.Sprintf(limit, ", lease: 200ms", url, "leased"))
	add("lease of 1 s", fmt.Sprintf(limit, ", lease: 1s", url, "long"))
	distant := add("far, lease", fmt.Sprintf(limit, ", lease: 200ms", "redis://"+far.Addr, "far"))
	for _, s := range servers {
		s.start(b)
	}
	client := func(i int) *authv3.CheckRequest {
		return from(fmt.Sprintf("10.%d.%d.%d", i>>16, i>>8&255, i&255), "/v1/orders?page=2")
	}
	random := rand.New(rand.NewPCG(1, 1))
	zipf := rand.NewZipf(random, 1.0001, 1, 999)
	one, some := []*authv3.CheckRequest{client(1)}, make([]*authv3.CheckRequest, each)
	for i := range some {
		some[i] = client(1000 + int(zipf.Uint64()))
	}
	next := 1 << 17
	rare := func() []*authv3.CheckRequest {
		all := make([]*authv3.CheckRequest, each)
		for i := range all {
			all[i] = client(next)
			next++
		}
		return all
	}
	for b.Loop() {
		for _, load := range []struct {
			name          string
			callers, each int
			requests      func() []*authv3.CheckRequest
		}{
			{"one key", 1, 3000, func() []*authv3.CheckRequest { return one }},
			{"one key", 64, each, func() []*authv3.CheckRequest { return one }},
			{"a thousand keys, few of them busy", 64, each, func() []*authv3.CheckRequest { return some }},
			{"keys that are used once", 64, each, rare},
		} {
			for _, s := range servers {
				s.reset()
			}
			turns := slices.Clone(servers)
			for round := range rounds + 1 {
				slices.Reverse(turns)
				for _, s := range turns {
					for _, isMeasured := range []bool{false, round > 0} { // the leases of the last turn have ended
						s.requests = load.requests()
						s.round(b, store, load.callers, load.each, isMeasured)
					}
				}
			}
			fmt.Printf(
				"\n%s, %d callers\n%-20s %10s %10s %8s %8s %12s %10s %8s %8s %8s\n", load.name, load.callers, "", "server µs",
				"Redis µs", "server", "both", "Redis calls", "checks/s", "p50 µs", "p99 µs", "p99.9 µs",
			)
			for _, s := range servers {
				s.print(servers[0])
			}
			fmt.Printf("lease over none %.3f; throughput over constant %.2f; p50 over in process %.3f, far %v more (p99 %v)\n",
				leased.both()/none.both(), leased.throughput()/servers[0].throughput(),
				float64(leased.quantile(.5))/float64(inProcess.quantile(.5)),
				distant.quantile(.5)-inProcess.quantile(.5), distant.quantile(.99))
		}
		fmt.Printf("\nmemory of sluice with leases: %d MiB, without %d MiB\n",
			rss(b, leased.process.cmd.Process.Pid)>>20, rss(b, none.process.cmd.Process.Pid)>>20)
	}
}
