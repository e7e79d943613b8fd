package policy

import (
	"crypto/sha256"

	"github.com/sluiceproxy/sluice/limiter"
)

// Draw is what a request owes.
type Draw struct {
	// Exempt says that the config leaves the request alone; the rest is then empty.
	Exempt bool
	// Charges has one for each limit that applies, in the file's order; those of the route's own limits come last.
	Charges []limiter.Charge
	// Unlimited are the limits that apply and have no bucket.
	Unlimited []*limiter.Limit
	// Mistakes of the config that the request shows. Where one is not of a shadow limit, Invalid says so, and nobody knows what the
	// request owes.
	Mistakes []*RuleError
	Invalid  bool
}

// Draw says what a request owes.
func (c *Config) Draw(req *Request) Draw {
	s := newSubject(req, &c.client)
	for range c.exempt.find(s, allReadings) {
		return Draw{Exempt: true}
	}
	d := drawing{subject: s, hasher: &c.hasher}
	on := c.route(s.Context)
	d.wrong(on.mistakes...)
	for i := range c.index.find(s, anyReading) {
		if on.considers(i) {
			d.consider(c.rules[i])
		}
	}
	for _, e := range on.limits {
		if e.rule != nil && e.rule.match.mismatch(s, anyReading) == "" {
			d.consider(e.rule)
		}
	}
	return d.Draw
}

// drawing is a Draw that is under way.
type drawing struct {
	Draw
	subject *subject
	hasher  *hasher
	groups  []*rule // the ones that count for their group
}

func (d *drawing) wrong(mistakes ...*RuleError) {
	for _, m := range mistakes {
		d.Mistakes = append(d.Mistakes, m)
		d.Invalid = d.Invalid || !m.Shadow
	}
}

// finding is what was found of a limit and a request, and why.
type finding struct {
	applies bool
	kind    findingKind
	field   string // of the match, where that does not hold
	other   *rule  // that comes first in the group
	part    int    // of the key, that is absent: its index
	whenIs  absentWhen
	err     *RuleError
	tier    *tier
	sum     digest // of an override's key
	key     string // whole; empty where unlimited
	cost    int64
	refused bool // as a part of the key is absent
}

// absentWhen says that a limit applies as its when is absent.
type absentWhen bool

// findingKind is what decided.
type findingKind uint8

const (
	foundApplies    findingKind = iota // the limit applies as it is
	foundOverridden                    // with an override's rate
	foundPartAbsent                    // a part of the key is absent, and it applies all the same
	foundExempt
	foundMismatch
	foundWhenFalse
	foundWhenAbsent // and the limit then does not apply
	foundSkipped    // as a part of the key is absent
	foundGroupTaken
	foundOff      // by the route
	foundReplaced // by the route's limit of the same name
	foundUnlisted // in the route's list
	foundMistake
)

// consider adds what the request owes a limit that it matches.
func (d *drawing) consider(r *rule) finding {
	if r.group != "" {
		for _, first := range d.groups {
			if first.group == r.group {
				return finding{kind: foundGroupTaken, other: first}
			}
		}
	}
	f := d.judge(r)
	switch {
	case f.err != nil:
		d.wrong(f.err)
	case !f.applies:
	case f.tier.unlimited:
		d.Unlimited = append(d.Unlimited, r.limit)
	default:
		if d.Charges == nil {
			d.Charges = make([]limiter.Charge, 0, 4) // most requests owe so few
		}
		c := limiter.Charge{Limit: r.limit, Bucket: f.tier.bucket, Key: f.key, Cost: f.cost, Refused: f.refused}
		if r.share > 0 {
			c.Local = c.Bucket.Share(r.share)
		}
		d.Charges = append(d.Charges, c)
	}
	if f.applies && r.group != "" {
		d.groups = append(d.groups, r)
	}
	return f
}

// judge says whether a limit that the request matches applies, and what the request then owes it.
func (d *drawing) judge(r *rule) finding {
	f := finding{applies: true, tier: r.tier, cost: r.cost.constant}
	mistake := func(field string, err error) finding {
		return finding{kind: foundMistake, err: &RuleError{Limit: r.limit.Name, Field: field, Err: err, Shadow: r.limit.Shadow}}
	}
	if r.when != nil {
		holds, known, err := r.when.condition(d.subject)
		switch {
		case err != nil:
			return mistake("when", err)
		case known && !holds:
			return finding{kind: foundWhenFalse}
		case !known && !r.appliesIfAbsent():
			return finding{kind: foundWhenAbsent}
		}
		f.whenIs = absentWhen(!known)
	}
	if len(r.key) == 0 {
		f.key = r.singleKey
	} else if err := d.makeKey(r, &f); err != nil {
		return mistake("key", err)
	}
	if !f.applies {
		return f
	}
	if f.tier.unlimited {
		f.key = ""
	}
	if r.cost.expression != nil {
		var err error
		if f.cost, err = r.cost.expression.tokens(d.subject); err != nil {
			return mistake("cost", err)
		}
	}
	f.refused = f.kind == foundPartAbsent && r.absent == absentDeny
	return f
}

// makeKey makes the key of a limit that has one, and finds the key's override.
func (d *drawing) makeKey(r *rule, f *finding) error {
	var few [256]byte
	key := append(few[:0], r.prefix...)
	var digests [maxKeyParts]digest
	for i, e := range r.key {
		value, err := e.keyPart(d.subject)
		switch {
		case err != nil:
			return err
		case value != "":
			if r.overrides != nil {
				digests[i] = sha256.Sum256([]byte(value))
			}
			key = r.appendPart(key, i, value, d.hasher)
			continue
		}
		if f.kind != foundPartAbsent {
			f.kind, f.part = foundPartAbsent, i
		}
		switch r.absent {
		case absentSkip:
			f.applies, f.kind = false, foundSkipped
			return nil
		case absentClient:
			key = d.hasher.appendAbsent(key, network(d.subject.client))
		default:
			key = d.hasher.appendAbsent(key, "")
		}
	}
	f.key = string(append(key, '}'))
	if r.overrides == nil || f.kind == foundPartAbsent {
		return nil
	}
	sum := digestOf(digests[:len(r.key)])
	if o, ok := r.overrides.lookup(sum); ok {
		f.kind, f.tier, f.sum = foundOverridden, o.tier, sum
	}
	return nil
}
