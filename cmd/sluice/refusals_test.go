package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"

	"github.com/sluiceproxy/sluice/limiter/redistest"
)

// TestRedisRefusesASidecar checks each way in which a reachable Redis refuses
// to work: every request gets the failure mode, none passes, and the log and a
// metric name the cause.
func TestRedisRefusesASidecar(t *testing.T) {
	const checks = 100
	on := func(t *testing.T, s *redistest.Server, commands ...string) {
		t.Helper()
		for _, c := range commands {
			var args []any
			for word := range strings.FieldsSeq(c) {
				args = append(args, word)
			}
			if err := s.Client().Do(t.Context(), args...).Err(); err != nil {
				t.Fatal(err)
			}
		}
	}
	const guest = "username: guest, password: pw"
	for _, tt := range []struct {
		name  string
		args  []string
		setup func(t *testing.T, s *redistest.Server)
		store string // besides url
		kind  string
		log   string // what its line says, besides the kind
	}{
		{
			name: "a replica", kind: "readonly", log: "READONLY",
			setup: func(t *testing.T, s *redistest.Server) { on(t, s, "REPLICAOF 127.0.0.1 1") },
		},
		{
			name: "too few replicas", kind: "readonly", log: "NOREPLICAS",
			setup: func(t *testing.T, s *redistest.Server) { on(t, s, "CONFIG SET min-replicas-to-write 1") },
		},
		{name: "a save that failed", kind: "readonly", log: "MISCONF", setup: func(t *testing.T, s *redistest.Server) {
			// There is a directory in the place of the file.
			dir := s.Client().ConfigGet(t.Context(), "dir").Val()["dir"]
			if err := os.Mkdir(filepath.Join(dir, "dump.rdb"), 0o700); err != nil {
				t.Fatal(err)
			}
			if err := s.Client().ConfigSet(t.Context(), "save", "3600 1").Err(); err != nil {
				t.Fatal(err)
			}
			on(t, s, "SET a b", "BGSAVE")
			eventually(t, "a failed save", func() bool { return s.Info("persistence")["rdb_last_bgsave_status"] == "err" })
		}},
		{
			name: "out of memory", kind: "oom", log: "OOM",
			setup: func(t *testing.T, s *redistest.Server) { on(t, s, "CONFIG SET maxmemory 1") },
		},
		{name: "loading", kind: "loading", log: "LOADING", args: []string{
			"--enable-debug-command", "yes", "--loading-process-events-interval-bytes", "1024",
		}, setup: func(t *testing.T, s *redistest.Server) {
			// Loading takes 40 s. Redis handles events after each key.
			on(t, s, "DEBUG POPULATE 4000 key 2000", "CONFIG SET rdbcompression no", "CONFIG SET key-load-delay 10000")
			go s.Client().Do(t.Context(), "DEBUG", "RELOAD") // ends with the server
			eventually(t, "a Redis that is loading", func() bool {
				return strings.HasPrefix(fmt.Sprint(s.Client().Get(t.Context(), "a").Err()), "LOADING")
			})
		}},
		{
			name: "a wrong password", kind: "auth", log: "WRONGPASS", store: "password: wrong",
			args: []string{"--requirepass", "right"},
		},
		{name: "no password", kind: "auth", log: "NOAUTH", args: []string{"--requirepass", "right"}},
		{name: "no rights", kind: "auth", log: "NOPERM", store: guest, setup: func(t *testing.T, s *redistest.Server) {
			on(t, s, "ACL SETUSER guest on >pw ~sluice:* +ping +time")
		}},
		{
			name: "no right to write", kind: "auth", log: "NOPERM", store: guest,
			setup: func(t *testing.T, s *redistest.Server) {
				on(t, s, "ACL SETUSER guest on >pw ~sluice:* +time +evalsha +eval +get")
			},
		},
		{name: "a certificate that has expired", kind: "connection", log: "certificate has expired"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			var url, store string
			if tt.log == "certificate has expired" {
				dir := t.TempDir()
				writeExpired(t, dir)
				port := redistest.FreePort(t)
				redistest.Start(
					t, "--tls-port", port, "--tls-cert-file", dir+"/cert.pem", "--tls-key-file", dir+"/key.pem", "--tls-auth-clients",
					"no", "--tls-ca-cert-file", dir+"/cert.pem", "--bind", "127.0.0.1",
				)
				url, store = "rediss://127.0.0.1:"+port, "tls: {ca_file: "+dir+"/cert.pem}"
			} else {
				s := redistest.Start(t, tt.args...)
				if tt.setup != nil {
					tt.setup(t, s)
				}
				url, store = s.URL(), tt.store
			}
			p := startSluice(t, "--config", file(t, "sluice.yaml", fmt.Sprintf(`
store: {redis: {url: %q, timeout: 5s, %s}}
limits: [{name: all, rate: 1000000/s}]
`, url, store)))
			conn := dial(t, p.grpc)
			for range checks {
				if got := check(t, conn, from("203.0.113.1", "/")); got != "503" {
					t.Fatalf("a request got %s", got)
				}
			}
			_, metrics := get(t, "http://"+p.metrics+"/metrics")
			for _, want := range []string{
				fmt.Sprintf("sluice_checks_total{decision=%q} %d\n", "failed_closed", checks),
				fmt.Sprintf("sluice_checks_total{decision=%q} 0\n", "allowed"),
			} {
				if !strings.Contains(metrics, want) {
					t.Errorf("no %s", want)
				}
			}
			for line := range strings.Lines(metrics) {
				if rest, ok := strings.CutPrefix(line, `sluice_store_errors_total{kind="`); ok {
					kind, count, _ := strings.Cut(strings.TrimSpace(rest), `"} `)
					if (count == "0") != (kind != tt.kind) {
						t.Errorf("errors of the kind %s: %s", kind, count)
					}
				}
			}
			said := 0
			for line := range strings.Lines(p.logged()) {
				var l struct{ Msg, Error string }
				if json.Unmarshal([]byte(line), &l) == nil && l.Msg == "store error: "+tt.kind {
					said++
					if !strings.Contains(l.Error, tt.log) {
						t.Errorf("the log says %q, without %s", l.Error, tt.log)
					}
				}
			}
			if said == 0 || said > checks/2 { // one a second
				t.Errorf("the log says so %d times:\n%s", said, p.logged())
			}
		})
	}
}

// TestRefusedClientsSpread checks that the clients that a sidecar without Redis
// refuses get different retry-after values.
func TestRefusedClientsSpread(t *testing.T) {
	const clients, longest = 1000, 10
	redis := redistest.Start(t)
	p := startSluice(t, "--redis", redis.URL(), "--config", file(t, "sluice.yaml",
		"store: {redis: {timeout: 10s}}\nlimits: [{name: all, rate: 1000000/s}]\n"))
	conn := dial(t, p.grpc)
	if got := check(t, conn, from("203.0.113.1", "/")); got != "ok" {
		t.Fatal(got)
	}
	redis.Kill()
	after := map[string]int{}
	for range clients {
		r, err := authv3.NewAuthorizationClient(conn).Check(t.Context(), from("203.0.113.1", "/"))
		if err != nil {
			t.Fatal(err)
		}
		for _, h := range r.GetDeniedResponse().GetHeaders() {
			if h.GetHeader().GetKey() == "retry-after" {
				after[h.GetHeader().GetValue()]++
			}
		}
	}
	t.Logf("%v", after)
	for seconds := range longest {
		// The expected number is 100. A difference of 40 is about four standard
		// deviations.
		if n := after[fmt.Sprint(1+seconds)]; n < clients/longest-40 || n > clients/longest+40 {
			t.Errorf("%d of %d are told to come back after %d s", n, clients, 1+seconds)
		}
	}
	if len(after) != longest {
		t.Errorf("%v", after)
	}
}

// writeExpired writes a self-signed server certificate that expired yesterday.
func writeExpired(t *testing.T, dir string) {
	t.Helper()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(err)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-48 * time.Hour), NotAfter: time.Now().Add(-24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	must(err)
	secret, err := x509.MarshalECPrivateKey(key)
	must(err)
	must(os.WriteFile(dir+"/cert.pem", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600))
	must(os.WriteFile(dir+"/key.pem", pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: secret}), 0o600))
}
