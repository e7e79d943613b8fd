package main

import (
	"github.com/spf13/cobra"

	"github.com/sluiceproxy/sluice/limiter/policy"
)

func (p *program) schemaCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "schema",
		Short: "Print the config's JSON Schema, for editors",
		Long: `Print the config's JSON Schema, for editors.

With the YAML language server, save it as sluice.schema.json and make this the config's first line:

  # yaml-language-server: $schema=sluice.schema.json`,
		Args: noArguments,
		RunE: func(*cobra.Command, []string) error {
			_, err := p.stdout.Write(policy.Schema)
			return err
		},
	}
}
