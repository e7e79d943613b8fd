package policy

import (
	"fmt"
	"strings"
	"unicode"
	"unicode/utf8"
)

// pathPattern is a path of a match. Its segments are literals, or {x} for any
// one segment; ** at the end matches any number of further segments, none
// included.
type pathPattern struct {
	segments []string // "" stands for {x}: a literal is never empty
	rest     bool     // the pattern ends with **
}

func parsePath(s string) (pathPattern, error) {
	if !strings.HasPrefix(s, "/") {
		return pathPattern{}, wrongPath(s, fmt.Sprintf("path %q does not begin with /", s))
	}
	if strings.ContainsAny(s, "?#") {
		return pathPattern{}, wrongPath(s, fmt.Sprintf("path %q has a query or fragment, which is never matched", s))
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
		case strings.HasPrefix(segment, "{") && strings.HasSuffix(segment, "}") && len(segment) > 2 &&
			!strings.ContainsAny(segment[1:len(segment)-1], "{}*"):
			p.segments = append(p.segments, "")
		case strings.ContainsAny(segment, "{}*"):
			return pathPattern{}, wrongPath(s, fmt.Sprintf("path %q: segment %q is not a literal, {x}, or ** at the end", s,
				segment))
		case segment == "" || "/"+segment != normalizePath("/"+segment):
			return pathPattern{}, fmt.Errorf("path %q is not in normal form, in which requests are matched; write %q",
				s, normalizePath(s))
		default:
			p.segments = append(p.segments, segment)
		}
	}
	return p, nil
}

// folded returns the pattern for paths that were folded by foldPath.
func (p pathPattern) folded() pathPattern {
	f := pathPattern{rest: p.rest}
	for _, segment := range p.segments {
		f.segments = append(f.segments, foldPath(segment))
	}
	return f
}

// foldPath returns a path without case. Letters are equal if Unicode's simple
// case folding makes them equal, as in some servers: the Kelvin sign is a k.
// Exemptions are stricter: they use lowerASCII.
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

// foldRune returns the same rune for all runes that differ only in case. It is
// a lower-case ASCII letter if there is one among them.
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

// matches reports whether the pattern matches a path without its query. It
// agrees with pathNode.find.
func (p pathPattern) matches(path string) bool {
	path = strings.TrimPrefix(path, "/")
	for _, want := range p.segments {
		segment, rest, more := strings.Cut(path, "/")
		if segment == "" || want != "" && want != segment {
			return false
		}
		path = rest
		if more && rest == "" && !p.rest {
			return false // the path ends with a slash; its reading without it matches instead
		}
	}
	return p.rest || path == ""
}
