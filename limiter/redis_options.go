package limiter

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/redis/go-redis/v9/maintnotifications"
)

// RedisMode is the kind of a Redis deployment.
type RedisMode string

// The modes.
const (
	Single   RedisMode = "single" // one server
	Cluster  RedisMode = "cluster"
	Sentinel RedisMode = "sentinel" // a master and its replicas, found through sentinels
)

// RedisOptions says which Redis to use, and how long a take may last.
type RedisOptions struct {
	// Mode is Single if empty.
	Mode RedisMode
	// URL is redis://, rediss:// or unix://. In the modes Cluster and Sentinel it
	// is optional, and one more address.
	URL string
	// Addresses are host:port, of a cluster's nodes or of sentinels.
	Addresses []string
	// Master is the name of the master. It is only for the mode Sentinel.
	Master string
	// Username and Password take precedence over those of the URL unless empty. A
	// user without a password is one that needs none (nopass).
	Username, Password string
	// TLS is nil to do as the URL says.
	TLS *TLS
	// Sentinel says how to connect to the sentinels. If it is nil they have no
	// password, and are dialled over TLS if the servers are. It is only for the
	// mode Sentinel.
	Sentinel *SentinelOptions
	// Timeout bounds one take, the wait for a connection included; above 0.
	// Connecting has its own timeout of 5 s.
	Timeout time.Duration
}

// SentinelOptions says how to connect to sentinels.
type SentinelOptions struct {
	// Username and Password may be empty. A user without a password is one that
	// needs none (nopass).
	Username, Password string
	// TLS is nil to do as for the servers.
	TLS *TLS
}

// TLS says how to verify servers, and with which certificate to connect. The
// files are read at each dial, so that they may be replaced.
type TLS struct {
	CAFile            string // PEM; empty for the system's roots
	CertFile, KeyFile string // PEM; both empty for no client certificate
	ServerName        string // in the servers' certificates; empty for the host that is dialled
}

// Validate returns an error that says what is wrong with the options, or nil.
// The error contains no password. It reads the files of TLS.
func (o RedisOptions) Validate() error {
	_, err := o.universal()
	return err
}

// poolSize is how many connections a sidecar has to a server at most:
// maxConnections for takes, and the others for Get, Reset and the
// like.
const poolSize = 16

// nopass is what is sent as the password of a user without one. Redis refuses
// AUTH without a password, and takes any for a user that has nopass.
const nopass = "nopass"

// credentials returns what is sent to a server; nothing if both are empty.
func credentials(username, password string) (string, string) {
	if username != "" && password == "" {
		password = nopass
	}
	return username, password
}

// universal returns the options for the library.
func (o RedisOptions) universal() (*redis.UniversalOptions, error) {
	if o.Timeout <= 0 {
		return nil, fmt.Errorf("timeout must be above 0, not %v", o.Timeout)
	}
	c := &redis.UniversalOptions{Addrs: slices.Clone(o.Addresses)} // the library appends to it
	if o.URL != "" || o.Mode == "" || o.Mode == Single {
		u, err := parseURL(o.URL)
		if err != nil {
			return nil, err
		}
		if u.Network == "unix" && o.Mode != "" && o.Mode != Single {
			return nil, fmt.Errorf("mode %s does not work over a unix socket; want redis:// or rediss://", o.Mode)
		}
		c.Addrs = append([]string{u.Addr}, o.Addresses...)
		c.DB, c.Username, c.Password, c.TLSConfig = u.DB, u.Username, u.Password, u.TLSConfig
	}
	switch o.Mode {
	case "", Single:
		if len(o.Addresses) > 0 {
			return nil, errors.New("addresses requires mode cluster or sentinel; a single Redis is given by url")
		}
	case Cluster:
		if c.DB != 0 {
			return nil, fmt.Errorf("database %d: a cluster has only database 0", c.DB)
		}
	case Sentinel:
		if o.Master == "" {
			return nil, errors.New("mode sentinel without master; want the master's name")
		}
		c.MasterName = o.Master
	default:
		return nil, fmt.Errorf("unknown mode %q; want single, cluster or sentinel", o.Mode)
	}
	if o.Master != "" && o.Mode != Sentinel {
		return nil, errors.New("master requires mode sentinel")
	}
	if len(c.Addrs) == 0 {
		return nil, fmt.Errorf("mode %s without addresses; want a list of host:port", o.Mode)
	}
	if o.Mode == Cluster || o.Mode == Sentinel {
		for _, a := range c.Addrs {
			if host, port, err := net.SplitHostPort(a); err != nil || host == "" || port == "" {
				return nil, fmt.Errorf("invalid address %q; want host:port", a)
			}
		}
	}
	if o.Sentinel != nil && o.Mode != Sentinel {
		return nil, errors.New("sentinel requires mode sentinel")
	}
	if o.Username != "" {
		c.Username = o.Username
	}
	if o.Password != "" {
		c.Password = o.Password
	}
	d := dialer{servers: o.TLS}
	if d.servers == nil && c.TLSConfig != nil {
		d.servers = &TLS{}
	}
	d.sentinels = d.servers
	if o.Sentinel != nil {
		c.SentinelUsername, c.SentinelPassword = credentials(o.Sentinel.Username, o.Sentinel.Password)
		if o.Sentinel.TLS != nil {
			d.sentinels = o.Sentinel.TLS
		}
	}
	c.TLSConfig = nil // the dialer speaks TLS
	for _, files := range []*TLS{d.servers, d.sentinels} {
		if files == nil {
			continue
		}
		if _, err := files.config("redis"); err != nil {
			return nil, err
		}
	}
	d.hasSentinels = o.Mode == Sentinel
	c.Dialer = d.dial

	// The library never sends a take again; see also once.
	c.MaxRetries = -1
	c.DialerRetries = 1
	// The caller's context bounds everything. These hold where there is none, and
	// for the making of connections: an answer to the greeting has a part of the
	// time for all, so that another sentinel, or another node of a cluster, can
	// be asked after one that hangs.
	c.ContextTimeoutEnabled = true
	c.DialTimeout, c.PoolTimeout = connectTimeout, connectTimeout
	c.ReadTimeout = max(o.Timeout, connectTimeout/10)
	c.WriteTimeout = c.ReadTimeout
	// Without a cap on active connections the pool would dial one for each caller
	// that waits for a slow Redis.
	c.PoolSize, c.MaxActiveConns = poolSize, poolSize
	c.PipelinePoolSize = -1 // no second pool beside that
	c.ConnMaxLifetime, c.ConnMaxLifetimeJitter = maxLifetime, maxLifetime/10
	// A take is some 200 bytes; the default of 32 kB each way would be 2 MiB a
	// sidecar.
	c.ReadBufferSize, c.WriteBufferSize = 4096, 4096
	// With RESP3 the library asks the kernel for push messages before and after
	// each command. Nothing here subscribes to any.
	c.Protocol = 2
	// Each of these is a round trip of a new connection.
	c.DisableIdentity = true
	c.MaintNotificationsConfig = &maintnotifications.Config{Mode: maintnotifications.ModeDisabled}
	return c, nil
}

// open returns the library's client.
func (o RedisOptions) open(c *redis.UniversalOptions) redis.UniversalClient {
	switch o.Mode {
	case Cluster:
		cluster := c.Cluster()
		// With routing policies the first takes would wait, past their
		// deadlines, for the library to ask which commands there are; all takes
		// would, if the user has no right to ask. A take has a key, which is
		// enough to route it.
		cluster.DisableRoutingPolicies = true
		return redis.NewClusterClient(cluster)
	case Sentinel:
		client := redis.NewFailoverClient(c.Failover())
		client.AddHook(masterHook{})
		return client
	case Single:
	}
	simple := c.Simple()
	if strings.HasPrefix(simple.Addr, "/") {
		simple.Network = "unix"
	}
	return redis.NewClient(simple)
}

// config reads the files and returns the configuration for a dial of host.
func (t *TLS) config(host string) (*tls.Config, error) {
	c := &tls.Config{MinVersion: tls.VersionTLS12, ServerName: host}
	if t.ServerName != "" {
		c.ServerName = t.ServerName
	}
	if t.CAFile != "" {
		pem, err := readPEM(t.CAFile)
		if err != nil {
			return nil, fmt.Errorf("ca_file: %w", err)
		}
		c.RootCAs = x509.NewCertPool()
		if !c.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("ca_file: %s contains no PEM certificate", t.CAFile)
		}
	}
	if (t.CertFile == "") != (t.KeyFile == "") {
		return nil, errors.New("cert_file and key_file must be set together")
	}
	if t.CertFile != "" {
		pair, err := readPair(t.CertFile, t.KeyFile)
		if err != nil {
			return nil, fmt.Errorf("cert_file and key_file: %w", err)
		}
		c.Certificates = []tls.Certificate{pair}
	}
	return c, nil
}
