package envoy

import (
	"cmp"
	"fmt"
)

// Istio returns what asks sluice in an Istio mesh, YAML with comments for kubectl: an extension provider (in a comment, since it is part
// of the mesh's own config) with its ServiceEntry, AuthorizationPolicy and EnvoyFilter; or an EnvoyFilter alone where the config reads
// metadata, which providers are not given. Of the options Sluice, Limits and Metadata count. It reports an address that cannot be used.
func Istio(o Options) ([]byte, error) { return mesh("istio.yaml.tmpl", o) }

// IstioGateway returns what asks sluice before an ingress gateway of Istio's, as Istio does; sluice is a Deployment, of which the options'
// address is the port. Of the options Sluice and Limits count.
func IstioGateway(o Options) ([]byte, error) { return mesh("istio-edge.yaml.tmpl", o) }

// IstioWaypoint is IstioGateway, for a waypoint of Istio's ambient mode.
func IstioWaypoint(o Options) ([]byte, error) {
	return mesh("istio-edge.yaml.tmpl", o, "Waypoint")
}

// Gateway returns what asks sluice before a Gateway of Envoy Gateway's, YAML with comments for kubectl: a SecurityPolicy and what
// belongs to it. Sluice is reached by its Service, of which the options' address is the port; or as a Backend by a unix socket, in the
// Gateway's own pods. Of the options Sluice, Limits and Metadata count. It reports an address that cannot be used.
func Gateway(o Options) ([]byte, error) { return mesh("envoy-gateway.yaml.tmpl", o) }

func mesh(name string, o Options, flags ...string) ([]byte, error) {
	addr := cmp.Or(o.Sluice, defaultSluice)
	sluice, err := remoteOrUnix(addr)
	if err != nil {
		return nil, fmt.Errorf("the sluice address %q: %w", addr, err)
	}
	f := o.fields()
	f.put("Sluice", sluice)
	for _, flag := range flags {
		f[flag] = "true"
	}
	return f.execute(name), nil
}
