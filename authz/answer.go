package authz

import (
	"strconv"
	"strings"
	"time"

	"go.uber.org/zap"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/sluiceproxy/sluice/limiter"
)

// answerSize is the initial capacity of an answer, in bytes. Most answers fit.
const answerSize = 512

// answer returns the response to a check. Its error is a gRPC status: the
// outcome is left to Envoy, or the caller is gone.
func (s *Server) answer(check *checkState) (*rawResponse, error) {
	e := &encoder{b: make([]byte, 0, answerSize)}
	switch classes[check.decision.Outcome].disposition {
	case allow:
		s.allow(e, check)
	case deny:
		s.deny(e, check)
	case delegate:
		return nil, status.Error(codes.Unavailable, "the rate limiter's store is unavailable")
	case cancel:
		return nil, status.Error(codes.Canceled, "the caller canceled the check")
	default:
		s.refuse(e, check)
	}
	return &rawResponse{e.b}, nil
}

// allow writes an OkHttpResponse.
func (s *Server) allow(e *encoder, check *checkState) {
	e.close(e.open(responseStatus)) // the code is 0, OK
	would := denyingShadows(&check.decision)
	ok := e.open(responseOK)
	isSet := false
	if len(would.names) > 0 {
		names := strings.Join(would.names, ",")
		if isSet = hasRoom(check.wire, shadowHeader, names); isSet {
			e.header(okHeaders, shadowHeader, names)
		}
	}
	if check.request != nil {
		// These headers are removed even if the request has more headers than
		// Envoy accepts after a mutation: Envoy then refuses the request, which
		// is better than to pass a client's x-sluice-* headers on. The shipped
		// filter chain has removed them before.
		for name := range check.request.Headers {
			// Envoy removes headers after it sets them. A header that is set
			// replaces the client's and must not be removed.
			if strings.HasPrefix(name, "x-sluice-") && (!isSet || name != shadowHeader) && isToken(name) {
				e.text(okHeadersToRemove, name)
			}
		}
	}
	limitHeaders(e, okResponseHeaders, check)
	e.close(ok)
	text, left := s.sealer.seal(check)
	if left > 0 {
		s.report.throttled.Warn("holds of a request do not fit into its metadata, and are spent",
			zap.Int("holds", left), zap.Int("max_bytes", maxSealed))
	}
	s.metadata(e, check, would, text)
}

// shadowHeader tells the upstream which shadow limits would have denied the
// request.
const shadowHeader = "x-sluice-shadow"

// Envoy's defaults of max_headers_count and max_request_headers_kb. Since 1.37
// Envoy answers 500 if a request exceeds them after ext_authz's mutations, even
// if it exceeded them before.
const (
	maxHeaderLines = 100
	maxHeaderBytes = 60 << 10 // of names and values
)

// hasRoom reports whether Envoy can add a header to the request of a check
// without exceeding its bounds.
func hasRoom(wire, name, value string) bool {
	lines, bytes := headerSize(wire)
	return lines < maxHeaderLines && bytes+len(name)+len(value) <= maxHeaderBytes
}

// isToken reports whether name is a token by RFC 9110, as every header name
// that Envoy passes on is.
func isToken(name string) bool {
	for i := 0; i < len(name); i++ {
		c := name[i]
		if !isAlphanumeric(c) && strings.IndexByte("!#$%&'*+-.^_`|~", c) < 0 {
			return false
		}
	}
	return name != ""
}

// deny writes a 429.
func (s *Server) deny(e *encoder, check *checkState) {
	d := &check.decision
	limit, verdict := d.Charges[d.Strictest].Limit.Name, &d.Verdicts[d.Strictest]
	p := problem{status: 429, title: "Too Many Requests", limit: limit}
	if verdict.RetryAfter == limiter.Never {
		p.detail = "Rate limit \"" + limit + "\" does not allow this request."
	} else {
		p.retryAfter = seconds(verdict.RetryAfter) // rounded up, so at least 1
		p.detail = "Rate limit \"" + limit + "\" exceeded. Retry in " + strconv.FormatInt(p.retryAfter, 10) + " s."
	}
	s.denied(e, check, codes.ResourceExhausted, p)
}

// refuse writes an answer with failure_status.
func (s *Server) refuse(e *encoder, check *checkState) {
	s.denied(e, check, codes.Unavailable, problem{
		status:     check.config.FailureStatus,
		title:      "Rate Limiter Unavailable",
		detail:     "The rate limiter is temporarily unavailable.",
		retryAfter: int64(s.jitter()),
	})
}

// denied writes a DeniedHttpResponse in the form that the client reads.
func (s *Server) denied(e *encoder, check *checkState, code codes.Code, p problem) {
	call := callTypeOf(check.request)
	httpStatus := p.status
	if call == translatedCall {
		// Envoy makes the HTTP status of a gRPC call 200, but not of this one.
		// Clients read grpc-status only if it is 200.
		httpStatus = 200
	}
	at := e.open(responseStatus)
	e.integer(statusCode, uint64(code))
	e.close(at)
	denied := e.open(responseDenied)
	at = e.open(deniedStatus)
	e.integer(statusCode, uint64(httpStatus))
	e.close(at)
	if code == codes.ResourceExhausted {
		e.header(deniedHeaders, "x-envoy-ratelimited", "true")
		limitHeaders(e, deniedHeaders, check)
	}
	if p.retryAfter > 0 && check.config.Headers.RetryAfter {
		e.header(deniedHeaders, "retry-after", strconv.FormatInt(p.retryAfter, 10))
	}
	if call != httpCall {
		// Without grpc-status Envoy turns every denial of a gRPC call into
		// UNAVAILABLE, which clients and proxies retry.
		e.header(deniedHeaders, "grpc-status", strconv.Itoa(int(code)))
	}
	if call == grpcWebCall || call == translatedCall {
		e.header(deniedHeaders, "grpc-message", p.detail)
	}
	switch call {
	case httpCall, grpcWebCall:
		e.header(deniedHeaders, "content-type", "application/problem+json")
		e.text(deniedBody, p.json())
	case grpcCall:
		e.text(deniedBody, p.detail) // Envoy makes it grpc-message
	case translatedCall:
		// If there is a body, Envoy's grpc_web filter makes grpc-status
		// UNAVAILABLE.
	}
	e.close(denied)
	s.metadata(e, check, denyingShadows(&check.decision), "")
}

// problem is a body in the format of RFC 9457. Its texts contain names from the
// config and nothing that a client sent. They are printable ASCII without a
// percent sign, so that they are a valid grpc-message as they are.
type problem struct {
	status     int
	title      string
	detail     string
	limit      string // omitted if empty
	retryAfter int64  // in seconds; omitted if 0
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

// limitHeaders writes the rate-limit headers for the client.
func limitHeaders(e *encoder, field protowire.Number, check *checkState) {
	d := &check.decision
	if d.Strictest < 0 {
		return
	}
	c, v := &d.Charges[d.Strictest], &d.Verdicts[d.Strictest]
	if !c.HasBucket() {
		return
	}
	if check.config.Headers.XRateLimit {
		e.header(field, "x-ratelimit-limit", strconv.FormatInt(c.Bucket.Burst(), 10))
		e.header(field, "x-ratelimit-remaining", strconv.FormatInt(v.Remaining, 10))
		e.header(field, "x-ratelimit-reset", strconv.FormatInt(seconds(v.FullAfter), 10))
	}
	if check.config.Headers.RateLimit {
		policies, limits := ietfFields(d)
		e.header(field, "ratelimit-policy", policies)
		e.header(field, "ratelimit", limits)
	}
}

// ietfFields returns the values of RateLimit-Policy and RateLimit for all
// enforced limits with a known verdict. They are lists of structured fields by
// RFC 9651, with the names of draft-ietf-httpapi-ratelimit-headers-10. The name
// of a limit needs no escaping.
func ietfFields(d *limiter.Decision) (policies, limits string) {
	var p, l []byte
	for i := range d.Charges {
		c, v := &d.Charges[i], &d.Verdicts[i]
		if c.Limit.Shadow || !v.Known() || !c.HasBucket() {
			continue
		}
		if len(p) > 0 {
			p, l = append(p, ", "...), append(l, ", "...)
		}
		p = strconv.AppendQuote(p, c.Limit.Name)
		p = strconv.AppendInt(append(p, ";q="...), c.Bucket.Burst(), 10)
		p = strconv.AppendInt(append(p, ";w="...), seconds(v.Period(c.Bucket)), 10)
		l = strconv.AppendQuote(l, c.Limit.Name)
		l = strconv.AppendInt(append(l, ";r="...), v.Remaining, 10)
		if v.NextAfter > 0 {
			l = strconv.AppendInt(append(l, ";t="...), seconds(v.NextAfter), 10)
		}
	}
	return string(p), string(l)
}

// seconds returns d in whole seconds, rounded up.
func seconds(d time.Duration) int64 {
	s := int64(d / time.Second)
	if d%time.Second > 0 {
		s++
	}
	return s
}

// shadows has the names of the shadow limits that would have denied a request,
// and the keys of their buckets.
type shadows struct{ names, keys []string }

func denyingShadows(d *limiter.Decision) (s shadows) {
	for i := range d.Charges {
		if c := &d.Charges[i]; wouldDeny(c, &d.Verdicts[i]) {
			s.names, s.keys = append(s.names, c.Limit.Name), append(s.keys, c.ShownKey())
		}
	}
	return s
}

// wouldDeny reports whether a charge is that of a limit in shadow mode, and its
// verdict a denial.
func wouldDeny(c *limiter.Charge, v *limiter.Verdict) bool {
	return c.Limit.Shadow && !v.Allowed && v.Known()
}

// sourceNames has the names of sources in metadata and spans.
var sourceNames = [...]string{
	limiter.NoSource:      "none",
	limiter.RedisSource:   "redis",
	limiter.MemorySource:  "memory",
	limiter.LocalSource:   "local",
	limiter.CeilingSource: "ceiling",
	limiter.LeaseSource:   "lease",
	limiter.BlockSource:   "none",
}

// metadata writes the dynamic metadata, which Envoy's access log and later
// filters can read. settle is what the access log brings back; nothing if empty.
func (s *Server) metadata(e *encoder, check *checkState, would shadows, settle string) {
	d := &check.decision
	at := e.open(responseMetadata)
	e.textEntry("decision", d.Outcome.String())
	if d.Strictest >= 0 {
		c, v := &d.Charges[d.Strictest], &d.Verdicts[d.Strictest]
		e.textEntry("limit", c.Limit.Name)
		e.textEntry("key", c.ShownKey())
		e.numberEntry("remaining", float64(v.Remaining))
		e.numberEntry("cost", float64(c.Cost))
		e.textEntry("source", sourceNames[v.Source])
		if d.Outcome == limiter.Limited && v.RetryAfter != limiter.Never {
			e.numberEntry("retry_after", float64(seconds(v.RetryAfter)))
		}
	} else {
		// Envoy's access log writes null as "-".
		e.nullEntry("limit")
		e.nullEntry("key")
		e.nullEntry("remaining")
		e.nullEntry("cost")
		e.textEntry("source", sourceNames[limiter.NoSource])
	}
	e.listEntry("shadow", would.names)
	if len(would.keys) > 0 {
		e.listEntry("shadow_keys", would.keys)
	}
	if settle != "" {
		e.textEntry(settleField, settle)
	}
	e.close(at)
}
