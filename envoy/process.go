package envoy

import (
	"bufio"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

const (
	// startTimeout is how long Envoy may take to start.
	startTimeout = 30 * time.Second
	// stopTimeout is how long Envoy may take to end after SIGTERM. Then it is
	// killed.
	stopTimeout = 5 * time.Second
)

// Process is a running Envoy. Its methods are safe for concurrent use.
type Process struct {
	cmd  *exec.Cmd
	dir  string
	done chan struct{} // closed when Envoy has exited and its files are removed
	err  error         // why it exited; valid after done is closed
}

// Start runs binary with a bootstrap and returns when Envoy accepts
// connections. Envoy's standard output, which is its access log, is copied to
// output. Envoy ends with Stop or when ctx ends; on Linux it is killed if this
// process ends. Its only files are in a temporary directory, which is removed
// when Envoy has exited. Start returns an error if Envoy exits or is not ready
// within 30 s.
func Start(ctx context.Context, binary string, bootstrap []byte, output io.Writer) (*Process, error) {
	dir, err := os.MkdirTemp("", "sluice-envoy-")
	if err != nil {
		return nil, err
	}
	p := &Process{dir: dir, done: make(chan struct{})}
	config := filepath.Join(dir, "envoy.yaml")
	if err := os.WriteFile(config, bootstrap, 0o600); err != nil {
		_ = os.RemoveAll(dir)
		return nil, err
	}
	p.cmd = exec.CommandContext(ctx, binary, "--config-path", config, "--admin-address-path", p.adminFile(),
		// Hot restart leaves shared memory behind and keeps a second Envoy on
		// the machine from starting.
		"--disable-hot-restart",
		"--concurrency", "1",
		"--log-level", "error", "--component-log-level", "config:info,main:info", "--log-format", "%l %v")
	p.cmd.SysProcAttr = sysProcAttr()
	p.cmd.Cancel = func() error { return p.cmd.Process.Signal(syscall.SIGTERM) }
	p.cmd.WaitDelay = stopTimeout
	// A pipe, also if output is a file: Envoy reopens its standard output and
	// would overwrite the file.
	p.cmd.Stdout = struct{ io.Writer }{output}
	log, err := p.cmd.StderrPipe()
	if err != nil {
		_ = os.RemoveAll(dir)
		return nil, err
	}
	if err := p.cmd.Start(); err != nil {
		_ = os.RemoveAll(dir)
		return nil, err
	}

	started := make(chan struct{})
	go func() {
		defer close(p.done)
		firstError := readLog(log, started)
		_ = p.cmd.Wait() // ProcessState has the result
		_ = os.RemoveAll(dir)
		state := p.cmd.ProcessState.String()
		select {
		case <-started:
			if firstError != "" {
				state += "; it logged: " + firstError
			}
			p.err = fmt.Errorf("Envoy exited: %s", state)
		default:
			p.err = fmt.Errorf("Envoy did not start: %s", cmp.Or(firstError, state))
		}
	}()
	late := time.NewTimer(startTimeout)
	defer late.Stop()
	select {
	case <-started:
		return p, nil
	case <-p.done:
		return nil, p.err
	case <-late.C:
		p.Stop()
		return nil, fmt.Errorf("Envoy did not start within %v", startTimeout)
	}
}

// readLog reads Envoy's log to its end and closes started when Envoy accepts
// connections. It returns the first error that Envoy logged after that, or, if
// Envoy never did, the first of all.
func readLog(log io.Reader, started chan<- struct{}) (firstError string) {
	lines := bufio.NewScanner(log)
	lines.Buffer(nil, 1<<20)
	var workers, loop, up bool
	for lines.Scan() {
		line := lines.Text()
		switch {
		case strings.HasPrefix(line, "error ") || strings.HasPrefix(line, "critical "):
			if firstError == "" {
				_, firstError, _ = strings.Cut(line, " ")
			}
		case strings.Contains(line, "starting workers"):
			workers = true
		case strings.Contains(line, "starting main dispatch loop"):
			loop = true
		}
		// Envoy listens just after it starts its workers, which is before the
		// dispatch loop starts. The order is reversed only if the name of a
		// cluster has to be resolved.
		if workers && loop && !up {
			up, firstError = true, ""
			close(started)
		}
	}
	_, _ = io.Copy(io.Discard, log)
	return firstError
}

// adminFile is where Envoy writes the address of its admin interface.
func (p *Process) adminFile() string { return filepath.Join(p.dir, "admin") }

// Done returns a channel that is closed when Envoy has exited, for whatever
// reason.
func (p *Process) Done() <-chan struct{} { return p.done }

// Err returns why Envoy exited. It is valid after Done is closed.
func (p *Process) Err() error { return p.err }

// Stop ends Envoy and returns when it has exited. It may be called again.
func (p *Process) Stop() {
	_ = p.cmd.Process.Signal(syscall.SIGTERM)
	late := time.AfterFunc(stopTimeout, func() { _ = p.cmd.Process.Kill() })
	defer late.Stop()
	<-p.done
}

// Listener returns the address on which Envoy listens, IP:port, if the
// bootstrap has port 0. The bootstrap must have an admin address.
func (p *Process) Listener(ctx context.Context) (string, error) {
	admin, err := p.Admin()
	if err != nil {
		return "", err
	}
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+admin+"/listeners?format=json", nil)
	if err != nil {
		return "", err
	}
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		return "", err
	}
	defer func() { _ = response.Body.Close() }()
	var all struct {
		ListenerStatuses []struct {
			LocalAddress struct {
				SocketAddress struct {
					Address   string
					PortValue int `json:"port_value"`
				} `json:"socket_address"`
			} `json:"local_address"`
		} `json:"listener_statuses"`
	}
	if err := json.NewDecoder(response.Body).Decode(&all); err != nil {
		return "", fmt.Errorf("decode Envoy's listeners: %w", err)
	}
	if len(all.ListenerStatuses) == 0 {
		return "", errors.New("Envoy has no listener")
	}
	a := all.ListenerStatuses[0].LocalAddress.SocketAddress
	return net.JoinHostPort(a.Address, strconv.Itoa(a.PortValue)), nil
}

// Admin returns the address of Envoy's admin interface, IP:port. It returns an
// error if the bootstrap has none or Envoy has exited.
func (p *Process) Admin() (string, error) {
	admin, err := os.ReadFile(p.adminFile())
	if err != nil {
		return "", fmt.Errorf("Envoy has no admin address: %w", err)
	}
	return string(admin), nil
}
