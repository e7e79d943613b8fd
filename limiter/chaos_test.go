package limiter

import (
	"context"
	"fmt"
	"net"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/redis/go-redis/v9"

	"github.com/sluiceproxy/sluice/limiter/redistest"
)

// This is the chaos suite: it runs real Redis servers under the faults that are
// known to happen to them. bound_test.go tests the bound in every window under
// random faults; outage_test.go servers that are killed, frozen, far away or
// failed over, and slots that move; clock_test.go steps of the clock. Tests
// that need a whole sidecar are in cmd/sluice. Tests that are worth a longer
// run are called TestChaos…, and .ci/test runs them for longer
// (redistest.Scaled, redistest.Lasts).

// shaky is a Redis of some mode with a proxy before each server that takes go
// to.
type shaky struct {
	options RedisOptions
	servers []*redistest.Server
	proxies []*redistest.Proxy
}

// each does something to all proxies.
func (s *shaky) each(do func(*redistest.Proxy)) {
	for _, p := range s.proxies {
		do(p)
	}
}

// scripts is how many scripts the servers have executed.
func (s *shaky) scripts(t testing.TB) (executed int) {
	for _, server := range s.servers {
		executed += scripts(t, server)
	}
	return executed
}

// open returns a store that runs, as in a sidecar, until the test ends.
func (s *shaky) open(t testing.TB, timeout time.Duration) *Redis {
	t.Helper()
	r, stop := s.run(t, timeout)
	t.Cleanup(stop)
	return r
}

// run returns a store that runs until stop is called.
func (s *shaky) run(t testing.TB, timeout time.Duration) (r *Redis, stop func()) {
	t.Helper()
	o := s.options
	o.Timeout, o.Addresses = timeout, slices.Clone(o.Addresses)
	r, err := NewRedis(o, nil, prometheus.NewRegistry())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	stopped := make(chan struct{})
	go func() { defer close(stopped); r.Run(ctx) }()
	return r, func() {
		cancel()
		<-stopped
		_ = r.Close()
	}
}

// sidecar is a sidecar that can be killed, stopped and started again.
type sidecar struct {
	s       *shaky
	running atomic.Pointer[process] // nil while none runs
}

// process is what a sidecar loses when it ends: its connections, what it leases,
// and the answers of the takes that are under way.
type process struct {
	redis   *Redis
	store   *Leases
	stop    func()
	isEnded atomic.Bool
}

func (c *sidecar) start(t testing.TB) {
	t.Helper()
	p := &process{}
	p.redis, p.stop = c.s.run(t, 50*time.Millisecond)
	// A lease's grants are recorded by the clock that Redis has, too.
	p.store = newLeases(NewCeiling(p.redis, prometheus.NewRegistry()), p.redis,
		func() int64 { return time.Now().UnixMicro() }, prometheus.NewRegistry())
	c.running.Store(p)
}

// kill ends the process as kill -9 does: whatever it leases and holds stays out.
func (c *sidecar) kill() {
	p := c.running.Swap(nil)
	p.isEnded.Store(true)
	p.stop()
}

// terminate ends the process as SIGTERM does: it gives back what it leases, if
// Redis answers, while checks still come.
func (c *sidecar) terminate() {
	ctx, cancel := context.WithTimeout(context.Background(), 200*time.Millisecond)
	defer cancel()
	c.running.Load().store.Close(ctx)
	c.kill()
}

// decide decides as the sidecar's process does. It reports not ok if none runs, or
// if it ended before its answer.
func (c *sidecar) decide(charges ...Charge) (d Decision, ok bool) {
	p := c.running.Load()
	if p == nil {
		return d, false
	}
	d = Decide(context.Background(), p.store, charges)
	return d, !p.isEnded.Load()
}

// settle settles one hold, if a process runs.
func (c *sidecar) settle(settlement Settlement) (r Settled, ok bool) {
	p := c.running.Load()
	if p == nil {
		return r, false
	}
	result := make([]Settled, 1)
	p.redis.Settle(context.Background(), []Settlement{settlement}, result)
	return result[0], true
}

func startShakySingle(t testing.TB, args ...string) *shaky {
	t.Helper()
	node := redistest.StartNode(t, args...)
	proxy := redistest.StartProxy(t, node.Addr)
	return &shaky{RedisOptions{URL: "redis://" + proxy.Addr}, []*redistest.Server{node.Server}, []*redistest.Proxy{proxy}}
}

func startShakySentinel(t testing.TB, args ...string) *shaky {
	t.Helper()
	s := startShakySingle(t, args...)
	sentinel := redistest.StartSentinel(t, s.proxies[0].Addr)
	s.options = RedisOptions{Mode: Sentinel, Addresses: []string{sentinel.Addr}, Master: "mymaster"}
	return s
}

func startShakyCluster(t testing.TB, args ...string) *shaky {
	t.Helper()
	s := &shaky{options: RedisOptions{Mode: Cluster}}
	var clients []*redis.Client
	for _, node := range redistest.StartCluster(t, 3, args...) {
		proxy := redistest.StartProxy(t, node.Addr)
		_, port, _ := net.SplitHostPort(proxy.Addr)
		client := node.Client()
		if err := client.ConfigSet(t.Context(), "cluster-announce-port", port).Err(); err != nil {
			t.Fatal(err)
		}
		clients = append(clients, client)
		s.servers, s.proxies = append(s.servers, node.Server), append(s.proxies, proxy)
		s.options.Addresses = append(s.options.Addresses, proxy.Addr)
	}
	eventually(t, "all nodes send clients to the proxies", func() bool {
		for _, client := range clients {
			for _, slots := range client.ClusterSlots(t.Context()).Val() { //nolint:staticcheck // as the library does itself
				if !slices.Contains(s.options.Addresses, slots.Nodes[0].Addr) {
					return false
				}
			}
		}
		return true
	})
	return s
}

// eventually polls a condition every few milliseconds until it is true.
func eventually(t testing.TB, what string, is func() bool) {
	t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for late := time.After(30 * time.Second); !is(); {
		select {
		case <-tick.C:
		case <-late:
			t.Fatalf("not within 30 s: %s", what)
		}
	}
}

// eachShaky runs a test on a Redis of each kind, all at once.
func eachShaky(t *testing.T, test func(t *testing.T, s *shaky)) {
	for _, kind := range []struct {
		name  string
		start func(testing.TB, ...string) *shaky
	}{
		{"single", startShakySingle}, {"sentinel", startShakySentinel}, {"cluster", startShakyCluster},
	} {
		t.Run(kind.name, func(t *testing.T) {
			t.Parallel()
			test(t, kind.start(t))
		})
	}
}

// A take whose answer is late or lost was executed once, and is never sent
// again: it may cost a client a token, and it gives none away.
func TestChaosLostAnswers(t *testing.T) {
	t.Parallel()
	const budget = 50 * time.Millisecond
	lost := redistest.Scaled(50, 300)
	eachShaky(t, func(t *testing.T, s *shaky) {
		r := s.open(t, budget)
		slow := bucket(t, 1, 366*day, 10)
		warm := charge(bucket(t, 1000, time.Second, 1000), "warm")
		for _, fault := range []struct {
			name  string
			spoil func(*redistest.Proxy)
			kinds []ErrorKind
		}{
			{"late", func(p *redistest.Proxy) { p.Delay(time.Minute) }, []ErrorKind{KindTimeout}},
			{"cut", (*redistest.Proxy).Cut, []ErrorKind{KindConnection, KindTimeout}}, // on a slow machine the budget ends first
		} {
			clients := make([]Charge, lost)
			for i := range clients {
				clients[i] = keyed(slow, fault.name, fmt.Sprint(i))
				warm.Key = keyed(warm.Bucket, "warm", fmt.Sprint(i)).Key // the same slot, so that there is a connection to its node
				waitForAnswer(t, r, warm)
				s.each(fault.spoil)
				d := Decide(t.Context(), r, clients[i:i+1])
				s.each((*redistest.Proxy).Mend)
				if d.Outcome != FailedClosed || !slices.Contains(fault.kinds, KindOf(d.Verdicts[0].Err)) {
					t.Fatalf("%s: %v %+v", fault.name, d.Outcome, d.Verdicts[0])
				}
			}
			executed := 0
			for _, c := range clients {
				switch left := waitForAnswer(t, r, c.costs(0)).Remaining; left {
				case 9:
					executed++
				case 10: // its connection was not up in time
				default:
					t.Errorf("%s: %d tokens of 10 are left after one take", fault.name, left)
				}
			}
			if executed < lost*9/10 {
				t.Errorf("%s: only %d of %d takes were executed: the fault came too early to say anything", fault.name, executed,
					lost)
			}
			t.Logf("%s: %d of %d takes were executed once, and none twice", fault.name, executed, lost)
		}
		if executed, called := s.scripts(t), calls(t, r); executed > called {
			t.Errorf("%d scripts were executed of %d calls", executed, called)
		}
	})
}
