package main

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"google.golang.org/grpc"

	"github.com/sluiceproxy/sluice/limiter/redistest"
)

// TestChaosManyClients checks that, however many clients there are, each takes
// little memory in Redis and no longer than necessary, and none in the sidecar
// or its metrics.
func TestChaosManyClients(t *testing.T) {
	clients := redistest.Scaled(10_000, 1_000_000)
	const callers, bytesEach, growth = 128, 250, 10 << 20
	redis := redistest.Start(t)
	p := startSluice(t, "--config", file(t, "sluice.yaml", fmt.Sprintf(`
domain: web
store: {redis: {url: %q, timeout: %v}}
limits: [{name: per-key, key: 'request.headers["x-api-key"]', rate: 1/h, burst: 2}]
`, redis.URL(), within)))
	metric := func(name string) float64 {
		_, text := get(t, "http://"+p.metrics+"/metrics")
		for line := range strings.Lines(text) {
			if value, ok := strings.CutPrefix(line, name+" "); ok {
				v, err := strconv.ParseFloat(strings.TrimSpace(value), 64)
				if err != nil {
					t.Fatal(err)
				}
				return v
			}
		}
		t.Fatalf("no %s", name)
		return 0
	}
	series := func() (n int) {
		_, text := get(t, "http://"+p.metrics+"/metrics")
		for line := range strings.Lines(text) {
			if strings.HasPrefix(line, "sluice_") {
				n++
			}
		}
		return n
	}
	// used returns what the keys take in Redis, with the tables in which they are.
	// used_memory also has the buffers of clients and the garbage of Lua, which
	// come and go: up to 30 bytes for each of the short test's keys.
	admin := redis.Client()
	used := func() int64 {
		if err := admin.ScriptFlush(t.Context()).Err(); err != nil { // and Lua's garbage with it
			t.Fatal(err)
		}
		stats, _ := admin.Do(t.Context(), "MEMORY", "STATS").Val().(map[any]any)
		tables, _ := stats["db.0"].(map[any]any)
		var sum int64
		for _, part := range []any{
			stats["dataset.bytes"], tables["overhead.hashtable.main"], tables["overhead.hashtable.expires"],
		} {
			bytes, ok := part.(int64)
			if !ok {
				t.Fatalf("MEMORY STATS: %v", stats)
			}
			sum += bytes
		}
		return sum
	}
	var conns []*grpc.ClientConn // as Envoy has them, one for each of its workers
	for range 4 {
		conns = append(conns, dial(t, p.grpc))
	}
	var next atomic.Int64
	ask := func(until int) {
		var wg sync.WaitGroup
		for caller := range callers {
			wg.Go(func() {
				c := authv3.NewAuthorizationClient(conns[caller%len(conns)])
				for i := int(next.Add(1)); i <= until; i = int(next.Add(1)) {
					r, err := c.Check(
						context.Background(),
						checkRequest("203.0.113.1", "GET", "/", map[string]string{"x-api-key": fmt.Sprint("key of client ", i)}),
					)
					if err != nil || r.GetOkResponse() == nil {
						t.Errorf("%v %v", r, err)
						return
					}
				}
			})
		}
		wg.Wait()
		next.Store(int64(until))
	}
	began := time.Now()
	warm := clients / 2 // after this the process has all that it needs for so many callers
	ask(warm)
	seriesBefore, processBefore, redisBefore := series(), metric("process_resident_memory_bytes"), used()
	ask(clients)
	lasted := time.Since(began)
	// While a table of Redis grows there are two of it, until Redis has moved all
	// entries, which it does by itself.
	var each float64
	defer func() { t.Logf("%.0f B a key in Redis %s", each, redis.Info("server")["redis_version"]) }()
	eventually(t, fmt.Sprintf("at most %d bytes a key in Redis", bytesEach), func() bool {
		each = float64(used()-redisBefore) / float64(clients-warm)
		return each <= bytesEach
	})
	grew := metric("process_resident_memory_bytes") - processBefore
	t.Logf(
		"%d clients in %v; the sidecar's memory grew by %.1f MiB to %.1f", clients,
		lasted.Round(time.Second), grew/(1<<20), (processBefore+grew)/(1<<20),
	)
	if grew > growth && slack < 100*time.Millisecond { // the race detector takes much memory of its own
		t.Errorf("the sidecar's memory grew by %.1f MiB", grew/(1<<20))
	}
	if after := series(); after != seriesBefore {
		t.Errorf("%d series became %d", seriesBefore, after)
	}

	// A bucket with one of two tokens taken is full after an hour, and removed
	// within a minute of that.
	c := redis.Client()
	seen := 0
	for keys := c.Scan(t.Context(), 0, "sluice:web:per-key:*", 1000); ; {
		names, cursor := keys.Val()
		pipe := c.Pipeline()
		for _, name := range names {
			pipe.PTTL(t.Context(), name)
		}
		answers, err := pipe.Exec(t.Context())
		if err != nil && len(names) > 0 {
			t.Fatal(err)
		}
		for _, a := range answers {
			ttl := a.(interface{ Val() time.Duration }).Val()
			if least := time.Hour - time.Since(began); ttl < least || ttl > time.Hour+time.Minute {
				t.Fatalf("%v ends in %v", a.Args(), ttl)
			}
		}
		seen += len(names)
		if cursor == 0 {
			break
		}
		keys = c.Scan(t.Context(), cursor, "sluice:web:per-key:*", 1000)
	}
	if seen < clients { // a scan may return a key twice
		t.Errorf("%d keys", seen)
	}
}
