package policy

import (
	"fmt"
	"strings"
	"testing"
	"time"
)

// TestPlans has plans that limits, overrides and files of these use.
func TestPlans(t *testing.T) {
	const text = `
limits: # before the plans: their order does not matter
  - name: a
    key: request.headers["k"]
    plan: free
    overrides: [{key: inline, plan: gold}, {key: tried, plan: gold, mode: shadow}, {key: plain, rate: 5/s}, {key: out, plan: out}]
    overrides_file: a.csv
  - {name: b, plan: gold}
plans:
  free: {rate: 60/m, burst: 100}
  gold: {rate: 600/m}
  out: {rate: none}
  open: {rate: unlimited}
`
	const rows = "key,plan,rate,burst,mode\nfiled,gold,,,\nopen,open,,,\nrated,,7/s,9,\nshadowed, gold ,,,shadow\n"
	file := directory(t, "c.yaml", text, "a.csv", rows, "old.csv", "key,rate,burst\nx,1/s,\n")
	c, _, err := Load(file, env())
	if err != nil {
		t.Fatal(err)
	}
	if len(c.Warnings) > 0 {
		t.Error(c.Warnings)
	}
	for key, want := range map[string]string{
		"other": "60/m 100 free false", "inline": "600/m 600 gold false", "tried": "600/m 600 gold true", "plain": "5/s 5  false",
		"out": "none 0 out false", "filed": "600/m 600 gold false", "open": "unlimited 0 open false", "rated": "7/s 9  false",
		"shadowed": "600/m 600 gold true",
	} {
		l := c.Explain(request(t, "GET h/ with k="+key)).Limits[0]
		if got := fmt.Sprintf("%s %d %s %v", l.Rate, l.Burst, l.Plan, l.Limit.Shadow); got != want {
			t.Errorf("%s: %s, want %s", key, got, want)
		}
	}
	for old, want := range map[string]string{
		text: "[] []",
		strings.Replace(text, "rate: 60/m", "rate: 61/m", 1):             "[a] [plans]",
		strings.Replace(text, "rate: 600/m", "rate: 600/m, burst: 9", 1): "[a b] [plans]",
		strings.Replace(text, "rate: 5/s", "plan: free", 1):              "[a] []",
		strings.Replace(text, ", mode: shadow", "", 1):                   "[a] []",
		text + "  more: {rate: 1/s}\n":                                   "[] [plans]",
	} {
		before, _, err := Load(directory(t, "c.yaml", old, "a.csv", rows), env())
		if err != nil {
			t.Fatal(err)
		}
		changes := c.Since(before)
		if got := fmt.Sprint(changes.Changed, changes.Settings); strings.TrimSpace(got) != strings.ReplaceAll(want, "] [", "][") && got != want {
			t.Errorf("since\n%s\n%s, want %s", old, got, want)
		}
	}
	// A route's limit may use the file's plans.
	if got := drawn(t, c, "GET h/ context sluice.limit.r={plan:_out}"); !strings.Contains(got, "r - none") {
		t.Error(got)
	}
	c = parse(t, "{plans: {used: {rate: 1/s}, idle: {rate: 2/s}}, limits: [{name: a, plan: used}]}")
	const unused = "test.yaml:1:35: plans.idle: no limit and no override has this plan; remove it, or write plan: idle where it is meant"
	if got := c.Warnings.Error(); got != unused {
		t.Errorf("%s, want %s", got, unused)
	}
}

// TestPlannedQuotas has plans with quotas, whose windows are those of the limit or of
// the override that has the plan.
func TestPlannedQuotas(t *testing.T) {
	const text = `
plans:
  gold: {rate: 600/m, burst: 1000, quota: 5000/month}
  free: {quota: 100/month}
  slow: {rate: 1/m}
limits:
  - name: api
    key: request.headers["k"]
    plan: free
    time_zone: Europe/Berlin
    starts: 2026-01-14
    overrides: [{key: inline, plan: gold, starts: 2026-01-20}]
    overrides_file: a.csv
`
	const rows = "key,plan,starts,mode\nfiled,gold,2026-01-31,shadow\ninherits,gold,,\nslow,slow,,\n"
	c, _, err := Load(directory(t, "c.yaml", text, "a.csv", rows), env())
	if err != nil {
		t.Fatal(err)
	}
	at := time.Date(2026, 2, 10, 12, 0, 0, 0, time.UTC)
	for key, want := range map[string]string{
		"other":    "free: api 100/month until 2026-02-13T23:00:00Z",
		"inline":   "gold: api 600/m; gold: api/quota 5000/month until 2026-02-19T23:00:00Z",
		"filed":    "gold: api 600/m in shadow; gold: api/quota 5000/month until 2026-02-27T23:00:00Z in shadow",
		"inherits": "gold: api 600/m; gold: api/quota 5000/month until 2026-02-13T23:00:00Z",
		"slow":     "slow: api 1/m",
	} {
		var got []string
		draw := c.Draw(request(t, "GET h/ with k="+key))
		for _, l := range c.Explain(request(t, "GET h/ with k="+key)).Limits {
			b := draw.Charges[l.Charge].Bucket
			s := l.Plan + ": " + l.Limit.Name + " " + l.Rate + l.Quota
			if b.IsQuota() {
				_, end := b.Calendar().Window(at)
				s += " until " + end.UTC().Format(time.RFC3339)
			}
			if l.Limit.Shadow {
				s += " in shadow"
			}
			got = append(got, s)
		}
		if strings.Join(got, "; ") != want {
			t.Errorf("%s: %s, want %s", key, strings.Join(got, "; "), want)
		}
	}
	for config, want := range map[string]string{
		"{plans: {a: {quota: 5/day, burst: 3}}, limits: []}":   "plans.a.burst: burst needs a rate; a quota is its own burst",
		"{plans: {a: {quota: 5/m}}, limits: []}":               `plans.a.quota: invalid quota "5/m"`,
		"{plans: {a: {rate: none, quota: 5/day}}, limits: []}": "plans.a.rate: rate: none denies every request; omit quota",
		"{plans: {a: {rate: 1/s}}, limits: [{name: l, key: client.ip, plan: a, overrides: [{key: 10.0.0.1, plan: a, starts: 2026-01-01}]}]}": "overrides[0].starts: starts has no effect: plan a has no quota",
		"{plans: {a: {rate: 1/s}}, limits: [{name: l, plan: a, quota: 5/day}]}":                                                              "limits[0].quota: the plan gives the rate, the burst and the quota; remove this, or the plan",
	} {
		_, err := Parse("c.yaml", []byte(config), env())
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %s", config, err, want)
		}
	}
}

// TestPlanColumns has rows of overrides files that are wrong.
func TestPlanColumns(t *testing.T) {
	for csv, want := range map[string]string{
		"key,plan\na,goldd\n":            `2:3: limits[0].overrides_file: unknown plan "goldd"; did you mean gold?`,
		"key,plan\na,x\n":                `2:3: limits[0].overrides_file: unknown plan "x"; want one of free, gold`,
		"key,plan\na,\n":                 "2:3: limits[0].overrides_file: neither a rate, a quota nor a plan; an override needs one of them",
		"key,rate,plan\na,1/s,gold\n":    "2:7: limits[0].overrides_file: plan gold gives the rate, the burst and the quota; remove these, or the plan",
		"key,burst,plan\na,5,gold\n":     "2:5: limits[0].overrides_file: plan gold gives the rate, the burst and the quota; remove these, or the plan",
		"key,plan,mode\na,gold,x\n":      `2:8: limits[0].overrides_file: unknown value "x"; want one of enforce, shadow`,
		"key,plans\na,gold\n":            "1:1: limits[0].overrides_file: column 2 has an unknown name; did you mean plan?",
		"key,plan,rate\na,,ten\na,gold,": "2:4: limits[0].overrides_file: invalid rate \"ten\"; want tokens/period such as 10/s, 100/m, 5000/24h, 10/7d or 3/250ms (units: us, ms, s, m, h, d), or unlimited or none",
	} {
		file := directory(t, "c.yaml", "plans: {free: {rate: 1/s}, gold: {rate: 2/s}}\n"+
			"limits: [{name: a, plan: free, key: request.headers.k, overrides_file: o.csv}]", "o.csv", csv)
		_, _, err := Load(file, env())
		if err == nil {
			t.Errorf("%q is valid", csv)
			continue
		}
		if got := strings.ReplaceAll(err.Error(), strings.TrimSuffix(file, "c.yaml")+"o.csv:", ""); got != want {
			t.Errorf("%q says\n%s\nwant\n%s", csv, got, want)
		}
	}
}

// manyTenants returns a config with three plans and a file of 100,000 tenants.
func manyTenants(t testing.TB) string {
	t.Helper()
	var rows strings.Builder
	rows.WriteString("tenant,plan\n")
	for i := range 100_000 {
		fmt.Fprintf(&rows, "tenant-%06d,%s\n", i, []string{"free", "team", "gold"}[i%3])
	}
	return directory(t, "c.yaml", `
plans: {free: {rate: 60/m}, team: {rate: 600/m, burst: 1000}, gold: {rate: 6000/m}}
limits: [{name: a, plan: free, key: 'request.headers["x-tenant"]', overrides_file: t.csv}]`, "t.csv", rows.String())
}

// BenchmarkPlans reads a file of 100,000 tenants with plans, which should take at
// most 150 ms.
func BenchmarkPlans(b *testing.B) {
	file := manyTenants(b)
	var c *Config
	for b.Loop() {
		began := time.Now()
		var err error
		if c, _, err = Load(file, env()); err != nil {
			b.Fatal(err)
		}
		b.ReportMetric(float64(time.Since(began).Milliseconds()), "ms")
	}
	if n := len(c.rules[0].overrides.file); n != 100_000 {
		b.Errorf("%d overrides", n)
	}
	if got := c.Explain(request(b, "GET h/ with x-tenant=tenant-000002")).Limits[0].Plan; got != "gold" {
		b.Errorf("plan %s", got)
	}
}
