package policy

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	"cel.dev/cel-go/cel"
	"cel.dev/cel-go/common/decls"
	"cel.dev/cel-go/common/operators"
	"cel.dev/cel-go/common/types"
)

// These tests check that a request which omits something is never granted more
// than one that has it. Let r() be a request that omits a header, a claim, an
// entry of the context, or content-length, and r(v) the same request with the
// value v there. A request that reveals a config mistake is refused, so it is
// granted nothing and left out below. For every expression that uses the
// omitted value:
//
//   - A limit outside groups charges r() if it charges any r(v).
//   - In a group, a limit that is not the last applies to r() only if it
//     applies to every r(v). Otherwise the limits after it charge r().
//   - An unlimited limit applies to r() only if it applies to every r(v).
//   - A key charges r() in the bucket of absent keys, which no value can name,
//     or in the one bucket that every r(v) draws from.
//   - A cost is 1 for r(), or the cost that every r(v) has.
//
// An expression may also test for the omitted value without using it: by ==,
// !=, has(), in, [?...] or by iterating over the map. Then it defines itself
// what r() gets: its value for a map without the entry, and for null with ==
// and !=. See TestAbsenceAskedFor.
//
// The expressions are generated from the functions, operators and macros that
// the environment declares, with what may be omitted at each position of their
// arguments. So a new function, or one that takes a new type, fails the test
// until it is covered.

// source is something that a request may omit.
type source struct {
	attribute string   // the name in attributes that it belongs to
	read      string   // an expression that reads it
	kind      string   // type of read: string, int or dyn
	present   []string // requests with it
	missing   []string // requests without it, in every way to omit it
}

var sources = func() []source {
	texts := []string{"1", "0", "7", "a", "zz", "true", "false", "2s", "2009-02-13T23:31:30Z", "a,b", "%25s", "UTC",
		"b"}
	with := func(format string, values ...string) (requests []string) {
		for _, v := range values {
			requests = append(requests, fmt.Sprintf(format, v))
		}
		return requests
	}
	claims := []string{`"1"`, `"a"`, `"zz"`, `"true"`, `"2s"`, `"2009-02-13T23:31:30Z"`, `"UTC"`, "true", "false", "0",
		"1", "7.5", `["a"]`, `["a","b"]`, `[]`, `[true]`, `{"a":"b"}`, `{}`}
	return []source{
		{"request.headers", `request.headers["x"]`, "string", with("GET h/ with x=%s", texts...),
			[]string{"GET h/", "GET h/ with x=", "GET h/ with y=1"}},
		{requestParams, `request.params["x"]`, "string", with("GET h/?x=%s", texts...),
			[]string{"GET h/", "GET h/?x=", "GET h/?y=1", "GET h/?x=1&x=2"}},
		{requestCookies, `request.cookies["x"]`, "string", with("GET h/ with cookie=x=%s", texts...),
			[]string{"GET h/", "GET h/ with cookie=x=", "GET h/ with cookie=y=1", "GET h/ with cookie=x=1;x=2"}},
		{"context", `context["x"]`, "string",
			with("GET h/ context x=%s",
				slices.DeleteFunc(slices.Clone(texts), func(s string) bool { return s == "%25s" })...),
			[]string{"GET h/", "GET h/ context x=", "GET h/ context y=1"}},
		{filterMetadata, "metadata.filter_metadata.jwt.payload.x", "dyn", with("GET h/ claim x=%s", claims...),
			[]string{"GET h/", `GET h/ claim x=""`, "GET h/ claim x=null", "GET h/ claim y=1"}},
		{"request.size", "request.size", "int", with("POST h/ with content-length=%s", "0", "1", "7", "1000"),
			[]string{"POST h/", "POST h/ with content-length=", "POST h/ with content-length=-1",
				"POST h/ with content-length=x"}},
	}
}()

// as returns expressions that make a value of type t from what is read, the
// simplest first. It returns none if the test does not know the type.
func (s source) as(t *cel.Type) []string {
	text := s.read
	if s.kind != "string" {
		text = "string(" + s.read + ")"
	}
	var ways []string
	if s.kind == "dyn" || s.kind == t.String() || t.Kind() == types.TypeParamKind || t.Kind() == types.DynKind {
		ways = append(ways, s.read)
	}
	switch t.Kind() {
	case types.StringKind:
		if ways = append(ways, text); s.kind == "int" {
			ways = append(ways, `("0" + `+text+` + ":00")`, `("200" + `+text+` + "-02-13T23:31:30Z")`)
		}
	case types.BoolKind:
		ways = append(ways, "bool("+text+")", "("+text+` < "7")`)
	case types.IntKind, types.UintKind, types.DoubleKind, types.BytesKind:
		ways = append(ways, t.String()+"("+text+")")
	case types.DurationKind:
		ways = append(ways, "duration("+text+")", "duration("+text+` + "s")`)
	case types.TimestampKind:
		ways = append(ways, "timestamp("+text+")", "timestamp(int("+text+"))")
	case types.ListKind:
		for _, element := range s.as(t.Parameters()[0]) {
			ways = append(ways, "["+element+"]")
		}
		ways = append(ways, text+`.split(",")`)
	case types.MapKind:
		ways = append(ways, "{"+text+": 1}", `{"a": `+s.read+"}")
		if s.kind == "int" {
			ways = append(ways, "{"+s.read+": 1}", "{1: "+s.read+"}")
		}
	case types.OpaqueKind:
		if t.TypeName() == "optional_type" {
			for _, value := range s.as(t.Parameters()[0]) {
				ways = append(ways, "optional.of("+value+")")
			}
		}
	}
	return ways
}

// constants returns values of a type, as other arguments of a call.
func (s source) constants(t *cel.Type) []string {
	switch t.Kind() {
	case types.StringKind:
		return []string{`"a"`, `"UTC"`, `"%s"`, `"1"`}
	case types.TypeParamKind, types.DynKind:
		if s.kind == "int" {
			return []string{"1", "7"}
		}
		return []string{`"a"`, "true"}
	case types.BoolKind:
		return []string{"true", "false"}
	case types.IntKind:
		return []string{"0", "1", "dyn(1)"} // dyn, because CEL's check does not compare int with double
	case types.UintKind:
		return []string{"1u", "dyn(1u)"}
	case types.DoubleKind:
		return []string{"1.5", "dyn(1.5)"}
	case types.BytesKind:
		return []string{`b"a"`}
	case types.DurationKind:
		return []string{`duration("1s")`}
	case types.TimestampKind:
		return []string{`timestamp("2009-02-13T23:31:30Z")`}
	case types.ListKind:
		var lists []string
		for _, element := range s.constants(t.Parameters()[0]) {
			lists = append(lists, "["+element+", "+element+"]")
		}
		return lists
	case types.MapKind:
		if s.kind == "int" {
			return []string{"{1: 1}", "{7: 1}"}
		}
		return []string{`{"a": 1}`}
	case types.OpaqueKind:
		if t.TypeName() == "optional_type" {
			var values []string
			for _, value := range s.constants(t.Parameters()[0]) {
				values = append(values, "optional.of("+value+")")
			}
			return append(values, "optional.none()")
		}
	}
	return nil
}

// call writes a call of a function, or an operator.
func call(function string, isMember bool, args []string) string {
	switch function {
	case operators.Conditional:
		return fmt.Sprintf("(%s ? %s : %s)", args[0], args[1], args[2])
	case operators.Index:
		return fmt.Sprintf("%s[%s]", args[0], args[1])
	case operators.OptIndex:
		return fmt.Sprintf("%s[?%s]", args[0], args[1])
	case operators.OptSelect:
		return args[0] + ".?a"
	case operators.In, operators.OldIn, "in":
		return fmt.Sprintf("(%s in %s)", args[0], args[1])
	case operators.LogicalNot:
		return "(!" + args[0] + ")"
	case operators.Negate:
		return "(-(" + args[0] + "))"
	}
	if symbol, ok := operators.FindReverseBinaryOperator(function); ok {
		return fmt.Sprintf("(%s %s %s)", args[0], symbol, args[1])
	}
	if isMember {
		return fmt.Sprintf("%s.%s(%s)", args[0], function, strings.Join(args[1:], ", "))
	}
	return fmt.Sprintf("%s(%s)", function, strings.Join(args, ", "))
}

// within are the functions that only macros use. TestAbsence tries the macros.
var within = []string{operators.NotStrictlyFalse, "__not_strictly_false__"} // and its former name

// combinations returns the lists with one element of each of choices, or the
// first few hundred of them.
func combinations(choices [][]string) [][]string {
	all := [][]string{nil}
	for _, these := range choices {
		var longer [][]string
		for _, list := range all {
			for _, one := range these {
				longer = append(longer, append(slices.Clone(list), one))
			}
		}
		all = longer
	}
	return all
}

// ofOverload returns expressions that call an overload with what is read as
// argument at.
func (s source) ofOverload(name string, o *decls.OverloadDecl, at int) (expressions []string) {
	choices := make([][]string, len(o.ArgTypes()))
	for i, t := range o.ArgTypes() {
		if name == operators.OptSelect {
			t = cel.MapType(cel.StringType, cel.DynType)
		}
		if choices[i] = s.constants(t); i == at {
			choices[i] = s.as(t)
			if i == 0 && (name == operators.OptSelect || name == operators.OptIndex) {
				// would test for the value
				choices[i] = slices.DeleteFunc(choices[i],
					func(way string) bool { return way == s.read || way == "optional.of("+s.read+")" })
			}
		}
	}
	for _, args := range combinations(choices) {
		expressions = append(expressions, call(name, o.IsMemberFunction(), args))
	}
	return expressions
}

// ofMacro returns expressions that apply a macro to what is read.
// TestAbsenceAskedFor has those for has().
func (s source) ofMacro(key string) []string {
	text := s.read
	if s.kind != "string" {
		text = "string(" + s.read + ")"
	}
	list, optional := text+`.split("")`, "optional.of("+text+")"
	bodies := func(format string) []string {
		return []string{
			fmt.Sprintf(format, list, `e < "m"`), fmt.Sprintf(format, `["a", "z"]`, "e < "+text), fmt.Sprintf(format,
				"{"+text+": 1}", `e < "m"`),
			fmt.Sprintf(format, `["a", "z"]`, text+".startsWith(e)"),
		}
	}
	return map[string][]string{
		"has:1:false":       {"has({" + text + `: "b"}.a)`, "has({\"a\": " + text + "}.a)"},
		"all:2:true":        bodies("%s.all(e, %s)"),
		"exists:2:true":     bodies("%s.exists(e, %s)"),
		"exists_one:2:true": bodies("%s.exists_one(e, %s)"),
		"map:2:true":        bodies("%s.map(e, %s)"),
		"map:3:true":        append(bodies("%s.map(e, %s, e)"), `["a", "z"].map(e, true, e + `+text+")"),
		"filter:2:true":     bodies("%s.filter(e, %s)"),
		"optMap:2:true":     {optional + `.optMap(e, e + "x")`, `optional.of("a").optMap(e, e + ` + text + ")"},
		"optFlatMap:2:true": {optional + ".optFlatMap(e, optional.of(e))",
			`optional.of("a").optFlatMap(e, optional.of(` + text + "))"},
	}[key]
}

// condition makes a boolean of a value of type t. ok is false if the test does
// not know the type.
func condition(value string, t *cel.Type) (text string, ok bool) {
	format := map[types.Kind]string{
		types.BoolKind: "%s", types.StringKind: `%s < "m"`, types.IntKind: "%s > 1", types.UintKind: "%s > 1u",
		types.DoubleKind: "%s > 1.0", types.BytesKind: "size(%s) > 1",
		types.DurationKind: `%s > duration("1s")`, types.TimestampKind: `%s > timestamp("2009-02-13T23:31:30Z")`,
		types.ListKind: "size(%s) > 1", types.MapKind: "size(%s) > 1",
		types.DynKind: `string(%s) < "m"`, types.TypeParamKind: `string(%s) < "m"`, types.TypeKind: "%s != bool",
		types.NullTypeKind: "%s != null", types.OpaqueKind: `string(%s.value()) < "m"`,
	}[t.Kind()]
	return fmt.Sprintf(format, value), format != ""
}

// absenceConfig returns a config that uses a condition in every place.
func absenceConfig(condition string) string {
	quoted := "'" + strings.ReplaceAll(condition, "'", "''") + "'"
	choice := "'(" + strings.ReplaceAll(condition, "'", "''") + ") ? "
	key, cost := choice+`"p" : "q"'`, choice+"3 : 5'"
	return `
limits:
  - {name: alone, rate: 99/s, when: ` + quoted + `}
  - {name: first, rate: 99/s, group: g, when: ` + quoted + `}
  - {name: rest, rate: 9/s, group: g}
  - {name: free, rate: unlimited, group: h, when: ` + quoted + `}
  - {name: paid, rate: 9/s, group: h}
  - {name: open, rate: unlimited, when: ` + quoted + `}
  - {name: keyed, rate: 99/s, key: ` + key + `}
  - {name: shared, rate: 99/s, absent: share, key: ` + key + `}
  - {name: priced, rate: 99/s, cost: ` + cost + `}
`
}

// owed returns what a request draws from each limit: its key and cost. ok is
// false if the request reveals a mistake.
func owed(t *testing.T, c *Config, line string) (owed map[string]string, ok bool) {
	t.Helper()
	d := c.Draw(request(t, line))
	owed = make(map[string]string)
	for _, l := range d.Unlimited {
		owed[l.Name] = "unlimited"
	}
	for _, charge := range d.Charges {
		owed[charge.Limit.Name] = fmt.Sprint(charge.Key, " ", charge.Cost)
	}
	return owed, !d.Invalid
}

// checkAbsence checks an expression against the rules above. It reports false
// if every request with a value reveals a mistake, so that the expression shows
// nothing.
func (s source) checkAbsence(t *testing.T, condition string) (shows bool) {
	t.Helper()
	c, err := Parse("test.yaml", []byte(absenceConfig(condition)), env())
	if err != nil {
		return false // it does not compile, or is a constant that fails
	}
	var present []map[string]string
	for _, line := range s.present {
		if with, ok := owed(t, c, line); ok {
			present = append(present, with)
		}
	}
	if len(present) == 0 {
		return false
	}
	every := func(name, is string) bool {
		return !slices.ContainsFunc(present, func(with map[string]string) bool { return with[name] != is })
	}
	none := func(name string) bool { return every(name, "") }
	var before map[string]string
	for i, line := range s.missing {
		without, ok := owed(t, c, line)
		if !ok {
			t.Errorf("%s\n%s: a mistake: %v", condition, line, c.Draw(request(t, line)).Mistakes)
			continue
		}
		if i > 0 && !maps.Equal(without, before) {
			t.Errorf("%s\n%s owes %v\n%s owes %v", condition, s.missing[0], before, line, without)
		}
		before = without
		wrong := func(what string) {
			t.Errorf("%s\n%s: %s: %v\nwith it %v", condition, line, what, without, present)
		}
		if without["alone"] == "" && !none("alone") {
			wrong("slips past a limit")
		}
		if (without["first"] == "") == (without["rest"] == "") || without["first"] != "" &&
			slices.ContainsFunc(present, func(p map[string]string) bool { return p["first"] == "" }) {
			wrong("takes the first place in a group")
		}
		if without["free"] != "" && !every("free", "unlimited") || without["free"] == "" && without["paid"] == "" {
			wrong("is unlimited in a group")
		}
		if without["open"] != "" && !every("open", "unlimited") {
			wrong("is unlimited")
		}
		for _, name := range []string{"keyed", "shared"} {
			if !strings.Contains(without[name], "{"+string(tagAbsent)) && !every(name, without[name]) ||
				without[name] == "" {
				wrong(name + ": draws from another's bucket")
			}
		}
		if cost := without["priced"]; !strings.HasSuffix(cost, " 1") && !every("priced", cost) {
			wrong("has another cost")
		}
	}
	return true
}

func TestAbsence(t *testing.T) {
	e, err := checkEnvironment()
	if err != nil {
		t.Fatal(err)
	}
	for name, a := range attributes {
		if a.kind.Kind() == types.MapKind &&
			!slices.ContainsFunc(sources, func(s source) bool { return s.attribute == name }) {
			t.Errorf("%s may be left out in part, and is none of the sources", name)
		}
	}
	checked, asked := 0, 0
	// try checks the first of some expressions that shows anything.
	try := func(s source, what string, expressions []string) {
		t.Helper()
		if asked++; asked%absenceStep != 0 {
			return
		}
		for _, text := range expressions {
			ast, issues := e.Compile(text)
			if issues.Err() != nil {
				continue
			}
			cond, ok := condition(text, ast.OutputType())
			if !ok {
				t.Errorf("%s: %s is of the type %v, of which the test makes no condition", what, text, ast.OutputType())
				continue
			}
			if s.checkAbsence(t, cond) {
				checked++
				return
			}
		}
		t.Errorf("%s, with %s: none of these shows anything; teach the test about it: %q", what, s.read,
			expressions[:min(len(expressions), 5)])
	}
	functions := e.Functions()
	for _, name := range slices.Sorted(maps.Keys(functions)) {
		if slices.Contains(within, name) {
			continue
		}
		for _, o := range functions[name].OverloadDecls() {
			for at := range o.ArgTypes() {
				if name == operators.OptSelect && at == 1 {
					continue // not an expression by itself
				}
				for _, s := range sources {
					if name == operators.Equals || name == operators.NotEquals {
						s.read, s.kind = strings.Join(s.as(types.StringType)[:1], ""), "string"
						s.read = "(" + s.read + ` + "")` // uses the value instead of reading it
					}
					try(s, fmt.Sprintf("%s %s, argument %d", name, o.ID(), at), s.ofOverload(name, o, at))
				}
			}
		}
	}
	for _, m := range e.Macros() {
		for _, s := range sources {
			expressions := s.ofMacro(m.MacroKey())
			if len(expressions) == 0 {
				t.Errorf("the macro %s is not covered", m.MacroKey())
			}
			for _, text := range expressions {
				try(s, m.MacroKey(), []string{text})
			}
		}
	}
	if checked < 1000/absenceStep {
		t.Errorf("only %d expressions were checked", checked)
	}
	t.Logf("%d expressions", checked)
}

// TestAbsenceAskedFor checks that expressions which test for an absent value
// have a result, and that others which use the test's operand are absent.
func TestAbsenceAskedFor(t *testing.T) {
	for condition, want := range map[string]string{
		`request.headers["x"] == "a"`:                                    "false",
		`request.headers["x"] != "a"`:                                    "true",
		`request.headers["x"] == null`:                                   "true",
		`null != request.headers.x`:                                      "false",
		`request.headers["x"] == request.headers["z"]`:                   "true",
		`has(request.headers.x)`:                                         "false",
		`!has(request.headers.x)`:                                        "true",
		`"x" in request.headers`:                                         "false",
		`request.headers[?"x"].hasValue()`:                               "false",
		`request.headers.?x.orValue("b") == "b"`:                         "true",
		`request.headers.exists(k, k == "x")`:                            "false",
		`request.headers.all(k, k != "x")`:                               "true",
		`request.headers.filter(k, k == "x").size() > 0`:                 "false",
		`request.params["x"] == "a"`:                                     "false",
		`has(request.params.x)`:                                          "false",
		`"x" in request.cookies`:                                         "false",
		`request.cookies[?"x"].hasValue()`:                               "false",
		`request.cookies["x"] != "a"`:                                    "true",
		`context["x"] == "a"`:                                            "false",
		`has(context.x)`:                                                 "false",
		`metadata.filter_metadata.jwt.payload.x == true`:                 "false",
		`has(metadata.filter_metadata.jwt.payload.x)`:                    "false",
		`has(metadata.filter_metadata.jwt.payload.x.y)`:                  "false",
		`metadata.filter_metadata.?jwt.payload.?x.orValue(7) == 7`:       "true",
		`request.size == 7`:                                              "false",
		`request.size != 7`:                                              "true",
		`request.headers["x"].lowerAscii() == "a"`:                       "absent",
		`request.headers[?"x"].orValue(context["x"]) == "b"`:             "absent",
		`context[request.headers["x"]] == "a"`:                           "absent",
		`context[request.headers["x"]] != "a"`:                           "absent",
		`context[request.headers["x"].lowerAscii()] != "a"`:              "absent",
		`metadata.filter_metadata[request.headers["x"]] == null`:         "absent",
		`has(metadata.filter_metadata[request.headers["x"]].y)`:          "absent",
		`metadata.filter_metadata[?request.headers["x"]].hasValue()`:     "absent",
		`request.headers["x"] in context`:                                "absent",
		`has({"y": request.headers["x"]}.y)`:                             "absent",
		`["a", "b"].exists_one(e, e < request.headers["x"])`:             "absent",
		`["a", "b"].map(e, e + request.headers["x"]) == ["ac"]`:          "absent",
		`["a", "b"].filter(e, e < request.headers["x"]) != ["a"]`:        "absent",
		`["a", "b"].exists(e, e == "a" || request.headers["x"] == "on")`: "true",
	} {
		c := parse(t, absenceConfig(condition))
		for _, line := range []string{"GET h/", "GET h/ with x= context x= claim x=null"} {
			owes, ok := owed(t, c, line)
			alone, first, open := owes["alone"] != "", owes["first"] != "", owes["open"] != ""
			got := "wrong"
			switch {
			case ok && alone && first && open:
				got = "true"
			case ok && !alone && !first && !open:
				got = "false"
			case ok && alone && !first && !open && strings.HasSuffix(owes["priced"], " 1") &&
				strings.Contains(owes["keyed"], "~"):
				got = "absent"
			}
			if got != want {
				t.Errorf("%s\n%s: %s, want %s: %v", condition, line, got, want, owes)
			}
		}
	}
}
