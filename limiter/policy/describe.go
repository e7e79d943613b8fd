package policy

import (
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/sluiceproxy/sluice/limiter"
)

// Described is a limit as the config writes it, for display.
type Described struct {
	Limit *limiter.Limit
	Rate  string // empty if there is only a quota, or this is its bucket
	Quota string // empty if this is not the bucket of a quota
	Plan  string // the name of the plan that says the rate and the quota; empty: none
	// RateFrom and MaxRate are the fields rate_from and max_rate; empty if the rate
	// does not depend on the request.
	RateFrom, MaxRate string
	// Twin is the limit in the other mode; nil if no override has that.
	Twin  *limiter.Limit
	Burst int64 // tokens; 0 if the rate is unlimited or none
	// FillTime is how long an empty bucket takes to be full; 0 if there is no
	// bucket.
	FillTime  time.Duration
	Key       []string // expressions of the key's parts; empty: no key
	Group     string   // empty: in no group
	Overrides int      // number of overrides
	Settle    string   // what a request has cost, once it has ended; empty: what was taken
	// SettleWithin is by when a request must have ended. It is 0 without Settle.
	SettleWithin time.Duration
	// Bucket is the shape of the buckets of keys without an override, and Tokens
	// and Period are its rate. They are zero if the rate is unlimited or none.
	Bucket limiter.Bucket
	Tokens int64
	Period time.Duration
	Absent string // what an absent part of the key does: client, share, skip or deny
	// Reads names what the limit reads of a request, in ascending order, as the
	// config writes it: request.method, request.headers["x-api-key"].
	Reads []string
}

// Describe returns the file's limits, in its order. After one with a rate and a quota
// that of its second bucket follows.
func (c *Config) Describe() []Described {
	all := make([]Described, 0, len(c.rules))
	for _, r := range c.rules {
		d := Described{Limit: r.limit, Twin: r.twin, Plan: r.tier.plan, Rate: r.tier.rate, Burst: r.tier.bucket.Burst(),
			Group: r.group, Bucket: r.tier.bucket, Absent: r.absent.String(), Reads: c.reads(r)}
		if r.tier.rate != "" {
			d.Tokens, d.Period, _ = parseRate(r.tier.rate) // it was parsed before
		}
		if d.Bucket.IsQuota() {
			d.Quota = r.tier.quotaText
		}
		if r.tier.hasBucket() {
			d.FillTime = r.tier.bucket.FillTime()
		}
		if r.rateFrom != nil {
			d.RateFrom, d.MaxRate = r.rateFrom.expression.text, r.rateFrom.max
		}
		for _, e := range r.key {
			d.Key = append(d.Key, e.text)
		}
		if r.settle != nil {
			d.Settle, d.SettleWithin = r.settle.text(), r.within
		}
		if r.overrides != nil {
			d.Overrides = len(r.overrides.inline) + len(r.overrides.file)
		}
		all = append(all, d)
		if r.quota != nil { // the limit itself may have none, but an override
			d.Limit, d.Twin, d.Rate, d.Quota, d.FillTime = r.quota, r.quotaTwin, "", "", 0
			d.Bucket, d.Burst, d.Tokens, d.Period = r.tier.quota, r.tier.quota.Burst(), 0, 0
			if r.tier.hasBoth() {
				d.Quota = r.tier.quotaText
			}
			all = append(all, d)
		}
	}
	return all
}

// KeyPart is one part of a bucket's key, for display.
type KeyPart struct {
	Kind KeyPartKind `json:"kind"`
	// Text is the escaped value of a KeyOpen, the hash of a KeyHash, and what
	// replaces the value of a KeyAbsent: the client's network or nothing.
	Text string `json:"text"`
}

// length returns the length of the part in the key in bytes.
func (p *KeyPart) length() int { return 2 + len(strconv.Itoa(len(p.Text))) + len(p.Text) }

// DurationText returns a duration as the config writes it: 1h, not 1h0m0s.
func DurationText(d time.Duration) string {
	s := d.String()
	if strings.HasSuffix(s, "m0s") {
		s = strings.TrimSuffix(s, "0s")
	}
	if strings.HasSuffix(s, "h0m") {
		s = strings.TrimSuffix(s, "0m")
	}
	return s
}

// RoughDuration returns a duration for people, in its two largest units: 21d,
// 3h 20m, 45s. Below a minute it is exact to the millisecond.
func RoughDuration(d time.Duration) string { return rough(d, time.Duration.Round) }

// RoughWait is RoughDuration for a time to wait, which it rounds up: less would
// be too short.
func RoughWait(d time.Duration) string {
	return rough(d, func(d, unit time.Duration) time.Duration {
		if down := d.Truncate(unit); down < d {
			return down + unit
		}
		return d
	})
}

// rough returns a duration in its two largest units, rounded to the smaller one.
func rough(d time.Duration, round func(d, unit time.Duration) time.Duration) string {
	if exact := round(d, time.Millisecond); exact < time.Minute {
		return exact.String()
	}
	const day = 24 * time.Hour
	large, small, names := day, time.Hour, "dh"
	switch { // by the larger unit after rounding to the smaller one
	case round(d, time.Second) < time.Hour:
		large, small, names = time.Minute, time.Second, "ms"
	case round(d, time.Minute) < day:
		large, small, names = time.Hour, time.Minute, "hm"
	}
	d = round(d, small)
	text := fmt.Sprintf("%d%c", d/large, names[0])
	if rest := d % large / small; rest > 0 {
		text += fmt.Sprintf(" %d%c", rest, names[1])
	}
	return text
}

// KeyPartKind says what the text of a part is.
type KeyPartKind string

// The kinds of KeyPart.
const (
	KeyOpen   KeyPartKind = "open"   // the value
	KeyHash   KeyPartKind = "hash"   // hash of the value
	KeyAbsent KeyPartKind = "absent" // replacement of an absent value
)

// KeyParts splits a bucket's key, as it is written in Redis between the braces.
// It returns nil for a limit without a key, and omits parts that are truncated.
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
