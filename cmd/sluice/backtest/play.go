package backtest

import (
	"container/heap"
	"math"
	"slices"

	"github.com/sluiceproxy/sluice/limiter"
)

// player plays requests through a world in one reading. One goroutine uses it.
type player struct {
	world   *world
	reading reading
	work    chan []*request
	table   table

	limited  int64 // requests that an enforced limit denied
	limits   map[*limitState]*limitResult
	timeline timeline // of all requests

	// timed are the keys with a timeline: those that were limited at least least
	// times.
	timed []*keyState
	least int64
}

// maxTimed is how many keys have a timeline at a time.
const maxTimed = 2000

// time adds a request to the timeline of a key that was limited.
func (p *player) time(k *keyState, at int64, limited bool) {
	n := k.limited[p.reading]
	if k.timeline == nil && n >= max(1, p.least) {
		if len(p.timed) == maxTimed {
			p.least = 2 * max(1, p.least)
			p.timed = slices.DeleteFunc(p.timed, func(k *keyState) bool {
				if k.limited[p.reading] >= p.least {
					return false
				}
				k.timeline = nil
				return true
			})
		}
		if n >= p.least && len(p.timed) < maxTimed {
			k.timeline = &timeline{}
			p.timed = append(p.timed, k)
		}
	}
	if k.timeline != nil {
		k.timeline.add(at, limited)
	}
}

// limitResult is what became of a limit's requests in one reading.
type limitResult struct {
	limited, limitedKeys int64
	timeline             timeline
}

func newPlayer(w *world, r reading) *player {
	return &player{
		world: w, reading: r, work: make(chan []*request, 8), table: table{reading: r},
		limits: make(map[*limitState]*limitResult),
	}
}

// result returns the result of a limit.
func (p *player) result(s *limitState) *limitResult {
	r := p.limits[s]
	if r == nil {
		r = &limitResult{}
		p.limits[s] = r
	}
	return r
}

func (p *player) play(q *request) {
	d := &q.draws[p.world.index]
	if d.exempt {
		p.timeline.add(q.at, false)
		return
	}
	for _, s := range d.unlimited {
		p.result(s).timeline.add(q.at, false)
	}
	if d.mistake != "" || len(d.charges) == 0 {
		p.timeline.add(q.at, false)
		return
	}
	outcome, verdicts := p.table.take(q, d.charges, nil)
	for i := range d.charges {
		c := &d.charges[i]
		r := p.result(c.key.limit)
		isLimited := !verdicts[i].Allowed
		if isLimited {
			r.limited++
			if c.key.limited[p.reading]++; c.key.limited[p.reading] == 1 {
				r.limitedKeys++
			}
		}
		r.timeline.add(q.at, isLimited)
		if p.reading == spread {
			p.time(c.key, q.at, isLimited)
		}
	}
	isLimited := outcome == limiter.Limited
	if isLimited {
		p.limited++
	}
	p.timeline.add(q.at, isLimited)
}

// table takes charges from the buckets of a world in one reading, and settles
// what has ended meanwhile.
type table struct {
	reading reading
	// buckets are those of a suggester; nil: those of the keys themselves.
	buckets map[*keyState]*limiter.ReplayBucket
	kept    int // buckets that the last sweep left

	replay   limiter.Replay
	charges  []limiter.Charge
	verdicts []limiter.Verdict
	at       []int64
	from     []*limiter.ReplayBucket
	pending  settlements
}

// take takes the charges of a request, but those of the limit without, if it is
// not nil. The verdicts are valid until the next call, and are those of the
// charges that are left.
func (t *table) take(q *request, charges []charge, without *limitState) (limiter.Outcome, []limiter.Verdict) {
	t.charges, t.at, t.from = t.charges[:0], t.at[:0], t.from[:0]
	earliest := int64(math.MaxInt64)
	for i := range charges {
		c := &charges[i]
		if c.key.limit == without {
			continue
		}
		at := c.when(q, t.reading)
		t.charges = append(t.charges, limiter.Charge{
			Limit: c.key.limit.limit, Bucket: c.bucket, Cost: c.cost, Refused: c.refused, HoldFor: c.life,
		})
		t.at, t.from = append(t.at, at), append(t.from, t.bucket(c.key, at))
		earliest = min(earliest, at)
	}
	if len(t.charges) == 0 {
		return limiter.Allowed, nil
	}
	t.settle(earliest)
	for len(t.verdicts) < len(t.charges) {
		t.verdicts = append(t.verdicts, limiter.Verdict{})
	}
	verdicts := t.verdicts[:len(t.charges)]
	outcome := t.replay.Take(t.at, t.from, t.charges, verdicts)
	j := 0
	for i := range charges {
		c := &charges[i]
		if c.key.limit == without {
			continue
		}
		if v := &verdicts[j]; c.life > 0 && !v.Hold.IsZero() {
			heap.Push(&t.pending, settlement{t.at[j] + q.duration, t.from[j], v.Hold, c.settled})
		}
		j++
	}
	return outcome, verdicts
}

// bucket returns the bucket of a key.
func (t *table) bucket(k *keyState, now int64) *limiter.ReplayBucket {
	if t.buckets == nil {
		return &k.buckets[t.reading]
	}
	b := t.buckets[k]
	if b == nil {
		if n := len(t.buckets); n > 2*t.kept+10_000 {
			t.sweep(now)
		}
		b = &limiter.ReplayBucket{}
		t.buckets[k] = b
	}
	return b
}

// sweep drops the buckets that are full. Those of other keys may be a grain
// ahead or behind; no grain is longer than a second.
func (t *table) sweep(now int64) {
	for k, b := range t.buckets {
		if b.IsFull(now - 1_000_000) {
			delete(t.buckets, k)
		}
	}
	t.kept = len(t.buckets)
}

// when returns when a charge is taken.
func (c *charge) when(q *request, r reading) int64 {
	if r == spread {
		return c.at
	}
	return q.at
}

// settle settles what has ended by an instant.
func (t *table) settle(now int64) {
	for len(t.pending) > 0 && t.pending[0].at <= now {
		s := heap.Pop(&t.pending).(settlement)
		s.bucket.Settle(s.at, s.hold, s.cost)
	}
}

// settlement is a settlement that is to come at an instant.
type settlement struct {
	at     int64
	bucket *limiter.ReplayBucket
	hold   limiter.Hold
	cost   int64
}

// settlements is a heap by instants.
type settlements []settlement

func (s settlements) Len() int           { return len(s) }
func (s settlements) Less(i, j int) bool { return s[i].at < s[j].at }
func (s settlements) Swap(i, j int)      { s[i], s[j] = s[j], s[i] }

// Push implements heap.Interface.
func (s *settlements) Push(x any) { *s = append(*s, x.(settlement)) }

// Pop implements heap.Interface.
func (s *settlements) Pop() any {
	last := (*s)[len(*s)-1]
	*s = (*s)[:len(*s)-1]
	return last
}

// maxSlots is how many slots a timeline has at most.
const maxSlots = 200

// widths are the lengths of a timeline's slots in seconds, each a multiple of the
// one before. Longer ones double.
var widths = []int64{1, 5, 15, 60, 300, 900, 3600, 3 * 3600, 12 * 3600, 24 * 3600, 48 * 3600}

// timeline counts requests in slots of equal length, which grow with the time
// that it covers. Its zero value is empty.
type timeline struct {
	start, width int64 // microseconds; start is a multiple of width
	slots        []slot
}

type slot struct{ requests, limited int64 }

// add counts a request. Instants do not go back.
func (t *timeline) add(at int64, limited bool) {
	const second = 1_000_000
	if t.width == 0 {
		t.start, t.width = at/second*second, second
	}
	for (at-t.start)/t.width >= maxSlots {
		t.widen()
	}
	i := int((at - t.start) / t.width)
	for len(t.slots) <= i {
		t.slots = append(t.slots, slot{})
	}
	t.slots[i].requests++
	if limited {
		t.slots[i].limited++
	}
}

// widen makes the slots as long as the next width.
func (t *timeline) widen() {
	const second = 1_000_000
	width := 2 * t.width
	for _, w := range widths {
		if w*second > t.width {
			width = w * second
			break
		}
	}
	start := t.start / width * width
	var wide []slot
	for i, s := range t.slots {
		at := int((t.start + int64(i)*t.width - start) / width)
		for len(wide) <= at {
			wide = append(wide, slot{})
		}
		wide[at].requests += s.requests
		wide[at].limited += s.limited
	}
	t.start, t.width, t.slots = start, width, wide
}
