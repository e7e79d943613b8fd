package testenv

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

// MemoryGroup is a control group that limits the memory of the processes in it,
// as a container's does.
type MemoryGroup struct {
	dir                 string
	limit, peak, events string // file names
}

// NewMemoryGroup creates a control group with a limit in bytes and removes it
// when the test ends, by when its processes must have ended. The name tells the
// groups of one test process apart. It needs root.
func NewMemoryGroup(t *testing.T, name string, limit int) *MemoryGroup {
	t.Helper()
	const root = "/sys/fs/cgroup"
	name = fmt.Sprintf("sluice-%d-%s", os.Getpid(), name)
	g := &MemoryGroup{filepath.Join(root, "memory", name), "memory.limit_in_bytes", "memory.max_usage_in_bytes",
		"memory.oom_control"}
	if _, err := os.Stat(filepath.Join(root, "memory")); err != nil { // control groups version 2
		g = &MemoryGroup{filepath.Join(root, name), "memory.max", "memory.peak", "memory.events"}
		// It may be enabled already.
		_ = os.WriteFile(filepath.Join(root, "cgroup.subtree_control"), []byte("+memory"), 0)
	}
	if err := os.Mkdir(g.dir, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.Remove(g.dir); err != nil {
			t.Error(err)
		}
	})
	if err := os.WriteFile(filepath.Join(g.dir, g.limit), []byte(strconv.Itoa(limit)), 0); err != nil {
		t.Fatal(err)
	}
	return g
}

// Launcher returns an executable that starts program inside the group, with its
// own arguments, as the process that it was started as.
func (g *MemoryGroup) Launcher(t *testing.T, program string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), filepath.Base(program))
	script := fmt.Sprintf("#!/bin/sh\necho $$ >'%s' && exec '%s' \"$@\"\n", filepath.Join(g.dir, "cgroup.procs"), program)
	if err := os.WriteFile(path, []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
	return path
}

// Killed reports whether the kernel has killed a process of the group because
// the group was out of memory.
func (g *MemoryGroup) Killed(t *testing.T) bool {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(g.dir, g.events))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		if n, ok := strings.CutPrefix(line, "oom_kill "); ok {
			return strings.TrimSpace(n) != "0"
		}
	}
	t.Fatalf("%s: %s", g.events, text)
	return true
}

// Peak returns the peak memory use of the group in bytes, which includes the
// pages of files that were read first in it.
func (g *MemoryGroup) Peak(t *testing.T) int {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(g.dir, g.peak))
	if err != nil {
		t.Fatal(err)
	}
	n, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil {
		t.Fatal(err)
	}
	return n
}
