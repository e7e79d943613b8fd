package envoy

import "syscall"

// attributes are how a child runs: in a process group of its own, since a terminal's Ctrl-C is for us to pass on (to Envoy after
// sluice has drained), and not longer than this process. The kernel means by that the thread that started it, which Go ends
// only with a goroutine that is locked to it.
func attributes() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
}
