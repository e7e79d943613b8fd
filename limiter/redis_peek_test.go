package limiter

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/sluiceproxy/sluice/limiter/redistest"
)

// Who looks is told what a take would be told, and changes nothing.
func TestReadOnly(t *testing.T) {
	server := redistest.Start(t)
	client := server.Client()
	ctx := context.Background()
	r := newTestRedis(t, server, serverClock)
	taking, looking := taker{t, r}, taker{t, r.ReadOnly()}
	slow := bucket(t, 1, day, 10)
	a, b := charge(slow, "a"), charge(slow, "b")

	looking.want("ok 10, ok 10", a, b)
	if n := client.DBSize(ctx).Val(); n != 0 {
		t.Errorf("looking has made %d keys", n)
	}
	taking.take(a.costs(7))
	dump, ttl := client.Dump(ctx, a.Key).Val(), client.PTTL(ctx, a.Key).Val()
	for range 3 {
		looking.want("ok 3, ok 10", a, b)
	}
	for _, v := range looking.take(a.costs(5), a.costs(11)) {
		if v.Allowed || v.Remaining != 3 {
			t.Errorf("%+v", v)
		}
	}
	if v := looking.take(a.costs(5))[0]; v.RetryAfter < 2*day-time.Minute || v.RetryAfter > 2*day ||
		v.Source != RedisSource {
		t.Errorf("%+v", v)
	}
	if v := looking.take(a.costs(11))[0]; v.RetryAfter != Never {
		t.Errorf("%+v", v)
	}
	looking.want("ok 3", charge(bucket(t, 1, time.Hour, 3), "a")) // a changed limit finds the tokens that are there
	if got := client.Dump(ctx, a.Key).Val(); got != dump || client.PTTL(ctx, a.Key).Val() > ttl {
		t.Error("looking has changed a bucket")
	}
	// All or none: who looks is told that b denies, and a keeps its tokens.
	d := Decide(ctx, r.ReadOnly(), []Charge{a, b.costs(11)})
	if d.Outcome != Limited || d.Strictest != 1 {
		t.Errorf("%+v", d)
	}

	// A read-only take treats invalid state, and state that a newer version has
	// stored, as a take does, and leaves it as it is.
	set := func(value string) {
		if err := client.Set(ctx, b.Key, value, 0).Err(); err != nil {
			t.Fatal(err)
		}
	}
	for _, value := range []string{
		"", "nonsense", stateMagic + "\x01", client.Get(ctx, a.Key).Val() + "x",
		stateMagic + "\x01" + strings.Repeat("\xff", 34),
	} {
		set(value)
		if v := looking.take(b)[0]; v.Allowed || v.Remaining != 0 {
			t.Errorf("%q: %+v", value, v)
		}
		if client.Get(ctx, b.Key).Val() != value {
			t.Errorf("%q was changed", value)
		}
	}
	if err := client.Del(ctx, b.Key).Err(); err != nil {
		t.Fatal(err)
	}
	if err := client.LPush(ctx, b.Key, "x").Err(); err != nil {
		t.Fatal(err)
	}
	if v := looking.take(b)[0]; v.Allowed || v.Remaining != 0 {
		t.Errorf("a list: %+v", v)
	}
	set(stateMagic + "\x06 of a version to come")
	verdicts := make([]Verdict, 2)
	r.ReadOnly().Take(ctx, []Charge{a, b}, verdicts)
	if verdicts[0].Err != nil || verdicts[0].Remaining != 3 || KindOf(verdicts[1].Err) != KindState ||
		!errors.Is(verdicts[1].Err, errNewer) {
		t.Errorf("%+v", verdicts)
	}

	// A connection that cannot even begin is no empty bucket.
	if err := client.ConfigSet(ctx, "requirepass", "secret").Err(); err != nil {
		t.Fatal(err)
	}
	stranger, err := NewRedis(RedisOptions{URL: server.URL(), Password: "wrong", Timeout: time.Minute}, nil,
		prometheus.NewRegistry())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = stranger.Close() }()
	stranger.ReadOnly().Take(ctx, []Charge{a, b}, verdicts)
	for _, v := range verdicts {
		if KindOf(v.Err) != KindAuth {
			t.Errorf("%+v", v)
		}
	}
	if _, _, err := stranger.Get(ctx, a); KindOf(err) != KindAuth {
		t.Errorf("%v", err)
	}

	server.Kill()
	r.ReadOnly().Take(ctx, []Charge{a, b}, verdicts)
	for _, v := range verdicts {
		if KindOf(v.Err) != KindConnection {
			t.Errorf("%+v", v)
		}
	}
}

// A password that changes is used by the connections that come after.
func TestSetCredentials(t *testing.T) {
	server := redistest.Start(t)
	client := server.Client()
	ctx := context.Background()
	o := RedisOptions{URL: server.URL(), Username: "sluice", Password: "old", Timeout: time.Minute}
	rights := []any{
		"ACL", "SETUSER", "sluice", "reset", "on", ">old", "~sluice:*", "+evalsha", "+eval", "+get", "+set", "+time",
	}
	if err := client.Do(ctx, rights...).Err(); err != nil {
		t.Fatal(err)
	}
	r, err := NewRedis(o, nil, prometheus.NewRegistry())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = r.Close() }()
	k := taker{t, r}
	a := charge(bucket(t, 1, day, 10), "a")
	k.want("ok 9", a)

	for _, command := range [][]any{
		{"ACL", "SETUSER", "sluice", "resetpass", ">new"}, {"CLIENT", "KILL", "USER", "sluice"},
	} {
		if err := client.Do(ctx, command...).Err(); err != nil {
			t.Fatal(err)
		}
	}
	verdicts := make([]Verdict, 1)
	for KindOf(verdicts[0].Err) != KindAuth { // the first may find that its connection is gone
		if r.Take(ctx, []Charge{a}, verdicts); verdicts[0].Err == nil {
			t.Fatal("a take with an old password")
		}
	}
	r.nodes.Range(func(_, n any) bool { // as after an outage
		for range tripsAfter {
			_ = n.(*node).failed(&StoreError{Kind: KindConnection, Err: errNotSent})
		}
		return true
	})
	o.Password = "new"
	if err := r.SetCredentials(o); err != nil {
		t.Fatal(err)
	}
	k.want("ok 8", a)
	if err := r.SetCredentials(RedisOptions{URL: "nonsense", Timeout: 1}); err == nil {
		t.Error("nonsense is good")
	}
}
