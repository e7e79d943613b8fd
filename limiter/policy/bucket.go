package policy

import (
	"crypto/sha256"
	"fmt"
	"strings"

	"github.com/sluiceproxy/sluice/limiter"
)

// Bucket is one of the buckets of a limit of the file.
type Bucket struct {
	Charge limiter.Charge // of no cost
	Key    string         // as it stands in Redis between the braces
	Rate   string         // as the config writes it, of an override where one holds
}

// Bucket finds the bucket that requests with these parts of a limit's key have, in clear and in the file's order.
func (c *Config) Bucket(limit string, parts []string) (Bucket, error) {
	i, ok := c.byName[limit]
	if !ok {
		names := make([]string, len(c.rules))
		for i, l := range c.rules {
			names[i] = l.limit.Name
		}
		return Bucket{}, fmt.Errorf("the config has no limit %q; there are %s", limit, strings.Join(names, ", "))
	}
	l := c.rules[i]
	if len(parts) != len(l.key) {
		return Bucket{}, fmt.Errorf("%d parts of a key; the limit %s has %d", len(parts), limit, len(l.key))
	}
	b := Bucket{Key: noKey}
	tier := l.tier
	if len(parts) > 0 {
		var key []byte
		digests := make([]digest, len(parts))
		for i, part := range parts {
			if part == "" {
				return Bucket{}, fmt.Errorf("an empty part of a key, which no request has: it is absent there")
			}
			key = l.appendPart(key, i, part, &c.hasher)
			digests[i] = sha256.Sum256([]byte(part))
		}
		b.Key = string(key)
		if l.overrides != nil {
			if o, ok := l.overrides.find(digestOf(digests)); ok {
				tier = o.tier
			}
		}
	}
	if tier.unlimited {
		return Bucket{}, fmt.Errorf("the limit %s is unlimited for this key, and so has no bucket", limit)
	}
	b.Rate = tier.rate
	b.Charge = limiter.Charge{Limit: l.limit, Bucket: tier.bucket, Key: l.prefix + b.Key + "}"}
	return b, nil
}

// ByKey are the names of the file's limits that have buckets, those together whose keys are always the same. On a Redis Cluster such limits share
// a hash slot, whatever the request.
func (c *Config) ByKey() [][]string {
	var all [][]string
	seen := make(map[string]int)
	for _, l := range c.rules {
		if l.tier.unlimited && l.overrides == nil {
			continue
		}
		key := fmt.Sprint(l.absent) // what stands in for an absent part is in the key, too
		if len(l.key) == 0 {
			key = ""
		}
		for _, e := range l.key {
			key += "\x00" + e.text
		}
		i, ok := seen[key]
		if !ok {
			i = len(all)
			seen[key], all = i, append(all, nil)
		}
		all[i] = append(all[i], l.limit.Name)
	}
	return all
}
