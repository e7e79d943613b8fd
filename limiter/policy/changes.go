package policy

import (
	"bytes"
	"maps"
	"reflect"
	"slices"
)

// Changes are the differences between two configs, as a log tells them. They
// contain names only, no values.
type Changes struct {
	// Added, Removed and Changed are the names of limits, in the order of the
	// file that has them. A limit that was renamed was removed and added.
	Added, Removed, Changed []string
	// Settings are the other fields of the file that changed, sorted by name.
	Settings []string
}

// Since returns what changed from old to c. Fields that need a restart
// (Replaces) are not among the changes.
func (c *Config) Since(old *Config) (changes Changes) {
	for _, r := range c.rules {
		switch i, ok := old.byName[r.limit.Name]; {
		case !ok:
			changes.Added = append(changes.Added, r.limit.Name)
		case !r.same(old.rules[i]):
			changes.Changed = append(changes.Changed, r.limit.Name)
		}
	}
	for _, r := range old.rules {
		if _, ok := c.byName[r.limit.Name]; !ok {
			changes.Removed = append(changes.Removed, r.limit.Name)
		}
	}
	for field, changed := range map[string]bool{
		"domain":         c.Domain != old.Domain,
		"listen.tls":     !reflect.DeepEqual(c.certificate(), old.certificate()),
		"routes":         c.noRouteLimits != old.noRouteLimits || !slices.Equal(c.routeDomains, old.routeDomains),
		"failure_status": c.FailureStatus != old.FailureStatus,
		"headers":        c.Headers != old.Headers,
		"grace":          c.Grace != old.Grace,
		"log_level":      c.LogLevel != old.LogLevel,
		"client_ip":      !reflect.DeepEqual(c.client, old.client),
		"exempt":         !reflect.DeepEqual(c.exempt.matches, old.exempt.matches),
		"plans":          !samePlans(c.inherited.plans, old.inherited.plans),
		"key_secret":     !bytes.Equal(c.hasher.secret, old.hasher.secret),
		"password":       c.password() != old.password(),
	} {
		if changed {
			changes.Settings = append(changes.Settings, field)
		}
	}
	slices.Sort(changes.Settings)
	return changes
}

// certificate returns the server's certificate chain, or nil.
func (c *Config) certificate() [][]byte {
	if c.ListenTLS == nil {
		return nil
	}
	return c.ListenTLS.Certificate.Certificate
}

// password returns the password of Redis, or "".
func (c *Config) password() string {
	if c.Redis == nil {
		return ""
	}
	return c.Redis.Password
}

// same reports whether two limits of the same name decide alike.
func (r *rule) same(old *rule) bool {
	return *r.limit == *old.limit && equal(r.twin, old.twin) && equal(r.quota, old.quota) && *r.tier == *old.tier &&
		r.within == old.within && r.group == old.group && r.readable == old.readable &&
		r.absent == old.absent && r.prefix == old.prefix && r.cost.text() == old.cost.text() &&
		sameRateFrom(r.rateFrom, old.rateFrom) &&
		sameSettle(r.settle, old.settle) && sameText(r.when, old.when) && slices.EqualFunc(r.key, old.key, sameText) &&
		reflect.DeepEqual(r.match, old.match) && r.overrides.same(old.overrides)
}

func sameSettle(a, b *cost) bool {
	if a == nil || b == nil {
		return a == b
	}
	return a.text() == b.text()
}

// sameText reports whether two expressions are written alike. Both may be nil.
func sameText(a, b *expression) bool {
	if a == nil || b == nil {
		return a == b
	}
	return a.text == b.text
}

// same reports whether two limits have the same overrides, wherever they are
// written. Both may be nil.
func (o *overrides) same(old *overrides) bool {
	if o == nil || old == nil {
		return o == old
	}
	sameRate := func(a, b override) bool { return *a.tier == *b.tier }
	return maps.EqualFunc(o.inline, old.inline, sameRate) && maps.EqualFunc(o.file, old.file, sameRate)
}
