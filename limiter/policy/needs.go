package policy

import (
	"maps"
	"slices"
)

// Needs says what a config needs of the Envoy in front of it, so that its
// limits see what they read.
type Needs struct {
	// Metadata has the names of the filters whose dynamic metadata the
	// expressions read, such as envoy.filters.http.jwt_authn, in ascending order.
	// A name that is computed is not among them; see Config.ReadsMetadata.
	Metadata []string
	// Headers has the names of the request headers that the expressions and
	// client_ip read, in lower case and ascending order.
	Headers []string
	// ClientHeader is client_ip.header; empty if there is none.
	ClientHeader string
	// Principals says that the file matches callers by the names in their
	// certificates, or has an expression that reads these.
	Principals bool
}

// Needs returns what the file needs of Envoy. It does not know the limits of
// routes.
func (c *Config) Needs() Needs {
	n := Needs{ClientHeader: c.client.header, Principals: len(c.client.principals) > 0}
	metadata, headers := map[string]bool{}, map[string]bool{}
	if c.client.header != "" {
		headers[c.client.header] = true
	}
	if c.client.xffFromRight > 0 {
		headers["x-forwarded-for"] = true
	}
	for _, r := range c.rules {
		n.Principals = n.Principals || len(r.match.principals) > 0
		for _, e := range r.expressions() {
			for _, read := range e.reads {
				switch {
				case read.attribute == "source.principal":
					n.Principals = true
				case read.entry == "": // all of them, or a computed one
				case read.attribute == filterMetadata:
					metadata[read.entry] = true
				case read.attribute == "request.headers":
					headers[read.entry] = true
				case read.attribute == requestCookies:
					headers["cookie"] = true
				}
			}
		}
	}
	for _, m := range c.exempt.matches {
		n.Principals = n.Principals || len(m.principals) > 0
	}
	n.Metadata, n.Headers = slices.Sorted(maps.Keys(metadata)), slices.Sorted(maps.Keys(headers))
	return n
}
