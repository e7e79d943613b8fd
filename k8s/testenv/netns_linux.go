package testenv

import (
	"errors"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"unsafe"
)

// Environment variables that a test passes to its child process.
const (
	isolatedEnv = "SLUICE_TEST_ISOLATED" // set in the child process
	dirEnv      = "SLUICE_TEST_DIR"      // the directory that Machine returns
)

// Network runs the calling test again in a child process with its own network
// namespace, in which every port is free, and reports whether the caller is
// that child. The parent must return if Network returns false; it fails if the
// child fails. In the child the loopback interface has the given IPv4
// addresses as well. It needs root or user namespaces.
func Network(t *testing.T, addresses ...string) bool {
	t.Helper()
	if os.Getenv(isolatedEnv) != "" {
		raiseLoopback(t, addresses)
		return true
	}
	attr := &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
	if os.Getuid() != 0 {
		attr.Cloneflags |= syscall.CLONE_NEWUSER
		attr.UidMappings = []syscall.SysProcIDMap{{HostID: os.Getuid(), Size: 1}}
		attr.GidMappings = []syscall.SysProcIDMap{{HostID: os.Getgid(), Size: 1}}
	}
	runChild(t, attr)
	return false
}

// Machine runs the calling test again in a child process that has PID, mount
// and network namespaces of its own, and reports whether the caller is that
// child, as Network does. When the child ends, all processes that it started
// end and its mounts are gone. /run, /var/lib and /var/log are empty in it. It
// needs root.
//
// dir is a temporary directory that the parent removes once the child has
// ended. The parent calls prepare with it before it starts the child. Control
// groups may be created below Cgroup(dir) and are removed as well.
func Machine(t *testing.T, prepare func(dir string), addresses ...string) (dir string, inside bool) {
	t.Helper()
	if os.Getenv(isolatedEnv) != "" {
		raiseLoopback(t, addresses)
		mount := func(source, target, kind string, flags uintptr) {
			if err := syscall.Mount(source, target, kind, flags, ""); err != nil {
				t.Fatalf("mount %s: %v", target, err)
			}
		}
		mount("", "/", "", syscall.MS_REC|syscall.MS_PRIVATE)
		mount("proc", "/proc", "proc", 0)
		for _, path := range []string{"/run", "/var/lib", "/var/log"} {
			mount("tmpfs", path, "tmpfs", 0)
		}
		return os.Getenv(dirEnv), true
	}
	if os.Getuid() != 0 {
		t.Fatal("this test needs root for its own PID, mount and network namespaces")
	}
	dir = t.TempDir()
	prepare(dir)
	// A kubelet sets these kernel parameters, which have no namespace.
	for _, path := range []string{
		"vm/overcommit_memory", "vm/panic_on_oom", "kernel/panic", "kernel/panic_on_oops",
		"kernel/keys/root_maxkeys", "kernel/keys/root_maxbytes",
	} {
		path = filepath.Join("/proc/sys", path)
		before, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		defer func() {
			if err := os.WriteFile(path, before, 0); err != nil {
				t.Error(err)
			}
		}()
	}
	defer removeCgroups(t, Cgroup(dir))
	t.Setenv(dirEnv, dir)
	runChild(t, &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS | syscall.CLONE_NEWPID})
	return "", false
}

// Cgroup returns the name of the control group for the processes of the Machine
// whose directory is dir.
func Cgroup(dir string) string { return "sluice-" + filepath.Base(filepath.Dir(dir)) }

// removeCgroups removes the control groups with this name and their children,
// in every hierarchy. They must have no processes.
func removeCgroups(t *testing.T, name string) {
	t.Helper()
	const root = "/sys/fs/cgroup"
	found, err := filepath.Glob(filepath.Join(root, "*", name))
	if err != nil {
		t.Error(err)
	}
	for _, top := range append(found, filepath.Join(root, name)) {
		var groups []string
		err := filepath.WalkDir(top, func(path string, d fs.DirEntry, err error) error {
			if err == nil && d.IsDir() {
				groups = append(groups, path)
			}
			return err
		})
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.Error(err)
		}
		for _, group := range slices.Backward(groups) {
			if err := os.Remove(group); err != nil {
				t.Error(err)
			}
		}
	}
}

// runChild runs the test again in a child process, and fails if it fails there.
func runChild(t *testing.T, attr *syscall.SysProcAttr) {
	t.Helper()
	child := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^"+t.Name()+"$", "-test.v", "-test.count=1")
	child.Env = append(os.Environ(), isolatedEnv+"=1")
	child.SysProcAttr = attr
	child.SysProcAttr.Pdeathsig = syscall.SIGKILL
	out, err := child.CombinedOutput()
	t.Logf("child process:\n%s", out)
	if err != nil || !strings.Contains(string(out), "--- PASS: "+t.Name()) {
		t.Errorf("%v", err)
	}
}

// raiseLoopback brings up the loopback interface and adds IPv4 addresses to it.
// It does not run ip(8), which is not installed everywhere.
func raiseLoopback(t *testing.T, addresses []string) {
	t.Helper()
	socket, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_DGRAM, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = syscall.Close(socket) }()
	type ifreq struct { // of netdevice(7)
		name  [syscall.IFNAMSIZ]byte
		value [24]byte
	}
	do := func(what uintptr, name string, value ...byte) {
		var r ifreq
		copy(r.name[:], name)
		copy(r.value[:], value)
		//nolint:gosec // ioctl takes a pointer
		if _, _, errno := syscall.Syscall(syscall.SYS_IOCTL, uintptr(socket), what,
			uintptr(unsafe.Pointer(&r))); errno != 0 {
			t.Fatalf("%s: %v", name, errno)
		}
	}
	do(syscall.SIOCSIFFLAGS, "lo", syscall.IFF_UP|syscall.IFF_RUNNING)
	for i, address := range addresses {
		ip := net.ParseIP(address).To4()
		do(syscall.SIOCSIFADDR, "lo:"+strconv.Itoa(i+1), append([]byte{syscall.AF_INET, 0, 0, 0}, ip...)...)
	}
}
