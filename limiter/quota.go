package limiter

import (
	"fmt"
	"math"
	"time"
	"unique"
)

// A quota is a Bucket that does not refill: all of its tokens are back at once when
// the next window of its Calendar begins.
//
// Its state is that of a bucket whose burst is the largest N that has been in force
// in the window, so that N can change: what was used is that burst less the level.
// The state names the window. A window that has begun is never left for an earlier
// one, whatever the clock says.

// NewQuota returns a bucket of 1 to MaxTokens tokens in each window of a calendar,
// which must not be zero. The error says which argument is out of range.
func NewQuota(tokens int64, c Calendar) (Bucket, error) {
	switch {
	case tokens < 1 || tokens > MaxTokens:
		return Bucket{}, fmt.Errorf("a quota is 1 to %d tokens, not %d", MaxTokens, tokens)
	case c == Calendar{}:
		return Bucket{}, fmt.Errorf("a quota needs a calendar")
	}
	return Bucket{n: 1, p: minP, burst: tokens, calendar: unique.Make(c)}, nil
}

// IsQuota reports whether the bucket is a quota.
func (b Bucket) IsQuota() bool { return b.calendar != unique.Handle[Calendar]{} }

// Calendar returns the calendar of a quota, and the zero Calendar for any other
// bucket.
func (b Bucket) Calendar() Calendar {
	if !b.IsQuota() {
		return Calendar{}
	}
	return b.calendar.Value()
}

// Period returns what RateLimit-Policy has as w: how long a bucket takes from empty to
// full, and of a quota the length of the window of the verdict.
func (v *Verdict) Period(b Bucket) time.Duration {
	if !b.IsQuota() {
		return b.FillTime()
	}
	instant := v.at
	if v.Source == LeaseSource || v.Source == CeilingSource { // by a clock of their own
		instant = time.Now().UnixMicro()
	}
	w := b.Calendar().window(instant)
	return time.Duration(w.end-w.start) * time.Microsecond
}

// quotaState is what a state has of a quota besides. It must not change once it is
// in use.
type quotaState struct {
	// window is the one that the level counts in.
	window window
	// lapsed is an instant at or after the window's end at which a settlement
	// arrived before any take: the level then is only a debt that the next window
	// begins with. It is 0 if there was none.
	lapsed int64
	// other is a window of another calendar that the bucket was used with: while
	// sidecars or routes disagree about the unit or the time zone, each counts in
	// its own. It is zero if there is none.
	other window
	// otherBurst and otherTokens are that window's burst and level.
	otherBurst, otherTokens int64
}

// reached is the earliest instant that a take can count at.
func (q *quotaState) reached() int64 {
	if q.lapsed > 0 {
		return q.window.end
	}
	return q.window.start
}

// ended reports whether the window is over at an instant.
func (q *quotaState) ended(at int64) bool { return q.lapsed > 0 || q.window.end <= at }

// debtUntil is the latest instant at which a window may begin that takes over a
// debt. A debt is paid by a window in which nobody asks.
func (q *quotaState) debtUntil() int64 { return max(q.window.end, q.lapsed) }

// length is how long the window lasts.
func (q *quotaState) length() int64 { return q.window.end - q.window.start }

// newState returns the state of a bucket that was never used.
func newState(b Bucket, now int64) state {
	s := state{shape: b, level: b.full(), at: now}
	if b.IsQuota() {
		s.shape, s.quota = Bucket{burst: b.burst}, b.Calendar().begin(now)
	}
	return s
}

// emptyState returns the state of a bucket whose stored one makes no sense.
func emptyState(b Bucket, now int64) state {
	s := newState(b, now)
	s.level = level{}
	return s
}

// levelFor returns what can be taken from a bucket in the state that next has
// returned, as a level of its shape b. The frac of a quota's level is how many
// microseconds its window still lasts.
func (s *state) levelFor(b Bucket) level {
	if s.quota == nil {
		return s.level
	}
	return s.quotaLevelFor(b)
}

func (s *state) quotaLevelFor(b Bucket) level {
	const most = 1<<48 - 1 // after a step of the clock back
	return level{
		// An N that was lowered below what is used is no debt.
		tokens: max(s.level.tokens+b.burst-s.shape.burst, min(0, s.level.tokens)),
		frac:   min(max(0, s.quota.window.end-s.at), most),
	}
}

// windowAt returns the window of a calendar in which a take counts.
func (s *state) windowAt(c Calendar, now int64) window { return c.window(max(now, s.quota.reached())) }

// nextQuota is next for a quota of the shape b, if w is the window of b's calendar
// in which a take counts.
func (s state) nextQuota(b Bucket, w window, now int64) (n state, moved bool, expired int) {
	n = s
	expired, moved = n.passTime(now)
	if q := s.quota; q.window != w || q.lapsed > 0 {
		expired += n.endAllHolds()
		n.enter(b, w, max(now, q.reached()))
		moved = true
	}
	if more := b.burst - n.shape.burst; more > 0 {
		n.level.tokens += more
		n.shape.burst = b.burst
		moved = true // whatever the take's guess of the window was
	}
	return n, moved, expired
}

// passTime brings a quota's state to an instant within its window.
func (s *state) passTime(now int64) (expired int, moved bool) {
	back := now < s.at
	s.at = now
	if s.holds == nil {
		return 0, false
	}
	expired, moved = s.endHolds(now, back)
	return expired, moved || back
}

// enter begins the window w of the shape b at an instant of w. It takes over a
// debt.
func (s *state) enter(b Bucket, w window, at int64) {
	q, next := s.quota, &quotaState{window: w}
	left, burst, debt := s.level.tokens, s.shape.burst, int64(0)
	if w.start <= q.debtUntil() {
		debt = max(0, -left)
	}
	ended := q.ended(at)
	s.shape.burst, s.level.tokens = b.burst, b.burst
	if q.other == w {
		s.shape.burst, s.level.tokens = q.otherBurst, q.otherTokens
	}
	s.level.tokens = max(s.level.tokens-min(debt, s.shape.burst), -s.shape.burst)
	switch {
	case !ended:
		next.other, next.otherBurst, next.otherTokens = q.window, burst, left+debt
	case q.other != w && q.other.end > at:
		next.other, next.otherBurst, next.otherTokens = q.other, q.otherBurst, q.otherTokens
	}
	if next.other == (window{}) {
		next = b.Calendar().begin(at)
	}
	s.quota = next
}

// lapse brings a quota's state to the instant of a settlement. If the window is
// over, what is taken then is a debt of the next one.
func (s state) lapse(now int64) (n state, moved bool, expired int) {
	n = s
	expired, moved = n.passTime(now)
	q := s.quota
	if at := max(now, q.reached()); n.holds == nil || !q.ended(at) {
		return n, moved, expired
	}
	expired += n.endAllHolds()
	next := *q
	next.lapsed = max(now, q.debtUntil())
	n.quota = &next
	if n.level.tokens = min(0, n.level.tokens); next.lapsed-q.debtUntil() >= q.length() {
		n.level.tokens = 0
	}
	return n, true, expired
}

// endAllHolds ends the holds of s: they count as spent. It returns how many were
// open.
func (s *state) endAllHolds() (expired int) {
	if s.holds == nil {
		return 0
	}
	for i := range s.holds.slices {
		e := &s.holds.slices[i]
		if e.open > 0 {
			expired += e.open
			e.open, e.left, e.expired = 0, 0, true
		}
	}
	s.holds.total = 0
	return expired
}

// keepQuotaFor is keepFor for a quota.
func (s state) keepQuotaFor() time.Duration {
	q := s.quota
	until := q.other.end
	if q.lapsed == 0 {
		until = max(until, q.window.end)
	}
	if s.level.tokens < 0 {
		until = max(until, q.debtUntil()+2*q.length()) // until the next window ends, and longer
	}
	if s.holds != nil {
		_, settleable := s.holds.ends()
		until = max(until, settleable)
	}
	return time.Duration(min(max(0, until-s.at), math.MaxInt64/1000)) * time.Microsecond
}
