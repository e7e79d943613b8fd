package limiter

import (
	"context"
	"fmt"
	"io"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/sluiceproxy/sluice/limiter/redistest"
)

// control is a connection that asks Redis for nothing but its answer, all the
// time, and so sees when this machine kept takes waiting, rather than sluice.
type control struct {
	mu   sync.Mutex
	slow []span
}

// span is some time in which something took longer than it should, by excess.
type span struct {
	from, to time.Time
	excess   time.Duration
}

// watch asks the server at addr about every millisecond, and notes how much
// longer than normal an answer took, or how late the question itself was.
func watch(t *testing.T, addr string, normal time.Duration) *control {
	t.Helper()
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	c := &control{}
	sent := make(chan time.Time, 10_000)
	var wg sync.WaitGroup
	stop := make(chan struct{})
	wg.Go(func() {
		defer close(sent)
		last := time.Now()
		for {
			select {
			case <-stop:
				return
			case <-time.After(time.Millisecond):
			}
			now := time.Now()
			c.note(last, now, time.Millisecond)
			last = now
			if _, err := conn.Write([]byte("PING\r\n")); err != nil {
				return
			}
			sent <- now
		}
	})
	wg.Go(func() {
		var answer [len("+PONG\r\n")]byte
		for at := range sent {
			if _, err := io.ReadFull(conn, answer[:]); err != nil {
				continue // until sent is closed
			}
			c.note(at, time.Now(), normal)
		}
	})
	t.Cleanup(func() {
		close(stop)
		_ = conn.Close()
		wg.Wait()
	})
	return c
}

func (c *control) note(from, to time.Time, normal time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if excess := to.Sub(from) - normal; excess > leastExcess {
		c.slow = append(c.slow, span{from, to, excess})
	}
}

// aftermath is how long a pause of the machine is felt, besides the round trips
// of a connection that is made again: takes run out of time, the breaker opens,
// and a probe finds Redis again.
const aftermath = 2*probesEvery + 100*time.Millisecond

// leastExcess is what a control notes at all.
const leastExcess = 3 * time.Millisecond

// slowFor returns for how long between two instants the machine was slow by
// more than some time.
func (c *control) slowFor(from, to time.Time, by time.Duration) (total time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, s := range c.slow { // in the order of their ends
		if s.from.Before(from) {
			s.from = from
		}
		if s.to.After(to) {
			s.to = to
		}
		if s.excess > by && s.to.After(s.from) {
			total, from = total+s.to.Sub(s.from), s.to
		}
	}
	return total
}

// excuses reports whether the machine was slow, by more than some time, between
// two instants.
func (c *control) excuses(from, to time.Time, by time.Duration) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.ContainsFunc(c.slow, func(s span) bool { return s.excess > by && s.to.After(from) && s.from.Before(to) })
}

// With a distant Redis and the default timeout, no take on a key of its own
// fails because of the distance, or waits much longer than the round trip.
func TestChaosDistance(t *testing.T) {
	distances := redistest.Scaled([]time.Duration{80}, []time.Duration{20, 40, 60, 80})
	for _, away := range distances {
		away *= time.Millisecond
		t.Run(away.String(), func(t *testing.T) {
			for _, perSecond := range []int{50, 200, 1000} {
				t.Run(fmt.Sprint(perSecond), func(t *testing.T) {
					t.Parallel()
					testDistance(t, away, perSecond)
				})
			}
		})
	}
}

func testDistance(t *testing.T, away time.Duration, perSecond int) {
	const timeout, late, disturbed = 100 * time.Millisecond, 25 * time.Millisecond, 10 * time.Millisecond
	left := timeout - away - 15*time.Millisecond // what the machine may use up: a take lingers for up to 13 ms
	lasts, rounds := redistest.Lasts(time.Second, 5*time.Second), redistest.Scaled(5, 2)
	node := redistest.StartNode(t)
	proxy, beside := redistest.StartProxy(t, node.Addr), redistest.StartProxy(t, node.Addr)
	proxy.Delay(away)
	beside.Delay(away)
	machine := watch(t, beside.Addr, away)
	s := &shaky{options: RedisOptions{URL: "redis://" + proxy.Addr}}
	r := s.open(t, timeout)
	if err := r.Ping(t.Context()); err != nil {
		t.Fatal(err)
	}
	shape := bucket(t, 1, time.Minute, 5)
	var next atomic.Int64
	for round := 1; ; round++ {
		took, failed, excused := takesBy(machine, away, disturbed, left, func(decided func(began time.Time, d *Decision)) {
			redistest.Pace(perSecond, lasts, func() {
				began := time.Now()
				d := Decide(context.Background(), r, []Charge{charge(shape, fmt.Sprint(next.Add(1)))})
				decided(began, &d)
			})
		})
		if excused > len(took) { // the machine did not let anything be seen
			if round < rounds {
				continue
			}
			t.Logf("the machine was slow during %d of %d takes: this says little", excused, excused+len(took))
			return
		}
		p99 := took[len(took)*99/100]
		t.Logf(
			"of %d takes %d failed, 99 %% took at most %v, the slowest %v; "+
				"%d connections at once; %d more while the machine was slow",
			len(took), len(failed), p99, took[len(took)-1], proxy.Most(), excused)
		if len(failed) > 0 {
			t.Errorf("failed: %v", failed[:min(len(failed), 5)])
		}
		if p99 > away+late {
			t.Errorf("99 %% took %v", p99)
		}
		if proxy.Most() > poolSize && excused == 0 {
			t.Errorf("%d connections at once", proxy.Most())
		}
		return
	}
}

// takesBy runs a load, which says of each take when it began and what came of
// it, and returns how long takes took, in order, and why they failed, without
// those that the machine kept waiting: by more than disturbed, or by more than
// left where a take failed.
func takesBy(
	machine *control,
	away, disturbed, left time.Duration,
	load func(decided func(began time.Time, d *Decision)),
) (took []time.Duration, failed []error, excused int) {
	type answer struct {
		began, ended time.Time
		err          error
	}
	var mu sync.Mutex
	var all []answer
	load(func(began time.Time, d *Decision) {
		a := answer{began, time.Now(), d.Verdicts[0].Err}
		mu.Lock()
		defer mu.Unlock()
		all = append(all, a)
	})
	<-time.After(2 * away) // until the control has its answers
	for _, a := range all {
		if machine.excuses(a.began, a.ended, disturbed) ||
			a.err != nil && machine.excuses(a.began.Add(-aftermath-4*away), a.ended, left) {
			excused++
			continue
		}
		if took = append(took, a.ended.Sub(a.began)); a.err != nil {
			failed = append(failed, a.err)
		}
	}
	slices.Sort(took)
	return took, failed, excused
}

// A client that brings a thousand new keys at once does not crowd out other
// clients.
func TestChaosBurstOfKeys(t *testing.T) {
	const burst, perSecond = 1100, 20
	const timeout, away, disturbed = 300 * time.Millisecond, 100 * time.Millisecond, 50 * time.Millisecond
	lasts := redistest.Lasts(2*time.Second, 20*time.Second)
	node := redistest.StartNode(t)
	proxy, beside := redistest.StartProxy(t, node.Addr), redistest.StartProxy(t, node.Addr)
	proxy.Delay(away)
	beside.Delay(away)
	machine := watch(t, beside.Addr, away)
	s := &shaky{options: RedisOptions{URL: "redis://" + proxy.Addr}}
	r := s.open(t, timeout)
	if err := r.Ping(t.Context()); err != nil {
		t.Fatal(err)
	}
	shape := bucket(t, 1, time.Minute, 5)
	var next, bursts atomic.Int64
	took, failed, excused := takesBy(
		machine,
		away,
		disturbed,
		disturbed,
		func(decided func(began time.Time, d *Decision)) {
			meanwhile(func() {
				redistest.Pace(perSecond, lasts, func() {
					began := time.Now()
					d := Decide(context.Background(), r, []Charge{charge(shape, fmt.Sprint("other-", next.Add(1)))})
					decided(began, &d)
				})
			}, func() {
				redistest.Pace(2, lasts, func() {
					bursts.Add(1)
					var wg sync.WaitGroup
					for range burst {
						wg.Go(func() { Decide(context.Background(), r, []Charge{charge(shape, fmt.Sprint("burst-", next.Add(1)))}) })
					}
					wg.Wait()
				})
			})
		},
	)
	t.Logf("beside %d bursts %d of %d takes were refused, and %d more while the machine was slow: %v", bursts.Load(),
		len(failed), len(took), excused, failed[:min(len(failed), 5)])
	if 100*len(failed) > len(took) {
		t.Errorf("%d of %d were refused", len(failed), len(took))
	}
}
