package main

import (
	"cmp"
	"context"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/sluiceproxy/sluice/authz"
	"github.com/sluiceproxy/sluice/limiter"
	"github.com/sluiceproxy/sluice/limiter/policy"
)

// requestFlags are the flags of explain that describe a request.
type requestFlags struct {
	method, host, path, source, principal, file string
	headers, context                            []string
}

func (p *program) explainCommand() *cobra.Command {
	var config, output string
	var r requestFlags
	c := &cobra.Command{
		Use:   "explain",
		Short: "Show which limits apply to a request and what the decision would be",
		Long: `Show which limits apply to a request and what the decision would be.

For each limit explain prints why it applies or not, the key of its bucket, the cost, and the tokens that the request
would leave in it. It takes no tokens.

The environment variables of run (SLUICE_REDIS, SLUICE_DOMAIN, ...) have their effect here, too. Exit status 1: the
request would be denied or refused.`,
		Args: noArguments,
		RunE: func(c *cobra.Command, _ []string) error {
			asJSON, err := isJSON(output)
			if err != nil {
				return err
			}
			if config, err = p.configOrVariable(config); err != nil && len(r.context) == 0 && r.file == "" {
				return err // a request from a route may bring its limits
			}
			request, err := r.request(c.Flags())
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
	f.StringVar(&r.method, "method", "GET", "the request's `method`")
	f.StringVar(&r.host, "host", "", "the request's `host`")
	f.StringVar(&r.path, "path", "/", "the request's `path`, with its query")
	f.StringArrayVar(&r.headers, "header", nil, "a header, `name=value`; may be repeated")
	f.StringVar(&r.source, "source", "127.0.0.1", "`IP` address of the connection's peer")
	f.StringVar(&r.principal, "principal", "",
		"the peer's `principal`, such as spiffe://cluster.local/ns/web/sa/shop")
	f.StringArrayVar(&r.context, "context", nil,
		"one of the route's context_extensions, `key=value`; may be repeated")
	f.StringVar(&r.file, "request", "", "`file` with a CheckRequest in JSON; the other flags override it")
	outputFlag(c, &output)
	return c
}

// request returns the request that the flags describe.
func (f *requestFlags) request(flags *pflag.FlagSet) (*policy.Request, error) {
	spec := authz.RequestSpec{
		Method: &f.method, Host: &f.host, Path: &f.path, Source: &f.source, Principal: &f.principal,
		Headers: f.headers, Context: f.context,
	}
	if f.file == "" {
		r, err := spec.NewRequest()
		if err != nil {
			return nil, usageError{fmt.Errorf("--%w", err)}
		}
		return r, nil
	}
	text, err := os.ReadFile(f.file)
	if err != nil {
		return nil, fmt.Errorf("--request: %w", trimSyscall(err))
	}
	r, err := authz.ParseRequest(text)
	if err != nil {
		return nil, fmt.Errorf("--request %s: %w", f.file, err)
	}
	// A default does not take precedence over the file.
	for name, field := range map[string]**string{
		"method": &spec.Method, "host": &spec.Host, "path": &spec.Path,
		"source": &spec.Source, "principal": &spec.Principal,
	} {
		if !flags.Changed(name) {
			*field = nil
		}
	}
	if err := spec.Apply(r); err != nil {
		return nil, usageError{fmt.Errorf("--%w", err)}
	}
	return r, nil
}

// explain prints the explanation of a request. It returns errNo if the request
// would be denied or refused.
func (p *program) explain(
	ctx context.Context, cfg *policy.Config, request *policy.Request, asJSON bool,
) error {
	var store limiter.Store
	if cfg.Redis != nil {
		redis, err := openRedis(cfg)
		if err != nil {
			return err
		}
		defer func() { _ = redis.Close() }()
		store = redis.ReadOnly()
	}
	e := authz.Explain(ctx, cfg, store, request)
	var err error
	if asJSON {
		err = p.printJSON(e)
	} else {
		err = p.printExplanation(e, request)
	}
	if err != nil {
		return err
	}
	if authz.IsDenial(e.Outcome) {
		return errNo
	}
	return nil
}

// printExplanation prints the result as text.
func (p *program) printExplanation(e authz.Explanation, r *policy.Request) error {
	var b strings.Builder
	fmt.Fprintf(&b, "%s %s%s\n", authz.Escape(r.Method), authz.Escape(r.Host), authz.Escape(r.Path))
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
		fmt.Fprintf(&b, "  applies  %-*s  %s\n", width, l.Name, amount(&l))
		fmt.Fprintf(&b, "           %*s  %s\n", width, "", l.Reason)
		if l.Key != nil {
			fmt.Fprintf(&b, "           %*s  key %s\n", width, "", *l.Key)
		}
	}
	if len(e.Limits) == 0 {
		b.WriteString("  no limits\n")
	}
	fmt.Fprintf(&b, "\n%s%s\n", e.Decision, cmp.Or(deniedBy(&e), meanings[e.Outcome]))
	if e.Note != "" {
		fmt.Fprintf(&b, "(%s)\n", e.Note)
	}
	_, err := p.stdout.Write([]byte(b.String()))
	return err
}

// meanings say of decisions what their names do not.
var meanings = map[limiter.Outcome]string{
	limiter.Unmatched:    ": no limit applies, so the request passes",
	limiter.FailedOpen:   ": a bucket cannot be read from Redis, and on_failure lets the request pass",
	limiter.FailedClosed: ": a bucket cannot be read from Redis, and on_failure refuses the request",
	limiter.Delegated: ": a bucket cannot be read from Redis, and on_failure leaves the request to Envoy's " +
		"failure_mode_allow",
}

// amount describes the cost and the bucket of a limit that applies.
func amount(l *authz.ExplainedLimit) string {
	switch {
	case l.Burst == nil && l.Cost == nil:
		return "unlimited"
	case l.Burst == nil && l.Mode == "shadow":
		return "rate none; shadow, never denies"
	case l.Burst == nil:
		return "rate none, denies every request"
	}
	remaining := "unknown"
	if l.Remaining != nil {
		remaining = fmt.Sprint(*l.Remaining)
	}
	s := fmt.Sprintf("cost %d, remaining %s", *l.Cost, remaining)
	if l.Held != nil {
		s += heldAndOwed(*l.Held, *l.Owed)
	}
	if l.Quota != nil {
		s += "; quota " + *l.Quota
	} else {
		s += fmt.Sprintf("; burst %d, rate %s", *l.Burst, l.Rate)
	}
	if l.Plan != nil {
		s += " by plan " + *l.Plan
	}
	if l.Settle != nil {
		s += "; settles"
	}
	if l.Lease != nil {
		s += "; leased for up to " + *l.Lease
	}
	if l.Mode == "shadow" {
		s += "; shadow, never denies"
	}
	return s
}

// heldAndOwed describes what is held and owed of a bucket, if anything is.
func heldAndOwed(held, owed int64) (s string) {
	if held > 0 {
		s += fmt.Sprintf(", held %d", held)
	}
	if owed > 0 {
		s += fmt.Sprintf(", owed %d", owed)
	}
	return s
}

// deniedBy lists the limits that deny, and for how long, after " by ".
func deniedBy(e *authz.Explanation) string {
	var by []string
	for _, l := range e.Limits {
		switch {
		case !l.Applies || l.Mode == "shadow" || l.Cost == nil:
		case l.RetryAfter != nil:
			by = append(by, l.Name+" for "+wait(*l.RetryAfter))
		case l.Never:
			by = append(by, l.Name+" forever")
		}
	}
	if len(by) == 0 || e.Decision != limiter.Limited.String() {
		return ""
	}
	return " by " + strings.Join(by, ", ")
}

// wait returns a number of seconds to wait for people.
func wait(seconds int64) string { return policy.RoughWait(time.Duration(seconds) * time.Second) }

// orUnknown returns s, or "unknown" if it is empty.
func orUnknown(s string) string {
	if s == "" {
		return "unknown"
	}
	return s
}
