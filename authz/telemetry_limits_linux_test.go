package authz

import (
	"fmt"
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluiceproxy/sluice/limiter"
)

func namedLimits(prefix string, n int) []*limiter.Limit {
	limits := make([]*limiter.Limit, n)
	for i := range limits {
		limits[i] = &limiter.Limit{Name: fmt.Sprint(prefix, i)}
	}
	return limits
}

// A limit that changes its mode is one limit, with the series of its new mode.
func TestLimitChangesItsMode(t *testing.T) {
	s, registry, _ := newServer(t, "limits: [{name: a, rate: 1/s, mode: shadow}]", nil)
	old := s.config.Load()
	s.SetConfig(configOf(t, "limits: [{name: a, rate: 1/s}]"))
	// A check that began with the old config ends.
	s.report.limits.forLimit(old, old.Limits()[0]).limited.Inc()
	if all := s.Limits(); len(all) != 1 || all[0].Shadow {
		t.Errorf("got %v, want one enforced limit", all)
	}
	if counts(t, registry, `sluice_limit_decisions_total{decision="shadow_limited",limit="a"} 0`) ||
		!counts(t, registry, `sluice_limit_decisions_total{decision="limited",limit="a"} 0`) ||
		!counts(t, registry, `sluice_limit_decisions_total{decision="allowed",limit="a"} 0`) {
		t.Error("the series are not those of the limit in force")
	}
}

// A route's limit is kept across reloads and dropped when no check has named it
// for routeLimitLife.
func TestRouteLimitsAreSwept(t *testing.T) {
	s, registry, _ := newServer(t, "limits: [{name: a, rate: 1/s}]", nil)
	limits, now := s.report.limits, time.Now()
	limits.now = func() time.Time { return now }
	config := s.config.Load()
	named := func(name string) { limits.forLimit(config, &limiter.Limit{Name: name}) }
	has := func(name string) bool {
		return counts(t, registry, fmt.Sprintf(`sluice_limit_decisions_total{decision="limited",limit=%q} 0`, name))
	}
	named("idle")
	named("busy")
	s.SetConfig(configOf(t, "limits: [{name: b, rate: 1/s}]"))
	if !has("idle") || !has("busy") || has("a") {
		t.Error("a reload drops the limits of the old config, and no others")
	}
	for range 3 {
		now = now.Add(routeLimitLife / 2)
		named("busy")
	}
	named("new") // a sweep is due
	if has("idle") || !has("busy") || !has("new") || !has("b") {
		t.Errorf("idle %v, busy %v, new %v, b %v: want all but idle", has("idle"), has("busy"), has("new"), has("b"))
	}
}

// A reload takes time in proportion to its limits, also where a client's routes
// have named 20,000.
func TestManyLimitsReload(t *testing.T) {
	for _, before := range []string{"route", "config"} {
		t.Run(before, func(t *testing.T) {
			s, _, _ := newServer(t, "", nil)
			limits, config := s.report.limits, s.config.Load()
			if before == "route" {
				for _, l := range namedLimits("route-", 20_000) {
					limits.forLimit(config, l)
				}
			}
			quick := time.Hour
			for round := range 5 {
				few := namedLimits(fmt.Sprint("few-", round, "-"), 500)
				took := threadTime(func() { limits.setLimits(few) })
				if round > 1 { // the first removes what was there before
					quick = min(quick, took)
				}
			}
			limits.setLimits(namedLimits("old-", 10_000))

			renamed := namedLimits("new-", 10_000)
			many := threadTime(func() { limits.setLimits(renamed) })
			t.Logf("500 limits %v, 10,000 limits %v", quick, many)
			if many > 200*quick { // 20 times as many; were it quadratic, 400
				t.Errorf("10,000 limits took %v, 500 %v", many, quick)
			}
		})
	}
}

// threadTime is the processor time that do takes in its own thread, whatever
// else the machine does. getrusage(2) would tell it in steps of a timer tick,
// which is longer than a short do.
func threadTime(do func()) time.Duration {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	used := func() time.Duration {
		var t unix.Timespec
		if err := unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &t); err != nil {
			panic(err)
		}
		return time.Duration(t.Nano())
	}
	before := used()
	do()
	return used() - before
}

// No check waits for a reload: it holds the locks that a known limit is found
// without.
func TestLookupsDoNotWait(t *testing.T) {
	s, _, _ := newServer(t, "limits: [{name: a, rate: 1/s}]", nil)
	limits, config := s.report.limits, s.config.Load()
	route := &limiter.Limit{Name: "route"}
	limits.forLimit(config, route)
	limits.series.Lock()
	limits.forLimit(config, route)
	limits.mu.Lock()
	limits.forLimit(config, config.Limits()[0])
	limits.mu.Unlock()
	limits.series.Unlock()
}
