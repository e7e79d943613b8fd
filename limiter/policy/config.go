// Package policy decides which buckets a request draws from: it reads the
// config, finds the limits that apply to a request, and makes the keys of their
// buckets. It takes plain strings (Request) and returns charges (Config.Draw).
package policy

import (
	"slices"
	"strings"
	"time"

	"github.com/sluiceproxy/sluice/limiter"
)

// Config is a config that was read, checked and compiled. It is immutable,
// except for a cache of what Envoy's routes say, and safe for concurrent use.
type Config struct {
	Domain        string
	Listen        Listen
	ListenTLS     *ListenTLS            // for Listen.GRPC; nil: no TLS
	Redis         *limiter.RedisOptions // nil: buckets are kept in memory
	FailureStatus int                   // HTTP status of refused requests, 500 to 599
	Headers       Headers
	Grace         time.Duration // for requests in flight at shutdown; >= 0
	LogLevel      string        // debug, info, warn or error

	// Hash identifies the config: 16 hex digits of a hash of its text and of
	// its overrides files. It does not cover secrets.
	Hash string

	// Warnings are valid settings that are unlikely to be intended, in the
	// order of the file. There are at most 200.
	Warnings Mistakes
	// timeoutAt is where store.redis.timeout is, or store.redis.
	timeoutAt Mistake

	rules  []*rule
	index  *index         // of the rules' matches
	byName map[string]int // indexes of rules
	exempt *index
	client clientIP
	hasher hasher
	// passwordFile and sentinelPasswordFile report that the password of Redis,
	// or of its sentinels, is read from a file.
	passwordFile         bool
	sentinelPasswordFile bool
	inherited            limitReader // settings of the file that routes' limits inherit
	routes               routeTable

	noRouteLimits bool     // routes.limits is false
	routeDomains  []string // routes.domains; nil: any domain
}

// Listen has the sidecar's listen addresses: host:port, or for GRPC also
// unix:///path.
type Listen struct {
	GRPC    string // Envoy's checks
	Admin   string // the operators' page and API
	Metrics string // /metrics, /healthz, /readyz
}

// Headers says which headers answers have.
type Headers struct {
	XRateLimit bool // x-ratelimit-limit, -remaining, -reset
	RetryAfter bool // retry-after, on denials
	RateLimit  bool // the IETF's RateLimit and RateLimit-Policy
}

// Limits returns the limits of the file, in its order. Limits of routes are not
// among them.
func (c *Config) Limits() []*limiter.Limit {
	limits := make([]*limiter.Limit, len(c.rules))
	for i, r := range c.rules {
		limits[i] = r.limit
	}
	return limits
}

// BucketLimits returns Limits and, after each that has a rate and a quota, the limit
// of its second bucket.
func (c *Config) BucketLimits() (limits []*limiter.Limit) {
	for _, r := range c.rules {
		limits = append(limits, r.limit)
		if r.quota != nil {
			limits = append(limits, r.quota)
		}
	}
	return limits
}

// ruleOf returns the limit that a bucket's limit is of, by its name; nil if the
// file has none.
func (c *Config) ruleOf(name string) *rule {
	name, isQuota := strings.CutSuffix(name, quotaSuffix)
	i, ok := c.byName[name]
	if !ok || isQuota && c.rules[i].quota == nil {
		return nil
	}
	return c.rules[i]
}

// LimitOfKey returns the name of the limit whose buckets have a name in their Redis
// keys. It is the same, except for quotas: in keys they have a suffix, and the limit
// has it only if it, or an override, has a rate and a quota.
func (c *Config) LimitOfKey(name string) string {
	if limit, isQuota := strings.CutSuffix(name, quotaSuffix); isQuota && c.ruleOf(name) == nil {
		return limit
	}
	return name
}

// Has reports whether l is one of InEachMode. A route's limit is not, even if it
// has the name of one.
func (c *Config) Has(l *limiter.Limit) bool {
	r := c.ruleOf(l.Name)
	return r != nil && (r.limit == l || r.twin == l || r.quota == l || r.quotaTwin == l)
}

// InEachMode returns BucketLimits, and those that overrides put into the other mode
// also in that one.
func (c *Config) InEachMode() []*limiter.Limit {
	limits := c.BucketLimits()
	for _, r := range c.rules {
		for _, twin := range []*limiter.Limit{r.twin, r.quotaTwin} {
			if twin != nil {
				limits = append(limits, twin)
			}
		}
	}
	return limits
}

// KeyPrefix returns store.redis.key_prefix, with which all Redis keys begin.
// The domain follows it.
func (c *Config) KeyPrefix() string { return c.inherited.keyPrefix }

// Mode returns the file's mode: enforce, or shadow if nothing in it denies.
func (c *Config) Mode() string { return c.inherited.mode }

// FailsClosed reports whether the file has an enforced limit with on_failure:
// deny and a bucket, which refuses requests while the store fails.
func (c *Config) FailsClosed() bool {
	return slices.ContainsFunc(c.rules, func(r *rule) bool {
		isEnforced := !r.limit.Shadow || r.twin != nil
		return isEnforced && r.limit.OnFailure == limiter.Deny && r.hasBuckets()
	})
}

// ReadsMetadata reports whether an expression of the file reads the dynamic
// metadata of Envoy's filters, such as the claims of a JWT. Envoy sends it only
// to filters that run after those.
func (c *Config) ReadsMetadata() bool {
	return slices.ContainsFunc(c.rules, func(r *rule) bool {
		return slices.ContainsFunc(r.expressions(), func(e *expression) bool { return e.metadata })
	})
}

// Replaces returns nil if c can replace old while the sidecar runs. Otherwise
// it returns Mistakes that name the fields which differ but need a restart: the
// listen addresses and the store.
func (c *Config) Replaces(old *Config, file string) error {
	var m Mistakes
	refuse := func(field string, changed bool) {
		if changed {
			m = append(m, Mistake{File: file, Field: field, Message: "changed; a restart is needed to apply it"})
		}
	}
	refuse("listen.grpc", c.Listen.GRPC != old.Listen.GRPC)
	refuse("listen.tls", !c.ListenTLS.same(old.ListenTLS))
	refuse("listen.admin", c.Listen.Admin != old.Listen.Admin)
	refuse("listen.metrics", c.Listen.Metrics != old.Listen.Metrics)
	refuse("store.redis", (c.Redis == nil) != (old.Redis == nil))
	if c.Redis != nil && old.Redis != nil {
		refuse("store.redis.username", c.Redis.Username != old.Redis.Username)
		// A password that is read from a file may change while the sidecar
		// runs.
		refuse("store.redis.password", c.Redis.Password != old.Redis.Password && (!c.passwordFile || !old.passwordFile))
		refuse("store.redis.url", c.Redis.URL != old.Redis.URL)
		refuse("store.redis.mode", c.Redis.Mode != old.Redis.Mode)
		refuse("store.redis.addresses", !slices.Equal(c.Redis.Addresses, old.Redis.Addresses))
		refuse("store.redis.master", c.Redis.Master != old.Redis.Master)
		refuse("store.redis.tls", !equal(c.Redis.TLS, old.Redis.TLS))
		refuse("store.redis.sentinel", !c.hasSentinelsOf(old))
		refuse("store.redis.timeout", c.Redis.Timeout != old.Redis.Timeout)
		refuse("store.redis.key_prefix", c.inherited.keyPrefix != old.inherited.keyPrefix)
	}
	if m == nil {
		return nil
	}
	return m
}

// hasSentinelsOf reports whether sentinels are accessed as in old, except for a
// password that both configs read from a file.
func (c *Config) hasSentinelsOf(old *Config) bool {
	a, b := c.Redis.Sentinel, old.Redis.Sentinel
	if a == nil || b == nil {
		return a == b
	}
	samePassword := a.Password == b.Password || c.sentinelPasswordFile && old.sentinelPasswordFile
	return a.Username == b.Username && samePassword && equal(a.TLS, b.TLS)
}

// SentinelPasswordChanged reports whether the sentinels' password differs from
// that in old. A restart is needed to apply it.
func (c *Config) SentinelPasswordChanged(old *Config) bool {
	return c.Redis != nil && old.Redis != nil && c.Redis.Sentinel != nil && old.Redis.Sentinel != nil &&
		c.Redis.Sentinel.Password != old.Redis.Sentinel.Password
}

// equal reports whether both are nil, or point to equal values.
func equal[T comparable](a, b *T) bool { return a == b || a != nil && b != nil && *a == *b }
