package main

import (
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// TestAccessLog checks that the shipped access log names no limit and no
// remaining tokens if no limit decided.
func TestAccessLog(t *testing.T) {
	up := startUpstream(t)
	p := startSluice(t, "--config", file(t, "sluice.yaml", `
exempt: [{match: {paths: [/exempt]}}]
limits: [{name: strict, rate: 1/d, match: {paths: [/strict]}}]
`))
	addr, stop := startLoggingEnvoy(t, filepath.Join(t.TempDir(), "access.log"), p.grpc, up.Listener.Addr().String())
	for _, path := range []string{"/free", "/exempt", "/strict", "/strict"} {
		fetch(t, client(t), "http://"+addr+path)
	}
	logged := strings.Join(regexp.MustCompile(`sluice=\S* limit=\S* remaining=\S*`).FindAllString(stop(), -1), "\n")
	if want := `sluice=unmatched limit=- remaining=-
sluice=exempt limit=- remaining=-
sluice=allowed limit=strict remaining=0
sluice=limited limit=strict remaining=0`; logged != want {
		t.Errorf("%s\nwant\n%s", logged, want)
	}
}
