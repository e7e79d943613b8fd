package backtest

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/sluiceproxy/sluice/cmd/sluice/accesslog"
)

// tenLimits are limits of all kinds, of which most apply to a request.
const tenLimits = `limits:
  - {name: a1, key: client.network, rate: 10/s, burst: 50}
  - {name: a2, key: client.ip, rate: 100/m}
  - {name: a3, key: [client.ip, request.method], rate: 1000/h}
  - {name: a4, key: request.url_path, rate: 100/s}
  - {name: a5, match: {methods: [GET]}, key: client.network, rate: 20/s}
  - {name: a6, match: {paths: ["/images/**"]}, key: client.ip, rate: 5/s}
  - {name: a7, match: {paths: ["/blog/**", "/v1/**"]}, key: client.ip, rate: 5/s}
  - {name: a8, rate: 1000/s}
  - {name: a9, key: 'request.headers["user-agent"]', rate: 100/s}
  - {name: a10, key: [client.network, request.url_path], rate: 60/m}
`

// BenchmarkRun plays a log of 100,000 combined lines through ten limits. The
// time is that of the whole log.
func BenchmarkRun(b *testing.B) {
	random := rand.New(rand.NewPCG(1, 2))
	begin := time.Date(2026, 3, 1, 10, 0, 0, 0, time.UTC)
	var log strings.Builder
	const lines = 100_000
	for i := range lines {
		fmt.Fprintf(&log, "10.0.%d.%d - - [%s +0000] \"GET /%s/%d HTTP/1.1\" 200 512 \"http://www.example.com/\" "+
			"\"Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.%d\"\n", random.IntN(8), random.IntN(250),
			begin.Add(time.Duration(i)*2*time.Millisecond).Format("02/Jan/2006:15:04:05"),
			[]string{"images", "blog", "v1", "assets"}[random.IntN(4)], random.IntN(300), random.IntN(100))
	}
	path := filepath.Join(b.TempDir(), "access.log")
	if err := os.WriteFile(path, []byte(log.String()), 0o600); err != nil {
		b.Fatal(err)
	}
	cfg := config(b, tenLimits)
	b.SetBytes(int64(log.Len()))
	for b.Loop() {
		s, err := accesslog.Open(path, nil, accesslog.Options{Wanted: Wanted(cfg)})
		if err != nil {
			b.Fatal(err)
		}
		r, err := Run(b.Context(), Options{Config: cfg, Logs: []*accesslog.Source{s}})
		if err != nil || r.Requests != lines || len(r.Limits) != 10 || r.Limits[9].Requests != lines {
			b.Fatal(err, r)
		}
	}
}
