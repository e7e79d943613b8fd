package policy

import (
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"
)

// otherNames are names that expressions do not have, with what to write instead.
var otherNames = map[string]string{
	"request.body": "sluice reads no bodies; use request.size, a header, or settle, which knows the response",
	"body":         "sluice reads no bodies; use request.size, a header, or settle, which knows the response",

	"client": clientMend, "client.address": clientMend, "client_ip": clientMend, "clientip": clientMend, "ip": clientMend,
	"remote_address": clientMend, "remote_addr": clientMend, "request.ip": clientMend, "source.ip": clientMend,
	"request.client_ip": clientMend, "request.remote_address": clientMend,

	"url": pathMend, "uri": pathMend, "path": pathMend, "request.url": pathMend, "request.uri": pathMend,
	"url_path": pathMend,

	"method":            "write request.method",
	"host":              "write request.host",
	"authority":         "write request.host",
	"request.authority": "write request.host",
	"query":             paramMend,
	"params":            paramMend, "request.parameters": paramMend, "request.param": paramMend, "request.args": paramMend,
	"cookies": cookieMend, "cookie": cookieMend, "request.cookie": cookieMend,
	"headers": headerMend, "header": headerMend, "request.header": headerMend, "req.headers": headerMend,
	"http.headers": headerMend,
	"principal":    "write source.principal",
	"user":         "write source.principal, or a claim: " + claimName,
	"jwt":          claimMend, "claims": claimMend, "claim": claimMend, "token": claimMend, "auth.claims": claimMend,
	"metadata": "write metadata.filter_metadata[\"name of the filter\"]; for a claim " + claimName,
}

const (
	clientMend = "for the client's address write client.ip, or client.network, which takes an IPv6 /64 as one client"
	pathMend   = "write request.path, or request.url_path without the query"
	headerMend = `write request.headers["x-name"]`
	paramMend  = `write request.query, or request.params["name"]`
	cookieMend = `write request.cookies["name"]`
	claimName  = `metadata.filter_metadata["envoy.filters.http.jwt_authn"].payload.NAME`
	claimMend  = "for a claim write " + claimName
)

// otherFunctions are functions that CEL does not have, with the one to write.
var otherFunctions = map[string]string{
	"toLowerCase": "lowerAscii()", "toLower": "lowerAscii()", "lower": "lowerAscii()", "tolower": "lowerAscii()",
	"toUpperCase": "upperAscii()", "toUpper": "upperAscii()", "upper": "upperAscii()",
	"length": "size()", "len": "size()", "count": "size()",
	"match": "matches(...)", "regex": "matches(...)", "includes": "contains(...)", "has": "contains(...)",
	"hasPrefix": "startsWith(...)", "hasSuffix": "endsWith(...)", "slice": "substring(...)", "substr": "substring(...)",
	"hash": "nothing: keys from headers are hashed",
}

var (
	dashedName      = whenUsed(`^[A-Za-z0-9]+(-[A-Za-z0-9]+)+$`)
	dashedHeader    = whenUsed(`request\.headers\.([A-Za-z0-9]+(?:-[A-Za-z0-9]+)+)`)
	unquotedHeader  = whenUsed(`request\.headers\[([A-Za-z0-9-]+)\]`)
	calledHeader    = whenUsed(`request\.headers\(["']([A-Za-z0-9-]+)["']\)`)
	formatString    = whenUsed(`%(?:REQ|DYNAMIC_METADATA|DOWNSTREAM_[A-Z_]+)\b\(?:?([A-Za-z0-9-]*)`)
	undeclared      = whenUsed(`^undeclared reference to '([^']*)'(?: \(did you mean '([^']*)'.*)?`)
	dottedName      = whenUsed(`^[A-Za-z_][A-Za-z0-9_.]*`)
	noOverload      = whenUsed(`^found no matching overload for '([^']*)' applied to '([^']*)'`)
	noFields        = whenUsed(`^type '([^']*)' does not support field selection`)
	wrapped         = whenUsed(`wrapper\(([a-z]+)\)`)
	unexpectedToken = whenUsed(`(?:mismatched|extraneous) input '([^']*)'`)
	badToken        = whenUsed(`token recognition error at: '(.*)'$`)
	scalars         = whenUsed(`^\((int|uint|double|string|bool|, )+\)$`)
	numberResults   = whenUsed(`^\(bool, (int, double|double, int)\)$`)
)

// mend returns the errors that CEL found in an expression in words that say what
// to write. Errors that follow from the first are left out.
func (p purpose) mend(text string, found []expressionError) []expressionError {
	whole := func(message string) []expressionError { return []expressionError{{1, 1, message}} }
	switch {
	case strings.TrimSpace(text) == "":
		return whole("empty expression; write one such as client.network, or omit the field")
	case dashedName().MatchString(text):
		return whole(fmt.Sprintf(`%q is not an expression; for the header write request.headers[%q]`, text,
			strings.ToLower(text)))
	case formatString().MatchString(text):
		name := formatString().FindStringSubmatch(text)[1]
		if name == "" {
			name = "x-name"
		}
		return whole(fmt.Sprintf("Envoy's format strings are not expressions; write one such as request.headers[%q]",
			strings.ToLower(name)))
	case strings.ContainsAny(text, "“”‘’"):
		return []expressionError{{found[0].line, found[0].column, `typographic quotes; write " or '`}}
	}
	for _, p := range []*regexp.Regexp{dashedHeader(), unquotedHeader(), calledHeader()} {
		if at := p.FindStringSubmatchIndex(text); at != nil {
			return []expressionError{{1, at[0] + 1,
				fmt.Sprintf("a header's name goes in brackets and quotes; write request.headers[%q]",
					strings.ToLower(text[at[2]:at[3]]))}}
		}
	}
	var mended []expressionError
	for _, e := range found {
		if message, ok := strings.CutPrefix(e.message, "Syntax error: "); ok {
			e.message = mendToken(text, message)
			return []expressionError{e}
		}
		if strings.Contains(e.message, "!error!") && len(found) > 1 {
			continue // another error says why
		}
		e.message = p.mendMessage(text, e)
		mended = append(mended, e)
	}
	return mended
}

// mendToken says what to write instead of a token that the parser did not expect.
func mendToken(text, message string) string {
	if m := badToken().FindStringSubmatch(message); m != nil {
		switch token := strings.TrimSpace(m[1]); {
		case token == "=":
			return "= is not an operator; write =="
		case token == "&" || token == "|":
			return fmt.Sprintf("%s is not an operator; write %[1]s%[1]s", token)
		case strings.HasPrefix(token, "$"):
			return "a name cannot begin with $; write an attribute without it, and an environment variable as ${NAME}"
		case strings.HasPrefix(token, `"`), strings.HasPrefix(token, "'"):
			return "a string is not closed; add its quote, or quote the whole expression if the string has \" #\" in it, " +
				"which begins a comment"
		default:
			return fmt.Sprintf("%q has no meaning in an expression", token)
		}
	}
	words := map[string]string{"and": "&&", "or": "||", "AND": "&&", "OR": "||", "is": "==", "eq": "=="}
	token := ""
	if m := unexpectedToken().FindStringSubmatch(message); m != nil {
		token = m[1]
	}
	switch {
	case words[token] != "":
		return fmt.Sprintf("%s is not an operator; write %s", token, words[token])
	case regexp.MustCompile(`(?i)\bnot\s+`+regexp.QuoteMeta(token)).MatchString(text) && token != "" && token != "<EOF>":
		return "not is not an operator; write !( )"
	case strings.Contains(message, "missing ')'"):
		return "a ( is not closed; add )"
	case strings.Contains(message, "missing ']'"):
		return "a [ is not closed; add ]"
	case token == "<EOF>":
		return "the expression is not complete"
	case token != "":
		return fmt.Sprintf("unexpected %s; an operator such as == or && may be missing before it", token)
	}
	message, _, _ = strings.Cut(message, " expecting ")
	return message
}

// mendMessage says what to write instead of a name or an operation that CEL does
// not know.
func (p purpose) mendMessage(text string, e expressionError) string {
	if m := undeclared().FindStringSubmatch(e.message); m != nil {
		if message := p.explain(e.message); message != e.message {
			return message
		}
		name := m[1]
		if e.line == 1 && e.column > 0 && e.column <= len(text) {
			if longer := dottedName().FindString(text[e.column-1:]); strings.HasPrefix(longer, name+".") {
				name = longer // only its beginning is reported
			}
		}
		for known := name; known != ""; {
			if mend := otherNames[known]; mend != "" {
				return fmt.Sprintf("unknown name %s; %s", name, mend)
			}
			i := strings.LastIndexByte(known, '.')
			known = known[:max(i, 0)]
		}
		if mend := otherFunctions[m[1]]; mend != "" {
			return fmt.Sprintf("unknown function %s; write %s", m[1], mend)
		}
		if m[2] != "" {
			return fmt.Sprintf("unknown name %s; did you mean %s?", name, m[2])
		}
		return fmt.Sprintf("unknown name %s; want a function of CEL or one of %s", name, strings.Join(p.names(), ", "))
	}
	if m := noFields().FindStringSubmatch(e.message); m != nil {
		return fmt.Sprintf(`a value of type %s has no fields; a name with a dot needs brackets, as in request.headers["a.b"]`,
			wrapped().ReplaceAllString(m[1], "$1"))
	}
	if m := noOverload().FindStringSubmatch(e.message); m != nil {
		operator, operands := strings.Trim(m[1], "_"), wrapped().ReplaceAllString(m[2], "$1")
		switch {
		case operator == "?_:" && numberResults().MatchString(operands):
			return "both results of ?: must have one type, not int and double; write 1.0 for 1"
		case operator == "?_:":
			return fmt.Sprintf("?: does not take %s; want a boolean before ?, and two results of one type", operands)
		case strings.HasPrefix(operands, "(") && regexp.MustCompile(`^[^a-z]+$`).MatchString(operator):
			message := fmt.Sprintf("%s does not take %s; both sides must have the same type", operator, operands)
			if scalars().MatchString(operands) {
				message += ": write int(...) or string(...) around one"
			}
			return message
		}
		return fmt.Sprintf("%s does not take %s", operator, operands)
	}
	return e.message
}

// names returns the attributes that expressions for the purpose can use.
func (p purpose) names() []string {
	if p == forSettle {
		return slices.Sorted(maps.Keys(endAttributes))
	}
	return slices.Sorted(maps.Keys(attributes))
}

// convert says how a value of another type becomes one that the purpose accepts.
func (p purpose) convert(text string) string {
	switch {
	case len(text) > 80 || strings.ContainsAny(text, " \n"): // more than a name
		return ""
	case p == forWhen:
		return fmt.Sprintf(`; compare it, as in %s == "value"`, text)
	case p.isNumber():
		return fmt.Sprintf("; write int(%s)", text)
	}
	return ""
}

// example returns an expression for the purpose.
func (p purpose) example() string {
	switch p {
	case forKey:
		return `request.headers["x-api-key"]`
	case forWhen:
		return `request.method == "POST"`
	case forRate:
		return strings.Replace(claimName, "NAME", "rate", 1)
	case forSettle:
		return "response.code"
	case forCost:
	}
	return "request.size"
}
