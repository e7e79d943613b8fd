package envoy

import (
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"testing"
)

// parentEnv makes this test binary start an Envoy, print its address and wait
// for its end.
const parentEnv = "SLUICE_TEST_ENVOY"

func TestMain(m *testing.M) {
	if path := os.Getenv(parentEnv); path != "" {
		p, err := begin(context.Background(), path, Options{})
		if err == nil {
			var addr string
			if addr, err = p.Listener(context.Background()); err == nil {
				fmt.Println(addr)
				<-p.Done()
			}
		}
		fmt.Println(err)
		return
	}
	os.Exit(m.Run())
}

// begin starts an Envoy on free ports.
func begin(ctx context.Context, binary string, o Options) (*Process, error) {
	o.Listener, o.Admin = "127.0.0.1:0", "127.0.0.1:0"
	var err error
	if o.Envoy, err = ReleaseOf(ctx, binary); err != nil {
		return nil, err
	}
	bootstrap, err := Plain(o)
	if err != nil {
		return nil, err
	}
	return Start(ctx, binary, bootstrap, io.Discard)
}

// takes reports whether addr accepts connections.
func takes(addr string) bool {
	conn, err := net.Dial("tcp", addr)
	if err == nil {
		_ = conn.Close()
	}
	return err == nil
}

func TestStart(t *testing.T) {
	temporary := t.TempDir()
	t.Setenv("TMPDIR", temporary)
	// Several Envoys can run on one machine.
	other, err := begin(t.Context(), binary(t), Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer other.Stop()
	others, err := os.ReadDir(temporary)
	if err != nil {
		t.Fatal(err)
	}
	for name, o := range map[string]Options{
		"fixed addresses": {},
		"names":           {Upstream: "localhost:80", Sluice: "localhost:9001"},
		"unknown names":   {Upstream: "app.invalid:80", Sluice: "sluice.invalid:9001"},
	} {
		t.Run(name, func(t *testing.T) {
			p, err := begin(t.Context(), binary(t), o)
			if err != nil {
				t.Fatal(err)
			}
			addr, err := p.Listener(t.Context())
			if err != nil || !strings.HasPrefix(addr, "127.0.0.1:") || !takes(addr) {
				t.Errorf("listens on %q, %v", addr, err)
			}
			p.Stop()
			p.Stop()
			if takes(addr) {
				t.Error("still listens")
			}
			if got := p.Err().Error(); got != "Envoy exited: exit status 0" {
				t.Errorf("%s", got)
			}
			if _, err := p.Listener(t.Context()); err == nil || !strings.HasPrefix(err.Error(), "Envoy has no admin address: ") {
				t.Errorf("%v", err)
			}
			if files, err := os.ReadDir(temporary); err != nil || len(files) != len(others) {
				t.Errorf("left behind: %v, %v", files, err)
			}
		})
	}
}

func TestStartErrors(t *testing.T) {
	temporary := t.TempDir()
	t.Setenv("TMPDIR", temporary)
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = taken.Close() }()
	bootstrap, err := Plain(Options{Listener: taken.Addr().String(), Envoy: release(t)})
	if err != nil {
		t.Fatal(err)
	}
	envoy := binary(t)
	for name, tt := range map[string]struct{ binary, bootstrap, want string }{
		"port taken":     {envoy, string(bootstrap), "ddress already in use"},
		"no bootstrap":   {envoy, "static_resources: {listeners: [{nonsense: 1}]}", "nonsense"},
		"no such binary": {"/no/such/envoy", string(bootstrap), "/no/such/envoy: no such file or directory"},
		"no Envoy":       {"/bin/false", string(bootstrap), "Envoy did not start: exit status 1"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := Start(t.Context(), tt.binary, []byte(tt.bootstrap), io.Discard)
			if err == nil || !strings.Contains(err.Error(), tt.want) || strings.Contains(err.Error(), "\n") {
				t.Errorf("%v, want %s", err, tt.want)
			}
			empty(t, temporary)
		})
	}
}

// Envoy exits when its context ends, and Err says why it exited.
func TestEnd(t *testing.T) {
	temporary := t.TempDir()
	t.Setenv("TMPDIR", temporary)
	ctx, cancel := context.WithCancel(t.Context())
	for want, end := range map[string]func(*Process){
		"Envoy exited: signal: killed": func(p *Process) { _ = p.cmd.Process.Kill() },
		"Envoy exited: exit status 0":  func(*Process) { cancel() },
	} {
		p, err := begin(ctx, binary(t), Options{})
		if err != nil {
			t.Fatal(err)
		}
		end(p)
		<-p.Done()
		if got := p.Err().Error(); got != want {
			t.Errorf("%s, want %s", got, want)
		}
		empty(t, temporary)
		ctx, cancel = context.WithCancel(t.Context())
	}
	cancel()
}
