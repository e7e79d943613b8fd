package authz

import "hash/maphash"

// seed differs between processes, so no client can choose keys whose hashes
// collide.
var seed = maphash.MakeSeed()

func hashOf(key string) uint32 { return uint32(maphash.String(seed, key)) }

// hashIndex is an open-addressing hash table from the hash of a key to the
// position of the key in another array. It holds at most 128 positions, each
// below 255. With maps a check would hash its key once for each map, and a
// flood of new keys three times. The zero value is empty.
type hashIndex [256]hashSlot

type hashSlot struct {
	hash uint32
	at   uint8 // the position plus 1; 0 if the slot is empty
}

// find returns the position of a key with the given hash for which matches
// reports true.
func (x *hashIndex) find(hash uint32, matches func(at int) bool) (at int, ok bool) {
	for i := uint8(hash); x[i].at != 0; i++ {
		if at := int(x[i].at) - 1; x[i].hash == hash && matches(at) {
			return at, true
		}
	}
	return 0, false
}

// insert adds a position.
func (x *hashIndex) insert(hash uint32, at int) {
	i := uint8(hash)
	for x[i].at != 0 {
		i++
	}
	x[i] = hashSlot{hash, uint8(at + 1)}
}

// remove removes a position, which must be present. It moves later slots into
// the gap, so that find still reaches them.
func (x *hashIndex) remove(hash uint32, at int) {
	gap := uint8(hash)
	for int(x[gap].at) != at+1 {
		gap++
	}
	for i := gap + 1; x[i].at != 0; i++ {
		if home := uint8(x[i].hash); i-home >= i-gap { // the gap is between home and i
			x[gap], gap = x[i], i
		}
	}
	x[gap] = hashSlot{}
}
