package authz

import (
	"strconv"
	"strings"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/sluiceproxy/sluice/limiter"
)

// manner is how an outcome is told to Envoy.
type manner uint8

const (
	pass     manner = iota // an allow, with the rate-limit headers where a limit tells
	deny                   // a 429
	refuse                 // a 5xx: not the client's fault
	delegate               // an error, which Envoy's failure_mode_allow judges
	hangUp                 // an error that nobody sees
)

// manners holds every outcome's. What the outcomes are called in metadata, metrics and logs is their String.
var manners = map[limiter.Outcome]manner{
	limiter.Unmatched:    pass,
	limiter.Allowed:      pass,
	limiter.Exempt:       pass,
	limiter.FailedOpen:   pass,
	limiter.FailedLocal:  pass, // of no answer: it is what checks are counted as
	limiter.Limited:      deny,
	limiter.FailedClosed: refuse,
	limiter.Invalid:      refuse,
	limiter.Delegated:    delegate,
	limiter.Canceled:     hangUp,
}

// The fields of an answer that are written. Their numbers are envoy/service/auth/v3/external_auth.proto's.
const (
	statusField   = 1 // of CheckResponse: google.rpc.Status
	deniedField   = 2
	okField       = 3
	metadataField = 4

	okUpstreamHeaders = 2 // of OkHttpResponse
	okRemovedHeaders  = 5
	okClientHeaders   = 6

	deniedStatus  = 1 // of DeniedHttpResponse
	deniedHeaders = 2
	deniedBody    = 3

	overwrite = uint64(corev3.HeaderValueOption_OVERWRITE_IF_EXISTS_OR_ADD)
)

// answerSize is about what an answer takes, in bytes.
const answerSize = 512

// answer tells Envoy a verdict.
func (s *Server) answer(v *verdict) (*reply, error) {
	e := &encoder{b: make([]byte, 0, answerSize)}
	switch manners[v.decision.Outcome] {
	case pass:
		s.pass(e, v)
	case deny:
		s.deny(e, v)
	case delegate:
		return nil, status.Error(codes.Unavailable, "the rate limiter's store is unavailable")
	case hangUp:
		return nil, status.Error(codes.Canceled, "the caller canceled the check")
	default:
		s.refuse(e, v)
	}
	return &reply{e.b}, nil
}

func (s *Server) pass(e *encoder, v *verdict) {
	e.close(e.open(statusField)) // its code is 0
	shadows := denyingShadows(&v.decision)
	ok := e.open(okField)
	isSet := false
	if len(shadows) > 0 {
		names := strings.Join(shadows, ",")
		if isSet = hasRoom(v.wire, shadowHeader, names); isSet {
			e.header(okUpstreamHeaders, shadowHeader, names)
		}
	}
	if v.request != nil {
		// A client's own headers of this kind are removed even from a request that Envoy then refuses, since it still has too many
		// headers: passing them on would be worse, and nobody else's request is concerned. The shipped chain has removed them before.
		for name := range v.request.Headers {
			// What is removed beats what is set, so one that is set, and so replaced, is not removed.
			if strings.HasPrefix(name, "x-sluice-") && (!isSet || name != shadowHeader) && isToken(name) {
				e.text(okRemovedHeaders, name)
			}
		}
	}
	limitHeaders(e, okClientHeaders, v)
	e.close(ok)
	s.metadata(e, v, shadows)
}

// shadowHeader tells the upstream which shadow limits would have denied the request.
const shadowHeader = "x-sluice-shadow"

// Envoy's default bounds of a request's headers, max_headers_count and max_request_headers_kb. Since 1.37 it answers 500 where an
// ext_authz server's changes leave more than that, also where the request had more from the start, since Envoy adds some of its own.
const (
	maxHeaderLines = 100
	maxHeaderBytes = 60 << 10 // of names and values
)

// hasRoom reports whether Envoy can add a header to the request of a check. It is not asked where none is to be added.
func hasRoom(wire, name, value string) bool {
	lines, bytes := headerSize(wire)
	return lines < maxHeaderLines && bytes+len(name)+len(value) <= maxHeaderBytes
}

// isToken reports whether a header's name is one by RFC 9110. All that Envoy passes on are.
func isToken(name string) bool {
	for i := 0; i < len(name); i++ {
		c := name[i]
		if (c < '0' || c > '9') && (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && strings.IndexByte("!#$%&'*+-.^_`|~", c) < 0 {
			return false
		}
	}
	return name != ""
}

func (s *Server) deny(e *encoder, v *verdict) {
	d := &v.decision
	charge, told := &d.Charges[d.Telling], &d.Verdicts[d.Telling]
	p := problem{status: 429, title: "Too Many Requests", limit: charge.Limit.Name}
	if told.RetryAfter == limiter.Never {
		p.detail = "Rate limit \"" + charge.Limit.Name + "\" does not allow this request."
	} else {
		p.retryAfter = seconds(told.RetryAfter) // rounded up, so at least 1
		p.detail = "Rate limit \"" + charge.Limit.Name + "\" exceeded. Retry in " + strconv.FormatInt(p.retryAfter, 10) + " s."
	}
	s.denied(e, v, codes.ResourceExhausted, p)
}

func (s *Server) refuse(e *encoder, v *verdict) {
	s.denied(e, v, codes.Unavailable, problem{
		status:     v.config.FailureStatus,
		title:      "Rate Limiter Unavailable",
		detail:     "The rate limiter is temporarily unavailable.",
		retryAfter: int64(s.jitter()),
	})
}

// denied is a denial of either kind, for an HTTP client or a gRPC one.
func (s *Server) denied(e *encoder, v *verdict, code codes.Code, p problem) {
	at := e.open(statusField)
	e.integer(1, uint64(code))
	e.close(at)
	denied := e.open(deniedField)
	at = e.open(deniedStatus)
	e.integer(1, uint64(p.status))
	e.close(at)
	if code == codes.ResourceExhausted {
		e.header(deniedHeaders, "x-envoy-ratelimited", "true")
		limitHeaders(e, deniedHeaders, v)
	}
	if p.retryAfter > 0 && v.config.Headers.RetryAfter {
		e.header(deniedHeaders, "retry-after", strconv.FormatInt(p.retryAfter, 10))
	}
	if v.request != nil && isGRPC(v.request) {
		// Without it Envoy makes every denial UNAVAILABLE, which clients and proxies retry. The body becomes grpc-message.
		e.header(deniedHeaders, "grpc-status", strconv.Itoa(int(code)))
		e.text(deniedBody, p.detail)
	} else {
		e.header(deniedHeaders, "content-type", "application/problem+json")
		e.text(deniedBody, p.json())
	}
	e.close(denied)
	s.metadata(e, v, denyingShadows(&v.decision))
}

// problem is a body by RFC 9457. Its texts hold names from the config and nothing from the client.
type problem struct {
	status     int
	title      string
	detail     string
	limit      string // empty: left out
	retryAfter int64  // in seconds; 0: left out
}

func (p *problem) json() string {
	b := make([]byte, 0, 192)
	b = append(b, `{"title":`...)
	b = strconv.AppendQuote(b, p.title)
	b = strconv.AppendInt(append(b, `,"status":`...), int64(p.status), 10)
	b = strconv.AppendQuote(append(b, `,"detail":`...), p.detail)
	if p.limit != "" {
		b = strconv.AppendQuote(append(b, `,"limit":`...), p.limit)
	}
	if p.retryAfter > 0 {
		b = strconv.AppendInt(append(b, `,"retry_after":`...), p.retryAfter, 10)
	}
	return string(append(b, '}'))
}

// limitHeaders writes the headers that tell a client its limits.
func limitHeaders(e *encoder, field protowire.Number, v *verdict) {
	d := &v.decision
	if d.Telling < 0 {
		return
	}
	if v.config.Headers.XRateLimit {
		c, told := &d.Charges[d.Telling], &d.Verdicts[d.Telling]
		e.header(field, "x-ratelimit-limit", strconv.FormatInt(c.Bucket.Burst(), 10))
		e.header(field, "x-ratelimit-remaining", strconv.FormatInt(told.Remaining, 10))
		e.header(field, "x-ratelimit-reset", strconv.FormatInt(seconds(told.FullAfter), 10))
	}
	if v.config.Headers.RateLimit {
		policies, limits := ietfFields(d)
		e.header(field, "ratelimit-policy", policies)
		e.header(field, "ratelimit", limits)
	}
}

// ietfFields are the values of RateLimit-Policy and RateLimit for all enforced limits that a bucket answered for: lists of
// structured fields by RFC 9651, named by draft-ietf-httpapi-ratelimit-headers-10. A limit's name needs no escaping.
func ietfFields(d *limiter.Decision) (policies, limits string) {
	var p, l []byte
	for i := range d.Charges {
		c, v := &d.Charges[i], &d.Verdicts[i]
		if c.Limit.Shadow || !v.Known() {
			continue
		}
		if len(p) > 0 {
			p, l = append(p, ", "...), append(l, ", "...)
		}
		p = strconv.AppendQuote(p, c.Limit.Name)
		p = strconv.AppendInt(append(p, ";q="...), c.Bucket.Burst(), 10)
		p = strconv.AppendInt(append(p, ";w="...), seconds(c.Bucket.FillTime()), 10)
		l = strconv.AppendQuote(l, c.Limit.Name)
		l = strconv.AppendInt(append(l, ";r="...), v.Remaining, 10)
		if v.NextAfter > 0 {
			l = strconv.AppendInt(append(l, ";t="...), seconds(v.NextAfter), 10)
		}
	}
	return string(p), string(l)
}

// seconds is d in whole seconds, rounded up.
func seconds(d time.Duration) int64 {
	s := int64(d / time.Second)
	if d%time.Second > 0 {
		s++
	}
	return s
}

// denyingShadows are the names of the shadow limits that would have denied.
func denyingShadows(d *limiter.Decision) (names []string) {
	for i := range d.Charges {
		if v := &d.Verdicts[i]; d.Charges[i].Limit.Shadow && !v.Allowed && v.Known() {
			names = append(names, d.Charges[i].Limit.Name)
		}
	}
	return names
}

// sources are the sources' names in metadata.
var sources = map[limiter.Source]string{
	limiter.NoSource:      "none",
	limiter.RedisSource:   "redis",
	limiter.MemorySource:  "memory",
	limiter.LocalSource:   "local",
	limiter.CeilingSource: "ceiling",
}

// metadata is what Envoy's access log and other filters see of the decision.
func (s *Server) metadata(e *encoder, v *verdict, shadows []string) {
	d := &v.decision
	at := e.open(metadataField)
	e.textEntry("decision", d.Outcome.String())
	if d.Telling >= 0 {
		charge, told := &d.Charges[d.Telling], &d.Verdicts[d.Telling]
		e.textEntry("limit", charge.Limit.Name)
		e.numberEntry("remaining", float64(told.Remaining))
		e.numberEntry("cost", float64(charge.Cost))
		e.textEntry("source", sources[told.Source])
		if d.Outcome == limiter.Limited && told.RetryAfter != limiter.Never {
			e.numberEntry("retry_after", float64(seconds(told.RetryAfter)))
		}
	} else {
		// Of null Envoy's access log says "-".
		e.nullEntry("limit")
		e.nullEntry("remaining")
		e.nullEntry("cost")
		e.textEntry("source", sources[limiter.NoSource])
	}
	e.listEntry("shadow", shadows)
	e.close(at)
}
