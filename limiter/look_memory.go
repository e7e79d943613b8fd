package limiter

import "context"

// Looking returns a Store on the same buckets whose Take says what a take would be answered and takes nothing, for people who ask. Where
// there is no room for a key's bucket, it tells of a full one, and not of the one that such keys share.
func (m *Memory) Looking() Store { return lookingInMemory{m} }

type lookingInMemory struct{ memory *Memory }

func (l lookingInMemory) Take(_ context.Context, charges []Charge, verdicts []Verdict) {
	for i := range charges {
		c := &charges[i]
		s := &l.memory.shards[l.memory.shardOf(c.Key)]
		s.mu.Lock()
		stored, ok := s.buckets[c.Key]
		now := l.memory.now()
		s.mu.Unlock()
		at := c.Bucket.full()
		if ok {
			at, _ = draw(stored, c.Bucket, now)
		}
		verdicts[i] = c.Bucket.verdict(at, c.needs(), 0, MemorySource)
	}
}
