package policy

import (
	"fmt"
	"strings"
)

// Mistake is one error in a config.
type Mistake struct {
	File    string `json:"file"`   // or the flag or environment variable
	Line    int    `json:"line"`   // from 1; 0 if unknown
	Column  int    `json:"column"` // in characters, from 1; 0 if unknown
	Field   string `json:"field"`  // such as limits[2].match.paths[0]; may be empty
	Message string `json:"message"`
}

func (m Mistake) String() string {
	var b strings.Builder
	b.WriteString(m.File)
	if m.Line > 0 {
		fmt.Fprintf(&b, ":%d:%d", m.Line, m.Column)
	}
	b.WriteString(": ")
	if m.Field != "" {
		b.WriteString(m.Field + ": ")
	}
	b.WriteString(m.Message)
	return b.String()
}

// Mistakes are all errors in a config, in its order. It is the error of Load,
// Parse and Config.Replaces.
type Mistakes []Mistake

func (m Mistakes) Error() string {
	lines := make([]string, len(m))
	for i := range m {
		lines[i] = m[i].String()
	}
	return strings.Join(lines, "\n")
}

// Setting is a value from a flag or the environment. It takes precedence over
// the file, unless it is Weak.
type Setting struct {
	// Field is one of listen.grpc, listen.admin, listen.metrics, domain,
	// store.redis.url, grace and log_level.
	Field string
	Value string
	From  string // its source, as mistakes name it: --grpc, SLUICE_GRPC
	// Weak values apply only if the file does not set the field.
	Weak bool
}

// RuleError is a mistake of the config that only a request reveals, such as an
// expression that fails. It contains nothing that the client sent.
type RuleError struct {
	Limit string // empty if it belongs to no one limit
	// Field is the limit's field, or context_extensions for what Envoy's route
	// says.
	Field string
	Err   error
	// Shadow reports that the limit is in shadow mode, so that the request is
	// not refused because of the mistake.
	Shadow bool
}

func (e *RuleError) Error() string {
	if e.Limit == "" {
		return fmt.Sprintf("%s: %v", e.Field, e.Err)
	}
	return fmt.Sprintf("limit %s: %s: %v", e.Limit, e.Field, e.Err)
}

// Unwrap returns Err.
func (e *RuleError) Unwrap() error { return e.Err }
