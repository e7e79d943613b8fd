package policy

import (
	"iter"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/structpb"
)

// Request is what a policy sees of one request, as Envoy's attributes give it.
// Unknown values are empty. It must not be changed while it is in use.
type Request struct {
	Method   string
	Scheme   string
	Host     string // as sent, with port and case
	Path     string // as sent: not decoded, with the query
	Protocol string // HTTP/1.1, HTTP/2, ...
	Time     time.Time

	// Headers has each header once. Names are in lower case; the values of a
	// header that was sent several times are joined by ",". Pseudo-headers may
	// be among them.
	Headers map[string]string

	// Repeated names the headers that were sent more than once, in ascending
	// order, except cookie. Such a header is absent as a part of a key. The
	// upstream may read any one of its values; with the joined one, a client
	// could have a new bucket for each further value that it makes up.
	Repeated []string

	Source, Destination Peer

	// Context has the context_extensions of Envoy's route, which clients cannot
	// set.
	Context map[string]string

	// Metadata is Envoy's dynamic metadata, by the filter's name. It may be
	// nil.
	Metadata map[string]*structpb.Struct
}

// Peer is one end of the connection.
type Peer struct {
	Address   string // IP address without a port, or empty
	Port      uint32
	Principal string // URI SAN of its certificate, or empty
}

// SetHeaders sets headers from lines of a name and a value, in the order in
// which they were sent. It replaces the entries of these names in Headers and
// Repeated. The lines of one header are joined by ",", those of cookie by "; "
// (RFC 9113, section 8.2.3).
func (req *Request) SetHeaders(lines iter.Seq2[string, string]) {
	values := make(map[string][]string)
	for name, value := range lines {
		name = strings.ToLower(name)
		values[name] = append(values[name], value)
	}
	if req.Headers == nil {
		req.Headers = make(map[string]string, len(values))
	}
	repeated := slices.DeleteFunc(slices.Clone(req.Repeated), func(name string) bool { return values[name] != nil })
	for name, all := range values {
		separator := ","
		switch {
		case name == "cookie":
			separator = "; "
		case len(all) > 1:
			repeated = append(repeated, name)
		}
		req.Headers[name] = strings.Join(all, separator)
	}
	slices.Sort(repeated)
	req.Repeated = repeated
}

// isRepeated reports whether a header was sent more than once.
func (req *Request) isRepeated(name string) bool {
	if len(req.Repeated) == 0 {
		return false
	}
	_, found := slices.BinarySearch(req.Repeated, name)
	return found
}
