package main

import (
	"encoding/json"
	"strings"
	"testing"

	"google.golang.org/protobuf/encoding/protojson"

	"github.com/sluiceproxy/sluice/authz"
	"github.com/sluiceproxy/sluice/limiter/policy"
	"github.com/sluiceproxy/sluice/limiter/redistest"
)

const explained = `
domain: shop/checkout
exempt: [{match: {paths: [/healthz]}}]
limits:
  - {name: per-client, key: client.network, rate: 10/d, burst: 20}
  - name: orders
    match: {methods: [POST], paths: [/v1/orders]}
    when: request.headers["x-beta"] != "on"
    key:
      - request.headers["x-api-key"]
      - request.method
    rate: 60/d
    burst: 7
    cost: 5
    group: plan
    overrides: [{key: [gold, POST], rate: 1/d, burst: 100}]
  - {name: fallback, group: plan, rate: 1/d}
  - {name: watched, mode: shadow, rate: 1/d}
  - {name: inside, match: {clients: [10.0.0.0/8]}, rate: unlimited}
`

// TestExplain checks that explain says what is then decided, and that it takes
// no tokens.
func TestExplain(t *testing.T) {
	redis := redistest.Start(t)
	config := file(t, "sluice.yaml", explained+"store: {redis: {url: '"+redis.URL()+"', timeout: 20s}}\n")
	p := startSluice(t, "--config", config)
	conn := dial(t, p.grpc)
	order := []string{
		"explain",
		"--config",
		config,
		"--method",
		"POST",
		"--path",
		"/v1/orders",
		"--source",
		"203.0.113.7",
		"--header",
		"X-API-Key=k",
	}
	for range 3 {
		status, stdout, stderr := sluice(t, nil, order...)
		if want := `POST /v1/orders
client 203.0.113.7, domain shop/checkout

  applies  per-client  cost 1, remaining 20; burst 20, rate 10/d
                       it applies to every request
                       key =11.203.0.113.7
  applies  orders      cost 5, remaining 7; burst 7, rate 60/d
                       it matches
                       key #43.gleutKJ6evplE1M8ieEaLYSXdt5CT2IjwGHxohIrnFo=4.POST
  no       fallback    orders comes first in the group plan
  applies  watched     cost 1, remaining 1; burst 1, rate 1/d; shadow, never denies
                       it applies to every request
                       key -
  no       inside      client 203.0.113.7 is in none of match.clients

allowed
`; status != 0 || stderr != "" ||
			stdout != strings.Replace(want, "gleutKJ6evplE1M8ieEaLYSXdt5CT2IjwGHxohIrnFo", hashOf("k"), 1) {
			t.Fatalf("%d %s\n%s", status, stderr, stdout)
		}
	}
	request := checkRequest("203.0.113.7", "POST", "/v1/orders", map[string]string{"x-api-key": "k"})
	if got := check(t, conn, request); got != "ok" {
		t.Fatal(got)
	}
	// Now there are too few tokens. The request comes from Envoy's debug log,
	// and then flags override it.
	text, err := protojson.Marshal(request)
	if err != nil {
		t.Fatal(err)
	}
	fromFile := []string{"explain", "--config", config, "--request", file(t, "request.json", string(text)), "-o", "json"}
	status, stdout, stderr := sluice(t, nil, fromFile...)
	var e authz.Explanation
	if err := json.Unmarshal([]byte(stdout), &e); err != nil || status != 1 || stderr != "" {
		t.Fatalf("%d %s %v\n%s", status, stderr, err, stdout)
	}
	orders := e.Limits[1]
	if e.Decision != "limited" || e.Domain != "shop/checkout" || e.Client != "203.0.113.7" || len(e.Limits) != 5 ||
		!orders.Applies || *orders.Remaining != 2 ||
		*orders.Cost != 5 || *orders.Burst != 7 || orders.Rate != "60/d" || orders.Mode != "enforce" ||
		*orders.RetryAfter < 4000 || *orders.RetryAfter > 4320 ||
		*e.Limits[0].Remaining != 19 || e.Limits[3].Mode != "shadow" || *e.Limits[3].RetryAfter < 80_000 ||
		e.Limits[4].Applies ||
		e.Limits[4].Burst != nil ||
		e.Limits[2].Key != nil {
		t.Errorf("%s", stdout)
	}
	if got := check(t, conn, request); got != "429" {
		t.Errorf("explained as limited: %s", got)
	}
	status, stdout, _ = sluice(t, nil, append(fromFile, "--header", "x-api-key=gold")...)
	if status != 0 || !strings.Contains(stdout, `"decision": "allowed"`) ||
		!strings.Contains(stdout, `"reason": "it matches; its rate is from overrides[0]"`) {
		t.Errorf("%d\n%s", status, stdout)
	}

	redis.Kill()
	status, stdout, stderr = sluice(t, nil, order...)
	if status != 1 || !strings.HasSuffix(stdout,
		"\nfailed_closed: a bucket cannot be read from Redis, and on_failure refuses the request\n") ||
		!strings.Contains(stdout, "its bucket is unknown: store: connection") {
		t.Errorf("%d %s\n%s", status, stderr, stdout)
	}
}

func hashOf(value string) string {
	c, err := policy.Parse(
		"", []byte(`limits: [{name: a, rate: 1/s, key: 'request.headers.k'}]`),
		func(string) (string, bool) { return "", false },
	)
	if err != nil {
		return err.Error()
	}
	d := c.Draw(&policy.Request{Headers: map[string]string{"k": value}})
	_, key, _ := strings.Cut(d.Charges[0].Key, "#43.")
	return strings.TrimSuffix(key, "}")
}

func TestExplainWithoutRedis(t *testing.T) {
	config := file(t, "sluice.yaml", explained)
	for _, tt := range []struct {
		args   string
		status int
		want   string // in the output
	}{
		{"", 0, "GET /\nclient 127.0.0.1, domain shop/checkout\n"},
		{
			"", 0,
			"\nallowed\n(without Redis the buckets are in the sidecar's process and cannot be read; they are assumed full)\n",
		},
		{"", 0, "cost 1, remaining unknown; burst 20, rate 10/d"},
		{"--path /healthz", 0, "\nexempt\n(exempt[0] holds)\n"},
		{"--source 10.1.2.3", 0, "inside      unlimited\n"},
		{"--source ::1", 0, "key =5.::/64\n"},
		{"--host a.example.com:80 --path //x?y", 0, "GET a.example.com:80//x?y\n"},
		{"--path /\x1b[31m", 0, "GET /\\x1b[31m\n"},
		{"--context sluice.limits=orders", 0, "\nunmatched: no limit applies, so the request passes\n"},
		{"--context sluice.limits=orders", 0, "no       per-client  the route's sluice.limits does not name it"},
		{"--context sluice.limit.big={rate: 5/s, cost: 'request.method.size() * 2'}", 1, "\nlimited by big forever\n"},
		{
			"--context sluice.limit.big={rate: 5}", 1,
			"\ninvalid\n(the request reveals an error in the config; limit big: context_extensions: sluice.limit.big:1:8: " +
				"rate: invalid rate \"5\"; a rate needs a period",
		},
		{
			"--context sluice.limits=none -o json", 1,
			`"note": "the request reveals an error in the config; context_extensions: sluice.limits: unknown limit \"none\""`,
		},
		{"-o json", 0, `"remaining": null`},
		{
			"--header x-a=1 --header x-a=2 --context sluice.limit.a={rate: 1/s, when: 'request.headers[\"x-a\"] == \"1,2\"'}", 0,
			"applies  a           cost 1,",
		},
	} {
		args := []string{"explain", "--config", config}
		for word := range strings.SplitSeq(tt.args, " --") {
			if word == "" {
				continue
			}
			word, json, isJSON := strings.Cut(strings.TrimPrefix(word, "--"), " -o ")
			if word == "-o json" {
				args = append(args, "-o", "json")
				continue
			}
			flag, value, _ := strings.Cut(word, " ")
			args = append(args, "--"+flag, strings.ReplaceAll(value, `\"`, `"`))
			if isJSON {
				args = append(args, "-o", json)
			}
		}
		if status, stdout, stderr := sluice(t, nil, args...); status != tt.status || !strings.Contains(stdout, tt.want) {
			t.Errorf("%q: status %d\n%s%s\nwant %d with %q", args, status, stdout, stderr, tt.status, tt.want)
		}
	}
	// Without a config only the route's limits apply.
	status, stdout, _ := sluice(t, nil, "explain", "--context", "sluice.limit.a={rate: 5/m}")
	if status != 0 || !strings.Contains(stdout, "applies  a  cost 1, remaining unknown; burst 5, rate 5/m") {
		t.Errorf("%d\n%s", status, stdout)
	}
	// As in a pod, the environment has the URL of Redis.
	redis := redistest.Start(t)
	status, stdout, _ = sluice(
		t, []string{"SLUICE_CONFIG=" + config, "SLUICE_REDIS=" + redis.URL(), "SLUICE_DOMAIN=mine"}, "explain",
	)
	if status != 0 || !strings.Contains(stdout, "cost 1, remaining 20;") || !strings.Contains(stdout, "domain mine") {
		t.Errorf("%d\n%s", status, stdout)
	}
}

func TestExplainErrors(t *testing.T) {
	config := file(t, "sluice.yaml", explained)
	for _, tt := range []struct {
		args   []string
		status int
		want   string
	}{
		{
			[]string{"--config", config, "--source", "here"}, 2,
			"sluice: --source \"here\": must be an IP address\nSee 'sluice explain --help'.\n",
		},
		{
			[]string{"--config", config, "--path", "x"}, 2,
			"sluice: --path \"x\": must begin with /\nSee 'sluice explain --help'.\n",
		},
		{
			[]string{"--config", config, "--header", "x"}, 2,
			"sluice: --header \"x\": must be name=value\nSee 'sluice explain --help'.\n",
		},
		{
			[]string{"--config", config, "--context", "=x"}, 2,
			"sluice: --context \"=x\": must be name=value\nSee 'sluice explain --help'.\n",
		},
		{
			[]string{"--config", config, "-o", "yaml"}, 2,
			"sluice: -o \"yaml\": must be text or json\nSee 'sluice explain --help'.\n",
		},
		{
			[]string{"--config", config, "extra"}, 2,
			"sluice: unexpected argument \"extra\"; sluice explain takes only flags\nSee 'sluice explain --help'.\n",
		},
		{[]string{"--config", "none.yaml"}, 1, "none.yaml: no such file or directory\n"},
		{
			[]string{"--config", config, "--request", "none.json"}, 1,
			"sluice: --request: open none.json: no such file or directory\n",
		},
		{
			[]string{"--config", config, "--request", config}, 1,
			"sluice: --request " + config + ": not a CheckRequest in JSON: ",
		},
		{
			[]string{"--config", config, "--request", file(t, "empty.json", "{}")}, 1,
			"the check has no HTTP request; ext_authz must be configured as an HTTP filter\n",
		},
	} {
		status, stdout, stderr := sluice(t, nil, append([]string{"explain"}, tt.args...)...)
		if status != tt.status || stdout != "" || !strings.Contains(stderr, tt.want) {
			t.Errorf("%v: %d %s%s\nwant %d %s", tt.args, status, stdout, stderr, tt.status, tt.want)
		}
	}
}

func TestSchemaCommand(t *testing.T) {
	status, stdout, stderr := sluice(t, nil, "schema")
	if status != 0 || stdout != string(policy.Schema) || stderr != "" || !json.Valid([]byte(stdout)) {
		t.Errorf("%d %s %d bytes", status, stderr, len(stdout))
	}
}
