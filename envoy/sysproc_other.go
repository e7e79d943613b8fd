//go:build !linux

package envoy

import "syscall"

// sysProcAttr returns how a child process runs. It has a process group of its
// own, so that a terminal's Ctrl-C reaches only this process, which stops Envoy
// after sluice has drained. Only Linux can end a child with its parent.
func sysProcAttr() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Setpgid: true}
}
