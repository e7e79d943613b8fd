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

// RedisMode is what kind of Redis there is.
type RedisMode string

// The modes.
const (
	Single   RedisMode = "single" // one server
	Cluster  RedisMode = "cluster"
	Sentinel RedisMode = "sentinel" // a master that sentinels know
)

// RedisOptions say which Redis, and how long a take may last.
type RedisOptions struct {
	Mode      RedisMode // empty: Single
	URL       string    // redis://, rediss:// or unix://; for a cluster or sentinels it may be empty, and is else one more address
	Addresses []string  // host:port, of a cluster's nodes or of sentinels
	Master    string    // its name among the sentinels
	Username  string    // over the URL's, unless empty; without a password it is a user who needs none (nopass)
	Password  string    // over the URL's, unless empty
	TLS       *TLS      // nil: as the URL says
	// Sentinel says how to talk to the sentinels; nil: without a password, and
	// over TLS if the servers use it. It is only for the mode Sentinel.
	Sentinel *SentinelOptions
	// Timeout bounds one take, the wait for a connection included; above 0. To
	// make a connection has a time of its own, connectTimeout.
	Timeout time.Duration
}

// SentinelOptions say how to talk to sentinels.
type SentinelOptions struct {
	Username string // without a password it is a user who needs none (nopass)
	Password string // empty, and Username too: none
	TLS      *TLS   // nil: as the servers
}

// TLS says how servers are known, and how this process shows who it is. The files are read at each dial, so that they may be replaced.
type TLS struct {
	CAFile            string // PEM; empty: the system's roots
	CertFile, KeyFile string // PEM; empty: no certificate of one's own
	ServerName        string // in the servers' certificates; empty: the host that is dialled
}

// Validate reports what is wrong with the options. Its error holds no password.
func (o RedisOptions) Validate() error {
	_, err := o.universal()
	return err
}

// poolSize is how many connections a sidecar has to a server at most:
// maxConnections for takes, and the others for what is given back, and for
// whoever asks besides.
const poolSize = 16

// nopass is what is sent as the password of a user without one. Redis refuses
// AUTH without a password, and takes any for a user that has nopass.
const nopass = "nopass"

// credentials are what is sent to a server: nothing where both are empty.
func credentials(username, password string) (string, string) {
	if username != "" && password == "" {
		password = nopass
	}
	return username, password
}

// universal is what the library is told.
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

	// A take is never sent again by the library: see once, too.
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
	// Without a cap on its active connections the pool dials one for each caller that waits for a slow Redis.
	c.PoolSize, c.MaxActiveConns = poolSize, poolSize
	c.PipelinePoolSize = -1 // no second pool beside that
	c.ConnMaxLifetime, c.ConnMaxLifetimeJitter = maxLifetime, maxLifetime/10
	// A take is some 200 bytes; the default of 32 kB each way would be 2 MiB a sidecar.
	c.ReadBufferSize, c.WriteBufferSize = 4096, 4096
	// Each of these is a round trip of a new connection.
	c.DisableIdentity = true
	c.MaintNotificationsConfig = &maintnotifications.Config{Mode: maintnotifications.ModeDisabled}
	return c, nil
}

// open makes the library's client.
func (o RedisOptions) open(c *redis.UniversalOptions) redis.UniversalClient {
	switch o.Mode {
	case Cluster:
		cluster := c.Cluster()
		// Else the first takes wait for the library to ask what commands there are, one after another and past their deadlines, and where
		// a user may not ask that, all takes do. Each take has a key, which says all that there is to know.
		cluster.DisableRoutingPolicies = true
		return redis.NewClusterClient(cluster)
	case Sentinel:
		client := redis.NewFailoverClient(c.Failover())
		client.AddHook(masterHook{})
		return client
	}
	simple := c.Simple()
	if strings.HasPrefix(simple.Addr, "/") {
		simple.Network = "unix"
	}
	return redis.NewClient(simple)
}

// config reads the files.
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
