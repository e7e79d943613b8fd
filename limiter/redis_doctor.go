package limiter

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/redis/go-redis/v9"
)

// Finding is one result of Diagnose.
type Finding struct {
	Name   string
	Status FindingStatus
	Detail string // what was found; it contains no secret
	Fix    string // what to do; empty if there is nothing to do
	// Unknown says that the user has no right to ask, so that nothing is known to
	// be wrong.
	Unknown bool
}

// FindingStatus says how severe a Finding is.
type FindingStatus string

// The statuses.
const (
	OK   FindingStatus = "ok"
	Warn FindingStatus = "warn" // takes work, but limits may be exceeded or takes may fail
	Fail FindingStatus = "fail" // takes do not work, or the deployment is not supported
)

// probeKey returns the key of a bucket that only Diagnose uses, under a prefix.
// It has an empty limit name, which no limit has.
func probeKey(prefix string, n int) string { return fmt.Sprintf("%s::{doctor.%d}", prefix, n) }

// Diagnose looks for what commonly goes wrong with a Redis and its settings. It
// takes from buckets of its own under the prefix, which Redis drops after 5 s.
// callerTimeout is how long the proxy waits for an answer; 0 if that is
// unknown. Diagnose returns within 10 s and the store's timeout.
func (r *Redis) Diagnose(ctx context.Context, prefix string, callerTimeout time.Duration) []Finding {
	ctx, cancel := context.WithTimeout(ctx, 2*connectTimeout+r.timeout)
	defer cancel()
	var all []Finding
	say := func(name string, status FindingStatus, fix, format string, args ...any) {
		all = append(all, Finding{Name: name, Status: status, Detail: fmt.Sprintf(format, args...), Fix: fix})
	}
	unknown := func(name, fix string, err error) {
		all = append(all,
			Finding{Name: name, Status: Warn, Detail: fmt.Sprintf("unknown: %v", storeError(err)), Fix: fix, Unknown: true})
	}

	// Connect first, so that the round trips below are measured without it.
	if err := r.ask(ctx, r.Ping); err != nil && KindOf(err) != KindReadOnly { // see checkScript
		fix := "check store.redis.url, the network, and that Redis is running"
		if known := new(refusal); errors.As(err, &known) {
			fix = "" // the error says it
		}
		say("reachable", Fail, fix, "%v", err)
		return all
	}
	say("reachable", OK, "", "Redis answers")
	hello := r.hello(ctx)
	if !r.checkMode(hello, say) || !r.checkVersion(ctx, hello, say, unknown) {
		return all
	}
	slowest := time.Duration(0)
	var times []time.Duration
	for range 20 {
		began := time.Now()
		if err := r.client.Time(ctx).Err(); err != nil {
			fix := "ACL SETUSER: +time"
			if KindOf(storeError(err)) != KindAuth {
				fix = notAProxy
			}
			say("rights", Fail, fix, "TIME: %v", storeError(err))
			return all
		}
		times = append(times, time.Since(began))
		slowest = max(slowest, times[len(times)-1])
	}
	slices.Sort(times)
	median := times[len(times)/2]
	switch {
	case slowest > r.timeout:
		say("round trip", Fail, "run Redis closer to sluice, or raise store.redis.timeout",
			"median %v, slowest %v: this exceeds the timeout of %v", median, slowest, r.timeout)
	case 3*median > r.timeout:
		say("round trip", Warn, "run Redis closer to sluice, or raise store.redis.timeout",
			"median %v, slowest %v: the timeout of %v leaves no room", median, slowest, r.timeout)
	default:
		say("round trip", OK, "", "median %v, slowest %v, the timeout is %v", median, slowest, r.timeout)
	}
	if callerTimeout > 0 {
		if r.timeout+deadlineMargin > callerTimeout {
			say("timeouts", Warn,
				"keep store.redis.timeout below the timeout of Envoy's ext_authz filter; "+
					"otherwise Envoy decides about failures instead of on_failure",
				"the store's timeout of %v is not below Envoy's %v", r.timeout, callerTimeout)
		} else {
			say("timeouts", OK, "", "the store's timeout of %v is below Envoy's %v", r.timeout, callerTimeout)
		}
	}

	if r.checkScript(ctx, prefix, say) && r.cluster == nil && !r.checkShards(ctx, prefix, say) {
		return all
	}
	r.checkClock(ctx, say)
	r.checkServer(ctx, say, unknown)
	return all
}

type sayFinding func(name string, status FindingStatus, fix, format string, args ...any)

// hello returns what a server says of itself in HELLO, which every user may
// call; nothing where it does not answer that.
func (r *Redis) hello(ctx context.Context) map[string]string {
	says := map[string]string{}
	add := func(name, value any) {
		if name, ok := name.(string); ok {
			says[name], _ = value.(string)
		}
	}
	switch hello := r.client.Do(ctx, "HELLO").Val().(type) {
	case map[any]any:
		for name, value := range hello {
			add(name, value)
		}
	case []any: // of an older protocol
		for i := 0; i+1 < len(hello); i += 2 {
			add(hello[i], hello[i+1])
		}
	}
	return says
}

// checkMode looks whether this is a cluster's node, and reports whether that
// agrees with the config.
func (r *Redis) checkMode(hello map[string]string, say sayFinding) bool {
	if r.cluster != nil { // it has answered which slots it has
		return true
	}
	if hello["mode"] == "cluster" {
		say("mode", Fail, "set store.redis.mode: cluster, with addresses of some of its nodes",
			"this Redis is a node of a cluster, and store.redis.mode is not cluster")
		return false
	}
	return true
}

// probeBucket returns the shape of the buckets that Diagnose uses.
func probeBucket() Bucket {
	b, err := NewBucket(1000, time.Second, 1000)
	if err != nil {
		panic(err) // a constant
	}
	return b
}

// probedKeys is how many keys checkShards tries. Behind a proxy to two servers
// all of them are on the same one in one of 2^(probedKeys-1) cases.
const probedKeys = 20

// checkShards looks for a proxy that spreads keys over several servers, and
// reports whether there is none. Such a proxy sends the script to the server of
// its first key, which then has the buckets of all keys of the call; a GET
// looks for each at the server of that key.
func (r *Redis) checkShards(ctx context.Context, prefix string, say sayFinding) bool {
	var batch []*pending
	pipe := r.client.Pipeline()
	stored := make([]*redis.StringCmd, probedKeys)
	for i := range probedKeys {
		c := Charge{Limit: &Limit{}, Bucket: probeBucket(), Key: probeKey(prefix, i), Cost: 1}
		batch = append(batch, newPending([]Charge{c}, time.Time{}, nil))
		stored[i] = pipe.Get(ctx, c.Key)
	}
	if _, err := r.run(ctx, r.client, takeArgs(batch)...); err != nil {
		say("one server", Fail, "", "%v", r.options.explain(err))
		return false
	}
	_, _ = pipe.Exec(ctx)
	for _, s := range stored {
		if errors.Is(s.Err(), redis.Nil) {
			say("one server", Fail, notAProxy,
				"a proxy at this address spreads keys over several servers, as Envoy's redis_proxy and twemproxy do: "+
					"takes do not find each other's buckets, and more is granted than the limits allow")
			return false
		}
	}
	return true
}

// checkScript runs the script as a take does, and reports whether it runs.
func (r *Redis) checkScript(ctx context.Context, prefix string, say sayFinding) bool {
	c := []Charge{{Limit: &Limit{Name: "doctor"}, Bucket: probeBucket(), Key: probeKey(prefix, 0), Cost: 1}}
	verdicts := make([]Verdict, 1)
	r.Take(ctx, c, verdicts)
	switch err := verdicts[0].Err; {
	case err == nil:
		say("script", OK, "", "the script runs")
		return true
	case KindOf(err) == KindAuth:
		say("script", Fail, fmt.Sprintf("ACL SETUSER <user> on ~%s:* +evalsha +eval +time +get +set", prefix), "%v", err)
	case KindOf(err) == KindReadOnly:
		say("script", Fail,
			"point store.redis at the master, and see that it may write (min-replicas-to-write, a failed save)", "%v", err)
	case KindOf(err) == KindOOM:
		say("script", Fail, "raise maxmemory", "%v", err)
	default:
		say("script", Fail, "", "%v", err)
	}
	return false
}

// checkClock compares Redis's clock with this machine's. The difference does
// not affect decisions, but confuses whoever compares the logs of both.
func (r *Redis) checkClock(ctx context.Context, say sayFinding) {
	before := time.Now()
	there, err := r.client.Time(ctx).Result()
	if err != nil {
		return // reported above, as rights
	}
	distance := there.Sub(before.Add(time.Since(before) / 2)).Round(time.Millisecond)
	if distance > time.Second || distance < -time.Second {
		say("clock", Warn,
			"synchronize both machines' clocks (NTP): Redis's clock decides, and a step forward grants up to a burst",
			"Redis's clock differs from this machine's by %v", distance)
		return
	}
	say("clock", OK, "", "Redis's clock differs from this machine's by %v", distance)
}

// notAProxy says what to do about a proxy that does not pass on what a take
// needs.
const notAProxy = "connect to Redis itself, or to a cluster's nodes with store.redis.mode: cluster"

// checkVersion looks which product and version the server is, and reports
// whether that can run the script as far as is known. Many users have no right
// to ask for INFO.
func (r *Redis) checkVersion(
	ctx context.Context, hello map[string]string, say sayFinding, unknown func(name, fix string, err error),
) bool {
	const other = "use Redis 7.0 or newer, or Valkey"
	info, err := r.client.Info(ctx, "server").Result()
	switch version := hello["version"]; {
	case err != nil && version != "" && !newEnough(version):
		say("version", Fail, other, "Redis %s: it refuses the script", version)
		return false
	case err != nil:
		unknown("version", "connect as a user with +info", err)
		return true
	case field(info, "redis_version") == "":
		unknown("version", "make sure that Redis is 7.0 or newer", errors.New("INFO has no redis_version"))
		return true
	}
	keyDB, _ := r.client.Info(ctx, "keydb").Result() // empty where there is no such section
	name, version := productOf(info + keyDB)
	if name == "KeyDB" || name == "Dragonfly" || name == "Redis" && !newEnough(version) {
		say("version", Fail, other, "%s %s: it refuses the script", name, version)
		return false
	}
	say("version", OK, "", "%s %s", name, version)
	return true
}

// productOf returns the name and the version of the product that an INFO is of.
// Every product has a redis_version, which says with what it is compatible.
func productOf(info string) (name, version string) {
	for _, p := range []struct{ name, field string }{
		{"Valkey", "valkey_version"}, {"Redict", "redict_version"}, {"Dragonfly", "dragonfly_version"},
	} {
		if version := field(info, p.field); version != "" {
			return p.name, version
		}
	}
	if field(info, "mvcc_depth") != "" || strings.Contains(field(info, "executable"), "keydb") {
		return "KeyDB", field(info, "redis_version")
	}
	return "Redis", field(info, "redis_version")
}

// checkServer looks at the settings of Redis. Many users have no right to ask
// for them.
func (r *Redis) checkServer(ctx context.Context, say sayFinding, unknown func(name, fix string, err error)) {
	settings := map[string]string{}
	for _, name := range []string{
		"maxmemory", "maxmemory-policy", "appendonly", "appendfsync", "save", "min-replicas-to-write",
	} {
		values, err := r.client.ConfigGet(ctx, name).Result()
		if err != nil {
			unknown("settings",
				"connect as a user with +config|get, or make sure that maxmemory-policy is noeviction and appendonly is yes", err)
			return
		}
		settings[name] = values[name]
	}
	if policy := settings["maxmemory-policy"]; settings["maxmemory"] != "0" && policy != "noeviction" {
		say("eviction", Warn, "set maxmemory-policy noeviction; an evicted bucket is full again",
			"maxmemory-policy is %s, with maxmemory %s", policy, settings["maxmemory"])
	} else {
		say("eviction", OK, "", "no key is evicted")
	}
	switch {
	case settings["appendonly"] == "yes":
		say("persistence", OK, "", "appendonly, appendfsync %s", settings["appendfsync"])
	case settings["save"] != "":
		say("persistence", Warn, "set appendonly yes and appendfsync everysec; a restart then loses at most two seconds",
			"snapshots only (save %s): a restart grants again what was taken since the last one", settings["save"])
	default:
		say("persistence", Warn, "set appendonly yes and appendfsync everysec",
			"none: after a restart of Redis every bucket is full")
	}
	if r.cluster != nil {
		return // each of its nodes has its own
	}
	replication, err := r.client.Info(ctx, "replication").Result()
	if err != nil {
		return // reported above, as version
	}
	switch replicas, _ := strconv.Atoi(field(replication, "connected_slaves")); {
	case field(replication, "role") == "":
		unknown("replication", "make sure that store.redis is the master", errors.New("INFO has no role"))
	case field(replication, "role") != "master":
		say("replication", Fail, "point store.redis at the master", "this Redis is a %s", field(replication, "role"))
	case replicas == 0:
		say("replication", OK, "", "no replicas")
	case settings["min-replicas-to-write"] == "0":
		say("replication", Warn,
			"set min-replicas-to-write 1, or an old master keeps granting beside the new one after a failover",
			"%d replicas, and min-replicas-to-write 0", replicas)
	default:
		say("replication", OK, "", "%d replicas, min-replicas-to-write %s", replicas, settings["min-replicas-to-write"])
	}
}

// field returns the value of a field of INFO; empty if it is missing.
func field(info, name string) string {
	for line := range strings.Lines(info) {
		if value, ok := strings.CutPrefix(line, name+":"); ok {
			return strings.TrimSpace(value)
		}
	}
	return ""
}

// newEnough reports whether a version of Redis can run a script that begins
// with #!lua.
func newEnough(version string) bool {
	major, _, _ := strings.Cut(version, ".")
	n, err := strconv.Atoi(major)
	return err == nil && n >= 7
}
