package policy

import (
	"bytes"
	"fmt"
	"strings"
)

// normalPath is the normal form of a path without its query: percent-decoded once, with \ read as /, empty and dot segments
// resolved, and each segment's ;parameters and the trailing slash dropped. It always begins with /. Two paths that a server
// may take for one have one normal form, so that no spelling slips past a limit.
func normalPath(path string) string {
	if isNormal(path) {
		return path
	}
	decoded := make([]byte, 0, len(path))
	for i := 0; i < len(path); i++ {
		c := path[i]
		if c == '%' && i+2 < len(path) {
			if hi, lo := unhex(path[i+1]), unhex(path[i+2]); hi >= 0 && lo >= 0 {
				c = byte(hi<<4 | lo)
				i += 2
			}
		}
		if c == '\\' {
			c = '/'
		}
		decoded = append(decoded, c)
	}
	normal := make([]byte, 0, len(decoded)+1)
	for segment := range strings.SplitSeq(string(decoded), "/") {
		segment, _, _ = strings.Cut(segment, ";")
		switch segment {
		case "", ".":
		case "..":
			normal = normal[:max(0, bytes.LastIndexByte(normal, '/'))]
		default:
			normal = append(append(normal, '/'), segment...)
		}
	}
	if len(normal) == 0 {
		return "/"
	}
	return string(normal)
}

// appendReadings appends the readings of a path without its query: as it was sent, its normal form, and the one of a server that
// resolves dot segments before it decodes, where these differ.
func appendReadings(readings []string, sent string) []string {
	readings = append(readings, sent)
	if normal := normalPath(sent); normal != sent {
		readings = append(readings, normal)
		if strings.ContainsAny(sent, "%\\") && strings.Contains(sent, "/.") {
			if late := normalPath(withoutDots(sent)); late != normal && late != sent {
				readings = append(readings, late)
			}
		}
	}
	return readings
}

// withoutDots resolves the dot segments of a path as it was sent, by RFC 3986, section 5.2.4.
func withoutDots(path string) string {
	var out []byte
	for segment := range strings.SplitSeq(strings.TrimPrefix(path, "/"), "/") {
		switch name, _, _ := strings.Cut(segment, ";"); name {
		case ".":
		case "..":
			out = out[:max(0, bytes.LastIndexByte(out, '/'))]
		default:
			out = append(append(out, '/'), segment...)
		}
	}
	return string(out)
}

// isNormal reports whether a path is surely its own normal form. Most are, and then nothing is allocated.
func isNormal(path string) bool {
	if path == "" || path[0] != '/' || len(path) > 1 && path[len(path)-1] == '/' {
		return false
	}
	for i := 0; i < len(path); i++ {
		switch path[i] {
		case '%', '\\', ';':
			return false
		case '/':
			if i+1 < len(path) && (path[i+1] == '/' || path[i+1] == '.') {
				return false
			}
		}
	}
	return true
}

func unhex(c byte) int {
	switch {
	case '0' <= c && c <= '9':
		return int(c - '0')
	case 'a' <= c && c <= 'f':
		return int(c-'a') + 10
	case 'A' <= c && c <= 'F':
		return int(c-'A') + 10
	}
	return -1
}

// pathPattern is a path of a match: literal segments, {x} for any one segment, and ** at the end for all that follows,
// nothing included.
type pathPattern struct {
	segments []string // "" is any one segment: a literal one is never empty
	rest     bool     // **
}

func parsePath(s string) (pathPattern, error) {
	const allowed = "allowed are paths such as /v1/orders, /v1/orders/{id}/pay and /v2/**"
	if !strings.HasPrefix(s, "/") {
		return pathPattern{}, fmt.Errorf("%q does not begin with /; %s", s, allowed)
	}
	if strings.ContainsAny(s, "?#") {
		return pathPattern{}, fmt.Errorf("%q has a query, which is not matched; %s", s, allowed)
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
			return pathPattern{}, fmt.Errorf("%q: the segment %q is not a name, {x}, or ** at the end; %s", s, segment, allowed)
		case segment == "" || "/"+segment != normalPath("/"+segment):
			return pathPattern{}, fmt.Errorf("%q is not in its normal form, which requests are matched in: write %q", s, normalPath(s))
		default:
			p.segments = append(p.segments, segment)
		}
	}
	return p, nil
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
