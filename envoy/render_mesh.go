package envoy

import (
	"cmp"
	"errors"
	"fmt"
	"strconv"
)

// ErrNoName reports that sluice's certificate has no DNS name, by which a
// gateway could verify it.
var ErrNoName = errors.New("the certificate has no DNS name; issue one with a name such as " +
	"sluice-gateway.sluice-system.svc")

// Istio returns resources for sluice as a sidecar in an Istio mesh, in YAML
// with comments for kubectl. They are a ServiceEntry, an AuthorizationPolicy
// and an EnvoyFilter, and in a comment the extension provider, which belongs to
// the mesh's own config. If the config reads metadata, which Istio does not
// pass to extension providers, they are an EnvoyFilter alone, which also has
// TLS. Istio uses the options Sluice, Limits, Metadata and Settle, and TLS with
// metadata only. It returns an error if an address cannot be used.
func Istio(o Options) ([]byte, error) {
	if o.Metadata {
		return mesh("istio.yaml.tmpl", "", o)
	}
	return mesh("istio.yaml.tmpl", "sluice.internal", o)
}

// IstioGateway returns resources for an ingress gateway of Istio, as Istio
// does. Sluice is a Deployment, and the options' address gives its port. For
// TLS there are a DestinationRule, and where sluice requires a client
// certificate a Role and a RoleBinding. IstioGateway uses the options Sluice,
// Limits, Settle and TLS.
func IstioGateway(o Options) ([]byte, error) { return edge("istio-edge.yaml.tmpl", o) }

// IstioWaypoint is IstioGateway for a waypoint of Istio's ambient mode.
func IstioWaypoint(o Options) ([]byte, error) { return edge("istio-edge.yaml.tmpl", o, "Waypoint") }

// Gateway returns resources for a Gateway of Envoy Gateway, in YAML with
// comments for kubectl: a SecurityPolicy and what belongs to it. Envoy reaches
// sluice by its Service, whose port the options' address gives, or by a Backend
// with a unix socket, if sluice runs in the Gateway's pods. For TLS there are a
// BackendTLSPolicy and, in the EnvoyProxy, the client certificate. Gateway uses
// the options Sluice, Limits, Metadata, Settle and TLS. It returns an error if
// an address cannot be used.
func Gateway(o Options) ([]byte, error) { return edge("envoy-gateway.yaml.tmpl", o) }

// edge is mesh for a proxy that calls sluice as a service, whose certificate it
// verifies by name.
func edge(name string, o Options, flags ...string) ([]byte, error) {
	if o.TLS != nil && o.TLS.Name == "" {
		return nil, fmt.Errorf("listen.tls: %w", ErrNoName)
	}
	return mesh(name, "sluice-gateway.sluice-system.svc.cluster.local", o, flags...)
}

// mesh executes a template with the address of sluice. host is the host of the
// service that Istio makes a cluster of; if it is empty, the file has the
// cluster. Each flag is a field that is set.
func mesh(name, host string, o Options, flags ...string) ([]byte, error) {
	addr := cmp.Or(o.Sluice, defaultSluice)
	sluice, err := remoteOrUnix(addr)
	if err != nil {
		return nil, fmt.Errorf("sluice address %q: %w", addr, err)
	}
	f := o.fields()
	f.put("Sluice", sluice)
	if host != "" {
		f["Cluster"] = strconv.Quote(fmt.Sprintf("outbound|%d||%s", cmp.Or(sluice.Port, 9001), host))
	}
	for _, flag := range flags {
		f[flag] = "true"
	}
	return f.execute(name), nil
}
