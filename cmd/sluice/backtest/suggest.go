package backtest

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/sluiceproxy/sluice/limiter"
)

// suggester measures in one reading what the keys of each limit ask for. One
// goroutine uses it.
//
// It takes that the limit itself denies nothing, and that the other limits are
// as they are. For that each enforced limit has buckets of all others, in which
// a request is played without it.
type suggester struct {
	world   *world
	reading reading
	work    chan []*request
	without map[*limitState]*table
	grids   map[*limitState]*grid
}

// grid is the rates for which a limit's keys are measured.
type grid struct {
	burst  int64
	period time.Duration
	text   string // of the period
	rates  []gridRate
	own    int // index of the limit's own rate
}

type gridRate struct {
	tokens int64
	bucket limiter.Bucket
}

// demand is what one key asks for.
type demand struct {
	depths []limiter.Depth // by grid.rates
	least  leastRate
}

func newSuggester(w *world, r reading) *suggester {
	s := &suggester{
		world: w, reading: r, work: make(chan []*request, 8),
		without: make(map[*limitState]*table), grids: make(map[*limitState]*grid),
	}
	enforced := 0
	for _, l := range w.limits {
		if !l.limit.Shadow {
			enforced++
		}
		if g := newGrid(l); g != nil {
			s.grids[l] = g
		}
	}
	for l := range s.grids {
		if enforced > 1 && !l.limit.Shadow {
			s.without[l] = &table{reading: r, buckets: make(map[*keyState]*limiter.ReplayBucket)}
		}
	}
	return s
}

// newGrid returns the rates to measure for a limit; nil if it has no rate.
func newGrid(l *limitState) *grid {
	d := l.described
	if d == nil || d.Tokens == 0 {
		return nil
	}
	_, text, _ := strings.Cut(d.Rate, "/")
	g := &grid{burst: d.Burst, period: d.Period, text: text}
	for _, part := range []struct{ times, of int64 }{{1, 4}, {1, 2}, {1, 1}, {2, 1}, {4, 1}, {8, 1}} {
		tokens := max(1, d.Tokens*part.times/part.of)
		b, err := limiter.NewBucket(tokens, d.Period, 1)
		if err != nil || slices.ContainsFunc(g.rates, func(r gridRate) bool { return r.tokens == tokens }) {
			continue
		}
		if tokens == d.Tokens {
			g.own = len(g.rates)
		}
		g.rates = append(g.rates, gridRate{tokens, b})
	}
	return g
}

// rate returns a rate of the grid's period as the config would write it.
func (g *grid) rate(tokens int64) string { return fmt.Sprintf("%d/%s", tokens, g.text) }

func (s *suggester) play(q *request) {
	d := &q.draws[s.world.index]
	if d.exempt || d.mistake != "" || len(d.charges) == 0 {
		return
	}
	isAllowed := make(map[*limitState]bool, 8)
	for l, t := range s.without {
		outcome, _ := t.take(q, d, l)
		isAllowed[l] = outcome == limiter.Allowed
	}
	for i, k := range d.keys {
		c, l := &d.charges[i], k.limit
		g := s.grids[l]
		if g == nil || c.Refused || !l.isOwn(c.Bucket) {
			continue
		}
		m := k.demand[s.reading]
		if m == nil {
			m = &demand{depths: make([]limiter.Depth, len(g.rates))}
			k.demand[s.reading] = m
		}
		at := q.at
		if s.reading == spread {
			at = d.spread[i]
		}
		if s.without[l] != nil && !isAllowed[l] {
			// The limit counts its own verdict even where another one denies.
			for j := range g.rates {
				m.depths[j].Look(g.rates[j].bucket, at, c.Cost)
			}
			m.least.look(g.burst, g.period.Microseconds(), at, c.Cost)
			continue
		}
		for j := range g.rates {
			m.depths[j].Take(g.rates[j].bucket, at, c.Cost)
		}
		m.least.take(g.burst, g.period.Microseconds(), at, c.Cost)
	}
}

// quantiles are the parts of keys that a suggestion may limit, as one in so many;
// 0: none.
var quantiles = []struct {
	text  string
	oneIn int
}{{"0%", 0}, {"0.1%", 1000}, {"1%", 100}}

// suggest returns the suggestions for a limit, and how many keys need which
// burst at its own rate; nil if there are none. Of two readings it takes the
// larger.
func suggest(all []*suggester, l *limitState) (*Suggestions, []Need) {
	if len(all) == 0 || all[0].grids[l] == nil {
		return nil, nil
	}
	g := all[0].grids[l]
	bursts := make([][]int64, len(g.rates)) // by rate and quantile
	rates := make([]int64, len(quantiles))
	for i := range bursts {
		bursts[i] = make([]int64, len(quantiles))
	}
	for _, s := range all {
		least := make([]int64, 0, len(l.keys))
		deepest := make([][]int64, len(g.rates))
		for _, k := range l.keys {
			m := k.demand[s.reading]
			if m == nil {
				continue
			}
			least = append(least, m.least.tokens)
			for i := range m.depths {
				deepest[i] = append(deepest[i], m.depths[i].Deepest())
			}
		}
		if len(least) == 0 {
			continue
		}
		raise(rates, least)
		for i := range deepest {
			raise(bursts[i], deepest[i])
		}
	}
	needs := needsOf(all, l, g.own)
	if len(needs) == 0 {
		return nil, nil
	}
	out := &Suggestions{}
	for i, q := range quantiles {
		out.Burst = append(out.Burst, SuggestedBurst{q.text, suggested(bursts[g.own][i])})
		var rate *string
		if rates[i] < noRate {
			rate = new(g.rate(max(1, rates[i])))
		}
		out.Rate = append(out.Rate, SuggestedRate{q.text, rate})
	}
	for i := range g.rates {
		p := Pair{Rate: g.rate(g.rates[i].tokens)}
		for j, q := range quantiles {
			p.Burst = append(p.Burst, SuggestedBurst{q.text, suggested(bursts[i][j])})
		}
		out.Pairs = append(out.Pairs, p)
	}
	return out, needs
}

// raise sets each quantile of the values, if it is larger.
func raise(to, values []int64) {
	slices.SortFunc(values, func(a, b int64) int { return int(max(-1, min(1, b-a))) }) // the largest first
	for i, q := range quantiles {
		limited := 0
		if q.oneIn > 0 {
			limited = len(values) / q.oneIn
		}
		to[i] = max(to[i], values[min(limited, len(values)-1)])
	}
}

// suggested returns a burst; nil if no bucket would do.
func suggested(burst int64) *int64 {
	if burst >= limiter.MaxTokens {
		return nil
	}
	return new(max(1, burst))
}

// Need says how many keys need at most a burst so that they are never limited.
type Need struct {
	Burst int64
	Keys  int
}

// needsOf returns how many keys of a limit need which burst at a rate of its grid,
// in ascending order and at most 64 steps. Of a key's readings it takes the larger.
func needsOf(all []*suggester, l *limitState, rate int) (needs []Need) {
	var bursts []int64
	for _, k := range l.keys {
		burst, asked := int64(0), false
		for _, s := range all {
			if m := k.demand[s.reading]; m != nil {
				burst, asked = max(burst, m.depths[rate].Deepest()), true
			}
		}
		if asked {
			bursts = append(bursts, burst)
		}
	}
	slices.Sort(bursts)
	for i, burst := range bursts {
		if n := len(needs); n > 0 && needs[n-1].Burst == burst {
			needs[n-1].Keys++
			continue
		}
		needs = append(needs, Need{burst, i + 1})
	}
	for len(needs) > 64 {
		var half []Need
		for i := range needs {
			if i%2 == 1 || i == 0 || i == len(needs)-1 {
				half = append(half, needs[i])
			}
		}
		needs = half
	}
	return needs
}
