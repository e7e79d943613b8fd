package main

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/sluiceproxy/sluice/envoy"
	"github.com/sluiceproxy/sluice/k8s/testenv"
)

// releaseAddress is another address of the machine on which TestRelease uses
// the archive.
const releaseAddress = "192.0.2.20"

// TestRelease makes a snapshot with .ci/release, from a fresh clone, and checks
// what is in it. It then uses the archive as its users do on a machine with
// nothing but the archive, an Envoy and a Redis: demo, run, doctor.
func TestRelease(t *testing.T) {
	if os.Getenv("SLUICE_LONG") == "" {
		t.Skip("needs root, and builds goreleaser and sluice for all platforms: set SLUICE_LONG=1")
	}
	dir, inside := testenv.Machine(t, func(dir string) {
		if _, err := envoy.Binary(t.Context(), func(s string) { t.Log(s) }); err != nil {
			t.Fatal(err)
		}
		checkRefusals(t, clone(t, filepath.Join(dir, "tagged")))
		checkRelease(t, makeRelease(t, dir))
	}, releaseAddress)
	if inside {
		useArchive(t, dir)
	}
}

// git runs git, and returns what it prints.
func git(t *testing.T, dir string, args ...string) string {
	t.Helper()
	c := exec.CommandContext(t.Context(), "git", append([]string{
		"-c", "user.name=test", "-c", "user.email=test@localhost", "-c", "init.defaultBranch=main",
	}, args...)...)
	c.Dir = dir
	out, err := c.Output()
	if err != nil {
		t.Fatalf("git %q: %v", args, err)
	}
	return strings.TrimSpace(string(out))
}

// clone makes a repository whose one commit has the files of this one as they
// are now, and returns its directory.
func clone(t *testing.T, to string) string {
	t.Helper()
	from, err := filepath.Abs(filepath.Join("..", ".."))
	if err != nil {
		t.Fatal(err)
	}
	names := git(t, from, "ls-files", "-z", "--cached", "--others", "--exclude-standard")
	for name := range strings.SplitSeq(names, "\x00") {
		info, err := os.Stat(filepath.Join(from, name))
		if name == "" || os.IsNotExist(err) { // deleted, and not committed yet
			continue
		}
		var text []byte
		if err == nil {
			text, err = os.ReadFile(filepath.Join(from, name))
		}
		if err == nil {
			err = os.MkdirAll(filepath.Dir(filepath.Join(to, name)), 0o755)
		}
		if err == nil {
			err = os.WriteFile(filepath.Join(to, name), text, info.Mode())
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	git(t, to, "init", "--quiet")
	git(t, to, "remote", "add", "origin", from) // as a clone has one
	git(t, to, "add", "--all")
	git(t, to, "commit", "--quiet", "--message", "as it is")
	return to
}

// checkRefusals checks that a tag that the files of the repository do not have
// makes no release.
func checkRefusals(t *testing.T, dir string) {
	t.Helper()
	git(t, dir, "tag", "v9.9.9")
	out, err := exec.CommandContext(t.Context(), "bash", filepath.Join(dir, ".ci", "release")).CombinedOutput()
	if err == nil || !strings.Contains(string(out), "k8s/chart/Chart.yaml: does not have v9.9.9") {
		t.Errorf("a tag of another version: %v\n%s", err, out)
	}
}

// release is what .ci/release made.
type release struct{ dir, version, commit string }

// archive returns the name of the directory in an archive, and the archive's
// without its ending.
func (r release) archive(platform string) string { return "sluice_" + r.version + "_" + platform }

// makeRelease makes a snapshot in dir.
func makeRelease(t *testing.T, dir string) release {
	t.Helper()
	source := clone(t, filepath.Join(dir, "source"))
	c := exec.CommandContext(t.Context(), "bash", ".ci/release")
	c.Dir = source
	c.Env = append(os.Environ(), imageBases(t, dir)...)
	out, err := c.CombinedOutput()
	t.Logf("%s", out)
	if err != nil {
		t.Fatal(err)
	}
	version := unique(string(out), `(?m)^== sluice (\S+)$`)
	if len(version) != 1 {
		t.Fatalf("versions %q", version)
	}
	r := release{
		dir: filepath.Join(source, "dist"), version: version[0], commit: git(t, source, "rev-parse", "--short", "HEAD"),
	}
	if !strings.HasSuffix(r.version, "-SNAPSHOT-"+r.commit) {
		t.Errorf("version %s of commit %s", r.version, r.commit)
	}
	if changed := git(t, source, "status", "--porcelain", "--ignored"); changed != "!! dist/" {
		t.Errorf("a release leaves behind\n%s", changed)
	}
	if err := os.WriteFile(filepath.Join(dir, "version"), []byte(r.version), 0o600); err != nil {
		t.Fatal(err)
	}
	return r
}

// imageBases makes stand-ins for the images that the Dockerfile begins with, as
// there is no registry here, and returns the environment in which buildah finds
// them. They have this machine's Go with its modules and caches.
func imageBases(t *testing.T, dir string) []string {
	t.Helper()
	home := filepath.Join(dir, "buildah")
	write := func(name, text string) string {
		path := filepath.Join(home, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	// The images are built without a network: the modules must all be there.
	if out, err := exec.CommandContext(t.Context(), "go", "mod", "download").CombinedOutput(); err != nil {
		t.Fatalf("go mod download: %v\n%s", err, out)
	}
	of := func(name string) string {
		out, err := exec.CommandContext(t.Context(), "go", "env", name).Output()
		if err != nil {
			t.Fatal(err)
		}
		return strings.TrimSpace(string(out))
	}
	env := []string{
		"BUILDAH_ISOLATION=chroot",
		"TMPDIR=" + home,
		"CONTAINERS_STORAGE_CONF=" + write("storage.conf", fmt.Sprintf(
			"[storage]\ndriver = \"vfs\"\ngraphroot = %q\nrunroot = %q\n", home+"/images", home+"/run")),
		"CONTAINERS_CONF=" + write("containers.conf", fmt.Sprintf(
			"[containers]\nnetns = \"host\"\nvolumes = [%q, %q, %q]\n",
			of("GOROOT")+":/usr/local/go:ro", of("GOMODCACHE")+":/modules", of("GOCACHE")+":/builds")),
	}
	busybox, err := exec.LookPath("busybox")
	if err != nil {
		t.Fatalf("%v: install what .ci/test does", err)
	}
	text, err := os.ReadFile(busybox)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(write("go/root/bin/busybox", string(text)), 0o755); err != nil {
		t.Fatal(err)
	}
	write("go/root/tmp/none", "")
	write("go/Containerfile", "FROM scratch\nCOPY root /\n"+
		"RUN [\"/bin/busybox\", \"ln\", \"-s\", \"/bin/busybox\", \"/bin/sh\"]\n"+
		"ENV PATH=/usr/local/go/bin:/bin HOME=/root GOTOOLCHAIN=local GOMODCACHE=/modules GOCACHE=/builds GOPROXY=off\n")
	write("static/Containerfile", "FROM scratch\nUSER 65532\n")
	buildah := func(args ...string) {
		c := exec.CommandContext(t.Context(), "buildah", args...)
		c.Env = append(os.Environ(), env...)
		if out, err := c.CombinedOutput(); err != nil {
			t.Fatalf("buildah %q: %v\n%s", args, err, out)
		}
	}
	for base, name := range map[string]string{
		"go": "docker.io/library/golang:1.26", "static": "gcr.io/distroless/static:nonroot",
	} {
		buildah("manifest", "create", name)
		for _, arch := range []string{"amd64", "arm64"} {
			one := "localhost/" + base + ":" + arch
			buildah("build", "--platform", "linux/"+arch, "--tag", one, filepath.Join(home, base))
			buildah("manifest", "add", name, one)
		}
	}
	return env
}

// checkRelease checks the files of a release.
func checkRelease(t *testing.T, r release) {
	t.Helper()
	run := func(name string, args ...string) string {
		t.Helper()
		c := exec.CommandContext(t.Context(), name, args...)
		c.Dir = r.dir
		out, err := c.Output()
		if err != nil {
			t.Fatalf("%s %q: %v\n%s", name, args, err, out)
		}
		return string(out)
	}
	chart := "sluice-" + r.version + ".tgz"
	want := []string{chart}
	platforms := []string{"linux_amd64", "linux_arm64", "darwin_amd64", "darwin_arm64"}
	for _, p := range platforms {
		want = append(want, r.archive(p)+".tar.gz", r.archive(p)+".sbom.json")
	}
	for _, arch := range []string{"amd64", "arm64"} {
		want = append(want, r.archive("image_linux_"+arch)+".tar")
	}
	slices.Sort(want)
	sums := "sluice_" + r.version + "_checksums.txt"
	listed := unique(run("cat", sums), `(?m)^[0-9a-f]{64}  (.*)$`)
	if !slices.Equal(listed, want) {
		t.Errorf("the checksums are of\n%q, want\n%q", listed, want)
	}
	run("sha256sum", "--check", "--strict", sums)

	for _, p := range platforms {
		files := run("tar", "--list", "--gzip", "--file", r.archive(p)+".tar.gz")
		for _, name := range []string{
			"sluice", "LICENSE", "README.md", "CHANGELOG.md", "systemd/sluice.service", "systemd/sluice.yaml",
			"compose/compose.yaml", "compose/envoy.yaml", "compose/sluice/sluice.yaml", "compose/grafana/dashboards.yaml",
			"observability/dashboard.json", "observability/alerts.yaml", "licenses/LICENSE.go",
		} {
			if !strings.Contains(files, r.archive(p)+"/"+name+"\n") {
				t.Errorf("%s: no %s", p, name)
			}
		}
		if !regexp.MustCompile(`/licenses/google\.golang\.org/grpc@v[\d.]+/LICENSE\n`).MatchString(files) {
			t.Errorf("%s: no license of a module", p)
		}
		checkSBOM(t, r, filepath.Join(r.dir, r.archive(p)+".sbom.json"))
	}
	if out := run("tar", "--extract", "--gzip", "--to-stdout", "--file", chart, "sluice/Chart.yaml"); !strings.Contains(
		out, "\nversion: "+r.version+"\n") || !strings.Contains(out, "\nappVersion: v"+r.version+"\n") {
		t.Errorf("the chart is\n%s", out)
	}
	for _, arch := range []string{"amd64", "arm64"} {
		checkImage(t, r, arch, run)
	}

	// The README's commands install it.
	bin := t.TempDir()
	commands := strings.NewReplacer("0.1.0", r.version, "linux_amd64", "linux_"+runtime.GOARCH, "sudo ", "",
		"/usr/local/bin/", bin).Replace(block(t, section(t, programReadme, "## Install"), "sh"))
	said := run("env", "PATH="+bin+":"+os.Getenv("PATH"), "bash", "-euc", commands)
	if !strings.Contains(said, ".tar.gz: OK\n") || !strings.HasSuffix(said, "\n"+printedVersion(r)) {
		t.Errorf("the README's commands print\n%s", said)
	}
}

// printedVersion returns what sluice --version of a release prints here.
func printedVersion(r release) string {
	return fmt.Sprintf("sluice v%s (%s, linux/%s)\n", r.version, runtime.Version(), runtime.GOARCH)
}

// checkSBOM checks that an SBOM describes this version of sluice, and has each
// module of go.mod that the program links with its version.
func checkSBOM(t *testing.T, r release, path string) {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	type component struct{ Name, Version string }
	var sbom struct {
		Metadata   struct{ Component component }
		Components []component
	}
	if err := json.Unmarshal(text, &sbom); err != nil {
		t.Fatal(err)
	}
	if c := sbom.Metadata.Component; c != (component{module, "v" + r.version}) {
		t.Errorf("%s is of %+v", path, c)
	}
	versions := map[string][]string{}
	for _, c := range sbom.Components {
		versions[c.Name] = append(versions[c.Name], c.Version)
	}
	if v := versions["std"]; !slices.Equal(v, []string{runtime.Version()}) {
		t.Errorf("%s: Go's library %q", path, v)
	}
	for _, line := range regexp.MustCompile(`(?m)^\t?(?:require )?(\S+) (v\S+)`).FindAllStringSubmatch(
		document(t, "go.mod"), -1) {
		linked := slices.ContainsFunc([]string{"grpc", "go-redis/v9", "cel-go", "zap", "cobra"},
			func(name string) bool { return strings.HasSuffix(line[1], "/"+name) })
		if v := versions[line[1]]; linked && !slices.Equal(v, []string{line[2]}) {
			t.Errorf("%s: %s %q, want %s", path, line[1], v, line[2])
		}
	}
	if len(versions) < 30 {
		t.Errorf("%s: only %d modules", path, len(versions))
	}
}

// checkImage checks that the image is the Dockerfile's, for an architecture.
func checkImage(t *testing.T, r release, arch string, run func(name string, args ...string) string) {
	t.Helper()
	file := r.archive("image_linux_"+arch) + ".tar"
	blob := func(digest string, into any) {
		t.Helper()
		text := run("tar", "--extract", "--to-stdout", "--file", file, "blobs/"+strings.Replace(digest, ":", "/", 1))
		if err := json.Unmarshal([]byte(text), into); err != nil {
			t.Fatal(err)
		}
	}
	type descriptor struct {
		Digest      string
		Annotations map[string]string
	}
	var index struct{ Manifests []descriptor }
	listing := run("tar", "--extract", "--to-stdout", "--file", file, "index.json")
	if err := json.Unmarshal([]byte(listing), &index); err != nil {
		t.Fatal(err)
	}
	if len(index.Manifests) != 1 {
		t.Fatalf("%s: %+v", file, index)
	}
	if name := index.Manifests[0].Annotations["org.opencontainers.image.ref.name"]; name != "sluice:v"+r.version {
		t.Errorf("%s is named %q", file, name)
	}
	var manifest struct{ Config descriptor }
	blob(index.Manifests[0].Digest, &manifest)
	var image struct {
		Architecture, OS string
		Config           struct {
			User       string
			Entrypoint []string
			Labels     map[string]string
		}
	}
	blob(manifest.Config.Digest, &image)
	if c := image.Config; image.OS != "linux" || image.Architecture != arch || c.User != "65532:65532" ||
		!slices.Equal(c.Entrypoint, []string{"/sluice"}) ||
		c.Labels["org.opencontainers.image.version"] != "v"+r.version {
		t.Errorf("%s: %+v", file, image)
	}
}

// useArchive uses the archive on a machine with nothing but it, an Envoy and a
// Redis: no Go, no shell, no home directory.
func useArchive(t *testing.T, dir string) {
	t.Helper()
	version, err := os.ReadFile(filepath.Join(dir, "version"))
	if err != nil {
		t.Fatal(err)
	}
	r := release{version: string(version)}
	name := r.archive("linux_" + runtime.GOARCH)
	archive := filepath.Join(dir, "source", "dist", name+".tar.gz")
	proxy, err := envoy.Binary(t.Context(), func(s string) { t.Log(s) })
	if err != nil {
		t.Fatal(err)
	}
	m := newContainer(t, dir, 1000, "127.0.0.1 localhost\n")
	if out, err := exec.CommandContext(t.Context(), "tar", "--extract", "--gzip", "--file", archive, "--directory",
		m.root).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	m.install(proxy, "/bin/envoy")
	m.bind(filepath.Join(m.root, name, "sluice"), "/bin/sluice", true)
	m.dir = "/" + name

	want := printedVersion(r)
	for _, args := range [][]string{{"sluice", "version"}, {"./sluice", "--version"}} {
		if status, said := m.run(args...); status != 0 || said != want {
			t.Errorf("%q: %d %s, want %s", args, status, said, want)
		}
	}

	c := client(t)
	t.Run("demo", func(t *testing.T) {
		m := *m
		m.t = t
		demo := m.start("sluice", "demo", "--port", "8080")
		eventually(t, "the demo", func() bool { return strings.Contains(demo.printed(), "\nCtrl-C stops the demo.") })
		if r, _ := fetch(t, c, "http://localhost:8080"); r.StatusCode != 200 || r.Header.Get("X-Ratelimit-Limit") != "5" {
			t.Errorf("%d %v", r.StatusCode, r.Header)
		}
		eventually(t, "a request that is limited", func() bool {
			r, _ := fetch(t, c, "http://localhost:8080")
			return r.StatusCode == 429
		})
		if err := demo.cmd.Process.Signal(syscall.SIGINT); err != nil {
			t.Fatal(err)
		}
		if <-demo.done; demo.cmd.ProcessState.ExitCode() != 0 {
			t.Errorf("%v\n%s", demo.cmd.ProcessState, demo.printed())
		}
	})

	// With the example's config, which names the Redis of this machine.
	redis := newContainer(t, dir, 999, "")
	program, err := exec.LookPath("redis-server")
	if err != nil {
		t.Fatal(err)
	}
	redis.install(program, "/bin/redis-server")
	redis.dir = "/tmp"
	redis.start("redis-server", "--appendonly", "yes", "--maxmemory", "100mb", "--maxmemory-policy", "noeviction")
	doctor := []string{"sluice", "doctor", "--config", "systemd/sluice.yaml"}
	eventually(t, "Redis", func() bool {
		status, _ := m.run(doctor...)
		return status == 0
	})
	if status, said := m.run(doctor...); status != 0 || strings.Contains(said, "fail ") || !strings.Contains(said, "ok ") {
		t.Errorf("doctor: %d\n%s", status, said)
	}
	if status, said := m.run("sluice", "validate", "systemd/sluice.yaml"); status != 0 {
		t.Errorf("validate: %d %s", status, said)
	}
	m.start("sluice", "run", "--config", "systemd/sluice.yaml")
	eventually(t, "sluice", func() bool {
		status, _ := m.run("sluice", "healthcheck")
		return status == 0
	})
	status, bootstrap := m.run("sluice", "envoy", "plain", "--config", "systemd/sluice.yaml")
	if status != 0 {
		t.Fatalf("envoy: %d %s", status, bootstrap)
	}
	if err := os.WriteFile(filepath.Join(m.root, "tmp", "envoy.yaml"), []byte(bootstrap), 0o644); err != nil {
		t.Fatal(err)
	}
	m.start("envoy", "--config-path", "/tmp/envoy.yaml", "--concurrency", "1", "--disable-hot-restart",
		"--log-level", "error")
	served := 0
	eventually(t, "a request that is limited by run", func() bool {
		response, err := c.Get("http://" + releaseAddress + ":8080")
		if err != nil {
			return false
		}
		_ = response.Body.Close()
		// There is no upstream: a request that passes gets 503, with sluice's headers.
		if limit, err := strconv.Atoi(response.Header.Get("X-Ratelimit-Limit")); err == nil && limit == 20 {
			served++
		}
		return response.StatusCode == 429
	})
	if served < 20 {
		t.Errorf("only %d requests passed", served)
	}
}
