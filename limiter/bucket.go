package limiter

import (
	"fmt"
	"math/bits"
	"time"
	"unique"
)

// The ranges that NewBucket accepts.
const (
	MaxTokens = 1_000_000_000          // of a rate and of a burst
	minPeriod = time.Microsecond       // of a rate; periods are whole microseconds
	maxPeriod = 366 * 24 * time.Hour   // of a rate
	MaxFill   = 36525 * 24 * time.Hour // 100 years, from empty to full
)

// maxWait is how long a bucket takes at most from a debt of one burst until it is
// full. Only a debt that a larger or faster shape has left could take longer.
const maxWait = 2 * MaxFill

// Never is the wait for more tokens than a bucket can hold.
const Never = time.Duration(1<<63 - 1)

// minP is the least p of a Bucket: levels are counted in whole tokens and p-ths
// of one. When a limit's rate changes, the fraction that a bucket holds is
// converted to the new p and rounded down, which costs a client at most a
// millionth of a token.
const minP = 1_000_000

// Bucket is the shape of a token bucket: how many tokens it holds at most and how
// fast it refills. It is a comparable value; equal rates (60/m and 1/s) make equal
// Buckets. The zero value is not a bucket.
//
// The rate is n tokens each p microseconds. NewBucket divides the tokens and the
// period by their greatest common divisor, then multiplies both until p is at
// least minP. So n is at most 1e15 and p at most 3.2e13 (2^45).
type Bucket struct {
	n, p  int64
	burst int64
	// calendar is zero except for a quota (quota.go), whose n and p have no meaning.
	calendar unique.Handle[Calendar]
}

// NewBucket returns a bucket of burst tokens that refills by tokens each
// period. Tokens and burst are 1 to MaxTokens; the period is 1 µs to 366 days
// in whole microseconds; from empty to full the bucket may take at most 100
// years. The error says which argument is out of range.
func NewBucket(tokens int64, period time.Duration, burst int64) (Bucket, error) {
	switch {
	case tokens < 1 || tokens > MaxTokens:
		return Bucket{}, fmt.Errorf("a rate is 1 to %d tokens a period, not %d", MaxTokens, tokens)
	case period < minPeriod || period > maxPeriod:
		return Bucket{}, fmt.Errorf("a rate's period is 1us to 366 days, not %v", period)
	case period%time.Microsecond != 0:
		return Bucket{}, fmt.Errorf("a rate's period is in whole microseconds, not %v", period)
	case burst < 1 || burst > MaxTokens:
		return Bucket{}, fmt.Errorf("a burst is 1 to %d tokens, not %d", MaxTokens, burst)
	}
	n, p := tokens, period.Microseconds()
	d := gcd(n, p)
	n, p = n/d, p/d
	if p < minP {
		k := (minP + p - 1) / p
		n, p = n*k, p*k
	}
	b := Bucket{n: n, p: p, burst: burst}
	// The product passes 2^64 long after it passes MaxFill, so compare it as a
	// float.
	if float64(burst)*float64(p)/float64(n) > float64(MaxFill.Microseconds()) {
		return Bucket{}, fmt.Errorf("a burst of %d at %d tokens each %v takes longer than 100 years to fill", burst, tokens,
			period)
	}
	return b, nil
}

func gcd(a, b int64) int64 {
	for b != 0 {
		a, b = b, a%b
	}
	return a
}

// Share returns a bucket with a part of b's rate and burst, or of a quota's
// tokens, 0 < part ≤ 1. Both are rounded down, but the burst is at least 1 token
// and the rate above 0.
func (b Bucket) Share(part float64) Bucket {
	const grain = 1_000_000 // of the part
	parts := max(1, int64(part*grain))
	s := b
	s.burst = max(1, b.burst*parts/grain)
	if s.IsQuota() {
		return s
	}
	// The n of a slow rate is too small to take a part of: lengthen the period
	// first, as far as it may be.
	if k := min(grain, maxPeriod.Microseconds()/s.p); s.n < grain && k > 1 {
		s.n, s.p = s.n*k, s.p*k
	}
	hi, lo := bits.Mul64(uint64(s.n), uint64(parts))
	n, _ := bits.Div64(hi, lo, grain) // at most s.n, since parts is at most grain
	s.n = max(1, int64(n))
	return s
}

// Burst returns how many tokens the bucket holds at most: of a quota, its N.
func (b Bucket) Burst() int64 { return b.burst }

// FillTime returns how long the bucket takes from empty to full, rounded up to
// a microsecond; 0 for a quota.
func (b Bucket) FillTime() time.Duration { return b.wait(level{}, b.burst) }

// level is what can be taken from a bucket: whole tokens, and frac p-ths of one
// more, with 0 ≤ frac < p of its Bucket. A full bucket has tokens == burst and
// frac == 0. A level below 0 is a debt (hold.go), of at most 1e9 tokens. See
// levelFor for what the frac of a quota's level is.
type level struct {
	tokens, frac int64
}

// full returns the level that a bucket starts with.
func (b Bucket) full() level { return level{tokens: b.burst} }

// fillFrom is about how many microseconds the bucket takes to be full from so
// many tokens, at most MaxFill. The script computes the same number.
func (b Bucket) fillFrom(tokens int64) float64 {
	return min(float64(max(0, b.burst-tokens))*float64(b.p)/float64(b.n), float64(MaxFill.Microseconds()))
}

// refill returns l after elapsed microseconds (at least 0): refilled, but to at
// most so many tokens. A level that is there already stays.
//
// It is exact: with elapsed = a·p + r (r < p), a·n + r·n/p tokens arrive. If a·n
// reaches the room that is left, the level is the most. Otherwise a·n < 2^31, and
// r·n < 2^45 · 1e15 < 2^95 is computed in 128 bits. The quotient is below
// n ≤ 1e15 and the remainder below p, so all sums stay below 2^63 (in Lua below
// 2^53; see take.lua).
func (b Bucket) refill(l level, elapsed, most int64) level {
	if b.IsQuota() {
		if l.frac -= elapsed; l.frac <= 0 {
			return level{tokens: most}
		}
		return l
	}
	room := most - l.tokens
	if room <= 0 {
		return l
	}
	a, r := elapsed/b.p, elapsed%b.p
	if hi, lo := bits.Mul64(uint64(a), uint64(b.n)); hi != 0 || lo >= uint64(room) {
		return level{tokens: most}
	}
	hi, lo := bits.Mul64(uint64(r), uint64(b.n))
	q, frac := bits.Div64(hi, lo, uint64(b.p)) // q < n, so hi < p
	tokens := a*b.n + int64(q)
	l.frac += int64(frac)
	if l.frac >= b.p {
		l.frac -= b.p
		tokens++
	}
	if tokens >= room {
		return level{tokens: most}
	}
	l.tokens += tokens
	return l
}

// convert returns l, a level of the shape from, as a level of b: at most so many
// tokens, and rounded down. A debt stays.
func (b Bucket) convert(l level, from Bucket, most int64) level {
	if l.tokens >= most {
		return level{tokens: most}
	}
	hi, lo := bits.Mul64(uint64(l.frac), uint64(b.p))
	frac, _ := bits.Div64(hi, lo, uint64(from.p)) // frac < from.p, so the quotient is below b.p
	l.frac = int64(frac)
	return l
}

// wait returns how long a bucket at level l takes until it holds want tokens,
// rounded up to a microsecond: 0 if it does already, Never if it cannot, and at
// most maxWait.
func (b Bucket) wait(l level, want int64) time.Duration {
	switch {
	case want <= l.tokens:
		return 0
	case want > b.burst:
		return Never
	case b.IsQuota():
		return time.Duration(l.frac) * time.Microsecond
	}
	// ceil(((want − tokens)·p − frac) / n)
	hi, lo := bits.Mul64(uint64(want-l.tokens), uint64(b.p))
	lo, borrow := bits.Sub64(lo, uint64(l.frac), 0)
	hi -= borrow
	if hi >= uint64(b.n) {
		return maxWait
	}
	q, rem := bits.Div64(hi, lo, uint64(b.n))
	if rem != 0 {
		q++
	}
	return time.Duration(min(q, uint64(maxWait.Microseconds()))) * time.Microsecond
}
