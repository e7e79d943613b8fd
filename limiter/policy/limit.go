package policy

import (
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/goccy/go-yaml/ast"

	"github.com/sluiceproxy/sluice/limiter"
)

// The bounds of what one limit may be made of.
const (
	maxLimits   = 10_000
	maxKeyParts = 8
)

// draft is a limit as it was read, before what the whole file says is known.
type draft struct {
	name           string
	nameAt         node
	match          match
	key            []*expression
	absent         absence
	rate, burst    node
	domain         string // empty: the file's
	mode, failure  string // empty: the file's
	tokens, bucket int64
	period         time.Duration
}

// absence says what becomes of a limit that has a part of its key absent.
type absence uint8

const (
	absentClient absence = iota // the client's network takes its place
	absentShare                 // all such requests share a bucket
	absentSkip                  // the limit does not apply
	absentDeny                  // the request is denied
)

func (f *configFile) readLimits(n node) {
	values, ok := n.Node.(*ast.SequenceNode)
	if !ok {
		f.wrong(n, "%s; wanted is a list of limits", describe(n.Node))
		return
	}
	if len(values.Values) > maxLimits {
		f.wrong(n, "%d limits; allowed are %d", len(values.Values), maxLimits)
		return
	}
	f.each(n, f.readLimit)
}

func (f *configFile) readLimit(n node) {
	d := &draft{}
	bad := len(f.mistakes)
	isMapping := f.mapping(n, map[string]func(node){
		"name": func(n node) {
			d.nameAt = n
			f.checked(&d.name, func(s string) error {
				if !nameOf.MatchString(s) {
					return fmt.Errorf("%q; allowed are 1 to 63 of a-z, 0-9 and -", s)
				}
				return nil
			})(n)
		},
		"match": func(n node) { f.readMatch(n, &d.match) },
		"key":   func(n node) { f.readKey(n, &d.key) },
		"absent": func(n node) {
			var s string
			f.oneOf(n, &s, "client", "share", "skip", "deny")
			d.absent = map[string]absence{"client": absentClient, "share": absentShare, "skip": absentSkip, "deny": absentDeny}[s]
		},
		"rate":       func(n node) { d.rate = n; f.readRate(n, d) },
		"burst":      func(n node) { d.burst = n; f.whole(n, &d.bucket, 1, limiter.MaxTokens) },
		"domain":     f.checked(&d.domain, checkDomain),
		"mode":       func(n node) { f.oneOf(n, &d.mode, "enforce", "shadow") },
		"on_failure": func(n node) { f.readOnFailure(n, &d.failure) },
	})
	if !isMapping {
		return
	}
	for _, required := range []struct {
		field string
		at    node
	}{{"name", d.nameAt}, {"rate", d.rate}} {
		if required.at.Node == nil && len(f.mistakes) == bad {
			f.wrong(node{n.Node, join(n.field, required.field)}, "missing; a limit has a name and a rate")
		}
	}
	if len(f.mistakes) == bad {
		f.drafts = append(f.drafts, d)
	}
}

func (f *configFile) readMatch(n node, m *match) {
	r := &f.reader
	f.mapping(n, map[string]func(node){
		"hosts":      func(n node) { texts(r, n, &m.hosts, parseHost) },
		"methods":    func(n node) { texts(r, n, &m.methods, parseMethod) },
		"paths":      func(n node) { texts(r, n, &m.paths, parsePath) },
		"clients":    func(n node) { texts(r, n, &m.clients, parsePrefix) },
		"principals": func(n node) { texts(r, n, &m.principals, parsePrincipal) },
	})
}

func (f *configFile) readKey(n node, into *[]*expression) {
	f.each(n, func(n node) {
		text, ok := f.text(n)
		if !ok {
			return
		}
		e, mistakes := compile(text)
		for _, m := range mistakes {
			f.wrongExpression(n, m)
		}
		if e != nil {
			*into = append(*into, e)
		}
	})
	if v, ok := n.Node.(*ast.SequenceNode); ok && (len(v.Values) == 0 || len(v.Values) > maxKeyParts) {
		f.wrong(n, "a list of %d; allowed are 1 to %d parts, and without a key one bucket for all", len(v.Values), maxKeyParts)
	}
}

// wrongExpression notes a mistake within an expression: at its own place where the expression stands in the file as it is, else at
// the value's.
func (f *configFile) wrongExpression(n node, e expressionError) {
	t := n.GetToken()
	m := Mistake{File: f.file, Field: n.field, Message: e.message, Line: t.Position.Line, Column: t.Position.Column}
	if s, ok := n.Node.(*ast.StringNode); ok && e.line == 1 && strings.Contains(t.Origin, s.Value) {
		m.Column += e.column - 1
		if strings.HasPrefix(strings.TrimSpace(t.Origin), "'") || strings.HasPrefix(strings.TrimSpace(t.Origin), `"`) {
			m.Column++
		}
	}
	f.mistakes = append(f.mistakes, m)
}

// readRate reads tokens/period: 10/s, 5000/24h, 3/250ms.
func (f *configFile) readRate(n node, d *draft) {
	s, ok := f.scalar(n) // a number lacks its period, and is told so
	if !ok {
		return
	}
	var err error
	if d.tokens, d.period, err = parseRate(s); err != nil {
		f.wrong(n, "%v", err)
	}
}

func parseRate(s string) (tokens int64, period time.Duration, err error) {
	const allowed = "allowed are tokens/period such as 10/s, 100/m, 5000/24h and 3/250ms: a period is s, m, h, d or a Go duration"
	count, every, ok := strings.Cut(s, "/")
	tokens, err = strconv.ParseInt(count, 10, 64)
	if !ok || err != nil || strings.HasPrefix(count, "+") {
		return 0, 0, fmt.Errorf("%q; %s", s, allowed)
	}
	switch every {
	case "s":
		period = time.Second
	case "m":
		period = time.Minute
	case "h":
		period = time.Hour
	case "d":
		period = 24 * time.Hour
	default:
		if period, err = time.ParseDuration(every); err != nil {
			return 0, 0, fmt.Errorf("%q; %s", s, allowed)
		}
	}
	if _, err := limiter.NewBucket(tokens, period, 1); err != nil {
		return 0, 0, fmt.Errorf("%q: %w", s, err)
	}
	return tokens, period, nil
}

// rule is a compiled limit.
type rule struct {
	limit  *limiter.Limit
	bucket limiter.Bucket
	match  match
	key    []*expression
	absent absence
	prefix string // of its keys, up to and with the brace
}

// compileLimit makes the rule of a draft, or notes why it cannot.
func (f *configFile) compileLimit(d *draft) *rule {
	burst, at := d.bucket, d.burst
	if at.Node == nil {
		burst, at = d.tokens, d.rate
	}
	bucket, err := limiter.NewBucket(d.tokens, d.period, burst)
	if err != nil {
		f.wrong(at, "%v", err)
		return nil
	}
	l := &limiter.Limit{
		Domain:    orElse(d.domain, f.domain),
		Name:      d.name,
		Shadow:    f.mode == "shadow" || d.mode == "shadow",
		OnFailure: failureModes[orElse(d.failure, f.onFailure)],
	}
	return &rule{
		limit:  l,
		bucket: bucket,
		match:  d.match,
		key:    d.key,
		absent: d.absent,
		prefix: f.keyPrefix + ":" + l.Domain + ":" + l.Name + ":{",
	}
}

func orElse(s, otherwise string) string {
	if s == "" {
		return otherwise
	}
	return s
}

// Draw is what a request owes.
type Draw struct {
	Charges []limiter.Charge // one for each limit that applies, in the file's order
}

// Draw says what a request owes. Its error is a *RuleError.
func (c *Config) Draw(r *Request) (Draw, error) {
	s := newSubject(r, &c.client)
	var d Draw
	for _, l := range c.limits {
		if !l.match.applies(&s) {
			continue
		}
		charge, applies, err := l.charge(&s, &c.hasher)
		if err != nil {
			return Draw{}, &RuleError{Limit: l.limit.Name, Field: "key", Err: err}
		}
		if applies {
			d.Charges = append(d.Charges, charge)
		}
	}
	return d, nil
}

// charge makes what a request owes a limit that matches it.
func (l *rule) charge(s *subject, h *hasher) (c limiter.Charge, applies bool, err error) {
	c = limiter.Charge{Limit: l.limit, Bucket: l.bucket, Cost: 1}
	var few [256]byte
	key := append(few[:0], l.prefix...)
	if len(l.key) == 0 {
		key = append(key, noKey...)
	}
	for _, e := range l.key {
		value, err := e.text(s)
		switch {
		case err != nil:
			return c, false, err
		case value != "" && e.open:
			key = h.appendOpen(key, value)
		case value != "":
			key = h.appendHash(key, value)
		case l.absent == absentSkip:
			return c, false, nil
		case l.absent == absentClient:
			key = h.appendAbsent(key, network(s.client))
		default:
			key = h.appendAbsent(key, "")
		}
		if value == "" && l.absent == absentDeny {
			c.Cost = l.bucket.Burst() + 1 // denied for ever, and so without retry-after, by a bucket that stays full
		}
	}
	c.Key = string(append(key, '}'))
	return c, true, nil
}
