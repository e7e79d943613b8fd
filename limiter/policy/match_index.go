package policy

import (
	"iter"
	"math/bits"
	"strings"
	"sync"
)

// index finds which of many matches fit a request's host, method and path, at a cost that hardly grows with their number: each of
// the three gives the set of matches that it fits, and the sets are intersected. Who sends the request is left to
// match.whoMismatches. It is safe for concurrent use.
type index struct {
	matches []*match
	words   int // of a set

	anyHost, anyMethod, anyPath members
	hosts                       map[string]members // names as they are
	domains                     map[string]members // what stands behind *.
	longestDomain               int                // in bytes: a client's host may have thousands of dots
	methods                     map[string]members
	paths                       *pathNode
	folded                      *pathNode // of matches that ignore case; nil where none does

	scratch sync.Pool // of *[]uint64: two sets
}

// set is a set of matches by their numbers, a bit each.
type set []uint64

// members are the matches that one pattern belongs to: their numbers or, where there are many, the set of them.
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

// pathNode is a tree of the patterns' segments.
type pathNode struct {
	named map[string]*pathNode
	any   *pathNode // {x}
	exact members   // of patterns that end here
	below members   // of patterns that go on with **
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

// with is m with the match i in it.
func (x *index) with(m members, i int) members {
	if m.set == nil && len(m.numbers) >= max(8, 2*x.words) { // from here on a set is smaller, and quicker to add
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

// child is the node of a segment below n; "" is any one.
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

// find yields, in order, the numbers of the matches that hold for a request.
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
				if n := i<<6 + bits.TrailingZeros64(w); x.matches[n].whoMismatches(s, which) == "" && !yield(n) {
					return
				}
			}
		}
	}
}

// addHost adds the matches that one reading of a host fits.
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

// find adds the patterns that a path, without its first slash, is one of. It does what pathPattern.matches does.
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
		case more && rest == "": // a trailing slash
			next.below.addTo(into)
		default:
			next.find(rest, into)
		}
	}
}
