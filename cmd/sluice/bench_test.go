package main

import (
	"flag"
	"fmt"
	"io"
	"maps"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"github.com/redis/go-redis/v9"

	"github.com/sluiceproxy/sluice/limiter/redistest"
)

// checkRequest returns a check as Envoy sends it for a browser's request.
func checkRequest(ip, method, path string, headers map[string]string) *authv3.CheckRequest {
	all := map[string]string{
		":authority": "shop.example.com", ":method": method, ":path": path, ":scheme": "http",
		"accept": "*/*", "user-agent": "curl/8.5.0", "x-forwarded-proto": "http",
		"x-request-id": "7f1f2a3b-5a0c-4a53-9d5a-0a3f5a9e3c11",
	}
	maps.Copy(all, headers)
	return &authv3.CheckRequest{Attributes: &authv3.AttributeContext{
		Source: &authv3.AttributeContext_Peer{Address: &corev3.Address{Address: &corev3.Address_SocketAddress{
			SocketAddress: &corev3.SocketAddress{Address: ip, PortSpecifier: &corev3.SocketAddress_PortValue{PortValue: 50123}},
		}}},
		Destination: &authv3.AttributeContext_Peer{Address: &corev3.Address{Address: &corev3.Address_SocketAddress{
			SocketAddress: &corev3.SocketAddress{
				Address:       "127.0.0.1",
				PortSpecifier: &corev3.SocketAddress_PortValue{PortValue: 8080},
			},
		}}},
		Request: &authv3.AttributeContext_Request{Http: &authv3.AttributeContext_HttpRequest{
			Id: "1234567890", Method: method, Path: path, Host: "shop.example.com", Scheme: "http", Protocol: "HTTP/1.1",
			Headers: all,
		}},
	}}
}

// benchScript returns the script as sluice sends it.
func benchScript(b testing.TB) string {
	b.Helper()
	text, err := os.ReadFile(filepath.Join("..", "..", "limiter", "take.lua"))
	if err != nil {
		b.Fatal(err)
	}
	return string(text) + "local t = redis.call('TIME') return take(t[1] * 1000000 + t[2])\n"
}

const (
	openLimit = "limits: [{name: per-client, key: client.ip, rate: 1000000000/s}]"
	slowLimit = "limits: [{name: per-client, key: client.ip, rate: 1/s}]"
)

// Sluice and the servers that it is compared with answer alike.
func TestBaselines(t *testing.T) {
	url := redistest.Start(t).URL()
	for _, s := range []*measured{
		{name: "constant answer", process: startBaseline(t, "constant", nil)},
		{name: "plain sidecar", process: startBaseline(t, "plain", []string{"SLUICE_TEST_SCRIPT=" + benchScript(t)}, url)},
		{name: "sluice", process: startSluice(t, "--config", file(t, "a.yaml", openLimit))},
		{name: "sluice, flooded", process: startSluice(t, "--config", file(t, "b.yaml", slowLimit)), flood: true},
	} {
		s.start(t)
	}
}

// plot is the file that BenchmarkServers draws its result into.
var plot = flag.String("plot", "", "an SVG `file` for BenchmarkServers")

// BenchmarkServers prints, from one run on one machine, what a check costs the
// server's processor and Redis's, beside servers that do less: by 1, 16 and 64
// callers on two connections, on a thousand keys. The servers take turns, so
// that a noisy machine is noisy for all, and every other round in the opposite
// order, so that none is always measured after the same one.
//
//	go test ./cmd/sluice -run '^$' -bench Servers -benchtime 1x -plot ../../limiter/speed.svg
func BenchmarkServers(b *testing.B) {
	const keys, rounds = 1000, 6
	store := redistest.Start(b)
	// A benchmark must not fail because the machine is busy.
	patient := "store: {redis: {url: " + store.URL() + ", timeout: 5s}}\n"
	script := benchScript(b)
	servers := []*measured{
		{name: "constant answer", process: startBaseline(b, "constant", nil)},
		{name: "constant, tuned", process: startBaseline(b, "constant", nil, "tuned")},
		{name: "plain sidecar", process: startBaseline(b, "plain", []string{"SLUICE_TEST_SCRIPT=" + script}, store.URL())},
	}
	executable = build(b)
	b.Cleanup(func() { executable = os.Args[0] })
	servers = append(servers, []*measured{
		{name: "sluice, in process", process: startSluice(b, "--config", file(b, "a.yaml", openLimit))},
		{name: "sluice, on Redis", process: startSluice(b, "--config", file(b, "b.yaml", patient+openLimit))},
		{
			name:    "sluice, flooded",
			process: startSluice(b, "--config", file(b, "c.yaml", patient+slowLimit), "--domain", "flood"),
			flood:   true,
		},
	}...)
	many := manyClients(keys)
	for _, s := range servers {
		s.requests = many
		if s.flood {
			s.requests = many[:10]
		}
		s.start(b)
	}
	for b.Loop() {
		var bare, after []time.Duration
		for _, load := range []struct{ callers, each int }{{1, 3000}, {16, 20_000}, {64, 30_000}} {
			for _, s := range servers {
				s.reset()
			}
			for round := range rounds + 1 {
				turns := slices.Clone(servers)
				if round%2 == 0 {
					slices.Reverse(turns)
				}
				for _, s := range turns {
					s.round(b, store, load.callers, load.each, round > 0)
				}
				if load.callers == 1 {
					bare = append(bare, bareEVALSHA(b, store, script, func(int) {})...)
					client := authv3.NewAuthorizationClient(servers[0].conns[0])
					after = append(after, bareEVALSHA(b, store, script, func(i int) {
						if _, err := client.Check(b.Context(), many[i%keys]); err != nil {
							b.Fatal(err)
						}
					})...)
				}
			}
			fmt.Printf(
				"\n%d callers\n%-20s %10s %10s %8s %8s %12s %10s %8s %8s %8s\n", load.callers, "", "server µs", "Redis µs",
				"server", "both", "Redis calls", "checks/s", "p50 µs", "p99 µs", "p99.9 µs",
			)
			for _, s := range servers {
				s.print(servers[0])
			}
			switch load.callers {
			case 64:
				sluice := servers[4]
				fmt.Printf(
					"\nmarks: server and Redis over constant %.2f, throughput over constant %.2f and over plain %.2f, in process "+
						"%.2f, flooded %.2f; "+
						"flooded: %d grants, %d Redis calls, %d checks in %v; memory of sluice on Redis %d MiB\n",
					sluice.both()/servers[0].both(),
					sluice.throughput()/servers[0].throughput(),
					sluice.throughput()/servers[2].throughput(),
					servers[3].server()/servers[0].server(),
					servers[5].server()/servers[0].server(),
					servers[5].granted,
					servers[5].scripts,
					servers[5].checks,
					servers[5].took.Round(time.Millisecond),
					rss(b, sluice.process.cmd.Process.Pid)>>20,
				)
				if *plot != "" {
					draw(b, *plot, servers[:6])
				}
			case 1:
				slices.Sort(bare)
				slices.Sort(after)
				more, hot, cold := servers[4].quantile(.5)-servers[0].quantile(.5), bare[len(bare)/2], after[len(after)/2]
				fmt.Printf(
					"\nmark: p50 over constant's %v: %.2f of a bare EVALSHA's %v in a row, %.2f of its %v between checks of the "+
						"constant answer\n",
					more,
					float64(more)/float64(hot),
					hot,
					float64(more)/float64(cold),
					cold,
				)
			}
		}
	}
}

// build builds sluice as the image does, by the Dockerfile's command.
func build(t testing.TB) string {
	t.Helper()
	dockerfile, err := os.ReadFile("../../Dockerfile")
	if err != nil {
		t.Fatal(err)
	}
	command := regexp.MustCompile(`go build .* -o /sluice \./cmd/sluice`).FindString(string(dockerfile))
	if command == "" {
		t.Fatal("the Dockerfile has no go build … -o /sluice ./cmd/sluice")
	}
	path := filepath.Join(t.TempDir(), "sluice")
	c := exec.Command("sh", "-c", strings.Replace(command, "-o /sluice ./cmd/sluice", `-o "$OUT" .`, 1))
	c.Env = append(os.Environ(), "CGO_ENABLED=0", "VERSION=devel", "OUT="+path)
	if out, err := c.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return path
}

// bareEVALSHA returns the durations of one caller's calls of the script, each
// after a call of before. In a row they find Redis awake. After a check they
// find it as the sidecar does, which has just been woken itself.
func bareEVALSHA(b *testing.B, store *redistest.Server, text string, before func(i int)) []time.Duration {
	b.Helper()
	client, script := store.Client(), redis.NewScript(text)
	var took []time.Duration
	for i := range 3000 {
		before(i)
		began := time.Now()
		reply, err := script.Run(b.Context(), client, []string{fmt.Sprintf("sluice:bare:{%d}", i%1000)}, oneCharge()).Text()
		if took = append(took, time.Since(began)); err != nil || !tookOne(reply) {
			b.Fatalf("%q %v", reply, err)
		}
	}
	return took
}

// startBaseline starts one of the servers above as a process.
func startBaseline(b testing.TB, mode string, env []string, args ...string) *process {
	b.Helper()
	p := start(b, mode, env, args...)
	p.cmd.Stderr = os.Stderr
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

// BenchmarkThroughEnvoy prints how long one caller waits for an answer through
// a real Envoy: without a filter, with one that asks a constant answer, and
// with sluice in process, on Redis, and with a lease. Each round goes through
// them in the reverse order of the one before.
//
//	go test ./cmd/sluice -run '^$' -bench ThroughEnvoy -benchtime 1x
func BenchmarkThroughEnvoy(b *testing.B) {
	const each, rounds = 2000, 5 // odd, so that the rows are printed in their order
	const config = "limits: [{name: per-client, key: client.ip, rate: 1000000000/s%s}]"
	store, up := redistest.Start(b), startUpstream(b)
	upstream := up.Listener.Addr().String()
	constant := startBaseline(b, "constant", nil)
	noFilter := func(bootstrap string) string {
		from, to := strings.Index(
			bootstrap,
			"          - name: envoy.filters.http.ext_authz",
		), strings.Index(
			bootstrap,
			"          - name: envoy.filters.http.router",
		)
		return bootstrap[:from] + bootstrap[to:]
	}
	executable = build(b)
	b.Cleanup(func() { executable = os.Args[0] })
	var p *process // the last one that was started
	sluice := func(name, lease string, args ...string) string {
		p = startSluice(b, append(args, "--config", file(b, name, fmt.Sprintf(config, lease)), "--domain", name)...)
		return startEnvoy(b, p.grpc, upstream)
	}
	type way struct {
		name, url string
		filtered  bool
		took      []time.Duration
	}
	constantAnswer := &way{name: "constant answer", url: startEnvoy(b, constant.grpc, upstream), filtered: true}
	ways := []*way{
		{name: "no filter", url: startEnvoy(b, constant.grpc, upstream, noFilter)},
		constantAnswer,
		{name: "sluice, in process", url: sluice("in-process", ""), filtered: true},
		{name: "sluice, on Redis", url: sluice("on-redis", "", "--redis", store.URL()), filtered: true},
		{name: "sluice, leased", url: sluice("leased", ", lease: 200ms", "--redis", store.URL()), filtered: true},
	}
	c := client(b)
	for b.Loop() {
		for round := range rounds + 1 {
			slices.Reverse(ways)
			for _, w := range ways {
				for range each {
					began := time.Now()
					response, err := c.Get("http://" + w.url + "/")
					if err != nil {
						b.Fatal(err)
					}
					_, err = io.Copy(io.Discard, response.Body)
					_ = response.Body.Close()
					took := time.Since(began)
					if err != nil || response.StatusCode != http.StatusOK ||
						(response.Header.Get("x-ratelimit-limit") == "1000000000") != w.filtered {
						b.Fatal(w.name, response.Status, response.Header, err)
					}
					if round > 0 {
						w.took = append(w.took, took)
					}
				}
			}
		}
		if n := p.counted(`sluice_lease_takes_total\{limit="per-client"\}`); n == 0 {
			b.Fatal("nothing was leased")
		}
		for _, w := range ways {
			slices.Sort(w.took)
		}
		fmt.Printf("\n%-20s %8s %8s %8s\n", "through Envoy", "p50 µs", "p99 µs", "p50 over constant's")
		for _, w := range ways {
			p50 := w.took[len(w.took)/2]
			fmt.Printf("%-20s %8d %8d %8.2f\n", w.name, p50.Microseconds(), w.took[len(w.took)*99/100].Microseconds(),
				float64(p50)/float64(constantAnswer.took[len(constantAnswer.took)/2]))
		}
	}
}

// BenchmarkStart prints how long a sidecar takes from its start until it is
// ready, with a Redis.
//
//	go test ./cmd/sluice -run '^$' -bench Start -benchtime 1x
func BenchmarkStart(b *testing.B) {
	store := redistest.Start(b)
	binary := build(b)
	config := file(b, "sluice.yaml", "limits: [{name: per-client, key: client.ip, rate: 10/s}]")
	for b.Loop() {
		var all []time.Duration
		for range 20 {
			metrics := redistest.FreePort(b)
			c := exec.Command(
				binary, "run", "--config", config, "--redis", store.URL(), "--grpc", "127.0.0.1:0", "--admin", "127.0.0.1:0",
				"--metrics", "127.0.0.1:"+metrics,
			)
			began := time.Now()
			if err := c.Start(); err != nil {
				b.Fatal(err)
			}
			eventually(b, "the sidecar to be ready", func() bool {
				response, err := http.Get("http://127.0.0.1:" + metrics + "/readyz")
				if err != nil {
					return false
				}
				_ = response.Body.Close()
				return response.StatusCode == http.StatusOK
			})
			all = append(all, time.Since(began))
			_ = c.Process.Kill()
			_ = c.Wait()
		}
		slices.Sort(all)
		fmt.Printf(
			"\nfrom the start to /readyz: median %v, slowest of %d %v\n", all[len(all)/2].Round(time.Millisecond), len(all),
			all[len(all)-1].Round(time.Millisecond),
		)
	}
}
