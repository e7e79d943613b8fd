package limiter

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"pgregory.net/rapid"

	"github.com/sluiceproxy/sluice/limiter/redistest"
)

// While calls are slow, a take waits no longer than the linger for a place in a
// batch. At most as many calls are in flight as the latency calls for; takes
// beyond them leave with the next batch.
func TestSlowCalls(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, ctx := newFakeNode(), t.Context()
		all := []*caller{f.ask(ctx, time.Second)}
		f.wantBatches(t, 1)
		all = append(all, f.ask(ctx, time.Second))
		time.Sleep(minLinger / 2)
		all = append(all, f.ask(ctx, time.Second))
		f.wantBatches(t)
		time.Sleep(minLinger / 2)
		f.wantBatches(t, 2)
		for range maxBatch {
			all = append(all, f.ask(ctx, time.Second))
		}
		f.wantBatches(t, maxBatch) // a full one does not wait
		all = append(all, f.ask(ctx, time.Second))
		time.Sleep(minLinger)
		f.wantBatches(t, 1)
		for range 2*maxBatch + 1 {
			all = append(all, f.ask(ctx, time.Second))
		}
		time.Sleep(10 * minLinger)
		f.wantBatches(t)
		for range 3 {
			f.ended <- nil
		}
		f.wantBatches(t, maxBatch, maxBatch, 1)
		for range 4 {
			f.ended <- nil
		}
		for i, p := range all {
			if <-p.done; p.err != nil || p.reply != "answered" {
				t.Errorf("take %d: %+v", i, p)
			}
		}
	})
}

// A batch is bounded by its charges rather than its takes, as charges are what
// costs Redis time.
func TestCallIsBoundedByCharges(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFakeNode()
		f.ask(t.Context(), time.Second)
		f.wantBatches(t, 1)
		for range 5 {
			f.askFor(t.Context(), time.Second, maxBatch/4)
		}
		f.wantBatches(t, 4)
		time.Sleep(minLinger)
		f.wantBatches(t, 1)
		f.askFor(t.Context(), time.Second, 3*maxBatch)
		f.wantBatches(t, 1)
		for range 4 {
			f.ended <- nil
		}
	})
}

// The longer the latency, the more calls are in flight, spread over the round
// trip, so that no take waits long to be sent.
func TestCallsByLatency(t *testing.T) {
	for _, tt := range []struct {
		latency time.Duration
		calls   int
		waits   time.Duration // at most
	}{
		{100 * time.Microsecond, minConnections, minLinger},
		{20 * time.Millisecond, 4, 12 * time.Millisecond},
		{40 * time.Millisecond, 8, 12 * time.Millisecond},
		{80 * time.Millisecond, maxConnections, 15 * time.Millisecond},
		{time.Second, maxConnections, 180 * time.Millisecond},
	} {
		synctest.Test(t, func(t *testing.T) {
			f := newFakeNode()
			f.latency = tt.latency
			dial := f.dial
			var opened, calls atomic.Int64
			f.dial = func(ctx context.Context) (*connection, error) { opened.Add(1); return dial(ctx) }
			f.call = func(_ context.Context, _ *connection, batch []*pending) error {
				if n := calls.Add(1); n > int64(tt.calls) {
					t.Errorf("%v: %d calls are under way", tt.latency, n)
				}
				defer calls.Add(-1)
				time.Sleep(tt.latency)
				for _, p := range batch {
					p.reply = "answered"
				}
				return nil
			}
			var all []*caller
			for range 1000 {
				all = append(all, f.ask(t.Context(), 10*time.Second))
				time.Sleep(time.Millisecond)
			}
			for _, p := range all {
				if <-p.done; p.err != nil || p.took > tt.latency+tt.waits {
					t.Errorf("%v: %v after %v", tt.latency, p.err, p.took)
				}
			}
			if opened.Load() > int64(tt.calls) {
				t.Errorf("%v: %d connections", tt.latency, opened.Load())
			}
		})
	}
}

// A take that cannot be answered in time is refused at once, and no other take
// is, however many are queued.
func TestWaitIsBoundedByTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, ctx := newFakeNode(), t.Context()
		f.latency = 100 * time.Millisecond
		for range maxConnections * maxBatch {
			f.ask(ctx, time.Second)
		}
		time.Sleep(10 * time.Millisecond)
		var waiting []*caller
		for range 2 * maxConnections * maxBatch {
			waiting = append(waiting, f.ask(ctx, 400*time.Millisecond))
		}
		over := f.ask(ctx, 250*time.Millisecond)
		if <-over.done; KindOf(over.err) != KindOverload || over.took != 0 {
			t.Errorf("too late: %v after %v", over.err, over.took)
		}
		if in := f.ask(ctx, 350*time.Millisecond); in.took != 0 {
			t.Errorf("in time: %v", in.err)
		}
		for _, w := range waiting {
			select {
			case <-w.done:
				t.Fatalf("%v", w.err)
			default:
			}
		}
		time.Sleep(time.Second)
	})
}

// Without a connection, takes wait for the first one. If it is refused, they
// fail at once with that reason, and so do later ones until the next attempt.
func TestTakesWaitForAConnection(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, ctx := newFakeNode(), t.Context()
		ready, dialed := f.dial, make(chan error)
		var attempts atomic.Int64
		f.dial = func(ctx context.Context) (*connection, error) {
			attempts.Add(1)
			if err := <-dialed; err != nil {
				return nil, err
			}
			return ready(ctx)
		}
		early, first := f.ask(ctx, 50*time.Millisecond), f.ask(ctx, time.Second)
		f.wantBatches(t)
		if n := attempts.Load(); n != minConnections {
			t.Errorf("%d attempts", n)
		}
		if <-early.done; KindOf(early.err) != KindTimeout || early.took != 50*time.Millisecond {
			t.Errorf("before there was one: %v after %v", early.err, early.took)
		}
		dialed <- nil
		f.wantBatches(t, 1)
		f.ended <- nil
		if <-first.done; first.err != nil {
			t.Error(first.err)
		}
		for range minConnections - 1 {
			dialed <- errors.New("no more")
		}
		synctest.Wait()
		if f.held != 1 {
			t.Errorf("%d connections", f.held)
		}
		// It breaks, and there is no other.
		broken := f.ask(ctx, time.Second)
		f.wantBatches(t, 1)
		f.ended <- errors.New("broken")
		<-broken.done
		time.Sleep(reconnectsEvery)
		attempts.Store(0)
		waits := f.ask(ctx, time.Second)
		for range minConnections {
			dialed <- &StoreError{KindAuth, errors.New("WRONGPASS")}
		}
		if <-waits.done; KindOf(waits.err) != KindAuth || waits.took != 0 {
			t.Errorf("refused: %v after %v", waits.err, waits.took)
		}
		if next := f.ask(ctx, time.Second); KindOf(next.err) != KindAuth || attempts.Load() != minConnections {
			t.Errorf("soon after: %v, %d attempts", next.err, attempts.Load())
		}
		time.Sleep(reconnectsEvery)
		last := f.ask(ctx, time.Second)
		for range minConnections {
			dialed <- nil
		}
		f.wantBatches(t, 1)
		f.ended <- nil
		if <-last.done; last.err != nil {
			t.Error(last.err)
		}
	})
}

// Nothing is sent on a connection that the server has closed: the take goes
// over a new one.
func TestClosedConnectionsAreNoFailures(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFakeNode()
		f.ask(t.Context(), time.Second)
		f.wantBatches(t, 1)
		f.ended <- nil
		synctest.Wait()
		gone := map[*connection]bool{}
		for _, on := range f.idle {
			gone[on] = true
		}
		if len(gone) != minConnections {
			t.Fatalf("%d connections", len(gone))
		}
		call := f.call
		f.call = func(ctx context.Context, on *connection, batch []*pending) error {
			if gone[on] {
				return errNotSent
			}
			return call(ctx, on, batch)
		}
		p := f.ask(t.Context(), time.Second)
		f.wantBatches(t, 1)
		f.ended <- nil
		if <-p.done; p.err != nil || f.failures.Load() != 0 {
			t.Errorf("%v, %d failures", p.err, f.failures.Load())
		}
		synctest.Wait()
		if f.held != minConnections {
			t.Errorf("%d connections", f.held)
		}
	})
}

// Five takes in a row that time out open the breaker, however short their
// deadlines are beside the store's timeout. A take with less time than calls
// usually need does not count.
func TestHurriedCallers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFakeNode()
		f.latency = 20 * time.Millisecond
		for range 2 * tripsAfter {
			p := f.ask(t.Context(), 10*time.Millisecond)
			if <-p.done; KindOf(p.err) != KindTimeout {
				t.Errorf("%v", p.err)
			}
		}
		if f.isOpen() {
			t.Error("callers in a hurry have opened the breaker")
		}
		for i := range tripsAfter {
			if f.isOpen() {
				t.Errorf("open after %d", i)
			}
			p := f.ask(t.Context(), 195*time.Millisecond)
			if <-p.done; KindOf(p.err) != KindTimeout || p.took != 195*time.Millisecond {
				t.Errorf("%v after %v", p.err, p.took)
			}
		}
		if p := f.ask(t.Context(), 195*time.Millisecond); p.took != 0 || KindOf(p.err) != KindTimeout {
			t.Errorf("%v after %v", p.err, p.took)
		}
	})
}

// A take leaves the queue at its deadline or when its caller hangs up, and is
// then not sent. A take that is in flight keeps its caller until the deadline
// at most, and its call goes on.
func TestTakesLeave(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFakeNode()
		ctx, hangUp := context.WithCancel(t.Context())
		first := f.ask(t.Context(), 100*time.Millisecond)
		f.wantBatches(t, 1)
		for range minConnections - 1 {
			f.ask(t.Context(), time.Second)
			time.Sleep(minLinger)
			f.wantBatches(t, 1)
		}
		dropped, hurried := f.ask(ctx, time.Second), f.ask(t.Context(), 20*time.Millisecond)
		patient := f.ask(t.Context(), 2*time.Second)
		hangUp()
		if <-dropped.done; !errors.Is(dropped.err, context.Canceled) || dropped.abandoned {
			t.Errorf("dropped: %+v", dropped)
		}
		if <-hurried.done; !errors.Is(hurried.err, context.DeadlineExceeded) || hurried.abandoned ||
			hurried.took != 20*time.Millisecond {
			t.Errorf("hurried: %+v", hurried)
		}
		if <-first.done; KindOf(first.err) != KindTimeout || first.took != 100*time.Millisecond {
			t.Errorf("first: %+v", first)
		}
		f.wantBatches(t, 1) // an overdue flight is no flight
		// Whoever may stay longest flies, and the others leave at their own
		// deadlines.
		short := f.ask(t.Context(), 30*time.Millisecond)
		for range minConnections {
			f.ended <- nil
		}
		<-patient.done
		f.wantBatches(t, 1)
		if <-short.done; KindOf(short.err) != KindTimeout || short.took != 30*time.Millisecond {
			t.Errorf("short: %+v", short)
		}
		solo, long := f.ask(t.Context(), 500*time.Millisecond), f.ask(t.Context(), 30*time.Millisecond)
		later := f.ask(t.Context(), 300*time.Millisecond)
		f.wantBatches(t, 1)
		f.ended <- nil
		<-solo.done
		f.wantBatches(t, 2)
		if <-long.done; !long.abandoned || !errors.Is(long.err, context.DeadlineExceeded) ||
			long.took != 30*time.Millisecond {
			t.Errorf("in the air past its deadline: %+v", long)
		}
		f.ended <- nil
		if <-later.done; later.err != nil {
			t.Errorf("with one that left: %+v", later)
		}
		gone := f.ask(ctx, time.Second)
		if <-gone.done; !errors.Is(gone.err, context.Canceled) {
			t.Errorf("gone before: %+v", gone)
		}
		f.wantBatches(t)
	})
}

// When the first who waits hangs up, the others are held up no longer for it.
func TestLingerIsEverybodys(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFakeNode()
		ctx, hangUp := context.WithCancel(t.Context())
		f.ask(t.Context(), time.Second)
		f.wantBatches(t, 1)
		first, second := f.ask(ctx, time.Second), f.ask(t.Context(), time.Second)
		hangUp()
		<-first.done
		time.Sleep(minLinger)
		f.wantBatches(t, 1)
		f.ended <- nil
		f.ended <- nil
		if <-second.done; second.err != nil || second.took != minLinger {
			t.Errorf("%v after %v", second.err, second.took)
		}
	})
}

// A call that panics is a failed one, and its connection is used no more.
func TestCallPanics(t *testing.T) {
	f := newFakeNode()
	f.call = func(context.Context, *connection, []*pending) error { panic("a mistake") }
	for range tripsAfter {
		func() {
			defer func() { _ = recover() }()
			p := newBlank()
			p.deadline = time.Now().Add(10 * time.Second)
			_, _ = f.do(t.Context(), p)
		}()
	}
	if !f.isOpen() || f.inFlight != 0 {
		t.Errorf("open %v, %d calls", f.isOpen(), f.inFlight)
	}
}

// Where the breaker is open nobody waits for a flight.
func TestNobodyWaitsForAnOpenBreaker(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, broken := newFakeNode(), errors.New("broken")
		for range tripsAfter {
			p := f.ask(t.Context(), time.Second)
			f.wantBatches(t, 1)
			f.ended <- broken
			<-p.done
		}
		for range 10 {
			if p := f.ask(t.Context(), time.Second); p.took != 0 {
				t.Error("waited")
			} else if <-p.done; KindOf(p.err) != KindConnection {
				t.Error(p.err)
			}
		}
		f.wantBatches(t)
		time.Sleep(probesEvery + time.Millisecond)
		probe := f.ask(t.Context(), time.Second)
		f.wantBatches(t, 1)
		other := f.ask(t.Context(), time.Second)
		if <-other.done; other.err == nil || other.took != 0 {
			t.Errorf("beside the probe: %+v", other)
		}
		f.ended <- nil
		if <-probe.done; probe.err != nil {
			t.Error(probe.err)
		}
	})
}

// A batch is the same as its takes one after another. For random requests that
// share keys, with different shapes, costs, shadows and clocks that jump, the
// script's verdicts and stored state are those of levelAt.
func TestBatchAgreesWithLevelAt(t *testing.T) {
	setRapidChecks(t, 3000)
	server := redistest.Start(t)
	client := server.Client()
	clock := &testClock{t: t, client: client}
	r := newTestRedis(t, server, keyClock)
	ctx := context.Background()
	sequences, shared := 0, 0
	rapid.Check(t, func(t *rapid.T) {
		sequences++
		m := newMemory("buckets", 1<<20, clock.now, nil, prometheus.NewRegistry())
		clock.set(begin)
		shapes := rapid.SliceOfN(anyBucket(), 1, 2).Draw(t, "shapes")
		for range rapid.IntRange(1, 3).Draw(t, "calls") {
			jump := rapid.OneOf(rapid.Int64Range(0, 2*shapes[0].wait(level{}, 1).Microseconds()),
				rapid.Int64Range(-time.Hour.Microseconds(), 0),
				rapid.Int64Range(0, shapes[0].FillTime().Microseconds())).Draw(t, "jump")
			clock.set(min(clock.at+jump, 1<<53-1))
			var requests [][]Charge
			var batch []*pending
			seen := map[string]bool{}
			for range rapid.IntRange(1, 6).Draw(t, "requests") {
				var charges []Charge
				for _, key := range []string{"a", "b", "c"} {
					if rapid.Bool().Draw(t, "without") && (key != "c" || len(charges) > 0) {
						continue
					}
					c := charge(rapid.SampledFrom(shapes).Draw(t, "of"), fmt.Sprint(key, sequences))
					c.Cost = rapid.OneOf(rapid.Int64Range(0, 3), rapid.Int64Range(0, c.Bucket.burst), rapid.Just(int64(1)<<60)).Draw(t,
						"cost")
					c.Limit.OnFailure = rapid.SampledFrom([]FailureMode{Allow, Delegate, Deny}).Draw(t, "on failure")
					if rapid.IntRange(0, 3).Draw(t, "shadow") == 0 {
						c = c.shadow()
					}
					if seen[c.Key] {
						shared++
					}
					seen[c.Key] = true
					charges = append(charges, c)
				}
				requests = append(requests, charges)
				batch = append(batch, newPending(charges, time.Time{}, nil))
			}
			if err := r.call(ctx, r.client, batch); err != nil {
				t.Fatal(err)
			}
			for i, charges := range requests {
				got, want := make([]Verdict, len(charges)), make([]Verdict, len(charges))
				if err := r.read(batch[i].at, batch[i].reply, charges, got); err != nil {
					t.Fatal(err)
				}
				m.Take(ctx, charges, want)
				for j, c := range charges {
					want[j].Source = RedisSource
					if got[j] != want[j] {
						t.Fatalf("request %d: %+v of %+v at %d\nthe script says %+v\n   the maths say %+v", i, c, c.Limit, clock.at,
							got[j], want[j])
					}
				}
			}
			for key := range seen {
				kept, ok := m.shards[m.shardOf(key)].buckets[key]
				raw := client.Get(ctx, key).Val()
				if ok != (raw != "") {
					t.Fatalf("stored %q, want %+v (%v)", raw, kept, ok)
				}
				if ok && describe(decode(t, raw)) != describe(kept) {
					t.Fatalf("stored %+v, want %+v", decode(t, raw), kept)
				}
			}
		}
	})
	if shared < 1000 {
		t.Errorf("only %d charges on a key that their batch had already", shared)
	}
}

// Many callers come and go, some with little time and some hanging up. Every
// caller gets the answer to its own take, and every token is accounted for.
func TestBusyBatches(t *testing.T) {
	server := redistest.Start(t)
	r := newTestRedis(t, server, serverClock)
	const callers, each, keys = 64, 300, 7
	shape := bucket(t, 1, day, callers*each)
	var mu sync.Mutex
	granted, unknown := make([]int64, keys), make([]int64, keys)
	var wg sync.WaitGroup
	for c := range callers {
		wg.Go(func() {
			random := rand.New(rand.NewPCG(1, uint64(c)))
			for range each {
				a, b := random.IntN(keys), random.IntN(keys)
				charges := []Charge{charge(shape, fmt.Sprint(a)).costs(1 + int64(a))}
				if a != b {
					charges = append(charges, charge(shape, fmt.Sprint(b)).costs(0))
				}
				verdicts := make([]Verdict, len(charges))
				ctx, cancel := context.WithCancel(context.Background())
				switch random.IntN(4) {
				case 0:
					ctx, cancel = context.WithTimeout(ctx, deadlineMargin+time.Duration(random.IntN(2000))*time.Microsecond)
				case 1:
					time.AfterFunc(time.Duration(random.IntN(300))*time.Microsecond, cancel)
				}
				r.Take(ctx, charges, verdicts)
				cancel()
				mu.Lock()
				if v := verdicts[0]; v.Err != nil {
					unknown[a] += 1 + int64(a)
				} else if granted[a] += 1 + int64(a); !v.Allowed {
					t.Errorf("%+v", v)
				}
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	for k := range keys {
		v := taker{t, r}.take(charge(shape, fmt.Sprint(k)).costs(0))[0]
		taken := shape.burst - v.Remaining
		if taken < granted[k] || taken > granted[k]+unknown[k] {
			t.Errorf("key %d: %d tokens are gone, %d were granted and of %d nobody knows", k, taken, granted[k], unknown[k])
		}
	}
	t.Logf("granted %v, unknown %v, in %d calls", granted, unknown, calls(t, r))
}
