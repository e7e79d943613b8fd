package authz

import (
	"errors"
	"io"
	"maps"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	logdatav3 "github.com/envoyproxy/go-control-plane/envoy/data/accesslog/v3"
	logv3 "github.com/envoyproxy/go-control-plane/envoy/service/accesslog/v3"
	"go.opentelemetry.io/otel/trace"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/sluiceproxy/sluice/limiter"
	"github.com/sluiceproxy/sluice/limiter/policy"
)

const (
	// settleField is the entry of the dynamic metadata with the sealed text.
	settleField = "settle"
	// logName is the log_name of the access log that `sluice envoy` prints.
	logName = "sluice"
	// maxLogMessage and maxLogEntry are the maximum lengths of a message and of
	// an entry in bytes. A larger message ends its stream, as does one that is
	// malformed; a larger entry settles nothing. Envoy sends each entry in a
	// message of its own, or in one with 16 KiB of others.
	maxLogMessage, maxLogEntry = 1 << 20, 128 << 10
	// logQuiet is how long a stream must be quiet before it is ended while the
	// server drains, and logDrain how long it may last then.
	logQuiet, logDrain = 20 * time.Millisecond, time.Second
)

// Field numbers of the messages of the access log.
const (
	logIdentifier = 1 // of StreamAccessLogsMessage
	logHTTP       = 2
	logEntry      = 1 // of HTTPAccessLogEntries
	logLogName    = 2 // of Identifier
)

// AccessLogMethod is the gRPC method by which Envoy sends its access log.
const AccessLogMethod = logv3.AccessLogService_StreamAccessLogs_FullMethodName

// rawLog is an encoded StreamAccessLogsMessage.
type rawLog struct {
	wire       string
	isTooLarge bool // and wire is empty
}

// logService is the generated description of Envoy's access log service, except
// that the stream gets encoded messages. A message may contain a thousand
// entries, of which one at a time is decoded.
var logService = grpc.ServiceDesc{
	ServiceName: logv3.AccessLogService_ServiceDesc.ServiceName,
	HandlerType: (*any)(nil),
	Streams: []grpc.StreamDesc{{
		StreamName:    "StreamAccessLogs",
		ClientStreams: true,
		Handler:       func(server any, stream grpc.ServerStream) error { return server.(*Server).readLog(stream) },
	}},
	Metadata: logv3.AccessLogService_ServiceDesc.Metadata,
}

// decoding bounds how many entries are decoded at a time, by all streams.
var decoding = make(chan struct{}, runtime.GOMAXPROCS(0))

// readLog settles the requests of an access log. It returns when Envoy ends the
// stream, and soon after the server begins to drain.
func (s *Server) readLog(stream grpc.ServerStream) error {
	if !s.config.Load().Settles() {
		return status.Error(codes.Unimplemented, "no limit of the config has `settle`")
	}
	// With the headers Envoy knows that the stream is answered. Until then it
	// keeps what it sent, to try again.
	if err := stream.SendHeader(metadata.MD{}); err != nil {
		return err
	}
	var read atomic.Int64 // messages
	ended := make(chan error, 1)
	go func() {
		var log accessLog
		for {
			var raw rawLog
			if err := stream.RecvMsg(&raw); err != nil {
				ended <- err
				return
			}
			if raw.isTooLarge || !log.read(s, raw.wire) {
				ended <- status.Errorf(codes.InvalidArgument,
					"not a StreamAccessLogsMessage, or one of more than %d bytes", maxLogMessage)
				return
			}
			read.Add(1)
		}
	}()
	select {
	case err := <-ended:
		if errors.Is(err, io.EOF) {
			return stream.SendMsg(&logv3.StreamAccessLogsResponse{})
		}
		return err
	case <-s.settling.draining:
	}
	last := time.After(logDrain)
	for before := int64(-1); ; {
		select {
		case err := <-ended:
			return err
		case <-last:
			return errDraining
		case <-time.After(logQuiet):
			if now := read.Load(); now != before {
				before = now
				continue
			}
			return errDraining
		}
	}
}

var errDraining = status.Error(codes.Unavailable, "the sidecar is shutting down")

// accessLog is what is known of the access log of a stream.
type accessLog struct {
	// isOurs says that it is the one that `sluice envoy` prints. The name is in
	// the first message of a stream only.
	isOurs bool
}

// read settles the requests of a message. It reports whether the message can be
// read.
func (a *accessLog) read(s *Server, wire string) bool {
	m := message{rest: wire}
	for m.next() {
		switch m.number {
		case logIdentifier:
			identifier := m.inner()
			for identifier.next() {
				if identifier.number == logLogName {
					if a.isOurs = identifier.text() == logName; !a.isOurs {
						s.report.otherLog(identifier.text())
					}
				}
			}
			m.bad = m.bad || identifier.bad
		case logHTTP:
			entries := m.inner()
			for entries.next() {
				if entries.number == logEntry && a.isOurs {
					s.readEntry(entries.data())
				}
			}
			m.bad = m.bad || entries.bad
		}
	}
	return !m.bad
}

// readEntry settles a request by its entry in the access log.
func (s *Server) readEntry(wire string) {
	if !strings.Contains(wire, settleField) {
		return // without a sealed text
	}
	decoding <- struct{}{}
	defer func() { <-decoding }()
	defer func() {
		if p := recover(); p != nil {
			s.report.panicked("settlement", p)
			s.report.notSettled()
		}
	}()
	var entry logdatav3.HTTPAccessLogEntry
	if len(wire) > maxLogEntry || proto.Unmarshal([]byte(wire), &entry) != nil {
		s.report.notSettled()
		return
	}
	s.ended(&entry)
}

// ended settles a request by its entry in the access log.
func (s *Server) ended(entry *logdatav3.HTTPAccessLogEntry) {
	common := entry.GetCommonProperties()
	if t := common.GetAccessLogType(); t != logdatav3.AccessLogType_DownstreamEnd && t != logdatav3.AccessLogType_NotSet {
		return
	}
	texts := sealedTexts(common.GetMetadata())
	if len(texts) == 0 {
		return
	}
	config := s.config.Load()
	var all []held
	var check trace.SpanContext
	err := errForged
	for _, text := range texts {
		if all, check, err = s.sealer.open(config, text); err == nil {
			break
		}
	}
	if err != nil {
		s.report.forged()
		return
	}
	now, end := time.Now(), endOf(entry)
	for _, h := range all {
		cost, err := config.Settle(h.domain, h.limit, end, h.hold.Tokens)
		if err != nil {
			s.report.mistaken(err)
		}
		s.settling.add(&ending{
			Settlement: limiter.Settlement{
				Limit: &limiter.Limit{Domain: h.domain, Name: config.LimitOfKey(h.limit)}, Key: h.key, Hold: h.hold,
				Cost: cost,
			},
			isMistake: err != nil, check: check, began: now,
		})
	}
}

// maxTexts is how many texts of an entry are tried at most.
const maxTexts = 4

// sealedTexts returns the texts in the metadata that may be sealed, first that of
// the filter with ext_authz's usual name. In meshes the filter has other names,
// and another filter may put something into metadata under the same key.
func sealedTexts(metadata *corev3.Metadata) (texts []string) {
	const usual = "envoy.filters.http.ext_authz"
	all := metadata.GetFilterMetadata()
	names := slices.Sorted(maps.Keys(all))
	if i := slices.Index(names, usual); i > 0 {
		names = slices.Insert(slices.Delete(names, i, i+1), 0, usual)
	}
	for _, name := range names {
		if text := all[name].GetFields()[settleField].GetStringValue(); text != "" && len(texts) < maxTexts {
			texts = append(texts, text)
		}
	}
	return texts
}

// endOf returns what an entry says of the end of a request.
func endOf(entry *logdatav3.HTTPAccessLogEntry) *policy.End {
	common, request, response := entry.GetCommonProperties(), entry.GetRequest(), entry.GetResponse()
	end := &policy.End{
		Method:           methodOf(request.GetRequestMethod()),
		Scheme:           request.GetScheme(),
		Host:             request.GetAuthority(),
		Path:             request.GetPath(),
		Protocol:         protocols[entry.GetProtocolVersion()],
		ID:               request.GetRequestId(),
		Time:             common.GetStartTime().AsTime(),
		RequestSize:      int64(request.GetRequestBodyBytes()),
		RequestTotalSize: int64(request.GetRequestBodyBytes() + request.GetRequestHeadersBytes()),
		Code:             int64(response.GetResponseCode().GetValue()),
		CodeDetails:      response.GetResponseCodeDetails(),
		Flags:            flagsOf(common.GetResponseFlags()),
		Headers:          response.GetResponseHeaders(),
		Trailers:         response.GetResponseTrailers(),
		Size:             int64(response.GetResponseBodyBytes()),
		TotalSize:        int64(response.GetResponseBodyBytes() + response.GetResponseHeadersBytes()),
		Metadata:         common.GetMetadata().GetFilterMetadata(),
	}
	if original := request.GetOriginalPath(); original != "" {
		end.Path = original
	}
	if d := common.GetDuration(); d != nil {
		end.Duration = new(d.AsDuration())
	}
	end.GRPCStatus = grpcStatusOf(end)
	return end
}

// methodOf returns a method's name. Envoy's log has no names of methods that HTTP
// itself does not define, such as PROPFIND.
func methodOf(m corev3.RequestMethod) string {
	if m == corev3.RequestMethod_METHOD_UNSPECIFIED {
		return ""
	}
	return m.String()
}

// protocols has the names of HTTP versions, as in checks.
var protocols = map[logdatav3.HTTPAccessLogEntry_HTTPVersion]string{
	logdatav3.HTTPAccessLogEntry_HTTP10: "HTTP/1.0",
	logdatav3.HTTPAccessLogEntry_HTTP11: "HTTP/1.1",
	logdatav3.HTTPAccessLogEntry_HTTP2:  "HTTP/2",
	logdatav3.HTTPAccessLogEntry_HTTP3:  "HTTP/3",
}

// grpcStatusOf returns the grpc-status of a response: a trailer, or a header if
// the response has trailers only. It is nil if there is none.
func grpcStatusOf(end *policy.End) *int64 {
	text, ok := end.Trailers["grpc-status"]
	if !ok {
		text = end.Headers["grpc-status"]
	}
	n, err := strconv.ParseInt(text, 10, 32)
	if err != nil || n < 0 {
		return nil
	}
	return &n
}

// flagsOf returns the short names of response flags, in the order of Envoy's
// documentation of %RESPONSE_FLAGS%.
func flagsOf(f *logdatav3.ResponseFlags) (names []string) {
	if f == nil {
		return nil
	}
	for _, flag := range []struct {
		isSet bool
		name  string
	}{
		{f.FailedLocalHealthcheck, "LH"},
		{f.NoHealthyUpstream, "UH"},
		{f.UpstreamRequestTimeout, "UT"},
		{f.LocalReset, "LR"},
		{f.UpstreamRemoteReset, "UR"},
		{f.UpstreamConnectionFailure, "UF"},
		{f.UpstreamConnectionTermination, "UC"},
		{f.UpstreamOverflow, "UO"},
		{f.NoRouteFound, "NR"},
		{f.DelayInjected, "DI"},
		{f.FaultInjected, "FI"},
		{f.RateLimited, "RL"},
		{f.UnauthorizedDetails != nil, "UAEX"},
		{f.RateLimitServiceError, "RLSE"},
		{f.DownstreamConnectionTermination, "DC"},
		{f.UpstreamRetryLimitExceeded, "URX"},
		{f.StreamIdleTimeout, "SI"},
		{f.InvalidEnvoyRequestHeaders, "IH"},
		{f.DownstreamProtocolError, "DPE"},
		{f.UpstreamMaxStreamDurationReached, "UMSDR"},
		{f.ResponseFromCacheFilter, "RFCF"},
		{f.NoFilterConfigFound, "NFCF"},
		{f.DurationTimeout, "DT"},
		{f.UpstreamProtocolError, "UPE"},
		{f.NoClusterFound, "NC"},
		{f.OverloadManager, "OM"},
		{f.DnsResolutionFailure, "DF"},
		{f.DownstreamRemoteReset, "DR"},
	} {
		if flag.isSet {
			names = append(names, flag.name)
		}
	}
	return names
}
