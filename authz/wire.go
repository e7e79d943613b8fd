package authz

import (
	"encoding/binary"
	"math"
	"unicode/utf8"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	"google.golang.org/protobuf/encoding/protowire"
)

// A check is a few fields of a large message, and its answer a few strings and
// numbers. The generated code allocates an object for each message in them,
// which was more than a quarter of the cost of a check. So this package reads
// checks from the wire format and writes answers to it. Rare and malformed
// checks are left to the generated code, and tests compare the two.

// Field numbers of the messages that are read.
const (
	checkAttributes = 1 // of envoy.service.auth.v3.CheckRequest

	attributesSource      = 1 // of envoy.service.auth.v3.AttributeContext
	attributesDestination = 2
	attributesRequest     = 4
	attributesContext     = 10
	attributesMetadata    = 11

	requestTime = 1 // of AttributeContext.Request
	requestHTTP = 2

	httpMethod    = 2 // of AttributeContext.HttpRequest
	httpHeaders   = 3
	httpPath      = 4
	httpHost      = 5
	httpScheme    = 6
	httpProtocol  = 10
	httpBody      = 11
	httpRawBody   = 12
	httpHeaderMap = 13

	peerAddress   = 1 // of AttributeContext.Peer
	peerPrincipal = 4

	addressSocket = 1 // of envoy.config.core.v3.Address

	socketAddress   = 2 // of envoy.config.core.v3.SocketAddress
	socketPort      = 3
	socketNamedPort = 4

	headerMapHeaders = 1 // of envoy.config.core.v3.HeaderMap

	headerKey      = 1 // of envoy.config.core.v3.HeaderValue
	headerValue    = 2
	headerRawValue = 3

	timestampSeconds = 1 // of google.protobuf.Timestamp
	timestampNanos   = 2

	entryKey   = 1 // of an entry of a map
	entryValue = 2
)

// Field numbers of the messages that are written.
const (
	responseStatus   = 1 // of envoy.service.auth.v3.CheckResponse
	responseDenied   = 2
	responseOK       = 3
	responseMetadata = 4

	statusCode = 1 // of google.rpc.Status and envoy.type.v3.HttpStatus

	okHeaders         = 2 // of OkHttpResponse: for the upstream
	okHeadersToRemove = 5
	okResponseHeaders = 6 // for the client

	deniedStatus  = 1 // of DeniedHttpResponse
	deniedHeaders = 2
	deniedBody    = 3

	optionHeader       = 1 // of envoy.config.core.v3.HeaderValueOption
	optionAppendAction = 3

	structFields = 1 // of google.protobuf.Struct

	valueNull   = 1 // of google.protobuf.Value
	valueNumber = 2
	valueString = 3
	valueList   = 6

	listValues = 1 // of google.protobuf.ListValue
)

// overwrite is the append_action of every header that is written.
const overwrite = uint64(corev3.HeaderValueOption_OVERWRITE_IF_EXISTS_OR_ADD)

// message iterates over the fields of an encoded message. It becomes bad, and
// ends, at a malformed field and at one that is read as another type than it
// has.
type message struct {
	rest string // what follows the current field
	bad  bool

	// The current field.
	number int
	kind   protowire.Type
	bytes  string // if kind is BytesType
	value  uint64 // if kind is VarintType
}

// next advances to the next field and reports whether there is one.
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
	default: // groups, which these messages do not have
		m.bad = true
	}
	return !m.bad
}

// uvarint consumes a varint.
func (m *message) uvarint() uint64 {
	var v uint64
	for i := 0; i < len(m.rest) && i < binary.MaxVarintLen64; i++ {
		b := m.rest[i]
		if i == binary.MaxVarintLen64-1 && b > 1 {
			break // more than 64 bits
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

// skip consumes n bytes.
func (m *message) skip(n int) {
	if len(m.rest) < n {
		m.bad = true
		return
	}
	m.rest = m.rest[n:]
}

// integer returns the current field, a varint.
func (m *message) integer() uint64 {
	m.bad = m.bad || m.kind != protowire.VarintType
	return m.value
}

// inner returns the current field, a message.
func (m *message) inner() message {
	m.bad = m.bad || m.kind != protowire.BytesType
	return message{rest: m.bytes, bad: m.bad}
}

// data returns the current field, bytes.
func (m *message) data() string {
	m.bad = m.bad || m.kind != protowire.BytesType
	return m.bytes
}

// text returns the current field, a string.
func (m *message) text() string {
	m.bad = m.bad || m.kind != protowire.BytesType || !utf8.ValidString(m.bytes)
	return m.bytes
}

// entry adds the current field, an entry of a map, to a map.
func (m *message) entry(to *map[string]string) {
	key, value := m.pair()
	if *to == nil {
		*to = make(map[string]string)
	}
	(*to)[key] = value
}

// pair returns the key and the value of the current field, an entry of a map.
func (m *message) pair() (key, value string) {
	key, inner := m.named()
	m.bad = m.bad || !utf8.ValidString(inner.rest)
	return key, inner.rest
}

// named returns the key and the value of the current field, an entry of a map
// whose values are messages, or strings, which are the rest of value then.
func (m *message) named() (key string, value message) {
	pair := m.inner()
	for pair.next() {
		switch pair.number {
		case entryKey:
			key = pair.text()
		case entryValue:
			value = pair.inner()
		}
	}
	m.join(pair)
	return key, value
}

// join makes m bad if inner, a message within it, is bad.
func (m *message) join(inner message) { m.bad = m.bad || inner.bad }

// encoder appends encoded fields to b.
type encoder struct{ b []byte }

// open begins a field that is a message. The fields of the message follow, and
// close(at) ends it.
func (e *encoder) open(number protowire.Number) (at int) {
	e.b = append(protowire.AppendTag(e.b, number, protowire.BytesType), 0)
	return len(e.b)
}

// close ends the message that open began at at, and writes its length before
// it. open reserves one byte for the length. If the length needs more, the
// message is moved.
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

// text writes a string field.
func (e *encoder) text(number protowire.Number, text string) {
	e.b = protowire.AppendString(protowire.AppendTag(e.b, number, protowire.BytesType), text)
}

// integer writes a varint field.
func (e *encoder) integer(number protowire.Number, n uint64) {
	e.b = protowire.AppendVarint(protowire.AppendTag(e.b, number, protowire.VarintType), n)
}

// header writes a HeaderValueOption that replaces a client's or an upstream's
// header of that name. Envoy's default is to add a second one.
func (e *encoder) header(number protowire.Number, key, value string) {
	option := e.open(number)
	header := e.open(optionHeader)
	e.text(headerKey, key)
	e.text(headerValue, value)
	e.close(header)
	e.integer(optionAppendAction, overwrite)
	e.close(option)
}

// textEntry writes an entry of a Struct whose value is a string.
func (e *encoder) textEntry(key, text string) {
	entry, value := e.openEntry(key)
	e.text(valueString, text)
	e.close(value)
	e.close(entry)
}

// numberEntry writes an entry of a Struct whose value is a number.
func (e *encoder) numberEntry(key string, n float64) {
	entry, value := e.openEntry(key)
	e.b = protowire.AppendTag(e.b, valueNumber, protowire.Fixed64Type)
	e.b = protowire.AppendFixed64(e.b, math.Float64bits(n))
	e.close(value)
	e.close(entry)
}

// nullEntry writes an entry of a Struct whose value is null.
func (e *encoder) nullEntry(key string) {
	entry, value := e.openEntry(key)
	e.integer(valueNull, 0)
	e.close(value)
	e.close(entry)
}

// listEntry writes an entry of a Struct whose value is a list of strings.
func (e *encoder) listEntry(key string, texts []string) {
	entry, value := e.openEntry(key)
	list := e.open(valueList)
	for _, text := range texts {
		item := e.open(listValues)
		e.text(valueString, text)
		e.close(item)
	}
	e.close(list)
	e.close(value)
	e.close(entry)
}

// openEntry begins an entry of a Struct and its value.
func (e *encoder) openEntry(key string) (entry, value int) {
	entry = e.open(structFields)
	e.text(entryKey, key)
	return entry, e.open(entryValue)
}
