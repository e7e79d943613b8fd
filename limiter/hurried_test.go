package limiter

import (
	"context"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"github.com/sluiceproxy/sluice/limiter/redistest"
)

// Redis is frozen, and callers wait for only a fifth of the store's timeout.
// The first five run out of time and open the breaker; later ones fail at once.
// One warning says that the timeout and the callers' deadlines do not match.
func TestFrozenRedisHurriedCallers(t *testing.T) {
	const timeout, callerWaits = time.Second, 200 * time.Millisecond
	node := redistest.StartNode(t)
	core, logged := observer.New(zap.WarnLevel)
	r, err := NewRedis(RedisOptions{URL: "redis://" + node.Addr, Timeout: timeout}, zap.New(core),
		prometheus.NewRegistry())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = r.Close() }()
	a := charge(bucket(t, 1, time.Minute, 1_000_000), "a")
	if err := r.Ping(t.Context()); err != nil {
		t.Fatal(err)
	}
	take := func() (time.Duration, error) {
		ctx, cancel := context.WithTimeout(t.Context(), callerWaits)
		defer cancel()
		verdicts := make([]Verdict, 1)
		began := time.Now()
		r.Take(ctx, []Charge{a}, verdicts)
		return time.Since(began), verdicts[0].Err
	}
	node.Freeze()
	for i := range tripsAfter {
		if took, err := take(); KindOf(err) != KindTimeout || took < callerWaits-2*deadlineMargin {
			t.Errorf("take %d: %v after %v", i, err, took)
		}
	}
	// One call each probesEvery asks whether Redis is back, and waits.
	var quick, waited int
	for began := time.Now(); time.Since(began) < time.Second; {
		if took, err := take(); err == nil {
			t.Fatal("a frozen Redis answers")
		} else if took < 5*time.Millisecond {
			quick++
		} else {
			waited++
		}
	}
	if waited > int(time.Second/probesEvery)+2+quick/1000 || quick < 100 {
		t.Errorf("%d takes were answered at once, %d waited", quick, waited)
	}
	node.Thaw()
	back := time.Now()
	for {
		_, err := take()
		if err == nil {
			break
		}
		if time.Since(back) > 10*time.Second {
			t.Fatal(err)
		}
		<-time.After(time.Millisecond)
	}
	found := time.Since(back)
	t.Logf("%d takes were answered at once, %d waited; recovered after %v", quick, waited, found)
	if found > 300*time.Millisecond+slack {
		t.Errorf("recovered after %v", found)
	}
	if lines := logged.FilterMessageSnippet("store.redis.timeout is longer than the caller's deadline").Len(); lines != 1 {
		t.Errorf("the log says %d times that the times do not match", lines)
	}
}

// Connections have a bounded life, so that a host name that has moved is
// followed, and idle ones are checked. Takes do not notice either.
func TestConnectionsAreRenewed(t *testing.T) {
	server := redistest.StartNode(t)
	r := openStore(t, RedisOptions{URL: "redis://" + server.Addr})
	if err := r.Ping(t.Context()); err != nil {
		t.Fatal(err)
	}
	known, _ := r.nodes.Load("")
	n := known.(*node)
	age := func(change func(*connection)) (all map[*connection]bool) {
		n.mu.Lock()
		defer n.mu.Unlock()
		all = map[*connection]bool{}
		for _, on := range n.idle {
			change(on)
			all[on] = true
		}
		return all
	}
	settled := func() bool {
		n.mu.Lock()
		defer n.mu.Unlock()
		return n.opening == 0 && len(n.idle) == n.limitLocked()
	}
	eventually(t, "there are connections", settled)
	old := age(func(on *connection) { on.opened = on.opened.Add(-maxLifetime - time.Second) })
	for range old {
		n.refresh(t.Context()) // one at a time
		eventually(t, "there is another", settled)
		if err := takeOnce(r); err != nil {
			t.Error(err)
		}
	}
	for on := range age(func(*connection) {}) {
		if old[on] {
			t.Error("an old connection is still there")
		}
	}
	// The server has hung up on idle ones: who looks finds out, and makes others.
	idle := age(func(on *connection) { on.used = on.used.Add(-checkedAfter - time.Second) })
	if err := server.Client().ClientKillByFilter(t.Context(), "TYPE", "normal").Err(); err != nil {
		t.Fatal(err)
	}
	n.refresh(t.Context())
	eventually(t, "there are others", settled)
	for on := range age(func(*connection) {}) {
		if idle[on] {
			t.Error("a dead connection is still there")
		}
	}
	if err := takeOnce(r); err != nil {
		t.Error(err)
	}
}

func takeOnce(r *Redis) error {
	verdicts := make([]Verdict, 1)
	b, err := NewBucket(1, day, 1_000)
	if err != nil {
		return err
	}
	r.Take(context.Background(), []Charge{charge(b, "a")}, verdicts)
	return verdicts[0].Err
}
