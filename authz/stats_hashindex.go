package authz

import "hash/maphash"

// seed is the hash's of all keys here: another in each process, so that no client can choose keys that fall together.
var seed = maphash.MakeSeed()

func hashOf(key string) uint32 { return uint32(maphash.String(seed, key)) }

// places says at which of at most half as many positions a key is kept, by its hash: a table with open addressing. With maps each check hashed its
// key for each of them, and a flood of new keys three times for each. The zero value is empty.
type places [256]place

type place struct {
	hash uint32
	at   uint8 // the position, and 1; 0: nobody is here
}

// find returns the position of a key with that hash for which is says so.
func (p *places) find(hash uint32, is func(at int) bool) (at int, ok bool) {
	for i := uint8(hash); p[i].at != 0; i++ {
		if at := int(p[i].at) - 1; p[i].hash == hash && is(at) {
			return at, true
		}
	}
	return 0, false
}

// put adds a position.
func (p *places) put(hash uint32, at int) {
	i := uint8(hash)
	for p[i].at != 0 {
		i++
	}
	p[i] = place{hash, uint8(at + 1)}
}

// remove takes away a position that is there, and closes the gap, so that what stands behind it is found.
func (p *places) remove(hash uint32, at int) {
	gap := uint8(hash)
	for int(p[gap].at) != at+1 {
		gap++
	}
	for i := gap + 1; p[i].at != 0; i++ {
		if home := uint8(p[i].hash); i-home >= i-gap { // it may stand at the gap, too
			p[gap], gap = p[i], i
		}
	}
	p[gap] = place{}
}
