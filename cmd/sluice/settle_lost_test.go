package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	logdatav3 "github.com/envoyproxy/go-control-plane/envoy/data/accesslog/v3"
	logv3 "github.com/envoyproxy/go-control-plane/envoy/service/accesslog/v3"
	"google.golang.org/grpc"

	"github.com/sluiceproxy/sluice/limiter/redistest"
)

// lossyLog passes an access log on to sluice, but for each tenth entry.
type lossyLog struct {
	logv3.UnimplementedAccessLogServiceServer
	to             logv3.AccessLogServiceClient
	entries, drops atomic.Int64
}

func (l *lossyLog) StreamAccessLogs(from logv3.AccessLogService_StreamAccessLogsServer) error {
	to, err := l.to.StreamAccessLogs(from.Context())
	if err != nil {
		return err
	}
	for {
		message, err := from.Recv()
		if errors.Is(err, io.EOF) {
			return from.SendAndClose(&logv3.StreamAccessLogsResponse{})
		}
		if err != nil {
			return err
		}
		if logs := message.GetHttpLogs(); logs != nil {
			var kept []*logdatav3.HTTPAccessLogEntry
			for _, entry := range logs.GetLogEntry() {
				if l.entries.Add(1)%10 == 0 {
					l.drops.Add(1)
				} else {
					kept = append(kept, entry)
				}
			}
			logs.LogEntry = kept
		}
		if err := to.Send(message); err != nil {
			return err
		}
	}
}

// TestChaosLostEnds loses a tenth of all ends between Envoy and sluice. What the
// requests took is spent, nothing is held longer than settle_within and a tenth
// of it, and the metrics say how many they were.
func TestChaosLostEnds(t *testing.T) {
	perSecond, lasts := redistest.Scaled(200, 500), redistest.Lasts(3*time.Second, 12*time.Second)
	const within = 2 * time.Second
	config := fmt.Sprintf("store: {redis: {url: 'redis://%s', timeout: 20s}}\n"+
		"limits: [{name: lossy, rate: 1000/d, burst: 1000000, cost: 10, settle: 4, settle_within: %v}]",
		redistest.StartNode(t).Addr, within)
	lossy := &lossyLog{}
	server := grpc.NewServer()
	logv3.RegisterAccessLogServiceServer(server, lossy)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	_, port, err := net.SplitHostPort(listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	const cluster, before = "envoy_grpc: { cluster_name: sluice }", "\n                # Tell each end"
	up := http.HandlerFunc(func(http.ResponseWriter, *http.Request) {})
	s := startSettling(t, config, up, nil,
		replaced(t, cluster+before, strings.Replace(cluster, "sluice", "ends", 1)+before),
		func(bootstrap string) string {
			return bootstrap + `
  - name: ends
    typed_extension_protocol_options:
      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
        "@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
        explicit_http_config: { http2_protocol_options: {} }
    load_assignment:
      cluster_name: ends
      endpoints:
      - lb_endpoints:
        - endpoint: { address: { socket_address: { address: 127.0.0.1, port_value: ` + port + ` } } }
`
		})
	lossy.to = logv3.NewAccessLogServiceClient(dial(t, s.p.grpc))
	go func() { _ = server.Serve(listener) }()
	t.Cleanup(server.Stop)

	var asked atomic.Int64
	ask := func() {
		r, err := s.c.Get("http://" + s.addr + "/")
		if err != nil {
			t.Error(err)
			return
		}
		_ = r.Body.Close()
		if r.StatusCode != http.StatusOK {
			t.Errorf("%d", r.StatusCode)
		}
		asked.Add(1)
	}
	redistest.Pace(perSecond, lasts, ask)
	ended := time.Now()
	var asking time.Duration // how long it took to ask what is held
	held := func() int64 {
		began := time.Now()
		defer func() { asking = time.Since(began) }()
		status, stdout, stderr := sluice(t, nil, "bucket", "get", "--config", file(t, "sluice.yaml", config),
			"--limit", "lossy", "-o", "json")
		var b bucketState
		if err := json.Unmarshal([]byte(stdout), &b); status != 0 || err != nil {
			t.Fatal(stdout, stderr, err)
		}
		return b.Held
	}
	if held() == 0 {
		t.Error("nothing was held when the last response had ended")
	}
	eventually(t, "nothing held", func() bool { return held() == 0 })
	// The command before saw held tokens, and may have taken as long.
	if took := time.Since(ended) - 2*asking; took > within+within/10 {
		t.Errorf("tokens were held for %v", took)
	}
	ask() // which finds what has expired
	eventually(t, "all ends", func() bool { return lossy.entries.Load() == asked.Load() })
	kept := int(asked.Load() - lossy.drops.Load())
	eventually(t, "all settlements", func() bool {
		return s.p.counted(`sluice_tokens_returned_total\{limit="lossy"\}`) == 6*kept
	})
	lost := int(lossy.drops.Load())
	if n := s.p.counted(`sluice_holds_expired_total\{limit="lossy"\}`); n != lost && n != lost-1 { // the last may be held
		t.Errorf("%d holds expired, and %d ends were lost", n, lost)
	}
	t.Logf("%d requests, of which %d ends were lost: %d expired", asked.Load(), lossy.drops.Load(),
		s.p.counted(`sluice_holds_expired_total\{limit="lossy"\}`))
}
