package main

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
)

// container is a root directory whose processes see only what was put into it,
// as in a container. It needs a [testenv.Machine], whose end removes its mounts.
type container struct {
	t    *testing.T
	root string
	user uint32
	dir  string // in which commands run
	env  []string
}

// newContainer makes a container in a directory of the machine, with /proc,
// /dev, /tmp and these lines of /etc/hosts. Its processes have the given user
// ID.
func newContainer(t *testing.T, dir string, user uint32, hosts string) *container {
	t.Helper()
	root, err := os.MkdirTemp(dir, "root-")
	if err != nil {
		t.Fatal(err)
	}
	c := &container{t: t, root: root, user: user, dir: "/", env: []string{"PATH=/bin"}}
	for name, mode := range map[string]fs.FileMode{"": 0o755, "bin": 0o755, "etc": 0o755, "tmp": 0o777} {
		path := filepath.Join(root, name)
		if err := errors.Join(os.MkdirAll(path, mode), os.Chmod(path, mode)); err != nil {
			t.Fatal(err)
		}
	}
	c.bind("/proc", "/proc", false)
	c.bind("/dev", "/dev", false)
	c.mount("tmpfs", "/dev/shm", "tmpfs", "mode=1777", 0)
	// A Go program that was built with cgo, as Debian's Prometheus, reads the
	// second file.
	for name, text := range map[string]string{"hosts": hosts, "nsswitch.conf": "hosts: files\n"} {
		if err := os.WriteFile(filepath.Join(root, "etc", name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return c
}

// mount mounts a file system at a directory of the container.
func (c *container) mount(source, target, kind, options string, flags uintptr) {
	c.t.Helper()
	path := filepath.Join(c.root, target)
	if err := os.MkdirAll(path, 0o755); err != nil {
		c.t.Fatal(err)
	}
	if err := syscall.Mount(source, path, kind, flags, options); err != nil {
		c.t.Fatalf("mount %s: %v", target, err)
	}
}

// bind makes a file or directory of the machine visible in the container.
func (c *container) bind(source, target string, readOnly bool) {
	c.t.Helper()
	info, err := os.Stat(source)
	if err != nil {
		c.t.Fatal(err)
	}
	path := filepath.Join(c.root, target)
	if info.IsDir() {
		err = os.MkdirAll(path, 0o755)
	} else if err = os.MkdirAll(filepath.Dir(path), 0o755); err == nil {
		err = os.WriteFile(path, nil, 0o600)
	}
	if err == nil {
		err = syscall.Mount(source, path, "", syscall.MS_BIND, "")
	}
	if err == nil && readOnly {
		err = syscall.Mount("", path, "", syscall.MS_BIND|syscall.MS_REMOUNT|syscall.MS_RDONLY, "")
	}
	if err != nil {
		c.t.Fatalf("%s at %s: %v", source, target, err)
	}
}

// install puts a program of the machine into the container, with the libraries
// that it needs.
func (c *container) install(program, target string) {
	c.t.Helper()
	c.bind(program, target, true)
	out, _ := exec.CommandContext(c.t.Context(), "ldd", program).Output() // fails for a static program
	for field := range strings.FieldsSeq(string(out)) {
		if strings.HasPrefix(field, "/") {
			c.bind(field, field, true)
		}
	}
}

// contained is a running process of a container.
type contained struct {
	cmd  *exec.Cmd
	done chan struct{} // closed when it has ended

	mu     sync.Mutex
	output bytes.Buffer
}

// Write appends to what the process printed.
func (p *contained) Write(text []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.output.Write(text)
}

func (p *contained) printed() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.output.String()
}

// start runs a command in the container. The first argument is a path in it, or
// the name of a program in its /bin. A process that still runs at the end of the
// test is stopped, and fails the test if that fails.
func (c *container) start(args ...string) *contained {
	c.t.Helper()
	path := args[0]
	if !strings.Contains(path, "/") {
		path = "/bin/" + path
	}
	p := &contained{done: make(chan struct{})}
	p.cmd = &exec.Cmd{Path: path, Args: args, Env: c.env, Dir: c.dir, Stdout: p, Stderr: p}
	p.cmd.SysProcAttr = &syscall.SysProcAttr{
		Chroot: c.root, Credential: &syscall.Credential{Uid: c.user, Gid: c.user}, Pdeathsig: syscall.SIGKILL,
	}
	if err := p.cmd.Start(); err != nil {
		c.t.Fatalf("%q: %v", args, err)
	}
	go func() {
		defer close(p.done)
		_ = p.cmd.Wait()
	}()
	c.t.Cleanup(func() {
		_ = p.cmd.Process.Signal(syscall.SIGTERM)
		eventually(c.t, fmt.Sprintf("the end of %q", args), func() bool {
			select {
			case <-p.done:
				return true
			default:
				return false
			}
		})
		if c.t.Failed() {
			c.t.Logf("%q: %v\n%s", args, p.cmd.ProcessState, p.printed())
		}
	})
	return p
}

// run runs a command in the container to its end.
func (c *container) run(args ...string) (status int, printed string) {
	c.t.Helper()
	p := c.start(args...)
	<-p.done
	return p.cmd.ProcessState.ExitCode(), p.printed()
}
