package policy

import (
	"errors"
	"fmt"
	"regexp"
	"strings"
	"time"

	"cel.dev/cel-go/cel"
	"cel.dev/cel-go/common/ast"
	"cel.dev/cel-go/common/operators"
	"cel.dev/cel-go/common/types"
	"cel.dev/cel-go/common/types/ref"
)

// constants finds errors in an expression that do not depend on the request:
// constant parts that fail to evaluate, and constant arguments that a function
// never accepts, such as an unknown time zone. Without this check every request
// that evaluates them would be refused.
type constants struct {
	env   *cel.Env
	tree  *ast.AST
	found []expressionError
}

func checkConstants(env *cel.Env, tree *ast.AST) []expressionError {
	c := &constants{env: env, tree: tree}
	c.visit(tree.Expr())
	return c.found
}

func (c *constants) wrong(e ast.Expr, err error) {
	message := err.Error()
	for kind, want := range map[string]string{
		"google.protobuf.Duration": `want a duration such as "90s" or "1h30m"`,
		"RFC 3339":                 `want a time such as "2026-01-31T00:00:00Z"`,
	} {
		if strings.Contains(message, kind) {
			message += "; " + want
		}
	}
	at := c.tree.SourceInfo().GetStartLocation(e.ID())
	c.found = append(c.found, expressionError{at.Line(), at.Column() + 1, message})
}

// visit checks e and its parts, and reports whether e is a constant. A constant
// is evaluated only if it is not part of a larger one.
func (c *constants) visit(e ast.Expr) (constant bool) {
	var parts []ast.Expr
	switch e.Kind() {
	case ast.LiteralKind:
		return true
	case ast.CallKind:
		call := e.AsCall()
		if call.IsMemberFunction() {
			parts = append(parts, call.Target())
		}
		parts = append(parts, call.Args()...)
		constant = true
	case ast.ListKind:
		parts = e.AsList().Elements()
		constant = true
	case ast.MapKind:
		for _, entry := range e.AsMap().Entries() {
			parts = append(parts, entry.AsMapEntry().Key(), entry.AsMapEntry().Value())
		}
		constant = true
	case ast.SelectKind:
		parts = append(parts, e.AsSelect().Operand())
	case ast.ComprehensionKind:
		fold := e.AsComprehension()
		parts = append(parts, fold.IterRange(), fold.AccuInit(), fold.LoopCondition(), fold.LoopStep(), fold.Result())
	}
	areConstant := make([]bool, len(parts))
	for i, part := range parts {
		areConstant[i] = c.visit(part)
		constant = constant && areConstant[i]
	}
	if constant {
		return true
	}
	for i, part := range parts {
		if areConstant[i] && part.Kind() != ast.LiteralKind {
			if _, err := c.value(part); err != nil {
				c.wrong(part, err)
			}
		}
	}
	if e.Kind() == ast.CallKind {
		c.visitArguments(e.AsCall())
	}
	return false
}

// value evaluates a constant.
func (c *constants) value(e ast.Expr) (ref.Val, error) {
	if e.Kind() == ast.LiteralKind {
		return e.AsLiteral(), nil
	}
	program, err := c.env.PlanProgram(ast.NewCheckedAST(ast.NewAST(e, c.tree.SourceInfo()), c.tree.TypeMap(),
		c.tree.ReferenceMap()), planOptions(nil, new(int))...)
	if err != nil {
		return nil, err
	}
	v, _, err := program.Eval(cel.NoVars())
	return v, err
}

// leaves returns the expressions that may become the value of e: e itself, or
// the branches of ?:.
func (c *constants) leaves(e ast.Expr) []ast.Expr {
	if e.Kind() == ast.CallKind && e.AsCall().FunctionName() == operators.Conditional {
		args := e.AsCall().Args()
		return append(c.leaves(args[1]), c.leaves(args[2])...)
	}
	return []ast.Expr{e}
}

// visitArguments checks the constant arguments of a call that is not constant.
func (c *constants) visitArguments(call ast.CallExpr) {
	check, at := argumentCheck(call)
	if check == nil || at >= len(call.Args()) {
		return
	}
	for _, leaf := range c.leaves(call.Args()[at]) {
		if !(&constants{env: c.env, tree: c.tree}).visit(leaf) {
			continue
		}
		v, err := c.value(leaf)
		if err != nil {
			continue // reported already
		}
		if err := check(v); err != nil {
			c.wrong(leaf, err)
		}
	}
}

// argumentCheck returns the check for an argument of a function that may be
// constant although others are not, and the index of that argument.
func argumentCheck(call ast.CallExpr) (check func(ref.Val) error, at int) {
	switch name := call.FunctionName(); name {
	case "getFullYear", "getMonth", "getDate", "getDayOfMonth", "getDayOfYear", "getDayOfWeek", "getHours",
		"getMinutes", "getSeconds", "getMilliseconds":
		return checkTimeZone, 0
	case "matches":
		if call.IsMemberFunction() {
			return checkPattern, 0
		}
		return checkPattern, 1
	case operators.Divide, operators.Modulo:
		return checkDivisor, 1
	case "charAt", "substring":
		return checkOffset, 0
	case "indexOf", "lastIndexOf":
		return checkOffset, 1
	case "int", "uint", "double", "bool", "duration", "timestamp":
		return checkConversion(name), 0
	}
	return nil, 0
}

func checkTimeZone(v ref.Val) error {
	own, err := builtins()
	if err != nil {
		return err
	}
	now := types.Timestamp{Time: time.Unix(0, 0).UTC()}
	if types.IsError(invoke(own["getHours"], []ref.Val{now, v})) {
		return fmt.Errorf("unknown time zone %q; want a name such as Europe/Berlin, or an offset such as +02:00",
			v.Value())
	}
	return nil
}

func checkPattern(v ref.Val) error {
	pattern, ok := v.(types.String)
	if !ok {
		return nil
	}
	if _, err := programSize(string(pattern)); err != nil {
		return err
	}
	_, err := regexp.Compile(string(pattern))
	return err
}

func checkDivisor(v ref.Val) error {
	if v == types.Int(0) || v == types.Uint(0) {
		return errors.New("division by zero")
	}
	return nil
}

func checkOffset(v ref.Val) error {
	if n, ok := v.(types.Int); ok && n < 0 {
		return fmt.Errorf("invalid offset %d; want a number >= 0", n)
	}
	return nil
}

func checkConversion(name string) func(ref.Val) error {
	return func(v ref.Val) error {
		own, err := builtins()
		if err != nil {
			return err
		}
		if err, ok := invoke(own[name], []ref.Val{v}).(*types.Err); ok {
			return err
		}
		return nil
	}
}
