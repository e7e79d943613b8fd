//go:build linux

// Package redistest runs real Redis servers for tests.
package redistest

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"golang.org/x/sys/unix"
)

// startWithin bounds how long a server may take to start or to end.
const startWithin = 20 * time.Second

// maxTimes is the largest value of SLUICE_LONG: in longer runs some tests would use
// up what their buckets have.
const maxTimes = 5

// times returns the value of SLUICE_LONG, or 0 if the environment does not have it.
func times() int {
	said := os.Getenv("SLUICE_LONG")
	if said == "" {
		return 0
	}
	n, err := strconv.Atoi(said)
	if err != nil || n < 1 || n > maxTimes {
		panic(fmt.Sprintf("SLUICE_LONG=%q: set it to 1, or up to %d to run tests with faults that many times as long",
			said, maxTimes))
	}
	return n
}

// Scaled returns quick, or long if the environment has SLUICE_LONG. .ci/test runs at
// length those tests that match the -run pattern of one of its long stages.
func Scaled[T any](quick, long T) T {
	if times() > 0 {
		return long
	}
	return quick
}

// Lasts returns for how long a test makes load or faults: quick, or long times the
// value of SLUICE_LONG if the environment has it, which is 1 in the stages of
// .ci/test.
func Lasts(quick, long time.Duration) time.Duration {
	return Scaled(quick, time.Duration(times())*long)
}

// Server is a redis-server on a unix socket, without persistence unless its
// arguments say otherwise. Its methods fail the test that started it. They are
// not safe for concurrent use.
type Server struct {
	t      testing.TB
	dir    string
	config []string // the arguments before all others: a config file, or none
	args   []string
	cmd    *exec.Cmd
	done   chan struct{} // closed when cmd has ended

	mu  sync.Mutex
	log strings.Builder // the output of all its runs
}

// Start starts a server, waits until it answers, and stops it when the test
// ends. args are arguments of redis-server, such as "--maxmemory", "1mb".
// Without a redis-server the test fails: a skip would hide that nothing was
// tested.
func Start(t testing.TB, args ...string) *Server {
	t.Helper()
	return start(t, nil, args)
}

func start(t testing.TB, config, args []string) *Server {
	t.Helper()
	dir, err := os.MkdirTemp("", "redistest") // not t.TempDir: a socket's path is at most 107 bytes
	if err != nil {
		t.Fatal(err)
	}
	s := &Server{t: t, dir: dir, config: config, args: args}
	t.Cleanup(func() {
		s.Kill()
		_ = os.RemoveAll(dir)
	})
	s.Restart()
	return s
}

// URL returns the URL of the server. It does not change when the server
// restarts.
func (s *Server) URL() string { return "unix://" + s.socket() }

func (s *Server) socket() string { return filepath.Join(s.dir, "redis.sock") }

// Client returns a client of the server. It is closed when the test ends.
func (s *Server) Client() *redis.Client {
	c := redis.NewClient(&redis.Options{Network: "unix", Addr: s.socket(), MaxRetries: -1})
	s.t.Cleanup(func() { _ = c.Close() })
	return c
}

// Restart starts the server, which must not be running, and waits until it
// accepts connections. It loads what it has persisted.
func (s *Server) Restart() {
	s.t.Helper()
	args := slices.Concat(s.config, []string{"--port", "0", "--unixsocket", s.socket(), "--dir", s.dir, "--save", ""},
		s.args)
	s.cmd = exec.Command("redis-server", args...)
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	out, err := s.cmd.StdoutPipe()
	if err != nil {
		s.t.Fatal(err)
	}
	if err := s.cmd.Start(); err != nil {
		s.t.Fatalf("%v: these tests need a real redis-server on PATH (.github/CONTRIBUTING.md, Test)", err)
	}
	ready := make(chan bool, 1)
	s.done = make(chan struct{})
	go func(cmd *exec.Cmd, done chan struct{}) {
		defer close(done)
		lines := bufio.NewScanner(out)
		for lines.Scan() {
			s.mu.Lock()
			s.log.WriteString(lines.Text() + "\n")
			s.mu.Unlock()
			if strings.Contains(lines.Text(), "eady to accept connections") ||
				strings.Contains(lines.Text(), "+monitor master") { // a sentinel's
				select {
				case ready <- true:
				default: // an earlier line said so
				}
			}
		}
		_ = cmd.Wait()
		select {
		case ready <- false:
		default:
		}
	}(s.cmd, s.done)
	select {
	case isReady := <-ready:
		if !isReady {
			s.t.Fatalf("redis-server %v did not start:\n%s", s.args, s.Log())
		}
	case <-time.After(startWithin):
		s.t.Fatalf("redis-server %v did not start within %v", s.args, startWithin)
	}
}

// Log returns what the server has printed so far, in all its runs.
func (s *Server) Log() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.log.String()
}

// Kill ends the server at once, as a crash would. It may have ended already.
func (s *Server) Kill() { s.end(syscall.SIGKILL) }

// Shutdown stops the server by SIGTERM, as an operator would.
func (s *Server) Shutdown() { s.end(syscall.SIGTERM) }

func (s *Server) end(sig syscall.Signal) {
	if s.cmd == nil || s.cmd.Process == nil {
		return
	}
	_ = s.cmd.Process.Signal(sig) // it may have ended by itself
	select {
	case <-s.done:
	case <-time.After(startWithin):
		s.t.Errorf("redis-server did not end within %v of %v", startWithin, sig)
	}
	s.cmd = nil
}

// Freeze suspends the server: its connections stay open, and nothing answers.
func (s *Server) Freeze() { s.signal(syscall.SIGSTOP) }

// Thaw resumes a frozen server.
func (s *Server) Thaw() { s.signal(syscall.SIGCONT) }

func (s *Server) signal(sig syscall.Signal) {
	s.t.Helper()
	if err := s.cmd.Process.Signal(sig); err != nil {
		s.t.Fatal(err)
	}
}

// CPU returns how much processor time the server has used since it was started
// last. It must be running.
func (s *Server) CPU() time.Duration {
	s.t.Helper()
	return ProcessTime(s.t, s.cmd.Process.Pid)
}

// ProcessTime returns how much processor time all threads of a process have
// used so far, to the nanosecond. getrusage(2), Redis's INFO and /proc/PID/stat
// tell it in steps of a timer tick.
func ProcessTime(t testing.TB, pid int) time.Duration {
	t.Helper()
	const perProcess = 2 // CPUCLOCK_SCHED: the clock's number is made as clock_getcpuclockid(3) does
	var used unix.Timespec
	if err := unix.ClockGettime(int32(^pid)<<3|perProcess, &used); err != nil {
		t.Fatalf("the processor time of process %d: %v", pid, err)
	}
	return time.Duration(used.Nano())
}

// Info returns the fields of a section of INFO.
func (s *Server) Info(section string) map[string]string {
	s.t.Helper()
	c := redis.NewClient(&redis.Options{Network: "unix", Addr: s.socket(), MaxRetries: -1})
	defer func() { _ = c.Close() }()
	text, err := c.Info(context.Background(), section).Result()
	if err != nil {
		s.t.Fatal(err)
	}
	fields := make(map[string]string)
	for line := range strings.Lines(text) {
		if name, value, ok := strings.Cut(strings.TrimSpace(line), ":"); ok {
			fields[name] = value
		}
	}
	return fields
}

// Node is a server that also listens on a TCP port.
type Node struct {
	*Server
	Addr string // host:port
}

// StartNode starts a server on a free port.
func StartNode(t testing.TB, args ...string) *Node {
	t.Helper()
	return startNode(t, nil, args)
}

func startNode(t testing.TB, config, args []string) *Node {
	t.Helper()
	port := FreePort(t)
	return &Node{start(t, config, append([]string{"--port", port, "--bind", "127.0.0.1"}, args...)), "127.0.0.1:" + port}
}

// StartSentinel starts a sentinel that monitors the master on host:port as
// "mymaster", and takes it for down after a minute of silence. args are as in
// Start.
func StartSentinel(t testing.TB, master string, args ...string) *Node {
	t.Helper()
	host, port, _ := strings.Cut(master, ":")
	config := filepath.Join(t.TempDir(), "sentinel.conf")
	text := fmt.Sprintf("sentinel monitor mymaster %s %s 1\nsentinel down-after-milliseconds mymaster 60000\n", host, port)
	must(t, os.WriteFile(config, []byte(text), 0o600))
	return startNode(t, []string{config, "--sentinel"}, args)
}

// StartCluster starts a Redis Cluster of so many masters on free ports, each
// with an equal part of the slots. args are as in Start.
func StartCluster(t testing.TB, masters int, args ...string) []*Node {
	t.Helper()
	var nodes []*Node
	for range masters {
		nodes = append(nodes,
			StartNode(t, append([]string{"--cluster-enabled", "yes", "--cluster-node-timeout", "2000"}, args...)...))
	}
	ctx := context.Background()
	const slots = 16384
	for i, n := range nodes {
		c := n.Client()
		// With equal epochs the nodes would disagree on who has which slot.
		must(t, c.Do(ctx, "CLUSTER", "SET-CONFIG-EPOCH", i+1).Err())
		must(t, c.ClusterAddSlotsRange(ctx, i*slots/masters, (i+1)*slots/masters-1).Err())
		must(t, c.Do(ctx, "CONFIG", "SET", "cluster-announce-ip", "127.0.0.1").Err())
		for _, other := range nodes[:i] {
			host, port, _ := strings.Cut(other.Addr, ":")
			must(t, c.ClusterMeet(ctx, host, port).Err())
		}
	}
	await(t, "the cluster is ready", func() bool {
		for _, n := range nodes {
			info := n.Client().ClusterInfo(ctx).Val()
			if !strings.Contains(info, "cluster_state:ok") ||
				!strings.Contains(info, "cluster_known_nodes:"+strconv.Itoa(masters)) {
				return false
			}
		}
		return true
	})
	return nodes
}

// FreePort returns a free TCP port. The port 10000 above it, which a cluster's
// bus needs, is free too.
func FreePort(t testing.TB) string {
	t.Helper()
	for range 100 {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		must(t, err)
		port := l.Addr().(*net.TCPAddr).Port
		must(t, l.Close())
		if port+10_000 > 65535 {
			continue
		}
		if bus, err := net.Listen("tcp", "127.0.0.1:"+strconv.Itoa(port+10_000)); err == nil {
			must(t, bus.Close())
			return strconv.Itoa(port)
		}
	}
	t.Fatal("no free port")
	return ""
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// MoveSlot moves a slot of a cluster with its keys, while clients may use it,
// and returns when all nodes know.
func MoveSlot(t testing.TB, nodes []*Server, slot int, from, to *Server) {
	t.Helper()
	ctx := context.Background()
	client := make(map[*Server]*redis.Client, len(nodes))
	id := make(map[*Server]string, len(nodes))
	for _, n := range nodes {
		c := redis.NewClient(&redis.Options{Network: "unix", Addr: n.socket(), MaxRetries: -1})
		defer func() { _ = c.Close() }()
		client[n], id[n] = c, c.Do(ctx, "CLUSTER", "MYID").Val().(string)
	}
	await(t, "all nodes are well", func() bool {
		for _, c := range client {
			if !strings.Contains(c.ClusterInfo(ctx).Val(), "cluster_state:ok") {
				return false
			}
		}
		return true
	})
	must(t, client[to].Do(ctx, "CLUSTER", "SETSLOT", slot, "IMPORTING", id[from]).Err())
	must(t, client[from].Do(ctx, "CLUSTER", "SETSLOT", slot, "MIGRATING", id[to]).Err())
	port := client[to].ConfigGet(ctx, "port").Val()["port"]
	for {
		keys, err := client[from].ClusterGetKeysInSlot(ctx, slot, 10).Result()
		must(t, err)
		if len(keys) == 0 {
			break
		}
		args := []any{"MIGRATE", "127.0.0.1", port, "", 0, startWithin.Milliseconds(), "KEYS"}
		for _, k := range keys {
			args = append(args, k)
		}
		must(t, client[from].Do(ctx, args...).Err())
	}
	// Tell the new owner first, or for a moment no node would have the slot. The
	// old owner may learn of it before it is told.
	for _, n := range append([]*Server{to, from}, nodes...) {
		must(t, client[n].Do(ctx, "CLUSTER", "SETSLOT", slot, "NODE", id[to]).Err())
	}
	// Each node knows now, but older gossip may still be under way, and overrules
	// a claim without the new epoch of the new owner.
	epoch := field(client[to].ClusterInfo(ctx).Val(), "cluster_my_epoch")
	await(t, "all nodes know who has the slot", func() bool {
		for _, c := range client {
			for line := range strings.Lines(c.ClusterNodes(ctx).Val()) {
				// id address flags master ping pong epoch link slots...
				if f := strings.Fields(line); len(f) > 6 && f[0] == id[to] && f[6] != epoch {
					return false
				}
			}
			for _, has := range c.ClusterSlots(ctx).Val() { //nolint:staticcheck // as the library does itself
				if has.Start <= slot && slot <= has.End && has.Nodes[0].ID != id[to] {
					return false
				}
			}
		}
		return true
	})
}

// field returns the value of a field in the output of INFO or CLUSTER INFO;
// empty if it is missing.
func field(info, name string) string {
	for line := range strings.Lines(info) {
		if n, value, ok := strings.Cut(strings.TrimSpace(line), ":"); ok && n == name {
			return value
		}
	}
	return ""
}

func await(t testing.TB, what string, is func() bool) {
	t.Helper()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for late := time.After(startWithin); !is(); {
		select {
		case <-tick.C:
		case <-late:
			t.Fatalf("not within %v: %s", startWithin, what)
		}
	}
}

// Pace calls do so many times a second for a while, each time in a goroutine of
// its own, and waits for all of them.
func Pace(perSecond int, lasts time.Duration, do func()) {
	tick := time.NewTicker(time.Second / time.Duration(perSecond))
	defer tick.Stop()
	var wg sync.WaitGroup
	began := time.Now()
	for done := 0; done < int(float64(perSecond)*lasts.Seconds()); {
		<-tick.C // one that was late stands for several
		for ; done < int(float64(perSecond)*min(time.Since(began), lasts).Seconds()); done++ {
			wg.Go(do)
		}
	}
	wg.Wait()
}
