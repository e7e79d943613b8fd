package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/sluiceproxy/sluice/limiter/policy"
)

// otherCommands are commands that other programs have, with those to run.
var otherCommands = map[string]string{
	"start": "run", "serve": "run", "server": "run", "proxy": "run", "sidecar": "run",
	"check": "validate", "lint": "validate", "test": "validate", "verify": "validate", "config": "validate",
	"bootstrap": "envoy", "why": "explain", "simulate": "explain", "health": "healthcheck", "get": "bucket get",
	"reset": "bucket reset", "completions": "completion",
}

// unknownCommand returns the error of a command that there is not.
func unknownCommand(root *cobra.Command, args []string) error {
	if len(args) == 0 {
		return nil
	}
	meant := otherCommands[args[0]]
	if near := root.SuggestionsFor(args[0]); meant == "" && len(near) > 0 {
		meant = near[0]
	}
	message := fmt.Sprintf("unknown command %q for %q", args[0], root.CommandPath())
	if meant != "" {
		message += fmt.Sprintf("; did you mean %s?", meant)
	}
	return errors.New(message)
}

// noArguments is the Args of commands that have flags only.
func noArguments(c *cobra.Command, args []string) error {
	if len(args) == 0 {
		return nil
	}
	has := func(flag string) bool { return c.Flags().Lookup(flag) != nil }
	mend := c.CommandPath() + " takes only flags"
	switch {
	case has("config") && isConfig(args[0]):
		mend = "write --config " + args[0]
	case has("file"):
		mend = "write --file " + args[0]
	case has("absent") && c.Flags().Changed("absent"):
		mend = "write --absent=" + args[0]
	}
	return fmt.Errorf("unexpected argument %q; %s", args[0], mend)
}

// isConfig reports whether an argument is probably a config file's name.
func isConfig(name string) bool {
	if slices.Contains([]string{".yaml", ".yml", ".json"}, filepath.Ext(name)) {
		return true
	}
	info, err := os.Stat(name)
	return err == nil && info.Mode().IsRegular()
}

// wantedValues are the values of flags, by their types.
var wantedValues = map[string]string{
	"bool":     "want true or false",
	"uint16":   "want a port from 1 to 65535",
	"duration": "want a duration such as 500ms or 10s",
}

var (
	invalidFlag = regexp.MustCompile(`^invalid argument "(.*)" for "(?:-., )?--([a-z-]+)" flag: `)
	shortFlag   = regexp.MustCompile(`^unknown shorthand flag: '(.)' in `)
	longFlag    = regexp.MustCompile(`^unknown flag: --([a-z-]+)`)
)

// shortenDefault has the help of a flag say 1m and not 1m0s.
func shortenDefault(f *pflag.Flag) {
	if d, err := time.ParseDuration(f.DefValue); err == nil && f.Value.Type() == "duration" {
		f.DefValue = policy.DurationText(d)
	}
}

// flagError says what to write instead of a flag that is wrong.
func flagError(c *cobra.Command, err error) error {
	if m := invalidFlag.FindStringSubmatch(err.Error()); m != nil {
		if f := c.Flags().Lookup(m[2]); f != nil && wantedValues[f.Value.Type()] != "" {
			return fmt.Errorf("--%s %q: %s", m[2], m[1], wantedValues[f.Value.Type()])
		}
	}
	meant := ""
	if m := shortFlag.FindStringSubmatch(err.Error()); m != nil && m[1] == "c" {
		meant = "config"
	} else if m := longFlag.FindStringSubmatch(err.Error()); m != nil {
		meant = m[1]
	}
	switch {
	case meant != "config":
	case c.Name() == "validate":
		return fmt.Errorf("%w; the files are arguments, as in sluice validate sluice.yaml", err)
	case c.Flags().Lookup("config") != nil:
		return fmt.Errorf("%w; write --config FILE", err)
	case !c.HasParent():
		return fmt.Errorf("%w; flags follow the command, as in sluice run --config FILE", err)
	}
	return err
}

// errNoConfig is the error of a command that needs a config.
var errNoConfig = errors.New("--config: missing; want the file with the limits, or set SLUICE_CONFIG")

// configOrVariable returns the value of --config, or the variable that stands for
// it. Without either it returns a usageError, unless a setting of the
// environment says what a file would.
func (p *program) configOrVariable(config string) (string, error) {
	if config == "" {
		config, _ = p.getenv("SLUICE_CONFIG")
	}
	if config == "" && len(p.settings(nil)) == 0 {
		return "", usageError{errNoConfig}
	}
	return config, nil
}
