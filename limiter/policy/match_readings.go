package policy

import (
	"bytes"
	"slices"
	"strings"
	"unicode"
)

// Servers disagree about which resource a path names. Each of the habits below is one thing that a server may do to a path
// before it routes a request by it, and each of the servers further down is a set of habits. A path is read once for each
// server, and a match sees all that comes of it: see match.path. To cover another framework, add a row.

// habits is a set of things that a server does to a path. They are done in the order in which they are declared.
type habits uint16

const (
	// dropBlanks removes tabs and line ends, and white space at the end.
	dropBlanks habits = 1 << iota
	// cutFragment drops the first # and all that follows.
	cutFragment
	// cutParams drops the first ; and all that follows, further segments included.
	cutParams
	// dropRawParams drops what follows a ; in each segment, before anything is decoded.
	dropRawParams
	// resolveRawDots resolves the segments . and .. before anything is decoded, by RFC 3986, section 5.2.4: a .. behind an empty
	// segment removes that one.
	resolveRawDots
	// backslash reads \ as /.
	backslash
	// decode decodes %XX once, but for %2F and %5C.
	decode
	// decodeSlashes has decode include %2F and %5C.
	decodeSlashes
	// dropAuthority drops the host of //host/path and scheme://host/path.
	dropAuthority
	// cutDecoded drops the first NUL, ? or # that decoding brings, and all that follows, and line ends at the end.
	cutDecoded
	// refuseControls takes a path in which decoding brings a control
	// character for the root, so that it is none that a router has.
	refuseControls
	// dropParams drops what follows a ; in each segment.
	dropParams
	// mergeSlashes drops empty segments before dots are resolved. (After that all servers have them dropped.)
	mergeSlashes
	// resolveDots resolves the segments . and .. .
	resolveDots

	everyHabit = resolveDots<<1 - 1
)

// normal is how a path's normal form is made.
const normal = backslash | decode | decodeSlashes | dropParams | mergeSlashes | resolveDots

// servers are the ways in which paths are read, besides as they were sent. Each drops empty segments and the trailing slash at last.
var servers = [...]habits{
	normal,
	// The normal form in which %2F and %5C stay.
	normal &^ decodeSlashes,
	// Jetty, and what cleans a path as it was sent: dot segments first.
	normal&^mergeSlashes | resolveRawDots,
	normal | resolveRawDots,
	resolveRawDots | decode,
	// Doubled slashes kept until dots are resolved: nginx with merge_slashes off.
	normal &^ mergeSlashes,
	// Express, chi: the path as it was sent, but for a trailing slash. Node's url.parse drops blanks and a fragment.
	0,
	dropBlanks | cutFragment,
	// Go's ServeMux, and Fastify from 5 on: segment by segment, each decoded.
	cutFragment | decode,
	// Fastify before 5: what follows a ; is a query.
	cutFragment | cutParams | decode,
	// Gin, Flask, Starlette: decoded as a whole. Python's urlsplit drops tabs and line ends, and its $ does not see a line end.
	cutFragment | decode | decodeSlashes,
	dropBlanks | cutFragment | decode | decodeSlashes | cutDecoded,
	// Starlette's {name:path} and Flask's <path:name> match no line end.
	decode | refuseControls,
	// Spring: segments without their parameters, each decoded.
	dropRawParams | decode,
	// Tomcat: parameters go first, then the path is decoded and cleaned.
	normal | dropRawParams,
	// nginx: decoded and cleaned; it knows no parameters.
	cutFragment | decode | decodeSlashes | mergeSlashes | resolveDots,
	// What makes a WHATWG URL of the request's path: new URL(path) and new URL(path, base).
	dropBlanks | cutFragment | backslash | decode | resolveDots,
	dropBlanks | cutFragment | backslash | decode | dropAuthority | resolveDots,
}

// normalPath is the normal form of a path without its query: percent-decoded once, with \ read as /, empty and dot segments
// resolved, and each segment's ;parameters and the trailing slash dropped. It always begins with /.
func normalizePath(path string) string {
	if matters, plain := relevantHabits(path); !plain {
		return readPath(path, normal&matters)
	}
	return path
}

// appendReadings appends the readings of a path without its query: as it was sent, and those that differ from that; the normal form
// comes first among these. For most paths there is one, and nothing is allocated.
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

// look finds which habits may change a path, and whether it is plain, so that all servers read it as it was sent.
func relevantHabits(path string) (matters habits, plain bool) {
	if path == "" || path[0] != '/' {
		return everyHabit, false
	}
	slashes, dots := false, false // there may be an empty segment, or one that is a dot
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

// read reads a path as a server with these habits does. What it returns begins with / and has no empty segment and no slash at
// the end.
func readPath(path string, h habits) string {
	has := func(habit habits) bool { return h&habit != 0 }
	b := make([]byte, 0, len(path)+1) // changed in place from here on: nothing makes it longer
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
	if has(refuseControls) && bytes.ContainsFunc(b, unicode.IsControl) {
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

// cutAt drops the first of some bytes, and all that follows.
func cutAt(path []byte, any string) []byte {
	if i := bytes.IndexAny(path, any); i >= 0 {
		return path[:i]
	}
	return path
}

// withoutBlanks drops tabs and line ends, and white space and control characters at the end.
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

// isBlank includes the non-breaking space of ISO 8859-1, in which Node reads paths.
func isBlank(c byte) bool { return c <= ' ' || c == 0x7f || c == 0xa0 }

// withoutParams drops what follows a ; in each segment.
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

// withoutDots resolves the segments . and .. . An empty segment is one like others. Where ;parameters are going to be dropped, they do not
// keep a segment from being a dot.
func withoutDots(path []byte, params bool) []byte {
	kept := path[:0]
	for len(path) > 0 {
		segment := path[:segmentEnd(path)] // with its slash
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

// withoutEmpty drops empty segments, and so the slash at the end.
func withoutEmpty(path []byte) []byte {
	kept := path[:0]
	for i, c := range path {
		if c != '/' || i+1 < len(path) && path[i+1] != '/' {
			kept = append(kept, c)
		}
	}
	return kept
}

// segmentEnd is where the first segment of a path that begins with a slash ends.
func segmentEnd(path []byte) int {
	for i := 1; i < len(path); i++ {
		if path[i] == '/' {
			return i
		}
	}
	return len(path)
}

// decoded decodes a path once, and has \ be /, as far as these habits say.
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

// withoutAuthority drops the host of //host/path, and of a path that is a whole URL.
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
