package main

import (
	"cmp"
	"fmt"
	"math/rand/v2"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"

	"github.com/sluiceproxy/sluice/limiter/redistest"
)

// leasing is a sluice with a lease, and the counts of a test's checks.
type leasing struct {
	*process

	client authv3.AuthorizationClient
}

// startLeasing starts a sluice with a limit by tenant.
func startLeasing(t testing.TB, limit, url string) leasing {
	t.Helper()
	return startLeasingBy(t, fmt.Sprintf(
		"limits: [{name: tenant, key: 'request.headers[\"x-tenant\"]', %s}]\nstore: {redis: {url: %q, timeout: 1s}}\n", limit, url))
}

// startLeasingBy starts a sluice with a config.
func startLeasingBy(t testing.TB, config string) leasing {
	t.Helper()
	p := startSluice(t, "--config", file(t, "sluice.yaml", config))
	return leasing{p, authv3.NewAuthorizationClient(dial(t, p.grpc))}
}

// check returns whether a check of a tenant passed, what is left by its answer,
// and its source.
func (l leasing) check(t testing.TB, tenant string) (ok bool, left int, source string) {
	t.Helper()
	answer, err := l.client.Check(t.Context(),
		checkRequest("192.0.2.1", "GET", "/", map[string]string{"x-tenant": tenant}))
	if err != nil {
		return false, 0, err.Error()
	}
	headers := answer.GetOkResponse().GetResponseHeadersToAdd()
	if answer.GetOkResponse() == nil {
		headers = answer.GetDeniedResponse().GetHeaders()
	}
	for _, h := range headers {
		if h.GetHeader().GetKey() == "x-ratelimit-remaining" {
			left, _ = strconv.Atoi(h.GetHeader().GetValue())
		}
	}
	return answer.GetOkResponse() != nil, left, answer.GetDynamicMetadata().GetFields()["source"].GetStringValue()
}

// warm makes a tenant busy until its checks are granted from a lease, and returns
// how many checks that took.
func (l leasing) warm(t testing.TB, tenant string) (checks int) {
	t.Helper()
	for until := time.Now().Add(within); time.Now().Before(until); {
		checks++
		if ok, _, source := l.check(t, tenant); !ok {
			t.Fatalf("check %d is denied: %s", checks, source)
		} else if source == "lease" {
			return checks
		}
	}
	t.Fatalf("no lease after %d checks:\n%s", checks, l.logged())
	return 0
}

// What a sidecar has leased is another's at once when it gets SIGTERM. If it is
// killed, its lease is lost, and the bucket is whole after the lease.
func TestLeaseEnds(t *testing.T) {
	t.Parallel()
	redis := redistest.Start(t)
	const limit = "rate: 4/d, burst: 100000, lease: 5s"
	a, b := startLeasing(t, limit, redis.URL()), startLeasing(t, limit, redis.URL())

	used := a.warm(t, "one")
	if leased := a.counted(`sluice_leases\{limit="tenant"\}`); leased != 1 {
		t.Errorf("%d leases by the metric; want 1", leased)
	}
	used++
	if _, left, source := a.check(t, "one"); left != 100_000-used || source != "lease" {
		t.Errorf("%d left after %d checks, by the %s", left, used, source)
	}
	began := time.Now()
	if err := a.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	for {
		used++
		_, left, _ := b.check(t, "one")
		if left == 100_000-used {
			break
		}
		if left > 100_000-used || time.Since(began) > within {
			t.Fatalf("%d left after %d checks", left, used)
		}
	}
	// It would come back by itself after three quarters of the lease.
	took := time.Since(began)
	if t.Logf("what was leased is back %v after SIGTERM", took.Round(100*time.Microsecond)); took > time.Second {
		t.Errorf("what was leased is back %v after SIGTERM", took)
	}

	const quick = "rate: 1000/s, burst: 1000, lease: 1s"
	c, d := startLeasing(t, quick, redis.URL()), startLeasing(t, quick, redis.URL())
	c.warm(t, "two")
	for range 100 {
		c.check(t, "two")
	}
	c.kill()
	killed := time.Now()
	// Each second one check, so that this sidecar takes no lease.
	tick := time.NewTicker(200 * time.Millisecond)
	defer tick.Stop()
	for left := 0; left != 999; <-tick.C {
		if _, left, _ = d.check(t, "two"); time.Since(killed) > within {
			t.Fatalf("%d left %v after the kill", left, time.Since(killed))
		}
	}
	if took := time.Since(killed); took > 4*time.Second {
		t.Errorf("the bucket is whole %v after its lease was lost; want 2 s at most", took)
	}
}

// One window after another of four sidecars with leases, which are frozen for
// longer than a lease, killed and started again: more than burst + rate·t is never
// granted, and a frozen sidecar grants nothing from a lease that has ended.
func TestChaosLeases(t *testing.T) {
	t.Parallel()
	const rate, burst, slow = 400, 400, 20 * time.Millisecond
	redis := redistest.Start(t)
	seed := uint64(time.Now().UnixNano())
	t.Logf("the seed is %d", seed)
	random := rand.New(rand.NewPCG(seed, 3))
	var sidecars [4]atomic.Pointer[leasing]
	open := func() *leasing {
		l := startLeasing(t, fmt.Sprintf("rate: %d/s, burst: %d, lease: 200ms", rate, burst), redis.URL())
		return &l
	}
	for i := range sidecars {
		sidecars[i].Store(open())
	}
	type granted struct{ sent, got time.Time }
	var mu sync.Mutex // guards all and sources
	var all []granted
	sources := map[string]int{}
	stop := make(chan struct{})
	var pause atomic.Int64 // of each caller between its checks
	var callers sync.WaitGroup
	for i := range 3 * len(sidecars) {
		callers.Go(func() {
			for {
				select {
				case <-stop:
					return
				case <-time.After(time.Duration(pause.Load())):
				}
				sent := time.Now()
				ok, _, source := sidecars[i%len(sidecars)].Load().check(t, "one")
				got := time.Now()
				mu.Lock()
				if ok {
					all = append(all, granted{sent, got})
					sources[source]++
				} else {
					sources["not granted"]++
				}
				mu.Unlock()
			}
		})
	}
	rest := func(d time.Duration) { <-time.After(d) }
	denied := func() int {
		mu.Lock()
		defer mu.Unlock()
		return sources["not granted"]
	}
	for until := time.Now().Add(redistest.Lasts(10*time.Second, 30*time.Second)); time.Now().Before(until); {
		// At half the rate, so that there are leases; then a full bucket, which all drain at once.
		pause.Store(int64(60 * time.Millisecond))
		rest(time.Second)
		i := random.IntN(len(sidecars))
		l := sidecars[i].Load()
		if random.IntN(3) == 0 {
			l.kill()
			sidecars[i].Store(open())
			continue
		}
		_ = l.cmd.Process.Signal(syscall.SIGSTOP)
		rest(2 * time.Second)
		before := denied()
		pause.Store(int64(time.Millisecond))
		_ = l.cmd.Process.Signal(syscall.SIGCONT)
		rest(500 * time.Millisecond)
		for i := 0; i < 30 && denied() == before; i++ { // until the bucket is drained, on a busy machine, too
			rest(100 * time.Millisecond)
		}
	}
	close(stop)
	callers.Wait()
	// When a check was granted is known to within its duration: those that took
	// longer than slow are left out, which can only make the excess smaller.
	all = slices.DeleteFunc(all, func(g granted) bool { return g.got.Sub(g.sent) > slow })
	slices.SortFunc(all, func(a, b granted) int { return cmp.Compare(a.got.UnixNano(), b.got.UnixNano()) })
	worst, here := -float64(burst), -float64(burst)
	for i, g := range all {
		if i > 0 {
			here -= rate * g.got.Sub(all[i-1].got).Seconds()
		}
		here = max(here, -burst) + 1
		worst = max(worst, here)
	}
	t.Logf("%d granted, %v; the worst window has %.0f of %d tokens more than the rate brings", len(all), sources, burst+worst, burst)
	if worst > rate*slow.Seconds() {
		t.Errorf("%.1f tokens over the bound", worst)
	}
	if sources["lease"] < 100 || worst < -burst/2 {
		t.Errorf("%v: this says little", sources)
	}
}
