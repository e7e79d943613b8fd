package limiter

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/url"
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
	Mode      RedisMode     // empty: Single
	URL       string        // redis://, rediss:// or unix://; for a cluster or sentinels it may be empty, and is else one more address
	Addresses []string      // host:port, of a cluster's nodes or of sentinels
	Master    string        // its name among the sentinels
	Username  string        // over the URL's, unless empty
	Password  string        // over the URL's, unless empty
	TLS       *TLS          // nil: as the URL says
	Timeout   time.Duration // of one take, the wait for a connection and its dial included; above 0
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

const urlForms = "allowed are redis://[user:password@]host:port[/database], the same with rediss://, and unix:///path/to/socket[?db=database]"

// poolSize is how many connections a sidecar has to a server at most. Takes need maxFlights; the others are for what is given back, and
// for whoever asks besides.
const poolSize = 16

// universal is what the library is told.
func (o RedisOptions) universal() (*redis.UniversalOptions, error) {
	if o.Timeout <= 0 {
		return nil, fmt.Errorf("the timeout %v is not above 0", o.Timeout)
	}
	c := &redis.UniversalOptions{Addrs: slices.Clone(o.Addresses)} // the library appends to it
	if o.URL != "" || o.Mode == "" || o.Mode == Single {
		u, err := parseURL(o.URL)
		if err != nil {
			return nil, err
		}
		if u.Network == "unix" && o.Mode != "" && o.Mode != Single {
			return nil, fmt.Errorf("a unix socket for a %s; allowed are redis:// and rediss://", o.Mode)
		}
		c.Addrs = append([]string{u.Addr}, o.Addresses...)
		c.DB, c.Username, c.Password, c.TLSConfig = u.DB, u.Username, u.Password, u.TLSConfig
	}
	switch o.Mode {
	case "", Single:
		if len(o.Addresses) > 0 {
			return nil, errors.New("addresses of a single Redis; its URL says where it is, and addresses are for a cluster and for sentinels")
		}
	case Cluster:
		if c.DB != 0 {
			return nil, fmt.Errorf("the database %d of a cluster, which has only 0", c.DB)
		}
	case Sentinel:
		if o.Master == "" {
			return nil, errors.New("sentinels without a master: its name is missing")
		}
		c.MasterName = o.Master
	default:
		return nil, fmt.Errorf("the mode %q; allowed are single, cluster, sentinel", o.Mode)
	}
	if o.Master != "" && o.Mode != Sentinel {
		return nil, errors.New("a master's name without sentinels; it is for the mode sentinel")
	}
	if len(c.Addrs) == 0 {
		return nil, fmt.Errorf("no addresses of the %s; wanted is a list of host:port", o.Mode)
	}
	if o.Mode == Cluster || o.Mode == Sentinel {
		for _, a := range c.Addrs {
			if host, port, err := net.SplitHostPort(a); err != nil || host == "" || port == "" {
				return nil, fmt.Errorf("the address %q; allowed are host:port", a)
			}
		}
	}
	if o.Username != "" {
		c.Username = o.Username
	}
	if o.Password != "" {
		c.Password = o.Password
	}
	files := o.TLS
	if files == nil && c.TLSConfig != nil {
		files = &TLS{}
	}
	c.TLSConfig = nil // the dialer speaks TLS
	if files != nil {
		if _, err := files.config("redis"); err != nil {
			return nil, err
		}
	}
	c.Dialer = dialer(files)

	// A take is never sent again by the library: see once, too.
	c.MaxRetries = -1
	c.DialerRetries = 1
	// The caller's context bounds everything; these hold where the library dials outside of one.
	c.ContextTimeoutEnabled = true
	c.DialTimeout, c.ReadTimeout, c.WriteTimeout, c.PoolTimeout = o.Timeout, o.Timeout, o.Timeout, o.Timeout
	// Without a cap on its active connections the pool dials one for each caller that waits for a slow Redis.
	c.PoolSize, c.MaxActiveConns = poolSize, poolSize
	// A take is some 200 bytes; the default of 32 kB each way would be 2 MiB a sidecar.
	c.ReadBufferSize, c.WriteBufferSize = 4096, 4096
	// Each of these is a round trip of a new connection, on the time of the take that waits for it.
	c.DisableIdentity = true
	c.MaintNotificationsConfig = &maintnotifications.Config{Mode: maintnotifications.ModeDisabled}
	return c, nil
}

// parseURL reads a URL more strictly than the library, which takes parameters for settings of its own.
func parseURL(text string) (*redis.Options, error) {
	u, err := url.Parse(text)
	if err != nil { // url.Error repeats the URL, and so its password
		return nil, fmt.Errorf("not a URL; %s", urlForms)
	}
	q := u.Query()
	if u.Scheme == "unix" {
		q.Del("db")
		if u.Path == "" {
			return nil, fmt.Errorf("a URL without the socket's path; %s", urlForms)
		}
	} else if u.Host == "" {
		return nil, fmt.Errorf("a URL without a host; %s", urlForms)
	}
	if len(q) > 0 {
		return nil, fmt.Errorf("a URL with parameters; %s", urlForms)
	}
	c, err := redis.ParseURL(text)
	if err != nil {
		return nil, fmt.Errorf("%s; %s", strings.TrimPrefix(err.Error(), "redis: "), urlForms)
	}
	if c.DB < 0 {
		return nil, fmt.Errorf("the database %d is not 0 or above; %s", c.DB, urlForms)
	}
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
		return redis.NewFailoverClient(c.Failover())
	}
	simple := c.Simple()
	if strings.HasPrefix(simple.Addr, "/") {
		simple.Network = "unix"
	}
	return redis.NewClient(simple)
}

// dialer dials servers, with TLS where there is some. A dial that fails gives a connection that is broken: of errors the library's pool
// keeps count, and after some takes a second to see that a server is there again.
func dialer(files *TLS) func(context.Context, string, string) (net.Conn, error) {
	var plain net.Dialer
	return func(ctx context.Context, network, addr string) (net.Conn, error) {
		conn, err := plain.DialContext(ctx, network, addr)
		if err != nil {
			return broken{err: err}, nil //nolint:nilerr // see above: the connection says it
		}
		if files == nil {
			return conn, nil
		}
		host, _, err := net.SplitHostPort(addr)
		if err != nil {
			host = addr
		}
		config, err := files.config(host)
		if err == nil {
			secure := tls.Client(conn, config)
			if err = secure.HandshakeContext(ctx); err == nil {
				return secure, nil
			}
		}
		_ = conn.Close()
		return broken{err: err}, nil
	}
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
			return nil, fmt.Errorf("ca_file: %s holds no certificate in PEM", t.CAFile)
		}
	}
	if (t.CertFile == "") != (t.KeyFile == "") {
		return nil, errors.New("one of cert_file and key_file; wanted are both or none")
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

// broken is a connection that could not be made: all that is done with it fails, with the reason.
type broken struct {
	net.Conn
	err error
}

func (b broken) Read([]byte) (int, error)       { return 0, b.err }
func (b broken) Write([]byte) (int, error)      { return 0, b.err }
func (broken) Close() error                     { return nil }
func (broken) LocalAddr() net.Addr              { return noAddr{} }
func (broken) RemoteAddr() net.Addr             { return noAddr{} }
func (broken) SetDeadline(time.Time) error      { return nil }
func (broken) SetReadDeadline(time.Time) error  { return nil }
func (broken) SetWriteDeadline(time.Time) error { return nil }

type noAddr struct{}

func (noAddr) Network() string { return "none" }
func (noAddr) String() string  { return "none" }
