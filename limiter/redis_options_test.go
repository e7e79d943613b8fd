package limiter

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/redis/go-redis/v9"

	"github.com/sluiceproxy/sluice/limiter/redistest"
)

// authority makes certificates.
type authority struct {
	t    *testing.T
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pem  []byte
}

func newAuthority(t *testing.T, name string) *authority {
	t.Helper()
	a := &authority{t: t}
	a.cert, a.key, a.pem, _ = a.make(name, nil)
	return a
}

// make makes a certificate; without a parent it is its own authority.
func (a *authority) make(
	name string,
	parent *authority,
) (cert *x509.Certificate, key *ecdsa.PrivateKey, certPEM, keyPEM []byte) {
	a.t.Helper()
	must := func(err error) {
		if err != nil {
			a.t.Fatal(err)
		}
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(err)
	serial, err := rand.Int(rand.Reader, big.NewInt(1<<62))
	must(err)
	template := &x509.Certificate{
		SerialNumber:          serial,
		Subject:               pkix.Name{CommonName: name},
		NotBefore:             time.Now().Add(-time.Hour),
		NotAfter:              time.Now().Add(time.Hour),
		IsCA:                  parent == nil,
		BasicConstraintsValid: true,
		DNSNames:              []string{"redis.test"},
		IPAddresses:           []net.IP{net.IPv4(127, 0, 0, 1)},
		KeyUsage:              x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	signer, signerKey := template, key
	if parent != nil {
		signer, signerKey = parent.cert, parent.key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, signer, &key.PublicKey, signerKey)
	must(err)
	cert, err = x509.ParseCertificate(der)
	must(err)
	keyDER, err := x509.MarshalECPrivateKey(key)
	must(err)
	certPEM = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	keyPEM = pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: keyDER})
	return cert, key, certPEM, keyPEM
}

// write writes the authority's certificate, and one that it has issued, into a
// directory.
func (a *authority) write(dir, name string) {
	a.t.Helper()
	_, _, cert, key := a.make(name, a)
	for file, text := range map[string][]byte{"ca.pem": a.pem, name + ".pem": cert, name + ".key": key} {
		if err := os.WriteFile(filepath.Join(dir, file), text, 0o600); err != nil {
			a.t.Fatal(err)
		}
	}
}

// TLS works with certificates on both sides, and their files may be replaced
// while the store is in use.
func TestTLS(t *testing.T) {
	servers, clients := t.TempDir(), t.TempDir()
	first := newAuthority(t, "first")
	first.write(servers, "server")
	first.write(clients, "client")
	port := redistest.FreePort(t)
	server := redistest.Start(t, "--tls-port", port, "--tls-cert-file", servers+"/server.pem", "--tls-key-file",
		servers+"/server.key", "--tls-ca-cert-file", servers+"/ca.pem", "--tls-auth-clients", "yes", "--bind", "127.0.0.1")
	open := func(o RedisOptions) *Redis {
		t.Helper()
		r, err := NewRedis(o, nil, prometheus.NewRegistry())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = r.Close() })
		return r
	}
	o := RedisOptions{URL: "rediss://127.0.0.1:" + port, Timeout: 10 * time.Second, TLS: &TLS{
		CAFile: clients + "/ca.pem", CertFile: clients + "/client.pem", KeyFile: clients + "/client.key",
	}}
	r := open(o)
	k := taker{t, r}
	a := charge(bucket(t, 1, day, 10), "a")
	k.want("ok 9", a)
	named := o
	named.TLS = &TLS{CAFile: o.TLS.CAFile, CertFile: o.TLS.CertFile, KeyFile: o.TLS.KeyFile, ServerName: "redis.test"}
	taker{t, open(named)}.want("ok 8", a)

	verdicts := make([]Verdict, 1)
	refused := func(what string, change func(*TLS)) {
		t.Helper()
		bad, files := o, *o.TLS
		change(&files)
		bad.TLS = &files
		open(bad).Take(context.Background(), []Charge{a}, verdicts)
		if KindOf(verdicts[0].Err) != KindConnection {
			t.Errorf("%s: %+v", what, verdicts[0])
		}
	}
	refused("another name", func(f *TLS) { f.ServerName = "other.test" })
	refused("no certificate of one's own", func(f *TLS) { f.CertFile, f.KeyFile = "", "" })
	refused("the system's roots", func(f *TLS) { f.CAFile = "" })

	// Another authority on both sides: the store in use goes on.
	second := newAuthority(t, "second")
	second.write(servers, "server")
	second.write(clients, "client")
	server.Shutdown()
	server.Restart()
	for try := 0; ; try++ { // the connections that were open are gone
		if r.Take(context.Background(), []Charge{a}, verdicts); verdicts[0].Err == nil {
			break
		}
		if try > poolSize {
			t.Fatal(verdicts[0].Err)
		}
	}
	if err := os.WriteFile(clients+"/client.key", []byte("nonsense"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := NewRedis(o, nil, prometheus.NewRegistry()); err == nil ||
		!strings.HasPrefix(err.Error(), "cert_file and key_file: ") {
		t.Errorf("%v", err)
	}
}

// startSentinel starts a sentinel and returns once it knows the master and its
// replica.
func startSentinel(t *testing.T, master string) (addr string, client *redis.SentinelClient) {
	t.Helper()
	node := redistest.StartSentinel(t, master)
	client = redis.NewSentinelClient(&redis.Options{Addr: node.Addr, MaxRetries: -1})
	t.Cleanup(func() { _ = client.Close() })
	eventually(t, "the sentinel knows the replica", func() bool {
		replicas, err := client.Replicas(t.Context(), "mymaster").Result()
		return err == nil && len(replicas) == 1 && replicas[0]["master-link-status"] == "ok"
	})
	return node.Addr, client
}

// Through sentinels to the master, also after another has become that.
func TestSentinel(t *testing.T) {
	master := redistest.StartNode(t)
	_, port, _ := strings.Cut(master.Addr, ":")
	replica := redistest.StartNode(t, "--replicaof", "127.0.0.1", port)
	addr, sentinel := startSentinel(t, master.Addr)
	ctx := context.Background()
	heir := replica.Client()
	r, err := NewRedis(
		RedisOptions{Mode: Sentinel, Addresses: []string{addr}, Master: "mymaster", Timeout: 10 * time.Second}, nil,
		prometheus.NewRegistry())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = r.Close() }()
	a := charge(bucket(t, 1, day, 1000), "a")
	taker{t, r}.want("ok 999", a)
	if n := master.Client().Exists(ctx, a.Key).Val(); n != 1 {
		t.Error("the master has no bucket")
	}
	if err := sentinel.Failover(ctx, "mymaster").Err(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the replica is the master",
		func() bool { return strings.Contains(heir.Info(ctx, "replication").Val(), "role:master") })
	eventually(t, "takes go to it", func() bool {
		verdicts := make([]Verdict, 1)
		before := heir.Get(ctx, a.Key).Val()
		r.Take(ctx, []Charge{a}, verdicts)
		return verdicts[0].Err == nil && verdicts[0].Allowed && heir.Get(ctx, a.Key).Val() != before
	})
}

func TestModesAreChecked(t *testing.T) {
	for want, o := range map[string]RedisOptions{
		`unknown mode "ring"; want single, cluster or sentinel`:                       {Mode: "ring", URL: "redis://h"},
		"mode cluster without addresses; want a list of host:port":                    {Mode: Cluster},
		"database 2: a cluster has only database 0":                                   {Mode: Cluster, URL: "redis://h/2"},
		"mode cluster does not work over a unix socket; want redis:// or rediss://":   {Mode: Cluster, URL: "unix:///x"},
		`invalid address "h"; want host:port`:                                         {Mode: Cluster, Addresses: []string{"h"}},
		"mode sentinel without master; want the master's name":                        {Mode: Sentinel, Addresses: []string{"h:1"}},
		"master requires mode sentinel":                                               {URL: "redis://h", Master: "m"},
		"addresses requires mode cluster or sentinel; a single Redis is given by url": {URL: "redis://h", Addresses: []string{"h:1"}},
		"cert_file and key_file must be set together":                                 {URL: "redis://h", TLS: &TLS{CertFile: "x"}},
		"ca_file: open none.pem: no such file or directory":                           {URL: "redis://h", TLS: &TLS{CAFile: "none.pem"}},
		"ca_file: redis_options_test.go contains no PEM certificate":                  {URL: "redis://h", TLS: &TLS{CAFile: "redis_options_test.go"}},
	} {
		o.Timeout = time.Second
		if err := o.Validate(); err == nil || err.Error() != want {
			t.Errorf("%v\nwant %s", err, want)
		}
	}
}

// The first takes of a process also end in time on a cluster most of whose
// nodes do not answer, as a user without the COMMAND command.
func TestColdClusterKeepsTime(t *testing.T) {
	const timeout = 200 * time.Millisecond
	nodes := redistest.StartCluster(t, 3)
	if err := nodes[0].Client().Do(context.Background(), "ACL", "SETUSER", "default", "-command").Err(); err != nil {
		t.Fatal(err)
	}
	for _, n := range nodes[1:] {
		n.Freeze()
	}
	r, err := NewRedis(RedisOptions{Mode: Cluster, Addresses: []string{nodes[0].Addr}, Timeout: timeout}, nil,
		prometheus.NewRegistry())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = r.Close() }()
	b := bucket(t, 1, day, 1)
	var wg sync.WaitGroup
	for i := range 20 {
		wg.Go(func() {
			c := charge(b, "a")
			c.Key = fmt.Sprintf("sluice:test:a:{%d}", i)
			verdicts := make([]Verdict, 1)
			began := time.Now()
			r.Take(context.Background(), []Charge{c}, verdicts)
			if took := time.Since(began); took > timeout+2*slack {
				t.Errorf("a take took %v of %v: %v", took, timeout, verdicts[0].Err)
			}
		})
	}
	wg.Wait()
}

// The URL selects the transport and the database: the bucket is in that
// database and in no other.
func TestURLSaysWhere(t *testing.T) {
	port := redistest.FreePort(t)
	server := redistest.Start(t, "--port", port, "--bind", "127.0.0.1")
	b := bucket(t, 1, day, 10)
	for database, url := range []string{
		server.URL(), server.URL() + "?db=1",
		"redis://127.0.0.1:" + port + "/2", "redis://localhost:" + port + "/3",
	} {
		r, err := NewRedis(RedisOptions{URL: url, Timeout: 10 * time.Second}, nil, prometheus.NewRegistry())
		if err != nil {
			t.Fatal(err)
		}
		taker{t, r}.want("ok 9", charge(b, "a"))
		if err := r.Close(); err != nil {
			t.Error(err)
		}
		keyspace := server.Info("keyspace")
		if len(keyspace) != database+1 || !strings.HasPrefix(keyspace[fmt.Sprintf("db%d", database)], "keys=1,") {
			t.Errorf("after a take by %s: %v", url, keyspace)
		}
	}
}
