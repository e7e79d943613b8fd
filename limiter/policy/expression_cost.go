package policy

import (
	"errors"
	"strconv"
	"strings"
	"sync"
	"unicode/utf8"

	"cel.dev/cel-go/common/functions"
	"cel.dev/cel-go/common/types"
	"cel.dev/cel-go/common/types/ref"
	"cel.dev/cel-go/common/types/traits"
	"cel.dev/cel-go/interpreter"
)

// Bounds of an evaluation. CEL charges for a call after it ran, which is too
// late if its time is the product of the lengths of strings that clients
// choose. For some calls it does not charge by length at all. So the calls in
// pricedCalls are charged here, by their arguments, before they run. For other
// calls, whose time is linear, CEL's charge is adequate.
const (
	maxEvaluation = 10_000    // units of one evaluation; a unit takes about 100 to 400 ns
	maxString     = 256 << 10 // bytes of a string that a function builds
)

// pricedCalls are the functions that are charged before they run.
var pricedCalls = map[string]pricedCall{
	"replace":     {units: replaceUnits, run: runReplace},
	"join":        {units: joinUnits, run: runJoin},
	"format":      {units: formatUnits},
	"split":       {units: splitUnits},
	"indexOf":     {units: scanUnits, run: runIndexOf},
	"lastIndexOf": {units: scanUnits, run: runLastIndexOf},
	"size":        {units: func(args []ref.Val) (int, error) { return 1 + textLen(args[0])/100, nil }},
	"int":         {units: scanUnits},
	"uint":        {units: scanUnits},
	"double":      {units: scanUnits},
	"duration":    {units: scanUnits}, // their errors quote the string
	"timestamp":   {units: scanUnits},
	"string":      {units: scanUnits, run: runString},
	// With a time zone these functions read a file.
	"getFullYear":     {units: zoneUnits},
	"getMonth":        {units: zoneUnits},
	"getDate":         {units: zoneUnits},
	"getDayOfMonth":   {units: zoneUnits},
	"getDayOfYear":    {units: zoneUnits},
	"getDayOfWeek":    {units: zoneUnits},
	"getHours":        {units: zoneUnits},
	"getMinutes":      {units: zoneUnits},
	"getSeconds":      {units: zoneUnits},
	"getMilliseconds": {units: zoneUnits},
}

// pricedCall says how a function is charged and run.
type pricedCall struct {
	// units returns the cost of a call. An error is the result of the call.
	units func(args []ref.Val) (int, error)
	// run is the function. If it is nil, CEL's own is used.
	run func(args []ref.Val) ref.Val
}

// price returns the planned call. If it is one of pricedCalls, it is replaced
// by a priced call.
func price(call interpreter.InterpretableCall, args []interpreter.InterpretableV2,
	instructions *int) (interpreter.InterpretableV2, error) {
	if call.Function() == "matches" && len(args) == 2 {
		return priceMatch(call, args, instructions)
	}
	p, ok := pricedCalls[call.Function()]
	if !ok || len(args) == 0 {
		return call, nil
	}
	if p.run == nil {
		if isConstant(args) {
			return call, nil // CEL evaluates it once, when it plans
		}
		own, err := builtins()
		if err != nil {
			return nil, err
		}
		f := own[call.Function()]
		if f == nil {
			return call, nil
		}
		p.run = func(args []ref.Val) ref.Val { return invoke(f, args) }
	}
	return &priced{id: call.ID(), args: args, pricedCall: p}, nil
}

func isConstant(args []interpreter.InterpretableV2) bool {
	for _, a := range args {
		if _, ok := a.(interpreter.InterpretableConst); !ok {
			return false
		}
	}
	return true
}

// builtins returns CEL's implementations of its functions, by name.
var builtins = sync.OnceValues(func() (map[string]*functions.Overload, error) {
	env, err := checkEnvironment()
	if err != nil {
		return nil, err
	}
	own := make(map[string]*functions.Overload)
	for name, f := range env.Functions() {
		overloads, err := f.Bindings()
		if err != nil {
			return nil, err
		}
		for _, o := range overloads {
			if o.Operator == name {
				own[name] = o
			}
		}
	}
	return own, nil
})

// invoke calls one of CEL's functions.
func invoke(f *functions.Overload, args []ref.Val) ref.Val {
	switch {
	case f.OperandTrait != 0 && !args[0].Type().HasTrait(f.OperandTrait):
		return errOverload
	case len(args) == 1 && f.Unary != nil:
		return f.Unary(args[0])
	case len(args) == 2 && f.Binary != nil:
		return f.Binary(args[0], args[1])
	case f.Function != nil:
		return f.Function(args...)
	}
	return errOverload
}

// priced is a call that is charged before it runs. Because it is not an
// InterpretableCall, CEL does not optimize it.
type priced struct {
	pricedCall
	id   int64
	args []interpreter.InterpretableV2
}

// ID implements interpreter.InterpretableV2.
func (p *priced) ID() int64 { return p.id }

// Exec implements interpreter.InterpretableV2.
func (p *priced) Exec(frame *interpreter.ExecutionFrame) ref.Val {
	args := make([]ref.Val, len(p.args))
	for i, arg := range p.args {
		if args[i] = arg.Exec(frame); types.IsUnknownOrError(args[i]) {
			return args[i]
		}
	}
	units, err := p.units(args)
	if err != nil {
		return types.WrapErr(err)
	}
	charge(frame, p.id, units)
	return p.run(args)
}

// Eval implements interpreter.Interpretable.
func (p *priced) Eval(a interpreter.Activation) ref.Val { return interpreter.EvalActivation(a, p.Exec) }

// charge adds units to the cost of the evaluation, and ends the evaluation if
// it exceeds the limit. It ignores a single unit, because CEL charges that much
// for the arguments, and counting it would allocate.
func charge(frame *interpreter.ExecutionFrame, id int64, units int) {
	if units <= 1 {
		return
	}
	if costs := frame.CostTracker(); costs != nil {
		costs.EvalUnary(frame, id, chargeCall{}, types.Int(units), nil)
	}
}

// chargeCall is the call that charge reports to CEL's cost tracker.
type chargeCall struct{}

const chargeName = "sluice_charge"

// Function implements cost.Call.
func (chargeCall) Function() string { return chargeName }

// OverloadID implements cost.Call.
func (chargeCall) OverloadID() string { return chargeName }

// chargedUnits implements cost.ActualCostEstimator for chargeCall.
type chargedUnits struct{}

// CallCost implements cost.ActualCostEstimator. For calls other than
// chargeCall it returns nil, so that CEL uses its own cost.
func (chargedUnits) CallCost(_, overload string, args []ref.Val, _ ref.Val) *uint64 {
	if overload != chargeName {
		return nil
	}
	units := uint64(max(0, args[0].(types.Int)))
	return &units
}

var (
	errZone       = errors.New("unknown time zone")
	errStringSize = errors.New("string grows too large")
	errOverload   = types.NewErr("no such overload")
)

// textLen returns the length of a string in bytes, and 0 for other values.
func textLen(v ref.Val) int {
	switch v := v.(type) {
	case types.String:
		return len(v)
	case types.Bytes:
		return len(v)
	}
	return 0
}

// scanUnits is the cost of a call that reads its arguments once.
func scanUnits(args []ref.Val) (int, error) {
	n := 0
	for _, a := range args {
		n += textLen(a)
	}
	return 1 + n/10, nil
}

func zoneUnits(args []ref.Val) (int, error) {
	if len(args) < 2 {
		return 1, nil
	}
	if textLen(args[1]) > 64 {
		return 0, errZone
	}
	return 200, nil
}

// equalUnits is the cost of comparing two values.
func equalUnits(left, right ref.Val) int {
	if _, isText := left.(types.String); isText {
		return 1 + min(textLen(left), textLen(right))/100
	}
	if !isContainer(left) || !isContainer(right) {
		return 1
	}
	elements, bytes := 0, 0
	measure(left, &elements, &bytes)
	return 1 + elements + bytes/100
}

func isContainer(v ref.Val) bool {
	switch v.(type) {
	case traits.Lister, traits.Mapper:
		return true
	}
	return false
}

// measure adds the number of elements and bytes of a value and everything in
// it. It stops once they exceed what an evaluation may use.
func measure(v ref.Val, elements, bytes *int) {
	if *elements++; *elements > maxEvaluation || *bytes > maxString {
		return
	}
	switch v := v.(type) {
	case traits.Mapper:
		for i := v.Iterator(); i.HasNext() == types.True && *elements <= maxEvaluation && *bytes <= maxString; {
			key := i.Next()
			measure(key, elements, bytes)
			measure(v.Get(key), elements, bytes)
		}
	case traits.Lister:
		for i := v.Iterator(); i.HasNext() == types.True && *elements <= maxEvaluation && *bytes <= maxString; {
			measure(i.Next(), elements, bytes)
		}
	default:
		*bytes += textLen(v)
	}
}

// formatUnits is the cost of text.format(values), which writes each value once.
func formatUnits(args []ref.Val) (int, error) {
	elements, bytes := 0, textLen(args[0])
	for _, v := range args[1:] {
		measure(v, &elements, &bytes)
	}
	if bytes > maxString {
		return 0, errStringSize
	}
	return 1 + elements + bytes/10, nil
}

// splitUnits is the cost of text.split(separator), which makes a list.
func splitUnits(args []ref.Val) (int, error) {
	if len(args) < 2 {
		return 1, nil
	}
	text, _ := args[0].(types.String)
	separator, _ := args[1].(types.String)
	parts := strings.Count(string(text), string(separator)) + 1
	if len(args) == 3 {
		if most, ok := args[2].(types.Int); ok && most >= 0 {
			parts = min(parts, int(min(most, maxString)))
		}
	}
	return 1 + parts + len(text)/100, nil
}

// replaceArgs are the arguments of text.replace(old, new) and text.replace(old,
// new, times).
type replaceArgs struct {
	text, old, by string
	times         int // -1: all
}

func replaceArgsOf(args []ref.Val) (r replaceArgs, ok bool) {
	if len(args) != 3 && len(args) != 4 {
		return r, false
	}
	text, ok1 := args[0].(types.String)
	old, ok2 := args[1].(types.String)
	by, ok3 := args[2].(types.String)
	r = replaceArgs{string(text), string(old), string(by), -1}
	if len(args) == 4 {
		n, ok := args[3].(types.Int)
		if !ok {
			return r, false
		}
		r.times = int(min(n, maxString))
	}
	return r, ok1 && ok2 && ok3
}

func replaceUnits(args []ref.Val) (int, error) {
	r, ok := replaceArgsOf(args)
	if !ok {
		return 1, nil
	}
	found := strings.Count(r.text, r.old)
	if r.times >= 0 {
		found = min(found, r.times)
	}
	grown := len(r.text) + found*max(0, len(r.by)-len(r.old))
	if grown > maxString {
		return 0, errStringSize
	}
	return 1 + found/10 + grown/100, nil
}

func runReplace(args []ref.Val) ref.Val {
	r, ok := replaceArgsOf(args)
	if !ok {
		return errOverload
	}
	return types.String(strings.Replace(r.text, r.old, r.by, r.times))
}

// joinUnits is the cost of texts.join() and texts.join(separator).
func joinUnits(args []ref.Val) (int, error) {
	texts, ok := args[0].(traits.Lister)
	if !ok {
		return 1, nil
	}
	elements, bytes := 0, 0
	measure(texts, &elements, &bytes)
	if len(args) == 2 {
		bytes += elements * textLen(args[1])
	}
	if bytes > maxString {
		return 0, errStringSize
	}
	return 1 + elements + bytes/100, nil
}

func runJoin(args []ref.Val) ref.Val {
	texts, ok := args[0].(traits.Lister)
	between := types.String("")
	if ok && len(args) == 2 {
		between, ok = args[1].(types.String)
	}
	if !ok {
		return errOverload
	}
	var b strings.Builder
	for i, first := texts.Iterator(), true; i.HasNext() == types.True; first = false {
		text, ok := i.Next().(types.String)
		if !ok {
			return errOverload
		}
		if !first {
			b.WriteString(string(between))
		}
		b.WriteString(string(text))
	}
	return types.String(b.String())
}

// runIndexOf is text.indexOf(part) and text.indexOf(part, from). Positions are
// in code points. It takes linear time; CEL's own takes time in proportion to
// the product of both lengths.
func runIndexOf(args []ref.Val) ref.Val {
	text, part, from, ok := searchArgs(args)
	switch {
	case !ok:
		return errOverload
	case from < 0:
		return types.NewErr("index out of range: %d", from)
	}
	at, ok := byteOffset(text, from)
	if !ok {
		at, from = len(text), int64(utf8.RuneCountInString(text))
		if part != "" {
			return types.Int(-1)
		}
	}
	i := strings.Index(text[at:], part)
	if i < 0 {
		return types.Int(-1)
	}
	return types.Int(from + int64(utf8.RuneCountInString(text[at:at+i])))
}

// runLastIndexOf is text.lastIndexOf(part), and text.lastIndexOf(part, from),
// which finds the last part that begins at from or before.
func runLastIndexOf(args []ref.Val) ref.Val {
	text, part, from, ok := searchArgs(args)
	if !ok {
		return errOverload
	}
	if len(args) == 2 {
		from = int64(utf8.RuneCountInString(text))
	}
	if from < 0 {
		return types.NewErr("index out of range: %d", from)
	}
	at, within := byteOffset(text, from)
	if !within {
		at = len(text)
		if part != "" && len(args) == 3 {
			return types.Int(-1) // as in CEL
		}
	} else if len(args) == 3 && at == len(text) && part != "" {
		return types.Int(-1)
	}
	i := strings.LastIndex(text[:min(len(text), at+len(part))], part)
	if i < 0 {
		return types.Int(-1)
	}
	return types.Int(utf8.RuneCountInString(text[:i]))
}

// searchArgs returns the arguments of indexOf and lastIndexOf.
func searchArgs(args []ref.Val) (text, part string, from int64, ok bool) {
	if len(args) != 2 && len(args) != 3 {
		return "", "", 0, false
	}
	t, ok1 := args[0].(types.String)
	p, ok2 := args[1].(types.String)
	if len(args) == 3 {
		n, ok3 := args[2].(types.Int)
		if !ok3 {
			return "", "", 0, false
		}
		from = int64(n)
	}
	return string(t), string(p), from, ok1 && ok2
}

// byteOffset returns the byte offset of code point n of a string, or the end if
// n is their number. ok is false if n is larger.
func byteOffset(text string, n int64) (at int, ok bool) {
	for ; n > 0 && at < len(text); n-- {
		_, size := utf8.DecodeRuneInString(text[at:])
		at += size
	}
	return at, n == 0
}

// runString is string(). It prints numbers without an exponent.
func runString(args []ref.Val) ref.Val {
	if f, ok := args[0].(types.Double); ok {
		return types.String(strconv.FormatFloat(float64(f), 'f', -1, 64))
	}
	return args[0].ConvertToType(types.StringType)
}
