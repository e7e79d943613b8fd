package limiter

import "golang.org/x/sys/unix"

// bootClock returns a clock in microseconds that never steps, and that also runs
// while the machine sleeps, as CLOCK_MONOTONIC does not on Linux.
func bootClock() func() int64 { return clockOf(unix.CLOCK_BOOTTIME) }
