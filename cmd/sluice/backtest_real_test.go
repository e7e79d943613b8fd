package main

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/sluiceproxy/sluice/limiter/redistest"
)

// TestBacktestAgrees sends requests of 200 keys through Envoy while a real Redis
// decides, and then plays Envoy's log through the same config. With times in
// microseconds the backtest says of each limit what the metrics said, but for a
// thousandth of the requests at most: the log has when a request began, and Redis
// decided a little later. With times in seconds what the metrics said lies
// between the two readings; with SLUICE_LONG=1 the log is long enough for that,
// as the seconds in which it begins and ends count as whole ones.
func TestBacktestAgrees(t *testing.T) {
	requests, isLong := 5000, os.Getenv("SLUICE_LONG") != ""
	if isLong {
		requests = 50_000
	}
	store := redistest.Start(t)
	redis := fmt.Sprintf("store: {redis: {url: %s, timeout: 5s}}\n", store.URL())
	config := file(t, "sluice.yaml", redis+"limits: [{name: none, match: {paths: [/never]}, rate: 1/s}]\n")
	p := startSluice(t, "--config", config)
	up := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	t.Cleanup(up.Close)
	log := filepath.Join(t.TempDir(), "access.log")
	addr := startEnvoy(t, p.grpc, up.Listener.Addr().String(), patiently(t), func(bootstrap string) string {
		changed := replaced(t,
			"name: envoy.access_loggers.stdout", "name: envoy.access_loggers.file",
			"envoy.extensions.access_loggers.stream.v3.StdoutAccessLog\n",
			"envoy.extensions.access_loggers.file.v3.FileAccessLog\n              path: "+log+"\n",
			"[%START_TIME%]", "[%START_TIME(%Y-%m-%dT%H:%M:%S.%6fZ)%]",
		)(bootstrap)
		return strings.Replace(changed, "id=%REQ(X-REQUEST-ID)%", "api_key=%REQ(X-API-KEY)% full_path=%REQ(:PATH)%", 1)
	})
	const callers = 8
	ask := func(requests int) {
		var sent atomic.Int64
		var all sync.WaitGroup
		for i := range callers {
			all.Go(func() {
				random, c := rand.New(rand.NewPCG(1, uint64(i))), client(t)
				keys := rand.NewZipf(random, 1.1, 8, 199)
				for sent.Add(1) <= int64(requests) {
					url := fmt.Sprintf("http://%s/p%d", addr, random.IntN(5))
					fetch(t, c, url, "x-api-key", fmt.Sprintf("key-%d", keys.Uint64()))
				}
			})
		}
		all.Wait()
	}
	// The limits are for as many requests a second as this machine manages now. If it
	// manages only a third of that later, enough requests are still limited to tell.
	const warmUp = 1000
	began := time.Now()
	ask(warmUp)
	rate := int(warmUp / time.Since(began).Seconds())
	limits := fmt.Sprintf(`limits:
  - {name: per-key, key: 'request.headers["x-api-key"]', rate: %d/m, burst: %d}
  - {name: per-path, mode: shadow, key: request.url_path, rate: %d/m, burst: %d}
  - {name: all, mode: shadow, rate: %d/m, burst: %d}
`, rate*60/100, max(1, rate/70), rate*60/20, max(1, rate/50), rate*60/4, max(1, rate/20))
	if err := os.WriteFile(config, []byte(redis+limits), 0o600); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the limits are in force", func() bool {
		return p.counted(`sluice_config_reloads_total\{result="success"\}`) == 1
	})
	ask(requests)
	var text string
	eventually(t, "Envoy writes its log", func() bool {
		b, err := os.ReadFile(log)
		text = string(b)
		return err == nil && strings.Count(text, "\n") == warmUp+requests
	})
	text = strings.Join(strings.SplitAfter(text, "\n")[warmUp:], "")
	play := func(text string) map[string][2]int {
		status, out, stderr := sluice(t, nil, "backtest", "--config", config, "-o", "json",
			"--field", `request.headers["x-api-key"]=api_key`, "--field", "request.path=full_path",
			file(t, "envoy.log", text))
		if status != 0 {
			t.Fatalf("status %d: %s", status, stderr)
		}
		var report struct {
			Requests int
			Limits   []struct {
				Name    string
				Limited int
				AtOnce  int `json:"at_once"`
			}
		}
		if err := json.Unmarshal([]byte(out), &report); err != nil {
			t.Fatal(err)
		}
		if report.Requests != requests {
			t.Fatalf("%d requests played, want %d\n%s", report.Requests, requests, stderr)
		}
		limited := make(map[string][2]int)
		for _, l := range report.Limits {
			limited[l.Name] = [2]int{l.Limited, l.AtOnce}
		}
		return limited
	}
	fine := play(text)
	coarse := play(regexp.MustCompile(`(?m)^(\[[^.]+)\.\d{6}Z`).ReplaceAllString(text, "${1}Z"))
	slack := requests / 1000
	if !isLong {
		slack *= 2 // of so few, chance has a larger part
	}
	// Redis decided about a request between the time in the log and took later. A
	// pause of the machine between the two moves it past the refill of a bucket. With
	// pauses of 150 to 300 ms, the two differ by up to a sixth of these.
	moved := len(regexp.MustCompile(` took=([2-9]\d|\d{3,})\d{3}us`).FindAllString(text, -1)) // 20 ms and more
	slack += moved / 4
	for _, name := range []string{"per-key", "per-path", "all"} {
		was := p.counted(`sluice_limit_decisions_total\{decision="(?:shadow_)?limited",limit="` + name + `"\}`)
		t.Logf("%s: %d of %d limited; backtest: %d; by seconds: %d to %d; %d waited", name, was, requests, fine[name][0],
			coarse[name][0], coarse[name][1], moved)
		if was < requests/50 || was > requests*49/50 {
			t.Errorf("%s: %d of %d limited, which shows nothing", name, was, requests)
		}
		if d := fine[name][0] - was; max(d, -d) > slack {
			t.Errorf("%s: the backtest says %d limited, the metrics said %d", name, fine[name][0], was)
		}
		if isLong && (was < coarse[name][0]-slack || was > coarse[name][1]+slack) {
			t.Errorf("%s: %d limited, not between the readings %d and %d of the log by seconds", name, was,
				coarse[name][0], coarse[name][1])
		}
	}
}
