package k8s

import (
	"bytes"
	"strings"
)

// maxAlignment bounds the time of alignLines: the maximum number of pairs of
// lines that it compares.
const maxAlignment = 4_000_000

// restoreSpacing returns text, which yaml.v3 has encoded, with the spacing of
// the original: blank lines, which the encoder drops, and spaces before
// comments. It takes an original line for each line that differs from it only
// in spacing. It knows nothing of block scalars, so that the caller has to
// check that the result has the same value.
func restoreSpacing(text, original []byte) []byte {
	split := func(text []byte) []string {
		return strings.Split(strings.TrimSuffix(strings.ReplaceAll(string(text), "\r\n", "\n"), "\n"), "\n")
	}
	blank := func(line string) bool { return strings.TrimSpace(line) == "" }
	written, old := split(text), split(original)
	var kept []int // indexes of the old lines that are not blank
	for i, line := range old {
		if !blank(line) {
			kept = append(kept, i)
		}
	}
	// normalize returns a line with its indentation and single spaces.
	normalize := func(line string) string {
		indent := line[:len(line)-len(strings.TrimLeft(line, " "))]
		return indent + strings.Join(strings.Fields(line), " ")
	}
	oldLines, newLines := make([]string, len(kept)), make([]string, len(written))
	for i, at := range kept {
		oldLines[i] = normalize(old[at])
	}
	for j, line := range written {
		newLines[j] = normalize(line)
	}
	from := alignLines(oldLines, newLines)
	var out bytes.Buffer
	for j, line := range written {
		if i := from[j]; i >= 0 {
			// Write the blank lines above it that the encoder has dropped.
			present := 0
			for above := j - 1; above >= 0 && blank(written[above]); above-- {
				present++
			}
			for above := kept[i] - 1; above >= 0 && blank(old[above]); above-- {
				if present--; present < 0 {
					out.WriteByte('\n')
				}
			}
			line = old[kept[i]]
		}
		out.WriteString(line)
		out.WriteByte('\n')
	}
	// Write the blank lines at the end, before the next document.
	for i := len(old) - 1; i >= 0 && blank(old[i]) && !blank(written[len(written)-1]); i-- {
		out.WriteByte('\n')
	}
	return out.Bytes()
}

// alignLines returns for each line the index in old of the same line, or -1: a
// longest common subsequence, after the lines that both have at their start and
// end. It leaves lines in between unmatched if there are too many of them.
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
	if rows == 0 || columns == 0 || rows > maxAlignment/columns {
		return from
	}
	// length(i, j) is the length of the longest common subsequence of the lines
	// from i and from j on.
	lengths := make([]int32, (rows+1)*(columns+1))
	length := func(i, j int) *int32 { return &lengths[i*(columns+1)+j] }
	for i := rows - 1; i >= 0; i-- {
		for j := columns - 1; j >= 0; j-- {
			if same(first+i, first+j) {
				*length(i, j) = *length(i+1, j+1) + 1
			} else {
				*length(i, j) = max(*length(i+1, j), *length(i, j+1))
			}
		}
	}
	for i, j := 0, 0; i < rows && j < columns; {
		switch {
		case same(first+i, first+j):
			from[first+j] = first + i
			i, j = i+1, j+1
		case *length(i+1, j) >= *length(i, j+1):
			i++
		default:
			j++
		}
	}
	return from
}
