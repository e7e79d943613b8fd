package policy

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/goccy/go-yaml/ast"
)

// hideVariables replaces, in the quoted parts of a message, the values of the
// variables that n uses by their names.
func (r *reader) hideVariables(n ast.Node, message string) string {
	names := r.replacer(n)
	if names == nil {
		return message
	}
	var b strings.Builder
	for rest := message; rest != ""; {
		i := strings.IndexByte(rest, '"')
		if i < 0 {
			b.WriteString(rest)
			break
		}
		b.WriteString(rest[:i])
		rest = rest[i:]
		quoted, err := strconv.QuotedPrefix(rest)
		if err != nil {
			b.WriteByte('"')
			rest = rest[1:]
			continue
		}
		rest = rest[len(quoted):]
		if text, err := strconv.Unquote(quoted); err == nil {
			if named := names.Replace(text); named != text {
				quoted = strconv.Quote(named)
			}
		}
		b.WriteString(quoted)
	}
	return b.String()
}

// replacer returns a replacer from the values of the variables that n uses to
// their names, or nil if n uses none.
func (r *reader) replacer(n ast.Node) *strings.Replacer {
	taken := make(map[string]string)
	var look func(ast.Node)
	look = func(n ast.Node) {
		if entries, ok := entries(n); ok {
			for _, e := range entries {
				look(e.Value)
			}
			return
		}
		if list, ok := n.(*ast.SequenceNode); ok {
			for _, v := range list.Values {
				look(v)
			}
			return
		}
		for _, found := range variablePattern.FindAllStringSubmatch(sourceText(n), -1) {
			name, _, _ := strings.Cut(found[1], ":-")
			if value := r.variables[name]; value != "" {
				taken[value] = name
			}
		}
	}
	if len(r.variables) > 0 {
		look(n)
	}
	if len(taken) == 0 {
		return nil
	}
	values := slices.SortedFunc(maps.Keys(taken), func(a, b string) int { return len(b) - len(a) })
	pairs := make([]string, 0, 2*len(values))
	for _, value := range values {
		pairs = append(pairs, value, "${"+taken[value]+"}")
	}
	return strings.NewReplacer(pairs...)
}

// sourceText returns a string as it is written in the file, with the names of
// variables. It returns "" for other values.
func sourceText(n ast.Node) string {
	switch v := n.(type) {
	case *ast.StringNode:
		return v.Value
	case *ast.LiteralNode:
		return v.Value.Value
	}
	return ""
}

// takesVariables reports whether a value uses environment variables.
func takesVariables(n node) bool { return strings.Contains(sourceText(n.Node), "${") }

// displayText returns the text of a scalar for a message that does not quote
// it. If the value uses variables, it is the text in the file.
func displayText(n node, text string) string {
	if takesVariables(n) {
		return sourceText(n.Node)
	}
	return text
}

// wrongFile records that a file cannot be read which the value n names.
func (r *reader) wrongFile(n node, err error) {
	var path *os.PathError
	if takesVariables(n) && errors.As(err, &path) {
		r.wrong(n, "%s: %v", sourceText(n.Node), path.Err)
		return
	}
	if errors.As(err, &path) {
		err = fmt.Errorf("%s: %w", path.Path, path.Err)
	}
	r.wrong(n, "%v", err)
}

var variablePattern = regexp.MustCompile(`\$\$\{|\$\{([^}]*)\}?`)

var variableNamePattern = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*$`)

const variableForms = "want ${NAME}, ${NAME:-default}, or $${ for a literal ${"

// expand replaces environment variables: ${NAME}, and ${NAME:-default}, which
// is the default if the variable is unset or empty, as in a shell. $${ stands
// for a literal ${. It reports false after a mistake.
func (r *reader) expand(n node, s string) (string, bool) {
	if !strings.Contains(s, "${") {
		return s, true
	}
	if r.getenv == nil {
		r.wrong(n, "variables (${...}) are replaced in the config file only; write the value out")
		return "", false
	}
	good := true
	wrong := func(format string, args ...any) string {
		good = false
		r.wrong(n, format, args...)
		return ""
	}
	s = variablePattern.ReplaceAllStringFunc(s, func(found string) string {
		if found == "$${" {
			return "${"
		}
		name, fallback, has := strings.Cut(strings.TrimSuffix(found[2:], "}"), ":-")
		switch {
		case !strings.HasSuffix(found, "}"):
			return wrong("variable without a closing brace; %s", variableForms)
		case !variableNamePattern.MatchString(name):
			if i := strings.IndexAny(name, ":=?+-"); i > 0 {
				name = name[:i] // the rest may be a secret, as in ${NAME:=secret}
			}
			return wrong("invalid variable name %q; %s", name, variableForms)
		case strings.Contains(fallback, "${"):
			return wrong("the default of %s contains a variable; want plain text", name)
		}
		v, isSet := r.getenv(name)
		switch {
		case has && v == "":
			return fallback
		case !isSet:
			return wrong("environment variable %s is not set; write ${%s:-default} for a default", name, name)
		}
		if r.variables == nil {
			r.variables = make(map[string]string)
		}
		r.variables[name] = v
		return v
	})
	return s, good
}
