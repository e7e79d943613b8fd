package limiter

import (
	"context"
	"hash/maphash"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

const (
	// ceilingLife is how long an answer of the store is used, and so how long a
	// denial may be wrong. It is wrong if the bucket was reset, if its rate was
	// raised elsewhere, or if Redis restarted, failed over or stepped its clock.
	ceilingLife   = time.Second
	ceilingShards = 64
)

// Ceiling is a Store over another one. If even the most that a bucket can hold by
// now is less than the cost, it denies the take without asking the other store, so
// that a flood over a limit costs that store next to nothing. The most is what the
// bucket held after the last answer, and what its rate has added since the take
// of that answer began. A Ceiling never grants anything by itself.
//
// If it denies a request, the other enforced charges of the request have no
// verdict (Verdict.Known). It is safe for concurrent use. Run sweeps it.
type Ceiling struct {
	store  Store
	now    func() int64 // microseconds of a monotonic clock
	seed   maphash.Seed
	shards [ceilingShards]struct {
		mu    sync.RWMutex
		known map[string]ceiling
		bytes int64    // that they take
		_     [24]byte // a cache line of its own
	}
	budget  int64 // of bytes in a shard
	entries atomic.Int64

	sweeps, swept prometheus.Counter
}

var _ Store = (*Ceiling)(nil)

// ceiling is what a bucket held according to an answer of the store.
type ceiling struct {
	shape Bucket
	left  level
	held  int64 // tokens that settlements may return
	at    int64 // the time of the answer, by the store's clock
	sent  int64 // when the take began, by this process's clock
}

// ceilingBudget returns how many bytes of MemoryBudget are a Ceiling's.
func ceilingBudget() int64 { return min(MemoryBudget()/8, 8<<20) }

// NewCeiling returns an empty Ceiling over a store.
func NewCeiling(store Store, metrics prometheus.Registerer) *Ceiling {
	start := time.Now()
	return newCeiling(store, func() int64 { return time.Since(start).Microseconds() }, metrics)
}

func newCeiling(store Store, now func() int64, metrics prometheus.Registerer) *Ceiling {
	table := prometheus.Labels{"table": "ceilings"}
	c := &Ceiling{
		store:  store,
		now:    now,
		budget: ceilingBudget() / ceilingShards,
		seed:   maphash.MakeSeed(),
		sweeps: newSweeps(table),
		swept:  newSwept(table),
	}
	for i := range c.shards {
		c.shards[i].known = make(map[string]ceiling)
	}
	metrics.MustRegister(c.sweeps, c.swept, newEntries(table, &c.entries))
	return c
}

// Take is Store's.
func (c *Ceiling) Take(ctx context.Context, charges []Charge, verdicts []Verdict) {
	now := c.now()
	if c.deny(now, charges, verdicts) {
		c.takeShadows(ctx, now, charges, verdicts)
		return
	}
	c.store.Take(ctx, charges, verdicts)
	for i := range charges {
		c.learn(now, &charges[i], &verdicts[i])
	}
}

// deny reports whether an enforced charge is denied for certain. It then has
// set the verdicts that are certain, and the others are zero.
func (c *Ceiling) deny(now int64, charges []Charge, verdicts []Verdict) (denied bool) {
	if c.entries.Load() == 0 {
		return false
	}
	for i := range charges {
		verdicts[i] = Verdict{}
		if most, held, ok := c.most(now, &charges[i]); ok && most.tokens+held < charges[i].needs() {
			verdicts[i] = charges[i].verdict(most, held, 0, CeilingSource)
			denied = denied || !charges[i].Limit.Shadow
		}
	}
	return denied
}

// most returns the most that can be taken from the bucket of a charge at the
// instant now, if that is known, and how much more settlements may return.
func (c *Ceiling) most(now int64, charge *Charge) (most level, held int64, ok bool) {
	s := &c.shards[maphash.String(c.seed, charge.Key)%ceilingShards]
	s.mu.RLock()
	known, ok := s.known[charge.Key]
	s.mu.RUnlock()
	elapsed := max(0, now-known.sent) // the other take may have begun after this one
	if !ok || elapsed > ceilingLife.Microseconds() || known.shape != charge.Bucket {
		return level{}, 0, false
	}
	// The clocks of two machines may differ in speed by a thousandth.
	return known.shape.refill(known.left, elapsed+elapsed/1000+1, known.shape.burst), known.held, true
}

// takeShadows takes the shadow charges of a request that is denied without
// asking, except those that are denied for certain too. It waits for their
// verdicts, as a shadow limit counts whatever happens to the request. So during
// a flood the store is asked about as many requests as the shadow's bucket
// allows.
func (c *Ceiling) takeShadows(ctx context.Context, now int64, charges []Charge, verdicts []Verdict) {
	var at []int
	var shadows []Charge
	for i := range charges {
		if charges[i].Limit.Shadow && !verdicts[i].Known() {
			at, shadows = append(at, i), append(shadows, charges[i])
		}
	}
	if len(shadows) == 0 {
		return
	}
	said := make([]Verdict, len(shadows))
	c.store.Take(ctx, shadows, said)
	for i := range shadows {
		c.learn(now, &shadows[i], &said[i])
		verdicts[at[i]] = said[i]
	}
}

// learn records the level of a bucket that cannot pay for the same charge
// again, unless a newer answer is recorded.
func (c *Ceiling) learn(sent int64, charge *Charge, v *Verdict) {
	usedUp := v.left.tokens+v.held < charge.needs() // the same again would be denied
	if !v.Known() || v.Source == LocalSource || !usedUp && c.entries.Load() == 0 {
		return
	}
	s := &c.shards[maphash.String(c.seed, charge.Key)%ceilingShards]
	s.mu.Lock()
	defer s.mu.Unlock()
	known, ok := s.known[charge.Key]
	switch {
	case ok && known.at > v.at:
	case !usedUp:
		if ok {
			delete(s.known, charge.Key)
			s.bytes -= entrySize(charge.Key)
			c.entries.Add(-1)
		}
	case !ok && s.bytes+entrySize(charge.Key) > c.budget: // the store is asked until a sweep has made room
	default:
		if !ok {
			c.entries.Add(1)
			s.bytes += entrySize(charge.Key)
		}
		s.known[charge.Key] = ceiling{shape: charge.Bucket, left: v.left, held: v.held, at: v.at, sent: sent}
	}
}

// Run sweeps every second until ctx ends.
func (c *Ceiling) Run(ctx context.Context) {
	tick := time.NewTicker(ceilingLife)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			c.sweep()
		}
	}
}

// sweep drops the entries that are too old to be used.
func (c *Ceiling) sweep() {
	now := c.now()
	for i := range c.shards {
		s := &c.shards[i]
		s.mu.Lock()
		for key, known := range s.known {
			if now-known.sent > ceilingLife.Microseconds() {
				delete(s.known, key)
				s.bytes -= entrySize(key)
				c.entries.Add(-1)
				c.swept.Inc()
			}
		}
		s.mu.Unlock()
	}
	c.sweeps.Inc()
}
