package policy

import (
	"fmt"
	"math"
	"slices"
	"strings"

	"cel.dev/cel-go/cel"
	"cel.dev/cel-go/common/ast"
	"cel.dev/cel-go/common/operators"
	"cel.dev/cel-go/common/types"
	"cel.dev/cel-go/common/types/ref"
)

// facts are what the text of an expression shows. They serve warnings only, and
// are dropped once the config was read.
type facts struct {
	// doubts are comparisons that never hold, or always.
	doubts []expressionError
	// values are all values that it can have, as parts of a key; nil if they are
	// not known.
	values []string
	// most is the largest of the numbers that it names as its value, rounded up.
	most int64
	// varies is what makes it differ for each request or connection, such as
	// request.id; empty if nothing does.
	varies string
	// chosen is what a client can make up of it, such as
	// request.headers["x-api-key"]; empty if there is no such thing.
	chosen string
}

func factsOf(tree *ast.AST, out *cel.Type) *facts {
	f := &facts{varies: varying(tree, tree.Expr())}
	isFinite := true
	leaves := (&constants{}).leaves(tree.Expr())
	for _, leaf := range leaves {
		if leaf.Kind() != ast.LiteralKind {
			isFinite = false
			continue
		}
		switch v := leaf.AsLiteral().(type) {
		case types.Int:
			f.most = max(f.most, int64(v))
		case types.Double:
			f.most = max(f.most, int64(math.Ceil(min(float64(v), maxCost))))
		}
		f.values = append(f.values, fmt.Sprint(leaf.AsLiteral().Value()))
	}
	switch {
	case out.Kind() == types.BoolKind:
		f.values = []string{"true", "false"}
	case !isFinite:
		f.values = nil
	}
	for _, leaf := range leaves {
		ast.PreOrderVisit(leaf, ast.NewExprVisitor(func(e ast.Expr) {
			if f.values == nil && f.chosen == "" {
				f.chosen = chosen(tree, e)
			}
		}))
	}
	ast.PreOrderVisit(tree.Expr(), ast.NewExprVisitor(func(e ast.Expr) {
		message := doubt(tree, e)
		isKnown := slices.ContainsFunc(f.doubts, func(d expressionError) bool { return d.message == message })
		if message != "" && !isKnown { // a part of a || b || c is another ||
			at := tree.SourceInfo().GetStartLocation(e.ID())
			f.doubts = append(f.doubts, expressionError{at.Line(), at.Column() + 1, message})
		}
	}))
	return f
}

// nameOf returns how an attribute, or an entry of one, is written: such as
// request.method or request.headers["x-api-key"]. It returns "" for other
// expressions.
func nameOf(tree *ast.AST, e ast.Expr) string {
	if r := tree.ReferenceMap()[e.ID()]; r != nil && r.Name != "" && len(r.OverloadIDs) == 0 {
		return r.Name
	}
	switch e.Kind() {
	case ast.SelectKind:
		if of := nameOf(tree, e.AsSelect().Operand()); of != "" && !e.AsSelect().IsTestOnly() {
			return fmt.Sprintf("%s[%q]", of, e.AsSelect().FieldName())
		}
	case ast.CallKind:
		call := e.AsCall()
		if call.FunctionName() != operators.Index && call.FunctionName() != operators.OptIndex {
			return ""
		}
		if name, ok := literalText(call.Args()[1]); ok {
			if of := nameOf(tree, call.Args()[0]); of != "" {
				return fmt.Sprintf("%s[%q]", of, name)
			}
		}
	}
	return ""
}

// literalText returns the text of a string in an expression.
func literalText(e ast.Expr) (string, bool) {
	if e.Kind() != ast.LiteralKind {
		return "", false
	}
	s, ok := e.AsLiteral().(types.String)
	return string(s), ok
}

// tracing are headers of which each request has a value of its own.
var tracing = []string{
	"x-request-id", "traceparent", "b3", "x-b3-traceid", "x-b3-spanid", "x-amzn-trace-id", "x-cloud-trace-context",
}

// varying returns what makes an expression differ for each request, or for each
// connection, or "".
func varying(tree *ast.AST, e ast.Expr) string {
	switch name := nameOf(tree, e); name {
	case "request.id", "request.time", "source.port":
		return name
	case "":
	default:
		if header, ok := headerName(tree, e); ok && slices.Contains(tracing, header) {
			return name
		}
	}
	if e.Kind() != ast.CallKind {
		return ""
	}
	call := e.AsCall()
	switch call.FunctionName() {
	case "string", "int", "uint", "double", "lowerAscii", "upperAscii", "trim", operators.Add:
	default:
		return ""
	}
	parts := call.Args()
	if call.IsMemberFunction() {
		parts = append(slices.Clip(parts), call.Target())
	}
	for _, part := range parts {
		if name := varying(tree, part); name != "" {
			return name
		}
	}
	return ""
}

// fromEnvoy are headers that Envoy sets itself.
var fromEnvoy = []string{"x-envoy-external-address", "x-forwarded-client-cert"}

// chosen returns how an attribute is written of which a client can make up
// values, if e reads one, and "" otherwise.
func chosen(tree *ast.AST, e ast.Expr) string {
	if header, ok := headerName(tree, e); ok && slices.Contains(fromEnvoy, header) {
		return ""
	}
	name := nameOf(tree, e)
	switch attribute, _, _ := strings.Cut(name, "["); attribute {
	case "request.headers", "request.params", "request.cookies":
		if attribute != name {
			return name
		}
	case "request.path", "request.url_path", "request.query":
		return attribute
	}
	return ""
}

// doubt says why a comparison, or several joined by && or ||, has the same result
// for each request. It returns "" if none has, as far as the text shows.
func doubt(tree *ast.AST, e ast.Expr) string {
	if e.Kind() != ast.CallKind {
		return ""
	}
	call := e.AsCall()
	switch call.FunctionName() {
	case operators.Equals, operators.NotEquals:
		for i, arg := range call.Args() {
			if text, ok := literalText(call.Args()[1-i]); ok {
				return neverIs(nameOf(tree, arg), text)
			}
		}
	case operators.In:
		if list := call.Args()[1]; list.Kind() == ast.ListKind {
			name := nameOf(tree, call.Args()[0])
			for _, v := range list.AsList().Elements() {
				if text, ok := literalText(v); ok && neverIs(name, text) != "" {
					return neverIs(name, text)
				}
			}
		}
	case "startsWith", "endsWith", "contains", "matches":
		if call.IsMemberFunction() && len(call.Args()) == 1 && nameOf(tree, call.Target()) == "request.method" {
			if text, ok := literalText(call.Args()[0]); ok && isLowerMethod(text) {
				return fmt.Sprintf("methods are in upper case, so none has %q; write %q", text, strings.ToUpper(text))
			}
		}
	case operators.LogicalOr:
		if name, a, b := twoValues(tree, e, operators.LogicalOr, operators.NotEquals); name != "" {
			return fmt.Sprintf("always true, as %s cannot be both %s and %s; write && instead of ||", name, a, b)
		}
	case operators.LogicalAnd:
		if name, a, b := twoValues(tree, e, operators.LogicalAnd, operators.Equals); name != "" {
			return fmt.Sprintf("always false, as %s cannot be both %s and %s; write || instead of &&", name, a, b)
		}
	}
	return ""
}

// isLowerMethod reports whether a text or a regular expression asks for letters
// in lower case, which no method has.
func isLowerMethod(pattern string) bool {
	if strings.Contains(pattern, "(?") {
		return false
	}
	letters := notLetters().ReplaceAllString(pattern, "")
	return letters != "" && letters == strings.ToLower(letters)
}

// notLetters matches what is no literal letter of a regular expression.
var notLetters = whenUsed(`\\.|\[[^\]]*\]|[^A-Za-z]`)

// neverIs says why an attribute never has a value, and what to write. It returns
// "" if it may have it.
func neverIs(name, text string) string {
	spell := canonicalParts[name]
	if spell == nil || text == "" {
		return ""
	}
	switch name {
	case "client.ip", "client.network", "source.address":
		if strings.Contains(text, "/") && !strings.HasSuffix(text, "/64") {
			return fmt.Sprintf("%s is one address, and never %q; compare with networks in match.clients", name, text)
		}
	case "request.method":
		if upper := strings.ToUpper(text); upper != text {
			return fmt.Sprintf("methods are in upper case, so none is %q; write %q", text, upper)
		}
	case "request.path": // a path with its query may be anything
		return ""
	}
	switch canonical, err := spell(strings.TrimSpace(text)); {
	case err != nil:
		return fmt.Sprintf("%s is never %q: %v", name, text, err)
	case canonical != text:
		return fmt.Sprintf("%s is never %q; write %q", name, text, canonical)
	}
	return ""
}

// twoValues returns an attribute that an expression compares with two values, and
// these. The comparisons are joined by a logical operator, and compare by another
// one. The name is empty if there is none.
func twoValues(tree *ast.AST, e ast.Expr, join, compare string) (name, a, b string) {
	seen := make(map[string]ref.Val)
	var visit func(e ast.Expr) bool
	visit = func(e ast.Expr) bool {
		if e.Kind() != ast.CallKind {
			return false
		}
		call := e.AsCall()
		switch call.FunctionName() {
		case join:
			return slices.ContainsFunc(call.Args(), visit)
		case compare:
			for i, arg := range call.Args() {
				value := call.Args()[1-i]
				of := nameOf(tree, arg)
				if of == "" || value.Kind() != ast.LiteralKind {
					continue
				}
				v := value.AsLiteral()
				if before, ok := seen[of]; ok && types.Equal(before, v) != types.True {
					name, a, b = of, written(before), written(v)
					return true
				}
				seen[of] = v
			}
		}
		return false
	}
	visit(e)
	return name, a, b
}

// written returns a literal as expressions write it.
func written(v ref.Val) string {
	if s, ok := v.(types.String); ok {
		return fmt.Sprintf("%q", string(s))
	}
	return fmt.Sprint(v.Value())
}
