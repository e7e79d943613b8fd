package limiter

import (
	"context"
	"hash/maphash"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"
)

const (
	// maxMemory is the most that is kept in process, in bytes: a million buckets
	// with keys of 60 bytes.
	maxMemory = 1_000_000 * (60 + entryOverhead)
	// entryOverhead is what an entry of a table takes beside its key, in bytes:
	// measured with keys of 40 to 450 bytes and rounded up.
	entryOverhead = 220
	// maxOverflow is how many limits have an overflow bucket of their own. The
	// names of routes' limits are anybody's who reaches the sidecar.
	maxOverflow = 10_000
	// sweepEvery is how often full buckets are dropped. A sweep over a million
	// takes some 50 ms of one core, and holds no lock for longer than a fraction
	// of a millisecond.
	sweepEvery = 5 * time.Second
	// shards is how many locks the buckets are under.
	shards = 256
)

// Memory is the Store that keeps its buckets in this process: no other sidecar
// sees them, and they end with the process. It is safe for concurrent use.
//
// Its size is bounded: once its budget in bytes is used up, the new keys of a limit
// share one overflow bucket, as a bucket that is not full is never dropped. Run
// drops the buckets that are full in every shape that has used them.
type Memory struct {
	seed     maphash.Seed
	shards   [shards]shard
	overflow shard        // by domain and limit; locked after any other shard
	entries  atomic.Int64 // buckets in shards
	bytes    atomic.Int64 // that they take
	budget   int64        // of bytes
	now      func() int64 // microseconds of a monotonic clock
	// wall is the time in microseconds since 1970, which the windows of quotas go
	// by.
	wall func() int64
	log  *zap.Logger

	sweeps, swept prometheus.Counter
	shared        prometheus.Counter
	sharedBefore  atomic.Int64 // takes from overflow buckets since the last sweep
}

type shard struct {
	mu      sync.Mutex
	buckets map[string]state
	_       [48]byte // a cache line of its own
}

var _ Store = (*Memory)(nil)

// MemoryBudget returns how many bytes a process may use for buckets and
// ceilings: enough for a million buckets with keys of 60 bytes, or a quarter of
// GOMEMLIMIT if that is less. A Memory takes all of it; a Fallback and a
// Ceiling share it.
func MemoryBudget() int64 {
	limit := debug.SetMemoryLimit(-1) // asks, and changes nothing
	return min(maxMemory, limit/4)
}

// entrySize is about how many bytes an entry with a key takes.
func entrySize(key string) int64 { return int64(len(key)) + entryOverhead }

// NewMemory returns an empty store that keeps its buckets in about so many
// bytes (see MemoryBudget). A nil log logs nothing.
func NewMemory(budget int64, log *zap.Logger, metrics prometheus.Registerer) *Memory {
	start := time.Now()
	return newMemory("buckets", budget, func() int64 { return time.Since(start).Microseconds() }, log, metrics)
}

// newMemory is NewMemory with a name for its metrics, and a clock.
func newMemory(name string, budget int64, now func() int64, log *zap.Logger, metrics prometheus.Registerer) *Memory {
	if log == nil {
		log = zap.NewNop()
	}
	table := prometheus.Labels{"table": name}
	m := &Memory{
		seed:   maphash.MakeSeed(),
		budget: budget,
		now:    now,
		wall:   func() int64 { return time.Now().UnixMicro() },
		log:    log,
		sweeps: newSweeps(table),
		swept:  newSwept(table),
		shared: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "sluice_overflow_takes_total",
			Help: "Total number of takes from a bucket that new keys of a limit share " +
				"because the table of buckets is full.",
			ConstLabels: table,
		}),
	}
	for i := range m.shards {
		m.shards[i].buckets = make(map[string]state)
	}
	m.overflow.buckets = make(map[string]state)
	metrics.MustRegister(m.sweeps, m.swept, m.shared, newEntries(table, &m.entries))
	return m
}

// newSweeps, newSwept and newEntries return the metrics that every table in
// this process has, with the label table.
func newSweeps(table prometheus.Labels) prometheus.Counter {
	return prometheus.NewCounter(prometheus.CounterOpts{
		Name: "sluice_janitor_sweeps_total", Help: "Total number of sweeps over a table kept in process.", ConstLabels: table,
	})
}

func newSwept(table prometheus.Labels) prometheus.Counter {
	return prometheus.NewCounter(prometheus.CounterOpts{
		Name:        "sluice_janitor_swept_total",
		Help:        "Total number of entries that sweeps dropped, such as buckets that were full again.",
		ConstLabels: table,
	})
}

func newEntries(table prometheus.Labels, entries *atomic.Int64) prometheus.GaugeFunc {
	return prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "sluice_janitor_entries", Help: "Number of entries kept in process.", ConstLabels: table,
	}, func() float64 { return float64(entries.Load()) })
}

// Take is Store's. It waits only for locks, and ignores the deadline of ctx.
func (m *Memory) Take(_ context.Context, charges []Charge, verdicts []Verdict) {
	var few [4]slot // hardly a request has more
	slots := few[:min(len(charges), len(few))]
	if len(charges) > len(few) {
		slots = make([]slot, len(charges))
	}
	for i := range charges {
		h, s := m.shardOf(charges[i].Key), &slots[i]
		s.shard, s.index, s.key = &m.shards[h], h, charges[i].Key
	}
	unlock := m.lock(slots)
	clocks := m.read()

	shared := false
	for i := range charges {
		c, s := &charges[i], &slots[i]
		now := clocks.of(c.Bucket)
		stored, ok := s.shard.buckets[s.key]
		if !ok && !m.reserve(s.key) {
			if !shared {
				m.overflow.mu.Lock()
				shared = true
			}
			s.shard, s.key = &m.overflow, m.overflowKeyLocked(overflowOf(c.Limit, c.Key), c.Bucket.IsQuota())
			stored, ok = s.shard.buckets[s.key]
			m.shared.Inc()
			m.sharedBefore.Add(1)
		} else {
			s.reserved = !ok
		}
		if ok {
			s.size = stored.holds.size()
			s.next, s.moved, s.expired = stored.next(c.Bucket, now)
		} else {
			s.next = newState(c.Bucket, now)
		}
		verdicts[i] = Verdict{Allowed: s.next.levelFor(c.Bucket).tokens >= c.needs(), Source: MemorySource}
	}
	spends := outcomeOf(charges, verdicts).Spends()
	for i := range charges {
		c, s := &charges[i], &slots[i]
		isTaken := verdicts[i].Allowed && (spends || c.Limit.Shadow)
		before, life, held := s.next.levelFor(c.Bucket), c.life(), Hold{}
		var taken int64
		if isTaken {
			taken = c.Cost
			// Two charges may be in the bucket of all further limits, so it has no
			// holds.
			if life > 0 && s.key != furtherLimits && s.key != furtherQuotas && m.bytes.Load() <= m.budget {
				held = s.next.hold(taken, life, newBirth())
				s.moved = true
			} else {
				s.next.level.tokens -= taken
			}
		}
		if taken > 0 || s.moved {
			s.shard.buckets[s.key] = s.next
			m.bytes.Add(s.next.holds.size() - s.size)
		} else if s.reserved {
			m.release(1, entrySize(s.key)) // nothing was taken from the full bucket: it stays absent
		}
		verdicts[i] = c.verdict(before, s.next.held(), taken, MemorySource)
		verdicts[i].at, verdicts[i].taken, verdicts[i].Hold = s.next.at, isTaken, held
		if c.HoldFor > 0 {
			verdicts[i].Expired = s.expired
		}
	}
	if shared {
		m.overflow.mu.Unlock()
	}
	unlock()
}

// ReadOnly returns a Store on the same buckets whose Take returns the verdicts
// that a take would get, and takes nothing. A key that would share an overflow
// bucket gets the verdicts of a full one.
func (m *Memory) ReadOnly() Store { return readOnlyMemory{m} }

type readOnlyMemory struct{ memory *Memory }

func (l readOnlyMemory) Take(_ context.Context, charges []Charge, verdicts []Verdict) {
	for i := range charges {
		c := &charges[i]
		s := &l.memory.shards[l.memory.shardOf(c.Key)]
		s.mu.Lock()
		stored, ok := s.buckets[c.Key]
		clocks, held := l.memory.read(), int64(0)
		now := clocks.of(c.Bucket)
		fresh := newState(c.Bucket, now)
		at := fresh.levelFor(c.Bucket)
		if ok {
			at, held = levelAt(stored, c.Bucket, now)
		}
		s.mu.Unlock()
		verdicts[i] = c.verdict(at, held, 0, MemorySource)
	}
}

// lower makes a bucket hold at most so many tokens. It does nothing if there is
// no room for the bucket.
func (m *Memory) lower(key string, b Bucket, most int64) {
	s := &m.shards[m.shardOf(key)]
	s.mu.Lock()
	defer s.mu.Unlock()
	stored, ok := s.buckets[key]
	if !ok && !m.reserve(key) {
		return // other keys use the overflow bucket, too
	}
	clocks := m.read()
	next := newState(b, clocks.of(b))
	if ok {
		size := stored.holds.size()
		next, _, _ = stored.next(b, next.at)
		m.bytes.Add(next.holds.size() - size)
	}
	if over := next.levelFor(b).tokens - most; over >= 0 {
		next.level = level{tokens: next.level.tokens - over}
	}
	s.buckets[key] = next
}

// Settle settles holds, and fills results[i] with what became of settlements[i].
// The slices have the same length. It waits only for locks, and ignores the
// deadline of ctx.
func (m *Memory) Settle(_ context.Context, settlements []Settlement, results []Settled) {
	for i := range settlements {
		s := &settlements[i]
		of := &m.shards[m.shardOf(s.Key)]
		of.mu.Lock()
		results[i] = m.settleLocked(of, s.Key, s)
		of.mu.Unlock()
		if results[i].Known {
			continue
		}
		expired := results[i].Expired
		m.overflow.mu.Lock()
		for _, key := range []string{overflowOf(s.Limit, s.Key), furtherLimits, furtherQuotas} {
			results[i] = m.settleLocked(&m.overflow, key, s)
			expired += results[i].Expired
			if results[i].Known {
				break
			}
		}
		m.overflow.mu.Unlock()
		results[i].Expired = expired
	}
}

func (m *Memory) settleLocked(of *shard, key string, s *Settlement) Settled {
	stored, ok := of.buckets[key]
	if !ok {
		return Settled{}
	}
	size := stored.holds.size()
	now := m.now()
	if stored.quota != nil {
		now = m.wall()
	}
	next, moved, expired := stored.settling(now)
	r := next.settle(s.Hold, s.Cost)
	r.Expired = expired
	if moved || r.Known && !r.Repeated {
		of.buckets[key] = next
		m.bytes.Add(next.holds.size() - size)
	}
	return r
}

// clocks are a Memory's clocks at an instant.
type clocks struct {
	now, wall int64
	memory    *Memory
}

// read reads the clock of the buckets that are no quotas.
func (m *Memory) read() clocks { return clocks{now: m.now(), memory: m} }

// of returns the instant by the clock that a bucket goes by. All quotas have the
// same one.
func (c *clocks) of(b Bucket) int64 {
	if !b.IsQuota() {
		return c.now
	}
	return c.ofQuotas()
}

func (c *clocks) ofQuotas() int64 {
	if c.wall == 0 {
		c.wall = c.memory.wall()
	}
	return c.wall
}

// reserve counts one more bucket, unless there is no room for it.
func (m *Memory) reserve(key string) bool {
	size := entrySize(key)
	if m.bytes.Add(size) > m.budget {
		m.bytes.Add(-size)
		return false
	}
	m.entries.Add(1)
	return true
}

func (m *Memory) release(entries int, bytes int64) {
	m.entries.Add(int64(-entries))
	m.bytes.Add(-bytes)
}

// The keys of the buckets that all limits share which have no overflow bucket of
// their own.
const furtherLimits, furtherQuotas = "", "quotas"

// overflowOf returns the key of the bucket that the new keys of a limit share: what
// is before the braces of their own key, where quotas and rates differ.
func overflowOf(l *Limit, key string) string {
	if shared, _, ok := strings.Cut(key, ":{"); ok {
		return shared
	}
	return l.Domain + ":" + l.Name
}

// overflowKeyLocked returns an overflow bucket's key. If there are too many such
// buckets, it is that of one for all further limits.
func (m *Memory) overflowKeyLocked(key string, isQuota bool) string {
	if _, ok := m.overflow.buckets[key]; !ok && len(m.overflow.buckets) >= maxOverflow {
		if isQuota {
			return furtherQuotas
		}
		return furtherLimits
	}
	return key
}

func (m *Memory) shardOf(key string) int { return int(maphash.String(m.seed, key) % shards) }

// slot is the place of one charge's bucket, and what the bucket holds.
type slot struct {
	shard    *shard
	index    int
	key      string
	next     state // what follows
	expired  int   // holds
	size     int64 // of the holds that are stored
	moved    bool  // the state has to be stored even if nothing is taken
	reserved bool  // the key is new, and counted in entries already
}

// lock locks the shards of slots, each once and in the order of their indexes,
// so that takes cannot deadlock. It returns the function that unlocks them.
func (m *Memory) lock(slots []slot) (unlock func()) {
	if len(slots) == 1 {
		slots[0].shard.mu.Lock()
		return slots[0].shard.mu.Unlock
	}
	indexes := make([]int, len(slots))
	for i := range slots {
		indexes[i] = slots[i].index
	}
	slices.Sort(indexes)
	indexes = slices.Compact(indexes)
	for _, i := range indexes {
		m.shards[i].mu.Lock()
	}
	return func() {
		for _, i := range indexes {
			m.shards[i].mu.Unlock()
		}
	}
}

// Run sweeps every few seconds until ctx ends.
func (m *Memory) Run(ctx context.Context) {
	tick := time.NewTicker(sweepEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			m.sweep()
		}
	}
}

// sweep drops the buckets that are full in every shape that has used them.
func (m *Memory) sweep() {
	var swept int
	for i := range m.shards {
		n, keys, held := m.shards[i].sweep(m)
		m.release(n, keys+held)
		swept += n
	}
	_, _, held := m.overflow.sweep(m) // only its holds are counted in bytes
	m.release(0, held)
	m.sweeps.Inc()
	m.swept.Add(float64(swept))
	if n := m.sharedBefore.Swap(0); n > 0 {
		m.log.Warn("the table of buckets is full: new keys of a limit share one bucket",
			zap.Int64("buckets", m.entries.Load()), zap.Int64("takes", n))
	}
}

// sweep returns how many buckets it dropped, and the bytes that these and their
// holds took.
func (s *shard) sweep(m *Memory) (swept int, keys, held int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	now, wall := m.now(), m.wall()
	for key, stored := range s.buckets {
		at := now
		if stored.quota != nil {
			at = wall
		}
		if at-stored.at >= stored.keepFor().Microseconds() {
			delete(s.buckets, key)
			swept, keys, held = swept+1, keys+entrySize(key), held+stored.holds.size()
		}
	}
	if swept > 0 && len(s.buckets) == 0 {
		s.buckets = make(map[string]state) // a map that was large keeps its memory
	}
	return swept, keys, held
}
