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
	statusNo    = 1 // an invalid config, a failed check, a failed start
	statusUsage = 2 // a wrong command line
)

// program is the environment that the commands run in.
type program struct {
	getenv         func(string) (string, bool)
	environ        func() []string // every variable of getenv, as NAME=value
	stdout, stderr io.Writer
}

// errNo ends a command with statusNo. The command has printed why.
var errNo = errors.New("no")

// errUsage ends a command with statusUsage. The command has printed why.
var errUsage = errors.New("wrong usage")

// usageError is an error in the command line that a command finds itself.
type usageError struct{ error }

// run runs the command that args name until it is done or ctx ends. It returns
// the exit status.
func run(ctx context.Context, args []string, getenv func(string) (string, bool), stdout, stderr io.Writer) int {
	p := &program{getenv: getenv, environ: os.Environ, stdout: stdout, stderr: stderr}
	started := false // before it is set, an error is wrong usage
	showVersion := false
	root := &cobra.Command{
		Use:   "sluice",
		Short: "A token-bucket rate limiter for Envoy's ext_authz",
		Long: `sluice is a token-bucket rate limiter for Envoy.

Envoy asks it about each request through the ext_authz gRPC API. sluice takes tokens from the buckets of all limits
that apply, in one atomic Redis call. It answers with a 429, or allows the request and adds rate-limit headers.

Exit status: 0 success; 1 the command failed or its result is negative (an invalid config, a request that would be
denied, a failed check); 2 wrong usage.`,
		SilenceErrors: true,
		SilenceUsage:  true,
		PersistentPreRunE: func(c *cobra.Command, _ []string) error {
			// --config "$FILE" with FILE unset would run without limits.
			if f := c.Flags().Lookup("config"); f != nil && f.Changed && f.Value.String() == "" {
				return errors.New("--config: empty; want the name of a file, or omit the flag")
			} else if f != nil && f.Value.String() == "-" {
				return errors.New("--config -: want the name of a file; write /dev/stdin for stdin")
			}
			started = true
			return nil
		},
		RunE: func(*cobra.Command, []string) error {
			if showVersion {
				return p.printVersion()
			}
			return usageError{errors.New("missing command")}
		},
	}
	// Cobra's own flag for this would link text/template.
	root.Flags().BoolVar(&showVersion, "version", false, "print the version")
	root.Args = func(_ *cobra.Command, args []string) error { return unknownCommand(root, args) }
	root.SetFlagErrorFunc(flagError)
	root.SetArgs(args)
	root.SetOut(stdout)
	root.SetErr(stderr)
	root.AddCommand(
		p.runCommand(), p.demoCommand(), p.validateCommand(), p.explainCommand(), p.backtestCommand(),
		p.schemaCommand(), p.bucketCommand(),
		p.doctorCommand(), p.envoyCommand(), p.injectCommand(), p.webhookCommand(), p.healthcheckCommand(),
		p.versionCommand(),
	)

	for _, c := range root.Commands() {
		c.Flags().VisitAll(shortenDefault)
	}

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
