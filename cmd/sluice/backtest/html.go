package backtest

import (
	_ "embed"
	"fmt"
	"html"
	"io"
	"math"
	"strings"
	"time"

	"github.com/sluiceproxy/sluice/limiter/policy"
)

//go:embed assets/report.css
var css string

// page writes HTML. Values are escaped where they are written: there is no way
// to write one that is not. The page has no script, and loads nothing.
type page struct{ strings.Builder }

// put writes markup, a constant of this package, in which each %v is replaced
// by a value as text.
func (p *page) put(markup string, values ...any) {
	for i, v := range values {
		values[i] = html.EscapeString(fmt.Sprint(v))
	}
	_, _ = fmt.Fprintf(p, markup, values...)
}

// HTML writes the report as one file for a browser.
func (r *Report) HTML(w io.Writer) error {
	p := &page{}
	p.put(`<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<link rel="icon" href="data:,">
<title>sluice backtest of %v</title>
<style>
`, r.Config)
	p.WriteString(css)
	p.put("</style>\n</head>\n<body>\n<header>\n<h1>sluice backtest of %v</h1>\n", r.Config)
	if r.Interrupted {
		p.put(`<p class="bad">Interrupted: this is what was found so far.</p>` + "\n")
	}
	if r.From == nil {
		p.put("<p>No requests in %v.</p>\n", plural(r.Lines, "line"))
		r.htmlHead(p)
		r.htmlRemarks(p)
	} else {
		p.put(`<p class="soft">%v to %v UTC, over %v</p>`+"\n", clock(*r.From), clock(*r.To),
			policy.RoughDuration(r.span))
		r.htmlHead(p)
		r.htmlTotals(p)
		r.htmlTable(p)
		for i := range r.Limits {
			r.htmlLimit(p, i)
		}
		r.htmlRemarks(p)
	}
	p.put("</main>\n</body>\n</html>\n")
	_, err := io.WriteString(w, p.String())
	return err //nolint:wrapcheck // as of fmt.Fprint
}

// htmlHead ends the header: what was played through what, and the verdict.
func (r *Report) htmlHead(p *page) {
	p.put(`<p class="soft">`)
	if r.Against != "" {
		p.put("Compared with %v. ", r.Against)
	}
	p.put("Logs: %v</p>\n", r.logs())
	v := &r.Verdict
	for _, why := range v.Reasons {
		p.put(`<p class="verdict failed"><strong>Failed</strong> %v</p>`+"\n", why)
	}
	if v.Passed && v.share != "" {
		p.put(`<p class="verdict passed"><strong>Passed</strong> %v</p>`+"\n", v.share)
	}
	p.put("</header>\n<main>\n")
}

func (r *Report) htmlTotals(p *page) {
	tile := func(name, value, more string) {
		p.put("<div class=\"tile\"><dt>%v</dt><dd>%v</dd><dd>%v</dd></div>\n", name, value, more)
	}
	p.put(`<dl class="tiles">` + "\n")
	tile("Requests", number(r.Requests), plural(r.Lines, "line"))
	tile("Would be denied", percentOf(r.Limited, r.Requests), r.spreadText(r.Limited))
	if r.AtOnce != nil {
		tile("If all at once", percentOf(*r.AtOnce, r.Requests), number(*r.AtOnce)+", each key's within "+unit(r.grain))
	}
	if r.Before != nil {
		tile("Before", percentOf(r.Before.Limited, r.Before.Requests), plural(r.Before.Limited, "request"))
	}
	p.put("</dl>\n<section class=\"card\">\n<div class=\"head\"><h2>Requests over time</h2>")
	legend(p, "denied")
	p.put("</div>\n")
	r.htmlBars(p, &r.timeline, "Requests over time")
	p.put("</section>\n")
}

func (r *Report) spreadText(n int64) string {
	if r.AtOnce == nil {
		return plural(n, "request")
	}
	return number(n) + ", evenly spread"
}

func percentOf(part, whole int64) string {
	if part == 0 || whole == 0 {
		return "0%"
	}
	return percent(part, whole)
}

func legend(p *page, limited string) {
	p.put(`<ul class="legend"><li class="tp">passed</li><li class="t2">%v</li></ul>`, limited)
}

// htmlTable writes a line for each limit, with a link to its part.
func (r *Report) htmlTable(p *page) {
	p.put(`<section class="card">
<h2>Limits</h2>
<div class="scroll" tabindex="0" role="region" aria-label="Limits">
<table>
<thead><tr><th scope="col">Limit</th><th scope="col" class="n wide">Rate</th>` +
		`<th scope="col" class="n wide">Burst</th><th scope="col" class="n">Requests</th>` +
		`<th scope="col" class="n wide">Keys</th><th scope="col" class="n">Limited</th>`)
	if r.AtOnce != nil {
		p.put(`<th scope="col" class="n">At once</th>`)
	}
	p.put(`<th scope="col" class="n">Keys limited</th>`)
	if r.Before != nil {
		p.put(`<th scope="col" class="n">Before</th><th scope="col" class="n">Newly limited</th>` +
			`<th scope="col" class="n">No longer</th>`)
	}
	p.put("</tr></thead>\n<tbody>\n")
	td := func(class, text string) { p.put(`<td class="%v">%v</td>`, class, text) }
	cell := func(text string) { td("n", text) }
	wide := func(text string) { td("n wide", text) } // not on a phone
	for i := range r.Limits {
		l := &r.Limits[i]
		p.put(`<tr><th scope="row"><a href="#limit-%v">%v</a>`, i, l.Name)
		if note := l.note(); note != "" {
			p.put(` <span class="soft">%v</span>`, note)
		}
		p.put("</th>")
		wide(l.rates())
		wide(l.size())
		cell(number(l.Requests))
		wide(number(l.Keys))
		cell(share(l.Limited, l.Requests))
		if r.AtOnce != nil {
			if l.AtOnce != nil {
				cell(share(*l.AtOnce, l.Requests))
			} else {
				cell("-")
			}
		}
		cell(share(l.LimitedKeys, l.Keys))
		if r.Before != nil {
			before := "-"
			if l.Before != nil {
				before = share(l.Before.Limited, l.Before.Requests)
			}
			cell(before)
			cell(number(l.NewlyKeys))
			cell(number(l.SparedKeys))
		}
		p.put("</tr>\n")
	}
	p.put("</tbody>\n</table>\n</div>\n</section>\n")
}

func (r *Report) htmlLimit(p *page, i int) {
	l := &r.Limits[i]
	p.put(`<section class="card" id="limit-%v">`+"\n"+
		`<div class="head"><h2>%v</h2><span class="soft">rate %v, burst %v`, i, l.Name, l.rates(), l.size())
	if note := l.note(); note != "" {
		p.put(", %v", note)
	}
	p.put("</span></div>\n")
	if l.Requests > 0 {
		// The only limit may have the chart that is above already.
		if len(r.Limits) > 1 || l.Requests != r.Requests || l.Limited != r.Limited {
			p.put(`<div class="head"><h3>Requests over time</h3>`)
			legend(p, "limited")
			p.put("</div>\n")
			r.htmlBars(p, &l.timeline, "Requests over time of the limit "+l.Name)
		}
		if l.Peak != nil {
			p.put(`<p class="soft">Most at %v UTC: %v of %v within %v.</p>`+"\n", clock(l.Peak.From), number(l.Peak.Limited),
				plural(l.Peak.Requests, "request"), policy.RoughDuration(time.Duration(l.Peak.Seconds*float64(time.Second))))
		}
	}
	if l.Suggest != nil {
		p.put(`<div class="columns">` + "\n")
		l.htmlNeeds(p)
		l.htmlPairs(p)
		p.put("</div>\n")
		l.htmlSuggestions(p)
	}
	r.htmlKeys(p, "Worst keys", l.Worst)
	r.htmlKeys(p, "Newly limited keys", l.Newly)
	r.htmlKeys(p, "Keys that are no longer limited", l.Spared)
	p.put("</section>\n")
}

// htmlBars draws a timeline over the time of the report.
func (r *Report) htmlBars(p *page, t *timeline, name string) {
	if len(t.slots) == 0 {
		return
	}
	most := int64(1)
	for _, s := range t.slots {
		most = max(most, s.requests)
	}
	n := len(t.slots)
	p.put(`<svg class="plot" viewBox="0 0 %v 100" preserveAspectRatio="none" role="img" aria-label="%v">`+"\n", n, name)
	for i, s := range t.slots {
		if s.requests == 0 {
			continue
		}
		height := 100 * float64(s.requests) / float64(most)
		limited := 100 * float64(s.limited) / float64(most)
		p.put(`<rect class="bar-passed" x="%v.06" width=".88" y="%v" height="%v"/>`, i,
			decimal(100-height), decimal(height-limited))
		if s.limited > 0 {
			limited = max(limited, 1.5) // a few are seen, too
			p.put(`<rect class="bar-limited" x="%v.06" width=".88" y="%v" height="%v"/>`, i,
				decimal(100-limited), decimal(limited))
		}
		p.put(`<rect class="hit" x="%v" width="1" y="0" height="100"><title>%v: %v, %v limited</title></rect>`+"\n", i,
			clock(rfc3339(t.start+int64(i)*t.width)), plural(s.requests, "request"), number(s.limited))
	}
	p.put("</svg>\n"+`<div class="axis"><span>%v</span><span>highest: %v in %v</span><span>%v</span></div>`+"\n",
		clock(rfc3339(t.start)), plural(most, "request"), policy.RoughDuration(time.Duration(t.width)*time.Microsecond),
		clock(rfc3339(t.start+int64(n)*t.width)))
}

func decimal(f float64) string { return strings.TrimSuffix(fmt.Sprintf("%.2f", f), ".00") }

// The size of a curve's drawing, and its margins.
const (
	curveWidth, curveHeight = 480.0, 220.0
	marginLeft, marginRight = 52.0, 16.0
	marginTop, marginBottom = 10.0, 34.0
)

// curve draws lines over two logarithmic or linear scales.
type curve struct {
	p                      *page
	minX, maxX, minY, maxY float64
	logY                   bool
}

func (c *curve) x(v float64) float64 {
	return marginLeft + (curveWidth-marginLeft-marginRight)*ratio(v, c.minX, c.maxX, true)
}

func (c *curve) y(v float64) float64 {
	return curveHeight - marginBottom - (curveHeight-marginTop-marginBottom)*ratio(v, c.minY, c.maxY, c.logY)
}

func ratio(v, from, to float64, isLog bool) float64 {
	if isLog {
		v, from, to = math.Log(max(v, 1)), math.Log(max(from, 1)), math.Log(max(to, 1))
	}
	if to <= from {
		return .5
	}
	return (v - from) / (to - from)
}

// begin draws the frame and the scales.
func (c *curve) begin(name, xName string, yTicks []float64, tick func(float64) string) {
	c.p.put(`<svg class="curve" viewBox="0 0 480 220" preserveAspectRatio="xMinYMid" role="img" `+
		`aria-label="%v">`+"\n", name)
	for _, v := range yTicks {
		y := decimal(c.y(v))
		c.p.put(`<line class="grid" x1="52" x2="464" y1="%v" y2="%v"/>`+
			`<text x="46" y="%v" text-anchor="end" dy="4">%v</text>`+"\n",
			y, y, y, tick(v))
	}
	for _, v := range ticks(c.minX, c.maxX) {
		x, anchor := c.x(v), "middle"
		if v == c.maxX { // which has no room on its right
			x, anchor = curveWidth-2, "end"
		}
		c.p.put(`<text x="%v" y="202" text-anchor="%v">%v</text>`+"\n", decimal(x), anchor, short(v))
	}
	c.p.put(`<text x="258" y="217" text-anchor="middle">%v</text>`+"\n", xName)
}

// ticks returns round numbers on a logarithmic scale, and both its ends.
func ticks(from, to float64) []float64 {
	all := []float64{from}
	for unit := 1.0; unit <= to; unit *= 10 {
		for _, v := range []float64{unit, 2 * unit, 5 * unit} {
			if v > from*1.3 && v < to/1.3 && (to/from < 100 || v == unit) {
				all = append(all, v)
			}
		}
	}
	if to > from {
		all = append(all, to)
	}
	return all
}

// short returns a number for a scale.
func short(v float64) string {
	switch {
	case v >= 1e6:
		return decimal(math.Round(v/1e4)/100) + "M"
	case v >= 1e4:
		return decimal(math.Round(v/100)/10) + "k"
	}
	return decimal(v)
}

// htmlNeeds draws how many keys need which burst at the limit's own rate.
func (l *LimitReport) htmlNeeds(p *page) {
	if len(l.needs) == 0 {
		return
	}
	last := l.needs[len(l.needs)-1]
	c := &curve{p: p, minX: 1, maxX: float64(max(last.Burst, l.Burst, 2)), minY: 0, maxY: 100}
	p.put("<div>\n<h3>Keys that a burst is enough for, at rate %v</h3>\n", l.Rate)
	c.begin("Share of keys that a burst is enough for", "burst", []float64{0, 25, 50, 75, 100},
		func(v float64) string { return decimal(v) + "%" })
	points, before := "", 0.0
	for _, n := range l.needs {
		y := 100 * float64(n.Keys) / float64(last.Keys)
		x := c.x(float64(n.Burst))
		points += fmt.Sprintf("%v,%v %v,%v ", decimal(x), decimal(c.y(before)), decimal(x), decimal(c.y(y)))
		before = y
	}
	points += fmt.Sprintf("%v,%v", decimal(curveWidth-marginRight), decimal(c.y(100)))
	p.put(`<polyline class="trace t0" points="%v"/>`+"\n", points)
	x := decimal(c.x(float64(l.Burst)))
	p.put(`<line class="mark" x1="%v" x2="%v" y1="10" y2="186"><title>the limit's burst, %v</title></line>`+"\n", x, x,
		number(l.Burst))
	p.put("</svg>\n" + `<ul class="legend"><li class="t0">keys never limited</li>` +
		`<li class="th">the burst now</li></ul>` + "\n</div>\n")
}

// htmlPairs draws which burst each rate needs.
func (l *LimitReport) htmlPairs(p *page) {
	if len(l.Suggest.Pairs) < 2 {
		return
	}
	c := &curve{p: p, minX: math.Inf(1), maxX: 1, minY: 1, maxY: float64(max(2, l.Burst)), logY: true}
	tokens := make([]float64, len(l.Suggest.Pairs))
	for i, pair := range l.Suggest.Pairs {
		_, _ = fmt.Sscanf(pair.Rate, "%g/", &tokens[i])
		c.minX, c.maxX = min(c.minX, tokens[i]), max(c.maxX, tokens[i])
		for _, b := range pair.Burst {
			if b.Burst != nil {
				c.maxY = max(c.maxY, float64(*b.Burst))
			}
		}
	}
	_, period, _ := strings.Cut(l.Rate, "/")
	p.put("<div>\n<h3>Bursts that rates need</h3>\n")
	c.begin("Burst that each rate needs", "rate, tokens/"+period, ticks(1, c.maxY), short)
	// Where lines are the same, a looser one is seen on the stricter, which is wider.
	for j, q := range quantiles {
		var points strings.Builder
		for i, pair := range l.Suggest.Pairs {
			if b := pair.Burst[j].Burst; b != nil {
				_, _ = fmt.Fprintf(&points, "%v,%v ", decimal(c.x(tokens[i])), decimal(c.y(float64(*b))))
			}
		}
		p.put(`<polyline class="trace pair t%v" points="%v"/>`+"\n", j, points.String())
		for i, pair := range l.Suggest.Pairs {
			if b := pair.Burst[j].Burst; b != nil {
				p.put(`<circle class="dot t%v" r="%v" cx="%v" cy="%v">`+
					`<title>%v, burst %v: %v of keys limited</title></circle>`+"\n", j, decimal(4.5-1.25*float64(j)),
					decimal(c.x(tokens[i])), decimal(c.y(float64(*b))), pair.Rate, number(*b), q.text)
			}
		}
	}
	var own float64
	_, _ = fmt.Sscanf(l.Rate, "%g/", &own)
	p.put(`<circle class="here" r="4.5" cx="%v" cy="%v"><title>the limit: %v, burst %v</title></circle>`+"\n",
		decimal(c.x(own)), decimal(c.y(float64(l.Burst))), l.Rate, number(l.Burst))
	p.put("</svg>\n" + `<ul class="legend"><li class="t0">no key limited</li><li class="t1">0.1%% of keys</li>` +
		`<li class="t2">1%% of keys</li><li class="th">the limit now</li></ul>` + "\n</div>\n")
}

// htmlSuggestions writes what would limit nobody, or only a few keys, as the text
// does: for the limit's own numbers, and the bursts that rates need.
func (l *LimitReport) htmlSuggestions(p *page) {
	begin := func(title string, columns ...string) {
		p.put("<div>\n<h3>%v</h3>\n"+`<div class="scroll" tabindex="0" role="region" aria-label="%v">`+
			"\n<table>\n<thead><tr>", title, title)
		for i, name := range columns {
			class := "n"
			if i == 0 {
				class = ""
			}
			p.put(`<th scope="col" class="%v">%v</th>`, class, name)
		}
		p.put("</tr></thead>\n<tbody>\n")
	}
	const end = "</tbody>\n</table>\n</div>\n</div>\n"
	burst := func(b *int64) {
		if b == nil {
			p.put(`<td class="n">none is enough</td>`)
			return
		}
		p.put(`<td class="n">%v</td>`, number(*b))
	}
	p.put(`<div class="columns">` + "\n")
	begin("Suggestions", "To limit", "Burst with rate "+l.Rate, "Rate with burst "+number(l.Burst))
	for i, s := range l.Suggest.Burst {
		p.put(`<tr><th scope="row">%v</th>`, whoIsLimited(s.Limited))
		burst(s.Burst)
		rate := "none is enough"
		if text := l.Suggest.Rate[i].Rate; text != nil {
			rate = *text
		}
		p.put(`<td class="n">%v</td></tr>`+"\n", rate)
	}
	p.put(end)
	columns := []string{"Rate"}
	for _, q := range quantiles {
		columns = append(columns, whoIsLimited(q.text)+" limited")
	}
	begin("Bursts that rates need", columns...)
	for _, pair := range l.Suggest.Pairs {
		p.put(`<tr><th scope="row">%v`, pair.Rate)
		if pair.Rate == l.Rate {
			p.put(` <span class="soft">now</span>`)
		}
		p.put("</th>")
		for _, s := range pair.Burst {
			burst(s.Burst)
		}
		p.put("</tr>\n")
	}
	p.put(end + "</div>\n")
}

// whoIsLimited returns a quantile in words.
func whoIsLimited(quantile string) string {
	if quantile == quantiles[0].text {
		return "no key"
	}
	return quantile + " of keys"
}

// htmlKeys writes a table of keys, each with its own time.
func (r *Report) htmlKeys(p *page, title string, keys []Key) {
	if len(keys) == 0 {
		return
	}
	p.put(`<h3>%v</h3>`+"\n"+`<div class="scroll" tabindex="0" role="region" aria-label="%v">`+
		"\n<table>\n<thead><tr>", title, title)
	p.put(`<th scope="col">Key</th><th scope="col" class="n">Requests</th><th scope="col" class="n">Limited</th>`)
	hasTime := false
	for i := range keys {
		hasTime = hasTime || keys[i].timeline != nil
	}
	if keys[0].AtOnce != nil {
		p.put(`<th scope="col" class="n">At once</th>`)
	}
	if hasTime {
		p.put(`<th scope="col" class="wide">Requests over time, from the first that was limited</th>`)
	}
	p.put("</tr></thead>\n<tbody>\n")
	for i := range keys {
		k := &keys[i]
		p.put(`<tr><th scope="row"><code>%v</code></th><td class="n">%v</td><td class="n">%v</td>`, k.Key, number(k.Requests),
			share(k.Limited, k.Requests))
		if k.AtOnce != nil {
			p.put(`<td class="n">%v</td>`, share(*k.AtOnce, k.Requests))
		}
		if hasTime {
			p.put(`<td class="spark wide">`)
			r.htmlSpark(p, k.timeline)
			p.put("</td>")
		}
		p.put("</tr>\n")
	}
	p.put("</tbody>\n</table>\n</div>\n")
}

// htmlSpark draws a key's timeline over the time of the report.
func (r *Report) htmlSpark(p *page, t *timeline) {
	if t == nil {
		return
	}
	const n = 120
	var slots [n]slot
	from, to := r.timeline.start, r.timeline.start+int64(len(r.timeline.slots))*r.timeline.width
	most := int64(1)
	for i, s := range t.slots {
		at := int(float64(t.start+int64(i)*t.width-from) / float64(to-from) * n)
		at = max(0, min(n-1, at))
		slots[at].requests += s.requests
		slots[at].limited += s.limited
		most = max(most, slots[at].requests)
	}
	p.put(`<svg class="plot" viewBox="0 0 120 100" preserveAspectRatio="none" aria-hidden="true">`)
	for i, s := range slots {
		if s.requests == 0 {
			continue
		}
		height := max(4, 100*float64(s.requests)/float64(most))
		limited := height * float64(s.limited) / float64(s.requests)
		p.put(`<rect class="bar-passed" x="%v" width="1" y="%v" height="%v"/>`, i,
			decimal(100-height), decimal(height-limited))
		if s.limited > 0 {
			p.put(`<rect class="bar-limited" x="%v" width="1" y="%v" height="%v"/>`, i,
				decimal(100-limited), decimal(limited))
		}
	}
	p.put("</svg>")
}

func (r *Report) htmlRemarks(p *page) {
	var all []string
	for _, count := range []struct {
		n    int64
		what string
	}{
		{r.Exempt, "exempt from all limits"},
		{r.Unmatched, "under no limit"},
		{r.Invalid, "refused by a mistake in the config: " + r.Mistake},
		{r.Outside, "outside of --since and --until"},
	} {
		if count.n > 0 {
			all = append(all, plural(count.n, "request")+" "+count.what)
		}
	}
	if r.NoRequest > 0 {
		all = append(all, plural(r.NoRequest, "line")+" without a request, left out")
	}
	all = append(all, r.Notes...)
	if len(all) == 0 && r.Skipped == 0 {
		return
	}
	p.put(`<section class="card">` + "\n<h2>Notes</h2>\n")
	if len(all) > 0 {
		p.put(`<ul class="notes">` + "\n")
		for _, text := range all {
			p.put("<li>%v</li>\n", text)
		}
		p.put("</ul>\n")
	}
	if r.Skipped > 0 {
		p.put(`<h3>%v of %v could not be read</h3>`+"\n"+`<pre tabindex="0">`, number(r.Skipped), plural(r.Lines, "line"))
		for _, u := range r.Unreadable {
			p.put("%v\n", &u)
		}
		p.put("</pre>\n")
	}
	p.put("</section>\n")
}
