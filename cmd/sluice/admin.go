package main

import (
	"cmp"
	"context"
	"embed"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"mime"
	"net"
	"net/http"
	"net/http/pprof"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"

	"github.com/sluiceproxy/sluice/authz"
	"github.com/sluiceproxy/sluice/limiter"
	"github.com/sluiceproxy/sluice/limiter/policy"
)

// pageFiles are the operator's page: plain HTML, CSS and JavaScript that ask for nothing but what is here.
//
//go:embed page
var pageFiles embed.FS

// admin serves the operator's page, the same as JSON, and profiles. All of it only reads.
type admin struct {
	sidecar *sidecar
	stores  prometheus.Gatherer // the store's own metrics
	began   time.Time
	history history
}

// What a request to the page's server may be.
const (
	maxForm    = 64 << 10 // bytes
	limitsTold = 100      // by default
	limitsMost = 1000
	keysTold   = 20
)

func (a *admin) handler() http.Handler {
	mux := http.NewServeMux()
	assets, err := fs.Sub(pageFiles, "page")
	if err != nil {
		panic(err) // it is built in
	}
	files := http.FileServerFS(assets)
	for _, name := range []string{"/{$}", "/page.css", "/page.js", "/icon.svg"} {
		mux.Handle("GET "+name, files)
	}
	mux.HandleFunc("GET /api/{$}", tell(func(*http.Request) (any, error) {
		return map[string]string{
			"/api/status":            "checks, store and config",
			"/api/history":           "the last five minutes, second by second",
			"/api/limits?filter=&n=": "limits and what they decided; the ones that denied most first, where there are more than n",
			"/api/top?limit=":        "a limit's keys with the most requests and the most denials, of the last five to ten minutes",
			"/api/denials":           "the last requests that were refused, like ones as one",
			"/api/explain": "what would become of a request, taking nothing: method, host, path, source, principal, header=name=value, " +
				"context=key=value, as a query or a form; or denial=, an id of /api/denials",
			"/debug/pprof/": "profiles",
		}, nil
	}))
	mux.HandleFunc("GET /api/status", tell(func(*http.Request) (any, error) { return a.status(), nil }))
	mux.HandleFunc("GET /api/history", tell(func(*http.Request) (any, error) { return a.history.seconds(), nil }))
	mux.HandleFunc("GET /api/limits", tell(a.limits))
	mux.HandleFunc("GET /api/top", tell(a.top))
	mux.HandleFunc("GET /api/denials", tell(func(*http.Request) (any, error) { return a.denials(), nil }))
	mux.HandleFunc("GET /api/explain", tell(a.explain))
	mux.HandleFunc("POST /api/explain", tell(a.explain)) // what is long or secret does not belong into a URL; it changes nothing either
	mux.HandleFunc("GET /debug/pprof/", pprof.Index)     // without cmdline, where a password may stand
	mux.HandleFunc("GET /debug/pprof/profile", pprof.Profile)
	mux.HandleFunc("GET /debug/pprof/symbol", pprof.Symbol)
	mux.HandleFunc("GET /debug/pprof/trace", pprof.Trace)
	return guard(mux, func() string { return a.sidecar.cfg.Load().Listen.Admin })
}

// guard keeps other sites' pages out: a browser that shows one may reach this server although its author cannot. A Host that is a foreign
// name is one that was made to lead here (DNS rebinding); addresses and localhost cannot be. listen is the address as the config has it.
func guard(next http.Handler, listen func() string) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h := w.Header()
		h.Set("Content-Security-Policy", "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "+
			"base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'")
		h.Set("X-Content-Type-Options", "nosniff")
		h.Set("X-Frame-Options", "DENY")
		h.Set("Referrer-Policy", "no-referrer")
		h.Set("Cross-Origin-Opener-Policy", "same-origin")
		h.Set("Cross-Origin-Resource-Policy", "same-origin")
		h.Set("Cache-Control", "no-store")
		if !isOwnHost(r.Host, listen()) {
			sayStatus(w, http.StatusForbidden, "this host is not known here: allowed are localhost, IP addresses, and the name in listen.admin")
			return
		}
		if site := r.Header.Get("Sec-Fetch-Site"); site != "" && site != "none" && site != "same-origin" {
			sayStatus(w, http.StatusForbidden, "another site may not ask here: open the address by itself")
			return
		}
		if origin := r.Header.Get("Origin"); origin != "" {
			if u, err := url.Parse(origin); err != nil || u.Scheme != "http" || u.Host != r.Host {
				sayStatus(w, http.StatusForbidden, "another site may not ask here")
				return
			}
		}
		next.ServeHTTP(w, r)
	})
}

func isOwnHost(host, listen string) bool {
	name := host
	if h, _, err := net.SplitHostPort(host); err == nil {
		name = h
	}
	name = strings.ToLower(strings.TrimSuffix(strings.TrimPrefix(name, "["), "]"))
	if _, err := netip.ParseAddr(name); err == nil {
		return true
	}
	own, _, _ := net.SplitHostPort(listen)
	return name == "localhost" || strings.HasSuffix(name, ".localhost") || name != "" && name == strings.ToLower(own)
}

// badRequest marks an error that the client can correct; it is answered with 400.
type badRequest struct{ error }

// badMedia marks a body of a type that is not read here; it is answered with 415.
type badMedia struct{ error }

// tell serves what find finds, as JSON.
func tell(find func(*http.Request) (any, error)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		r.Body = http.MaxBytesReader(w, r.Body, maxForm)
		found, err := find(r)
		status := http.StatusOK
		if err != nil {
			status = http.StatusInternalServerError
			if errors.As(err, new(badRequest)) {
				status = http.StatusBadRequest
			}
			if errors.As(err, new(badMedia)) {
				status = http.StatusUnsupportedMediaType
			}
			found = struct {
				Error string `json:"error"`
			}{err.Error()}
		}
		text, err := json.Marshal(found)
		if err != nil {
			status, text = http.StatusInternalServerError, []byte(`{"error":"not to be written as JSON"}`)
		}
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(status)
		_, _ = w.Write(append(text, '\n'))
	}
}

// statusReport is how all is.
type statusReport struct {
	Version  string            `json:"version"`
	Domain   string            `json:"domain"`
	Now      time.Time         `json:"now"`
	Started  time.Time         `json:"started"`
	LogLevel string            `json:"log_level"`
	Ready    bool              `json:"ready"`
	Draining bool              `json:"draining"`
	Checks   map[string]uint64 `json:"checks"`        // since the start
	Seconds  quantiles         `json:"check_seconds"` // of the last minute
	Store    storeReport       `json:"store"`
	Config   configReport      `json:"config"`
}

type storeReport struct {
	Kind        string            `json:"kind"` // redis or memory
	Address     string            `json:"address,omitempty"`
	BreakerOpen uint64            `json:"breaker_open"` // nodes that are not asked, as they do not answer
	Errors      map[string]uint64 `json:"errors"`       // since the start, by kind
	ErrorsOf    uint64            `json:"errors_last_minute"`
	Seconds     quantiles         `json:"seconds"` // of the last minute
	Entries     uint64            `json:"entries"` // buckets in this process

	histogram *dto.Histogram
}

type configReport struct {
	File   string  `json:"file"`
	Hash   string  `json:"hash"`
	Limits int     `json:"limits"`
	Last   *reload `json:"last_reload"` // null: none since the start
}

type reload struct {
	At       time.Time `json:"at"`
	Result   string    `json:"result"` // success or failure
	Mistakes []string  `json:"mistakes"`
}

func (a *admin) status() statusReport {
	s, cfg := a.sidecar, a.sidecar.cfg.Load()
	r := statusReport{
		Version: buildVersion(), Domain: cfg.Domain, Now: time.Now().UTC(), Started: a.began.UTC(), LogLevel: s.level.String(),
		Ready: s.answered.Load() && !s.draining.Load(), Draining: s.draining.Load(),
		Checks: make(map[string]uint64), Store: a.storeHealth(),
		Config: configReport{File: s.reload.source.file, Hash: cfg.Hash, Limits: len(cfg.Limits())},
	}
	for outcome, n := range s.check.Totals().Checks {
		r.Checks[outcome.String()] = n
	}
	r.Seconds, r.Store.Seconds, r.Store.ErrorsOf = a.history.lately()
	if last := s.reload.last.Load(); last != nil {
		r.Config.Last = &reload{At: last.at.UTC(), Result: "success", Mistakes: last.mistakes}
		if len(last.mistakes) > 0 {
			r.Config.Last.Result = "failure"
		}
	}
	return r
}

// storeHealth is what the store's own metrics say.
func (a *admin) storeHealth() storeReport {
	r := storeReport{Kind: "memory", Errors: make(map[string]uint64)}
	if o := a.sidecar.cfg.Load().Redis; o != nil {
		r.Kind, r.Address = "redis", addressOf(o)
	}
	families, _ := a.stores.Gather() // what could not be gathered is missing
	for _, f := range families {
		for _, m := range f.GetMetric() {
			switch f.GetName() {
			case "sluice_store_errors_total":
				r.Errors[m.GetLabel()[0].GetValue()] = uint64(m.GetCounter().GetValue())
			case "sluice_store_breaker_open":
				r.BreakerOpen = uint64(m.GetGauge().GetValue())
			case "sluice_store_seconds":
				r.histogram = m.GetHistogram()
			case "sluice_janitor_entries":
				r.Entries += uint64(m.GetGauge().GetValue())
			}
		}
	}
	return r
}

// addressOf is where a Redis is, without what stands for a password.
func addressOf(o *limiter.RedisOptions) string {
	all := slices.Clone(o.Addresses)
	if u, err := url.Parse(o.URL); err == nil && o.URL != "" {
		all = append([]string{(&url.URL{Scheme: u.Scheme, Host: u.Host, Path: u.Path}).String()}, all...)
	}
	return strings.Join(all, ", ")
}

// limitReport is one limit, and what it decided since the start.
type limitReport struct {
	Name      string   `json:"name"`
	Mode      string   `json:"mode"`
	From      string   `json:"from"` // config, or route: Envoy's filter chain
	Rate      string   `json:"rate,omitempty"`
	Burst     int64    `json:"burst,omitempty"`
	Key       []string `json:"key"`
	Group     string   `json:"group,omitempty"`
	Overrides int      `json:"overrides"`
	Allowed   uint64   `json:"allowed"`
	Limited   uint64   `json:"limited"`
	Tokens    uint64   `json:"tokens"`
}

func (a *admin) limits(r *http.Request) (any, error) {
	filter, most := r.FormValue("filter"), limitsTold
	if n := r.FormValue("n"); n != "" {
		var err error
		if most, err = strconv.Atoi(n); err != nil || most < 1 || most > limitsMost {
			return nil, badRequest{fmt.Errorf("n=%q: allowed are 1 to %d", n, limitsMost)}
		}
	}
	modes := map[bool]string{false: "enforce", true: "shadow"}
	counted := make(map[string]authz.LimitTotals)
	for _, l := range a.sidecar.check.Limits() {
		counted[l.Name+" "+modes[l.Shadow]] = l
	}
	all := []limitReport{}
	add := func(l limitReport, counts authz.LimitTotals) {
		if strings.Contains(l.Name, filter) {
			l.Allowed, l.Limited, l.Tokens = counts.Allowed, counts.Limited, counts.Taken
			all = append(all, l)
		}
	}
	for _, d := range a.sidecar.cfg.Load().Describe() {
		mode := modes[d.Limit.Shadow]
		add(limitReport{
			Name: d.Limit.Name, Mode: mode, From: "config", Rate: d.Rate, Burst: d.Burst, Key: append([]string{}, d.Key...), Group: d.Group, Overrides: d.Overrides,
		}, counted[d.Limit.Name+" "+mode])
		delete(counted, d.Limit.Name+" "+mode)
	}
	for _, l := range a.sidecar.check.Limits() {
		if mode := modes[l.Shadow]; counted[l.Name+" "+mode].Name != "" {
			add(limitReport{Name: l.Name, Mode: mode, From: "route", Key: []string{}}, l)
		}
	}
	total := len(all)
	if total > most {
		slices.SortStableFunc(all, func(a, b limitReport) int {
			return cmp.Or(cmp.Compare(b.Limited, a.Limited), cmp.Compare(b.Allowed, a.Allowed))
		})
		all = all[:most]
	}
	return struct {
		Total  int           `json:"total"`
		Limits []limitReport `json:"limits"`
	}{total, all}, nil
}

// keyReport is a key for people: its parts, of which secrets are hashed.
type keyReport struct {
	Key   string           `json:"key"`
	Parts []policy.KeyPart `json:"parts"`
	Count uint64           `json:"count"`
	Over  uint64           `json:"over"` // by how much the count may be too high
}

func (a *admin) top(r *http.Request) (any, error) {
	limit := r.FormValue("limit")
	if limit == "" {
		return nil, badRequest{errors.New("limit= is missing: the name of one")}
	}
	requests, denials := a.sidecar.check.Top(limit, keysTold)
	keys := func(all []authz.TopKey) []keyReport {
		told := make([]keyReport, len(all))
		for i, k := range all {
			told[i] = keyReport{k.Key, policy.KeyParts(k.Key), k.Count, k.Over}
		}
		return told
	}
	return struct {
		Limit    string      `json:"limit"`
		Requests []keyReport `json:"requests"`
		Denials  []keyReport `json:"denials"`
	}{limit, keys(requests), keys(denials)}, nil
}

// denialReport is a refused request, and others like it. Its texts are escaped.
type denialReport struct {
	ID          uint64           `json:"id"`
	Count       uint64           `json:"count"`
	Last        time.Time        `json:"last"`
	Decision    string           `json:"decision"`
	Reason      string           `json:"reason"`
	Limit       string           `json:"limit"`
	Domain      string           `json:"domain"`
	Key         string           `json:"key"`
	Parts       []policy.KeyPart `json:"parts"`
	Cost        int64            `json:"cost"`
	Remaining   int64            `json:"remaining"`
	RetryAfter  *int64           `json:"retry_after"` // null: never, or nobody knows
	Method      string           `json:"method"`
	Host        string           `json:"host"`
	Path        string           `json:"path"`
	Source      string           `json:"source"`
	RequestID   string           `json:"request_id"`
	Explainable bool             `json:"explainable"`
}

func (a *admin) denials() []denialReport {
	all := []denialReport{}
	for _, d := range a.sidecar.check.Denials() {
		r := denialReport{
			ID: d.ID, Count: d.Count, Last: d.Last.UTC(), Decision: d.Outcome.String(), Reason: reasonOf(&d),
			Limit: d.Limit, Domain: d.Domain, Key: d.Key, Parts: policy.KeyParts(d.Key), Cost: d.Cost, Remaining: d.Remaining,
			Method: authz.Escape(d.Method), Host: authz.Escape(d.Host), Path: authz.Escape(d.Path), Source: authz.Escape(d.Source), RequestID: d.RequestID,
			Explainable: d.Explainable(),
		}
		if d.Outcome == limiter.Limited && d.RetryAfter != limiter.Never {
			wait := int64((d.RetryAfter + time.Second - 1) / time.Second)
			r.RetryAfter = &wait
		}
		all = append(all, r)
	}
	return all
}

// reasonOf says in a sentence why a request was refused.
func reasonOf(d *authz.Denial) string {
	switch {
	case d.Outcome == limiter.Invalid && d.Field == "":
		return "the check holds no HTTP request"
	case d.Outcome == limiter.Invalid:
		return "a mistake of the config: " + d.Field + " of " + cmp.Or(d.Limit, "the route")
	case d.Failure != "" && d.Outcome == limiter.Delegated:
		return "the store does not answer (" + string(d.Failure) + "): left to Envoy"
	case d.Failure != "":
		return "the store does not answer (" + string(d.Failure) + "), and on_failure refuses"
	case d.Outcome != limiter.Limited:
		return "a mistake in sluice ended the check: see the log"
	}
	reason := fmt.Sprintf("costs %d, and %d are left", d.Cost, d.Remaining)
	if d.RetryAfter == limiter.Never {
		reason += "; never allowed: it costs more than the burst, or a part of its key is absent"
	}
	if d.Local {
		reason += "; decided in this process, as the store does not answer"
	}
	return reason
}

func (a *admin) explain(r *http.Request) (any, error) {
	const form = "application/x-www-form-urlencoded"
	if media, _, err := mime.ParseMediaType(r.Header.Get("Content-Type")); r.ContentLength != 0 && (err != nil || media != form) {
		return nil, badMedia{errors.New("the request's body must be " + form)}
	}
	if err := r.ParseForm(); err != nil {
		return nil, badRequest{fmt.Errorf("the form: %w", err)}
	}
	allowed := []string{"method", "host", "path", "source", "principal", "header", "context", "denial"}
	for name := range r.Form {
		if !slices.Contains(allowed, name) {
			return nil, badRequest{fmt.Errorf("%q: allowed are %s", name, strings.Join(allowed, ", "))}
		}
	}
	request, err := a.askedFor(r.Form)
	if err != nil {
		return nil, badRequest{err}
	}
	var store limiter.Store
	if a.sidecar.redis != nil {
		store = a.sidecar.redis.ReadOnly()
	} else {
		store = a.sidecar.memory.ReadOnly()
	}
	ctx, cancel := context.WithTimeout(r.Context(), humanTimeout)
	defer cancel()
	return authz.Explain(ctx, a.sidecar.cfg.Load(), store, request), nil
}

// askedFor is the request that a form describes.
func (a *admin) askedFor(form url.Values) (*policy.Request, error) {
	if text := form.Get("denial"); text != "" {
		id, err := strconv.ParseUint(text, 10, 64)
		if err != nil {
			return nil, fmt.Errorf("denial %q: allowed are ids of /api/denials", text)
		}
		if request := a.sidecar.check.Denied(id); request != nil {
			return request, nil
		}
		return nil, fmt.Errorf("the request of denial %d is not kept (any more)", id)
	}
	field := func(name, otherwise string) *string { return new(cmp.Or(form.Get(name), otherwise)) }
	spec := authz.RequestSpec{
		Method: field("method", "GET"), Host: field("host", ""), Path: field("path", "/"),
		Source: field("source", "127.0.0.1"), Principal: field("principal", ""),
		Headers: form["header"], Context: form["context"],
	}
	return spec.NewRequest()
}
