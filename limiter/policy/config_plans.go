package policy

import (
	"fmt"
	"maps"
	"slices"
	"strings"
)

// maxPlans bounds the plans of one config.
const maxPlans = 10_000

// plan is a rate and a burst with a name, which limits and overrides use.
type plan struct {
	tier     *tier
	hasBurst bool // the burst is given, and not that of the rate
	at       node
	isUsed   bool
}

// readPlans reads the plans. Limits must be read after them.
func (cr *configReader) readPlans(n node) {
	values, ok := entries(n.Node)
	switch {
	case !ok:
		cr.wrong(n, "must be a mapping of plans such as {gold: {rate: 600/m, burst: 1000}}, not %s", describe(n.Node))
		return
	case len(values) > maxPlans:
		cr.wrong(n, "%d plans; the maximum is %d", len(values), maxPlans)
		return
	}
	fields := make(map[string]func(node), len(values))
	for _, v := range values {
		name := v.Key.GetToken().Value
		fields[name] = func(n node) { cr.readPlan(name, n) }
	}
	cr.mapping(n, fields)
}

// readPlan reads a plan. One with a mistake has some rate, so that what uses it is
// not a mistake, too.
func (cr *configReader) readPlan(name string, n node) {
	before := len(cr.mistakes)
	p := &plan{at: n, tier: &tier{rate: unlimitedRate, unlimited: true}}
	if err := checkName(name); err != nil {
		cr.wrong(n, "%v", err)
	}
	var rate, burst node
	isMapping := cr.mapping(n, map[string]func(node){
		"rate":  func(n node) { rate = n },
		"burst": func(n node) { burst = n },
	})
	switch {
	case !isMapping || len(cr.mistakes) > before:
	case rate.Node == nil:
		cr.wrong(n, "missing rate; a plan needs one")
	default:
		if t := cr.readTier(rate, burst, ""); t != nil {
			t := *t
			t.plan = name
			p.tier, p.hasBurst = &t, burst.Node != nil
		}
	}
	p.isUsed = len(cr.mistakes) > before // nothing is warned of after a mistake
	cr.plans[name] = p
}

// plannedTier returns the tier of the plan of an allowance.
func (lr *limitReader) plannedTier(a allowance) (*tier, error) {
	if a.rate != "" || a.burst != "" {
		return nil, fmt.Errorf("plan %s gives the rate and the burst; remove these, or the plan", a.plan)
	}
	p := lr.plans[a.plan]
	if p == nil {
		return nil, lr.unknownPlan(a.plan)
	}
	if lr.inputs != nil { // a route's limit may be read while others use the plans
		p.isUsed = true
	}
	t := *p.tier
	t.mode = a.mode
	return &t, nil
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

// readPlanned returns the tier of the plan that a node names, for a mode as
// allowance has it; nil after a mistake. The nodes of the rate and the burst beside
// it must be nil.
func (lr *limitReader) readPlanned(n, rate, burst node, mode string) *tier {
	name, ok := lr.text(n)
	if !ok {
		return nil
	}
	for _, other := range []node{rate, burst} {
		if other.Node != nil {
			lr.wrong(other, "the plan gives the rate and the burst; remove this, or the plan")
			return nil
		}
	}
	t, err := lr.tierOf(allowance{plan: name, mode: mode})
	if err != nil {
		lr.wrongError(n, err)
		return nil
	}
	return t
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
	return maps.EqualFunc(a, b, func(p, q *plan) bool { return *p.tier == *q.tier })
}
