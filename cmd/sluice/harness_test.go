package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// execEnv makes this test binary run as sluice, so that tests use real
// processes, with the race detector if the tests have it.
const execEnv = "TEST_SLUICE_EXEC"

func TestMain(m *testing.M) {
	switch os.Getenv(execEnv) {
	case "sluice":
		main() // ends the process
	case "constant":
		constantServer(len(os.Args) > 1)
		return
	case "plain":
		plainServer(os.Args[1])
		return
	}
	os.Exit(m.Run())
}

// executable is the program that processes run.
var executable = os.Args[0]

// within is the longest time that a test waits for anything.
const within = 30 * time.Second

// patientStore is for configs of tests whose subject is not an outage: on a busy
// machine Redis may take longer than the default. The flag --redis has the URL.
const patientStore = "store: {redis: {url: 'redis://flag.invalid', timeout: 10s}}\n"

// eventually waits until cond returns true, and fails the test if it does not
// within the time of within. what completes "waited for" in the message.
func eventually(t testing.TB, what string, cond func() bool) {
	t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for late := time.After(within); !cond(); {
		select {
		case <-tick.C:
		case <-late:
			t.Fatalf("waited %v for %s", within, what)
		}
	}
}

// process is a running sluice.
type process struct {
	t    testing.TB
	cmd  *exec.Cmd
	done chan struct{} // closed when it has ended

	grpc, metrics, admin string // its addresses, as its log says

	isKilled bool // by kill

	mu  sync.Mutex
	log []string // its lines on stderr
}

// start runs sluice with args and further environment variables, each
// NAME=value. It does not wait until sluice is ready.
func start(t testing.TB, mode string, env []string, args ...string) *process {
	t.Helper()
	p := &process{t: t, cmd: exec.Command(executable, args...), done: make(chan struct{})}
	// By default a process with the race detector sleeps a second before it
	// ends.
	p.cmd.Env = append(os.Environ(), execEnv+"="+mode, "GORACE=atexit_sleep_ms=0")
	p.cmd.Env = append(p.cmd.Env, env...)
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	return p
}

// startSluice runs `sluice run` with args on free ports, and waits until it
// serves. At the end of the test it stops sluice, and fails the test if that
// fails.
func startSluice(t testing.TB, args ...string) *process {
	t.Helper()
	args = append([]string{"run", "--metrics", "127.0.0.1:0", "--admin", "127.0.0.1:0"}, args...)
	if !strings.Contains(strings.Join(args, " "), "--grpc") {
		args = append(args, "--grpc", "127.0.0.1:0")
	}
	p := start(t, "sluice", nil, args...)
	stderr, err := p.cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	serving := make(chan bool, 1)
	go func() {
		defer close(p.done)
		lines := bufio.NewScanner(stderr)
		lines.Buffer(nil, 1<<20)
		for lines.Scan() {
			p.mu.Lock()
			p.log = append(p.log, lines.Text())
			p.mu.Unlock()
			var line struct{ Msg, Grpc, Metrics, Admin string }
			if json.Unmarshal(lines.Bytes(), &line) == nil && line.Msg == "serving" {
				p.grpc, p.metrics, p.admin = line.Grpc, line.Metrics, line.Admin
				serving <- true
			}
		}
		_, _ = io.Copy(io.Discard, stderr)
		_ = p.cmd.Wait()
	}()
	t.Cleanup(func() {
		if p.stop() != 0 && !p.isKilled {
			t.Errorf("sluice ended with status %d:\n%s", p.cmd.ProcessState.ExitCode(), p.logged())
		}
	})
	select {
	case <-serving:
	case <-p.done:
		t.Fatalf("sluice %v ended:\n%s", args, p.logged())
	case <-time.After(within):
		t.Fatalf("sluice %v does not serve:\n%s", args, p.logged())
	}
	return p
}

func (p *process) logged() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return strings.Join(p.log, "\n")
}

// counted returns the sum of the metrics that a pattern matches.
func (p *process) counted(pattern string) (sum int) {
	p.t.Helper()
	_, metrics := get(p.t, "http://"+p.metrics+"/metrics")
	for _, m := range regexp.MustCompile(`(?m)^`+pattern+` (\d+)$`).FindAllStringSubmatch(metrics, -1) {
		n, err := strconv.Atoi(m[1])
		if err != nil {
			p.t.Fatal(err)
		}
		sum += n
	}
	return sum
}

// stop sends SIGTERM to the process and returns its exit status. The process
// may have ended before.
func (p *process) stop() int {
	p.t.Helper()
	_ = p.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-p.done:
	case <-time.After(within):
		_ = p.cmd.Process.Signal(syscall.SIGQUIT) // its goroutines' stacks say why
		<-p.done
		p.t.Errorf("sluice did not end within %v of SIGTERM:\n%s", within, p.logged())
	}
	return p.cmd.ProcessState.ExitCode()
}

// kill ends the process by SIGKILL, and waits for its end.
func (p *process) kill() {
	p.isKilled = true
	_ = p.cmd.Process.Kill()
	<-p.done
}

// sluice runs a command to its end and returns its exit status and what it
// printed.
func sluice(t testing.TB, env []string, args ...string) (status int, stdout, stderr string) {
	t.Helper()
	return sluiceWith(t, "", env, args...)
}

// sluiceWith is sluice with a text on stdin.
func sluiceWith(t testing.TB, stdin string, env []string, args ...string) (status int, stdout, stderr string) {
	t.Helper()
	p := start(t, "sluice", env, args...)
	var out, errs bytes.Buffer
	p.cmd.Stdin, p.cmd.Stdout, p.cmd.Stderr = strings.NewReader(stdin), &out, &errs
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	late := time.AfterFunc(within, func() { _ = p.cmd.Process.Kill() })
	_ = p.cmd.Wait()
	if !late.Stop() {
		t.Fatalf("sluice %v did not end within %v\n%s%s", args, within, out.String(), errs.String())
	}
	return p.cmd.ProcessState.ExitCode(), out.String(), errs.String()
}

// file writes a file into the test's directory and returns its path.
func file(t testing.TB, name, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}
