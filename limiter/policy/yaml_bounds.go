package policy

import (
	"bytes"
	"fmt"
	"strings"
	"unicode"
)

// checkBounds reports where a text exceeds the bounds of a config: in levels of
// nesting, in fields of one mapping, in values of one list, or in the length of
// a string. It runs before the parser, which recurses and takes quadratic time
// for some texts. It understands YAML only roughly, and rather counts too much:
// quotes count only if they are closed on the same line.
func checkBounds(text []byte) (line, column int, message string) {
	var flow []flowScope   // the open flow mappings and lists
	var block []blockScope // the open block mappings and lists, from left to right
	for number, rest := 1, text; len(rest) > 0; number++ {
		var row []byte
		row, rest, _ = bytes.Cut(rest, []byte{'\n'})
		row = withoutComment(row)
		if column, message = checkBlockBounds(row, &block); message != "" {
			return number, column, message
		}
		since := 0 // index of the last character that ends a plain string
		for i := 0; i < len(row); i++ {
			if i-since > 2*maxText {
				message = fmt.Sprintf("string of more than %d bytes; the maximum is %d", 2*maxText, maxText)
				return number, since + 1, message
			}
			c := row[i]
			if strings.IndexByte("[]{},:'\"", c) >= 0 {
				since = i
			}
			switch c {
			case '\'', '"':
				if end := closingQuote(row, i); end-i <= maxText {
					i, since = end, end
				}
			case '[', '{':
				flow = append(flow, flowScope{open: c})
				if len(flow) > maxDepth {
					return number, i + 1, tooDeep
				}
			case ']', '}':
				flow = flow[:max(0, len(flow)-1)]
			case ',':
				if len(flow) == 0 {
					continue
				}
				in := &flow[len(flow)-1]
				if in.commas++; in.open == '{' && in.commas > maxFields {
					return number, i + 1, tooManyFields
				} else if in.commas > maxValues {
					return number, i + 1, tooManyValues
				}
			}
		}
	}
	return 0, 0, ""
}

// closingQuote returns the index of the quote that closes the one at i on the
// same line. It returns i if there is none, or if the quote at i is inside a
// word, as in don't.
func closingQuote(row []byte, i int) int {
	if i > 0 && (isDigits(string(row[i-1:i])) || unicode.IsLetter(rune(row[i-1]))) {
		return i
	}
	for j := i + 1; j < len(row); j++ {
		switch {
		case row[j] == '\\' && row[i] == '"':
			j++
		case row[j] == row[i]:
			return j
		}
	}
	return i
}

// withoutComment returns a line without its comment. That begins with a #
// outside quotes, at the start of the line or after a space.
func withoutComment(row []byte) []byte {
	for i := 0; i < len(row); i++ {
		switch c := row[i]; {
		case c == '\'' || c == '"':
			i = closingQuote(row, i)
		case c == '#' && (i == 0 || row[i-1] == ' ' || row[i-1] == '\t'):
			return row[:i]
		}
	}
	return row
}

var (
	tooDeep       = fmt.Sprintf("more than %d levels of nesting", maxDepth)
	tooManyFields = fmt.Sprintf("more than %d fields in one mapping", maxFields)
	tooManyValues = fmt.Sprintf("more than %d values in one list", maxValues)
)

// flowScope is an open flow mapping or list.
type flowScope struct {
	open   byte
	commas int
}

// blockScope is an open block mapping or list, and the column where it begins.
type blockScope struct{ column, entries int }

// checkBlockBounds counts the entries that a line adds to block mappings and
// lists. It returns a message and its column if there are too many.
func checkBlockBounds(row []byte, block *[]blockScope) (column int, message string) {
	add := func(column, limit int, message string) string {
		open := *block
		for len(open) > 0 && open[len(open)-1].column > column {
			open = open[:len(open)-1]
		}
		if len(open) == 0 || open[len(open)-1].column < column {
			open = append(open, blockScope{column: column})
		}
		*block = open
		last := &open[len(open)-1]
		if last.entries++; last.entries > limit {
			return message
		}
		return ""
	}
	column, dashes := 0, 0
	for ; column < len(row); column++ {
		switch c := row[column]; {
		case c == ' ' || c == '\t':
		case (c == '-' || c == '?') && (column+1 == len(row) || row[column+1] == ' '):
			if dashes++; dashes > maxDepth {
				return column + 1, tooDeep
			}
			if m := add(column, maxValues, tooManyValues); m != "" {
				return column + 1, m
			}
		default:
			content := bytes.TrimSpace(row[column:])
			switch {
			case c == '[' || c == '{':
				return column + 1, add(column, maxValues, tooManyValues)
			case bytes.Contains(content, []byte(": ")) || bytes.HasSuffix(content, []byte(":")):
				return column + 1, add(column, maxFields, tooManyFields)
			}
			return 0, ""
		}
	}
	return 0, ""
}
