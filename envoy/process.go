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

// The bounds of Envoy's life.
const (
	readyWithin = 30 * time.Second
	stopWithin  = 5 * time.Second // of SIGTERM, after which it is killed
)

// Process is a running Envoy. Its methods are safe for concurrent use.
type Process struct {
	cmd  *exec.Cmd
	dir  string
	done chan struct{} // closed when it has ended and its files are gone
	err  error         // why it ended; read after done
}

// Start runs binary with a bootstrap and returns when it takes connections. Its standard output, which is its access log, goes
// to output. It is stopped with Stop, or when ctx ends; on Linux it is killed where this process is. Its only files are in a
// temporary directory, which goes with it.
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
		// Else it leaves shared memory behind, and two Envoys on one machine are in each other's way.
		"--disable-hot-restart",
		"--concurrency", "1",
		"--log-level", "error", "--component-log-level", "config:info,main:info", "--log-format", "%l %v")
	p.cmd.SysProcAttr = attributes()
	p.cmd.Cancel = func() error { return p.cmd.Process.Signal(syscall.SIGTERM) }
	p.cmd.WaitDelay = stopWithin
	// Through a pipe, also where output is a file: Envoy opens its standard output anew, and would write over what is there.
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
		trouble := read(log, started)
		_ = p.cmd.Wait() // the state says it
		_ = os.RemoveAll(dir)
		state := p.cmd.ProcessState.String()
		select {
		case <-started:
			if trouble != "" {
				state += "; it said: " + trouble
			}
			p.err = fmt.Errorf("Envoy ended: %s", state)
		default:
			p.err = fmt.Errorf("Envoy did not start: %s", cmp.Or(trouble, state))
		}
	}()
	late := time.NewTimer(readyWithin)
	defer late.Stop()
	select {
	case <-started:
		return p, nil
	case <-p.done:
		return nil, p.err
	case <-late.C:
		p.Stop()
		return nil, fmt.Errorf("Envoy did not start within %v", readyWithin)
	}
}

// read reads Envoy's log to its end, closes started when Envoy takes connections, and returns the first error that it logged
// since then, or before, if it never came to that.
func read(log io.Reader, started chan<- struct{}) (trouble string) {
	lines := bufio.NewScanner(log)
	lines.Buffer(nil, 1<<20)
	var workers, loop, up bool
	for lines.Scan() {
		line := lines.Text()
		switch {
		case strings.HasPrefix(line, "error ") || strings.HasPrefix(line, "critical "):
			if trouble == "" {
				_, trouble, _ = strings.Cut(line, " ")
			}
		case strings.Contains(line, "starting workers"):
			workers = true
		case strings.Contains(line, "starting main dispatch loop"):
			loop = true
		}
		// Its sockets listen just after the first, which is before the second. Only where a cluster's name has to be looked up
		// is the order the other way round.
		if workers && loop && !up {
			up, trouble = true, ""
			close(started)
		}
	}
	_, _ = io.Copy(io.Discard, log)
	return trouble
}

func (p *Process) adminFile() string { return filepath.Join(p.dir, "admin") }

// Done is closed when Envoy has ended, whoever ended it.
func (p *Process) Done() <-chan struct{} { return p.done }

// Err says why Envoy ended, after Done.
func (p *Process) Err() error { return p.err }

// Stop ends Envoy, and returns when it is gone. It may have ended already.
func (p *Process) Stop() {
	_ = p.cmd.Process.Signal(syscall.SIGTERM)
	late := time.AfterFunc(stopWithin, func() { _ = p.cmd.Process.Kill() })
	defer late.Stop()
	<-p.done
}

// Listener is where Envoy listens, IP:port, for a bootstrap that leaves the port to it (0). The bootstrap has to have an admin address.
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
		return "", fmt.Errorf("Envoy's list of its listeners: %w", err)
	}
	if len(all.ListenerStatuses) == 0 {
		return "", errors.New("Envoy has no listener")
	}
	a := all.ListenerStatuses[0].LocalAddress.SocketAddress
	return net.JoinHostPort(a.Address, strconv.Itoa(a.PortValue)), nil
}

// Admin is the address of Envoy's admin page, IP:port. Where the bootstrap has none, or Envoy has ended, it is an error.
func (p *Process) Admin() (string, error) {
	admin, err := os.ReadFile(p.adminFile())
	if err != nil {
		return "", fmt.Errorf("Envoy has no admin page: %w", err)
	}
	return string(admin), nil
}
