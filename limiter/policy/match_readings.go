package policy

import (
	"bytes"
	"slices"
	"strings"
)

// Servers disagree about which resource a path names. A habit is one step that
// some servers apply to a path before they route a request; a server is
// described by its set of habits. Each path is read once for each server, and
// the distinct results are the path's readings. A limit holds if any reading
// matches, an exemption only if all do. To cover another framework, add its set
// to servers. A new habit is also a step of readPath, and relevantHabits says
// which characters it may change.

// habits is a set of steps. They are applied in the order of declaration.
type habits uint16

const (
	// dropBlanks removes tabs and line ends, and trailing white space.
	dropBlanks habits = 1 << iota
	// cutFragment removes the first # and everything after it.
	cutFragment
	// cutParams removes the first ; and everything after it, including further
	// segments.
	cutParams
	// dropRawParams removes ; and what follows it from each segment, before the
	// path is decoded.
	dropRawParams
	// resolveRawDots resolves the segments . and .. before the path is decoded,
	// by RFC 3986, section 5.2.4: a .. after an empty segment removes that one.
	resolveRawDots
	// backslash replaces \ by /, also one that is decoded.
	backslash
	// decode decodes %XX once, except for %2F and %5C.
	decode
	// decodeSlashes makes decode include %2F and %5C.
	decodeSlashes
	// dropAuthority removes the host of //host/path and scheme://host/path.
	dropAuthority
	// cutDecoded removes the first NUL, ? or # that decoding produces and
	// everything after it, and then trailing line ends.
	cutDecoded
	// refuseControls reads a path as / if decoding produces a control character
	// of ASCII: such a server has no route for it.
	refuseControls
	// dropParams removes ; and what follows it from each segment.
	dropParams
	// mergeSlashes removes empty segments before dots are resolved. All servers
	// remove them at the end.
	mergeSlashes
	// resolveDots resolves the segments . and .. after decoding.
	resolveDots

	everyHabit = resolveDots<<1 - 1
)

// normal is the set of habits of the normal form.
const normal = backslash | decode | decodeSlashes | dropParams | mergeSlashes | resolveDots

// servers are the habits of known servers. Every reading except the path as
// sent also loses its empty segments and its trailing slash.
var servers = [...]habits{
	normal,
	// The normal form, but with %2F and %5C kept.
	normal &^ decodeSlashes,
	// Jetty, and proxies that normalize the path as sent: dots first.
	normal&^mergeSlashes | resolveRawDots,
	normal | resolveRawDots,
	resolveRawDots | decode,
	// nginx with merge_slashes off: dots are resolved before slashes merge.
	normal &^ mergeSlashes,
	// Express and chi use the path as sent, except for a trailing slash. Node's
	// url.parse removes blanks and a fragment.
	0,
	dropBlanks | cutFragment,
	// Go's ServeMux and Fastify since 5 decode each segment by itself.
	cutFragment | decode,
	// Fastify before 5 takes what follows a ; for a query.
	cutFragment | cutParams | decode,
	// Gin, Flask and Starlette decode the path as a whole. Python's urlsplit
	// removes tabs and line ends, and $ in its regular expressions matches
	// before a final line end.
	cutFragment | decode | decodeSlashes,
	dropBlanks | cutFragment | decode | decodeSlashes | cutDecoded,
	// Starlette's {name:path} and Flask's <path:name> match no line end.
	decode | refuseControls,
	// Spring removes the parameters of each segment, then decodes it.
	dropRawParams | decode,
	// Tomcat removes parameters, then decodes and normalizes the path.
	normal | dropRawParams,
	// nginx decodes and normalizes; it has no parameters.
	cutFragment | decode | decodeSlashes | mergeSlashes | resolveDots,
	// Servers that parse the path as a WHATWG URL: new URL(path) and new
	// URL(path, base).
	dropBlanks | cutFragment | backslash | decode | resolveDots,
	dropBlanks | cutFragment | backslash | decode | dropAuthority | resolveDots,
}

// normalizePath returns the normal form of a path without its query:
// percent-decoded once, with \\ read as /, with empty and dot segments
// resolved, and without parameters and a trailing slash. It always begins with
// /.
func normalizePath(path string) string {
	if matters, plain := relevantHabits(path); !plain {
		return readPath(path, normal&matters)
	}
	return path
}

// appendReadings appends the readings of a path without its query: the path as
// sent, then the distinct other readings, of which the normal form is the
// first. Most paths have a single reading, for which nothing is allocated.
func appendReadings(readings []string, sent string) []string {
	from := len(readings)
	readings = append(readings, sent)
	matters, plain := relevantHabits(sent)
	if plain {
		return readings
	}
	var done [len(servers)]habits
	for i, server := range servers {
		server &= matters
		if done[i] = server; slices.Contains(done[:i], server) {
			continue
		}
		if reading := readPath(sent, server); !slices.Contains(readings[from:], reading) {
			readings = append(readings, reading)
		}
	}
	return readings
}

// relevantHabits returns the habits that may change a path. plain reports that
// there are none and that the path has no trailing slash, so that all servers
// read it as sent.
func relevantHabits(path string) (matters habits, plain bool) {
	if path == "" || path[0] != '/' {
		return everyHabit, false
	}
	slashes, dots := false, false // the path may have an empty segment, or one of dots
	for i := 0; i < len(path); i++ {
		switch c := path[i]; {
		case c > '%' && c != '/' && c != ';' && c != '\\' && c < 0x7f, c == '!', c == '"', c == '$':
		case c == '/':
			if i+1 < len(path) {
				slashes = slashes || path[i+1] == '/'
				dots = dots || path[i+1] == '.'
			}
		case c == '%':
			matters |= decode | cutDecoded
			if i+2 < len(path) && (path[i+1] == '0' || path[i+1] == '1' || path[i+1] == '7') {
				matters |= refuseControls
			}
			if i+2 < len(path) {
				switch path[i+1 : i+3] {
				case "2f", "2F", "5c", "5C":
					matters |= decodeSlashes | backslash
					slashes = true
				case "3b", "3B":
					matters |= dropParams
					slashes = true
				case "2e", "2E":
					dots = true
				}
			}
		case c == '\\':
			matters |= backslash
			slashes = true
		case c == ';':
			matters |= cutParams | dropRawParams | dropParams
			slashes = true
		case c == '#':
			matters |= cutFragment | cutDecoded
		case isBlank(c):
			matters |= dropBlanks | cutDecoded | refuseControls
			slashes = true
		}
	}
	if slashes {
		matters |= dropAuthority
		dots = dots || strings.IndexByte(path, '.') >= 0
	}
	if dots {
		matters |= resolveRawDots | mergeSlashes | resolveDots
	}
	return matters, matters == 0 && (len(path) == 1 || path[len(path)-1] != '/')
}

// readPath returns the path as a server with the habits h reads it. The result
// begins with /, and has no empty segments and no trailing slash.
func readPath(path string, h habits) string {
	has := func(habit habits) bool { return h&habit != 0 }
	b := make([]byte, 0, len(path)+1) // changed in place from here on: no step makes it longer
	if !strings.HasPrefix(path, "/") {
		b = append(b, '/')
	}
	b = append(b, path...)
	if has(dropBlanks) {
		b = withoutBlanks(b)
	}
	if has(cutFragment) {
		b = cutAt(b, "#")
	}
	if has(cutParams) {
		b = cutAt(b, ";")
	}
	if has(dropRawParams) {
		b = withoutParams(b)
	}
	if has(resolveRawDots) {
		b = withoutDots(b, has(dropParams))
	}
	if has(backslash | decode) {
		b = decodePath(b, h)
	}
	if has(dropAuthority) {
		b = withoutAuthority(b)
	}
	if has(cutDecoded) {
		b = bytes.TrimRight(cutAt(b, "\x00?#"), "\r\n")
	}
	if has(refuseControls) && bytes.ContainsFunc(b, isControl) {
		return "/"
	}
	if has(dropParams) {
		b = withoutParams(b)
	}
	if has(mergeSlashes) {
		b = withoutEmpty(b)
	}
	if has(resolveDots) {
		b = withoutDots(b, false)
	}
	if b = withoutEmpty(b); len(b) == 0 {
		return "/"
	}
	return string(b)
}

// isControl reports whether r is a control character of ASCII.
func isControl(r rune) bool { return r < ' ' || r == 0x7f }

// cutAt removes the first of the given bytes and everything after it.
func cutAt(path []byte, any string) []byte {
	if i := bytes.IndexAny(path, any); i >= 0 {
		return path[:i]
	}
	return path
}

// withoutBlanks removes tabs and line ends, and trailing white space and
// control characters.
func withoutBlanks(path []byte) []byte {
	end := len(path)
	for end > 0 && isBlank(path[end-1]) {
		end--
	}
	kept := path[:0]
	for _, c := range path[:end] {
		if c != '\t' && c != '\n' && c != '\r' {
			kept = append(kept, c)
		}
	}
	return kept
}

// isBlank includes the non-breaking space of ISO 8859-1, as which Node decodes
// paths.
func isBlank(c byte) bool { return c <= ' ' || c == 0x7f || c == 0xa0 }

// withoutParams removes ; and what follows it from each segment.
func withoutParams(path []byte) []byte {
	kept, dropping := path[:0], false
	for _, c := range path {
		switch c {
		case ';':
			dropping = true
		case '/':
			dropping = false
		}
		if !dropping {
			kept = append(kept, c)
		}
	}
	return kept
}

// withoutDots resolves dot segments (. and ..). An empty segment counts as a
// segment. If params is set, a dot segment may have parameters.
func withoutDots(path []byte, params bool) []byte {
	kept := path[:0]
	for len(path) > 0 {
		segment := path[:segmentEnd(path)] // including its leading slash
		path = path[len(segment):]
		name := segment[1:]
		if params && len(name) > 0 && name[0] == '.' {
			name = cutAt(name, ";")
		}
		switch {
		case len(name) == 1 && name[0] == '.':
		case len(name) == 2 && name[0] == '.' && name[1] == '.':
			kept = kept[:max(0, bytes.LastIndexByte(kept, '/'))]
		default:
			kept = append(kept, segment...)
		}
	}
	return kept
}

// withoutEmpty removes empty segments, and with them a trailing slash.
func withoutEmpty(path []byte) []byte {
	kept := path[:0]
	for i, c := range path {
		if c != '/' || i+1 < len(path) && path[i+1] != '/' {
			kept = append(kept, c)
		}
	}
	return kept
}

// segmentEnd returns the end of the first segment of a path that begins with a
// slash.
func segmentEnd(path []byte) int {
	for i := 1; i < len(path); i++ {
		if path[i] == '/' {
			return i
		}
	}
	return len(path)
}

// decodePath applies the habits decode, decodeSlashes and backslash of h.
func decodePath(path []byte, h habits) []byte {
	kept := path[:0]
	for i := 0; i < len(path); i++ {
		c := path[i]
		if c == '%' && h&decode != 0 && i+2 < len(path) {
			if hi, lo := unhex(path[i+1]), unhex(path[i+2]); hi >= 0 && lo >= 0 {
				if d := byte(hi<<4 | lo); h&decodeSlashes != 0 || d != '/' && d != '\\' {
					c = d
					i += 2
				}
			}
		}
		if c == '\\' && h&backslash != 0 {
			c = '/'
		}
		kept = append(kept, c)
	}
	return kept
}

// withoutAuthority removes the host of //host/path, and the scheme and host of
// a complete URL.
func withoutAuthority(path []byte) []byte {
	rest := path[1:]
	if scheme, after, ok := bytes.Cut(rest, []byte("://")); ok && bytes.IndexByte(scheme, '/') < 0 {
		rest = after
	} else if rest, ok = bytes.CutPrefix(rest, []byte("/")); !ok {
		return path
	}
	if i := bytes.IndexByte(rest, '/'); i >= 0 {
		return rest[i:]
	}
	return nil
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
