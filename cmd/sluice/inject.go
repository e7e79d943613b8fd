package main

import (
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/sluiceproxy/sluice/k8s"
)

// defaultImage returns the image of this program's version.
func defaultImage() string {
	v := buildVersion()
	if strings.ContainsAny(v, "+-") || v == "devel" {
		v = "latest" // this is no release
	}
	return "ghcr.io/sluiceproxy/sluice:" + v
}

// sidecarFlags are the flags for the sidecar that is injected.
type sidecarFlags struct{ image, user, resources string }

// register adds the flags to f.
func (s *sidecarFlags) register(f *pflag.FlagSet) {
	f.StringVar(&s.image, "image", defaultImage(), "sidecar's `image`")
	f.StringVar(&s.user, "run-as-user", k8s.DefaultUser,
		"sidecar's `user` ID, or platform to leave it to the platform, as on OpenShift")
	f.StringVar(&s.resources, "resources", "",
		"sidecar's `resources`, such as {requests: {cpu: 50m}, limits: {memory: 128Mi}}")
}

// options returns the options of an injection, or a usageError.
func (s *sidecarFlags) options() (k8s.Options, error) {
	o := k8s.Options{Image: s.image, User: s.user, Version: buildVersion()}
	if err := k8s.CheckImage(s.image); err != nil {
		return o, usageError{fmt.Errorf("--image %w", err)}
	}
	if err := k8s.CheckUser(s.user); err != nil {
		return o, usageError{fmt.Errorf("--run-as-user %w", err)}
	}
	if s.resources != "" {
		var err error
		if o.Resources, err = k8s.ParseResources(s.resources); err != nil {
			return o, usageError{fmt.Errorf("--resources: %w", err)}
		}
	}
	return o, nil
}

func (p *program) injectCommand() *cobra.Command {
	var file string
	var sidecar sidecarFlags
	var strict bool
	c := &cobra.Command{
		Use:   "inject",
		Short: "Add the sidecar to the pods of a Kubernetes manifest",
		Long: `Add the sidecar to every pod and pod template of a manifest, as the webhook does, and print the result.

The manifest is YAML with any number of documents, or JSON, and may contain Lists. A pod that cannot have a sidecar is
printed unchanged, with a warning; if its label asks for a sidecar, that is an error.`,
		Args: noArguments,
		RunE: func(c *cobra.Command, _ []string) error {
			options, err := sidecar.options()
			if err != nil {
				return err
			}
			// Most of what a large List allocates stays in use until its end, so that
			// the default would take half as much memory again.
			setGC(p.getenv, 35)
			in := c.InOrStdin()
			if file != "" && file != "-" {
				f, err := os.Open(file)
				if err != nil {
					return trimSyscall(err)
				}
				defer func() { _ = f.Close() }()
				in = f
			}
			text, err := io.ReadAll(in)
			if err != nil {
				return err
			}
			out, skipped, err := k8s.Manifest(text, options)
			for _, s := range skipped {
				_, _ = fmt.Fprintf(p.stderr, "warning: %s\n", s)
			}
			if err != nil {
				return err
			}
			if strict && len(skipped) > 0 {
				return errNo
			}
			_, err = p.stdout.Write(out)
			return err
		},
	}
	c.Flags().StringVarP(&file, "file", "f", "", "`file` with the manifest (default stdin)")
	c.Flags().BoolVar(&strict, "strict", false, "print nothing and exit with status 1 if there is a warning")
	sidecar.register(c.Flags())
	return c
}
