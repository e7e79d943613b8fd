package backtest

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/sluiceproxy/sluice/cmd/sluice/accesslog"
	"github.com/sluiceproxy/sluice/limiter/policy"
)

// Report is the result of Run. Its JSON is what `sluice backtest -o json`
// prints.
type Report struct {
	Verdict   Verdict  `json:"verdict"`
	Config    string   `json:"config"`            // name of its file
	Against   string   `json:"against,omitempty"` // of the config that it is compared with
	Logs      []string `json:"logs"`              // names of the files, or stdin
	Lines     int64    `json:"lines"`             // of the logs, without empty ones
	Skipped   int64    `json:"skipped"`           // lines that cannot be read
	NoRequest int64    `json:"no_request"`        // lines on which the client sent no request
	Outside   int64    `json:"outside"`           // requests before since or from until on
	Late      int64    `json:"late"`              // requests too far out of order, played later than their time
	From      *string  `json:"from"`              // of the first request, RFC 3339; null without requests
	To        *string  `json:"to"`
	Totals
	Exempt    int64 `json:"exempt"`
	Unmatched int64 `json:"unmatched"`
	// Invalid is how many requests a mistake of the config would have refused, and
	// Mistake says the first.
	Invalid int64  `json:"invalid"`
	Mistake string `json:"mistake,omitempty"`
	// Before has the totals of the config that this one is compared with.
	Before *Totals       `json:"before,omitempty"`
	Limits []LimitReport `json:"limits"`
	// Interrupted reports that Run ended before the logs.
	Interrupted bool `json:"interrupted,omitempty"`
	// Notes are what is assumed, and what is odd, in words.
	Notes []string `json:"notes"`
	// Unreadable has the first lines that cannot be read.
	Unreadable []Unreadable `json:"unreadable,omitempty"`

	grain    time.Duration
	span     time.Duration
	timeline timeline
}

// Totals counts requests.
type Totals struct {
	Requests int64 `json:"requests"`
	// Limited is how many of them an enforced limit would have denied if the
	// requests of each key came evenly spread over the unit of the log's times,
	// and AtOnce if they came all at once. AtOnce is nil if the times are exact.
	Limited int64  `json:"limited"`
	AtOnce  *int64 `json:"at_once,omitempty"`
}

// Unreadable is a line that cannot be read.
type Unreadable struct {
	Log    string `json:"log"`
	Line   int    `json:"line"`
	Text   string `json:"text"` // quoted, escaped and cut
	Reason string `json:"reason"`
}

func (u *Unreadable) String() string {
	return fmt.Sprintf("%s:%d, %s: %s", printable(u.Log), u.Line, u.Reason, u.Text)
}

// LimitReport is the result of one limit.
type LimitReport struct {
	Name string `json:"name"`
	LimitResult
	// Before is the result in the config that this one is compared with; nil if
	// that does not have the limit.
	Before *LimitResult `json:"before,omitempty"`
	// Newly are the keys that are limited and were not before, and Spared those
	// that no longer are: the first few. NewlyKeys and SparedKeys count all.
	Newly      []Key `json:"newly_limited,omitempty"`
	NewlyKeys  int64 `json:"newly_limited_keys,omitempty"`
	Spared     []Key `json:"no_longer_limited,omitempty"`
	SparedKeys int64 `json:"no_longer_limited_keys,omitempty"`

	needs []Need
}

// LimitResult is what became of the requests that a limit applied to. A limit
// counts its own verdict even where another one denies.
type LimitResult struct {
	Totals
	Mode  string `json:"mode"` // enforce or shadow; none if the limit is removed
	Rate  string `json:"rate"`
	Burst int64  `json:"burst"`
	// MaxRate is the most that requests may bring; empty if the limit has no
	// rate_from.
	MaxRate     string       `json:"max_rate,omitempty"`
	Keys        int64        `json:"keys"`
	LimitedKeys int64        `json:"limited_keys"`
	Worst       []Key        `json:"worst"`
	Peak        *Peak        `json:"peak,omitempty"`
	Suggest     *Suggestions `json:"suggest,omitempty"`

	timeline timeline
}

// removed is the mode of a limit that only the config has that is compared with.
const removed = "none"

// note returns what a reader should know of a limit beside its name, or "".
func (l *LimitResult) note() string {
	switch l.Mode {
	case "enforce":
		return ""
	case removed:
		return "removed"
	}
	return l.Mode
}

// rates returns the rate, or the quota, and the largest that requests may bring.
func (l *LimitResult) rates() string {
	switch {
	case l.Mode == removed:
		return "-"
	case l.MaxRate != "":
		return l.Rate + " or rate_from to " + l.MaxRate
	}
	return l.Rate
}

// size returns the burst.
func (l *LimitResult) size() string {
	if l.Burst == 0 {
		return "-"
	}
	return number(l.Burst)
}

// Key is one key of a limit, as logs show it.
type Key struct {
	Key string `json:"key"`
	Totals

	timeline *timeline
}

// Peak is when most requests were limited.
type Peak struct {
	From     string  `json:"from"`    // RFC 3339
	Seconds  float64 `json:"seconds"` // how long it is
	Requests int64   `json:"requests"`
	Limited  int64   `json:"limited"`
}

// Suggestions are the least bursts and rates with which nobody, or only a part of
// the keys, would have been limited.
type Suggestions struct {
	Burst []SuggestedBurst `json:"burst"` // at the limit's rate
	Rate  []SuggestedRate  `json:"rate"`  // for the limit's burst
	Pairs []Pair           `json:"pairs"`
}

// SuggestedBurst is a burst. It is nil if none would do.
type SuggestedBurst struct {
	Limited string `json:"limited"` // the part of keys that it limits
	Burst   *int64 `json:"burst"`
}

// SuggestedRate is a rate in the limit's own period. It is nil if none would do.
type SuggestedRate struct {
	Limited string  `json:"limited"`
	Rate    *string `json:"rate"`
}

// Pair is a rate with the bursts that it needs.
type Pair struct {
	Rate  string           `json:"rate"`
	Burst []SuggestedBurst `json:"burst"`
}

// maxWorst is how many keys are listed.
const maxWorst = 10

// rfc3339 returns an instant in microseconds since 1970.
func rfc3339(at int64) string { return time.UnixMicro(at).UTC().Format(time.RFC3339Nano) }

func (r *run) report(interrupted bool) *Report {
	out := &Report{
		Lines: r.counts.Lines, Skipped: r.counts.Skipped, NoRequest: r.counts.NoRequest, Outside: r.outside, Late: r.late,
		Interrupted: interrupted, Notes: r.notes(), Limits: []LimitReport{}, grain: r.grain,
		span: time.Duration(r.to-r.from) * time.Microsecond, Config: r.ConfigFile, Against: r.AgainstFile, Logs: []string{},
	}
	for _, l := range r.Logs {
		out.Logs = append(out.Logs, l.Name)
	}
	for _, b := range r.counts.Bad {
		out.Unreadable = append(out.Unreadable, Unreadable{b.Source, b.Line, b.Text, b.Reason})
	}
	if r.requests > 0 {
		out.From, out.To = new(rfc3339(r.from)), new(rfc3339(r.to))
	}
	w := r.worlds[0]
	p := r.player(w, spread)
	out.Exempt, out.Unmatched, out.Invalid, out.Mistake = p.exempt, p.unmatched, p.invalid, p.mistake
	out.Totals = r.totals(w)
	out.timeline = p.timeline
	for _, s := range w.limits {
		l := LimitReport{Name: s.limit.Name, LimitResult: r.result(w, s)}
		l.Suggest, l.needs = suggest(r.suggesters, s)
		out.Limits = append(out.Limits, l)
	}
	if len(r.worlds) > 1 {
		r.compare(out)
	}
	return out
}

// player returns the player of a world in a reading; nil if there is none.
func (r *run) player(w *world, of reading) *player {
	for _, p := range r.players {
		if p.world == w && p.reading == of {
			return p
		}
	}
	return nil
}

func (r *run) totals(w *world) Totals {
	t := Totals{Requests: r.requests, Limited: r.player(w, spread).limited}
	if p := r.player(w, atOnce); p != nil {
		t.AtOnce = new(p.limited)
	}
	return t
}

func (r *run) result(w *world, s *limitState) LimitResult {
	evenly := r.player(w, spread).result(s)
	out := LimitResult{
		Totals: Totals{Requests: evenly.requests, Limited: evenly.limited}, Mode: s.limit.Mode(), Keys: int64(len(s.keys)),
		LimitedKeys: evenly.limitedKeys, timeline: evenly.timeline, Peak: peakOf(&evenly.timeline),
	}
	if p := r.player(w, atOnce); p != nil {
		out.AtOnce = new(p.result(s).limited)
	}
	if s.described != nil {
		out.Rate, out.Burst, out.MaxRate = cmp.Or(s.described.Rate, s.described.Quota), s.described.Burst, s.described.MaxRate
	}
	out.Worst = r.keys(s, func(k *keyState) bool { return k.limited[spread] > 0 || k.limited[atOnce] > 0 })
	return out
}

// keys returns the worst of the keys that are wanted.
func (r *run) keys(s *limitState, wanted func(*keyState) bool) []Key {
	var worst []*keyState
	order := func(a, b *keyState) int {
		return cmp.Or(
			cmp.Compare(b.limited[spread], a.limited[spread]), cmp.Compare(b.limited[atOnce], a.limited[atOnce]),
			cmp.Compare(b.requests, a.requests), cmp.Compare(a.key, b.key),
		)
	}
	for _, k := range s.keys {
		if !wanted(k) || len(worst) == maxWorst && order(k, worst[maxWorst-1]) > 0 {
			continue
		}
		at, _ := slices.BinarySearchFunc(worst, k, order)
		worst = slices.Insert(worst, at, k)
		worst = worst[:min(len(worst), maxWorst)]
	}
	out := []Key{}
	for _, k := range worst {
		one := Key{Key: k.key, Totals: Totals{Requests: k.requests, Limited: k.limited[spread]}, timeline: k.timeline}
		if readings(r.grain) > 1 {
			one.AtOnce = new(k.limited[atOnce])
		}
		out = append(out, one)
	}
	return out
}

// peakOf returns when most requests were limited; nil if none were.
func peakOf(t *timeline) *Peak {
	worst := -1
	for i := range t.slots {
		if t.slots[i].limited > 0 && (worst < 0 || t.slots[i].limited > t.slots[worst].limited) {
			worst = i
		}
	}
	if worst < 0 {
		return nil
	}
	return &Peak{
		rfc3339(t.start + int64(worst)*t.width), time.Duration(t.width * 1000).Seconds(), t.slots[worst].requests,
		t.slots[worst].limited,
	}
}

// compare adds what was before.
func (r *run) compare(out *Report) {
	w, old := r.worlds[0], r.worlds[1]
	out.Before = new(r.totals(old))
	was := make(map[string]*limitState)
	for _, s := range old.limits {
		was[s.limit.Name] = s
	}
	for i := range out.Limits {
		l, s := &out.Limits[i], w.limits[i]
		before := was[l.Name]
		if before == nil {
			before = &limitState{} // all that is limited is so newly
		} else {
			l.Before = new(r.result(old, before))
			delete(was, l.Name)
		}
		r.compareKeys(l, s, before)
	}
	for _, s := range old.limits {
		if was[s.limit.Name] == nil {
			continue
		}
		gone := LimitReport{Name: s.limit.Name, Before: new(r.result(old, s))}
		gone.Mode, gone.Rate, gone.Worst = removed, "none", []Key{}
		r.compareKeys(&gone, &limitState{}, s)
		out.Limits = append(out.Limits, gone)
	}
}

// compareKeys finds the keys that are limited in one of two states of a limit
// only, as evenly spread.
func (r *run) compareKeys(l *LimitReport, now, before *limitState) {
	only := func(in, not *limitState) ([]Key, int64) {
		has := make(map[string]bool)
		for _, k := range not.keys {
			if k.limited[spread] > 0 {
				has[k.key] = true
			}
		}
		wanted := func(k *keyState) bool { return k.limited[spread] > 0 && !has[k.key] }
		n := int64(0)
		for _, k := range in.keys {
			if wanted(k) {
				n++
			}
		}
		return r.keys(in, wanted), n
	}
	l.Newly, l.NewlyKeys = only(now, before)
	l.Spared, l.SparedKeys = only(before, now)
}

// notes says what is assumed, and what is odd about the logs.
func (r *run) notes() []string {
	all := []string{}
	add := func(text string) {
		if !slices.Contains(all, text) {
			all = append(all, text)
		}
	}
	for _, l := range r.Logs {
		for _, n := range l.Notes {
			add(n)
		}
	}
	for _, n := range Missing(r.Config, r.Logs) {
		add(n)
	}
	if r.Config.Settles() && r.Suggest {
		add("suggestions for limits with settle count what is reserved, not what is returned")
	}
	for _, s := range r.worlds[0].limits {
		if r.Suggest && s.described != nil && s.described.Overrides > 0 {
			add(s.limit.Name + ": suggestions are for the keys without an override")
		}
	}
	if r.requests > 0 && r.late > r.requests/100 {
		add("more than 1 % of the requests came over a minute after a later one in the same log: " +
			"they were played at the time at which they came")
	}
	const year = 366 * 24 * time.Hour
	if span := time.Duration(r.to-r.from) * time.Microsecond; span > year {
		add("the requests are years apart, from " + rfc3339(r.from) + " to " + rfc3339(r.to) +
			": use --since and --until if some times are wrong")
	}
	if r.requests > 0 && time.UnixMicro(r.to).After(time.Now().Add(time.Minute)) {
		add("the log ends in the future, at " + rfc3339(r.to) + ": its clock or its time zone may be wrong")
	}
	return all
}

// aliases are attributes that are of use where others are.
var aliases = map[string]string{
	"request.id": `request.headers["x-request-id"]`, "request.size": `request.headers["content-length"]`,
	"response.size": "response.total_size", "request.total_size": "request.size",
}

// Wanted returns a function that reports whether an attribute of a log is of use
// for one of the configs.
func Wanted(configs ...*policy.Config) func(attribute string) bool {
	reads := make(map[string]bool)
	for _, c := range configs {
		for _, d := range c.Describe() {
			for _, name := range d.Reads {
				reads[name] = true
				reads[accesslog.Whole(name)] = true
			}
		}
	}
	return func(attribute string) bool {
		if reads[attribute] || reads[aliases[attribute]] {
			return true
		}
		// Whoever reads a whole map, such as request.headers, reads each entry.
		for at := strings.LastIndexAny(attribute, "[."); at > 0; at = strings.LastIndexAny(attribute[:at], "[.") {
			if reads[attribute[:at]] {
				return true
			}
		}
		return false
	}
}
