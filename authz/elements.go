package authz

import (
	"errors"
	"fmt"
	"sync"

	protobuf "google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/sluiceproxy/sluice/limiter/policy"
)

// What a check may hold. An element of two bytes takes a hundred once it is
// decoded, so that a message within maxMessage could take more than a gigabyte.
const (
	// maxElements bounds its headers, context_extensions and values of metadata
	// together. Envoy lets 100 headers pass unless it is told otherwise.
	maxElements = 8192
	// maxGenerated is how many bytes the generated code reads of a check. It
	// takes up to 240 times as many.
	maxGenerated = 128 << 10
	// freeGenerated is how many bytes it reads while it reads others, too.
	freeGenerated = 16 << 10
	// maxAllElements bounds the elements of all checks under way, some 20 MiB.
	// Checks with at most fewElements do not count.
	maxAllElements = 200_000
	fewElements    = 256
)

var errTooMany = fmt.Errorf("a check with more than %d headers, context_extensions and values of metadata, or with %d KiB of what is rare in checks",
	maxElements, maxGenerated>>10)

var errTooManyChecks = errors.New("too many checks at once with hundreds of headers, context_extensions and values of metadata")

// elements is how many headers, context_extensions and values of metadata a
// request has.
func elements(r *policy.Request) int {
	n := len(r.Headers) + len(r.Context)
	for _, s := range r.Metadata {
		n += 1 + fieldsOf(s)
	}
	return n
}

func fieldsOf(s *structpb.Struct) (n int) {
	for _, v := range s.GetFields() {
		n += valuesIn(v)
	}
	return n
}

// valuesIn is how many values a value is, with those in it.
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

// generating is held while the generated code reads something large.
var generating sync.Mutex

// generated has the generated code read a message. It returns errNoCheck or
// errTooMany.
func generated(wire string, to protobuf.Message) error {
	if len(wire) > maxGenerated {
		return errTooMany
	}
	if len(wire) > freeGenerated {
		generating.Lock()
		defer generating.Unlock()
	}
	if err := protobuf.Unmarshal([]byte(wire), to); err != nil {
		return errNoCheck
	}
	return nil
}
