// Package envoy prints the Envoy configuration that puts sluice into a filter
// chain, and finds or installs an Envoy and runs it.
package envoy

import (
	"cmp"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"
)

// Options has the addresses that a file connects and what it shows. The zero
// value has all defaults.
type Options struct {
	// Listener is where Envoy listens, IP:port. Port 0 is any free port. The
	// default is 0.0.0.0:8080.
	Listener string
	// Upstream is where requests go, host:port. The default is 127.0.0.1:8081.
	Upstream string
	// Sluice is sluice's gRPC address, host:port or unix:///path. The default is
	// 127.0.0.1:9001.
	Sluice string
	// Admin is where Envoy's admin interface listens, IP:port. By default there
	// is none, since the interface has no access control.
	Admin string
	// Envoy is the release of Envoy that the file is for. The default is that of
	// Version. For 1.36 the retries are in the filter and not at the cluster.
	Envoy Release
	// Limits has the names of the config's limits. A commented example in the
	// file shows how a route chooses from them.
	Limits []string
	// Metadata says that the config reads the metadata of other filters, such
	// as the claims of a JWT.
	Metadata bool
	// Settle says that limits of the config settle, for which Envoy has to
	// report the ends of requests; nil if none does.
	Settle *Settle
	// TLS configures TLS to sluice's gRPC address; nil is cleartext.
	TLS *TLS
}

// Settle has the names of the headers and trailers of responses that the config
// reads when it settles.
type Settle struct{ Headers, Trailers []string }

// TLS has what Envoy needs to connect to a sluice whose config has listen.tls.
type TLS struct {
	// Name is a DNS name in sluice's certificate. In a wildcard name the
	// asterisk is replaced by "sluice-gateway". If Name is empty, Plain and
	// Istio print that Envoy verifies the CA alone; IstioGateway, IstioWaypoint
	// and Gateway return an error that wraps ErrNoName.
	Name string
	// ClientCert says that sluice requires a client certificate.
	ClientCert bool
}

// endpoint is an address in a file. Its strings are quoted for YAML.
type endpoint struct {
	Host, Path string // exactly one is set
	Unix       string // Path as a URL
	Port       int
	Name       bool // Host is a DNS name
}

// Plain returns a complete bootstrap, in YAML with comments. It returns an error
// if Envoy could not use an address.
func Plain(o Options) ([]byte, error) {
	f := o.fields()
	for _, a := range []struct {
		name, addr, otherwise string
		parse                 func(string) (*endpoint, error)
	}{
		{"Listener", o.Listener, "0.0.0.0:8080", local},
		{"Upstream", o.Upstream, "127.0.0.1:8081", remote},
		{"Sluice", o.Sluice, defaultSluice, remoteOrUnix},
		{"Admin", o.Admin, "", local},
	} {
		addr := cmp.Or(a.addr, a.otherwise)
		if addr == "" {
			f.put(a.name, &endpoint{})
			continue
		}
		e, err := a.parse(addr)
		if err != nil {
			return nil, fmt.Errorf("%s address %q: %w", strings.ToLower(a.name), addr, err)
		}
		f.put(a.name, e)
	}
	return f.execute("plain.yaml.tmpl"), nil
}

// local parses an address to listen on. Port 0 is any free port.
func local(addr string) (*endpoint, error) {
	if a, err := netip.ParseAddrPort(addr); err == nil {
		return &endpoint{Host: strconv.Quote(a.Addr().String()), Port: int(a.Port())}, nil
	}
	return nil, errors.New("want IP:port")
}

// remote parses an address to connect to.
func remote(addr string) (*endpoint, error) {
	host, text, err := net.SplitHostPort(addr)
	port, portErr := strconv.ParseUint(text, 10, 16)
	_, ipErr := netip.ParseAddr(host)
	if err != nil || portErr != nil || port == 0 || ipErr != nil && !hostname.MatchString(host) {
		return nil, errors.New("want host:port")
	}
	return &endpoint{Host: strconv.Quote(host), Port: int(port), Name: ipErr != nil}, nil
}

// defaultSluice is where sluice listens by default.
const defaultSluice = "127.0.0.1:9001"

var hostname = regexp.MustCompile(`^[A-Za-z0-9._-]+$`)

// maxSocketPath is the maximum length of a unix socket's path on Linux in
// bytes.
const maxSocketPath = 107

// remoteOrUnix parses an address to connect to, which may be a unix socket.
func remoteOrUnix(addr string) (*endpoint, error) {
	path, ok := strings.CutPrefix(addr, "unix://")
	if !ok {
		if e, err := remote(addr); err == nil {
			return e, nil
		}
	} else if filepath.IsAbs(path) && len(path) <= maxSocketPath && utf8.ValidString(path) &&
		!strings.ContainsFunc(path, unicode.IsControl) {
		return &endpoint{Path: strconv.Quote(path), Unix: strconv.Quote(addr)}, nil
	}
	return nil, fmt.Errorf("want host:port, or unix:///absolute/path of at most %d bytes", maxSocketPath)
}
