package limiter

import (
	"sync/atomic"
	"time"
)

// busyKeys tells which keys are used often. It counts the uses of a key within the
// length of its lease in a table of 64 kB, in one of the eight slots that a hash
// may have: with one slot, keys that are used equally often would push each other
// out. If all eight belong to keys that are used more often, a key is not counted.
// The zero value is ready, and safe for concurrent use; a use may then be missed.
type busyKeys [1024][8]atomic.Uint64

// count counts a use of the key with a hash at an instant in microseconds, and
// returns how many there have been since the first of them, which is less than
// lasts ago; 0 if it is not counted. A key that has reached hotChecks may be
// forgotten. A use that was denied ends the count.
func (b *busyKeys) count(hash uint64, now int64, lasts time.Duration, isDenied bool) int {
	// A slot is 32 bits of the hash, 16 of the millisecond of the first use, and how
	// many uses there were.
	slots := &b[hash%uint64(len(b))]
	const starts, uses = 0xffff, 1<<16 - 1
	owner, at, period := hash&^(1<<32-1), uint64(now/1000)&starts, uint64(lasts.Milliseconds())
	var least *atomic.Uint64
	var oldest uint64
	fewest := uint64(uses)
	for i := range slots {
		known := slots[i].Load()
		n, age := known&uses, (at-known>>16)&starts
		if known&^(1<<32-1) == owner {
			if age >= period {
				n, known = 0, owner|at<<16
			}
			if n = min(n+1, uses); isDenied {
				n = 0
			}
			slots[i].Store(known&^uses | n)
			return int(n)
		}
		if age >= period || n >= hotChecks {
			n = 0
		}
		if n < fewest || n == fewest && age > oldest {
			least, fewest, oldest = &slots[i], n, age
		}
	}
	switch {
	case isDenied:
		return 0
	case fewest > 1:
		least.Add(^uint64(0))
		return 0
	}
	least.Store(owner | at<<16 | 1)
	return 1
}
