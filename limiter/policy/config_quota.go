package policy

import (
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/sluiceproxy/sluice/limiter"
)

// quotaSuffix is what follows a limit's name in that of the second bucket, of a
// limit with a rate and a quota. A name has no slash itself.
const quotaSuffix = "/quota"

// quotaOf returns the bucket of an allowance's quota. An error is about the field
// that is returned.
func quotaOf(a allowance) (b limiter.Bucket, field string, err error) {
	tokens, unit, err := parseQuota(a.quota)
	if err != nil {
		return b, "quota", err
	}
	starts, err := parseStarts(a.starts)
	if err != nil {
		return b, "starts", err
	}
	if a.startsInherited && unit < limiter.Week {
		starts = time.Time{} // the limit's own quota has a longer unit
	}
	c, err := limiter.NewCalendar(unit, a.zone, starts)
	if err != nil {
		return b, "starts", err // the time zone was checked before
	}
	b, err = limiter.NewQuota(tokens, c)
	return b, "quota", err
}

// parseStarts parses a date; empty is zero.
func parseStarts(s string) (time.Time, error) {
	if s == "" {
		return time.Time{}, nil
	}
	day, err := time.Parse(time.DateOnly, s)
	if err != nil || day.IsZero() { // which NewCalendar would take for none
		return time.Time{}, fmt.Errorf("invalid starts %q; want a date such as 2026-01-14", s)
	}
	return day, nil
}

// readStarts reads the day on which the windows of a quota begin.
func (lr *limitReader) readStarts(n node, g *granted) {
	g.startsAt = n
	g.starts = lr.readText(n, "a date such as 2026-01-14")
	if _, err := parseStarts(g.starts); err != nil {
		lr.wrongError(n, err)
		g.starts = ""
	}
}

// parseQuota parses tokens/unit, such as 100000/month.
func parseQuota(s string) (tokens int64, unit limiter.Unit, err error) {
	count, name, ok := strings.Cut(s, "/")
	tokens, err = strconv.ParseInt(count, 10, 64)
	if ok && err == nil && !strings.HasPrefix(count, "+") {
		if unit, err = limiter.ParseUnit(name); err == nil {
			switch {
			case tokens == 0:
				return 0, 0, fmt.Errorf("invalid quota %q; want 1 to %d tokens, or rate: none to deny every request", s,
					limiter.MaxTokens)
			case tokens < 0 || tokens > limiter.MaxTokens:
				return 0, 0, fmt.Errorf("invalid quota %q; want 1 to %d tokens", s, limiter.MaxTokens)
			}
			return tokens, unit, nil
		}
	}
	return 0, 0, &advice{fmt.Sprintf("invalid quota %q", s), mendQuota(s),
		"want tokens/unit such as 100000/month (units: hour, day, week, month, year)"}
}

var (
	writtenQuota = whenUsed(`(?i)^([0-9][0-9,_]*)(k|m)? *(?:tokens|requests|reqs|req)? *` +
		`(?:/|per|an|a)? *(1)? *([a-z]*)$`)
	writtenDays = whenUsed(`^([0-9]+)/([0-9]+)(h|d|m|s)$`)
)

// quotaUnits are other words for the units of a quota.
var quotaUnits = map[string]string{
	"h": "hour", "hr": "hour", "hours": "hour", "hourly": "hour", "d": "day", "days": "day", "daily": "day",
	"w": "week", "weeks": "week", "weekly": "week", "mo": "month", "mon": "month", "months": "month", "monthly": "month",
	"y": "year", "yr": "year", "years": "year", "yearly": "year",
	"hour": "hour", "day": "day", "week": "week", "month": "month", "year": "year",
}

// mendQuota returns what to write instead of a text that is not a quota, or "".
func mendQuota(s string) string {
	s = strings.TrimSpace(s)
	switch strings.ToLower(s) {
	case "unlimited", "none":
		return "write rate: " + strings.ToLower(s) + " and omit quota"
	}
	if writtenDays().MatchString(s) {
		if _, _, err := parseRate(s); err == nil {
			return "a quota has a whole unit of the calendar; write rate: " + s + ", or a quota such as 1000/day"
		}
	}
	m := writtenQuota().FindStringSubmatch(s)
	if m == nil {
		return ""
	}
	zeros := map[string]string{"k": "000", "m": "000000"}[strings.ToLower(m[2])]
	count := strings.NewReplacer(",", "", "_", "").Replace(m[1]) + zeros
	if n, err := strconv.ParseInt(count, 10, 64); err != nil || n < 1 || n > limiter.MaxTokens {
		return ""
	}
	switch unit := strings.ToLower(m[4]); {
	case unit == "" && m[2] == "":
		return fmt.Sprintf("a quota needs a unit; write %s/day or %[1]s/month", count)
	case unit == "m" || unit == "min" || unit == "minute" || unit == "s" || unit == "second":
		return fmt.Sprintf("the shortest unit of a quota is hour; write rate: %s/%s, or quota: %[1]s/month", count, unit[:1])
	case quotaUnits[unit] != "":
		return fmt.Sprintf("write %s/%s", count, quotaUnits[unit])
	}
	return ""
}
