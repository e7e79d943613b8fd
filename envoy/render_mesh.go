package envoy

import (
	"cmp"
	"fmt"
)

// Istio returns resources for sluice as a sidecar in an Istio mesh, in YAML
// with comments for kubectl. They are a ServiceEntry, an AuthorizationPolicy
// and an EnvoyFilter, and in a comment the extension provider, which belongs to
// the mesh's own config. If the config reads metadata, which Istio does not
// pass to extension providers, they are an EnvoyFilter alone. Istio uses the
// options Sluice, Limits and Metadata. It returns an error if an address cannot
// be used.
func Istio(o Options) ([]byte, error) { return mesh("istio.yaml.tmpl", o) }

// IstioGateway returns resources for an ingress gateway of Istio, as Istio
// does. Sluice is a Deployment, and the options' address gives its port.
// IstioGateway uses the options Sluice and Limits.
func IstioGateway(o Options) ([]byte, error) { return mesh("istio-edge.yaml.tmpl", o) }

// IstioWaypoint is IstioGateway for a waypoint of Istio's ambient mode.
func IstioWaypoint(o Options) ([]byte, error) {
	return mesh("istio-edge.yaml.tmpl", o, "Waypoint")
}

// Gateway returns resources for a Gateway of Envoy Gateway, in YAML with
// comments for kubectl: a SecurityPolicy and what belongs to it. Envoy reaches
// sluice by its Service, whose port the options' address gives, or by a Backend
// with a unix socket, if sluice runs in the Gateway's pods. Gateway uses the
// options Sluice, Limits and Metadata. It returns an error if an address cannot
// be used.
func Gateway(o Options) ([]byte, error) { return mesh("envoy-gateway.yaml.tmpl", o) }

// mesh executes a template with the address of sluice. Each flag is a field that
// is set.
func mesh(name string, o Options, flags ...string) ([]byte, error) {
	addr := cmp.Or(o.Sluice, defaultSluice)
	sluice, err := remoteOrUnix(addr)
	if err != nil {
		return nil, fmt.Errorf("sluice address %q: %w", addr, err)
	}
	f := o.fields()
	f.put("Sluice", sluice)
	for _, flag := range flags {
		f[flag] = "true"
	}
	return f.execute(name), nil
}
