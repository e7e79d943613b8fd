package main

import (
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
)

func TestListenUnix(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "s.sock")
	addr := "unix://" + path
	first, err := listen(addr, zap.NewNop())
	if err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o666 {
		t.Errorf("%v, %v", info.Mode(), err)
	}
	if _, err := listen(addr, zap.NewNop()); err == nil || err.Error() != "listen unix "+path+": address already in use" {
		t.Errorf("a live one: %v", err)
	}

	// As in a restart, the first listener is closed after the second has
	// replaced it.
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	second, err := listen(addr, zap.NewNop())
	if err != nil {
		t.Fatalf("a stale one: %v", err)
	}
	defer func() { _ = second.Close() }()
	_ = first.Close()
	go func() { // a process that answers
		for c, err := second.Accept(); err == nil; c, err = second.Accept() {
			_ = c.Close()
		}
	}()
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatalf("the first took the second's socket with it: %v", err)
	}
	_ = c.Close()

	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := listen("unix://"+file, zap.NewNop()); err == nil || err.Error() != file+" exists and is not a socket" {
		t.Errorf("a file: %v", err)
	}
	if b, err := os.ReadFile(file); err != nil || string(b) != "precious" {
		t.Errorf("the file is %q, %v", b, err)
	}
	if _, err := listen("unix://"+filepath.Join(dir, "no", "s.sock"), zap.NewNop()); err == nil ||
		!strings.Contains(err.Error(), "no such file or directory") {
		t.Errorf("no directory: %v", err)
	}
}

// TestListenUnixAtOnce checks that exactly one of many processes that start at
// once gets a stale socket, and keeps it.
func TestListenUnixAtOnce(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s.sock")
	stale, err := listen("unix://"+path, zap.NewNop())
	if err != nil {
		t.Fatal(err)
	}
	_ = stale.Close()
	var wg sync.WaitGroup
	var mu sync.Mutex
	var got []net.Listener
	for range 20 {
		wg.Go(func() {
			if l, err := listen("unix://"+path, zap.NewNop()); err == nil {
				mu.Lock()
				defer mu.Unlock()
				got = append(got, l)
			}
		})
	}
	wg.Wait()
	if len(got) != 1 {
		t.Errorf("%d listen", len(got))
	}
	for _, l := range got {
		_ = l.Close()
	}
}

func TestListenErrors(t *testing.T) {
	l, err := listen("127.0.0.1:0", zap.NewNop())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	for addr, want := range map[string]string{
		l.Addr().String():  "listen tcp " + l.Addr().String() + ": address already in use",
		"9001":             `"9001": must be host:port or unix:///absolute/path`,
		"127.0.0.1:":       `"127.0.0.1:": must be host:port or unix:///absolute/path`,
		"unix://s.sock":    `"unix://s.sock": must be host:port or unix:///absolute/path`,
		"127.0.0.1:999999": "listen tcp: address 999999: invalid port",
	} {
		if _, err := listen(addr, zap.NewNop()); err == nil || err.Error() != want {
			t.Errorf("%s: %v, want %s", addr, err, want)
		}
	}
}

// TestListenUnixLocked checks that a start that waits for the lock on the
// socket's directory logs it.
func TestListenUnixLocked(t *testing.T) {
	dir := t.TempDir()
	held, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = held.Close() }()
	if err := syscall.Flock(int(held.Fd()), syscall.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	core, logged := observer.New(zap.WarnLevel)
	bound := make(chan error, 1)
	go func() {
		l, err := listen("unix://"+filepath.Join(dir, "s.sock"), zap.New(core))
		if err == nil {
			err = l.Close()
		}
		bound <- err
	}()
	eventually(t, "a warning about the lock", func() bool { return logged.Len() == 1 })
	if err := syscall.Flock(int(held.Fd()), syscall.LOCK_UN); err != nil {
		t.Fatal(err)
	}
	if err := <-bound; err != nil {
		t.Error(err)
	}
}
