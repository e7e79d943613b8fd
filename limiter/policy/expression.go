package policy

import (
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"
	"sync"

	"cel.dev/cel-go/cel"
	"cel.dev/cel-go/common/ast"
	"cel.dev/cel-go/common/operators"
	"cel.dev/cel-go/common/types"
	"cel.dev/cel-go/common/types/ref"
	"cel.dev/cel-go/ext"

	"github.com/sluiceproxy/sluice/limiter"
)

const maxExpression = 4096 // bytes

// purpose is what an expression is for.
type purpose uint8

const (
	forKey  purpose = iota // a text, a number or a boolean
	forWhen                // a boolean
	forCost                // a number
)

// wanted says what an expression's value has to be.
func (p purpose) wanted() string {
	return [...]string{"must be a string, a number or a boolean", "must be a boolean", "must be a number"}[p]
}

// accepts reports whether a value of a type that the check found may do; one of unknown type is seen at run time.
func (p purpose) accepts(out *cel.Type) bool {
	switch out.Kind() {
	case types.DynKind:
		return true
	case types.OpaqueKind:
		return out.TypeName() == "optional_type" && (len(out.Parameters()) == 0 || p.accepts(out.Parameters()[0]))
	case types.StringKind:
		return p == forKey
	case types.BoolKind:
		return p != forCost
	case types.IntKind, types.UintKind, types.DoubleKind:
		return p != forWhen
	}
	return false
}

// environment is what expressions are checked against. It is made once: that takes milliseconds.
var environment = sync.OnceValues(func() (*cel.Env, error) {
	options := []cel.EnvOption{
		ext.Strings(), cel.OptionalTypes(), cel.ParserExpressionSizeLimit(maxExpression), cel.ParserRecursionLimit(64),
	}
	for name, a := range attributes {
		options = append(options, cel.Variable(name, a.kind))
	}
	return cel.NewEnv(options...)
})

// expression is a compiled one. It is safe for concurrent use.
type expression struct {
	text    string
	program cel.Program
	// instructions is the total program size of its constant regular expressions,
	// which take most of its memory.
	instructions int
	// open says that its value may stand in a key as it is.
	open bool
	// constant says that its value is the same for every request.
	constant bool
	// metadata says that it reads what Envoy's filters leave behind.
	metadata bool
	// unaskedSize says that it reads request.size and does not look at content-length, without which that is absent.
	unaskedSize bool
	// attribute is the attribute that it is, and nothing else; empty: none.
	attribute string
	// direct reads the value of an expression that is just an attribute or a header, without CEL's machinery; else nil.
	direct func(*subject) string
	// header is the header's name where the expression is just that; else empty.
	header string
}

// expressionError is what is wrong with an expression, and where in it: line and column from 1, or 0.
type expressionError struct {
	line, column int
	message      string
}

// compile reads an expression.
func compile(text string, p purpose) (*expression, []expressionError) {
	wrong := func(format string, args ...any) (*expression, []expressionError) {
		return nil, []expressionError{{message: fmt.Sprintf(format, args...)}}
	}
	if len(text) > maxExpression {
		return wrong("expression of %d bytes; the maximum is %d", len(text), maxExpression)
	}
	env, err := environment()
	if err != nil {
		return wrong("%v", err)
	}
	checked, issues := env.Compile(text)
	if issues.Err() != nil {
		var found []expressionError
		for _, e := range issues.Errors() {
			found = append(found, expressionError{e.Location.Line(), e.Location.Column() + 1, e.Message})
		}
		return nil, found
	}
	native := checked.NativeRep()
	if found := checkHeaderNames(native); found != nil {
		return nil, found
	}
	if out := checked.OutputType(); !p.accepts(out) {
		return wrong("%s, not %v", p.wanted(), out)
	}
	if found := checkConstants(env, native); found != nil {
		return nil, found
	}
	asks := make(map[int64]bool)
	ast.PreOrderVisit(native.Expr(), ast.NewExprVisitor(func(e ast.Expr) {
		if e.Kind() == ast.SelectKind && e.AsSelect().IsTestOnly() {
			asks[e.ID()] = true
		}
	}))
	instructions := 0
	program, err := env.Program(checked, planOptions(asks, &instructions)...)
	if err != nil {
		return wrong("%v", err)
	}
	e := &expression{text: text, program: program, instructions: instructions, open: true, constant: true}
	if p == forKey {
		e.direct, e.header = directRead(native)
		if r := native.ReferenceMap()[native.Expr().ID()]; r != nil && attributes[r.Name].kind != nil {
			e.attribute = r.Name
		}
	}
	for _, r := range native.ReferenceMap() {
		if a, ok := attributes[r.Name]; ok {
			e.constant = false
			e.metadata = e.metadata || r.Name == filterMetadata
			e.unaskedSize = e.unaskedSize || r.Name == "request.size" && !readsHeader(native, "content-length")
			if !a.open {
				e.open = e.direct != nil && r.Name == "request.path" // whole: appendOpen sees whether it has a query
			}
		}
	}
	return e, nil
}

// planOptions returns the options for planning an expression. asks has the IDs of
// its has() parts. The program sizes of its constant regular expressions are added
// to *instructions.
func planOptions(asks map[int64]bool, instructions *int) []cel.ProgramOption {
	return []cel.ProgramOption{
		cel.CostTracking(chargedUnits{}), cel.CostLimit(maxEvaluation), cel.EvalOptions(cel.OptOptimize),
		cel.CustomDecoratorV2(decorator(asks, instructions)),
	}
}

// checkHeaderNames finds headers that no request can have, since Envoy's are in lower case.
func checkHeaderNames(tree *ast.AST) (found []expressionError) {
	ast.PreOrderVisit(tree.Expr(), ast.NewExprVisitor(func(e ast.Expr) {
		if name, ok := headerName(tree, e); ok && name != strings.ToLower(name) {
			at := tree.SourceInfo().GetStartLocation(e.ID())
			found = append(found, expressionError{at.Line(), at.Column() + 1,
				fmt.Sprintf("the header %q is not in lower case; write %q", name, strings.ToLower(name))})
		}
	}))
	return found
}

// readsHeader reports whether an expression looks at a header, or asks whether it is there.
func readsHeader(tree *ast.AST, header string) (reads bool) {
	ast.PreOrderVisit(tree.Expr(), ast.NewExprVisitor(func(e ast.Expr) {
		if name, ok := headerName(tree, e); ok && name == header {
			reads = true
		}
	}))
	return reads
}

// headerName is the name in request.headers["name"], request.headers.name, and "name" in request.headers.
func headerName(tree *ast.AST, e ast.Expr) (string, bool) {
	headers, name := e, e
	switch e.Kind() {
	case ast.SelectKind:
		return e.AsSelect().FieldName(), isHeaders(tree, e.AsSelect().Operand())
	case ast.CallKind:
		call := e.AsCall()
		if len(call.Args()) != 2 {
			return "", false
		}
		switch call.FunctionName() {
		case operators.Index, operators.OptIndex, operators.OptSelect:
			headers, name = call.Args()[0], call.Args()[1]
		case operators.In:
			name, headers = call.Args()[0], call.Args()[1]
		}
	}
	if name.Kind() != ast.LiteralKind || !isHeaders(tree, headers) {
		return "", false
	}
	text, ok := name.AsLiteral().Value().(string)
	return text, ok
}

func isHeaders(tree *ast.AST, e ast.Expr) bool {
	r := tree.ReferenceMap()[e.ID()]
	return r != nil && r.Name == "request.headers"
}

// directRead is the read of a key's part that is nothing but a text attribute or a header, with the header's name, else nil.
// TestDirectReads holds it to what CEL says.
func directRead(tree *ast.AST) (read func(*subject) string, header string) {
	e := tree.Expr()
	if name, ok := headerName(tree, e); ok && (e.Kind() == ast.SelectKind && !e.AsSelect().IsTestOnly() ||
		e.Kind() == ast.CallKind && e.AsCall().FunctionName() == operators.Index) {
		return func(s *subject) string { return s.keyHeader(name) }, name
	}
	r := tree.ReferenceMap()[e.ID()]
	if r == nil {
		return nil, ""
	}
	if r.Name == "request.id" {
		return func(s *subject) string { return s.keyHeader("x-request-id") }, "x-request-id"
	}
	a, ok := attributes[r.Name]
	if !ok || a.kind != cel.StringType {
		return nil, ""
	}
	return func(s *subject) string { return a.value(s).(string) }, ""
}

// keyHeader is a header as a key's part: empty, and so absent, where it was sent more than once.
func (req *Request) keyHeader(name string) string {
	if req.isRepeated(name) {
		return ""
	}
	return req.Headers[name]
}

// eval is the expression's value; nil where it is absent. The error says nothing of what the client sent.
func (e *expression) eval(s cel.Activation) (ref.Val, error) {
	v, _, err := e.program.Eval(s)
	if err != nil {
		if isAbsent(err) {
			return nil, nil
		}
		return nil, failure(err)
	}
	for {
		o, ok := v.(*types.Optional)
		switch {
		case !ok:
			if v == types.NullValue {
				return nil, nil
			}
			return v, nil
		case !o.HasValue():
			return nil, nil
		}
		v = o.GetValue()
	}
}

// failures are what the errors of CEL and of its functions begin with. What
// follows may be a client's.
var failures = []string{
	"no such key", "no such overload", "index out of bounds", "index out of range", "invalid substring range", "division by zero", "modulus by zero",
	"integer overflow", "unsigned integer overflow", "duration overflow", "timestamp overflow", "type conversion error",
	"invalid RFC 3339 timestamp", errZone.Error(), "time: invalid location name", "timezone offset", "error parsing regexp", errPattern.Error(), errStringSize.Error(),
	"operation cancelled: actual cost limit exceeded",
}

// failure is an evaluation's error without its words for values, which a client may have sent.
func failure(err error) error {
	for _, known := range failures {
		if strings.HasPrefix(err.Error(), known) {
			return errors.New("evaluation failed: " + known)
		}
	}
	return errors.New("evaluation failed")
}

// part is the expression's value as a key's part; "" where it is absent or empty.
func (e *expression) keyPart(s *subject) (string, error) {
	if e.direct != nil {
		return e.direct(s), nil
	}
	v, err := e.eval(s.keySubject())
	if err != nil || v == nil {
		return "", err
	}
	switch v := v.(type) {
	case types.String:
		return string(v), nil
	case types.Int:
		return strconv.FormatInt(int64(v), 10), nil
	case types.Uint:
		return strconv.FormatUint(uint64(v), 10), nil
	case types.Double:
		if f := float64(v); math.IsNaN(f) || math.IsInf(f, 0) {
			return "", errors.New("must be a finite number")
		}
		return strconv.FormatFloat(float64(v), 'f', -1, 64), nil
	case types.Bool:
		return strconv.FormatBool(bool(v)), nil
	}
	return "", fmt.Errorf("%s, not %v", forKey.wanted(), v.Type())
}

// holds is the expression's value as a condition; known is false where it is absent.
func (e *expression) condition(s *subject) (holds, known bool, err error) {
	v, err := e.eval(s)
	if err != nil || v == nil {
		return false, false, err
	}
	b, ok := v.(types.Bool)
	if !ok {
		return false, false, fmt.Errorf("%s, not %v", forWhen.wanted(), v.Type())
	}
	return bool(b), true, nil
}

// tokens is the expression's value as a cost, 1 where it is absent. What is above all bursts is the least such.
func (e *expression) tokens(s *subject) (int64, error) {
	v, err := e.eval(s)
	if err != nil || v == nil {
		return 1, err
	}
	switch v := v.(type) {
	case types.Int:
		return wholeCost(float64(v)) // inexact only where it is above all bursts
	case types.Uint:
		return wholeCost(float64(v))
	case types.Double:
		return wholeCost(float64(v))
	}
	return 0, fmt.Errorf("%s, not %v", forCost.wanted(), v.Type())
}

// wholeCost is a cost in whole tokens: a fraction is rounded up.
func wholeCost(f float64) (int64, error) {
	if math.IsNaN(f) || f < 0 {
		return 0, errors.New("must be a number >= 0")
	}
	return int64(min(math.Ceil(f), limiter.MaxTokens+1)), nil
}
