package main

import (
	"context"
	"io"
	"net/http"
	"strings"
	"testing"

	"google.golang.org/grpc/health/grpc_health_v1"
)

// spent returns how many tokens of a limit are spent or held.
func (s *settling) spent(limit string) int {
	s.t.Helper()
	return s.p.counted(`sluice_tokens_taken_total\{limit="`+limit+`"\}`) -
		s.p.counted(`sluice_tokens_returned_total\{limit="`+limit+`"\}`) +
		s.p.counted(`sluice_tokens_surcharged_total\{limit="`+limit+`"\}`)
}

// costs asks for a path, with headers given as name, value, name, value, and
// checks what that has cost by a limit once it has ended.
func (s *settling) costs(limit string, want int, method, path string, headers ...string) {
	s.t.Helper()
	settled, spent := s.settlements(limit), s.spent(limit)
	send(s.t, s.c, method, "http://"+s.addr+path, headers...)
	eventually(s.t, "the end", func() bool { return s.settlements(limit) > settled })
	if got := s.spent(limit) - spent; got != want {
		s.t.Errorf("%s %s %v: %d tokens of %s, want %d", method, path, headers, got, limit, want)
	}
}

// llm is an upstream that answers as APIs of large language models do.
func llm(w http.ResponseWriter, r *http.Request) {
	stream := func(events ...string) {
		w.Header().Set("Content-Type", "text/event-stream")
		for _, e := range events {
			_, _ = io.WriteString(w, e+"\n\n")
			w.(http.Flusher).Flush()
		}
	}
	answer := func(body string) {
		w.Header().Set("Content-Type", "application/json")
		_, _ = io.WriteString(w, body)
	}
	const chunk, part = `data: {"id":"1","object":"chat.completion.chunk",`, "event: content_block_delta\n"
	switch r.URL.String() {
	case "/v1/chat/completions":
		answer(`{"id":"1","object":"chat.completion","choices":[{"index":0,"message":{"role":"assistant","content":"Hi"}}],` +
			`"usage":{"prompt_tokens":19,"completion_tokens":10,"total_tokens":29,"prompt_tokens_details":{"cached_tokens":0}}}`)
	case "/v1/chat/completions?stream":
		stream(chunk+`"choices":[{"index":0,"delta":{"content":"H"}}],"usage":null}`,
			chunk+`"choices":[{"index":0,"delta":{"content":"i"}}],"usage":null}`,
			chunk+`"choices":[],"usage":{"prompt_tokens":19,"completion_tokens":21,"total_tokens":40}}`,
			`data: [DONE]`)
	case "/v1/chat/completions?stream&without-usage":
		stream(chunk+`"choices":[{"index":0,"delta":{"content":"Hi"}}]}`, `data: [DONE]`)
	case "/v1/messages":
		answer(`{"id":"msg_1","type":"message","content":[{"type":"text","text":"Hi"}],` +
			`"usage":{"input_tokens":2095,"output_tokens":503}}`)
	case "/v1/messages?stream":
		stream("event: message_start\n"+
			`data: {"type":"message_start","message":{"id":"msg_1","usage":{"input_tokens":25,"output_tokens":1}}}`,
			part+`data: {"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"Hi"}}`,
			"event: message_delta\n"+
				`data: {"type":"message_delta","delta":{"stop_reason":"end_turn"},"usage":{"output_tokens":15}}`,
			"event: message_stop\n"+`data: {"type":"message_stop"}`)
	case "/header":
		w.Header().Set("X-Usage-Tokens", "150")
	case "/trailer":
		w.Header().Set("Trailer", "X-Usage-Tokens")
		_, _ = io.WriteString(w, "hello")
		w.Header().Set("X-Usage-Tokens", "2500")
	}
}

// TestSettleRecipes runs the recipes of limits that settle.
func TestSettleRecipes(t *testing.T) {
	t.Run("Only failed logins count", func(t *testing.T) {
		s := startSettling(t, recipe(t, "Only failed logins count"), http.HandlerFunc(
			func(w http.ResponseWriter, r *http.Request) {
				if r.Header.Get("X-Password") != "right" {
					w.WriteHeader(http.StatusUnauthorized)
				}
			}), nil)
		for range 7 {
			s.costs("failed-logins", 0, "POST", "/login", "x-password", "right")
		}
		for range 5 {
			s.costs("failed-logins", 1, "POST", "/login", "x-password", "wrong")
		}
		r, err := s.c.Post("http://"+s.addr+"/login", "", nil)
		if err != nil {
			t.Fatal(err)
		}
		_ = r.Body.Close()
		if r.StatusCode != http.StatusTooManyRequests {
			t.Errorf("the sixth: %d", r.StatusCode)
		}
	})
	t.Run("LLM tokens, from a header or a trailer", func(t *testing.T) {
		s := startSettling(
			t, recipe(t, "LLM tokens, from a header or a trailer"), http.HandlerFunc(llm), nil, trailersOfHTTP1(t))
		s.costs("llm-tokens", 150, "GET", "/header", "x-api-key", "k")
		s.costs("llm-tokens", 2500, "GET", "/trailer", "x-api-key", "k", "te", "trailers")
		s.costs("llm-tokens", 2000, "GET", "/neither", "x-api-key", "k")
	})
	t.Run("LLM tokens, from the answer's body", func(t *testing.T) {
		const router = "          - name: envoy.filters.http.router\n"
		filters := block(t, section(t, "envoy/README.md", "#### Usage in bodies"), "yaml")
		s := startSettling(t, recipe(t, "LLM tokens, from the answer's body"), http.HandlerFunc(llm), nil,
			replaced(t, router, "          "+strings.ReplaceAll(strings.TrimSpace(filters), "\n", "\n          ")+"\n"+router))
		s.costs("openai", 29, "POST", "/v1/chat/completions", "authorization", "Bearer k")
		s.costs("openai", 40, "POST", "/v1/chat/completions?stream", "authorization", "Bearer k")
		s.costs("openai", 2000, "POST", "/v1/chat/completions?stream&without-usage", "authorization", "Bearer k")
		s.costs("anthropic", 2095+503, "POST", "/v1/messages", "x-api-key", "k")
		s.costs("anthropic", 25+15, "POST", "/v1/messages?stream", "x-api-key", "k")
	})
	t.Run("No charge for errors of the upstream", func(t *testing.T) {
		reached := make(chan bool, 1)
		s := startSettling(t, recipe(t, "No charge for errors of the upstream"), http.HandlerFunc(
			func(w http.ResponseWriter, r *http.Request) {
				switch r.URL.Path {
				case "/fails":
					w.WriteHeader(http.StatusBadGateway)
				case "/hangs":
					reached <- true
					<-r.Context().Done()
				}
			}), nil)
		s.costs("per-key", 0, "GET", "/fails", "x-api-key", "k")
		s.costs("per-key", 1, "GET", "/works", "x-api-key", "k")
		// Hanging up early is not free.
		settled, spent := s.settlements("per-key"), s.spent("per-key")
		ctx, cancel := context.WithCancel(t.Context())
		r, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+s.addr+"/hangs", nil)
		if err != nil {
			t.Fatal(err)
		}
		r.Header.Set("X-Api-Key", "k")
		go func() { <-reached; cancel() }()
		if answer, err := s.c.Do(r); err == nil {
			_ = answer.Body.Close()
			t.Errorf("%d", answer.StatusCode)
		}
		eventually(t, "the end", func() bool { return s.settlements("per-key") > settled })
		if got := s.spent("per-key") - spent; got != 1 {
			t.Errorf("hanging up has cost %d", got)
		}
	})
	t.Run("Bandwidth", func(t *testing.T) {
		s := startSettling(t, recipe(t, "Bandwidth"), http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			_, _ = io.CopyN(w, endless{}, 300_000)
		}), nil)
		settled := s.settlements("bytes")
		if _, body := fetch(t, s.c, "http://"+s.addr+"/"); len(body) != 300_000 {
			t.Errorf("%d bytes", len(body))
		}
		eventually(t, "the end", func() bool { return s.settlements("bytes") > settled })
		if got := s.spent("bytes"); got < 300_000 || got > 301_000 {
			t.Errorf("%d tokens", got)
		}
	})
	t.Run("gRPC calls by their status", func(t *testing.T) {
		s := startSettling(t, recipe(t, "gRPC calls by their status"), healthHandler(), nil)
		for service, want := range map[string]int{"": 10, "none": 1} { // which is NOT_FOUND
			settled, spent := s.settlements("calls"), s.spent("calls")
			_, _ = grpc_health_v1.NewHealthClient(dial(t, s.addr)).Check(t.Context(),
				&grpc_health_v1.HealthCheckRequest{Service: service})
			eventually(t, "the end", func() bool { return s.settlements("calls") > settled })
			if got := s.spent("calls") - spent; got != want {
				t.Errorf("%q has cost %d, want %d", service, got, want)
			}
		}
	})
}

// trailersOfHTTP1 makes Envoy pass on trailers of HTTP/1.1.
func trailersOfHTTP1(t *testing.T) func(string) string {
	const options, upstream = "http_protocol_options: { enable_trailers: true }", "use_downstream_protocol_config: { "
	return replaced(t, "          stat_prefix: ingress\n", "          stat_prefix: ingress\n          "+options+"\n",
		upstream, upstream+options+", ")
}

// endless is a reader without an end.
type endless struct{}

func (endless) Read(b []byte) (int, error) { return copy(b, strings.Repeat("x", len(b))), nil }
