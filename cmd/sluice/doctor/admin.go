package doctor

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"path"
	"path/filepath"
	"strings"
	"time"
)

// Limits of what is read.
const (
	// MaxConfig is the size of the largest config that is read, in bytes.
	MaxConfig = 64 << 20
	maxStats  = 16 << 20 // bytes
	maxInfo   = 1 << 20  // bytes
	adminTime = 15 * time.Second
)

// Admin is the admin interface of an Envoy.
type Admin struct {
	base   *url.URL
	client *http.Client
	shown  string // the address without user and password
}

// NewAdmin returns the admin interface at a URL: http://host:port, https:// or
// unix:///path. A URL may have a path, before which the interface's own come, and
// a user and password. The error does not quote the URL.
func NewAdmin(text string) (*Admin, error) {
	const want = "want a URL such as http://127.0.0.1:9901, https://host, or unix:///path/of/socket"
	u, err := url.Parse(text)
	if err != nil {
		return nil, errors.New(want)
	}
	transport := &http.Transport{
		DisableKeepAlives: true, MaxResponseHeaderBytes: 64 << 10, TLSClientConfig: &tls.Config{MinVersion: tls.VersionTLS12},
	}
	a := &Admin{base: u, client: &http.Client{Transport: transport,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}}
	u.RawQuery, u.Fragment = "", ""
	switch {
	case u.Scheme == "unix" && u.Host == "" && u.User == nil && filepath.IsAbs(u.Path):
		socket := u.Path
		transport.DialContext = func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", socket)
		}
		a.shown = "unix://" + printable(socket)
		a.base = &url.URL{Scheme: "http", Host: "envoy"}
	case (u.Scheme == "http" || u.Scheme == "https") && u.Hostname() != "":
		a.shown = u.Scheme + "://" + printable(u.Host)
	default:
		return nil, errors.New(want)
	}
	return a, nil
}

// String returns the address, without user and password.
func (a *Admin) String() string { return a.shown }

// Read reads the config and the counters of a running Envoy. It takes at most
// 15 s. The error does not contain the URL's user and password.
func (a *Admin) Read(ctx context.Context) (*Envoy, error) {
	ctx, cancel := context.WithTimeout(ctx, adminTime)
	defer cancel()
	text, err := a.get(ctx, "/config_dump", "", MaxConfig)
	if err != nil {
		return nil, err
	}
	if !json.Valid(text) {
		return nil, errors.New("/config_dump: not what an Envoy answers")
	}
	e, err := Parse(text)
	if err != nil {
		return nil, fmt.Errorf("/config_dump: %w", err)
	}
	e.isPart = false // it is all that Envoy has
	const counters = `(\.ext_authz\.|^http\..*\.(downstream_rq_total|rq_total|no_route)$|` +
		`^cluster\..*\.(membership_(total|healthy)|ssl\.(connection_error|fail_verify_.*)|` +
		`upstream_(cx_(connect_fail|connect_timeout|protocol_error|destroy_remote_with_active_rq)|` +
		`rq_(timeout|per_try_timeout|pending_overflow|retry_overflow)))$)`
	text, err = a.get(ctx, "/stats", "format=json&filter="+url.QueryEscape(counters), maxStats)
	if err != nil {
		return nil, err
	}
	var stats struct {
		Stats []struct {
			Name  string          `json:"name"`
			Value json.RawMessage `json:"value"`
		} `json:"stats"`
	}
	if err := json.Unmarshal(text, &stats); err != nil {
		return nil, fmt.Errorf("/stats: not what an Envoy answers: %w", err)
	}
	e.counters = make(map[string]float64, len(stats.Stats))
	for _, s := range stats.Stats {
		if n, err := decode(s.Value); err == nil && s.Name != "" {
			e.counters[s.Name] = n.number(0)
		}
	}
	text, err = a.get(ctx, "/server_info", "", maxInfo)
	if err != nil {
		return nil, err
	}
	info, err := decode(text)
	if err != nil {
		return nil, fmt.Errorf("/server_info: not what an Envoy answers: %w", err)
	}
	// Such as "0ebfcf.../1.40.0/Clean/RELEASE/BoringSSL".
	if parts := strings.Split(info.at("version").text(), "/"); len(parts) > 1 {
		e.version = printable(parts[1])
	}
	e.uptime = info.at("uptime_current_epoch").duration(0)
	return e, nil
}

// get returns what the interface answers to a path, at most so many bytes.
func (a *Admin) get(ctx context.Context, name, query string, most int64) ([]byte, error) {
	u := *a.base
	u.Path, u.RawPath, u.RawQuery = path.Join("/", a.base.Path, name), "", query
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return nil, errors.New("cannot be asked") // err has the URL
	}
	response, err := a.client.Do(request)
	if err != nil {
		if failed := new(url.Error); errors.As(err, &failed) { // which has the URL
			err = failed.Err
		}
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	defer func() { _ = response.Body.Close() }()
	if response.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("%s: status %d; is this the admin interface of an Envoy?", name, response.StatusCode)
	}
	text, err := io.ReadAll(io.LimitReader(response.Body, most+1))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	if int64(len(text)) > most {
		return nil, fmt.Errorf("%s: more than %d MiB", name, most>>20)
	}
	return text, nil
}
