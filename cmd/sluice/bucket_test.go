package main

import (
	"strings"
	"testing"
	"time"

	"github.com/sluiceproxy/sluice/limiter/redistest"
)

func TestBucket(t *testing.T) {
	redis := redistest.Start(t)
	config := file(t, "sluice.yaml", explained+"store: {redis: {url: '"+redis.URL()+"', timeout: 20s}}\n")
	p := startSluice(t, "--config", config)
	conn := dial(t, p.grpc)
	request := checkRequest("203.0.113.7", "POST", "/v1/orders", map[string]string{"x-api-key": "k"})
	key := "#43." + hashOf("k") + "=4.POST"
	ask := func(want string, args ...string) {
		t.Helper()
		if status, stdout, stderr := sluice(t, nil, append([]string{"bucket"}, args...)...); status != 0 || stdout != want ||
			stderr != "" {
			t.Errorf("%v: %d %s%s\nwant %s", args, status, stdout, stderr, want)
		}
	}
	of := []string{"--config", config, "--limit", "orders", "--key", "k", "--key", "POST"}
	get, reset := append([]string{"get"}, of...), append([]string{"reset"}, of...)
	const none = "full: the bucket does not exist, because it was not used or has refilled\n"
	ask("orders {"+key+"}: 7 of 7 tokens, refilled at 60/d, "+none, get...)
	if got := check(t, conn, request); got != "ok" {
		t.Fatal(got)
	}
	ask("orders {"+key+"}: 2 of 7 tokens, refilled at 60/d, full in 2h\n", get...)
	ask(`{
  "limit": "orders",
  "key": "`+key+`",
  "exists": true,
  "tokens": 2,
  "burst": 7,
  "rate": "60/d",
  "quota": null,
  "window_ends": null,
  "reset": 7200,
  "held": 0,
  "owed": 0
}
`, append(get, "-o", "json")...)
	if got := check(t, conn, request); got != "429" {
		t.Error(got)
	}
	shown := []string{"--config", config, "--limit", "orders", "--key-hash", key}
	ask("orders {"+key+"}: 2 of 7 tokens, refilled at 60/d, full in 2h\n", append([]string{"get"}, shown...)...)
	ask("orders {"+key+"}: 7 of 7 tokens, refilled at 60/d, full\n", reset...)
	ask("orders {"+key+"}: 7 of 7 tokens, refilled at 60/d, "+none, append([]string{"reset"}, shown...)...)
	ask(`{
  "limit": "orders",
  "key": "`+key+`",
  "exists": false,
  "tokens": 7,
  "burst": 7,
  "rate": "60/d",
  "quota": null,
  "window_ends": null,
  "reset": 0,
  "held": 0,
  "owed": 0
}
`, append(reset, "-o", "json")...)
	// The sidecar still knows from Redis that the bucket is empty. It asks
	// again within a second.
	for began := time.Now(); check(t, conn, request) != "ok"; {
		if time.Since(began) > 3*time.Second {
			t.Fatal("limited long after a reset")
		}
	}
	ask(
		"orders {#43."+hashOf("gold")+"=4.POST}: 100 of 100 tokens, refilled at 1/d, "+none, "get", "--config", config,
		"--limit", "orders", "--key", "gold", "--key", "POST",
	)
	ask(
		"orders {#43."+hashOf("gold")+"=4.POST}: 100 of 100 tokens, refilled at 1/d, "+none, "get", "--config", config,
		"--limit", "orders", "--key-hash", "#43."+hashOf("gold")+"=4.POST",
	)
	ask(
		"orders {~11.203.0.113.7=4.POST}: 7 of 7 tokens, refilled at 60/d, "+none, "get", "--config", config, "--limit",
		"orders", "--absent=203.0.113.7", "--key=", "--key", "POST",
	)
	ask(
		"orders {~13.2001:db8::/64~13.2001:db8::/64}: 7 of 7 tokens, refilled at 60/d, "+none, "get", "--config", config,
		"--limit", "orders", "--absent=2001:db8::1",
	)
	ask(
		"fallback {-}: 1 of 1 tokens, refilled at 1/d, "+none, "get", "--config", config, "--limit", "fallback", "--key-hash",
		"-",
	)
	ask("fallback {-}: 1 of 1 tokens, refilled at 1/d, "+none, "get", "--config", config, "--limit", "fallback")

	alone := file(t, "alone.yaml", explained)
	for _, tt := range []struct {
		args   string
		status int
		want   string
	}{
		{"", 2, "sluice: missing command; want get or reset\nSee 'sluice bucket --help'.\n"},
		{"look", 2, "sluice: unknown command \"look\"; want get or reset\nSee 'sluice bucket --help'.\n"},
		{"get", 2, "sluice: --limit: missing; want the name of a limit\nSee 'sluice bucket get --help'.\n"},
		{
			"get --config CONFIG --limit none", 1,
			"sluice: unknown limit \"none\"; the config has: per-client, orders, fallback, watched, inside\n",
		},
		{"get --config CONFIG --limit orders --key k", 1, "sluice: want 2 key parts for limit orders, not 1; write --key " +
			"once for each of request.headers[\"x-api-key\"], request.method\n"},
		{"get --config CONFIG --limit fallback --key k", 1, "sluice: limit fallback has no key, but a single bucket; " +
			"omit --key\n"},
		{"get --config CONFIG --limit orders --absent 10.0.0.1", 2, "sluice: unexpected argument \"10.0.0.1\"; write " +
			"--absent=10.0.0.1\nSee 'sluice bucket get --help'.\n"},
		{
			"get --config CONFIG --limit orders --key k --key=", 1,
			"sluice: empty key part; a request's empty part counts as absent\n",
		},
		{"get --config CONFIG --limit inside", 1, "sluice: limit inside is unlimited for this key and has no bucket\n"},
		{
			"get --config CONFIG --limit orders --key k --key get", 1,
			"sluice: part 2 of the key, request.method: invalid method; want an upper-case name such as GET or POST\n",
		},
		{
			"get --config CONFIG --limit orders --absent", 1,
			"sluice: limit orders has absent: client, so requests without a key have one bucket for each client network; " +
				"write --absent=ADDRESS with the client's address\n",
		},
		{
			"get --config CONFIG --limit orders --absent=10.0.0.1 --key k --key POST", 1,
			"sluice: no key part is absent; give an absent part as an empty one\n",
		},
		{"get --config CONFIG --limit fallback --absent", 1, "sluice: limit fallback has no key, so none can be absent\n"},
		{
			"get --config CONFIG --limit orders --key-hash =4.POST", 1,
			"sluice: invalid key \"=4.POST\" for limit orders; want its 2 parts as logs and metadata show them, such as " +
				"#43.<hash> or =4.POST\n",
		},
		{
			"get --config CONFIG --limit orders --key-hash =4.POST=1.ax", 1,
			"sluice: invalid key \"=4.POST=1.ax\" for limit orders; want its 2 parts as logs and metadata show them, such as " +
				"#43.<hash> or =4.POST\n",
		},
		{
			"get --config CONFIG --limit fallback --key-hash a", 1,
			"sluice: invalid key \"a\"; limit fallback has a single bucket, with the key \"-\"\n",
		},
		{
			"get --config CONFIG --limit orders --key-hash a --key k", 2,
			"sluice: --key-hash is the whole key; omit --key and --absent\nSee 'sluice bucket get --help'.\n",
		},
		{
			"get --config ALONE --limit fallback", 1,
			"sluice: the config has no store.redis: the buckets are in the sidecar's process and cannot be read from outside\n",
		},
		{
			"reset --config ALONE --limit fallback", 1,
			"sluice: the config has no store.redis: the buckets are in the sidecar's process and cannot be read from outside\n",
		},
	} {
		args := append(
			[]string{"bucket"},
			strings.Fields(strings.NewReplacer("CONFIG", config, "ALONE", alone).Replace(tt.args))...)
		if status, stdout, stderr := sluice(t, nil, args...); status != tt.status || stdout != "" || stderr != tt.want {
			t.Errorf("%v: %d %s%s\nwant %d %s", args, status, stdout, stderr, tt.status, tt.want)
		}
	}
	redis.Kill()
	if status, _, stderr := sluice(t, nil, append([]string{"bucket"}, get...)...); status != 1 ||
		!strings.HasPrefix(stderr, "sluice: store: connection: ") {
		t.Errorf("%d %s", status, stderr)
	}
}
