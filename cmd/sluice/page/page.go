// Package page serves the operator's page, its data as JSON under /api/, and
// profiles under /debug/pprof/. No request changes anything.
package page

import (
	"context"
	"embed"
	"encoding/json"
	"errors"
	"io/fs"
	"net/http"
	"net/http/pprof"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/sluiceproxy/sluice/authz"
	"github.com/sluiceproxy/sluice/limiter"
	"github.com/sluiceproxy/sluice/limiter/policy"
)

// assets are the page's HTML, CSS and JavaScript. They load nothing from
// elsewhere.
//
//go:embed assets
var assets embed.FS

// maxForm is the maximum size of a request's body in bytes.
const maxForm = 64 << 10

// Options configures a Page. All fields but Leases and ConfigFile are required.
// The functions must be safe for concurrent use.
type Options struct {
	Server *authz.Server         // whose checks are shown
	Config func() *policy.Config // returns the config in force
	// Buckets is what explain reads. Its Take must take nothing.
	Buckets limiter.Store
	// StoreMetrics has the metrics of the store alone.
	StoreMetrics prometheus.Gatherer
	// Leases returns the counts of leases by limit; nil: there are none.
	Leases     func() map[string]limiter.LeaseTotals
	State      func() State
	Version    string
	ConfigFile string // empty: there is no config file
	GRPC       string // the address that Envoy asks
}

// State is the state of the process.
type State struct {
	Ready, Draining bool
	LogLevel        string
	Reloaded        time.Time // when the config was last reloaded, or zero
	ReloadErrors    []string  // why that failed; empty if it succeeded
	StoreError      string    // why Redis has not answered yet; empty once it has
	Outage          *Outage   // the last one of Redis, or nil
}

// Outage is a time in which Redis did not answer.
type Outage struct {
	Since, Until time.Time // Until is zero while it lasts
	// Checks has the numbers of the checks that on_failure decided.
	Checks map[limiter.Outcome]uint64
}

// Page is the HTTP handler of the admin listener. It is safe for concurrent
// use.
type Page struct {
	Options
	handler http.Handler
	started time.Time
	history history
	limits  atomic.Pointer[limitList] // of the config that was shown last
}

// New returns a Page. It shows charts only while Run runs.
func New(o Options) *Page {
	p := &Page{Options: o, started: time.Now()}
	p.handler = sameOrigin(p.routes(), func() string { return o.Config().Listen.Admin })
	return p
}

// ServeHTTP serves the page, the JSON and the profiles.
func (p *Page) ServeHTTP(w http.ResponseWriter, r *http.Request) { p.handler.ServeHTTP(w, r) }

// Run records the history that the page shows until ctx ends.
func (p *Page) Run(ctx context.Context) { p.history.run(ctx, p.sample) }

// paths describes the paths of the API. GET /api/ returns it.
var paths = map[string]string{
	"/api/status":  "checks, store and config",
	"/api/history": "the last five minutes, by second",
	"/api/limits?filter=&sort=&n=": "limits and their decisions; filter is a part of their names, groups or keys; " +
		"sort is file, name, allowed or denied; of more than n limits, those that denied most unless sort says otherwise",
	"/api/top?limit=": "the keys of a limit with the most requests and the most denials in the last five to ten minutes",
	"/api/denials": "the latest denied requests, and those that limits in shadow mode would have denied (shadow), " +
		"grouped by limit, key and outcome",
	"/api/explain": "which limits apply to a request and what the decision would be, without taking tokens; " +
		"a query or a form with method, host, path, source, principal, header=name=value and context=key=value, " +
		"or denial=ID with an id of /api/denials",
	"/debug/pprof/": "profiles",
}

func (p *Page) routes() *http.ServeMux {
	mux := http.NewServeMux()
	root, err := fs.Sub(assets, "assets")
	if err != nil {
		panic(err) // the name is valid
	}
	files := http.FileServerFS(root)
	for _, name := range []string{"/{$}", "/page.css", "/page.js", "/elements.js", "/icon.svg"} {
		mux.Handle("GET "+name, files)
	}
	for path, find := range map[string]func(*http.Request) (any, error){
		"/api/{$}":     func(*http.Request) (any, error) { return paths, nil },
		"/api/status":  func(*http.Request) (any, error) { return p.status(), nil },
		"/api/history": func(*http.Request) (any, error) { return p.history.seconds(), nil },
		"/api/limits":  p.findLimits,
		"/api/top":     p.top,
		"/api/denials": func(*http.Request) (any, error) { return p.denials(), nil },
		"/api/explain": p.explain,
	} {
		mux.HandleFunc("GET "+path, jsonHandler(find))
	}
	// Long or secret values do not belong in a URL.
	mux.HandleFunc("POST /api/explain", jsonHandler(p.explain))
	// Not cmdline, which may show a password.
	mux.HandleFunc("GET /debug/pprof/", pprof.Index)
	mux.HandleFunc("GET /debug/pprof/profile", pprof.Profile)
	mux.HandleFunc("GET /debug/pprof/symbol", pprof.Symbol)
	mux.HandleFunc("GET /debug/pprof/trace", pprof.Trace)
	return mux
}

// badRequestError marks an error that the client can correct; it is answered
// with 400.
type badRequestError struct{ error }

// unsupportedMediaError marks a body of an unsupported type; it is answered
// with 415.
type unsupportedMediaError struct{ error }

// jsonHandler returns a handler that serves the result of find as JSON, or its
// error as {"error": "..."}.
func jsonHandler(find func(*http.Request) (any, error)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		r.Body = http.MaxBytesReader(w, r.Body, maxForm)
		result, err := find(r)
		status := http.StatusOK
		if err != nil {
			status = http.StatusInternalServerError
			if errors.As(err, new(badRequestError)) {
				status = http.StatusBadRequest
			}
			if errors.As(err, new(unsupportedMediaError)) {
				status = http.StatusUnsupportedMediaType
			}
			result = struct {
				Error string `json:"error"`
			}{err.Error()}
		}
		text, err := json.Marshal(result)
		if err != nil {
			status, text = http.StatusInternalServerError, []byte(`{"error":"the result cannot be written as JSON"}`)
		}
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(status)
		_, _ = w.Write(append(text, '\n'))
	}
}
