package main

import (
	"fmt"
	"strings"
	"sync"
	"testing"

	"github.com/sluiceproxy/sluice/limiter/redistest"
)

// TestLeaseMemory checks that 10,000 leased keys take 10 MiB of a sidecar's heap
// at most: those of 200 tenants in each of 50 limits, beside a sidecar without
// leases that gets the same checks. It logs the resident memory, too, which
// depends on when each of them last collected garbage.
func TestLeaseMemory(t *testing.T) {
	const limits, most = 50, 10 << 20
	tenants, url := redistest.Scaled(20, 200), redistest.Start(t).URL()
	start := func(lease string) leasing {
		var config strings.Builder
		fmt.Fprintf(&config, "store: {redis: {url: %q, timeout: 5s}}\nlimits:\n", url)
		for i := range limits {
			fmt.Fprintf(&config, "- {name: l%d, key: 'request.headers[\"x-tenant\"]', rate: 1000000000/s%s}\n", i, lease)
		}
		return startLeasingBy(t, config.String())
	}
	// check checks each tenant so many times in a row.
	check := func(l leasing, times int) {
		var callers sync.WaitGroup
		for caller := range 16 {
			callers.Go(func() {
				for i := caller; i < tenants; i += 16 {
					for range times {
						if ok, _, source := l.check(t, fmt.Sprint("tenant-", i)); !ok {
							t.Errorf("a check is denied: %s", source)
						}
					}
				}
			})
		}
		callers.Wait()
	}
	with, without, rounds, leased := start(", lease: 5s"), start(""), 0, 0
	check(with, 20)
	eventually(t, "most keys to be leased", func() bool { // a busy machine has too few checks for all at once
		rounds++
		check(with, 1)
		leased = with.counted(`sluice_leases\{limit="l\d+"\}`)
		return leased >= tenants*limits*3/4
	})
	resident, heap := rss(t, with.cmd.Process.Pid), with.heap()
	check(without, 20)
	for range rounds {
		check(without, 1)
	}
	resident -= rss(t, without.cmd.Process.Pid)
	heap -= without.heap()
	t.Logf("%d leased keys after %d rounds: %d kB more heap, %d kB more resident memory",
		leased, rounds, heap>>10, resident>>10)
	if heap > leased*most/10_000 && !isRace {
		t.Errorf("%d bytes more heap", heap)
	}
}
