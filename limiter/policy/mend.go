package policy

import (
	"cmp"
	"errors"
	"fmt"
	"math/big"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/goccy/go-yaml/ast"

	"github.com/sluiceproxy/sluice/limiter"
)

// This file has what people write by mistake, and what they should write
// instead. The functions are called once something is known to be wrong.

// whenUsed returns a function that returns the compiled expression. It is compiled
// by the first call: a config without mistakes, which a sidecar holds, needs none.
func whenUsed(expression string) func() *regexp.Regexp {
	return sync.OnceValue(func() *regexp.Regexp { return regexp.MustCompile(expression) })
}

// advice is an error about a value that says what to write instead.
type advice struct {
	what string
	// mend is made of the value; empty if nothing is known to be meant.
	mend string
	want string // in general
}

func (a *advice) Error() string { return a.what + "; " + cmp.Or(a.mend, a.want) }

// wrongError records an error about a value. What it makes of the value is left
// out if that uses environment variables, which may be secrets.
func (r *reader) wrongError(n node, err error) {
	if a, ok := errors.AsType[*advice](err); ok && takesVariables(n) {
		err = &advice{what: a.what, want: a.want}
	}
	r.wrong(n, "%v", err)
}

// misplaced are fields that belong elsewhere, by the field in which they stand:
// the file is "", a limit "limits[]". Each has what to write instead.
var misplaced = map[string]map[string]string{
	"": {
		"redis":       "write store: {redis: {url: ...}}",
		"rate":        "it belongs to a limit; indent it like the limit's name",
		"key":         "it belongs to a limit; indent it like the limit's name",
		"name":        "it belongs to a limit; write limits: [{name: ..., rate: ...}]",
		"rules":       "did you mean limits?",
		"rate_limits": "did you mean limits?",
		"ratelimits":  "did you mean limits?",
		"descriptors": "this is a config of envoyproxy/ratelimit; write limits, as envoy/README.md shows under Migrating",
		"apiVersion":  "this is a Kubernetes manifest; use the text under its data: sluice.yaml instead",
		"include":     "a config is one file; only the limits' overrides_file names others",
		"admin":       "write listen: {admin: ...}",
		"metrics":     "write listen: {metrics: ...}",
		"grpc":        "write listen: {grpc: ...}",
		"tls":         "write listen: {tls: ...} for Envoy's connections, or store: {redis: {tls: ...}}",
	},
	"store": {
		"url":    "write redis: {url: ...}",
		"mode":   "write redis: {mode: ...}",
		"memory": "omit store to keep the buckets in this process",
	},
	"limits[]": {
		"hosts":      "write match: {hosts: ...}",
		"methods":    "write match: {methods: ...}",
		"paths":      "write match: {paths: ...}",
		"path":       "write match: {paths: [...]}",
		"clients":    "write match: {clients: ...}",
		"principals": "write match: {principals: ...}",
		"shadow":     "write mode: shadow",
		"if":         "did you mean when?",
		"id":         "did you mean name?",
		"period":     "the period is part of the rate, as in rate: 10/m",
		"deny":       "write rate: none",
		"block":      "write rate: none",
		"unit":       "the unit is part of the rate, as in rate: 10/m",
		"per":        "the period is part of the rate, as in rate: 10/m",
		"requests":   "write rate: 10/m",
		"limit":      "write rate: 10/m",
		"window":     "write rate: 10/m, or quota: 1000/month for a window of the calendar",
	},
	"limits[].match": {
		"headers": `write when: request.headers["x-name"] == "value" in the limit`,
		"header":  `write when: request.headers["x-name"] == "value" in the limit`,
		"query":   `write when: request.params["name"] == "value" in the limit`,
		"ips":     "did you mean clients?",
	},
	"exempt[]": {
		"hosts":      "write match: {hosts: ...}",
		"methods":    "write match: {methods: ...}",
		"paths":      "write match: {paths: ...}",
		"clients":    "write match: {clients: ...}",
		"principals": "write match: {principals: ...}",
	},
}

var indexes = whenUsed(`\[\d+\]`)

// unknownField says what to write instead of an unknown field of the field in,
// whose fields have these names.
func unknownField(in, name string, fields []string) string {
	if in == "" && !slices.Contains(fields, "limits") {
		in = "limits[]" // of a route
	}
	if mend := misplaced[indexes().ReplaceAllString(in, "[]")][name]; mend != "" {
		return "unknown field; " + mend
	}
	if near := nearest(name, fields); near != "" {
		return fmt.Sprintf("unknown field; did you mean %s?", near)
	}
	return "unknown field; want one of " + strings.Join(fields, ", ")
}

// nearest returns the name that someone who wrote the other one probably meant,
// or "".
func nearest(written string, names []string) string {
	plain := func(s string) string {
		return strings.NewReplacer("_", "", "-", "", " ", "").Replace(strings.ToLower(s))
	}
	best, least := "", 3
	for _, name := range names {
		d := distance(plain(written), plain(name))
		if d < least && d*2 < len(name) {
			best, least = name, d
		}
	}
	return best
}

// distance returns how many letters have to be added, removed or changed to make
// one short text the other.
func distance(a, b string) int {
	if max(len(a), len(b)) > 64 {
		return 64
	}
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		before := row[0]
		row[0] = i + 1
		for j := range len(b) {
			d := before
			if a[i] != b[j] {
				d++
			}
			before = row[j+1]
			row[j+1] = min(d, before+1, row[j]+1)
		}
	}
	return row[len(b)]
}

// mendList says how a value that should be a list is written as one.
func mendList(n node) string {
	s, ok := n.Node.(*ast.StringNode)
	if !ok || len(s.Value) > 100 || strings.ContainsAny(s.Value, "@$\"'\n") {
		return ""
	}
	if strings.ContainsAny(s.Value, "*{}[],:# ") {
		return fmt.Sprintf("; write [%q]", s.Value)
	}
	return fmt.Sprintf("; write [%s]", s.Value)
}

// mendHost says what to write instead of a text that is not a host, or "".
func mendHost(s string) string {
	_, bare, isURL := strings.Cut(s, "://")
	if !isURL {
		bare = s
	}
	bare, _, _ = strings.Cut(bare, "/")
	if name, port, ok := strings.Cut(bare, ":"); ok && isDigits(port) {
		bare = name
	}
	switch {
	case s == "*":
		return "omit hosts for all"
	case bare != s && hostPattern.MatchString(strings.TrimPrefix(bare, "*.")):
		return "write " + bare
	}
	return ""
}

// wrongPath is the error about a text that is not a path.
func wrongPath(s, what string) error {
	const want = "want one such as /v1/orders, /v1/orders/{id}/pay or /v2/**"
	a := &advice{what: what, want: want}
	star := strings.TrimSuffix(s, "*")
	switch {
	case strings.ContainsAny(s, "^$|\\+") || strings.Contains(s, ".*"):
		a.mend = "paths are not regular expressions; " + want
	case strings.HasPrefix(star, "/") && strings.HasSuffix(star, "/") && !strings.ContainsAny(star, "{}*"):
		a.mend = fmt.Sprintf("write %s** for any number of segments, or %[1]s{x} for one", star)
	}
	return a
}

// unknownValue is the error about a value that is none of those that are allowed.
func unknownValue(written string, allowed []string) error {
	synonyms := map[string]string{
		"warning": "warn", "trace": "debug", "fatal": "error", "open": "allow", "fail_open": "allow", "fail-open": "allow",
		"closed": "deny", "fail_closed": "deny", "fail-closed": "deny", "dry-run": "shadow", "dry_run": "shadow",
		"log": "shadow", "report": "shadow", "block": "deny", "ignore": "skip", "x-ratelimit-limit": "x-ratelimit",
		"x-ratelimit-remaining": "x-ratelimit", "x-ratelimit-reset": "x-ratelimit",
	}
	near := nearest(written, allowed)
	if synonym := synonyms[strings.ToLower(written)]; slices.Contains(allowed, synonym) {
		near = synonym
	}
	a := &advice{what: fmt.Sprintf("unknown value %q", written), want: "want one of " + strings.Join(allowed, ", ")}
	if near != "" {
		a.mend = fmt.Sprintf("did you mean %s? (%s)", near, a.want)
	}
	return a
}

// rateUnits are the units that a rate does not have, with the period to write.
// The periods of unitsOfOtherLength differ.
var rateUnits = map[string]string{
	"microsecond": "us", "microseconds": "us", "millisecond": "ms", "milliseconds": "ms", "msec": "ms",
	"sec": "s", "secs": "s", "second": "s", "seconds": "s", "min": "m", "mins": "m", "minute": "m", "minutes": "m",
	"hr": "h", "hrs": "h", "hour": "h", "hours": "h", "day": "d", "days": "d", "w": "7d", "week": "7d", "weeks": "7d",
	"mo": "30d", "mon": "30d", "month": "30d", "months": "30d", "y": "365d", "yr": "365d", "year": "365d", "years": "365d",
}

var (
	// Tokens, k or an exponent, the period's number and its unit.
	writtenRate = whenUsed(`(?i)^([0-9][0-9.,_]*)(k|e[0-9])? *(?:tokens|requests|reqs|req|r|tx)? *` +
		`(?:/|p|per|an|a)? *([0-9.]*) *([a-zµ]*)$`)
	writtenSplit = whenUsed(`^([0-9]+)d([0-9]+)h$`)
)

// mendRate returns what to write instead of a text that is not a rate, or "".
func mendRate(s string) string {
	s = strings.TrimSpace(s)
	switch strings.ToLower(s) {
	case "unlimited", "infinite", "infinity", "inf", "unlimit", "no limit", "-1":
		return "write unlimited"
	case "none", "never", "nothing", "deny", "denied", "block", "blocked", "no", "0":
		return "write none"
	}
	if m := writtenRate().FindStringSubmatch(s); m != nil && m[3] == "" {
		unit := strings.ToLower(m[4])
		tokens, ok := tokensOf(m)
		if known := rateUnits[unit]; ok && (known == "30d" || known == "365d") && tokens.IsInt() && tokens.Num().IsInt64() {
			return fmt.Sprintf("write quota: %s/%s", tokens.Num(), quotaUnits[unit])
		}
	}
	return mendTokensPerPeriod(s)
}

// tokensOf returns the tokens of a match of writtenRate.
func tokensOf(m []string) (*big.Rat, bool) {
	tokens, ok := new(big.Rat).SetString(strings.NewReplacer(",", "", "_", "").Replace(m[1]))
	if !ok {
		return nil, false
	}
	switch zeros := strings.ToLower(m[2]); {
	case zeros == "k":
		tokens.Mul(tokens, big.NewRat(1000, 1))
	case zeros != "":
		for range zeros[1] - '0' {
			tokens.Mul(tokens, big.NewRat(10, 1))
		}
	}
	return tokens, true
}

// mendTokensPerPeriod is mendRate where only tokens/period is of use.
func mendTokensPerPeriod(s string) string {
	s = strings.TrimSpace(s)
	if n, err := strconv.ParseInt(s, 10, 64); err == nil && n > 0 {
		return fmt.Sprintf("a rate needs a period; write %d/s or %[1]d/m", n)
	}
	if before, after, ok := strings.Cut(s, "/"); ok {
		if m := writtenSplit().FindStringSubmatch(strings.TrimSpace(after)); m != nil {
			days, _ := strconv.ParseInt(m[1], 10, 16)
			hours, _ := strconv.ParseInt(m[2], 10, 16)
			return checkedMend("", strings.TrimSpace(before), fmt.Sprintf("%dh", 24*days+hours))
		}
	}
	m := writtenRate().FindStringSubmatch(s)
	if m == nil {
		return ""
	}
	tokens, ok := tokensOf(m)
	if !ok {
		return ""
	}
	unit, note := strings.ToLower(m[4]), ""
	if known := rateUnits[unit]; known != "" {
		switch known {
		case "30d", "365d":
			note = "a rate's longest unit is d, as months and years differ in length; "
		case "7d":
			note = "a rate's longest unit is d; "
		}
		unit = known
	}
	count := big.NewRat(1, 1)
	if m[3] != "" {
		if count, ok = new(big.Rat).SetString(m[3]); !ok {
			return ""
		}
		if unit == "" {
			unit = "s"
		}
	}
	for _, longer := range []string{"7d", "30d", "365d"} {
		if unit == longer {
			days, _ := strconv.ParseInt(strings.TrimSuffix(longer, "d"), 10, 64)
			count.Mul(count, big.NewRat(days, 1))
			unit = "d"
		}
	}
	if unit == "d" && !count.IsInt() {
		count.Mul(count, big.NewRat(24, 1))
		unit = "h"
	}
	// Half a token a second is one token in two.
	if !tokens.IsInt() {
		count.Mul(count, new(big.Rat).SetInt(tokens.Denom()))
		tokens = new(big.Rat).SetInt(tokens.Num())
	}
	if !count.IsInt() {
		return ""
	}
	period := unit
	if n := count.Num(); n.Cmp(big.NewInt(1)) != 0 {
		period = n.String() + unit
	}
	return checkedMend(note, tokens.Num().String(), period)
}

// checkedMend returns that a rate is to be written, if it is one.
func checkedMend(note, tokens, period string) string {
	n, err := strconv.ParseInt(tokens, 10, 64)
	d, periodErr := parsePeriod(period)
	if err != nil || periodErr != nil || d == 0 {
		return ""
	}
	if _, err := limiter.NewBucket(n, d, 1); err != nil {
		return ""
	}
	return fmt.Sprintf("%swrite %s/%s", note, tokens, period)
}

var writtenDuration = whenUsed(`^([0-9.]+) *([A-Za-zµ]*)$`)

// mendDuration returns what to write instead of a text that is not a duration,
// or "". What is to be written is in the range.
func mendDuration(s string, from, to time.Duration) string {
	m := writtenDuration().FindStringSubmatch(strings.TrimSpace(s))
	if m == nil {
		return ""
	}
	units, what := []string{strings.ToLower(m[2])}, ""
	if m[2] == "" {
		units, what = []string{"ms", "s"}, "a duration needs a unit; "
	}
	var all []string
	for _, unit := range units {
		number := m[1]
		if known := rateUnits[unit]; known != "" {
			unit = known
		}
		if days, err := strconv.ParseInt(number, 10, 16); err == nil && unit == "d" {
			number, unit = strconv.FormatInt(24*days, 10), "h"
		}
		if d, err := time.ParseDuration(number + unit); err == nil && d >= from && d <= to {
			all = append(all, number+unit)
		}
	}
	if all == nil {
		return ""
	}
	return what + "write " + strings.Join(all, " or ")
}

// expressionLine matches a line whose value is an expression, which may be quoted
// in messages: it holds no secret, as the key of an override may.
var expressionLine = whenUsed(`^[\s-]*(when|key|cost|settle|rate_from):\s+(.*` + anAttribute + `.*?)\s*$`)

const anAttribute = `\b(?:request|response|source|destination|client|metadata)\.[a-z]`

var (
	indexed     = whenUsed(anAttribute + `[A-Za-z_.]*\["[^"]*"\]`)
	unquotedVar = whenUsed(`\$\{[A-Za-z_][A-Za-z0-9_]*(:-[^}]*)?\}`)
	noSpace     = whenUsed(`^\s*(?:- )?([A-Za-z_]+):\S`)
	noDashSpace = whenUsed(`^\s*-[A-Za-z_]+:`)
	itsValue    = whenUsed(`^[\s-]*[A-Za-z_]+:\s+(.*)$`)
)

// mendSyntax says what to write instead of a line that is not YAML. message is
// the parser's. It quotes nothing that may be a secret.
func mendSyntax(text []byte, line int, message string) string {
	lines := strings.Split(string(text), "\n")
	if line < 1 || line > len(lines) {
		return message
	}
	this, after := strings.TrimRight(lines[line-1], "\r"), ""
	if line < len(lines) {
		after = lines[line]
	}
	value := ""
	if m := itsValue().FindStringSubmatch(this); m != nil {
		value = m[1]
	}
	quoted := func() string { // the expression of this line, in quotes
		m := expressionLine().FindStringSubmatch(this)
		if m == nil {
			return "quote the value"
		}
		if strings.Contains(m[2], "'") {
			return "quote the expression, and write each ' inside it as ''"
		}
		return fmt.Sprintf("quote the expression: %s: '%s'", m[1], m[2])
	}
	switch {
	case strings.Contains(this, "\u00a0"):
		return "a no-break space, which YAML does not accept; replace it by a space"
	case strings.Contains(message, "'\t'"):
		return "a tab; indent with spaces"
	case strings.Contains(message, "must be specified") && indexed().MatchString(this):
		return fmt.Sprintf("inside { } or [ ], an expression with brackets needs quotes; write '%s'",
			indexed().FindString(this))
	case strings.Contains(message, "must be specified") && unquotedVar().MatchString(this):
		name, _, _ := strings.Cut(strings.Trim(unquotedVar().FindString(this), "${}"), ":-")
		return fmt.Sprintf(`inside { } or [ ], a variable needs quotes; write "${%s}"`, name)
	case strings.Contains(message, "must be specified"):
		return "a { or [ is not closed, or a comma is missing; a value with [ ] or { } in it needs quotes"
	case strings.HasPrefix(value, "{{"):
		return "{{ }} is not replaced here; an environment variable is written \"${NAME}\""
	case strings.HasPrefix(value, "@"), strings.HasPrefix(value, "`"), strings.HasPrefix(value, "*"),
		strings.HasPrefix(value, "&"):
		return fmt.Sprintf("a value that begins with %s needs quotes", value[:1])
	case noDashSpace().MatchString(this):
		return "no space after the dash; write - name: ..."
	case noSpace().MatchString(this):
		return fmt.Sprintf("no space after the colon; write %s: ...", noSpace().FindStringSubmatch(this)[1])
	case strings.Contains(message, "map key-value is pre-defined") && strings.IndexAny(value, `"'`) == 0:
		return fmt.Sprintf("the value ends at its closing %s, but more text follows; %s", value[:1], quoted())
	case strings.Contains(message, "end token"):
		return "the bracket that opens here is not closed; add ] or }"
	case strings.HasPrefix(value, "[") && !strings.HasSuffix(value, "]"),
		strings.HasPrefix(value, "{") && !strings.HasSuffix(value, "}"):
		return fmt.Sprintf("a value that begins with %s is a list or a mapping; %s", value[:1], quoted())
	case strings.Contains(message, "mapping value is not allowed") && strings.Contains(value, ": "):
		return `a value with ": " in it needs quotes; ` + quoted()
	case strings.Contains(message, "mapping value is not allowed") && indentOf(after) > indentOf(this):
		return "the next line is indented deeper than this one, as if it were part of its value; align the fields of a limit"
	case strings.Contains(message, "value is not allowed"):
		return "indented unlike the lines above it; align the fields of a limit"
	case strings.Contains(message, "unexpected key name"):
		return fmt.Sprintf("no colon after the field's name; write %s:", firstWord(this))
	case strings.Contains(message, "end character of"):
		return "the quote that opens here is not closed"
	case strings.Contains(message, "header option"):
		return "nothing may follow | or > on its line; quote the value, or begin it on the next line"
	}
	message, _, _ = strings.Cut(message, `"`) // what follows is from the file
	return message
}

// indentOf returns the number of spaces, and of the dashes of lists, before a
// line's text.
func indentOf(line string) int { return len(line) - len(strings.TrimLeft(line, " -")) }

// firstWord returns the field name that a line begins with, or "name".
func firstWord(line string) string {
	if word := regexp.MustCompile(`^[a-z_]+`).FindString(strings.TrimLeft(line, " -")); word != "" {
		return word
	}
	return "name"
}

// mendHeader says what is wrong with the first row of a CSV file of overrides
// whose keys have a number of parts. It quotes no cell, which may be a key.
func mendHeader(row []string, parts int) error {
	want := "key"
	if parts > 1 {
		names := make([]string, parts)
		for i := range names {
			names[i] = fmt.Sprintf("part%d", i+1)
		}
		want = strings.Join(names, ",")
	}
	want += ",rate,burst"
	for _, cell := range row {
		if _, _, err := parseRate(strings.TrimSpace(cell)); err == nil {
			return errors.New("no header row; add one as the first line: " + want)
		}
	}
	for _, separator := range []string{";", "\t", "|"} {
		if len(row) == 1 && strings.Count(row[0], separator) >= parts {
			return fmt.Errorf("columns separated by %q; separate them by commas, as in %s", separator, want)
		}
	}
	all := strings.Join(overrideColumns, ", ")
	if len(row) <= parts {
		return fmt.Errorf("header row of %d columns; want %d for the key's parts, and then some of %s, as in %s", len(row),
			parts, all, want)
	}
	isKnown := func(cell string) bool {
		return slices.Contains(overrideColumns, strings.ToLower(strings.TrimSpace(cell)))
	}
	for i, cell := range row[parts:] {
		switch near := nearest(strings.TrimSpace(cell), overrideColumns); {
		case isKnown(cell):
		case near != "":
			return fmt.Errorf("column %d has an unknown name; did you mean %s?", parts+i+1, near)
		default:
			return fmt.Errorf("column %d has an unknown name; want %d for the key's parts, and then some of %s, as in %s",
				parts+i+1, parts, all, want)
		}
	}
	if i := slices.IndexFunc(row[:parts], isKnown); i >= 0 {
		return fmt.Errorf("column %d is named %s, but must be a part of the key; want a header row such as %s", i+1,
			strings.ToLower(strings.TrimSpace(row[i])), want)
	}
	return fmt.Errorf("no column is named rate, quota or plan; want a header row such as %s", want)
}
