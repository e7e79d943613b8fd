package policy

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
)

// Keys of context_extensions, by which Envoy's routes add limits of their own
// and select those of the file.
const (
	routePrefix = "sluice."
	routeLimit  = "sluice.limit." // followed by the limit's name
	routeLimits = "sluice.limits"
)

// Bounds of the route table. Clients cannot set context_extensions through
// Envoy. But Envoy's configuration changes over time, and a program that can
// reach listen.grpc can send anything.
const (
	maxRouteTexts  = 4096
	maxRouteText   = 8192     // bytes of a key and its value
	maxRouteMemory = 24 << 20 // estimated bytes of all entries
)

// route is what the context_extensions of one request say.
type route struct {
	only     *routeEntry   // limits of the file to consider; nil: all
	limits   []*routeEntry // the route's limits, sorted by name
	mistakes []*RuleError
}

// routeEntry is a parsed entry of context_extensions.
type routeEntry struct {
	rule    *rule // the route's limit; nil: switched off
	index   int   // of the file's limit with the same name, or -1
	limits  set   // selected limits of the file
	mistake *RuleError
	memory  int // estimated bytes
}

// considers reports whether limit i of the file is considered on the route.
func (r *route) considers(i int) bool {
	return !r.omits(i) && r.replacing(i) == nil
}

// omits reports whether the route selects limits of the file, and not limit i.
func (r *route) omits(i int) bool {
	return r.only != nil && r.only.limits[i>>6]&(1<<(i&63)) == 0
}

// replacing returns the route's entry with the name of limit i of the file, or
// nil.
func (r *route) replacing(i int) *routeEntry {
	for _, e := range r.limits {
		if e.index == i {
			return e
		}
	}
	return nil
}

// route parses the context_extensions of a request. The result is cached.
func (c *Config) route(context map[string]string) (route route) {
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
			route.mistakes = append(route.mistakes, e.mistake)
		case key == routeLimits:
			route.only = e
		default:
			route.limits = append(route.limits, e)
		}
	}
	return route
}

// routeText is an entry of context_extensions as Envoy sends it.
type routeText struct{ key, value string }

// routeTable caches parsed entries of context_extensions. It is safe for
// concurrent use.
type routeTable struct {
	// reading serializes parsing. A new expression takes milliseconds to
	// compile, so that a caller who invents expressions occupies one core at
	// most.
	reading sync.Mutex
	mu      sync.RWMutex
	entries map[routeText]*routeEntry
	memory  int // of all entries
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
		return e // another goroutine was faster
	}
	if len(text.key)+len(text.value) > maxRouteText {
		return c.readRoute(text) // returns a mistake, which is not cached
	}
	// The text is part of the request's buffer. A copy lets that be freed.
	text = routeText{strings.Clone(text.key), strings.Clone(text.value)}
	e = c.readRoute(text)
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.entries == nil {
		t.entries = make(map[routeText]*routeEntry)
	}
	for old, dropped := range t.entries { // drops random entries; those in use are parsed again
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

// Estimates of an entry's memory in bytes, as measured: a limit with one short
// expression, each byte of text, and a mistake without its message.
const (
	entryMemory   = 4096
	textFactor    = 32
	mistakeMemory = 256
)

// readRoute parses an entry of context_extensions, and estimates its memory.
func (c *Config) readRoute(text routeText) *routeEntry {
	expressions := make(map[expressionID]*expression)
	e := c.readRouteText(text, expressions)
	e.memory = entryMemory + textFactor*(len(text.key)+len(text.value))
	for _, x := range expressions {
		if x != nil { // it compiled
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

// readRouteText parses an entry of context_extensions. It adds the expressions
// that it compiles to expressions.
func (c *Config) readRouteText(text routeText, expressions map[expressionID]*expression) *routeEntry {
	wrong := func(limit string, err error) *routeEntry {
		return &routeEntry{mistake: &RuleError{Limit: limit, Field: "context_extensions", Err: err,
			Shadow: c.inherited.mode == "shadow"}}
	}
	name, isLimit := strings.CutPrefix(text.key, routeLimit)
	switch {
	case len(text.key)+len(text.value) > maxRouteText:
		return wrong("", fmt.Errorf("a sluice. key and its value have %d bytes; the maximum is %d",
			len(text.key)+len(text.value), maxRouteText))
	case text.key == routeLimits:
		return c.readListed(text.value, wrong)
	case !isLimit:
		return wrong("", fmt.Errorf("unknown key %q; want sluice.limits or sluice.limit.<name>", text.key))
	}
	if err := checkName(name); err != nil {
		return wrong("", fmt.Errorf("%s: %w", routeLimit, err))
	}
	if c.noRouteLimits {
		return wrong(name,
			errors.New("routes.limits is false in this config, so routes can neither add a limit nor turn one off"))
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
	lr.expressions, lr.tiers = expressions, make(map[allowance]*tier)
	root := lr.document([]byte(text.value))
	if root == nil {
		if len(lr.mistakes) == 0 {
			return wrong(name,
				errors.New(`empty value; want a limit such as {rate: 10/m, key: client.network}, or "off"`))
		}
		return wrong(name, lr.mistakes)
	}
	d := &draft{name: name}
	if lr.readLimit(*root, d) {
		e.rule = lr.rule(d)
	}
	if e.rule != nil && c.routeDomains != nil && !slices.Contains(c.routeDomains, e.rule.limit.Domain) {
		return wrong(name, fmt.Errorf("domain %q is not allowed for routes; want one of routes.domains: %s",
			e.rule.limit.Domain, strings.Join(c.routeDomains, ", ")))
	}
	if len(lr.mistakes) > 0 {
		e := wrong(name, lr.mistakes)
		e.mistake.Shadow = e.mistake.Shadow || d.mode == "shadow"
		return e
	}
	return e
}

// readListed parses the value of sluice.limits.
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
