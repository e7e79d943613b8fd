package page

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"mime"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	dto "github.com/prometheus/client_model/go"

	"github.com/sluiceproxy/sluice/authz"
	"github.com/sluiceproxy/sluice/limiter"
	"github.com/sluiceproxy/sluice/limiter/policy"
)

const (
	topKeys = 20 // of GET /api/top

	// explainTimeout is how long explain waits for the store. It is longer
	// than the timeout of a check, because a person waits for it.
	explainTimeout = 2 * time.Second
)

// statusReport is the response of GET /api/status. Counts are since the start.
type statusReport struct {
	Version  string            `json:"version"`
	Domain   string            `json:"domain"`
	Now      time.Time         `json:"now"`
	Started  time.Time         `json:"started"`
	LogLevel string            `json:"log_level"`
	Ready    bool              `json:"ready"`
	Draining bool              `json:"draining"`
	GRPC     string            `json:"grpc"`          // the address that Envoy asks
	Checks   map[string]uint64 `json:"checks"`        // by decision
	Checked  *time.Time        `json:"last_check"`    // to a second; null: none since the start
	Seconds  quantiles         `json:"check_seconds"` // in the last minute
	Store    storeReport       `json:"store"`
	Config   configReport      `json:"config"`
}

type storeReport struct {
	Kind             string            `json:"kind"` // redis or memory
	Address          string            `json:"address,omitempty"`
	BreakerOpen      uint64            `json:"breaker_open"` // nodes whose circuit breaker is open
	Errors           map[string]uint64 `json:"errors"`       // by kind
	ErrorsLastMinute uint64            `json:"errors_last_minute"`
	Seconds          quantiles         `json:"seconds"`         // in the last minute
	Entries          uint64            `json:"entries"`         // buckets in this process
	Error            string            `json:"error,omitempty"` // why Redis has not answered since the start
	Outage           *outageReport     `json:"outage"`          // the last one; null: none since the start

	histogram *dto.Histogram // of a call to the store, in seconds
}

// outageReport is a time in which Redis did not answer.
type outageReport struct {
	Since   time.Time  `json:"since"`
	Until   *time.Time `json:"until"` // null while it lasts
	Seconds float64    `json:"seconds"`
	// Checks has the numbers of the checks that on_failure decided meanwhile.
	Checks map[string]uint64 `json:"checks"`
}

type configReport struct {
	File     string  `json:"file"`
	Hash     string  `json:"hash"`
	Mode     string  `json:"mode"` // enforce, or shadow: nothing in the file denies
	Limits   int     `json:"limits"`
	Shadow   int     `json:"shadow_limits"` // of Limits
	Warnings int     `json:"warnings"`
	Last     *reload `json:"last_reload"` // null: none since the start
}

type reload struct {
	At       time.Time `json:"at"`
	Result   string    `json:"result"` // success or failure
	Mistakes []string  `json:"mistakes"`
}

func (p *Page) status() statusReport {
	cfg, state := p.Config(), p.State()
	limits := cfg.Limits()
	r := statusReport{
		Version: p.Version, Domain: cfg.Domain, Now: time.Now().UTC(), Started: p.started.UTC(),
		LogLevel: state.LogLevel, Ready: state.Ready, Draining: state.Draining,
		GRPC: p.GRPC, Checks: make(map[string]uint64), Store: p.store(),
		Config: configReport{
			File: p.ConfigFile, Hash: cfg.Hash, Mode: cfg.Mode(), Limits: len(limits), Warnings: len(cfg.Warnings),
		},
	}
	for _, l := range limits {
		if l.Shadow {
			r.Config.Shadow++
		}
	}
	if at := p.history.lastCheck(); !at.IsZero() {
		r.Checked = new(at.UTC())
	}
	r.Store.Error = state.StoreError
	if o := state.Outage; o != nil {
		r.Store.Outage = &outageReport{Since: o.Since.UTC(), Checks: make(map[string]uint64)}
		end := r.Now
		if !o.Until.IsZero() {
			end = o.Until.UTC()
			r.Store.Outage.Until = &end
		}
		r.Store.Outage.Seconds = end.Sub(r.Store.Outage.Since).Seconds()
		for outcome, n := range o.Checks {
			r.Store.Outage.Checks[outcome.String()] = n
		}
	}
	for outcome, n := range p.Server.Totals().Checks {
		r.Checks[outcome.String()] = n
	}
	r.Seconds, r.Store.Seconds, r.Store.ErrorsLastMinute = p.history.lastMinute()
	if !state.Reloaded.IsZero() {
		r.Config.Last = &reload{At: state.Reloaded.UTC(), Result: "success", Mistakes: state.ReloadErrors}
		if len(state.ReloadErrors) > 0 {
			r.Config.Last.Result = "failure"
		}
	}
	return r
}

// store reports what the store's own metrics say.
func (p *Page) store() storeReport {
	r := storeReport{Kind: "memory", Errors: make(map[string]uint64)}
	if o := p.Config().Redis; o != nil {
		r.Kind, r.Address = "redis", addressOf(o)
	}
	families, _ := p.StoreMetrics.Gather() // what cannot be gathered is not shown
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

// sample returns the counts as they are now.
func (p *Page) sample() sample {
	totals, store := p.Server.Totals(), p.store()
	s := sample{at: time.Now(), checks: histogramOf(totals.Seconds), calls: histogramOf(store.histogram)}
	for outcome, n := range totals.Checks {
		switch {
		case outcome == limiter.Limited:
			s.limited += n
		case authz.IsDenial(outcome):
			s.refused += n
		case outcome == limiter.Canceled: // neither: nobody learned of the decision
		default:
			s.passed += n
		}
	}
	for _, n := range store.Errors {
		s.storeErrors += n
	}
	return s
}

// addressOf returns where a Redis is, without its credentials.
func addressOf(o *limiter.RedisOptions) string {
	all := slices.Clone(o.Addresses)
	if u, err := url.Parse(o.URL); err == nil && o.URL != "" {
		all = append([]string{(&url.URL{Scheme: u.Scheme, Host: u.Host, Path: u.Path}).String()}, all...)
	}
	return strings.Join(all, ", ")
}

// keyReport is one key of GET /api/top.
type keyReport struct {
	Key   string           `json:"key"`
	Parts []policy.KeyPart `json:"parts"` // of the key; secrets are hashed
	Count uint64           `json:"count"`
	Over  uint64           `json:"over"` // Count is too high by at most this
}

// top returns the keys of the parameter limit with the most requests and the
// most denials.
func (p *Page) top(r *http.Request) (any, error) {
	limit := r.FormValue("limit")
	if limit == "" {
		return nil, badRequestError{errors.New("limit: missing; want the name of a limit")}
	}
	requests, denials, counted := p.Server.Top(limit, topKeys)
	report := func(keys []authz.TopKey) []keyReport {
		all := make([]keyReport, len(keys))
		for i, k := range keys {
			all[i] = keyReport{k.Key, policy.KeyParts(k.Key), k.Count, k.Over}
		}
		return all
	}
	return struct {
		Limit    string      `json:"limit"`
		Counted  bool        `json:"counted"` // whether the keys of the limit are counted
		Requests []keyReport `json:"requests"`
		Denials  []keyReport `json:"denials"`
	}{limit, counted, report(requests), report(denials)}, nil
}

// denialReport is one entry of GET /api/denials: the latest of Count denied
// requests with the same limit, key and outcome. Its texts are escaped. Shadow
// says that a limit in shadow mode would have denied them; Decision is then
// shadow_limited.
type denialReport struct {
	ID          uint64           `json:"id"`
	Count       uint64           `json:"count"`
	Last        time.Time        `json:"last"`
	Decision    string           `json:"decision"`
	Shadow      bool             `json:"shadow"`
	Reason      string           `json:"reason"`
	Limit       string           `json:"limit"`
	Domain      string           `json:"domain"`
	Key         string           `json:"key"`
	Parts       []policy.KeyPart `json:"parts"`
	Cost        int64            `json:"cost"`
	Remaining   int64            `json:"remaining"`
	Held        int64            `json:"held"`        // tokens of requests under way, with settle or lease
	Owed        int64            `json:"owed"`        // tokens that requests used beyond what there was
	RetryAfter  *int64           `json:"retry_after"` // in seconds; null: never, or unknown
	Method      string           `json:"method"`
	Host        string           `json:"host"`
	Path        string           `json:"path"`
	Source      string           `json:"source"` // the peer's address
	Client      string           `json:"client"` // the client's by client_ip; empty if unknown
	RequestID   string           `json:"request_id"`
	Explainable bool             `json:"explainable"`
}

func (p *Page) denials() []denialReport {
	all := []denialReport{}
	for _, d := range p.Server.Denials() {
		r := denialReport{
			ID: d.ID, Count: d.Count, Last: d.Last.UTC(), Decision: d.Decision(), Shadow: d.Shadow, Reason: reasonOf(&d),
			Limit: d.Limit, Domain: d.Domain, Key: d.Key, Parts: policy.KeyParts(d.Key),
			Cost: d.Cost, Remaining: d.Remaining, Held: d.Held, Owed: d.Owed,
			Method: authz.Escape(d.Method), Host: authz.Escape(d.Host), Path: authz.Escape(d.Path),
			Source: authz.Escape(d.Source), Client: d.Client, RequestID: d.RequestID, Explainable: d.Explainable(),
		}
		if d.Outcome == limiter.Limited && d.RetryAfter != limiter.Never {
			r.RetryAfter = new(int64((d.RetryAfter + time.Second - 1) / time.Second))
		}
		all = append(all, r)
	}
	return all
}

// reasonOf says why a request was denied.
func reasonOf(d *authz.Denial) string {
	switch {
	case d.Outcome == limiter.Invalid && d.Field == "":
		return "the check has no HTTP request"
	case d.Outcome == limiter.Invalid:
		return "error in the config: " + d.Field + " of " + cmp.Or(d.Limit, "the route")
	case d.Failure != "" && d.Outcome == limiter.Delegated:
		return "store failed (" + string(d.Failure) + "), on_failure delegates to Envoy"
	case d.Failure != "":
		return "store failed (" + string(d.Failure) + "), on_failure denies"
	case d.Outcome != limiter.Limited:
		return "error in sluice, see the log"
	}
	reason := fmt.Sprintf("cost %d, remaining %d", d.Cost, d.Remaining)
	if d.Held > 0 {
		reason += fmt.Sprintf(", held %d", d.Held)
	}
	if d.Owed > 0 {
		reason += fmt.Sprintf(", owed %d", d.Owed)
	}
	if d.RetryAfter == limiter.Never {
		reason += "; never allowed: the rate is none, the cost exceeds the burst, or a part of the key is absent"
	}
	if d.Local {
		reason += "; decided in this process, because the store failed"
	}
	return reason
}

// explain explains the request that the query or the form describes.
func (p *Page) explain(r *http.Request) (any, error) {
	const form = "application/x-www-form-urlencoded"
	media, _, err := mime.ParseMediaType(r.Header.Get("Content-Type"))
	if r.ContentLength != 0 && (err != nil || media != form) {
		return nil, unsupportedMediaError{errors.New("the request's body must be " + form)}
	}
	if err := r.ParseForm(); err != nil {
		return nil, badRequestError{fmt.Errorf("the form: %w", err)}
	}
	known := []string{"method", "host", "path", "source", "principal", "header", "context", "denial"}
	for name := range r.Form {
		if !slices.Contains(known, name) {
			return nil, badRequestError{fmt.Errorf("unknown parameter %q; want %s", name, strings.Join(known, ", "))}
		}
	}
	request, err := p.requestFromForm(r.Form)
	if err != nil {
		return nil, badRequestError{err}
	}
	ctx, cancel := context.WithTimeout(r.Context(), explainTimeout)
	defer cancel()
	return authz.Explain(ctx, p.Config(), p.Buckets, request), nil
}

// requestFromForm returns the request that form describes.
func (p *Page) requestFromForm(form url.Values) (*policy.Request, error) {
	if text := form.Get("denial"); text != "" {
		id, err := strconv.ParseUint(text, 10, 64)
		if err != nil {
			return nil, fmt.Errorf("denial %q: want an id of /api/denials", text)
		}
		if request := p.Server.Denied(id); request != nil {
			return request, nil
		}
		return nil, fmt.Errorf("denial %d: its request is not kept, or no longer", id)
	}
	field := func(name, otherwise string) *string { return new(cmp.Or(form.Get(name), otherwise)) }
	spec := authz.RequestSpec{
		Method: field("method", "GET"), Host: field("host", ""), Path: field("path", "/"),
		Source: field("source", "127.0.0.1"), Principal: field("principal", ""),
		Headers: form["header"], Context: form["context"],
	}
	return spec.NewRequest()
}
