package limiter

import "sync/atomic"

// busyKeys tells which keys are used often. It counts the uses of a key within a
// period in a table of a fixed size: a key whose slot another key uses more
// often is not counted. The zero value is ready, and safe for concurrent use; a
// use may then be missed.
type busyKeys [4096]atomic.Uint64

// count counts a use of the key with a hash, and returns how many there have been
// in the period; 0 if the slot is another key's.
func (b *busyKeys) count(hash uint64, period int64) int {
	// A slot is 32 bits of the hash, 16 of the period, and how many uses there
	// were.
	slot := &b[hash%uint64(len(b))]
	owner := hash&^(1<<32-1) | uint64(period&0xffff)<<16
	const uses = 1<<16 - 1
	switch known := slot.Load(); {
	case known&^uses == owner:
		if known&uses < uses {
			known++
			slot.Store(known)
		}
		return int(known & uses)
	case (known^owner)&(0xffff<<16) == 0 && known&uses > 1: // another key, in this period
		slot.Store(known - 1)
		return 0
	}
	slot.Store(owner | 1)
	return 1
}
