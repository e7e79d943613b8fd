package k8s

import (
	"encoding/json"
	"maps"
	"reflect"
	"slices"
)

// object is a decoded JSON object. Pods are not decoded into structs, which
// would lose the fields that this version does not know.
type object = map[string]any

// objectField returns a field of an object that is itself an object. It returns
// nil, from which fields can be read, if there is no such field.
func objectField(o object, name string) object {
	field, _ := o[name].(object)
	return field
}

// listField returns a copy of a field of an object that is a list, or nil.
func listField(o object, name string) []any {
	list, _ := o[name].([]any)
	return slices.Clone(list)
}

// hasName reports whether a value is an object with this name.
func hasName(v any, name string) bool {
	o, _ := v.(object)
	return o["name"] == name
}

// indexByName returns the index of the first object in list with this name, or
// -1.
func indexByName(list []any, name string) int {
	return slices.IndexFunc(list, func(v any) bool { return hasName(v, name) })
}

// upsert replaces the object in list that has the same name as o, or appends o.
// It leaves an equal one as it is.
func upsert(list []any, o object) []any {
	name, _ := o["name"].(string)
	i := indexByName(list, name)
	if i < 0 {
		return append(list, o)
	}
	if !equalJSON(list[i], o) {
		list[i] = o
	}
	return list
}

// insert appends o to list unless it has an object of the same name.
func insert(list []any, o object) []any {
	if name, _ := o["name"].(string); indexByName(list, name) >= 0 {
		return list
	}
	return append(list, o)
}

// removeByName removes all objects with this name from list.
func removeByName(list []any, name string) []any {
	return slices.DeleteFunc(list, func(v any) bool { return hasName(v, name) })
}

// merged returns a copy of base in which the fields of ours take precedence.
func merged(base, ours object) object {
	out := object{}
	maps.Copy(out, base)
	maps.Copy(out, ours)
	return out
}

// withField returns a copy of o in which a field has another value.
func withField(o object, name string, value any) object {
	return merged(o, object{name: value})
}

// equalJSON reports whether two values have the same JSON encoding. Numbers of
// different Go types are equal if they are written alike.
func equalJSON(a, b any) bool {
	if reflect.DeepEqual(a, b) {
		return true
	}
	x, errX := json.Marshal(a)
	y, errY := json.Marshal(b)
	return errX == nil && errY == nil && string(x) == string(y)
}
