package authz

import (
	"encoding/binary"
	"io"
	"math"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/encoding/proto"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/sluiceproxy/sluice/limiter/policy"
)

// A check is a few fields of a large message, and its answer a few strings and numbers. Read and written by the generated code, which makes an
// object of each of them, they were more than a quarter of what a check cost. So checks are read from the wire here, field by field,
// and answers are written to it; what is rare or strange in a check is left to the generated code, and tests hold both to it.

// question is a check as it came.
type question struct{ wire string }

// reply is an answer as it goes.
type reply struct{ wire []byte }

// codec passes checks and answers on as they are, and is protobuf's for all else.
type codec struct{ encoding.CodecV2 }

func newCodec() codec { return codec{encoding.GetCodecV2(proto.Name)} }

// Marshal is CodecV2's.
func (c codec) Marshal(v any) (mem.BufferSlice, error) {
	if r, ok := v.(*reply); ok {
		return mem.BufferSlice{mem.SliceBuffer(r.wire)}, nil
	}
	return c.CodecV2.Marshal(v)
}

// Unmarshal is CodecV2's.
func (c codec) Unmarshal(data mem.BufferSlice, v any) error {
	q, ok := v.(*question)
	if !ok {
		return c.CodecV2.Unmarshal(data, v)
	}
	if data.Len() > maxWhole {
		q.wire = withoutBody(data)
		return nil
	}
	var wire strings.Builder // the buffers are gRPC's again after this
	wire.Grow(data.Len())
	for _, b := range data {
		wire.Write(b.ReadOnlyData())
	}
	q.wire = wire.String()
	return nil
}

// maxWhole is the size of a check, in bytes, above which its body is left out. Envoy's own bound of headers is 60 KiB, and a check is
// hardly ever larger but for a body.
const maxWhole = 128 << 10

// withoutBody returns a check without the request's body, which with_request_body adds and nothing here reads. What is not a check
// comes out as what is not one either.
func withoutBody(data mem.BufferSlice) string {
	r := bodyFilter{in: data.Reader()}
	defer func() { _ = r.in.Close() }()
	r.copy(data.Len(), []int{1, 4, 2}) // attributes, request, http
	if r.bad {
		return "\x00" // no message begins so
	}
	return string(r.out.b)
}

// bodyFilter copies a check, but for its body, buffer by buffer.
type bodyFilter struct {
	in  *mem.Reader
	out encoder
	bad bool
}

// copy copies a message of n bytes. path has the fields that lead from it to the HTTP request; without any it is the HTTP request.
func (f *bodyFilter) copy(n int, path []int) {
	end := f.in.Remaining() - n
	for !f.bad && f.in.Remaining() > end {
		tag := f.uvarint()
		number := int(tag >> 3)
		switch protowire.Type(tag & 7) {
		case protowire.VarintType:
			f.out.b = protowire.AppendVarint(protowire.AppendVarint(f.out.b, tag), f.uvarint())
		case protowire.Fixed32Type:
			f.out.b = protowire.AppendVarint(f.out.b, tag)
			f.take(4)
		case protowire.Fixed64Type:
			f.out.b = protowire.AppendVarint(f.out.b, tag)
			f.take(8)
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
				f.copy(int(size), path[1:])
				f.out.close(at)
			default:
				f.out.b = protowire.AppendVarint(protowire.AppendVarint(f.out.b, tag), size)
				f.take(int(size))
			}
		default: // groups, which no field is
			f.bad = true
		}
	}
	f.bad = f.bad || f.in.Remaining() < end // a field that is cut has taken of what is after the message
}

// The fields of an HTTP request that hold its body.
const (
	httpBody    = 11
	httpRawBody = 12
)

// take copies n bytes.
func (f *bodyFilter) take(n int) {
	at := len(f.out.b)
	f.out.b = slices.Grow(f.out.b, n)[:at+n]
	if _, err := io.ReadFull(f.in, f.out.b[at:]); err != nil {
		f.bad = true
	}
}

func (f *bodyFilter) uvarint() uint64 {
	v, err := binary.ReadUvarint(f.in)
	f.bad = f.bad || err != nil
	return v
}

// parse decodes a CheckRequest from its wire format. It returns errNoHTTP, errNoCheck or errTooMany.
func parse(wire string) (*policy.Request, error) {
	r := &policy.Request{Time: time.Unix(0, 0).UTC()} // as of a check without a time
	hasHTTP, ok := quickly(wire, r)
	if !ok {
		var err error
		if r, err = slowly(wire); err != nil {
			return nil, err
		}
	} else if !hasHTTP {
		return nil, errNoHTTP
	}
	if elements(r) > maxElements {
		return nil, errTooMany
	}
	return r, nil
}

// slowly is parse for a check that quickly does not read.
func slowly(wire string) (*policy.Request, error) {
	var check authv3.CheckRequest
	if err := generated(wire, &check); err != nil {
		return nil, err
	}
	return read(&check)
}

// quickly reads what nearly all checks are made of. It reports whether there was an HTTP request, and not ok where the check is malformed,
// or has what it does not read: a pipe's address, and a message that came in two pieces, which would have to be merged.
func quickly(wire string, r *policy.Request) (hasHTTP, ok bool) {
	hasTime, hasMetadata := false, false
	check := message{rest: wire}
	for check.next() {
		if check.number != 1 { // attributes
			continue
		}
		attributes := check.inner()
		for attributes.next() {
			switch attributes.number {
			case 1:
				check.join(quickPeer(attributes.inner(), &r.Source))
			case 2:
				check.join(quickPeer(attributes.inner(), &r.Destination))
			case 4:
				request := attributes.inner()
				for request.next() {
					switch request.number {
					case 1:
						check.bad = check.bad || hasTime
						hasTime = true
						check.join(quickTime(request.inner(), &r.Time))
					case 2:
						check.bad = check.bad || hasHTTP
						hasHTTP = true
						check.join(quickHTTP(request.inner(), r))
					}
				}
				check.join(request)
			case 10: // context_extensions
				attributes.entry(&r.Context)
				check.bad = check.bad || len(r.Context) > maxElements
			case 11: // metadata_context, which Envoy always sends and which is mostly empty
				check.bad = check.bad || hasMetadata
				hasMetadata = true
				check.join(quickMetadata(attributes.inner(), r))
			}
		}
		check.join(attributes)
	}
	return hasHTTP, !check.bad
}

func quickPeer(peer message, to *policy.Peer) message {
	for peer.next() {
		switch peer.number {
		case 1:
			address := peer.inner()
			for address.next() {
				if address.number != 1 { // socket_address
					return message{bad: true}
				}
				socket := address.inner()
				for socket.next() {
					switch socket.number {
					case 2:
						to.Address = socket.text()
					case 3:
						to.Port = uint32(socket.integer())
					case 4: // named_port, which unsets the other
						return message{bad: true}
					}
				}
				address.join(socket)
			}
			peer.join(address)
		case 4:
			to.Principal = peer.text()
		}
	}
	return peer
}

func quickTime(stamp message, to *time.Time) message {
	var seconds, nanos int64
	for stamp.next() {
		switch stamp.number {
		case 1:
			seconds = int64(stamp.integer())
		case 2:
			nanos = int64(int32(stamp.integer()))
		}
	}
	*to = time.Unix(seconds, nanos).UTC()
	return stamp
}

// quickMetadata leaves metadata to the generated code: its values are of many types.
func quickMetadata(metadata message, r *policy.Request) message {
	if metadata.bad || metadata.rest == "" {
		return metadata
	}
	var read corev3.Metadata
	if err := generated(metadata.rest, &read); err != nil {
		return message{bad: true}
	}
	r.Metadata = read.GetFilterMetadata()
	return metadata
}

func quickHTTP(http message, r *policy.Request) message {
	hasRaw := false
	for http.next() {
		switch http.number {
		case 2:
			r.Method = http.text()
		case 3:
			if r.Headers == nil {
				r.Headers = make(map[string]string, 16) // what a browser's request has
			}
			http.bad = http.bad || hasRaw
			http.entry(&r.Headers)
			http.bad = http.bad || len(r.Headers) > maxElements
		case 4:
			r.Path = http.text()
		case 5:
			r.Host = http.text()
		case 6:
			r.Scheme = http.text()
		case 10:
			r.Protocol = http.text()
		case 13: // header_map, which Envoy sends in the place of headers
			http.bad = http.bad || hasRaw || r.Headers != nil
			hasRaw = true
			http.join(quickHeaders(http.inner(), r))
		}
	}
	return http
}

// quickHeaders reads a header_map, which has an element for each header line.
func quickHeaders(list message, r *policy.Request) message {
	lines, counted := 0, list
	for counted.next() {
		lines++
	}
	if lines == 0 {
		return counted
	}
	if lines > maxElements {
		return message{bad: true}
	}
	r.Headers = make(map[string]string, lines)
	isRepeated := false
	rest := list
	for rest.next() {
		if rest.number != 1 {
			continue
		}
		name, value, line := rest.headerLine()
		counted.join(line)
		before := len(r.Headers)
		r.Headers[name] = value
		isRepeated = isRepeated || len(r.Headers) == before
	}
	if !isRepeated || counted.bad {
		return counted
	}
	clear(r.Headers)
	r.SetHeaders(func(yield func(name, value string) bool) {
		rest := list
		for rest.next() {
			if rest.number != 1 {
				continue
			}
			if name, value, _ := rest.headerLine(); !yield(name, value) {
				return
			}
		}
	})
	return counted
}

// headerLine reads the HeaderValue that the field is: its name, in lower case, and its value, which Envoy writes as bytes.
func (m *message) headerLine() (name, value string, line message) {
	line = m.inner()
	raw := ""
	for line.next() {
		switch line.number {
		case 1:
			name = line.text()
		case 2:
			value = line.text()
		case 3:
			raw = line.data()
		}
	}
	if value == "" {
		value = raw
	}
	return strings.ToLower(name), value, line
}

// headerSize returns how many header lines the request of a check has in Envoy, and the bytes of their names and values. Where the
// check holds headers already joined it is the most that these can be: each comma may have joined two lines.
func headerSize(wire string) (lines, bytes int) {
	check := message{rest: wire}
	for check.next() {
		if check.number != 1 { // attributes
			continue
		}
		attributes := check.inner()
		for attributes.next() {
			if attributes.number != 4 { // request
				continue
			}
			request := attributes.inner()
			for request.next() {
				if request.number != 2 { // http
					continue
				}
				l, b := sizeOfHeaders(request.inner())
				lines, bytes = lines+l, bytes+b
			}
		}
	}
	return lines, bytes
}

func sizeOfHeaders(http message) (lines, bytes int) {
	for http.next() {
		switch http.number {
		case 3:
			name, value := http.pair()
			commas := strings.Count(value, ",")
			lines, bytes = lines+1+commas, bytes+(1+commas)*len(name)+len(value)
		case 13: // header_map
			list := http.inner()
			for list.next() {
				if list.number == 1 {
					name, value, _ := list.headerLine()
					lines, bytes = lines+1, bytes+len(name)+len(value)
				}
			}
		}
	}
	return lines, bytes
}

// message is a message's fields, one after another. What is malformed, or not of the type that it is read as, makes them bad.
type message struct {
	rest   string
	bad    bool
	number int
	kind   protowire.Type
	bytes  string // of a field with a length
	value  uint64 // of a varint
}

// next goes to the next field, and reports whether there is one.
func (m *message) next() bool {
	if m.bad || m.rest == "" {
		return false
	}
	tag := m.uvarint()
	m.number, m.kind = int(tag>>3), protowire.Type(tag&7)
	if m.bad || tag>>3 == 0 || tag>>3 > uint64(protowire.MaxValidNumber) {
		m.bad = true
		return false
	}
	switch m.kind {
	case protowire.VarintType:
		m.value = m.uvarint()
	case protowire.BytesType:
		if size := m.uvarint(); size > uint64(len(m.rest)) {
			m.bad = true
		} else {
			m.bytes, m.rest = m.rest[:size], m.rest[size:]
		}
	case protowire.Fixed32Type:
		m.skip(4)
	case protowire.Fixed64Type:
		m.skip(8)
	default: // groups, which no field is
		m.bad = true
	}
	return !m.bad
}

func (m *message) uvarint() uint64 {
	var v uint64
	for i := 0; i < len(m.rest) && i < binary.MaxVarintLen64; i++ {
		b := m.rest[i]
		if i == binary.MaxVarintLen64-1 && b > 1 {
			break // past 64 bits
		}
		v |= uint64(b&0x7f) << (7 * i)
		if b < 0x80 {
			m.rest = m.rest[i+1:]
			return v
		}
	}
	m.bad = true
	return 0
}

func (m *message) skip(n int) {
	if len(m.rest) < n {
		m.bad = true
		return
	}
	m.rest = m.rest[n:]
}

func (m *message) integer() uint64 {
	m.bad = m.bad || m.kind != protowire.VarintType
	return m.value
}

func (m *message) inner() message {
	m.bad = m.bad || m.kind != protowire.BytesType
	return message{rest: m.bytes, bad: m.bad}
}

func (m *message) data() string {
	m.bad = m.bad || m.kind != protowire.BytesType
	return m.bytes
}

func (m *message) text() string {
	m.bad = m.bad || m.kind != protowire.BytesType || !utf8.ValidString(m.bytes)
	return m.bytes
}

// entry puts the entry that the field is into a map.
func (m *message) entry(to *map[string]string) {
	key, value := m.pair()
	if *to == nil {
		*to = make(map[string]string)
	}
	(*to)[key] = value
}

// pair reads the entry of a map that the field is.
func (m *message) pair() (key, value string) {
	pair := m.inner()
	for pair.next() {
		switch pair.number {
		case 1:
			key = pair.text()
		case 2:
			value = pair.text()
		}
	}
	m.join(pair)
	return key, value
}

// join makes m bad where a message within it is.
func (m *message) join(inner message) { m.bad = m.bad || inner.bad }

// encoder writes messages.
type encoder struct{ b []byte }

// open begins a message, which close ends.
func (e *encoder) open(number protowire.Number) (at int) {
	e.b = append(protowire.AppendTag(e.b, number, protowire.BytesType), 0)
	return len(e.b)
}

// close puts a message's length before it: one byte is there, and where it takes more, what was written moves.
func (e *encoder) close(at int) {
	size := len(e.b) - at
	if size < 0x80 {
		e.b[at-1] = byte(size)
		return
	}
	more := protowire.SizeVarint(uint64(size)) - 1
	for range more {
		e.b = append(e.b, 0)
	}
	copy(e.b[at+more:], e.b[at:at+size])
	protowire.AppendVarint(e.b[:at-1], uint64(size))
}

func (e *encoder) text(number protowire.Number, text string) {
	e.b = protowire.AppendString(protowire.AppendTag(e.b, number, protowire.BytesType), text)
}

func (e *encoder) integer(number protowire.Number, n uint64) {
	e.b = protowire.AppendVarint(protowire.AppendTag(e.b, number, protowire.VarintType), n)
}

// header writes a HeaderValueOption that replaces what a client or an upstream has sent. Envoy's default would add a second one.
func (e *encoder) header(number protowire.Number, key, value string) {
	option := e.open(number)
	header := e.open(1)
	e.text(1, key)
	e.text(2, value)
	e.close(header)
	e.integer(3, overwrite)
	e.close(option)
}

// textEntry, numberEntry, nullEntry and listEntry write an entry of a Struct.

func (e *encoder) textEntry(key, text string) {
	at := e.open(1)
	e.text(1, key)
	value := e.open(2)
	e.text(3, text)
	e.close(value)
	e.close(at)
}

func (e *encoder) numberEntry(key string, n float64) {
	at := e.open(1)
	e.text(1, key)
	value := e.open(2)
	e.b = protowire.AppendFixed64(protowire.AppendTag(e.b, 2, protowire.Fixed64Type), math.Float64bits(n))
	e.close(value)
	e.close(at)
}

func (e *encoder) nullEntry(key string) {
	at := e.open(1)
	e.text(1, key)
	value := e.open(2)
	e.integer(1, 0)
	e.close(value)
	e.close(at)
}

func (e *encoder) listEntry(key string, texts []string) {
	at := e.open(1)
	e.text(1, key)
	value := e.open(2)
	list := e.open(6)
	for _, text := range texts {
		item := e.open(1)
		e.text(3, text)
		e.close(item)
	}
	e.close(list)
	e.close(value)
	e.close(at)
}
