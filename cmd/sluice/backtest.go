package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/sluiceproxy/sluice/cmd/sluice/accesslog"
	"github.com/sluiceproxy/sluice/cmd/sluice/backtest"
	"github.com/sluiceproxy/sluice/limiter/policy"
)

// backtestFlags are the flags of backtest.
type backtestFlags struct {
	config, against, format, since, until, maxLimited, output string
	fields                                                    []string
	suggest                                                   bool
}

func (p *program) backtestCommand() *cobra.Command {
	var f backtestFlags
	c := &cobra.Command{
		Use:   "backtest LOG...",
		Short: "Play access logs through a config and show who would have been limited",
		Long: `Play access logs through a config and show who would have been limited.

A LOG is a file, or - for standard input. It may be compressed by gzip or zstd. backtest recognizes the common and the
combined format, the formats of Envoy, Istio, sluice and AWS load balancers, JSON lines (Envoy, Istio, Traefik,
Cloudflare, Caddy and others), and CSV with a header row. --field says which field of the log is which attribute of a
request: a member of a JSON object, in which dots descend, a column, a field NAME=value of a line, or the number of a
field.

All requests are decided in the order of their times as sluice would have decided them then, in this process: nothing is
taken from any bucket in Redis. A log whose times are in seconds or milliseconds does not show the bursts within one. So
the requests of each are played twice: those of each key evenly spread over it, and all at once.

Exit status 1: more than --max-limited of the requests would be denied, more than 1% of the lines cannot be read, there
are no requests, or the run was interrupted.`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) == 0 {
				return errors.New("missing LOG: name an access log, or - for standard input")
			}
			return nil
		},
		RunE: func(c *cobra.Command, args []string) error {
			ctx, stop := untilSignal(c.Context())
			defer stop()
			return p.backtest(ctx, &f, args)
		},
	}
	flags := c.Flags()
	flags.StringVar(&f.config, "config", "", "`file` with the limits (default $SLUICE_CONFIG)")
	flags.StringVar(&f.against, "against", "", "`file` with the limits before, to show what changes")
	flags.StringVar(&f.format, "format", "auto", "`format` of the logs: "+strings.Join(accesslog.Formats, ", "))
	flags.StringArrayVar(&f.fields, "field", nil,
		"the attribute that a field of the log is, `ATTRIBUTE=NAME`, such as "+
			"'request.headers[\"x-api-key\"]=api_key'; may be repeated")
	flags.StringVar(&f.since, "since", "",
		"play requests from this `time` on: RFC 3339, or a duration back from the logs' end, "+
			"such as 24h or 7d")
	flags.StringVar(&f.until, "until", "", "play requests before this `time`, likewise")
	flags.StringVar(&f.maxLimited, "max-limited", "",
		"exit with status 1 if more than this `share` of all requests, evenly spread, would be denied, such as 0.1%")
	flags.BoolVar(&f.suggest, "suggest", false, "find the least bursts and rates that limit no key, 0.1% and 1% of keys")
	flags.StringVarP(&f.output, "output", "o", "text", "`format` of the result: text, json or html")
	return c
}

func (p *program) backtest(ctx context.Context, f *backtestFlags, logs []string) error {
	if !slices.Contains([]string{"text", "json", "html"}, f.output) {
		return usageError{fmt.Errorf("-o %q: must be text, json or html", f.output)}
	}
	if !slices.Contains(accesslog.Formats, f.format) {
		return usageError{fmt.Errorf("--format %q: must be one of %s", f.format, strings.Join(accesslog.Formats, ", "))}
	}
	maxLimited, err := parseShare(f.maxLimited)
	if err != nil {
		return usageError{fmt.Errorf("--max-limited %q: %w", f.maxLimited, err)}
	}
	read := accesslog.Options{Format: f.format}
	for _, text := range f.fields {
		field, err := accesslog.ParseField(text)
		if err != nil {
			return usageError{fmt.Errorf("--field %w", err)}
		}
		read.Fields = append(read.Fields, field)
	}
	if f.config == "" {
		f.config, _ = p.getenv("SLUICE_CONFIG")
	}
	if f.config == "" {
		return usageError{errNoConfig}
	}
	o := backtest.Options{
		ConfigFile: f.config, AgainstFile: f.against, Suggest: f.suggest || f.output == "html", MaxLimited: maxLimited,
		Progress: &backtest.Progress{},
	}
	if o.Config, err = p.load(f.config, p.settings(nil)...); err != nil {
		return err
	}
	configs := []*policy.Config{o.Config}
	if f.against != "" {
		if o.Against, err = p.load(f.against, p.settings(nil)...); err != nil {
			return err
		}
		configs = append(configs, o.Against)
	}
	read.Wanted = backtest.Wanted(configs...)
	if o.Logs, err = p.openLogs(logs, read); err != nil {
		return err
	}
	if o.Since, o.Until, err = window(f, o.Logs); err != nil {
		return err
	}
	finished := p.showProgress(&o)
	report, _ := backtest.Run(ctx, o) // its error is among the reasons of the verdict
	finished()
	if err := p.printBacktest(report, f); err != nil {
		return err
	}
	for _, why := range report.Verdict.Reasons {
		_, _ = fmt.Fprintf(p.stderr, "sluice: %s\n", why)
	}
	if !report.Verdict.Passed {
		return errNo
	}
	return nil
}

// openLogs opens the logs. One that is empty is only a warning, if there are
// others.
func (p *program) openLogs(names []string, o accesslog.Options) (all []*accesslog.Source, err error) {
	var empty error
	for i, name := range names {
		if slices.Contains(names[:i], name) {
			return nil, fmt.Errorf("%s: named twice; its requests would count twice", name)
		}
		s, err := accesslog.Open(name, os.Stdin, o)
		switch {
		case errors.Is(err, accesslog.ErrEmpty):
			empty = err
			if len(names) > 1 {
				_, _ = fmt.Fprintf(p.stderr, "warning: %v\n", err)
			}
		case err != nil:
			return nil, err //nolint:wrapcheck // it names the log
		default:
			all = append(all, s)
		}
	}
	if len(all) == 0 {
		return nil, empty
	}
	return all, nil
}

// window returns --since and --until in microseconds since 1970; 0 is no bound.
func window(f *backtestFlags, logs []*accesslog.Source) (since, until int64, err error) {
	end := int64(0) // of the logs
	for _, flag := range []struct {
		name, text string
		at         *int64
	}{{"since", f.since, &since}, {"until", f.until, &until}} {
		if flag.text == "" {
			continue
		}
		if t, err := time.Parse(time.RFC3339Nano, flag.text); err == nil {
			*flag.at = t.UnixMicro()
			continue
		}
		back, err := parseBack(flag.text)
		if err != nil {
			return 0, 0, usageError{fmt.Errorf("--%s %q: must be a time such as 2026-01-02T15:04:05Z, "+
				"or a duration back from the logs' end such as 24h or 7d", flag.name, flag.text)}
		}
		for _, l := range logs {
			if end > 0 && flag.name == "until" && since > 0 {
				break // known from since
			}
			last, err := l.Last()
			if err != nil {
				return 0, 0, err //nolint:wrapcheck // it names the log
			}
			end = max(end, last)
		}
		*flag.at = end - back.Microseconds()
	}
	if since > 0 && until > 0 && since >= until {
		return 0, 0, usageError{fmt.Errorf("--since %s is not before --until %s", f.since, f.until)}
	}
	return since, until, nil
}

// parseBack parses a duration, also of days.
func parseBack(text string) (time.Duration, error) {
	if days, ok := strings.CutSuffix(text, "d"); ok {
		n, err := strconv.ParseUint(days, 10, 16)
		return time.Duration(n) * 24 * time.Hour, err //nolint:wrapcheck // the caller words it
	}
	d, err := time.ParseDuration(text)
	if err == nil && d < 0 {
		err = errors.New("negative")
	}
	return d, err //nolint:wrapcheck // the caller words it
}

// parseShare parses a percentage, or returns nil for no text.
func parseShare(text string) (*float64, error) {
	if text == "" {
		return nil, nil
	}
	number, isPercent := strings.CutSuffix(text, "%")
	n, err := strconv.ParseFloat(strings.TrimSpace(number), 64)
	if isShare := err == nil && n >= 0 && n <= 100; !isShare || !isPercent && n != 0 {
		mend := ""
		if isShare {
			mend = "; write " + text + "%"
		}
		return nil, errors.New("must be a percentage from 0% to 100%, such as 0.1%" + mend)
	}
	return &n, nil
}

func (p *program) printBacktest(r *backtest.Report, f *backtestFlags) error {
	switch f.output {
	case "json":
		return p.printJSON(r)
	case "html":
		return r.HTML(p.stdout) //nolint:wrapcheck // an error of stdout
	default:
		return r.Text(p.stdout) //nolint:wrapcheck // an error of stdout
	}
}

// showProgress shows on a terminal how far a run is, until finished is called.
func (p *program) showProgress(o *backtest.Options) (finished func()) {
	f, ok := p.stderr.(*os.File)
	if !ok || !term.IsTerminal(int(f.Fd())) {
		return func() {}
	}
	total, known := int64(0), true
	for _, l := range o.Logs {
		total += l.Size
		known = known && l.Size > 0
	}
	if !known {
		total = 0
	}
	stop := make(chan struct{})
	var shown sync.WaitGroup
	shown.Go(func() {
		began := time.Now()
		tick := time.NewTicker(200 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-stop:
				_, _ = io.WriteString(f, "\r\x1b[K")
				return
			case <-tick.C:
				_, _ = io.WriteString(f, "\r\x1b[K"+progressLine(o.Progress, total, time.Since(began)))
			}
		}
	})
	return func() { close(stop); shown.Wait() }
}

// progressLine describes how far a run is. total is the size of all logs in
// bytes; 0: unknown.
func progressLine(at *backtest.Progress, total int64, since time.Duration) string {
	read, lines := at.Read.Load(), at.Lines.Load()
	text := fmt.Sprintf("%d MB, %d lines, %.0f lines/s", read>>20, lines, float64(lines)/since.Seconds())
	if total == 0 || read == 0 {
		return text
	}
	part := min(1, float64(read)/float64(total))
	const width = 24
	bar := strings.Repeat("#", int(part*width)) + strings.Repeat("-", width-int(part*width))
	left := time.Duration(float64(since) * (1 - part) / part).Round(time.Second)
	return fmt.Sprintf("[%s] %3.0f%%, %s, %v left", bar, 100*part, text, left)
}
