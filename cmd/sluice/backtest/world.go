package backtest

import (
	"errors"
	"io"
	"time"

	"github.com/sluiceproxy/sluice/limiter"
	"github.com/sluiceproxy/sluice/limiter/policy"
)

// maxBad is how many lines are shown that cannot be read.
const maxBad = 5

func isEOF(err error) bool { return errors.Is(err, io.EOF) }

// world is a config with the state of its limits.
type world struct {
	config *policy.Config
	index  int // in request.draws
	limits []*limitState
	states map[*limiter.Limit]*limitState
	keys   int // of all limits
	// mistakes counts requests by the mistake of the config that refuses them.
	exempt, unmatched, invalid int64
	mistake                    string // the first
}

// limitState is a limit with its keys.
type limitState struct {
	limit     *limiter.Limit
	described *policy.Described // nil: none of the file
	keys      map[string]*keyState
	requests  int64
}

// keyState is one bucket of a limit. What a reading changes belongs to its
// player alone.
type keyState struct {
	limit    *limitState
	key      string // as logs show it
	requests int64
	buckets  [2]limiter.ReplayBucket // by reading
	limited  [2]int64
	timeline *timeline
	demand   [2]*demand

	// While a group is spread over its grain:
	inGroup, spread int64
	at              int64 // of the latest charge
}

// charge is what a request draws from one bucket.
type charge struct {
	key     *keyState
	bucket  limiter.Bucket
	cost    int64
	settled int64         // what the request has cost at its end
	at      int64         // when it is taken, evenly spread
	life    time.Duration // of the hold; 0: nothing is held
	refused bool
}

func newWorld(config *policy.Config, index int) *world {
	w := &world{config: config, index: index, states: make(map[*limiter.Limit]*limitState)}
	all := config.Describe()
	for i := range all {
		w.state(all[i].Limit).described = &all[i]
	}
	return w
}

// state returns the state of a limit.
func (w *world) state(l *limiter.Limit) *limitState {
	s := w.states[l]
	if s == nil {
		s = &limitState{limit: l, keys: make(map[string]*keyState)}
		w.states[l] = s
		w.limits = append(w.limits, s)
	}
	return s
}

// settled returns what a request has cost at its end by each charge that is
// held; nil if none is. It is safe for concurrent use.
func (w *world) settled(charges []limiter.Charge, end *policy.End) (all []int64) {
	for i := range charges {
		c := &charges[i]
		if c.HoldFor <= 0 {
			continue
		}
		if all == nil {
			all = make([]int64, len(charges))
		}
		// Of a mistake, what was taken stands, and that is what Settle returns.
		all[i], _ = w.config.Settle(c.Limit.Domain, c.Limit.Name, end, c.Cost)
	}
	return all
}

// intern returns what a request draws, with the states of its buckets.
func (w *world) intern(d *policy.Draw, settled []int64) drawn {
	out := drawn{exempt: d.Exempt}
	if d.Exempt {
		w.exempt++
		return out
	}
	for _, l := range d.Unlimited {
		s := w.state(l)
		s.requests++
		out.unlimited = append(out.unlimited, s)
	}
	if d.Invalid {
		w.invalid++
		for _, m := range d.Mistakes {
			if !m.Shadow && w.mistake == "" {
				w.mistake = m.Error()
			}
		}
		out.mistake = w.mistake
	}
	if len(d.Charges) == 0 {
		if out.unmatched = len(d.Unlimited) == 0 && !d.Invalid; out.unmatched {
			w.unmatched++
		}
		return out
	}
	out.charges = make([]charge, len(d.Charges))
	for i := range d.Charges {
		c := &d.Charges[i]
		s := w.state(c.Limit)
		k := s.keys[c.Key]
		if k == nil {
			k = &keyState{limit: s, key: c.ShownKey()}
			s.keys[c.Key] = k
			w.keys++
		}
		s.requests++
		k.requests++
		out.charges[i] = charge{key: k, bucket: c.Bucket, cost: c.Cost, refused: c.Refused, life: c.HoldFor}
		if c.HoldFor > 0 {
			out.charges[i].settled = settled[i]
		}
	}
	return out
}

// isOwn reports whether a bucket has the shape that its limit says, and not that
// of an override.
func (s *limitState) isOwn(b limiter.Bucket) bool {
	return s.described != nil && s.described.Bucket == b
}
