package main

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/redis/go-redis/v9"

	"github.com/sluiceproxy/sluice/limiter"
	"github.com/sluiceproxy/sluice/limiter/policy"
	"github.com/sluiceproxy/sluice/limiter/redistest"
)

// readmeACL returns the permissions in the ACL lines of limiter/README.md, by
// the purpose that follows the # of a line.
func readmeACL(t *testing.T) map[string][]string {
	t.Helper()
	lines := make(map[string][]string)
	for line := range strings.Lines(document(t, limiterReadme)) {
		if rights, ok := strings.CutPrefix(line, "ACL SETUSER sluice "); ok {
			rights, use, _ := strings.Cut(rights, "#")
			lines[strings.TrimSpace(use)] = strings.Fields(rights)
		}
	}
	return lines
}

// TestREADMEACL checks that the ACL lines of limiter/README.md permit
// everything that sluice does, and that no permission could be left out.
func TestREADMEACL(t *testing.T) {
	lines := readmeACL(t)
	const limits = `
limits:
  - {name: wide, rate: 1/d, burst: 1000}
  - {name: narrow, key: client.ip, rate: 1/d, burst: 1}
`
	config := func(redis string) string {
		return file(
			t, "sluice.yaml",
			fmt.Sprintf("store: {redis: {%s, username: sluice, password: PASSWORD, timeout: 5s}}\n", redis)+limits,
		)
	}
	single := redistest.Start(t)
	cluster := redistest.StartCluster(t, 3)
	var addresses []string
	var masters []*redis.Client
	for _, n := range cluster {
		addresses = append(addresses, "'"+n.Addr+"'")
		masters = append(masters, n.Client())
	}
	for _, tt := range []struct {
		name, config string
		nodes        []*redis.Client
		lines        []string
	}{
		{
			"single", config("url: '" + single.URL() + "'"), []*redis.Client{single.Client()},
			[]string{"each take", "bucket reset, doctor and a start's checks"},
		},
		{
			"database", config("url: '" + single.URL() + "?db=3'"), []*redis.Client{single.Client()},
			[]string{"each take", "a database in the URL", "bucket reset, doctor and a start's checks"},
		},
		{
			"cluster", config("mode: cluster, addresses: [" + strings.Join(addresses, ", ") + "]"), masters,
			[]string{"each take", "a cluster", "bucket reset, doctor and a start's checks"},
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var rights []string
			for _, l := range tt.lines {
				if len(lines[l]) == 0 {
					t.Fatalf("limiter/README.md has no ACL line for %s", l)
				}
				rights = append(rights, lines[l]...)
			}
			setUser(t, tt.nodes, rights)
			if failed := everything(t, tt.config, tt.nodes); failed != nil {
				t.Errorf("with %v: %s", rights, strings.Join(failed, "\n"))
			}
			// sluice does not even try what it may not do, because an operator
			// may watch ACL LOG.
			for _, n := range tt.nodes {
				denied, err := n.ACLLog(t.Context(), 100).Result()
				if err != nil {
					t.Fatal(err)
				}
				for _, d := range denied {
					t.Errorf("%s was denied %d times: %s", d.Object, d.Count, d.Reason)
				}
			}
			for i, right := range rights {
				if right == "reset" {
					continue
				}
				setUser(t, tt.nodes, slices.Delete(slices.Clone(rights), i, i+1))
				if everything(t, tt.config, tt.nodes) == nil {
					t.Errorf("nothing is missed without %s", right)
				}
			}
		})
	}
}

func setUser(t *testing.T, nodes []*redis.Client, rights []string) {
	t.Helper()
	args := []any{"ACL", "SETUSER", "sluice"}
	for _, r := range rights {
		args = append(args, r)
	}
	for _, n := range nodes {
		for _, do := range [][]any{{"ACL", "LOG", "RESET"}, {"FLUSHALL"}, args} {
			if err := n.Do(t.Context(), do...).Err(); err != nil {
				t.Fatalf("%v: %v", do, err)
			}
		}
	}
}

// everything does all that sluice does with a Redis, with a config, and returns
// what failed.
func everything(t *testing.T, config string, nodes []*redis.Client) (failed []string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), within)
	defer cancel()
	miss := func(format string, args ...any) { failed = append(failed, fmt.Sprintf(format, args...)) }
	program := func(want string, args ...string) {
		var stdout, stderr bytes.Buffer
		if status := run(ctx, append(args, "--config", config), os.LookupEnv, &stdout, &stderr); status != statusGood ||
			!strings.Contains(stdout.String(), want) {
			miss("%v: %d %s%s", args, status, stdout.String(), stderr.String())
		}
	}
	cfg, _, err := policy.Load(config, os.LookupEnv)
	if err != nil {
		t.Fatal(err)
	}
	store, err := limiter.NewRedis(*cfg.Redis, nil, prometheus.NewRegistry())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = store.Close() }()
	if err := store.Ping(ctx); err != nil {
		miss("ping: %v", err)
	}
	take := func(client string, want limiter.Outcome) {
		d := limiter.Decide(ctx, store, cfg.Draw(&policy.Request{Source: policy.Peer{Address: client}}).Charges)
		if d.Outcome != want {
			miss("%s: %v %+v", client, d.Outcome, d.Verdicts)
		}
	}
	take("203.0.113.1", limiter.Allowed)
	take("203.0.113.1", limiter.Limited) // on a cluster the token of the other slot is returned
	for _, n := range nodes {
		if err := n.ScriptFlush(ctx).Err(); err != nil {
			t.Fatal(err)
		}
	}
	take("203.0.113.2", limiter.Allowed)
	program("998 of 1000 tokens", "bucket", "get", "--limit", "wide")
	if len(nodes) > 1 {
		migrating(ctx, t, nodes, "=11.203.0.113.3", func() { take("203.0.113.3", limiter.Allowed) })
	}
	program("1000 of 1000 tokens", "bucket", "reset", "--limit", "wide")
	program("allowed", "explain", "--source", "203.0.113.4")
	program("ok    script", "doctor", "--envoy-timeout", "1m")
	var stdout bytes.Buffer
	run(ctx, []string{"doctor", "--config", config}, os.LookupEnv, &stdout, &stdout)
	if strings.Contains(stdout.String(), "unknown: ") {
		miss("doctor: %s", stdout.String())
	}
	return failed
}

// migrating calls do while the slot of a hash tag migrates to another node, so
// that keys that are not on the old node must be read from the new one.
func migrating(ctx context.Context, t *testing.T, nodes []*redis.Client, tag string, do func()) {
	t.Helper()
	slot := nodes[0].ClusterKeySlot(ctx, "{"+tag+"}").Val()
	from := slices.IndexFunc(
		nodes,
		func(n *redis.Client) bool { return n.Exists(ctx, "{"+tag+"}").Err() == nil },
	) // the others answer MOVED
	to := (from + 1) % len(nodes)
	set := func(node int, args ...any) {
		t.Helper()
		if err := nodes[node].Do(ctx, append([]any{"CLUSTER", "SETSLOT", slot}, args...)...).Err(); err != nil {
			t.Fatal(err)
		}
	}
	set(to, "IMPORTING", nodes[from].Do(ctx, "CLUSTER", "MYID").Val())
	set(from, "MIGRATING", nodes[to].Do(ctx, "CLUSTER", "MYID").Val())
	do()
	set(from, "STABLE")
	set(to, "STABLE")
}
