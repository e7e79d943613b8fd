package limiter

import (
	"context"
	"fmt"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/redis/go-redis/v9"

	"github.com/sluiceproxy/sluice/limiter/redistest"
)

// BenchmarkTake times a take by store, on one key and on many, by one caller and by 64:
//
//	go test ./limiter -run '^$' -bench Take
//
// For Redis it says how much of Redis's processor time a take costs, too.
func BenchmarkTake(b *testing.B) {
	const many = 10_000
	for _, store := range []struct {
		name string
		open func(b *testing.B) (Store, *redistest.Server)
	}{
		{"memory", func(b *testing.B) (Store, *redistest.Server) {
			return NewMemory(1<<30, nil, prometheus.NewRegistry()), nil
		}},
		{"redis", func(b *testing.B) (Store, *redistest.Server) {
			s := redistest.Start(b)
			return newTestRedis(b, s, serverClock), s
		}},
	} {
		for _, keys := range []int{1, many} {
			shape := bucket(b, MaxTokens, time.Second, MaxTokens)
			charges := make([][]Charge, keys)
			for i := range charges {
				charges[i] = []Charge{charge(shape, fmt.Sprint("key-", i))}
			}
			run := func(name string, loop func(b *testing.B, take func(i int))) {
				b.Run(fmt.Sprintf("%s/keys=%d/%s", store.name, keys, name), func(b *testing.B) {
					s, server := store.open(b)
					checkStore(b, s)
					take := func(i int) {
						var v [1]Verdict
						if s.Take(context.Background(), charges[i%keys], v[:]); !v[0].Allowed {
							b.Fatalf("%+v", v[0])
						}
					}
					take(0)
					b.ReportAllocs()
					var before time.Duration
					if server != nil {
						before = server.CPU()
					}
					b.ResetTimer()
					loop(b, take)
					b.StopTimer()
					if server != nil {
						b.ReportMetric(float64((server.CPU()-before).Microseconds())/float64(b.N), "redis-µs/op")
					}
				})
			}
			run("serial", func(b *testing.B, take func(i int)) {
				for i := range b.N {
					take(i)
				}
			})
			run("64-callers", func(b *testing.B, take func(i int)) {
				b.SetParallelism(64) // a caller for each, and each processor
				var next atomic.Int64
				b.RunParallel(func(pb *testing.PB) {
					for i := int(next.Add(7919)); pb.Next(); i++ {
						take(i)
					}
				})
			})
		}
	}
}

// checkStore fails the benchmark of a store that does not limit.
func checkStore(b *testing.B, s Store) {
	b.Helper()
	two := charge(bucket(b, 1, time.Hour, 2), "check")
	var v [1]Verdict
	for i, want := range []bool{true, true, false} {
		if s.Take(context.Background(), []Charge{two}, v[:]); v[0].Allowed != want {
			b.Fatalf("take %d: %+v", i, v[0])
		}
	}
	other := charge(bucket(b, 1, time.Hour, 2), "another")
	if s.Take(context.Background(), []Charge{other}, v[:]); v[0].Remaining != 1 {
		b.Fatalf("keys are not their own: %+v", v[0])
	}
}

// BenchmarkStorage shows why a bucket is stored as one packed string. It
// compares that with a hash of numbers, by Redis's processor time for a read
// and a write, and by the memory of a key.
//
//	go test ./limiter -run '^$' -bench Storage -benchtime 200000x
func BenchmarkStorage(b *testing.B) {
	for _, tt := range []struct{ name, script string }{
		{"nothing", "#!lua\nreturn redis.call('TIME')[1] and 1"},
		{"string", `#!lua
			local raw = redis.call('GET', KEYS[1])
			local tokens = 5
			local _
			if raw then _, _, tokens = struct.unpack('>c2BI4I6I7I4I7I6', raw) end
			local at = redis.call('TIME')[1] * 1000000
			redis.call('SET', KEYS[1], struct.pack('>c2BI4I6I7I4I7I6', 'xx', 1, tokens, 999999, at, 100, 1000000, 1000000),
				'PX', string.format('%.0f', 60000))
			return tokens`},
		{"hash", `#!lua
			local f = redis.call('HMGET', KEYS[1], 'v', 't', 'f', 'a', 'b', 'n', 'p')
			local tokens = 5
			for i = 1, 7 do f[i] = tonumber(f[i]) end
			if f[2] then tokens = f[2] end
			local at = redis.call('TIME')[1] * 1000000
			redis.call('HSET', KEYS[1], 'v', 1, 't', tokens, 'f', 999999, 'a', string.format('%.0f', at), 'b', 100, 'n', 1000000, 'p', 1000000)
			redis.call('PEXPIRE', KEYS[1], 60000)
			return tokens`},
	} {
		b.Run(tt.name, func(b *testing.B) {
			server := redistest.Start(b)
			client := server.Client()
			ctx := context.Background()
			script := redis.NewScript(tt.script)
			key := charge(Bucket{}, "per-client").Key
			for range 2 {
				if got, err := script.Run(ctx, client, []string{key}).Int(); err != nil || got != 5 && got != 1 {
					b.Fatal(got, err)
				}
			}
			before := server.CPU()
			b.ResetTimer()
			for done := 0; done < b.N; done += 100 {
				p := client.Pipeline()
				for range min(100, b.N-done) {
					p.EvalSha(ctx, script.Hash(), []string{key})
				}
				if _, err := p.Exec(ctx); err != nil {
					b.Fatal(err)
				}
			}
			b.StopTimer()
			b.ReportMetric(float64((server.CPU()-before).Microseconds())/float64(b.N), "redis-µs/op")
			if n, err := client.MemoryUsage(ctx, key).Result(); err == nil { // the first script stores no key
				b.ReportMetric(float64(n), "B/key")
			}
		})
	}
}
