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
	"cel.dev/cel-go/common/types/traits"
	"cel.dev/cel-go/ext"
)

const (
	maxExpression = 4096   // characters
	maxEvaluation = 10_000 // CEL's units of cost; a comparison of two short strings is some 2
)

// attribute is one name that expressions know, by Envoy's names for what it knows of a request.
type attribute struct {
	kind *cel.Type
	// open says that what it holds is an address, a name or the like, which may stand in a key as it is. The rest (headers, claims,
	// context, queries) may hold secrets, and is hashed.
	open bool
	of   func(*subject) any
}

var attributes = map[string]attribute{
	"request.path":             {cel.StringType, false, func(s *subject) any { return s.Path }}, // with its query
	"request.url_path":         {cel.StringType, true, func(s *subject) any { return s.sent }},
	"request.query":            {cel.StringType, false, func(s *subject) any { return s.query }},
	"request.host":             {cel.StringType, true, func(s *subject) any { return s.host }},
	"request.scheme":           {cel.StringType, true, func(s *subject) any { return s.Scheme }},
	"request.method":           {cel.StringType, true, func(s *subject) any { return s.Method }},
	"request.protocol":         {cel.StringType, true, func(s *subject) any { return s.Protocol }},
	"request.id":               {cel.StringType, false, func(s *subject) any { return s.Headers["x-request-id"] }},
	"request.size":             {cel.IntType, true, func(s *subject) any { return s.Size }},
	"request.time":             {cel.TimestampType, true, func(s *subject) any { return s.Time }},
	"request.headers":          {textMap, false, func(s *subject) any { return presentIn(s.Headers) }},
	"source.address":           {cel.StringType, true, func(s *subject) any { return bareAddress(s.Source.Address) }},
	"source.port":              {cel.IntType, true, func(s *subject) any { return int64(s.Source.Port) }},
	"source.principal":         {cel.StringType, true, func(s *subject) any { return s.Source.Principal }},
	"destination.address":      {cel.StringType, true, func(s *subject) any { return bareAddress(s.Destination.Address) }},
	"destination.port":         {cel.IntType, true, func(s *subject) any { return int64(s.Destination.Port) }},
	"destination.principal":    {cel.StringType, true, func(s *subject) any { return s.Destination.Principal }},
	"metadata.filter_metadata": {cel.MapType(cel.StringType, cel.DynType), false, func(s *subject) any { return s.Metadata }},
	"context":                  {textMap, false, func(s *subject) any { return presentIn(s.Context) }},
	"client.ip":                {cel.StringType, true, func(s *subject) any { return addressText(s.client) }},
	"client.network":           {cel.StringType, true, func(s *subject) any { return network(s.client) }},
}

// textMap is a map whose absent entries are null.
var textMap = cel.MapType(cel.StringType, cel.NullableType(cel.StringType))

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

// expression is a compiled one.
type expression struct {
	program cel.Program
	open    bool // its value may stand in a key as it is
	// direct reads the value of an expression that is just an attribute or a header, without CEL's machinery.
	direct func(*subject) string
}

// expressionError is what is wrong with an expression, and where in it: line and column from 1, or 0.
type expressionError struct {
	line, column int
	message      string
}

// compile reads an expression whose value is to be a text, a number or a boolean.
func compile(text string) (*expression, []expressionError) {
	env, err := environment()
	if err != nil {
		return nil, []expressionError{{message: err.Error()}}
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
	switch out := checked.OutputType(); {
	case out.Kind() == types.DynKind, out.Kind() == types.StringKind, out.Kind() == types.IntKind, out.Kind() == types.UintKind,
		out.Kind() == types.DoubleKind, out.Kind() == types.BoolKind, out.IsExactType(cel.OptionalType(cel.DynType)), out.TypeName() == "optional_type":
	default:
		return nil, []expressionError{{message: fmt.Sprintf("a key is a text, a number or a boolean, and this is %v", out)}}
	}
	program, err := env.Program(checked, cel.CostLimit(maxEvaluation), cel.EvalOptions(cel.OptOptimize))
	if err != nil {
		return nil, []expressionError{{message: err.Error()}}
	}
	e := &expression{program: program, open: true, direct: directRead(native)}
	for _, r := range native.ReferenceMap() {
		if a, ok := attributes[r.Name]; ok && !a.open {
			e.open = e.direct != nil && r.Name == "request.path" // whole: appendOpen sees whether it has a query
		}
	}
	return e, nil
}

// checkHeaderNames finds headers that no request can have, since Envoy's are in lower case, and questions about them that have one
// answer only.
func checkHeaderNames(tree *ast.AST) (found []expressionError) {
	ast.PreOrderVisit(tree.Expr(), ast.NewExprVisitor(func(e ast.Expr) {
		wrong := func(format string, args ...any) {
			at := tree.SourceInfo().GetStartLocation(e.ID())
			found = append(found, expressionError{at.Line(), at.Column() + 1, fmt.Sprintf(format, args...)})
		}
		name, ok := headerName(tree, e)
		switch {
		case !ok:
		case name != strings.ToLower(name):
			wrong("the header %q is not in lower case: write %q", name, strings.ToLower(name))
		case e.Kind() == ast.SelectKind && e.AsSelect().IsTestOnly():
			// An absent header is null, which CEL takes for a value that is there.
			wrong("has() is true for every header: write request.headers[%q] != null", name)
		}
	}))
	return found
}

// headerName is the name in request.headers["name"] and request.headers.name.
func headerName(tree *ast.AST, e ast.Expr) (string, bool) {
	isHeaders := func(e ast.Expr) bool {
		r := tree.ReferenceMap()[e.ID()]
		return r != nil && r.Name == "request.headers"
	}
	switch e.Kind() {
	case ast.SelectKind:
		return e.AsSelect().FieldName(), isHeaders(e.AsSelect().Operand())
	case ast.CallKind:
		call := e.AsCall()
		if f := call.FunctionName(); (f == operators.Index || f == operators.OptIndex) && len(call.Args()) == 2 &&
			call.Args()[1].Kind() == ast.LiteralKind && isHeaders(call.Args()[0]) {
			name, ok := call.Args()[1].AsLiteral().Value().(string)
			return name, ok
		}
	}
	return "", false
}

// directRead is the read of an expression that is nothing but a text attribute or a header, else nil. TestDirectReads holds it to
// what CEL says.
func directRead(tree *ast.AST) func(*subject) string {
	if name, ok := headerName(tree, tree.Expr()); ok && (tree.Expr().Kind() == ast.SelectKind && !tree.Expr().AsSelect().IsTestOnly() ||
		tree.Expr().Kind() == ast.CallKind && tree.Expr().AsCall().FunctionName() == operators.Index) {
		return func(s *subject) string { return s.Headers[name] }
	}
	r := tree.ReferenceMap()[tree.Expr().ID()]
	if r == nil {
		return nil
	}
	a, ok := attributes[r.Name]
	if !ok || a.kind != cel.StringType {
		return nil
	}
	return func(s *subject) string { return a.of(s).(string) }
}

// text is the expression's value as a key's part. Absent values, null and the empty text among them, are "".
func (e *expression) text(s *subject) (string, error) {
	if e.direct != nil {
		return e.direct(s), nil
	}
	v, _, err := e.program.Eval(activation{s})
	if err != nil {
		if isAbsence(err) {
			return "", nil
		}
		return "", errors.New("the expression fails") // CEL's own words may hold what the client sent
	}
	return textOf(v)
}

// isAbsence reports whether an evaluation failed as something that it reads is not there.
func isAbsence(err error) bool {
	return strings.HasPrefix(err.Error(), "no such key") || strings.HasPrefix(err.Error(), "no such overload")
}

func textOf(v ref.Val) (string, error) {
	switch v := v.(type) {
	case types.String:
		return string(v), nil
	case types.Int:
		return strconv.FormatInt(int64(v), 10), nil
	case types.Uint:
		return strconv.FormatUint(uint64(v), 10), nil
	case types.Double:
		if f := float64(v); math.IsNaN(f) || math.IsInf(f, 0) {
			return "", errors.New("the value is not a finite number")
		}
		return strconv.FormatFloat(float64(v), 'f', -1, 64), nil
	case types.Bool:
		return strconv.FormatBool(bool(v)), nil
	case types.Null:
		return "", nil
	case *types.Optional:
		if !v.HasValue() {
			return "", nil
		}
		return textOf(v.GetValue())
	}
	return "", fmt.Errorf("a key is a text, a number or a boolean, and this is %v", v.Type())
}

// activation gives CEL the attributes that it asks for.
type activation struct{ s *subject }

func (a activation) ResolveName(name string) (any, bool) {
	known, ok := attributes[name]
	if !ok {
		return nil, false
	}
	return known.of(a.s), true
}

func (activation) Parent() cel.Activation { return nil }

// present is a map of texts in which a missing or empty entry is null.
type present struct{ traits.Mapper }

func presentIn(m map[string]string) present {
	return present{types.NewStringStringMap(types.DefaultTypeAdapter, m)}
}

func (p present) Find(key ref.Val) (ref.Val, bool) {
	v, ok := p.Mapper.Find(key)
	if v != nil && types.IsUnknownOrError(v) {
		return v, false
	}
	if !ok || v.Equal(types.String("")) == types.True {
		return types.NullValue, true
	}
	return v, true
}

func (p present) Get(key ref.Val) ref.Val {
	v, _ := p.Find(key)
	return v
}

func (p present) Contains(key ref.Val) ref.Val {
	v, _ := p.Find(key)
	if types.IsUnknownOrError(v) {
		return v
	}
	return types.Bool(v != types.NullValue)
}
