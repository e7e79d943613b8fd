package policy

import (
	"cmp"
	"errors"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/goccy/go-yaml/ast"

	"github.com/sluiceproxy/sluice/limiter"
)

// Bounds of one config.
const (
	maxLimits   = 10_000
	maxKeyParts = 8
)

// limitReader reads limits, of the file and of Envoy's routes.
type limitReader struct {
	reader
	// inputs records the files that limits name. It is nil for a route's limit,
	// which may name none.
	inputs *inputs

	// Defaults for limits that do not set these.
	domain, keyPrefix, mode, onFailure string
	localShare                         float64 // 0: not given
	// incomplete reports that a field of the file has a mistake by which it, such as
	// plans or local_share, may only seem to be missing.
	incomplete  bool
	expressions map[expressionID]*expression
	tiers       map[allowance]*tier
	plans       map[string]*plan // by name
	warnings    Mistakes
}

// expressionID identifies an expression: equal ones are compiled once.
type expressionID struct {
	text    string
	purpose purpose
}

func newLimitReader(r reader) limitReader {
	return limitReader{
		reader:      r,
		domain:      "default",
		keyPrefix:   "sluice",
		mode:        "enforce",
		onFailure:   "deny",
		expressions: make(map[expressionID]*expression),
		tiers:       make(map[allowance]*tier),
		plans:       make(map[string]*plan),
	}
}

// draft is a limit as read, before the settings that it inherits are known.
type draft struct {
	at         node
	name       string
	nameAt     node
	match      match
	when       *expression
	whenAt     node
	key        []*expression
	keyAt      []node // of the parts of key
	absent     absence
	cost       cost
	costAt     node
	settle     *cost
	settleAt   node
	within     time.Duration
	withinAt   node
	lease      time.Duration
	leaseAt    node
	readable   bool
	readableAt node
	group      string
	granted    granted
	zoneAt     node
	rateFrom   *rateFrom
	rateFromAt node
	maxRate    node
	tier       *tier
	// hasQuota and hasBoth report that the limit or an override has a quota, or a
	// rate and a quota.
	hasQuota, hasBoth bool
	domain            string // empty: that of the file
	mode, onFailure   string // empty: those of the file
	onFailureAt       node
	overrides         node
	files             []node
	// enforces and shadows report that an override has that mode.
	enforces, shadows bool
	// doubtful counts the overrides that are warned of, and doubtfulAt is where
	// the last one is.
	doubtful   int
	doubtfulAt node
}

// readLimit reads a limit into d. If d has a name already, the limit has no
// field name. It reports whether there was no mistake; d then holds all that
// could be read.
func (lr *limitReader) readLimit(n node, d *draft) bool {
	d.at, d.cost.constant, d.within = n, 1, defaultSettleWithin
	bad := len(lr.mistakes)
	fields := map[string]func(node){
		"plan":  func(n node) { d.granted.plan = n },
		"match": func(n node) { lr.readMatch(n, &d.match) },
		"when":  func(n node) { d.whenAt = n; d.when = lr.expression(n, forWhen) },
		"key":   func(n node) { lr.readKey(n, d) },
		"absent": func(n node) {
			var s string
			lr.oneOf(n, &s, "client", "share", "skip", "deny")
			d.absent = absences[s]
		},
		"rate":      func(n node) { d.granted.rate = n },
		"burst":     func(n node) { d.granted.burst = n },
		"quota":     func(n node) { d.granted.quota = n },
		"time_zone": func(n node) { d.zoneAt = n; lr.readZone(n, &d.granted.zone) },
		"starts":    func(n node) { lr.readStarts(n, &d.granted) },
		"cost":      func(n node) { d.costAt = n; lr.readCost(n, &d.cost, forCost) },
		"rate_from": func(n node) {
			d.rateFromAt, d.rateFrom = n, new(rateFrom)
			if _, _, err := parseRate(sourceText(n.Node)); err == nil {
				lr.wrong(n, "must be an expression such as %s; write a rate that is the same for every request as the rate",
					forRate.example())
				return
			}
			d.rateFrom.expression = lr.expression(n, forRate)
		},
		"max_rate":   func(n node) { d.maxRate = n },
		"readable":   func(n node) { d.readableAt = n; lr.boolean(n, &d.readable) },
		"group":      lr.checked(&d.group, checkName),
		"domain":     lr.checked(&d.domain, checkDomain),
		"mode":       func(n node) { lr.oneOf(n, &d.mode, modes...) },
		"on_failure": func(n node) { d.onFailureAt = n; lr.readOnFailure(n, &d.onFailure) },
		"overrides":  func(n node) { d.overrides = n },
	}
	if d.name == "" {
		fields["name"] = func(n node) { d.nameAt = n; lr.checked(&d.name, checkName)(n) }
	}
	if lr.inputs != nil {
		fields["settle"] = func(n node) { d.settleAt, d.settle = n, new(cost); lr.readCost(n, d.settle, forSettle) }
		fields["settle_within"] = func(n node) { d.withinAt = n; lr.duration(n, &d.within, minSettleWithin, maxSettleWithin) }
		fields["lease"] = func(n node) { d.leaseAt = n; lr.duration(n, &d.lease, limiter.MinLease, limiter.MaxLease) }
		fields["overrides_file"] = func(n node) { lr.each(n, func(n node) { d.files = append(d.files, n) }) }
	}
	complete := lr.mapping(n, fields) // otherwise a field may only seem to be missing
	clean := len(lr.mistakes) == bad
	if clean && d.name == "" {
		lr.wrong(node{n.Node, join(n.field, "name")}, "missing; a limit needs a name, and a rate, a quota or a plan")
	}
	d.granted.incomplete = !complete
	switch {
	case d.granted.isGiven():
		d.tier = lr.readTier(d.granted)
		d.notes(d.tier)
		if d.granted.plan.Node != nil {
			d.granted.rate = d.granted.plan // what is wrong with the rate is the plan's
		}
	case clean:
		lr.wrong(node{n.Node, join(n.field, "rate")}, "missing; a limit needs a name, and a rate, a quota or a plan")
	}
	lr.readMaxRate(d, complete)
	if t := d.tier; t != nil && t.unlimited && d.absent == absentDeny {
		lr.wrong(d.granted.rate, "absent: deny needs a bucket, but the rate is unlimited; give a rate that is never reached")
	} else if t != nil && t.hasBucket() && complete && d.cost.expression == nil && d.cost.constant > t.holds() {
		lr.wrong(d.costAt, "%d exceeds the %s of %d, so every request would be denied", d.cost.constant, t.holder(),
			t.holds())
	}
	hasBucket := d.tier == nil || d.tier.hasBucket() || d.rateFrom != nil
	if d.settle != nil && !hasBucket {
		mend := "give a rate that is never reached"
		if d.tier.none {
			mend = "remove settle"
		}
		lr.wrong(d.settleAt, "settle needs a bucket, but the rate is %s; %s", d.tier.rate, mend)
	}
	if d.settle == nil && d.withinAt.Node != nil && complete {
		lr.wrong(d.withinAt, "has no effect without settle")
	}
	if d.leaseAt.Node != nil {
		switch {
		case d.settle != nil:
			lr.wrong(d.leaseAt, "cannot be used with settle, which holds each request's tokens in the store; remove one of them")
		case !hasBucket:
			lr.wrong(d.leaseAt, "lease needs a bucket, but the rate is %s; remove it", d.tier.rate)
		}
	}
	return len(lr.mistakes) == bad
}

// notes records what an allowance of the limit or of an override has. One that is
// not known, after a mistake, may have a quota.
func (d *draft) notes(t *tier) {
	if t == nil {
		d.hasQuota = true
		return
	}
	d.hasQuota, d.hasBoth = d.hasQuota || t.quotaText != "", d.hasBoth || t.hasBoth()
}

// readZone reads a time zone.
func (lr *limitReader) readZone(n node, into *string) {
	lr.checked(into, func(s string) error {
		_, err := limiter.NewCalendar(limiter.Day, s, time.Time{})
		return err
	})(n)
}

func checkName(s string) error {
	if !namePattern.MatchString(s) {
		return fmt.Errorf("invalid name %q; want 1 to 63 characters of a-z, 0-9 and -", s)
	}
	return nil
}

// readOnFailure reads a failure mode.
func (lr *limitReader) readOnFailure(n node, into *string) {
	lr.oneOf(n, into, "deny", "allow", "local", "delegate")
}

var failureModes = map[string]limiter.FailureMode{
	"deny":     limiter.Deny,
	"allow":    limiter.Allow,
	"local":    limiter.Local,
	"delegate": limiter.Delegate,
}

func (lr *limitReader) readMatch(n node, m *match) {
	r := &lr.reader
	var paths, ignoreCase node
	complete := lr.mapping(n, map[string]func(node){
		"hosts":   func(n node) { readStrings(r, n, &m.hosts, parseHost) },
		"methods": func(n node) { readStrings(r, n, &m.methods, parseMethod) },
		"paths":   func(n node) { paths = n; readStrings(r, n, &m.paths, parsePath) },
		"ignore_case": func(n node) {
			if lr.boolean(n, &m.ignoreCase); m.ignoreCase {
				ignoreCase = n
			}
		},
		"clients":    func(n node) { readStrings(r, n, &m.clients, parsePrefix) },
		"principals": func(n node) { readStrings(r, n, &m.principals, parsePrincipal) },
	})
	if m.ignoreCase {
		for i, p := range m.paths {
			m.paths[i] = p.folded()
		}
		if paths.Node == nil && complete {
			lr.wrong(ignoreCase, "requires paths; only they are compared with case by default")
		}
	}
}

func (lr *limitReader) readKey(n node, d *draft) {
	lr.each(n, func(n node) {
		if e := lr.expression(n, forKey); e != nil {
			d.key, d.keyAt = append(d.key, e), append(d.keyAt, n)
		}
	})
	if v, ok := n.Node.(*ast.SequenceNode); ok && len(v.Values) == 0 {
		lr.wrong(n, "empty list; want 1 to %d parts, or omit key for one shared bucket", maxKeyParts)
	} else if ok && len(v.Values) > maxKeyParts {
		lr.wrong(n, "list of %d parts; want 1 to %d", len(v.Values), maxKeyParts)
	}
}

// expression reads a CEL expression. It returns nil after a mistake. Equal
// expressions, of which most files have many, are compiled once.
func (lr *limitReader) expression(n node, p purpose) *expression {
	var text string
	if b, isBool := n.Node.(*ast.BoolNode); isBool && p == forWhen {
		text = strconv.FormatBool(b.Value)
	} else if sourceText(n.Node) == "" && describe(n.Node) != "a string" {
		quotes := ""
		if kind := describe(n.Node); kind == "a mapping" || kind == "a list" {
			quotes = "; one that begins with { or [ needs quotes"
		}
		lr.wrong(n, "must be an expression such as %s, not %s%s", p.example(), describe(n.Node), quotes)
		return nil
	} else if s, ok := lr.text(n); ok {
		text = s
	} else {
		return nil
	}
	id := expressionID{text, p}
	e, known := lr.expressions[id]
	if !known {
		if len(lr.mistakes) >= maxMistakes {
			return nil // the mistake would not be reported
		}
		e = lr.compile(n, text, p)
		lr.expressions[id] = e
	} else if e == nil {
		lr.wrong(n, "same error as in the identical expression above")
	}
	return e
}

// compile compiles an expression. It also evaluates a constant one, to report
// an error now and not for each request.
func (lr *limitReader) compile(n node, text string, p purpose) *expression {
	e, mistakes := compile(text, p)
	for _, m := range mistakes {
		lr.wrongExpression(n, m)
	}
	if e == nil {
		return nil
	}
	if lr.inputs == nil { // a route's limit is not warned of
		e.facts = nil
	}
	if text := sourceText(n.Node); text != "" {
		e.text = text // with the names of variables, not their values
	}
	if !e.constant {
		return e
	}
	empty, err := &subject{Request: &Request{}}, error(nil)
	switch p {
	case forKey:
		var part string
		if part, err = e.keyPart(empty); err == nil && part == "" {
			err = errors.New("always absent; omit key for one shared bucket")
		}
	case forWhen:
		_, _, err = e.condition(empty)
	case forRate: // readMaxRate reports it
	case forCost, forSettle:
		_, err = e.tokens(empty, 1, maxCost)
	}
	if err != nil {
		lr.wrong(n, "%v", err)
		return nil
	}
	return e
}

// wrongExpression reports an error in an expression.
func (lr *limitReader) wrongExpression(n node, e expressionError) { lr.add(lr.inExpression(n, e)) }

// inExpression returns an error in an expression as a mistake. The position is
// exact if the expression is written on one line, and that of the value
// otherwise.
func (lr *limitReader) inExpression(n node, e expressionError) Mistake {
	t := n.GetToken()
	m := Mistake{File: lr.file, Field: n.field, Message: e.message, Line: t.Position.Line, Column: t.Position.Column}
	if takesVariables(n) { // CEL's message may quote a variable's value
		m.Message = "invalid expression after its variables are replaced; the error is not shown, as it may " +
			"quote a secret"
	} else if s, ok := n.Node.(*ast.StringNode); ok && e.line == 1 && strings.Contains(t.Origin, s.Value) {
		m.Column += e.column - 1
		if strings.HasPrefix(strings.TrimSpace(t.Origin), "'") || strings.HasPrefix(strings.TrimSpace(t.Origin), `"`) {
			m.Column++
		}
	}
	return m
}

// readCost reads a cost: a number or an expression. A constant expression
// becomes a number.
func (lr *limitReader) readCost(n node, into *cost, p purpose) {
	switch n.Node.(type) {
	case *ast.IntegerNode, *ast.FloatNode:
		s, _ := lr.scalar(n)
		v, err := strconv.ParseFloat(strings.ReplaceAll(s, "_", ""), 64)
		if err != nil || math.IsInf(v, 0) {
			lr.wrong(n, "must be a number >= 0 or a CEL expression, not %s", displayText(n, s))
			return
		}
		if into.constant, err = wholeCost(v, maxCost); err != nil {
			lr.wrong(n, "%v", err)
		}
		return
	}
	e := lr.expression(n, p)
	if e == nil {
		return
	}
	if !e.constant {
		into.expression = e
		return
	}
	into.constant, _ = e.tokens(&subject{Request: &Request{}}, 1, maxCost) // compile has evaluated it before
}

const noShare = "local requires local_share: this sidecar's fraction of each limit, such as 0.1 for ten sidecars"

// rule compiles a draft, once the settings that it inherits are known. It
// returns nil after a mistake.
func (lr *limitReader) rule(d *draft) *rule {
	before := len(lr.mistakes)
	if d.onFailure == "local" && lr.localShare == 0 && !lr.incomplete {
		lr.wrong(d.onFailureAt, noShare)
	}
	o := lr.readOverrides(d)
	if !d.hasQuota {
		for _, at := range []node{d.zoneAt, d.granted.startsAt} {
			if at.Node != nil && len(lr.mistakes) == before {
				lr.wrong(at, "has no effect without quota")
			}
		}
	}
	if len(lr.mistakes) > before || d.tier == nil {
		return nil
	}
	l := &limiter.Limit{
		Domain:    cmp.Or(d.domain, lr.domain),
		Name:      d.name,
		Shadow:    lr.mode == "shadow" || d.mode == "shadow",
		OnFailure: failureModes[cmp.Or(d.onFailure, lr.onFailure)],
		Lease:     d.lease,
	}
	if l.OnFailure == limiter.Local {
		l.LocalShare = lr.localShare
	}
	if e := d.cost.expression; e != nil && e.uncheckedSize {
		lr.warn(d.costAt,
			`request.size is absent if a body has no content-length, as with chunked encoding, and the cost is then 1; `+
				`state the cost, as in "content-length" in request.headers ? request.size : 1000`)
	}
	var within time.Duration
	if d.settle != nil {
		within = d.within
		lr.warnOfSettle(d)
	}
	var twin *limiter.Limit
	if lr.mode != "shadow" && (l.Shadow && d.enforces || !l.Shadow && d.shadows) {
		other := *l
		other.Shadow = !l.Shadow
		twin = &other
	}
	prefix := lr.keyPrefix + ":" + l.Domain + ":" + l.Name + ":{"
	if l.OnFailure == limiter.Local && (!l.Shadow || twin != nil) {
		lr.warnOfShare(d, o)
	}
	var quota, quotaTwin *limiter.Limit
	if d.hasBoth {
		quota, quotaTwin = withSuffix(l), withSuffix(twin)
	}
	return &rule{
		limit:     l,
		twin:      twin,
		quota:     quota,
		quotaTwin: quotaTwin,
		tier:      d.tier,
		match:     d.match,
		when:      d.when,
		key:       d.key,
		readable:  d.readable && slices.ContainsFunc(d.key, func(e *expression) bool { return !e.open }),
		absent:    d.absent,
		cost:      d.cost,
		group:     d.group,
		rateFrom:  d.rateFrom,
		settle:    d.settle,
		within:    within,
		overrides: o,
		prefix:    prefix,
		singleKey: prefix + noKey + "}",
	}
}

// withSuffix returns the limit of the second bucket beside l's, or nil if l is nil.
func withSuffix(l *limiter.Limit) *limiter.Limit {
	if l == nil {
		return nil
	}
	other := *l
	other.Name += quotaSuffix
	return &other
}

// warnOfSettle warns of a limit that settles and lets only one request pass at a
// time, as what is under way is held.
func (lr *limitReader) warnOfSettle(d *draft) {
	if cost := d.cost.constant; d.cost.expression == nil && d.tier.hasBucket() && d.tier.holds() < 2*cost {
		lr.warn(d.settleAt, "the %s of %d is below twice the cost of %d, so only one request can be under way at a time; "+
			"raise %[1]s, or lower cost", d.tier.holder(), d.tier.holds(), cost)
	}
}

// warnOfShare warns of a limit whose cost exceeds the burst of its local
// buckets, so that every request is denied while the store fails.
func (lr *limitReader) warnOfShare(d *draft, o *overrides) {
	if d.cost.expression != nil {
		return // unknown before there is a request
	}
	isAbove := func(t *tier) bool {
		return t.hasBucket() && d.cost.constant > t.share(lr.localShare).holds()
	}
	if isAbove(d.tier) {
		local := d.tier.share(lr.localShare)
		lr.warn(d.costAt,
			"%d exceeds the %s of %d that local_share leaves of %d: every request is denied while the store fails; "+
				"raise %[2]s or local_share, or lower cost",
			d.cost.constant, local.holder(), local.holds(), d.tier.holds())
		return
	}
	if o == nil {
		return
	}
	above := 0
	for _, table := range []map[digest]override{o.inline, o.file} {
		for _, row := range table {
			if isAbove(row.tier) {
				above++
			}
		}
	}
	if above > 0 {
		lr.warn(d.costAt,
			"%d exceeds the burst that local_share leaves to %d overrides: their requests are denied while the store "+
				"fails; raise their burst or local_share, or lower cost",
			d.cost.constant, above)
	}
}

// warnOfGroups warns of groups in which every limit has a when, so that some
// requests are not limited at all.
func (lr *limitReader) warnOfGroups(drafts []*draft) {
	last := make(map[string]*draft) // by group; nil if a limit of it always applies
	for _, d := range drafts {
		if d.group == "" {
			continue
		}
		before, known := last[d.group]
		switch {
		case d.when == nil || d.when.constant:
			last[d.group] = nil
		case !known || before != nil:
			last[d.group] = d
		}
	}
	for _, d := range drafts {
		if last[d.group] == d {
			lr.warn(d.whenAt,
				"every limit of the group %s has a when, so a request that fits none of them is not limited by the "+
					"group; end the group with a limit without when", d.group)
		}
	}
}

// warn adds a warning about a value that is valid but unlikely to be intended.
func (lr *limitReader) warn(n node, format string, args ...any) {
	if len(lr.warnings) >= maxMistakes {
		return
	}
	at := start(n.Node).Position
	lr.warnings = append(lr.warnings,
		Mistake{File: lr.file, Line: at.Line, Column: at.Column, Field: n.field, Message: fmt.Sprintf(format, args...)})
}
