package k8s

import (
	"bytes"
	"strings"
)

// maxAligned bounds the work of spaced: so many pairs of lines are compared at the most.
const maxAligned = 4_000_000

// spaced is a text, as the encoder of YAML writes it, with the spacing that like has where their lines are the same but for it: blank lines,
// which the encoder forgets, and blanks before comments. What it means has to be seen anew: of block scalars it knows nothing.
func restoreSpacing(text, like []byte) []byte {
	lines := func(text []byte) []string {
		return strings.Split(strings.TrimSuffix(strings.ReplaceAll(string(text), "\r\n", "\n"), "\n"), "\n")
	}
	blank := func(line string) bool { return strings.TrimSpace(line) == "" }
	written, old := lines(text), lines(like)
	var kept []int // the old lines that are not blank
	for i, line := range old {
		if !blank(line) {
			kept = append(kept, i)
		}
	}
	words := func(line string) string { // with the line's margin
		return line[:len(line)-len(strings.TrimLeft(line, " "))] + strings.Join(strings.Fields(line), " ")
	}
	was, is := make([]string, len(kept)), make([]string, len(written))
	for i, at := range kept {
		was[i] = words(old[at])
	}
	for j, line := range written {
		is[j] = words(line)
	}
	from := alignLines(was, is)
	var out bytes.Buffer
	for j, line := range written {
		if i := from[j]; i >= 0 {
			there := 0 // blank lines above it, some of which the encoder may have kept
			for above := j - 1; above >= 0 && blank(written[above]); above-- {
				there++
			}
			for above := kept[i] - 1; above >= 0 && blank(old[above]); above-- {
				if there--; there < 0 {
					out.WriteByte('\n')
				}
			}
			line = old[kept[i]]
		}
		out.WriteString(line)
		out.WriteByte('\n')
	}
	for i := len(old) - 1; i >= 0 && blank(old[i]) && !blank(written[len(written)-1]); i-- { // before the next document
		out.WriteByte('\n')
	}
	return out.Bytes()
}

// aligned says of each line which of the old ones it is, or -1: a longest common subsequence, beside what both begin and end with.
func alignLines(old, lines []string) []int {
	m, n := len(old), len(lines)
	from := make([]int, n)
	for j := range from {
		from[j] = -1
	}
	same := func(i, j int) bool { return old[i] == lines[j] }
	first := 0
	for first < m && first < n && same(first, first) {
		from[first] = first
		first++
	}
	for m > first && n > first && same(m-1, n-1) {
		m, n = m-1, n-1
		from[n] = m
	}
	rows, columns := m-first, n-first
	if rows == 0 || columns == 0 || rows > maxAligned/columns {
		return from
	}
	longest := make([]int32, (rows+1)*(columns+1)) // of what is left from each pair on
	at := func(i, j int) *int32 { return &longest[i*(columns+1)+j] }
	for i := rows - 1; i >= 0; i-- {
		for j := columns - 1; j >= 0; j-- {
			if same(first+i, first+j) {
				*at(i, j) = *at(i+1, j+1) + 1
			} else {
				*at(i, j) = max(*at(i+1, j), *at(i, j+1))
			}
		}
	}
	for i, j := 0, 0; i < rows && j < columns; {
		switch {
		case same(first+i, first+j):
			from[first+j] = first + i
			i, j = i+1, j+1
		case *at(i+1, j) >= *at(i, j+1):
			i++
		default:
			j++
		}
	}
	return from
}
