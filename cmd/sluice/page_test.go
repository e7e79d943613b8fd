package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/sluiceproxy/sluice/authz"
	"github.com/sluiceproxy/sluice/limiter/policy"
	"github.com/sluiceproxy/sluice/limiter/redistest"
)

// demo is a running `sluice demo`.
type demo struct {
	url, page, metrics string // http://…, without a slash at the end
	grpc               string
}

// startDemo runs the demo with further arguments until the test ends.
func startDemo(t testing.TB, args ...string) demo {
	t.Helper()
	port := freePort(t)
	p := start(t, "sluice", nil, append([]string{"demo", "--port", strconv.Itoa(port)}, args...)...)
	stdout, err := p.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	var stderr strings.Builder
	p.cmd.Stderr = &stderr
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	d := demo{url: fmt.Sprintf("http://localhost:%d", port)}
	ready := make(chan bool)
	go func() {
		defer close(p.done)
		found := regexp.MustCompile(`gRPC (\S+) +metrics (http://\S+)/metrics +page (http://\S+)/`)
		lines := bufio.NewScanner(stdout)
		for lines.Scan() {
			if at := found.FindStringSubmatch(lines.Text()); at != nil {
				d.grpc, d.metrics, d.page = at[1], at[2], at[3]
			}
			if strings.HasPrefix(lines.Text(), "Ctrl-C") {
				close(ready)
			}
		}
		_, _ = io.Copy(io.Discard, stdout)
		_ = p.cmd.Wait()
	}()
	t.Cleanup(func() {
		_ = p.cmd.Process.Signal(syscall.SIGINT)
		select {
		case <-p.done:
		case <-time.After(within):
			_ = p.cmd.Process.Kill()
			<-p.done
		}
		if status := p.cmd.ProcessState.ExitCode(); status != 0 {
			t.Errorf("the demo ended with status %d:\n%s", status, stderr.String())
		}
	})
	select {
	case <-ready:
	case <-p.done:
		t.Fatalf("the demo ended:\n%s", stderr.String())
	case <-time.After(within):
		t.Fatal("the demo is not ready")
	}
	return d
}

// repeat calls do about two hundred times a second, with 0, 1 and so on, until the
// test ends or do returns false.
func repeat(t testing.TB, do func(ctx context.Context, i int) bool) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	var all sync.WaitGroup
	all.Go(func() {
		tick := time.NewTicker(5 * time.Millisecond)
		defer tick.Stop()
		for i := 0; ; i++ {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
			}
			if !do(ctx, i) {
				return
			}
		}
	})
	t.Cleanup(func() { cancel(); all.Wait() })
}

// underLoad sends about two hundred requests a second until the test ends.
// prepare sets the i-th request up.
func underLoad(t testing.TB, url string, prepare func(i int, r *http.Request)) {
	t.Helper()
	c := client(t)
	repeat(t, func(ctx context.Context, i int) bool {
		r, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
		if err != nil {
			t.Error(err)
			return false
		}
		prepare(i, r)
		response, err := c.Do(r)
		if err != nil {
			if ctx.Err() == nil {
				t.Error(err)
			}
			return false
		}
		_, _ = io.Copy(io.Discard, response.Body)
		_ = response.Body.Close()
		return true
	})
}

const attack = `<img src=x onerror="window.hacked=1">`

const pageConfig = `
domain: shop/checkout
store: {redis: {url: redis://127.0.0.1, timeout: 10s}} # the URL is a flag's; a machine that is busy otherwise explains nothing late
client_ip: {xff_from_right: 2}
limits:
  - {name: per-client, key: client.network, rate: 10/s, burst: 20}
  - {name: per-key, match: {paths: ["/v1/**"]}, key: [request.method, 'request.headers["x-api-key"]'], rate: 10/s, burst: 20, overrides: [{key: [GET, gold], rate: 600/m}]}
  - {name: search, match: {paths: [/v1/search]}, rate: 15/s, cost: 5, burst: 60}
  - {name: by-path, match: {paths: ["/odd/**"]}, key: [request.path, '"<img src=x onerror=window.hacked=1>"'], rate: 1/m}
  - {name: per-client-strict, mode: shadow, key: client.network, rate: 2/s}
  - {name: quiet, match: {hosts: [nobody.example]}, rate: 3/d}
`

// TestPage opens the page of a running demo under load in a real browser, as an
// operator does.
func TestPage(t *testing.T) {
	config := file(t, "sluice.yaml", pageConfig)
	redis := redistest.Start(t)
	d := startDemo(t, "--config", config, "--redis", redis.URL())
	b := startBrowser(t)
	b.look(1280, "light")
	b.open(d.page + "/")

	text := func(selector string) string {
		t.Helper()
		s, _ := b.eval(fmt.Sprintf("document.querySelector(%q)?.innerText ?? ''", selector)).(string)
		return s
	}
	holds := func(selector, what string) {
		t.Helper()
		b.await(fmt.Sprintf("(document.querySelector(%q)?.innerText ?? '').includes(%q)", selector, what))
	}

	// Before the first request the page reports that all is well.
	holds("#domain", "shop/checkout")
	holds("#state", "Ready")
	holds("#store", "answers")
	holds("#config", "sluice.yaml")
	holds("#denials", "No denials since this sidecar started.")
	if b.eval(`[...document.querySelectorAll("#denials th")].some((th) => th.checkVisibility())`) != false {
		t.Error("a table without rows has a head")
	}

	// The page shows numbers, and they change.
	underLoad(t, d.url, func(i int, r *http.Request) {
		r.URL.Path = []string{"/", "/v1/orders", "/v1/search", "/v1/orders"}[i%4]
		r.Header.Set(
			"X-Forwarded-For",
			fmt.Sprintf("203.0.113.%d", []int{7, 7, 7, 7, 7, 12, 12, 12, 41, 41, 42, 43, 44, 45}[i%14]),
		)
		r.Header.Set("X-Api-Key", []string{"gold", "s3cr3t-key", "a", "b", "c"}[i*i%5])
		if i%23 == 0 {
			r.URL.Path = "/odd/" + attack
			r.Header.Set("X-Api-Key", attack)
			r.Header.Set("X-Request-Id", attack)
			r.Header.Set("User-Agent", attack)
		}
	})
	for range 2 { // requests that Envoy would reject
		r := checkRequest(
			attack, attack, "/odd/"+attack, map[string]string{"x-request-id": attack, "x-forwarded-for": attack},
		)
		r.Attributes.Request.Http.Host = "<script>window.hacked=1</script>.example"
		check(t, dial(t, d.grpc), r)
	}
	for _, id := range []string{"now-checks", "now-limited", "now-p99", "store-p50"} {
		b.await(fmt.Sprintf(`/[1-9]/.test(document.getElementById(%q).textContent)`, id))
	}
	b.await(`document.querySelectorAll("#traffic path").length >= 4`)
	const allowed = "#limits-rows tr:nth-child(1) .total"
	first := text(allowed)
	b.await(fmt.Sprintf(`document.querySelector(%q).innerText !== %q`, allowed, first))
	holds("#limits-rows", "per-client-strict")
	holds("#limits-rows", "by request.method · request.headers[\"x-api-key\"], 1 override")
	b.await(`document.querySelectorAll("#top-denials .bar").length > 1`)

	// A click on a limit shows its keys. Secret keys are shown as hashes.
	b.click(`[data-limit="per-key"]`)
	holds("#top-title", "per-key")
	b.await(`document.querySelectorAll("#top-requests .hash").length > 2`)
	b.click(`[data-limit="by-path"]`)
	holds("#top-denials", "%3Cimg") // a key is escaped already
	b.click(`[data-limit="per-client"]`)
	holds("#top-denials", "203.0.113.")

	// The latest denials have a reason. What a client sent is shown as text.
	holds("#denials-rows", "/odd/%3Cimg")
	holds("#denials-rows", "<script>window.hacked=1</script>.example/odd/<img src=x onerror=")
	holds("#denials-rows", "retry in")

	// A denial is found by its key or its client.
	for _, what := range []string{"203.0.113.12", "=12.203.0.113.12"} {
		b.set("#denials-filter", what, "input")
		b.await(`(() => { const rows = [...document.querySelectorAll("#denials-rows tr")];
			return rows.length > 0 && rows.every((r) => r.innerText.includes("203.0.113.12")); })()`)
	}
	b.set("#denials-filter", "nobody", "input")
	holds("#denials", "has this. Earlier ones are in the logs.")
	b.set("#denials-filter", "", "input")
	b.await(`document.querySelectorAll("#denials-rows tr").length > 1`)

	// A click explains a denied request.
	row := `#denials-rows tr:has(b) [data-denial]`
	b.click(row)
	holds("#answer", "The denied request now")
	b.await(`document.querySelectorAll("#answer .verdicts li").length === 6`)

	// An invalid request is reported.
	b.eval(`document.querySelector("[name=source]").value = "` + strings.ReplaceAll(attack, `"`, `\"`) + `"`)
	b.click("button[type=submit]")
	holds("#answer .error", "<img src=x onerror=")
	b.eval(`document.querySelector("[name=source]").value = "127.0.0.1"`)

	// A request can be typed in and explained with the keyboard alone.
	b.eval(`document.querySelector("[name=path]").focus()`)
	b.eval(`document.querySelector("[name=path]").select()`)
	b.call("Input.insertText", map[string]any{"text": "/v1/orders?" + attack}, nil)
	b.eval(`document.querySelector("[name=header]").focus()`)
	b.call("Input.insertText", map[string]any{"text": "x-api-key=nobody\nx-attack=" + attack}, nil)
	b.eval(`document.querySelector("[name=source]").focus()`)
	b.press("Enter")
	holds("#answer", "allowed")
	holds("#answer", "cost 1, remaining 20 of 20 tokens")
	holds("#answer", "hosts") // why quiet does not apply
	b.eval(`document.querySelector("#traffic").focus()`)
	b.press("ArrowLeft")
	b.await(`/\d\d:\d\d:\d\d/.test(document.querySelector("#legend").innerText)`)
	b.press("Tab")
	if got := b.eval("document.activeElement.id"); got != "filter" {
		t.Errorf("after the chart Tab leads to %v", got)
	}
	b.call("Input.insertText", map[string]any{"text": "strict"}, nil)
	b.await(`document.querySelectorAll("#limits-rows tr").length === 1`)
	b.set("#filter", "", "input")
	b.await(`document.querySelectorAll("#limits-rows tr").length === 6`)
	b.eval(`document.activeElement.blur()`)

	if os.Getenv("SLUICE_SHOTS") != "" { // screenshots have a history
		b.await(`document.querySelectorAll("#denials-rows tr").length > 5`)
		<-time.After(20 * time.Second)
	}
	b.looks("load")

	// The new config is invalid and contains an attack.
	if err := os.WriteFile(config, []byte(pageConfig+"  - {name: '"+attack+"', rate: 1/s}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	holds("#alarms", "Config reload failed")
	holds("#alarms", "onerror")
	holds("#config", "rejected")
	b.look(1280, "light")
	b.shot("rejected")

	asked, wrong := b.seen()
	for _, url := range asked {
		if !strings.HasPrefix(url, d.page+"/") {
			t.Errorf("the page asked for %s", url)
		}
	}
	// Chromium reports only the address that was rejected.
	for _, w := range wrong {
		if !strings.Contains(w, "status of 400") || !strings.Contains(w, "/api/explain") {
			t.Errorf("the browser says: %s", w)
		}
	}
	if len(asked) < 20 {
		t.Errorf("only %d requests: %q", len(asked), asked)
	}
	if b.eval(
		`window.hacked === undefined && document.scripts.length === 1 && document.querySelectorAll("img").length === 1`,
	) != true {
		t.Error("markup of a client's became part of the page")
	}

	redis.Kill()
	holds("#alarms", "Redis does not answer")
	b.shot("no-redis")
}

// looks checks that everything has room on the page, light and dark, on a
// screen, a tablet and a phone, and takes a picture of each.
func (b *browser) looks(name string) {
	b.t.Helper()
	for _, look := range []struct {
		name, colours string
		width         int
	}{
		{"dark", "dark", 1280}, {"phone", "light", 390}, {"phone-dark", "dark", 390}, {"middle", "light", 800},
		{"light", "light", 1280}, // the last stays
	} {
		b.look(look.width, look.colours)
		b.await(fmt.Sprintf("innerWidth === %d", look.width))
		b.polled()
		if wide := b.eval("document.documentElement.scrollWidth"); wide.(float64) > float64(look.width) {
			b.t.Errorf("%s: at %d pixels the page is %v wide", name, look.width, wide)
		}
		if cut := b.eval(`[...document.querySelectorAll("td, li, dd, h2, main p")].
			filter((e) => e.scrollWidth > e.clientWidth + 1).map((e) => e.innerText).join("; ")`); cut != "" {
			b.t.Errorf("%s: at %d pixels this is wider than its place: %v", name, look.width, cut)
		}
		b.eval(`scrollTo({top: 0, behavior: "instant"})`) // the header is at the top of a picture
		b.shot(name + "-" + look.name)
	}
}

// polled waits until the page has shown an answer that was asked for after now.
func (b *browser) polled() {
	b.t.Helper()
	b.eval("window.was = document.body.dataset.polls")
	b.await("document.body.dataset.polls > Number(window.was) + 1")
}

// TestAdminIsGuarded checks that requests with a foreign Host or from another
// site's page are rejected, and that nothing can be changed.
func TestAdminIsGuarded(t *testing.T) {
	p := startSluice(t)
	_, port, _ := strings.Cut(p.admin, ":")
	c := client(t)
	for _, tt := range []struct {
		method, host, site, origin, path string
		status                           int
	}{
		{"GET", p.admin, "", "", "/", 200},
		{"GET", "localhost:" + port, "none", "", "/", 200},
		{"GET", "localhost", "same-origin", "", "/api/status", 200},
		{"GET", "LOCALHOST:1", "", "", "/api/status", 200},
		{"GET", "sluice.localhost:1", "", "", "/api/status", 200},
		{"GET", "[::1]:9002", "", "", "/api/status", 200},
		{"GET", "10.1.2.3:9002", "", "", "/api/status", 200},
		{"GET", "evil.example", "", "", "/", 403},
		{"GET", "evil.example:" + port, "", "", "/api/status", 403},
		{"GET", "127.0.0.1.evil.example", "", "", "/api/status", 403},
		{"GET", "localhost.evil.example", "", "", "/debug/pprof/", 403},
		{"GET", "localhost.", "", "", "/", 403},
		{"GET", p.admin, "cross-site", "", "/", 403},
		{"GET", p.admin, "same-site", "", "/api/status", 403},
		{"GET", p.admin, "", "http://evil.example", "/api/status", 403},
		{"POST", p.admin, "", "null", "/api/explain", 403},
		{"POST", p.admin, "", "http://" + p.admin, "/api/explain", 200},
		{"POST", p.admin, "", "https://" + p.admin, "/api/explain", 403},
		{"POST", p.admin, "", "http://localhost:1", "/api/explain", 403},
		{"POST", p.admin, "", "", "/api/explain", 200},
		{"POST", p.admin, "", "", "/api/status", 405},
		{"PUT", p.admin, "", "", "/api/limits", 405},
		{"DELETE", p.admin, "", "", "/", 405},
		{"GET", p.admin, "", "", "/api/nothing", 404},
		{"GET", p.admin, "", "", "/page/", 404},
		{"GET", p.admin, "", "", "/debug/pprof/heap", 200},
		{"GET", p.admin, "", "", "/debug/pprof/cmdline", 404},
		{"GET", p.admin, "", "", "/api/top", 400},
		{"GET", p.admin, "", "", "/api/limits?n=0", 400},
		{"GET", p.admin, "", "", "/api/explain?source=x", 400},
		{"GET", p.admin, "", "", "/api/explain?denial=-1", 400},
		{"GET", p.admin, "", "", "/api/explain?denial=1", 400},
		{"GET", p.admin, "", "", "/api/explain?header=x", 400},
		{"GET", p.admin, "", "", "/api/explain?pth=/", 400},
		{"GET", p.admin, "", "", "/api/explain?%zz", 400},
	} {
		r, err := http.NewRequestWithContext(t.Context(), tt.method, "http://"+p.admin+tt.path, nil)
		if err != nil {
			t.Fatal(err)
		}
		r.Host = tt.host
		for name, value := range map[string]string{"Sec-Fetch-Site": tt.site, "Origin": tt.origin} {
			if value != "" {
				r.Header.Set(name, value)
			}
		}
		response, err := c.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		body, _ := io.ReadAll(response.Body)
		_ = response.Body.Close()
		policy := response.Header.Get("Content-Security-Policy")
		if response.StatusCode != tt.status || !strings.Contains(policy, "default-src 'none'") ||
			strings.Contains(policy, "unsafe") ||
			response.Header.Get("X-Content-Type-Options") != "nosniff" ||
			response.Header.Get("Access-Control-Allow-Origin") != "" {
			t.Errorf("%v: %d %v\n%s", tt, response.StatusCode, response.Header, body)
		}
		if tt.status == 400 {
			var said struct{ Error string }
			if json.Unmarshal(body, &said) != nil || said.Error == "" {
				t.Errorf("%v: %s", tt, body)
			}
		}
	}
}

// TestAdminJSON checks that the data of the page is available as JSON without
// secrets, and that explain takes no tokens.
func TestAdminJSON(t *testing.T) {
	const limits = `
limits:
  - {name: a, match: {paths: [/a]}, rate: 1/d, burst: 2, cost: 2, key: ['request.headers["x-api-key"]', client.ip]}
  - {name: b, rate: 1/h, mode: shadow}
`
	redis := redistest.Start(t)
	inRedis := strings.Replace(redis.URL(), "unix://", "unix://default:k3y-of-redis@", 1)
	if err := redis.Client().ConfigSet(t.Context(), "requirepass", "k3y-of-redis").Err(); err != nil {
		t.Fatal(err)
	}
	for name, tt := range map[string]struct {
		config string
		args   []string
	}{
		"in process": {limits, nil},
		"on Redis":   {patientStore + limits, []string{"--redis", inRedis}},
	} {
		t.Run(name, func(t *testing.T) {
			config := file(t, "sluice.yaml", tt.config)
			p := startSluice(t, append(tt.args, "--config", config)...)
			ask := func(path string, into any) {
				t.Helper()
				status, text := get(t, "http://"+p.admin+path)
				if status != 200 || strings.Contains(text, "k3y") {
					t.Errorf("%s: %d %s", path, status, text)
				}
				if err := json.Unmarshal([]byte(text), into); err != nil {
					t.Fatalf("%s: %v in %s", path, err, text)
				}
			}
			conn := dial(t, p.grpc)
			for i, want := range []string{"ok", "429", "429"} {
				r := checkRequest("203.0.113.7", "GET", "/a?token=k3y", map[string]string{"x-api-key": "k3y"})
				if got := check(t, conn, r); got != want {
					t.Errorf("check %d: %s", i, got)
				}
			}

			var status struct {
				Checks map[string]int
				Ready  bool
				Domain string
				Store  struct{ Kind, Address string }
				Config struct {
					File, Hash string
					Limits     int
					Last       *struct{} `json:"last_reload"`
				}
			}
			ask("/api/status", &status)
			if status.Checks["allowed"] != 1 || status.Checks["limited"] != 2 || !status.Ready ||
				status.Domain != "default" || len(status.Config.Hash) != 16 || status.Config.Limits != 2 ||
				status.Config.File != config || status.Config.Last != nil ||
				(status.Store.Kind == "redis") != (name == "on Redis") {
				t.Errorf("%+v", status)
			}
			if name == "on Redis" && status.Store.Address != redis.URL() {
				t.Errorf("%+v", status.Store)
			}
			var limits struct {
				Total  int
				Limits []struct {
					Name, Mode, From, Rate      string
					Burst                       int
					Key                         []string
					Group                       string
					Overrides, Allowed, Limited int
					Tokens                      int
				}
			}
			ask("/api/limits", &limits)
			got := fmt.Sprintf("%d %+v", limits.Total, limits.Limits)
			if want := `2 [{Name:a Mode:enforce From:config Rate:1/d Burst:2 Key:[request.headers["x-api-key"] client.ip] ` +
				`Group: Overrides:0 Allowed:1 Limited:2 Tokens:2}` +
				` {Name:b Mode:shadow From:config Rate:1/h Burst:1 Key:[] Group: Overrides:0 Allowed:1 Limited:2 Tokens:1}]`; got != want {
				t.Errorf("%s\nwant\n%s", got, want)
			}
			ask("/api/limits?filter=b&n=1", &limits)
			if limits.Total != 1 || limits.Limits[0].Name != "b" {
				t.Errorf("%+v", limits)
			}
			const key = `[{hash pJsSh4cMEKdvH0ZVKspEMYQs7V3t8O4_KP-hKFWk6Go} {open 203.0.113.7}]`
			type topKey struct {
				Parts []policy.KeyPart
				Count int
			}
			var top struct{ Requests, Denials []topKey }
			ask("/api/top?limit=a", &top)
			if len(top.Requests) != 1 || top.Requests[0].Count != 3 || top.Denials[0].Count != 2 ||
				fmt.Sprint(top.Denials[0].Parts) != key {
				t.Errorf("%+v", top)
			}
			var denials []struct {
				ID                                    uint64
				Count                                 int
				Limit, Decision, Reason, Path, Source string
				Key, Host, Client                     string
				Shadow                                bool
				RetryAfter                            *int `json:"retry_after"`
				Explainable                           bool
				Parts                                 []policy.KeyPart
			}
			ask("/api/denials", &denials)
			if len(denials) != 2 {
				t.Fatalf("%+v", denials)
			}
			if denials[0].Shadow { // both are of the same check
				slices.Reverse(denials)
			}
			if d := denials[1]; !d.Shadow || d.Limit != "b" || d.Decision != "shadow_limited" || d.Key != "-" ||
				d.Client != "203.0.113.7" || !d.Explainable {
				t.Errorf("%+v", d)
			}
			if d := denials[0]; d.Count != 2 || d.Limit != "a" || d.Decision != "limited" ||
				d.Reason != "cost 2, remaining 0" || d.Path != "/a" || d.Source != "203.0.113.7" ||
				d.Shadow || d.Client != "203.0.113.7" ||
				d.Key != "#43.pJsSh4cMEKdvH0ZVKspEMYQs7V3t8O4_KP-hKFWk6Go=11.203.0.113.7" ||
				*d.RetryAfter < 172_000 || *d.RetryAfter > 172_800 || !d.Explainable ||
				fmt.Sprint(d.Parts) != key {
				t.Errorf("%+v", d)
			}
			for range 3 { // explain takes no tokens
				for query, want := range map[string]string{
					"denial=" + strconv.FormatUint(denials[0].ID, 10):                  "limited [a true 0/2] [b true 0/1]",
					"path=/a&source=203.0.113.7&header=x-api-key%3Dk3y":                "limited [a true 0/2] [b true 0/1]",
					"path=/a&source=203.0.113.7&header=x-api-key%3Dk3y2":               "allowed [a true 2/2] [b true 0/1]",
					"path=/b&method=POST&host=h&context=sluice.limits%3Db&principal=p": "allowed [a false] [b true 0/1]",
				} {
					var e authz.Explanation
					ask("/api/explain?"+query, &e)
					said := e.Decision
					for _, l := range e.Limits {
						said += fmt.Sprintf(" [%s %v", l.Name, l.Applies)
						if l.Remaining != nil {
							said += fmt.Sprintf(" %d/%d", *l.Remaining, *l.Burst)
						}
						said += "]"
					}
					if said != want {
						t.Errorf("%s: %s, want %s", query, said, want)
					}
				}
			}
			var past []struct{ At int64 }
			eventually(t, "a second of history", func() bool { ask("/api/history", &past); return len(past) > 0 })
			var paths map[string]string
			ask("/api/", &paths)
			if len(paths) < 6 {
				t.Errorf("%v", paths)
			}
		})
	}
}
