// Package policy says which buckets a request draws from: it reads the config, finds the limits that apply to a request, and
// makes the keys of their buckets. Plain strings come in (Request), charges go out (Config.Draw).
package policy

import (
	"slices"
	"time"

	"github.com/sluiceproxy/sluice/limiter"
)

// Config is a config that was read, checked and compiled. It is safe for concurrent use.
type Config struct {
	Domain        string
	Listen        Listen
	ListenTLS     *ListenTLS            // of Listen.GRPC; nil: none
	Redis         *limiter.RedisOptions // nil: the buckets are in this process
	FailureStatus int                   // the HTTP status of a refused request, 500 to 599
	Headers       Headers
	Grace         time.Duration // for what is in flight at the end; 0 or more
	LogLevel      string        // debug, info, warn or error

	// Hash names the config: 16 hex digits of a hash of its text and of its overrides_files. Secrets are not in it.
	Hash string

	// Warnings are of what is allowed and hardly meant, in the file's order; at most 200.
	Warnings Mistakes

	rules        []*rule
	index        *index         // of the rules' matches
	byName       map[string]int // the rules
	exempt       *index
	client       clientIP
	hasher       hasher
	passwordFile bool // Redis's password is that of a file
	// sentinelPasswordFile is whether the sentinels' password is that of a file.
	sentinelPasswordFile bool
	inherited            limitReader // what a route's limit has of the file
	routes               routeTable

	noRouteLimits bool     // Envoy's routes bring no limits
	routeDomains  []string // for which they may; nil: any
}

// Listen is where the sidecar listens: host:port each, or for GRPC also unix:///path.
type Listen struct {
	GRPC    string // for Envoy's checks
	Admin   string // for its operators
	Metrics string // /metrics, /healthz, /readyz
}

// Headers says which headers an answer has.
type Headers struct {
	XRateLimit bool // x-ratelimit-limit, -remaining, -reset
	RetryAfter bool // retry-after, on a denial
	RateLimit  bool // the IETF's RateLimit and RateLimit-Policy
}

// Limits are the file's, in its order.
func (c *Config) Limits() []*limiter.Limit {
	limits := make([]*limiter.Limit, len(c.rules))
	for i, r := range c.rules {
		limits[i] = r.limit
	}
	return limits
}

// Has reports whether l is one of Limits. A limit of a route is not, whatever
// its name.
func (c *Config) Has(l *limiter.Limit) bool {
	i, ok := c.byName[l.Name]
	return ok && c.rules[i].limit == l
}

// KeyPrefix is what all keys in Redis begin with, before the domain.
func (c *Config) KeyPrefix() string { return c.inherited.keyPrefix }

// FailsClosed reports whether an enforced limit of the file refuses requests while the store does not answer.
func (c *Config) FailsClosed() bool {
	return slices.ContainsFunc(c.rules, func(r *rule) bool {
		return !r.limit.Shadow && r.limit.OnFailure == limiter.Deny
	})
}

// ReadsMetadata reports whether an expression of the file reads what Envoy's filters leave behind, such as the claims of a JWT: only who
// stands after these filters is told.
func (c *Config) ReadsMetadata() bool {
	return slices.ContainsFunc(c.rules, func(r *rule) bool {
		return slices.ContainsFunc(append([]*expression{r.when, r.cost.expression}, r.key...), func(e *expression) bool {
			return e != nil && e.metadata
		})
	})
}

// Replaces reports why c cannot take the place of old while the sidecar runs: what listens, and the store, are for its whole life. The
// error is a Mistakes.
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
		// A file with the password is there to change while the sidecar runs.
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

// hasSentinelsOf reports whether sentinels are reached as in old, apart from a
// password that both have from a file.
func (c *Config) hasSentinelsOf(old *Config) bool {
	a, b := c.Redis.Sentinel, old.Redis.Sentinel
	if a == nil || b == nil {
		return a == b
	}
	samePassword := a.Password == b.Password || c.sentinelPasswordFile && old.sentinelPasswordFile
	return a.Username == b.Username && samePassword && equal(a.TLS, b.TLS)
}

// SentinelPasswordChanged reports whether the sentinels' password is another than
// in old, which takes a restart.
func (c *Config) SentinelPasswordChanged(old *Config) bool {
	return c.Redis != nil && old.Redis != nil && c.Redis.Sentinel != nil && old.Redis.Sentinel != nil &&
		c.Redis.Sentinel.Password != old.Redis.Sentinel.Password
}

// equal reports whether both are nil, or point to equal values.
func equal[T comparable](a, b *T) bool { return a == b || a != nil && b != nil && *a == *b }
