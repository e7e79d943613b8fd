package backtest

import (
	"fmt"
	"io"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"
	"unicode/utf8"

	"github.com/sluiceproxy/sluice/limiter/policy"
)

// Text writes the report for a person.
func (r *Report) Text(w io.Writer) error {
	var b strings.Builder
	if r.Interrupted {
		b.WriteString("Interrupted: this is what was found so far.\n\n")
	}
	against := ""
	if r.Against != "" {
		against = ", compared with " + printable(r.Against)
	}
	fmt.Fprintf(&b, "config:  %s%s\nlogs:    %s\n", printable(r.Config), against, r.logs())
	if r.From == nil {
		fmt.Fprintf(&b, "no requests in %s\n", plural(r.Lines, "line"))
		r.verdict(&b)
	} else {
		fmt.Fprintf(&b, "%s from %s to %s UTC, over %s\n", plural(r.Requests, "request"), clock(*r.From), clock(*r.To),
			policy.RoughDuration(r.span))
		fmt.Fprintf(&b, "limited: %s\n", r.reading(&r.Totals))
		if r.Before != nil {
			fmt.Fprintf(&b, "before:  %s\n", r.reading(r.Before))
		}
		r.verdict(&b)
		for _, count := range []struct {
			n    int64
			what string
		}{
			{r.Exempt, "exempt from all limits"},
			{r.Unmatched, "under no limit"},
			{r.Invalid, "refused by a mistake in the config: " + r.Mistake},
		} {
			if count.n > 0 {
				fmt.Fprintf(&b, "%s %s\n", plural(count.n, "request"), count.what)
			}
		}
		r.table(&b)
		for i := range r.Limits {
			r.limit(&b, &r.Limits[i])
		}
	}
	r.remarks(&b)
	_, err := io.WriteString(w, b.String())
	return err //nolint:wrapcheck // as of fmt.Fprint
}

// logs names the logs, of many the first ones.
func (r *Report) logs() string {
	const most = 5
	var names []string
	for _, name := range r.Logs[:min(most, len(r.Logs))] {
		names = append(names, printable(name))
	}
	s := strings.Join(names, ", ")
	if n := len(r.Logs) - most; n > 0 {
		s += fmt.Sprintf(" and %d more", n)
	}
	return s
}

// printable returns the name of a file as a terminal may show it.
func printable(name string) string {
	if strings.ContainsFunc(name, func(c rune) bool { return !strconv.IsPrint(c) }) || !utf8.ValidString(name) {
		return strconv.Quote(name)
	}
	return name
}

// verdict writes whether the run passed, if that was asked for, or why not.
func (r *Report) verdict(b *strings.Builder) {
	for _, why := range r.Verdict.Reasons {
		fmt.Fprintf(b, "failed:  %s\n", why)
	}
	if r.Verdict.Passed && r.Verdict.share != "" {
		fmt.Fprintf(b, "passed:  %s\n", r.Verdict.share)
	}
}

// reading describes how many requests are limited.
func (r *Report) reading(t *Totals) string {
	s := share(t.Limited, t.Requests)
	if t.AtOnce != nil {
		s += fmt.Sprintf(" if each key's requests came evenly spread over %s, %s if all at once", unit(r.grain),
			share(*t.AtOnce, t.Requests))
	}
	return s
}

// unit names a grain.
func unit(grain time.Duration) string {
	if grain == time.Second {
		return "the second"
	}
	return grain.String()
}

// table writes a line for each limit.
func (r *Report) table(b *strings.Builder) {
	if len(r.Limits) == 0 {
		b.WriteString("\nthe config has no limits\n")
		return
	}
	b.WriteString("\n")
	t := tabwriter.NewWriter(b, 0, 0, 2, ' ', tabwriter.AlignRight|tabwriter.TabIndent)
	head := "LIMIT\tRATE\tBURST\tREQUESTS\tKEYS\tLIMITED\t"
	if r.grain > time.Microsecond {
		head += "AT ONCE\t"
	}
	head += "KEYS LIMITED\t"
	if r.Before != nil {
		head += "BEFORE\tNEWLY\tNO LONGER\t"
	}
	_, _ = fmt.Fprintln(t, head)
	for i := range r.Limits {
		l := &r.Limits[i]
		name := l.Name
		if note := l.note(); note != "" {
			name += " (" + note + ")"
		}
		line := fmt.Sprintf("%s\t%s\t%s\t%s\t%s\t%s\t", name, l.rates(), l.size(), number(l.Requests), number(l.Keys),
			share(l.Limited, l.Requests))
		if r.grain > time.Microsecond {
			atOnce := "-"
			if l.AtOnce != nil {
				atOnce = share(*l.AtOnce, l.Requests)
			}
			line += atOnce + "\t"
		}
		line += share(l.LimitedKeys, l.Keys) + "\t"
		if r.Before != nil {
			before := "-"
			if l.Before != nil {
				before = share(l.Before.Limited, l.Before.Requests)
			}
			line += fmt.Sprintf("%s\t%s\t%s\t", before, number(l.NewlyKeys), number(l.SparedKeys))
		}
		_, _ = fmt.Fprintln(t, line)
	}
	_ = t.Flush()
}

// limit writes who was limited by a limit, when, and what is suggested.
func (r *Report) limit(b *strings.Builder, l *LimitReport) {
	if len(l.Worst) == 0 && l.Suggest == nil && l.NewlyKeys+l.SparedKeys == 0 {
		return
	}
	fmt.Fprintf(b, "\n%s\n", l.Name)
	if p := l.Peak; p != nil {
		fmt.Fprintf(b, "  limited over time  %s\n", sparkline(&l.timeline))
		fmt.Fprintf(b, "  most at %s UTC: %s of %s within %s\n", clock(p.From), number(p.Limited),
			plural(p.Requests, "request"), policy.RoughDuration(time.Duration(p.Seconds*float64(time.Second))))
	}
	r.keyTable(b, "worst keys", l.Worst)
	r.keyTable(b, "newly limited", l.Newly)
	r.keyTable(b, "no longer limited", l.Spared)
	if l.Suggest != nil {
		l.suggestions(b)
	}
}

func (r *Report) keyTable(b *strings.Builder, title string, keys []Key) {
	if len(keys) == 0 {
		return
	}
	width := len(title)
	for _, k := range keys {
		width = max(width, len(k.Key))
	}
	head := fmt.Sprintf("  %-*s  %10s  %10s", width, strings.ToUpper(title), "REQUESTS", "LIMITED")
	if keys[0].AtOnce != nil {
		head += fmt.Sprintf("  %10s", "AT ONCE")
	}
	fmt.Fprintln(b, head)
	for _, k := range keys {
		fmt.Fprintf(b, "  %-*s  %10s  %10s", width, k.Key, number(k.Requests), number(k.Limited))
		if k.AtOnce != nil {
			fmt.Fprintf(b, "  %10s", number(*k.AtOnce))
		}
		b.WriteString("\n")
	}
}

// suggestions writes what would limit nobody, or only a few keys.
func (l *LimitReport) suggestions(b *strings.Builder) {
	b.WriteString("  to limit\n")
	for i, s := range l.Suggest.Burst {
		burst, rate := "no burst is enough", "no rate is enough"
		if s.Burst != nil {
			burst = "burst: " + strconv.FormatInt(*s.Burst, 10)
		}
		if text := l.Suggest.Rate[i].Rate; text != nil {
			rate = "rate: " + *text
		}
		fmt.Fprintf(b, "    %-13s %s with rate %s, or %s with burst %d\n", whoIsLimited(s.Limited), burst, l.Rate, rate,
			l.Burst)
	}
	b.WriteString("  bursts that rates need\n")
	t := tabwriter.NewWriter(b, 0, 0, 2, ' ', tabwriter.AlignRight)
	_, _ = fmt.Fprint(t, "    RATE\t")
	for _, q := range quantiles {
		_, _ = fmt.Fprintf(t, "%s OF KEYS LIMITED\t", q.text)
	}
	_, _ = fmt.Fprintln(t)
	for _, p := range l.Suggest.Pairs {
		_, _ = fmt.Fprintf(t, "    %s\t", p.Rate)
		for _, s := range p.Burst {
			text := "-"
			if s.Burst != nil {
				text = number(*s.Burst)
			}
			_, _ = fmt.Fprintf(t, "%s\t", text)
		}
		_, _ = fmt.Fprintln(t)
	}
	_ = t.Flush()
}

// remarks writes what is assumed, what is odd, and what cannot be read.
func (r *Report) remarks(b *strings.Builder) {
	if r.Outside+r.NoRequest+r.Skipped > 0 || len(r.Notes) > 0 {
		b.WriteString("\n")
	}
	if r.Outside > 0 {
		fmt.Fprintf(b, "%s outside of --since and --until\n", plural(r.Outside, "request"))
	}
	if r.NoRequest > 0 {
		fmt.Fprintf(b, "%s without a request, left out\n", plural(r.NoRequest, "line"))
	}
	if r.Skipped > 0 {
		fmt.Fprintf(b, "%s of %s could not be read:\n", number(r.Skipped), plural(r.Lines, "line"))
		for _, u := range r.Unreadable {
			fmt.Fprintf(b, "  %v\n", &u)
		}
	}
	for _, n := range r.Notes {
		fmt.Fprintf(b, "note: %s\n", n)
	}
}

// clock returns a time in RFC 3339 in UTC without its T and Z, and cut to
// milliseconds.
func clock(rfc string) string {
	t, err := time.Parse(time.RFC3339Nano, rfc)
	if err != nil {
		return rfc
	}
	return t.Format("2006-01-02 15:04:05.999")
}

// number returns n with commas between thousands.
func number(n int64) string {
	s := strconv.FormatInt(n, 10)
	for i := len(s) - 3; i > 0; i -= 3 {
		s = s[:i] + "," + s[i:]
	}
	return s
}

func plural(n int64, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return number(n) + " " + what + "s"
}

// share returns a part and its percentage of the whole.
func share(part, whole int64) string {
	if part == 0 || whole == 0 {
		return number(part)
	}
	return fmt.Sprintf("%s (%s)", number(part), percent(part, whole))
}

// percent returns a percentage with at least two significant digits.
func percent(part, whole int64) string {
	p := 100 * float64(part) / float64(whole)
	digits := 1
	for limit := 10.0; p < limit && digits < 6; limit /= 10 {
		digits++
	}
	return strconv.FormatFloat(p, 'f', digits-1, 64) + "%"
}

// sparkWidth is the width of a sparkline in characters.
const sparkWidth = 48

// sparkline shows how many requests were limited over time.
func sparkline(t *timeline) string {
	bars := []rune("▁▂▃▄▅▆▇█")
	n := min(sparkWidth, len(t.slots))
	sums := make([]int64, n)
	most := int64(1)
	for i := range t.slots {
		at := i * n / len(t.slots)
		sums[at] += t.slots[i].limited
		most = max(most, sums[at])
	}
	var b strings.Builder
	for _, s := range sums {
		if s == 0 {
			b.WriteRune('·')
		} else {
			b.WriteRune(bars[min(int64(len(bars)-1), s*int64(len(bars))/most)])
		}
	}
	return b.String()
}
