//go:build linux

package k8s

import (
	"encoding/json"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/sluiceproxy/sluice/envoy"
	"github.com/sluiceproxy/sluice/k8s/testenv"
)

// The images of the node's pods, by the names that the chart and the
// Deployments use. There is no registry here: sluice's image is built from the
// Dockerfile, the others are made of programs of this machine and take the
// place of the real ones.
const (
	sluiceImage   = "ghcr.io/sluiceproxy/sluice:v0.1.0"
	upgradedImage = "ghcr.io/sluiceproxy/sluice:v0.1.1" // the same image
	otherImage    = "localhost/sluice:arm64"            // the same for arm64
	redisImage    = "docker.io/library/redis:7.4"
	envoyImage    = "docker.io/envoyproxy/envoy:v" + envoy.Version
	appImage      = "localhost/app:1"
	pauseImage    = "localhost/pause:1" // of the pods' sandboxes
)

// images is a directory in which images are built and saved.
type images string

func (dir images) path(name string) string { return filepath.Join(string(dir), name) }

// buildah runs buildah with storage of its own.
func (dir images) buildah(t *testing.T, args ...string) string {
	t.Helper()
	c := exec.CommandContext(t.Context(), "buildah",
		append([]string{"--root", dir.path("buildah"), "--runroot", dir.path("buildah-run")}, args...)...)
	c.Env = append(os.Environ(), "TMPDIR="+string(dir)) // also for cache mounts
	out, err := c.CombinedOutput()
	if err != nil {
		t.Fatalf("buildah %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

// make builds an image from files of this machine, which files maps from their
// paths in the image, with the libraries that they need, and from these lines
// of a Containerfile. flags are passed to buildah.
func (dir images) make(t *testing.T, name, lines string, files map[string]string, flags ...string) {
	t.Helper()
	root, err := os.MkdirTemp(string(dir), "image-")
	if err != nil {
		t.Fatal(err)
	}
	put := func(from, to string) {
		to = filepath.Join(root, "root", to)
		if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
			t.Fatal(err)
		}
		if out, err := exec.CommandContext(t.Context(), "cp", "--dereference", from, to).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v\n%s", from, err, out)
		}
	}
	for to, from := range files {
		put(from, to)
		out, _ := exec.CommandContext(t.Context(), "ldd", from).Output() // fails for a static program
		for field := range strings.FieldsSeq(string(out)) {
			if strings.HasPrefix(field, "/") {
				put(field, field)
			}
		}
	}
	if err := os.MkdirAll(filepath.Join(root, "root", "tmp"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(root, "Containerfile"), []byte("FROM scratch\nCOPY root /\n"+lines),
		0o600); err != nil {
		t.Fatal(err)
	}
	dir.buildah(t, slices.Concat([]string{"bud", "--layers=false"}, flags,
		[]string{"--file", filepath.Join(root, "Containerfile"), "--tag", name, root})...)
	if err := os.RemoveAll(root); err != nil {
		t.Fatal(err)
	}
}

// goSays returns a setting of this machine's Go.
func goSays(t *testing.T, name string) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), "go", "env", name).Output()
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(out))
}

// prepare builds all images, and saves them as tar files.
func (dir images) prepare(t *testing.T) {
	t.Helper()
	look := func(name string) string {
		path, err := exec.LookPath(name)
		if err != nil {
			t.Fatalf("%v: install what .ci/test does", err)
		}
		return path
	}
	busybox := look("busybox")
	source, err := filepath.Abs("..")
	if err != nil {
		t.Fatal(err)
	}
	for arch, name := range map[string]string{"amd64": sluiceImage, "arm64": otherImage} {
		platform := "--platform=linux/" + arch
		// The base images of the Dockerfile, under the same names. They are
		// built only for this platform, which buildah requires whatever FROM
		// says. Go, its modules and its builds are mounted.
		dir.make(t, "docker.io/library/golang:1.26",
			"RUN [\"/bin/busybox\", \"ln\", \"-s\", \"/bin/busybox\", \"/bin/sh\"]\nENV PATH=/usr/local/go/bin:/bin "+
				"HOME=/root GOTOOLCHAIN=local GOMODCACHE=/modules GOCACHE=/builds GOPROXY="+goSays(t, "GOPROXY")+"\n",
			map[string]string{"/bin/busybox": busybox,
				"/etc/ssl/certs/ca-certificates.crt": "/etc/ssl/certs/ca-certificates.crt"}, platform)
		dir.make(t, "gcr.io/distroless/static:nonroot", "USER 65532\n", nil, platform)
		dir.buildah(t, "bud", "--pull-never", "--isolation", "chroot", "--network", "host", "--layers=false", platform,
			"--build-arg", "VERSION=v0.1.0",
			"--volume", goSays(t, "GOROOT")+":/usr/local/go:ro",
			"--volume", goSays(t, "GOMODCACHE")+":/modules", "--volume", goSays(t, "GOCACHE")+":/builds",
			"--file", filepath.Join(source, "Dockerfile"), "--tag", name, source)
		dir.buildah(t, "push", name, "oci:"+dir.path(arch))
	}
	dir.buildah(t, "tag", sluiceImage, upgradedImage)
	dir.buildah(t, "from", "--pull-never", "--platform=linux/arm64", "--name", "other", otherImage)
	root := strings.TrimSpace(dir.buildah(t, "mount", "other"))
	for _, pattern := range []string{"LICENSE", "LICENSE.go", "go.uber.org/zap@*/LICENSE",
		"google.golang.org/grpc@*/NOTICE*"} {
		if found, err := filepath.Glob(filepath.Join(root, "licenses", pattern)); err != nil || len(found) != 1 {
			t.Errorf("the image's /licenses has no %s: %v", pattern, err)
		}
	}
	other := filepath.Join(root, "sluice")
	if out, err := exec.CommandContext(t.Context(), "cp", other,
		dir.path("sluice-arm64")).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	dir.buildah(t, "rm", "other")

	dir.make(t, redisImage, "", map[string]string{"/bin/redis-server": look("redis-server"),
		"/bin/redis-cli": look("redis-cli")})
	proxy, err := envoy.Binary(t.Context(), func(said string) { t.Log(said) })
	if err != nil {
		t.Fatal(err)
	}
	dir.make(t, envoyImage, "ENTRYPOINT [\"/bin/envoy\"]\n", map[string]string{"/bin/envoy": proxy})
	app := dir.path("app")
	build := exec.CommandContext(t.Context(), "go", "build", "-o", app, "./testdata/app")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	dir.make(t, appImage, "ENTRYPOINT [\"/bin/app\"]\n", map[string]string{"/bin/app": app})
	dir.make(t, pauseImage, "ENTRYPOINT [\"/bin/busybox\", \"sleep\", \"1000000\"]\n",
		map[string]string{"/bin/busybox": busybox})

	for i, name := range []string{sluiceImage, upgradedImage, redisImage, envoyImage, appImage, pauseImage} {
		dir.buildah(t, "push", name, fmt.Sprintf("docker-archive:%s:%s", dir.path(fmt.Sprintf("image-%d.tar", i)),
			name))
	}
	if err := os.RemoveAll(dir.path("buildah")); err != nil {
		t.Fatal(err)
	}
}

// node is a node of a cluster with all that runs pods on it: containerd,
// kubelet, kube-proxy, the scheduler and CoreDNS. Pods have addresses in
// 10.1.0.0/16, Services in 10.0.0.0/24; the test can reach both.
type node struct {
	*controlPlane
	dir string
}

const (
	services = "10.0.0.0/24"
	dns      = "192.0.2.4"
)

const containerdConfig = `version = 2
root = "DIR/containerd"
state = "/run/containerd"
oom_score = 0
[grpc]
  address = "/run/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "` + pauseImage + `"
  restrict_oom_score_adj = true
  disable_apparmor = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "DIR/cni"
`

// A ptp network routes packets between pods, so that kube-proxy's rules also
// see the replies.
const cniConfig = `{"cniVersion": "1.0.0", "name": "pods", "plugins": [
  {"type": "ptp", "ipam": {"type": "host-local",
   "ranges": [[{"subnet": "10.1.0.0/16"}]], "routes": [{"dst": "0.0.0.0/0"}]}},
  {"type": "loopback"}
]}`

const kubeletConfig = `apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
address: HOME
readOnlyPort: 0
authentication: {anonymous: {enabled: true}, webhook: {enabled: false}}
authorization: {mode: AlwaysAllow}
containerRuntimeEndpoint: unix:///run/containerd.sock
cgroupDriver: cgroupfs
cgroupRoot: /CGROUP
failCgroupV1: false
failSwapOn: false
oomScoreAdj: 0
clusterDNS: [NAMES]
clusterDomain: cluster.local
resolvConf: ""
# The disk is not this node's own.
evictionHard:
  memory.available: 1Mi
  nodefs.available: 0%
  nodefs.inodesFree: 0%
  imagefs.available: 0%
  imagefs.inodesFree: 0%
imageGCHighThresholdPercent: 100
syncFrequency: 5s
`

// startNode runs a cluster whose node is this machine, which is a
// testenv.Machine.
func startNode(t *testing.T, dir, coredns string) *node {
	t.Helper()
	n := &node{dir: dir, controlPlane: cluster(t,
		"--service-cluster-ip-range", services, "--kubelet-preferred-address-types", "InternalIP")}
	text := strings.NewReplacer("DIR", dir, "HOME", home, "NAMES", dns, "CGROUP", testenv.Cgroup(dir))
	write := func(name, content string) string {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text.Replace(content)), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	// Version 1 of control groups has a hierarchy for each controller.
	hierarchies, err := filepath.Glob("/sys/fs/cgroup/*/cgroup.procs")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat("/sys/fs/cgroup/cgroup.controllers"); err == nil {
		hierarchies = []string{"/sys/fs/cgroup/cgroup.procs"}
	}
	if len(hierarchies) == 0 {
		t.Fatal("no control groups at /sys/fs/cgroup")
	}
	for _, h := range hierarchies {
		if err := os.MkdirAll(filepath.Join(filepath.Dir(h), testenv.Cgroup(dir)), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	// A route for the test's own calls to Services.
	if out, err := exec.CommandContext(t.Context(), "ip", "route", "add", services, "dev", "lo", "src",
		home).CombinedOutput(); err != nil {
		t.Fatalf("ip route: %v\n%s", err, out)
	}

	write("cni/pods.conflist", cniConfig)
	start(t, nil, "containerd", "--config", write("containerd.toml", containerdConfig), "--log-level", "warn")
	await(t, "containerd", func() bool {
		_, err := ctr(t, "version")
		return err == nil
	})
	tars, err := filepath.Glob(filepath.Join(dir, "image-*.tar"))
	if err != nil {
		t.Fatal(err)
	}
	for _, tar := range tars {
		if out, err := ctr(t, "images", "import", tar); err != nil {
			t.Fatalf("%s: %v\n%s", tar, err, out)
		}
	}
	start(t, nil, filepath.Join(n.bin, "kubelet"), "--config", write("kubelet.yaml", kubeletConfig), "--kubeconfig",
		n.kubeconfig, "--cert-dir", filepath.Join(dir, "kubelet"),
		"--node-ip", home, "--hostname-override", "node")
	start(t, nil, filepath.Join(n.bin, "kube-scheduler"), "--kubeconfig", n.kubeconfig, "--secure-port", "0",
		"--leader-elect=false")
	// The limits of conntrack apply to the whole machine, so that they are left
	// alone.
	start(t, nil, filepath.Join(n.bin, "kube-proxy"), "--kubeconfig", n.kubeconfig, "--proxy-mode", "nftables",
		"--hostname-override", "node",
		"--conntrack-max-per-core", "0", "--conntrack-tcp-timeout-established", "0",
		"--conntrack-tcp-timeout-close-wait", "0")
	start(t, nil, coredns, "-conf", write("Corefile", "cluster.local {\n  bind "+dns+"\n  ready "+dns+
		":8181\n  errors\n  kubernetes {\n    kubeconfig "+n.kubeconfig+"\n  }\n}\n"))
	await(t, "CoreDNS", func() bool {
		response, err := http.Get("http://" + dns + ":8181/ready")
		if err != nil {
			return false
		}
		_ = response.Body.Close()
		return response.StatusCode == http.StatusOK
	})
	await(t, "the node", func() bool {
		conditions, err := n.kubectl(t, "", "get", "node", "node", "--output",
			`jsonpath={.status.conditions[?(@.type=="Ready")].status} {.spec.taints}`)
		return err == nil && conditions == "True "
	})
	return n
}

// ctr runs containerd's client.
func ctr(t *testing.T, args ...string) ([]byte, error) {
	t.Helper()
	return exec.CommandContext(t.Context(), "ctr",
		append([]string{"--address", "/run/containerd.sock", "--namespace", "k8s.io"}, args...)...).CombinedOutput()
}

// state returns events, pods and logs, for the message of a failed test.
func (n *node) state(t *testing.T) string {
	t.Helper()
	said, _ := n.kubectl(t, "", "get", "events,pods", "--all-namespaces")
	for pod := range strings.FieldsSeq(n.do(t, "", "get", "pods", "--namespace", release, "--output", "name")) {
		logged, _ := n.kubectl(t, "", "logs", pod, "--namespace", release, "--all-containers", "--tail", "5")
		said += pod + ":\n" + logged
	}
	return said
}

// readme runs all commands of a section of k8s/README.md, and returns what they
// print. They install the chart's package, as .ci/release makes it, in the place
// of its directory.
func (n *node) readme(t *testing.T, section string) string {
	t.Helper()
	text, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, after, _ := strings.Cut(string(text), "\n## "+section+"\n")
	after, _, _ = strings.Cut(after, "\n## ")
	commands := ""
	for i, block := range strings.Split(after, "```sh\n") {
		if block, _, ends := strings.Cut(block, "```"); i > 0 && ends {
			commands += block
		}
	}
	if commands == "" {
		t.Fatalf("README has no commands under %q", section)
	}
	tools := t.TempDir()
	version := sluiceImage[strings.LastIndex(sluiceImage, ":v")+2:]
	if out, err := helm(t, "package", "chart", "--version", version, "--app-version", "v"+version,
		"--destination", tools); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	commands = strings.ReplaceAll(commands, " k8s/chart ", " "+filepath.Join(tools, "sluice-"+version+".tgz")+" ")
	if strings.Contains(commands, "k8s/chart") {
		t.Fatalf("README names the chart in another way:\n%s", commands)
	}
	c := exec.CommandContext(t.Context(), "bash", "-euxc", commands)
	c.Dir = ".."
	for _, tool := range []string{helmBinary(t), filepath.Join(n.bin, "kubectl")} {
		if err := os.Symlink(tool, filepath.Join(tools, filepath.Base(tool))); err != nil {
			t.Fatal(err)
		}
	}
	c.Env = append(os.Environ(), "PATH="+tools+":"+os.Getenv("PATH"), "HOME="+tools, "KUBECONFIG="+n.kubeconfig)
	out, err := c.CombinedOutput()
	if err != nil {
		t.Fatalf("README, %s: %v\n%s\n%s", section, err, out, n.state(t))
	}
	return string(out)
}

// machine returns the node of a test. It runs the test in a testenv.Machine,
// and returns false in the parent process.
func machine(t *testing.T) (*node, bool) {
	t.Helper()
	if os.Getenv("SLUICE_LONG") == "" {
		t.Skip("builds Kubernetes and images, which takes minutes: SLUICE_LONG=1")
	}
	kubernetesBinaries(t)
	helmBinary(t)
	coredns := corednsBinary(t)
	dir, inside := testenv.Machine(t, func(dir string) { images(dir).prepare(t) }, home, dns)
	if !inside {
		return nil, false
	}
	return startNode(t, dir, coredns), true
}

// imageManifest is an OCI image manifest.
type imageManifest struct {
	Layers []struct{ Size int64 }
	Config struct{ Digest string }
}

// readImage returns the size and config of the image in an OCI layout
// directory.
func readImage(t *testing.T, dir string) (compressed int64, config object) {
	t.Helper()
	blob := func(digest string, v any) {
		t.Helper()
		text, err := os.ReadFile(filepath.Join(dir, "blobs", strings.Replace(digest, ":", "/", 1)))
		if err == nil {
			err = json.Unmarshal(text, v)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	var index struct{ Manifests []struct{ Digest string } }
	text, err := os.ReadFile(filepath.Join(dir, "index.json"))
	if err != nil || json.Unmarshal(text, &index) != nil || len(index.Manifests) != 1 {
		t.Fatalf("index.json: %v\n%s", err, text)
	}
	var manifest imageManifest
	blob(index.Manifests[0].Digest, &manifest)
	blob(manifest.Config.Digest, &config)
	err = filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		info, err := d.Info()
		if err == nil {
			compressed += info.Size()
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return compressed, config
}
