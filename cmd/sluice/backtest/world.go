package backtest

import (
	"errors"
	"io"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/sluiceproxy/sluice/cmd/sluice/accesslog"
	"github.com/sluiceproxy/sluice/limiter"
	"github.com/sluiceproxy/sluice/limiter/policy"
)

// maxBad is how many lines are shown that cannot be read.
const maxBad = 5

func isEOF(err error) bool { return errors.Is(err, io.EOF) }

// world is a config with the state of its limits. Workers use it while they draw,
// all at once; the rest is written by the players.
type world struct {
	config *policy.Config
	index  int           // in request.draws
	own    []*limitState // the limits of the file
	keys   atomic.Int64  // of all limits

	mu     sync.Mutex
	states map[*limiter.Limit]*limitState // all limits, those of routes too
	limits []*limitState                  // all limits; only mu's holder may use it while workers run
}

// limitState is a limit with its keys.
type limitState struct {
	limit     *limiter.Limit
	described *policy.Described // nil: none of the file
	index     int               // in world.limits

	mu   sync.Mutex
	keys map[string]*keyState
}

// keyState is one bucket of a limit. What a reading changes belongs to its
// player alone.
type keyState struct {
	limit    *limitState
	key      string                  // as logs show it
	requests int64                   // counted by the player of spread
	buckets  [2]limiter.ReplayBucket // by reading
	limited  [2]int64
	timeline *timeline
	demand   [2]*demand

	// While a group is spread over its grain:
	inGroup, spread int64
	at              int64 // of the latest charge
}

// drawn is what a request draws in one world. The slices have one element for
// each charge.
type drawn struct {
	charges []limiter.Charge // without their keys; shared with other requests
	keys    []*keyState
	spread  []int64 // when each is taken, evenly spread
	settled []int64 // what the request has cost at its end; nil if nothing is held

	unlimited []*limitState
	mistake   string // the config's mistake for which it is refused
	exempt    bool
}

func newWorld(config *policy.Config, index int) *world {
	w := &world{config: config, index: index, states: make(map[*limiter.Limit]*limitState)}
	all := config.Describe()
	for i := range all {
		s := w.state(all[i].Limit)
		s.described = &all[i]
		if all[i].Twin != nil {
			w.states[all[i].Twin] = s
		}
	}
	w.own = slices.Clone(w.limits)
	return w
}

// state returns the state of a limit. It is safe for concurrent use.
func (w *world) state(l *limiter.Limit) *limitState {
	w.mu.Lock()
	defer w.mu.Unlock()
	s := w.states[l]
	if s == nil {
		s = &limitState{limit: l, index: len(w.limits), keys: make(map[string]*keyState)}
		w.states[l] = s
		w.limits = append(w.limits, s)
	}
	return s
}

// key returns the state of a charge's bucket. It is safe for concurrent use.
func (s *limitState) key(w *world, c *limiter.Charge) *keyState {
	s.mu.Lock()
	defer s.mu.Unlock()
	k := s.keys[c.Key]
	if k == nil {
		k = &keyState{limit: s, key: c.ShownKey()}
		s.keys[c.Key] = k
		w.keys.Add(1)
	}
	return k
}

// drawer finds what requests draw in a world. One goroutine uses it.
type drawer struct {
	world   *world
	charges []limiter.Charge // memory for one draw
	// shared are the charges of the latest requests that differ in more than their
	// keys, the latest first. Most requests draw what another has drawn.
	shared [][]limiter.Charge
	// latest are the keys that were drawn last, by limitState.index. Often the
	// next request is the same client's.
	latest []drawnKey
	// What is left of the memory for the draws of many requests:
	keys  []*keyState
	times []int64
}

type drawnKey struct {
	key   string
	state *keyState
}

// maxShared is how many lists of charges a drawer compares with.
const maxShared = 16

// drawRoom is for how many charges a drawer allocates memory at a time.
const drawRoom = 4096

// draw returns what a request draws, with the states of its buckets.
func (d *drawer) draw(e *accesslog.Entry) drawn {
	w := d.world
	draw := w.config.DrawInto(&e.Request, d.charges)
	if draw.Exempt {
		return drawn{exempt: true}
	}
	var out drawn
	for _, l := range draw.Unlimited {
		out.unlimited = append(out.unlimited, w.state(l))
	}
	if draw.Invalid {
		for _, m := range draw.Mistakes {
			if !m.Shadow {
				out.mistake = m.Error()
				break
			}
		}
	}
	n := len(draw.Charges)
	if n == 0 {
		return out
	}
	d.charges = draw.Charges
	if n > len(d.keys) {
		room := max(n, drawRoom)
		d.keys, d.times = make([]*keyState, room), make([]int64, room)
	}
	out.keys, d.keys = d.keys[:n:n], d.keys[n:]
	out.spread, d.times = d.times[:n:n], d.times[n:]
	own := w.own
	for i := range draw.Charges {
		c := &draw.Charges[i]
		// The charges of the file's limits are in the order of the file.
		var s *limitState
		if j := slices.IndexFunc(own, func(s *limitState) bool { return s.limit == c.Limit }); j >= 0 {
			s, own = own[j], own[j+1:]
		} else {
			s = w.state(c.Limit)
		}
		out.keys[i] = d.key(s, c)
		c.Key, c.Shown = "", ""
		if c.HoldFor > 0 {
			if out.settled == nil {
				out.settled = make([]int64, n)
			}
			// Of a mistake, what was taken stands, and that is what Settle returns.
			out.settled[i], _ = w.config.Settle(c.Limit.Domain, c.Limit.Name, &e.End, c.Cost)
		}
	}
	out.charges = d.share(draw.Charges)
	return out
}

// key returns the state of a charge's bucket.
func (d *drawer) key(s *limitState, c *limiter.Charge) *keyState {
	for len(d.latest) <= s.index {
		d.latest = append(d.latest, drawnKey{})
	}
	l := &d.latest[s.index]
	if l.state == nil || l.key != c.Key {
		*l = drawnKey{c.Key, s.key(d.world, c)}
	}
	return l.state
}

// share returns charges that are equal to the given ones, whose memory is the
// caller's.
func (d *drawer) share(charges []limiter.Charge) []limiter.Charge {
	at := slices.IndexFunc(d.shared, func(s []limiter.Charge) bool { return slices.Equal(s, charges) })
	var found []limiter.Charge
	switch {
	case at >= 0:
		found = d.shared[at]
	case len(d.shared) < maxShared:
		at, found, d.shared = len(d.shared), slices.Clone(charges), append(d.shared, nil)
	default:
		at, found = maxShared-1, slices.Clone(charges)
	}
	copy(d.shared[1:at+1], d.shared[:at])
	d.shared[0] = found
	return found
}

// isOwn reports whether a bucket has the shape that its limit says, and not that
// of an override.
func (s *limitState) isOwn(b limiter.Bucket) bool {
	return s.described != nil && s.described.Bucket == b
}
