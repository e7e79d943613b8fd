package authz

import (
	"context"
	"errors"
	"maps"
	"slices"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/timestamppb"
	"pgregory.net/rapid"

	"github.com/sluiceproxy/sluice/limiter/policy"
)

// Check encodes a check, answers it and decodes the answer, so that tests use
// messages and cover the wire format both ways.
func (s *Server) Check(ctx context.Context, check *authv3.CheckRequest) (*authv3.CheckResponse, error) {
	wire, err := proto.Marshal(check)
	if err != nil {
		return nil, err
	}
	answer, err := s.check(ctx, &rawRequest{string(wire)})
	if err != nil {
		return nil, err
	}
	var response authv3.CheckResponse
	return &response, proto.Unmarshal(answer.wire, &response)
}

// agree compares parse with the generated code.
func agree(t interface{ Errorf(string, ...any) }, wire []byte) (isCheck, isFast bool) {
	var check authv3.CheckRequest
	got, _, err := parse(string(wire))
	if proto.Unmarshal(wire, &check) != nil {
		// parse does not look into the fields that it skips, so it may accept
		// some invalid checks. For the others it returns its errors.
		if err != nil && !errors.Is(err, errNoCheck) && !errors.Is(err, errNoHTTP) {
			t.Errorf("%q: %v", wire, err)
		}
		return false, false
	}
	want, wantErr := requestOf(&check)
	if !errors.Is(err, wantErr) {
		t.Errorf("%q: %v, want %v", wire, err, wantErr)
	}
	if wantErr != nil {
		return true, false
	}
	if !cmp.Equal(got, want, protocmp.Transform(), cmp.Transformer("maps", func(m map[string]string) map[string]string {
		if len(m) == 0 {
			return nil
		}
		return m
	})) {
		t.Errorf("%q: %s", wire, cmp.Diff(got, want, protocmp.Transform()))
	}
	_, isFast = parseFast(string(wire), &policy.Request{})
	return true, isFast
}

// parse reads checks as the generated code does: with and without each field,
// and in two pieces, which protobuf merges.
func TestParseAgrees(t *testing.T) {
	usual := []string{"", "x", "/v1/orders?page=2", string(make([]byte, 300))}
	text := rapid.OneOf(rapid.StringN(0, 20, -1), rapid.SampledFrom(usual))
	texts := rapid.MapOfN(text, text, 0, 20)
	name := rapid.OneOf(text, rapid.SampledFrom([]string{"a", "A", "cookie", "Cookie", "x-api-key"}))
	fast := 0
	rapid.Check(t, func(t *rapid.T) {
		maybe := func(what string) bool { return rapid.IntRange(0, 9).Draw(t, what) > 0 }
		seldom := func(what string) bool { return rapid.IntRange(0, 19).Draw(t, what) == 0 }
		peer := func() *authv3.AttributeContext_Peer {
			p := &authv3.AttributeContext_Peer{
				Principal: text.Draw(t, "principal"),
				Service:   text.Draw(t, "service"),
				Labels:    texts.Draw(t, "labels"),
			}
			if maybe("address") {
				socket := &corev3.SocketAddress{
					Address:       text.Draw(t, "ip"),
					PortSpecifier: &corev3.SocketAddress_PortValue{PortValue: rapid.Uint32().Draw(t, "port")},
				}
				if seldom("named port") {
					socket.PortSpecifier = &corev3.SocketAddress_NamedPort{NamedPort: "http"}
				}
				p.Address = &corev3.Address{Address: &corev3.Address_SocketAddress{SocketAddress: socket}}
			}
			if seldom("pipe") {
				p.Address = &corev3.Address{Address: &corev3.Address_Pipe{Pipe: &corev3.Pipe{Path: "/x"}}}
			}
			return p
		}
		var wire []byte
		pieces := 1
		if seldom("two") {
			pieces = 2
		}
		for range pieces {
			a := &authv3.AttributeContext{}
			if maybe("source") {
				a.Source = peer()
			}
			if maybe("destination") {
				a.Destination = peer()
			}
			if maybe("request") {
				a.Request = &authv3.AttributeContext_Request{}
				if maybe("time") {
					a.Request.Time = &timestamppb.Timestamp{
						Seconds: rapid.Int64().Draw(t, "s"),
						Nanos:   rapid.Int32Range(0, 999_999_999).Draw(t, "ns"),
					}
				}
				if maybe("http") {
					a.Request.Http = &authv3.AttributeContext_HttpRequest{
						Id: "1", Method: text.Draw(t, "method"), Headers: texts.Draw(t, "headers"),
						Path: text.Draw(t, "path"), Host: text.Draw(t, "host"),
						Scheme: text.Draw(t, "scheme"), Query: text.Draw(t, "query"), Fragment: "f",
						Size:     rapid.Int64().Draw(t, "size"),
						Protocol: text.Draw(t, "protocol"), Body: text.Draw(t, "body"), RawBody: []byte("\xff"),
					}
					if rapid.Bool().Draw(t, "raw") {
						if maybe("raw only") {
							a.Request.Http.Headers = nil
						}
						a.Request.Http.HeaderMap = &corev3.HeaderMap{}
						for range rapid.IntRange(0, 20).Draw(t, "lines") {
							line := &corev3.HeaderValue{
								Key:      name.Draw(t, "name"),
								RawValue: []byte(rapid.StringN(0, 20, -1).Draw(t, "value") + "\xff"),
							}
							if seldom("sanitised") {
								line.Value, line.RawValue = text.Draw(t, "value"), nil
							}
							a.Request.Http.HeaderMap.Headers = append(a.Request.Http.HeaderMap.Headers, line)
						}
					}
				}
			}
			a.ContextExtensions = texts.Draw(t, "context")
			if seldom("metadata") {
				a.MetadataContext = &corev3.Metadata{FilterMetadata: map[string]*structpb.Struct{
					"f": {Fields: map[string]*structpb.Value{"a": structpb.NewNumberValue(1)}},
				}}
			}
			a.TlsSession = &authv3.AttributeContext_TLSSession{Sni: text.Draw(t, "sni")}
			piece, err := proto.Marshal(&authv3.CheckRequest{Attributes: a})
			if err != nil {
				t.Fatal(err)
			}
			wire = append(wire, piece...)
		}
		if _, isFast := agree(t, wire); isFast {
			fast++
		}
		// A truncated check causes no panic.
		agree(t, wire[:rapid.IntRange(0, len(wire)).Draw(t, "cut")])
	})
	if fast < 10 { // of a hundred; about a third are
		t.Errorf("parseFast read only %d", fast)
	}
}

// withoutBody removes the body and nothing else, in however many buffers the
// check comes. A truncated check stays invalid.
func TestWithoutBody(t *testing.T) {
	for _, isRaw := range []bool{false, true} {
		check := asEnvoySends(isRaw)
		write := proto.MarshalOptions{Deterministic: true} // maps are in one order
		bare, err := write.Marshal(check)
		if err != nil {
			t.Fatal(err)
		}
		check.Attributes.Request.Http.Body, check.Attributes.Request.Http.RawBody = "some body", []byte("\xff\xfe")
		wire, err := write.Marshal(check)
		if err != nil {
			t.Fatal(err)
		}
		for size := 1; size <= len(wire); size = size*3/2 + 1 {
			var data mem.BufferSlice
			for chunk := range slices.Chunk(wire, size) {
				data = append(data, mem.SliceBuffer(chunk))
			}
			if got := withoutBody(data); got != string(bare) {
				t.Fatalf("in buffers of %d bytes: %q\nwant %q", size, got, bare)
			}
		}
		for end := range wire {
			var with, without authv3.CheckRequest
			cut := wire[:end]
			err := proto.Unmarshal([]byte(withoutBody(mem.BufferSlice{mem.SliceBuffer(cut)})), &without)
			if (err == nil) != (proto.Unmarshal(cut, &with) == nil) {
				t.Errorf("cut to %d bytes: %v", end, err)
			}
		}
	}
}

// FuzzParseCheck parses any bytes, as a client of the socket may send them.
func FuzzParseCheck(f *testing.F) {
	check := checkOf()
	check.GetAttributes().GetRequest().Time = timestamppb.New(time.Unix(1_700_000_000, 5))
	wire, err := proto.Marshal(check)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(wire)
	f.Add([]byte("\x0a\x04\x0a\x02\x0a\x00"))
	f.Add([]byte("\x0a\x02\x22\x00"))
	f.Add([]byte("\x0a\x0a000\xff\xee\xf8\xc902\xff\xee\xf8\xc9020")) // a field that exceeds its message
	f.Fuzz(func(t *testing.T, wire []byte) {
		text := string(wire)
		if cost := allocates(func() { _, _, _ = parse(text) }); cost > mayAllocate(len(wire)) {
			t.Errorf("%q: %d bytes are allocated for %d", wire, cost, len(wire))
		}
		data := mem.BufferSlice{mem.SliceBuffer(wire)}
		if cost := allocates(func() { withoutBody(data) }); cost > 64<<10+4*len(wire) {
			t.Errorf("%q: without its body %d bytes are allocated for %d", wire, cost, len(wire))
		}
		if _, isFast := agree(t, wire); !isFast {
			return // groups are read by the generated code only
		}
		with, _, err := parse(string(wire))
		without, _, err2 := parse(withoutBody(mem.BufferSlice{mem.SliceBuffer(wire)}))
		if err == nil && (err2 != nil || !cmp.Equal(with, without, protocmp.Transform())) {
			t.Errorf("%q without its body: %v, %s", wire, err2, cmp.Diff(with, without, protocmp.Transform()))
		}
	})
}

// asEnvoySends returns a browser's request as Envoy sends it with the shipped
// filter chain: header by header, and with empty metadata. If isRaw is false,
// it is what Envoy sends without encode_raw_headers.
func asEnvoySends(isRaw bool) *authv3.CheckRequest {
	check := checkOf(
		":authority", "shop.example.com", ":path", "/v1/orders?page=2", ":method", "GET", ":scheme", "https",
		"user-agent", "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) "+
			"Chrome/140.0.0.0 Safari/537.36",
		"accept", "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,*/*;q=0.8",
		"accept-encoding", "gzip, deflate, br, zstd",
		"accept-language", "en-GB,en;q=0.9", "cookie", "session=0123456789abcdef0123456789abcdef; theme=dark",
		"referer", "https://shop.example.com/",
		"sec-ch-ua-platform", `"Linux"`, "sec-fetch-mode", "navigate", "x-api-key", "0123456789abcdef0123456789abcdef",
		"x-request-id", "b4bda79a-8746-42bd-a76b-a81165877d54",
		"x-forwarded-for", "203.0.113.7", "x-forwarded-proto", "https",
		"x-envoy-external-address", "203.0.113.7",
	)
	a := check.GetAttributes()
	a.Destination = address("10.0.0.2", 8443)
	a.MetadataContext, a.RouteMetadataContext = &corev3.Metadata{}, &corev3.Metadata{}
	a.Request.Time = timestamppb.New(time.Unix(1_700_000_000, 5))
	http := a.Request.Http
	http.Path, http.Id = "/v1/orders?page=2", "8214536076756794993"
	if isRaw {
		http.HeaderMap = &corev3.HeaderMap{}
		for _, name := range slices.Sorted(maps.Keys(http.Headers)) {
			line := &corev3.HeaderValue{Key: name, RawValue: []byte(http.Headers[name])}
			http.HeaderMap.Headers = append(http.HeaderMap.Headers, line)
		}
		http.Headers = nil
	}
	return check
}

// parseFast reads what Envoy sends, with headers and with header_map, and the
// results are equal.
func TestParseIsFast(t *testing.T) {
	var read [2]*policy.Request
	for i, isRaw := range []bool{false, true} {
		wire, err := proto.Marshal(asEnvoySends(isRaw))
		if err != nil {
			t.Fatal(err)
		}
		if _, isFast := agree(t, wire); !isFast {
			t.Errorf("with header_map %v, parseFast does not read it", isRaw)
		}
		if read[i], _, err = parse(string(wire)); err != nil {
			t.Fatal(err)
		}
	}
	if diff := cmp.Diff(read[0], read[1]); diff != "" {
		t.Error(diff)
	}
}

// BenchmarkParse compares the generated code with parse, with headers and with
// header_map.
//
//	go test ./authz -run '^$' -bench Parse
func BenchmarkParse(b *testing.B) {
	for name, isRaw := range map[string]bool{"headers": false, "header_map": true} {
		b.Run(name, func(b *testing.B) { benchmarkParse(b, asEnvoySends(isRaw)) })
	}
}

func benchmarkParse(b *testing.B, check *authv3.CheckRequest) {
	wire, err := proto.Marshal(check)
	if err != nil {
		b.Fatal(err)
	}
	b.Run("generated", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			var check authv3.CheckRequest
			if err := proto.Unmarshal(wire, &check); err != nil {
				b.Fatal(err)
			}
			if _, err := requestOf(&check); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("parse", func(b *testing.B) {
		text := string(wire)
		b.ReportAllocs()
		for b.Loop() {
			if _, _, err := parse(text); err != nil {
				b.Fatal(err)
			}
		}
	})
}
