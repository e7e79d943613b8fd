package main

import (
	"bufio"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// browser is a headless Chromium with one page, controlled by the DevTools
// protocol through its pipe. It needs only a few calls of it, and the Go
// libraries for it are larger than sluice.
type browser struct {
	t    testing.TB
	pipe io.Writer

	mu      sync.Mutex
	calls   map[int]chan reply
	session string
	asked   []string // addresses of all requests
	errs    []string // errors in the page's console and of Chromium
	ended   bool
}

type reply struct {
	ID        int
	Method    string
	SessionID string
	Params    json.RawMessage
	Result    json.RawMessage
	Error     *struct{ Message string }
}

// startBrowser starts Chromium with an empty profile, and stops it at the end
// of the test.
func startBrowser(t testing.TB) *browser {
	t.Helper()
	binary := ""
	for _, name := range []string{"chromium", "chromium-browser", "google-chrome"} {
		if path, err := exec.LookPath(name); err == nil {
			binary = path
			break
		}
	}
	if binary == "" {
		t.Fatal("chromium is missing: .ci/test installs it")
	}
	toRead, in, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	out, toWrite, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	profile, err := os.MkdirTemp("", "sluice-browser-")
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(
		binary, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-dev-shm-usage", "--no-first-run",
		"--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
		"--remote-debugging-pipe", "--user-data-dir="+profile,
	)
	cmd.ExtraFiles = []*os.File{toRead, toWrite} // 3 and 4
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	_, _ = toRead.Close(), toWrite.Close()
	b := &browser{t: t, pipe: in, calls: make(map[int]chan reply)}
	read := make(chan struct{})
	go func() { defer close(read); b.read(out) }()
	t.Cleanup(func() {
		_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) // its children, too
		_ = cmd.Wait()
		_ = in.Close()
		<-read
		_ = out.Close()
		// Its children may still write files while they end.
		eventually(t, "the removal of the profile", func() bool { return os.RemoveAll(profile) == nil })
	})

	var target struct{ TargetID string }
	b.call("Target.createTarget", map[string]any{"url": "about:blank"}, &target)
	var attached struct{ SessionID string }
	b.call("Target.attachToTarget", map[string]any{"targetId": target.TargetID, "flatten": true}, &attached)
	b.mu.Lock()
	b.session = attached.SessionID
	b.mu.Unlock()
	for _, domain := range []string{"Page", "Runtime", "Network", "Log"} {
		b.call(domain+".enable", nil, nil)
	}
	return b
}

// read takes what Chromium says until it ends.
func (b *browser) read(from io.Reader) {
	for r := bufio.NewReader(from); ; {
		text, err := r.ReadBytes(0)
		if err != nil {
			break
		}
		var m reply
		if err := json.Unmarshal(text[:len(text)-1], &m); err != nil {
			b.note(fmt.Sprintf("the browser said %q: %v", text, err))
			continue
		}
		b.take(m)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.ended = true
	for _, c := range b.calls {
		close(c)
	}
	clear(b.calls)
}

func (b *browser) take(m reply) {
	b.mu.Lock()
	answered := b.calls[m.ID]
	delete(b.calls, m.ID)
	b.mu.Unlock()
	if m.ID > 0 && answered != nil {
		answered <- m
		return
	}
	var p struct {
		Type             string
		Request          struct{ URL string }
		Entry            struct{ Level, Text, URL string }
		ExceptionDetails struct {
			Text      string
			Exception struct{ Description string }
		}
		Args []struct{ Value any }
	}
	_ = json.Unmarshal(m.Params, &p) // other events have other fields
	switch m.Method {
	case "Network.requestWillBeSent", "Network.webSocketCreated":
		b.mu.Lock()
		b.asked = append(b.asked, p.Request.URL)
		b.mu.Unlock()
	case "Runtime.exceptionThrown":
		b.note(p.ExceptionDetails.Text + " " + p.ExceptionDetails.Exception.Description)
	case "Runtime.consoleAPICalled":
		b.note(fmt.Sprint("console.", p.Type, " ", p.Args))
	case "Log.entryAdded":
		b.note(p.Entry.Level + ": " + p.Entry.Text + " " + p.Entry.URL)
	case "Page.javascriptDialogOpening":
		b.note("a dialog opened: " + string(m.Params))
	}
}

func (b *browser) note(what string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.errs = append(b.errs, what)
}

// seen returns the addresses that were asked, and all that went wrong.
func (b *browser) seen() (asked, wrong []string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return slices.Clone(b.asked), slices.Clone(b.errs)
}

// call makes a call of the protocol and reads its result into result, where
// that is not nil.
func (b *browser) call(method string, params, result any) {
	b.t.Helper()
	if err := b.try(method, params, result); err != nil {
		b.t.Fatalf("%s: %v", method, err)
	}
}

var browserCalls struct {
	sync.Mutex
	last int
}

func (b *browser) try(method string, params, result any) error {
	browserCalls.Lock()
	browserCalls.last++
	id := browserCalls.last
	browserCalls.Unlock()
	answered := make(chan reply, 1)
	b.mu.Lock()
	if b.ended {
		b.mu.Unlock()
		return errors.New("the browser has ended")
	}
	b.calls[id] = answered
	message := map[string]any{"id": id, "method": method}
	if params != nil {
		message["params"] = params
	}
	if b.session != "" {
		message["sessionId"] = b.session
	}
	text, err := json.Marshal(message)
	if err == nil {
		_, err = b.pipe.Write(append(text, 0))
	}
	b.mu.Unlock()
	if err != nil {
		return err
	}
	select {
	case r, ok := <-answered:
		switch {
		case !ok:
			return errors.New("the browser has ended")
		case r.Error != nil:
			return errors.New(r.Error.Message)
		case result == nil:
			return nil
		}
		return json.Unmarshal(r.Result, result)
	case <-time.After(within):
		return fmt.Errorf("no answer within %v", within)
	}
}

// open shows an address.
func (b *browser) open(url string) {
	b.t.Helper()
	var r struct{ ErrorText string }
	b.call("Page.navigate", map[string]any{"url": url}, &r)
	if r.ErrorText != "" {
		b.t.Fatalf("%s: %s", url, r.ErrorText)
	}
	b.await("document.readyState === 'complete'")
}

// eval runs an expression in the page and returns its value.
func (b *browser) eval(expression string) any {
	b.t.Helper()
	var r struct {
		Result           struct{ Value any }
		ExceptionDetails *struct {
			Text      string
			Exception struct{ Description string }
		}
	}
	b.call("Runtime.evaluate", map[string]any{"expression": expression, "returnByValue": true, "awaitPromise": true}, &r)
	if e := r.ExceptionDetails; e != nil {
		b.t.Fatalf("%s: %s %s", expression, e.Text, e.Exception.Description)
	}
	return r.Result.Value
}

// await waits until an expression is true.
func (b *browser) await(expression string) {
	b.t.Helper()
	defer func() {
		if b.t.Failed() {
			_, wrong := b.seen()
			b.t.Logf("waited for %s; wrong: %q", expression, wrong)
		}
	}()
	eventually(b.t, expression, func() bool { return b.eval(expression) == true })
}

// click clicks on the middle of what a selector finds, as a mouse does.
func (b *browser) click(selector string) {
	b.t.Helper()
	at, _ := b.eval(fmt.Sprintf(`(() => { const e = document.querySelector(%q); e.scrollIntoView({block: "center", behavior: "instant"});
		const r = e.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]; })()`, selector)).([]any)
	if len(at) != 2 {
		b.t.Fatalf("no %s to click on", selector)
	}
	for _, kind := range []string{"mousePressed", "mouseReleased"} {
		b.call(
			"Input.dispatchMouseEvent", map[string]any{"type": kind, "x": at[0], "y": at[1], "button": "left", "clickCount": 1},
			nil,
		)
	}
}

// set gives a field a value, and tells the page by an event, input or change.
func (b *browser) set(selector, value, event string) {
	b.t.Helper()
	b.eval(fmt.Sprintf(`(() => { const e = document.querySelector(%q); e.value = %q; e.dispatchEvent(new Event(%q)); })()`,
		selector, value, event))
}

// press presses a key, such as Tab, Enter or ArrowLeft.
func (b *browser) press(key string) {
	b.t.Helper()
	codes := map[string]int{"Tab": 9, "Enter": 13, "ArrowLeft": 37}
	params := map[string]any{"type": "keyDown", "key": key, "code": key, "windowsVirtualKeyCode": codes[key]}
	if key == "Enter" {
		params["text"] = "\r"
	}
	b.call("Input.dispatchKeyEvent", params, nil)
	params["type"] = "keyUp"
	b.call("Input.dispatchKeyEvent", params, nil)
}

// look sets the window's width and the colours that are preferred, light or
// dark.
func (b *browser) look(width int, colours string) {
	b.t.Helper()
	b.call(
		"Emulation.setDeviceMetricsOverride",
		map[string]any{"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}, nil,
	)
	b.call("Emulation.setEmulatedMedia", map[string]any{"features": []map[string]string{
		{"name": "prefers-color-scheme", "value": colours}, {"name": "prefers-reduced-motion", "value": "reduce"},
	}}, nil)
}

// shot writes a picture of the whole page into the directory that SLUICE_SHOTS
// names, where it does.
func (b *browser) shot(name string) {
	b.t.Helper()
	directory := os.Getenv("SLUICE_SHOTS")
	if directory == "" {
		return
	}
	var r struct{ Data string }
	b.call("Page.captureScreenshot", map[string]any{"captureBeyondViewport": true}, &r)
	picture, err := base64.StdEncoding.DecodeString(r.Data)
	if err != nil {
		b.t.Fatal(err)
	}
	if err := os.WriteFile(strings.TrimSuffix(directory, "/")+"/"+name+".png", picture, 0o600); err != nil {
		b.t.Fatal(err)
	}
}
