package limiter

import (
	"cmp"
	"encoding/binary"
	"errors"
	"math"
	"math/rand/v2"
	"slices"
	"time"
)

// Tokens can be held: taken for now, until it is known how many of them were
// spent. A hold ends by its settlement, which says so, or else after its life,
// and then all of its tokens count as spent.
//
// What is held still occupies the bucket, which refills to its burst less what is
// held. If it refilled to its burst, returned tokens would come on top, and more
// than burst + rate·t could be spent in a window of t.
//
// A settlement may also cost more than was held. The difference is taken from
// the level, which may then be a debt of at most one burst; what exceeds that is
// forgiven.

// Hold names tokens that a take holds. The zero Hold names none.
type Hold struct {
	// Tokens is how many are held, at least 0.
	Tokens int64

	birth [8]byte // of holds
	slice uint32  // its number
	index uint16  // in the slice
	// isLocal says that this process holds the tokens, in place of Redis.
	isLocal bool
}

// IsZero reports whether h names nothing.
func (h Hold) IsZero() bool { return h.birth == [8]byte{} }

// HoldBytes is the length of an encoded Hold.
const HoldBytes = 4 + 8 + 4 + 2 + 1

// AppendBinary implements encoding.BinaryAppender. Its error is nil.
func (h Hold) AppendBinary(b []byte) ([]byte, error) {
	b = binary.BigEndian.AppendUint32(b, uint32(h.Tokens))
	b = append(b, h.birth[:]...)
	b = binary.BigEndian.AppendUint32(b, h.slice)
	b = binary.BigEndian.AppendUint16(b, h.index)
	if h.isLocal {
		return append(b, 1), nil
	}
	return append(b, 0), nil
}

// UnmarshalBinary implements encoding.BinaryUnmarshaler. It refuses what
// AppendBinary did not return, as far as that can be told.
func (h *Hold) UnmarshalBinary(b []byte) error {
	if len(b) != HoldBytes || b[HoldBytes-1] > 1 {
		return errors.New("not an encoded hold")
	}
	*h = Hold{
		Tokens:  int64(binary.BigEndian.Uint32(b)),
		birth:   [8]byte(b[4:]),
		slice:   binary.BigEndian.Uint32(b[12:]),
		index:   binary.BigEndian.Uint16(b[16:]),
		isLocal: b[18] == 1,
	}
	if h.Tokens > MaxTokens || h.IsZero() {
		return errors.New("not an encoded hold")
	}
	return nil
}

// newBirth returns a random number for the holds of a bucket.
func newBirth() (b [8]byte) {
	binary.BigEndian.PutUint64(b[:], rand.Uint64()|1) // not 0, which names nothing
	return b
}

// holds are the holds of a bucket.
type holds struct {
	// birth is a random number. It tells these holds from those of a state that
	// was lost. Buckets whose first holds were made in one call share it, so a
	// Hold names tokens only together with its bucket's key.
	birth [8]byte
	// next is the number of the next slice.
	next uint32
	// total is how many tokens are held in all slices.
	total int64
	// slices are in the order of their ends.
	slices []slice
}

// A slice is the holds of a bucket that end at about the same time. So the
// state of a bucket grows by a bit for each hold: how many tokens it has is
// written in the Hold.
type slice struct {
	// number names the slice. It is never used again while the state has the same
	// birth.
	number uint32
	// end is when the holds end, and life the longest time that they last, in
	// microseconds. The slice is kept for one more life after its end if some
	// holds had no settlement, as a late one may still cost more.
	end, life int64
	// left is how many tokens of the slice are still held.
	left int64
	// count is how many holds there have been. Hold i has been settled if bit i of
	// settled is set, from the least bit of the first byte.
	count   int
	settled []byte
	// open is how many holds have neither been settled nor expired.
	open int
	// expired says that the end has come, and that holds were open then.
	expired bool
}

const (
	// sliceParts is how many slices a life has: a hold ends up to that part of its
	// life late.
	sliceParts = 12
	// maxSlices is the maximum number of slices of a bucket, and maxSliceHolds
	// that of holds in a slice. Together they bound a state to some 67 kB.
	maxSlices     = 64
	maxSliceHolds = 8192
)

// The range of a hold's life.
const (
	MinHold = 10 * time.Millisecond
	MaxHold = 24 * time.Hour
)

// sliceOverhead is about how many bytes a slice takes in this process beside its
// bits, and holdsOverhead what holds take beside the slices.
const sliceOverhead, holdsOverhead = 88, 64

// size is about how many bytes the holds take in this process; 0 if h is nil.
func (h *holds) size() int64 {
	if h == nil {
		return 0
	}
	n := holdsOverhead + sliceOverhead*cap(h.slices)
	for i := range h.slices {
		n += cap(h.slices[i].settled)
	}
	return int64(n)
}

// clone returns a copy that shares nothing with h, or nil if h is nil.
func (h *holds) clone() *holds {
	if h == nil {
		return nil
	}
	c := *h
	c.slices = slices.Clone(h.slices)
	for i := range c.slices {
		c.slices[i].settled = slices.Clone(c.slices[i].settled)
	}
	return &c
}

// ends returns when the last open hold ends, and until when a settlement may still
// change the bucket; 0 if no hold is open, or none can be settled. Both are
// instants of the store's clock, in microseconds.
func (h *holds) ends() (ended, settleable int64) {
	for i := range h.slices {
		s := &h.slices[i]
		if s.open > 0 {
			ended = max(ended, s.end)
		}
		if s.open > 0 || s.expired {
			settleable = max(settleable, s.end+s.life)
		}
	}
	return ended, settleable
}

// held returns how many tokens are held.
func (s *state) held() int64 {
	if s.holds == nil {
		return 0
	}
	return s.holds.total
}

// endHolds ends the holds of s whose time has come by now, and forgets slices. s
// then is at the instant of the last end. After a step of the clock back no hold
// lasts longer than its whole life from now on.
func (s *state) endHolds(now int64, steppedBack bool) (expired int, changed bool) {
	h := s.holds
	if steppedBack {
		for i := range h.slices {
			h.slices[i].end = min(h.slices[i].end, now+h.slices[i].life)
		}
		slices.SortFunc(h.slices, func(a, b slice) int {
			return cmp.Or(cmp.Compare(a.end, b.end), cmp.Compare(a.number, b.number))
		})
	}
	for i := range h.slices {
		e := &h.slices[i]
		if e.open == 0 || e.end > now {
			continue
		}
		// Until they ended the tokens occupied the bucket.
		if e.end > s.at {
			s.level = s.shape.refill(s.level, e.end-s.at, s.shape.burst-h.total)
			s.at = e.end
		}
		expired += e.open
		h.total -= e.left
		e.open, e.left, e.expired, changed = 0, 0, true, true
	}
	before := len(h.slices)
	h.slices = slices.DeleteFunc(h.slices, func(e slice) bool {
		return e.open == 0 && e.end <= now && (!e.expired || e.end+e.life <= now)
	})
	if len(h.slices) == 0 {
		s.holds = nil
	}
	return expired, changed || len(h.slices) < before
}

// hold takes cost tokens, which the level must have, and holds them for a life of
// MinHold to MaxHold. birth is random, for a state without holds. If the state
// has no room for one more hold it returns a zero Hold: the tokens then count as
// spent.
func (s *state) hold(cost int64, life time.Duration, birth [8]byte) Hold {
	s.level.tokens -= cost
	h := s.holds
	if h == nil {
		h = &holds{birth: birth}
	}
	part := life.Microseconds() / sliceParts
	end := (s.at + life.Microseconds() + part - 1) / part * part
	i := len(h.slices)
	for i > 0 && h.slices[i-1].end > end {
		i--
	}
	if i--; i < 0 || h.slices[i].end != end || h.slices[i].expired || h.slices[i].count == maxSliceHolds {
		if i = h.insert(end); i < 0 {
			return Hold{}
		}
	}
	s.holds = h
	e := &h.slices[i]
	e.life = max(e.life, life.Microseconds()+part)
	id := Hold{Tokens: cost, birth: h.birth, slice: e.number, index: uint16(e.count)}
	if e.count%8 == 0 {
		e.settled = append(e.settled, 0)
	}
	e.count++
	e.open++
	e.left += cost
	h.total += cost
	return id
}

// insert adds an empty slice and returns its index, or -1 if there is no room.
// It forgets the slices whose holds have all been settled. If there are too many
// nevertheless, it forgets the first one that has expired: what its holds still
// cost, if they are settled late, is not taken then.
func (h *holds) insert(end int64) int {
	if h.next == math.MaxUint32 {
		return -1
	}
	h.slices = slices.DeleteFunc(h.slices, func(e slice) bool { return e.open == 0 && !e.expired })
	if len(h.slices) == maxSlices {
		i := slices.IndexFunc(h.slices, func(e slice) bool { return e.expired })
		if i < 0 {
			return -1
		}
		h.slices = slices.Delete(h.slices, i, i+1)
	}
	i := len(h.slices)
	for i > 0 && h.slices[i-1].end > end {
		i--
	}
	h.slices = slices.Insert(h.slices, i, slice{number: h.next, end: end})
	h.next++
	return i
}

// Settled says what a settlement has changed.
type Settled struct {
	// Known says that the bucket knew the hold. Otherwise nothing was changed: the
	// state was lost since, or the hold was never made.
	Known bool
	// Repeated says that the hold had been settled before, and nothing was
	// changed.
	Repeated bool
	// Late says that the hold had ended by itself: nothing was returned.
	Late bool
	// Returned and Surcharged are how many tokens were returned to the bucket,
	// and taken from it besides those that were held. Forgiven is what exceeded
	// the largest debt. Each is at least 0.
	Returned, Surcharged, Forgiven int64
	// Expired is how many holds of the bucket had ended by themselves since it was
	// last used.
	Expired int
	// Err is a *StoreError if the store did not answer. The hold may then have
	// been settled; it must not be settled again.
	Err error
}

// settle ends a hold whose request has cost so many tokens. s must be at the
// instant of the settlement.
func (s *state) settle(id Hold, cost int64) Settled {
	h := s.holds
	if h == nil || h.birth != id.birth {
		return Settled{}
	}
	i := slices.IndexFunc(h.slices, func(e slice) bool { return e.number == id.slice })
	if i < 0 { // all of its holds have been settled, or its time is over
		return Settled{Known: id.slice < h.next, Repeated: id.slice < h.next}
	}
	e := &h.slices[i]
	if int(id.index) >= e.count {
		return Settled{}
	}
	bit := byte(1) << (id.index % 8)
	if e.settled[id.index/8]&bit != 0 {
		return Settled{Known: true, Repeated: true}
	}
	e.settled[id.index/8] |= bit
	r := Settled{Known: true, Late: e.expired}
	freed := min(id.Tokens, e.left)
	if !e.expired {
		if e.open--; e.open == 0 {
			freed = e.left
		}
	}
	e.left -= freed
	h.total -= freed
	burst := s.shape.burst
	if back := min(freed, id.Tokens) - cost; back > 0 {
		// After a change of the shape there may be no room for all of it.
		r.Returned = max(0, min(back, burst-h.total-s.level.tokens))
		s.level.tokens += r.Returned
		if s.level.tokens+h.total >= burst {
			s.level.frac = 0
		}
		if s.level.tokens == burst && s.other != nil && s.other.burst <= burst {
			s.other = nil // as in next
		}
	}
	if more := cost - id.Tokens; more > 0 {
		r.Surcharged = max(0, min(more, s.level.tokens+burst))
		r.Forgiven = more - r.Surcharged
		s.level.tokens -= r.Surcharged
	}
	return r
}
