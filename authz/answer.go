package authz

import (
	"strconv"
	"strings"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	typev3 "github.com/envoyproxy/go-control-plane/envoy/type/v3"
	statuspb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/sluiceproxy/sluice/limiter"
)

// manner is how an outcome is told to Envoy.
type manner uint8

const (
	pass     manner = iota // an allow, with the rate-limit headers where a limit tells
	deny                   // a 429
	refuse                 // a 5xx: not the client's fault
	delegate               // an error, which Envoy's failure_mode_allow judges
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
}

// answer tells Envoy a verdict.
func (s *Server) answer(v *verdict) (*authv3.CheckResponse, error) {
	switch manners[v.decision.Outcome] {
	case pass:
		return s.pass(v), nil
	case deny:
		return s.deny(v), nil
	case delegate:
		return nil, status.Error(codes.Unavailable, "the store of the rate limiter does not answer")
	}
	return s.refuse(v), nil
}

func (s *Server) pass(v *verdict) *authv3.CheckResponse {
	ok := &authv3.OkHttpResponse{}
	shadows := denyingShadows(&v.decision)
	if len(shadows) > 0 {
		ok.Headers = []*corev3.HeaderValueOption{header("x-sluice-shadow", strings.Join(shadows, ","))}
	}
	if v.request != nil {
		for name := range v.request.Headers {
			// What is removed beats what is set, so one that is set, and so replaced, is not removed.
			if strings.HasPrefix(name, "x-sluice-") && (len(shadows) == 0 || name != "x-sluice-shadow") {
				ok.HeadersToRemove = append(ok.HeadersToRemove, name)
			}
		}
	}
	ok.ResponseHeadersToAdd = limitHeaders(v, nil)
	return &authv3.CheckResponse{
		Status:          &statuspb.Status{},
		HttpResponse:    &authv3.CheckResponse_OkResponse{OkResponse: ok},
		DynamicMetadata: s.metadata(v, shadows),
	}
}

func (s *Server) deny(v *verdict) *authv3.CheckResponse {
	d := &v.decision
	charge, told := &d.Charges[d.Telling], &d.Verdicts[d.Telling]
	p := problem{status: 429, title: "Too Many Requests", limit: charge.Limit.Name}
	if told.RetryAfter == limiter.Never {
		p.detail = "The limit " + charge.Limit.Name + " never allows this request."
	} else {
		p.retryAfter = seconds(told.RetryAfter) // rounded up, so at least 1
		p.detail = "The limit " + charge.Limit.Name + " allows this request in " + strconv.FormatInt(p.retryAfter, 10) + " s."
	}
	headers := limitHeaders(v, []*corev3.HeaderValueOption{header("x-envoy-ratelimited", "true")})
	if p.retryAfter > 0 && v.config.Headers.RetryAfter {
		headers = append(headers, header("retry-after", strconv.FormatInt(p.retryAfter, 10)))
	}
	return s.denied(v, codes.ResourceExhausted, headers, p)
}

func (s *Server) refuse(v *verdict) *authv3.CheckResponse {
	p := problem{
		status:     v.config.FailureStatus,
		title:      "Rate Limiter Unavailable",
		detail:     "The rate limiter could not decide about this request.",
		retryAfter: int64(s.jitter()),
	}
	var headers []*corev3.HeaderValueOption
	if v.config.Headers.RetryAfter {
		headers = append(headers, header("retry-after", strconv.FormatInt(p.retryAfter, 10)))
	}
	return s.denied(v, codes.Unavailable, headers, p)
}

// denied is a denial of either kind, for an HTTP client or a gRPC one.
func (s *Server) denied(v *verdict, code codes.Code, headers []*corev3.HeaderValueOption, p problem) *authv3.CheckResponse {
	response := &authv3.DeniedHttpResponse{Status: &typev3.HttpStatus{Code: typev3.StatusCode(p.status)}}
	if v.request != nil && isGRPC(v.request) {
		// Without it Envoy makes every denial UNAVAILABLE, which clients and proxies retry. The body becomes grpc-message.
		headers = append(headers, header("grpc-status", strconv.Itoa(int(code))))
		response.Body = p.detail
	} else {
		headers = append(headers, header("content-type", "application/problem+json"))
		response.Body = p.json()
	}
	response.Headers = headers
	return &authv3.CheckResponse{
		Status:          &statuspb.Status{Code: int32(code)},
		HttpResponse:    &authv3.CheckResponse_DeniedResponse{DeniedResponse: response},
		DynamicMetadata: s.metadata(v, denyingShadows(&v.decision)),
	}
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

// limitHeaders appends the headers that tell a client its limits.
func limitHeaders(v *verdict, headers []*corev3.HeaderValueOption) []*corev3.HeaderValueOption {
	d := &v.decision
	if d.Telling < 0 {
		return headers
	}
	if v.config.Headers.XRateLimit {
		c, told := &d.Charges[d.Telling], &d.Verdicts[d.Telling]
		headers = append(headers,
			header("x-ratelimit-limit", strconv.FormatInt(c.Bucket.Burst(), 10)),
			header("x-ratelimit-remaining", strconv.FormatInt(told.Remaining, 10)),
			header("x-ratelimit-reset", strconv.FormatInt(seconds(told.FullAfter), 10)))
	}
	if v.config.Headers.RateLimit {
		policies, limits := ietfFields(d)
		headers = append(headers, header("ratelimit-policy", policies), header("ratelimit", limits))
	}
	return headers
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

// header sets a header: it replaces what a client or an upstream has sent. Envoy's default would add a second one.
func header(key, value string) *corev3.HeaderValueOption {
	h := &struct {
		option corev3.HeaderValueOption
		value  corev3.HeaderValue
	}{} // one allocation for both
	h.value.Key, h.value.Value = key, value
	h.option.Header = &h.value
	h.option.AppendAction = corev3.HeaderValueOption_OVERWRITE_IF_EXISTS_OR_ADD
	return &h.option
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

// The values of metadata that are always the same. They are only ever read.
var (
	outcomeValues = func() map[limiter.Outcome]*structpb.Value {
		values := make(map[limiter.Outcome]*structpb.Value)
		for _, o := range limiter.Outcomes {
			values[o] = structpb.NewStringValue(o.String())
		}
		return values
	}()
	sourceValues = func() map[limiter.Source]*structpb.Value {
		values := make(map[limiter.Source]*structpb.Value)
		for s, name := range sources {
			values[s] = structpb.NewStringValue(name)
		}
		return values
	}()
	noText = structpb.NewStringValue("")
	zero   = structpb.NewNumberValue(0)
	noList = structpb.NewListValue(&structpb.ListValue{})
)

// metadata is what Envoy's access log and other filters see of the decision.
func (s *Server) metadata(v *verdict, shadows []string) *structpb.Struct {
	d := &v.decision
	fields := make(map[string]*structpb.Value, 7)
	fields["decision"] = outcomeValues[d.Outcome]
	if d.Telling >= 0 {
		charge, told := &d.Charges[d.Telling], &d.Verdicts[d.Telling]
		if fields["limit"] = s.report.of(charge.Limit).name; fields["limit"] == nil {
			fields["limit"] = structpb.NewStringValue(charge.Limit.Name)
		}
		fields["remaining"] = structpb.NewNumberValue(float64(told.Remaining))
		fields["cost"] = structpb.NewNumberValue(float64(charge.Cost))
		fields["source"] = sourceValues[told.Source]
		if d.Outcome == limiter.Limited && told.RetryAfter != limiter.Never {
			fields["retry_after"] = structpb.NewNumberValue(float64(seconds(told.RetryAfter)))
		}
	} else {
		fields["limit"], fields["remaining"], fields["cost"], fields["source"] = noText, zero, zero, sourceValues[limiter.NoSource]
	}
	fields["shadow"] = noList
	if len(shadows) > 0 {
		names := make([]*structpb.Value, len(shadows))
		for i, name := range shadows {
			names[i] = structpb.NewStringValue(name)
		}
		fields["shadow"] = structpb.NewListValue(&structpb.ListValue{Values: names})
	}
	return &structpb.Struct{Fields: fields}
}
