package policy

import (
	"cmp"
	"fmt"
	"math"
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"
)

// maxComparisons bounds how many patterns of matches the warnings of a config
// compare, so that a reload of thousands of limits stays fast. Beyond it nothing
// is warned of.
const maxComparisons = 1_000_000

// linter finds settings that are valid but unlikely to be intended, once the
// whole config was read without a mistake. What only one value shows is warned
// of where that value is read.
type linter struct {
	*configReader
	comparisons int // of patterns, at most maxComparisons
}

// lint adds the warnings that depend on more than one value. The rules of the
// config are those of the drafts, in the same order.
func (cr *configReader) lint() {
	l := linter{configReader: cr}
	l.warnOfListeners()
	l.warnOfExemptions()
	for i, d := range cr.drafts {
		l.warnOfExpressions(d)
		l.warnOfKey(d)
		l.warnOfReadable(d)
		l.warnOfRateFrom(d)
		l.warnOfCost(d, cr.config.rules[i].overrides)
		if d.doubtful > maxDoubtful {
			l.warn(d.doubtfulAt, "%d more overrides like this one", d.doubtful-maxDoubtful)
		}
	}
	l.warnOfPlans()
	l.warnOfUnreachable()
	l.warnOfInventedKeys()
	for _, e := range cr.expressions {
		if e != nil {
			e.facts = nil // nothing else reads them
		}
	}
	sortMistakes(cr.warnings, cr.file)
}

// sortMistakes sorts mistakes: those without a line, then those in the file,
// then those in the files that it names, each by position.
func sortMistakes(all Mistakes, file string) {
	part := func(m Mistake) int {
		switch {
		case m.Line == 0:
			return 0
		case m.File == file:
			return 1
		}
		return 2
	}
	slices.SortStableFunc(all, func(a, b Mistake) int {
		name := 0
		if part(a) == 2 && part(b) == 2 {
			name = cmp.Compare(a.File, b.File)
		}
		return cmp.Or(part(a)-part(b), name, a.Line-b.Line, a.Column-b.Column)
	})
}

// WarningsFor returns Warnings and, if the store may answer only after Envoy's
// ext_authz filter has given up, a warning of that. envoyTimeout is the filter's
// timeout. Line by line they are in the order of the file.
func (c *Config) WarningsFor(envoyTimeout time.Duration) Mistakes {
	if c.Redis == nil || c.Redis.Timeout < envoyTimeout {
		return c.Warnings
	}
	all := slices.Clone(c.Warnings)
	m := c.timeoutAt
	m.Message = fmt.Sprintf("%v is not below the timeout of Envoy's ext_authz filter (%v), so Envoy decides about "+
		"failures instead of on_failure; lower it, or raise the filter's timeout and pass it as --envoy-timeout",
		c.Redis.Timeout, envoyTimeout)
	all = append(all, m)
	sortMistakes(all, m.File)
	return all
}

// warnAt is warn for a value that a setting may have given instead of the file.
func (l *linter) warnAt(field, format string, args ...any) {
	for _, s := range slices.Backward(l.settings) {
		if s.Field == field && !s.Weak {
			l.warnings = append(l.warnings, Mistake{File: s.From, Field: field, Message: fmt.Sprintf(format, args...)})
			return
		}
	}
	if n, ok := l.listenAt[field]; ok {
		l.warn(n, format, args...)
		return
	}
	l.warnings = append(l.warnings, Mistake{File: cmp.Or(l.file, "defaults"), Field: field,
		Message: fmt.Sprintf(format, args...)})
}

// warnOfListeners warns of two listeners on one port, of which only the first
// can start, and of an admin listener that everyone can reach: the page and its
// profiles show what clients request.
func (l *linter) warnOfListeners() {
	listen := l.config.Listen
	all := []struct{ field, addr string }{
		{"listen.grpc", listen.GRPC}, {"listen.admin", listen.Admin}, {"listen.metrics", listen.Metrics},
	}
	for i, b := range all {
		for _, a := range all[:i] {
			if !samePort(a.addr, b.addr) {
				continue
			}
			at, other := b, a
			if _, given := l.listenAt[b.field]; !given {
				at, other = a, b // the default is not what has to change
			}
			l.warnAt(at.field, "%s is also the port of %s (%s), so sluice cannot start; give each listener a port of its own",
				at.addr, other.field, other.addr)
		}
	}
	if host, _, err := net.SplitHostPort(listen.Admin); err == nil && isEverywhere(host) {
		l.warnAt("listen.admin", "%s is open to everyone who can reach this machine; listen on 127.0.0.1 and "+
			"use kubectl port-forward", listen.Admin)
	}
}

// samePort reports whether two addresses cannot be listened on at once. Port 0
// is any free port.
func samePort(a, b string) bool {
	hostA, portA, errA := net.SplitHostPort(a)
	hostB, portB, errB := net.SplitHostPort(b)
	if errA != nil || errB != nil { // a unix socket
		return false
	}
	numberA, errA := net.LookupPort("tcp", portA)
	numberB, errB := net.LookupPort("tcp", portB)
	return errA == nil && errB == nil && numberA == numberB && numberA != 0 &&
		(hostA == hostB || isEverywhere(hostA) || isEverywhere(hostB) || isLoopback(hostA) && isLoopback(hostB))
}

// isLoopback reports whether a host is 127.0.0.1 by one of its two usual names.
func isLoopback(host string) bool { return host == "127.0.0.1" || host == "localhost" }

// isEverywhere reports whether a listener with this host has all addresses of
// the machine.
func isEverywhere(host string) bool {
	ip, err := netip.ParseAddr(host)
	return host == "" || err == nil && ip.IsUnspecified()
}

// warnOfExemptions warns of exemptions of everything.
func (l *linter) warnOfExemptions() {
	for i, m := range l.exempt {
		if of := m.everything(); of != "" {
			l.warn(l.exemptAt[i], "exempts every request%s, so that no limit applies to them; narrow the match, or write "+
				"mode: shadow to try limits without denying", of)
		}
	}
}

// everything says of whom a match holds for every request, as the end of a
// sentence. It returns "" if it excludes requests of everyone.
func (m *match) everything() string {
	v4, v6 := len(m.clients) == 0, len(m.clients) == 0
	for _, p := range m.clients {
		v4 = v4 || p.Bits() == 0 && p.Addr().Is4()
		v6 = v6 || p.Bits() == 0 && p.Addr().Is6()
	}
	switch {
	case len(m.hosts)+len(m.methods)+len(m.principals) > 0:
		return ""
	case len(m.paths) > 0 && !slices.ContainsFunc(m.paths, pathPattern.matchesAll):
		return ""
	case v4 && v6:
		return ", whatever it is"
	case v4:
		return " of IPv4 clients"
	case v6:
		return " of IPv6 clients"
	}
	return ""
}

// warnOfExpressions warns of what the text of a limit's expressions shows.
func (l *linter) warnOfExpressions(d *draft) {
	doubt := func(n node, e *expression) {
		if e == nil {
			return
		}
		for _, doubt := range e.facts.doubts {
			l.warnings = append(l.warnings, l.inExpression(n, doubt))
		}
	}
	doubt(d.whenAt, d.when)
	for i, e := range d.key {
		doubt(d.keyAt[i], e)
	}
	doubt(d.costAt, d.cost.expression)
	if d.rateFrom != nil {
		doubt(d.rateFromAt, d.rateFrom.expression)
	}
	if d.settle != nil {
		doubt(d.settleAt, d.settle.expression)
	}
	switch holds, constant := d.constantWhen(); {
	case d.when == nil || !constant:
	case holds:
		l.warn(d.whenAt, "is always true; omit when")
	default:
		l.warn(d.whenAt, "is always false, so the limit never applies; remove the limit, or use mode: shadow to keep "+
			"counting what it would deny")
	}
}

// constantWhen returns whether the limit's when holds, if that is the same for
// all requests. A limit without one always applies.
func (d *draft) constantWhen() (holds, constant bool) {
	if d.when == nil || !d.when.constant {
		return d.when == nil, d.when == nil
	}
	holds, known, err := d.when.condition(&subject{Request: &Request{}})
	return holds || !known && d.group == "", err == nil
}

// warnOfKey warns of parts of a key that are the same for all requests, or
// different for each.
func (l *linter) warnOfKey(d *draft) {
	for i, e := range d.key {
		switch {
		case e.constant && len(d.key) == 1:
			l.warn(d.keyAt[i], "is constant, so all requests share one bucket; omit key if that is meant, or write an "+
				"expression such as client.network")
		case e.constant:
			l.warn(d.keyAt[i], "is the same for all requests, so this part of the key has no effect; omit it")
		case e.facts.varies != "":
			l.warn(d.keyAt[i], "%s differs for each %s, so each gets a full bucket of its own and the limit never denies; "+
				"write what identifies the client, such as client.network", e.facts.varies,
				map[bool]string{true: "connection", false: "request"}[e.facts.varies == "source.port"])
		}
	}
}

// warnOfReadable warns if a part of a readable limit's key is likely to be a secret,
// and if readable has no effect, as no part is hashed.
func (l *linter) warnOfReadable(d *draft) {
	if !d.readable {
		return
	}
	hidden := false
	for i, e := range d.key {
		hidden = hidden || !e.open
		if of := e.secret(); of != "" && !e.open {
			l.warn(d.keyAt[i], "%s is likely to be a secret, and readable: true shows it in clear in logs, metadata and on "+
				"the page; remove readable, or use a name that is not secret, such as a tenant's", of)
		}
	}
	if !hidden {
		l.warn(d.readableAt, "has no effect: no part of the key is hashed; remove it")
	}
}

// secretWords are the words of the name of a header, a parameter or a cookie by which
// it is likely to be a secret.
var secretWords = []string{
	"apikey", "auth", "authentication", "authorization", "bearer", "cookie", "credential", "credentials", "csrf", "jwt",
	"key", "passphrase", "passwd", "password", "secret", "session", "sessionid", "signature", "token", "xsrf",
}

// secret returns what an expression reads that is likely to be a secret, or "".
// What the names of claims say is not looked at.
func (e *expression) secret() string {
	if e.attribute == "request.query" {
		return e.attribute
	}
	for _, r := range e.reads {
		if !slices.Contains([]string{"request.headers", requestParams, requestCookies}, r.attribute) {
			continue
		}
		if r.entry == "" {
			return "one of " + r.attribute
		}
		isSecret := func(word string) bool { return slices.Contains(secretWords, word) }
		if slices.ContainsFunc(strings.FieldsFunc(r.entry, func(c rune) bool { return c == '-' || c == '_' }), isSecret) {
			return r.String()
		}
	}
	return ""
}

// warnOfCost warns of a limit that takes nothing, and of costs that its bucket,
// or that of an override, can never pay.
func (l *linter) warnOfCost(d *draft, o *overrides) {
	if d.cost.expression == nil {
		if d.cost.constant == 0 && d.settle == nil && d.tier.hasBucket() {
			l.warn(d.costAt, "a limit that takes no tokens never denies; give it a cost above 0, or a settle that "+
				"charges each request when its response ends")
		}
		return
	}
	most := d.cost.expression.facts.most
	if d.tier.hasBucket() && most > d.tier.holds() {
		l.warn(d.costAt, "may be %d, above the %s of %d: such a request is always denied; raise %[2]s to at least %[1]d",
			most, d.tier.holder(), d.tier.holds())
		return
	}
	if o == nil || most == 0 {
		return
	}
	above, least := 0, int64(math.MaxInt64)
	for _, table := range []map[digest]override{o.inline, o.file} {
		for _, row := range table {
			if row.tier.hasBucket() && most > row.tier.holds() {
				above, least = above+1, min(least, row.tier.holds())
			}
		}
	}
	if above > 0 {
		l.warn(d.costAt, "may be %d, above the burst of %d overrides (the smallest is %d): such a request is always "+
			"denied; raise their burst to at least %[1]d", most, above, least)
	}
}

// warnOfUnreachable warns of limits in a group that another one, before them,
// always keeps from applying.
func (l *linter) warnOfUnreachable() {
	const most = 64                         // earlier limits that each is compared with
	earlier := make(map[[2]string][]*draft) // by group, and text of when; "" if it always holds
	for _, d := range l.drafts {
		if d.group == "" {
			continue
		}
		always, same := [2]string{d.group}, [2]string{d.group}
		if holds, constant := d.constantWhen(); !constant {
			same[1] = d.when.text
		} else if !holds {
			continue // warned of already
		}
		before := earlier[always]
		if same != always {
			before = append(slices.Clip(before), earlier[same]...)
		}
		for _, other := range before {
			if l.covers(&other.match, &d.match) {
				l.warn(d.at, "is never reached: the limit %s before it in the group %s applies to every request that this "+
					"one matches; put this one first", other.name, d.group)
				break
			}
		}
		if mayBeSkipped := d.absent == absentSkip && len(d.key) > 0; !mayBeSkipped && len(earlier[same]) < most {
			earlier[same] = append(earlier[same], d)
		}
	}
}

// covers is covers of matches, within maxComparisons.
func (l *linter) covers(a, b *match) bool {
	l.comparisons += 1 + len(a.hosts)*len(b.hosts) + len(a.methods)*len(b.methods) + len(a.paths)*len(b.paths) +
		len(a.clients)*len(b.clients) + len(a.principals)*len(b.principals)
	return l.comparisons <= maxComparisons && a.covers(b)
}

// warnOfInventedKeys warns of limits by a value that clients choose, beside
// which no other limit bounds a client that makes up values. With absent: skip a
// client need not even do that: such a limit is not meant to bound one.
func (l *linter) warnOfInventedKeys() {
	var alone, bounding []*draft
	for _, d := range l.drafts {
		switch {
		case d.tier.unlimited && d.rateFrom == nil:
		case d.tier.none && len(d.key) > 0: // made-up values are denied
		case d.invented() >= 0 && d.absent == absentSkip:
		case d.invented() >= 0:
			alone = append(alone, d)
		case l.mode == "shadow" || d.mode != "shadow":
			bounding = append(bounding, d)
		}
	}
	alone = slices.DeleteFunc(alone, func(d *draft) bool {
		return l.comparisons > maxComparisons || slices.ContainsFunc(bounding, func(other *draft) bool {
			return (other.group == "" || other.group != d.group) && l.covers(&other.match, &d.match)
		})
	})
	if len(alone) == 0 || l.comparisons > maxComparisons {
		return
	}
	first := alone[0]
	i := first.invented()
	also := ""
	if n := len(alone) - 1; n == 1 {
		also = fmt.Sprintf(" (so is the key of %s)", alone[1].name)
	} else if n > 1 {
		also = fmt.Sprintf(" (so are the keys of %s and %d more)", alone[1].name, n-1)
	}
	l.warn(first.keyAt[i], "%s is chosen by the client%s: a client that makes up values gets a full bucket for each; add "+
		"a limit with key: client.network for the same requests, or have Envoy verify the value before it asks sluice",
		first.key[i].facts.chosen, also)
}

// invented returns the index of the first part of a limit's key that clients can
// make up, or -1.
func (d *draft) invented() int {
	return slices.IndexFunc(d.key, func(e *expression) bool {
		if e.facts.varies != "" { // warned of already
			return false
		}
		return e.facts.chosen != "" && (e.facts.chosen != "request.url_path" || !d.match.fixesPath())
	})
}

// maxDoubtful is how many overrides of one limit are warned of one by one.
const maxDoubtful = 5

// doubtfulPart returns the index of the first part of an override's key that no
// request is likely to have, and why. The message is empty if there is none, or
// if enough of the limit's overrides were warned of.
func doubtfulPart(d *draft, n node, parts []string) (part int, message string) {
	if part = spacedPart(d.key, parts); part >= 0 {
		message = spacedWarning
	} else {
		for i := 0; i < len(d.key) && i < len(parts) && message == ""; i++ {
			part, message = i, d.unmet(i, parts[i])
		}
	}
	if message == "" {
		return part, ""
	}
	if d.doubtful++; d.doubtful > maxDoubtful {
		d.doubtfulAt = n
		return part, ""
	}
	return part, message
}

// unmet says why no request that the limit matches has the value of a part of an
// override's key. It returns "" if one may have it.
func (d *draft) unmet(i int, part string) string {
	e := d.key[i]
	if strings.HasPrefix(part, hexPrefix) || e.facts == nil {
		return ""
	}
	if values := e.facts.values; values != nil && !e.constant && !slices.Contains(values, part) {
		return fmt.Sprintf("no request has this key: the part is always one of %s", strings.Join(values, ", "))
	}
	canonical, err := e.canonicalPart(part)
	if err != nil {
		return "" // a mistake, which is reported
	}
	if field := d.match.excludes(e.attribute, canonical); field != "" {
		return fmt.Sprintf("no request has this key: the limit's match.%s excludes it", field)
	}
	return ""
}
