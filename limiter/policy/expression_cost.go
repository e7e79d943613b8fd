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

// What an evaluation may cost. CEL charges a call after it ran, which is too
// late where its time is a product of texts that clients choose, and some calls
// it does not charge by their texts at all. The calls of pricedCalls are
// therefore charged here, from their arguments, before they run; what CEL
// charges for the others is a fair price for work that is linear.
const (
	maxEvaluation = 10_000    // units of an evaluation; a unit is some 100 to 400 ns
	maxString     = 256 << 10 // bytes of a text that is made of others
)

// pricedCalls are the functions whose calls are charged before they run.
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
	"duration":    {units: scanUnits}, // their errors quote the text
	"timestamp":   {units: scanUnits},
	"string":      {units: scanUnits, run: runString},
	// With a time zone these read a file.
	"getFullYear": {units: zoneUnits}, "getMonth": {units: zoneUnits}, "getDate": {units: zoneUnits}, "getDayOfMonth": {units: zoneUnits},
	"getDayOfYear": {units: zoneUnits}, "getDayOfWeek": {units: zoneUnits}, "getHours": {units: zoneUnits}, "getMinutes": {units: zoneUnits},
	"getSeconds": {units: zoneUnits}, "getMilliseconds": {units: zoneUnits},
}

// pricedCall is how one function is charged and run.
type pricedCall struct {
	// units says what a call costs. An error is the call's result.
	units func(args []ref.Val) (int, error)
	// run is the function; nil: CEL's own.
	run func(args []ref.Val) ref.Val
}

// price is a call as it is planned: one of pricedCalls as a priced node.
func price(call interpreter.InterpretableCall, args []interpreter.InterpretableV2, instructions *int) (interpreter.InterpretableV2, error) {
	if call.Function() == "matches" && len(args) == 2 {
		return priceMatch(call, args, instructions)
	}
	p, ok := pricedCalls[call.Function()]
	if !ok || len(args) == 0 {
		return call, nil
	}
	if p.run == nil {
		if isConstant(args) {
			return call, nil // CEL evaluates it once
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

// builtins are CEL's own implementations of its functions, by their names.
var builtins = sync.OnceValues(func() (map[string]*functions.Overload, error) {
	env, err := environment()
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

// priced is a call of a function that is charged before it runs. It is none of
// CEL's calls any more, so that CEL does not optimise it into one.
type priced struct {
	pricedCall
	id   int64
	args []interpreter.InterpretableV2
}

// ID is CEL's.
func (p *priced) ID() int64 { return p.id }

// Exec is CEL's.
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

// Eval is CEL's.
func (p *priced) Eval(a interpreter.Activation) ref.Val { return interpreter.EvalActivation(a, p.Exec) }

// charge adds to what the evaluation has cost, and ends it where that is too
// much. A single unit it leaves out, which would allocate more than it counts:
// CEL charges for the arguments of such a call.
func charge(frame *interpreter.ExecutionFrame, id int64, units int) {
	if units <= 1 {
		return
	}
	if costs := frame.CostTracker(); costs != nil {
		costs.EvalUnary(frame, id, chargeCall{}, types.Int(units), nil)
	}
}

// chargeCall is what charge has the tracker see.
type chargeCall struct{}

const chargeName = "sluice_charge"

// Function is CEL's.
func (chargeCall) Function() string { return chargeName }

// OverloadID is CEL's.
func (chargeCall) OverloadID() string { return chargeName }

// chargedUnits tells CEL's tracker what charge means.
type chargedUnits struct{}

// CallCost is CEL's; nil leaves a call to CEL's own prices.
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

// textLen is the length of a text in bytes; 0 of what is none.
func textLen(v ref.Val) int {
	switch v := v.(type) {
	case types.String:
		return len(v)
	case types.Bytes:
		return len(v)
	}
	return 0
}

// scanUnits is the price of reading the arguments, as CEL counts it.
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

// equalUnits is the price of comparing two values.
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

// measure adds the elements and the bytes of a value with all that is in it,
// until there are more of them than any evaluation may handle.
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

// formatUnits is the price of text.format(values), which writes each value
// once.
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

// splitUnits is the price of text.split(separator), which makes a list.
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

// replacing is what text.replace(old, new) and text.replace(old, new, times)
// ask for.
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

// joinUnits is the price of texts.join() and texts.join(between).
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

// indexOf is text.indexOf(part) and text.indexOf(part, from), in code points
// as CEL counts them, in linear time. CEL's own takes the product of both.
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

// lastIndexOf is text.lastIndexOf(part), and text.lastIndexOf(part, from),
// where the part begins at from or before it.
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
			return types.Int(-1) // as CEL has it
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

// searching are the arguments of indexOf and lastIndexOf.
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

// byteOffset is where a text's nth code point begins, or its end for the one
// behind the last; ok is false for one behind that.
func byteOffset(text string, n int64) (at int, ok bool) {
	for ; n > 0 && at < len(text); n-- {
		_, size := utf8.DecodeRuneInString(text[at:])
		at += size
	}
	return at, n == 0
}

// printed is string(), which prints numbers without an exponent.
func runString(args []ref.Val) ref.Val {
	if f, ok := args[0].(types.Double); ok {
		return types.String(strconv.FormatFloat(float64(f), 'f', -1, 64))
	}
	return args[0].ConvertToType(types.StringType)
}
