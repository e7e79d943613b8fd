package policy

import (
	"maps"
	"slices"
	"strings"
	"time"

	"cel.dev/cel-go/cel"
	"cel.dev/cel-go/common/types"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/sluiceproxy/sluice/limiter"
)

// The range and the default of settle_within.
const (
	minSettleWithin     = time.Second
	maxSettleWithin     = limiter.MaxHold
	defaultSettleWithin = time.Minute
)

// End is what is known of a request once its response has ended, as Envoy's
// access log gives it. Unknown values are empty. It must not be changed while
// it is in use.
type End struct {
	Method   string
	Scheme   string
	Host     string // as sent, with port and case
	Path     string // as sent: not decoded, with the query
	Protocol string // HTTP/1.1, HTTP/2, ...
	ID       string // x-request-id
	Time     time.Time
	Duration *time.Duration // until its end; nil if unknown

	// RequestSize is the length of the request's body in bytes, and
	// RequestTotalSize that of its headers, too.
	RequestSize, RequestTotalSize int64

	// Code is the response's status; 0 if no response began.
	Code        int64
	CodeDetails string
	// Flags are the short names of the access log's response flags.
	Flags []string
	// GRPCStatus is the response's grpc-status; nil if it has none.
	GRPCStatus *int64
	// Headers and Trailers are those of the response that Envoy was told to
	// send. Names are in lower case.
	Headers, Trailers map[string]string
	// Size is the length of the response's body in bytes, and TotalSize that of
	// its headers, too.
	Size, TotalSize int64

	// Metadata returns Envoy's dynamic metadata at the end, by the filter's name. It
	// is called only for expressions that read it, and may be nil.
	Metadata func() map[string]*structpb.Struct
}

// endSubject resolves attributes for the expressions about an end.
type endSubject struct {
	*End
	cost int64 // what was taken
}

// endAttribute is a name that expressions about the end of a request can use.
type endAttribute struct {
	kind  *cel.Type
	value func(*endSubject) any
}

func (a endAttribute) celType() *cel.Type { return a.kind }

var endAttributes = map[string]endAttribute{
	"cost":                  {cel.IntType, func(s *endSubject) any { return s.cost }},
	"request.path":          {cel.StringType, func(s *endSubject) any { return s.Path }},
	"request.url_path":      {cel.StringType, (*endSubject).urlPath},
	"request.query":         {cel.StringType, (*endSubject).query},
	"request.host":          {cel.StringType, (*endSubject).host},
	"request.scheme":        {cel.StringType, func(s *endSubject) any { return s.Scheme }},
	"request.method":        {cel.StringType, func(s *endSubject) any { return s.Method }},
	"request.protocol":      {cel.StringType, func(s *endSubject) any { return s.Protocol }},
	"request.id":            {cel.StringType, func(s *endSubject) any { return s.ID }},
	"request.size":          {cel.IntType, func(s *endSubject) any { return s.RequestSize }},
	"request.total_size":    {cel.IntType, func(s *endSubject) any { return s.RequestTotalSize }},
	"request.duration":      {cel.DurationType, (*endSubject).duration},
	"request.time":          {cel.TimestampType, func(s *endSubject) any { return s.Time }},
	"response.code":         {cel.IntType, func(s *endSubject) any { return s.Code }},
	"response.code_details": {cel.StringType, func(s *endSubject) any { return s.CodeDetails }},
	"response.flags":        {cel.ListType(cel.StringType), func(s *endSubject) any { return s.Flags }},
	responseGRPCStatus:      {cel.IntType, (*endSubject).grpcStatus},
	responseHeaders:         {textMap, func(s *endSubject) any { return present(s.Headers) }},
	responseTrailers:        {textMap, func(s *endSubject) any { return present(s.Trailers) }},
	"response.size":         {cel.IntType, func(s *endSubject) any { return s.Size }},
	"response.total_size":   {cel.IntType, func(s *endSubject) any { return s.TotalSize }},
	filterMetadata: {cel.MapType(cel.StringType, cel.DynType),
		func(s *endSubject) any { return present(s.metadata()) }},
}

// The attributes for which Envoy must be told what to send: the maps of the
// response, and the status that is in one of them.
const (
	responseHeaders    = "response.headers"
	responseTrailers   = "response.trailers"
	responseGRPCStatus = "response.grpc_status"
	grpcStatus         = "grpc-status"
)

func (s *endSubject) urlPath() any {
	path, _, _ := strings.Cut(s.Path, "?")
	return path
}

func (s *endSubject) query() any {
	_, query, _ := strings.Cut(s.Path, "?")
	return query
}

func (s *endSubject) host() any {
	if hosts := appendHosts(nil, s.Host); len(hosts) > 0 {
		return hosts[0]
	}
	return ""
}

func (s *endSubject) duration() any {
	if s.Duration == nil {
		return absent
	}
	return types.Duration{Duration: *s.Duration}
}

func (s *endSubject) grpcStatus() any {
	if s.GRPCStatus == nil {
		return absent
	}
	return types.Int(*s.GRPCStatus)
}

func (s *endSubject) metadata() map[string]*structpb.Struct {
	if s.Metadata == nil {
		return nil
	}
	return s.Metadata()
}

// ResolveName implements cel.Activation.
func (s *endSubject) ResolveName(name string) (any, bool) {
	a, ok := endAttributes[name]
	if !ok {
		return nil, false
	}
	return a.value(s), true
}

// Parent implements cel.Activation.
func (*endSubject) Parent() cel.Activation { return nil }

// SettleSecret returns the key_secret, with which texts for the end of a request
// can be sealed so that another sidecar with the same secret opens them; nil if
// the config has none.
func (c *Config) SettleSecret() []byte { return c.hasher.secret }

// Settles reports whether a limit of the file settles.
func (c *Config) Settles() bool {
	return slices.ContainsFunc(c.rules, func(r *rule) bool { return r.settle != nil })
}

// SettlingLimits returns the limits of the file that settle. They must not be
// changed.
func (c *Config) SettlingLimits() (all []*limiter.Limit) {
	for _, r := range c.rules {
		if r.settle != nil {
			all = append(all, r.limit)
			if r.quota != nil {
				all = append(all, r.quota)
			}
		}
	}
	return all
}

// SettleReads returns the names of the headers and trailers of responses that
// the file's limits read when they settle, each in ascending order.
func (c *Config) SettleReads() (headers, trailers []string) {
	return c.settleReads(func(e *expression) []string { return e.responseHeaders }),
		c.settleReads(func(e *expression) []string { return e.responseTrailers })
}

func (c *Config) settleReads(of func(*expression) []string) []string {
	names := make(map[string]bool)
	for _, r := range c.rules {
		if r.settle != nil && r.settle.expression != nil {
			for _, name := range of(r.settle.expression) {
				names[name] = true
			}
		}
	}
	return slices.Sorted(maps.Keys(names))
}

// Settle returns what a request has cost by a limit of the file, of which taken
// tokens were taken when it began. That is taken itself if the file has no such
// limit now or the limit does not settle, and if what the limit reads is absent.
// The error is a mistake of the config that this end reveals; it contains
// nothing that the client sent. Settle is safe for concurrent use.
func (c *Config) Settle(domain, limit string, end *End, taken int64) (cost int64, err error) {
	r := c.ruleOf(c.LimitOfKey(limit))
	if r == nil || r.settle == nil || r.limit.Domain != domain {
		return taken, nil
	}
	if r.settle.expression == nil {
		return r.settle.constant, nil
	}
	if cost, err = r.settle.expression.tokens(&endSubject{end, taken}, taken, maxSettled); err != nil {
		return taken, &RuleError{Limit: limit, Field: "settle", Err: err, Shadow: r.limit.Shadow}
	}
	return cost, nil
}

// explain returns a message of CEL in other words, if it is about a name that
// only the expressions at the other end of a request know.
func (p purpose) explain(message string) string {
	rest, ok := strings.CutPrefix(message, "undeclared reference to '")
	if !ok {
		return message
	}
	name, _, _ := strings.Cut(rest, "'")
	knows := func(names map[string]*cel.Type) bool {
		for known := range names {
			if root, _, _ := strings.Cut(known, "."); known == name || root == name {
				return true
			}
		}
		return false
	}
	ofRequest, ofEnd := knows(kindsOf(attributes)), knows(kindsOf(endAttributes))
	switch {
	case p == forSettle && ofRequest && !ofEnd:
		return name + " is not known any more when the response has ended; use it in cost"
	case p != forSettle && ofEnd && !ofRequest:
		return name + " is known only when the response has ended; use it in settle"
	}
	return message
}
