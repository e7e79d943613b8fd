package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"
)

// The exit statuses.
const (
	statusGood  = 0
	statusNo    = 1 // the answer is no: an invalid config, a failed check, a start that failed
	statusUsage = 2 // the command line itself is wrong
)

// program is what the commands have of the outside world.
type program struct {
	getenv         func(string) (string, bool)
	environ        func() []string // all that getenv looks up, as NAME=value
	stdout, stderr io.Writer
}

// errNo ends a command whose output has said already that the answer is no.
var errNo = errors.New("no")

// errUsage is errNo where the command line is wrong.
var errUsage = errors.New("wrong usage")

// usageError is a wrong command line that only the command itself can tell.
type usageError struct{ error }

// run is the whole program: it runs the command that args name until it is done or ctx ends, and returns the exit status.
func run(ctx context.Context, args []string, getenv func(string) (string, bool), stdout, stderr io.Writer) int {
	p := &program{getenv: getenv, environ: os.Environ, stdout: stdout, stderr: stderr}
	started := false // from then on an error is the command's answer, and not wrong usage
	root := &cobra.Command{
		Use:   "sluice",
		Short: "A token-bucket rate limiter for Envoy's ext_authz",
		Long: `sluice is a token-bucket rate limiter for Envoy.

Envoy hands each request to it through the ext_authz gRPC API. sluice draws from the buckets that the request falls
under, in one atomic Redis call, and answers with a 429, or with an allow that carries the rate-limit headers.

Exit status: 0 good, 1 the answer is no, 2 wrong usage.`,
		Args:          cobra.NoArgs,
		SilenceErrors: true,
		SilenceUsage:  true,
		PersistentPreRunE: func(c *cobra.Command, _ []string) error {
			// A variable that is not set would become a config without limits.
			if f := c.Flags().Lookup("config"); f != nil && f.Changed && f.Value.String() == "" {
				return errors.New("--config is empty: want the name of a file, or leave the flag out")
			}
			started = true
			return nil
		},
		RunE: func(*cobra.Command, []string) error {
			return usageError{errors.New("a command is missing")}
		},
	}
	root.SetArgs(args)
	root.SetOut(stdout)
	root.SetErr(stderr)
	root.AddCommand(p.runCommand(), p.demoCommand(), p.validateCommand(), p.explainCommand(), p.schemaCommand(), p.bucketCommand(), p.doctorCommand(), p.envoyCommand(), p.injectCommand(), p.webhookCommand(), p.healthcheckCommand(), p.versionCommand())

	command, err := root.ExecuteContextC(ctx)
	var usage usageError
	switch {
	case err == nil:
		return statusGood
	case errors.Is(err, errNo):
		return statusNo
	case errors.Is(err, errUsage):
		return statusUsage
	case !started || errors.As(err, &usage):
		_, _ = fmt.Fprintf(stderr, "sluice: %v\nSee '%s --help'.\n", err, command.CommandPath())
		return statusUsage
	}
	_, _ = fmt.Fprintf(stderr, "sluice: %v\n", err)
	return statusNo
}
