package backtest

import (
	"math/bits"

	"github.com/sluiceproxy/sluice/limiter"
)

// noRate is a rate that no limit can have: there is none that would do.
const noRate = limiter.MaxTokens + 1

// A leastRate finds the least number of tokens in a period with which a bucket
// never denies what it is asked for. Its zero value has seen no request.
//
// A bucket of burst tokens that refills by n tokens each period allows a request
// at the instant t that brings the sum of costs to S, if for each request i
// before it, and for itself,
//
//	S − sum(i) ≤ burst + n·(t − t(i))/period
//
// where sum(i) is the sum before i. As a function of n, each i is the line
// sum(i) − n·t(i)/period, and only the lowest line at each n counts. lines has
// those that are the lowest for some n that is at least the least rate so far,
// by ascending instants; as n grows, later ones are the lowest.
type leastRate struct {
	tokens int64 // the least rate so far; 0: none was needed yet
	sum    int64 // of costs
	lines  []line
}

type line struct{ at, sum int64 }

// take notes a request: at an instant in microseconds that does not go back,
// with a cost. The period is in microseconds.
func (r *leastRate) take(burst, period, at, cost int64) {
	r.look(burst, period, at, cost)
	r.sum += cost
}

// look is take for a request that another limit denies: this one must not deny
// it, either, but keeps the cost.
func (r *leastRate) look(burst, period, at, cost int64) {
	if r.tokens == noRate {
		return
	}
	if cost > burst {
		r.tokens, r.lines = noRate, nil
		return
	}
	r.tokens = max(r.tokens, 1)
	r.add(line{at, r.sum}, period)
	for {
		first := r.lines[0]
		needed := r.sum + cost - burst - first.sum
		if needed <= 0 || !more(needed, period, r.tokens, at-first.at) {
			return
		}
		elapsed := at - first.at
		if elapsed == 0 {
			r.tokens, r.lines = noRate, nil
			return
		}
		if r.tokens = quotient(needed, period, elapsed); r.tokens >= noRate {
			r.tokens, r.lines = noRate, nil
			return
		}
		// At the new rate a later line may be the lowest.
		for len(r.lines) > 1 && !more(r.lines[1].sum-r.lines[0].sum, period, r.tokens, r.lines[1].at-r.lines[0].at) {
			r.lines = r.lines[1:]
		}
	}
}

// add adds the line of a request that is the latest.
func (r *leastRate) add(l line, period int64) {
	if n := len(r.lines); n > 0 && r.lines[n-1].at >= l.at {
		return // the earlier line is nowhere higher
	}
	// If the new line is the lowest at the least rate, it is so at all higher
	// rates: the bucket is full.
	if len(r.lines) > 0 && !more(l.sum-r.lines[0].sum, period, r.tokens, l.at-r.lines[0].at) {
		r.lines = r.lines[:0]
	}
	for n := len(r.lines); n > 1; n-- {
		a, b := r.lines[n-2], r.lines[n-1]
		// b is the lowest nowhere if the new line crosses a before b does.
		if more(l.sum-a.sum, b.at-a.at, b.sum-a.sum, l.at-a.at) {
			break
		}
		r.lines = r.lines[:n-1]
	}
	r.lines = append(r.lines, l)
}

// more reports whether a·b > c·d; all are at least 0.
func more(a, b, c, d int64) bool {
	h1, l1 := bits.Mul64(uint64(a), uint64(b))
	h2, l2 := bits.Mul64(uint64(c), uint64(d))
	return h1 > h2 || h1 == h2 && l1 > l2
}

// quotient returns a·b/c, rounded up, and at most noRate.
func quotient(a, b, c int64) int64 {
	hi, lo := bits.Mul64(uint64(a), uint64(b))
	if hi >= uint64(c) {
		return noRate
	}
	q, rest := bits.Div64(hi, lo, uint64(c))
	if rest > 0 {
		q++
	}
	return int64(min(q, noRate))
}
