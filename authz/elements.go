package authz

import (
	"errors"
	"fmt"
	"sync"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/sluiceproxy/sluice/limiter/policy"
)

// Bounds of the elements of checks: headers, context_extensions and values of
// metadata. An element of two bytes takes a hundred when it is decoded, so a
// message of maxMessage could take 800 MB.
const (
	// maxElements is the maximum number of elements of a check. Envoy allows 100
	// headers by default.
	maxElements = 8192
	// maxUnmarshal is the size of a message in bytes up to which the generated
	// code decodes it. That allocates up to 240 times as much, most of it garbage
	// afterwards.
	maxUnmarshal = 128 << 10
	// maxConcurrentUnmarshal is the size of a message in bytes up to which it is
	// decoded concurrently with others.
	maxConcurrentUnmarshal = 16 << 10
	// maxAllElements is the maximum number of elements of all checks that are being
	// decided, some 20 MiB. Checks with at most fewElements do not count.
	maxAllElements = 200_000
	fewElements    = 256
)

var errTooMany = fmt.Errorf("the check has more than %d headers, context_extensions and metadata values, "+
	"or is larger than %d KiB and has fields that only the generated code reads", maxElements, maxUnmarshal>>10)

var errTooManyChecks = errors.New("too many concurrent checks with hundreds of headers, " +
	"context_extensions and metadata values")

// elements returns the number of elements of a request.
func elements(r *policy.Request) int {
	n := len(r.Headers) + len(r.Context)
	for _, s := range r.Metadata {
		n += 1 + fieldsOf(s)
	}
	return n
}

// fieldsOf returns the number of values in a struct, including nested ones.
func fieldsOf(s *structpb.Struct) (n int) {
	for _, v := range s.GetFields() {
		n += valuesIn(v)
	}
	return n
}

// valuesIn returns the number of values in v, including v.
func valuesIn(v *structpb.Value) int {
	n := 1
	switch v := v.GetKind().(type) {
	case *structpb.Value_StructValue:
		n += fieldsOf(v.StructValue)
	case *structpb.Value_ListValue:
		for _, e := range v.ListValue.GetValues() {
			n += valuesIn(e)
		}
	}
	return n
}

// unmarshaling serializes the decoding of large messages.
var unmarshaling sync.Mutex

// unmarshal decodes a message with the generated code. It returns errTooMany for
// a message larger than maxUnmarshal, malformed or not, and errNoCheck for
// another one that is malformed.
func unmarshal(wire string, to proto.Message) error {
	if len(wire) > maxUnmarshal {
		return errTooMany
	}
	if len(wire) > maxConcurrentUnmarshal {
		unmarshaling.Lock()
		defer unmarshaling.Unlock()
	}
	if err := proto.Unmarshal([]byte(wire), to); err != nil {
		return errNoCheck
	}
	return nil
}
