package authz

import (
	"maps"
	"slices"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	logdatav3 "github.com/envoyproxy/go-control-plane/envoy/data/accesslog/v3"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/timestamppb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/sluiceproxy/sluice/limiter/policy"
)

// anEntry is an entry with all that is read, and with some that is not.
func anEntry(t testing.TB) *logdatav3.HTTPAccessLogEntry {
	t.Helper()
	fields := func(of map[string]any) *structpb.Struct {
		s, err := structpb.NewStruct(of)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	return &logdatav3.HTTPAccessLogEntry{
		ProtocolVersion: logdatav3.HTTPAccessLogEntry_HTTP2,
		CommonProperties: &logdatav3.AccessLogCommon{
			DownstreamRemoteAddress: &corev3.Address{Address: &corev3.Address_Pipe{Pipe: &corev3.Pipe{Path: "p"}}},
			StartTime:               timestamppb.New(time.Unix(5, 6)), Duration: durationpb.New(1001 * time.Millisecond),
			ResponseFlags: &logdatav3.ResponseFlags{
				NoHealthyUpstream: true, DownstreamConnectionTermination: true,
				UnauthorizedDetails: &logdatav3.ResponseFlags_Unauthorized{},
			},
			AccessLogType: logdatav3.AccessLogType_DownstreamEnd,
			Metadata: &corev3.Metadata{FilterMetadata: map[string]*structpb.Struct{
				"a":                            fields(map[string]any{"settle": "first by name", "other": 1}),
				"envoy.filters.http.ext_authz": fields(map[string]any{"settle": "usual", "list": []any{"x"}}),
				"number":                       fields(map[string]any{"settle": 3}),
				"usage":                        fields(map[string]any{"total": 7}),
			}},
		},
		Request: &logdatav3.HTTPRequestProperties{
			RequestMethod: corev3.RequestMethod_POST, Scheme: "https", Authority: "h",
			Path: "/rewritten", OriginalPath: "/sent?q", UserAgent: "u", Port: wrapperspb.UInt32(443),
			RequestId: "id", RequestHeadersBytes: 30, RequestBodyBytes: 4,
			RequestHeaders: map[string]string{"x": "y"},
		},
		Response: &logdatav3.HTTPResponseProperties{
			ResponseCode: wrapperspb.UInt32(200), ResponseCodeDetails: "via_upstream", ResponseHeadersBytes: 20,
			ResponseBodyBytes: 7, ResponseHeaders: map[string]string{"grpc-status": "3", "x-usage": "5"},
			ResponseTrailers: map[string]string{"t": "u"},
		},
	}
}

func encoded(t testing.TB, m proto.Message) string {
	t.Helper()
	wire, err := proto.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return string(wire)
}

func TestParseEntry(t *testing.T) {
	entry, ok := parseEntry(encoded(t, anEntry(t)))
	if !ok {
		t.Fatal("it cannot be read")
	}
	if got, ok := entry.sealedTexts(); !ok || !slices.Equal(got, []string{"usual", "first by name"}) {
		t.Errorf("texts %q, %v", got, ok)
	}
	end := entry.finish()
	want := &policy.End{
		Method: "POST", Scheme: "https", Host: "h", Path: "/sent?q", Protocol: "HTTP/2", ID: "id",
		Time: time.Unix(5, 6).UTC(), Duration: new(1001 * time.Millisecond), RequestSize: 4, RequestTotalSize: 34,
		Code: 200, CodeDetails: "via_upstream", Flags: []string{"UH", "UAEX", "DC"}, GRPCStatus: new(int64(3)),
		Headers: map[string]string{"grpc-status": "3", "x-usage": "5"}, Trailers: map[string]string{"t": "u"},
		Size: 7, TotalSize: 27,
	}
	if diff := cmp.Diff(want, end, cmpopts.IgnoreFields(policy.End{}, "Metadata")); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	metadata := end.Metadata()
	if n := metadata["usage"].GetFields()["total"].GetNumberValue(); n != 7 {
		t.Errorf("metadata %v", metadata)
	}
	if end.Metadata()["usage"] != metadata["usage"] {
		t.Error("the metadata are decoded for each expression")
	}
	entry, ok = parseEntry(encoded(t, &logdatav3.HTTPAccessLogEntry{Response: &logdatav3.HTTPResponseProperties{
		ResponseHeaders: map[string]string{"grpc-status": "3"}, ResponseTrailers: map[string]string{"grpc-status": "5"},
	}}))
	if end := entry.finish(); !ok || end.Method != "" || end.Duration != nil || *end.GRPCStatus != 5 {
		t.Errorf("%v, %q, %v, %d", ok, end.Method, end.Duration, *end.GRPCStatus)
	}
}

// An entry may come in parts, each of which adds to those before it.
func TestParseEntryInParts(t *testing.T) {
	part := func(common *logdatav3.AccessLogCommon) string {
		return encoded(t, &logdatav3.HTTPAccessLogEntry{CommonProperties: common})
	}
	metadata := func(filter, text string) *corev3.Metadata {
		fields, err := structpb.NewStruct(map[string]any{"settle": text})
		if err != nil {
			t.Fatal(err)
		}
		return &corev3.Metadata{FilterMetadata: map[string]*structpb.Struct{filter: fields}}
	}
	wire := part(&logdatav3.AccessLogCommon{Metadata: metadata("a", "x"), Duration: &durationpb.Duration{Seconds: 1},
		ResponseFlags: &logdatav3.ResponseFlags{NoRouteFound: true}}) +
		part(&logdatav3.AccessLogCommon{Metadata: metadata("b", "y"), Duration: &durationpb.Duration{Nanos: 2}})
	var log logdatav3.HTTPAccessLogEntry
	if err := proto.Unmarshal([]byte(wire), &log); err != nil {
		t.Fatal(err)
	}
	entry, ok := parseEntry(wire)
	if got, texts := entry.sealedTexts(); !ok || !texts || !slices.Equal(got, generatedTexts(&log)) {
		t.Errorf("texts %q, want %q", got, generatedTexts(&log))
	}
	if diff := cmp.Diff(generatedEnd(&log), entry.finish(), cmpopts.IgnoreFields(policy.End{}, "Metadata"),
		cmpopts.EquateEmpty()); diff != "" {
		t.Errorf("-generated +read:\n%s", diff)
	}
	// A flag that a later part takes back, and one that is no varint.
	for _, flags := range []string{"\x48\x01\x48\x00", "\x4d\x01\x00\x00\x00", "\x4a\x00", "\x68\x01"} {
		common := "\x82\x01" + string(rune(len(flags))) + flags
		entry, ok := parseEntry("\x0a" + string(rune(len(common))) + common)
		if end := entry.finish(); !ok || len(end.Flags) != 0 {
			t.Errorf("%q: %v, %v", flags, ok, end.Flags)
		}
	}
}

// Metadata that are malformed are reported, not taken as absent.
func TestBrokenMetadata(t *testing.T) {
	for metadata, broken := range map[string]string{
		"\x0a\x07\x0a\x01a\x12\x05\x0a\x00": "text", // cut off
		"\x0a\x03\x0a\x01\xff":              "read", // no UTF-8, in a key that no text is below
	} {
		e := entry{metadata: metadata}
		_, ok := e.sealedTexts()
		if broken == "text" && ok {
			t.Errorf("%q: the texts are taken as read", metadata)
		}
		if e.finish().Metadata(); !e.isBroken {
			t.Errorf("%q: decoded", metadata)
		}
	}
}

// TestFlagNames checks that each response flag that Envoy's API has is known.
func TestFlagNames(t *testing.T) {
	fields := (&logdatav3.ResponseFlags{}).ProtoReflect().Descriptor().Fields()
	if len(flagNames) != fields.Len()+1 {
		t.Errorf("%d names for %d flags", len(flagNames)-1, fields.Len())
	}
	for i := range fields.Len() {
		number := fields.Get(i).Number()
		if int(number) >= len(flagNames) || flagNames[number] == "" {
			t.Errorf("%s has no name", fields.Get(i).Name())
		}
	}
}

// FuzzParseEntry compares what is read of an entry with what the generated code
// decodes.
func FuzzParseEntry(f *testing.F) {
	f.Add([]byte(encoded(f, anEntry(f))))
	f.Add([]byte(""))
	f.Add([]byte("\x0a\x03\x8a\x01\x00\x1a\x02\x12\x00\x22\x00"))
	f.Fuzz(func(t *testing.T, wire []byte) {
		_, _ = parseEntry(string(wire)) // whatever it is
		var log logdatav3.HTTPAccessLogEntry
		if (proto.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(wire, &log) != nil {
			return
		}
		// As Envoy would write it: each message in one piece.
		entry, ok := parseEntry(encoded(t, &log))
		if !ok {
			t.Fatalf("refused: %v", &log)
		}
		if entry.kind != log.GetCommonProperties().GetAccessLogType() {
			t.Errorf("type %v", entry.kind)
		}
		if got, ok := entry.sealedTexts(); !ok || !slices.Equal(got, generatedTexts(&log)) {
			t.Errorf("texts %q, %v, want %q", got, ok, generatedTexts(&log))
		}
		got, want := entry.finish(), generatedEnd(&log)
		if diff := cmp.Diff(want, got, cmpopts.IgnoreFields(policy.End{}, "Metadata"), cmpopts.EquateEmpty()); diff != "" {
			t.Errorf("-generated +read:\n%s", diff)
		}
		if diff := cmp.Diff(want.Metadata(), got.Metadata(), protocmp.Transform(), cmpopts.EquateNaNs(),
			cmpopts.EquateEmpty()); diff != "" && len(entry.metadata) <= maxUnmarshal {
			t.Errorf("metadata: -generated +read:\n%s", diff)
		}
	})
}

// generatedTexts is what sealedTexts returns, by the generated code.
func generatedTexts(log *logdatav3.HTTPAccessLogEntry) (texts []string) {
	const usual = "envoy.filters.http.ext_authz"
	all := log.GetCommonProperties().GetMetadata().GetFilterMetadata()
	names := slices.Sorted(maps.Keys(all))
	if i := slices.Index(names, usual); i > 0 {
		names = slices.Insert(slices.Delete(names, i, i+1), 0, usual)
	}
	for _, name := range names {
		if text := all[name].GetFields()["settle"].GetStringValue(); text != "" && len(texts) < maxTexts {
			texts = append(texts, text)
		}
	}
	return texts
}

// generatedEnd is what an entry says of the end of a request, by the generated
// code.
func generatedEnd(log *logdatav3.HTTPAccessLogEntry) *policy.End {
	common, request, response := log.GetCommonProperties(), log.GetRequest(), log.GetResponse()
	end := &policy.End{
		Scheme: request.GetScheme(), Host: request.GetAuthority(), Path: request.GetPath(), ID: request.GetRequestId(),
		Protocol: protocols[log.GetProtocolVersion()], Time: common.GetStartTime().AsTime(),
		RequestSize:      int64(request.GetRequestBodyBytes()),
		RequestTotalSize: int64(request.GetRequestBodyBytes() + request.GetRequestHeadersBytes()),
		Code:             int64(response.GetResponseCode().GetValue()),
		CodeDetails:      response.GetResponseCodeDetails(),
		Headers:          response.GetResponseHeaders(), Trailers: response.GetResponseTrailers(),
		Size:      int64(response.GetResponseBodyBytes()),
		TotalSize: int64(response.GetResponseBodyBytes() + response.GetResponseHeadersBytes()),
		Metadata:  common.GetMetadata().GetFilterMetadata,
	}
	if m := request.GetRequestMethod(); m != corev3.RequestMethod_METHOD_UNSPECIFIED {
		end.Method = m.String()
	}
	if original := request.GetOriginalPath(); original != "" {
		end.Path = original
	}
	if d := common.GetDuration(); d != nil {
		end.Duration = new(d.AsDuration())
	}
	flags := common.GetResponseFlags().ProtoReflect()
	for i := range flags.Descriptor().Fields().Len() {
		if flag := flags.Descriptor().Fields().Get(i); flags.Has(flag) {
			end.Flags = append(end.Flags, flagNames[flag.Number()])
		}
	}
	end.GRPCStatus = grpcStatusOf(end)
	return end
}
