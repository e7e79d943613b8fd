package limiter

import "sync/atomic"

// busyKeys tells which keys are used often. It counts the uses of a key within a
// period in a table of 64 kB, in one of the eight slots that a hash may have: with
// one slot, keys that are used equally often would push each other out. If all
// eight belong to keys that are used more often, a key is not counted. The zero
// value is ready, and safe for concurrent use; a use may then be missed.
type busyKeys [1024][8]atomic.Uint64

// count counts a use of the key with a hash, and returns how many there have been
// in the period; 0 if it is not counted. A key that has reached hotChecks may be
// forgotten. A use that was denied ends the count.
func (b *busyKeys) count(hash uint64, period int64, isDenied bool) int {
	// A slot is 32 bits of the hash, 16 of the period, and how many uses there
	// were.
	slots := &b[hash%uint64(len(b))]
	const periods, uses = 0xffff << 16, 1<<16 - 1
	owner := hash&^(periods|uses) | uint64(period)<<16&periods
	var least *atomic.Uint64
	fewest := uint64(uses)
	for i := range slots {
		known := slots[i].Load()
		n := known & uses
		if known&^uses == owner {
			if n = min(n+1, uses); isDenied {
				n = 0
			}
			slots[i].Store(owner | n)
			return int(n)
		}
		if (known^owner)&periods != 0 || n >= hotChecks {
			n = 0
		}
		if n < fewest {
			least, fewest = &slots[i], n
		}
	}
	switch {
	case isDenied:
		return 0
	case fewest > 1:
		least.Add(^uint64(0))
		return 0
	}
	least.Store(owner | 1)
	return 1
}
