package main

import (
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/sluiceproxy/sluice/limiter/redistest"
)

// TestThreeSidecarsShareABucket checks that three sidecars on one Redis, behind
// one Envoy, together grant a key what its limit allows.
func TestThreeSidecarsShareABucket(t *testing.T) {
	const rate, burst, callers, lasts = 150, 300, 64, 5 * time.Second
	redis := redistest.Start(t)
	up := startUpstream(t)
	// This test counts and does not measure time. On a busy machine an answer
	// may take long.
	config := file(t, "sluice.yaml", fmt.Sprintf(`
store: {redis: {url: %q, timeout: %v}}
limits: [{name: all, key: client.ip, rate: %d/s, burst: %d}]
`, redis.URL(), within, rate, burst))
	patient := func(bootstrap string) string { return strings.Replace(bootstrap, "timeout: 0.2s", "timeout: 30s", 1) }
	var ports []string
	for range 3 {
		p := startSluice(t, "--config", config)
		ports = append(ports, strings.TrimPrefix(p.grpc, "127.0.0.1:"))
	}
	addr := startEnvoy(t, "127.0.0.1:"+ports[0], up.Listener.Addr().String(), patient, func(bootstrap string) string {
		// The last endpoint of the bootstrap is sluice's. The others are added
		// beside it.
		one := `
        - endpoint:
            address:
              socket_address: { address: "127.0.0.1", port_value: %s }`
		return strings.TrimRight(bootstrap, "\n") + fmt.Sprintf(one+one+"\n", ports[1], ports[2])
	})
	c := client(t)
	var granted, denied atomic.Int64
	began := time.Now()
	until := began.Add(lasts)
	var wg sync.WaitGroup
	for range callers {
		wg.Go(func() {
			for time.Now().Before(until) {
				switch r, body := fetch(t, c, "http://"+addr+"/"); r.StatusCode {
				case 200:
					granted.Add(1)
				case 429:
					denied.Add(1)
				default:
					t.Errorf("%d %s", r.StatusCode, body)
				}
			}
		})
	}
	wg.Wait()
	took := time.Since(began)
	most := burst + rate*took.Seconds()
	least := .98 * (burst + rate*lasts.Seconds())
	if n := float64(granted.Load()); n > most || n < least {
		t.Errorf("%v granted in %v, want %.0f to %.0f", n, took, least, most)
	}
	t.Logf("%d granted and %d denied in %v: at most %.0f, at least %.0f", granted.Load(), denied.Load(), took, most, least)
	if denied.Load() < granted.Load() {
		t.Errorf("only %d denied: the load was too low to say anything", denied.Load())
	}
}

// watched requests one URL all the time, and keeps the answers since the last
// reset.
type watched struct {
	name    string
	mu      sync.Mutex
	answers map[string]int
	slowest time.Duration
	last    string
	streak  int // how many of the last answers were the same
}

func (w *watched) saw(answer string, took time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.answers[answer]++
	w.slowest = max(w.slowest, took)
	if w.streak++; answer != w.last {
		w.last, w.streak = answer, 1
	}
}

// reset returns what was seen, and forgets it.
func (w *watched) reset() (answers map[string]int, slowest time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	answers, slowest = w.answers, w.slowest
	w.answers, w.slowest, w.streak = make(map[string]int), 0, 0
	return answers, slowest
}

// settled reports whether the latest answers were all the same as answer.
func (w *watched) settled(answer string) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.last == answer && w.streak >= 20
}

// TestRedisFaultsThroughEnvoy stops, restarts, freezes and thaws Redis under
// load. It checks that each failure mode answers as documented, in time, and
// ends soon after.
func TestRedisFaultsThroughEnvoy(t *testing.T) {
	const budget, recovers = 100 * time.Millisecond, 2 * time.Second
	redis := redistest.Start(t)
	up := startUpstream(t)
	const ok = "200 counted"
	failing := map[string]string{
		"deny":     "503 from sluice",
		"allow":    "200",
		"delegate": "503 from Envoy",
	}
	var all []*watched
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for mode := range failing {
		p := startSluice(t, "--config", file(t, "sluice.yaml", fmt.Sprintf(`
on_failure: %s
store: {redis: {url: %q, timeout: %v}}
limits: [{name: all, rate: 1000000/s}]
`, mode, redis.URL(), budget)))
		// By its own 0.2 s Envoy would give up what a busy machine answers 100 ms late.
		addr := startEnvoy(t, p.grpc, up.Listener.Addr().String(), replaced(t, "timeout: 0.2s", "timeout: 0.5s"))
		w := &watched{name: mode, answers: make(map[string]int)}
		all = append(all, w)
		for range 4 {
			c := client(t)
			wg.Go(func() {
				tick := time.NewTicker(5 * time.Millisecond)
				defer tick.Stop()
				for {
					select {
					case <-stop:
						return
					case <-tick.C:
					}
					began := time.Now()
					r, body := fetch(t, c, "http://"+addr+"/")
					answer := fmt.Sprint(r.StatusCode)
					switch {
					case r.Header.Get("X-Ratelimit-Limit") != "":
						answer += " counted"
					case strings.Contains(body, "Rate Limiter Unavailable"):
						answer += " from sluice"
					case r.StatusCode == 503:
						answer += " from Envoy"
					}
					w.saw(answer, time.Since(began))
				}
			})
		}
	}
	defer func() {
		close(stop)
		wg.Wait()
	}()
	settle := func(what string, want func(mode string) string) {
		t.Helper()
		began := time.Now()
		eventually(t, what, func() bool {
			for _, w := range all {
				if !w.settled(want(w.name)) {
					return false
				}
			}
			return true
		})
		t.Logf("%s after %v", what, time.Since(began).Round(time.Millisecond))
	}
	good := func(string) string { return ok }
	bad := func(mode string) string { return failing[mode] }
	settle("all is well", good)

	for _, fault := range []struct {
		name       string
		begin, end func()
	}{
		{"stopped", redis.Shutdown, redis.Restart},
		{"frozen", redis.Freeze, redis.Thaw},
		{"killed", redis.Kill, redis.Restart},
	} {
		for _, w := range all {
			w.reset()
		}
		fault.begin()
		settle(fault.name, bad)
		for _, w := range all {
			answers, slowest := w.reset()
			t.Logf("%s, %s: %v, the slowest in %v", fault.name, w.name, answers, slowest)
			if slowest > budget+slack {
				t.Errorf("%s, %s: an answer took %v of a budget of %v", fault.name, w.name, slowest, budget)
			}
			for answer := range answers {
				if answer != ok && answer != failing[w.name] {
					t.Errorf("%s, %s: answered %s", fault.name, w.name, answer)
				}
			}
		}
		fault.end()
		began := time.Now()
		settle(fault.name+" is over", good)
		if took := time.Since(began); took > recovers {
			t.Errorf("%s: recovered only after %v", fault.name, took)
		}
	}
}
