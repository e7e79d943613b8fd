package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"
)

// http2Client writes HTTP/2 frames as no well-behaved client would. It obeys
// the flow control of the server, because its calls would fail otherwise.
type http2Client struct {
	net.Conn
	frames *http2.Framer
	next   uint32 // stream

	mu     sync.Mutex
	more   *sync.Cond
	credit map[uint32]int // bytes that it may still send, by stream; 0 is the connection
	ended  bool
}

// dialHTTP2 opens an HTTP/2 connection from an address, and discards what the
// server sends. It returns nil if the connection is refused.
func dialHTTP2(addr, from string) *http2Client {
	conn, err := (&net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}}).Dial("tcp", addr)
	if err != nil {
		return nil
	}
	_ = conn.SetWriteDeadline(time.Now().Add(within))
	c := &http2Client{Conn: conn, frames: http2.NewFramer(conn, conn), next: 1, credit: map[uint32]int{0: 65535}}
	c.more = sync.NewCond(&c.mu)
	_, _ = io.WriteString(conn, http2.ClientPreface)
	_ = c.frames.WriteSettings()
	_ = c.frames.WriteSettingsAck()
	go func() {
		for {
			f, err := c.frames.ReadFrame()
			c.mu.Lock()
			if w, ok := f.(*http2.WindowUpdateFrame); ok {
				c.credit[w.StreamID] += int(w.Increment)
			}
			c.ended = err != nil
			c.more.Broadcast()
			c.mu.Unlock()
			if err != nil {
				return
			}
		}
	}()
	return c
}

// send sends data when the server is ready for all of it.
func (c *http2Client) send(stream uint32, data []byte) error {
	c.mu.Lock()
	for !c.ended && (c.credit[0] < len(data) || c.credit[stream]+65535 < len(data)) {
		c.more.Wait()
	}
	c.credit[0] -= len(data)
	c.credit[stream] -= len(data)
	c.mu.Unlock()
	return c.frames.WriteData(stream, false, data)
}

// check begins a check and returns its stream. The caller writes the message.
func (c *http2Client) check() (uint32, error) {
	return c.call("/envoy.service.auth.v3.Authorization/Check")
}

// call begins a call of a method and returns its stream.
func (c *http2Client) call(method string) (uint32, error) {
	var block bytes.Buffer
	e := hpack.NewEncoder(&block)
	for _, f := range [][2]string{
		{":method", "POST"}, {":scheme", "http"}, {":path", method},
		{":authority", "sluice"},
		{"content-type", "application/grpc"}, {"te", "trailers"},
	} {
		if err := e.WriteField(hpack.HeaderField{Name: f[0], Value: f[1], Sensitive: true}); err != nil {
			return 0, err
		}
	}
	stream := c.next
	c.next += 2
	return stream, c.frames.WriteHeaders(
		http2.HeadersFrameParam{StreamID: stream, BlockFragment: block.Bytes(), EndHeaders: true},
	)
}

// half writes the first n bytes of a message whose length prefix says 2n.
func (c *http2Client) half(stream uint32, n int) error {
	message := binary.BigEndian.AppendUint32([]byte{0}, uint32(2*n))
	message = append(message, make([]byte, n)...)
	for len(message) > 0 {
		frame := message[:min(len(message), 16<<10)]
		if err := c.send(stream, frame); err != nil {
			return err
		}
		message = message[len(frame):]
	}
	return nil
}

// TestAttackGRPC checks that idle connections, incomplete messages and calls
// that are reset at once neither fill the memory nor delay the answers to
// Envoy.
func TestAttackGRPC(t *testing.T) {
	part := 10
	if os.Getenv("SLUICE_LONG") != "" {
		part = 1
	}
	p := startShipped(t, "--config", file(t, "sluice.yaml", manyLimits(200)))
	conn := dialGRPC(t, p.grpc, "127.0.0.2")

	// Envoy sends checks all the time.
	stop := make(chan struct{})
	var asked, failed atomic.Int64
	var slowest atomic.Int64
	var envoy sync.WaitGroup
	t.Cleanup(func() { envoy.Wait() })
	for range 4 {
		envoy.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				began := time.Now()
				if got := check(t, conn, checkRequest("203.0.113.1", "GET", "/1", nil)); got != "ok" {
					failed.Add(1)
					t.Errorf("a check: %s", got)
					return
				}
				asked.Add(1)
				slowest.Store(max(slowest.Load(), int64(time.Since(began))))
			}
		})
	}
	phase := func(name string, attack func()) {
		asked.Store(0)
		slowest.Store(0)
		attack()
		at := asked.Load()
		eventually(t, "20 more checks", func() bool { return asked.Load() >= at+20 })
		t.Logf(
			"%s: %d checks, the slowest %v, %d MiB at most", name, asked.Load(), time.Duration(slowest.Load()),
			peak(t, p.cmd.Process.Pid)>>20,
		)
	}
	// Each attack comes from an address of its own. Otherwise its new
	// connections would only replace its old ones.
	clients := func(from string, n int, f func(c *http2Client) error) {
		var wg sync.WaitGroup
		for range n {
			wg.Go(func() {
				if c := dialHTTP2(p.grpc, from); c != nil {
					t.Cleanup(func() { _ = c.Close() })
					_ = f(c) // it may be closed
				}
			})
		}
		wg.Wait()
	}
	phase("idle", func() {
		hold(t, 5000/part, p.grpc, "")
		for range 50 / part {
			clients("127.0.0.3", 100, func(*http2Client) error { return nil })
		}
	})
	// This attack is first, because connections that hold much are closed for
	// those that hold more.
	phase("elements", func() {
		conn := dialGRPC(t, p.grpc, "127.0.0.8")
		// The second form takes the slower path, where the sum of the messages
		// matters and not the size of one.
		for _, form := range []struct {
			size, times int
			rest        string
		}{{15 << 20 / part, 1, ""}, {120 << 10, 10 / part, "\x7b\x7c"}} {
			for _, path := range [][]protowire.Number{{1, 4, 2, 13}, {1, 11, 1, 2, 1, 2, 6}, {1, 1}} {
				message := bytes.Repeat([]byte("\x0a\x00"), form.size/2)
				for _, number := range slices.Backward(path) {
					message = protowire.AppendBytes(protowire.AppendTag(nil, number, protowire.BytesType), message)
				}
				message = append(message, form.rest...)
				for range form.times {
					err := conn.Invoke(
						t.Context(), "/envoy.service.auth.v3.Authorization/Check", message, new([]byte), grpc.ForceCodecV2(rawCodec{}),
					)
					if code := status.Code(err); code != codes.ResourceExhausted && code != codes.OK &&
						code != codes.Unavailable { // it may be too slow
						t.Errorf("%v: %v", path, err)
					}
				}
			}
		}
	})
	phase("large halves", func() {
		clients("127.0.0.4", 5, func(c *http2Client) error {
			for range 100 {
				stream, err := c.check()
				if err != nil {
					return err
				}
				if err := c.half(stream, 512<<10); err != nil {
					return err
				}
			}
			return nil
		})
	})
	phase("small halves", func() {
		for _, connections := range []int{1, 64} {
			clients("127.0.0.5", connections, func(c *http2Client) error {
				for range 4096 / connections {
					stream, err := c.check()
					if err != nil {
						return err
					}
					if err := c.half(stream, 900); err != nil {
						return err
					}
				}
				return nil
			})
		}
	})
	phase("resets", func() {
		clients("127.0.0.6", 10, func(c *http2Client) error {
			for range 10_000 / part {
				stream, err := c.check()
				if err != nil {
					return err
				}
				if err := c.frames.WriteRSTStream(stream, http2.ErrCodeCancel); err != nil {
					return err
				}
			}
			return nil
		})
	})
	phase("a message that does not come", func() {
		clients("127.0.0.7", 1, func(c *http2Client) error {
			stream, err := c.check()
			if err != nil {
				return err
			}
			return c.half(stream, 10)
		})
		eventually(t, "a closed connection", func() bool {
			_, metrics := get(t, "http://"+p.metrics+"/metrics")
			return !strings.Contains(metrics, `sluice_grpc_connections_closed_total{reason="time"} 0`)
		})
	})
	close(stop)
	envoy.Wait()
	if got := fmt.Sprint(failed.Load()); got != "0" {
		t.Errorf("%s checks failed", got)
	}
	if !strings.Contains(p.logged(), "a message did not arrive in time") {
		t.Errorf("the log says nothing:\n%s", p.logged())
	}
	p.wantWithin(t, shipped)
}

// dialGRPC is dial from another loopback address.
func dialGRPC(t *testing.T, addr, from string) *grpc.ClientConn {
	t.Helper()
	dialer := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}}
	conn, err := grpc.NewClient(
		"passthrough:///"+addr,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(
			func(ctx context.Context, addr string) (net.Conn, error) { return dialer.DialContext(ctx, "tcp", addr) },
		),
	)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

// rawCodec is a gRPC codec for messages that are already encoded.
type rawCodec struct{}

// Marshal implements encoding.CodecV2.
func (rawCodec) Marshal(v any) (mem.BufferSlice, error) {
	return mem.BufferSlice{mem.SliceBuffer(v.([]byte))}, nil
}

// Unmarshal implements encoding.CodecV2.
func (rawCodec) Unmarshal(mem.BufferSlice, any) error { return nil }

// Name implements encoding.CodecV2.
func (rawCodec) Name() string { return "proto" }
