package policy

import (
	"strconv"
	"strings"

	"cel.dev/cel-go/cel"
	"cel.dev/cel-go/common/operators"
	"cel.dev/cel-go/common/types"
	"cel.dev/cel-go/common/types/ref"
	"cel.dev/cel-go/common/types/traits"
	"cel.dev/cel-go/interpreter"
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
	"request.size":             {cel.IntType, true, (*subject).size},
	"request.time":             {cel.TimestampType, true, func(s *subject) any { return s.Time }},
	"request.headers":          {textMap, false, func(s *subject) any { return s.present(s.Headers) }},
	"source.address":           {cel.StringType, true, func(s *subject) any { return bareAddress(s.Source.Address) }},
	"source.port":              {cel.IntType, true, func(s *subject) any { return int64(s.Source.Port) }},
	"source.principal":         {cel.StringType, true, func(s *subject) any { return s.Source.Principal }},
	"destination.address":      {cel.StringType, true, func(s *subject) any { return bareAddress(s.Destination.Address) }},
	"destination.port":         {cel.IntType, true, func(s *subject) any { return int64(s.Destination.Port) }},
	"destination.principal":    {cel.StringType, true, func(s *subject) any { return s.Destination.Principal }},
	"metadata.filter_metadata": {cel.MapType(cel.StringType, cel.DynType), false, func(s *subject) any { return s.present(s.Metadata) }},
	"context":                  {textMap, false, func(s *subject) any { return s.present(s.Context) }},
	"client.ip":                {cel.StringType, true, func(s *subject) any { return addressText(s.client) }},
	"client.network":           {cel.StringType, true, func(s *subject) any { return network(s.client) }},
}

// textMap is a map of texts that may be compared with null, which is what an absent entry is.
var textMap = cel.MapType(cel.StringType, cel.NullableType(cel.StringType))

// subjectName is what an expression's own machinery finds the subject by. No expression can say it.
const subjectName = "@subject"

// ResolveName gives CEL the attributes that it asks for.
func (s *subject) ResolveName(name string) (any, bool) {
	if a, ok := attributes[name]; ok {
		return a.of(s), true
	}
	return s, name == subjectName
}

// Parent is CEL's; there is none.
func (*subject) Parent() cel.Activation { return nil }

// size is the length of the body by its header, which may be absent.
func (s *subject) size() any {
	n, err := strconv.ParseInt(s.Headers["content-length"], 10, 64)
	if err != nil || n < 0 {
		s.misses++
		return types.NewErr(miss + ": content-length")
	}
	return n
}

// How absence works. In CEL a map's missing entry is an error, which every operator passes on but for &&, || and ?:, where the other
// operand may decide. So an expression that uses what is absent ends in that error, which eval tells from mistakes: the maps of a
// request count what was missed in them. has(), in and optional syntax ask without using, as they do on every map. What is left is
// that for == and != the absent is null.

// miss is how CEL's error for a missing entry begins.
const miss = "no such key"

func isMiss(err error) bool { return strings.HasPrefix(err.Error(), miss) }

// presentMap is a map of a request's, in which an empty or null entry is a missing one.
type presentMap struct {
	traits.Mapper
	s *subject
}

// present is one of the request's maps as expressions see it.
func (s *subject) present(m any) ref.Val {
	v := types.DefaultTypeAdapter.NativeToValue(m)
	if m, ok := v.(traits.Mapper); ok {
		return presentMap{m, s}
	}
	return v
}

// Find is CEL's: what is under a key, and whether anything is.
func (p presentMap) Find(key ref.Val) (ref.Val, bool) {
	v, ok := p.Mapper.Find(key)
	if v != nil && types.IsUnknownOrError(v) {
		return v, false
	}
	if !ok || v == types.NullValue || v == types.String("") {
		p.s.misses++
		return nil, false
	}
	if m, ok := v.(traits.Mapper); ok {
		v = presentMap{m, p.s} // the claims within claims
	}
	return v, true
}

// Get is CEL's: what is under a key, or the error of a missing one.
func (p presentMap) Get(key ref.Val) ref.Val {
	v, ok := p.Find(key)
	if !ok && v == nil {
		return types.NewErr(miss)
	}
	return v
}

// Contains is CEL's `in`.
func (p presentMap) Contains(key ref.Val) ref.Val {
	v, ok := p.Find(key)
	if !ok && v != nil {
		return v
	}
	return types.Bool(ok)
}

// decorate changes what CEL does in two places. It is an interpreter.InterpretableDecoratorV2.
func decorate(i interpreter.InterpretableV2) (interpreter.InterpretableV2, error) {
	call, ok := i.(interpreter.InterpretableCall)
	if !ok {
		return i, nil
	}
	args := call.Args()
	switch call.Function() {
	case operators.Equals, operators.NotEquals:
		return &equality{call, args[0], args[1], call.Function() == operators.NotEquals}, nil
	case "replace", "join":
		return &bounded{call, args}, nil
	}
	return i, nil
}

// bounded is a call whose result may be the product of its arguments' lengths, which a client may choose, and which CEL's own cost sees
// when it is too late.
type bounded struct {
	interpreter.InterpretableCall
	args []interpreter.InterpretableV2
}

const maxProduct = 1 << 20 // bytes

// Exec is CEL's.
func (b *bounded) Exec(frame *interpreter.ExecutionFrame) ref.Val {
	size := 1
	for _, arg := range b.args {
		switch v := arg.Exec(frame).(type) {
		case types.String:
			size *= len(v) + 1
		case traits.Lister:
			if n, ok := v.Size().(types.Int); ok {
				size *= int(n) + 1
			}
		}
		if size > maxProduct {
			return types.NewErr("a text grows too large")
		}
	}
	return b.InterpretableCall.Exec(frame)
}

// Eval is CEL's.
func (b *bounded) Eval(a interpreter.Activation) ref.Val {
	return interpreter.EvalActivation(a, b.Exec)
}

// equality is == or !=, which take what is absent for null.
type equality struct {
	interpreter.InterpretableCall
	left, right interpreter.InterpretableV2
	negated     bool
}

// Exec is CEL's.
func (e *equality) Exec(frame *interpreter.ExecutionFrame) ref.Val {
	left := nullable(e.left, frame)
	if types.IsUnknownOrError(left) {
		return left
	}
	right := nullable(e.right, frame)
	if types.IsUnknownOrError(right) {
		return right
	}
	return types.Bool((types.Equal(left, right) == types.True) != e.negated)
}

// Eval is CEL's.
func (e *equality) Eval(a interpreter.Activation) ref.Val {
	return interpreter.EvalActivation(a, e.Exec)
}

// nullable is an operand's value, null where it is absent.
func nullable(operand interpreter.InterpretableV2, frame *interpreter.ExecutionFrame) ref.Val {
	found, _ := frame.ResolveName(subjectName)
	s, ok := found.(*subject)
	if !ok {
		return operand.Exec(frame)
	}
	before := s.misses
	v := operand.Exec(frame)
	if err, ok := v.(*types.Err); ok && s.misses > before && isMiss(err) {
		return types.NullValue
	}
	return v
}
