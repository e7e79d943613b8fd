//go:build linux

package k8s

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/sluiceproxy/sluice/k8s/testenv"
)

// kubernetes are the programs of Kubernetes that the tests run, of version
// kubeVersion.
var kubernetes = []string{"kube-apiserver", "kube-controller-manager", "kube-scheduler", "kube-proxy", "kubelet",
	"kubectl"}

// kubernetesBinaries returns the directory of these programs. The first call
// builds them from the module k8s/cluster into the user's cache directory,
// which takes minutes and needs the network; call it before testenv.Network.
func kubernetesBinaries(t *testing.T) string {
	t.Helper()
	cache, err := os.UserCacheDir()
	if err != nil {
		t.Fatal(err)
	}
	home := filepath.Join(cache, "sluice", "kubernetes-"+kubeVersion)
	isBuilt := func() bool {
		return !slices.ContainsFunc(kubernetes, func(name string) bool {
			_, err := os.Stat(filepath.Join(home, name))
			return err != nil
		})
	}
	if isBuilt() {
		return home
	}
	defer testenv.Lock(t, home)()
	if isBuilt() {
		return home
	}
	part := home + ".building"
	if err := errors.Join(os.RemoveAll(part), os.Mkdir(part, 0o755)); err != nil { // a build may have been killed
		t.Fatal(err)
	}
	defer func() { _ = os.RemoveAll(part) }()
	t.Logf("building Kubernetes %s into %s; this happens once", kubeVersion, home)
	// Other flags would invalidate Go's build cache.
	args := []string{"build", "-trimpath", "-ldflags", "-s -w -X k8s.io/component-base/version.gitVersion=" +
		kubeVersion, "-o", part + "/"}
	for _, name := range kubernetes {
		args = append(args, "k8s.io/kubernetes/cmd/"+name)
	}
	build := exec.CommandContext(t.Context(), "go", args...)
	build.Dir = "cluster"
	build.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=", "GOWORK=off")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("Kubernetes %s: %v\n%s", kubeVersion, err, out)
	}
	if err := errors.Join(os.RemoveAll(home), os.Rename(part, home)); err != nil {
		t.Fatal(err)
	}
	return home
}

// controlPlane is a real API server and etcd with the controllers that create
// pods for Deployments and Jobs. It has no scheduler and no node.
type controlPlane struct {
	*API              // with all rights
	bin        string // the directory of kubernetesBinaries
	address    string // of the API server, host:port
	kubeconfig string // with all rights
}

// home is the address of the API server in the test's network namespace.
// Kubernetes refuses loopback addresses as endpoints, by which pods reach it.
const home = "192.0.2.3"

// cluster runs a control plane until the test ends. flags are added to those of
// the API server.
func cluster(t *testing.T, flags ...string) *controlPlane {
	t.Helper()
	etcd, err := exec.LookPath("etcd")
	if err != nil {
		t.Fatal("etcd is missing: install it (on Debian etcd-server)")
	}
	bin := kubernetesBinaries(t)
	dir, ports := t.TempDir(), freePorts(t, 3)
	in := func(name string) string { return filepath.Join(dir, name) }
	write := func(name, text string) {
		if err := os.WriteFile(in(name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	store, peer := "http://127.0.0.1:"+ports[0], "http://127.0.0.1:"+ports[1]
	start(t, nil, etcd, "--data-dir", in("etcd"), "--listen-client-urls", store, "--advertise-client-urls", store,
		"--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer, "--initial-cluster", "default="+peer,
		"--unsafe-no-fsync")

	certificate, key, err := newCA(time.Now(), time.Hour) // signs the tokens of service accounts
	if err != nil {
		t.Fatal(err)
	}
	write("sa.crt", string(certificate))
	write("sa.key", string(key))
	write("token", rand.Text())
	token, err := os.ReadFile(in("token"))
	if err != nil {
		t.Fatal(err)
	}
	write("tokens", string(token)+",admin,1,system:masters\n")
	c := &controlPlane{bin: bin, address: home + ":" + ports[2], kubeconfig: in("kubeconfig")}
	start(t, nil, filepath.Join(bin, "kube-apiserver"), append([]string{
		"--etcd-servers", store, "--bind-address", home, "--secure-port", ports[2], "--cert-dir", dir,
		"--allow-privileged", "--service-cluster-ip-range", "10.0.0.0/24", "--token-auth-file", in("tokens"),
		"--authorization-mode", "RBAC",
		"--service-account-issuer", "https://kubernetes.default.svc", "--service-account-key-file", in("sa.crt"),
		"--service-account-signing-key-file", in("sa.key"),
	}, flags...)...)
	var chain []byte // the API server's certificate and its CA
	await(t, "the API server's certificate", func() bool {
		chain, err = os.ReadFile(in("apiserver.crt"))
		block, _ := pem.Decode(chain)
		return err == nil && block != nil
	})
	write("ca.crt", string(chain))
	write("kubeconfig", strings.NewReplacer("DIR", dir, "ADDRESS", c.address, "TOKEN",
		string(token)).Replace(`apiVersion: v1
kind: Config
current-context: all
contexts: [{name: all, context: {cluster: all, user: all}}]
clusters: [{name: all, cluster: {server: "https://ADDRESS", certificate-authority: DIR/ca.crt}}]
users: [{name: all, user: {token: TOKEN}}]
`))
	if c.API, err = InCluster(c.env, dir); err != nil {
		t.Fatal(err)
	}
	await(t, "the API server", func() bool {
		return c.call(t.Context(), http.MethodGet, "/api/v1/namespaces/default", nil, &object{}) == nil
	})
	start(t, nil, filepath.Join(bin, "kube-controller-manager"), "--kubeconfig", c.kubeconfig, "--secure-port", "0",
		"--leader-elect=false",
		"--service-account-private-key-file", in("sa.key"), "--root-ca-file", in("ca.crt"))
	await(t, "the controllers", func() bool {
		return c.call(t.Context(), http.MethodGet, "/api/v1/namespaces/default/serviceaccounts/default", nil,
			&object{}) == nil
	})
	return c
}

// env looks up the environment variables by which a pod finds the API server.
func (c *controlPlane) env(name string) (string, bool) {
	host, port, _ := net.SplitHostPort(c.address)
	v, ok := map[string]string{"KUBERNETES_SERVICE_HOST": host, "KUBERNETES_SERVICE_PORT": port}[name]
	return v, ok
}

// kubectl runs kubectl with all rights, and returns its output and its error.
func (c *controlPlane) kubectl(t *testing.T, stdin string, args ...string) (string, error) {
	t.Helper()
	k := exec.CommandContext(t.Context(), filepath.Join(c.bin, "kubectl"),
		append([]string{"--kubeconfig", c.kubeconfig}, args...)...)
	k.Env = append(os.Environ(), "HOME="+c.account)
	k.Stdin = strings.NewReader(stdin)
	out, err := k.CombinedOutput()
	return string(out), err
}

// do is kubectl for a command that must succeed.
func (c *controlPlane) do(t *testing.T, stdin string, args ...string) string {
	t.Helper()
	out, err := c.kubectl(t, stdin, args...)
	if err != nil {
		t.Fatalf("kubectl %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return out
}

// writeIn returns a function that writes a file in a directory and returns its
// path.
func writeIn(t *testing.T, dir string) func(name, text string) string {
	return func(name, text string) string {
		t.Helper()
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
}

// await polls for what has no event to wait for.
func await(t *testing.T, what string, there func() bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	for !there() {
		select {
		case <-ctx.Done():
			t.Fatalf("two minutes, and still not there: %s", what)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// selfSigned returns a CA certificate with the names and addresses of a
// template, valid for one hour.
func selfSigned(t *testing.T, template x509.Certificate) tls.Certificate {
	t.Helper()
	return signed(t, template, nil)
}

// signed is selfSigned, signed by another certificate unless by is nil.
func signed(t *testing.T, template x509.Certificate, by *tls.Certificate) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template.SerialNumber, template.IsCA, template.BasicConstraintsValid = newSerial(), true, true
	template.NotBefore, template.NotAfter = time.Now().Add(-time.Minute), time.Now().Add(time.Hour)
	parent, signer := &template, any(key)
	if by != nil {
		parent, signer, template.IsCA = by.Leaf, by.PrivateKey, false
	}
	der, err := x509.CreateCertificate(rand.Reader, &template, parent, key.Public(), signer)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}
}

// startApp runs an app whose answers have rate limit headers of their own,
// which clients must not receive. The returned function returns the header of
// the latest request.
func startApp(t *testing.T, address string) func() http.Header {
	t.Helper()
	var last atomic.Pointer[http.Header]
	listener, err := net.Listen("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{ReadHeaderTimeout: time.Minute,
		Handler: http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
			last.Store(&q.Header)
			w.Header().Set("X-Ratelimit-Limit", "the app's")
			w.Header().Set("X-Pod", "web")
		})}
	go func() { _ = server.Serve(listener) }()
	t.Cleanup(func() { _ = server.Close() })
	return func() http.Header { return *last.Load() }
}

// freePorts returns ports on which nothing listens.
func freePorts(t *testing.T, n int) []string {
	t.Helper()
	var ports []string
	for range n {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = l.Close() }()
		ports = append(ports, strconv.Itoa(l.Addr().(*net.TCPAddr).Port))
	}
	return ports
}

// process is a running program.
type process struct {
	*exec.Cmd
	mu     sync.Mutex
	out    bytes.Buffer
	exited chan struct{} // closed once the program has ended; then ProcessState is set
}

// Write receives the program's stdout and stderr.
func (p *process) Write(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.out.Write(b)
}

func (p *process) logged() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.out.String()
}

// start runs a program until the test ends. If the test fails, it logs the end
// of the program's output.
func start(t *testing.T, env []string, name string, args ...string) *process {
	t.Helper()
	return startIn(t, "", env, name, args...)
}

// startIn is start in a working directory.
func startIn(t *testing.T, dir string, env []string, name string, args ...string) *process {
	t.Helper()
	p := &process{Cmd: exec.Command(name, args...), exited: make(chan struct{})}
	p.Dir = dir
	p.Stdout, p.Stderr = p, p
	p.Env = append(os.Environ(), env...)
	p.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := p.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		_ = p.Wait()
		close(p.exited)
	}()
	t.Cleanup(func() {
		_ = p.Process.Kill()
		<-p.exited
		if t.Failed() {
			text := p.logged()
			t.Logf("%s:\n%s", filepath.Base(name), text[max(0, len(text)-4000):])
		}
	})
	return p
}
