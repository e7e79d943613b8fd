package authz

import (
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/sluiceproxy/sluice/limiter"
)

// The sketch keeps what its authors prove: no count is too low, none is too
// high by more than over, and no key with more than a 64th of all requests is
// missing.
func TestSketch(t *testing.T) {
	for seed := range uint64(20) {
		random := rand.New(rand.NewPCG(seed, 1))
		zipf := rand.NewZipf(random, 1.05+random.Float64(), 1, 100_000)
		var s sketch
		exact := map[string]uint64{}
		const all = 50_000
		for range all {
			key := fmt.Sprint(zipf.Uint64())
			exact[key]++
			s.add(key, hashOf(key))
		}
		for key, n := range exact {
			at, ok := s.find(key, hashOf(key))
			if !ok && n > all/sketchSize {
				t.Errorf("seed %d: %s occurred %d times of %d and is missing", seed, key, n, all)
			}
			if ok && (n > s.counts[at] || n < s.counts[at]-s.over[at]) {
				t.Errorf("seed %d: %s occurred %d times, counted %d, at most %d too many",
					seed, key, n, s.counts[at], s.over[at])
			}
		}
		if s.used != sketchSize {
			t.Errorf("%d keys", s.used)
		}
	}
}

// The index finds what was inserted and nothing else, whatever was removed in
// between, also if hashes collide.
func TestHashIndex(t *testing.T) {
	for seed := range uint64(10) {
		random := rand.New(rand.NewPCG(seed, 2))
		var p hashIndex
		stands := map[int]uint32{} // hashes by position
		for range 1000 {
			at := random.IntN(128)
			if hash, ok := stands[at]; ok {
				p.remove(hash, at)
				delete(stands, at)
			} else {
				stands[at] = random.Uint32N(1+uint32(seed)*7) << (8 * (seed % 2)) // few hashes, or one home for all
				p.insert(stands[at], at)
			}
			for at := range 128 {
				hash, want := stands[at]
				if _, ok := p.find(hash, func(is int) bool { return is == at }); ok != want {
					t.Fatalf("seed %d: position %d is found: %v", seed, at, ok)
				}
			}
		}
	}
}

// Top covers the last five to ten minutes.
func TestTopKeysExpire(t *testing.T) {
	at := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	top := newTopKeys()
	tell := func(n int) string {
		requests, denials := top.list(n, at)
		return fmt.Sprint(requests, denials)
	}
	for i := range 5 {
		top.add("a", i > 2, at)
	}
	top.add("b", true, at)
	if got := tell(2); got != "[{a 5 0} {b 1 0}] [{a 2 0} {b 1 0}]" {
		t.Error(got)
	}
	at = at.Add(topWindow)
	top.add("a", false, at)
	top.add("c", false, at)
	if got := tell(1); got != "[{a 6 0}] [{a 2 0}]" {
		t.Error(got)
	}
	at = at.Add(topWindow)
	if got := tell(9); got != "[{a 1 0} {c 1 0}] []" {
		t.Error(got)
	}
	at = at.Add(3 * topWindow)
	if got := tell(9); got != "[] []" {
		t.Error(got)
	}
}

// With a million clients memory stays bounded, and the client that is denied
// most is found among them.
func TestStatsAreBounded(t *testing.T) {
	s, _, _ := newServer(t,
		"limits: [{name: a, rate: 1/d, key: client.ip}, {name: b, rate: 1/d, key: 'request.path'}]", nil)
	deny := no(0, time.Second, time.Second, 1)
	heap := func() uint64 {
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	v := checkState{config: s.config.Load(), decision: limiter.Decision{
		Outcome: limiter.Limited, Charges: make([]limiter.Charge, 1), Verdicts: []limiter.Verdict{deny},
	}}
	limit := v.config.Limits()[0]
	bucket := bucketOf(t)
	now := time.Now()
	ask := func(key string) {
		charge := &v.decision.Charges[0]
		*charge = limiter.Charge{Limit: limit, Bucket: bucket, Key: "sluice:default:a:{" + key + "}", Cost: 1}
		s.report.charged(s.report.limits.forLimit(v.config, limit), charge, &v.decision.Verdicts[0], false, now)
		s.report.denials.add(&v, limiter.Limited, &v.decision.Charges[0], &deny, now)
	}
	const clients = 1_000_000
	before := heap()
	for i := range clients {
		ask(fmt.Sprint("=8.client-", i))
		if i%20 == 0 {
			ask("=4.busy")
		}
	}
	if after := heap(); after > before+1<<20 {
		t.Errorf("the heap grew from %d kB to %d kB", before>>10, after>>10)
	}
	requests, denials, _ := s.Top("a", 10)
	if len(requests) != 10 || requests[0].Key != "=4.busy" || denials[0].Key != "=4.busy" ||
		denials[0].Count < clients/20 || denials[0].Count-denials[0].Over > clients/20 {
		t.Errorf("%v %v", requests, denials)
	}
	if all := s.Denials(); len(all) != maxDenials || all[0].Key != fmt.Sprint("=8.client-", clients-1) {
		t.Errorf("%d denials, %v", len(all), all[0])
	}
	long := strings.Repeat("x", 1000)
	ask(long)
	if d := s.Denials()[0]; d.Key != long {
		t.Errorf("%d bytes of key", len(d.Key))
	}
	cut := long[:maxTopKey]
	counted := s.report.limits.forLimit(v.config, limit).topKeys.Load()
	if _, ok := counted.current.requests.find(cut, hashOf(cut)); !ok {
		t.Error("a long key is not cut")
	}
}

func TestTopKeysAreBounded(t *testing.T) {
	s, _, _ := newServer(t, "", nil)
	for round := range 2 {
		var limits []*limiter.Limit
		for i := range maxCountedLimits + 3 {
			limits = append(limits, &limiter.Limit{Name: fmt.Sprintf("l%d-%d", round, i)})
		}
		s.report.limits.setLimits(limits)
		kept := 0
		for _, l := range limits {
			s.report.charged(s.report.limits.forLimit(s.config.Load(), l),
				&limiter.Charge{Limit: l, Bucket: bucketOf(t), Key: "p:{k}"},
				&limiter.Verdict{Allowed: true, Source: limiter.MemorySource}, true, time.Now())
			if requests, _, _ := s.Top(l.Name, 1); len(requests) == 1 && requests[0].Key == "k" {
				kept++
			}
		}
		if kept != maxCountedLimits {
			t.Errorf("round %d: %d limits' are kept", round, kept)
		}
	}
	if r, d, counted := s.Top("nobody", 1); r != nil || d != nil || counted {
		t.Error(r, d)
	}
}

// Denials have the reason. Equal ones are grouped, and allowed requests are not
// listed.
func TestDenials(t *testing.T) {
	s, _, _ := newServer(t, `
limits:
  - {name: a, rate: 1/s, burst: 5, cost: 2, key: 'request.headers["x-api-key"]'}
  - {name: bad, match: {paths: [/bad]}, rate: 1/s, key: 'request.path.split("?")[1]'}
`, nil)
	const secret = "s3cr3t"
	ask := func(store limiter.Store, path string) {
		s.store = store
		r := checkOf("x-api-key", secret, "x-request-id", "id-1")
		r.Attributes.Request.Http.Path, r.Attributes.Request.Http.Host = path, "h"
		_, _ = s.Check(t.Context(), r)
	}
	deny := said{no(1, time.Second, 4*time.Second, 1)}
	ask(said{ok(1, 1, 1)}, "/fine")
	ask(deny, "/one?token="+secret)
	ask(said{failed}, "/two")
	ask(said{failed}, "/bad")
	ask(panics{}, "/panic")
	ask(deny, "/three?token="+secret)
	var got []string
	for _, d := range s.Denials() {
		got = append(got, fmt.Sprint(d.ID, " ", d.Count, " ", d.Outcome, " ", d.Limit, d.Field, d.Failure,
			" ", d.Cost, "/", d.Remaining, " ", d.RetryAfter,
			" ", d.Method, " ", d.Host, d.Path, " ", d.Source, " ", d.RequestID, " ", s.Denied(d.ID).Path))
		if strings.Contains(strings.Replace(fmt.Sprintf("%+v", d), fmt.Sprint(d.request), "", 1), secret) {
			t.Errorf("%+v", d)
		}
	}
	want := `1 2 limited a 2/1 1s GET h/three 203.0.113.7 id-1 /three?token=s3cr3t
4 1 failed_closed  0/0 0s GET h/panic 203.0.113.7 id-1 /panic
3 1 invalid badkey 0/0 0s GET h/bad 203.0.113.7 id-1 /bad
2 1 failed_closed atimeout 2/0 0s GET h/two 203.0.113.7 id-1 /two`
	if g := strings.Join(got, "\n"); g != want {
		t.Errorf("%s\nwant\n%s", g, want)
	}
	if s.Denied(99) != nil {
		t.Error("a request of no denial")
	}
	ask(deny, "/"+strings.Repeat("x", maxExplainable))
	if d := s.Denials()[0]; s.Denied(d.ID) != nil || len(d.Path) != maxShown {
		t.Errorf("%d bytes of the path are kept, and %v", len(d.Path), s.Denied(d.ID))
	}
}

// The key of a readable limit is in clear wherever people see it, by one text, and
// not in metrics.
func TestReadableKeys(t *testing.T) {
	const key = "=14.acme%20%22x%22"
	deny := no(0, time.Second, time.Second, 1)
	s, registry, logs := newServer(t, `
limits:
  - {name: a, rate: 1/s, key: 'request.headers["x-tenant"]', readable: true}
  - {name: b, rate: 1/s, key: 'request.headers["x-tenant"]', readable: true, mode: shadow}
`, said{deny, deny})
	check := checkOf("x-tenant", `acme "x"`)
	answer, err := s.Check(t.Context(), check)
	if got := spell(answer, err); !strings.Contains(got, fmt.Sprintf(" key=%q ", key)) ||
		!strings.Contains(got, " shadow_keys=["+key+"] ") {
		t.Error(got)
	}
	request, err := requestOf(check)
	if err != nil {
		t.Fatal(err)
	}
	explained := Explain(t.Context(), s.config.Load(), nil, request).Limits
	for i, limit := range []string{"a", "b"} {
		requests, denials, _ := s.Top(limit, 9)
		for where, got := range map[string]string{
			"log": fmt.Sprint(logs.All()[i].ContextMap()["key"]), "list": s.Denials()[i].Key, "explain": *explained[i].Key,
			"top": requests[0].Key, "top denials": denials[0].Key,
		} {
			if got != key {
				t.Errorf("%s of %s: %s, want %s", where, limit, got, key)
			}
		}
	}
	families, err := registry.Gather()
	if text := fmt.Sprint(families); err != nil || strings.Contains(text, "acme") {
		t.Errorf("%s, %v", text, err)
	}
}

// What limits in shadow mode would have denied is listed like denials, and
// replaces none of them. The client is the one that client_ip names.
func TestShadowDenials(t *testing.T) {
	s, _, _ := newServer(t, `
client_ip: {xff_from_right: 1}
limits:
  - {name: a, rate: 1/s, key: client.ip}
  - {name: b, rate: 1/s, key: 'request.headers["x-tenant"]', mode: shadow}
  - {name: c, rate: 1/s, mode: shadow}
`, nil)
	allow, deny := ok(1, 1, 1), no(0, time.Second, time.Second, 1)
	ask := func(store limiter.Store, tenant string) {
		s.store = store
		_, _ = s.Check(t.Context(), checkOf("x-forwarded-for", "2001:db8::7", "x-tenant", tenant))
	}
	ask(said{deny, allow, allow}, "t")
	for i := range maxDenials {
		ask(said{allow, deny, allow}, fmt.Sprint(i))
	}
	ask(said{allow, deny, deny}, "0")
	ask(said{deny, deny, {}}, "0") // c has no verdict
	count := make(map[string]int)
	var got []string
	for i, d := range s.Denials() {
		count[d.Decision()]++
		if i < 3 {
			got = append(got, fmt.Sprintf("%s %s %s %v %d", d.Decision(), d.Limit, d.Client, d.Shadow, d.Count))
		}
		if r := s.Denied(d.ID); r == nil || !d.Explainable() {
			t.Errorf("%+v cannot be explained", d)
		}
	}
	slices.Sort(got)
	want := "limited a 2001:db8::7 false 2, shadow_limited b 2001:db8::7 true 3, shadow_limited c 2001:db8::7 true 1"
	if g := strings.Join(got, ", "); g != want {
		t.Errorf("%s\nwant %s", g, want)
	}
	if count["limited"] != 1 || count["shadow_limited"] != maxDenials {
		t.Error(count)
	}
}

// Checks run concurrently with readers of the statistics and with new configs.
func TestStatsConcurrently(t *testing.T) {
	s, _, _ := newServer(t, "limits: [{name: a, rate: 1/d, burst: 10, key: 'request.headers[\"k\"]'}]",
		limiter.NewMemory(1<<20, nil, prometheus.NewRegistry()))
	var wg sync.WaitGroup
	for i := range 4 {
		wg.Go(func() {
			for j := range 500 {
				_, _ = s.Check(t.Context(), checkOf("k", fmt.Sprint(i*j%50)))
			}
		})
	}
	wg.Go(func() {
		for range 50 {
			s.Top("a", 5)
			for _, d := range s.Denials() {
				s.Denied(d.ID)
			}
			s.Totals()
			s.Limits()
			s.SetConfig(s.config.Load())
		}
	})
	wg.Wait()
	totals, limits := s.Totals(), s.Limits()
	allowed := totals.Checks[limiter.Allowed]
	if allowed+totals.Checks[limiter.Limited] != 2000 || totals.Seconds.GetSampleCount() != 2000 ||
		len(limits) != 1 || limits[0].Allowed != allowed || limits[0].Taken != allowed {
		t.Errorf("%v %v", totals, limits)
	}
}
