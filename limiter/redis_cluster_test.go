package limiter

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"github.com/sluiceproxy/sluice/limiter/redistest"
)

// newClusterStore is a store on a cluster.
func newClusterStore(t *testing.T, nodes []*redistest.Node) *Redis {
	t.Helper()
	r, err := NewRedis(RedisOptions{Mode: Cluster, Addresses: []string{nodes[0].Addr}, Timeout: time.Minute}, nil,
		prometheus.NewRegistry())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = r.Close() })
	return r
}

// keyed is a charge whose bucket has a key, which decides on its slot.
func keyed(b Bucket, limit, key string) Charge {
	c := charge(b, limit)
	c.Key = "sluice:test:" + limit + ":{" + key + "}"
	return c
}

// On a cluster a request takes from all of its buckets or from none, whatever
// slots they are in.
func TestCluster(t *testing.T) {
	nodes := redistest.StartCluster(t, 3)
	r := newClusterStore(t, nodes)
	k := taker{t, r}
	slow := bucket(t, 1, day, 1000)
	a, b, c := keyed(slow, "a", "one"), keyed(slow, "b", "two"), keyed(bucket(t, 1, day, 1), "c", "three")
	same := keyed(slow, "same", "one")
	k.want("ok 999, ok 999", a, same) // one slot: one script
	k.want("ok 998, ok 999", a, b)
	k.want("ok 997, ok 998, ok 0", a, b, c)
	for range 200 {
		for i, v := range k.take(a, b, c) {
			if want := int64([]int{997, 998, 0}[i]); v.Remaining != want || v.Allowed != (i < 2) {
				t.Fatalf("%d: %+v", i, v)
			}
		}
	}
	k.want("ok 996, ok 997", a, b)
	shadow := keyed(slow, "shadow", "four").shadow()
	if v := k.take(c, shadow); v[0].Allowed || !v[1].Allowed || v[1].Remaining != 999 {
		t.Errorf("%+v", v)
	}

	// 64 callers: each bucket gives what it has, and no more.
	d, e := keyed(bucket(t, 1, day, 700), "d", "five"), keyed(bucket(t, 1, day, 500), "e", "six")
	var both, onlyD atomic.Int64
	var wg sync.WaitGroup
	for range 64 {
		wg.Go(func() {
			verdicts := make([]Verdict, 2)
			for range 15 {
				if r.Take(t.Context(), []Charge{d, e}, verdicts); verdicts[0].Allowed && verdicts[1].Allowed {
					both.Add(1)
				}
				if r.Take(t.Context(), []Charge{d}, verdicts[:1]); verdicts[0].Allowed {
					onlyD.Add(1)
				}
			}
		})
	}
	wg.Wait()
	if both.Load() > 500 || both.Load()+onlyD.Load() > 700 || both.Load()+onlyD.Load() < 690 {
		t.Errorf("%d took from both and %d from the first, of 700 and 500", both.Load(), onlyD.Load())
	}

	// Who looks sees the same.
	looking := taker{t, r.ReadOnly()}
	for i, v := range looking.take(a, b, c) {
		if want := int64([]int{996, 997, 0}[i]); v.Remaining != want {
			t.Errorf("%d: %+v", i, v)
		}
	}
}

// A node that hangs costs the buckets on other nodes no tokens: they are
// returned, even after the request's deadline.
func TestHungNodeCostsTheOthersNothing(t *testing.T) {
	nodes := redistest.StartCluster(t, 3)
	var addresses []string
	for _, n := range nodes {
		addresses = append(addresses, n.Addr)
	}
	r, err := NewRedis(RedisOptions{Mode: Cluster, Addresses: addresses, Timeout: 200 * time.Millisecond}, nil,
		prometheus.NewRegistry())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = r.Close() }()
	if err := r.Ping(t.Context()); err != nil {
		t.Fatal(err)
	}
	slow := bucket(t, 1, day, 1000)
	well, hung := keyed(slow, "well", "one"), keyed(slow, "hung", "one")
	on := func(c Charge) string {
		node, err := r.cluster.MasterForKey(t.Context(), c.Key)
		if err != nil {
			t.Fatal(err)
		}
		return node.Options().Addr
	}
	for i := 0; on(well) == on(hung); i++ {
		hung = keyed(slow, "hung", fmt.Sprint(i))
	}
	for _, n := range nodes {
		if n.Addr == on(hung) {
			n.Freeze()
			defer n.Thaw()
		}
	}
	before := calls(t, r)
	for range 3 {
		if d := Decide(t.Context(), r, []Charge{well, hung}); d.Outcome != FailedClosed {
			t.Fatalf("%+v", d)
		}
	}
	if n := calls(t, r) - before; n < 4 {
		t.Errorf("only %d calls: the buckets that are well were not asked", n)
	}
	eventually(t, "the tokens are back", func() bool {
		var v [1]Verdict
		r.Take(t.Context(), []Charge{well.costs(0)}, v[:])
		return v[0].Err == nil && v[0].Remaining == 1000
	})
}

// Denied requests cost a bucket in another slot nothing: an honest client gets as
// much of a shared limit as of a bucket in process that only it uses.
func TestDeniedRequestsCostOtherSlotsNothing(t *testing.T) {
	r := newClusterStore(t, redistest.StartCluster(t, 3))
	undisturbed := NewMemory(1<<20, nil, prometheus.NewRegistry())
	shared := keyed(bucket(t, 20, time.Second, 20), "shared", "-")
	spent, own := bucket(t, 1, day, 1), bucket(t, 1000, time.Second, 1000)
	const attackers = 16
	ctx, cancel := context.WithTimeout(t.Context(), redistest.Scaled(3*time.Second, 8*time.Second))
	defer cancel()
	var denied atomic.Int64
	var wg sync.WaitGroup
	for i := range attackers {
		c := keyed(spent, "own", fmt.Sprint("spent ", i))
		taker{t, r}.want("ok 0", c)
		wg.Go(func() {
			tick := time.NewTicker(time.Second / 100)
			defer tick.Stop()
			for ctx.Err() == nil {
				if d := Decide(context.Background(), r, []Charge{c, shared}); d.Outcome == Limited {
					denied.Add(1)
				}
				<-tick.C
			}
		})
	}
	granted, alone := 0, 0
	tick := time.NewTicker(time.Second / 50)
	defer tick.Stop()
	for ctx.Err() == nil {
		if Decide(context.Background(), undisturbed, []Charge{shared}).Outcome == Allowed {
			alone++
		}
		if d := Decide(context.Background(), r, []Charge{keyed(own, "own", "honest"), shared}); d.Outcome == Allowed {
			granted++
		}
		<-tick.C
	}
	wg.Wait()
	t.Logf("%d granted beside %d denied requests, %d without them", granted, denied.Load(), alone)
	// What is under way is held, and returns.
	if denied.Load() < 500 || granted < alone-attackers-alone/20 {
		t.Errorf("%d granted beside %d denied requests, and %d without them", granted, denied.Load(), alone)
	}
}

// The settlements that a store sends by itself have its whole timeout, and no
// caller with a deadline.
func TestOwnSettlementsHaveTheirTime(t *testing.T) {
	nodes := redistest.StartCluster(t, 3)
	core, logged := observer.New(zap.WarnLevel)
	r, err := NewRedis(RedisOptions{Mode: Cluster, Addresses: []string{nodes[0].Addr}, Timeout: 10 * time.Second},
		zap.New(core), prometheus.NewRegistry())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = r.Close() }()
	slow := bucket(t, 1, day, 10)
	a, b, c := keyed(slow, "a", "one"), keyed(slow, "b", "two"), keyed(bucket(t, 1, day, 1), "c", "three")
	k := taker{t, r}
	k.want("ok 9, ok 9, ok 0", a, b, c)
	if v := k.take(a, b, c); !v[0].Allowed || v[0].Remaining != 9 || !v[1].Allowed || v[1].Remaining != 9 || v[2].Allowed {
		t.Errorf("got %+v, want what the first take held of the other slots back", v)
	}
	if n := logged.Len(); n > 0 {
		t.Errorf("%d warnings: %+v", n, logged.All()[0])
	}
}
