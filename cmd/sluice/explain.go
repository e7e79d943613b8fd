package main

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/sluiceproxy/sluice/authz"
	"github.com/sluiceproxy/sluice/limiter"
	"github.com/sluiceproxy/sluice/limiter/policy"
)

// asked is the request that explain is about, as the flags say it.
type asked struct {
	method, host, path, source, principal, file string
	headers, context                            []string
}

func (p *program) explainCommand() *cobra.Command {
	var config, output string
	var a asked
	c := &cobra.Command{
		Use:   "explain",
		Short: "Say what would become of a request, and why",
		Long: `Say what would become of a request: which limits apply and why the others do not, the buckets' keys, the costs, and what each bucket
holds now. Nothing is taken.

The environment of run (SLUICE_REDIS, SLUICE_DOMAIN, ...) counts here, too. Exit status 1: the request would be refused.`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			asJSON, err := isJSON(output)
			if err != nil {
				return err
			}
			if config == "" {
				config, _ = p.getenv("SLUICE_CONFIG")
			}
			request, err := a.request(c.Flags())
			if err != nil {
				return err
			}
			cfg, err := p.load(config, p.settings(nil)...)
			if err != nil {
				return err
			}
			return p.explain(c.Context(), cfg, request, asJSON)
		},
	}
	f := c.Flags()
	f.StringVar(&config, "config", "", "`file` with the limits (default $SLUICE_CONFIG)")
	f.StringVar(&a.method, "method", "GET", "the request's `method`")
	f.StringVar(&a.host, "host", "", "its `host`")
	f.StringVar(&a.path, "path", "/", "its `path`, with its query")
	f.StringArrayVar(&a.headers, "header", nil, "a header, `name=value`; any number of them")
	f.StringVar(&a.source, "source", "127.0.0.1", "the `IP` of the connection's peer")
	f.StringVar(&a.principal, "principal", "", "the peer's `principal`, such as spiffe://cluster.local/ns/web/sa/shop")
	f.StringArrayVar(&a.context, "context", nil, "one of the route's context_extensions, `key=value`; any number of them")
	f.StringVar(&a.file, "request", "", "`file` with a CheckRequest in JSON; the other flags are over it")
	outputFlag(c, &output)
	return c
}

// request is what is asked about.
func (a *asked) request(flags *pflag.FlagSet) (*policy.Request, error) {
	r := &policy.Request{Scheme: "http", Protocol: "HTTP/1.1", Time: time.Now()}
	given := func(string) bool { return true }
	if a.file != "" {
		text, err := os.ReadFile(a.file)
		if err != nil {
			return nil, fmt.Errorf("--request: %w", plain(err))
		}
		if r, err = authz.ParseRequest(text); err != nil {
			return nil, fmt.Errorf("--request %s: %w", a.file, err)
		}
		given = flags.Changed
	}
	for _, f := range []struct {
		flag, value string
		to          *string
	}{
		{"method", a.method, &r.Method},
		{"host", a.host, &r.Host},
		{"path", a.path, &r.Path},
		{"source", a.source, &r.Source.Address},
		{"principal", a.principal, &r.Source.Principal},
	} {
		if given(f.flag) {
			*f.to = f.value
		}
	}
	if _, err := netip.ParseAddr(a.source); err != nil {
		return nil, usageError{fmt.Errorf("--source %q: allowed are IP addresses", a.source)}
	}
	if !strings.HasPrefix(a.path, "/") && a.path != "*" {
		return nil, usageError{fmt.Errorf("--path %q: allowed are paths that begin with /", a.path)}
	}
	headers, err := pairs("header", a.headers)
	if err != nil {
		return nil, err
	}
	r.SetHeaders(func(yield func(name, value string) bool) {
		for _, h := range headers {
			if !yield(h[0], h[1]) {
				return
			}
		}
	})
	context, err := pairs("context", a.context)
	if err != nil {
		return nil, err
	}
	for name, value := range map[string]string{":method": r.Method, ":path": r.Path, ":authority": r.Host, ":scheme": r.Scheme} {
		if value != "" {
			r.Headers[name] = value // as Envoy has them among the headers
		}
	}
	if r.Context == nil {
		r.Context = make(map[string]string)
	}
	for _, c := range context {
		r.Context[c[0]] = c[1]
	}
	return r, nil
}

// pairs splits a flag's values, key=value.
func pairs(flag string, values []string) (all [][2]string, err error) {
	for _, v := range values {
		key, value, ok := strings.Cut(v, "=")
		if !ok || key == "" {
			return nil, usageError{fmt.Errorf("--%s %q: wanted is name=value", flag, v)}
		}
		all = append(all, [2]string{key, value})
	}
	return all, nil
}

// explanation is explain's result, as JSON has it. What is not known, or not to be had, is null.
type explanation struct {
	Decision string           `json:"decision"`
	Domain   string           `json:"domain"`
	Client   string           `json:"client"`
	Note     string           `json:"note,omitempty"`
	Limits   []explainedLimit `json:"limits"`
}

type explainedLimit struct {
	Name       string  `json:"name"`
	Applies    bool    `json:"applies"`
	Reason     string  `json:"reason"`
	Domain     string  `json:"domain"`
	Key        *string `json:"key"`
	Cost       *int64  `json:"cost"`
	Mode       string  `json:"mode"`
	Rate       string  `json:"rate"`
	Burst      *int64  `json:"burst"`
	Remaining  *int64  `json:"remaining"`
	RetryAfter *int64  `json:"retry_after"`

	refused bool // for ever
}

func (p *program) explain(ctx context.Context, cfg *policy.Config, request *policy.Request, asJSON bool) error {
	var store limiter.Store
	if cfg.Redis != nil {
		redis, err := openRedis(cfg)
		if err != nil {
			return err
		}
		defer func() { _ = redis.Close() }()
		store = redis.ReadOnly()
	}
	e, outcome := explain(ctx, cfg, store, request)
	var err error
	if asJSON {
		err = p.printJSON(e)
	} else {
		err = p.printExplanation(e, request)
	}
	if err != nil {
		return err
	}
	switch outcome {
	case limiter.Limited, limiter.Invalid, limiter.FailedClosed, limiter.Delegated:
		return errNo
	}
	return nil
}

// explain says what would become of a request. The store is one that only looks, or nil where the buckets are in another process.
func explain(ctx context.Context, cfg *policy.Config, store limiter.Store, request *policy.Request) (explanation, limiter.Outcome) {
	x := cfg.Explain(request)
	e := explanation{Domain: cfg.Domain, Client: cfg.Client(request), Limits: []explainedLimit{}}
	d := foresee(ctx, store, x.Draw)
	e.Decision = d.Outcome.String()
	switch {
	case x.Draw.Exempt:
		e.Note = x.Exempt
	case x.Draw.Invalid:
		e.Note = "the request shows a mistake of the config"
	case store == nil && len(d.Charges) > 0:
		e.Note = "there is no Redis, so the buckets are in the sidecar's own process: what they hold is not known here, and taken to be all"
	}
	for _, m := range x.Draw.Mistakes {
		if m.Field == "context_extensions" { // the others are their limits' reasons
			e.Note += fmt.Sprintf("; %v", m)
		}
	}
	e.Note = strings.TrimPrefix(e.Note, "; ")
	for _, l := range x.Limits {
		out := explainedLimit{Name: l.Limit.Name, Applies: l.Applies, Reason: l.Reason, Domain: l.Limit.Domain, Mode: "enforce", Rate: l.Rate}
		if l.Limit.Shadow {
			out.Mode = "shadow"
		}
		if l.Burst > 0 {
			out.Burst = &l.Burst
		}
		if l.Charge >= 0 {
			charge, verdict := d.Charges[l.Charge], d.Verdicts[l.Charge]
			out.Key, out.Cost = &l.Key, &charge.Cost
			if verdict.Err == nil && store != nil {
				out.Remaining = &verdict.Remaining
			}
			out.refused = verdict.Err == nil && verdict.RetryAfter == limiter.Never
			if verdict.Err == nil && !verdict.Allowed && !out.refused {
				wait := int64((verdict.RetryAfter + time.Second - 1) / time.Second)
				out.RetryAfter = &wait
			}
			if verdict.Err != nil {
				out.Reason += fmt.Sprintf("; its bucket is not known: %v", verdict.Err)
			}
		}
		e.Limits = append(e.Limits, out)
	}
	if cfg.Redis != nil && cfg.Redis.Mode == limiter.Cluster {
		e.Note = strings.TrimPrefix(e.Note+slotsNote(e.Limits), "; ")
	}
	return e, d.Outcome
}

// slotsNote says which limits of a request lie in hash slots of their own, after "; ", where there are several.
func slotsNote(limits []explainedLimit) string {
	var keys []string
	names := make(map[string][]string)
	for _, l := range limits {
		if l.Key == nil {
			continue
		}
		if names[*l.Key] == nil {
			keys = append(keys, *l.Key)
		}
		names[*l.Key] = append(names[*l.Key], l.Name)
	}
	if len(keys) < 2 {
		return ""
	}
	for i, k := range keys {
		keys[i] = strings.Join(names[k], ", ")
	}
	return "; the cluster takes from these in calls of their own, as their keys differ and so their hash slots: " + strings.Join(keys, " | ")
}

// foresee is the decision that a draw would lead to now. Without a store all buckets are taken for full.
func foresee(ctx context.Context, store limiter.Store, draw policy.Draw) limiter.Decision {
	switch {
	case draw.Exempt:
		return limiter.Decision{Outcome: limiter.Exempt, Strictest: -1}
	case len(draw.Charges) == 0 && len(draw.Unlimited) > 0 && !draw.Invalid:
		return limiter.Decision{Outcome: limiter.Allowed, Strictest: -1}
	}
	if store == nil {
		store = limiter.NewMemory(1<<20, nil, prometheus.NewRegistry())
	}
	d := limiter.Decide(ctx, store, draw.Charges)
	if draw.Invalid { // what the other limits hold may be of use all the same
		d.Outcome = limiter.Invalid
	}
	return d
}

// printExplanation prints the result for people.
func (p *program) printExplanation(e explanation, r *policy.Request) error {
	var b strings.Builder
	fmt.Fprintf(&b, "%s %s%s\n", escaped(r.Method), escaped(r.Host), escaped(r.Path))
	fmt.Fprintf(&b, "client %s, domain %s\n\n", orUnknown(e.Client), e.Domain)
	width := 0
	for _, l := range e.Limits {
		width = max(width, len(l.Name))
	}
	for _, l := range e.Limits {
		if !l.Applies {
			fmt.Fprintf(&b, "  no       %-*s  %s\n", width, l.Name, l.Reason)
			continue
		}
		fmt.Fprintf(&b, "  applies  %-*s  %s\n", width, l.Name, l.amount())
		fmt.Fprintf(&b, "           %*s  %s\n", width, "", l.Reason)
		if l.Key != nil {
			fmt.Fprintf(&b, "           %*s  key %s\n", width, "", *l.Key)
		}
	}
	if len(e.Limits) == 0 {
		b.WriteString("  there are no limits\n")
	}
	fmt.Fprintf(&b, "\n%s%s\n", e.Decision, e.verdict())
	if e.Note != "" {
		fmt.Fprintf(&b, "(%s)\n", e.Note)
	}
	_, err := p.stdout.Write([]byte(b.String()))
	return err
}

// amount is what a limit that applies costs, and what there is.
func (l *explainedLimit) amount() string {
	if l.Burst == nil {
		return "unlimited"
	}
	left := "?"
	if l.Remaining != nil {
		left = fmt.Sprint(*l.Remaining)
	}
	s := fmt.Sprintf("costs %d of %s left; burst %d, refilled at %s", *l.Cost, left, *l.Burst, l.Rate)
	if l.Mode == "shadow" {
		s += "; shadow: never denies"
	}
	return s
}

// verdict is who denies, and for how long.
func (e *explanation) verdict() string {
	var by []string
	for _, l := range e.Limits {
		switch {
		case !l.Applies || l.Mode == "shadow" || l.Cost == nil:
		case l.RetryAfter != nil:
			by = append(by, fmt.Sprintf("%s for %d s", l.Name, *l.RetryAfter))
		case l.refused:
			by = append(by, l.Name+" for ever")
		}
	}
	if len(by) == 0 || e.Decision != limiter.Limited.String() {
		return ""
	}
	return " by " + strings.Join(by, ", ")
}

func orUnknown(s string) string {
	if s == "" {
		return "unknown"
	}
	return s
}

// escaped is a text of unknown origin as a terminal may show it.
func escaped(s string) string {
	q := fmt.Sprintf("%+q", s)
	return q[1 : len(q)-1]
}
