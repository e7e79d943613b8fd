package policy

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
)

// maxPlans bounds the plans of one config.
const maxPlans = 10_000

// plan is a rate, a burst and a quota with a name, which limits and overrides use.
type plan struct {
	// grants has no plan, no mode, and no time zone or day to start on: these are
	// those of the limit or the override. It is empty after a mistake in the plan.
	grants allowance
	at     node
	isUsed bool
}

// readPlans reads the plans. Limits must be read after them.
func (cr *configReader) readPlans(n node) {
	values, ok := entries(n.Node)
	switch {
	case !ok:
		cr.wrong(n, "must be a mapping of plans such as {gold: {rate: 600/m, burst: 1000}}, not %s", describe(n.Node))
		cr.incomplete = true
		return
	case len(values) > maxPlans:
		cr.wrong(n, "%d plans; the maximum is %d", len(values), maxPlans)
		cr.incomplete = true
		return
	}
	fields := make(map[string]func(node), len(values))
	for _, v := range values {
		name := v.Key.GetToken().Value
		cr.plans[name] = &plan{isUsed: true} // until it is read
		fields[name] = func(n node) { cr.readPlan(name, n) }
	}
	cr.mapping(n, fields)
}

// readPlan reads a plan.
func (cr *configReader) readPlan(name string, n node) {
	before := len(cr.mistakes)
	p := &plan{at: n}
	if err := checkName(name); err != nil {
		cr.wrong(n, "%v", err)
	}
	var g granted
	cr.mapping(n, map[string]func(node){
		"rate":  func(n node) { g.rate = n },
		"burst": func(n node) { g.burst = n },
		"quota": func(n node) { g.quota = n },
	})
	switch {
	case len(cr.mistakes) > before:
	case !g.isGiven():
		cr.wrong(n, "missing rate or quota; a plan needs one of them, or both")
	default:
		if t := cr.readTier(g); t != nil {
			p.grants = allowance{rate: t.rate, quota: t.quotaText}
			if g.burst.Node != nil {
				p.grants.burst = strconv.FormatInt(t.bucket.Burst(), 10)
			}
		}
	}
	p.isUsed = len(cr.mistakes) > before // nothing is warned of after a mistake
	cr.plans[name] = p
}

// plannedTier returns the tier of the plan of an allowance. It is nil if a mistake in
// the plan, or in plans, is reported. An error is about the field that is returned.
func (lr *limitReader) plannedTier(a allowance) (t *tier, field string, err error) {
	if a.rate != "" || a.burst != "" || a.quota != "" {
		return nil, "plan", fmt.Errorf("plan %s gives the rate, the burst and the quota; remove these, or the plan", a.plan)
	}
	p := lr.plans[a.plan]
	switch {
	case p == nil && lr.incomplete && len(lr.plans) == 0:
		return nil, "", nil
	case p == nil:
		return nil, "plan", lr.unknownPlan(a.plan)
	case p.grants == (allowance{}):
		return nil, "", nil
	}
	if lr.inputs != nil { // a route's limit may be read while others use the plans
		p.isUsed = true
	}
	b := p.grants
	b.mode, b.zone, b.starts, b.startsInherited = a.mode, a.zone, a.starts, a.startsInherited
	shared, field, err := lr.tierOf(b)
	if err != nil {
		return nil, field, err
	}
	own := *shared
	own.plan = a.plan
	return &own, "", nil
}

// unknownPlan is the error about a name that no plan has.
func (lr *limitReader) unknownPlan(name string) error {
	names := slices.Sorted(maps.Keys(lr.plans))
	a := &advice{what: fmt.Sprintf("unknown plan %q", name)}
	const most = 10
	switch {
	case len(names) == 0:
		a.want = "the config has no plans; write plans: {gold: {rate: 600/m}} above the limits"
	case len(names) > most:
		a.want = fmt.Sprintf("want one of %s and %d more", strings.Join(names[:most], ", "), len(names)-most)
	default:
		a.want = "want one of " + strings.Join(names, ", ")
	}
	if near := nearest(name, names); near != "" {
		a.mend = fmt.Sprintf("did you mean %s?", near)
	}
	return a
}

// readPlanned returns the name of the plan that is granted, beside which nothing else
// is.
func (lr *limitReader) readPlanned(g granted) string {
	name, ok := lr.text(g.plan)
	if ok && name == "" {
		lr.wrong(g.plan, "%s", noValue)
	}
	for _, other := range []node{g.rate, g.burst, g.quota} {
		if ok && other.Node != nil {
			lr.wrong(other, "the plan gives the rate, the burst and the quota; remove this, or the plan")
			break
		}
	}
	return name
}

// warnOfPlans warns of plans that nothing uses.
func (l *linter) warnOfPlans() {
	for _, name := range slices.Sorted(maps.Keys(l.plans)) {
		if p := l.plans[name]; !p.isUsed {
			l.warn(p.at, "no limit and no override has this plan; remove it, or write plan: %s where it is meant", name)
		}
	}
}

// samePlans reports whether two configs have the same plans.
func samePlans(a, b map[string]*plan) bool {
	return maps.EqualFunc(a, b, func(p, q *plan) bool { return p.grants == q.grants })
}
