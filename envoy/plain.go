// Package envoy has what Envoy needs to ask sluice: filter chains as files that people can copy, and a real Envoy, found or
// installed, to run them in.
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

// Options say what a file connects. An empty address is the default.
type Options struct {
	Listener string // where Envoy listens, IP:port, port 0 for any that is free; default 0.0.0.0:8080
	Upstream string // where requests go, host:port; default 127.0.0.1:8081
	Sluice   string // sluice's gRPC address, host:port or unix:///path; default 127.0.0.1:9001
	Admin    string // where Envoy's own admin page listens, as Listener; by default nowhere, since it obeys everybody
	// Limits are the names of the config's limits, which the file then shows how to choose from on a route.
	Limits []string
	// Metadata says that the config reads what other filters leave behind, such as the claims of a JWT.
	Metadata bool
	// TLS is how sluice's gRPC address is asked by TLS; nil for cleartext.
	TLS *TLS
}

// TLS says what Envoy needs to ask a sluice whose config has listen.tls.
type TLS struct {
	Name       string // a DNS name in sluice's certificate; empty for none, where Envoy then checks the CA alone
	ClientCert bool   // sluice wants a certificate of its clients
}

// endpoint is an address as the files write it. All texts are quoted for YAML.
type endpoint struct {
	Host, Path string // one of them
	Unix       string // the path as a URL
	Port       int
	Name       bool // Host is a name, which Envoy has to look up
}

// Plain returns a complete bootstrap, in YAML with comments, for Envoy 1.40 or newer. It reports an address that Envoy could not
// use.
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
			return nil, fmt.Errorf("the %s address %q: %w", strings.ToLower(a.name), addr, err)
		}
		f.put(a.name, e)
	}
	return f.execute("plain.yaml.tmpl"), nil
}

// local parses an address to listen on. Port 0 is any that is free.
func local(addr string) (*endpoint, error) {
	if a, err := netip.ParseAddrPort(addr); err == nil {
		return &endpoint{Host: strconv.Quote(a.Addr().String()), Port: int(a.Port())}, nil
	}
	return nil, errors.New("allowed are IP:port")
}

// remote parses an address to connect to.
func remote(addr string) (*endpoint, error) {
	host, text, err := net.SplitHostPort(addr)
	port, portErr := strconv.ParseUint(text, 10, 16)
	_, ipErr := netip.ParseAddr(host)
	if err != nil || portErr != nil || port == 0 || ipErr != nil && !hostname.MatchString(host) {
		return nil, errors.New("allowed are host:port")
	}
	return &endpoint{Host: strconv.Quote(host), Port: int(port), Name: ipErr != nil}, nil
}

// defaultSluice is where sluice listens by default.
const defaultSluice = "127.0.0.1:9001"

var hostname = regexp.MustCompile(`^[A-Za-z0-9._-]+$`)

// maxSocketPath is how long a unix socket's path may be in bytes, on Linux.
const maxSocketPath = 107

// remoteOrUnix parses an address to connect to, which may be a unix socket's.
func remoteOrUnix(addr string) (*endpoint, error) {
	path, ok := strings.CutPrefix(addr, "unix://")
	if !ok {
		if e, err := remote(addr); err == nil {
			return e, nil
		}
	} else if filepath.IsAbs(path) && len(path) <= maxSocketPath && utf8.ValidString(path) && !strings.ContainsFunc(path, unicode.IsControl) {
		return &endpoint{Path: strconv.Quote(path), Unix: strconv.Quote(addr)}, nil
	}
	return nil, fmt.Errorf("allowed are host:port and unix:///absolute/path of at most %d bytes", maxSocketPath)
}
