package limiter

import "golang.org/x/sys/unix"

// bootClock returns a clock in microseconds that never steps, and that also runs
// while the machine sleeps, as this one does on macOS.
func bootClock() func() int64 { return clockOf(unix.CLOCK_MONOTONIC) }
