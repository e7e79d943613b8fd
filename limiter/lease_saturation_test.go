package limiter

import (
	"fmt"
	"testing"
	"time"

	"github.com/sluiceproxy/sluice/limiter/redistest"
)

// Sidecars with leases that share a real Redis grant what they would grant
// without. The stores of all of them are in this process, as only then it is known
// at a denial what the others have leased; two cores would not carry as many
// processes either.
func TestLeaseSaturation(t *testing.T) {
	for _, sidecars := range redistest.Scaled([]int{16}, []int{1, 4, 16}) {
		for _, demand := range []float64{.8, 2} {
			t.Run(fmt.Sprintf("%d sidecars at %.1f of the rate", sidecars, demand), func(t *testing.T) {
				for left := redistest.Scaled(5, 2); ; left-- {
					with, without, late := saturate(t, sidecars, demand)
					t.Logf("%v; without leases %v; the machine was slow for %d", with, without, late)
					if late*100 < with.checks {
						with.want(t, without, sidecars, demand, 0)
						return
					} else if left == 1 {
						with.want(t, without, sidecars, demand, late)
						return
					}
				}
			})
		}
	}
}

// saturate plays sidecars on a real Redis. Each check is made twice: by sidecars
// without leases, and on another bucket by sidecars with leases.
func saturate(t *testing.T, sidecars int, demand float64) (with, without leaseCost, late int) {
	t.Helper()
	const lease = 200 * time.Millisecond
	lasts := redistest.Lasts(3*time.Second, 12*time.Second)
	// At least 20 checks of a sidecar come within a lease, so that it takes one.
	rate := redistest.Scaled(int64(1600/demand), 2000)
	server := redistest.Start(t)
	b := bucket(t, rate, time.Second, rate)
	leased, other := &fleet{charge: charge(b, "leased").leased(lease)}, &fleet{charge: charge(b, "not leased")}
	for _, f := range []*fleet{leased, other} {
		for range sidecars {
			f.add(newTestRedis(t, server, serverClock), 0)
		}
		if demand > 1 {
			// What sidecars have leased when a bucket becomes empty weighs more the shorter
			// this lasts, so that this one is empty from the beginning.
			f.sidecars[0].store.Take(t.Context(), []Charge{f.charge.costs(rate)}, make([]Verdict, 1))
		}
	}
	late = arrivals(lasts, float64(rate)*demand, sidecars, func(sidecar int) {
		other.check(sidecar)
		leased.check(sidecar)
	})
	return leased.close(), other.close(), late
}
