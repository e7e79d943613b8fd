package main

import (
	"encoding/json"
	"fmt"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"

	"github.com/sluiceproxy/sluice/authz"
	"github.com/sluiceproxy/sluice/limiter/redistest"
)

// aYear returns a day on which a year of a quota begins, as starts has it, and the
// instant at which the year ends that is in force: half a year from now, so that no
// test runs over it.
func aYear() (starts string, ends time.Time) {
	ends = time.Now().UTC().AddDate(0, 0, 180).Truncate(24 * time.Hour)
	return ends.AddDate(-1, 0, 0).Format(time.DateOnly), ends
}

// inSeconds matches how many seconds something lasts, and inDays how many days and
// hours.
var (
	inSeconds = regexp.MustCompile(`("reset":|"retry_after":) (\d+)`)
	inDays    = regexp.MustCompile(`(for|in) (\d+)d(?: (\d+)h)?`)
)

// untilEnd replaces the time until an instant by N. It changes no others.
func untilEnd(text string, ends time.Time) string {
	for _, form := range []struct {
		written *regexp.Regexp
		units   []time.Duration
		rounded time.Duration // up to this
	}{
		{inSeconds, []time.Duration{time.Second}, time.Second},
		{inDays, []time.Duration{24 * time.Hour, time.Hour}, time.Hour},
	} {
		text = form.written.ReplaceAllStringFunc(text, func(s string) string {
			m := form.written.FindStringSubmatch(s)
			lasts := time.Duration(0)
			for i, unit := range form.units {
				n, _ := strconv.Atoi(m[2+i]) // an absent one is 0
				lasts += time.Duration(n) * unit
			}
			if over := lasts - time.Until(ends); over < -within || over > form.rounded+within {
				return s
			}
			return m[1] + " N"
		})
	}
	return text
}

// TestQuotaCommands checks what explain and bucket say of a quota in Redis, and that
// a reset of it leaves the rate's bucket.
func TestQuotaCommands(t *testing.T) {
	redis := redistest.Start(t)
	starts, ends := aYear()
	config := file(t, "sluice.yaml", "store: {redis: {url: '"+redis.URL()+"', timeout: 20s}}\n"+
		"limits: [{name: api, key: 'request.headers[\"x-api-key\"]', rate: 10/366d, burst: 7, quota: 5/year, cost: 2, "+
		"starts: "+starts+"}]\n")
	p := startSluice(t, "--config", config)
	conn, key := dial(t, p.grpc), "#43."+hashOf("k")
	request := checkRequest("203.0.113.7", "GET", "/", map[string]string{"x-api-key": "k"})
	ask := func(status int, want, args string) {
		t.Helper()
		words := append(strings.Fields(args), "--config", config)
		got, stdout, stderr := sluice(t, nil, words...)
		if stdout = untilEnd(stdout, ends); got != status || stdout != want || stderr != "" {
			t.Errorf("%s: %d %s%s\nwant %d %s", args, got, stdout, stderr, status, want)
		}
	}
	const explain = "explain --source 203.0.113.7 --header x-api-key=k"
	explained := func(ofRate, ofQuota int, decision string) string {
		return fmt.Sprintf(`GET /
client 203.0.113.7, domain default

  applies  api        cost 2, remaining %d; burst 7, rate 10/366d
                      it applies to every request
                      key %s
  applies  api/quota  cost 2, remaining %d; quota 5/year
                      it applies to every request
                      key %[2]s

%[4]s
`, ofRate, key, ofQuota, decision)
	}
	state := func(exists bool, tokens int) string {
		return fmt.Sprintf(`{
  "limit": "api/quota",
  "key": "%s",
  "exists": %t,
  "tokens": %d,
  "burst": 5,
  "rate": "",
  "quota": "5/year",
  "window_ends": "%s",
  "reset": N,
  "held": 0,
  "owed": 0
}
`, key, exists, tokens, ends.Format(time.RFC3339))
	}
	const get, reset = "bucket get --limit api/quota --key k", "bucket reset --limit api/quota --key k"
	line := func(tokens int) string {
		return fmt.Sprintf("api/quota {%s}: %d of 5 tokens, quota 5/year, all back in N, at %s\n", key, tokens,
			ends.Format(time.RFC3339))
	}
	ask(0, explained(7, 5, "allowed"), explain)
	ask(0, line(5), get)
	ask(0, state(false, 5), get+" -o json")
	for range 2 {
		if got := check(t, conn, request); got != "ok" {
			t.Fatal(got)
		}
	}
	ask(1, explained(3, 1, "limited by api/quota for N"), explain)
	ask(0, line(1), get)
	ask(0, line(1), "bucket get --limit api/quota --key-hash "+key)
	ask(0, state(true, 1), get+" -o json")
	_, stdout, _ := sluice(t, nil, append(strings.Fields(explain), "--config", config, "-o", "json")...)
	var e authz.Explanation
	if err := json.Unmarshal([]byte(stdout), &e); err != nil || len(e.Limits) != 2 {
		t.Fatalf("%v %s", err, stdout)
	}
	if q := e.Limits[1]; q.Name != "api/quota" || q.Quota == nil || *q.Quota != "5/year" || q.Rate != "" ||
		*q.Burst != 5 || *q.Remaining != 1 || *q.Key != key || q.RetryAfter == nil ||
		(time.Until(ends)-time.Duration(*q.RetryAfter)*time.Second).Abs() > within || e.Limits[0].Quota != nil {
		t.Errorf("%s", stdout)
	}
	ask(0, line(5), reset)
	ask(0, state(false, 5), reset+" -o json")
	// The sidecar still knows from Redis how little was left. It asks again within a
	// second.
	for began := time.Now(); check(t, conn, request) != "ok"; {
		if time.Since(began) > 3*time.Second {
			t.Fatal("limited long after a reset")
		}
	}
	ask(0, line(3), get)
	_, stdout, _ = sluice(t, nil, "bucket", "get", "--config", config, "--limit", "api", "--key", "k")
	if !strings.HasPrefix(stdout, "api {"+key+"}: 1 of 7 tokens, refilled at 10/366d, full in ") {
		t.Errorf("the rate's bucket after a reset of the quota's: %s", stdout)
	}
}

// TestReloadedQuota checks that a quota whose N or plan changes in the middle of its
// window, by the config or by a file of overrides, keeps what was used, at once, even
// if it has just denied.
func TestReloadedQuota(t *testing.T) {
	starts, _ := aYear()
	byConfig := func(plan string, free, gold int) map[string]string {
		return map[string]string{"sluice.yaml": fmt.Sprintf(`
store: {redis: {timeout: 10s}}
plans:
  free: {rate: 1000000/s, quota: %d/year}
  gold: {rate: 1000000/s, quota: %d/year}
limits:
  - {name: tenant, key: 'request.headers["x-tenant"]', starts: %s, plan: %s}
`, free, gold, starts, plan)}
	}
	byFile := func(rows string) map[string]string { return map[string]string{"tenants.csv": rows} }
	config := byConfig("free", 10, 20)
	withFile := map[string]string{
		"tenants.csv": "key,quota\na,10/year\n",
		"sluice.yaml": strings.Replace(config["sluice.yaml"], "plan: free", "plan: free, overrides_file: tenants.csv", 1),
	}
	type step struct {
		files  map[string]string // what is written; nil if nothing
		checks int
		want   string // of the last check
	}
	for name, steps := range map[string][]step{
		"by the config": {
			{config, 4, "ok 6"},
			{byConfig("free", 30, 20), 1, "ok 25"},
			{byConfig("gold", 30, 20), 1, "ok 14"},
			{byConfig("gold", 30, 5), 3, "no 0"},
			{byConfig("gold", 30, 7), 1, "ok 0"},
			{nil, 3, "no 0"},
			{byConfig("gold", 30, 1007), 1, "ok 999"},
			{byConfig("free", 10, 1007), 3, "no 0"},
		},
		"by a file": {
			{withFile, 4, "ok 6"},
			{byFile("key,quota\na,30/year\n"), 1, "ok 25"},
			{byFile("key,plan\na,gold\n"), 1, "ok 14"},
			{byFile("key,quota\na,5/year\n"), 3, "no 0"},
			{byFile("key,quota\na,7/year\n"), 1, "ok 0"},
			{nil, 3, "no 0"},
			{byFile("key,rate,quota\na,1000000/s,1007/year\n"), 1, "ok 999"},
			{byFile("key,quota\nb,1007/year\n"), 1, "ok 1"}, // the plan's, of 10
		},
	} {
		t.Run(name, func(t *testing.T) {
			redis, dir := redistest.Start(t), t.TempDir()
			put := func(files map[string]string) {
				for name, text := range files {
					write(t, filepath.Join(dir, name), []byte(text))
				}
			}
			put(steps[0].files)
			p := startSluice(t, "--config", filepath.Join(dir, "sluice.yaml"), "--redis", redis.URL())
			tenant := leasing{p, authv3.NewAuthorizationClient(dial(t, p.grpc))}
			reloads := 0
			for i, s := range steps {
				if i > 0 && s.files != nil {
					put(s.files)
					reloads++
					eventually(t, "the reload", func() bool {
						return p.counted(`sluice_config_reloads_total\{result="success"\}`) >= reloads
					})
				}
				got := ""
				for range s.checks {
					ok, left, source := tenant.check(t, "a")
					if got = fmt.Sprint("no ", left); ok {
						got = fmt.Sprint("ok ", left)
					}
					if source != "redis" && source != "ceiling" {
						t.Errorf("step %d: %s from %s", i, got, source)
					}
				}
				if got != s.want {
					t.Errorf("step %d: %s, want %s", i, got, s.want)
				}
			}
			if n := p.counted(`sluice_config_reloads_total\{result="failure"\}`); n > 0 {
				t.Errorf("%d reloads failed:\n%s", n, p.logged())
			}
		})
	}
}

// TestBacktestQuota checks that backtest names a quota and its share, over a month's
// end.
func TestBacktestQuota(t *testing.T) {
	config := file(t, "sluice.yaml", "limits: [{name: api, key: client.ip, rate: 10/s, burst: 10, quota: 2/month}]\n")
	night := accessLine(0, "192.0.2.1", "/") // of 1 March
	day := strings.ReplaceAll(night, "01/Mar/2026:10", "28/Feb/2026:23")
	log := file(t, "access.log", strings.Repeat(day, 5)+strings.Repeat(night, 3))
	status, stdout, stderr := sluice(t, nil, "backtest", "--config", config, "-o", "json", "--max-limited", "50%", log)
	var r struct {
		Requests, Limited int
		Limits            []struct {
			Name, Rate string
			Limited    int
		}
	}
	if err := json.Unmarshal([]byte(stdout), &r); err != nil || status != 0 || stderr != "" || len(r.Limits) != 2 {
		t.Fatalf("%d %s%v\n%s", status, stderr, err, stdout)
	}
	if q := r.Limits[1]; r.Requests != 8 || r.Limited != 4 || q.Name != "api/quota" || q.Rate != "2/month" ||
		q.Limited != 4 || r.Limits[0].Limited != 0 {
		t.Errorf("%s", stdout)
	}
	if status, stdout, stderr = sluice(t, nil, "backtest", "--config", config, "--max-limited", "49%", log); status != 1 ||
		!strings.Contains(stdout, "api/quota") || !strings.HasPrefix(stderr, "sluice: 4 of 8 requests would be denied, 50%") {
		t.Errorf("%d %s%s", status, stderr, stdout)
	}
}
