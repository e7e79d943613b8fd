package main

import (
	"flag"
	"fmt"
	"os"
	"slices"
	"testing"

	"github.com/sluiceproxy/sluice/limiter/redistest"
)

var earlier = flag.String("earlier", "", "a sluice `program` of an earlier commit that BenchmarkEarlier compares with")

// BenchmarkEarlier prints what a check costs the processor, sluice and Redis
// together, over what it costs with the program of an earlier commit:
//
//	CGO_ENABLED=0 go build -trimpath -tags grpcnotrace -ldflags '-s -w -X main.version=devel' \
//		-o /tmp/earlier ./cmd/sluice
//	go test ./cmd/sluice -run '^$' -bench Earlier -benchtime 1x -earlier /tmp/earlier -timeout 30m
//
// A busy machine is some percent slower for seconds at a time. So each ratio is
// that of two short rounds of both programs, in the order now, earlier, earlier,
// now. Of the ratios the median is printed, and the 6th and the 15th of 20: the
// true median lies between those with a probability of 0.96 (the sign test's
// confidence interval).
func BenchmarkEarlier(b *testing.B) {
	if *earlier == "" {
		b.Skip("needs -earlier and a program")
	}
	const ratios = 20
	store := redistest.Start(b)
	patient := "store: {redis: {url: " + store.URL() + ", timeout: 5s}}\n"
	programs := [2]string{build(b), *earlier}
	b.Cleanup(func() { executable = os.Args[0] })
	start := func(kind, config string, flood bool) (servers [2]*measured) {
		for i, program := range programs {
			s := &measured{name: kind, flood: flood, earlier: i == 1, requests: manyClients(1000)}
			if flood {
				s.requests = s.requests[:10]
			}
			executable = program
			s.process = startSluice(b, "--config", file(b, "c.yaml", config), "--domain", fmt.Sprint(kind, i))
			s.start(b)
			servers[i] = s
		}
		return servers
	}
	kinds := [][2]*measured{
		start("in-process", openLimit, false),
		start("redis", patient+openLimit, false),
		start("flooded", patient+slowLimit, true),
	}
	for b.Loop() {
		fmt.Printf("\n%-12s %7s %8s %16s %8s %16s\n", "", "callers", "both", "", "p50", "")
		for _, load := range []struct{ callers, each int }{{1, 1500}, {16, 6000}, {64, 8000}} {
			for _, servers := range kinds {
				var costs, waits []float64
				for i := range ratios + 1 {
					for _, s := range servers {
						s.reset()
					}
					for _, turn := range []int{0, 1, 1, 0} {
						servers[turn].round(b, store, load.callers, load.each, true)
					}
					if i == 0 { // it warmed up
						continue
					}
					costs = append(costs, servers[0].both()/servers[1].both())
					waits = append(waits, float64(servers[0].quantile(.5))/float64(servers[1].quantile(.5)))
				}
				slices.Sort(costs)
				slices.Sort(waits)
				median := func(of []float64) string {
					return fmt.Sprintf("%8.3f (%.3f to %.3f)", (of[ratios/2-1]+of[ratios/2])/2, of[5], of[14])
				}
				fmt.Printf("%-12s %7d %s %s\n", servers[0].name, load.callers, median(costs), median(waits))
			}
		}
	}
}
