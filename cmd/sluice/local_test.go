package main

import (
	"strings"
	"testing"

	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"

	"github.com/sluiceproxy/sluice/limiter/redistest"
)

// TestLocalSidecar checks that with on_failure: local a sidecar limits by
// itself without Redis, reports it, and is ready from the start.
func TestLocalSidecar(t *testing.T) {
	redis := redistest.Start(t)
	p := startSluice(t, "--redis", redis.URL(), "--config", file(t, "sluice.yaml", `
on_failure: local
local_share: 0.5
store: {redis: {timeout: 10s}}
limits: [{name: a, rate: 1/d, burst: 6, key: client.ip}]
`))
	conn := dial(t, p.grpc)
	ask := func() (allowed bool, metadata string) {
		t.Helper()
		r, err := authv3.NewAuthorizationClient(conn).Check(t.Context(), from("203.0.113.1", "/"))
		if err != nil {
			t.Fatal(err)
		}
		f := r.GetDynamicMetadata().GetFields()
		return r.GetOkResponse() != nil, f["decision"].GetStringValue() + " " + f["source"].GetStringValue()
	}
	if ok, m := ask(); !ok || m != "allowed redis" {
		t.Errorf("%v %s", ok, m)
	}
	redis.Kill()
	for i := range 5 {
		if ok, m := ask(); ok != (i < 3) || m != map[bool]string{true: "allowed local", false: "limited local"}[ok] {
			t.Errorf("%d: %v %s", i, ok, m)
		}
	}
	_, metrics := get(t, "http://"+p.metrics+"/metrics")
	for _, want := range []string{
		`sluice_checks_total{decision="failed_local"} 5`, `sluice_checks_total{decision="allowed"} 1`,
		`sluice_rejections_total{limit="a"} 2`, `sluice_store_breaker_open 1`, `sluice_janitor_entries{table="local"} 1`,
	} {
		if !strings.Contains(metrics, want) {
			t.Errorf("no %s", want)
		}
	}
	if status, _ := get(t, "http://"+p.metrics+"/readyz"); status != 200 {
		t.Errorf("/readyz: %d", status)
	}
}
