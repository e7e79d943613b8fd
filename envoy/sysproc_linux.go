package envoy

import "syscall"

// sysProcAttr returns how a child process runs. It has a process group of its
// own, so that a terminal's Ctrl-C reaches only this process, which stops Envoy
// after sluice has drained. The kernel kills it when this process ends:
// strictly, when the thread that started it ends, which Go ends only together
// with a goroutine locked to it.
func sysProcAttr() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
}
