package policy

import (
	"errors"
	"fmt"
	"math"
	"slices"
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

// purpose says what the value of an expression is used for.
type purpose uint8

const (
	forKey    purpose = iota // a string, a number or a boolean
	forWhen                  // a boolean
	forCost                  // a number
	forSettle                // a number, once the response has ended
	forRate                  // a rate, or a number
)

// wanted describes the values that the purpose accepts.
func (p purpose) wanted() string {
	return [...]string{
		"must be a string, a number or a boolean", "must be a boolean", "must be a number", "must be a number",
		"must be a string or a number",
	}[p]
}

// isNumber reports whether the purpose accepts numbers alone.
func (p purpose) isNumber() bool { return p == forCost || p == forSettle }

// accepts reports whether the purpose accepts values of a type. A value whose
// type is known only at run time is checked then.
func (p purpose) accepts(out *cel.Type) bool {
	switch out.Kind() {
	case types.DynKind:
		return true
	case types.OpaqueKind:
		return out.TypeName() == "optional_type" && (len(out.Parameters()) == 0 || p.accepts(out.Parameters()[0]))
	case types.StringKind:
		return p == forKey || p == forRate
	case types.BoolKind:
		return p == forKey || p == forWhen
	case types.IntKind, types.UintKind, types.DoubleKind:
		return p != forWhen
	}
	return false
}

// checkEnvironment is the CEL environment of the expressions about a request, and
// endEnvironment that of those about its end. Each is made once, because that
// takes milliseconds.
var (
	checkEnvironment = sync.OnceValues(func() (*cel.Env, error) { return newEnvironment(kindsOf(attributes)) })
	endEnvironment   = sync.OnceValues(func() (*cel.Env, error) { return newEnvironment(kindsOf(endAttributes)) })
)

func newEnvironment(kinds map[string]*cel.Type) (*cel.Env, error) {
	options := []cel.EnvOption{
		ext.Strings(), cel.OptionalTypes(), cel.ParserExpressionSizeLimit(maxExpression), cel.ParserRecursionLimit(64),
	}
	for name, kind := range kinds {
		options = append(options, cel.Variable(name, kind))
	}
	return cel.NewEnv(options...)
}

// environment returns the CEL environment of the purpose's expressions.
func (p purpose) environment() (*cel.Env, error) {
	if p == forSettle {
		return endEnvironment()
	}
	return checkEnvironment()
}

// expression is a compiled CEL expression. It is safe for concurrent use.
type expression struct {
	text    string
	program cel.Program
	// instructions is the total size of its constant regular expressions, which
	// take most of its memory.
	instructions int
	// open reports that the value may appear in a key in plain text.
	open bool
	// constant reports that the value does not depend on the request.
	constant bool
	// metadata reports that it reads the dynamic metadata of Envoy's filters.
	metadata bool
	// uncheckedSize reports that it reads request.size without a look at
	// content-length, on which request.size depends.
	uncheckedSize bool
	// attribute is the attribute's name if the expression is an attribute and
	// nothing else; otherwise it is empty.
	attribute string
	// canonical is that of canonicalParts for the attribute, or nil.
	canonical func(string) (string, error)
	// direct reads an attribute or a header without CEL, if the expression is
	// nothing else; otherwise it is nil.
	direct func(*subject) string
	// only is the entry of request.headers, request.params or request.cookies that
	// the expression reads, if it is nothing else; otherwise it is zero.
	only read
	// reads is what it reads of a request: see readsOf.
	reads []read
	// responseHeaders and responseTrailers are the names of those that it reads,
	// in ascending order.
	responseHeaders, responseTrailers []string
	// facts serve warnings. They are nil once the config was read.
	facts *facts
}

// expressionError is an error in an expression. Its line and column begin at 1,
// or are 0 if unknown.
type expressionError struct {
	line, column int
	message      string
}

// compile parses, checks and plans an expression.
func compile(text string, p purpose) (*expression, []expressionError) {
	wrong := func(format string, args ...any) (*expression, []expressionError) {
		return nil, []expressionError{{message: fmt.Sprintf(format, args...)}}
	}
	if len(text) > maxExpression {
		return wrong("expression of %d bytes; the maximum is %d", len(text), maxExpression)
	}
	env, err := p.environment()
	if err != nil {
		return wrong("%v", err)
	}
	checked, issues := env.Compile(text)
	if issues.Err() != nil {
		var found []expressionError
		for _, e := range issues.Errors() {
			found = append(found, expressionError{e.Location.Line(), e.Location.Column() + 1, e.Message})
		}
		return nil, p.mend(text, found)
	}
	native := checked.NativeRep()
	if found := append(checkNames(native), checkLookups(native)...); found != nil {
		return nil, found
	}
	headers, trailers, found := responseFields(native)
	if found != nil {
		return nil, found
	}
	if out := checked.OutputType(); !p.accepts(out) {
		return wrong("%s, not %s%s", p.wanted(), wrapped().ReplaceAllString(out.String(), "$1"), p.convert(text))
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
	e := &expression{
		text: text, program: program, instructions: instructions, open: true, constant: true,
		reads: readsOf(native), facts: factsOf(native, checked.OutputType()),
		responseHeaders: headers, responseTrailers: trailers,
	}
	if p == forKey {
		e.direct, e.only = directRead(native)
		if r := native.ReferenceMap()[native.Expr().ID()]; r != nil && attributes[r.Name].kind != nil {
			e.attribute, e.canonical = r.Name, canonicalParts[r.Name]
		}
	}
	for _, r := range native.ReferenceMap() {
		if _, ok := endAttributes[r.Name]; ok {
			e.constant = false
		}
		if a, ok := attributes[r.Name]; ok {
			e.constant = false
			e.metadata = e.metadata || r.Name == filterMetadata
			e.uncheckedSize = e.uncheckedSize || r.Name == "request.size" && !readsHeader(native, "content-length")
			if !a.open {
				// The whole path may be open: appendOpen hashes it if it has a query.
				e.open = e.direct != nil && r.Name == "request.path"
			}
		}
	}
	return e, nil
}

// planOptions returns the options for planning an expression. asks has the IDs
// of its has() calls. The program sizes of its constant regular expressions are
// added to *instructions.
func planOptions(asks map[int64]bool, instructions *int) []cel.ProgramOption {
	return []cel.ProgramOption{
		cel.CostTracking(chargedUnits{}), cel.CostLimit(maxEvaluation), cel.EvalOptions(cel.OptOptimize),
		cel.CustomDecoratorV2(decorator(asks, instructions)),
	}
}

// textMaps are the attributes that are maps by names of headers.
var textMaps = []string{"request.headers", "response.headers", "response.trailers"}

// checkNames reports constant names of headers, parameters and cookies that no
// request has.
func checkNames(tree *ast.AST) (found []expressionError) {
	checks := map[string]func(string) error{requestParams: checkParamName, requestCookies: checkCookieName}
	for _, of := range textMaps {
		checks[of] = checkHeaderName
	}
	ast.PreOrderVisit(tree.Expr(), ast.NewExprVisitor(func(e ast.Expr) {
		for of, check := range checks { // an expression has a name in at most one of them
			name, ok := nameIn(tree, e, of)
			if !ok {
				continue
			}
			if err := check(name); err != nil {
				at := tree.SourceInfo().GetStartLocation(e.ID())
				found = append(found, expressionError{at.Line(), at.Column() + 1, err.Error()})
			}
		}
	}))
	return found
}

// checkHeaderName returns an error for a name that no header has, such as one that
// is not in lower case: Envoy lowers their names. The name of a pseudo-header, such
// as :authority, begins with a colon.
func checkHeaderName(name string) error {
	lower := strings.ToLower(name)
	meant := strings.TrimRight(strings.TrimLeft(lower, " \t"), ": \t")
	if !headerPattern.MatchString(strings.TrimPrefix(meant, ":")) {
		meant = strings.TrimLeft(meant, ": \t")
	}
	switch {
	case headerPattern.MatchString(strings.TrimPrefix(lower, ":")) && name == lower:
		return nil
	case headerPattern.MatchString(strings.TrimPrefix(lower, ":")):
		return fmt.Errorf("the header %q is not in lower case; write %q", name, lower)
	case headerPattern.MatchString(strings.TrimPrefix(meant, ":")):
		return fmt.Errorf("no header has the name %q; write %q", name, meant)
	}
	return fmt.Errorf(`no header has the name %q; want letters, digits and -, as in "x-api-key"`, name)
}

// checkParamName returns an error for an empty name, by which no parameter of a
// query is read.
func checkParamName(name string) error {
	if name == "" {
		return errors.New(`the name of a parameter is empty; want a name such as "id"`)
	}
	return nil
}

// checkCookieName returns an error for a name that no cookie has.
func checkCookieName(name string) error {
	if name == "" {
		return errors.New(`the name of a cookie is empty; want a name such as "session"`)
	}
	meant := name
	if end := strings.IndexAny(name, "=;"); end >= 0 {
		meant = name[:end]
	}
	switch meant = strings.Trim(meant, " \t"); {
	case meant == "":
		return fmt.Errorf(`no cookie has the name %q; want a name such as "session"`, name)
	case meant != name:
		return fmt.Errorf("no cookie has the name %q; write %q", name, meant)
	}
	return nil
}

// responseFields returns the names of the headers and trailers of the response
// that an expression reads, in ascending order. A use that does not name one is
// an error: Envoy sends only those that it was told to. response.grpc_status is
// a trailer, or a header if the response has trailers only.
func responseFields(tree *ast.AST) (headers, trailers []string, found []expressionError) {
	named := make(map[int64]bool) // the uses that name one, by the ID of the map's expression
	ast.PreOrderVisit(tree.Expr(), ast.NewExprVisitor(func(e ast.Expr) {
		for _, of := range textMaps[1:] {
			name, ok := nameIn(tree, e, of)
			if !ok {
				continue
			}
			for _, part := range append(partsOf(e), e) {
				named[part.ID()] = true
			}
			if of == textMaps[1] {
				headers = append(headers, name)
			} else {
				trailers = append(trailers, name)
			}
		}
	}))
	ast.PreOrderVisit(tree.Expr(), ast.NewExprVisitor(func(e ast.Expr) {
		r := tree.ReferenceMap()[e.ID()]
		if r != nil && r.Name == responseGRPCStatus {
			headers, trailers = append(headers, grpcStatus), append(trailers, grpcStatus)
		}
		if r == nil || named[e.ID()] || !slices.Contains(textMaps[1:], r.Name) {
			return
		}
		at := tree.SourceInfo().GetStartLocation(e.ID())
		found = append(found, expressionError{at.Line(), at.Column() + 1,
			fmt.Sprintf(`%s must be used with a constant name, as in %[1]s["x-name"], so that Envoy can be told to send it`,
				r.Name)})
	}))
	for _, names := range []*[]string{&headers, &trailers} {
		slices.Sort(*names)
		*names = slices.Compact(*names)
	}
	return headers, trailers, found
}

// partsOf returns the operands of a selection or a call.
func partsOf(e ast.Expr) []ast.Expr {
	switch e.Kind() {
	case ast.SelectKind:
		return []ast.Expr{e.AsSelect().Operand()}
	case ast.CallKind:
		return e.AsCall().Args()
	}
	return nil
}

// readsHeader reports whether an expression reads a header, or tests for it.
func readsHeader(tree *ast.AST, header string) (reads bool) {
	ast.PreOrderVisit(tree.Expr(), ast.NewExprVisitor(func(e ast.Expr) {
		if name, ok := headerName(tree, e); ok && name == header {
			reads = true
		}
	}))
	return reads
}

// headerName returns the name in request.headers["name"], request.headers.name,
// and "name" in request.headers.
func headerName(tree *ast.AST, e ast.Expr) (string, bool) { return nameIn(tree, e, "request.headers") }

// nameIn is headerName for any map of strings.
func nameIn(tree *ast.AST, e ast.Expr, of string) (string, bool) {
	headers, name := e, e
	switch e.Kind() {
	case ast.SelectKind:
		return e.AsSelect().FieldName(), isAttribute(tree, e.AsSelect().Operand(), of)
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
	if name.Kind() != ast.LiteralKind || !isAttribute(tree, headers, of) {
		return "", false
	}
	text, ok := name.AsLiteral().Value().(string)
	return text, ok
}

func isAttribute(tree *ast.AST, e ast.Expr, name string) bool {
	r := tree.ReferenceMap()[e.ID()]
	return r != nil && r.Name == name
}

// directRead returns a function that reads an expression without CEL, if it is
// only an attribute of type string, a header, a parameter or a cookie; otherwise
// it returns nil. only is the entry that it then reads of a map. TestDirectReads
// compares it with CEL.
func directRead(tree *ast.AST) (direct func(*subject) string, only read) {
	e := tree.Expr()
	if e.Kind() == ast.SelectKind && !e.AsSelect().IsTestOnly() ||
		e.Kind() == ast.CallKind && e.AsCall().FunctionName() == operators.Index {
		if name, ok := headerName(tree, e); ok {
			return func(s *subject) string { return s.keyHeader(name) }, read{"request.headers", name}
		}
		for _, of := range []string{requestParams, requestCookies} {
			if name, ok := nameIn(tree, e, of); ok {
				return func(s *subject) string { return s.lookUp(of, name).value }, read{of, name}
			}
		}
	}
	r := tree.ReferenceMap()[e.ID()]
	if r == nil {
		return nil, read{}
	}
	if r.Name == "request.id" {
		return func(s *subject) string { return s.keyHeader("x-request-id") }, read{"request.headers", "x-request-id"}
	}
	return attributes[r.Name].text, read{}
}

// keyHeader returns a header as a part of a key. It is empty, and so absent, if
// the header was sent more than once.
func (req *Request) keyHeader(name string) string {
	if req.isRepeated(name) {
		return ""
	}
	return req.Headers[name]
}

// eval evaluates the expression. It returns nil if the value is absent. The
// error contains nothing that the client sent.
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

// failures are the beginnings of the errors of CEL and its functions. The rest
// of such an error may quote the client.
var failures = []string{
	"no such key", "no such overload", "index out of bounds", "index out of range",
	"invalid substring range", "division by zero", "modulus by zero", "integer overflow",
	"unsigned integer overflow", "duration overflow", "timestamp overflow", "type conversion error",
	"invalid RFC 3339 timestamp", errZone.Error(), "time: invalid location name", "timezone offset",
	"error parsing regexp", errPattern.Error(), errStringSize.Error(),
	"operation cancelled: actual cost limit exceeded",
}

// failure returns an evaluation error without the values that it quotes, which
// may be the client's.
func failure(err error) error {
	for _, known := range failures {
		if strings.HasPrefix(err.Error(), known) {
			return errors.New("evaluation failed: " + known)
		}
	}
	return errors.New("evaluation failed")
}

// keyPart returns the value as a part of a key, or "" if it is absent or empty.
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

// condition returns the value as a condition. known is false if it is absent.
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

// tokens returns the value as a cost: otherwise if it is absent, and at most
// most.
func (e *expression) tokens(s cel.Activation, otherwise, most int64) (int64, error) {
	v, err := e.eval(s)
	if err != nil || v == nil {
		return otherwise, err
	}
	switch v := v.(type) {
	case types.Int:
		return wholeCost(float64(v), most) // inexact only for values that exceed every burst
	case types.Uint:
		return wholeCost(float64(v), most)
	case types.Double:
		return wholeCost(float64(v), most)
	}
	return 0, fmt.Errorf("%s, not %v", forCost.wanted(), v.Type())
}

// maxCost exceeds every burst, and maxSettled every burst and debt.
const maxCost, maxSettled = limiter.MaxTokens + 1, 3*limiter.MaxTokens + 1

// wholeCost returns a cost in whole tokens, rounded up, and at most most.
func wholeCost(f float64, most int64) (int64, error) {
	if math.IsNaN(f) || f < 0 {
		return 0, errors.New("must be a number >= 0")
	}
	return int64(min(math.Ceil(f), float64(most))), nil
}
