package policy

import (
	"time"

	"google.golang.org/protobuf/types/known/structpb"
)

// Request is what a policy sees of one request. Whoever fills it in does so from Envoy's attributes, and leaves
// empty what is not known. It is not changed while it is in use.
type Request struct {
	Method   string
	Scheme   string
	Host     string // as sent: with its port, in its case
	Path     string // as sent: not decoded, with its query
	Protocol string // "HTTP/1.1", "HTTP/2", ...
	Time     time.Time

	// Headers holds each header once: names in lower case, the values of one that was sent several times joined
	// by ",". Pseudo-headers may be among them.
	Headers map[string]string

	Source, Destination Peer

	// Context is what the route says: context_extensions, which no client can set.
	Context map[string]string

	// Metadata is Envoy's dynamic metadata by its filter's name; it may be nil.
	Metadata map[string]*structpb.Struct
}

// Peer is one end of the connection.
type Peer struct {
	Address   string // a bare IP, or empty
	Port      uint32
	Principal string // the URI SAN of its certificate, or empty
}
