package main

import (
	"bufio"
	"bytes"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/sluiceproxy/sluice/envoy"
)

// piped gives a process a pipe with text as /dev/fd/3, like a shell's
// <(command).
func piped(t *testing.T, p *process, text string) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	p.cmd.ExtraFiles = []*os.File{r}
	go func() {
		_, _ = w.WriteString(text)
		_ = w.Close()
	}()
	t.Cleanup(func() { _ = r.Close() })
}

// lines runs a process that is not started yet, and passes on the lines of its
// stderr until it ends.
type lines struct {
	*process
	mu   sync.Mutex
	said []string
}

func startLines(t *testing.T, p *process) *lines {
	t.Helper()
	l := &lines{process: p}
	stderr, err := p.cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(p.done)
		for s := bufio.NewScanner(stderr); s.Scan(); {
			l.mu.Lock()
			l.said = append(l.said, s.Text())
			l.mu.Unlock()
		}
		_ = p.cmd.Wait()
	}()
	t.Cleanup(func() { _ = p.cmd.Process.Kill(); <-p.done })
	return l
}

// count returns the number of lines that contain text.
func (l *lines) count(text string) (n int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, line := range l.said {
		n += strings.Count(line, text)
	}
	return n
}

// text is all that was said.
func (l *lines) text() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Join(l.said, "\n")
}

const freePorts = "listen: {grpc: '127.0.0.1:0', admin: '127.0.0.1:0', metrics: '127.0.0.1:0'}\n"

// TestConfigFromAPipe checks that a config can come from any kind of pipe. It
// is read once; the files that it names are reloaded.
func TestConfigFromAPipe(t *testing.T) {
	const config = freePorts + "domain: piped\nlimits: [{name: a, rate: 1/d, key: request.headers.k, overrides_file: " +
		"o.csv}]\n"
	dir := t.TempDir()
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, "o.csv"), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("key,rate,burst\n")
	fifo := filepath.Join(dir, "fifo")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	for name, path := range map[string]string{"a shell's": "/dev/fd/3", "stdin": "/dev/stdin", "named": fifo} {
		t.Run(name, func(t *testing.T) {
			write("key,rate,burst\n")
			p := start(t, "sluice", nil, "run", "--config", path)
			p.cmd.Dir = dir
			switch path {
			case fifo:
				go func() { _ = os.WriteFile(fifo, []byte(config), 0o600) }() // waits for a reader
			case "/dev/stdin":
				p.cmd.Stdin = strings.NewReader(config)
			default:
				piped(t, p, config)
			}
			l := startLines(t, p)
			eventually(t, "the start", func() bool { return l.count(`"serving"`) == 1 })
			if l.count(`"domain":"piped"`) != 1 {
				t.Errorf("the config does not count:\n%s", l.text())
			}
			eventually(t, "the warning about the pipe", func() bool { return l.count("cannot be reloaded") == 1 })
			write("key,rate,burst\ngold,5/d,\n")
			eventually(t, "the first reload", func() bool { return l.count("config reloaded") == 1 })
			if n := l.count(`"limits":1`); n != 2 { // that of the start, and the reloaded one
				t.Errorf("%d configs have the limit:\n%s", n, l.text())
			}
			if err := p.cmd.Process.Signal(syscall.SIGHUP); err != nil {
				t.Fatal(err)
			}
			eventually(t, "the second reload", func() bool { return l.count("config reloaded") == 2 })
			if l.count("cannot be reloaded") != 1 {
				t.Errorf("said more than once:\n%s", l.text())
			}
			if status := p.stop(); status != 0 {
				t.Errorf("status %d\n%s", status, l.text())
			}
		})
	}
}

// TestValidateAPipe checks that validate reads a pipe and finds an error in it.
func TestValidateAPipe(t *testing.T) {
	for config, want := range map[string]string{
		limit("a"): "/dev/fd/3: ok\n",
		"limits: [{name: a}]\n": "/dev/fd/3:1:10: limits[0].rate: missing; " +
			"a limit needs a name, and a rate, a quota or a plan\n",
		"": "/dev/fd/3: the file is empty (perhaps it is still being written); for a config without " +
			"limits write limits: []\n",
	} {
		p := start(t, "sluice", nil, "validate", "/dev/fd/3")
		piped(t, p, config)
		if out, _ := p.cmd.Output(); string(out) != want {
			t.Errorf("%q: %s\nwant %s", config, out, want)
		}
	}
}

// TestDemoFromAPipe checks that the demo takes its config from a pipe.
func TestDemoFromAPipe(t *testing.T) {
	if _, err := envoy.Binary(t.Context(), func(s string) { t.Log(s) }); err != nil {
		t.Fatal(err)
	}
	p := start(
		t, "sluice", []string{"TMPDIR=" + t.TempDir()}, "demo", "--port", strconv.Itoa(freePort(t)), "--config", "/dev/fd/3",
	)
	piped(t, p, limit("from-a-pipe"))
	stdout, err := p.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	l := startLines(t, p)
	var said strings.Builder
	for s := bufio.NewScanner(stdout); s.Scan(); {
		said.WriteString(s.Text() + "\n")
		if strings.HasPrefix(s.Text(), "Ctrl-C") {
			break
		}
	}
	if !strings.Contains(said.String(), "limits    from-a-pipe\n") {
		t.Errorf("%s%s", said.String(), l.text())
	}
	p.stop()
}

// TestBlankConfig checks that an empty config file is an error for every
// command.
func TestBlankConfig(t *testing.T) {
	blank := file(t, "blank.yaml", "\ufeff \n\n")
	for _, path := range []string{blank, "/dev/null"} {
		want := path + ": the file is empty (perhaps it is still being written); for a config without limits write " +
			"limits: []\n"
		for _, args := range [][]string{{"run", "--config"}, {"demo", "--config"}, {"explain", "--config"}, {"validate"}} {
			status, stdout, stderr := sluice(t, nil, append(args, path)...)
			if status != 1 || stdout+stderr != want {
				t.Errorf("%v %s: %d %s%s", args, path, status, stdout, stderr)
			}
		}
	}
	for _, command := range []string{"run", "demo", "explain", "doctor", "envoy"} {
		if status, _, stderr := sluice(t, []string{"SLUICE_CONFIG=" + blank}, command, "--config="); status != 2 ||
			!strings.HasPrefix(stderr, "sluice: --config: empty; want the name of a file") {
			t.Errorf("%s: %d %s", command, status, stderr)
		}
	}
}

// TestPipeThatNobodyWrites checks that a pipe without a writer blocks neither
// the end of a start nor the end of a sidecar whose config it replaced.
func TestPipeThatNobodyWrites(t *testing.T) {
	dir := t.TempDir()
	fifo := filepath.Join(dir, "fifo")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{"run"}, {"demo"}} {
		p := start(t, "sluice", nil, append(args, "--config", fifo)...)
		l := startLines(t, p)
		var writer *os.File // that says nothing
		eventually(t, "a reader of the pipe", func() bool {
			var err error
			writer, err = os.OpenFile(fifo, os.O_WRONLY|syscall.O_NONBLOCK, 0) // fails until it is read
			return err == nil
		})
		if status := p.stop(); status != 0 {
			t.Errorf("%v: status %d\n%s", args, status, l.text())
		}
		_ = writer.Close()
	}

	config := file(t, "sluice.yaml", freePorts+limit("a"))
	p := start(t, "sluice", nil, "run", "--config", config)
	l := startLines(t, p)
	eventually(t, "the start", func() bool { return l.count(`"serving"`) == 1 })
	replace := func() {
		t.Helper()
		if err := os.Rename(fifo, config); err != nil {
			t.Fatal(err)
		}
	}
	replace()
	eventually(t, "the rejected pipe", func() bool { return l.count("sluice.yaml: not a regular file") == 1 })
	if err := os.WriteFile(config+".new", []byte(freePorts+limit("a", "b")), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(config+".new", config); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the reload", func() bool { return l.count(`"limits":2`) == 1 })
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	replace()
	eventually(t, "the second rejected pipe", func() bool { return l.count("sluice.yaml: not a regular file") == 2 })
	if status := p.stop(); status != 0 {
		t.Errorf("status %d\n%s", status, l.text())
	}
}

// TestPipesThatAConfigNames checks that a pipe as a file that the config names
// is an error, and that nothing waits for it.
func TestPipesThatAConfigNames(t *testing.T) {
	dir := t.TempDir()
	fifo := filepath.Join(dir, "fifo")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, text := range []string{
		"key_secret_file: fifo",
		"store: {redis: {url: 'redis://h', password_file: fifo}}",
		"limits: [{name: a, rate: 1/s, key: client.ip, overrides_file: fifo}]",
		"limits: [{name: a, rate: 1/s, key: client.ip, overrides_file: 'fif*'}]",
		"store: {redis: {url: 'rediss://h', tls: {ca_file: fifo}}}",
		"store: {redis: {url: 'rediss://h', tls: {cert_file: fifo, key_file: fifo}}}",
	} {
		config := filepath.Join(dir, "sluice.yaml")
		if err := os.WriteFile(config, []byte(text+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		if status, stdout, stderr := sluice(t, nil, "validate", config); status != 1 ||
			!strings.Contains(stdout, fifo+": not a regular file") {
			t.Errorf("%s: %d %s%s", text, status, stdout, stderr)
		}
	}
}

// TestOneInterruptIsEnough checks that one SIGINT ends a command that waits.
func TestOneInterruptIsEnough(t *testing.T) {
	for _, args := range [][]string{{"inject"}, {"validate", "/dev/stdin"}, {"explain", "--config", "/dev/stdin"}} {
		p := start(t, "sluice", nil, args...)
		stdin, err := p.cmd.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		l := startLines(t, p)
		if _, err := stdin.Write(bytes.Repeat([]byte("#\n"), 100_000)); err != nil { // more than a pipe holds: it reads
			t.Fatal(err)
		}
		if err := p.cmd.Process.Signal(syscall.SIGINT); err != nil {
			t.Fatal(err)
		}
		select {
		case <-p.done:
			if p.cmd.ProcessState.Success() {
				t.Errorf("%v ended well", args)
			}
		case <-time.After(within):
			t.Errorf("%v goes on\n%s", args, l.text())
		}
		_ = stdin.Close()
	}
}
