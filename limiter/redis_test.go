package limiter

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	dto "github.com/prometheus/client_model/go"
	"github.com/redis/go-redis/v9"

	"github.com/sluiceproxy/sluice/limiter/redistest"
)

// scripts returns how many scripts the server has executed since its start, by
// its own count.
func scripts(t testing.TB, s *redistest.Server) (executed int) {
	t.Helper()
	stats := s.Info("commandstats")
	for _, command := range []string{"cmdstat_evalsha", "cmdstat_eval"} {
		// In
		// calls=3,usec=100,usec_per_call=33.3,rejected_calls=0,failed_calls=1,
		// the failed call changed nothing here.
		fields := map[string]int{}
		for f := range strings.SplitSeq(stats[command], ",") {
			name, value, _ := strings.Cut(f, "=")
			fields[name], _ = strconv.Atoi(value)
		}
		executed += fields["calls"] - fields["failed_calls"]
	}
	return executed
}

// calls is how many calls of the script a store has made.
func calls(t testing.TB, r *Redis) int {
	t.Helper()
	var m dto.Metric
	if err := r.batches.Write(&m); err != nil {
		t.Fatal(err)
	}
	return int(m.GetHistogram().GetSampleCount())
}

func TestRedisSurvivesFlushedScripts(t *testing.T) {
	server := redistest.Start(t)
	r := newTestRedis(t, server, serverClock)
	client := server.Client()
	const callers, takes = 16, 300
	a := charge(bucket(t, 1, day, callers*takes+1), "a") // no token comes back meanwhile

	done := make(chan struct{})
	flushes := make(chan int)
	go func() {
		n := 0
		tick := time.NewTicker(2 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-done:
				flushes <- n
				return
			case <-tick.C:
				if err := client.ScriptFlush(context.Background()).Err(); err != nil {
					t.Error(err)
				}
				n++
			}
		}
	}()
	var wg sync.WaitGroup
	for range callers {
		wg.Go(func() {
			verdicts := make([]Verdict, 1)
			for range takes {
				if r.Take(t.Context(), []Charge{a}, verdicts); !verdicts[0].Allowed {
					t.Errorf("%+v", verdicts[0])
				}
			}
		})
	}
	wg.Wait()
	close(done)
	if n := <-flushes; n == 0 {
		t.Error("no flush fell into the load")
	}
	taker{t, r}.want("ok 1", a.costs(0)) // each take was charged once
	if n, want := scripts(t, server), calls(t, r); n != want || n > callers*takes+1 {
		t.Errorf("%d scripts were executed, of %d calls for %d takes", n, want, callers*takes+1)
	}
}

// A Redis that does not answer costs a caller the store's timeout and no more,
// and what it executes late it executes once.
func TestFrozenRedis(t *testing.T) {
	const budget = 100 * time.Millisecond
	server := redistest.Start(t)
	r, err := NewRedis(RedisOptions{URL: server.URL(), Timeout: budget}, nil, prometheus.NewRegistry())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = r.Close() }()
	a := charge(bucket(t, 1, day, 1000), "a")
	warm := make([]Verdict, 1)
	if r.Take(t.Context(), []Charge{a}, warm); !warm[0].Allowed {
		t.Fatalf("%+v", warm[0])
	}

	server.Freeze()
	const callers, takes = 50, 4
	var slowest atomic.Int64
	var wg sync.WaitGroup
	for range callers {
		wg.Go(func() {
			verdicts := make([]Verdict, 1)
			for range takes {
				start := time.Now()
				r.Take(t.Context(), []Charge{a}, verdicts)
				took := int64(time.Since(start))
				for old := slowest.Load(); took > old && !slowest.CompareAndSwap(old, took); old = slowest.Load() {
				}
				if KindOf(verdicts[0].Err) != KindTimeout {
					t.Errorf("%+v", verdicts[0])
				}
			}
		})
	}
	wg.Wait()
	if d := time.Duration(slowest.Load()); d > budget+slack {
		t.Errorf("a take lasted %v of a budget of %v", d, budget)
	}
	server.Thaw()

	v := waitForAnswer(t, r, a.costs(0))
	executed := scripts(t, server)
	if called := calls(t, r); executed > called { // each carries several takes
		t.Errorf("%d scripts were executed of %d calls", executed, called)
	}
	if v.Remaining < 1000-1-callers*takes {
		t.Errorf("%d tokens are left after %d takes", v.Remaining, callers*takes)
	}
}

// waitForAnswer takes until Redis answers, for at most 10 s.
func waitForAnswer(t *testing.T, r *Redis, c Charge) Verdict {
	t.Helper()
	verdicts := make([]Verdict, 1)
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); {
		if r.Take(t.Context(), []Charge{c}, verdicts); verdicts[0].Err == nil {
			return verdicts[0]
		}
	}
	t.Fatalf("no answer within 10 s: %v", verdicts[0].Err)
	return Verdict{}
}

func TestRestartedRedis(t *testing.T) {
	server := redistest.Start(t)
	r := newTestRedis(t, server, serverClock)
	a := charge(bucket(t, 1, day, 10), "a")
	k := taker{t, r}
	k.want("ok 3", a.costs(7))
	server.Kill()
	verdicts := make([]Verdict, 1)
	for range 3 {
		if r.Take(t.Context(), []Charge{a}, verdicts); KindOf(verdicts[0].Err) != KindConnection {
			t.Errorf("%+v", verdicts[0])
		}
	}
	server.Restart() // without persistence: what it knew is gone
	if v := waitForAnswer(t, r, a); v.Remaining != 9 {
		t.Errorf("%+v", v)
	}
}

func TestCallersDeadline(t *testing.T) {
	server := redistest.Start(t)
	r := newTestRedis(t, server, serverClock) // its own budget is a minute
	a := charge(bucket(t, 1, day, 10), "a")
	verdicts := make([]Verdict, 1)

	server.Freeze()
	inTime := false
	const tries = 4 // a busy machine wakes some of them too late; five would open the breaker
	for range tries {
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		r.Take(ctx, []Charge{a}, verdicts)
		inTime = inTime || ctx.Err() == nil
		cancel()
		if KindOf(verdicts[0].Err) != KindTimeout {
			t.Errorf("%+v", verdicts[0])
		}
	}
	if !inTime {
		t.Error("no take was over by its caller's deadline")
	}
	server.Thaw()

	// What is over before it was sent is not sent.
	before := scripts(t, server)
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	for range 10 {
		if r.Take(gone, []Charge{a}, verdicts); !errors.Is(verdicts[0].Err, context.Canceled) {
			t.Errorf("%+v", verdicts[0])
		}
	}
	if after := scripts(t, server); after > before+tries { // those of the frozen server may come late
		t.Errorf("%d scripts of a caller who was gone", after-before)
	}
}

// One bucket's trouble stays its own.
func TestStoredTrouble(t *testing.T) {
	server := redistest.Start(t)
	client := server.Client()
	registry := prometheus.NewRegistry()
	r, err := NewRedis(RedisOptions{URL: server.URL(), Timeout: time.Minute}, nil, registry)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = r.Close() }()
	ctx := t.Context()
	b := bucket(t, 1, day, 5)
	good, bad := charge(b, "good"), charge(b, "bad")
	k := taker{t, r}

	valid := func() string {
		k.want("ok 4", charge(b, "valid"))
		s, err := client.GetDel(ctx, charge(b, "valid").Key).Result()
		if err != nil {
			t.Fatal(err)
		}
		return s
	}()
	set := func(value string) func() {
		return func() {
			if err := client.Set(ctx, bad.Key, value, 0).Err(); err != nil {
				t.Fatal(err)
			}
		}
	}
	patch := func(at int, bytes string) func() { return set(valid[:at] + bytes + valid[at+len(bytes):]) }
	for name, poison := range map[string]func(){
		"a list":              func() { client.RPush(ctx, bad.Key, "x") },
		"a hash":              func() { client.HSet(ctx, bad.Key, "x", "y") },
		"empty":               set(""),
		"text":                set("one hundred tokens"),
		"cut":                 set(valid[:36]),
		"too long":            set(valid + "\x00"),
		"version 0":           patch(2, "\x00"),
		"more than its burst": patch(3, "\x00\x00\x00\x06"),
		"a full one and more": patch(3, "\x00\x00\x00\x05\x00\x00\x00\x00\x00\x01"),
		"a part above one":    patch(7, "\xff\xff\xff\xff\xff\xff"),
		"a time after time":   patch(13, "\xff\xff\xff\xff\xff\xff\xff"),
		"no burst":            patch(20, "\x00\x00\x00\x00"),
		"no rate":             patch(24, "\x00\x00\x00\x00\x00\x00\x00"),
		"a rate too fast":     patch(24, "\xff\xff\xff\xff\xff\xff\xff"),
		"no period":           patch(31, "\x00\x00\x00\x00\x00\x00"),
		"a period too long":   patch(31, "\xff\xff\xff\xff\xff\xff"),
	} {
		t.Run(name, func(t *testing.T) {
			client.Del(ctx, bad.Key, good.Key)
			poison()
			before := testutil.ToFloat64(r.errors[KindState])
			// This bucket is empty now. The other one keeps its token because
			// the request was denied, and gives it to a take of its own.
			k := taker{t, r}
			v := k.take(good, bad)
			if v[1].Allowed || v[1].Remaining != 0 || v[1].RetryAfter > day || v[1].RetryAfter < day-time.Minute ||
				v[0].Remaining != 5 {
				t.Errorf("%+v", v)
			}
			if got := testutil.ToFloat64(r.errors[KindState]) - before; got != 1 {
				t.Errorf("reported %v times", got)
			}
			k.want("ok 4", good)
			if ttl := client.PTTL(ctx, bad.Key).Val(); ttl < 5*day || ttl > 5*day+time.Minute {
				t.Errorf("TTL %v", ttl)
			}
			k.want("ok 0", bad.costs(0)) // it makes sense now
			if got := testutil.ToFloat64(r.errors[KindState]) - before; got != 1 {
				t.Errorf("reported %v times", got)
			}
		})
	}

	t.Run("a newer version is no empty bucket but a failure", func(t *testing.T) {
		for _, tt := range []struct {
			mode   FailureMode
			shadow bool
			left   int64 // in the other bucket
		}{
			{Deny, false, 5}, {Delegate, false, 4}, {Allow, false, 4}, {Deny, true, 4},
		} {
			client.Del(ctx, good.Key)
			newer := valid[:2] + "\x04 whatever it may look like"
			set(newer)()
			c := bad
			c.Limit = &Limit{Domain: "test", Name: "bad", OnFailure: tt.mode, Shadow: tt.shadow}
			verdicts := make([]Verdict, 2)
			r.Take(ctx, []Charge{c, good}, verdicts)
			if KindOf(verdicts[0].Err) != KindState || !verdicts[1].Allowed || verdicts[1].Remaining != tt.left {
				t.Errorf("%+v: %+v", tt, verdicts)
			}
			if got := client.Get(ctx, bad.Key).Val(); got != newer {
				t.Errorf("overwritten by %q", got)
			}
		}
	})
}

func TestRedisRefuses(t *testing.T) {
	ctx := t.Context()
	for _, tt := range []struct {
		name  string
		args  []string
		setup func(t *testing.T, c *redis.Client) error
		user  string
		want  ErrorKind
	}{
		{name: "wrong password", args: []string{"--requirepass", "secret-of-redis"}, want: KindAuth},
		{name: "no right to the keys", user: "guest", want: KindAuth, setup: func(t *testing.T, c *redis.Client) error {
			return c.Do(ctx, "ACL", "SETUSER", "guest", "on", ">pw", "~other:*", "+@all").Err()
		}},
		{name: "no right to scripts", user: "guest", want: KindAuth, setup: func(t *testing.T, c *redis.Client) error {
			return c.Do(ctx, "ACL", "SETUSER", "guest", "on", ">pw", "~*", "+@all", "-@scripting").Err()
		}},
		{name: "no right to write within scripts", user: "guest", want: KindAuth,
			setup: func(t *testing.T, c *redis.Client) error {
				return c.Do(ctx, "ACL", "SETUSER", "guest", "on", ">pw", "~*", "+@all", "-set").Err()
			}},
		{name: "no right to read within scripts", user: "guest", want: KindAuth,
			setup: func(t *testing.T, c *redis.Client) error {
				return c.Do(ctx, "ACL", "SETUSER", "guest", "on", ">pw", "~*", "+@all", "-get").Err()
			}},
		{name: "a replica", want: KindReadOnly, setup: func(t *testing.T, c *redis.Client) error {
			return c.Do(ctx, "REPLICAOF", "127.0.0.1", "1").Err()
		}},
		{name: "too few replicas", want: KindReadOnly, setup: func(t *testing.T, c *redis.Client) error {
			return c.ConfigSet(ctx, "min-replicas-to-write", "1").Err()
		}},
		{name: "out of memory", want: KindOOM, setup: func(t *testing.T, c *redis.Client) error {
			return c.ConfigSet(ctx, "maxmemory", "1").Err()
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			server := redistest.Start(t, tt.args...)
			if tt.setup != nil {
				if err := tt.setup(t, server.Client()); err != nil {
					t.Fatal(err)
				}
			}
			o := RedisOptions{URL: server.URL(), Timeout: time.Minute}
			if tt.user != "" {
				o.Username, o.Password = tt.user, "pw"
			}
			r, err := NewRedis(o, nil, prometheus.NewRegistry())
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = r.Close() }()
			verdicts := make([]Verdict, 1)
			r.Take(ctx, []Charge{charge(bucket(t, 1, day, 5), "a")}, verdicts)
			if got := KindOf(verdicts[0].Err); got != tt.want || verdicts[0].Allowed {
				t.Errorf("%s (%v), want %s", got, verdicts[0].Err, tt.want)
			}
			if got := testutil.ToFloat64(r.errors[tt.want]); got != 1 {
				t.Errorf("counted %v times", got)
			}
		})
	}
}

func TestPing(t *testing.T) {
	server := redistest.Start(t)
	r := newTestRedis(t, server, serverClock)
	if err := r.Ping(t.Context()); err != nil {
		t.Error(err)
	}
	// A user with no more rights than takes need.
	if err := server.Client().Do(t.Context(), "ACL", "SETUSER", "least", "on", ">pw", "resetkeys", "~sluice:*", "-@all",
		"+evalsha", "+eval", "+get", "+set", "+time", "+hello").Err(); err != nil {
		t.Fatal(err)
	}
	least, err := NewRedis(RedisOptions{URL: server.URL(), Username: "least", Password: "pw", Timeout: time.Minute}, nil,
		prometheus.NewRegistry())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = least.Close() }()
	if err := least.Ping(t.Context()); err != nil {
		t.Error(err)
	}
	taker{t, least}.want("ok 4", charge(bucket(t, 1, day, 5), "a"))
	server.Kill()
	if err := r.Ping(t.Context()); KindOf(err) != KindConnection {
		t.Error(err)
	}
}

// The script checks its arguments before it reads anything.
func TestScriptArguments(t *testing.T) {
	server := redistest.Start(t)
	client := server.Client()
	c := charge(bucket(t, 1, time.Second, 5), "a")
	good := string(appendCharge(nil, &c, true, window{}))
	patch := func(at int, bytes string) string { return good[:at] + bytes + good[at+len(bytes):] }
	held := c.holding(time.Minute)
	holds := string(appendCharge(nil, &held, true, window{}))
	settles := string(appendSettlement(nil, &Settlement{Key: c.Key, Hold: Hold{Tokens: 1, birth: newBirth()}}))
	for name, args := range map[string][]any{
		"none":            {},
		"too few":         {good},
		"too many":        {good + good + good},
		"one each":        {good, good},
		"cut":             {good + good[:21]},
		"empty":           {""},
		"no rate":         {good + patch(1, "\x00\x00\x00\x00\x00\x00\x00")},
		"rate too fast":   {good + patch(1, "\xff\xff\xff\xff\xff\xff\xff")},
		"no period":       {good + patch(8, "\x00\x00\x00\x00\x00\x00")},
		"period too long": {good + patch(8, "\xff\xff\xff\xff\xff\xff")},
		"no burst":        {good + patch(14, "\x00\x00\x00\x00")},
		"burst too large": {good + patch(14, "\xff\xff\xff\xff")},
		"veto unheard of": {good + patch(0, "\x03")},
		"veto past 4":     {good + patch(0, "\x07")},
		"option of 17":    {good + patch(0, "\x11")},
		"option of 255":   {good + patch(0, "\xff")},
		"no end":          {good + patch(0, "\x00")},
		"no random bytes": {good + holds},
		"too few of them": {good + holds, "1234567"},
		"no randomness":   {good + holds, "\x00\x00\x00\x00\x00\x00\x00\x00"},
		"life cut":        {good + holds[:len(holds)-1], "12345678"},
		"life too short":  {good + holds[:len(holds)-5] + "\x00\x00\x00\x00\x01", "12345678"},
		"life too long":   {good + holds[:len(holds)-5] + "\xff\xff\xff\xff\xff", "12345678"},
		"settlement cut":  {good + settles[:22]},
		"settlement amid": {patch(0, "\x00") + settles},
		"more than that":  {settles + settles + settles},
	} {
		err := client.Eval(t.Context(), newScript(serverClock).text, []string{"a", "b"}, args...).Err()
		if err == nil || !strings.HasPrefix(err.Error(), "SLUICE ") {
			t.Errorf("%s: %v", name, err)
		}
	}
	if keys := client.Keys(t.Context(), "*").Val(); len(keys) != 0 {
		t.Errorf("written: %q", keys)
	}
	if err := client.Eval(t.Context(), newScript(serverClock).text, []string{"a", "b"},
		good+good).Err(); err != nil {
		t.Error(err)
	}
}

func TestReplyOfAnother(t *testing.T) {
	r, err := NewRedis(RedisOptions{URL: "redis://127.0.0.1:1", Timeout: time.Second}, nil, prometheus.NewRegistry())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = r.Close() }()
	c := []Charge{charge(bucket(t, 1, time.Second, 5), "a")}
	read := func(reply string) error {
		a := newPending(c, time.Now(), nil)
		if err := deal(reply, []*pending{a}); err != nil {
			return err
		}
		return r.read(a.at, a.reply, c, make([]Verdict, 1))
	}
	const at, held = "\x00\x00\x00\x00\x00\x00\x01", "\x00\x00\x00\x00"
	good := at + "\x03\x00\x00\x00\x05\x00\x00\x00\x00\x00\x00" + held
	for _, reply := range []string{
		"", at, at[:6], at + "\x03", good[:21], good + "\x00", good + good, at + "\x08",
		at + "\x08NEWER        ", at + "\x08NEWER          ", "OK",
		at + "\x03\x00\x00\x00\x06\x00\x00\x00\x00\x00\x00" + held,
		at + "\x03\x00\x00\x00\x05\xff\xff\xff\xff\xff\xff" + held,
	} {
		if err := read(reply); !errors.Is(err, errReply) {
			t.Errorf("%q: %v", reply, err)
		}
	}
	if err := read(good); err != nil {
		t.Error(err)
	}
	if KindOf(storeError(errReply)) != KindScript {
		t.Error("of another kind")
	}
}

func TestRedisOptions(t *testing.T) {
	for _, url := range []string{
		"redis://127.0.0.1:6379", "redis://127.0.0.1:6379/0", "redis://redis/3",
		"rediss://u:p@[::1]:6380/1", "unix:///run/redis.sock",
		"unix:///run/redis.sock?db=2", "redis://:p@h", "redis://:p@ss@h\n", "redis://:%2F%23%3F@h", "redis://user@h/1\r\n",
	} {
		if err := (RedisOptions{URL: url, Timeout: time.Second}).Validate(); err != nil {
			t.Errorf("%s: %v", url, err)
		}
	}
	for url, want := range map[string]string{
		"":                                "URL without a host",
		"127.0.0.1:6379":                  "invalid URL",
		"redis:6379":                      "URL without a host",
		"http://:s3cret@h":                "invalid URL scheme; ",
		"redis://:s3cret@h/x":             "database must be a number",
		"redis://:s3cret@h/-1":            "database must be 0 or above",
		"redis://:s3cret@h/1/2":           "database must be a number",
		"redis://:s3cret@h?max_retries=3": "URL parameters are not supported",
		"redis://:s3cret@h:port":          "invalid URL",
		"redis://h\x7f:s3cret@":           "invalid URL",
		"unix://":                         "socket URL without a path",
		"redis://:s3cret@h:99999":         "invalid port 99999; want 1 to 65535",
		"redis://:s3cret@h:0":             "invalid port 0; want 1 to 65535",
		"redis://:p@s3cret#w/rd@host": "user or password contains / ? or #: write %2F, %3F or %23, " +
			"or use password or password_file",
		"redis://u:12/s3cret@h":               "user or password contains / ? or #",
		"redis://u:12?s3cret@h":               "user or password contains / ? or #",
		"unix://u:12/s3cret@/run/x":           "socket URL with a host",
		"redis://u:s3cret:6379":               "host contains colons",
		"redis://h:6379/s3cret":               "database must be a number",
		"redis://h/-53":                       "database must be 0 or above",
		"s3cret://h":                          "invalid URL scheme",
		"redis://::1:26379":                   "host contains colons: write an IPv6 address in brackets",
		"redis://a:1,b:2":                     "URL with several hosts: write mode: cluster or mode: sentinel",
		"redis://a,b":                         "URL with several hosts: write mode: cluster or mode: sentinel",
		"unix://run/x.sock":                   "socket URL with a host: write three slashes",
		"redis://h#s3cret":                    "URL contains a #; in a password write %23",
		"unix:///" + strings.Repeat("x", 108): "socket path of 109 bytes; the maximum is 107",
	} {
		err := (RedisOptions{URL: url, Timeout: time.Second}).Validate()
		if err == nil || !strings.HasPrefix(err.Error(), want) || !strings.HasSuffix(err.Error(), urlForms) {
			t.Errorf("%q: %v", url, err)
		} else if strings.Contains(err.Error(), "s3cret") {
			t.Errorf("tells the password: %v", err)
		}
	}
	if err := (RedisOptions{URL: "redis://h"}).Validate(); err == nil || err.Error() != "timeout must be above 0, not 0s" {
		t.Error(err)
	}
}

// A bucket takes at most 250 bytes of Redis's memory if its domain, limit and
// key have ordinary lengths.
func TestRedisMemory(t *testing.T) {
	server := redistest.Start(t)
	r := newTestRedis(t, server, serverClock)
	used := func() int {
		n, err := strconv.Atoi(server.Info("memory")["used_memory"])
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	b := bucket(t, 1, day, 5)
	limit := &Limit{Domain: "shop", Name: "per-client"}
	taker{t, r}.take(charge(b, "warm"))
	before := used()
	const keys = 20_000
	for i := range keys {
		c := Charge{
			Limit:  limit,
			Bucket: b,
			Key:    fmt.Sprintf("sluice:shop:per-client:{=13.198.51.%03d.%03d}", i/256, i%256),
			Cost:   1,
		}
		taker{t, r}.take(c)
	}
	a := (used() - before) / keys
	t.Logf("%d bytes a bucket", a)
	if a > 250 {
		t.Errorf("%d bytes a bucket", a)
	}
}
