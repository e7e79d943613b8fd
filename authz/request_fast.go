package authz

import (
	"strings"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"

	"github.com/sluiceproxy/sluice/limiter/policy"
)

// parseFast decodes into r the fields that nearly all checks consist of, and
// reports whether the check has an HTTP request. It reports not ok if the check
// is malformed, or if it has what only the generated code reads: the address of
// a pipe, a named port, or a message in two pieces, which would have to be
// merged.
func parseFast(wire string, r *policy.Request) (hasHTTP, ok bool) {
	hasTime, hasMetadata := false, false
	check := message{rest: wire}
	for check.next() {
		if check.number != checkAttributes {
			continue
		}
		attributes := check.inner()
		for attributes.next() {
			switch attributes.number {
			case attributesSource:
				check.join(fastPeer(attributes.inner(), &r.Source))
			case attributesDestination:
				check.join(fastPeer(attributes.inner(), &r.Destination))
			case attributesRequest:
				request := attributes.inner()
				for request.next() {
					switch request.number {
					case requestTime:
						check.bad = check.bad || hasTime
						hasTime = true
						check.join(fastTime(request.inner(), &r.Time))
					case requestHTTP:
						check.bad = check.bad || hasHTTP
						hasHTTP = true
						check.join(fastHTTP(request.inner(), r))
					}
				}
				check.join(request)
			case attributesContext:
				attributes.entry(&r.Context)
				check.bad = check.bad || len(r.Context) > maxElements
			case attributesMetadata: // Envoy always sends it, mostly empty
				check.bad = check.bad || hasMetadata
				hasMetadata = true
				check.join(fastMetadata(attributes.inner(), r))
			}
		}
		check.join(attributes)
	}
	return hasHTTP, !check.bad
}

func fastPeer(peer message, to *policy.Peer) message {
	for peer.next() {
		switch peer.number {
		case peerAddress:
			address := peer.inner()
			for address.next() {
				if address.number != addressSocket {
					return message{bad: true}
				}
				socket := address.inner()
				for socket.next() {
					switch socket.number {
					case socketAddress:
						to.Address = socket.text()
					case socketPort:
						to.Port = uint32(socket.integer())
					case socketNamedPort: // in a oneof with the port
						return message{bad: true}
					}
				}
				address.join(socket)
			}
			peer.join(address)
		case peerPrincipal:
			to.Principal = peer.text()
		}
	}
	return peer
}

func fastTime(stamp message, to *time.Time) message {
	var seconds, nanos int64
	for stamp.next() {
		switch stamp.number {
		case timestampSeconds:
			seconds = int64(stamp.integer())
		case timestampNanos:
			nanos = int64(int32(stamp.integer()))
		}
	}
	*to = time.Unix(seconds, nanos).UTC()
	return stamp
}

// fastMetadata leaves metadata that is not empty to the generated code, since
// its values have many types.
func fastMetadata(metadata message, r *policy.Request) message {
	if metadata.bad || metadata.rest == "" {
		return metadata
	}
	var read corev3.Metadata
	if err := unmarshal(metadata.rest, &read); err != nil {
		return message{bad: true}
	}
	r.Metadata = read.GetFilterMetadata()
	return metadata
}

// typicalHeaders is how many headers a browser's request has.
const typicalHeaders = 16

func fastHTTP(http message, r *policy.Request) message {
	hasHeaderMap := false
	for http.next() {
		switch http.number {
		case httpMethod:
			r.Method = http.text()
		case httpHeaders:
			if r.Headers == nil {
				r.Headers = make(map[string]string, typicalHeaders)
			}
			http.bad = http.bad || hasHeaderMap
			http.entry(&r.Headers)
			http.bad = http.bad || len(r.Headers) > maxElements
		case httpPath:
			r.Path = http.text()
		case httpHost:
			r.Host = http.text()
		case httpScheme:
			r.Scheme = http.text()
		case httpProtocol:
			r.Protocol = http.text()
		case httpHeaderMap: // Envoy sends it instead of headers
			http.bad = http.bad || hasHeaderMap || r.Headers != nil
			hasHeaderMap = true
			http.join(fastHeaderMap(http.inner(), r))
		}
	}
	return http
}

// fastHeaderMap decodes a HeaderMap, which has an element for each header line.
func fastHeaderMap(list message, r *policy.Request) message {
	lines, counted := 0, list
	for counted.next() {
		lines++
	}
	if lines == 0 {
		return counted
	}
	if lines > maxElements {
		return message{bad: true}
	}
	r.Headers = make(map[string]string, lines)
	isRepeated := false
	rest := list
	for rest.next() {
		if rest.number != headerMapHeaders {
			continue
		}
		name, value, line := rest.headerLine()
		counted.join(line)
		before := len(r.Headers)
		r.Headers[name] = value
		isRepeated = isRepeated || len(r.Headers) == before
	}
	if !isRepeated || counted.bad {
		return counted
	}
	clear(r.Headers)
	r.SetHeaders(func(yield func(name, value string) bool) {
		rest := list
		for rest.next() {
			if rest.number != headerMapHeaders {
				continue
			}
			if name, value, _ := rest.headerLine(); !yield(name, value) {
				return
			}
		}
	})
	return counted
}

// headerLine decodes the current field, a HeaderValue. It returns the name in
// lower case and the value, which Envoy sends in raw_value.
func (m *message) headerLine() (name, value string, line message) {
	line = m.inner()
	raw := ""
	for line.next() {
		switch line.number {
		case headerKey:
			name = line.text()
		case headerValue:
			value = line.text()
		case headerRawValue:
			raw = line.data()
		}
	}
	if value == "" {
		value = raw
	}
	return strings.ToLower(name), value, line
}

// headerSize returns how many header lines the request of a check has in Envoy,
// and the bytes of their names and values. If the check has joined headers,
// headerSize returns the most that they can be: each comma may have joined two
// lines.
func headerSize(wire string) (lines, bytes int) {
	check := message{rest: wire}
	for check.next() {
		if check.number != checkAttributes {
			continue
		}
		attributes := check.inner()
		for attributes.next() {
			if attributes.number != attributesRequest {
				continue
			}
			request := attributes.inner()
			for request.next() {
				if request.number != requestHTTP {
					continue
				}
				l, b := httpHeaderSize(request.inner())
				lines, bytes = lines+l, bytes+b
			}
		}
	}
	return lines, bytes
}

// httpHeaderSize is headerSize for an HttpRequest.
func httpHeaderSize(http message) (lines, bytes int) {
	for http.next() {
		switch http.number {
		case httpHeaders:
			name, value := http.pair()
			commas := strings.Count(value, ",")
			lines, bytes = lines+1+commas, bytes+(1+commas)*len(name)+len(value)
		case httpHeaderMap:
			list := http.inner()
			for list.next() {
				if list.number == headerMapHeaders {
					name, value, _ := list.headerLine()
					lines, bytes = lines+1, bytes+len(name)+len(value)
				}
			}
		}
	}
	return lines, bytes
}
