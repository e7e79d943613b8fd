package main

import (
	"fmt"
	"net"
	"testing"
	"time"

	"github.com/sluiceproxy/sluice/limiter/redistest"
)

// TestClientsHangUp checks that clients that hang up while Redis is slow count
// neither as failures of Redis nor as refusals, so that no alert fires.
func TestClientsHangUp(t *testing.T) {
	const clients, rounds = 50, 20
	redis := redistest.StartProxy(t, redistest.StartNode(t).Addr)
	s := serveRecipe(t, fmt.Sprintf(`
store: {redis: {url: "redis://%s/0", timeout: 15s}}
limits:
  - {name: per-key, key: 'request.headers["x-api-key"]', rate: 1/d}
`, redis.Addr), nil)
	s.want(1, 1, "GET /", "x-api-key", "first")
	counted := s.p.counted
	began := func() int { return counted(`grpc_server_started_total\{.*method="Check".*\}`) }
	ended := func() int { return counted(`sluice_checks_total\{decision="[a-z_]+"\}`) }

	redis.Delay(2 * time.Second)
	for round := range rounds {
		before := began()
		var all []net.Conn
		for i := range clients {
			conn, err := net.Dial("tcp", s.addr)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := fmt.Fprintf(conn, "GET / HTTP/1.1\r\nHost: h\r\nx-api-key: %d-%d\r\n\r\n", round, i); err != nil {
				t.Fatal(err)
			}
			all = append(all, conn)
		}
		eventually(t, "the calls of all clients", func() bool { return began() == before+clients })
		for _, conn := range all {
			_ = conn.Close()
		}
	}
	redis.Mend()
	eventually(t, "the end of all calls", func() bool { return ended() == began() })
	if n := counted(`sluice_store_errors_total\{kind="[a-z]+"\}`); n != 0 {
		t.Errorf("%d errors of the store", n)
	}
	// The leaders of batches, whose calls carried the takes of others, got
	// their answers.
	canceled, allowed := counted(
		`sluice_checks_total\{decision="canceled"\}`,
	), counted(
		`sluice_checks_total\{decision="allowed"\}`,
	)
	if canceled < clients*rounds/2 || canceled+allowed != clients*rounds+1 {
		t.Errorf("%d canceled and %d allowed of %d checks", canceled, allowed, ended())
	}
	s.want(1, 2, "GET /", "x-api-key", "last")
}
