//go:build linux || darwin

package limiter

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// clockOf returns one of the system's clocks, in microseconds.
func clockOf(clock int32) func() int64 {
	return func() int64 {
		var now unix.Timespec
		if err := unix.ClockGettime(clock, &now); err != nil { // every kernel that Go runs on has it
			panic(fmt.Sprintf("clock %d: %v", clock, err))
		}
		return now.Nano() / 1000
	}
}
