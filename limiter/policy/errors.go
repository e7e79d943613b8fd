package policy

import (
	"fmt"
	"strings"
)

// Mistake is one thing that is wrong with a config.
type Mistake struct {
	File    string `json:"file"`   // or the flag or environment variable that said it
	Line    int    `json:"line"`   // from 1; 0 where there is none
	Column  int    `json:"column"` // in characters, from 1; 0 where there is none
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

// Mistakes are all that is wrong with a config, in its order.
type Mistakes []Mistake

func (m Mistakes) Error() string {
	lines := make([]string, len(m))
	for i := range m {
		lines[i] = m[i].String()
	}
	return strings.Join(lines, "\n")
}

// Setting is a value from a flag or the environment that is over the file's, unless it is Weak.
type Setting struct {
	Field string // listen.grpc, listen.admin, listen.metrics, domain, store.redis.url, grace or log_level
	Value string
	From  string // who says so, as a mistake shall name it: --grpc, SLUICE_GRPC
	// Weak values are for where the file says nothing.
	Weak bool
}

// RuleError is a mistake of the config that only a request can show, such as an expression that fails. It says nothing of what
// the client sent.
type RuleError struct {
	Limit string // empty: of no one limit
	Field string // of the limit; or context_extensions, for what Envoy's route says
	Err   error
	// Shadow says that the limit only decides and counts, and so does its mistake.
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
