package authz

import (
	"errors"
	"io"
	"runtime"
	"strings"
	"sync/atomic"
	"time"

	logdatav3 "github.com/envoyproxy/go-control-plane/envoy/data/accesslog/v3"
	logv3 "github.com/envoyproxy/go-control-plane/envoy/service/accesslog/v3"
	"go.opentelemetry.io/otel/trace"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/sluiceproxy/sluice/limiter"
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
	if len(wire) > maxLogEntry {
		s.report.notSettled()
		return
	}
	if entry, ok := parseEntry(wire); ok {
		s.ended(&entry)
	} else {
		s.report.notSettled()
	}
}

// ended settles a request by its entry in the access log.
func (s *Server) ended(entry *entry) {
	if t := entry.kind; t != logdatav3.AccessLogType_DownstreamEnd && t != logdatav3.AccessLogType_NotSet {
		return
	}
	texts, ok := entry.sealedTexts()
	if !ok {
		s.report.notSettled()
		return
	}
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
	now, end := time.Now(), entry.finish()
	for _, h := range all {
		cost, err := config.Settle(h.domain, h.limit, end, h.hold.Tokens)
		if entry.isBroken { // what it read
			s.report.notSettled()
			return
		}
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
