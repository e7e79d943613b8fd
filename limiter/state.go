package limiter

import (
	"math"
	"time"
)

// state is what a store keeps of a bucket: the level that it had at an instant,
// in microseconds of the store's clock, the shape that it had then, and what is
// held.
//
// An absent bucket is a full one, whatever the shape that asks next. So a store
// drops a bucket only when it is full in every shape that has used it since it
// was last absent, and no settlement can change it any more (keepFor). If one
// shape's end counted, the other's burst would be granted again each time: with a
// burst of 1000 at 1000/d and one of 10 at 10/s, every six seconds.
type state struct {
	shape Bucket
	level level
	at    int64
	// other is a shape that fills no earlier, from any level, than each of the
	// other shapes that have used the bucket since it was last absent or full in
	// all of them. It is nil where shape itself is such a one; that is so for all
	// buckets whose shape never changed.
	other *Bucket
	// holds is nil where nothing is held or was held lately.
	holds *holds
	// quota is not nil for a quota. Of the shape only the burst then counts.
	quota *quotaState
}

// keepFor is how long after its instant a store must keep the state, if nothing
// is taken: until the bucket is full in every shape that has used it, and no
// settlement can change it any more.
func (s state) keepFor() time.Duration {
	if s.quota != nil {
		return s.keepQuotaFor()
	}
	keep := s.shape.wait(s.level, s.shape.burst)
	if s.other != nil {
		keep = max(keep, time.Duration(s.otherFullAfter())*time.Microsecond)
	}
	if s.holds == nil {
		return keep
	}
	ended, settleable := s.holds.ends()
	return max(keep+time.Duration(max(0, ended-s.at))*time.Microsecond, time.Duration(settleable-s.at)*time.Microsecond)
}

// otherFullAfter is how many microseconds after its instant the bucket is full in
// its other shape, if nothing is held.
func (s state) otherFullAfter() int64 { return int64(math.Ceil(s.other.fillFrom(s.level.tokens))) }

// next returns the state that follows s when the shape b uses the bucket at the
// instant now, before anything is taken. It does no I/O and reads no clock; the
// Lua script computes exactly the same, and a test compares the two.
//
// The bucket refills in its stored shape up to now, so that a changed limit finds
// the tokens that were there, at most its own burst; from then on the new shape
// counts. Neither what is held nor a debt changes with the shape.
//
// If moved is true, the new state must be stored even if the take is denied. It
// is true if the clock went back, as the bucket would otherwise not refill until
// the clock has caught up; if the shape changed, as a raised rate counts from now
// on, not from the next grant; and if holds ended or were forgotten. Only then
// does next change the holds of s, which are those of the new state, too. expired
// is how many holds ended without a settlement.
func (s state) next(b Bucket, now int64) (n state, moved bool, expired int) {
	switch {
	case b.IsQuota() != (s.quota != nil): // such a state makes no sense under this key
		if s.quota != nil {
			expired, _ = s.passTime(now)
		} else {
			_, _, expired = s.next(s.shape, now)
		}
		return emptyState(b, now), true, expired
	case b.IsQuota():
		return s.nextQuota(b, s.windowAt(b.Calendar(), now), now)
	}
	n = s
	elapsed := now - s.at
	if moved = elapsed < 0; moved {
		elapsed, n.at = 0, now
	}
	var held, fullAfter int64
	if s.other != nil {
		fullAfter = s.otherFullAfter()
	}
	if s.holds != nil {
		ended, _ := s.holds.ends()
		fullAfter += max(0, ended-s.at)
		var changed bool
		expired, changed = n.endHolds(now, moved)
		moved = moved || changed
		held = n.held()
	}
	n.level = s.shape.refill(n.level, now-n.at, s.shape.burst-held)
	n.at = now
	full := n.level.tokens == s.shape.burst
	if full && n.other != nil && (elapsed >= fullAfter || n.other.burst <= s.shape.burst) {
		n.other = nil
	}
	if s.shape != b {
		if !full || n.other != nil {
			n.other = b.otherThan(s.shape, n.other)
		}
		n.level = b.convert(n.level, s.shape, max(0, b.burst-held))
		n.shape, moved = b, true
	}
	return n, moved, expired
}

// settling returns the state that follows s when a settlement uses the bucket at
// the instant now, before it is settled. See next.
func (s state) settling(now int64) (n state, moved bool, expired int) {
	if s.quota != nil {
		return s.lapse(now)
	}
	return s.next(s.shape, now)
}

// levelAt returns what can be taken from a bucket with the stored state s at the
// instant now, as a level of the limit's shape b, and what is held. It leaves s
// as it is.
func levelAt(s state, b Bucket, now int64) (l level, held int64) {
	s.holds = s.holds.clone()
	n, _, _ := s.next(b, now)
	return n.levelFor(b), n.held()
}

// otherThan returns the other shape to keep when the shape b uses a bucket that
// is not full in shape, or not in other; other may be nil.
func (b Bucket) otherThan(shape Bucket, other *Bucket) *Bucket {
	if other != nil {
		shape = slower(shape, *other)
	}
	if b.covers(shape) {
		return nil
	}
	return &shape
}

// covers reports whether b, from every level that is no debt, is full no earlier
// than o. The time to fill is linear in the tokens, so it is enough to compare
// the two ends.
func (b Bucket) covers(o Bucket) bool {
	return o.burst <= b.burst && o.fillFrom(0) <= b.fillFrom(0)
}

// slower returns a shape that covers a and o: one of them, or one of the larger
// burst and the slower rate.
func slower(a, o Bucket) Bucket {
	switch {
	case a.covers(o):
		return a
	case o.covers(a):
		return o
	}
	both := a
	if float64(o.n)/float64(o.p) < float64(a.n)/float64(a.p) {
		both = o
	}
	both.burst = max(a.burst, o.burst)
	return both
}
