package policy

import (
	"strconv"
	"strings"

	"github.com/sluiceproxy/sluice/limiter"
)

// Described is a limit as its config writes it, for people.
type Described struct {
	Limit     *limiter.Limit
	Rate      string
	Burst     int64    // 0 where the rate is unlimited
	Key       []string // its parts' expressions; empty: one bucket for all
	Group     string   // empty: none
	Overrides int      // other rates for some keys
}

// Describe tells the file's limits, in its order.
func (c *Config) Describe() []Described {
	all := make([]Described, len(c.rules))
	for i, r := range c.rules {
		d := Described{Limit: r.limit, Rate: r.tier.rate, Burst: r.tier.bucket.Burst(), Group: r.group}
		for _, e := range r.key {
			d.Key = append(d.Key, e.text)
		}
		if r.overrides != nil {
			d.Overrides = len(r.overrides.inline) + len(r.overrides.file)
		}
		all[i] = d
	}
	return all
}

// KeyPart is one part of a bucket's key, for people.
type KeyPart struct {
	Kind KeyPartKind `json:"kind"`
	Text string      `json:"text"` // escaped; of a KeyHash the hash, of a KeyAbsent the network that takes its place, or nothing
}

// KeyPartKind says what a part's text is.
type KeyPartKind string

// The kinds.
const (
	KeyOpen   KeyPartKind = "open"   // the value
	KeyHash   KeyPartKind = "hash"   // its hash
	KeyAbsent KeyPartKind = "absent" // what stands in for a value that was absent
)

// KeyParts splits a bucket's key, as it stands in Redis between its braces. A limit without a key has none; what is cut is left out.
func KeyParts(key string) []KeyPart {
	kinds := map[byte]KeyPartKind{tagOpen: KeyOpen, tagHash: KeyHash, tagAbsent: KeyAbsent}
	var parts []KeyPart
	for key != "" {
		kind, ok := kinds[key[0]]
		length, rest, found := strings.Cut(key[1:], ".")
		n, err := strconv.Atoi(length)
		if !ok || !found || err != nil || n < 0 || n > len(rest) {
			break
		}
		parts = append(parts, KeyPart{kind, rest[:n]})
		key = rest[n:]
	}
	return parts
}
