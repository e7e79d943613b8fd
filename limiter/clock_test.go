package limiter

import (
	"context"
	"encoding/binary"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/sluiceproxy/sluice/limiter/redistest"
)

// stepped is a server whose clock a test steps while it runs.
type stepped struct {
	*redistest.Server
	t    *testing.T
	file string
}

func startStepped(t *testing.T) stepped {
	t.Helper()
	dir := t.TempDir()
	library, file := filepath.Join(dir, "clock.so"), filepath.Join(dir, "step")
	cc := os.Getenv("CC")
	if cc == "" {
		cc = "cc"
	}
	if out, err := exec.Command(cc, "-shared", "-fPIC", "-O1", "-o", library, "testdata/clock.c",
		"-ldl").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	s := stepped{t: t, file: file}
	s.step(0)
	t.Setenv("LD_PRELOAD", library)
	t.Setenv("CLOCK_STEP", file)
	s.Server = redistest.Start(t)
	return s
}

// step sets how far the server's clock is from the machine's.
func (s stepped) step(by time.Duration) {
	s.t.Helper()
	f, err := os.OpenFile(s.file, os.O_WRONLY|os.O_CREATE, 0o600)
	if err != nil {
		s.t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	if _, err := f.WriteAt(binary.NativeEndian.AppendUint64(nil, uint64(by.Microseconds())), 0); err != nil {
		s.t.Fatal(err)
	}
}

// If Redis's clock steps back, nothing is granted for it and no one waits
// longer than a token takes. If it steps forward, at most a burst is granted.
func TestClockSteps(t *testing.T) {
	server := startStepped(t)
	client := server.Client()
	r := newTestRedis(t, server.Server, serverClock)
	const rate, burst = 5, 20
	a := charge(bucket(t, rate, time.Second, burst), "a")
	now := time.Duration(0)
	for _, by := range []time.Duration{-time.Hour, time.Hour, time.Hour, -time.Hour} {
		verdicts := make([]Verdict, 1)
		for r.Take(t.Context(), []Charge{a}, verdicts); verdicts[0].Allowed; r.Take(t.Context(), []Charge{a}, verdicts) {
		}
		now += by
		stepped := time.Now()
		server.step(now)
		// Valkey 9.1 reads the machine's clock at most once a millisecond.
		off := func() time.Duration { return time.Until(client.Time(context.Background()).Val()) - now }
		for late := stepped.Add(time.Second); off().Abs() > time.Second; {
			if time.Now().After(late) {
				t.Fatalf("the clock is %v from where it should be", off())
			}
		}
		granted, first := 0, time.Duration(0)
		tick := time.NewTicker(2 * time.Millisecond)
		for time.Since(stepped) < 800*time.Millisecond {
			if r.Take(t.Context(), []Charge{a}, verdicts); verdicts[0].Err != nil {
				t.Fatal(verdicts[0].Err)
			}
			if !verdicts[0].Allowed {
				<-tick.C
				continue
			}
			if granted++; granted == 1 {
				first = time.Since(stepped)
			}
		}
		tick.Stop()
		// What was in the bucket before the step is less than a token.
		most := rate*time.Since(stepped).Seconds() + 1
		if by > 0 {
			most += burst
		}
		if float64(granted) > most {
			t.Errorf("a step by %v: %d tokens were granted, of at most %.1f", by, granted, most)
		}
		if by > 0 && granted < burst {
			t.Errorf("a step by %v: only %d tokens were granted: it was not felt", by, granted)
		}
		if granted == 0 || first > time.Second/rate+slack {
			t.Errorf("a step by %v: %d tokens were granted, the first after %v", by, granted, first)
		}
		t.Logf("a step by %v: %d tokens of at most %.1f, the first after %v", by, granted, most, first)
	}
}
