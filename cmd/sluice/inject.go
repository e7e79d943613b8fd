package main

import (
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"github.com/sluiceproxy/sluice/k8s"
)

// defaultImage is sluice's, at the program's own version.
func defaultImage() string {
	v := buildVersion()
	if strings.ContainsAny(v, "+-") || v == "devel" {
		v = "latest" // no release
	}
	return "ghcr.io/sluiceproxy/sluice:" + v
}

func (p *program) injectCommand() *cobra.Command {
	var file, image string
	c := &cobra.Command{
		Use:   "inject",
		Short: "Add the sidecar to the pods of a Kubernetes manifest",
		Long: `Add the sidecar to every pod of a manifest, from stdin or a file to stdout, as the webhook would: YAML of any number of documents, or
JSON, and Lists. What cannot have one is left as it is with a warning, unless it asks for one by label, which is an error.`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			if err := k8s.CheckImage(image); err != nil {
				return usageError{fmt.Errorf("--image %w", err)}
			}
			in := c.InOrStdin()
			if file != "" && file != "-" {
				f, err := os.Open(file)
				if err != nil {
					return err
				}
				defer func() { _ = f.Close() }()
				in = f
			}
			text, err := io.ReadAll(in)
			if err != nil {
				return err
			}
			out, skipped, err := k8s.Manifest(text, k8s.Options{Image: image, Version: buildVersion()})
			for _, s := range skipped {
				_, _ = fmt.Fprintf(p.stderr, "warning: %s\n", s)
			}
			if err != nil {
				return err
			}
			_, err = p.stdout.Write(out)
			return err
		},
	}
	c.Flags().StringVarP(&file, "file", "f", "", "manifest's `file` (default stdin)")
	c.Flags().StringVar(&image, "image", defaultImage(), "sluice's `image`")
	return c
}
