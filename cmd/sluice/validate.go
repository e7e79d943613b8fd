package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"github.com/sluiceproxy/sluice/limiter/policy"
)

func (p *program) validateCommand() *cobra.Command {
	var output string
	var v validation
	c := &cobra.Command{
		Use:   "validate FILE...",
		Short: "Validate config files and report every error with its position",
		Long: `Validate config files and report every error with its position. The file - is stdin.

What is valid but probably a mistake is reported as a warning on stderr, or with -o json in the list, with the severity
warning. Warnings do not change the exit status unless --strict makes errors of them.`,
		Args: func(_ *cobra.Command, files []string) error {
			if len(files) == 0 {
				return errors.New("missing file; want the config files to validate, such as sluice.yaml, or - for stdin")
			}
			return nil
		},
		RunE: func(c *cobra.Command, files []string) error {
			asJSON, err := isJSON(output)
			if err != nil {
				return err
			}
			if v.envoyTimeout <= 0 {
				return usageError{fmt.Errorf("--envoy-timeout %v: must be above 0", v.envoyTimeout)}
			}
			v.stdin = c.InOrStdin()
			return p.validate(files, v, asJSON)
		},
	}
	c.Flags().BoolVar(&v.strict, "strict", false, "treat warnings as errors")
	c.Flags().DurationVar(&v.envoyTimeout, "envoy-timeout", defaultEnvoyTimeout,
		"`duration` that Envoy's ext_authz filter waits for sluice, for a warning about store.redis.timeout")
	outputFlag(c, &output)
	return c
}

// stdinName is the name of stdin in messages.
const stdinName = "<stdin>"

// validation is how validate judges configs.
type validation struct {
	strict       bool          // warnings are errors
	envoyTimeout time.Duration // of the ext_authz filter
	stdin        io.Reader     // the file -
}

// problem is an error or a warning, as -o json prints it.
type problem struct {
	policy.Mistake
	Severity string `json:"severity"` // error or warning
}

// problems returns the errors of a file and its warnings, in the order of the
// file.
func (v *validation) problems(p *program, file string) (all []problem, err error) {
	var cfg *policy.Config
	if file == stdinName {
		cfg, err = policy.Read(file, v.stdin, p.getenv, p.settings(nil)...)
	} else {
		cfg, _, err = policy.Load(file, p.getenv, p.settings(nil)...)
	}
	var mistakes policy.Mistakes
	if err != nil && !errors.As(err, &mistakes) {
		return nil, err
	}
	for _, m := range mistakes {
		all = append(all, problem{m, severityError})
	}
	if cfg == nil {
		return all, nil
	}
	severity := severityWarning
	if v.strict {
		severity = severityError
	}
	for _, w := range cfg.WarningsFor(v.envoyTimeout) {
		all = append(all, problem{w, severity})
	}
	return all, nil
}

// The severities of a problem.
const severityError, severityWarning = "error", "warning"

// outputFlag adds -o to a command.
func outputFlag(c *cobra.Command, output *string) {
	c.Flags().StringVarP(output, "output", "o", "text", "`format` of the result: text or json")
}

// isJSON reports whether the value of -o is json.
func isJSON(output string) (bool, error) {
	if output != "text" && output != "json" {
		return false, usageError{fmt.Errorf("-o %q: must be text or json", output)}
	}
	return output == "json", nil
}

// printJSON prints v as JSON.
func (p *program) printJSON(v any) error {
	e := json.NewEncoder(p.stdout)
	e.SetEscapeHTML(false)
	e.SetIndent("", "  ")
	return e.Encode(v)
}

// validate reports what is wrong with files. It returns errNo if a file has an
// error.
func (p *program) validate(files []string, v validation, asJSON bool) error {
	all := []problem{} // not nil, which is null in JSON
	invalid := false
	for _, file := range files {
		if file == "-" {
			file = stdinName
		}
		problems, err := v.problems(p, file)
		if err != nil {
			return err
		}
		all = append(all, problems...)
		ok := !slices.ContainsFunc(problems, func(m problem) bool { return m.Severity == severityError })
		invalid = invalid || !ok
		if asJSON {
			continue
		}
		if err := p.printProblems(problems); err != nil {
			return err
		}
		if ok {
			if _, err := fmt.Fprintf(p.stdout, "%s: ok\n", file); err != nil {
				return err
			}
		}
	}
	if asJSON {
		if err := p.printJSON(all); err != nil {
			return err
		}
	}
	if invalid {
		return errNo
	}
	return nil
}

// printProblems prints errors to stdout, as they are the result, and warnings to
// stderr.
func (p *program) printProblems(problems []problem) error {
	for _, m := range problems {
		var err error
		if m.Severity == severityWarning {
			_, err = fmt.Fprintf(p.stderr, "warning: %v\n", m.Mistake)
		} else {
			_, err = fmt.Fprintln(p.stdout, m.Mistake)
		}
		if err != nil {
			return err
		}
	}
	return nil
}
