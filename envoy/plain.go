// Package envoy has what Envoy needs to ask sluice: filter chains as files that people can copy, and a real Envoy, found or installed, to run
// them in.
package envoy

import (
	"bytes"
	_ "embed"
	"fmt"
	"net"
	"net/netip"
	"path/filepath"
	"strconv"
	"strings"
	"text/template"
)

// Options say what a bootstrap connects. Addresses are host:port; an empty one is the default.
type Options struct {
	Listener string // where Envoy listens, an IP and a port: 0.0.0.0:8080
	Upstream string // where requests go to: 127.0.0.1:8081
	Sluice   string // sluice's gRPC address, or unix:///path: 127.0.0.1:9001
	Admin    string // Envoy's own admin page, an IP and a port; none where empty
}

//go:embed plain.yaml.tmpl
var plainTemplate string

var plain = template.Must(template.New("plain").Parse(plainTemplate))

// endpoint is an address as the template writes it. All texts are quoted for YAML.
type endpoint struct {
	Host, Path string
	Port       int
	Type       string // of a cluster with it
}

// Plain returns a complete bootstrap, in YAML with comments, for an Envoy of version 1.30 or newer. It reports an address that Envoy could not
// use.
func Plain(o Options) ([]byte, error) {
	var data struct{ Listener, Upstream, Sluice, Admin *endpoint }
	for _, a := range []struct {
		name, addr, otherwise string
		ip, unix              bool
		to                    **endpoint
	}{
		{"listener", o.Listener, "0.0.0.0:8080", true, false, &data.Listener},
		{"upstream", o.Upstream, "127.0.0.1:8081", false, false, &data.Upstream},
		{"sluice", o.Sluice, "127.0.0.1:9001", false, true, &data.Sluice},
		{"admin", o.Admin, "", true, false, &data.Admin},
	} {
		addr := a.addr
		if addr == "" {
			addr = a.otherwise
		}
		if addr == "" {
			continue
		}
		e, err := parse(addr, a.ip, a.unix)
		if err != nil {
			return nil, fmt.Errorf("the %s address %q: %w", a.name, addr, err)
		}
		*a.to = e
	}
	var b bytes.Buffer
	if err := plain.Execute(&b, data); err != nil {
		return nil, err
	}
	return b.Bytes(), nil
}

func parse(addr string, ip, unix bool) (*endpoint, error) {
	if path, ok := strings.CutPrefix(addr, "unix://"); ok && unix {
		if !filepath.IsAbs(path) {
			return nil, fmt.Errorf("allowed are host:port and unix:///absolute/path")
		}
		return &endpoint{Path: strconv.Quote(path), Type: "STATIC"}, nil
	}
	allowed := "host:port"
	if ip {
		allowed = "IP:port"
	} else if unix {
		allowed = "host:port and unix:///absolute/path"
	}
	host, text, err := net.SplitHostPort(addr)
	port, portErr := strconv.ParseUint(text, 10, 16)
	_, ipErr := netip.ParseAddr(host)
	if err != nil || portErr != nil || host == "" || ip && ipErr != nil || strings.ContainsAny(host, "\"\\\n\x00 ") {
		return nil, fmt.Errorf("allowed are %s", allowed)
	}
	e := &endpoint{Host: strconv.Quote(host), Port: int(port), Type: "STATIC"}
	if ipErr != nil {
		e.Type = "STRICT_DNS"
	}
	return e, nil
}
