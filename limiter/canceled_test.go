package limiter

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/sluiceproxy/sluice/limiter/redistest"
)

// If the caller hangs up, the outcome is Canceled whatever the failure modes
// are. It does not count as a store error, and no tokens are taken, neither in
// Redis nor locally.
func TestCallerHangsUp(t *testing.T) {
	nodes := redistest.StartCluster(t, 3)
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	for name, r := range map[string]*Redis{
		"single":  newTestRedis(t, redistest.Start(t), serverClock),
		"cluster": newClusterStore(t, nodes),
	} {
		b := bucket(t, 1, day, 10)
		for _, mode := range []FailureMode{Allow, Local, Delegate, Deny} {
			limit := &Limit{Domain: "test", Name: fmt.Sprint("on-failure-", mode), OnFailure: mode, LocalShare: .5}
			mine := Charge{
				Limit:  limit,
				Bucket: b,
				Key:    fmt.Sprintf("sluice:test:a:{%s-%v}", name, mode),
				Cost:   1,
			}
			other := Charge{
				Limit:  &Limit{Domain: "test", Name: "other", OnFailure: Deny},
				Bucket: b,
				Key:    fmt.Sprintf("sluice:test:b:{other-%v}", mode),
				Cost:   1,
			}
			shadow := mine.shadow()
			shadow.Key = fmt.Sprintf("sluice:test:c:{%s-%v}", name, mode)
			for what, charges := range map[string][]Charge{
				"one": {mine}, "a shadow": {shadow}, "several": {mine, other, shadow},
			} {
				if name == "single" && what == "several" {
					charges = []Charge{mine, shadow}
				}
				began := time.Now()
				if d := Decide(gone, r, charges); d.Outcome != Canceled || d.Local {
					t.Errorf("%s, %v, %s: %+v", name, mode, what, d)
				}
				if took := time.Since(began); took > time.Second {
					t.Errorf("%s, %v, %s: took %v", name, mode, what, took)
				}
			}
			if d := Decide(t.Context(), r, []Charge{mine}); d.Outcome != Allowed || d.Verdicts[0].Remaining != 9 ||
				d.Verdicts[0].Source != RedisSource {
				t.Errorf("%s, %v: afterwards %+v", name, mode, d)
			}
		}
		for kind, n := range r.errors {
			if n := testutil.ToFloat64(n); n != 0 {
				t.Errorf("%s: %v errors of kind %s", name, n, kind)
			}
		}
	}
}

// A caller that hangs up is still denied if another bucket of the request is
// known to be empty.
func TestDenialBeforeCallerHangsUp(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	b := bucket(t, 1, day, 10)
	says := saying{{Source: RedisSource, RetryAfter: time.Second}, {Err: storeError(context.Canceled)}}
	if d := Decide(ctx, says, []Charge{charge(b, "a"), charge(b, "b")}); d.Outcome != Limited || d.Strictest != 0 {
		t.Errorf("%+v", d)
	}
}

// saying is a store that says the same of each request.
type saying []Verdict

func (s saying) Take(_ context.Context, _ []Charge, verdicts []Verdict) { copy(verdicts, s) }
