package limiter

import (
	"context"
	"hash/maphash"
	"maps"
	"math"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// The range of a Limit's Lease.
const (
	MinLease = MinHold
	MaxLease = 5 * time.Second
)

const (
	// leasePart: a lease takes at most 1/leasePart of what the bucket has left.
	leasePart = 4
	// hotChecks is how many checks of a key within the length of a lease make the
	// key busy, if none of them is denied: a lease is then taken. It is renewed
	// while its key gets at least busyChecks within its length. A term costs a call
	// that takes it, and a settlement that goes with a later one: with fewer checks
	// than that it would spare the store little.
	hotChecks, busyChecks = 8, 4
	// leaseWorkers is how many calls about leases are under way at most.
	leaseWorkers = 16
	leaseShards  = 64
	// leaseOverhead is about how many bytes a lease takes besides its key.
	leaseOverhead = 270
)

// Lender is a store that holds what it takes for a charge with HoldFor, and
// settles it. Redis and Memory are Lenders.
type Lender interface {
	Store
	Settle(ctx context.Context, settlements []Settlement, results []Settled)
}

// Leases is a Store over another one. For the busy keys of the limits that have a
// Lease it takes tokens ahead from a Lender and grants from them by itself, so
// that most checks ask nobody. What it takes is held (see Hold), so that the bound
// is exact over all sidecars: what was not granted goes back when the lease is
// renewed, when it ends, and on Close. A sidecar that crashes loses what it has
// leased, until the hold ends.
//
// All else, and each charge for which a lease has too few tokens, is the other
// store's. A request's leased tokens are set aside before the other store is
// asked, and put back if it denies.
//
// It is safe for concurrent use.
type Leases struct {
	store  Store
	lender Lender
	now    func() int64 // microseconds of bootClock
	seed   maphash.Seed
	busy   busyKeys
	shards [leaseShards]struct {
		mu     sync.RWMutex
		leases map[string]*lease
		_      [32]byte // a cache line of its own
	}
	budget int64        // of bytes, for all leases
	bytes  atomic.Int64 // that they take

	// limits has the metrics of the limits with a Lease. The map is replaced,
	// never changed.
	limits atomic.Pointer[map[string]*leaseMetrics]

	wakes wakes

	mu      sync.Mutex
	queue   []*lease // to be renewed or ended, each once
	workers int
	idle    *sync.Cond // signalled when workers falls to 0

	isClosed atomic.Bool
}

var _ Store = (*Leases)(nil)

// lease is the tokens that are held for a key. TestLeaseSize bounds its size.
type lease struct {
	key     string
	shape   Bucket
	limit   *Limit
	metrics *leaseMetrics // nil if the config in force has no such limit

	mu sync.Mutex
	term
	// rest is what the bucket has besides the term's tokens, by the answer of the
	// instant restAt of the store's clock: the newest one, to a check or for this
	// lease.
	rest   level
	restAt int64
	// restSeen is when that answer was noted, by the clock of the lease.
	restSeen int64
	// checks is how many checks there have been since the instant since, and
	// asked what they cost, whoever granted them.
	checks, asked, since int64
	isQueued             bool // a worker has the lease, or will
	// isSpare says that the last attempt to renew the term failed, so that it is
	// granted from to its end, and renewed at wakeAt.
	isSpare bool
	// wasDenied says that a check was denied, so that there is no new term.
	wasDenied bool
	place     int32 // in the wakes, which guard it
	// wakeAt is when the lease is renewed, if there are tokens left until then. It is
	// set by the wakes with mu held.
	wakeAt int64
}

// term is one hold of a lease. The zero term holds nothing.
type term struct {
	hold Hold
	// left is how many of its tokens can be granted until the instant end. The
	// others have been granted.
	left, end int64
	took      int64 // how long the call took, in microseconds
	// lasts is the time from the sending of the call to the end, in microseconds.
	lasts int64
	// windowEnd is when the window of a quota ends, by the store's clock; 0 for all
	// others. No term outlives it.
	windowEnd int64
}

// NewLeases returns a Leases over a store that takes from a lender, which keeps
// the same buckets as the store.
func NewLeases(store Store, lender Lender, metrics prometheus.Registerer) *Leases {
	return newLeases(store, lender, bootClock(), metrics)
}

func newLeases(store Store, lender Lender, now func() int64, metrics prometheus.Registerer) *Leases {
	l := &Leases{store: store, lender: lender, now: now, seed: maphash.MakeSeed(), budget: leaseBudget()}
	l.idle = sync.NewCond(&l.mu)
	l.wakes = wakes{now: func() int64 { return l.now() }, wake: l.wake}
	for i := range l.shards {
		l.shards[i].leases = make(map[string]*lease)
	}
	l.limits.Store(&map[string]*leaseMetrics{})
	metrics.MustRegister(l)
	return l
}

// leaseBudget returns how many bytes of MemoryBudget are for leases.
func leaseBudget() int64 { return min(MemoryBudget()/8, 8<<20) }

// source is a lease that has granted a charge, and what it held then.
type source struct {
	lease *lease
	hold  Hold
}

// Take is Store's.
func (l *Leases) Take(ctx context.Context, charges []Charge, verdicts []Verdict) {
	var few [4]source
	from, granted, now := few[:0], 0, int64(0)
	for i := range charges {
		var s source
		if c := &charges[i]; c.lease() > 0 {
			if now == 0 {
				now = l.now()
			}
			if s = l.grant(now, c, &verdicts[i]); s.lease != nil {
				granted++
			}
		}
		from = append(from, s)
	}
	switch {
	case granted == len(charges):
		return
	case granted == 0:
		l.store.Take(ctx, charges, verdicts)
	default:
		l.takeRest(ctx, from, charges, verdicts)
	}
	if now == 0 { // no charge can be leased
		return
	}
	for i := range charges {
		if from[i].lease == nil && charges[i].lease() > 0 {
			l.learn(now, &charges[i], &verdicts[i])
		}
	}
}

// lease returns for how long tokens for the charge are leased; 0 if it cannot be
// granted from a lease.
func (c *Charge) lease() time.Duration {
	if c.Limit.Lease <= 0 || c.Cost <= 0 || c.Cost > c.Bucket.burst || c.Refused || c.HoldFor > 0 {
		return 0
	}
	return c.Limit.lease()
}

// lease returns for how long tokens of a limit with a Lease are leased.
func (l *Limit) lease() time.Duration { return min(max(l.Lease, MinLease), MaxLease) }

// takeRest takes the charges that no lease has granted. If the request does not
// spend what it took, it puts the tokens back into the leases.
func (l *Leases) takeRest(ctx context.Context, from []source, charges []Charge, verdicts []Verdict) {
	var at []int
	var rest []Charge
	for i := range charges {
		if from[i].lease == nil {
			at, rest = append(at, i), append(rest, charges[i])
		}
	}
	said := make([]Verdict, len(rest))
	l.store.Take(ctx, rest, said)
	for i := range rest {
		verdicts[at[i]] = said[i]
	}
	if outcomeOf(charges, verdicts).Spends() {
		return
	}
	for i := range charges {
		if from[i].lease != nil && !charges[i].Limit.Shadow {
			from[i].putBack(&charges[i], &verdicts[i])
		}
	}
}

// find returns the lease of a key, or nil.
func (l *Leases) find(key string) *lease {
	if l.bytes.Load() == 0 {
		return nil
	}
	s := &l.shards[maphash.String(l.seed, key)%leaseShards]
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.leases[key]
}

// grant grants a charge from a lease that has the tokens at the instant now, and
// sets the verdict. It returns a zero source if there is none.
func (l *Leases) grant(now int64, c *Charge, v *Verdict) source {
	e := l.find(c.Key)
	if e == nil {
		return source{}
	}
	if e.shape != c.Bucket || e.limit.lease() != c.lease() {
		return source{} // the config has changed: the lease ends, as its checks are no longer counted
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.checks++
	e.asked += c.Cost
	var s source
	if e.left >= c.Cost && now < e.end {
		before := e.rest
		before.tokens += e.left
		if c.Bucket.IsQuota() {
			before.frac = max(0, before.frac-max(0, now-e.restSeen))
		}
		*v = c.verdict(before, 0, c.Cost, LeaseSource)
		v.at, v.taken = now, true
		e.left -= c.Cost
		s = source{e, e.hold}
	}
	if e.left <= e.hold.Tokens/8 && !e.isSpare && now < e.end && !e.isQueued {
		l.enqueueLocked(e)
	}
	return s
}

// putBack puts back what a lease has granted to a request that was then denied.
// If the term has ended since, the tokens count as spent.
func (s source) putBack(c *Charge, v *Verdict) {
	before := v.left
	before.tokens += c.Cost
	*v = c.verdict(before, 0, 0, LeaseSource)
	s.lease.mu.Lock()
	defer s.lease.mu.Unlock()
	if s.lease.hold == s.hold {
		s.lease.left += c.Cost
	}
}

// learn notes what the store answered to a charge, and begins a lease if the key
// is busy.
func (l *Leases) learn(now int64, c *Charge, v *Verdict) {
	isAnswer := v.Source == RedisSource || v.Source == MemorySource
	isDenied := v.Known() && !v.Allowed
	if e := l.find(c.Key); e != nil {
		if isAnswer && e.shape == c.Bucket {
			e.mu.Lock()
			e.learnLocked(now, v)
			e.wasDenied = e.wasDenied || isDenied
			e.mu.Unlock()
		}
		return
	}
	lasts := c.lease()
	isBusy := l.busy.count(maphash.String(l.seed, c.Key), now, lasts, isDenied) == hotChecks
	if !isBusy || !isAnswer || l.isClosed.Load() {
		return
	}
	e := &lease{
		key: c.Key, shape: c.Bucket, limit: c.Limit, metrics: (*l.limits.Load())[c.Limit.Name],
		rest: v.left, restAt: v.at, restSeen: now,
		// Nobody knows the pace yet: twice as many checks as there were must do.
		checks: hotChecks, asked: hotChecks * c.Cost, since: now - lasts.Microseconds()/2,
		isQueued: true,
	}
	if e.sizeLocked(now) > 0 && l.add(e) {
		l.enqueue(e)
	}
}

// learnLocked notes what the bucket had left after an answer of the store. Of the
// answers of one instant, which are of one call, the last one has the fewest tokens:
// nothing is refilled within it, and it settles before it takes.
func (e *lease) learnLocked(now int64, v *Verdict) {
	if v.Known() && (v.at > e.restAt || v.at == e.restAt && v.left.tokens < e.rest.tokens) {
		e.rest, e.restAt, e.restSeen = v.left, v.at, now
	}
}

// add adds a new lease. It reports false if the key has one, or if there is no
// room.
func (l *Leases) add(e *lease) bool {
	size := int64(len(e.key)) + leaseOverhead
	if l.bytes.Add(size) > l.budget {
		l.bytes.Add(-size)
		return false
	}
	s := &l.shards[maphash.String(l.seed, e.key)%leaseShards]
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.leases[e.key] != nil {
		l.bytes.Add(-size)
		return false
	}
	s.leases[e.key] = e
	return true
}

func (l *Leases) remove(e *lease) {
	s := &l.shards[maphash.String(l.seed, e.key)%leaseShards]
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.leases, e.key)
	l.bytes.Add(-int64(len(e.key)) - leaseOverhead)
}

// sizeLocked returns how many tokens the next term should have: as many as the
// checks use within a lease at their pace since the last term began, at most a
// part of what the bucket has left. It returns 0 if that is not worth a call.
func (e *lease) sizeLocked(now int64) int64 {
	elapsed, lasts := max(1, now-e.since), e.limit.lease().Microseconds()
	if e.wasDenied || e.checks*lasts < busyChecks*elapsed {
		return 0
	}
	asked := min(e.asked, math.MaxInt64/lasts)
	size := min(asked*lasts/elapsed, e.rest.tokens/leasePart)
	if size*e.checks < busyChecks*e.asked {
		return 0
	}
	return size
}

// enqueueLocked gives a lease to a worker. The caller holds e.mu.
func (l *Leases) enqueueLocked(e *lease) {
	e.isQueued = true
	l.enqueue(e)
}

func (l *Leases) enqueue(e *lease) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.queue = append(l.queue, e)
	if l.workers < leaseWorkers {
		l.workers++
		go l.work()
	}
}

// work renews and ends leases until the queue is empty.
func (l *Leases) work() {
	for {
		l.mu.Lock()
		if len(l.queue) == 0 {
			l.queue = nil
			if l.workers--; l.workers == 0 {
				l.idle.Broadcast()
			}
			l.mu.Unlock()
			return
		}
		e := l.queue[0]
		l.queue = l.queue[1:]
		l.mu.Unlock()
		l.renew(e)
	}
}

// renew takes a new term while checks are still granted from the old one. Then it
// closes the old one, from which nothing is granted any more, and gives back what
// is left of it. If there is no new term, and no time for another attempt either,
// that is the end of the lease.
func (l *Leases) renew(e *lease) {
	sent := l.now()
	e.mu.Lock()
	checks, asked, size := e.checks, e.asked, int64(0)
	if !l.isClosed.Load() {
		size = e.sizeLocked(sent)
	}
	e.mu.Unlock()
	var next term
	var answer Verdict
	if size > 0 {
		next, answer = l.take(e, sent, size)
	}

	now := l.now()
	e.mu.Lock()
	e.learnLocked(now, &answer)
	old, lasts := e.term, e.limit.lease().Microseconds()
	// How long before its end a term is closed, so that what is left arrives in
	// time.
	margin := max(lasts/16, 2*old.took)
	e.isQueued = false
	if size > 0 && next.hold.IsZero() && now < old.end-margin && !l.isClosed.Load() {
		e.isSpare = true
		l.wakes.set(e, now, old.end-margin)
		e.mu.Unlock()
		return
	}
	e.term, e.isSpare = next, false
	isOver := next.hold.IsZero()
	if !isOver {
		if next.windowEnd == old.windowEnd {
			e.rest.tokens = min(e.rest.tokens+old.left, e.shape.burst-e.left) // which is about to come back
		}
		e.since, e.checks, e.asked = sent, e.checks-checks, e.asked-asked
		l.wakes.set(e, now, next.end-max(next.lasts/4, 4*next.took))
		if l.isClosed.Load() {
			l.enqueueLocked(e)
		}
	} else {
		l.wakes.drop(e)
	}
	e.mu.Unlock()

	if isOver {
		l.remove(e)
	}
	if !old.hold.IsZero() {
		l.giveBack(e, old)
	}
	e.metrics.count(!isOver, !old.hold.IsZero())
}

// wake gives the leases that were to be woken by the instant now to workers.
func (l *Leases) wake(now int64, due []*lease) {
	for _, e := range due {
		e.mu.Lock()
		// One that was renewed in this moment waits for another instant.
		if !e.isQueued && !e.hold.IsZero() && e.wakeAt <= now {
			l.enqueueLocked(e)
		}
		e.mu.Unlock()
	}
}

// take takes a term of so many tokens. It returns a zero term if the bucket has
// fewer, or if the store fails.
func (l *Leases) take(e *lease, sent, size int64) (t term, answer Verdict) {
	lasts := e.limit.lease()
	ctx, cancel := context.WithTimeout(context.Background(), lasts)
	defer cancel()
	charges := []Charge{{Limit: e.limit, Bucket: e.shape, Key: e.key, Cost: size, HoldFor: lasts}}
	verdicts := make([]Verdict, 1)
	l.lender.Take(ctx, charges, verdicts)
	answer = verdicts[0]
	if answer.Hold.IsZero() { // without a hold, tokens that were taken count as spent already
		return term{}, answer
	}
	t = term{hold: answer.Hold, left: size, took: l.now() - sent, lasts: lasts.Microseconds()}
	if e.shape.IsQuota() {
		t.lasts, t.windowEnd = min(t.lasts, answer.left.frac), answer.at+answer.left.frac
	}
	t.lasts -= t.lasts / 1000 // two clocks may differ in speed by a thousandth
	t.end = sent + t.lasts
	return t, answer
}

// giveBack settles a closed term.
func (l *Leases) giveBack(e *lease, t term) {
	ctx, cancel := context.WithTimeout(context.Background(), e.limit.lease())
	defer cancel()
	// If it fails, what the term holds counts as spent once the hold ends.
	s := Settlement{Limit: e.limit, Key: e.key, Hold: t.hold, Cost: t.hold.Tokens - t.left}
	l.lender.Settle(ctx, []Settlement{s}, make([]Settled, 1))
}

// Close gives back what is leased, and returns when that is done or ctx ends. All
// checks are then the other store's.
func (l *Leases) Close(ctx context.Context) {
	l.isClosed.Store(true)
	var all []*lease
	for i := range l.shards {
		s := &l.shards[i]
		s.mu.RLock()
		all = slices.AppendSeq(all, maps.Values(s.leases))
		s.mu.RUnlock()
	}
	for _, e := range all {
		e.mu.Lock()
		if !e.isQueued {
			l.enqueueLocked(e)
		}
		e.mu.Unlock()
	}
	stop := context.AfterFunc(ctx, func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		l.idle.Broadcast()
	})
	defer stop()
	l.mu.Lock()
	defer l.mu.Unlock()
	for l.workers > 0 && ctx.Err() == nil {
		l.idle.Wait()
	}
}
