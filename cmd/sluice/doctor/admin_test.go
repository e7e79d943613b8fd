package doctor

import (
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"testing"
)

// admin is an admin interface that answers with these bodies.
type admin map[string]string

func (a admin) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	text, ok := a[r.URL.Path]
	if !ok {
		http.NotFound(w, r)
		return
	}
	_, _ = w.Write([]byte(text))
}

const aDump = `{"configs": [{"@type": "type.googleapis.com/envoy.admin.v3.ListenersConfigDump", "dynamic_listeners": [
{"name": "a", "error_state": {"details": "no such\nfilter"}}]},
{"@type": "type.googleapis.com/of.a.later.Envoy", "x": 1}]}`

var aWhole = admin{
	"/config_dump": aDump, "/stats": `{"stats": [{"name": "http.a.rq_total", "value": 3}, {"histograms": {}}]}`,
	"/server_info": `{"version": "0ebfcfe/1.40.0/Clean/RELEASE/BoringSSL", "uptime_current_epoch": "75s"}`,
}

func TestAdminRead(t *testing.T) {
	server := httptest.NewServer(aWhole)
	defer server.Close()
	prefixed := httptest.NewServer(http.StripPrefix("/envoy", aWhole))
	defer prefixed.Close()
	socket := filepath.Join(t.TempDir(), "s")
	listener, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	onSocket := &httptest.Server{Listener: listener, Config: &http.Server{Handler: aWhole}} //nolint:gosec // ends with the test
	onSocket.Start()
	defer onSocket.Close()
	for _, url := range []string{server.URL, server.URL + "/", prefixed.URL + "/envoy", "unix://" + socket} {
		a, err := NewAdmin(url)
		if err != nil {
			t.Fatal(err)
		}
		e, err := a.Read(t.Context())
		if err != nil {
			t.Errorf("%s: %v", url, err)
			continue
		}
		if e.version != "1.40.0" || e.uptime.Seconds() != 75 || e.counters["http.a.rq_total"] != 3 || len(e.refused) != 1 ||
			e.refused[0] != "listener a: no such filter" {
			t.Errorf("%s: %+v", url, e)
		}
	}
}

// TestAdminShowsNoPassword checks that neither an address nor an error has the
// password of a URL, and that it is sent.
func TestAdminShowsNoPassword(t *testing.T) {
	sent := ""
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, sent, _ = r.BasicAuth()
		http.Error(w, "no", http.StatusForbidden)
	}))
	url := strings.Replace(server.URL, "http://", "http://admin:hunter2@", 1)
	for _, text := range []string{url, "http://u:hunter2@127.0.0.1:1", "http://u:hunter2@h:port", "ftp://u:hunter2@h",
		"http://u:hunter2@[::1", "unix://u:hunter2@h/x", "http://u:hunter2%zz@h", "https://hunter2@127.0.0.1:1/?hunter2"} {
		a, err := NewAdmin(text)
		if err == nil {
			if strings.Contains(a.String(), "hunter2") {
				t.Errorf("%s", a)
			}
			_, err = a.Read(t.Context())
		}
		if err == nil || strings.Contains(err.Error(), "hunter2") {
			t.Errorf("%v", err)
		}
	}
	if sent != "hunter2" {
		t.Errorf("sent %q", sent)
	}
	server.Close()
}

// TestAdminIsBounded checks that no server makes doctor read on and on, ask
// elsewhere, or take what is not Envoy's for its config.
func TestAdminIsBounded(t *testing.T) {
	elsewhere := httptest.NewServer(aWhole)
	defer elsewhere.Close()
	for name, tt := range map[string]struct {
		serve http.HandlerFunc
		want  string
	}{
		"without end": {func(w http.ResponseWriter, _ *http.Request) {
			for block := make([]byte, 1<<20); ; {
				if _, err := w.Write(block); err != nil {
					return
				}
			}
		}, "/config_dump: more than 64 MiB"},
		"a redirect": {func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, elsewhere.URL+r.URL.Path, http.StatusFound)
		},
			"/config_dump: status 302"},
		"a page":         {admin{"/config_dump": "<html>"}.ServeHTTP, "/config_dump: not what an Envoy answers"},
		"another server": {admin{"/config_dump": `{"status": "up"}`}.ServeHTTP, "/config_dump: want a bootstrap"},
		"no counters":    {admin{"/config_dump": aDump, "/stats": "x"}.ServeHTTP, "/stats: not what an Envoy answers"},
		"no information": {admin{"/config_dump": aDump, "/stats": "{}"}.ServeHTTP, "/server_info: status 404"},
	} {
		t.Run(name, func(t *testing.T) {
			server := httptest.NewServer(tt.serve)
			defer server.Close()
			a, err := NewAdmin(server.URL)
			if err != nil {
				t.Fatal(err)
			}
			if _, err = a.Read(t.Context()); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("%v, want %s", err, tt.want)
			}
		})
	}
}

func TestNewAdminRefuses(t *testing.T) {
	for _, text := range []string{"", "127.0.0.1:9901", "localhost:9901", "file:///etc/passwd", "unix://relative", "unix:relative",
		"http://", "http:///x", "http://:9901", "gopher://h", "\x00"} {
		if _, err := NewAdmin(text); err == nil || !strings.HasPrefix(err.Error(), "want a URL such as http://127.0.0.1:9901") {
			t.Errorf("%q: %v", text, err)
		}
	}
}
