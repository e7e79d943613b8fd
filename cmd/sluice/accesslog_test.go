package main

import (
	"context"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/sluiceproxy/sluice/envoy"
)

// TestAccessLog checks that the shipped access log names no limit and no
// remaining tokens if no limit decided.
func TestAccessLog(t *testing.T) {
	up := startUpstream(t)
	p := startSluice(t, "--config", file(t, "sluice.yaml", `
exempt: [{match: {paths: [/exempt]}}]
limits: [{name: strict, rate: 1/d, match: {paths: [/strict]}}]
`))
	binary, release := envoyBinary(t)
	bootstrap, err := envoy.Plain(envoy.Options{
		Listener: "127.0.0.1:0", Admin: "127.0.0.1:0", Sluice: p.grpc, Upstream: up.Listener.Addr().String(), Envoy: release,
	})
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "access.log")
	log, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = log.Close() }()
	proxy, err := envoy.Start(context.WithoutCancel(t.Context()), binary, bootstrap, log)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(proxy.Stop)
	addr, err := proxy.Listener(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{"/free", "/exempt", "/strict", "/strict"} {
		fetch(t, client(t), "http://"+addr+path)
	}
	logged := func() string {
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		return strings.Join(regexp.MustCompile(`sluice=\S* limit=\S* remaining=\S*`).FindAllString(string(text), -1), "\n")
	}
	proxy.Stop() // flushes the access log
	if want := `sluice=unmatched limit=- remaining=-
sluice=exempt limit=- remaining=-
sluice=allowed limit=strict remaining=0
sluice=limited limit=strict remaining=0`; logged() != want {
		t.Errorf("%s\nwant\n%s", logged(), want)
	}
}
