package main

import (
	"bytes"
	"os"
	"strconv"
	"strings"
	"testing"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	logdatav3 "github.com/envoyproxy/go-control-plane/envoy/data/accesslog/v3"
	logv3 "github.com/envoyproxy/go-control-plane/envoy/service/accesslog/v3"
	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/sluiceproxy/sluice/authz"
)

// openLog opens an access log of a name; without an identifier if the name
// is empty.
func openLog(t *testing.T, conn *grpc.ClientConn, name string) logv3.AccessLogService_StreamAccessLogsClient {
	t.Helper()
	stream, err := logv3.NewAccessLogServiceClient(conn).StreamAccessLogs(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if name != "" {
		if err := stream.Send(&logv3.StreamAccessLogsMessage{
			Identifier: &logv3.StreamAccessLogsMessage_Identifier{LogName: name},
		}); err != nil {
			t.Fatal(err)
		}
	}
	return stream
}

// endWith is the end of a request with a sealed text; without metadata if it is
// empty.
func endWith(text string) *logdatav3.HTTPAccessLogEntry {
	common := &logdatav3.AccessLogCommon{
		AccessLogType: logdatav3.AccessLogType_DownstreamEnd, RouteName: strings.Repeat("r", 200),
	}
	if text != "" {
		common.Metadata = &corev3.Metadata{FilterMetadata: map[string]*structpb.Struct{"envoy.filters.http.ext_authz": {
			Fields: map[string]*structpb.Value{"settle": structpb.NewStringValue(text)},
		}}}
	}
	return &logdatav3.HTTPAccessLogEntry{CommonProperties: common}
}

// sealedBy returns the sealed text of a check; empty if it holds nothing.
func sealedBy(t *testing.T, conn *grpc.ClientConn) string {
	t.Helper()
	answer, err := authv3.NewAuthorizationClient(conn).Check(t.Context(), checkRequest("203.0.113.1", "GET", "/", nil))
	if err != nil {
		t.Fatal(err)
	}
	return answer.GetDynamicMetadata().GetFields()["settle"].GetStringValue()
}

func logOf(entries ...*logdatav3.HTTPAccessLogEntry) *logv3.StreamAccessLogsMessage {
	return &logv3.StreamAccessLogsMessage{LogEntries: &logv3.StreamAccessLogsMessage_HttpLogs{
		HttpLogs: &logv3.StreamAccessLogsMessage_HTTPAccessLogEntries{LogEntry: entries},
	}}
}

// TestAttackAccessLog checks that whatever is sent as an access log gives nobody
// a token, neither fills the memory nor ends the streams of others, and that an
// honest log may be of any length.
func TestAttackAccessLog(t *testing.T) {
	part := 10
	if os.Getenv("SLUICE_LONG") != "" {
		part = 1
	}
	const config = "limits: [{name: settling, rate: 1000/d, cost: 10, settle: 4, match: {paths: [/]}}]\n"
	p := startShipped(t, "--config", file(t, "sluice.yaml", config))
	result := func(limit, result string) int {
		return p.counted(`sluice_settlements_total\{limit="` + limit + `",result="` + result + `"\}`)
	}
	honest := dialGRPC(t, p.grpc, "127.0.0.2")
	log := openLog(t, honest, "sluice")
	settled := 0
	// works checks that the honest log settles.
	works := func(after string) {
		t.Helper()
		settled++
		if err := log.Send(logOf(endWith(sealedBy(t, honest)))); err != nil {
			t.Fatalf("after %s: %v", after, err)
		}
		eventually(t, "a settlement after "+after, func() bool { return result("settling", "returned") == settled })
		t.Logf("after %s: %d MiB at most", after, peak(t, p.cmd.Process.Pid)>>20)
	}
	works("nothing")

	// A log lasts for days: what was read of it does not count.
	many := make([]*logdatav3.HTTPAccessLogEntry, 1000)
	for i := range many {
		many[i] = endWith("")
	}
	for range 1000 / part {
		if err := log.Send(logOf(many...)); err != nil {
			t.Fatal(err)
		}
	}
	works("a million entries")

	// While no entry comes, the checks on the same connection do not count as what
	// the log holds: the connection stays, with more than the budget received.
	large := checkRequest("203.0.113.1", "GET", "/other", map[string]string{"x-large": strings.Repeat("x", 30_000)})
	for range 4000 / part {
		if got := check(t, honest, large); got != "ok" && got != "429" {
			t.Fatal(got)
		}
	}
	if n := p.counted(`sluice_grpc_connections_closed_total\{reason="memory"\}`); n != 0 {
		t.Errorf("%d connections closed, and nobody attacked", n)
	}
	log = openLog(t, honest, "sluice") // as Envoy does when a stream has ended
	works("checks beside a quiet log")

	// The texts of others, of another process, and again.
	text := sealedBy(t, honest)
	foreign := sealedBy(t, dial(t, startSluice(t, "--config", file(t, "sluice.yaml", config)).grpc))
	if foreign == "" {
		t.Fatal("the other sluice seals nothing")
	}
	hostile := dialGRPC(t, p.grpc, "127.0.0.3")
	for _, name := range []string{"", "another"} { // without an identifier, and of another name
		if err := openLog(t, hostile, name).Send(logOf(endWith(text))); err != nil {
			t.Fatal(err)
		}
	}
	stream := openLog(t, hostile, "sluice")
	if err := stream.Send(&logv3.StreamAccessLogsMessage{LogEntries: &logv3.StreamAccessLogsMessage_TcpLogs{
		TcpLogs: &logv3.StreamAccessLogsMessage_TCPAccessLogEntries{
			LogEntry: []*logdatav3.TCPAccessLogEntry{{CommonProperties: endWith(text).GetCommonProperties()}},
		},
	}}); err != nil {
		t.Fatal(err)
	}
	for _, forged := range []string{foreign, "x", text + "AA", strings.Repeat("A", 100_000)} {
		if err := stream.Send(logOf(endWith(forged))); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "four forged texts", func() bool { return result("", "forged") == 4 })
	works("forged texts")
	settled++
	for range 1000 {
		if err := stream.Send(logOf(endWith(text))); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "999 replays", func() bool {
		return result("settling", "repeated") == 999 && result("settling", "returned") == settled
	})
	works("replays")

	// Entries and messages that are too large, and of many small parts.
	long := endWith(strings.Repeat("A", 200_000))
	if err := stream.Send(logOf(long, long)); err != nil {
		t.Fatal(err)
	}
	eventually(t, "two entries that are too large", func() bool { return result("", "failed") == 2 })
	parts := protowire.AppendBytes(protowire.AppendTag(nil, 2, protowire.BytesType), // request
		bytes.Repeat([]byte("\x6a\x00"), 60_000)) // headers
	entry, err := proto.Marshal(endWith("x"))
	if err != nil {
		t.Fatal(err)
	}
	entries := protowire.AppendBytes(protowire.AppendTag(nil, 1, protowire.BytesType), append(entry, parts...))
	message := protowire.AppendBytes(protowire.AppendTag(nil, 2, protowire.BytesType), bytes.Repeat(entries, 7))
	for range 20 {
		many := dialGRPC(t, p.grpc, "127.0.0.4")
		stream, err := many.NewStream(t.Context(), &grpc.StreamDesc{ClientStreams: true}, authz.AccessLogMethod,
			grpc.ForceCodecV2(rawCodec{}))
		if err != nil {
			t.Fatal(err)
		}
		identifier, err := proto.Marshal(&logv3.StreamAccessLogsMessage{
			Identifier: &logv3.StreamAccessLogsMessage_Identifier{LogName: "sluice"},
		})
		if err != nil {
			t.Fatal(err)
		}
		for range 20 / part {
			if err := stream.SendMsg(append(identifier, message...)); err != nil {
				break // it may be closed
			}
		}
	}
	log = openLog(t, honest, "sluice")
	works("entries of many parts")
	if err := stream.Send(logOf(entriesOf(2 << 20)...)); err != nil {
		t.Fatal(err)
	}
	if err := stream.RecvMsg(new(logv3.StreamAccessLogsResponse)); status.Code(err) != codes.InvalidArgument {
		t.Errorf("a message of 2 MiB: %v", err)
	}
	for i := range 64 {
		if c := dialHTTP2(p.grpc, "127.0.0."+strconv.Itoa(5+i%4)); c != nil {
			t.Cleanup(func() { _ = c.Close() })
			for range 8 / min(part, 8) {
				if stream, err := c.call(authz.AccessLogMethod); err != nil || c.half(stream, 1<<20) != nil {
					break // it may be closed
				}
			}
		}
	}
	log = openLog(t, honest, "sluice") // the stream from before may have been ended
	works("half messages")
	if n := p.counted(`sluice_tokens_returned_total\{limit="settling"\}`); n != 6*settled {
		t.Errorf("%d tokens returned by %d settlements", n, settled)
	}
	p.wantWithin(t, shipped)
}

// entriesOf returns entries of n bytes together.
func entriesOf(n int) (all []*logdatav3.HTTPAccessLogEntry) {
	for range n / 10_000 {
		all = append(all, &logdatav3.HTTPAccessLogEntry{CommonProperties: &logdatav3.AccessLogCommon{
			RouteName: strings.Repeat("r", 10_000),
		}})
	}
	return all
}
