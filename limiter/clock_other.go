//go:build !(linux || darwin)

package limiter

import "time"

// bootClock returns a clock in microseconds that never steps. Whether it also
// runs while the machine sleeps depends on the system.
func bootClock() func() int64 {
	start := time.Now()
	return func() int64 { return time.Since(start).Microseconds() }
}
