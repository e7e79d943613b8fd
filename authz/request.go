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

// errNoHTTP reports a check without an HTTP request, as ext_authz sends it if
// it is a network filter.
var errNoHTTP = errors.New("the check has no HTTP request; ext_authz must be configured as an HTTP filter")

// errNoCheck reports bytes that are not a CheckRequest. It does not wrap
// protobuf's error, which may quote the payload.
var errNoCheck = errors.New("invalid CheckRequest")

// ParseRequest decodes a CheckRequest in protobuf's JSON, as Envoy logs it at
// the debug level, into the request that a policy draws for. Header names may
// be in any case. A request without a time gets the current one. ParseRequest
// returns an error if text is not such JSON or has no HTTP request.
func ParseRequest(text []byte) (*policy.Request, error) {
	var check authv3.CheckRequest
	if err := protojson.Unmarshal(text, &check); err != nil {
		return nil, fmt.Errorf("not a CheckRequest in JSON: %w", err)
	}
	r, err := requestOf(&check)
	if err != nil {
		return nil, err
	}
	if http := check.GetAttributes().GetRequest().GetHttp(); len(http.GetHeaderMap().GetHeaders()) == 0 {
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

// parse decodes a CheckRequest from its wire format, and returns the number of
// its elements, too. It returns errNoHTTP, errNoCheck or errTooMany. The texts of
// the request are parts of wire.
func parse(wire string) (*policy.Request, int, error) {
	r := &policy.Request{Time: time.Unix(0, 0).UTC()} // as of a check without a time
	hasHTTP, ok := parseFast(wire, r)
	if !ok {
		var err error
		if r, err = parseSlow(wire); err != nil {
			return nil, 0, err
		}
	} else if !hasHTTP {
		return nil, 0, errNoHTTP
	}
	n := elements(r)
	if n > maxElements {
		return nil, 0, errTooMany
	}
	return r, n, nil
}

// parseSlow is parse for a check that parseFast does not read.
func parseSlow(wire string) (*policy.Request, error) {
	var check authv3.CheckRequest
	if err := unmarshal(wire, &check); err != nil {
		return nil, err
	}
	return requestOf(&check)
}

// requestOf returns the request of a check. What is missing in the check is
// empty in the request, except that a check without an HTTP request is
// errNoHTTP.
func requestOf(check *authv3.CheckRequest) (*policy.Request, error) {
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
		Source:      peerOf(attributes.GetSource()),
		Destination: peerOf(attributes.GetDestination()),
		Context:     attributes.GetContextExtensions(),
		Metadata:    attributes.GetMetadataContext().GetFilterMetadata(),
		Time:        attributes.GetRequest().GetTime().AsTime(),
	}
	setHeaders(r, http)
	return r, nil
}

// setHeaders sets the headers of r. Envoy sends them in headers, where it has
// joined the values of a repeated header with ",", or with encode_raw_headers
// in header_map, line by line. If both are present, header_map takes
// precedence.
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

// peerOf returns one end of a connection. The peer of a pipe has no address.
func peerOf(p *authv3.AttributeContext_Peer) policy.Peer {
	out := policy.Peer{Principal: p.GetPrincipal()}
	if a, ok := p.GetAddress().GetAddress().(*corev3.Address_SocketAddress); ok {
		out.Address, out.Port = a.SocketAddress.GetAddress(), a.SocketAddress.GetPortValue()
	}
	return out
}

// callType is the protocol that a request is in when Envoy asks about it.
type callType uint8

const (
	httpCall callType = iota
	grpcCall
	grpcWebCall
	// translatedCall is a gRPC-Web call that Envoy's grpc_web filter, standing
	// before ext_authz, has made a gRPC call. Its content-type is
	// application/grpc. It is recognized by x-grpc-web, which the clients send.
	translatedCall
)

// callTypeOf returns the type of a request. It is httpCall if r is nil.
func callTypeOf(r *policy.Request) callType {
	if r == nil {
		return httpCall
	}
	rest, ok := strings.CutPrefix(r.Headers["content-type"], "application/grpc")
	rest, isWeb := strings.CutPrefix(rest, "-web")
	if isWeb {
		rest = strings.TrimPrefix(rest, "-text")
	}
	if !ok || rest != "" && rest[0] != '+' && rest[0] != ';' {
		return httpCall
	}
	if isWeb {
		return grpcWebCall
	}
	if _, isTranslated := r.Headers["x-grpc-web"]; isTranslated {
		return translatedCall
	}
	return grpcCall
}

// maxRequestID is the maximum length of a request ID in a log line, in bytes.
const maxRequestID = 64

// requestID returns the ID of a request for logs and spans. It is empty if the
// header has anything but letters, digits and hyphens, or is too long: a client
// may have set it.
func requestID(r *policy.Request) string {
	id := r.Headers["x-request-id"]
	if len(id) > maxRequestID {
		return ""
	}
	for i := 0; i < len(id); i++ {
		if !isAlphanumeric(id[i]) && id[i] != '-' {
			return ""
		}
	}
	return id
}

// isAlphanumeric reports whether c is an ASCII letter or digit.
func isAlphanumeric(c byte) bool {
	return '0' <= c && c <= '9' || 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z'
}
