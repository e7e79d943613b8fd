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
		Short: "Validate config files and report every error with its position",
		Long: `Validate config files and report every error with its position.

What is valid but probably a mistake is reported as a warning on stderr. Warnings are not part of the result and do not
change the exit status.`,
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

func (p *program) validate(files []string, asJSON bool) error {
	all := policy.Mistakes{} // not nil, which is null in JSON
	for _, file := range files {
		cfg, _, err := policy.Load(file, p.getenv, p.settings(nil)...)
		var mistakes policy.Mistakes
		if err != nil && !errors.As(err, &mistakes) {
			return err
		}
		all = append(all, mistakes...)
		if cfg != nil {
			for _, w := range cfg.Warnings {
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
