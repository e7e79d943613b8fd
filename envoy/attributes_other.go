//go:build !linux

package envoy

import "syscall"

// attributes are how a child runs: in a process group of its own, since a terminal's Ctrl-C is for us to pass on (to Envoy after
// sluice has drained). Only Linux can end a process with its parent.
func attributes() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Setpgid: true}
}
