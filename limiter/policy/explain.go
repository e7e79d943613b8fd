package policy

import (
	"fmt"
	"strings"
	"unicode/utf8"

	"github.com/sluiceproxy/sluice/limiter"
)

// Explanation says what a request draws, and why.
type Explanation struct {
	Draw Draw
	// Exempt names the exemption that matches, such as "exempt[0] holds", or is
	// empty.
	Exempt string
	// Limits has all limits of the file, in its order, and then the route's. One with
	// a rate and a quota has a second entry, for the quota.
	Limits []Explained
}

// Explained is the decision about one limit.
type Explained struct {
	Limit   *limiter.Limit
	Applies bool
	// Reason is a sentence. Values from the client are quoted and shortened in
	// it; it has no value of a header.
	Reason string
	// Rate is the rate as the config writes it: that of the key's override if
	// there is one, else what rate_from says, else the limit's.
	Rate string
	// Quota is the quota as the config writes it, if the entry is about its bucket;
	// Rate is then empty.
	Quota  string
	Burst  int64  // tokens; 0 if the rate is unlimited or none
	Plan   string // the name of the plan that says the rate; empty: none
	Settle string // what a request has cost once it has ended, as the config writes it; empty: what was taken
	Charge int    // index in Draw.Charges; -1 if there is none
	// Key is the bucket's key as logs and metadata show it. It is empty if there
	// is no charge.
	Key string
}

// Explain returns what Draw does with a request, and the reasons.
func (c *Config) Explain(req *Request) Explanation {
	s := newSubject(req, &c.client)
	x := Explanation{}
	for i := range c.exempt.find(s, allReadings) {
		x.Exempt = fmt.Sprintf("exempt[%d] holds", i)
		x.Draw.Exempt = true
		break
	}
	d := drawing{Draw: Draw{Client: s.client}, subject: s, hasher: &c.hasher}
	route := c.route(s.Context)
	d.addMistakes(route.mistakes...)
	look := func(r *rule) finding {
		if field := r.match.mismatch(s, anyReading); field != "" {
			return finding{kind: foundMismatch, field: field}
		}
		return d.consider(r)
	}
	add := func(r *rule, f finding) {
		if x.Draw.Exempt {
			f = finding{kind: foundExempt}
		}
		tier := r.tier
		if f.applies {
			tier = f.tier
		}
		e := Explained{Limit: r.limitOf(tier), Applies: f.applies, Reason: c.reason(s, r, f), Rate: tier.rate,
			Burst: tier.bucket.Burst(), Plan: tier.plan, Charge: -1}
		if tier.bucket.IsQuota() {
			e.Quota = tier.quotaText
		}
		if r.settle != nil {
			e.Settle = r.settle.text()
		}
		if f.applies && f.brought.isKnown {
			e.Rate = f.brought.String()
		}
		if f.applies && !tier.unlimited {
			e.Charge = len(d.Charges) - 1
			e.Key = d.Charges[e.Charge].ShownKey()
		}
		if !tier.hasBoth() {
			x.Limits = append(x.Limits, e)
			return
		}
		second := e
		second.Limit, second.Rate, second.Quota, second.Burst = r.quotaLimitOf(tier), "", tier.quotaText, tier.quota.Burst()
		if e.Charge >= 0 {
			e.Charge--
		}
		x.Limits = append(x.Limits, e, second)
	}
	for i, r := range c.rules {
		replaced := route.replacing(i)
		switch {
		case replaced != nil && replaced.rule == nil:
			add(r, finding{kind: foundOff})
		case replaced != nil:
			add(r, finding{kind: foundReplaced})
		case route.omits(i):
			add(r, finding{kind: foundUnlisted})
		default:
			add(r, look(r))
		}
	}
	for _, e := range route.limits {
		if e.rule != nil {
			add(e.rule, look(e.rule))
		}
	}
	if !x.Draw.Exempt {
		x.Draw = d.Draw
	}
	return x
}

// reason describes a finding in words.
func (c *Config) reason(s *subject, r *rule, f finding) string {
	switch f.kind {
	case foundExempt:
		return "the request is exempt"
	case foundMismatch:
		return r.match.explain(s, f.field)
	case foundWhenFalse:
		return "when is false: " + r.when.text
	case foundWhenAbsent:
		if r.group != "" {
			return "when is absent, and a limit in a group does not apply then: " + r.when.text
		}
		if r.tier.none {
			return "when is absent, and a limit with rate: none does not apply then: " + r.when.text
		}
		return "when is absent, and an unlimited limit does not apply then: " + r.when.text
	case foundSkipped:
		return fmt.Sprintf("its key %s is absent%s, and the limit has absent: skip", r.partName(f.part),
			r.explainAbsent(s, f.part))
	case foundGroupTaken:
		return fmt.Sprintf("%s comes first in the group %s", f.other.limit.Name, r.group)
	case foundOff:
		return fmt.Sprintf("the route turns it off: %s%s", routeLimit, r.limit.Name)
	case foundReplaced:
		return fmt.Sprintf("the route's %s%s replaces it", routeLimit, r.limit.Name)
	case foundUnlisted:
		return "the route's sluice.limits does not name it"
	case foundMistake:
		return fmt.Sprintf("config mistake: %s: %v", f.err.Field, f.err.Err)
	case foundApplies, foundOverridden, foundPartAbsent: // the limit applies
	}
	reason := "it applies to every request"
	if !r.match.matchesAll() || r.when != nil {
		reason = "it matches"
	}
	if f.whenAbsent {
		reason += "; when is absent, so it applies"
	}
	denied := "the request is denied"
	if r.limitOf(f.tier).Shadow {
		denied = "the request would be denied"
	}
	switch f.kind {
	case foundOverridden:
		reason += "; its rate is from " + r.overrides.position(f.keyDigest)
	case foundPartAbsent:
		reason += fmt.Sprintf("; its key %s is absent%s: ", r.partName(f.part), r.explainAbsent(s, f.part)) +
			map[absence]string{
				absentClient: "the client's network is used instead",
				absentShare:  "all such requests share a bucket",
				absentDeny:   denied,
			}[r.absent]
	default: // nothing to add
	}
	switch {
	case r.rateFrom == nil || f.kind == foundOverridden:
	case !f.brought.isKnown:
		reason += "; rate_from is absent, so the rate is the limit's own"
	case f.brought.isCut:
		reason += "; its rate is from rate_from, cut to max_rate"
	default:
		reason += "; its rate is from rate_from"
	}
	if f.tier.none {
		reason += "; the rate is none, so " + denied
	}
	return reason
}

// partName names a part of the key.
func (r *rule) partName(i int) string { return "part " + r.key[i].text }

// explainAbsent says, in parentheses after a space, why a part of the key is
// absent although the request has it. Otherwise it returns "".
func (r *rule) explainAbsent(s *subject, i int) string {
	switch only := r.key[i].only; {
	case only.attribute == "request.headers" && s.isRepeated(only.entry):
		return " (the header was sent more than once)"
	case only.attribute == requestParams && s.lookUp(requestParams, only.entry).differ:
		return " (the query has several values of it)"
	case only.attribute == requestCookies && s.lookUp(requestCookies, only.entry).differ:
		return " (there are several cookies of this name)"
	}
	return ""
}

// explain says why a field of the match does not hold.
func (m *match) explain(s *subject, field string) string {
	switch field {
	case "hosts":
		return fmt.Sprintf("host %s matches none of match.hosts", quoted(s.host()))
	case "methods":
		return fmt.Sprintf("method %s matches none of match.methods", quoted(s.Method))
	case "paths":
		return fmt.Sprintf("path %s%s matches none of match.paths", quoted(s.sent), alsoRead(s.paths[1:]))
	case "clients":
		if !s.client.IsValid() {
			return "the client's address is unknown, so match.clients cannot match"
		}
		return fmt.Sprintf("client %v is in none of match.clients", s.client)
	}
	if s.Source.Principal == "" {
		return "the peer has no principal, so match.principals cannot match"
	}
	return fmt.Sprintf("principal %s matches none of match.principals", quoted(s.Source.Principal))
}

// alsoRead lists the first few other readings of a path.
func alsoRead(others []string) string {
	const most = 4
	if len(others) == 0 {
		return ""
	}
	var texts []string
	for _, reading := range others[:min(len(others), most)] {
		texts = append(texts, quoted(reading))
	}
	if more := len(others) - most; more > 0 {
		texts = append(texts, fmt.Sprintf("and %d more", more))
	}
	return ", also read as " + strings.Join(texts, ", ") + ","
}

// quoted returns what a client sent in quotes, escaped, and cut to about 100
// bytes.
func quoted(sent string) string {
	const most = 100
	if len(sent) <= most {
		return fmt.Sprintf("%+q", sent)
	}
	end := most
	for end > 0 && !utf8.RuneStart(sent[end]) {
		end--
	}
	return fmt.Sprintf("%+q...", sent[:end])
}

// Client returns the address that the config takes for the request's client, or
// "" if it is unknown.
func (c *Config) Client(req *Request) string {
	client, _ := c.client.address(req)
	return addressText(client)
}
