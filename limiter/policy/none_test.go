package policy

import (
	"fmt"
	"slices"
	"strings"
	"testing"
)

// TestNone has limits and overrides with the rate none, which have no bucket and
// deny.
func TestNone(t *testing.T) {
	const config = `
limits:
  - {name: blocked, match: {clients: [203.0.113.9/32]}, rate: none}
  - name: keys
    key: request.headers["k"]
    rate: none
    cost: 0
    overrides: [{key: a, rate: 10/s}, {key: b, rate: unlimited}]
  - {name: some, key: 'request.headers["k"]', rate: 10/s, on_failure: local, overrides: [{key: bad, rate: none}]}
  - {name: beta, when: 'request.headers["x"].startsWith("y")', rate: none}
local_share: 0.5
`
	c := parse(t, config)
	for _, tt := range []struct{ request, drawn string }{
		{"GET h/ from 203.0.113.9 with k=a", "blocked - none, keys #(a) costs 0, some #(a)"},
		{"GET h/ with k=b", "keys unlimited, some #(b)"},
		{"GET h/ with k=bad", "keys #(bad) none costs 0, some #(bad) none"},
		{"GET h/", "keys ~11.203.0.113.7 none costs 0, some ~11.203.0.113.7"},
		{"GET h/ with x=yes with k=a", "keys #(a) costs 0, some #(a), beta - none"},
		{"GET h/ with x=no with k=a", "keys #(a) costs 0, some #(a)"},
	} {
		if got, want := drawn(t, c, tt.request), withHashes(tt.drawn); got != want {
			t.Errorf("%s: %s, want %s", tt.request, got, want)
		}
	}
	x := c.Explain(request(t, "GET h/ from 203.0.113.9 with k=bad"))
	var got []string
	for _, l := range x.Limits {
		got = append(got, fmt.Sprintf("%s %v %s %d %d %s", l.Limit.Name, l.Applies, l.Rate, l.Burst, l.Charge, l.Reason))
	}
	want := []string{
		"blocked true none 0 0 it matches; the rate is none, so the request is denied",
		"keys true none 0 1 it applies to every request; the rate is none, so the request is denied",
		"some true none 0 2 it applies to every request; its rate is from overrides[0]; the rate is none, " +
			"so the request is denied",
		"beta false none 0 -1 when is absent, and a limit with rate: none does not apply then: " +
			`request.headers["x"].startsWith("y")`,
	}
	if !slices.Equal(got, want) {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	_, err := c.Bucket(BucketName{Limit: "some", Parts: []string{"bad"}})
	const noBucket = "limit some denies every request with this key (rate: none) and has no bucket"
	if err == nil || err.Error() != noBucket {
		t.Errorf("%v, want %s", err, noBucket)
	}
	if got, want := fmt.Sprint(c.ByKey()), "[[keys some]]"; got != want {
		t.Errorf("by key: %s, want %s", got, want)
	}
	if len(c.Warnings) > 0 {
		t.Error(c.Warnings)
	}
	if d := c.Describe()[0]; d.Burst != 0 || d.FillTime != 0 || d.Tokens != 0 || d.Rate != "none" {
		t.Errorf("%+v", d)
	}
}

// TestOverrideModes has overrides with a mode of their own, inline and in files.
func TestOverrideModes(t *testing.T) {
	c := loadFiles(t, "c.yaml", `
limits:
  - name: a
    key: request.headers["k"]
    rate: 10/s
    overrides: [{key: tried, rate: 1/s, mode: shadow}, {key: same, rate: 2/s, mode: enforce}]
    overrides_file: a.csv
  - name: b
    key: request.headers["k"]
    rate: 10/s
    mode: shadow
    overrides_file: b.csv
  - {name: c, key: 'request.headers["k"]', rate: 10/s, overrides: [{key: same, rate: 2/s, mode: enforce}]}
`, "a.csv", "key,mode,burst,rate\nfiled,shadow,7,5/s\nplain,,,5/s\n",
		"b.csv", "key,rate,mode\ncanary,10/s,enforce\n")
	for key, want := range map[string]string{
		"tried":  "a shadow 1/s 1, b shadow 10/s 10, c enforce 10/s 10",
		"same":   "a enforce 2/s 2, b shadow 10/s 10, c enforce 2/s 2",
		"filed":  "a shadow 5/s 7, b shadow 10/s 10, c enforce 10/s 10",
		"plain":  "a enforce 5/s 5, b shadow 10/s 10, c enforce 10/s 10",
		"canary": "a enforce 10/s 10, b enforce 10/s 10, c enforce 10/s 10",
	} {
		var got []string
		modes := map[bool]string{true: "shadow", false: "enforce"}
		x := c.Explain(request(t, "GET h/ with k="+key))
		for i, l := range x.Limits {
			got = append(got, fmt.Sprintf("%s %s %s %d", l.Limit.Name, modes[l.Limit.Shadow], l.Rate, l.Burst))
			if charged := x.Draw.Charges[i].Limit; charged != l.Limit || !c.Has(charged) {
				t.Errorf("%s: %s is charged as another limit", key, l.Limit.Name)
			}
		}
		if strings.Join(got, ", ") != want {
			t.Errorf("%s: %s, want %s", key, strings.Join(got, ", "), want)
		}
	}
	var names []string
	for _, l := range c.InEachMode() {
		names = append(names, fmt.Sprint(l.Name, " ", l.Shadow))
	}
	if got, want := strings.Join(names, ", "), "a false, b true, c false, a true, b false"; got != want {
		t.Errorf("%s, want %s", got, want)
	}
	// In a file in shadow mode nothing denies.
	c = parse(t, `
mode: shadow
limits: [{name: a, rate: 1/s, key: client.ip, overrides: [{key: 203.0.113.7, rate: none, mode: enforce}]}]
`)
	if d := c.Draw(request(t, "GET h/")); !d.Charges[0].Limit.Shadow || c.FailsClosed() || len(c.InEachMode()) != 1 {
		t.Errorf("%+v", d)
	}
}

// TestColumns has headers of overrides files that are wrong.
func TestColumns(t *testing.T) {
	const example = "a header row such as key,rate,burst"
	for csv, want := range map[string]string{
		"key,rate,brust\n":  "1:1: column 3 has an unknown name; did you mean burst?",
		"key,rate,region\n": "1:1: column 3 has an unknown name; " + wantColumns,
		"key,burst\n":       "1:1: no column is named rate, quota or plan; want " + example,
		"rate,burst\n":      "1:1: column 1 is named rate, but must be a part of the key; want " + example,
		"key\n":             "1:1: header row of 1 columns; " + wantColumns,
		"hunter2,none\n":    "1:1: no header row; add one as the first line: key,rate,burst",
		"key,rate,rate\n":   "1:1: two columns are named rate",
		"key;rate\n":        `1:1: columns separated by ";"; separate them by commas, as in key,rate,burst`,

		"key,rate,mode\na,1/s,x\n": `2:7: unknown value "x"; want one of enforce, shadow`,
		"key,mode,rate\na,dry-run,1/s\nb,,0\n": `2:3: unknown value "dry-run"; did you mean shadow? ` +
			"(want one of enforce, shadow)\n" + `3:4: invalid rate "0"; write none`,
		"key,rate,burst\na,none,5\n": "2:3: burst 5 needs a bucket, but the rate is none; omit burst",
		"key,rate,burst\na,0/m,\n":   `2:3: invalid rate "0/m"; write none to deny every request`,
	} {
		const config = "limits: [{name: a, rate: 1/s, key: request.headers.k, overrides_file: o.csv}]"
		if got := overrideMistakes(t, config, csv); got != want {
			t.Errorf("%q says\n%s\nwant\n%s", csv, got, want)
		}
	}
}

// TestShadowReasons checks that no reason says that a limit in shadow mode denies.
func TestShadowReasons(t *testing.T) {
	c := parse(t, `limits:
  - {name: a, mode: shadow, rate: none}
  - {name: b, mode: shadow, rate: 1/s, key: request.headers.k, absent: deny}
  - {name: c, rate: 1/s, key: request.method, overrides: [{key: GET, rate: none, mode: shadow}]}
`)
	var got []string
	for _, l := range c.Explain(request(t, "GET h/")).Limits {
		got = append(got, l.Limit.Name+": "+l.Reason)
	}
	want := []string{
		"a: it applies to every request; the rate is none, so the request would be denied",
		"b: it applies to every request; its key part request.headers.k is absent: the request would be denied",
		"c: it applies to every request; its rate is from overrides[0]; the rate is none, so the request would be denied",
	}
	if !slices.Equal(got, want) {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}
