package policy

import (
	"bytes"
	"fmt"
	"strings"
	"unicode"
)

// outgrown finds where a text is larger than any config, before a parser that recurses, and takes quadratic time for some of it, sees it:
// too many levels, fields of one mapping, or values of one list. It knows YAML roughly, and counts rather too much than too little:
// quotes count as such where they end on their line.
func checkBounds(text []byte) (line, column int, message string) {
	var flow []flowScope   // that are open
	var block []blockScope // the block mappings and lists that are open, by their columns
	for number, rest := 1, text; len(rest) > 0; number++ {
		var row []byte
		row, rest, _ = bytes.Cut(rest, []byte{'\n'})
		row = withoutComment(row)
		if column, message = checkBlockBounds(row, &block); message != "" {
			return number, column, message
		}
		since := 0 // the last character that is not of a plain text
		for i := 0; i < len(row); i++ {
			if i-since > 2*maxText {
				return number, since + 1, fmt.Sprintf("string of more than %d bytes; the maximum is %d", 2*maxText, maxText)
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

// closing is where the quote at i ends on its line; i where it does not, or where it opens nothing, as in don't.
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

// withoutComment is a line up to its comment, which begins at a # that is first or behind a space, and not within quotes.
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

// bracket is a flow mapping or list.
type flowScope struct {
	open   byte
	commas int
}

// outline is a block mapping or list that begins at a column.
type blockScope struct{ column, entries int }

// outgrownBlock counts what one line adds to block mappings and lists.
func checkBlockBounds(row []byte, block *[]blockScope) (column int, message string) {
	add := func(column, most int, message string) string {
		open := *block
		for len(open) > 0 && open[len(open)-1].column > column {
			open = open[:len(open)-1]
		}
		if len(open) == 0 || open[len(open)-1].column < column {
			open = append(open, blockScope{column: column})
		}
		*block = open
		last := &open[len(open)-1]
		if last.entries++; last.entries > most {
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
