package limiter

import (
	"context"
	"fmt"
	"runtime"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// leaseSize is how many bytes of the heap a lease may take. The heap grows to
// three times of what is live, so that 10,000 leases take 10 MiB at most.
const leaseSize = 10 << 20 / 3 / 10_000

// What leases take of the heap, with their keys and the tables that they are in,
// is bounded, and what leaseOverhead says of it is true.
func TestLeaseSize(t *testing.T) {
	const leases = 10_000
	live := func() int64 {
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return int64(m.HeapAlloc)
	}
	synctest.Test(t, func(t *testing.T) {
		store := generous{}
		l := newLeases(store, store, wallClock, prometheus.NewRegistry())
		b := bucket(t, 100_000, time.Second, 100_000)
		verdicts := make([]Verdict, 1)
		limit := charge(b, "").leased(MaxLease).Limit
		before := live()
		// The keys take turns, so that all are equally busy.
		for range 2 * hotChecks {
			for i := range leases {
				key := fmt.Sprintf("sluice:default:tenant:{=11.192.0.2.%d}", i)
				l.Take(t.Context(), []Charge{{Limit: limit, Bucket: b, Key: key, Cost: 1}}, verdicts)
			}
			synctest.Wait()
		}
		n := int64(len(l.wakes.queue))
		each, said := (live()-before)/n, l.bytes.Load()/n
		if t.Logf("%d bytes for each lease, %d as it is counted", each, said); each > leaseSize {
			t.Errorf("a lease takes %d bytes; want %d at most", each, leaseSize)
		}
		if n < leases*95/100 || said < each*8/10 || said > each*12/10 {
			t.Errorf("%d leases of %d bytes are counted as %d bytes each", n, each, said)
		}
		l.Close(t.Context())
		if n := len(l.wakes.queue); n > 0 {
			t.Errorf("%d leases are to be woken after Close", n)
		}
	})
}

// generous is a lender that grants everything and keeps nothing.
type generous struct{}

func (generous) Take(_ context.Context, charges []Charge, verdicts []Verdict) {
	for i := range charges {
		c := &charges[i]
		verdicts[i] = c.verdict(level{tokens: c.Bucket.burst}, 0, c.Cost, MemorySource)
		if c.HoldFor > 0 {
			verdicts[i].Hold = Hold{Tokens: c.Cost, birth: [8]byte{1}}
		}
	}
}

func (generous) Settle(context.Context, []Settlement, []Settled) {}

// Keys whose leases have other lengths are counted beside each other.
func TestBusyKeysOfOtherLengths(t *testing.T) {
	var b busyKeys
	const began, tick = 12_000_000, 10_000 // µs
	got := [2]int{}
	for i := range int64(hotChecks) {
		got[0] = b.count(1<<40, began+i*tick, 200*time.Millisecond, false)
		got[1] = b.count(2<<40, began+i*tick, 5*time.Second, false)
	}
	if got != [2]int{hotChecks, hotChecks} {
		t.Errorf("counted %v of %d", got, hotChecks)
	}
	// The first has not been used for the length of its lease, the second has.
	const later = began + 200_000
	if n := b.count(1<<40, later, 200*time.Millisecond, false); n != 1 {
		t.Errorf("%d after a pause", n)
	}
	if n := b.count(2<<40, later, 5*time.Second, false); n != hotChecks+1 {
		t.Errorf("%d, want one more", n)
	}
}
