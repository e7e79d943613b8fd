package policy

import _ "embed"

// Schema is the JSON Schema (draft 2020-12) of the config file, for editors. It
// rejects nothing that Load accepts, but cannot check expressions and files,
// and so accepts some configs that Load rejects.
//
//go:embed schema.json
var Schema []byte
