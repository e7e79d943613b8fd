package policy

import (
	"fmt"
	"regexp"
	"regexp/syntax"

	"cel.dev/cel-go/common/types"
	"cel.dev/cel-go/common/types/ref"
	"cel.dev/cel-go/interpreter"
)

const (
	maxProgram  = 4096 // instructions of one regular expression
	maxPrograms = 4 * maxProgram

	// instructionBytes is the approximate memory of an instruction.
	instructionBytes = 80
)

var (
	errPattern  = fmt.Errorf("regular expression of more than %d instructions", maxProgram)
	errPatterns = fmt.Errorf("regular expressions of more than %d instructions in total", maxPrograms)
)

// priceMatch plans text.matches(pattern). The time of Go's regular expressions
// is linear in the length of the text times the size of the program, and so is
// the cost. A constant pattern is compiled once, and its size is added to
// *instructions.
func priceMatch(call interpreter.InterpretableCall, args []interpreter.InterpretableV2,
	instructions *int) (interpreter.InterpretableV2, error) {
	p := &priced{id: call.ID(), args: args, pricedCall: pricedCall{units: matchUnits, run: runMatch}}
	c, ok := args[1].(interpreter.InterpretableConst)
	if !ok {
		return p, nil
	}
	pattern, ok := c.Value().(types.String)
	if !ok {
		return call, nil
	}
	size, err := programSize(string(pattern))
	if err != nil {
		return nil, err
	}
	if *instructions += size; *instructions > maxPrograms {
		return nil, errPatterns
	}
	compiled, err := regexp.Compile(string(pattern))
	if err != nil {
		return nil, err
	}
	p.units = func(args []ref.Val) (int, error) { return 1 + textLen(args[0])*size/stepsPerUnit, nil }
	p.run = func(args []ref.Val) ref.Val {
		text, ok := args[0].(types.String)
		if !ok {
			return errOverload
		}
		return types.Bool(compiled.MatchString(string(text)))
	}
	return p, nil
}

const (
	stepsPerUnit  = 40 // steps of a match: an instruction at a byte
	compileFactor = 10 // units to compile an instruction
)

// matchUnits is the cost of a match whose pattern is not constant.
func matchUnits(args []ref.Val) (int, error) {
	pattern, ok := args[1].(types.String)
	if !ok {
		return 1, nil
	}
	if len(pattern) > maxExpression {
		return 0, errPattern
	}
	size, err := programSize(string(pattern))
	if err != nil {
		return 0, err
	}
	return 1 + size*compileFactor + textLen(args[0])*size/stepsPerUnit, nil
}

func runMatch(args []ref.Val) ref.Val {
	text, ok1 := args[0].(types.String)
	pattern, ok2 := args[1].(types.String)
	if !ok1 || !ok2 {
		return errOverload
	}
	compiled, err := regexp.Compile(string(pattern))
	if err != nil {
		return types.WrapErr(err)
	}
	return types.Bool(compiled.MatchString(string(text)))
}

// programSize estimates the number of instructions of a pattern without
// compiling it, which may take long: repetitions multiply. It is at least 2.
func programSize(pattern string) (int, error) {
	tree, err := syntax.Parse(pattern, syntax.Perl)
	if err != nil {
		return 0, err
	}
	if n := 2 + instructions(tree); n <= maxProgram {
		return n, nil
	}
	return 0, errPattern
}

func instructions(re *syntax.Regexp) int {
	n := 0
	for _, sub := range re.Sub {
		n = min(n+instructions(sub), maxProgram+1) // keeps products small
	}
	switch re.Op {
	case syntax.OpLiteral:
		return len(re.Rune)
	case syntax.OpRepeat: // x{2,5} is xx(x(x(x)?)?)?, and x{2,} is xxx*
		return max(re.Min, re.Max, 1)*max(n, 1) + max(re.Max-re.Min, 1)
	case syntax.OpConcat:
		return n
	}
	return n + 2
}
