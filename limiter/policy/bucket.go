package policy

import (
	"cmp"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"net/url"
	"strings"

	"github.com/sluiceproxy/sluice/limiter"
)

// Bucket is a bucket of one of the file's limits.
type Bucket struct {
	Charge limiter.Charge // its Cost is 0
	// Rate is the rate as the config writes it: that of the key's override if
	// there is one, else the limit's.
	Rate string
	// Quota is the quota as the config writes it, if this is its bucket; else empty.
	Quota string
}

// BucketName identifies a bucket of a limit by the parts of its key, or by the
// key as sluice prints it.
type BucketName struct {
	Limit string
	// Parts are the parts of the key in plain text, in the order of the config.
	// Empty parts are absent if Absent is set, and an error otherwise.
	Parts []string
	// Key is the complete key as logs and metadata show it, or as in Redis. It
	// replaces Parts; empty if Parts are used.
	Key string
	// Absent says that the empty Parts are absent, or all parts if there are no
	// Parts. Client is then the client's address, if the limit has absent:
	// client, and empty otherwise.
	Absent bool
	Client string
}

// Bucket finds a bucket of one of the file's limits. It returns an error if the
// limit is unknown, if the name does not fit the limit's key, or if the limit
// has no bucket for that key, as its rate is unlimited or none.
//
// If Key contains an HMAC, the override of that key cannot be found, and the
// bucket has the limit's own rate.
func (c *Config) Bucket(name BucketName) (Bucket, error) {
	r := c.ruleOf(name.Limit)
	if r == nil {
		var names []string
		for _, l := range c.BucketLimits() {
			names = append(names, l.Name)
		}
		return Bucket{}, fmt.Errorf("unknown limit %q; the config has: %s", name.Limit,
			cmp.Or(strings.Join(names, ", "), "none"))
	}
	var key, shown []byte
	var tier *tier // of the key's override
	if name.Key != "" {
		if err := r.checkKey(name.Key); err != nil {
			return Bucket{}, err
		}
		key, shown = r.storedKey(name.Key, &c.hasher), []byte(name.Key)
		if sum, ok := c.hasher.digestOfKey(name.Key); ok && r.overrides != nil {
			if o, ok := r.overrides.lookup(sum); ok {
				tier = o.tier
			}
		}
	} else {
		var err error
		if key, shown, tier, err = c.keyOf(r, name); err != nil {
			return Bucket{}, err
		}
	}
	isOwn := tier == nil
	if isOwn {
		tier = r.tier
	}
	if r.rateFrom != nil && isOwn && !tier.hasBucket() {
		// Requests that bring a rate have a bucket, of at most this shape.
		most, err := r.rateFrom.tierOf(broughtRate{tokens: r.rateFrom.tokens, period: r.rateFrom.period}, r.tier)
		if err != nil {
			return Bucket{}, err
		}
		most.rate, tier = r.rateFrom.max, most
	}
	switch {
	case tier.unlimited:
		return Bucket{}, fmt.Errorf("limit %s is unlimited for this key and has no bucket", name.Limit)
	case tier.none:
		return Bucket{}, fmt.Errorf("limit %s denies every request with this key (rate: none) and has no bucket", name.Limit)
	}
	b := Bucket{
		Rate: tier.rate,
		Charge: limiter.Charge{
			Limit: r.limitOf(tier), Bucket: tier.bucket, Shown: string(shown), HoldFor: r.within,
		},
	}
	if isQuota := strings.HasSuffix(name.Limit, quotaSuffix); isQuota && tier.hasBoth() {
		b.Rate, b.Charge.Limit, b.Charge.Bucket = "", r.quotaLimitOf(tier), tier.quota
	} else if isQuota && !tier.bucket.IsQuota() {
		return Bucket{}, fmt.Errorf("limit %s has no quota for this key; write --limit %s", r.limit.Name, r.limit.Name)
	}
	if b.Charge.Bucket.IsQuota() {
		b.Quota = tier.quotaText
	}
	b.Charge.Key = r.keyOf(b.Charge.Bucket, r.prefix+string(key)+"}")
	return b, nil
}

// storedKey returns the key in Redis for a key as people see it.
func (r *rule) storedKey(shown string, h *hasher) []byte {
	if !r.readable {
		return []byte(shown)
	}
	var key []byte
	rest := shown
	for i, p := range KeyParts(shown) {
		text := rest[:p.length()]
		rest = rest[len(text):]
		value, err := url.PathUnescape(p.Text)
		if p.Kind == KeyOpen && err == nil {
			key = r.appendPart(key, i, value, h)
		} else {
			key = append(key, text...)
		}
	}
	return key
}

// checkKey reports why a key cannot be one of the limit's.
func (r *rule) checkKey(key string) error {
	if len(r.key) == 0 {
		if key != noKey {
			return fmt.Errorf("invalid key %q; limit %s has a single bucket, with the key %q", key, r.limit.Name, noKey)
		}
		return nil
	}
	parts, length := KeyParts(key), 0
	for _, p := range parts {
		length += p.length()
	}
	if len(parts) != len(r.key) || length != len(key) {
		return fmt.Errorf("invalid key %q for limit %s; want its %d parts as logs and metadata show them, such as "+
			"#43.<hash> or =4.POST",
			key, r.limit.Name, len(r.key))
	}
	return nil
}

// digestOfKey returns the digest of a printed key, by which overrides are
// looked up. ok is false if a part is absent or an HMAC.
func (h *hasher) digestOfKey(key string) (sum digest, ok bool) {
	var digests []digest
	for _, p := range KeyParts(key) {
		var d digest
		switch p.Kind {
		case KeyOpen:
			text, err := url.PathUnescape(p.Text)
			if err != nil {
				return sum, false
			}
			d = sha256.Sum256([]byte(text))
		case KeyHash:
			if n, err := base64.RawURLEncoding.Decode(d[:], []byte(p.Text)); err != nil || n != len(d) ||
				len(h.secret) > 0 {
				return sum, false
			}
		default:
			return sum, false
		}
		digests = append(digests, d)
	}
	if len(digests) == 0 {
		return sum, false
	}
	return digestOf(digests), true
}

// keyOf returns the key that requests with a name's parts have, as in Redis and as
// people see it, and the tier of the key's override; nil if it has none.
func (c *Config) keyOf(r *rule, name BucketName) (key, shown []byte, t *tier, err error) {
	parts := name.Parts
	if name.Absent && len(parts) == 0 {
		parts = make([]string, len(r.key))
	}
	switch {
	case len(r.key) == 0 && len(parts) > 0:
		return nil, nil, nil, fmt.Errorf("limit %s has no key, but a single bucket; omit --key", r.limit.Name)
	case len(parts) != len(r.key):
		var names []string
		for _, e := range r.key {
			names = append(names, e.text)
		}
		return nil, nil, nil, fmt.Errorf("want %d key parts for limit %s, not %d; write --key once for each of %s",
			len(r.key), r.limit.Name, len(parts), strings.Join(names, ", "))
	case len(r.key) == 0 && name.Absent:
		return nil, nil, nil, fmt.Errorf("limit %s has no key, so none can be absent", r.limit.Name)
	case len(r.key) == 0:
		return []byte(noKey), []byte(noKey), nil, nil
	}
	standIn := ""
	if name.Absent {
		if standIn, err = r.standIn(name.Client); err != nil {
			return nil, nil, nil, err
		}
	}
	digests := make([]digest, len(parts))
	whole := true
	for i, part := range parts {
		switch {
		case part == "" && name.Absent:
			key, shown = c.hasher.appendAbsent(key, standIn), c.hasher.appendAbsent(shown, standIn)
			whole = false
			continue
		case part == "":
			return nil, nil, nil, errEmptyPart
		}
		if part, err = r.key[i].canonicalPart(part); err != nil {
			return nil, nil, nil, fmt.Errorf("part %d of the key, %s: %w", i+1, r.key[i].text, err)
		}
		key, shown = r.appendPart(key, i, part, &c.hasher), r.appendShown(shown, i, part, &c.hasher)
		digests[i] = sha256.Sum256([]byte(part))
	}
	if name.Absent && whole {
		return nil, nil, nil, errors.New("no key part is absent; give an absent part as an empty one")
	}
	if whole && r.overrides != nil {
		if o, ok := r.overrides.lookup(digestOf(digests)); ok {
			return key, shown, o.tier, nil
		}
	}
	return key, shown, nil, nil
}

// standIn returns what replaces an absent part in the limit's keys.
func (r *rule) standIn(client string) (string, error) {
	address := parseAddr(client)
	switch {
	case r.absent == absentSkip:
		return "", fmt.Errorf("limit %s has absent: skip, so requests without a key have no bucket", r.limit.Name)
	case r.absent == absentDeny:
		return "", fmt.Errorf("limit %s has absent: deny, so requests without a key have no bucket", r.limit.Name)
	case r.absent == absentShare && client != "":
		return "", fmt.Errorf("limit %s has absent: share, so requests without a key share one bucket; omit the "+
			"address", r.limit.Name)
	case r.absent == absentShare:
		return "", nil
	case !address.IsValid():
		return "", fmt.Errorf("limit %s has absent: client, so requests without a key have one bucket for each "+
			"client network; write --absent=ADDRESS with the client's address", r.limit.Name)
	}
	return network(address), nil
}

// ByKey returns the names of the file's limits that have buckets, grouped so
// that limits in one group always have the same key. On a Redis Cluster the
// buckets of such limits share a hash slot for every request.
func (c *Config) ByKey() [][]string {
	var all [][]string
	seen := make(map[string]int)
	for _, r := range c.rules {
		if !r.hasBuckets() {
			continue
		}
		key := fmt.Sprint(r.absent) // what replaces an absent part belongs to the key
		if len(r.key) == 0 {
			key = ""
		}
		for _, e := range r.key {
			key += "\x00" + e.text
		}
		i, ok := seen[key]
		if !ok {
			i = len(all)
			seen[key], all = i, append(all, nil)
		}
		all[i] = append(all[i], r.limit.Name)
	}
	return all
}
