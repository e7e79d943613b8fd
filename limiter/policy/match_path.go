package policy

import (
	"fmt"
	"strings"
	"unicode"
	"unicode/utf8"
)

// pathPattern is a path of a match: literal segments, {x} for any one segment, and ** at the end for all that follows,
// nothing included.
type pathPattern struct {
	segments []string // "" is any one segment: a literal one is never empty
	rest     bool     // **
}

func parsePath(s string) (pathPattern, error) {
	const want = "want one such as /v1/orders, /v1/orders/{id}/pay or /v2/**"
	if !strings.HasPrefix(s, "/") {
		return pathPattern{}, fmt.Errorf("path %q does not begin with /; %s", s, want)
	}
	if strings.ContainsAny(s, "?#") {
		return pathPattern{}, fmt.Errorf("path %q has a query or fragment, which is never matched; %s", s, want)
	}
	var p pathPattern
	body := strings.TrimPrefix(s, "/")
	if rest, ok := strings.CutSuffix("/"+body, "/**"); ok {
		p.rest, body = true, strings.TrimPrefix(rest, "/")
	}
	if body == "" {
		return p, nil
	}
	for segment := range strings.SplitSeq(body, "/") {
		switch {
		case strings.HasPrefix(segment, "{") && strings.HasSuffix(segment, "}") && len(segment) > 2 && !strings.ContainsAny(segment[1:len(segment)-1], "{}*"):
			p.segments = append(p.segments, "")
		case strings.ContainsAny(segment, "{}*"):
			return pathPattern{}, fmt.Errorf("path %q: segment %q is not a literal, {x}, or ** at the end; %s", s, segment, want)
		case segment == "" || "/"+segment != normalizePath("/"+segment):
			return pathPattern{}, fmt.Errorf("path %q is not in normal form, in which requests are matched; write %q", s, normalizePath(s))
		default:
			p.segments = append(p.segments, segment)
		}
	}
	return p, nil
}

// folded is the pattern for paths without case.
func (p pathPattern) folded() pathPattern {
	f := pathPattern{rest: p.rest}
	for _, segment := range p.segments {
		f.segments = append(f.segments, foldPath(segment))
	}
	return f
}

// foldPath is a path without case. Letters are one if any of Unicode's simple mappings makes them one, as some servers do: the Kelvin sign
// is a k. An exemption is stricter, and takes only A to Z for a to z.
func foldPath(path string) string {
	for i := 0; i < len(path); i++ {
		if path[i] >= utf8.RuneSelf {
			return foldRunes(path)
		}
	}
	return lowerASCII(path)
}

func foldRunes(path string) string {
	folded := make([]byte, 0, len(path)+utf8.UTFMax)
	for i := 0; i < len(path); {
		r, size := utf8.DecodeRuneInString(path[i:])
		if r == utf8.RuneError && size == 1 {
			folded = append(folded, path[i]) // not UTF-8
		} else {
			folded = utf8.AppendRune(folded, foldRune(r))
		}
		i += size
	}
	return string(folded)
}

// foldRune is one letter for all that differ in case only: of ASCII the lower one.
func foldRune(r rune) rune {
	if lower := unicode.ToLower(unicode.ToUpper(r)); lower < utf8.RuneSelf {
		return lower
	}
	least := r
	for other := unicode.SimpleFold(r); other != r; other = unicode.SimpleFold(other) {
		least = min(least, other)
	}
	return least
}

// matches reports whether a path without its query is one of the pattern's.
func (p pathPattern) matches(path string) bool {
	path = strings.TrimPrefix(path, "/")
	for _, want := range p.segments {
		segment, rest, more := strings.Cut(path, "/")
		if segment == "" || want != "" && want != segment {
			return false
		}
		path = rest
		if more && rest == "" && !p.rest {
			return false // a trailing slash is another path, but for its normal form
		}
	}
	return p.rest || path == ""
}
