package policy

import (
	"iter"
	"math/bits"
	"strings"
	"sync"
)

// index finds the matches that hold for a request, among thousands, at a cost
// that hardly grows with their number. It looks up the set of matches for the
// host, for the method and for the path, and intersects the three. The
// remaining fields are checked by match.callerMismatch. An index is safe for
// concurrent use.
type index struct {
	matches []*match
	words   int // length of a set

	anyHost, anyMethod, anyPath members
	hosts                       map[string]members // full names
	domains                     map[string]members // of *.example.com: example.com
	longestDomain               int                // in bytes; bounds the lookups for a host of many labels
	methods                     map[string]members
	paths                       *pathNode
	folded                      *pathNode // for matches with ignore_case; nil if there are none

	scratch sync.Pool // holds *[]uint64 for two sets
}

// set is a bit set of matches, by their index.
type set []uint64

// members are the matches that contain one pattern: a list of their indexes, or
// a set if there are many.
type members struct {
	numbers []int32
	set     set
}

func (m members) addTo(s set) {
	for _, i := range m.numbers {
		s[i>>6] |= 1 << (i & 63)
	}
	for i, w := range m.set {
		s[i] |= w
	}
}

// pathNode is a node of a tree of path patterns, by their segments.
type pathNode struct {
	named map[string]*pathNode
	any   *pathNode // the child for {x}
	exact members   // patterns that end at this node
	below members   // patterns that continue with **
}

func newIndex(matches []*match) *index {
	x := &index{
		matches: matches,
		words:   (len(matches) + 63) / 64,
		hosts:   make(map[string]members),
		domains: make(map[string]members),
		methods: make(map[string]members),
		paths:   &pathNode{},
	}
	x.scratch.New = func() any {
		s := make([]uint64, 2*x.words)
		return &s
	}
	in := func(m map[string]members, key string, i int) { m[key] = x.with(m[key], i) }
	for i, m := range matches {
		if len(m.hosts) == 0 {
			x.anyHost = x.with(x.anyHost, i)
		}
		for _, h := range m.hosts {
			if behind, ok := strings.CutPrefix(h, "*."); ok {
				in(x.domains, behind, i)
				x.longestDomain = max(x.longestDomain, len(behind))
			} else {
				in(x.hosts, h, i)
			}
		}
		if len(m.methods) == 0 {
			x.anyMethod = x.with(x.anyMethod, i)
		}
		for _, method := range m.methods {
			in(x.methods, method, i)
			if method == "GET" {
				in(x.methods, "HEAD", i)
			}
		}
		if len(m.paths) == 0 {
			x.anyPath = x.with(x.anyPath, i)
		}
		root := x.paths
		if m.ignoreCase && len(m.paths) > 0 {
			if x.folded == nil {
				x.folded = &pathNode{}
			}
			root = x.folded
		}
		for _, p := range m.paths {
			n := root
			for _, segment := range p.segments {
				n = n.child(segment)
			}
			if p.rest {
				n.below = x.with(n.below, i)
			} else {
				n.exact = x.with(n.exact, i)
			}
		}
	}
	return x
}

// with returns m with match i added.
func (x *index) with(m members, i int) members {
	if m.set == nil && len(m.numbers) >= max(8, 2*x.words) { // a set is now smaller, and faster to add
		m.set = make(set, x.words)
		members{numbers: m.numbers}.addTo(m.set)
		m.numbers = nil
	}
	if m.set != nil {
		m.set[i>>6] |= 1 << (i & 63)
	} else {
		m.numbers = append(m.numbers, int32(i))
	}
	return m
}

// child returns the child of n for a segment, and creates it if necessary. The
// segment "" stands for {x}.
func (n *pathNode) child(segment string) *pathNode {
	if segment == "" {
		if n.any == nil {
			n.any = &pathNode{}
		}
		return n.any
	}
	if n.named == nil {
		n.named = make(map[string]*pathNode)
	}
	c := n.named[segment]
	if c == nil {
		c = &pathNode{}
		n.named[segment] = c
	}
	return c
}

// find yields the indexes of the matches that hold for a request, in ascending
// order.
func (x *index) find(s *subject, which reading) iter.Seq[int] {
	return func(yield func(int) bool) {
		if x.words == 0 {
			return
		}
		scratch := x.scratch.Get().(*[]uint64)
		defer x.scratch.Put(scratch)
		found, also := set((*scratch)[:x.words]), set((*scratch)[x.words:])

		clear(found)
		x.anyHost.addTo(found)
		for i, host := range s.hosts {
			if i > 0 && which == allReadings {
				clear(also)
				x.anyHost.addTo(also)
				x.addHost(host, also)
				found.intersect(also)
			} else {
				x.addHost(host, found)
			}
		}

		clear(also)
		x.anyMethod.addTo(also)
		x.methods[s.Method].addTo(also)
		found.intersect(also)

		clear(also)
		x.anyPath.addTo(also)
		for i, path := range s.paths {
			if i > 0 && which == allReadings {
				found.intersect(also)
				clear(also)
				x.anyPath.addTo(also)
			}
			x.paths.find(strings.TrimPrefix(path, "/"), also)
			if x.folded != nil {
				x.folded.find(strings.TrimPrefix(s.folded(which)[i], "/"), also)
			}
		}
		found.intersect(also)

		for i, w := range found {
			for ; w != 0; w &= w - 1 {
				if n := i<<6 + bits.TrailingZeros64(w); x.matches[n].callerMismatch(s, which) == "" && !yield(n) {
					return
				}
			}
		}
	}
}

// addHost adds to into the matches that have a pattern for the host.
func (x *index) addHost(host string, into set) {
	x.hosts[host].addTo(into)
	for i := max(1, len(host)-x.longestDomain-1); i < len(host); i++ {
		if host[i] == '.' {
			x.domains[host[i+1:]].addTo(into)
		}
	}
}

func (s set) intersect(with set) {
	for i := range s {
		s[i] &= with[i]
	}
}

// find adds to into the matches that have a pattern for the path, which is
// given without its leading slash. It agrees with pathPattern.matches.
func (n *pathNode) find(path string, into set) {
	n.below.addTo(into)
	if path == "" {
		n.exact.addTo(into)
		return
	}
	segment, rest, more := strings.Cut(path, "/")
	if segment == "" {
		return
	}
	for _, next := range [...]*pathNode{n.named[segment], n.any} {
		switch {
		case next == nil:
		case more && rest == "": // the path ends with a slash
			next.below.addTo(into)
		default:
			next.find(rest, into)
		}
	}
}
