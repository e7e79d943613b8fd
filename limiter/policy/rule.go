package policy

import (
	"github.com/sluiceproxy/sluice/limiter"
)

// rule is a compiled limit. It is not changed any more.
type rule struct {
	limit     *limiter.Limit
	tier      *tier
	match     match
	when      *expression // nil: always
	key       []*expression
	absent    absence
	cost      cost
	group     string // empty: none
	overrides *overrides
	share     float64 // this process's part of it while Redis fails; 0: none
	prefix    string  // of its keys, up to and with the brace
	singleKey string  // the whole key of its one bucket, where it has no key
}

// tier is a rate and a burst, as the config writes them and as a bucket. Limits and overrides that say the same share one.
type tier struct {
	rate      string
	bucket    limiter.Bucket // none where unlimited
	unlimited bool
}

// cost is what a request costs.
type cost struct {
	constant   int64       // where there is no expression
	expression *expression // or nil
}

// absence says what becomes of a limit that has a part of its key absent.
type absence uint8

const (
	absentClient absence = iota // the client's network takes its place
	absentShare                 // all such requests share a bucket
	absentSkip                  // the limit does not apply
	absentDeny                  // the request is denied
)

// appliesIfAbsent reports whether the limit applies where its when is absent, so that leaving something out slips past no limit. In a group
// it does not apply, or it would keep the limits behind it, which may be stricter, from counting. An unlimited one does not either: all
// that it does is to grant. The rate of an override is not asked: only a key that is there has one, and alone an override that is unlimited
// grants as much as a limit that does not apply.
func (r *rule) appliesIfAbsent() bool { return r.group == "" && !r.tier.unlimited }

// appendPart appends a part of the limit's key that is there.
func (r *rule) appendPart(key []byte, i int, value string, h *hasher) []byte {
	if r.key[i].open {
		return h.appendOpen(key, value)
	}
	return h.appendHash(key, value)
}
