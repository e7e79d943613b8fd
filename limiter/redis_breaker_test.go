package limiter

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/sluiceproxy/sluice/limiter/redistest"
)

// A node that does not answer costs only a few takes their time, and a node
// that is back is found soon.
func TestBreaker(t *testing.T) {
	const budget = 100 * time.Millisecond
	server := redistest.Start(t)
	r, err := NewRedis(RedisOptions{URL: server.URL(), Timeout: budget}, nil, prometheus.NewRegistry())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = r.Close() }()
	a := charge(bucket(t, 1, time.Minute, 1_000_000), "a")
	waitForAnswer(t, r, a)
	verdicts := make([]Verdict, 1)
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for _, outage := range []struct {
		name       string
		begin, end func()
		kind       ErrorKind
	}{
		{"frozen", server.Freeze, server.Thaw, KindTimeout},
		{"killed", server.Kill, server.Restart, KindConnection},
	} {
		outage.begin()
		waited, asked := 0, 0
		for began := time.Now(); time.Since(began) < 2*time.Second; asked++ {
			<-tick.C
			start := time.Now()
			if r.Take(context.Background(), []Charge{a}, verdicts); KindOf(verdicts[0].Err) != outage.kind {
				t.Errorf("%s: %+v", outage.name, verdicts[0])
			}
			if time.Since(start) > budget/2 {
				waited++
			}
		}
		if open := testutil.ToFloat64(r.breakers); open != 1 {
			t.Errorf("%s: %v breakers are open", outage.name, open)
		}
		// Five until it opens, and then one each 200 ms, which then waits its 100.
		if waited > tripsAfter+2+int(2*time.Second/(probesEvery)) || asked < 20*waited/2 {
			t.Errorf("%s: %d of %d takes waited", outage.name, waited, asked)
		}
		outage.end()
		back := time.Now()
		take := func() { r.Take(context.Background(), []Charge{a}, verdicts) }
		for take(); verdicts[0].Err != nil; take() {
			<-tick.C
		}
		found := time.Since(back)
		if found > probesEvery+budget+250*time.Millisecond {
			t.Errorf("%s: found after %v", outage.name, found)
		}
		if open := testutil.ToFloat64(r.breakers); open != 0 {
			t.Errorf("%s: %v breakers are open", outage.name, open)
		}
		t.Logf("%s: %d of %d takes waited; back after %v", outage.name, waited, asked, found)
	}
}

// Neither a caller without time nor one that hung up says anything of the node.
func TestBreakerIsFair(t *testing.T) {
	server := redistest.Start(t)
	r, err := NewRedis(RedisOptions{URL: server.URL(), Timeout: 10 * time.Second}, nil, prometheus.NewRegistry())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = r.Close() }()
	a := charge(bucket(t, 1, day, 1000), "a")
	verdicts := make([]Verdict, 1)
	gone, hangUp := context.WithCancel(context.Background())
	hangUp()
	for range 2 * tripsAfter {
		hurried, cancel := context.WithTimeout(context.Background(), time.Millisecond)
		r.Take(hurried, []Charge{a}, verdicts)
		cancel()
		r.Take(gone, []Charge{a}, verdicts)
	}
	if r.Take(context.Background(), []Charge{a}, verdicts); verdicts[0].Err != nil {
		t.Error(verdicts[0].Err)
	}
}

// A node that leaves its cluster is forgotten, and so is that it did not
// answer.
func TestNodesThatLeftAreForgotten(t *testing.T) {
	nodes := redistest.StartCluster(t, 3)
	r, err := NewRedis(RedisOptions{Mode: Cluster, Addresses: []string{nodes[0].Addr}, Timeout: 50 * time.Millisecond},
		nil, prometheus.NewRegistry())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = r.Close() }()
	a := charge(bucket(t, 1, time.Minute, 1_000_000), "a")
	for i := 0; nodes[0].Client().ClusterKeySlot(t.Context(), a.Key).Val() < 10_922; i++ { // the third node's
		a.Key = fmt.Sprintf("sluice:test:a:{%d}", i)
	}
	waitForAnswer(t, r, a)
	if _, ok := r.nodes.Load(nodes[2].Addr); !ok {
		t.Fatal("the third node has no takes: this would say nothing")
	}
	nodes[2].Freeze()
	verdicts := make([]Verdict, 1)
	for range tripsAfter {
		r.Take(t.Context(), []Charge{a}, verdicts)
	}
	if open := testutil.ToFloat64(r.breakers); open != 1 {
		t.Fatalf("%v breakers are open", open)
	}
	for i, command := range []string{"DELSLOTSRANGE", "ADDSLOTSRANGE"} {
		for _, n := range nodes[:2-i] {
			if err := n.Client().Do(t.Context(), "CLUSTER", command, 10_922, 16_383).Err(); err != nil {
				t.Fatal(err)
			}
		}
	}
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		r.Run(ctx)
	}()
	waitForAnswer(t, r, a)
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for began := time.Now(); ; <-tick.C {
		if _, ok := r.nodes.Load(nodes[2].Addr); !ok {
			break
		}
		if time.Since(began) > 30*time.Second {
			t.Fatal("the third node is not forgotten")
		}
	}
	if open := testutil.ToFloat64(r.breakers); open != 0 {
		t.Errorf("%v breakers are open", open)
	}
	stop()
	<-done
}
