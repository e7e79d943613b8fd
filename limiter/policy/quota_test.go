package policy

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/sluiceproxy/sluice/limiter"
)

// TestQuotas has limits and overrides with a quota, with and without a rate, inline
// and in files.
func TestQuotas(t *testing.T) {
	c := loadFiles(t, "c.yaml", `
limits:
  - name: monthly
    key: request.headers["k"]
    quota: 1000/month
    time_zone: Europe/Berlin
    starts: 2026-01-14
    overrides: [{key: daily, quota: 10/day}, {key: rated, rate: 5/s}, {key: own, quota: 7/month, starts: 2026-01-20}]
    overrides_file: m.csv
  - {name: api, key: 'request.headers["k"]', rate: 10/s, burst: 20, quota: 500/week, settle: 1, cost: 2}
`, "m.csv", "key,rate,burst,quota,starts,mode\nboth,3/s,,20/year,2024-02-29,\nonly,,,30/hour,,shadow\nrate,4/s,9,,,\n")
	shape := func(b limiter.Bucket) string {
		if !b.IsQuota() {
			return fmt.Sprintf("burst %d", b.Burst())
		}
		return fmt.Sprintf("%d/%s in %s", b.Burst(), b.Calendar().Unit(), b.Calendar().Zone())
	}
	for _, tt := range []struct{ key, want string }{
		{"x", "monthly 1000/month in Europe/Berlin"},
		{"daily", "monthly 10/day in Europe/Berlin"},
		{"rated", "monthly burst 5"},
		{"both", "monthly burst 3, monthly/quota 20/year in Europe/Berlin"},
		{"only", "monthly 30/hour in Europe/Berlin shadow"},
		{"rate", "monthly burst 9"},
	} {
		d := c.Draw(request(t, "GET h/ with k="+tt.key))
		var got []string
		for _, charge := range d.Charges {
			text := charge.Limit.Name + " " + shape(charge.Bucket)
			if charge.Limit.Shadow {
				text += " shadow"
			}
			got = append(got, text)
			wantPrefix := "sluice:default:" + strings.TrimSuffix(charge.Limit.Name, quotaSuffix)
			if charge.Bucket.IsQuota() {
				wantPrefix += quotaSuffix
			}
			if !strings.HasPrefix(charge.Key, wantPrefix+":{#43.") || !strings.HasSuffix(charge.Key, "}") {
				t.Errorf("%s: key %s", tt.key, charge.Key)
			}
		}
		if want := tt.want + ", api burst 20, api/quota 500/week in UTC"; strings.Join(got, ", ") != want {
			t.Errorf("%s: %s, want %s", tt.key, strings.Join(got, ", "), want)
		}
		for _, charge := range d.Charges[len(d.Charges)-2:] {
			if charge.Cost != 2 || charge.HoldFor == 0 || !c.Has(charge.Limit) {
				t.Errorf("%+v", charge)
			}
			name := strings.Split(charge.Key, ":")[2] // as a settlement has it
			cost, err := c.Settle("default", name, &End{}, 2)
			if cost != 1 || err != nil || c.LimitOfKey(name) != charge.Limit.Name {
				t.Errorf("%s costs %d (%v) in the end, of %s", name, cost, err, c.LimitOfKey(name))
			}
		}
		var explained []string
		for _, l := range c.Explain(request(t, "GET h/ with k="+tt.key)).Limits {
			if charge := d.Charges[l.Charge]; charge.Limit != l.Limit || charge.Bucket.Burst() != l.Burst ||
				!strings.Contains(charge.Key, l.Key) || charge.Bucket.IsQuota() != (l.Quota != "") {
				t.Errorf("%s: %+v of %+v", tt.key, l, charge)
			}
			explained = append(explained, l.Limit.Name)
		}
		for i, name := range explained {
			b, err := c.Bucket(BucketName{Limit: name, Parts: []string{tt.key}})
			if want := d.Charges[i]; err != nil || b.Charge.Key != want.Key || b.Charge.Bucket != want.Bucket ||
				b.Charge.Limit != want.Limit {
				t.Errorf("%s of %s: %+v, %v", name, tt.key, b, err)
			}
		}
	}
	var names []string
	for _, l := range c.InEachMode() {
		names = append(names, fmt.Sprint(l.Name, l.Shadow))
	}
	want := []string{
		"monthlyfalse", "monthly/quotafalse", "apifalse", "api/quotafalse", "monthlytrue", "monthly/quotatrue",
	}
	if !slices.Equal(names, want) {
		t.Errorf("limits %v, want %v", names, want)
	}
	if _, err := c.Bucket(BucketName{Limit: "monthly/quota", Parts: []string{"rated"}}); err == nil ||
		err.Error() != "limit monthly has no quota for this key; write --limit monthly" {
		t.Error(err)
	}
	if _, err := c.Bucket(BucketName{Limit: "nope"}); err == nil ||
		err.Error() != `unknown limit "nope"; the config has: monthly, monthly/quota, api, api/quota` {
		t.Error(err)
	}
	// A rate that the request brings leaves the quota as it is.
	brought := parse(t, `
limits:
  - {name: a, key: client.ip, rate: 1/s, quota: 9/day, rate_from: 'request.headers["rate"]', max_rate: 50/s}
`)
	if d := brought.Draw(request(t, "GET h/ with rate=7")); len(d.Charges) != 2 ||
		d.Charges[0].Bucket.Burst() != 7 || d.Charges[1].Bucket.Burst() != 9 {
		t.Errorf("%+v", d)
	}
	if d := brought.Draw(request(t, "GET h/ with rate=none")); len(d.Charges) != 1 || d.Charges[0].HasBucket() {
		t.Errorf("%+v", d)
	}
	// A route may bring quotas, too.
	d := c.Draw(request(t, "GET h/ with k=x context sluice.limit.api={quota:_3/day,_rate:_1/s}"))
	if len(d.Mistakes) > 0 || len(d.Charges) != 3 || d.Charges[2].Limit.Name != "api/quota" ||
		d.Charges[2].Bucket.Burst() != 3 {
		t.Errorf("%+v", d)
	}
}

// TestQuotaColumns has what is wrong with quotas in overrides files.
func TestQuotaColumns(t *testing.T) {
	for _, tt := range []struct{ rows, want string }{
		{"key,quota\n10.0.0.1,5/day\n", ""},
		{"key,quota,rate\n10.0.0.1,5/m,\n", `2:10: invalid quota "5/m"; the shortest unit of a quota is hour; ` +
			"write rate: 5/m, or quota: 5/month"},
		{"key,rate,quota\n10.0.0.1,,\n", "2:10: neither a rate, a quota nor a plan; an override needs one of them"},
		{"key,rate,burst,quota\n10.0.0.1,,7,5/day\n", "2:10: burst 7 needs a rate; a quota is its own burst"},
		{"key,rate,quota,starts\n10.0.0.1,,5/month,May\n", `2:19: invalid starts "May"; want a date such as 2026-01-14`},
		{"key,rate,starts\n10.0.0.1,5/m,2026-01-14\n", "2:14: starts has no effect without quota; " +
			"an override replaces the limit's quota too"},
		{"key,rate\n10.0.0.1,5/month\n", `2:10: invalid rate "5/month"; write quota: 5/month`},
		{"key,quota\n10.0.0.1,0/day\n", `2:10: invalid quota "0/day"; want 1 to 1000000000 tokens, ` +
			"or rate: none to deny every request"},
		{"key,quota\n10.0.0.1,100\n", `2:10: invalid quota "100"; a quota needs a unit; write 100/day or 100/month`},
		{"key,quota\n10.0.0.1,unlimited\n", `2:10: invalid quota "unlimited"; write rate: unlimited and omit quota`},
		{"key,quota\n10.0.0.1,5 / month\n", `2:10: invalid quota "5 / month"; write 5/month`},
		{"key,quota,mode\n10.0.0.1,5/day,off\n", `2:16: unknown value "off"; want one of enforce, shadow`},
		{"key,quota,starts\n10.0.0.1,5/month,2026-02-30\n", `2:18: invalid starts "2026-02-30"; ` +
			"want a date such as 2026-01-14"},
		{"key,quota,starts\n10.0.0.1,5/month,0001-01-01\n", `2:18: invalid starts "0001-01-01"; ` +
			"want a date such as 2026-01-14"},
		{"key,quota,starts\n10.0.0.1,5/day,2026-01-14\n", "2:16: starts moves weeks, months and years; " +
			"there is none for a quota each day"},
		{"key,quota,time_zone\n10.0.0.1,5/day,UTC\n", "1:1: column 3 has an unknown name; " + wantColumns},
		{"key,quotas\n10.0.0.1,5/day\n", "1:1: column 2 has an unknown name; did you mean quota?"},
		{"key,start,quota\n10.0.0.1,,5/day\n", "1:1: column 2 has an unknown name; did you mean starts?"},
		{"key,quota\n10.0.0.1,5/day,7\n", "2:1: row of 3 columns; want 2, as the header row has"},
		{"key,rate,quota\n10.0.0.1,none,5/day\n", "2:10: rate: none denies every request; omit quota"},
		{"key,rate,quota\n10.0.0.1,unlimited,5/day\n", "2:10: rate: unlimited has no effect beside a quota; omit rate"},
		{"key,quota\n10.0.0.1,5/day\n10.0.0.1,6/day\n", "3:1: duplicate key; want one override for each key"},
	} {
		const config = "limits: [{name: a, key: client.ip, rate: 1/s, overrides_file: o.csv}]\n"
		if got := overrideMistakes(t, config, tt.rows); got != tt.want {
			t.Errorf("%q says\n%s\nwant\n%s", tt.rows, got, tt.want)
		}
	}
}
