package limiter

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/sluiceproxy/sluice/limiter/redistest"
)

// witness decides on charges and records the decisions. It is safe for
// concurrent use.
type witness struct {
	store Store

	mu       sync.Mutex
	granted  record
	outcomes map[Outcome]int
	failures map[string]int // by what was wrong
	took     []time.Duration
	decided  []decided // in the order in which they ended
}

// decided is when a decision ended, and whether it failed.
type decided struct {
	at     time.Time
	failed bool
}

func newWitness(store Store) *witness {
	return &witness{store: store, granted: record{}, outcomes: map[Outcome]int{}, failures: map[string]int{}}
}

func (w *witness) decide(charges ...Charge) {
	began := time.Now()
	d := Decide(context.Background(), w.store, charges)
	took := time.Since(began)
	w.mu.Lock()
	defer w.mu.Unlock()
	w.granted.add(&d)
	w.outcomes[d.Outcome]++
	w.took = append(w.took, took)
	w.decided = append(w.decided, decided{began.Add(took), d.Outcome == FailedClosed})
	if d.Outcome == FailedClosed {
		w.failures[d.Verdicts[0].Err.Error()]++
	}
}

// inTime logs how long decisions took, and fails the test if they took longer
// than promised.
func (w *witness) inTime(t *testing.T, budget time.Duration) {
	t.Helper()
	w.mu.Lock()
	defer w.mu.Unlock()
	slices.Sort(w.took)
	most, slowest := w.took[len(w.took)*999/1000], w.took[len(w.took)-1]
	t.Logf("%v; of %d answers 99.9 %% took at most %v, the slowest %v", w.outcomes, len(w.took), most, slowest)
	if most > budget+2*slack/5 || slowest > budget+slack {
		t.Errorf("99.9 %% of the answers took at most %v, the slowest %v, of a budget of %v", most, slowest, budget)
	}
}

// failedUntil returns how long after an instant the outage ended, which is with the
// last failure before 100 decisions in a row that did not fail; 0 if there was none.
// A failure after those is a busy machine's.
func (w *witness) failedUntil(since time.Time) (until time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	hasFailed, good := false, 0
	for _, d := range w.decided {
		isSince := !d.at.Before(since)
		switch {
		case d.failed:
			hasFailed, good = true, 0
			if isSince {
				until = d.at.Sub(since)
			}
		case hasFailed && isSince:
			good++
		}
		if good == 100 {
			break
		}
	}
	return until
}

// meanwhile runs a load, and something beside it, and waits for both.
func meanwhile(load, beside func()) {
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(load)
	beside()
}

// Redis is killed under load and restarted at once. With an append-only file it
// remembers what it granted; without one it grants one burst more.
func TestChaosKilledRedis(t *testing.T) {
	const budget, recovers = 100 * time.Millisecond, 1500 * time.Millisecond
	perSecond, lasts := 1000, redistest.Lasts(2*time.Second, 8*time.Second)
	for _, tt := range []struct {
		name string
		args []string
		most float64 // over the bound, in bursts
	}{
		{"append-only file, everysec", []string{"--appendonly", "yes", "--appendfsync", "everysec"}, 0},
		{"no persistence", nil, 1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			server := redistest.Start(t, tt.args...)
			s := &shaky{options: RedisOptions{URL: server.URL()}}
			w := newWitness(s.open(t, budget))
			b := bucket(t, 100, time.Second, 500)
			a := charge(b, "a")
			var back time.Time
			meanwhile(func() { redistest.Pace(perSecond, lasts, func() { w.decide(a) }) }, func() {
				<-time.After(lasts / 2)
				server.Kill()
				server.Restart()
				back = time.Now()
			})
			w.inTime(t, budget)
			if took := w.failedUntil(back); took > recovers {
				t.Errorf("recovered only %v after Redis was back", took)
			}
			over := excess(b, w.granted[a.Key])
			t.Logf("the last failure was %v after Redis was back; %.1f tokens over the bound of a bucket of %d",
				w.failedUntil(back), over, b.burst)
			if over > tt.most*float64(b.burst) &&
				!(tt.most == 0 && strings.Contains(server.Log(), "Asynchronous AOF fsync is taking too long")) {
				t.Errorf("%v tokens over the bound", over)
			}
			if tt.most > 0 && over < float64(b.burst)/2 {
				t.Error("Redis forgot nothing: this says little")
			}
			if w.outcomes[FailedClosed] == 0 {
				t.Error("nothing failed: this says little")
			}
		})
	}
}

// Redis is frozen for two seconds under load. Every decision comes in time, and
// neither connections nor goroutines pile up.
func TestFrozenRedisUnderLoad(t *testing.T) {
	const budget, perSecond = 100 * time.Millisecond, 500
	server := redistest.Start(t)
	s := &shaky{options: RedisOptions{URL: server.URL()}}
	w := newWitness(s.open(t, budget))
	a := charge(bucket(t, 1000, time.Second, 1000), "a")
	if err := w.store.(*Redis).Ping(t.Context()); err != nil {
		t.Fatal(err)
	}
	before := goleak.IgnoreCurrent()
	connections := func() int {
		n, err := strconv.Atoi(server.Info("stats")["total_connections_received"])
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	opened := connections()
	var thawed time.Time
	meanwhile(func() { redistest.Pace(perSecond, 4*time.Second, func() { w.decide(a) }) }, func() {
		<-time.After(time.Second)
		server.Freeze()
		<-time.After(2 * time.Second)
		server.Thaw()
		thawed = time.Now()
	})
	w.inTime(t, budget)
	opened = connections() - opened - 1 // the question's own
	recovered := w.failedUntil(thawed)
	t.Logf("%d new connections; the last failure was %v after the thaw", opened, recovered)
	if opened > 3*poolSize {
		t.Errorf("%d new connections", opened)
	}
	if recovered > 250*time.Millisecond+slack {
		t.Errorf("recovered only %v after the thaw", recovered)
	}
	if w.outcomes[FailedClosed] == 0 {
		t.Error("nothing failed: this says little")
	}
	if err := goleak.Find(before); err != nil {
		t.Error(err)
	}
}

// Redis is so far away that callers' deadlines pass before a connection is up.
// Takes soon succeed all the same, on few connections.
func TestFarRedis(t *testing.T) {
	const away, callerWaits, perSecond = 10 * time.Millisecond, 35 * time.Millisecond, 200
	s := startShakySingle(t)
	s.each(func(p *redistest.Proxy) { p.Delay(away) })
	r := s.open(t, 100*time.Millisecond)
	a := charge(bucket(t, 1000, time.Second, 1000), "a")
	began := time.Now()
	const works = 2 * time.Second
	var mu sync.Mutex
	var failed []time.Duration // after the start
	redistest.Pace(perSecond, works+time.Second, func() {
		ctx, cancel := context.WithTimeout(context.Background(), callerWaits)
		defer cancel()
		if d := Decide(ctx, r, []Charge{a}); d.Outcome == FailedClosed {
			mu.Lock()
			failed = append(failed, time.Since(began).Round(time.Millisecond))
			mu.Unlock()
		}
	})
	s.each((*redistest.Proxy).Mend)
	opened := s.servers[0].Info("stats")["total_connections_received"]
	t.Logf("%s connections; takes failed at %v", opened, failed)
	if n, err := strconv.Atoi(opened); err != nil || n > poolSize+10 {
		t.Errorf("%s connections (%v)", opened, err)
	}
	late := 0
	for _, at := range failed {
		if at > works {
			late++
		}
	}
	if late > perSecond/2 { // a busy machine may be late with some, and a pool that does not warm fails all
		t.Errorf("%d of %d takes failed later than %v after the start", late, perSecond, works)
	}
}

// More takes come than a slow Redis can carry. The queue is bounded, and takes
// beyond it are refused at once.
func TestOverload(t *testing.T) {
	const perSecond, times = 8000, 4
	s := startShakySingle(t)
	r := s.open(t, 2*time.Second)
	if err := r.Ping(t.Context()); err != nil {
		t.Fatal(err)
	}
	s.each(func(p *redistest.Proxy) { p.Throttle(6) })
	machine := watch(t, redistest.StartProxy(t, s.proxies[0].Server()).Addr, 0)
	start := time.Now()
	var running, most, carried, late atomic.Int64
	var mu sync.Mutex
	var shed []time.Duration
	slow := bucket(t, 1, day, 30_000)
	const lasts = 3 * time.Second
	redistest.Pace(perSecond, lasts, func() {
		n := running.Add(1)
		for old := most.Load(); n > old && !most.CompareAndSwap(old, n); old = most.Load() {
		}
		began := time.Now()
		d := Decide(context.Background(), r, []Charge{charge(slow, "a")})
		took := time.Since(began)
		running.Add(-1)
		switch {
		case d.Outcome == Allowed:
			carried.Add(1)
		case KindOf(d.Verdicts[0].Err) == KindOverload:
			mu.Lock()
			shed = append(shed, took)
			mu.Unlock()
		default:
			late.Add(1)
		}
	})
	disturbed := machine.slowFor(start, time.Now(), 20*time.Millisecond)
	s.each((*redistest.Proxy).Mend)
	if len(shed) < 1000 {
		t.Fatalf("only %d were shed", len(shed))
	}
	// Each p99 is of a tenth of the refused takes, as a busy machine has
	// pauses; the median of the ten must be good.
	var p99 []time.Duration
	for part := range slices.Chunk(shed, len(shed)/10) {
		slices.Sort(part)
		p99 = append(p99, part[len(part)*99/100])
	}
	slices.Sort(p99)
	t.Logf("of %d takes %d were carried, %d too late and %d shed, 99 %% of them in %v (at worst %v); at most %d at once",
		perSecond*int(lasts.Seconds()), carried.Load(), late.Load(), len(shed), p99[len(p99)/2], p99[len(p99)-1], most.Load())
	if disturbed > lasts/4 {
		t.Logf("the machine was slow for %v: this says little", disturbed)
		return
	}
	if p99[len(p99)/2] > slack/10 {
		t.Errorf("99 %% of what was shed took %v", p99)
	}
	// Those that are just being shed, or are answered and not yet gone, are at
	// once, too. Without a bound there would be as many as come in a timeout.
	if bound := perSecond * int64(r.timeout/time.Second) / 2; most.Load() > bound {
		t.Errorf("%d takes at once, of a bound of %d", most.Load(), bound)
	}
	if carried.Load()*times > perSecond*int64(lasts.Seconds()) || carried.Load() == 0 {
		t.Errorf("%d were carried: this says little", carried.Load())
	}
}

// A replica that has received nothing for a while becomes the master. It grants
// at most one burst more, and the rate again for as long as the old master
// still answers. Takes recover soon after.
func TestFailoverWithFrozenReplication(t *testing.T) {
	t.Parallel()
	const rate, burst, well = 50, 200, 3 * time.Second
	ctx := context.Background()
	master := redistest.StartNode(t)
	link := redistest.StartProxy(t, master.Addr)
	_, port, _ := strings.Cut(link.Addr, ":")
	replica := redistest.StartNode(t, "--replicaof", "127.0.0.1", port)
	addr, sentinel := startSentinel(t, master.Addr)
	s := &shaky{options: RedisOptions{Mode: Sentinel, Addresses: []string{addr}, Master: "mymaster"}}
	w := newWitness(s.open(t, 100*time.Millisecond))
	b := bucket(t, rate, time.Second, burst)
	a := charge(b, "a")
	machine := watch(t, replica.Addr, 0)
	link.Hold()
	var switched, old time.Time // when the replica became the master, and when the old one last ran a script
	meanwhile(func() { redistest.Pace(200, 6*time.Second, func() { w.decide(a) }) }, func() {
		<-time.After(1500 * time.Millisecond) // the bucket is empty by then
		if err := sentinel.Failover(ctx, "mymaster").Err(); err != nil {
			t.Error(err)
		}
		heir := replica.Client()
		eventually(t, "the replica is the master",
			func() bool { return strings.Contains(heir.Info(ctx, "replication").Val(), "role:master") })
		switched, old = time.Now(), time.Now()
		ran := scripts(t, master.Server)
		for time.Since(switched) < well {
			rest(20)
			if n := scripts(t, master.Server); n > ran {
				ran, old = n, time.Now()
			}
		}
	})
	over, most := excess(b, w.granted[a.Key]), burst+rate*old.Sub(switched).Seconds()
	t.Logf(
		"%v; the old master answered for %v; %.1f tokens over the bound of a bucket, of at most %.1f; "+
			"the last failure was %v after the switch",
		w.outcomes, old.Sub(switched), over, most, w.failedUntil(switched))
	if over > most {
		t.Errorf("%.1f tokens over the bound, of at most %.1f", over, most)
	}
	if over < burst/2 {
		t.Error("nothing was forgotten: this says little")
	}
	if took := w.failedUntil(switched); took > well {
		last := switched.Add(took)
		if machine.slowFor(last.Add(-aftermath), last, 20*time.Millisecond) > 0 {
			t.Logf("a take failed %v after the switch, when the machine was slow: this says little", took)
		} else {
			t.Errorf("a take failed %v after the switch", took)
		}
	}
}

// A slot of a cluster moves to another node and back under load. Takes follow
// it, none is executed twice, and hardly any fails.
func TestChaosSlotMoves(t *testing.T) {
	t.Parallel()
	const perSecond = 400
	nodes := redistest.StartCluster(t, 3)
	var servers []*redistest.Server
	for _, n := range nodes {
		servers = append(servers, n.Server)
	}
	s := &shaky{options: RedisOptions{Mode: Cluster, Addresses: []string{nodes[0].Addr}}, servers: servers}
	r := s.open(t, time.Second) // this is about what is executed, and not about time
	w := newWitness(r)
	const clients, burst = 50, 30_000
	slow := bucket(t, 1, day, burst)
	slot := int(nodes[0].Client().ClusterKeySlot(t.Context(), "moves").Val())
	home := slot * len(servers) / 16384
	var sent [clients]atomic.Int64
	var next atomic.Int64
	client := func(i int64) Charge {
		c := keyed(slow, fmt.Sprint("client-", i), "moves")
		return c
	}
	for i := range int64(clients) {
		waitForAnswer(t, r, client(i).costs(0))
	}
	lasts, moves := redistest.Lasts(6*time.Second, 20*time.Second), 0
	meanwhile(func() {
		redistest.Pace(perSecond, lasts, func() {
			i := next.Add(1) % clients
			sent[i].Add(1)
			w.decide(client(i))
		})
	}, func() {
		away := servers[(home+1)%len(servers)]
		for until := time.Now().Add(lasts - 2*time.Second); time.Now().Before(until); moves += 2 {
			redistest.MoveSlot(t, servers, slot, servers[home], away)
			rest(50)
			redistest.MoveSlot(t, servers, slot, away, servers[home])
			rest(50)
		}
	})
	total := 0
	for i := range int64(clients) {
		gone := burst - waitForAnswer(t, r, client(i).costs(0)).Remaining
		if granted := int64(len(w.granted[client(i).Key])); gone < granted || gone > sent[i].Load() {
			t.Errorf("client %d: %d tokens are gone for %d takes, of which %d were granted", i, gone, sent[i].Load(), granted)
		}
		total += int(sent[i].Load())
	}
	failed := w.outcomes[FailedClosed]
	t.Logf("%d moves; of %d takes %d failed: %v", moves, total, failed, w.failures)
	if failed*100 > total {
		t.Errorf("of %d takes %d failed", total, failed)
	}
	if moves == 0 {
		t.Error("the slot did not move")
	}
}

// A key with a foreign value fails its own takes, and none of the others in
// their batches.
func TestPoisonedKey(t *testing.T) {
	server := redistest.Start(t)
	client := server.Client()
	r := newTestRedis(t, server, serverClock)
	slow := bucket(t, 1, day, 30_000)
	list, newer := charge(slow, "list"), charge(slow, "newer")
	var wg sync.WaitGroup
	for caller := range 64 {
		good := charge(slow, fmt.Sprint("good-", caller))
		wg.Go(func() {
			for i := range 50 {
				switch {
				case caller == 0: // again and again, as what makes no sense is an empty bucket from then on
					client.Del(context.Background(), list.Key)
					client.RPush(context.Background(), list.Key, "x")
					client.Set(context.Background(), newer.Key, "\xb5\x08\x63 of a version to come", 0)
				case caller < 4:
					Decide(t.Context(), r, []Charge{list})
				case caller < 8:
					if d := Decide(t.Context(), r, []Charge{newer}); d.Outcome == FailedClosed &&
						KindOf(d.Verdicts[0].Err) != KindState {
						t.Errorf("%+v", d.Verdicts[0])
					}
				default:
					d := Decide(t.Context(), r, []Charge{good})
					if v := d.Verdicts[0]; d.Outcome != Allowed || v.Remaining != slow.burst-1-int64(i) {
						t.Errorf("take %d: %v %+v", i, d.Outcome, v)
					}
				}
			}
		})
	}
	wg.Wait()
}
