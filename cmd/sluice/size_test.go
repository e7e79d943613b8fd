package main

import (
	"os"
	"testing"
)

// The program is as small as its code: no package makes the linker keep every
// exported method of all others, as one that finds methods by names made up at
// run time does (text/template; `go build -ldflags=-dumpdep` says
// ReflectMethod). It is then half as large again.
func TestProgramIsSmall(t *testing.T) {
	if os.Getenv("SLUICE_LONG") == "" {
		t.Skip("compiles all anew, with the image's flags: set SLUICE_LONG=1")
	}
	const most = 30 << 20
	info, err := os.Stat(build(t))
	if err != nil {
		t.Fatal(err)
	}
	if t.Logf("%.1f MiB", float64(info.Size())/(1<<20)); info.Size() > most {
		t.Errorf("the program has %d bytes, more than %d", info.Size(), most)
	}
}
