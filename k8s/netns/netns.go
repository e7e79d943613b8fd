//go:build linux

// Package netns gives a test a network of its own: for programs that listen on fixed ports or on all addresses, and for addresses that this
// machine does not have.
package netns

import (
	"net"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"unsafe"
)

// networkEnv says that the test runs in a network namespace of its own.
const networkEnv = "SLUICE_TEST_NETWORK"

// Own runs the test once more, in a process with a network of its own where nobody else is and whose ports are all free, and
// reports whether this is that process. Its loopback interface has the addresses, too.
func Own(t *testing.T, addresses ...string) bool {
	t.Helper()
	if os.Getenv(networkEnv) != "" {
		raiseLoopback(t, addresses)
		return true
	}
	again := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^"+t.Name()+"$", "-test.v", "-test.count=1")
	again.Env = append(os.Environ(), networkEnv+"=1")
	again.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
	if os.Getuid() != 0 {
		again.SysProcAttr.Cloneflags |= syscall.CLONE_NEWUSER
		again.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{HostID: os.Getuid(), Size: 1}}
		again.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{HostID: os.Getgid(), Size: 1}}
	}
	out, err := again.CombinedOutput()
	t.Logf("in a network of its own:\n%s", out)
	if err != nil || !strings.Contains(string(out), "--- PASS: "+t.Name()) {
		t.Errorf("%v", err)
	}
	return false
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
