package authz

import (
	"encoding/binary"
	"io"
	"slices"
	"strings"
	"unsafe"

	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/encoding/proto"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"
)

// rawRequest is an encoded CheckRequest.
type rawRequest struct{ wire string }

// rawResponse is an encoded CheckResponse.
type rawResponse struct{ wire []byte }

// codec passes rawRequests, rawResponses and rawLogs through and leaves all other
// messages to gRPC's codec for protobuf.
type codec struct{ encoding.CodecV2 }

func newCodec() codec { return codec{encoding.GetCodecV2(proto.Name)} }

// Marshal implements encoding.CodecV2.
func (c codec) Marshal(v any) (mem.BufferSlice, error) {
	if r, ok := v.(*rawResponse); ok {
		return mem.BufferSlice{mem.SliceBuffer(r.wire)}, nil
	}
	return c.CodecV2.Marshal(v)
}

// Unmarshal implements encoding.CodecV2.
func (c codec) Unmarshal(data mem.BufferSlice, v any) error {
	switch r := v.(type) {
	case *rawRequest:
		if data.Len() > maxWithBody {
			r.wire = withoutBody(data)
		} else {
			r.wire = copied(data)
		}
	case *rawLog:
		r.isTooLarge = data.Len() > maxLogMessage
		if !r.isTooLarge {
			r.wire = copied(data)
		}
	default:
		return c.CodecV2.Unmarshal(data, v)
	}
	return nil
}

// copied returns a copy of data, since gRPC reuses the buffers.
func copied(data mem.BufferSlice) string {
	var wire strings.Builder
	wire.Grow(data.Len())
	for _, b := range data {
		wire.Write(b.ReadOnlyData())
	}
	return wire.String()
}

// maxWithBody is the size of a check in bytes up to which it is kept whole. The
// body is removed from larger ones. Without a body hardly any check is larger,
// since Envoy's headers are at most 60 KiB by default.
const maxWithBody = 128 << 10

// withoutBody returns a check without the request's body, which Envoy adds with
// with_request_body and this package does not read. If data is not a message,
// the result is not one either.
func withoutBody(data mem.BufferSlice) string {
	f := bodyFilter{in: data.Reader()}
	defer func() { _ = f.in.Close() }()
	f.copyMessage(data.Len(), []int{checkAttributes, attributesRequest, requestHTTP})
	if f.bad {
		return "\x00" // a field number of 0, which is invalid
	}
	return unsafe.String(unsafe.SliceData(f.out.b), len(f.out.b)) // not written again; a copy may be 16 MiB
}

// bodyFilter copies a check without its body, buffer by buffer. It becomes bad
// if the check is malformed.
type bodyFilter struct {
	in  *mem.Reader
	out encoder
	bad bool
}

// copyMessage copies a message of n bytes. path has the numbers of the fields
// that lead from it to the HTTP request. If path is empty, the message is the
// HTTP request.
func (f *bodyFilter) copyMessage(n int, path []int) {
	end := f.in.Remaining() - n
	for !f.bad && f.in.Remaining() > end {
		tag := f.uvarint()
		number := int(tag >> 3)
		switch protowire.Type(tag & 7) {
		case protowire.VarintType:
			f.out.b = protowire.AppendVarint(protowire.AppendVarint(f.out.b, tag), f.uvarint())
		case protowire.Fixed32Type:
			f.out.b = protowire.AppendVarint(f.out.b, tag)
			f.copyBytes(4)
		case protowire.Fixed64Type:
			f.out.b = protowire.AppendVarint(f.out.b, tag)
			f.copyBytes(8)
		case protowire.BytesType:
			size := f.uvarint()
			if left := f.in.Remaining() - end; f.bad || left < 0 || size > uint64(left) {
				f.bad = true
				return
			}
			switch {
			case len(path) == 0 && (number == httpBody || number == httpRawBody):
				_, err := f.in.Discard(int(size))
				f.bad = f.bad || err != nil
			case len(path) > 0 && number == path[0]:
				at := f.out.open(protowire.Number(number))
				f.copyMessage(int(size), path[1:])
				f.out.close(at)
			default:
				f.out.b = protowire.AppendVarint(protowire.AppendVarint(f.out.b, tag), size)
				f.copyBytes(int(size))
			}
		default: // groups, which these messages do not have
			f.bad = true
		}
	}
	f.bad = f.bad || f.in.Remaining() < end // the last field exceeds the message
}

// copyBytes copies n bytes.
func (f *bodyFilter) copyBytes(n int) {
	at := len(f.out.b)
	f.out.b = slices.Grow(f.out.b, n)[:at+n]
	if _, err := io.ReadFull(f.in, f.out.b[at:]); err != nil {
		f.bad = true
	}
}

// uvarint consumes a varint.
func (f *bodyFilter) uvarint() uint64 {
	v, err := binary.ReadUvarint(f.in)
	f.bad = f.bad || err != nil
	return v
}
