package main

import (
	"encoding/json"
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/sluiceproxy/sluice/limiter/policy"
)

func (p *program) validateCommand() *cobra.Command {
	var output string
	c := &cobra.Command{
		Use:   "validate FILE...",
		Short: "Say every mistake in configs, and where it is",
		Long: `Say every mistake in configs, and where it is. What is allowed and hardly meant is a warning on stderr, which changes neither the result
nor the exit status.`,
		Args: cobra.MinimumNArgs(1),
		RunE: func(_ *cobra.Command, files []string) error {
			asJSON, err := isJSON(output)
			if err != nil {
				return err
			}
			return p.validate(files, asJSON)
		},
	}
	outputFlag(c, &output)
	return c
}

// outputFlag adds -o to a command whose result a script may want to read.
func outputFlag(c *cobra.Command, output *string) {
	c.Flags().StringVarP(output, "output", "o", "text", "`format` of the result: text or json")
}

func isJSON(output string) (bool, error) {
	if output != "text" && output != "json" {
		return false, usageError{fmt.Errorf("-o %q: allowed are text and json", output)}
	}
	return output == "json", nil
}

// printJSON prints a result for scripts.
func (p *program) printJSON(v any) error {
	e := json.NewEncoder(p.stdout)
	e.SetEscapeHTML(false)
	e.SetIndent("", "  ")
	return e.Encode(v)
}

func (p *program) validate(files []string, asJSON bool) error {
	all := policy.Mistakes{} // an empty list in JSON, not null
	for _, file := range files {
		cfg, _, err := policy.Load(file, p.getenv, p.settings(nil)...)
		var mistakes policy.Mistakes
		if err != nil && !errors.As(err, &mistakes) {
			return err
		}
		all = append(all, mistakes...)
		if cfg != nil {
			for _, w := range cfg.Warnings { // beside the result, which is mistakes only
				_, _ = fmt.Fprintf(p.stderr, "warning: %v\n", w)
			}
		}
		if asJSON {
			continue
		}
		if len(mistakes) == 0 {
			if _, err := fmt.Fprintf(p.stdout, "%s: ok\n", file); err != nil {
				return err
			}
		}
		for _, m := range mistakes {
			if _, err := fmt.Fprintln(p.stdout, m); err != nil {
				return err
			}
		}
	}
	if asJSON {
		if err := p.printJSON(all); err != nil {
			return err
		}
	}
	if len(all) > 0 {
		return errNo
	}
	return nil
}
