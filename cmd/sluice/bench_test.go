package main

import (
	"context"
	"fmt"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/sluiceproxy/sluice/limiter/redistest"
)

// checkRequest is a check as Envoy sends it for a browser's request.
func checkRequest(ip, method, path string, headers map[string]string) *authv3.CheckRequest {
	all := map[string]string{
		":authority": "shop.example.com", ":method": method, ":path": path, ":scheme": "http",
		"accept": "*/*", "user-agent": "curl/8.5.0", "x-forwarded-proto": "http",
		"x-request-id": "7f1f2a3b-5a0c-4a53-9d5a-0a3f5a9e3c11",
	}
	for k, v := range headers {
		all[k] = v
	}
	return &authv3.CheckRequest{Attributes: &authv3.AttributeContext{
		Source: &authv3.AttributeContext_Peer{Address: &corev3.Address{Address: &corev3.Address_SocketAddress{
			SocketAddress: &corev3.SocketAddress{Address: ip, PortSpecifier: &corev3.SocketAddress_PortValue{PortValue: 50123}},
		}}},
		Destination: &authv3.AttributeContext_Peer{Address: &corev3.Address{Address: &corev3.Address_SocketAddress{
			SocketAddress: &corev3.SocketAddress{Address: "127.0.0.1", PortSpecifier: &corev3.SocketAddress_PortValue{PortValue: 8080}},
		}}},
		Request: &authv3.AttributeContext_Request{Http: &authv3.AttributeContext_HttpRequest{
			Id: "1234567890", Method: method, Path: path, Host: "shop.example.com", Scheme: "http", Protocol: "HTTP/1.1", Headers: all,
		}},
	}}
}

// constantServer is what sluice is compared with: the least that a gRPC server at its defaults, on a Go at its defaults, must do to
// give the same answer.
func constantServer() {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		panic(err)
	}
	fmt.Println(l.Addr())
	s := grpc.NewServer()
	authv3.RegisterAuthorizationServer(s, constant{})
	_ = s.Serve(l)
}

type constant struct{}

func (constant) Check(context.Context, *authv3.CheckRequest) (*authv3.CheckResponse, error) {
	header := func(k, v string) *corev3.HeaderValueOption {
		return &corev3.HeaderValueOption{
			Header:       &corev3.HeaderValue{Key: k, Value: v},
			AppendAction: corev3.HeaderValueOption_OVERWRITE_IF_EXISTS_OR_ADD,
		}
	}
	return &authv3.CheckResponse{
		Status: &status.Status{},
		HttpResponse: &authv3.CheckResponse_OkResponse{OkResponse: &authv3.OkHttpResponse{
			ResponseHeadersToAdd: []*corev3.HeaderValueOption{
				header("x-ratelimit-limit", "1000000000"), header("x-ratelimit-remaining", "999999999"), header("x-ratelimit-reset", "1"),
			},
		}},
		DynamicMetadata: &structpb.Struct{Fields: map[string]*structpb.Value{
			"decision": structpb.NewStringValue("allowed"), "limit": structpb.NewStringValue("per-client"),
			"remaining": structpb.NewNumberValue(999999999), "cost": structpb.NewNumberValue(1),
			"source": structpb.NewStringValue("redis"), "shadow": structpb.NewListValue(&structpb.ListValue{}),
		}},
	}, nil
}

// cpu is the processor time that a process has used, in steps of 10 ms.
func cpu(b *testing.B, pid int) time.Duration {
	b.Helper()
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		b.Fatal(err)
	}
	fields := strings.Fields(string(stat)[strings.LastIndex(string(stat), ")")+2:])
	var ticks int
	for _, f := range fields[11:13] { // utime and stime, as proc(5) counts from 14
		n, err := strconv.Atoi(f)
		if err != nil {
			b.Fatal(err)
		}
		ticks += n
	}
	return time.Duration(ticks) * 10 * time.Millisecond
}

// BenchmarkCheckCPU prints, from one run on one machine, what a check costs the server's processor, and Redis's, beside a server that
// gives a constant answer. 64 callers on two connections and a thousand keys; the servers take turns, so that a noisy machine is noisy for all.
//
//	go test ./cmd/sluice -run '^$' -bench CheckCPU -benchtime 1x
func BenchmarkCheckCPU(b *testing.B) {
	const callers, keys, rounds, each = 64, 1000, 5, 30_000
	const config = `
limits:
  - {name: per-client, key: client.ip, rate: 1000000000/s}
`
	redis := redistest.Start(b)
	servers := []*measured{{name: "constant answer"}, {name: "sluice, in process"}, {name: "sluice, on Redis"}}
	servers[0].start(b, startConstant(b))
	for i, args := range [][]string{nil, {"--redis", redis.URL()}} {
		p := startSluice(b, append([]string{"--config", file(b, "sluice.yaml", config)}, args...)...)
		servers[i+1].start(b, p)
	}
	requests := make([]*authv3.CheckRequest, keys)
	for i := range requests {
		requests[i] = from(fmt.Sprintf("10.1.%d.%d", i/250, i%250), "/v1/orders?page=2")
	}

	for b.Loop() {
		for round := range rounds + 1 {
			for _, s := range servers {
				cpuBefore, redisBefore, scriptsBefore, began := cpu(b, s.pid), redis.CPU(), evalshas(b, redis), time.Now()
				s.load(b, requests, callers, each)
				if round == 0 { // warms up
					s.latencies = s.latencies[:0]
					continue
				}
				s.cpu += cpu(b, s.pid) - cpuBefore
				s.redis += redis.CPU() - redisBefore
				s.scripts += evalshas(b, redis) - scriptsBefore
				s.took += time.Since(began)
				s.checks += each
			}
		}
	}
	base := float64(servers[0].cpu) / float64(servers[0].checks)
	fmt.Printf("\n%-20s %12s %8s %12s %12s %10s %9s %9s\n", "", "server µs", "ratio", "redis µs", "EVALSHAs", "checks/s", "p50 µs", "p99 µs")
	for _, s := range servers {
		n := float64(s.checks)
		slices.Sort(s.latencies)
		fmt.Printf("%-20s %12.1f %8.2f %12.1f %12.2f %10.0f %9d %9d\n", s.name, float64(s.cpu.Microseconds())/n, float64(s.cpu)/n/base,
			float64(s.redis.Microseconds())/n, float64(s.scripts)/n, n/s.took.Seconds(),
			s.latencies[len(s.latencies)/2].Microseconds(), s.latencies[len(s.latencies)*99/100].Microseconds())
	}
	b.ReportMetric(float64(servers[1].cpu)/float64(servers[1].checks)/base, "memory/constant")
	b.ReportMetric(float64(servers[2].cpu)/float64(servers[2].checks)/base, "redis/constant")
}

func evalshas(b *testing.B, s *redistest.Server) int {
	b.Helper()
	_, rest, _ := strings.Cut(s.Info("commandstats")["cmdstat_evalsha"], "calls=")
	n, _, _ := strings.Cut(rest, ",")
	calls, _ := strconv.Atoi(n) // none yet: 0
	return calls
}

// startConstant starts constantServer as a process.
func startConstant(b *testing.B) *process {
	b.Helper()
	p := start(b, "constant", nil)
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		b.Fatal(err)
	}
	if err := p.cmd.Start(); err != nil {
		b.Fatal(err)
	}
	if _, err := fmt.Fscanln(out, &p.grpc); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		_ = p.cmd.Process.Kill()
		_ = p.cmd.Wait()
	})
	return p
}

// measured is one server of a comparison.
type measured struct {
	name  string
	pid   int
	conns []*grpc.ClientConn

	checks, scripts  int
	cpu, redis, took time.Duration
	latencies        []time.Duration
}

// start connects to the server and looks at its answer: one that gives the wrong one is not worth timing.
func (m *measured) start(b *testing.B, p *process) {
	b.Helper()
	m.pid = p.cmd.Process.Pid
	for range 2 {
		m.conns = append(m.conns, dial(b, p.grpc))
	}
	answer, err := authv3.NewAuthorizationClient(m.conns[0]).Check(b.Context(), from("192.0.2.1", "/"))
	if err != nil {
		b.Fatal(err)
	}
	got := map[string]string{}
	for _, h := range answer.GetOkResponse().GetResponseHeadersToAdd() {
		got[h.GetHeader().GetKey()] = h.GetHeader().GetValue()
	}
	if got["x-ratelimit-limit"] != "1000000000" || got["x-ratelimit-remaining"] != "999999999" || len(got) != 3 ||
		len(answer.GetDynamicMetadata().GetFields()) != 6 {
		b.Fatalf("%s answers %v", m.name, answer)
	}
}

// load makes checks from that many callers.
func (m *measured) load(b *testing.B, requests []*authv3.CheckRequest, callers, checks int) {
	b.Helper()
	var wg sync.WaitGroup
	var mu sync.Mutex
	for c := range callers {
		wg.Go(func() {
			client := authv3.NewAuthorizationClient(m.conns[c%len(m.conns)])
			mine := make([]time.Duration, 0, checks/callers+1)
			for i := c; i < checks; i += callers {
				began := time.Now()
				answer, err := client.Check(b.Context(), requests[i%len(requests)])
				mine = append(mine, time.Since(began))
				if err != nil || answer.GetStatus().GetCode() != 0 {
					b.Errorf("%s: %v, %v", m.name, answer, err)
					return
				}
			}
			mu.Lock()
			defer mu.Unlock()
			m.latencies = append(m.latencies, mine...)
		})
	}
	wg.Wait()
}
