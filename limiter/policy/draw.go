package policy

import (
	"crypto/sha256"
	"net/netip"

	"github.com/sluiceproxy/sluice/limiter"
)

// Draw is the result of Config.Draw: what a request takes from which buckets.
type Draw struct {
	// Exempt reports that an exemption of the config matches the request. The
	// other fields are then empty.
	Exempt bool
	// Client is the address that the config takes for the request's client. It
	// is invalid if that is unknown.
	Client netip.Addr
	// Charges has one entry for each limit that applies, except the unlimited ones:
	// the limits of the file in its order, then those of the route. One with the
	// rate none has no bucket (limiter.Charge.HasBucket). One with a rate and a quota
	// has a second entry, for the quota.
	Charges []limiter.Charge
	// Unlimited lists the limits that apply with the rate unlimited. They have
	// no bucket.
	Unlimited []*limiter.Limit
	// Mistakes are the config's mistakes that this request reveals, such as an
	// expression that fails. Invalid reports that one of them belongs to a
	// limit that is not in shadow mode; Charges is then incomplete, and the
	// request must be refused.
	Mistakes []*RuleError
	Invalid  bool
}

// Draw finds the limits that apply to a request, and returns what the request
// takes from their buckets. It takes nothing itself. It is safe for concurrent
// use.
func (c *Config) Draw(req *Request) Draw { return c.DrawInto(req, nil) }

// DrawInto is Draw, except that the result's Charges use the memory of buf if
// they fit: a caller that draws for many requests need not allocate for each.
func (c *Config) DrawInto(req *Request, buf []limiter.Charge) Draw {
	s := newSubject(req, &c.client)
	for range c.exempt.find(s, allReadings) {
		return Draw{Exempt: true}
	}
	d := drawing{Draw: Draw{Client: s.client}, subject: s, hasher: &c.hasher, buf: buf[:0]}
	route := c.route(s.Context)
	d.usual = min(4, len(c.rules)+len(route.limits))
	d.addMistakes(route.mistakes...)
	for i := range c.index.find(s, anyReading) {
		if route.considers(i) {
			d.consider(c.rules[i])
		}
	}
	for _, e := range route.limits {
		if e.rule != nil && e.rule.match.mismatch(s, anyReading) == "" {
			d.consider(e.rule)
		}
	}
	return d.Draw
}

// drawing is the state of a Draw that is being computed.
type drawing struct {
	Draw
	subject *subject
	hasher  *hasher
	// groups has, of each group, the limit that applies. It is the first one.
	groups []*rule
	buf    []limiter.Charge // the memory of Charges
	usual  int              // for how many Charges to make room at first; hardly a request has more
	// keyBuf and digests are memory for the key that is being made.
	keyBuf  [256]byte
	digests [maxKeyParts]digest
}

func (d *drawing) addMistakes(mistakes ...*RuleError) {
	for _, m := range mistakes {
		d.Mistakes = append(d.Mistakes, m)
		d.Invalid = d.Invalid || !m.Shadow
	}
}

// finding is the decision about one limit for one request, with its reason.
type finding struct {
	applies    bool
	kind       findingKind
	whenAbsent bool   // the limit applies although its when is absent
	refused    bool   // absent: deny, and a part of the key is absent
	field      string // of the match that does not hold
	other      *rule  // the limit of the group that applies
	part       int    // index of the key's first absent part
	err        *RuleError
	tier       *tier
	brought    broughtRate // by rate_from
	keyDigest  digest      // of the overridden key
	key        string      // complete Redis key; empty if unlimited
	shown      string      // the key as people see it, if the limit is readable
	cost       int64
}

// findingKind is the reason of a finding.
type findingKind uint8

const (
	foundApplies    findingKind = iota // the limit applies
	foundOverridden                    // it applies, with the rate of an override
	foundPartAbsent                    // it applies, although a part of the key is absent
	foundExempt
	foundMismatch
	foundWhenFalse
	foundWhenAbsent // when is absent, and the limit does not apply then
	foundSkipped    // absent: skip, and a part of the key is absent
	foundGroupTaken
	foundOff      // switched off by the route
	foundReplaced // replaced by the route's limit of the same name
	foundUnlisted // not in the route's sluice.limits
	foundMistake
)

// consider decides about a limit whose match holds, and records its charge.
func (d *drawing) consider(r *rule) (f finding) {
	if r.group != "" {
		for _, first := range d.groups {
			if first.group == r.group {
				return finding{kind: foundGroupTaken, other: first}
			}
		}
	}
	d.judge(r, &f)
	switch {
	case f.err != nil:
		d.addMistakes(f.err)
	case !f.applies:
	case f.tier.unlimited:
		d.Unlimited = append(d.Unlimited, r.limitOf(f.tier))
	default:
		if d.Charges == nil {
			if d.Charges = d.buf; d.Charges == nil {
				d.Charges = make([]limiter.Charge, 0, d.usual)
			}
		}
		d.charge(r, &f, r.limitOf(f.tier), f.tier.bucket)
		if f.tier.hasBoth() {
			d.charge(r, &f, r.quotaLimitOf(f.tier), f.tier.quota)
		}
	}
	if f.applies && r.group != "" {
		d.groups = append(d.groups, r)
	}
	return f
}

// charge records the charge of one bucket of a limit that applies.
func (d *drawing) charge(r *rule, f *finding, l *limiter.Limit, b limiter.Bucket) {
	d.Charges = append(d.Charges, limiter.Charge{
		Limit: l, Bucket: b, Key: r.keyOf(b, f.key), Shown: f.shown, Cost: f.cost, Refused: f.refused,
		HoldFor: r.within,
	})
}

// judge sets f, which must be zero, to whether a limit whose match holds applies,
// and what it costs.
func (d *drawing) judge(r *rule, f *finding) {
	f.applies, f.tier, f.cost = true, r.tier, r.cost.constant
	mistake := func(field string, err error) {
		*f = finding{kind: foundMistake,
			err: &RuleError{Limit: r.limit.Name, Field: field, Err: err, Shadow: r.limitOf(f.tier).Shadow}}
	}
	if r.when != nil {
		holds, known, err := r.when.condition(d.subject)
		switch {
		case err != nil:
			mistake("when", err)
			return
		case known && !holds:
			*f = finding{kind: foundWhenFalse}
			return
		case !known && !r.appliesIfAbsent():
			*f = finding{kind: foundWhenAbsent}
			return
		}
		f.whenAbsent = !known
	}
	if len(r.key) == 0 {
		f.key = r.singleKey
	} else if err := d.makeKey(r, f); err != nil {
		mistake("key", err)
		return
	}
	if !f.applies {
		return
	}
	if r.rateFrom != nil && f.kind != foundOverridden {
		var err error
		if f.brought, err = r.rateFrom.evaluate(d.subject); err == nil && f.brought.isKnown {
			var t *tier
			if t, err = r.rateFrom.tierOf(f.brought, r.tier); err == nil {
				f.tier = t
			}
		}
		if err != nil {
			mistake("rate_from", err)
			return
		}
	}
	if f.tier.unlimited {
		f.key = ""
	}
	if r.cost.expression != nil {
		var err error
		if f.cost, err = r.cost.expression.tokens(d.subject, 1, maxCost); err != nil {
			mistake("cost", err)
			return
		}
	}
	f.refused = f.kind == foundPartAbsent && r.absent == absentDeny
}

// makeKey sets f's bucket key for a limit that has a key, and the tier of the
// key's override if there is one. It clears f.applies if a part is absent and
// the limit has absent: skip.
func (d *drawing) makeKey(r *rule, f *finding) error {
	key := append(d.keyBuf[:0], r.prefix...)
	var shown []byte
	if r.readable {
		shown = make([]byte, 0, 128)
	}
	for i, e := range r.key {
		value, err := e.keyPart(d.subject)
		switch {
		case err != nil:
			return err
		case value != "":
			if r.overrides != nil {
				d.digests[i] = sha256.Sum256([]byte(value))
			}
			key = r.appendPart(key, i, value, d.hasher)
			if r.readable {
				shown = r.appendShown(shown, i, value, d.hasher)
			}
			continue
		}
		if f.kind != foundPartAbsent {
			f.kind, f.part = foundPartAbsent, i
		}
		standIn := ""
		switch r.absent {
		case absentSkip:
			f.applies, f.kind = false, foundSkipped
			return nil
		case absentClient:
			standIn = network(d.subject.client)
		default:
		}
		key = d.hasher.appendAbsent(key, standIn)
		if r.readable {
			shown = d.hasher.appendAbsent(shown, standIn)
		}
	}
	f.key, f.shown = string(append(key, '}')), string(shown)
	if r.overrides == nil || f.kind == foundPartAbsent {
		return nil
	}
	sum := digestOf(d.digests[:len(r.key)])
	if o, ok := r.overrides.lookup(sum); ok {
		f.kind, f.tier, f.keyDigest = foundOverridden, o.tier, sum
	}
	return nil
}
