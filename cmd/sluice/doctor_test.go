package main

import (
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/sluiceproxy/sluice/envoy"
	"github.com/sluiceproxy/sluice/limiter/redistest"
)

func TestDoctor(t *testing.T) {
	good := redistest.Start(t, "--appendonly", "yes")
	careless := redistest.Start(t, "--maxmemory", "100mb", "--maxmemory-policy", "allkeys-lru")
	port := redistest.FreePort(t)
	master := redistest.Start(t, "--port", port, "--bind", "127.0.0.1")
	replica := redistest.Start(t, "--replicaof", "127.0.0.1", port)
	eventually(t, "a connected replica", func() bool { return master.Info("replication")["connected_slaves"] == "1" })
	for user, rights := range map[string][]any{
		"least": {"on", ">pw", "~sluice:*", "+evalsha", "+eval", "+time", "+get", "+set"},
		"less":  {"on", ">pw", "~sluice:*", "+evalsha", "+eval", "+time", "+get"},
	} {
		setUser := append([]any{"ACL", "SETUSER", user, "reset"}, rights...)
		if err := good.Client().Do(t.Context(), setUser...).Err(); err != nil {
			t.Fatal(err)
		}
	}
	dead := redistest.Start(t)
	url := dead.URL()
	dead.Kill()
	config := func(url, more string) string {
		return file(t, "sluice.yaml", "store: {redis: {url: '"+url+"', timeout: 5s"+more+"}}\n")
	}
	for _, tt := range []struct {
		name, config string
		args         string
		status       int
		want         []string // lines, or what they begin with
	}{
		{"good", config(good.URL(), ""), "--envoy-timeout 10s", 0, []string{
			"ok    config        0 limits\n", "ok    reachable ", "ok    round trip ", "ok    timeouts ", "ok    script ",
			"ok    clock ", "ok    version ", "ok    eviction ", "ok    persistence   appendonly, appendfsync everysec\n",
			"ok    replication   no replicas\n",
		}},
		{
			"slower than Envoy", config(good.URL(), ""), "", 0,
			[]string{
				"warn  timeouts      the store's timeout of 5s is not below Envoy's 200ms\n                    → keep " +
					"store.redis.timeout below",
			},
		},
		{"careless", config(careless.URL(), ""), "", 0, []string{
			"warn  eviction      maxmemory-policy is allkeys-lru, with maxmemory 104857600\n                    → " +
				"set maxmemory-policy noeviction",
			"warn  persistence   none: after a restart of Redis every bucket is full\n",
		}},
		{
			"a master without a safeguard", config("redis://127.0.0.1:"+port, ""), "", 0,
			[]string{"warn  replication   1 replicas, and min-replicas-to-write 0\n"},
		},
		{
			"a replica", config(replica.URL(), ""), "", 1,
			[]string{
				"fail  script ", "→ point store.redis at the master, and see that it may write",
				"fail  replication   this Redis is a slave\n",
			},
		},
		{
			"least rights", config(good.URL(), ", username: least, password: pw"), "", 0,
			[]string{"ok    script ", "warn  version       unknown: store: auth: NOPERM", "warn  settings "},
		},
		{
			"less", config(good.URL(), ", username: less, password: pw"), "", 1,
			[]string{"fail  script ", "→ ACL SETUSER <user> on ~sluice:default:* +evalsha +eval +time +get +set\n"},
		},
		{
			"a wrong password", config(good.URL(), ", username: least, password: wrong"), "", 1,
			[]string{
				"fail  reachable     store: auth: ", ": WRONGPASS invalid username-password pair",
				"check store.redis.username and password",
			},
		},
		{
			"nobody there", config(url, ""), "", 1,
			[]string{"fail  reachable     store: connection: ", "→ check store.redis.url"},
		},
		{"in process", file(t, "sluice.yaml", "{}\n"), "", 0, []string{"warn  store         in process"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			status, stdout, stderr := sluice(
				t,
				nil,
				append([]string{"doctor", "--config", tt.config}, strings.Fields(tt.args)...)...)
			if status != tt.status || stderr != "" {
				t.Errorf("status %d, want %d; %s", status, tt.status, stderr)
			}
			for _, want := range tt.want {
				if !strings.Contains(stdout, want) {
					t.Errorf("no %q in\n%s", want, stdout)
				}
			}
			status, stdout, _ = sluice(t, nil, "doctor", "--config", tt.config, "-o", "json")
			var d diagnosis
			if err := json.Unmarshal([]byte(stdout), &d); err != nil || len(d.Checks) < 2 || d.Checks[0].Status == "" ||
				status != tt.status {
				t.Errorf("%d %v %s", status, err, stdout)
			}
		})
	}
	for _, s := range []*redistest.Server{good, careless, master} {
		for _, key := range s.Client().Keys(t.Context(), "*").Val() {
			if ttl := s.Client().PTTL(t.Context(), key).Val(); !strings.HasPrefix(key, "sluice:default::{doctor.") || ttl <= 0 ||
				ttl > 6*time.Second {
				t.Errorf("doctor has left %s for %v", key, ttl)
			}
		}
	}
	if status, _, stderr := sluice(t, nil, "doctor", "--envoy-timeout", "0s"); status != 2 ||
		!strings.Contains(stderr, "--envoy-timeout 0s: must be above 0") {
		t.Errorf("%d %s", status, stderr)
	}
}

// shardingProxy is an Envoy that spreads keys over servers.
const shardingProxy = `
admin: {address: {socket_address: {address: 127.0.0.1, port_value: 0}}}
static_resources:
  listeners:
  - address: {socket_address: {address: 127.0.0.1, port_value: 0}}
    filter_chains:
    - filters:
      - name: envoy.filters.network.redis_proxy
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.redis_proxy.v3.RedisProxy
          stat_prefix: redis
          settings: {op_timeout: 5s}
          prefix_routes: {catch_all_route: {cluster: redis}}
  clusters:
  - name: redis
    type: STATIC
    lb_policy: MAGLEV
    load_assignment:
      cluster_name: redis
      endpoints: [{lb_endpoints: [SERVERS]}]
`

// TestDoctorNamesAProxy checks that doctor reports a proxy that spreads keys
// over servers, which grants more than the limits. A proxy for a single server
// does no harm.
func TestDoctorNamesAProxy(t *testing.T) {
	binary, err := envoy.Binary(t.Context(), func(s string) { t.Log(s) })
	if err != nil {
		t.Fatal(err)
	}
	var servers []string
	for range 2 {
		_, port, _ := strings.Cut(redistest.StartNode(t, "--appendonly", "yes").Addr, ":")
		servers = append(servers, "{endpoint: {address: {socket_address: {address: 127.0.0.1, port_value: "+port+"}}}}")
	}
	doctor := func(servers []string) (int, string) {
		addr := startEnvoyOn(t, binary, []byte(strings.Replace(shardingProxy, "SERVERS", strings.Join(servers, ", "), 1)))
		status, stdout, stderr := sluice(
			t, nil, "doctor", "--config", file(t, "sluice.yaml", "store: {redis: {url: 'redis://"+addr+"', timeout: 5s}}\n"),
			"--envoy-timeout", "10s",
		)
		if stderr != "" {
			t.Error(stderr)
		}
		return status, stdout
	}
	if status, stdout := doctor(servers); status != 1 ||
		!strings.Contains(stdout, "fail  one server    a proxy at this address spreads keys over several servers") {
		t.Errorf("%d\n%s", status, stdout)
	}
	if status, stdout := doctor(servers[:1]); status != 0 || strings.Contains(stdout, "one server") ||
		strings.Contains(stdout, "this Redis is a ") {
		t.Errorf("%d\n%s", status, stdout)
	}
}

// doctor warns of a lease that is too long for its burst.
func TestDoctorOfLeases(t *testing.T) {
	redis := redistest.Start(t, "--appendonly", "yes")
	_, stdout, _ := sluice(t, nil, "doctor", "--config", file(t, "sluice.yaml", `
store: {redis: {url: '`+redis.URL()+`', timeout: 5s}}
limits:
  - {name: right, rate: 1000/s, burst: 1000, lease: 500ms}
  - {name: none, rate: 1000/s, burst: 10}
  - {name: free, rate: unlimited}
  - {name: long, rate: 1000/s, burst: 1000, lease: 501ms}
`))
	const want = "warn  lease         long: a lease of 501ms is long for a burst that refills in 1s: " +
		"tokens that one sidecar holds are missing at the others\n" +
		"                    → set lease to 500ms at most, or raise burst\n"
	if strings.Count(stdout, "  lease  ") != 1 || !strings.Contains(stdout, want) {
		t.Errorf("%s\nwant\n%s", stdout, want)
	}
}
