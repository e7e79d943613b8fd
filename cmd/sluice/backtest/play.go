package backtest

import (
	"container/heap"
	"slices"

	"github.com/sluiceproxy/sluice/limiter"
)

// player plays requests through a world in one reading. One goroutine uses it.
type player struct {
	world   *world
	reading reading
	work    chan []*request
	table   table

	limited  int64          // requests that an enforced limit denied
	limits   []*limitResult // by limitState.index
	timeline timeline       // of all requests
	// exempt, unmatched and invalid count requests. mistake is the first of those
	// for which a request was refused.
	exempt, unmatched, invalid int64
	mistake                    string

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
	requests, limited, limitedKeys int64
	timeline                       timeline
}

func newPlayer(w *world, r reading) *player {
	return &player{
		world: w, reading: r, work: make(chan []*request, 8), table: table{reading: r},
	}
}

// result returns the result of a limit.
func (p *player) result(s *limitState) *limitResult {
	for len(p.limits) <= s.index {
		p.limits = append(p.limits, &limitResult{})
	}
	return p.limits[s.index]
}

func (p *player) play(q *request) {
	d := &q.draws[p.world.index]
	isLimited := false
	switch {
	case d.exempt:
		p.exempt++
	case d.mistake != "":
		p.invalid++
		if p.mistake == "" {
			p.mistake = d.mistake
		}
	case len(d.charges) == 0 && len(d.unlimited) == 0:
		p.unmatched++
	case len(d.charges) > 0:
		isLimited = p.take(q, d)
	}
	if isLimited {
		p.limited++
	}
	for _, s := range d.unlimited {
		r := p.result(s)
		r.requests++
		r.timeline.add(q.at, false)
	}
	p.timeline.add(q.at, isLimited)
}

// take takes what a request draws, and reports whether an enforced limit denies
// it.
func (p *player) take(q *request, d *drawn) (isLimited bool) {
	outcome, verdicts := p.table.take(q, d, nil)
	for i, k := range d.keys {
		r := p.result(k.limit)
		isLimited := !verdicts[i].Allowed
		r.requests++
		if isLimited {
			r.limited++
			if k.limited[p.reading]++; k.limited[p.reading] == 1 {
				r.limitedKeys++
			}
		}
		r.timeline.add(q.at, isLimited)
		if p.reading == spread {
			k.requests++
			p.time(k, q.at, isLimited)
		}
	}
	return outcome == limiter.Limited
}

// table takes charges from the buckets of a world in one reading, and settles
// what has ended meanwhile.
type table struct {
	reading reading
	// buckets are those of a suggester; nil: those of the keys themselves.
	buckets map[*keyState]*limiter.ReplayBucket
	kept    int // buckets that the last sweep left

	replay   limiter.Replay
	verdicts []limiter.Verdict
	at       []int64
	from     []*limiter.ReplayBucket
	pending  settlements
}

// take takes the charges of a request, but those of the limit without, if it is
// not nil. The verdicts are valid until the next call, and are those of the
// charges that are left.
func (t *table) take(q *request, d *drawn, without *limitState) (limiter.Outcome, []limiter.Verdict) {
	charges, at := d.charges, d.spread
	if t.reading == atOnce {
		t.at = t.at[:0]
		for range charges {
			t.at = append(t.at, q.at)
		}
		at = t.at
	}
	keys, settled := d.keys, d.settled
	if i := slices.IndexFunc(keys, func(k *keyState) bool { return k.limit == without }); without != nil && i >= 0 {
		charges, at, keys, settled = cut(charges, i), cut(at, i), cut(keys, i), cut(settled, i)
	}
	if len(charges) == 0 {
		return limiter.Allowed, nil
	}
	t.settle(slices.Min(at))
	t.from = t.from[:0]
	for i, k := range keys {
		t.from = append(t.from, t.bucket(k, at[i]))
	}
	for len(t.verdicts) < len(charges) {
		t.verdicts = append(t.verdicts, limiter.Verdict{})
	}
	verdicts := t.verdicts[:len(charges)]
	outcome := t.replay.Take(at, t.from, charges, verdicts)
	for i := range settled {
		if v := &verdicts[i]; !v.Hold.IsZero() {
			heap.Push(&t.pending, settlement{at[i] + q.duration, t.from[i], v.Hold, settled[i]})
		}
	}
	return outcome, verdicts
}

// cut returns a copy of s without s[i]; nil if s is nil.
func cut[T any](s []T, i int) []T {
	if s == nil {
		return nil
	}
	return slices.Concat(s[:i], s[i+1:])
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
