package main

import (
	"bytes"
	"net/http"
	"strings"
	"testing"
)

// TestLargeBodies checks that requests with large bodies are limited like
// others, even if Envoy sends the body along and allows what gets no answer.
// What is too large even then is counted and logged.
func TestLargeBodies(t *testing.T) {
	s := serveRecipe(
		t,
		"limits: [{name: a, rate: 2/d, match: {paths: [/a]}}, {name: b, rate: 1/d, match: {paths: [/b]}}]",
		nil,
		func(b string) string {
			return strings.Replace(
				b, "failure_mode_allow: false",
				"with_request_body: { max_request_bytes: 33554432, pack_as_bytes: true }\n              failure_mode_allow: true",
				1,
			)
		},
	)
	post := func(path string, mib int) int {
		r, err := http.NewRequestWithContext(
			t.Context(), http.MethodPost, "http://"+s.addr+path, bytes.NewReader(bytes.Repeat([]byte("b"), mib<<20)),
		)
		if err != nil {
			t.Fatal(err)
		}
		answer, err := s.c.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		_ = answer.Body.Close()
		return answer.StatusCode
	}
	for i, want := range []int{200, 200, 429, 429} {
		if got := post("/a", 1+4*i); got != want {
			t.Errorf("a body of %d MiB: %d, want %d", 1+4*i, got, want)
		}
	}
	for range 2 {
		if got := post("/b", 17); got != 200 {
			t.Errorf("a body of 17 MiB: %d", got)
		}
	}
	// gRPC answers a check that is too large before sluice counts and logs it.
	eventually(t, "the count of checks that are too large", func() bool {
		return series(t, s.p.metrics)["sluice_checks_too_large_total"] == "2"
	})
	eventually(t, "a log line that says what to do", func() bool {
		return strings.Contains(s.p.logged(), "remove with_request_body")
	})
}
