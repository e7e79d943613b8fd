package backtest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/sluiceproxy/sluice/cmd/sluice/accesslog"
	"github.com/sluiceproxy/sluice/limiter/policy"
)

// config reads a config.
func config(t testing.TB, text string) *policy.Config {
	t.Helper()
	path := filepath.Join(t.TempDir(), "sluice.yaml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	cfg, _, err := policy.Load(path, func(string) (string, bool) { return "", false })
	if err != nil {
		t.Fatal(err)
	}
	return cfg
}

// play runs logs through a config.
func play(t testing.TB, o Options, text string, logs ...string) *Report {
	t.Helper()
	o.Config = config(t, text)
	for i, log := range logs {
		path := filepath.Join(t.TempDir(), fmt.Sprint(i, ".log"))
		if err := os.WriteFile(path, []byte(log), 0o600); err != nil {
			t.Fatal(err)
		}
		s, err := accesslog.Open(path, nil, accesslog.Options{Wanted: Wanted(o.Config)})
		if err != nil {
			t.Fatal(err)
		}
		o.Logs = append(o.Logs, s)
	}
	r, err := Run(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// at returns a line of the common format, so many seconds after midnight.
func at(second int, client, path string) string {
	return fmt.Sprintf("%s - - [%s +0000] \"GET %s HTTP/1.1\" 200 5\n", client,
		time.Unix(1_700_000_000/86400*86400+int64(second), 0).UTC().Format("02/Jan/2006:15:04:05"), path)
}

// TestReadings checks the two readings of requests of one second: evenly spread
// none is limited, and of ten at once five are.
func TestReadings(t *testing.T) {
	log := strings.Repeat(at(0, "192.0.2.1", "/"), 10) + at(3, "192.0.2.2", "/")
	r := play(t, Options{}, "limits: [{name: a, key: client.ip, rate: 10/s, burst: 5}]", log)
	a := r.Limits[0]
	if r.Requests != 11 || r.Limited != 0 || *r.AtOnce != 5 || a.Limited != 0 || *a.AtOnce != 5 || a.Keys != 2 ||
		a.LimitedKeys != 0 || len(a.Worst) != 1 || a.Worst[0].Key != "=9.192.0.2.1" || *a.Worst[0].AtOnce != 5 {
		t.Errorf("%+v", r)
	}
	if *r.From != "2023-11-14T00:00:00Z" || *r.To != "2023-11-14T00:00:03Z" {
		t.Errorf("from %s to %s", *r.From, *r.To)
	}
}

// TestAllOrNone checks that a request that one limit denies takes nothing from
// another, and that a shadow limit does not deny.
func TestAllOrNone(t *testing.T) {
	log := strings.Repeat(at(0, "192.0.2.1", "/a"), 4) + strings.Repeat(at(0, "192.0.2.1", "/b"), 4)
	r := play(t, Options{}, `limits:
  - {name: a, rate: 1/d, burst: 2, match: {paths: [/a]}}
  - {name: all, rate: 1/d, burst: 4}
  - {name: quiet, rate: 1/d, burst: 1, mode: shadow}
`, log)
	var got []int64
	for _, l := range r.Limits {
		got = append(got, l.Limited)
	}
	// Of /a two pass, which leaves two of all for /b.
	if want := []int64{2, 2, 7}; !slices.Equal(got, want) || r.Limited != 4 {
		t.Errorf("limited are %v, and %d in all; want %v and 4", got, r.Limited, want)
	}
}

// TestQuota checks over a month's end that each window has its own tokens, by the
// quota's time zone, that a rate and a quota draw together or not at all, and that
// nothing is suggested for a quota.
func TestQuota(t *testing.T) {
	const endOfNovember = 17 * 86400 // after the midnight of 14 November
	var log strings.Builder
	for _, seconds := range []int{-7200, -7100, -7000, -3600, -1800, -1, 0, 1, 1800, 3600} {
		log.WriteString(at(endOfNovember+seconds, "192.0.2.1", "/"))
	}
	log.WriteString(at(endOfNovember, "192.0.2.2", "/"))
	for _, tt := range []struct {
		limits string
		want   string // each limit's name, and how many of its requests were limited
	}{
		{"{name: api, key: client.ip, quota: 4/month}", "api 2"},
		{"{name: api, key: client.ip, quota: 4/month, time_zone: Europe/Berlin}", "api 3"},
		{"{name: api, key: client.ip, quota: 2/hour}", "api 3"},
		{"{name: api, key: client.ip, quota: 5/month, rate: 1/h, burst: 2}", "api 5, api/quota 0"},
		{"{name: api, key: client.ip, quota: 1/month, rate: 1/h, burst: 2}", "api 0, api/quota 8"},
		{"{name: api, key: client.ip, quota: 1/month, mode: shadow}", "api 8"},
	} {
		r := play(t, Options{Suggest: true}, "limits: ["+tt.limits+"]", log.String())
		var got []string
		sum := int64(0)
		for _, l := range r.Limits {
			got = append(got, fmt.Sprint(l.Name, " ", l.Limited))
			if l.Mode != "shadow" {
				sum += l.Limited
			}
			if l.Requests != 11 || l.Keys != 2 || (l.Suggest != nil) != (l.Rate == "1/h") {
				t.Errorf("%s: %+v", tt.limits, l)
			}
		}
		if text := strings.Join(got, ", "); text != tt.want || r.Requests != 11 || r.Limited != sum {
			t.Errorf("%s: %s and %d of %d in all, want %s", tt.limits, text, r.Limited, r.Requests, tt.want)
		}
	}
}

// TestOrder checks that logs are merged, that lines within a minute are put in
// order, and that the zone counts.
func TestOrder(t *testing.T) {
	one := at(100, "192.0.2.1", "/") + at(50, "192.0.2.1", "/") + at(0, "192.0.2.9", "/") // 50 s and 100 s late
	two := at(75, "192.0.2.1", "/") + strings.ReplaceAll(at(3600+125, "192.0.2.1", "/"), "+0000", "+0100")
	// A token every 25 s: in order, none is limited.
	r := play(t, Options{}, "limits: [{name: a, key: client.ip, rate: 1/25s, burst: 1}]", one, two)
	if r.Requests != 5 || r.Limited != 0 || r.Late != 0 {
		t.Errorf("%d requests, %d limited, %d late", r.Requests, r.Limited, r.Late)
	}
	// After more than a minute a line is late: it is played when it comes.
	var long strings.Builder
	for i := range 20_000 {
		long.WriteString(at(i, "192.0.2.1", "/"))
	}
	r = play(t, Options{}, "limits: [{name: a, key: client.ip, rate: 1/s}]",
		long.String()+at(0, "192.0.2.2", "/")+at(19_999, "192.0.2.3", "/"))
	if r.Requests != 20_002 || r.Limited != 0 || r.Late != 1 || *r.To != "2023-11-14T05:33:19Z" {
		t.Errorf("%d requests, %d limited, %d late, until %s", r.Requests, r.Limited, r.Late, *r.To)
	}
}

// randomLog returns a log of several clients over a minute.
func randomLog(random *rand.Rand, layout string) string {
	var lines []string
	clients := 1 + random.IntN(12)
	for c := range clients {
		for n := random.IntN(60); n >= 0; n-- {
			second := random.ExpFloat64() * 10
			when := time.Unix(1_700_000_000, 0).Add(time.Duration(second * float64(time.Second))).UTC()
			lines = append(lines, fmt.Sprintf("%s,192.0.2.%d,%s", when.Format(layout), c+1, []string{"/a", "/b"}[random.IntN(2)]))
		}
	}
	slices.Sort(lines)
	return "time,client_ip,path\n" + strings.Join(lines, "\n") + "\n"
}

// TestSuggestionsHold checks on random logs that with a suggested burst or rate
// no more keys are limited than it says, and that with one token less more are.
// Another limit denies requests, too.
func TestSuggestionsHold(t *testing.T) {
	random := rand.New(rand.NewPCG(5, 6))
	bursts, rates := 0, 0
	for i := range 200 {
		layout := []string{"2006-01-02 15:04:05", "2006-01-02 15:04:05.000", "2006-01-02 15:04:05.000000"}[i%3]
		log := randomLog(random, layout)
		tokens, burst, other := 1+random.Int64N(30), 1+random.Int64N(10), 1+random.Int64N(60)
		limits := func(rate string, burst int64) string {
			return fmt.Sprintf(`limits:
  - {name: a, key: client.ip, rate: %s, burst: %d}
  - {name: b, match: {paths: [/b]}, rate: %d/m, burst: %d}
`, rate, burst, other, other)
		}
		report := play(t, Options{Suggest: true}, limits(fmt.Sprintf("%d/m", tokens), burst), log).Limits[0]
		suggest := report.Suggest
		limited := func(rate string, burst int64) int64 {
			r := play(t, Options{}, limits(rate, burst), log).Limits[0]
			if r.AtOnce != nil && *r.AtOnce > 0 {
				return max(r.Limited, *r.AtOnce)
			}
			return r.Limited
		}
		own := fmt.Sprintf("%d/m", tokens)
		least := *suggest.Burst[0].Burst
		if last := report.needs[len(report.needs)-1]; max(1, last.Burst) != least || int64(last.Keys) != report.Keys {
			t.Fatalf("log %d: the chart says that %d is enough for %d keys; %d is, for %d", i, last.Burst, last.Keys,
				least, report.Keys)
		}
		if n := limited(own, least); n > 0 {
			t.Fatalf("log %d: with %s and burst %d, %d requests are limited", i, own, least, n)
		}
		if least > 1 {
			if bursts++; limited(own, least-1) == 0 {
				t.Fatalf("log %d: with %s a burst of %d is enough, too, not %d", i, own, least-1, least)
			}
		}
		if text := suggest.Rate[0].Rate; text != nil {
			var n int64
			if _, err := fmt.Sscanf(*text, "%d/m", &n); err != nil {
				t.Fatal(err)
			}
			if limited(*text, burst) > 0 {
				t.Fatalf("log %d: with burst %d and %s, requests are limited", i, burst, *text)
			}
			if n > 1 {
				if rates++; limited(fmt.Sprintf("%d/m", n-1), burst) == 0 {
					t.Fatalf("log %d: with burst %d a rate of %d/m is enough, too, not %s", i, burst, n-1, *text)
				}
			}
		}
	}
	if bursts < 150 || rates < 50 {
		t.Errorf("only %d bursts and %d rates were tried", bursts, rates)
	}
}

// TestSuggestedQuantiles checks the suggestions that limit some keys: of 1000
// keys, one asks for 30 tokens at once, nine for 20 and the others for 2.
func TestSuggestedQuantiles(t *testing.T) {
	var log strings.Builder
	log.WriteString("time,client_ip\n")
	for k := range 1000 {
		n := 2
		switch {
		case k == 0:
			n = 30
		case k < 10:
			n = 20
		}
		for range n {
			fmt.Fprintf(&log, "2024-05-17 10:05:03.000000,10.0.%d.%d\n", k/250, k%250)
		}
	}
	r := play(t, Options{Suggest: true}, "limits: [{name: a, key: client.ip, rate: 1/d, burst: 25}]", log.String())
	var got []string
	for i, b := range r.Limits[0].Suggest.Burst {
		rate := "none"
		if text := r.Limits[0].Suggest.Rate[i].Rate; text != nil {
			rate = *text
		}
		got = append(got, fmt.Sprint(b.Limited, " ", *b.Burst, " ", rate))
	}
	if want := []string{"0% 30 none", "0.1% 20 1/d", "1% 2 1/d"}; !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
}

// TestSettle checks that what a request does not cost comes back when it ends.
func TestSettle(t *testing.T) {
	var log strings.Builder
	for i := range 20 {
		status := 200
		if i >= 10 {
			status = 401
		}
		fmt.Fprintf(&log, `{"start_time":"2024-05-17T10:05:%02d.000Z","path":"/login","response_code":%d,"duration":100}`+"\n",
			i, status)
	}
	r := play(t, Options{}, "limits: [{name: a, rate: 5/d, settle: 'response.code == 200 ? 0 : 1'}]", log.String())
	if r.Limited != 5 || r.Limits[0].Limited != 5 {
		t.Errorf("%d requests are limited; want 5 of the 10 that fail", r.Limited)
	}
	for _, n := range r.Notes {
		t.Errorf("note: %s", n)
	}
}

// TestAgainst checks who is newly limited, and who no longer.
func TestAgainst(t *testing.T) {
	log := strings.Repeat(at(0, "192.0.2.1", "/a"), 3) + strings.Repeat(at(0, "192.0.2.2", "/b"), 3)
	old := config(t, `limits:
  - {name: a, key: client.ip, rate: 1/d, burst: 2, match: {paths: [/a]}}
  - {name: gone, rate: 1/d, match: {paths: [/none]}}
`)
	r := play(t, Options{Against: old}, `limits:
  - {name: a, key: client.ip, rate: 1/d, burst: 1, match: {paths: [/b]}}
  - {name: new, rate: 1/d, burst: 10}
`, log)
	a := r.Limits[0]
	if r.Limited != 2 || r.Before.Limited != 1 || a.Limited != 2 || a.Before.Limited != 1 || a.NewlyKeys != 1 ||
		a.Newly[0].Key != "=9.192.0.2.2" || a.SparedKeys != 1 || a.Spared[0].Key != "=9.192.0.2.1" {
		t.Errorf("%+v", r)
	}
	if r.Limits[1].Before != nil || r.Limits[2].Name != "gone" || r.Limits[2].Before == nil {
		t.Errorf("%+v", r.Limits)
	}
}

// TestJSON checks the names that are promised.
func TestJSON(t *testing.T) {
	r := play(t, Options{Suggest: true, Against: config(t, "limits: [{name: a, rate: 1/s}]")},
		"limits: [{name: a, rate: 1/s}]", strings.Repeat(at(0, "192.0.2.1", "/a"), 3)+"junk\n")
	text, err := json.Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	var got map[string]any
	if err := json.Unmarshal(text, &got); err != nil {
		t.Fatal(err)
	}
	path := func(names ...string) (v any) {
		v = got
		for _, name := range names {
			if list, ok := v.([]any); ok {
				v = list[0]
			}
			v = v.(map[string]any)[name]
		}
		return v
	}
	for _, names := range []string{
		"lines", "skipped", "from", "to", "requests", "limited", "at_once", "before limited", "before at_once",
		"limits name", "limits requests", "limits limited", "limits at_once", "limits keys", "limits limited_keys",
		"limits worst key", "limits worst requests", "limits worst limited", "limits worst at_once",
		"limits suggest burst limited", "limits suggest burst burst", "limits suggest rate limited",
		"limits before limited", "limits before keys", "limits before limited_keys", "limits before worst key",
	} {
		if path(strings.Fields(names)...) == nil {
			t.Errorf("no %s in %s", names, text)
		}
	}
	if path("lines") != 4.0 || path("skipped") != 1.0 {
		t.Errorf("%v lines, %v skipped", path("lines"), path("skipped"))
	}
}

// TestVerdict checks that text, page and JSON say what was played, and whether it
// passed: without a gate, at it, above it, and where something else is wrong. The
// names of files are escaped.
func TestVerdict(t *testing.T) {
	percentage := func(p float64) *float64 { return &p }
	// A burst of 1 allows 1 of 4 at once.
	const text = "limits: [{name: a, key: client.ip, rate: 1/d}]"
	good := strings.Repeat(at(0, "192.0.2.1", "/a"), 4)
	const three = "3 of 4 requests would be denied, 75%; --max-limited is "
	const unreadable = "1 of 5 lines cannot be read, more than 1%; the first is "
	for _, tt := range []struct {
		most    *float64
		log     string
		passed  bool
		want    string   // in text after a label; empty: nothing
		reasons []string // how they begin
	}{
		{nil, good, true, "", nil},
		{percentage(75), good, true, "passed:  " + three + "75%\n", nil},
		{percentage(74.9), good, false, "failed:  " + three + "74.9%\n", []string{three + "74.9%"}},
		{percentage(0), good, false, "failed:  " + three + "0%\n", []string{three + "0%"}},
		{nil, good + "junk\n", false, "failed:  " + unreadable, []string{unreadable}},
		{percentage(100), good + "junk\n", false, "failed:  " + unreadable, []string{unreadable}},
		{percentage(10), good + "junk\n", false, "failed:  " + three + "10%\n", []string{unreadable, three + "10%"}},
	} {
		r := play(t, Options{MaxLimited: tt.most, ConfigFile: "a<b>\x1b.yaml", AgainstFile: "old&.yaml"}, text, tt.log)
		var plain, page strings.Builder
		encoded, err := json.Marshal(r)
		if err := errors.Join(err, r.Text(&plain), r.HTML(&page)); err != nil {
			t.Fatal(err)
		}
		var got struct {
			Verdict struct {
				Passed     bool
				MaxLimited string `json:"max_limited"`
				Reasons    []string
			}
			Config, Against string
			Logs            []string
		}
		if err := json.Unmarshal(encoded, &got); err != nil {
			t.Fatal(err)
		}
		v := got.Verdict
		if v.Passed != tt.passed || len(v.Reasons) != len(tt.reasons) || v.Reasons == nil ||
			(v.MaxLimited == "") != (tt.most == nil) {
			t.Errorf("%+v, want %+v", v, tt)
		}
		for i, want := range tt.reasons[:min(len(tt.reasons), len(v.Reasons))] {
			if !strings.HasPrefix(v.Reasons[i], want) {
				t.Errorf("%q, want %q", v.Reasons[i], want)
			}
		}
		if got.Config != "a<b>\x1b.yaml" || got.Against != "old&.yaml" || len(got.Logs) != 1 {
			t.Errorf("%+v", got)
		}
		if !strings.Contains(plain.String(), tt.want) || tt.want == "" &&
			regexp.MustCompile("(?m)^(passed|failed): ").MatchString(plain.String()) {
			t.Errorf("%q is not in\n%s", tt.want, plain.String())
		}
		names := "config:  \"a<b>\\x1b.yaml\", compared with old&.yaml\nlogs:    " + got.Logs[0] + "\n"
		if !strings.HasPrefix(plain.String(), names) {
			t.Errorf("%q is not first in\n%s", names, plain.String())
		}
		for _, want := range []string{
			"<title>sluice backtest of a&lt;b&gt;\x1b.yaml</title>", "Compared with old&amp;.yaml. Logs: " + got.Logs[0],
		} {
			if !strings.Contains(page.String(), want) {
				t.Errorf("%q is not in the page", want)
			}
		}
		label := map[bool]string{true: "Passed", false: "Failed"}[tt.passed]
		if want := `<strong>` + label + `</strong> `; tt.want != "" && !strings.Contains(page.String(), want) ||
			tt.want == "" && strings.Contains(page.String(), "<strong>") {
			t.Errorf("%+v: the page has not %s", tt, want)
		}
	}
}

// TestSuggestionTables checks that the page has the suggestions of the text: each
// column under its name, and the rates in ascending order.
func TestSuggestionTables(t *testing.T) {
	r := play(t, Options{Suggest: true}, "limits: [{name: a, key: client.ip, rate: 4/m, burst: 2}]",
		strings.Repeat(at(0, "192.0.2.1", "/a"), 9))
	var page strings.Builder
	if err := r.HTML(&page); err != nil {
		t.Fatal(err)
	}
	cells := func(row string) (all []string) {
		for _, m := range regexp.MustCompile(`<t[hd][^>]*>(.*?)</t[hd]>`).FindAllStringSubmatch(row, -1) {
			all = append(all, regexp.MustCompile(`<[^>]*>`).ReplaceAllString(m[1], ""))
		}
		return all
	}
	var got []string
	for row := range strings.SplitSeq(page.String(), "<tr>") {
		got = append(got, strings.Join(cells(row), " | "))
	}
	s := r.Limits[0].Suggest
	want := []string{
		"To limit | Burst with rate 4/m | Rate with burst 2",
		fmt.Sprintf("no key | %d | none is enough", *s.Burst[0].Burst),
		"Rate | no key limited | 0.1% of keys limited | 1% of keys limited",
	}
	for i, rate := range []string{"1/m", "2/m", "4/m now", "8/m", "16/m", "32/m"} {
		row := rate
		for _, b := range s.Pairs[i].Burst {
			row += fmt.Sprintf(" | %d", *b.Burst)
		}
		want = append(want, row)
	}
	at := 0
	for _, row := range got {
		if at < len(want) && row == want[at] {
			at++
		}
	}
	if at < len(want) {
		t.Errorf("no row %q, in this order, in\n%s", want[at], strings.Join(got, "\n"))
	}
}

// TestMissing checks that what a log does not hold is named.
func TestMissing(t *testing.T) {
	r := play(t, Options{}, `limits:
  - {name: a, rate: 1/s, key: 'request.headers["x-api-key"]', absent: share}
  - {name: b, rate: 1/s, match: {hosts: [a.example.com]}}
  - {name: c, rate: 1/s, key: client.ip, when: 'request.url_path.startsWith("/a")'}
`, at(0, "192.0.2.1", "/a"))
	want := []string{
		`a reads request.headers["x-api-key"], which the log does not hold: it is taken to be absent, for which the limit has ` +
			`absent: share; name a field with --field`,
		`b reads request.host, which the log does not hold: it is taken to be absent; name a field with --field`,
	}
	if !slices.Equal(r.Notes, want) {
		t.Errorf("%s\nwant\n%s", strings.Join(r.Notes, "\n"), strings.Join(want, "\n"))
	}
}

// TestInterrupted checks that a run that is interrupted reports what it knows.
func TestInterrupted(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a.log")
	if err := os.WriteFile(path, []byte(strings.Repeat(at(0, "192.0.2.1", "/"), 50_000)), 0o600); err != nil {
		t.Fatal(err)
	}
	s, err := accesslog.Open(path, nil, accesslog.Options{})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	r, err := Run(ctx, Options{Config: config(t, "limits: [{name: a, rate: 1/s}]"), Logs: []*accesslog.Source{s}})
	if err != nil || !r.Interrupted || r.Requests == 50_000 {
		t.Errorf("%v, %+v", err, r)
	}
}

// TestTimeline checks that no request is lost where slots grow.
func TestTimeline(t *testing.T) {
	random := rand.New(rand.NewPCG(7, 8))
	var l timeline
	now := int64(1_700_000_000_123_456)
	for range 10_000 {
		now += random.Int64N(600_000_000)
		l.add(now, random.IntN(2) == 0)
	}
	n := int64(0)
	for _, s := range l.slots {
		n += s.requests
	}
	if n != 10_000 || len(l.slots) > maxSlots || l.start%l.width != 0 || l.width%3_600_000_000 != 0 {
		t.Errorf("%d requests in %d slots of %d s from %d", n, len(l.slots), l.width/1e6, l.start)
	}
}
