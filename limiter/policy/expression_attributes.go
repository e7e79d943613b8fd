package policy

import (
	"errors"
	"maps"
	"slices"
	"strconv"

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
	open  bool
	value func(*subject) any
}

var attributes = map[string]attribute{
	"request.path":          {cel.StringType, false, func(s *subject) any { return s.Path }}, // with its query
	"request.url_path":      {cel.StringType, true, func(s *subject) any { return s.sent }},
	"request.query":         {cel.StringType, false, func(s *subject) any { return s.query }},
	"request.host":          {cel.StringType, true, func(s *subject) any { return s.host() }},
	"request.scheme":        {cel.StringType, true, func(s *subject) any { return s.Scheme }},
	"request.method":        {cel.StringType, true, func(s *subject) any { return s.Method }},
	"request.protocol":      {cel.StringType, true, func(s *subject) any { return s.Protocol }},
	"request.id":            {cel.StringType, false, func(s *subject) any { return s.Headers["x-request-id"] }},
	"request.size":          {cel.IntType, true, (*subject).size},
	"request.time":          {cel.TimestampType, true, func(s *subject) any { return s.Time }},
	"request.headers":       {textMap, false, func(s *subject) any { return present(s.Headers) }},
	"source.address":        {cel.StringType, true, func(s *subject) any { return bareAddress(s.Source.Address) }},
	"source.port":           {cel.IntType, true, func(s *subject) any { return int64(s.Source.Port) }},
	"source.principal":      {cel.StringType, true, func(s *subject) any { return s.Source.Principal }},
	"destination.address":   {cel.StringType, true, func(s *subject) any { return bareAddress(s.Destination.Address) }},
	"destination.port":      {cel.IntType, true, func(s *subject) any { return int64(s.Destination.Port) }},
	"destination.principal": {cel.StringType, true, func(s *subject) any { return s.Destination.Principal }},
	filterMetadata:          {cel.MapType(cel.StringType, cel.DynType), false, func(s *subject) any { return present(s.Metadata) }},
	"context":               {textMap, false, func(s *subject) any { return present(s.Context) }},
	"client.ip":             {cel.StringType, true, func(s *subject) any { return addressText(s.client) }},
	"client.network":        {cel.StringType, true, func(s *subject) any { return network(s.client) }},
}

// filterMetadata is what Envoy's filters leave behind, such as the claims of a JWT.
const filterMetadata = "metadata.filter_metadata"

// textMap is a map of texts that may be compared with null, which is what an absent entry is.
var textMap = cel.MapType(cel.StringType, cel.NullableType(cel.StringType))

// ResolveName gives CEL the attributes that it asks for.
func (s *subject) ResolveName(name string) (any, bool) {
	a, ok := attributes[name]
	if !ok {
		return nil, false
	}
	return a.value(s), true
}

// Parent is CEL's; there is none.
func (*subject) Parent() cel.Activation { return nil }

// keySubject gives CEL the attributes as a key sees them: without the headers that were sent more than once.
type keySubject struct {
	*subject
	headers map[string]string
}

// keySubject returns what the expressions of keys are evaluated on.
func (s *subject) keySubject() cel.Activation {
	if len(s.Repeated) == 0 {
		return s
	}
	if s.forKeys == nil {
		headers := maps.Clone(s.Headers)
		for _, name := range s.Repeated {
			delete(headers, name)
		}
		s.forKeys = &keySubject{s, headers}
	}
	return s.forKeys
}

// ResolveName is CEL's.
func (k *keySubject) ResolveName(name string) (any, bool) {
	switch name {
	case "request.headers":
		return present(k.headers), true
	case "request.id":
		return k.headers["x-request-id"], true
	}
	return k.subject.ResolveName(name)
}

// size is the length of the body by its header, which may be absent.
func (s *subject) size() any {
	n, err := strconv.ParseInt(s.Headers["content-length"], 10, 64)
	if err != nil || n < 0 {
		return absent
	}
	return n
}

// How absence works. What is not there is an error of its own kind, which every operator of CEL passes on but for &&, || and ?:, where the
// other operand may decide. So an expression that uses what is absent ends in that error. has(), in and [?...] ask without using,
// and for == and != what is absent is null.

// errAbsent is what is absent. No text of a client's makes an error that is this one.
var errAbsent = errors.New("absent")

// absent is errAbsent as CEL hands it on.
var absent = types.WrapErr(errAbsent)

func isAbsent(v any) bool {
	err, _ := v.(error)
	for ; err != nil; err = errors.Unwrap(err) {
		if err == errAbsent { //nolint:errorlint // CEL's errors are equal to all of the same text, so they are compared one by one
			return true
		}
	}
	return false
}

// present is one of the request's values as expressions see it: in maps an empty or null entry is absent.
func present(v any) ref.Val {
	switch v := types.DefaultTypeAdapter.NativeToValue(v).(type) {
	case presentMap, presentList:
		return v
	case traits.Mapper:
		return presentMap{v}
	case traits.Lister:
		return presentList{v}
	default:
		return v
	}
}

type presentMap struct{ traits.Mapper }

// find is what is under a key, and whether anything is.
func (p presentMap) find(key ref.Val) (ref.Val, bool) {
	v, ok := p.Mapper.Find(key)
	if v != nil && types.IsUnknownOrError(v) || !ok || v == types.NullValue || v == types.String("") {
		return v, false
	}
	return present(v), true
}

// Find is CEL's: what is under a key. Of what is not there CEL would make an error that looks like a mistake's.
func (p presentMap) Find(key ref.Val) (ref.Val, bool) {
	v, ok := p.find(key)
	if !ok && (v == nil || !types.IsUnknownOrError(v)) {
		return absent, false
	}
	return v, ok
}

// Get is CEL's: what is under a key.
func (p presentMap) Get(key ref.Val) ref.Val {
	v, _ := p.Find(key)
	return v
}

// Contains is CEL's `in`.
func (p presentMap) Contains(key ref.Val) ref.Val {
	v, ok := p.find(key)
	if !ok && v != nil && types.IsUnknownOrError(v) {
		return v
	}
	return types.Bool(ok)
}

// keys are those of what is there.
func (p presentMap) keys() traits.Lister {
	var keys []ref.Val
	for i := p.Mapper.Iterator(); i.HasNext() == types.True; {
		key := i.Next()
		if _, ok := p.find(key); ok {
			keys = append(keys, key)
		}
	}
	return types.DefaultTypeAdapter.NativeToValue(keys).(traits.Lister)
}

// Iterator is CEL's: over the keys.
func (p presentMap) Iterator() traits.Iterator { return p.keys().Iterator() }

// Size is CEL's.
func (p presentMap) Size() ref.Val { return p.keys().Size() }

// presentList is a list within a map.
type presentList struct{ traits.Lister }

// Get is CEL's.
func (p presentList) Get(index ref.Val) ref.Val { return present(p.Lister.Get(index)) }

// Iterator is CEL's.
func (p presentList) Iterator() traits.Iterator { return presentIterator{p.Lister.Iterator()} }

type presentIterator struct{ traits.Iterator }

// Next is CEL's.
func (p presentIterator) Next() ref.Val { return present(p.Iterator.Next()) }

// decorator returns a decorator for CEL's planner. asks has the IDs of the has()
// expressions. The program sizes of constant regular expressions are added to
// *instructions.
func decorator(asks map[int64]bool, instructions *int) interpreter.InterpretableDecoratorV2 {
	return func(i interpreter.InterpretableV2) (interpreter.InterpretableV2, error) {
		if _, done := i.(lookup); done {
			return i, nil
		}
		if a, ok := i.(interpreter.InterpretableAttribute); ok {
			return lookup{a, asks[i.ID()]}, nil
		}
		call, ok := i.(interpreter.InterpretableCall)
		if !ok {
			return i, nil
		}
		switch args := call.Args(); call.Function() {
		case operators.Equals, operators.NotEquals:
			return &equality{call, args[0], args[1], call.Function() == operators.NotEquals}, nil
		default:
			return price(call, args, instructions)
		}
	}
}

// lookup is the reading of an attribute, with what is selected of it.
type lookup struct {
	interpreter.InterpretableAttribute
	isHas bool // has(): whether it is there
}

// Exec is CEL's.
func (l lookup) Exec(frame *interpreter.ExecutionFrame) ref.Val {
	v := l.InterpretableAttribute.Exec(frame)
	if !isAbsent(v) || !l.readsAbsent(frame) {
		return v
	}
	if l.isHas {
		return types.False
	}
	for _, q := range l.Attr().(interpreter.NamespacedAttribute).Qualifiers() {
		if q.IsOptional() {
			return types.OptionalNone
		}
	}
	return v
}

// readsAbsent reports whether a lookup that is absent reads what is not there, and does not use something else that is absent: as a key, or
// in what it looks into. The variables in which macros gather their results are no readings, either.
func (l lookup) readsAbsent(vars interpreter.Activation) bool {
	a, ofVariable := l.Attr().(interpreter.NamespacedAttribute)
	if !ofVariable {
		return false
	}
	for _, q := range a.Qualifiers() {
		if key, ok := q.(interpreter.Attribute); ok {
			if v, err := key.Resolve(vars); isAbsent(err) || isAbsent(v) {
				return false
			}
		}
	}
	return len(a.Qualifiers()) > 0 || slices.ContainsFunc(a.CandidateVariableNames(), func(name string) bool {
		_, ok := attributes[name]
		return ok
	})
}

// Eval is CEL's.
func (l lookup) Eval(a interpreter.Activation) ref.Val { return interpreter.EvalActivation(a, l.Exec) }

// equality is == or !=, for which what is read and is absent is null. An operand that uses what is absent is absent, and so is the
// comparison.
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
	charge(frame, e.ID(), equalUnits(left, right))
	return types.Bool((types.Equal(left, right) == types.True) != e.negated)
}

// Eval is CEL's.
func (e *equality) Eval(a interpreter.Activation) ref.Val {
	return interpreter.EvalActivation(a, e.Exec)
}

// nullable is an operand's value, null where it is a reading of what is absent.
func nullable(operand interpreter.InterpretableV2, frame *interpreter.ExecutionFrame) ref.Val {
	v := operand.Exec(frame)
	if l, ok := operand.(lookup); ok && isAbsent(v) && l.readsAbsent(frame) {
		return types.NullValue
	}
	return v
}
