package main

import (
	"bufio"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/sluiceproxy/sluice/k8s/testenv"
)

func startServeMux(t *testing.T) string {
	mux := http.NewServeMux()
	ran := func(handler string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) { w.Header().Set("x-handler", handler) }
	}
	for pattern, handler := range map[string]string{
		"/v1/orders/{id}":  "limited",
		"/public/admin":    "limited",
		"/admin":           "limited",
		"/admin/{rest...}": "limited",
		"/healthz":         "exempt",
		"/static":          "exempt",
		"/static/":         "exempt",
	} {
		mux.Handle("GET api.example.com"+pattern, ran(handler))
	}
	mux.Handle("/", ran("other"))
	server := httptest.NewServer(mux)
	t.Cleanup(server.Close)
	return server.Listener.Addr().String()
}

// frameworkDir has the applications and the files that pin their dependencies.
var frameworkDir = filepath.Join("testdata", "frameworks")

func node(app string, args ...string) func(*testing.T) string {
	return func(t *testing.T) string {
		dir := filepath.Join(frameworkDir, "node")
		home := testenv.Packages(t, []string{filepath.Join(dir, "package.json"), filepath.Join(dir, "package-lock.json")},
			"npm", "ci", "--no-audit", "--no-fund")
		return startApp(
			t,
			[]string{"NODE_PATH=" + filepath.Join(home, "node_modules")},
			"node",
			append([]string{filepath.Join(dir, app)}, args...)...)
	}
}

func python(app string, args ...string) func(*testing.T) string {
	return func(t *testing.T) string {
		dir := filepath.Join(frameworkDir, "python")
		home := testenv.Packages(
			t, []string{filepath.Join(dir, "requirements.txt")}, "python3", "-m", "pip", "install", "--quiet",
			"--disable-pip-version-check", "--no-input", "--no-deps", "--target", "lib", "-r", "requirements.txt",
		)
		return startApp(
			t,
			[]string{"PYTHONPATH=" + filepath.Join(home, "lib"), "PYTHONDONTWRITEBYTECODE=1"},
			"python3",
			append([]string{filepath.Join(dir, app)}, args...)...)
	}
}

func java(name string) func(*testing.T) string {
	return func(t *testing.T) string {
		dir := filepath.Join(frameworkDir, name)
		home := testenv.Packages(
			t, []string{filepath.Join(dir, "pom.xml")}, "mvn", "--quiet", "--batch-mode",
			"org.apache.maven.plugins:maven-dependency-plugin:3.8.1:copy-dependencies", "-DoutputDirectory=lib",
		)
		libraries, classes := filepath.Join(home, "lib", "*"), t.TempDir()
		javac := exec.CommandContext(t.Context(), "javac",
			"-parameters", "-cp", libraries, "-d", classes, filepath.Join(dir, "App.java"))
		if out, err := javac.CombinedOutput(); err != nil {
			t.Fatalf("javac: %v\n%s", err, out)
		}
		return startApp(t, nil, "java", "-cp", classes+string(os.PathListSeparator)+libraries, "App")
	}
}

// startApp runs an application that prints its port on 127.0.0.1 once it
// listens, and kills it when the test ends.
func startApp(t *testing.T, env []string, name string, args ...string) string {
	t.Helper()
	app := exec.Command(name, args...)
	app.Env = append(os.Environ(), env...)
	app.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	var errs strings.Builder
	app.Stderr = &errs
	out, err := app.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := app.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(out)
	port := make(chan string, 1)
	drained := make(chan struct{})
	go func() {
		defer close(drained)
		lines.Scan()
		port <- lines.Text()
		_, _ = io.Copy(io.Discard, out)
	}()
	t.Cleanup(func() {
		_ = app.Process.Kill()
		<-drained
		_ = app.Wait()
		if t.Failed() {
			t.Logf("%s %q said:\n%s", name, args, errs.String())
		}
	})
	select {
	case p := <-port:
		if p == "" {
			t.Fatalf("%s %q ended before it listened", name, args)
		}
		return net.JoinHostPort("127.0.0.1", p)
	case <-time.After(10 * within): // a JVM on a busy machine
		t.Fatalf("%s %q does not listen", name, args)
		return ""
	}
}
