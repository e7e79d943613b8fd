package policy

import (
	"fmt"
	"strings"
	"syscall"
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
    overrides:
      - {key: inline, plan: gold}
      - {key: tried, plan: gold, mode: shadow}
      - {key: plain, rate: 5/s}
      - {key: out, plan: out}
    overrides_file: a.csv
  - {name: b, plan: gold}
plans:
  free: {rate: 60/m, burst: 100}
  gold: {rate: 600/m}
  out: {rate: none}
  open: {rate: unlimited}
`
	const rows = "key,plan,rate,burst,mode\nfiled,gold,,,\nopen,open,,,\nrated,,7/s,9,\nshadowed, gold ,,,shadow\n"
	c := loadFiles(t, "c.yaml", text, "a.csv", rows, "old.csv", "key,rate,burst\nx,1/s,\n")
	if len(c.Warnings) > 0 {
		t.Error(c.Warnings)
	}
	for key, want := range map[string]string{
		"other": "60/m 100 free false", "inline": "600/m 600 gold false", "tried": "600/m 600 gold true",
		"plain": "5/s 5  false", "out": "none 0 out false", "filed": "600/m 600 gold false",
		"open": "unlimited 0 open false", "rated": "7/s 9  false", "shadowed": "600/m 600 gold true",
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
		changes := c.Since(loadFiles(t, "c.yaml", old, "a.csv", rows))
		if got := fmt.Sprint(changes.Changed, changes.Settings); got != want {
			t.Errorf("since\n%s\n%s, want %s", old, got, want)
		}
	}
	// A route's limit may use the file's plans.
	if got := drawn(t, c, "GET h/ context sluice.limit.r={plan:_out}"); !strings.Contains(got, "r - none") {
		t.Error(got)
	}
	c = parse(t, "{plans: {used: {rate: 1/s}, idle: {rate: 2/s}}, limits: [{name: a, plan: used}]}")
	const unused = "test.yaml:1:35: plans.idle: no limit and no override has this plan; " +
		"remove it, or write plan: idle where it is meant"
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
	c := loadFiles(t, "c.yaml", text, "a.csv", rows)
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
	for _, tt := range []struct{ config, want string }{
		{"{plans: {a: {quota: 5/day, burst: 3}}, limits: []}", "plans.a.burst: burst 3 needs a rate; a quota is its own burst"},
		{"{plans: {a: {quota: 5/m}}, limits: []}", `plans.a.quota: invalid quota "5/m"`},
		{"{plans: {a: {rate: none, quota: 5/day}}, limits: []}",
			"plans.a.rate: rate: none denies every request; omit quota"},
		{"{plans: {a: {rate: 1/s}}, limits: [{name: l, key: client.ip, plan: a, " +
			"overrides: [{key: 10.0.0.1, plan: a, starts: 2026-01-01}]}]}",
			"overrides[0].starts: has no effect without quota"},
		{"{plans: {a: {rate: 1/s}}, limits: [{name: l, plan: a, quota: 5/day}]}",
			"limits[0].quota: the plan gives the rate, the burst and the quota; remove this, or the plan"},
	} {
		_, err := Parse("c.yaml", []byte(tt.config), env())
		if err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v, want %s", tt.config, err, tt.want)
		}
	}
}

// A plan may use variables of the environment.
func TestPlanVariables(t *testing.T) {
	c := parse(t, `
plans: {a: {rate: "${R:-7/s}", burst: "${B:-9}", quota: "${Q:-5/day}"}}
limits: [{name: l, plan: a}]
`)
	d := c.Draw(request(t, "GET h/"))
	if len(d.Charges) != 2 || d.Charges[0].Bucket.Burst() != 9 || d.Charges[1].Bucket.Burst() != 5 {
		t.Errorf("%+v", d)
	}
}

// TestPlanColumns has rows of overrides files that are wrong.
func TestPlanColumns(t *testing.T) {
	const config = "plans: {free: {rate: 1/s}, gold: {rate: 2/s}}\n" +
		"limits: [{name: a, plan: free, key: request.headers.k, overrides_file: o.csv}]"
	const twice = "plan gold gives the rate, the burst and the quota; remove these, or the plan"
	for csv, want := range map[string]string{
		"key,plan\na,goldd\n":               `2:3: unknown plan "goldd"; did you mean gold?`,
		"key,plan\na,x\n":                   `2:3: unknown plan "x"; want one of free, gold`,
		"key,plan\na,\n":                    "2:3: neither a rate, a quota nor a plan; an override needs one of them",
		"key,rate,plan\na,1/s,gold\n":       "2:7: " + twice,
		"key,burst,plan\na,5,gold\n":        "2:5: " + twice,
		"key,plan,mode\na,gold,x\n":         `2:8: unknown value "x"; want one of enforce, shadow`,
		"key,plans\na,gold\n":               "1:1: column 2 has an unknown name; did you mean plan?",
		"key,plan,rate\na,gold,\nb,,gold\n": `3:4: invalid rate "gold"; ` + wantRate,
		"key,plan,rate\na,,ten\na,gold,":    `2:4: invalid rate "ten"; ` + wantRate,
	} {
		if got := overrideMistakes(t, config, csv); got != want {
			t.Errorf("%q says\n%s\nwant\n%s", csv, got, want)
		}
	}
}

// BenchmarkPlans reads files of 100,000 tenants, each of which should take at most
// 150 ms of the processors' time (cpu-ms):
//
//	go test ./limiter/policy -run '^$' -bench Plans
func BenchmarkPlans(b *testing.B) {
	for _, rows := range []struct{ name, header, free, gold string }{
		{"plan", "plan", "free", "gold"},
		{"rate", "rate,burst", "60/m,", "6000/m,9000"},
		{"quota", "rate,burst,quota", "60/m,,1000/month", "6000/m,9000,100000/month"},
	} {
		b.Run(rows.name, func(b *testing.B) {
			var csv strings.Builder
			fmt.Fprintf(&csv, "tenant,%s\n", rows.header)
			for i := range 50_000 {
				fmt.Fprintf(&csv, "tenant-%06d,%s\ntenant-%06d,%s\n", 2*i, rows.free, 2*i+1, rows.gold)
			}
			file := directory(b, "c.yaml", "plans: {free: {rate: 60/m}, gold: {rate: 6000/m, burst: 9000}}\n"+
				"limits: [{name: a, plan: free, key: request.headers.k, overrides_file: t.csv}]", "t.csv", csv.String())
			var c *Config
			loads, before := 0, processorTime(b)
			for b.Loop() {
				var err error
				if c, _, err = Load(file, env()); err != nil {
					b.Fatal(err)
				}
				loads++
			}
			took := processorTime(b) - before
			b.ReportMetric(took.Seconds()*1000/float64(loads), "cpu-ms/op")
			if n := len(c.rules[0].overrides.file); n != 100_000 {
				b.Errorf("%d overrides", n)
			}
			if d := c.Draw(request(b, "GET h/ with k=tenant-000003")); d.Charges[0].Bucket.Burst() != 9000 {
				b.Errorf("%+v", d)
			}
		})
	}
}

// processorTime returns how long processors have worked for this process. Other
// than the time that passes, it hardly depends on how busy the machine is.
func processorTime(b *testing.B) time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
