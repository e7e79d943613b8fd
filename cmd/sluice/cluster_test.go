package main

import (
	"slices"
	"strings"
	"testing"

	"github.com/redis/go-redis/v9"

	"github.com/sluiceproxy/sluice/limiter/redistest"
)

// TestClusterSlotsAreTold checks that explain and doctor report which limits
// take calls of their own on a cluster.
func TestClusterSlotsAreTold(t *testing.T) {
	var addresses []string
	for _, n := range redistest.StartCluster(t, 2) {
		addresses = append(addresses, "'"+n.Addr+"'")
	}
	config := func(limits string) string {
		return file(
			t, "sluice.yaml",
			"store: {redis: {mode: cluster, timeout: 10s, addresses: ["+strings.Join(addresses, ", ")+"]}}\n"+limits,
		)
	}
	apart := config(`limits:
  - {name: per-client, key: client.ip, rate: 10/d}
  - {name: all, rate: 100/d}
  - {name: orders, key: client.ip, rate: 5/d}
  - {name: posts, key: client.ip, rate: 5/d, match: {methods: [POST]}}
`)
	together := config("limits: [{name: a, key: client.ip, rate: 1/d}, {name: b, key: client.ip, rate: 2/d}]\n")
	for _, tt := range []struct {
		want string
		args []string
	}{
		{
			"allowed\n(limits with different keys are in different hash slots; each slot needs a call of its own: " +
				"per-client, orders | all)\n",
			[]string{"explain", "--config", apart},
		},
		{"allowed\n\n", []string{"explain", "--config", together}},
		{
			"ok    slots         limits with different keys are in different hash slots; each slot needs a call of " +
				"its own: per-client, orders, posts | all\n",
			[]string{"doctor", "--config", apart},
		},
		{
			"ok    slots         all limits of a request share a hash slot, and so one call\n",
			[]string{"doctor", "--config", together},
		},
	} {
		if status, stdout, stderr := sluice(t, nil, tt.args...); status != 0 || !strings.Contains(stdout+"\n", tt.want) {
			t.Errorf("%v: %d %s\n%s\nwant %s", tt.args[:1], status, stderr, stdout, tt.want)
		}
	}
}

// TestStartSaysWhatIsWrongWithRedis checks that a sidecar logs once what is
// wrong with the way Redis is run, and how to fix it.
func TestStartSaysWhatIsWrongWithRedis(t *testing.T) {
	careless := redistest.Start(t, "--maxmemory", "100mb", "--maxmemory-policy", "allkeys-lru")
	p := startSluice(t, "--redis", careless.URL())
	for _, want := range []string{
		`"msg":"Redis: eviction","detail":"maxmemory-policy is allkeys-lru, with maxmemory 104857600",` +
			`"fix":"set maxmemory-policy noeviction`,
		`"msg":"Redis: persistence"`,
	} {
		eventually(t, "a log line about how Redis is run", func() bool { return strings.Count(p.logged(), want) == 1 })
	}

	// A user with minimal permissions cannot read the settings, so nothing is
	// reported about them. Missing permissions for takes are reported.
	for rights, want := range map[string]string{"+get +set": "", "+get": `"msg":"Redis: script","detail":"store: auth: `} {
		args := []any{"ACL", "SETUSER", "sluice", "reset", "on", ">pw", "~sluice:*", "+evalsha", "+eval", "+time"}
		for right := range strings.FieldsSeq(rights) {
			args = append(args, right)
		}
		for _, do := range [][]any{args, {"ACL", "LOG", "RESET"}} {
			if err := careless.Client().Do(t.Context(), do...).Err(); err != nil {
				t.Fatal(err)
			}
		}
		p := startSluice(
			t,
			"--config",
			file(
				t, "sluice.yaml",
				"store: {redis: {url: '"+careless.URL()+"', username: sluice, password: pw}}\nlimits: [{name: a, rate: 1/s}]\n",
			),
		)
		eventually(t, "a refused CLUSTER command", func() bool { // the last command of the checks
			return slices.ContainsFunc(
				careless.Client().ACLLog(t.Context(), 100).Val(),
				func(d *redis.ACLLogEntry) bool { return d.Object == "config|get" },
			)
		})
		if status, _ := get(t, "http://"+p.metrics+"/readyz"); status != 200 {
			t.Errorf("%s: /readyz %d", rights, status)
		}
		p.stop()
		if n := strings.Count(p.logged(), `"msg":"Redis: `); n != min(1, len(want)) || !strings.Contains(p.logged(), want) {
			t.Errorf("%s: %d findings:\n%s", rights, n, p.logged())
		}
	}
}
