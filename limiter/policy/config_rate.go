package policy

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/sluiceproxy/sluice/limiter"
)

// granted is what a limit, an override or a plan grants, as read. Its nodes may be
// nil.
type granted struct {
	rate, burst, quota, plan, startsAt node
	starts                             string // at startsAt
	// zone is the limit's time zone, and inherited its starts.
	zone, inherited string
	mode            string // as allowance has it
	// incomplete reports that a field beside these has a mistake, by which the rate
	// may only seem to be missing.
	incomplete bool
}

// isGiven reports whether there is a rate, a quota or a plan.
func (g *granted) isGiven() bool {
	return g.rate.Node != nil || g.quota.Node != nil || g.plan.Node != nil
}

// at returns the node that a mistake in a field of an allowance is about.
func (g *granted) at(field string) node {
	named := map[string]node{"rate": g.rate, "burst": g.burst, "quota": g.quota, "plan": g.plan, "starts": g.startsAt}
	for _, n := range []node{named[field], g.plan, g.rate} {
		if n.Node != nil {
			return n
		}
	}
	return g.quota
}

// readTier reads what is granted, which is something. It returns nil after a
// mistake.
func (lr *limitReader) readTier(g granted) *tier {
	if g.incomplete && g.rate.Node == nil {
		g.burst = node{} // which needs a rate
	}
	before := len(lr.mistakes)
	a := allowance{mode: g.mode, zone: g.zone, starts: g.inherited, startsInherited: true}
	if g.startsAt.Node != nil {
		a.starts, a.startsInherited = g.starts, false
	}
	if g.plan.Node != nil {
		a.plan = lr.readPlanned(g)
	}
	if g.quota.Node != nil {
		a.quota = lr.readText(g.quota, "tokens/unit such as 100000/month")
	}
	if g.rate.Node != nil { // a number is reported as a rate without a period
		a.rate = lr.readText(g.rate, "tokens/period such as 10/m")
	}
	if g.burst.Node != nil {
		var v int64
		others := len(lr.mistakes)
		if lr.integer(g.burst, &v, 1, limiter.MaxTokens); len(lr.mistakes) > others {
			lr.mistakes[others].Message += "; omit burst for as many tokens as the rate has"
		}
		a.burst = strconv.FormatInt(v, 10)
	}
	if len(lr.mistakes) > before {
		return nil
	}
	t, field, err := lr.tierOf(a)
	if err != nil {
		lr.wrongError(g.at(field), err)
		return nil
	}
	return t
}

// readText reads a text, or a number, that is wanted as in want. It returns "" after
// a mistake, such as a variable that is empty.
func (lr *limitReader) readText(n node, want string) string {
	if kind := describe(n.Node); kind != "a string" && kind != "a number" {
		lr.wrong(n, "must be %s, not %s", want, kind)
		return ""
	}
	text, ok := lr.scalar(n)
	if ok && text == "" {
		lr.wrong(n, "%s", noValue)
	}
	return text
}

// errNoQuota is the error about the starts of an override without a quota.
var errNoQuota = errors.New("has no effect without quota; an override replaces the limit's quota too")

// The rates of limits and overrides that have no bucket.
const (
	unlimitedRate = "unlimited" // allows every request
	noneRate      = "none"      // denies every request
)

// allowance is what a limit or an override grants, as text. It has a plan, or a
// rate, a quota or both.
type allowance struct {
	rate  string
	burst string // empty: the number of tokens of the rate
	plan  string // name of a plan, instead of the rate, the burst and the quota; empty: none
	mode  string // of an override; empty: the limit's
	quota string // empty: none
	// zone is the time zone of the quota, also of the plan's, and starts the day that
	// it starts on. startsInherited says that starts is the limit's, and without
	// effect where there is no quota, or one for each hour or day.
	zone, starts    string
	startsInherited bool
}

// tierOf returns the tier of an allowance. It is nil if a mistake in its plan is
// reported. An error is about the field of it that is returned.
func (lr *limitReader) tierOf(a allowance) (t *tier, field string, err error) {
	if t := lr.tiers[a]; t != nil {
		return t, "", nil
	}
	if a.plan != "" {
		t, field, err = lr.plannedTier(a)
	} else {
		t, field, err = newTier(a)
	}
	if err != nil || t == nil {
		return nil, field, err
	}
	lr.tiers[a] = t
	return t, "", nil
}

// newTier returns the tier of an allowance without a plan. An error is about the
// field that is returned.
func newTier(a allowance) (t *tier, field string, err error) {
	var tokens int64
	var period time.Duration
	switch {
	case a.rate == "" && a.quota == "":
		return nil, "rate", errors.New("neither a rate, a quota nor a plan; an override needs one of them")
	case a.rate != "":
		if tokens, period, err = parseRate(a.rate); err != nil {
			return nil, "rate", err
		}
	}
	if err := checkMode(a.mode); err != nil {
		return nil, "mode", err
	}
	var quota limiter.Bucket
	if a.quota != "" {
		if quota, field, err = quotaOf(a); err != nil {
			return nil, field, err
		}
	}
	t = &tier{rate: a.rate, mode: a.mode, quotaText: a.quota}
	switch {
	case a.rate == "" && a.burst != "":
		return nil, "burst", fmt.Errorf("burst %s needs a rate; a quota is its own burst", a.burst)
	case a.rate == "":
		t.bucket = quota
		return t, "", nil
	case a.rate == noneRate && a.quota != "":
		return nil, "rate", errors.New("rate: none denies every request; omit quota")
	case a.rate == unlimitedRate && a.quota != "":
		return nil, "rate", errors.New("rate: unlimited has no effect beside a quota; omit rate")
	case period == 0 && a.burst != "":
		return nil, "burst", fmt.Errorf("burst %s needs a bucket, but the rate is %s; omit burst", a.burst, a.rate)
	case period == 0:
		t.unlimited, t.none = a.rate == unlimitedRate, a.rate == noneRate
		return t, "", nil
	}
	size, field := tokens, "rate"
	if a.burst != "" {
		field = "burst"
		if size, err = strconv.ParseInt(a.burst, 10, 64); err != nil || a.burst[0] == '+' {
			return nil, field, fmt.Errorf("invalid burst %q; want a whole number from 1 to %d", a.burst, limiter.MaxTokens)
		}
	}
	if t.bucket, err = limiter.NewBucket(tokens, period, size); err != nil {
		return nil, field, err
	}
	t.quota = quota
	return t, "", nil
}

// modes are the modes of limits and overrides.
var modes = []string{"enforce", "shadow"}

// checkMode returns an error if a text is not the mode of an override. It may be
// empty.
func checkMode(s string) error {
	if s != "" && !slices.Contains(modes, s) {
		return unknownValue(s, modes)
	}
	return nil
}

// parseRate parses tokens/period, such as 10/s, 10/7d, 5000/24h or 3/250ms. For
// "unlimited" and "none" the period is 0.
func parseRate(s string) (tokens int64, period time.Duration, err error) {
	invalid := func() error {
		return &advice{fmt.Sprintf("invalid rate %q", s), mendRate(s), "want tokens/period such as 10/s, 100/m, 5000/24h, " +
			"10/7d or 3/250ms (units: us, ms, s, m, h, d), or unlimited or none"}
	}
	if s == unlimitedRate || s == noneRate {
		return 0, 0, nil
	}
	count, every, ok := strings.Cut(s, "/")
	tokens, err = strconv.ParseInt(count, 10, 64)
	if !ok || err != nil || strings.HasPrefix(count, "+") {
		return 0, 0, invalid()
	}
	if period, err = parsePeriod(every); err != nil {
		return 0, 0, invalid()
	}
	if _, err := limiter.NewBucket(tokens, period, 1); err != nil {
		if tokens == 0 {
			return 0, 0, &advice{what: fmt.Sprintf("invalid rate %q", s), want: "write none to deny every request"}
		}
		return 0, 0, fmt.Errorf("invalid rate %q: %w", s, err)
	}
	return tokens, period, nil
}

// parsePeriod parses a Go duration, a unit alone, or a number of days.
func parsePeriod(s string) (time.Duration, error) {
	switch s {
	case "us", "\u00b5s", "\u03bcs", "ms", "s", "m", "h", "d":
		s = "1" + s
	}
	if days, ok := strings.CutSuffix(s, "d"); ok {
		n, err := strconv.ParseUint(days, 10, 16)
		return time.Duration(n) * 24 * time.Hour, err
	}
	return time.ParseDuration(s)
}
