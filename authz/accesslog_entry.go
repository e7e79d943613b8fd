package authz

import (
	"cmp"
	"slices"
	"strconv"
	"sync"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	logdatav3 "github.com/envoyproxy/go-control-plane/envoy/data/accesslog/v3"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/sluiceproxy/sluice/limiter/policy"
)

// An entry of the access log is a large message, of which little is needed. The
// generated code decodes all of it and allocates an object for each message in it,
// which took half as long as a whole check. So entries are read from the wire
// format, as checks are (wire.go). Tests compare that with the generated code.

// Field numbers of the messages of an entry.
const (
	entryCommon   = 1 // of envoy.data.accesslog.v3.HTTPAccessLogEntry
	entryProtocol = 2
	entryRequest  = 3
	entryResponse = 4

	commonStart    = 5 // of AccessLogCommon
	commonFlags    = 16
	commonMetadata = 17
	commonDuration = 23
	commonKind     = 33

	loggedMethod       = 1 // of HTTPRequestProperties
	loggedScheme       = 2
	loggedAuthority    = 3
	loggedPath         = 5
	loggedID           = 9
	loggedOriginalPath = 10
	loggedHeaderBytes  = 11
	loggedBodyBytes    = 12

	responseCode        = 1 // of HTTPResponseProperties
	responseHeaderBytes = 2
	responseBodyBytes   = 3
	responseHeaders     = 4
	responseTrailers    = 5
	responseDetails     = 6

	filterMetadata = 1 // of envoy.config.core.v3.Metadata

	wrappedValue = 1 // of google.protobuf.UInt32Value

	flagDetails = 13 // of ResponseFlags: unauthorized_details
)

// entry is what is read of an HTTPAccessLogEntry. Its strings are parts of the
// encoded one.
type entry struct {
	kind     logdatav3.AccessLogType
	metadata string // an encoded envoy.config.core.v3.Metadata
	// isBroken says that metadata could not be decoded.
	isBroken bool
	end      policy.End

	method                      corev3.RequestMethod
	protocol                    logdatav3.HTTPAccessLogEntry_HTTPVersion
	originalPath                string
	flags                       uint64 // bit i is the field with the number i of ResponseFlags
	seconds                     int64  // of the duration
	nanos                       int32  // besides
	requestHeaders, requestBody uint64 // bytes
	headers, body               uint64 // bytes of the response
}

// parseEntry decodes an HTTPAccessLogEntry from its wire format. It reports not ok
// if the entry is malformed, as far as it is read.
func parseEntry(wire string) (e entry, ok bool) {
	e.end.Time = time.Unix(0, 0).UTC()
	log := message{rest: wire}
	for log.next() {
		switch log.number {
		case entryCommon:
			log.join(e.common(log.inner()))
		case entryProtocol:
			e.protocol = logdatav3.HTTPAccessLogEntry_HTTPVersion(log.integer())
		case entryRequest:
			log.join(e.request(log.inner()))
		case entryResponse:
			log.join(e.response(log.inner()))
		}
	}
	return e, !log.bad
}

func (e *entry) common(common message) message {
	for common.next() {
		switch common.number {
		case commonStart:
			common.join(fastTime(common.inner(), &e.end.Time))
		case commonFlags:
			flags := common.inner()
			for flags.next() {
				e.flag(&flags)
			}
			common.join(flags)
		case commonMetadata:
			e.metadata += common.data() // the parts of a message are one message
		case commonDuration:
			duration := common.inner()
			for duration.next() {
				switch duration.number {
				case timestampSeconds: // a Duration has the same fields
					e.seconds = int64(duration.integer())
				case timestampNanos:
					e.nanos = int32(duration.integer())
				}
			}
			common.join(duration)
			d := durationpb.Duration{Seconds: e.seconds, Nanos: e.nanos}
			e.end.Duration = new(d.AsDuration())
		case commonKind:
			e.kind = logdatav3.AccessLogType(common.integer())
		}
	}
	return common
}

// flag reads the current field of a ResponseFlags.
func (e *entry) flag(flags *message) {
	bit := uint64(1) << flags.number // 0 beyond 63
	switch {
	case flags.number >= len(flagNames):
	case flags.number == flagDetails:
		if flags.kind == protowire.BytesType { // a message, which is empty mostly
			e.flags |= bit
		}
	case flags.kind != protowire.VarintType: // unknown, as to the generated code
	case flags.value != 0:
		e.flags |= bit
	default:
		e.flags &^= bit
	}
}

func (e *entry) request(request message) message {
	for request.next() {
		switch request.number {
		case loggedMethod:
			e.method = corev3.RequestMethod(request.integer())
		case loggedScheme:
			e.end.Scheme = request.text()
		case loggedAuthority:
			e.end.Host = request.text()
		case loggedPath:
			e.end.Path = request.text()
		case loggedID:
			e.end.ID = request.text()
		case loggedOriginalPath:
			e.originalPath = request.text()
		case loggedHeaderBytes:
			e.requestHeaders = request.integer()
		case loggedBodyBytes:
			e.requestBody = request.integer()
		}
	}
	return request
}

func (e *entry) response(response message) message {
	for response.next() {
		switch response.number {
		case responseCode:
			code := response.inner()
			for code.next() {
				if code.number == wrappedValue {
					e.end.Code = int64(uint32(code.integer()))
				}
			}
			response.join(code)
		case responseHeaderBytes:
			e.headers = response.integer()
		case responseBodyBytes:
			e.body = response.integer()
		case responseHeaders:
			response.entry(&e.end.Headers)
		case responseTrailers:
			response.entry(&e.end.Trailers)
		case responseDetails:
			e.end.CodeDetails = response.text()
		}
	}
	return response
}

// maxTexts is how many texts of an entry are tried at most.
const maxTexts = 4

// sealedTexts returns the texts in the metadata that may be sealed, first that of
// the filter with ext_authz's usual name. In meshes the filter has other names,
// and another filter may put something into metadata under the same key. It
// reports not ok if the metadata are malformed.
func (e *entry) sealedTexts() (texts []string, ok bool) {
	const usual = "envoy.filters.http.ext_authz"
	type found struct{ filter, text string }
	var all []found
	metadata := message{rest: e.metadata}
	for metadata.next() {
		if metadata.number != filterMetadata {
			continue
		}
		filter, fields := metadata.named()
		text := settleIn(&fields)
		if metadata.join(fields); text != "" {
			all = append(all, found{filter, text})
		}
	}
	slices.SortFunc(all, func(a, b found) int {
		switch usual {
		case a.filter:
			return -1
		case b.filter:
			return 1
		}
		return cmp.Compare(a.filter, b.filter)
	})
	for _, f := range all[:min(len(all), maxTexts)] {
		texts = append(texts, f.text)
	}
	return texts, !metadata.bad
}

// settleIn returns the string of settleField in an encoded Struct; empty if it has
// none.
func settleIn(fields *message) (text string) {
	for fields.next() {
		if fields.number != structFields {
			continue
		}
		name, value := fields.named()
		for name == settleField && value.next() {
			if value.number == valueString {
				text = value.data()
			}
		}
		fields.join(value)
	}
	return text
}

// finish returns what the entry says of the end of a request, once all of it is
// read.
func (e *entry) finish() *policy.End {
	end := &e.end
	// Envoy's log has no names of methods that HTTP itself does not define, such as
	// PROPFIND.
	if e.method != corev3.RequestMethod_METHOD_UNSPECIFIED {
		end.Method = e.method.String()
	}
	end.Protocol = protocols[e.protocol]
	if e.originalPath != "" {
		end.Path = e.originalPath
	}
	end.RequestSize, end.RequestTotalSize = int64(e.requestBody), int64(e.requestBody+e.requestHeaders)
	end.Size, end.TotalSize = int64(e.body), int64(e.body+e.headers)
	for number, name := range flagNames {
		if e.flags&(1<<number) != 0 {
			end.Flags = append(end.Flags, name)
		}
	}
	end.GRPCStatus = grpcStatusOf(end)
	end.Metadata = sync.OnceValue(func() map[string]*structpb.Struct {
		var metadata corev3.Metadata
		if unmarshal(e.metadata, &metadata) != nil {
			e.isBroken = true
			return nil
		}
		return metadata.GetFilterMetadata()
	})
	return end
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

// flagNames has the short names of response flags, as in Envoy's documentation of
// %RESPONSE_FLAGS%, by the numbers of the fields of ResponseFlags.
// The one at flagDetails is a message.
var flagNames = [...]string{
	1: "LH", 2: "UH", 3: "UT", 4: "LR", 5: "UR", 6: "UF", 7: "UC", 8: "UO", 9: "NR", 10: "DI", 11: "FI", 12: "RL",
	13: "UAEX", 14: "RLSE", 15: "DC", 16: "URX", 17: "SI", 18: "IH", 19: "DPE", 20: "UMSDR", 21: "RFCF", 22: "NFCF",
	23: "DT", 24: "UPE", 25: "NC", 26: "OM", 27: "DF", 28: "DR",
}
