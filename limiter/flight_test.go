package limiter

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"pgregory.net/rapid"

	"github.com/sluiceproxy/sluice/limiter/redistest"
)

// airport is a node whose calls a test sees leave, and lets land when it likes.
type airport struct {
	*node
	left   chan []*take
	landed chan error
}

// newAirport is for use in a bubble of synctest's, whose clock it then goes by.
func newAirport() airport {
	a := airport{left: make(chan []*take, 100), landed: make(chan error)}
	a.node = &node{breaker: newBreaker(time.Second), send: func(ctx context.Context, batch []*take) error {
		a.left <- batch
		select {
		case err := <-a.landed:
			for _, t := range batch {
				if err == nil {
					t.reply = "landed"
				}
			}
			return err
		case <-ctx.Done():
			return ctx.Err()
		}
	}}
	return a
}

// passenger is one take and how it fared.
type passenger struct {
	*take
	left bool
	err  error
	took time.Duration
	done chan struct{}
}

// board has a take carried, with that long to live.
func (a airport) board(ctx context.Context, life time.Duration) *passenger {
	began := time.Now()
	p := &passenger{take: blankTake(), done: make(chan struct{})}
	p.deadline = began.Add(life)
	go func() {
		p.left, p.err = a.carry(ctx, p.take)
		p.took = time.Since(began)
		close(p.done)
	}()
	synctest.Wait()
	return p
}

func (a airport) inTheAir(t *testing.T, sizes ...int) {
	t.Helper()
	synctest.Wait()
	for _, size := range sizes {
		select {
		case batch := <-a.left:
			if len(batch) != size {
				t.Errorf("%d takes left, want %d", len(batch), size)
			}
		default:
			t.Fatalf("no flight left, want one of %d takes", size)
		}
	}
	select {
	case batch := <-a.left:
		t.Errorf("%d takes left, want none", len(batch))
	default:
	}
}

// What arrives while a call is under way leaves with the next one, all at once.
func TestTakesGather(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, ctx := newAirport(), t.Context()
		all := []*passenger{a.board(ctx, time.Second)}
		a.inTheAir(t, 1) // an idle node's take waits for nobody
		for range 20 {
			all = append(all, a.board(ctx, time.Second))
		}
		a.inTheAir(t)
		a.landed <- nil
		a.inTheAir(t, 20)
		a.landed <- nil
		for i, p := range all {
			if <-p.done; p.err != nil || p.left || p.reply != "landed" || p.took != 0 {
				t.Errorf("take %d: %+v", i, p)
			}
		}
		a.inTheAir(t)
		if a.flights != 0 || len(a.waiting) != 0 {
			t.Errorf("%d in the air, %d waiting", a.flights, len(a.waiting))
		}
	})
}

// A call that takes long holds nobody up for longer than patience; at most maxFlights are in the air, with at most maxBoard on each, and
// past maxWaiting takes are turned away at once.
func TestSlowFlights(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, ctx := newAirport(), t.Context()
		all := []*passenger{a.board(ctx, time.Second)}
		a.inTheAir(t, 1)
		all = append(all, a.board(ctx, time.Second))
		time.Sleep(patience / 2)
		all = append(all, a.board(ctx, time.Second))
		a.inTheAir(t)
		time.Sleep(patience / 2)
		a.inTheAir(t, 2)
		for range maxBoard {
			all = append(all, a.board(ctx, time.Second))
		}
		a.inTheAir(t, maxBoard) // a full one does not wait
		all = append(all, a.board(ctx, time.Second))
		time.Sleep(patience)
		a.inTheAir(t, 1)
		for range maxWaiting {
			all = append(all, a.board(ctx, time.Second))
		}
		time.Sleep(10 * patience)
		a.inTheAir(t)
		over := a.board(ctx, time.Second)
		if <-over.done; KindOf(over.err) != KindOverload || over.took != 0 {
			t.Errorf("past the bound: %v after %v", over.err, over.took)
		}
		for range maxFlights {
			a.landed <- nil
		}
		a.inTheAir(t, maxBoard, maxBoard, maxBoard, maxBoard)
		for range maxFlights {
			a.landed <- nil
		}
		for i, p := range all {
			if <-p.done; p.err != nil || p.reply != "landed" {
				t.Errorf("take %d: %+v", i, p)
			}
		}
	})
}

// A take leaves the queue at its own deadline, or when its caller hangs up, and is then not sent; one that is in the air keeps its caller no
// longer than to the deadline, and flies on.
func TestTakesLeave(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newAirport()
		ctx, hangUp := context.WithCancel(t.Context())
		first := a.board(t.Context(), 100*time.Millisecond)
		a.inTheAir(t, 1)
		for range maxFlights - 1 {
			a.board(t.Context(), time.Second)
			time.Sleep(patience)
			a.inTheAir(t, 1)
		}
		dropped, hurried := a.board(ctx, time.Second), a.board(t.Context(), 20*time.Millisecond)
		patient := a.board(t.Context(), 2*time.Second)
		hangUp()
		if <-dropped.done; !errors.Is(dropped.err, context.Canceled) || dropped.left {
			t.Errorf("dropped: %+v", dropped)
		}
		if <-hurried.done; !errors.Is(hurried.err, context.DeadlineExceeded) || hurried.left || hurried.took != 20*time.Millisecond {
			t.Errorf("hurried: %+v", hurried)
		}
		if <-first.done; KindOf(first.err) != KindTimeout || first.took != 100*time.Millisecond {
			t.Errorf("first: %+v", first)
		}
		a.inTheAir(t, 1) // an overdue flight is no flight
		// Whoever may stay longest flies, and the others leave at their own deadlines.
		short := a.board(t.Context(), 30*time.Millisecond)
		for range maxFlights {
			a.landed <- nil
		}
		<-patient.done
		a.inTheAir(t, 1)
		if <-short.done; KindOf(short.err) != KindTimeout || short.took != 30*time.Millisecond {
			t.Errorf("short: %+v", short)
		}
		solo, long := a.board(t.Context(), 500*time.Millisecond), a.board(t.Context(), 30*time.Millisecond)
		later := a.board(t.Context(), 300*time.Millisecond)
		a.inTheAir(t, 1)
		a.landed <- nil
		<-solo.done
		a.inTheAir(t, 2)
		if <-long.done; !long.left || !errors.Is(long.err, context.DeadlineExceeded) || long.took != 30*time.Millisecond {
			t.Errorf("in the air past its deadline: %+v", long)
		}
		a.landed <- nil
		if <-later.done; later.err != nil {
			t.Errorf("with one that left: %+v", later)
		}
		gone := a.board(ctx, time.Second)
		if <-gone.done; !errors.Is(gone.err, context.Canceled) {
			t.Errorf("gone before: %+v", gone)
		}
		a.inTheAir(t)
	})
}

// When the first who waits hangs up, the others are held up no longer for it.
func TestPatienceIsEverybodys(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newAirport()
		ctx, hangUp := context.WithCancel(t.Context())
		a.board(t.Context(), time.Second)
		a.inTheAir(t, 1)
		first, second := a.board(ctx, time.Second), a.board(t.Context(), time.Second)
		hangUp()
		<-first.done
		time.Sleep(patience)
		a.inTheAir(t, 1)
		a.landed <- nil
		a.landed <- nil
		if <-second.done; second.err != nil || second.took != patience {
			t.Errorf("%v after %v", second.err, second.took)
		}
	})
}

// A call that panics is a failed one: its passengers fail, and the breaker waits for no end of it.
func TestFlightPanics(t *testing.T) {
	b := newBreaker(time.Second)
	for range tripsAfter {
		func() {
			defer func() { _ = recover() }()
			_ = b.run(t.Context(), func() error { panic("a mistake") })
		}()
	}
	if !b.isOpen() {
		t.Error("calls that panicked have not opened the breaker")
	}
}

// Where the breaker is open nobody waits for a flight.
func TestNobodyWaitsForAnOpenBreaker(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, broken := newAirport(), errors.New("broken")
		for range tripsAfter {
			p := a.board(t.Context(), time.Second)
			a.inTheAir(t, 1)
			a.landed <- broken
			<-p.done
		}
		for range 10 {
			if p := a.board(t.Context(), time.Second); p.took != 0 {
				t.Error("waited")
			} else if <-p.done; KindOf(p.err) != KindConnection {
				t.Error(p.err)
			}
		}
		a.inTheAir(t)
		time.Sleep(probesEvery + time.Millisecond)
		probe := a.board(t.Context(), time.Second)
		a.inTheAir(t, 1)
		other := a.board(t.Context(), time.Second)
		if <-other.done; other.err == nil || other.took != 0 {
			t.Errorf("beside the probe: %+v", other)
		}
		a.landed <- nil
		if <-probe.done; probe.err != nil {
			t.Error(probe.err)
		}
	})
}

// A batch is its takes one after another: of random requests that share keys, with shapes that differ, costs, shadows and clocks that jump, the
// script says of each charge what the maths say, and stores the same.
func TestBatchAgreesWithDraw(t *testing.T) {
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
			jump := rapid.OneOf(rapid.Int64Range(0, 2*shapes[0].wait(level{}, 1).Microseconds()), rapid.Int64Range(-time.Hour.Microseconds(), 0),
				rapid.Int64Range(0, shapes[0].FillTime().Microseconds())).Draw(t, "jump")
			clock.set(min(clock.at+jump, 1<<53-1))
			var requests [][]Charge
			var batch []*take
			seen := map[string]bool{}
			for range rapid.IntRange(1, 6).Draw(t, "requests") {
				var charges []Charge
				for _, key := range []string{"a", "b", "c"} {
					if rapid.Bool().Draw(t, "without") && (key != "c" || len(charges) > 0) {
						continue
					}
					c := charge(rapid.SampledFrom(shapes).Draw(t, "of"), fmt.Sprint(key, sequences))
					c.Cost = rapid.OneOf(rapid.Int64Range(0, 3), rapid.Int64Range(0, c.Bucket.burst), rapid.Just(int64(1)<<60)).Draw(t, "cost")
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
				batch = append(batch, newTake(charges, time.Time{}))
			}
			if err := r.call(ctx, batch); err != nil {
				t.Fatal(err)
			}
			for i, charges := range requests {
				got, want := make([]Verdict, len(charges)), make([]Verdict, len(charges))
				if err := r.read(batch[i].at, batch[i].reply, charges, got, nil); err != nil {
					t.Fatal(err)
				}
				m.Take(ctx, charges, want)
				for j, c := range charges {
					want[j].Source = RedisSource
					if got[j] != want[j] {
						t.Fatalf("request %d: %+v of %+v at %d\nthe script says %+v\n   the maths say %+v", i, c, c.Limit, clock.at, got[j], want[j])
					}
				}
			}
			for key := range seen {
				kept, ok := m.shards[m.shardOf(key)].buckets[key]
				raw := client.Get(ctx, key).Val()
				if ok != (raw != "") {
					t.Fatalf("stored %q, want %+v (%v)", raw, kept, ok)
				}
				if ok && !decode(t, raw).equal(kept) {
					t.Fatalf("stored %+v, want %+v", decode(t, raw), kept)
				}
			}
		}
	})
	if shared < 1000 {
		t.Errorf("only %d charges on a key that their batch had already", shared)
	}
}

// Many callers who come and go, some with little time and some who hang up: every answer is the right one's, and every token is accounted for.
func TestBusyFlights(t *testing.T) {
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
