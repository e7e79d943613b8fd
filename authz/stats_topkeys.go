package authz

import (
	"cmp"
	"slices"
	"strings"
	"sync"
	"time"
)

// The keys of a limit with the most requests and with the most denials are
// counted by the Space-Saving sketch (Metwally, Agrawal and El Abbadi: Efficient
// Computation of Frequent and Top-k Elements in Data Streams, 2005). It has a
// fixed number of counters. A key without a counter takes over the lowest one,
// whose count becomes the key's possible error. Every key with more than a 64th
// of the requests of a limit is among the counted ones, whatever the others do.

const (
	// sketchSize is the number of counters of a sketch.
	sketchSize = 64
	// topWindow is how long a sketch counts until it is replaced. The counts of
	// the current and the previous sketch are added up.
	topWindow = 5 * time.Minute
	// maxCountedLimits is the number of limits whose keys are counted. Their
	// sketches take some 20 kB for each limit, and 64 kB more if all keys have
	// maxTopKey bytes.
	maxCountedLimits = 100
	// maxTopKey is the maximum key length in bytes. Longer keys are truncated,
	// so keys with the same prefix are counted together.
	maxTopKey = 256
)

// sketch counts keys. The zero value is empty.
type sketch struct {
	index  hashIndex // of the keys in the arrays
	used   int       // the number of keys
	keys   [sketchSize]string
	hashes [sketchSize]uint32
	counts [sketchSize]uint64
	over   [sketchSize]uint64 // by how much a count may be too high
	// No count is below least. The search for a count that equals least starts
	// at next, so that it mostly looks at few.
	least uint64
	next  int
}

// add counts a key with the given hash.
func (s *sketch) add(key string, hash uint32) {
	if at, ok := s.find(key, hash); ok {
		s.counts[at]++
		return
	}
	at := s.used
	if at < sketchSize {
		s.used++
	} else {
		at = s.leastAt()
		s.index.remove(s.hashes[at], at)
	}
	s.index.insert(hash, at)
	s.keys[at], s.hashes[at], s.over[at] = key, hash, s.counts[at]
	s.counts[at]++
}

// find returns the position of a key.
func (s *sketch) find(key string, hash uint32) (at int, ok bool) {
	return s.index.find(hash, func(at int) bool { return s.keys[at] == key })
}

// leastAt returns the position of a lowest count.
func (s *sketch) leastAt() int {
	for {
		for range sketchSize {
			at := s.next
			s.next = (at + 1) % sketchSize
			if s.counts[at] == s.least {
				return at
			}
		}
		s.least = slices.Min(s.counts[:])
	}
}

// topKeys counts the keys of a limit. It is safe for concurrent use.
type topKeys struct {
	mu       sync.Mutex
	began    time.Time // when the current window began
	previous *window
	current  *window
}

// window has the sketches of one window.
type window struct{ requests, denials sketch }

func newTopKeys() *topKeys { return &topKeys{previous: new(window), current: new(window)} }

// add counts a request with a key.
func (t *topKeys) add(key string, denied bool, now time.Time) {
	if len(key) > maxTopKey {
		key = strings.Clone(key[:maxTopKey]) // does not keep the whole key in memory
	}
	hash := hashOf(key)
	t.mu.Lock()
	defer t.mu.Unlock()
	t.rotateLocked(now)
	t.current.requests.add(key, hash)
	if denied {
		t.current.denials.add(key, hash)
	}
}

// rotateLocked begins a new window if the current one is over.
func (t *topKeys) rotateLocked(now time.Time) {
	past := now.Sub(t.began)
	if past < topWindow {
		return
	}
	t.previous, t.current = t.current, t.previous
	*t.current = window{}
	if past >= 2*topWindow { // a whole window without a request
		*t.previous = window{}
	}
	t.began = now
}

// TopKey is a key with many requests or denials.
type TopKey struct {
	// Key is the part of the Redis key between its braces, at most 256 bytes.
	Key string
	// Count is the number of requests or denials in the last five to ten
	// minutes.
	Count uint64
	// Over is by how much Count may be too high, because the key has taken over
	// another key's counter.
	Over uint64
}

// list returns the keys with the most requests, and those with the most denials,
// at most n each.
func (t *topKeys) list(n int, now time.Time) (requests, denials []TopKey) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.rotateLocked(now)
	return highest(n, &t.current.requests, &t.previous.requests), highest(n, &t.current.denials, &t.previous.denials)
}

// highest returns at most n keys of two sketches with the highest sums of their
// counts, the highest first.
func highest(n int, current, previous *sketch) []TopKey {
	sums := make(map[string]TopKey)
	for _, s := range []*sketch{current, previous} {
		for at, key := range s.keys[:s.used] {
			k := sums[key]
			sums[key] = TopKey{Key: key, Count: k.Count + s.counts[at], Over: k.Over + s.over[at]}
		}
	}
	var all []TopKey
	for _, k := range sums {
		all = append(all, k)
	}
	slices.SortFunc(all, func(a, b TopKey) int {
		return cmp.Or(cmp.Compare(b.Count, a.Count), cmp.Compare(a.Key, b.Key))
	})
	return all[:min(n, len(all))]
}
