package policy

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
)

// What Envoy's filter chain says in context_extensions: limits of a route's own, and which of the file's are considered on it.
const (
	routePrefix = "sluice."
	routeLimit  = "sluice.limit." // and the limit's name
	routeLimits = "sluice.limits"
)

// Bounds of the route table. Through Envoy no client can set context_extensions,
// but Envoy's config changes, and whoever reaches listen.grpc can send any.
const (
	maxRouteTexts  = 4096
	maxRouteText   = 8192     // bytes of one
	maxRouteMemory = 24 << 20 // bytes that all entries take
)

// route is what a request's route says.
type route struct {
	only     *routeEntry   // which of the file's limits are considered; nil: all
	limits   []*routeEntry // its own, by name
	mistakes []*RuleError
}

// routeEntry is one of context_extensions, as it was understood.
type routeEntry struct {
	rule    *rule // the route's own limit; nil: off
	index   int   // the file's limit of that name, or -1
	limits  set   // of the file's limits
	mistake *RuleError
	memory  int // bytes that it takes, about
}

// considers reports whether the file's limit i is considered on the route.
func (r *route) considers(i int) bool {
	return !r.omits(i) && r.replacing(i) == nil
}

// omits reports whether the route lists others of the file's limits.
func (r *route) omits(i int) bool {
	return r.only != nil && r.only.limits[i>>6]&(1<<(i&63)) == 0
}

// replacing is the route's entry by the name of the file's limit i, or nil.
func (r *route) replacing(i int) *routeEntry {
	for _, e := range r.limits {
		if e.index == i {
			return e
		}
	}
	return nil
}

// route reads what a request's route says.
func (c *Config) route(context map[string]string) (on route) {
	var keys []string
	for key := range context {
		if strings.HasPrefix(key, routePrefix) {
			keys = append(keys, key)
		}
	}
	slices.Sort(keys)
	for _, key := range keys {
		e := c.routes.entry(c, routeText{key, context[key]})
		switch {
		case e.mistake != nil:
			on.mistakes = append(on.mistakes, e.mistake)
		case key == routeLimits:
			on.only = e
		default:
			on.limits = append(on.limits, e)
		}
	}
	return on
}

// routeText is one of context_extensions as Envoy sends it.
type routeText struct{ key, value string }

// routeTable keeps what was understood of context_extensions, so that each is parsed once. It is safe for concurrent use.
type routeTable struct {
	reading sync.Mutex // one text at a time: a fresh expression takes milliseconds, and who invents them gets one core at most
	mu      sync.RWMutex
	entries map[routeText]*routeEntry
	memory  int // of the entries
}

func (t *routeTable) entry(c *Config, text routeText) *routeEntry {
	t.mu.RLock()
	e := t.entries[text]
	t.mu.RUnlock()
	if e != nil {
		return e
	}
	t.reading.Lock()
	defer t.reading.Unlock()
	t.mu.RLock()
	e = t.entries[text]
	t.mu.RUnlock()
	if e != nil {
		return e // somebody else was quicker
	}
	if len(text.key)+len(text.value) > maxRouteText {
		return c.readRoute(text) // a mistake, and not kept
	}
	// A copy: the text is a part of the check, which it would keep in memory.
	text = routeText{strings.Clone(text.key), strings.Clone(text.value)}
	e = c.readRoute(text)
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.entries == nil {
		t.entries = make(map[routeText]*routeEntry)
	}
	for old, dropped := range t.entries { // any one; what is in use comes back
		if len(t.entries) < maxRouteTexts && t.memory+e.memory <= maxRouteMemory {
			break
		}
		delete(t.entries, old)
		t.memory -= dropped.memory
	}
	t.entries[text] = e
	t.memory += e.memory
	return e
}

// The memory of an entry in bytes, as measured: of a limit with one short
// expression, for each byte of text, and of a mistake without its message.
const (
	entryBytes    = 4096
	textFactor    = 32
	mistakeMemory = 256
)

// readRoute decodes one of context_extensions, and estimates the memory that the
// entry takes.
func (c *Config) readRoute(text routeText) *routeEntry {
	expressions := make(map[[2]string]*expression)
	e := c.readRouteText(text, expressions)
	e.memory = entryBytes + textFactor*(len(text.key)+len(text.value))
	for _, x := range expressions {
		if x != nil { // it could be compiled
			e.memory += x.instructions * instructionBytes
		}
	}
	if e.mistake != nil {
		if all, ok := errors.AsType[Mistakes](e.mistake.Err); ok {
			for _, m := range all {
				e.memory += mistakeMemory + len(m.Field) + len(m.Message)
			}
		}
	}
	return e
}

// readRouteText decodes one of context_extensions. It adds the expressions that
// it compiles to expressions.
func (c *Config) readRouteText(text routeText, expressions map[[2]string]*expression) *routeEntry {
	wrong := func(limit string, err error) *routeEntry {
		return &routeEntry{mistake: &RuleError{Limit: limit, Field: "context_extensions", Err: err, Shadow: c.inherited.mode == "shadow"}}
	}
	name, isLimit := strings.CutPrefix(text.key, routeLimit)
	switch {
	case len(text.key)+len(text.value) > maxRouteText:
		return wrong("", fmt.Errorf("a sluice. key and its value have %d bytes; the maximum is %d", len(text.key)+len(text.value), maxRouteText))
	case text.key == routeLimits:
		return c.readListed(text.value, wrong)
	case !isLimit:
		return wrong("", fmt.Errorf("unknown key %q; want sluice.limits or sluice.limit.<name>", text.key))
	}
	if err := checkName(name); err != nil {
		return wrong("", fmt.Errorf("%s: %w", routeLimit, err))
	}
	if c.noRouteLimits {
		return wrong(name, errors.New("routes.limits is false in this config, so routes can neither add a limit nor turn one off"))
	}
	e := &routeEntry{index: -1}
	if i, ok := c.byName[name]; ok {
		e.index = i
	}
	if text.value == "off" {
		return e
	}
	lr := c.inherited
	lr.reader = reader{file: text.key}
	lr.expressions, lr.tiers = expressions, make(map[[2]string]*tier)
	root := lr.document([]byte(text.value))
	if root == nil {
		if len(lr.mistakes) == 0 {
			return wrong(name, errors.New(`empty value; want a limit such as {rate: 10/m, key: client.network}, or "off"`))
		}
		return wrong(name, lr.mistakes)
	}
	d := &draft{name: name}
	if lr.readLimit(*root, d) {
		e.rule = lr.rule(d)
	}
	if e.rule != nil && c.routeDomains != nil && !slices.Contains(c.routeDomains, e.rule.limit.Domain) {
		return wrong(name, fmt.Errorf("domain %q is not allowed for routes; want one of routes.domains: %s", e.rule.limit.Domain, strings.Join(c.routeDomains, ", ")))
	}
	if len(lr.mistakes) > 0 {
		e := wrong(name, lr.mistakes)
		e.mistake.Shadow = e.mistake.Shadow || d.mode == "shadow"
		return e
	}
	return e
}

// readListed reads the value of sluice.limits.
func (c *Config) readListed(value string, wrong func(string, error) *routeEntry) *routeEntry {
	e := &routeEntry{limits: make(set, (len(c.rules)+63)/64)}
	for name := range strings.SplitSeq(value, ",") {
		name = strings.TrimSpace(name)
		i, ok := c.byName[name]
		if !ok {
			return wrong("", fmt.Errorf("sluice.limits: unknown limit %q", name))
		}
		e.limits[i>>6] |= 1 << (i & 63)
	}
	return e
}
