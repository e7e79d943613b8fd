package policy

import (
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/sluiceproxy/sluice/limiter"
)

// readTier reads a rate and a burst. The burst's node may be nil.
func (lr *limitReader) readTier(rate, burst node) *tier {
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
	t, err := lr.tierOf(text, burstText)
	if err != nil {
		lr.wrongError(at, err)
		return nil
	}
	return t
}

// unlimitedRate is the rate of limits and overrides that have no bucket.
const unlimitedRate = "unlimited"

// tierOf returns the tier of a rate and a burst, given as text. If burst is
// empty, it is the number of tokens of the rate.
func (lr *limitReader) tierOf(rate, burst string) (*tier, error) {
	id := [2]string{rate, burst}
	if t := lr.tiers[id]; t != nil {
		return t, nil
	}
	tokens, period, err := parseRate(rate)
	if err != nil {
		return nil, err
	}
	t := &tier{rate: rate}
	switch {
	case period == 0 && burst != "":
		return nil, fmt.Errorf("burst %s needs a bucket, but the rate is unlimited; omit burst", burst)
	case period == 0:
		t.unlimited = true
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
	lr.tiers[id] = t
	return t, nil
}

// parseRate parses tokens/period, such as 10/s, 10/7d, 5000/24h or 3/250ms. For
// "unlimited" the period is 0.
func parseRate(s string) (tokens int64, period time.Duration, err error) {
	invalid := func() error {
		return &advice{fmt.Sprintf("invalid rate %q", s), mendRate(s), "want tokens/period such as 10/s, 100/m, 5000/24h, " +
			"10/7d or 3/250ms (units: us, ms, s, m, h, d), or unlimited"}
	}
	if s == unlimitedRate {
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
