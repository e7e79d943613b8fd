package limiter

import (
	"cmp"
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/sluiceproxy/sluice/limiter/redistest"
)

// grant is what a store gave from a bucket.
type grant struct {
	at     int64 // microseconds of Redis's clock
	tokens int64
}

// record is what stores gave, by bucket.
type record map[string][]grant

// add adds what a decision gave, if anything, but for what is held.
func (r record) add(d *Decision) {
	if d.Outcome != Allowed {
		return
	}
	for i := range d.Charges {
		if d.Verdicts[i].Hold.IsZero() {
			r[d.Charges[i].Key] = append(r[d.Charges[i].Key], grant{d.Verdicts[i].at, d.Charges[i].Cost})
		}
	}
}

// underWay is a request whose cost is held.
type underWay struct {
	charge Charge
	hold   Hold
	at     int64 // of the take, by the store's clock
	began  time.Time
	ends   time.Time
	cost   int64 // when it has ended
	isLost bool  // its end never comes
}

// spent adds what the request spent of what it held, at some time of its life
// until now.
func (r record) spent(u *underWay, random *rand.Rand) {
	tokens := min(u.cost, u.hold.Tokens)
	if u.isLost {
		tokens = u.hold.Tokens
	}
	at := u.at + random.Int64N(min(time.Since(u.began), u.charge.HoldFor).Microseconds()+1)
	r[u.charge.Key] = append(r[u.charge.Key], grant{at, tokens})
}

// excess returns by how many tokens the grants of a bucket exceed burst +
// rate·t in the worst window from one grant to another. It is at most 0 if the
// bucket keeps its bound. One pass covers all windows: the worst window that
// ends with a grant is either that grant alone, or it extends the worst window
// that ends with the grant before. The result is exact for the rates that the
// tests use.
func excess(b Bucket, grants []grant) float64 {
	grants = slices.Clone(grants)
	slices.SortFunc(grants, func(a, b grant) int { return cmp.Compare(a.at, b.at) })
	worst, here := -b.burst*b.p, -b.burst*b.p // in p-ths of a token
	for i, g := range grants {
		if i > 0 {
			here -= b.n * (g.at - grants[i-1].at)
		}
		here = max(here, -b.burst*b.p) + g.tokens*b.p
		worst = max(worst, here)
	}
	return float64(worst) / float64(b.p)
}

// A bucket keeps the bound in every window, whenever takes come, and excess
// notices a single token too many at any time.
func TestExcess(t *testing.T) {
	random := rand.New(rand.NewPCG(5, 5))
	for range 2000 {
		b := bucket(t, 1+random.Int64N(9), time.Duration(1+random.IntN(5))*time.Second, 1+random.Int64N(10))
		play := func(b Bucket) (grants []grant) {
			s, now := state{shape: b, level: b.full()}, int64(begin)
			for range 300 { // mostly more than the rate brings, with a rest now and then
				now += random.Int64N(b.wait(level{}, 1).Microseconds())
				if random.IntN(50) == 0 {
					now += random.Int64N(b.wait(level{}, b.burst).Microseconds())
				}
				l, _ := levelAt(s, b, now)
				cost := 1 + random.Int64N(min(3, b.burst))
				if l.tokens >= cost {
					l.tokens -= cost
					s, grants = state{shape: b, level: l, at: now}, append(grants, grant{now, cost})
				}
			}
			return grants
		}
		grants := play(b)
		if over := excess(b, grants); over > 0 {
			t.Fatalf("%+v: the bucket itself is %v tokens over the bound", b, over)
		}
		more := b
		more.burst++
		if over := excess(b, play(more)); over <= 0 {
			t.Fatalf("%+v: a burst of one token more was not seen", b)
		}
		// This bucket gave all that it had at each instant, so one token more,
		// at any time until then, exceeds the bound.
		at := random.Int64N(1000 * b.wait(level{}, 1).Microseconds())
		s, greedy := state{shape: b, level: b.full()}, []grant{{begin + at, 1}}
		for now := int64(begin); now <= begin+at; {
			l, _ := levelAt(s, b, now)
			greedy = append(greedy, grant{now, l.tokens})
			l.tokens = 0
			s = state{shape: b, level: l, at: now}
			now += b.wait(l, 1).Microseconds()
		}
		if over := excess(b, greedy[1:]); over > 0 {
			t.Fatalf("%+v: the bucket itself is %v tokens over the bound", b, over)
		}
		if over := excess(b, greedy); over <= 0 {
			t.Fatalf("%+v: one token more after %d µs was not seen", b, at)
		}
	}
}

// Four sidecars take from the same buckets under random faults in which Redis
// loses no data and sidecars are killed and restarted, with holds and leases out. In
// no window is more granted than burst + rate·t.
func TestChaosBound(t *testing.T) {
	t.Parallel()
	lasts := redistest.Lasts(5*time.Second, time.Minute)
	type action = func(t *testing.T, s *shaky, i int) // i is a server's
	type fault struct {
		name       string
		begin, end action
	}
	proxy := func(do func(*redistest.Proxy)) action {
		return func(_ *testing.T, s *shaky, i int) { do(s.proxies[i]) }
	}
	server := func(do func(*redistest.Server)) action {
		return func(_ *testing.T, s *shaky, i int) { do(s.servers[i]) }
	}
	ask := func(do func(*redis.Client) error) action {
		return func(t *testing.T, s *shaky, i int) {
			if err := do(s.servers[i].Client()); err != nil {
				t.Error(err)
			}
		}
	}
	nothing := func(*testing.T, *shaky, int) {}
	mend := proxy((*redistest.Proxy).Mend)
	faults := []fault{
		{"slow", proxy(func(p *redistest.Proxy) { p.Delay(10 * time.Millisecond) }), mend},
		{"late", proxy(func(p *redistest.Proxy) { p.Delay(100 * time.Millisecond) }), mend},
		{"cut", proxy((*redistest.Proxy).Cut), mend},
		{"held", proxy((*redistest.Proxy).Hold), mend},
		{"frozen", server((*redistest.Server).Freeze), server((*redistest.Server).Thaw)},
		{"killed", server((*redistest.Server).Kill), server((*redistest.Server).Restart)},
		{"scripts flushed", ask(func(c *redis.Client) error { return c.ScriptFlush(context.Background()).Err() }), nothing},
		{"clients killed", ask(func(c *redis.Client) error {
			return c.ClientKillByFilter(context.Background(), "TYPE", "normal", "SKIPME", "yes").Err()
		}), nothing},
	}
	for _, tt := range []struct {
		name   string
		start  func(testing.TB, ...string) *shaky
		faults []fault
	}{
		{"single", startShakySingle, faults},
		{"cluster", startShakyCluster, append(slices.Clone(faults), fault{"slot moved", func(t *testing.T, s *shaky, i int) {
			redistest.MoveSlot(t, s.servers, slotsOf(s)[i], s.servers[i], s.servers[(i+1)%len(s.servers)])
		}, func(t *testing.T, s *shaky, i int) { // and back
			redistest.MoveSlot(t, s.servers, slotsOf(s)[i], s.servers[(i+1)%len(s.servers)], s.servers[i])
		}})},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			// What Redis has answered it has on disk: so that a kill forgets nothing.
			s := tt.start(t, "--appendonly", "yes", "--appendfsync", "always")
			seed := uint64(time.Now().UnixNano())
			t.Logf("the seed is %d", seed)

			limits := map[string]Bucket{
				"fast":   bucket(t, 200, time.Second, 50),
				"slow":   bucket(t, 7, time.Second, 20),
				"all":    bucket(t, 500, time.Second, 300),
				"held":   bucket(t, 100, time.Second, 40),
				"leased": bucket(t, 400, time.Second, 200),
			}
			const lease = 200 * time.Millisecond
			var mu sync.Mutex
			granted, outcomes, settled, leased := record{}, map[Outcome]int{}, map[string]int{}, 0
			stop := make(chan struct{})
			var wg sync.WaitGroup
			sidecars := make([]*sidecar, 4)
			for i := range sidecars {
				sidecars[i] = &sidecar{s: s}
				sidecars[i].start(t)
			}
			for i, c := range sidecars {
				wg.Go(func() {
					mine, ofLeases := record{}, 0
					random := rand.New(rand.NewPCG(seed, 100+uint64(i)))
					tick := time.NewTicker(2 * time.Millisecond)
					defer tick.Stop()
					for {
						select {
						case <-stop:
							mu.Lock()
							defer mu.Unlock()
							leased += ofLeases
							for key, grants := range mine {
								granted[key] = append(granted[key], grants...)
							}
							return
						case <-tick.C:
						}
						d, ok := c.decide(keyed(limits["leased"], "leased", "-").costs(1 + random.Int64N(3)).leased(lease))
						if !ok {
							continue
						}
						if mine.add(&d); d.Verdicts[0].Source == LeaseSource {
							ofLeases++
						}
					}
				})
				for caller := range uint64(4) {
					wg.Go(func() {
						random := rand.New(rand.NewPCG(seed, 4*uint64(i)+caller))
						mine, saw := record{}, map[Outcome]int{}
						var open []underWay
						ended := map[string]int{}
						settle := func(u *underWay) {
							mine.spent(u, random)
							if u.isLost {
								return
							}
							// Ends may reach another sidecar, and come twice.
							to := sidecars[random.IntN(len(sidecars))]
							for range 1 + random.IntN(2) {
								if r, ok := to.settle(
									Settlement{Limit: u.charge.Limit, Key: u.charge.Key, Hold: u.hold, Cost: u.cost},
								); ok {
									ended[kindOfEnd(&r)]++
								}
							}
						}
						tick := time.NewTicker(4 * time.Millisecond)
						defer tick.Stop()
						for {
							select {
							case <-stop:
								for i := range open {
									mine.spent(&open[i], random)
								}
								mu.Lock()
								defer mu.Unlock()
								for kind, n := range ended {
									settled[kind] += n
								}
								for key, grants := range mine {
									granted[key] = append(granted[key], grants...)
								}
								for o, n := range saw {
									outcomes[o] += n
								}
								return
							case <-tick.C:
							}
							if len(open) > 0 && time.Now().After(open[0].ends) {
								settle(&open[0])
								open = open[1:]
							}
							limit := []string{"fast", "slow", "held"}[random.IntN(3)]
							own := keyed(limits[limit], limit, fmt.Sprint("client ", random.IntN(3))).costs(1 + random.Int64N(3))
							if limit == "held" {
								own = own.costs(1 + random.Int64N(10)).holding(500 * time.Millisecond)
							}
							charges := []Charge{own, keyed(limits["all"], "all", "-").costs(1 + random.Int64N(2))}
							d, ok := c.decide(charges[:1+random.IntN(2)]...)
							if !ok {
								continue
							}
							mine.add(&d)
							saw[d.Outcome]++
							if hold := d.Verdicts[0].Hold; !hold.IsZero() {
								now := time.Now()
								open = append(open, underWay{
									charge: charges[0], hold: hold, at: d.Verdicts[0].at, began: now,
									ends:   now.Add(time.Duration(random.Int64N(int64(100 * time.Millisecond)))),
									cost:   random.Int64N(2 * hold.Tokens),
									isLost: random.IntN(10) == 0,
								})
							}
						}
					})
				}
			}
			random := rand.New(rand.NewPCG(seed, 99))
			restart := func(name string, end func(*sidecar)) fault {
				var c *sidecar
				return fault{name, func(*testing.T, *shaky, int) {
					c = sidecars[random.IntN(len(sidecars))]
					end(c)
				}, func(t *testing.T, _ *shaky, _ int) { c.start(t) }}
			}
			faults := append(slices.Clone(tt.faults), restart("sidecar killed", (*sidecar).kill),
				restart("sidecar terminated", (*sidecar).terminate))
			happened := map[string]int{}
			for until := time.Now().Add(lasts); time.Now().Before(until); {
				f, i := faults[random.IntN(len(faults))], random.IntN(len(s.servers))
				f.begin(t, s, i)
				rest(random.IntN(200))
				f.end(t, s, i)
				rest(random.IntN(300))
				happened[f.name]++
			}
			rest(2000) // without faults, so that buckets are drained on a busy machine, too
			close(stop)
			wg.Wait()
			for _, c := range sidecars {
				c.kill()
			}
			keys := 0
			for key, grants := range granted {
				b := limits[strings.Split(key, ":")[2]]
				over := excess(b, grants)
				if over > 0 {
					t.Errorf("%s: %v tokens over the bound", key, over)
				}
				if over > -1.5*float64(b.n)/float64(b.p)-3 {
					keys++ // it was held to it
				}
			}
			t.Logf("%v; %v; ends %v; %d checks from leases; %d of %d buckets gave all that they may",
				happened, outcomes, settled, leased, keys, len(granted))
			if leased == 0 || outcomes[Allowed] == 0 || outcomes[Limited] == 0 || outcomes[FailedClosed] == 0 || keys == 0 ||
				settled["settled"] == 0 || settled["repeated"] == 0 || settled["failed"] == 0 {
				t.Errorf("%v, %v, and %d buckets gave all that they may: this says little", outcomes, settled, keys)
			}
		})
	}
}

// kindOfEnd names what became of a settlement.
func kindOfEnd(s *Settled) string {
	switch {
	case s.Err != nil:
		return "failed"
	case !s.Known:
		return "unknown"
	case s.Repeated:
		return "repeated"
	case s.Late:
		return "late"
	}
	return "settled"
}

func rest(milliseconds int) {
	<-time.After(time.Duration(milliseconds) * time.Millisecond)
}

// slotsOf returns for each server of a cluster a slot that it has: one of the
// test's buckets if there is one, or else any.
func slotsOf(s *shaky) []int {
	slots := make([]int, len(s.servers))
	for i := range slots {
		slots[i] = i*16384/len(slots) + 1
	}
	for _, tag := range []string{"-", "client 0", "client 1", "client 2"} {
		slot := int(s.servers[0].Client().ClusterKeySlot(context.Background(), tag).Val())
		for i := range slots {
			if i*16384/len(slots) <= slot && slot < (i+1)*16384/len(slots) {
				slots[i] = slot
			}
		}
	}
	return slots
}
