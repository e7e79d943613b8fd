package main

import (
	"fmt"
	"regexp"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"

	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"

	"github.com/sluiceproxy/sluice/limiter/redistest"
)

// heap returns how many bytes of a sluice's heap are in use after a collection.
func (p *process) heap() int {
	p.t.Helper()
	_, profile := get(p.t, "http://"+p.admin+"/debug/pprof/heap?gc=1&debug=1")
	found := regexp.MustCompile(`# HeapAlloc = (\d+)`).FindStringSubmatch(profile)
	if found == nil {
		p.t.Fatalf("no HeapAlloc in %.1000s", profile)
	}
	n, err := strconv.Atoi(found[1])
	if err != nil {
		p.t.Fatal(err)
	}
	return n
}

// TestHeldMemory checks that a request that holds tokens costs the sidecar next to
// no memory, as Envoy keeps what its end needs: 10 MiB at most for 100,000.
func TestHeldMemory(t *testing.T) {
	const keys, callers, most = 1000, 16, 10 << 20
	const config = "limits: [{name: held, key: request.url_path, rate: 1000000000/s, cost: 10, settle: 4, " +
		"settle_within: 1h}]\n"
	n := redistest.Scaled(10_000, 100_000)
	for name, store := range map[string]string{
		"redis": fmt.Sprintf("store: {redis: {url: '%s', timeout: 5s}}\n", redistest.Start(t).URL()), "in process": "",
	} {
		t.Run(name, func(t *testing.T) {
			p := startSluice(t, "--config", file(t, "sluice.yaml", store+config))
			conn := dial(t, p.grpc)
			var first atomic.Pointer[string]
			hold := func(n int) {
				var next atomic.Int64
				var wg sync.WaitGroup
				for range callers {
					wg.Go(func() {
						for i := next.Add(1); i <= int64(n); i = next.Add(1) {
							answer, err := authv3.NewAuthorizationClient(conn).Check(t.Context(),
								from("203.0.113.1", fmt.Sprint("/", i%keys)))
							text := answer.GetDynamicMetadata().GetFields()["settle"].GetStringValue()
							if err != nil || text == "" {
								t.Errorf("it holds nothing: %v, %v", answer, err)
								return
							}
							first.CompareAndSwap(nil, &text)
						}
					})
				}
				wg.Wait()
			}
			hold(2 * keys) // what a key costs, and what any check does
			heap, resident := p.heap(), rss(t, p.cmd.Process.Pid)
			hold(n)
			heap, resident = p.heap()-heap, rss(t, p.cmd.Process.Pid)-resident
			t.Logf("%d requests hold tokens: %d kB more heap, %d kB more resident memory", n, heap>>10, resident>>10)
			if heap > most/100_000*n || resident > most && !isRace {
				t.Errorf("%d bytes more heap and %d bytes more resident memory", heap, resident)
			}
			if err := openLog(t, conn, "sluice").Send(logOf(endWith(*first.Load()))); err != nil {
				t.Fatal(err)
			}
			eventually(t, "the first of them to be settled", func() bool {
				return p.counted(`sluice_tokens_returned_total\{limit="held"\}`) == 6
			})
		})
	}
}
