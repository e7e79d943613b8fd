package authz

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap"

	"github.com/sluiceproxy/sluice/limiter"
)

// BenchmarkReport measures what reporting costs a check, on all cores and with
// a thousand keys: metrics, sampled log lines, top keys, denials and the counts
// of gRPC calls. A whole check costs the server tens of microseconds
// (BenchmarkServers in cmd/sluice).
func BenchmarkReport(b *testing.B) {
	for name, told := range map[string]limiter.Verdict{
		"allowed": ok(50, time.Second, time.Second),
		"limited": no(0, time.Second, time.Second, time.Second),
	} {
		b.Run(name, func(b *testing.B) {
			s, _, _ := newServer(b, "limits: [{name: a, rate: 100/s, key: client.ip}]", nil)
			s.report.log = zap.NewNop() // the tests' own writes each denial
			config := s.config.Load()
			limit, bucket := config.Limits()[0], bucketOf(b)
			verdicts := make([]checkState, 1000)
			for i := range verdicts {
				request, err := requestOf(checkOf())
				if err != nil {
					b.Fatal(err)
				}
				outcome := limiter.Limited
				if told.Allowed {
					outcome = limiter.Allowed
				}
				charge := limiter.Charge{
					Limit: limit, Bucket: bucket, Cost: 1,
					Key: fmt.Sprintf("sluice:default:a:{=9.10.0.0.%d}", i),
				}
				wire := strings.Repeat(" ", 1000)
				verdicts[i] = checkState{config: config, request: request, wire: wire, decision: limiter.Decision{
					Outcome:  outcome,
					Charges:  []limiter.Charge{charge},
					Verdicts: []limiter.Verdict{told},
				}}
			}
			b.ReportAllocs()
			b.RunParallel(func(each *testing.PB) {
				for i := 0; each.Next(); i++ {
					s.metrics.check.started.Inc()
					s.report.checked(&verdicts[i*7919%1000], time.Now())
					s.metrics.check.completed(nil)
				}
			})
			b.StopTimer()
			if n := s.Totals().Seconds.GetSampleCount(); n != uint64(b.N) {
				b.Errorf("%d of %d checks were counted", n, b.N)
			}
		})
	}
}
