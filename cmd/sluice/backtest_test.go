package main

import (
	"bytes"
	"compress/gzip"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// accessLine returns a line of the combined format, so many seconds after
// 10:00:00.
func accessLine(second int, client, path string) string {
	t := time.Date(2026, 3, 1, 10, 0, second, 0, time.UTC)
	return fmt.Sprintf("%s - - [%s +0000] \"GET %s HTTP/1.1\" 200 5 \"-\" \"curl/8\"\n", client,
		t.Format("02/Jan/2006:15:04:05"), path)
}

// backtestConfig allows a client 2 tokens, and two more each second. Of five
// requests in a second it allows three if they are evenly spread, and two if they
// come at once.
const backtestConfig = "limits: [{name: per-client, key: client.ip, rate: 2/s, burst: 2}]\n"

// TestBacktestStatus checks the statuses and messages of backtest.
func TestBacktestStatus(t *testing.T) {
	cfg := file(t, "sluice.yaml", backtestConfig)
	good := file(t, "good.log", strings.Repeat(accessLine(0, "192.0.2.1", "/"), 5)+accessLine(9, "192.0.2.2", "/"))
	half := file(t, "half.log", accessLine(0, "192.0.2.1", "/")+"junk\n")
	empty := file(t, "empty.log", "")
	binary := file(t, "binary.log", "\x00\x01\x02")
	future := file(t, "future.log", strings.ReplaceAll(accessLine(0, "192.0.2.1", "/"), "2026", "2126"))
	mixed := file(t, "mixed.log", strings.Repeat(accessLine(0, "192.0.2.1", "/"), 50)+
		strings.Repeat(`{"start_time":"2026-03-01T10:00:00Z","path":"/"}`+"\n", 40))
	apart := file(t, "apart.log", accessLine(0, "192.0.2.1", "/")+
		strings.ReplaceAll(accessLine(9, "192.0.2.1", "/"), "2026", "2020"))
	for _, test := range []struct {
		args   string
		status int
		want   string // in stdout or stderr
	}{
		{good, 0, "6 requests from 2026-03-01 10:00:00 to 2026-03-01 10:00:09 UTC, over 9s\nlimited: 2 (33%) if each"},
		{"--max-limited 34% " + good, 0, "passed:  2 of 6 requests would be denied, 33.33%; --max-limited is 34%\n"},
		{"--max-limited 0 -o json " + good, 1, `"max_limited": "0%",`},
		{"--max-limited 0 -o html " + good, 1, "<strong>Failed</strong> 2 of 6 requests would be denied"},
		{good, 0, "config:  " + cfg + "\nlogs:    " + good + "\n"},
		{"--max-limited 10% " + good, 1, "sluice: 2 of 6 requests would be denied, 33.33%; --max-limited is 10%\n"},
		{"--max-limited 10 " + good, 2, "must be a percentage from 0% to 100%, such as 0.1%; write 10%\n"},
		{"--max-limited 101% " + good, 2, "must be a percentage from 0% to 100%, such as 0.1%\n"},
		{"--since 5s " + good, 0, "1 request from"},
		{"--until 5s " + good, 0, "5 requests from"},
		{"--since 2026-03-01T11:00:05+01:00 " + good, 0, "1 request from"},
		{"--since 2027-01-01T00:00:00Z " + good, 1, "sluice: all 6 requests are outside of --since and --until"},
		{"--since yesterday " + good, 2, "--since \"yesterday\": must be a time such as"},
		{"--since 1s --until 2s " + good, 2, "--since 1s is not before --until 2s"},
		{"-o yaml " + good, 2, "-o \"yaml\": must be text, json or html"},
		{"--format xml " + good, 2, "--format \"xml\": must be one of auto, common, combined, envoy, json, csv"},
		{"--field request.path " + good, 2, "--field \"request.path\": want ATTRIBUTE=NAME"},
		{"", 2, "missing LOG"},
		{good + " " + good, 1, "named twice"},
		{"/nonexistent/a.log", 1, "/nonexistent/a.log: no such file or directory"},
		{filepath.Dir(good), 1, "is a directory"},
		{half, 1, "sluice: 1 of 2 lines cannot be read, more than 1%; the first is " + half + ":2, not of the format combined: " +
			`"junk"`},
		{empty, 1, "empty.log: empty"},
		{empty + " " + good, 0, "warning: "},
		{binary, 1, "binary.log: binary data"},
		{"--format json " + good, 1, "good.log: not of the format json"},
		{future, 0, "the log ends in the future, at 2126-03-01T10:00:00Z"},
		{mixed, 1, "40 of 90 lines cannot be read"},
		{apart, 0, "the requests are years apart"},
	} {
		args := append([]string{"backtest", "--config", cfg}, strings.Fields(test.args)...)
		status, stdout, stderr := sluice(t, nil, args...)
		if status != test.status || !strings.Contains(stdout+stderr, test.want) {
			t.Errorf("%s: status %d\n%s%s\nwant status %d and %q", test.args, status, stdout, stderr, test.status, test.want)
		}
	}
	status, _, stderr := sluice(t, nil, "backtest", good)
	if status != 2 || !strings.Contains(stderr, "--config: missing; want the file") {
		t.Errorf("without a config: status %d, %s", status, stderr)
	}
	if status, _, _ := sluice(t, []string{"SLUICE_CONFIG=" + cfg}, "backtest", good); status != 0 {
		t.Errorf("with SLUICE_CONFIG: status %d", status)
	}
}

// TestBacktestJSON checks a compressed log from standard input, and the result
// as JSON.
func TestBacktestJSON(t *testing.T) {
	var log bytes.Buffer
	z := gzip.NewWriter(&log)
	_, _ = z.Write([]byte(strings.Repeat(accessLine(0, "192.0.2.1", "/"), 5)))
	_ = z.Close()
	p := start(t, "sluice", nil, "backtest", "--config", file(t, "sluice.yaml", backtestConfig), "--since", "1h", "-o", "json", "-")
	var out bytes.Buffer
	p.cmd.Stdin, p.cmd.Stdout = &log, &out
	if err := p.cmd.Run(); err != nil {
		t.Fatal(err)
	}
	var r struct {
		Lines, Requests, Limited int64
		AtOnce                   int64 `json:"at_once"`
		Limits                   []struct {
			Name  string
			Worst []struct{ Key string }
		}
	}
	if err := json.Unmarshal(out.Bytes(), &r); err != nil {
		t.Fatal(err)
	}
	if r.Lines != 5 || r.Requests != 5 || r.Limited != 2 || r.AtOnce != 3 || r.Limits[0].Worst[0].Key != "=9.192.0.2.1" {
		t.Errorf("%s", out.String())
	}
}

// TestBacktestInterrupt checks that Ctrl-C prints what is known so far.
func TestBacktestInterrupt(t *testing.T) {
	in, lines, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _, _ = in.Close(), lines.Close() }()
	p := start(t, "sluice", nil, "backtest", "--config", file(t, "sluice.yaml", backtestConfig), "-")
	var out, errs bytes.Buffer
	p.cmd.Stdin, p.cmd.Stdout, p.cmd.Stderr = in, &out, &errs
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	// More than the sample, and more than one chunk; then nothing comes any more.
	_, _ = lines.WriteString(strings.Repeat(accessLine(0, "192.0.2.1", "/"), 10_000))
	_ = p.cmd.Process.Signal(os.Interrupt)
	_ = p.cmd.Wait()
	if status := p.cmd.ProcessState.ExitCode(); status != 1 || !strings.HasPrefix(out.String(), "Interrupted: ") ||
		!strings.Contains(errs.String(), "sluice: interrupted after ") {
		t.Errorf("status %d\n%s%s", status, out.String(), errs.String())
	}
}

// TestBacktestPage opens the report in a browser, in light and dark, wide and
// narrow: it asks for nothing, and what a client sent is text.
func TestBacktestPage(t *testing.T) {
	const evil = `/<script>alert(1)</script><img/src=x/onerror=alert(2)>"'`
	var log strings.Builder
	for i := range 50 {
		log.WriteString(accessLine(i/10, "192.0.2.1", strings.ReplaceAll(evil, `"`, `\x22`)))
	}
	log.WriteString("<script>alert(3)</script>\n")
	cfg := file(t, "sluice.yaml", `limits:
  - {name: per-client, key: client.ip, rate: 1/s, burst: 2}
  - {name: per-path, key: request.url_path, rate: 1/s, burst: 2, mode: shadow}
  - {name: by-header, key: 'request.headers["x-api-key"]', rate: unlimited}
`)
	status, page, stderr := sluice(t, nil, "backtest", "--config", cfg, "--against", cfg, "-o", "html", file(t, "a.log", log.String()))
	if status != 1 || !strings.Contains(stderr, "1 of 51 lines cannot be read") {
		t.Fatalf("status %d: %s", status, stderr)
	}
	path := file(t, "report.html", page)
	b := startBrowser(t)
	for _, scheme := range []string{"light", "dark"} {
		for _, width := range []int{1280, 360} {
			b.look(width, scheme)
			b.open("file://" + path)
			if wide := b.eval("document.documentElement.scrollWidth"); wide != float64(width) {
				t.Errorf("the page is %v wide in a window of %d", wide, width)
			}
		}
	}
	for expression, want := range map[string]any{
		"document.scripts.length":                                                                   0.0,
		"document.images.length":                                                                    0.0,
		"document.querySelectorAll('section').length":                                               6.0,
		"document.querySelectorAll('.scroll:not([tabindex=\"0\"])').length":                         0.0,
		"document.body.innerText.includes('<script>alert(3)</script>')":                             true,
		"[...document.querySelectorAll('th code')].some((c) => c.textContent.includes('alert(1)'))": true,
	} {
		if got := b.eval(expression); got != want {
			t.Errorf("%s is %v, want %v", expression, got, want)
		}
	}
	asked, wrong := b.seen()
	for _, url := range asked {
		if !strings.HasPrefix(url, "file://"+path) && url != "about:blank" && !strings.HasPrefix(url, "data:,") {
			t.Errorf("the page asked for %s", url)
		}
	}
	if len(wrong) > 0 {
		t.Errorf("%q", wrong)
	}
}
