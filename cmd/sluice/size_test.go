package main

import (
	"os"
	"testing"
)

// TestProgramIsSmall checks that no package makes the linker keep every
// exported method, as text/template does, because it finds methods by names at
// run time. The program is then half as large again. `go build
// -ldflags=-dumpdep` shows ReflectMethod for such a package.
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
