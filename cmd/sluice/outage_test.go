package main

import (
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"github.com/sluiceproxy/sluice/limiter"
	"github.com/sluiceproxy/sluice/limiter/redistest"
)

// TestOutages checks what is logged about times in which Redis does not answer.
func TestOutages(t *testing.T) {
	core, logged := observer.New(zap.InfoLevel)
	nodes, checks := 0, map[limiter.Outcome]uint64{limiter.FailedClosed: 3}
	o := outages{
		log: zap.New(core), unreachable: func() int { return nodes },
		checks: func() map[limiter.Outcome]uint64 { return maps.Clone(checks) },
	}
	began := time.Unix(1_000_000, 0)
	look := func(after time.Duration, want ...string) {
		t.Helper()
		o.look(began.Add(after))
		var got []string
		for _, e := range logged.TakeAll() {
			got = append(got, fmt.Sprint(e.Level, " ", e.Message, " ", e.ContextMap()))
		}
		if strings.Join(got, "\n") != strings.Join(want, "\n") {
			t.Errorf("after %v:\n got %v\nwant %v", after, got, want)
		}
	}
	look(0)
	checks[limiter.FailedClosed] += 5 // these open the breaker
	nodes = 1
	look(time.Second, "warn circuit breaker open, Redis does not answer map[nodes:1]")
	checks[limiter.FailedClosed] += 35
	checks[limiter.FailedLocal] += 7
	nodes = 2
	look(2 * time.Second)
	nodes = 0
	look(91500*time.Millisecond, "info Redis answers again map[after:1m30.5s failed_closed:40 failed_local:7]")
	look(92 * time.Second)
	nodes = 1
	look(93*time.Second, "warn circuit breaker open, Redis does not answer map[nodes:1]")
	nodes = 0
	look(94*time.Second, "info Redis answers again map[after:1s]")
	look(95 * time.Second)
	checks[limiter.FailedClosed] += 2 // the first of those that open the breaker
	look(96 * time.Second)
	checks[limiter.FailedClosed] += 3
	nodes = 1
	look(97*time.Second, "warn circuit breaker open, Redis does not answer map[nodes:1]")
	nodes = 0
	look(98*time.Second, "info Redis answers again map[after:1s failed_closed:5]")
}

// TestLogTellsOfAnOutage checks that a sidecar logs that its Redis went away and
// came back, and how many requests it refused meanwhile.
func TestLogTellsOfAnOutage(t *testing.T) {
	redis := redistest.Start(t)
	p := startSluice(t, "--redis", redis.URL(), "--config", file(t, "sluice.yaml", "limits: [{name: all, rate: 1000000/s}]\n"))
	conn := dial(t, p.grpc)
	eventually(t, "an answer", func() bool { return check(t, conn, from("203.0.113.1", "/")) == "ok" })
	redis.Kill()
	refused := 0
	eventually(t, "the open breaker", func() bool {
		if check(t, conn, from("203.0.113.1", "/")) == "503" {
			refused++
		}
		return strings.Contains(p.logged(), "circuit breaker open, Redis does not answer")
	})
	redis.Restart()
	eventually(t, "the end of the outage", func() bool {
		if check(t, conn, from("203.0.113.1", "/")) == "503" {
			refused++
		}
		return strings.Contains(p.logged(), "Redis answers again")
	})
	for line := range strings.Lines(p.logged()) {
		var l struct {
			Msg    string
			After  float64
			Failed int `json:"failed_closed"`
		}
		if json.Unmarshal([]byte(line), &l) == nil && l.Msg == "Redis answers again" && (l.Failed != refused || l.After <= 0) {
			t.Errorf("%d were refused: %s", refused, line)
		}
	}
}

// TestLogTellsWhatChanged checks what a start and a reload say of the config, in
// log and metrics.
func TestLogTellsWhatChanged(t *testing.T) {
	config := file(t, "sluice.yaml", "limits:\n- {name: a, rate: 1/s}\n- {name: b, rate: 1/s}\n")
	p := startSluice(t, "--config", config)
	said := func(message string) (l struct {
		Config, Mode, Version             string
		Limits, Warnings                  int
		Shadow                            int `json:"shadow_limits"`
		Added, Removed, Changed, Settings []string
	}) {
		t.Helper()
		eventually(t, message, func() bool { return strings.Contains(p.logged(), `"`+message+`"`) })
		for line := range strings.Lines(p.logged()) {
			if strings.Contains(line, `"`+message+`"`) {
				if err := json.Unmarshal([]byte(line), &l); err != nil {
					t.Fatal(err)
				}
			}
		}
		return l
	}
	if l := said("serving"); l.Config != config || l.Mode != "enforce" || l.Limits != 2 || l.Shadow != 0 || l.Version == "" {
		t.Errorf("%+v", l)
	}
	metrics := func(want ...string) {
		t.Helper()
		_, text := get(t, "http://"+p.metrics+"/metrics")
		for _, w := range want {
			if !strings.Contains(text, w) {
				t.Errorf("no %s", w)
			}
		}
	}
	metrics(`sluice_config_limits{mode="enforce"} 2`, `sluice_config_limits{mode="shadow"} 0`,
		`sluice_build_info{version="`+buildVersion()+`"} 1`)
	var text strings.Builder
	text.WriteString("log_level: debug\nlimits:\n- {name: b, rate: 2/s}\n- {name: idle, rate: 2/s, cost: 0, mode: shadow}\n")
	for i := range 30 {
		fmt.Fprintf(&text, "- {name: new-%d, rate: 1/s}\n", i)
	}
	if err := os.WriteFile(config, []byte(text.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	l := said("config reloaded")
	if len(l.Added) != 21 || l.Added[0] != "idle" || l.Added[20] != "and 11 more" || fmt.Sprint(l.Removed) != "[a]" ||
		fmt.Sprint(l.Changed) != "[b]" || fmt.Sprint(l.Settings) != "[log_level]" || l.Limits != 32 || l.Shadow != 1 ||
		l.Warnings != 1 {
		t.Errorf("%+v", l)
	}
	eventually(t, "the metrics", func() bool {
		_, text := get(t, "http://"+p.metrics+"/metrics")
		return strings.Contains(text, `sluice_config_limits{mode="enforce"} 31`)
	})
	metrics(`sluice_config_limits{mode="shadow"} 1`)
}
