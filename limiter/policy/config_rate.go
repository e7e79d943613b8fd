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
}

// isGiven reports whether there is a rate, a quota or a plan.
func (g *granted) isGiven() bool {
	return g.rate.Node != nil || g.quota.Node != nil || g.plan.Node != nil
}

// readTier reads what is granted, which is something. It returns nil after a
// mistake.
func (lr *limitReader) readTier(g granted) *tier {
	if g.plan.Node != nil {
		return lr.readPlanned(g)
	}
	a := allowance{mode: g.mode}
	if g.quota.Node != nil {
		before := len(lr.mistakes)
		a.zone, a.starts, a.startsInherited = g.zone, g.inherited, true
		if g.startsAt.Node != nil {
			a.starts, a.startsInherited = g.starts, false
		}
		if kind := describe(g.quota.Node); kind != "a string" && kind != "a number" {
			lr.wrong(g.quota, "must be tokens/unit such as 100000/month, not %s", kind)
		} else if a.quota, _ = lr.scalar(g.quota); len(lr.mistakes) == before {
			if _, err := quotaOf(a); err != nil {
				at := g.quota
				if _, _, quotaErr := parseQuota(a.quota); quotaErr == nil && g.startsAt.Node != nil {
					at = g.startsAt
				}
				lr.wrongError(at, err)
			}
		}
		if len(lr.mistakes) > before {
			return nil
		}
	}
	if g.rate.Node == nil {
		if g.burst.Node != nil {
			lr.wrong(g.burst, "burst needs a rate; a quota is its own burst")
			return nil
		}
		t, err := lr.tierOf(a)
		if err != nil {
			lr.wrongError(g.quota, err)
		}
		return t
	}
	rate, burst := g.rate, g.burst
	if kind := describe(rate.Node); kind != "a string" && kind != "a number" {
		lr.wrong(rate, "must be tokens/period such as 10/m, not %s", kind)
		return nil
	}
	text, ok := lr.scalar(rate) // a number is reported as a rate without a period
	if !ok {
		return nil
	}
	burstText, at := "", rate
	if burst.Node != nil {
		var v int64
		before := len(lr.mistakes)
		if lr.integer(burst, &v, 1, limiter.MaxTokens); len(lr.mistakes) > before {
			lr.mistakes[before].Message += "; omit burst for as many tokens as the rate has"
			return nil
		}
		burstText, at = strconv.FormatInt(v, 10), burst
	}
	if _, _, err := parseRate(text); err != nil {
		at = rate
	}
	a.rate, a.burst = text, burstText
	t, err := lr.tierOf(a)
	if err != nil {
		lr.wrongError(at, err)
		return nil
	}
	return t
}

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
	// quota is empty if there is none; zone is the time zone of it or of the plan's,
	// and starts the day that it starts on. startsInherited says that starts is the limit's, and without
	// effect on an override's quota each hour or day.
	quota, zone, starts string
	startsInherited     bool
}

// tierOf returns the tier of an allowance.
func (lr *limitReader) tierOf(a allowance) (*tier, error) {
	if t := lr.tiers[a]; t != nil {
		return t, nil
	}
	if a.plan != "" {
		t, err := lr.plannedTier(a)
		if err == nil {
			err = checkMode(a.mode)
		}
		if err != nil {
			return nil, err
		}
		lr.tiers[a] = t
		return t, nil
	}
	rate, burst := a.rate, a.burst
	if a.quota == "" && a.starts != "" && !a.startsInherited {
		return nil, errors.New("starts has no effect without quota; an override replaces the limit's quota too")
	}
	if rate == "" && a.quota == "" {
		return nil, errors.New("neither a rate, a quota nor a plan; an override needs one of them")
	}
	var tokens int64
	var period time.Duration
	var err error
	if rate != "" {
		if tokens, period, err = parseRate(rate); err != nil {
			return nil, err
		}
	}
	if err := checkMode(a.mode); err != nil {
		return nil, err
	}
	t := &tier{rate: rate, mode: a.mode, quotaText: a.quota}
	var quota limiter.Bucket
	if a.quota != "" {
		if quota, err = quotaOf(a); err != nil {
			return nil, err
		}
		t.quota = quota
	}
	switch {
	case rate == "" && burst != "":
		return nil, fmt.Errorf("burst %s needs a rate; a quota is its own burst", burst)
	case rate == "":
		t.bucket, t.quota = quota, limiter.Bucket{}
	case period == 0 && a.quota != "" && rate == noneRate:
		return nil, errors.New("rate: none denies every request; omit quota")
	case period == 0 && a.quota != "":
		return nil, errors.New("rate: unlimited has no effect beside a quota; omit rate")
	case period == 0 && burst != "":
		return nil, fmt.Errorf("burst %s needs a bucket, but the rate is %s; omit burst", burst, rate)
	case period == 0:
		t.unlimited, t.none = rate == unlimitedRate, rate == noneRate
	default:
		size := tokens
		if burst != "" {
			if size, err = strconv.ParseInt(burst, 10, 64); err != nil || burst[0] == '+' {
				return nil, fmt.Errorf("invalid burst %q; want a whole number from 1 to %d", burst, limiter.MaxTokens)
			}
		}
		if t.bucket, err = limiter.NewBucket(tokens, period, size); err != nil {
			return nil, err
		}
	}
	lr.tiers[a] = t
	return t, nil
}

// checkMode returns an error if a text is not the mode of an override. It may be
// empty.
func checkMode(s string) error {
	if modes := []string{"enforce", "shadow"}; s != "" && !slices.Contains(modes, s) {
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
			return 0, 0, fmt.Errorf("invalid rate %q; write none to deny every request", s)
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
