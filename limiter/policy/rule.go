package policy

import (
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/sluiceproxy/sluice/limiter"
)

// rule is a compiled limit. It is immutable.
type rule struct {
	limit *limiter.Limit
	// twin is the limit in the other mode, for the overrides that have it; nil if
	// none does.
	twin *limiter.Limit
	// quota and quotaTwin are limit and twin for the second bucket of tiers with a
	// rate and a quota; nil if there are no such tiers.
	quota, quotaTwin *limiter.Limit
	tier             *tier
	match            match
	when             *expression // nil: the limit always applies
	key              []*expression
	// readable says that people see the parts of the key in plain text that are
	// hashed in Redis. It is false if there are none.
	readable  bool
	absent    absence
	cost      cost
	rateFrom  *rateFrom     // nil: the rate does not depend on the request
	settle    *cost         // what a request has cost once it has ended; nil: what was taken
	within    time.Duration // by when it must have ended, if settle is not nil
	group     string        // empty: in no group
	overrides *overrides
	prefix    string // of its Redis keys: everything before the key's parts
	singleKey string // the complete Redis key if the limit has no key
}

// tier is what a limit or an override grants, as text and as buckets, and the mode
// that an override has. Limits and overrides with the same text share a tier.
type tier struct {
	rate   string         // empty if there is only a quota
	bucket limiter.Bucket // zero if unlimited or none; the quota if there is no rate
	// quota is the second bucket if there are a rate and a quota, and zero otherwise.
	quota     limiter.Bucket
	quotaText string // as the config writes it; empty if there is none
	// unlimited and none report that there is no bucket: every request is allowed,
	// or denied.
	unlimited, none bool
	mode            string // of an override: enforce, shadow, or empty for the limit's
	plan            string // name of the plan that says what is granted; empty: none
}

// hasBucket reports whether the tier is neither unlimited nor none.
func (t *tier) hasBucket() bool { return !t.unlimited && !t.none }

// hasBoth reports whether the tier has two buckets, of a rate and of a quota.
func (t *tier) hasBoth() bool { return t.quota != limiter.Bucket{} }

// holds returns the most tokens that a request can take: the least that one of the
// buckets holds at most. It is 0 if there is no bucket.
func (t *tier) holds() int64 {
	if t.hasBoth() {
		return min(t.bucket.Burst(), t.quota.Burst())
	}
	return t.bucket.Burst()
}

// holder names the field of the config that says what holds returns.
func (t *tier) holder() string {
	if t.bucket.IsQuota() || t.hasBoth() && t.quota.Burst() < t.bucket.Burst() {
		return "quota"
	}
	return "burst"
}

// share returns the tier that this process limits by while the store fails, for a
// part of the rate and of the quota. The tier must have a bucket.
func (t *tier) share(part float64) *tier {
	s := *t
	s.bucket = t.bucket.Share(part)
	if t.hasBoth() {
		s.quota = t.quota.Share(part)
	}
	return &s
}

// quotaLimitOf is limitOf for the second bucket of a tier that has both.
func (r *rule) quotaLimitOf(t *tier) *limiter.Limit {
	if r.quotaTwin != nil && t.mode != "" && (t.mode == "shadow") != r.quota.Shadow {
		return r.quotaTwin
	}
	return r.quota
}

// keyOf returns the Redis key of a bucket, by the key that a rate's bucket has.
// Quotas have keys of their own, so that a limit may get a rate, or a quota in its
// place, and neither finds what the other stored.
func (r *rule) keyOf(b limiter.Bucket, key string) string {
	if !b.IsQuota() {
		return key
	}
	return r.quotaKey(key)
}

func (r *rule) quotaKey(key string) string {
	return strings.TrimSuffix(r.prefix, ":{") + quotaSuffix + ":{" + key[len(r.prefix):]
}

// limitOf returns the limit in the mode that a tier has.
func (r *rule) limitOf(t *tier) *limiter.Limit {
	if r.twin != nil && t.mode != "" && (t.mode == "shadow") != r.limit.Shadow {
		return r.twin
	}
	return r.limit
}

// hasBuckets reports whether the limit has a bucket for some key.
func (r *rule) hasBuckets() bool {
	return r.tier.hasBucket() || r.overrides != nil || r.rateFrom != nil
}

// expressions returns the limit's expressions about a request when it begins.
func (r *rule) expressions() (all []*expression) {
	candidates := append([]*expression{r.when, r.cost.expression}, r.key...)
	if r.rateFrom != nil {
		candidates = append(candidates, r.rateFrom.expression)
	}
	return slices.DeleteFunc(candidates, func(e *expression) bool { return e == nil })
}

// cost is what one request takes from the limit's bucket, or has cost, in tokens.
type cost struct {
	constant   int64 // used if expression is nil
	expression *expression
}

// text returns the cost as the config writes it.
func (c *cost) text() string {
	if c.expression != nil {
		return c.expression.text
	}
	return strconv.FormatInt(c.constant, 10)
}

// absence says what happens if a part of the limit's key is absent. It is the
// field absent of a limit.
type absence uint8

const (
	absentClient absence = iota // the client's network replaces the part
	absentShare                 // all such requests share a bucket
	absentSkip                  // the limit does not apply
	absentDeny                  // the request is denied
)

// absences are the values of the field absent.
var absences = map[string]absence{
	"client": absentClient,
	"share":  absentShare,
	"skip":   absentSkip,
	"deny":   absentDeny,
}

// String returns the value of the field absent.
func (a absence) String() string {
	for name, value := range absences {
		if value == a {
			return name
		}
	}
	return ""
}

// appliesIfAbsent reports whether the limit applies to a request for which its
// when is absent. It normally does, so that no client avoids a limit by
// omitting a header.
//
// There are three exceptions. In a group, a limit that applies keeps the later
// limits of the group, which may be stricter, from applying. An unlimited limit
// only ever grants. And a limit with the rate none would deny every request that
// omits the header. An override with the rate unlimited is no exception: its key must
// be present in the request, and without a group it has the same effect as a
// limit that does not apply.
func (r *rule) appliesIfAbsent() bool { return r.group == "" && r.tier.hasBucket() }

// appendPart appends the value of the key's part i to a bucket key.
func (r *rule) appendPart(key []byte, i int, value string, h *hasher) []byte {
	if r.key[i].open {
		return h.appendOpen(key, value)
	}
	return h.appendHash(key, value)
}

// appendShown appends the value of the key's part i to a key as people see it. If
// the limit is not readable, this is what appendPart does.
func (r *rule) appendShown(key []byte, i int, value string, h *hasher) []byte {
	if r.readable && !r.key[i].open {
		return h.appendReadable(key, value)
	}
	return r.appendPart(key, i, value, h)
}
