package limiter

import (
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/url"
	"regexp"
	"strconv"
	"strings"

	"github.com/redis/go-redis/v9"
)

const urlForms = "want redis://[user:password@]host:port[/database], the same with rediss://, " +
	"or unix:///path/to/socket[?db=database]"

// maxSocketPath is how long the path of a unix socket may be, in bytes.
const maxSocketPath = 107

// parseURL reads the URL of a Redis. It is stricter than the library, which
// takes parameters for settings of its own. No error quotes more than the host
// and the port: any other part may belong to a password.
func parseURL(text string) (*redis.Options, error) {
	c, err := readURL(strings.TrimRight(text, "\r\n"))
	if err != nil {
		return nil, fmt.Errorf("%w; %s", err, urlForms)
	}
	return c, nil
}

func readURL(text string) (*redis.Options, error) {
	scheme, rest, _ := strings.Cut(text, "://")
	isUnix := strings.EqualFold(scheme, "unix")
	at := strings.LastIndexByte(rest, '@')
	if !isUnix && at >= 0 && strings.ContainsAny(rest[:at], "/?#") {
		return nil, errors.New("user or password contains / ? or #: write %2F, %3F or %23, or use password or password_file")
	}
	if servers, _, _ := strings.Cut(rest[at+1:], "/"); !isUnix && strings.Contains(servers, ",") {
		return nil, errors.New(
			"URL with several hosts: write mode: cluster or mode: sentinel, and addresses: [host:port, host:port]")
	}
	u, err := url.Parse(text)
	if err != nil { // url.Error repeats the URL, and so its password
		return nil, errors.New("invalid URL")
	}
	c := &redis.Options{}
	switch u.Scheme {
	case "unix":
		err = readSocket(u, c)
	case "redis":
		err = readServer(u, c)
	case "rediss":
		err = readServer(u, c)
		c.TLSConfig = &tls.Config{MinVersion: tls.VersionTLS12}
	default:
		switch {
		case rest != "" && u.Scheme != "":
			err = errors.New("invalid URL scheme")
		case hostAndPort.MatchString(text):
			err = errors.New("URL without a scheme: write redis:// before it")
		default:
			err = errors.New("URL without a host")
		}
	}
	if err != nil {
		return nil, err
	}
	if u.User != nil {
		c.Username = u.User.Username()
		c.Password, _ = u.User.Password()
	}
	return c, nil
}

// readServer reads host, port and database.
func readServer(u *url.URL, c *redis.Options) error {
	host, port := u.Hostname(), u.Port()
	switch {
	case host == "":
		return errors.New("URL without a host")
	case strings.Contains(host, ":") && !strings.HasPrefix(u.Host, "["):
		return errors.New(
			"host contains colons: write an IPv6 address in brackets, as in redis://[::1]:6379, " +
				"and user and password before an @")
	case strings.ContainsFunc(host, isNoHost):
		return errors.New("host contains characters that no host name has")
	case u.Fragment != "":
		return errors.New("URL contains a #; in a password write %23")
	case u.RawQuery != "":
		return errors.New("URL parameters are not supported")
	}
	if port == "" {
		port = "6379"
	}
	if n, err := strconv.Atoi(port); err != nil || n < 1 || n > 65535 {
		return fmt.Errorf("invalid port %s; want 1 to 65535", port)
	}
	c.Addr = net.JoinHostPort(host, port)
	return readDatabase(strings.Trim(u.Path, "/"), c)
}

// hostAndPort matches what is often written instead of a URL.
var hostAndPort = regexp.MustCompile(`^[A-Za-z0-9.-]+:[0-9]+(/[0-9]*)?$`)

// isNoHost reports whether a rune is in no name or address of a host.
func isNoHost(r rune) bool {
	return r <= ' ' || r == 0x7f || strings.ContainsRune("\"'<>\\^`{|}/?#@", r)
}

func readSocket(u *url.URL, c *redis.Options) error {
	q := u.Query()
	database := q.Get("db")
	q.Del("db")
	switch {
	case u.Host != "":
		return errors.New("socket URL with a host: write three slashes, as in unix:///run/redis.sock")
	case u.Path == "":
		return errors.New("socket URL without a path")
	case len(u.Path) > maxSocketPath:
		return fmt.Errorf("socket path of %d bytes; the maximum is %d", len(u.Path), maxSocketPath)
	case len(q) > 0 || u.Fragment != "":
		return errors.New("URL parameters are not supported")
	}
	c.Network, c.Addr = "unix", u.Path
	return readDatabase(database, c)
}

func readDatabase(text string, c *redis.Options) error {
	if text == "" {
		return nil
	}
	n, err := strconv.Atoi(text)
	if err != nil {
		return errors.New("database must be a number")
	}
	if n < 0 {
		return errors.New("database must be 0 or above")
	}
	c.DB = n
	return nil
}
