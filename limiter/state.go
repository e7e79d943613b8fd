package limiter

import (
	"math"
	"time"
)

// state is what a store keeps of a bucket: the level that it had at an instant,
// in microseconds of the store's clock, and the shape that it had then.
//
// An absent bucket is a full one, whatever the shape that asks next. So a store
// drops a bucket only when it is full in every shape that has used it since it
// was last absent (fullAfter). If one shape's end counted, the other's burst
// would be granted again each time: with a burst of 1000 at 1000/d and one of 10
// at 10/s, every six seconds.
type state struct {
	shape Bucket
	level level
	at    int64
	// other is a shape that fills no earlier, from any level, than each of the
	// other shapes that have used the bucket since it was last absent or full in
	// all of them. It is nil where shape itself is such a one; that is so for all
	// buckets whose shape never changed.
	other *Bucket
}

// fullAfter is how long after its instant the bucket is full in every shape
// that has used it, if nothing is taken: the earliest that a store may drop it.
func (s state) fullAfter() time.Duration {
	own := s.shape.wait(s.level, s.shape.burst)
	if s.other == nil {
		return own
	}
	return max(own, time.Duration(math.Ceil(s.other.fillFrom(s.level.tokens)))*time.Microsecond)
}

// otherFor is the other of the state that follows s when the shape b uses the
// bucket at an instant.
func (s state) otherFor(b Bucket, now int64) *Bucket {
	switch {
	case s.shape == b && s.other == nil, max(0, now-s.at) >= s.fullAfter().Microseconds():
		return nil
	case s.shape == b:
		return s.other
	}
	other := s.shape
	if s.other != nil {
		other = slower(s.shape, *s.other)
	}
	if b.covers(other) {
		return nil
	}
	return &other
}

// levelAt returns what a bucket with the stored state s holds at the instant now,
// as a level of the limit's shape b, before anything is taken. It does no I/O and
// reads no clock; the Lua script computes exactly the same, and a test compares
// the two.
//
// The bucket refills in its stored shape up to now, so that a changed limit finds
// the tokens that were there, at most its own burst; from then on the new shape
// counts. If moved is true, the new state must be stored even if the take is
// denied. It is true if the clock went back, as the bucket would otherwise not
// refill until the clock has caught up; and if the shape changed, as a raised
// rate counts from now on, not from the next grant.
func levelAt(s state, b Bucket, now int64) (l level, moved bool) {
	l = s.level
	if now < s.at {
		moved = true
	} else {
		l = s.shape.refill(l, now-s.at)
	}
	if s.shape != b {
		l, moved = b.convert(l, s.shape), true
	}
	return l, moved
}

// covers reports whether b, from every level, is full no earlier than o. The
// time to fill is linear in the tokens, so it is enough to compare the two
// ends.
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
