package main

import (
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/sluiceproxy/sluice/limiter/policy"
	"github.com/sluiceproxy/sluice/limiter/redistest"
)

// BenchmarkSettle prints what a limit that settles costs the processors of sluice,
// Redis and Envoy, beside the same limit without settle: by 16 clients through a
// real Envoy, in five rounds by turns. Envoy tells each end at once, or collects
// ends for 10 ms. Then it prints how long after the last byte of a response its
// tokens are back, at 500 and 2,000 requests a second.
//
//	go test ./cmd/sluice -run '^$' -bench Settle -benchtime 1x
func BenchmarkSettle(b *testing.B) {
	const each, rounds, clients, keys = 20_000, 5, 16, 1000
	const limits = "limits: [{name: per-client, key: request.url_path, rate: 1000000000/s, cost: 10%s}]"
	store := redistest.Start(b)
	// A benchmark must not fail because the machine is busy.
	patient := "store: {redis: {url: '" + store.URL() + "', timeout: 5s}}\n"
	up := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "hello") })
	executable = build(b)
	b.Cleanup(func() { executable = os.Args[0] })
	type way struct {
		name, settle         string
		change               []func(string) string // of what is printed for Envoy
		config               string
		s                    *settling
		pid                  int       // of Envoy
		sluice, redis, envoy []float64 // µs of CPU a request, by round
	}
	const settle = ", settle: 4"
	collect := replaced(b, "buffer_size_bytes: 0", "buffer_flush_interval: 0.010s")
	ways := []*way{
		{name: "without settle"},
		{name: "with settle", settle: settle},
		{name: "collected 10 ms", settle: settle, change: []func(string) string{collect}},
	}
	for i, w := range ways {
		w.config = fmt.Sprintf("domain: d%d\n"+limits, i, w.settle)
		w.s = startSettling(b, patient+w.config, up, nil, w.change...)
		pids := children(b, "envoy")
		w.pid = pids[len(pids)-1]
	}
	load := func(w *way, n int) {
		var wg sync.WaitGroup
		var next atomic.Int64
		for range clients {
			wg.Go(func() {
				for i := next.Add(1); i <= int64(n); i = next.Add(1) {
					answer, err := w.s.c.Get(fmt.Sprint("http://", w.s.addr, "/", i%keys))
					if err != nil {
						b.Error(err)
						return
					}
					_, _ = io.Copy(io.Discard, answer.Body)
					_ = answer.Body.Close()
					if answer.StatusCode != http.StatusOK || answer.Header.Get("X-Ratelimit-Limit") != "1000000000" {
						b.Errorf("%s: %d %v", w.name, answer.StatusCode, answer.Header)
						return
					}
				}
			})
		}
		wg.Wait()
	}
	perRequest := func(d time.Duration) float64 { return float64(d.Microseconds()) / each }
	for b.Loop() {
		turns := slices.Clone(ways)
		for round := range rounds + 1 {
			slices.Reverse(turns)
			for _, w := range turns {
				pid := w.s.p.cmd.Process.Pid
				sluice, redis, proxy := redistest.ProcessTime(b, pid), store.CPU(), redistest.ProcessTime(b, w.pid)
				load(w, each)
				if w != ways[0] { // every request is settled, and all that it did not use is back
					eventually(b, "all settlements", func() bool {
						return w.s.p.counted(`sluice_tokens_returned_total\{limit="per-client"\}`) == 6*each*(round+1)
					})
				}
				if round > 0 {
					w.sluice = append(w.sluice, perRequest(redistest.ProcessTime(b, pid)-sluice))
					w.redis = append(w.redis, perRequest(store.CPU()-redis))
					w.envoy = append(w.envoy, perRequest(redistest.ProcessTime(b, w.pid)-proxy))
				}
			}
		}
		median := func(all []float64) float64 { return slices.Sorted(slices.Values(all))[len(all)/2] }
		fmt.Printf("\n%-16s %10s %10s %10s\n", "CPU µs a request", "sluice", "Redis", "Envoy")
		for _, w := range ways {
			fmt.Printf("%-16s %10.1f %10.1f %10.1f\n", w.name, median(w.sluice), median(w.redis), median(w.envoy))
		}
		off := ways[0]
		for _, on := range ways[1:] {
			fmt.Printf("%s over without: sluice and Redis %.2f, Envoy %.2f\n", on.name,
				(median(on.sluice)+median(on.redis))/(median(off.sluice)+median(off.redis)), median(on.envoy)/median(off.envoy))
			for _, perSecond := range []int{500, 2000} {
				fmt.Printf("at %d requests a second tokens are back after: %s\n", perSecond,
					settleTimes(b, on.s, on.config, store, perSecond))
			}
		}
	}
}

// settleTimes returns how long after the last byte of a response Redis has what
// it did not use, of a sample of 50 a second.
func settleTimes(b *testing.B, s *settling, config string, store *redistest.Server, perSecond int) string {
	b.Helper()
	const lasts, samples = 5 * time.Second, 50
	sample := int64(perSecond / samples)
	cfg, err := policy.Parse("sluice.yaml", []byte(config), noVariables)
	if err != nil {
		b.Fatal(err)
	}
	client := store.Client()
	var mu sync.Mutex
	var took []time.Duration
	var n atomic.Int64
	redistest.Pace(perSecond, lasts, func() {
		i := n.Add(1)
		path := fmt.Sprint("/timed/", perSecond, "/", i)
		answer, err := s.c.Get("http://" + s.addr + path)
		if err != nil {
			b.Error(err)
			return
		}
		_, _ = io.Copy(io.Discard, answer.Body)
		_ = answer.Body.Close()
		ended := time.Now()
		if i%sample != 0 {
			return
		}
		bucket, err := cfg.Bucket(policy.BucketName{Limit: "per-client", Parts: []string{path}})
		if err != nil {
			b.Error(err)
			return
		}
		for client.PTTL(b.Context(), bucket.Charge.Key).Val() > 10*time.Second { // it lasts as long as its hold
			if time.Since(ended) > time.Second {
				b.Error("a hold for a second")
				return
			}
		}
		mu.Lock()
		took = append(took, time.Since(ended))
		mu.Unlock()
	})
	if len(took) < samples*int(lasts.Seconds())*9/10 {
		b.Fatalf("only %d of the sample", len(took))
	}
	slices.Sort(took)
	return fmt.Sprintf("p50 %v, p99 %v, at most %v, of %d",
		took[len(took)/2], took[len(took)*99/100], took[len(took)-1], len(took))
}

// children returns the processes of a name that this process has started, in
// the order in which it did.
func children(b *testing.B, name string) (pids []int) {
	b.Helper()
	stats, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		b.Fatal(err)
	}
	for _, path := range stats {
		stat, err := os.ReadFile(path)
		if err != nil {
			continue // it has ended
		}
		var pid, parent int
		var comm, state string
		_, err = fmt.Sscan(string(stat), &pid, &comm, &state, &parent)
		if err == nil && comm == "("+name+")" && parent == os.Getpid() {
			pids = append(pids, pid)
		}
	}
	slices.Sort(pids)
	return pids
}
