package limiter

import (
	"context"
	"fmt"
	"net"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/sluiceproxy/sluice/limiter/redistest"
)

// openStore opens a store, and closes it when the test ends.
func openStore(t *testing.T, o RedisOptions) *Redis {
	t.Helper()
	if o.Timeout == 0 {
		o.Timeout = 10 * time.Second
	}
	r, err := NewRedis(o, nil, prometheus.NewRegistry())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = r.Close() })
	return r
}

// certify writes certificates for a server, and returns redis-server's
// arguments with which it speaks TLS on a port, and the file that says whom to
// trust.
func certify(t *testing.T, port string) (args []string, ca string) {
	t.Helper()
	dir := t.TempDir()
	newAuthority(t, "ca").write(dir, "server")
	return []string{
		"--tls-port", port, "--tls-cert-file", dir + "/server.pem", "--tls-key-file", dir + "/server.key",
		"--tls-ca-cert-file", dir + "/ca.pem", "--tls-auth-clients", "no",
	}, dir + "/ca.pem"
}

// Whatever the reason why Redis, or the way to it, refuses a connection, the
// errors of a take, a read-only take, Ping and Diagnose say what happened,
// where, and how to fix it.
func TestRefusals(t *testing.T) {
	ctx := t.Context()
	do := func(s *redistest.Server, args ...any) {
		t.Helper()
		if err := s.Client().Do(ctx, args...).Err(); err != nil {
			t.Fatal(err)
		}
	}
	open := redistest.StartNode(t)
	master := redistest.StartNode(t)
	locked := redistest.StartNode(t, "--requirepass", "pw")
	do(locked.Server, "AUTH", "pw") // whether it does
	full := redistest.StartNode(t)
	do(full.Server, "CONFIG", "SET", "maxclients", "1")              // which is this one
	strangers := redistest.StartProxyFrom(t, open.Addr, "127.0.0.2") // protected mode knows 127.0.0.1 only
	tlsPort := redistest.FreePort(t)
	secureArgs, ca := certify(t, tlsPort)
	redistest.Start(t, append(secureArgs, "--bind", "127.0.0.1")...)
	cluster := redistest.StartCluster(t, 3)
	sentinel, lockedSentinel := redistest.StartSentinel(t, master.Addr), redistest.StartSentinel(t, master.Addr)
	do(lockedSentinel.Server, "ACL", "SETUSER", "default", "resetpass", ">pw")
	nobody := "127.0.0.1:" + redistest.FreePort(t)

	for _, tt := range []struct {
		name    string
		options RedisOptions
		where   string
		kind    ErrorKind
		want    []string
	}{
		{"nobody there", RedisOptions{URL: "redis://" + nobody}, nobody, KindConnection, []string{"connection refused"}},
		{"no password", RedisOptions{URL: "redis://" + locked.Addr},
			locked.Addr, KindAuth, []string{"NOAUTH", "set store.redis.password"}},
		{"a wrong password", RedisOptions{URL: "redis://:s3cret@" + locked.Addr},
			locked.Addr, KindAuth, []string{"WRONGPASS", "check store.redis.username and password"}},
		{"no such user", RedisOptions{URL: "redis://" + locked.Addr, Username: "nobody", Password: "s3cret"},
			locked.Addr, KindAuth, []string{"WRONGPASS", "check store.redis.username"}},
		{"protected mode", RedisOptions{URL: "redis://" + strangers.Addr},
			strangers.Addr, KindAuth, []string{"DENIED Redis is running in protected mode", "give Redis a password"}},
		{"too many clients", RedisOptions{URL: "redis://" + full.Addr},
			full.Addr, KindConnection, []string{"max number of clients reached", "raise maxclients"}},
		{"TLS to plain", RedisOptions{URL: "rediss://" + open.Addr},
			open.Addr, KindTimeout, []string{"no answer to TLS", "write redis:// in store.redis.url"}},
		{"plain to TLS", RedisOptions{URL: "redis://127.0.0.1:" + tlsPort},
			"127.0.0.1:" + tlsPort, KindConnection, []string{"TLS", "write rediss:// in store.redis.url"}},
		{"an unknown authority", RedisOptions{URL: "rediss://127.0.0.1:" + tlsPort},
			"127.0.0.1:" + tlsPort, KindConnection, []string{"x509: certificate signed by unknown authority"}},
		{"another name in the certificate",
			RedisOptions{URL: "rediss://127.0.0.1:" + tlsPort, TLS: &TLS{CAFile: ca, ServerName: "other"}},
			"127.0.0.1:" + tlsPort, KindConnection, []string{"x509: ", "other"}},
		{"a single Redis for a cluster", RedisOptions{Mode: Cluster, Addresses: []string{open.Addr}},
			open.Addr, "", []string{"cluster support disabled", "store.redis.mode: single"}},
		{"a sentinel for a Redis", RedisOptions{URL: "redis://" + sentinel.Addr},
			sentinel.Addr, "", []string{"sentinel", "store.redis.mode: sentinel"}},
		{"a Redis for a sentinel", RedisOptions{Mode: Sentinel, Addresses: []string{open.Addr}, Master: "mymaster"},
			"", "", []string{"no sentinel answers", "unknown command"}},
		{"an unknown master", RedisOptions{Mode: Sentinel, Addresses: []string{sentinel.Addr}, Master: "other"},
			"", KindConnection, []string{`no sentinel knows a master with the name "other"`, "check store.redis.master"}},
		{"a sentinel's password", RedisOptions{Mode: Sentinel, Addresses: []string{lockedSentinel.Addr}, Master: "mymaster"},
			"", "", []string{"NOAUTH", "store.redis.sentinel.password"}},
		{"a wrong one",
			RedisOptions{Mode: Sentinel, Addresses: []string{lockedSentinel.Addr}, Master: "mymaster",
				Sentinel: &SentinelOptions{Password: "s3cret"}},
			"", "", []string{"WRONGPASS", "store.redis.sentinel.password"}},
		{"no sentinel", RedisOptions{Mode: Sentinel, Addresses: []string{nobody}, Master: "mymaster"},
			"", "", []string{"no sentinel answers", "connection refused"}},
		{"a name that does not resolve", RedisOptions{URL: "redis://redis.invalid"},
			"redis.invalid:6379", KindConnection, []string{"lookup redis.invalid", "check the host name"}},
		{"a socket that is not there", RedisOptions{URL: "unix:///none/redis.sock"},
			"/none/redis.sock", KindConnection, []string{"no such file"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			says := func(who string, err error) {
				t.Helper()
				if err == nil {
					t.Errorf("%s: no error", who)
					return
				}
				for _, want := range append(tt.want, tt.where) {
					if !strings.Contains(err.Error(), want) {
						t.Errorf("%s: no %q in %v", who, want, err)
					}
				}
				if tt.kind != "" && KindOf(err) != tt.kind || strings.ContainsAny(err.Error(), "\r\n") ||
					strings.Contains(err.Error(), "s3cret") ||
					len(err.Error()) > 600 {
					t.Errorf("%s: of the kind %s, in %d bytes: %q", who, KindOf(err), len(err.Error()), err)
				}
			}
			c := charge(bucket(t, 1, day, 5), "a")
			verdicts := make([]Verdict, 1)
			var wg sync.WaitGroup
			defer wg.Wait()
			for _, ask := range []func(r *Redis){
				func(r *Redis) {
					r.Take(ctx, []Charge{c}, verdicts)
					says("a take", verdicts[0].Err)
				},
				func(r *Redis) { says("Ping", r.Ping(ctx)) },
				func(r *Redis) {
					_, _, err := r.Get(ctx, c)
					says("Get", err)
				},
				func(r *Redis) {
					findings := r.Diagnose(ctx, "sluice:test", 0)
					last := findings[len(findings)-1]
					if last.Status != Fail || !strings.Contains(last.Detail, tt.want[0]) ||
						!strings.Contains(last.Detail+last.Fix, tt.want[len(tt.want)-1]) {
						t.Errorf("Check: %+v", findings)
					}
				},
			} {
				r := openStore(t, tt.options)
				wg.Go(func() { ask(r) })
			}
		})
	}

	t.Run("a node of a cluster for a single Redis", func(t *testing.T) {
		r := openStore(t, RedisOptions{URL: "redis://" + cluster[0].Addr})
		findings := r.Diagnose(ctx, "sluice:test", 0)
		if last := findings[len(findings)-1]; last.Status != Fail ||
			!strings.Contains(last.Fix, "store.redis.mode: cluster") {
			t.Errorf("%+v", findings)
		}
		verdicts := make([]Verdict, 1)
		for i := 0; verdicts[0].Err == nil && i < 100; i++ { // until a key is another node's
			r.Take(ctx, []Charge{charge(bucket(t, 1, day, 5), fmt.Sprint(i))}, verdicts)
		}
		if err := verdicts[0].Err; err == nil || !strings.Contains(err.Error(), "set store.redis.mode: cluster") {
			t.Errorf("%v", err)
		}
	})
}

// Sentinels have a password and TLS of their own, the servers another and none.
func TestSentinelsOfTheirOwn(t *testing.T) {
	master := redistest.StartNode(t, "--requirepass", "pw")
	port := redistest.FreePort(t)
	args, ca := certify(t, port)
	sentinel := redistest.StartSentinel(t, master.Addr, args...)
	for _, command := range [][]any{
		{"SENTINEL", "SET", "mymaster", "auth-pass", "pw"},
		{"ACL", "SETUSER", "watcher", "on", ">their-own", "+@all"},
		{"ACL", "SETUSER", "default", "off"},
	} {
		if err := sentinel.Client().Do(t.Context(), command...).Err(); err != nil {
			t.Fatal(command, err)
		}
	}
	o := RedisOptions{
		Mode: Sentinel, Addresses: []string{"127.0.0.1:" + port}, Master: "mymaster", Password: "pw",
		Sentinel: &SentinelOptions{Username: "watcher", Password: "their-own", TLS: &TLS{CAFile: ca}},
	}
	taker{t, openStore(t, o)}.want("ok 9", charge(bucket(t, 1, day, 10), "a"))
}

// A user without a password is used where it is named.
func TestUserWithoutPassword(t *testing.T) {
	server := redistest.StartNode(t)
	for _, args := range [][]any{
		{"ACL", "SETUSER", "open", "on", "nopass", "~*", "+@all"},
		{"ACL", "SETUSER", "default", "off"},
	} {
		if err := server.Client().Do(t.Context(), args...).Err(); err != nil {
			t.Fatal(err)
		}
	}
	a := charge(bucket(t, 1, day, 10), "a")
	taker{t, openStore(t, RedisOptions{URL: "redis://open@" + server.Addr + "\n"})}.want("ok 9", a)
	taker{t, openStore(t, RedisOptions{URL: "redis://" + server.Addr, Username: "open"})}.want("ok 8", a)
}

// blackhole returns the host of an address on which nothing answers to a
// connection's first packet, on any free port, and that port.
func blackhole(t *testing.T) (host, port string) {
	t.Helper()
	fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = syscall.Close(fd) })
	port = redistest.FreePort(t)
	var n int
	if _, err := fmt.Sscan(port, &n); err != nil {
		t.Fatal(err)
	}
	host = "127.0.0.2"
	if err := syscall.Bind(fd, &syscall.SockaddrInet4{Port: n, Addr: [4]byte{127, 0, 0, 2}}); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Listen(fd, 0); err != nil { // nobody accepts: what is beyond the queue is dropped
		t.Fatal(err)
	}
	for i := 0; ; i++ {
		ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
		conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", net.JoinHostPort(host, port))
		cancel()
		if err != nil {
			return host, port
		}
		t.Cleanup(func() { _ = conn.Close() })
		if i > 10 {
			t.Fatal("it still answers")
		}
	}
}

// A name's first address may be dead: the next one is dialled beside it.
func TestFirstAddressIsDead(t *testing.T) {
	dead, port := blackhole(t)
	l, err := net.Listen("tcp", "127.0.0.1:"+port)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	for _, addresses := range [][]string{
		{dead, "127.0.0.1"}, {"127.0.0.3", "127.0.0.1"}, {dead, "127.0.0.3", dead, "127.0.0.1"},
	} {
		began := time.Now()
		conn, err := dialFirst(t.Context(), addresses, port)
		took := time.Since(began)
		if err != nil {
			t.Fatal(addresses, err)
		}
		if to := conn.RemoteAddr().String(); to != "127.0.0.1:"+port || took > connectTimeout/2 {
			t.Errorf("%v: to %s after %v", addresses, to, took)
		}
		_ = conn.Close()
	}
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if conn, err := dialFirst(ctx, []string{dead}, port); err == nil {
		_ = conn.Close()
		t.Error("the dead address answers: this says nothing")
	}
	if _, err := dialFirst(t.Context(), []string{"127.0.0.3", "127.0.0.4"}, port); err == nil ||
		!strings.Contains(err.Error(), "127.0.0.3:"+port) {
		t.Errorf("%v", err)
	}
}
