package policy

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/sluiceproxy/sluice/limiter"
)

// readTier reads a rate and a burst, whose node may be nil, for a mode as
// allowance has it.
func (lr *limitReader) readTier(rate, burst node, mode string) *tier {
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
	t, err := lr.tierOf(allowance{rate: text, burst: burstText, mode: mode})
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

// allowance is what a limit or an override grants, as text.
type allowance struct {
	rate  string
	burst string // empty: the number of tokens of the rate
	plan  string // name of a plan, instead of the rate and the burst; empty: none
	mode  string // of an override; empty: the limit's
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
	tokens, period, err := parseRate(rate)
	if err != nil {
		return nil, err
	}
	if err := checkMode(a.mode); err != nil {
		return nil, err
	}
	t := &tier{rate: rate, mode: a.mode}
	switch {
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
