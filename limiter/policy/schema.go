package policy

import _ "embed"

// Schema is the config's JSON Schema (draft 2020-12), for editors. It knows no CEL and no files, and so lets through some of what Load
// refuses; what it refuses, Load does.
//
//go:embed schema.json
var Schema []byte
