//go:build linux

// Package isolated gives a test a network of its own, or a machine: for programs that listen on fixed ports or on all addresses, for
// addresses that this machine does not have, and for what starts and mounts things that it does not end.
package isolated

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

const (
	isolatedEnv = "SLUICE_TEST_ISOLATED" // says that the test runs inside
	dirEnv      = "SLUICE_TEST_DIR"      // Machine's directory
)

// Network runs the test once more, in a process with a network of its own where nobody else is and whose ports are all free, and
// reports whether this is that process. Its loopback interface has the addresses, too.
func Network(t *testing.T, addresses ...string) bool {
	t.Helper()
	if os.Getenv(isolatedEnv) != "" {
		raiseLoopback(t, addresses)
		return true
	}
	attributes := &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
	if os.Getuid() != 0 {
		attributes.Cloneflags |= syscall.CLONE_NEWUSER
		attributes.UidMappings = []syscall.SysProcIDMap{{HostID: os.Getuid(), Size: 1}}
		attributes.GidMappings = []syscall.SysProcIDMap{{HostID: os.Getgid(), Size: 1}}
	}
	again(t, attributes)
	return false
}

// Machine is Network for a test that is a whole machine, which only root can have: the test is its first process, and all others end with
// it; what it mounts goes, too; and /run, /var/lib and /var/log are empty. inside reports whether this is that process; dir is a directory
// that is removed when the machine is no more, which prepare has filled before it was there. Control groups may be made below Cgroup(dir).
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
		t.Fatal("it wants a machine of its own, which only root can have")
	}
	dir = t.TempDir()
	prepare(dir)
	// What a kubelet sets, which no namespace keeps to itself.
	for _, path := range []string{"vm/overcommit_memory", "vm/panic_on_oom", "kernel/panic", "kernel/panic_on_oops", "kernel/keys/root_maxkeys", "kernel/keys/root_maxbytes"} {
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
	again(t, &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS | syscall.CLONE_NEWPID})
	return "", false
}

// Cgroup is the name of the control group for what runs in the Machine with this directory.
func Cgroup(dir string) string { return "sluice-" + filepath.Base(filepath.Dir(dir)) }

// removeCgroups removes the groups of that name with all below them, in each hierarchy; they are empty of processes.
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

// again runs the test once more, in a process with these attributes, and fails with it.
func again(t *testing.T, attributes *syscall.SysProcAttr) {
	t.Helper()
	inner := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^"+t.Name()+"$", "-test.v", "-test.count=1")
	inner.Env = append(os.Environ(), isolatedEnv+"=1")
	inner.SysProcAttr = attributes
	inner.SysProcAttr.Pdeathsig = syscall.SIGKILL
	out, err := inner.CombinedOutput()
	t.Logf("isolated:\n%s", out)
	if err != nil || !strings.Contains(string(out), "--- PASS: "+t.Name()) {
		t.Errorf("%v", err)
	}
}

// raiseLoopback does what `ip link set lo up` and `ip address add` do, which are not everywhere.
func raiseLoopback(t *testing.T, addresses []string) {
	t.Helper()
	socket, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_DGRAM, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = syscall.Close(socket) }()
	type request struct { // the kernel's ifreq
		name  [syscall.IFNAMSIZ]byte
		value [24]byte
	}
	do := func(what uintptr, name string, value ...byte) {
		var r request
		copy(r.name[:], name)
		copy(r.value[:], value)
		//nolint:gosec // the kernel wants a pointer
		if _, _, errno := syscall.Syscall(syscall.SYS_IOCTL, uintptr(socket), what, uintptr(unsafe.Pointer(&r))); errno != 0 {
			t.Fatalf("%s: %v", name, errno)
		}
	}
	do(syscall.SIOCSIFFLAGS, "lo", syscall.IFF_UP|syscall.IFF_RUNNING)
	for i, address := range addresses {
		ip := net.ParseIP(address).To4()
		do(syscall.SIOCSIFADDR, "lo:"+strconv.Itoa(i+1), append([]byte{syscall.AF_INET, 0, 0, 0}, ip...)...)
	}
}
