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

// attribute is a name that expressions can use. The names are those of Envoy's
// attributes where Envoy has one.
type attribute struct {
	kind *cel.Type
	// open reports that the value may appear in a key in plain text, as an
	// address or a name may. Other values (headers, claims, context, queries)
	// may be secrets, and are hashed.
	open  bool
	value func(*subject) any
	text  func(*subject) string // value, if kind is StringType; otherwise nil
}

// textAttribute returns an attribute whose value is a string.
func textAttribute(open bool, text func(*subject) string) attribute {
	return attribute{cel.StringType, open, func(s *subject) any { return text(s) }, text}
}

var attributes = map[string]attribute{
	"request.path":        textAttribute(false, func(s *subject) string { return s.Path }), // with its query
	"request.url_path":    textAttribute(true, func(s *subject) string { return s.sent }),
	"request.query":       textAttribute(false, func(s *subject) string { return s.query }),
	"request.host":        textAttribute(true, func(s *subject) string { return s.host() }),
	"request.scheme":      textAttribute(true, func(s *subject) string { return s.Scheme }),
	"request.method":      textAttribute(true, func(s *subject) string { return s.Method }),
	"request.protocol":    textAttribute(true, func(s *subject) string { return s.Protocol }),
	"request.id":          textAttribute(false, func(s *subject) string { return s.Headers["x-request-id"] }),
	"request.size":        {kind: cel.IntType, open: true, value: (*subject).size},
	"request.time":        {kind: cel.TimestampType, open: true, value: func(s *subject) any { return s.Time }},
	"request.headers":     {kind: textMap, value: func(s *subject) any { return present(s.Headers) }},
	requestParams:         {kind: textMap, value: lookUpIn(requestParams)},
	requestCookies:        {kind: textMap, value: lookUpIn(requestCookies)},
	"source.address":      textAttribute(true, func(s *subject) string { return bareAddress(s.Source.Address) }),
	"source.port":         {kind: cel.IntType, open: true, value: func(s *subject) any { return int64(s.Source.Port) }},
	"source.principal":    textAttribute(true, func(s *subject) string { return s.Source.Principal }),
	"destination.address": textAttribute(true, func(s *subject) string { return bareAddress(s.Destination.Address) }),
	"destination.port": {
		kind: cel.IntType, open: true,
		value: func(s *subject) any { return int64(s.Destination.Port) },
	},
	"destination.principal": textAttribute(true, func(s *subject) string { return s.Destination.Principal }),
	filterMetadata: {
		kind:  cel.MapType(cel.StringType, cel.DynType),
		value: func(s *subject) any { return present(s.Metadata) },
	},
	"context":        {kind: textMap, value: func(s *subject) any { return present(s.Context) }},
	"client.ip":      textAttribute(true, (*subject).clientIP),
	"client.network": textAttribute(true, (*subject).clientNetwork),
}

// filterMetadata is the dynamic metadata of Envoy's filters, such as the claims
// of a JWT.
const filterMetadata = "metadata.filter_metadata"

// textMap is a map of strings that can be compared with null: an absent entry
// equals null.
var textMap = cel.MapType(cel.StringType, cel.NullableType(cel.StringType))

// kindsOf returns the types of attributes by their names.
func kindsOf[A interface{ celType() *cel.Type }](attributes map[string]A) map[string]*cel.Type {
	kinds := make(map[string]*cel.Type, len(attributes))
	for name, a := range attributes {
		kinds[name] = a.celType()
	}
	return kinds
}

func (a attribute) celType() *cel.Type { return a.kind }

// ResolveName implements cel.Activation.
func (s *subject) ResolveName(name string) (any, bool) {
	a, ok := attributes[name]
	if !ok {
		return nil, false
	}
	return a.value(s), true
}

// Parent implements cel.Activation.
func (*subject) Parent() cel.Activation { return nil }

// keySubject resolves attributes for the expressions of keys: without the
// headers that were sent more than once.
type keySubject struct {
	*subject
	headers map[string]string
}

// keySubject returns the activation for the expressions of keys.
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

// ResolveName implements cel.Activation.
func (k *keySubject) ResolveName(name string) (any, bool) {
	switch name {
	case "request.headers":
		return present(k.headers), true
	case "request.id":
		return k.headers["x-request-id"], true
	}
	return k.subject.ResolveName(name)
}

// size returns the length of the body as given by content-length, or absent.
func (s *subject) size() any {
	n, err := strconv.ParseInt(s.Headers["content-length"], 10, 64)
	if err != nil || n < 0 {
		return absent
	}
	return n
}

// How absence works: an absent value is a special error. CEL's operators return
// the error of an operand, except &&, || and ?:, for which another operand may
// decide. So an expression that uses an absent value evaluates to that error.
// has(), in and [?...] test for a value without using it, and == and != compare
// an absent value as null.

// errAbsent is the error of absent values. No string from a client can become
// an error that is identical to it.
var errAbsent = errors.New("absent")

// absent is errAbsent as a CEL value.
var absent = types.WrapErr(errAbsent)

func isAbsent(v any) bool {
	err, _ := v.(error)
	for ; err != nil; err = errors.Unwrap(err) {
		if err == errAbsent { //nolint:errorlint // errors.Is takes CEL's errors of the same text for equal
			return true
		}
	}
	return false
}

// present returns a value of the request as expressions see it: empty and null
// entries of its maps are absent.
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

// find returns the entry for a key, and whether there is one.
func (p presentMap) find(key ref.Val) (ref.Val, bool) {
	v, ok := p.Mapper.Find(key)
	if v != nil && types.IsUnknownOrError(v) || !ok || v == types.NullValue || v == types.String("") {
		return v, false
	}
	return present(v), true
}

// Find implements traits.Mapper. For a missing entry CEL would make an error
// that is indistinguishable from a mistake in the expression.
func (p presentMap) Find(key ref.Val) (ref.Val, bool) {
	v, ok := p.find(key)
	if !ok && (v == nil || !types.IsUnknownOrError(v)) {
		return absent, false
	}
	return v, ok
}

// Get implements traits.Mapper.
func (p presentMap) Get(key ref.Val) ref.Val {
	v, _ := p.Find(key)
	return v
}

// Contains implements traits.Container, for CEL's in operator.
func (p presentMap) Contains(key ref.Val) ref.Val {
	v, ok := p.find(key)
	if !ok && v != nil && types.IsUnknownOrError(v) {
		return v
	}
	return types.Bool(ok)
}

// keys returns the keys of the entries that are present.
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

// Iterator implements traits.Iterable. It iterates over the keys.
func (p presentMap) Iterator() traits.Iterator { return p.keys().Iterator() }

// Size implements traits.Sizer.
func (p presentMap) Size() ref.Val { return p.keys().Size() }

// presentList is a list within a value of the request.
type presentList struct{ traits.Lister }

// Get implements traits.Indexer.
func (p presentList) Get(index ref.Val) ref.Val { return present(p.Lister.Get(index)) }

// Iterator implements traits.Iterable.
func (p presentList) Iterator() traits.Iterator { return presentIterator{p.Lister.Iterator()} }

type presentIterator struct{ traits.Iterator }

// Next implements traits.Iterator.
func (p presentIterator) Next() ref.Val { return present(p.Iterator.Next()) }

// decorator returns a decorator for CEL's planner. asks has the IDs of the
// has() expressions. The program sizes of constant regular expressions are
// added to *instructions.
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

// lookup reads an attribute, including the fields and indexes that are selected
// from it.
type lookup struct {
	interpreter.InterpretableAttribute
	isHas bool // has(), which only tests for the value
}

// Exec implements interpreter.InterpretableV2.
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

// readsAbsent reports whether a lookup that evaluated to absent did so because
// the attribute has no such value. It is false if the lookup uses another
// absent value: as a key, or as what is selected from. It is false for the
// variables of macros, too.
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
		_, ofRequest := attributes[name]
		_, ofEnd := endAttributes[name]
		return ofRequest || ofEnd
	})
}

// Eval implements interpreter.Interpretable.
func (l lookup) Eval(a interpreter.Activation) ref.Val { return interpreter.EvalActivation(a, l.Exec) }

// equality is == or !=. An operand that reads an absent value counts as null.
// If an operand uses an absent value, the comparison is absent.
type equality struct {
	interpreter.InterpretableCall
	left, right interpreter.InterpretableV2
	negated     bool
}

// Exec implements interpreter.InterpretableV2.
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

// Eval implements interpreter.Interpretable.
func (e *equality) Eval(a interpreter.Activation) ref.Val {
	return interpreter.EvalActivation(a, e.Exec)
}

// nullable evaluates an operand. It returns null if the operand reads an absent
// value.
func nullable(operand interpreter.InterpretableV2, frame *interpreter.ExecutionFrame) ref.Val {
	v := operand.Exec(frame)
	if l, ok := operand.(lookup); ok && isAbsent(v) && l.readsAbsent(frame) {
		return types.NullValue
	}
	return v
}
