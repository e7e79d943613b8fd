package main

import (
	"bufio"
	"fmt"
	"net"
	"net/http"
	"strings"
	"testing"
)

// TestShadowBesideManyHeaders checks that a shadow limit denies nobody, however
// many headers a client sends: if Envoy has no room for another header, sluice
// adds none.
func TestShadowBesideManyHeaders(t *testing.T) {
	const limits = `
mode: shadow
limits:
  - {name: would-deny, rate: 1/d, burst: 1, match: {paths: [/shadow]}}
`
	for name, change := range map[string][]func(string) string{
		"as shipped": nil,
		"without the raw": {func(b string) string {
			return strings.Replace(b, "encode_raw_headers: true", "encode_raw_headers: false", 1)
		}},
	} {
		t.Run(name, func(t *testing.T) {
			s := serveRecipe(t, limits, nil, change...)
			s.want(1, 1, "GET /shadow")
			told := map[bool]int{}
			ask := func(what string, lines ...string) {
				free := s.raw("/nobody", lines...)
				s.up.forget()
				if got := s.raw("/shadow", lines...); got != free {
					t.Errorf("%s: %d, and %d where no limit applies", what, got, free)
				}
				if free == http.StatusOK {
					told[s.up.got().Get("X-Sluice-Shadow") == "would-deny"]++
				}
			}
			for n := 80; n <= 100; n++ {
				var lines []string
				for i := range n {
					lines = append(lines, fmt.Sprintf("x-%d: 1", i))
				}
				ask(fmt.Sprint(n, " headers"), lines...)
				ask(
					fmt.Sprint(n, " headers and forged ones"),
					append(lines[2:], "x-sluice-shadow: forged", "x-sluice-other: forged")...)
			}
			for n := 61_100; n <= 61_440; n += 5 {
				ask(fmt.Sprint(n, " bytes"), "x-large: "+strings.Repeat("a", n))
			}
			if told[true] < 20 || told[false] < 20 {
				t.Errorf("the upstream was told %d times, and not told %d times", told[true], told[false])
			}
		})
	}
}

// TestForgedBesideManyHeaders checks that forged x-sluice-* headers never reach
// the upstream if only sluice removes them: Envoy removes them as sluice says,
// or refuses a request with too many headers.
func TestForgedBesideManyHeaders(t *testing.T) {
	s := serveRecipe(t, "limits: [{name: a, rate: 1/d, burst: 1, mode: shadow}]", nil, func(b string) string {
		return strings.ReplaceAll(b, "prefix: x-sluice-", "prefix: x-other-")
	})
	statuses := map[int]int{}
	for n := 80; n <= 97; n++ {
		lines := []string{"x-sluice-shadow: forged", "x-sluice-other: forged"}
		for i := range n {
			lines = append(lines, fmt.Sprintf("x-%d: 1", i))
		}
		s.up.forget()
		statuses[s.raw("/", lines...)]++
		for name, values := range s.up.got() {
			if strings.HasPrefix(name, "X-Sluice-") && values[0] != "a" {
				t.Errorf("%d headers: the upstream got %s: %s", n, name, values)
			}
		}
	}
	if statuses[http.StatusOK] < 10 || statuses[http.StatusOK]+statuses[http.StatusInternalServerError] != 18 {
		t.Errorf("statuses %v", statuses)
	}
}

// raw requests a path with any number of header lines, and returns the status
// of the response.
func (s *served) raw(path string, lines ...string) int {
	s.t.Helper()
	conn, err := net.Dial("tcp", s.addr)
	if err != nil {
		s.t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	_, err = fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: h\r\n%s\r\n\r\n", path, strings.Join(lines, "\r\n"))
	if err != nil {
		s.t.Fatal(err)
	}
	answer, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		s.t.Fatal(err)
	}
	_ = answer.Body.Close()
	return answer.StatusCode
}
