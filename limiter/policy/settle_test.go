package policy

import (
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/structpb"
)

func TestSettle(t *testing.T) {
	metadata, err := structpb.NewStruct(map[string]any{"tokens": 12.2, "text": "many"})
	if err != nil {
		t.Fatal(err)
	}
	status := func(n int64) *int64 { return &n }
	end := End{
		Method: "POST", Scheme: "https", Host: "API.example.com:443", Path: "/v1/chat?stream=1", Protocol: "HTTP/2",
		ID: "one", Time: time.Unix(1_700_000_000, 0), Duration: new(1500 * time.Millisecond),
		RequestSize: 100, RequestTotalSize: 300,
		Code: 200, CodeDetails: "via_upstream", Flags: []string{"UH", "DC"}, GRPCStatus: status(8),
		Headers: map[string]string{"x-usage": "17", "x-empty": ""}, Trailers: map[string]string{"x-late": "3"},
		Size: 1000, TotalSize: 1200,
		Metadata: func() map[string]*structpb.Struct { return map[string]*structpb.Struct{"filter": metadata} },
	}
	for _, tt := range []struct {
		settle string
		want   int64 // -1: a mistake
	}{
		{`response.code >= 200 && response.code < 400 ? 0 : 1`, 0},
		{`int(response.headers["x-usage"])`, 17},
		{`int(response.headers["x-missing"])`, 5},
		{`int(response.headers["x-empty"])`, 5},
		{`response.headers["x-missing"] == null ? 1 : 2`, 1},
		{`"x-usage" in response.headers ? 1 : 2`, 1},
		{`int(response.trailers["x-late"]) + int(response.trailers.?x_missing.orValue("1"))`, 4},
		{`metadata.filter_metadata["filter"].tokens`, 13},
		{`metadata.filter_metadata["filter"].none`, 5},
		{`metadata.filter_metadata["filter"].text`, -1},
		{`metadata.filter_metadata["another"].tokens`, 5},
		{`"UH" in response.flags && !("UF" in response.flags) ? 1 : 2`, 1},
		{`response.grpc_status == 8 ? 1 : 2`, 1},
		{`response.code_details == "via_upstream" ? 1 : 2`, 1},
		{`response.size + response.total_size`, 2200},
		{`request.size + request.total_size`, 400},
		{`request.method == "POST" && request.scheme == "https" && request.protocol == "HTTP/2" && request.id == "one" ? 1 : 2`, 1},
		{`request.path == "/v1/chat?stream=1" && request.url_path == "/v1/chat" && request.query == "stream=1" ? 1 : 2`, 1},
		{`request.host == "api.example.com" ? 1 : 2`, 1},
		{`request.duration > duration("1s") ? 1 : 2`, 1},
		{`request.duration.getMilliseconds() + 1`, 1501},
		{`request.time == timestamp("2023-11-14T22:13:20Z") ? 1 : 2`, 1},
		{`cost`, 5},
		{`double(cost) * 2.0 + 0.1`, 11},
		{`cost - 6`, -1},
		{`5 / (response.code - 200)`, -1},
		{`1e9 + 0.5`, 1_000_000_001},
		{`double(response.code) * 1.0e30`, 3_000_000_001},
		{`0`, 0},
	} {
		c := parse(t, "limits: [{name: l, rate: 100/s, cost: 5, settle: '"+tt.settle+"'}]")
		got, err := c.Settle("default", "l", &end, 5)
		if tt.want < 0 {
			if err == nil || got != 5 || !strings.Contains(err.Error(), "settle") || strings.Contains(err.Error(), "many") {
				t.Errorf("%s: %d, %v; want a mistake, and 5", tt.settle, got, err)
			}
			continue
		}
		if err != nil || got != tt.want {
			t.Errorf("%s: %d, %v; want %d", tt.settle, got, err, tt.want)
		}
	}
	c := parse(t, "limits: [{name: l, rate: 100/s, settle: response.grpc_status}, {name: m, rate: 1/s, domain: shop}]")
	end.GRPCStatus, end.Duration = nil, nil
	if got, err := parse(t, "limits: [{name: l, rate: 100/s, settle: request.duration.getSeconds()}]").Settle(
		"default", "l", &end, 7); got != 7 || err != nil {
		t.Errorf("without a duration: %d, %v; want what was taken", got, err)
	}
	for _, limit := range [][2]string{{"default", "l"}, {"default", "m"}, {"shop", "m"}, {"shop", "l"}, {"default", "gone"}} {
		if got, err := c.Settle(limit[0], limit[1], &end, 7); got != 7 || err != nil {
			t.Errorf("%v: %d, %v; want what was taken", limit, got, err)
		}
	}
}

func TestSettleReads(t *testing.T) {
	c, _, err := Load("testdata/good/settle.yaml", env())
	if err != nil {
		t.Fatal(err)
	}
	headers, trailers := c.SettleReads()
	if !c.Settles() || !slices.Equal(headers, []string{"grpc-status", "simple", "x-other", "x-usage-tokens"}) ||
		!slices.Equal(trailers, []string{"grpc-status", "x-usage"}) {
		t.Errorf("%v, %q, %q", c.Settles(), headers, trailers)
	}
	if parse(t, "limits: [{name: l, rate: 1/s}]").Settles() {
		t.Error("a config without settle settles")
	}
}

func TestSettleWarnings(t *testing.T) {
	const redis, secret = "store: {redis: {url: 'redis://r'}}\n", "key_secret: a-secret-of-at-least-thirty-two-bytes\n"
	for text, want := range map[string]string{
		"limits: [{name: a, rate: 10/s, cost: 6, settle: 1}]":                                "only one request can be under way",
		"limits: [{name: a, rate: 10/s, cost: 5, settle: 1}]":                                "",
		redis + "limits: [{name: a, rate: 10/s, settle: 1}]":                                 "without key_secret",
		redis + "limits: [{name: a, rate: 10/s}]":                                            "",
		redis + secret + "limits: [{name: a, rate: 10/s, cost: 1, settle: 1}]":               "",
		redis + "limits: [{name: a, rate: 9/s, settle: 1}, {name: b, rate: 9/s, settle: 1}]": "without key_secret", // once
	} {
		var warned []string
		for _, w := range parse(t, text).Warnings {
			warned = append(warned, w.Message)
		}
		if want == "" && warned != nil || want != "" && (len(warned) != 1 || !strings.Contains(warned[0], want)) {
			t.Errorf("%s: %q; want %q", text, warned, want)
		}
	}
}

// What a limit that settles takes is held for settle_within.
func TestSettleHolds(t *testing.T) {
	c := parse(t, `
limits:
  - {name: a, rate: 10/s, settle: 0}
  - {name: b, rate: 10/s, settle: 0, settle_within: 2h}
  - {name: c, rate: 10/s}
`)
	var lives []time.Duration
	for _, charge := range c.Draw(&Request{Method: "GET", Path: "/"}).Charges {
		lives = append(lives, charge.HoldFor)
	}
	if !slices.Equal(lives, []time.Duration{time.Minute, 2 * time.Hour, 0}) {
		t.Error(lives)
	}
}
