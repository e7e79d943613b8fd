package main

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	logdatav3 "github.com/envoyproxy/go-control-plane/envoy/data/accesslog/v3"
	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"google.golang.org/grpc"

	"github.com/sluiceproxy/sluice/limiter/redistest"
)

// pageInBrowser is a page in a browser.
type pageInBrowser struct {
	*browser
}

// text returns what a reader sees of an element.
func (s pageInBrowser) text(selector string) string {
	s.t.Helper()
	text, _ := s.eval(fmt.Sprintf("document.querySelector(%q)?.innerText ?? ''", selector)).(string)
	return text
}

// holds waits until an element shows a text.
func (s pageInBrowser) holds(selector, what string) {
	s.t.Helper()
	s.await(fmt.Sprintf("(document.querySelector(%q)?.innerText ?? '').includes(%q)", selector, what))
}

// is waits until an element shows a text and nothing else.
func (s pageInBrowser) is(selector, what string) {
	s.t.Helper()
	s.await(fmt.Sprintf("document.querySelector(%q)?.innerText === %q", selector, what))
}

// matches waits until an element shows what a regular expression of JavaScript
// matches.
func (s pageInBrowser) matches(selector, pattern string) {
	s.t.Helper()
	s.await(fmt.Sprintf("/%s/.test(document.querySelector(%q)?.innerText)", pattern, selector))
}

// lacks checks that an element does not show a text.
func (s pageInBrowser) lacks(selector, what string) {
	s.t.Helper()
	if text := s.text(selector); strings.Contains(text, what) {
		s.t.Errorf("%s says %q: %s", selector, what, text)
	}
}

// isInView reports whether an element is wholly in the window.
func (s pageInBrowser) isInView(selector string) bool {
	s.t.Helper()
	return s.eval(fmt.Sprintf(`(() => { const r = document.querySelector(%q).getBoundingClientRect();
		return r.height > 0 && r.top >= 0 && r.bottom <= innerHeight; })()`, selector)) == true
}

// showPage opens the page of a sidecar.
func showPage(t testing.TB, p *process) pageInBrowser {
	t.Helper()
	b := startBrowser(t)
	b.look(1280, "light")
	b.open("http://" + p.admin + "/")
	t.Cleanup(func() {
		asked, wrong := b.seen()
		for _, url := range asked {
			if !strings.HasPrefix(url, "http://"+p.admin+"/") {
				t.Errorf("the page asked for %s", url)
			}
		}
		if len(wrong) > 0 {
			t.Errorf("the browser says %q", wrong)
		}
	})
	return pageInBrowser{b}
}

// askOften asks a sidecar about two hundred times a second until the test ends.
// prepare returns the i-th check.
func askOften(t testing.TB, conn *grpc.ClientConn, prepare func(i int) *authv3.CheckRequest) {
	t.Helper()
	repeat(t, func(ctx context.Context, i int) bool {
		_, _ = authv3.NewAuthorizationClient(conn).Check(ctx, prepare(i)) // an outage fails some
		return true
	})
}

// TestPageNeverAsked checks that the page of a sidecar that Envoy has never asked
// says so and what to do, until the first check.
func TestPageNeverAsked(t *testing.T) {
	p := startSluice(t, "--config", file(t, "sluice.yaml", "limits: [{name: all, key: client.ip, rate: 5/s}]\n"))
	s := showPage(t, p)
	s.holds("#state", "Ready, never asked")
	s.holds("#alarms", "No check yet: does Envoy ask this sidecar?")
	s.holds("#alarms", "its cluster leads elsewhere than to "+p.grpc)
	s.holds("#alarms", "sluice doctor --envoy-admin URL")
	s.holds("#last-check", "none since the start")
	s.holds("#checks", "Last check\nnone")
	s.holds("#denials", "No denials since this sidecar started.")
	s.looks("fresh")
	check(t, dial(t, p.grpc), from("203.0.113.1", "/"))
	s.is("#state", "Ready")
	s.is("#alarms", "")
	s.holds("#last-check", "last one")
	s.holds("#checks", "Allowed\n1")
}

// TestPageShadow checks that the page of a config in shadow mode says that
// nothing is denied, and that each limit has one row after the mode has changed.
func TestPageShadow(t *testing.T) {
	const limits = `
limits:
  - {name: per-client, key: client.ip, rate: 5/s}
  - {name: all, rate: 20/s}
`
	config := file(t, "sluice.yaml", "mode: shadow\n"+limits)
	p := startSluice(t, "--config", config)
	s := showPage(t, p)
	askOften(t, dial(t, p.grpc), func(i int) *authv3.CheckRequest {
		return from(fmt.Sprintf("203.0.113.%d", i*i%7), "/v1/orders?token=k3y")
	})
	s.holds("#alarms", "Shadow mode: no limit of the config denies.")
	s.holds("#state", "shadow mode")
	s.holds("#config", "Mode\nshadow")
	s.holds("#limits-denied", "Would deny")
	s.holds("#top", "Would be denied most")
	s.holds("#now-refused", "shadow mode denies none")
	s.holds("#denials-rows", "shadow: would be limited")
	s.holds("#denials-rows", "client 203.0.113.")
	s.lacks("#denials-rows", "k3y")
	s.await(`document.querySelectorAll("#limits-rows .edge.would").length === 2`)
	const marks = "#limits-rows .edge.limited, #traffic .edge.limited, .hot"
	if n := s.eval(fmt.Sprintf("document.querySelectorAll(%q).length", marks)); n != 0.0 {
		t.Errorf("%v marks of denials, and nothing is denied", n)
	}
	s.settle()
	s.looks("shadow")

	if err := os.WriteFile(config, []byte(limits), 0o600); err != nil {
		t.Fatal(err)
	}
	s.holds("#config", "Mode\nenforce")
	s.is("#alarms", "")
	s.holds("#limits-denied", "Denied")
	s.await(`document.querySelector("#denials-kind").checkVisibility()`) // both kinds are in the list
	s.set("#denials-kind", "denied", "change")
	s.await(`!document.querySelector("#denials-rows").innerText.includes("shadow")`)
	rows := s.eval(`[...document.querySelectorAll("#limits-rows [data-limit]")].map((e) => e.innerText).join()`)
	if rows != "per-client,all" {
		t.Errorf("the limits are %v", rows)
	}
	s.lacks("#limits", "from a route")
}

// settle waits for some history where pictures are taken.
func (s pageInBrowser) settle() {
	if os.Getenv("SLUICE_SHOTS") != "" {
		<-time.After(15 * time.Second)
	}
}

// TestPageOutage checks that the page says since when Redis does not answer, what
// becomes of requests meanwhile, and afterwards for how long it was away.
func TestPageOutage(t *testing.T) {
	redis := redistest.Start(t)
	p := startSluice(t, "--redis", redis.URL(), "--config", file(t, "sluice.yaml", `
limits:
  - {name: per-client, key: client.ip, rate: 1000/s, match: {paths: [/strict]}}
  - {name: open, rate: 1000/s, on_failure: allow, match: {paths: [/open]}}
`))
	s := showPage(t, p)
	askOften(t, dial(t, p.grpc), func(i int) *authv3.CheckRequest {
		return from(fmt.Sprintf("203.0.113.%d", i*i%7), []string{"/strict", "/open"}[i%2])
	})
	s.holds("#store", "Last outage\nnone since the start")
	s.is("#state", "Ready")
	s.settle()
	redis.Kill()
	s.holds("#state", "Without Redis")
	s.holds("#alarms", "Redis does not answer. Since ")
	s.matches("#alarms", `Since \d\d:\d\d:\d\d \(\d+ s\) on_failure decides`)
	s.matches("#alarms", `Requests meanwhile: [\d,]+ refused, [\d,]+ passed unlimited\.`)
	s.holds("#store", "Last outage\nnow, for ")
	s.holds("#now-refused", "refused")
	s.holds("#denials-rows", "store failed (")
	s.settle()
	s.looks("outage")
	redis.Restart()
	s.holds("#alarms", "Redis answers again. It was away for ")
	s.matches("#alarms", `from \d\d:\d\d:\d\d to \d\d:\d\d:\d\d\. Requests meanwhile: [\d,]+ refused`)
	s.is("#state", "Ready")
	s.holds("#store", ", ended ")
	if got := s.eval(`document.querySelectorAll("#alarms [role=alert]").length`); got == 0.0 {
		t.Error("no screen reader says that Redis is back")
	}
	s.looks("recovery")
}

// TestPageWaitsForRedis checks that the page, and the log, say why a Redis has not
// been usable since the start: one that answers is not said to be silent.
func TestPageWaitsForRedis(t *testing.T) {
	config := file(t, "sluice.yaml", "limits: [{name: all, rate: 5/s}]\n")
	locked := redistest.Start(t)
	if err := locked.Client().ConfigSet(t.Context(), "requirepass", "k3y-of-redis").Err(); err != nil {
		t.Fatal(err)
	}
	for url, want := range map[string]struct{ page, log string }{
		"redis://127.0.0.1:1": {"connection refused", "Redis does not answer"},
		locked.URL():          {"Redis requires a password", "Redis answers with an error"},
	} {
		t.Run(want.page, func(t *testing.T) {
			p := startSluice(t, "--redis", url, "--config", config)
			s := showPage(t, p)
			s.holds("#state", "Waiting for Redis")
			s.holds("#alarms", "Redis is not usable yet. "+url+" is asked until it answers.")
			s.holds("#alarms pre", want.page)
			s.holds("#store", "State\nnot usable yet")
			if !strings.Contains(p.logged(), `"`+want.log+`"`) {
				t.Errorf("the log has no %q:\n%s", want.log, p.logged())
			}
			s.looks("waiting")
		})
	}
}

// TestPageRejectedConfig checks that the page says when and why a new config was
// rejected, until a good one comes.
func TestPageRejectedConfig(t *testing.T) {
	const good = "limits: [{name: all, key: client.ip, rate: 5/s}]\n"
	config := file(t, "sluice.yaml", good)
	p := startSluice(t, "--config", config)
	s := showPage(t, p)
	check(t, dial(t, p.grpc), from("203.0.113.1", "/"))
	bad := strings.Replace(good, "5/s", "5 per second, brust: 7", 1)
	if err := os.WriteFile(config, []byte(bad), 0o600); err != nil {
		t.Fatal(err)
	}
	s.holds("#alarms", "Config reload failed, keeping the previous config. Tried at ")
	s.holds("#alarms pre", "limits[0].rate")
	s.holds("#alarms pre", "brust")
	s.holds("#config", "Last reload\nrejected")
	s.holds("#state", "Ready, previous config")
	s.looks("rejected")
	if err := os.WriteFile(config, []byte(good+"# mended\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	s.is("#alarms", "")
	s.holds("#config", "Last reload\nin force")
}

// tenantLimits returns a config of so many limits.
func tenantLimits(n int) string {
	var b strings.Builder
	b.WriteString("limits:\n")
	for i := range n {
		fmt.Fprintf(&b, "  - {name: tenant-%05d, match: {paths: [/t/%d]}, key: client.ip, rate: 2/s, group: team-%d}\n",
			i, i, i%7)
	}
	return b.String()
}

// TestPageSixtyLimits checks that the keys of each of sixty limits are beside it,
// that the limits can be found and sorted, and that on a phone they are below it.
func TestPageSixtyLimits(t *testing.T) {
	p := startSluice(t, "--config", file(t, "sluice.yaml", tenantLimits(60)))
	s := showPage(t, p)
	askOften(t, dial(t, p.grpc), func(i int) *authv3.CheckRequest {
		return from(fmt.Sprintf("203.0.113.%d", i*i%11), fmt.Sprintf("/t/%d", max(0, 59-i%90)))
	})
	rows := func(want int) {
		t.Helper()
		s.await(fmt.Sprintf(`document.querySelectorAll("#limits-rows tr[data-id]").length === %d`, want))
	}
	rows(60)
	s.holds("#denials-rows", "tenant-00000")
	s.click(`[data-limit="tenant-00047"]`)
	s.holds("#top-title", "tenant-00047")
	s.await(`document.querySelectorAll("#top-requests .bar").length > 1`)
	for _, both := range []string{`[data-limit="tenant-00047"]`, "#top-denials"} {
		if !s.isInView(both) {
			t.Errorf("%s is not in view", both)
		}
	}
	s.set("#sort", "denied", "change")
	s.is("#limits-rows [data-limit]", "tenant-00000")
	s.holds("#top-title", "tenant-00047") // it stays chosen
	s.settle()
	s.looks("sixty")
	s.holds("#top-title", "tenant-") // again, after a phone closed it
	s.set("#filter", "TEAM-3", "input")
	rows(9)
	s.holds("#limits-note", "9 found")
	s.set("#filter", "", "input")

	s.look(390, "light")
	s.await(`document.querySelectorAll("#limits-rows tr[data-id]:not(.detail)").length === 20`)
	s.holds("#limits-more", "Show 20 more")
	s.click("#limits-more")
	s.await(`document.querySelectorAll("#limits-rows tr[data-id]:not(.detail)").length === 40`)
	s.click(`[data-limit="tenant-00000"]`)
	s.holds("tr.chosen + tr.detail", "Top keys of tenant-00000")
	for _, both := range []string{`[data-limit="tenant-00000"]`, "#top-denials"} {
		if !s.isInView(both) {
			t.Errorf("on a phone %s is not in view", both)
		}
	}
	s.shot("sixty-phone-chosen")
	s.click(`[data-limit="tenant-00000"]`)
	s.await(`document.querySelector("tr.detail") === null`)
}

// TestPageTenThousandLimits checks that the page stays small and quick with as
// many limits, and finds each.
func TestPageTenThousandLimits(t *testing.T) {
	p := startSluice(t, "--config", file(t, "sluice.yaml", tenantLimits(10_000)))
	conn := dial(t, p.grpc)
	for range 5 {
		check(t, conn, from("203.0.113.1", "/t/9876"))
	}
	s := showPage(t, p)
	s.holds("#limits-note", "100 of 10,000, those that denied most")
	s.is("#limits-rows [data-limit]", "tenant-09876")
	s.holds("#top-title", "tenant-09876")
	s.await(`document.querySelectorAll("#top-denials .bar").length === 1`)
	if n := s.eval(`document.querySelectorAll("*").length`); n.(float64) > 4000 {
		t.Errorf("the page has %v elements", n)
	}
	s.looks("many")
	s.set("#filter", "tenant-00042", "input")
	s.await(`document.querySelectorAll("#limits-rows tr[data-id]").length === 1`)
	for query, want := range map[string]string{
		"": "denied tenant-09876 100", "sort=file": "file tenant-00000 100", "sort=allowed&n=1": "allowed tenant-09876 1",
		"sort=name&n=1000": "name tenant-00000 1000", "filter=team-6&sort=name&n=2": "name tenant-00006 2",
		"filter=client.IP&n=3": "denied tenant-09876 3",
	} {
		status, text := get(t, "http://"+p.admin+"/api/limits?"+query)
		var got struct {
			Sort   string
			Limits []struct{ Name string }
		}
		if err := json.Unmarshal([]byte(text), &got); err != nil || status != http.StatusOK {
			t.Fatal(status, err)
		}
		if said := fmt.Sprint(got.Sort, " ", got.Limits[0].Name, " ", len(got.Limits)); said != want || len(text) > 400_000 {
			t.Errorf("%s: %s, want %s; %d bytes", query, said, want, len(text))
		}
	}
	if status, text := get(t, "http://"+p.admin+"/api/limits?sort=x"); status != http.StatusBadRequest ||
		!strings.Contains(text, "allowed, denied, file, name") {
		t.Error(status, text)
	}
}

// TestPageHeldAndLeased checks that the page shows what limits hold, owe, settle
// and lease.
func TestPageHeldAndLeased(t *testing.T) {
	p := startSluice(t, "--redis", redistest.Start(t).URL(), "--config", file(t, "sluice.yaml", patientStore+`
limits:
  - {name: busy, match: {paths: [/busy]}, rate: 100000/s, lease: 1s}
  - name: settled
    match: {paths: [/settled]}
    rate: 1/d
    burst: 10
    cost: 4
    settle: int(response.headers["x"])
    settle_within: 1h
`))
	s := showPage(t, p)
	conn := dial(t, p.grpc)
	askOften(t, conn, func(int) *authv3.CheckRequest { return from("203.0.113.1", "/busy") })
	s.holds("#limits-rows", "lease 1s")
	s.click(`[data-limit="busy"]`)
	s.holds("#top", "1s; 1 key leased now, ")

	ask := func() (r *authv3.CheckResponse) {
		t.Helper()
		r, err := authv3.NewAuthorizationClient(conn).Check(t.Context(), from("203.0.113.1", "/settled"))
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	end := endWith(ask().GetDynamicMetadata().GetFields()["settle"].GetStringValue())
	end.Response = &logdatav3.HTTPResponseProperties{ResponseHeaders: map[string]string{"x": "5"}}
	if err := openLog(t, conn, "sluice").Send(logOf(end)); err != nil {
		t.Fatal(err)
	}
	s.click(`[data-limit="settled"]`)
	s.holds("#top", `int(response.headers["x"]) within 1h`)
	s.holds("#top", "0 returned, 1 surcharged, 0 forgiven, 0 ends missing")
	ask() // and 4 are held
	if status := ask().GetStatus().GetCode(); status != 8 {
		t.Errorf("status %d", status)
	}
	s.holds("#denials-rows", "cost 4, remaining 1, held 4")
	s.click("#denials-rows [data-denial]")
	s.holds("#answer", "The denied request now: limited")
	s.holds("#answer", "held 4")
	if path := s.eval(`document.querySelector("[name=path]").value`); path != "/settled" {
		t.Errorf("the form has the path %v", path)
	}
	s.holds("#form-note", "without its headers")
	s.looks("held")
}

// TestPageQuota checks that the page shows quotas that are partly used, settled and
// used up, and when they begin again.
func TestPageQuota(t *testing.T) {
	starts, _ := aYear()
	p := startSluice(t, "--redis", redistest.Start(t).URL(), "--config", file(t, "sluice.yaml", patientStore+`
limits:
  - name: tokens
    match: {paths: [/chat]}
    key: request.headers["x-team"]
    readable: true
    quota: 100/year
    starts: `+starts+`
    cost: 40
    settle: int(response.headers["x-tokens"])
    settle_within: 1h
  - {name: orders, match: {paths: [/orders]}, key: client.ip, rate: 10/s, quota: 5/year, starts: `+starts+`}
`))
	conn := dial(t, p.grpc)
	ask := func(path, team string) *authv3.CheckResponse {
		t.Helper()
		r, err := authv3.NewAuthorizationClient(conn).Check(t.Context(), checkRequest(
			"203.0.113.1", "GET", path, map[string]string{"x-team": team}))
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	for team, used := range map[string]string{"atlas": "25", "borealis": "55"} {
		end := endWith(ask("/chat", team).GetDynamicMetadata().GetFields()["settle"].GetStringValue())
		end.Response = &logdatav3.HTTPResponseProperties{ResponseHeaders: map[string]string{"x-tokens": used}}
		if err := openLog(t, conn, "sluice").Send(logOf(end)); err != nil {
			t.Fatal(err)
		}
	}
	s := showPage(t, p)
	s.holds("#limits-rows", "tokens")
	s.click(`[data-limit="tokens"]`)
	s.holds("#top", "100/year")
	s.holds("#top", "15 returned, 15 surcharged, 0 forgiven, 0 ends missing")
	ask("/chat", "borealis") // is under way: 5 are left
	for range 7 {
		ask("/chat", "borealis")
		ask("/orders", "")
	}
	s.holds("#limits-rows", "5/year")
	s.holds("#denials-rows", "cost 40, remaining 5, held 40")
	s.holds("#denials-rows", "cost 1, remaining 0\nretry in 1")
	s.matches("#denials-rows", `retry in 1\d\d days`)
	s.holds("#denials-rows", "borealis")
	s.click(`#denials-rows tr:has(td.limit b) [data-denial]`)
	s.holds("#answer", "The denied request now: limited")
	s.holds("#answer", "limited by orders/quota")
	s.holds("#answer .verdicts li", "orders/quota") // the first
	s.matches("#answer", `retry in 1\d\d days`)
	s.settle()
	s.looks("quota")
}
