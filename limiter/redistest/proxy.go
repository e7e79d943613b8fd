//go:build linux

package redistest

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/Shopify/toxiproxy/v2"
	"github.com/rs/zerolog"
)

// Proxy stands between clients and a server, and spoils what comes through. Its faults are of connections that are open, and of new ones.
type Proxy struct {
	Addr string // host:port

	t     testing.TB
	proxy *toxiproxy.Proxy
}

// StartProxy starts a proxy before a server on host:port, and stops it when the test ends.
func StartProxy(t testing.TB, server string) *Proxy {
	t.Helper()
	zerolog.SetGlobalLevel(zerolog.Disabled) // its faults log on their own
	api := toxiproxy.NewServer(toxiproxy.NewMetricsContainer(nil), zerolog.Nop())
	p := toxiproxy.NewProxy(api, server, "127.0.0.1:0", server)
	must(t, p.Start())
	t.Cleanup(p.Stop)
	return &Proxy{Addr: p.Listen, t: t, proxy: p}
}

// Delay makes all that the server says late by d.
func (p *Proxy) Delay(d time.Duration) {
	p.toxic("downstream", "latency", "latency", int(d.Milliseconds()))
}

// Throttle lets so many kilobytes a second through to the server, on each connection.
func (p *Proxy) Throttle(kilobytes int) { p.toxic("upstream", "bandwidth", "rate", kilobytes) }

// Cut closes each connection where the server next says something, which nobody gets to hear.
func (p *Proxy) Cut() { p.toxic("downstream", "limit_data", "bytes", 0) }

// Hold keeps all that the server says to itself. Mend then closes the connections.
func (p *Proxy) Hold() { p.toxic("downstream", "timeout", "timeout", 0) }

func (p *Proxy) toxic(stream, kind, attribute string, value int) {
	p.t.Helper()
	text := fmt.Sprintf(`{"type": %q, "stream": %q, "attributes": {%q: %d}}`, kind, stream, attribute, value)
	_, err := p.proxy.Toxics.AddToxicJson(strings.NewReader(text))
	must(p.t, err)
}

// Mend ends all faults.
func (p *Proxy) Mend() { p.proxy.Toxics.ResetToxics(context.Background()) }
