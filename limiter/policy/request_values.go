package policy

import (
	"strings"

	"cel.dev/cel-go/common/ast"
	"cel.dev/cel-go/common/types"
	"cel.dev/cel-go/common/types/ref"
	"cel.dev/cel-go/common/types/traits"
)

// The attributes whose entries are looked up in a text of the request.
const (
	requestParams  = "request.params"
	requestCookies = "request.cookies"
)

// maxLookup is the maximum length in bytes of a query, or of a Cookie header, in
// which values are looked up; in a longer one all are absent. It exceeds Envoy's
// default for all headers of a request, 60 KiB.
const maxLookup = 64 << 10

// maxRemembered is how many values a subject remembers, so that many limits by
// the same value look it up once.
const maxRemembered = 8

// found is the result of a lookup.
type found struct {
	attribute, name string
	value           string // empty: absent
	differ          bool   // several values differ, so that the value is absent
}

// lookUp returns the entry of request.params or request.cookies with a name.
func (s *subject) lookUp(attribute, name string) found {
	for i := range s.found {
		if f := &s.found[i]; f.attribute == attribute && f.name == name {
			return *f
		}
	}
	f := found{attribute: attribute, name: name}
	if attribute == requestParams {
		f.value, f.differ = findParam(s.query, name)
	} else {
		f.value, f.differ = findCookie(s.Headers["cookie"], name)
	}
	if len(s.found) < maxRemembered {
		s.found = append(s.found, f)
	}
	return f
}

// findParam returns the decoded value of a parameter of a query. If the query has
// it more than once, with values that differ, the value is empty and differ is
// set. Names are compared decoded, as the upstream reads them.
func findParam(query, name string) (value string, differ bool) {
	if len(query) > maxLookup {
		return "", false
	}
	var seen agreed
	for query != "" {
		var pair string
		pair, query, _ = strings.Cut(query, "&")
		n, v, _ := strings.Cut(pair, "=")
		if len(n) >= len(name) && unescape(n, true) == name {
			seen.add(unescape(v, true))
		}
	}
	return seen.result()
}

// findCookie is findParam for a Cookie header. A value is decoded from
// percent-encoding and its double quotes are removed; names are as sent.
func findCookie(header, name string) (value string, differ bool) {
	if len(header) > maxLookup {
		return "", false
	}
	var seen agreed
	for header != "" {
		var pair string
		pair, header, _ = strings.Cut(header, ";")
		n, v, hasValue := strings.Cut(pair, "=")
		if !hasValue || strings.Trim(n, " \t") != name {
			continue
		}
		v = strings.Trim(v, " \t")
		if len(v) >= 2 && v[0] == '"' && v[len(v)-1] == '"' {
			v = v[1 : len(v)-1]
		}
		seen.add(unescape(v, false))
	}
	return seen.result()
}

// agreed is the one value of an entry, however often a request has it.
type agreed struct {
	value           string
	isFound, differ bool
}

func (a *agreed) add(value string) {
	a.differ = a.differ || a.isFound && value != a.value
	a.value, a.isFound = value, true
}

// result returns the value, and "" if there is none or if several differ.
func (a *agreed) result() (value string, differ bool) {
	if a.differ {
		return "", true
	}
	return a.value, false
}

// unescape decodes percent-encoding and, in forms, + as a space. What is not
// valid percent-encoding stays as it is, as browsers and servers read it.
func unescape(s string, isForm bool) string {
	if strings.IndexByte(s, '%') < 0 && (!isForm || strings.IndexByte(s, '+') < 0) {
		return s
	}
	b := make([]byte, 0, len(s))
	for i := 0; i < len(s); i++ {
		c := s[i]
		switch {
		case c == '+' && isForm:
			c = ' '
		case c == '%' && i+2 < len(s):
			if hi, lo := unhex(s[i+1]), unhex(s[i+2]); hi >= 0 && lo >= 0 {
				c = byte(hi<<4 | lo)
				i += 2
			}
		}
		b = append(b, c)
	}
	return string(b)
}

// values is request.params or request.cookies, as CEL sees it. Only entries with
// constant names are used of it (checkLookups), so it is never read as a whole.
type values struct {
	traits.Mapper // empty
	subject       *subject
	attribute     string
}

// emptyMap stands for the whole of values.
var emptyMap = types.NewStringStringMap(types.DefaultTypeAdapter, nil)

// lookUpIn returns the function that returns an attribute's values.
func lookUpIn(attribute string) func(*subject) any {
	return func(s *subject) any { return presentMap{values{emptyMap, s, attribute}} }
}

// Find implements traits.Mapper.
func (v values) Find(key ref.Val) (ref.Val, bool) {
	name, ok := key.(types.String)
	if !ok {
		return nil, false
	}
	text := v.subject.lookUp(v.attribute, string(name)).value
	return types.String(text), text != ""
}

// checkLookups reports uses of request.params and request.cookies without a
// constant name. So what an expression reads of them is known, and costs one
// pass over the query or the header.
func checkLookups(tree *ast.AST) (mistakes []expressionError) {
	named := make(map[int64]bool) // the uses that name an entry, by the ID of the map's expression
	ast.PreOrderVisit(tree.Expr(), ast.NewExprVisitor(func(e ast.Expr) {
		for _, of := range []string{requestParams, requestCookies} {
			if _, ok := nameIn(tree, e, of); ok {
				for _, part := range partsOf(e) {
					named[part.ID()] = true
				}
			}
		}
	}))
	ast.PreOrderVisit(tree.Expr(), ast.NewExprVisitor(func(e ast.Expr) {
		r := tree.ReferenceMap()[e.ID()]
		if r == nil || named[e.ID()] || r.Name != requestParams && r.Name != requestCookies {
			return
		}
		at := tree.SourceInfo().GetStartLocation(e.ID())
		mistakes = append(mistakes, expressionError{at.Line(), at.Column() + 1,
			r.Name + ` must be used with a constant name, as in ` + r.Name + `["name"]`})
	}))
	return mistakes
}
