package authz

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/sluiceproxy/sluice/limiter"
	"github.com/sluiceproxy/sluice/limiter/policy"
)

// Explanation describes what the answer to a request would be, and why. The
// admin API and `sluice explain -o json` print it as it is; what is unknown or
// does not exist is null there.
type Explanation struct {
	// Decision is the name of Outcome.
	Decision string `json:"decision"`
	Domain   string `json:"domain"`
	// Client is the client's address, or empty if it is unknown.
	Client string `json:"client"`
	// Note has further remarks, or is empty.
	Note string `json:"note,omitempty"`
	// Limits has every limit of the config and of the route, in this order.
	Limits []ExplainedLimit `json:"limits"`

	Outcome limiter.Outcome `json:"-"`
}

// ExplainedLimit is the part of one limit in an Explanation.
type ExplainedLimit struct {
	Name    string `json:"name"`
	Applies bool   `json:"applies"`
	// Reason is why the limit applies or does not.
	Reason string `json:"reason"`
	Domain string `json:"domain"`
	// Key is the bucket's key, with secrets hashed, and Cost the tokens that
	// the request would take from it. Both are nil if no bucket is used.
	Key  *string `json:"key"`
	Cost *int64  `json:"cost"`
	Mode string  `json:"mode"` // enforce or shadow
	Rate string  `json:"rate"` // empty for a quota
	// Quota is the quota as the config writes it, or nil if the bucket is none.
	Quota *string `json:"quota"`
	// Plan is the name of the plan that says the rate, the burst and the quota, or nil.
	Plan *string `json:"plan"`
	// Burst is the size of the bucket in tokens, or nil without a bucket.
	Burst *int64 `json:"burst"`
	// Remaining is the number of tokens in the bucket, rounded down: what the
	// request would leave, or what there is if it would be denied. It is nil
	// if it is unknown.
	Remaining *int64 `json:"remaining"`
	// RetryAfter is the number of seconds until the limit allows the request.
	// It is nil if the limit allows it now or never.
	RetryAfter *int64 `json:"retry_after"`
	// Settle is what a request has cost once its response has ended, as the
	// config writes it. It is nil if that is what was taken.
	Settle *string `json:"settle"`
	// Lease is for how long a sidecar may hold tokens of a busy key, such as
	// 200ms. It is nil if it may not.
	Lease *string `json:"lease"`
	// Held is how many tokens of the bucket are held until it is known what
	// requests under way have cost, and Owed how many requests have used more
	// than there were. Both are nil if they are unknown.
	Held *int64 `json:"held"`
	Owed *int64 `json:"owed"`

	// Never is true if the limit never allows the request.
	Never bool `json:"-"`
}

// Explain returns what Server would answer to a request now, without taking a
// token. store must be one that only reads, or nil if the buckets are in
// another process; they are then assumed to be full. It is safe for concurrent
// use.
func Explain(
	ctx context.Context, config *policy.Config, store limiter.Store, request *policy.Request,
) Explanation {
	x := config.Explain(request)
	e := Explanation{Domain: config.Domain, Client: config.Client(request), Limits: []ExplainedLimit{}}
	full := store == nil
	if full {
		store = limiter.NewMemory(1<<20, nil, prometheus.NewRegistry())
	}
	d := decideDraw(ctx, store, &x.Draw)
	if x.Draw.Invalid {
		// The check is refused whatever the buckets hold, but the reader may
		// want to know it.
		held := limiter.Decide(ctx, store, x.Draw.Charges)
		d.Charges, d.Verdicts = held.Charges, held.Verdicts
	}
	e.Outcome, e.Decision = d.Outcome, d.Outcome.String()
	var notes []string
	switch {
	case x.Draw.Exempt:
		notes = append(notes, x.Exempt)
	case x.Draw.Invalid:
		notes = append(notes, "the request reveals an error in the config")
	case full && slices.ContainsFunc(d.Charges, func(c limiter.Charge) bool { return c.HasBucket() }):
		notes = append(notes, "without Redis the buckets are in the sidecar's process and cannot be read; "+
			"they are assumed full")
	}
	for _, m := range x.Draw.Mistakes {
		if m.Field == "context_extensions" { // other mistakes are in the reasons of their limits
			notes = append(notes, m.Error())
		}
	}
	for _, l := range x.Limits {
		e.Limits = append(e.Limits, explainLimit(&l, &d, full))
	}
	if config.Redis != nil && config.Redis.Mode == limiter.Cluster {
		notes = append(notes, slotsNote(d.Charges)...)
	}
	e.Note = strings.Join(notes, "; ")
	return e
}

// explainLimit describes the part of l in the decision d. full says that the
// buckets are only assumed to be full.
func explainLimit(l *policy.Explained, d *limiter.Decision, full bool) ExplainedLimit {
	out := ExplainedLimit{
		Name: l.Limit.Name, Applies: l.Applies, Reason: l.Reason, Domain: l.Limit.Domain,
		Mode: l.Limit.Mode(), Rate: l.Rate,
	}
	if l.Quota != "" {
		out.Quota = &l.Quota
	}
	if l.Burst > 0 {
		out.Burst = &l.Burst
	}
	if l.Plan != "" {
		out.Plan = &l.Plan
	}
	if l.Settle != "" {
		out.Settle = &l.Settle
	}
	if lease := l.Limit.Lease; lease > 0 {
		text := lease.String()
		out.Lease = &text
	}
	if l.Charge < 0 {
		return out
	}
	charge, verdict := &d.Charges[l.Charge], &d.Verdicts[l.Charge]
	out.Key, out.Cost = &l.Key, &charge.Cost
	if verdict.Err != nil {
		out.Reason += fmt.Sprintf("; its bucket is unknown: %v", verdict.Err)
		return out
	}
	if !full && charge.HasBucket() {
		out.Remaining, out.Held, out.Owed = &verdict.Remaining, &verdict.Held, &verdict.Owed
	}
	out.Never = verdict.RetryAfter == limiter.Never
	if !verdict.Allowed && !out.Never {
		out.RetryAfter = new(seconds(verdict.RetryAfter))
	}
	return out
}

// slotsNote returns a note on the limits of a request whose buckets are in
// different hash slots of a cluster, or nothing if all are in one.
func slotsNote(charges []limiter.Charge) []string {
	var keys []string
	names := make(map[string][]string)
	for i := range charges {
		c := &charges[i]
		if !c.HasBucket() {
			continue
		}
		_, tag, _ := strings.Cut(c.Key, "{") // ends with the key, as does the hash tag
		if names[tag] == nil {
			keys = append(keys, tag)
		}
		names[tag] = append(names[tag], c.Limit.Name)
	}
	if len(keys) < 2 {
		return nil
	}
	for i, k := range keys {
		keys[i] = strings.Join(names[k], ", ")
	}
	return []string{
		"limits with different keys are in different hash slots; each slot needs a call of its own: " +
			strings.Join(keys, " | "),
	}
}

// RequestSpec describes a request in the words of command-line flags and
// forms. A field that is nil is left as it is.
type RequestSpec struct {
	Method, Host, Path *string
	Source             *string  // the address of the connection's peer
	Principal          *string  // of the peer
	Headers, Context   []string // name=value; context are the route's context_extensions
}

// NewRequest returns the request that s describes. Its error begins with the
// name of the field.
func (s *RequestSpec) NewRequest() (*policy.Request, error) {
	r := &policy.Request{Scheme: "http", Protocol: "HTTP/1.1", Time: time.Now()}
	return r, s.Apply(r)
}

// Apply sets what s describes in r. Its error begins with the name of the
// field.
func (s *RequestSpec) Apply(r *policy.Request) error {
	if s.Source != nil {
		if _, err := netip.ParseAddr(*s.Source); err != nil {
			return fmt.Errorf("source %q: must be an IP address", *s.Source)
		}
	}
	if s.Path != nil && !strings.HasPrefix(*s.Path, "/") && *s.Path != "*" {
		return fmt.Errorf("path %q: must begin with /", *s.Path)
	}
	headers, err := pairs("header", s.Headers)
	if err != nil {
		return err
	}
	context, err := pairs("context", s.Context)
	if err != nil {
		return err
	}
	for _, f := range []struct{ from, to *string }{
		{s.Method, &r.Method},
		{s.Host, &r.Host},
		{s.Path, &r.Path},
		{s.Source, &r.Source.Address},
		{s.Principal, &r.Source.Principal},
	} {
		if f.from != nil {
			*f.to = *f.from
		}
	}
	r.SetHeaders(func(yield func(name, value string) bool) {
		for _, h := range headers {
			if !yield(h[0], h[1]) {
				return
			}
		}
	})
	// Envoy lists these among the headers.
	for name, value := range map[string]string{
		":method": r.Method, ":path": r.Path, ":authority": r.Host, ":scheme": r.Scheme,
	} {
		if value != "" {
			r.Headers[name] = value
		}
	}
	if r.Context == nil {
		r.Context = make(map[string]string)
	}
	for _, c := range context {
		r.Context[c[0]] = c[1]
	}
	return nil
}

// pairs splits the values of a field, each name=value.
func pairs(field string, values []string) (all [][2]string, err error) {
	for _, v := range values {
		name, value, ok := strings.Cut(v, "=")
		if !ok || name == "" {
			return nil, fmt.Errorf("%s %q: must be name=value", field, v)
		}
		all = append(all, [2]string{name, value})
	}
	return all, nil
}

// Escape returns a text that a client sent as a terminal or a page may show
// it: in printable ASCII, with \ escapes for all else.
func Escape(s string) string {
	q := fmt.Sprintf("%+q", s)
	return q[1 : len(q)-1]
}
