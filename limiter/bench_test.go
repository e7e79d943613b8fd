package limiter

import (
	"context"
	"fmt"
	"sync"
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

// BenchmarkHolds shows why the holds of a bucket are kept as slices of time with
// a bit for each. It compares that with a hash of numbered holds beside the
// bucket, and with numbered holds in the bucket's string. An operation is one hold
// and one settlement, with so many others open.
//
//	go test ./limiter -run '^$' -bench Holds -benchtime 3000x
//
// The scripts for the two others keep holds and do nothing else, so their figures
// are the least that these could cost.
func BenchmarkHolds(b *testing.B) {
	const key = "sluice:default:limit:{-}"
	hash := redis.NewScript(`#!lua
		local raw = redis.call('GET', KEYS[1]) or string.rep('\0', 37)
		local at = redis.call('TIME')[1]
		if ARGV[1] == 'hold' then
			redis.call('HSET', KEYS[2], ARGV[2], '1:' .. at)
			redis.call('PEXPIRE', KEYS[2], 60000)
		else
			redis.call('HGET', KEYS[2], ARGV[2])
			redis.call('HDEL', KEYS[2], ARGV[2])
		end
		redis.call('SET', KEYS[1], raw, 'PX', 60000)
		return 1`)
	numbered := redis.NewScript(`#!lua
		local raw = redis.call('GET', KEYS[1]) or string.rep('\0', 37)
		local at = redis.call('TIME')[1]
		if ARGV[1] == 'hold' then
			raw = raw .. struct.pack('>I4I4I5', ARGV[2], 1, at)
		else
			local want, low, high = tonumber(ARGV[2]), 0, (#raw - 37) / 13 - 1
			while low < high do
				local middle = math.floor((low + high) / 2)
				if struct.unpack('>I4', raw, 37 + middle * 13 + 1) < want then
					low = middle + 1
				else
					high = middle
				end
			end
			raw = string.sub(raw, 1, 37 + low * 13) .. string.sub(raw, 37 + low * 13 + 14)
		end
		redis.call('SET', KEYS[1], raw, 'PX', 60000)
		return 1`)
	ctx := context.Background()
	byScript := func(script *redis.Script) func(*testing.B, *redistest.Server) (hold func() int, settle func(int)) {
		return func(b *testing.B, s *redistest.Server) (func() int, func(int)) {
			client, next := s.Client(), 0
			run := func(what string, id int) {
				if err := script.Run(ctx, client, []string{key, key + "holds"}, what, id).Err(); err != nil {
					b.Fatal(err)
				}
			}
			hold := func() int {
				next++
				run("hold", next)
				return next
			}
			return hold, func(id int) { run("settle", id) }
		}
	}
	for _, tt := range []struct {
		name string
		open func(*testing.B, *redistest.Server) (hold func() int, settle func(int))
	}{
		{"slices", func(b *testing.B, s *redistest.Server) (func() int, func(int)) {
			r := newTestRedis(b, s, serverClock)
			c := charge(bucket(b, MaxTokens, time.Second, MaxTokens), "").holding(time.Minute)
			c.Key = key
			var all []Hold
			hold := func() int {
				var v [1]Verdict
				if r.Take(ctx, []Charge{c}, v[:]); v[0].Hold.IsZero() {
					b.Fatalf("%+v", v[0])
				}
				all = append(all, v[0].Hold)
				return len(all) - 1
			}
			return hold, func(id int) {
				var settled [1]Settled
				r.Settle(ctx, []Settlement{{Limit: c.Limit, Key: key, Hold: all[id]}}, settled[:])
				if settled[0].Returned != 1 {
					b.Fatalf("%+v", settled[0])
				}
			}
		}},
		{"hash", byScript(hash)},
		{"numbered", byScript(numbered)},
	} {
		for _, others := range []int{1, 100, 10_000} {
			b.Run(fmt.Sprintf("%s/open=%d", tt.name, others), func(b *testing.B) {
				server := redistest.Start(b)
				hold, settle := tt.open(b, server)
				var open []int
				for range others {
					open = append(open, hold())
				}
				var size int64
				for _, k := range []string{key, key + "holds"} {
					if n, err := server.Client().MemoryUsage(ctx, k, 0).Result(); err == nil {
						size += n
					}
				}
				before := server.CPU()
				b.ResetTimer()
				for range b.N {
					settle(open[0])
					open = append(open[1:], hold())
				}
				b.StopTimer()
				b.ReportMetric(float64((server.CPU()-before).Microseconds())/float64(b.N), "redis-µs/op")
				b.ReportMetric(float64(size), "B")
			})
		}
	}
}

// BenchmarkSlots times requests with two limits on a Redis Cluster: with the same
// key, so that their buckets are in one slot, and with a key and without. In the
// second case what is taken is held, and settled afterwards.
//
//	go test ./limiter -run '^$' -bench Slots -benchtime 5000x
func BenchmarkSlots(b *testing.B) {
	nodes := redistest.StartCluster(b, 3)
	r, err := NewRedis(RedisOptions{Mode: Cluster, Addresses: []string{nodes[0].Addr}, Timeout: 300 * time.Millisecond},
		nil, prometheus.NewRegistry())
	if err != nil {
		b.Fatal(err)
	}
	defer func() { _ = r.Close() }()
	shape := bucket(b, MaxTokens, time.Second, MaxTokens)
	for _, slots := range []string{"one", "two"} {
		for _, callers := range []int{1, 16} {
			b.Run(fmt.Sprintf("slots=%s/callers=%d", slots, callers), func(b *testing.B) {
				var next atomic.Int64
				take := func(client int64, verdicts []Verdict) bool {
					own := keyed(shape, "own", fmt.Sprint("client ", client))
					all := keyed(shape, "all", "-")
					if slots == "one" {
						all = keyed(shape, "all", fmt.Sprint("client ", client))
					}
					r.Take(context.Background(), []Charge{own, all}, verdicts)
					return verdicts[0].Allowed && verdicts[1].Allowed
				}
				if verdicts := make([]Verdict, 2); !take(0, verdicts) || verdicts[1].Remaining >= MaxTokens {
					b.Fatalf("%+v", verdicts)
				}
				var before time.Duration
				for _, n := range nodes {
					before -= n.CPU()
				}
				calledBefore := calls(b, r)
				b.ResetTimer()
				var wg sync.WaitGroup
				for caller := range int64(callers) {
					wg.Go(func() {
						verdicts := make([]Verdict, 2)
						for next.Add(1) <= int64(b.N) {
							if !take(caller, verdicts) {
								b.Errorf("%+v", verdicts)
								return
							}
						}
					})
				}
				wg.Wait()
				b.StopTimer()
				for _, n := range nodes {
					before += n.CPU()
				}
				b.ReportMetric(float64(before.Microseconds())/float64(b.N), "redis-µs/op")
				b.ReportMetric(float64(calls(b, r)-calledBefore)/float64(b.N), "calls/op")
			})
		}
	}
}
