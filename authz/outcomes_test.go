package authz

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/redis/go-redis/v9"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/sluiceproxy/sluice/limiter"
	"github.com/sluiceproxy/sluice/limiter/redistest"
)

// What a limit's bucket says of a request.
const (
	bucketAllows = iota
	bucketDenies
	bucketFails
)

// limitKinds has the ways in which a limit can take part in an outcome.
var limitKinds = []string{
	"on_failure: deny", "on_failure: delegate", "on_failure: local", "on_failure: allow", "mode: shadow",
}

// wantOutcome is the rule in a table's words: the decision, what it is
// counted as, and whether the buckets that allowed the request stay charged.
func wantOutcome(kinds [3]string, buckets [3]int) (decision, counted string, charged bool) {
	has := func(kind string, bucket int) bool {
		for i := range kinds {
			if kinds[i] != "mode: shadow" && buckets[i] == bucket && (kind == "" || kinds[i] == kind) {
				return true
			}
		}
		return false
	}
	switch {
	case has("", bucketDenies):
		decision, charged = "limited", false
	case has("on_failure: deny", bucketFails):
		decision, charged = "failed_closed", false
	case has("on_failure: delegate", bucketFails):
		decision, charged = "delegated", true
	case has("on_failure: allow", bucketFails):
		decision, charged = "failed_open", true
	default: // local buckets are full in this test
		decision, charged = "allowed", true
	}
	counted = decision
	if has("on_failure: local", bucketFails) && (decision == "allowed" || decision == "limited") {
		counted = "failed_local"
	}
	return decision, counted, charged
}

// TestOutcomes tries combinations of the failure modes of three limits and of
// what their buckets say. The outcome must be as the README has it: the
// decision in the metadata, the metrics, and what stays charged.
func TestOutcomes(t *testing.T) {
	const newer = "\xb5\x08\x09 of a version to come" // which fails the bucket, and no other
	all := []int{bucketAllows, bucketDenies, bucketFails}
	t.Run("redis", func(t *testing.T) {
		server := redistest.Start(t)
		testOutcomes(t, limiter.RedisOptions{URL: server.URL()}, newer, all)
	})
	t.Run("cluster", func(t *testing.T) {
		o := limiter.RedisOptions{Mode: limiter.Cluster}
		for _, node := range redistest.StartCluster(t, 3) {
			o.Addresses = append(o.Addresses, node.Addr)
		}
		testOutcomes(t, o, newer, all)
	})
	t.Run("memory", func(t *testing.T) {
		m := limiter.NewMemory(1<<24, nil, prometheus.NewRegistry())
		testOutcomesOf(t, m, m.ReadOnly(), nil, all[:bucketFails])
	})
}

func testOutcomes(t *testing.T, o limiter.RedisOptions, newer string, buckets []int) {
	t.Helper()
	o.Timeout = time.Minute
	r, err := limiter.NewRedis(o, nil, prometheus.NewRegistry())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = r.Close() })
	var client redis.UniversalClient
	if o.Mode == limiter.Cluster {
		client = redis.NewClusterClient(&redis.ClusterOptions{Addrs: o.Addresses})
	} else {
		client = redis.NewClient(&redis.Options{Network: "unix", Addr: strings.TrimPrefix(o.URL, "unix://")})
	}
	t.Cleanup(func() { _ = client.Close() })
	testOutcomesOf(t, limiter.NewFallback(r, nil, prometheus.NewRegistry()), r.ReadOnly(), func(key string) {
		if err := client.Set(t.Context(), key, newer, time.Minute).Err(); err != nil {
			t.Fatal(err)
		}
	}, buckets)
}

// testOutcomesOf runs combinations of three limits against a store. fail makes
// the bucket with a given key fail.
//
// A limit has one state for each pair of its kind and what its bucket says. A
// long run tries all triples of states. An ordinary run tries those whose
// numbers add up to a multiple of the number of states: a fifteenth of them, in
// which any two limits still have every pair of states.
func testOutcomesOf(t *testing.T, store, looking limiter.Store, fail func(key string), buckets []int) {
	t.Helper()
	states := len(limitKinds) * len(buckets)
	every := redistest.Scaled(states, 1)
	runs := 0
	for a := range limitKinds {
		for b := range limitKinds {
			for c := range limitKinds {
				kinds := [3]string{limitKinds[a], limitKinds[b], limitKinds[c]}
				var config strings.Builder
				config.WriteString("local_share: 1\nlimits:\n")
				for i, kind := range kinds {
					// A header that is not sent denies, whatever the bucket holds.
					fmt.Fprintf(&config, "- {name: l%d, rate: 1/d, burst: 5, key: 'request.headers[\"x-%[1]d\"]', "+
						"absent: deny, %s}\n", i, kind)
				}
				s, registry, _ := newServer(t, config.String(), store)
				for _, x := range buckets {
					for _, y := range buckets {
						for _, z := range buckets {
							if ((a+b+c)*len(buckets)+x+y+z)%every != 0 {
								continue
							}
							runs++
							testOutcome(t, s, registry, looking, fail, kinds, [3]int{x, y, z}, runs)
						}
					}
				}
			}
		}
	}
	t.Logf("%d combinations", runs)
	if want := states * states * states / every; runs != want {
		t.Errorf("%d combinations were tried, want %d", runs, want)
	}
}

func testOutcome(
	t *testing.T, s *Server, registry *prometheus.Registry, looking limiter.Store, fail func(string),
	kinds [3]string, buckets [3]int, run int,
) {
	t.Helper()
	check := checkOf()
	headers := check.GetAttributes().GetRequest().GetHttp().GetHeaders()
	for i, bucket := range buckets {
		if bucket != bucketDenies {
			headers[fmt.Sprint("x-", i)] = fmt.Sprint("run ", run, " key ", i)
		}
	}
	request, err := requestOf(check)
	if err != nil {
		t.Fatal(err)
	}
	charges := s.config.Load().Draw(request).Charges
	for i, bucket := range buckets {
		if bucket == bucketFails {
			fail(charges[i].Key)
		}
	}
	decision, counted, charged := wantOutcome(kinds, buckets)
	complain := func(format string, args ...any) {
		t.Helper()
		t.Errorf("%v, buckets %v: %s", kinds, buckets, fmt.Sprintf(format, args...))
	}

	countBefore, takenBefore := countOf(t, registry, counted), takenOf(s)
	answer, err := s.Check(t.Context(), check)
	switch {
	case decision == "delegated":
		if status.Code(err) != codes.Unavailable {
			complain("got %v, %v, want UNAVAILABLE", answer, err)
		}
	case err != nil:
		complain("%v", err)
	default:
		if got := answer.GetDynamicMetadata().GetFields()["decision"].GetStringValue(); got != decision {
			complain("metadata say %s, want %s", got, decision)
		}
	}
	if got := countOf(t, registry, counted) - countBefore; got != 1 {
		complain("sluice_checks_total{decision=%q} rose by %v, want 1", counted, got)
	}
	takenAfter := takenOf(s)
	for i, bucket := range buckets {
		if bucket != bucketAllows {
			continue
		}
		taken := kinds[i] == "mode: shadow" || charged
		want, got := int64(5), leftOf(t, looking, charges[i])
		if taken {
			want = 4
		}
		if got != want {
			complain("bucket %d holds %d tokens, want %d", i, got, want)
		}
		name := fmt.Sprint("l", i)
		if got := takenAfter[name] - takenBefore[name]; taken != (got == 1) {
			complain("%d tokens of %s counted as taken, want %v", got, name, taken)
		}
	}
}

// takenOf returns how many tokens were counted as taken, by limit.
func takenOf(s *Server) map[string]uint64 {
	taken := map[string]uint64{}
	for _, l := range s.Limits() {
		taken[l.Name] = l.Taken
	}
	return taken
}

// countOf returns how many checks were counted with a decision.
func countOf(t *testing.T, registry *prometheus.Registry, decision string) float64 {
	t.Helper()
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			if f.GetName() == "sluice_checks_total" && m.GetLabel()[0].GetValue() == decision {
				return m.GetCounter().GetValue()
			}
		}
	}
	return 0
}

// leftOf returns how many tokens a bucket has.
func leftOf(t *testing.T, looking limiter.Store, c limiter.Charge) int64 {
	t.Helper()
	v := make([]limiter.Verdict, 1)
	looking.Take(context.Background(), []limiter.Charge{c}, v)
	if v[0].Err != nil {
		t.Fatal(v[0].Err)
	}
	return v[0].Remaining
}
