package authz

import (
	"cmp"
	"slices"
	"strings"
	"sync"
	"time"
)

// Who asks most, and who is denied most, is kept for each limit by the Space-Saving sketch (Metwally, Agrawal and El Abbadi: Efficient
// Computation of Frequent and Top-k Elements in Data Streams, 2005): so many keys have a counter, and a key that has none takes over the
// least one, with its count as the error. Every key with more than a 64th of a limit's requests is among them, whatever the others do. The
// sketch is some forty lines, and what is told needs its error and its window.

const (
	topKeys = 64 // counters of one sketch
	// topWindow is how long a sketch counts until another takes its place. What is told is of the last one and of this one.
	topWindow = 5 * time.Minute
	// maxTops is how many limits have sketches: some 20 kB each, and 64 kB more
	// where all keys are of longestTop.
	maxTops = 100
	// longestTop bounds a key's text; what is longer is cut, and told apart no more after that.
	longestTop = 256
)

// sketch counts keys. The zero value is an empty one.
type sketch struct {
	index  places // of keys in the arrays
	used   int    // of them
	keys   [topKeys]string
	hashes [topKeys]uint32
	counts [topKeys]uint64
	over   [topKeys]uint64 // by how much a count may be too high
	// No count is below least. One that equals it, if there is any, is looked for from next on, so that mostly few have to be looked at.
	least uint64
	next  int
}

// add counts a key, whose hash is given, as both sketches of a top want it.
func (s *sketch) add(key string, hash uint32) {
	if at, ok := s.find(key, hash); ok {
		s.counts[at]++
		return
	}
	at := s.used
	if at < topKeys {
		s.used++
	} else {
		at = s.leastAt()
		s.index.remove(s.hashes[at], at)
	}
	s.index.put(hash, at)
	s.keys[at], s.hashes[at], s.over[at] = key, hash, s.counts[at]
	s.counts[at]++
}

func (s *sketch) find(key string, hash uint32) (at int, ok bool) {
	return s.index.find(hash, func(at int) bool { return s.keys[at] == key })
}

// leastAt is where a least count stands.
func (s *sketch) leastAt() int {
	for {
		for range topKeys {
			at := s.next
			s.next = (at + 1) % topKeys
			if s.counts[at] == s.least {
				return at
			}
		}
		s.least = slices.Min(s.counts[:])
	}
}

// top is a limit's. It is safe for concurrent use.
type top struct {
	mu    sync.Mutex
	began time.Time  // when the current window did
	last  *[2]sketch // the window before, of requests and of denials
	now   *[2]sketch
}

func newTop() *top { return &top{last: new([2]sketch), now: new([2]sketch)} }

// add counts a request with a key of the limit's.
func (t *top) add(key string, denied bool, now time.Time) {
	if len(key) > longestTop {
		key = strings.Clone(key[:longestTop]) // and not the whole behind it
	}
	hash := hashOf(key)
	t.mu.Lock()
	defer t.mu.Unlock()
	t.turn(now)
	t.now[0].add(key, hash)
	if denied {
		t.now[1].add(key, hash)
	}
}

// turn begins another window where it is time to. The caller holds mu.
func (t *top) turn(now time.Time) {
	past := now.Sub(t.began)
	if past < topWindow {
		return
	}
	t.last, t.now = t.now, t.last
	*t.now = [2]sketch{}
	if past >= 2*topWindow { // nobody asked for a whole one
		*t.last = [2]sketch{}
	}
	t.began = now
}

// TopKey is a key that a limit saw often.
type TopKey struct {
	Key   string // as it stands in Redis between its braces
	Count uint64 // in the last five to ten minutes
	Over  uint64 // by how much Count may be too high, since keys took each other's place
}

// told returns the keys with the most requests, and those with the most denials, at most n each.
func (t *top) told(n int, now time.Time) (requests, denials []TopKey) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.turn(now)
	var both [2][]TopKey
	for i := range both {
		sums := make(map[string]TopKey)
		for _, s := range []*sketch{&t.now[i], &t.last[i]} {
			for at, key := range s.keys[:s.used] {
				k := sums[key]
				sums[key] = TopKey{Key: key, Count: k.Count + s.counts[at], Over: k.Over + s.over[at]}
			}
		}
		for _, k := range sums {
			both[i] = append(both[i], k)
		}
		slices.SortFunc(both[i], func(a, b TopKey) int { return cmp.Or(cmp.Compare(b.Count, a.Count), cmp.Compare(a.Key, b.Key)) })
		both[i] = both[i][:min(n, len(both[i]))]
	}
	return both[0], both[1]
}
