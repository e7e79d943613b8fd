package authz

import (
	"errors"
	"runtime"
	"slices"
	"strings"
	"testing"

	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	typev3 "github.com/envoyproxy/go-control-plane/envoy/type/v3"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"github.com/sluiceproxy/sluice/limiter"
)

// allocates returns how many bytes a function allocates in all.
func allocates(f func()) int {
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	f()
	runtime.ReadMemStats(&after)
	return int(after.TotalAlloc - before.TotalAlloc)
}

// mayAllocate returns how many bytes the parsing of a check of n bytes may
// allocate: little more than n for a large check, since it has at most
// maxElements elements.
func mayAllocate(n int) int { return 64<<10 + 4*n + min(n, maxUnmarshal)*256 }

// within returns inner in a field in a field and so on, by their numbers.
func within(inner string, path ...protowire.Number) string {
	for _, p := range slices.Backward(path) {
		inner = string(protowire.AppendString(protowire.AppendTag(nil, p, protowire.BytesType), inner))
	}
	return inner
}

// elementsOf returns distinct entries of maps, or other elements with one
// string, of some bytes in all.
func elementsOf(number protowire.Number, bytes int) string {
	var b strings.Builder
	for i := 0; b.Len() < bytes; i++ {
		b.WriteString(within(within(string([]byte{byte('0' + i&63), byte('0' + i>>6&63), byte('0' + i>>12&63)}), 1), number))
	}
	return b.String()
}

// A check takes memory in proportion to its size. One with more elements than
// any request has is refused before they are decoded.
func TestElementsAreBounded(t *testing.T) {
	const group = "\x7b\x7c" // what is left to the generated code
	small := within("/", 1, 4, 2, 4)
	for name, form := range map[string]func(n int) string{
		"headers":                func(n int) string { return within(elementsOf(3, n), 1, 4, 2) },
		"header_map":             func(n int) string { return within(elementsOf(1, n), 1, 4, 2, 13) },
		"empty lines":            func(n int) string { return within(strings.Repeat("\x0a\x00", n/2), 1, 4, 2, 13) },
		"empty lines, generated": func(n int) string { return within(strings.Repeat("\x0a\x00", n/2), 1, 4, 2, 13) + group },
		"context_extensions":     func(n int) string { return within(elementsOf(10, n), 1) + small },
		"filters":                func(n int) string { return within(elementsOf(1, n), 1, 11) + small },
		"fields of metadata":     func(n int) string { return within(elementsOf(1, n), 1, 11, 1, 2) + small },
		"a list in metadata": func(n int) string {
			return within(strings.Repeat("\x0a\x00", n/2), 1, 11, 1, 2, 1, 2, 6) + small
		},
		"labels, generated": func(n int) string { return within(elementsOf(3, n), 1, 1) + small + group },
		"another list, generated": func(n int) string {
			return within(strings.Repeat("\x0a\x00", n/2), 1, 13, 1, 2, 1, 2, 6) + small + group
		},
		"many messages, generated": func(n int) string { return strings.Repeat("\x0a\x00", n/2) + small + group },
	} {
		for _, n := range []int{16 << 10, 120 << 10, 2 << 20} {
			wire, err := form(n), error(nil)
			cost := allocates(func() { _, _, err = parse(wire) })
			if cost > mayAllocate(len(wire)) {
				t.Errorf("%s: %d kB are allocated for %d", name, cost>>10, len(wire)>>10)
			}
			if n > maxUnmarshal && !errors.Is(err, errTooMany) {
				t.Errorf("%s: %d kB: %v", name, len(wire)>>10, err)
			}
		}
	}
}

// Concurrent checks with many elements share a bound, and those that are done
// no longer count.
func TestElementsAtOnce(t *testing.T) {
	store := limiter.NewMemory(1<<20, nil, prometheus.NewRegistry())
	s, _, logs := newServer(t, "limits: [{name: a, rate: 1000000/s}]", store)
	wire, err := proto.Marshal(checkOf())
	if err != nil {
		t.Fatal(err)
	}
	large := string(wire) + within(elementsOf(10, 5000), 1)
	for range maxAllElements / 500 {
		if _, err := s.check(t.Context(), &rawRequest{large}); err != nil {
			t.Fatal(err)
		}
	}
	s.elements.Add(maxAllElements) // others are under way
	raw, err := s.check(t.Context(), &rawRequest{large})
	if err != nil {
		t.Fatal(err)
	}
	var refused authv3.CheckResponse
	if err := proto.Unmarshal(raw.wire, &refused); err != nil {
		t.Fatal(err)
	}
	if got := refused.GetDeniedResponse().GetStatus().GetCode(); got != typev3.StatusCode_ServiceUnavailable {
		t.Errorf("a large one: %v", &refused)
	}
	if n := logs.FilterMessage("check refused: " + errTooManyChecks.Error()).Len(); n != 1 {
		t.Errorf("%d log lines", n)
	}
	if r, err := s.Check(t.Context(), checkOf()); err != nil || codes.Code(r.GetStatus().GetCode()) != codes.OK {
		t.Errorf("a small one: %v, %v", r, err)
	}
	if n := s.elements.Load(); n != maxAllElements {
		t.Errorf("%d elements", n)
	}
}
