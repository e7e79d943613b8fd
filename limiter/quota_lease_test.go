package limiter

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/sluiceproxy/sluice/limiter/redistest"
)

// Three sidecars with leases, whose clocks are up to 90 seconds off, take from one
// quota as fast as they can. Each time that they have tokens leased, Redis's clock is
// stepped: over the end of a window, back over it, and by the hour and the half hour,
// as by a mistake about summer time. Each window grants exactly its tokens; if the
// clock was stepped into it, at most what was leased then besides. No take fails, and
// what is held comes back or ends.
func TestQuotaIsExactWithLeases(t *testing.T) {
	server := startStepped(t)
	// Each has the instants from the end of a window on to which Redis's clock is set.
	ways := []struct {
		name string
		sets []time.Duration
	}{
		{"no step", []time.Duration{-10 * time.Second}},
		{"runs over the end", []time.Duration{-30 * time.Millisecond}},
		{"forwards", []time.Duration{-10 * time.Second, 10 * time.Second}},
		{"back", []time.Duration{10 * time.Second, -10 * time.Second}},
		{"back within the window", []time.Duration{20 * time.Second, 10 * time.Second}},
		{"forwards and back", []time.Duration{-10 * time.Second, 10 * time.Second, -10 * time.Second, 20 * time.Second}},
		{"an hour forwards and back", []time.Duration{-10 * time.Second, time.Hour - 10*time.Second, -10 * time.Second}},
		{"an hour back and forwards", []time.Duration{10 * time.Second, 10*time.Second - time.Hour, 10 * time.Second}},
		{"half an hour forwards, twice", []time.Duration{-10 * time.Second, 30 * time.Minute, time.Hour - time.Minute}},
	}
	var leased, lost, over int64
	step := redistest.Scaled(13, 7) // all of them take minutes
	for i := 0; i < len(windowEnds); i += step {
		end := windowEnds[i]
		c := calendar(t, end.unit, end.zone, end.starts)
		ends, err := time.Parse(time.RFC3339, end.ends)
		if err != nil {
			t.Fatal(err)
		}
		for _, way := range ways {
			t.Run(fmt.Sprintf("%s/%s/%s/%s", end.unit, end.zone, end.ends, way.name), func(t *testing.T) {
				s := newStepping(t, server, c)
				for _, at := range way.sets {
					s.set(ends.Add(at).UnixMicro())
				}
				s.drain()
				a, b, c := s.check()
				leased, lost, over = leased+a, lost+b, over+c
			})
		}
	}
	t.Logf("%d tokens were leased at steps into a window, which granted %d of them; %d may be lost", leased, over, lost)
	if leased == 0 && !t.Failed() {
		t.Error("nothing was leased when the clock was stepped: this says little")
	}
}

// stepping is sidecars that take from a quota while its Redis's clock is stepped.
type stepping struct {
	t        *testing.T
	server   stepped
	charge   Charge
	sidecars []*leasing
	stop     chan struct{}
	callers  sync.WaitGroup
	steps    []clockStep

	mu     sync.Mutex
	grants []grantedFrom
	// failure is the first take without a verdict.
	failure string
}

// clockStep says that Redis's clock is ahead of the machine's by so many
// microseconds, from an instant between before and after on, by the machine's clock.
type clockStep struct{ ahead, before, after int64 }

// grantedFrom is a token that was granted in the window with an end, or from a
// lease between two instants of the machine's clock: a call reads the clock
// first, and may then wait for the lease.
type grantedFrom struct {
	windowEnd, from, until int64
	lease                  bool
}

// leasing is the lender of one sidecar's Leases, with a list of all that was leased.
type leasing struct {
	*Redis
	leases *Leases

	mu    sync.Mutex
	terms map[Hold]*leasedTerm
	// lost has how many tokens may neither have been granted nor returned, by when
	// their window ends: their take or their settlement was late. A take without an
	// answer tells no window, and counts in 0.
	lost map[int64]int64
}

// leasedTerm is a term's tokens, from the sending of the take to that of its
// settlement; settled is 0 until then.
type leasedTerm struct{ tokens, windowEnd, sent, settled int64 }

func (l *leasing) Take(ctx context.Context, charges []Charge, verdicts []Verdict) {
	sent := wallClock()
	l.Redis.Take(ctx, charges, verdicts)
	l.mu.Lock()
	defer l.mu.Unlock()
	switch v := &verdicts[0]; {
	case !v.Hold.IsZero():
		l.terms[v.Hold] = &leasedTerm{tokens: v.Hold.Tokens, windowEnd: windowEnd(v), sent: sent}
	case v.Err != nil:
		l.lost[0] += charges[0].Cost
	}
}

func (l *leasing) Settle(ctx context.Context, settlements []Settlement, results []Settled) {
	l.mu.Lock()
	term := l.terms[settlements[0].Hold]
	term.settled = wallClock()
	l.mu.Unlock()
	l.Redis.Settle(ctx, settlements, results)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.lost[term.windowEnd] += settlements[0].Hold.Tokens - settlements[0].Cost - results[0].Returned
}

// windowEnd returns when the window of a quota ends, by Redis's verdict.
func windowEnd(v *Verdict) int64 { return v.at + v.FullAfter.Microseconds() }

// has returns how many tokens can be granted from the lease of a key now.
func (l *leasing) has(key string) int64 {
	e := l.leases.find(key)
	if e == nil {
		return 0
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if wallClock() >= e.end {
		return 0
	}
	return e.left
}

// The tokens of the quota, and how long its leases last.
const steppingTokens, steppingLease = 100_000, 250 * time.Millisecond

func newStepping(t *testing.T, server stepped, c Calendar) *stepping {
	s := &stepping{t: t, server: server, stop: make(chan struct{})}
	s.charge = charge(quota(t, steppingTokens, c), t.Name()).leased(steppingLease)
	for _, off := range []time.Duration{-90 * time.Second, 0, 90 * time.Second} {
		r := newTestRedis(t, server.Server, serverClock)
		r.wall = func() int64 { return wallClock() + off.Microseconds() }
		l := &leasing{Redis: r, terms: map[Hold]*leasedTerm{}, lost: map[int64]int64{}}
		l.leases = newLeases(r, l, wallClock, prometheus.NewRegistry())
		s.sidecars = append(s.sidecars, l)
	}
	return s
}

// set sets Redis's clock, and waits until tokens are leased, or none are left.
func (s *stepping) set(at int64) {
	before := wallClock()
	ahead := at - before
	s.server.step(time.Duration(ahead) * time.Microsecond)
	s.steps = append(s.steps, clockStep{ahead, before, wallClock()})
	if len(s.steps) == 1 {
		for _, l := range s.sidecars {
			for range 3 {
				s.callers.Go(func() { s.call(l) })
			}
		}
	}
	eventually(s.t, "tokens are leased", func() bool {
		out := int64(0)
		for _, l := range s.sidecars {
			out += l.has(s.charge.Key)
		}
		return out >= steppingTokens/100 || s.left() == 0
	})
	// A sidecar that ends now loses a hold: nobody settles it.
	v := make([]Verdict, 1)
	s.sidecars[0].Redis.Take(s.t.Context(), []Charge{s.charge.holding(steppingLease / 5)}, v)
	s.note(&v[0])
}

// left returns how many tokens can be granted, from leases too.
func (s *stepping) left() int64 {
	v, _, err := s.sidecars[0].Get(s.t.Context(), s.charge)
	if err != nil {
		s.t.Fatal(err)
	}
	return v.Remaining + v.Held
}

// call takes until the test is over.
func (s *stepping) call(l *leasing) {
	verdicts := make([]Verdict, 1)
	for {
		select {
		case <-s.stop:
			return
		default:
		}
		l.leases.Take(context.Background(), []Charge{s.charge}, verdicts)
		s.note(&verdicts[0])
	}
}

// note notes what became of a take.
func (s *stepping) note(v *Verdict) {
	until := wallClock()
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case !v.Known() && s.failure == "":
		s.failure = fmt.Sprintf("%+v", *v)
	case v.Allowed:
		s.grants = append(s.grants, grantedFrom{windowEnd(v), v.at, until, v.Source == LeaseSource})
	}
}

// drain waits until the last window has no tokens, and nothing of it is held.
func (s *stepping) drain() {
	eventually(s.t, "nothing is left and nothing held", func() bool { return s.left() == 0 })
	close(s.stop)
	s.callers.Wait()
	for _, l := range s.sidecars {
		l.leases.Close(s.t.Context())
	}
}

// check compares what each window has granted with its tokens. It returns what was
// leased when the clock was stepped into a window, what may be lost of the last
// window, and how much that has granted besides its tokens.
func (s *stepping) check() (leased, lost, over int64) {
	if s.failure != "" {
		s.t.Errorf("a take failed: %s", s.failure)
	}
	c := s.charge.Bucket.Calendar()
	most := map[int64]int64{} // that a window may grant, by when it ends
	reached := int64(0)
	for i, step := range s.steps {
		last := c.window(step.before + step.ahead).end
		if i == 0 || last > reached {
			out := int64(0)
			if i > 0 {
				out = s.leasedAt(step)
			}
			most[last] = steppingTokens + out
			leased += out
			reached = last
		}
		// The window that the clock runs into before it is stepped again.
		until := wallClock()
		if i+1 < len(s.steps) {
			until = s.steps[i+1].after
		}
		if next := c.window(until + step.ahead).end; next > reached {
			most[next], reached = steppingTokens, next
		}
	}
	granted, all := map[int64]int64{}, int64(0)
	for _, g := range s.grants {
		end := g.windowEnd
		if g.lease {
			first, _ := s.reachedAt(c, g.from)
			_, last := s.reachedAt(c, g.until)
			if end = last; first != last { // of which of them nobody knows
				if last == reached {
					lost++
				}
				continue
			}
		}
		granted[end]++
	}
	for _, n := range most {
		all += n
	}
	if n := int64(len(s.grants)); n > all {
		s.t.Errorf("all windows granted %d, want at most %d", n, all)
	}
	for end, n := range granted {
		if n > most[end] {
			s.t.Errorf("the window until %v granted %d, want at most %d", time.UnixMicro(end).UTC(), n, most[end])
		}
	}
	for _, l := range s.sidecars {
		lost += l.lost[0] + l.lost[reached]
	}
	over = granted[reached] - steppingTokens
	if over+lost < 0 {
		s.t.Errorf("the last window granted %d, and %d may be lost of %d", granted[reached], lost, steppingTokens)
	}
	return leased, lost, max(0, over)
}

// leasedAt returns how much was leased when the clock was stepped.
func (s *stepping) leasedAt(step clockStep) (tokens int64) {
	for _, l := range s.sidecars {
		for _, term := range l.terms {
			if term.sent <= step.after && (term.settled == 0 || term.settled >= step.before) &&
				term.sent+steppingLease.Microseconds() >= step.before {
				tokens += term.tokens
			}
		}
	}
	return tokens
}

// reachedAt returns when the latest windows end that Redis's clock has surely, and
// has at most, shown until an instant of the machine's clock.
func (s *stepping) reachedAt(c Calendar, at int64) (surely, atMost int64) {
	for i, step := range s.steps {
		next := clockStep{before: at, after: at}
		if i+1 < len(s.steps) {
			next = s.steps[i+1]
		}
		if i == 0 || step.after <= at {
			surely = max(surely, c.window(min(at, next.before)+step.ahead).end)
		}
		if i == 0 || step.before <= at {
			atMost = max(atMost, c.window(min(at, next.after)+step.ahead).end)
		}
	}
	return surely, atMost
}
