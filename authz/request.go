package authz

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"google.golang.org/protobuf/encoding/protojson"

	"github.com/sluiceproxy/sluice/limiter/policy"
)

// errNoHTTP is of a check that no HTTP request can have led to.
var errNoHTTP = errors.New("the check has no HTTP request; ext_authz must be configured as an HTTP filter")

// errNoCheck is of bytes that are none. What protobuf says of them is not told: it may quote them.
var errNoCheck = errors.New("invalid CheckRequest")

// read is what the policy sees of a check. What is missing at any level is empty there; only a check without an HTTP request is
// an error.
func read(check *authv3.CheckRequest) (*policy.Request, error) {
	attributes := check.GetAttributes()
	http := attributes.GetRequest().GetHttp()
	if http == nil {
		return nil, errNoHTTP
	}
	r := &policy.Request{
		Method:      http.GetMethod(),
		Scheme:      http.GetScheme(),
		Host:        http.GetHost(),
		Path:        http.GetPath(),
		Protocol:    http.GetProtocol(),
		Source:      peer(attributes.GetSource()),
		Destination: peer(attributes.GetDestination()),
		Context:     attributes.GetContextExtensions(),
		Metadata:    attributes.GetMetadataContext().GetFilterMetadata(),
		Time:        attributes.GetRequest().GetTime().AsTime(),
	}
	setHeaders(r, http)
	return r, nil
}

// ParseRequest reads a CheckRequest in protobuf's JSON, as Envoy logs it at debug level, for who asks what would become of it.
func ParseRequest(text []byte) (*policy.Request, error) {
	var check authv3.CheckRequest
	if err := protojson.Unmarshal(text, &check); err != nil {
		return nil, fmt.Errorf("not a CheckRequest in JSON: %w", err)
	}
	r, err := read(&check)
	if err != nil {
		return nil, err
	}
	if http := check.GetAttributes().GetRequest().GetHttp(); len(http.GetHeaderMap().GetHeaders()) == 0 {
		// Envoy's names are in lower case; those of a file that people wrote need not be.
		r.Headers = make(map[string]string, len(http.GetHeaders()))
		r.SetHeaders(func(yield func(name, value string) bool) {
			for _, name := range slices.Sorted(maps.Keys(http.GetHeaders())) {
				if !yield(name, http.GetHeaders()[name]) {
					return
				}
			}
		})
	}
	if check.GetAttributes().GetRequest().GetTime() == nil {
		r.Time = time.Now()
	}
	return r, nil
}

// setHeaders reads a check's headers: Envoy puts them into headers, with the values of a header that was sent several times
// joined by ",", or with encode_raw_headers into header_map, line by line. If both are there, header_map takes precedence.
func setHeaders(r *policy.Request, http *authv3.AttributeContext_HttpRequest) {
	r.Headers = http.GetHeaders()
	raw := http.GetHeaderMap().GetHeaders()
	if len(raw) == 0 {
		return
	}
	r.Headers = make(map[string]string, len(raw)+len(http.GetHeaders()))
	for name, value := range http.GetHeaders() {
		r.Headers[strings.ToLower(name)] = value
	}
	r.SetHeaders(func(yield func(name, value string) bool) {
		for _, line := range raw {
			value := line.GetValue()
			if value == "" {
				value = string(line.GetRawValue())
			}
			if !yield(line.GetKey(), value) {
				return
			}
		}
	})
}

// peer is one end of a connection. A pipe has no address.
func peer(p *authv3.AttributeContext_Peer) policy.Peer {
	out := policy.Peer{Principal: p.GetPrincipal()}
	if a, ok := p.GetAddress().GetAddress().(*corev3.Address_SocketAddress); ok {
		out.Address, out.Port = a.SocketAddress.GetAddress(), a.SocketAddress.GetPortValue()
	}
	return out
}

// isGRPC reports whether a request is a gRPC call. gRPC-Web is plain HTTP to Envoy.
func isGRPC(r *policy.Request) bool {
	rest, ok := strings.CutPrefix(r.Headers["content-type"], "application/grpc")
	return ok && (rest == "" || rest[0] == '+' || rest[0] == ';')
}

// requestID is the request's id for the log, or empty where what the client sent is not an ordinary one.
func requestID(r *policy.Request) string {
	id := r.Headers["x-request-id"]
	if len(id) > 64 {
		return ""
	}
	for i := 0; i < len(id); i++ {
		c := id[i]
		if (c < '0' || c > '9') && (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && c != '-' {
			return ""
		}
	}
	return id
}
