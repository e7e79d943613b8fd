package policy

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/csv"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/goccy/go-yaml/ast"

	"github.com/sluiceproxy/sluice/limiter"
)

// Bounds of the overrides files of one limit, in total.
const (
	maxOverrideBytes = 256 << 20
	maxOverrides     = 1_000_000
)

// overrides are the keys of a limit that have a rate, a quota or a mode of their own.
// They are looked up by a digest, in constant time; the keys themselves are not kept.
// An inline override takes precedence over one in a file.
type overrides struct {
	inline, file map[digest]override
	files        []string // names of the files
}

// override is the rate of one key, and where it is written.
type override struct {
	tier *tier
	file int32 // index in overrides.files
	row  int32 // line in the file, or index of an inline override
}

// digest identifies a key among overrides. It is the SHA-256 of the SHA-256s of
// the key's parts or, for a single part, its SHA-256.
type digest [sha256.Size]byte

func digestOf(parts []digest) digest {
	if len(parts) == 1 {
		return parts[0]
	}
	h := sha256.New()
	for i := range parts {
		h.Write(parts[i][:])
	}
	var d digest
	h.Sum(d[:0])
	return d
}

const hexPrefix = "sha256:" // marks a part that is given by its SHA-256

// checkPart returns an error if a part of an override's key is empty, or begins
// with sha256: without 64 hex digits after it.
func checkPart(part string) error {
	if part == "" {
		return errEmptyPart
	}
	text, isDigest := strings.CutPrefix(part, hexPrefix)
	if !isDigest {
		return nil
	}
	if sum, err := hex.DecodeString(text); err != nil || len(sum) != sha256.Size {
		return fmt.Errorf("want sha256: and 64 hex digits, not %d characters", len(text))
	}
	return nil
}

var errEmptyPart = errors.New("empty key part; a request's empty part counts as absent")

// digestOfPart returns the digest of a part that checkPart accepts. It returns
// an error if no request can have the part.
func (e *expression) digestOfPart(part string) (d digest, err error) {
	if text, isDigest := strings.CutPrefix(part, hexPrefix); isDigest {
		_, err = hex.Decode(d[:], []byte(text))
		return d, err
	}
	part, err = e.canonicalPart(part)
	return sha256.Sum256([]byte(part)), err
}

// lookup returns the override for the digest of a key.
func (o *overrides) lookup(d digest) (override, bool) {
	if row, ok := o.inline[d]; ok {
		return row, true
	}
	row, ok := o.file[d]
	return row, ok
}

// position says where an override is written.
func (o *overrides) position(d digest) string {
	row, isInline := o.inline[d]
	inFile, isInFile := o.file[d]
	line := ""
	if isInFile {
		line = fmt.Sprintf("%s:%d", o.files[inFile.file], inFile.row)
	}
	switch {
	case isInline && isInFile:
		return fmt.Sprintf("overrides[%d], which takes precedence over %s", row.row, line)
	case isInline:
		return fmt.Sprintf("overrides[%d]", row.row)
	}
	return line
}

// readOverrides reads the overrides of a limit, after its other fields. It
// returns nil if there are none.
func (lr *limitReader) readOverrides(d *draft) *overrides {
	if d.overrides.Node == nil && len(d.files) == 0 {
		return nil
	}
	if len(d.key) == 0 {
		at := d.overrides
		if at.Node == nil {
			at = d.files[0]
		}
		lr.wrong(at, "requires key; a limit without one has a single bucket")
		return nil
	}
	o := &overrides{inline: make(map[digest]override), file: make(map[digest]override)}
	if d.overrides.Node != nil {
		lr.readInline(d, o)
	}
	total := int64(0)
	for _, n := range d.files {
		pattern, ok := lr.text(n)
		if !ok {
			continue
		}
		for _, name := range lr.glob(n, pattern) {
			lr.readOverridesFile(n, d, o, name, &total)
		}
	}
	return o
}

func (lr *limitReader) readInline(d *draft, o *overrides) {
	if _, ok := d.overrides.Node.(*ast.SequenceNode); !ok {
		lr.wrong(d.overrides, "must be a list of overrides such as {key: gold, rate: 100/m}, not %s",
			describe(d.overrides.Node))
		return
	}
	index := -1
	lr.each(d.overrides, func(n node) {
		index++
		var key node
		granted := granted{zone: d.granted.zone, inherited: d.granted.starts}
		before := len(lr.mistakes)
		complete := lr.mapping(n, map[string]func(node){
			"key":    func(n node) { key = n },
			"rate":   func(n node) { granted.rate = n },
			"burst":  func(n node) { granted.burst = n },
			"plan":   func(n node) { granted.plan = n },
			"quota":  func(n node) { granted.quota = n },
			"starts": func(n node) { lr.readStarts(n, &granted) },
			"mode":   func(n node) { lr.oneOf(n, &granted.mode, modes...) },
		})
		switch {
		case key.Node == nil && complete:
			lr.wrong(n, "missing key; an override needs one, and a rate, a quota or a plan")
			return
		case !granted.isGiven() && complete:
			lr.wrong(n, "missing rate, quota or plan; an override needs one")
			return
		case key.Node == nil || !granted.isGiven():
			return
		}
		granted.incomplete = !complete
		var parts []string
		lr.each(key, func(n node) {
			s, _ := lr.readPart(n)
			parts = append(parts, s)
		})
		good := len(lr.mistakes) == before
		tier := lr.readTier(granted)
		if complete && tier != nil && tier.quotaText == "" && granted.startsAt.Node != nil {
			lr.wrongError(granted.startsAt, errNoQuota)
			return
		}
		if tier == nil {
			d.notes(tier)
		}
		if !good || tier == nil {
			return
		}
		if _, err := d.addOverride(o.inline, parts, override{tier: tier, row: int32(index)}); err != nil {
			lr.wrong(key, "%v", err)
		}
		if _, message := doubtfulPart(d, key, parts); message != "" {
			lr.warn(key, "%s", message)
		}
	})
}

// readPart reads a part of an override's key. An unquoted sha256:2c26... within
// brackets is a string in YAML, but a mapping to goccy/go-yaml.
func (lr *limitReader) readPart(n node) (string, bool) {
	if entries, ok := entries(n.Node); ok && len(entries) == 1 && entries[0].Key.GetToken().Value == "sha256" {
		switch v := entries[0].Value.(type) {
		case *ast.StringNode, *ast.IntegerNode, *ast.FloatNode:
			return "sha256:" + v.GetToken().Value, true
		}
	}
	return lr.scalar(n)
}

// glob returns the files that match a pattern. There may be none yet, as with
// nginx's include; a plain name must exist. It records the directories in which
// matching files may appear.
func (lr *limitReader) glob(n node, pattern string) []string {
	if lr.inputs == nil {
		lr.wrong(n, "files are not read for a route's limit; use overrides")
		return nil
	}
	if !isPattern(pattern) {
		path := lr.path(pattern)
		lr.inputs.add(filepath.Dir(path))
		return []string{path}
	}
	written := pattern
	if !filepath.IsAbs(pattern) { // the config's own directory is not a pattern
		pattern = filepath.Join(escapeMeta(lr.dir), pattern)
	}
	names, err := filepath.Glob(pattern)
	if err != nil {
		lr.wrong(n, "invalid file name pattern %q: %v", written, err)
		return nil
	}
	dir := filepath.Dir(pattern)
	for ; isPattern(dir); dir = filepath.Dir(dir) {
		in, _ := filepath.Glob(dir) // valid, because the whole pattern is
		for _, d := range in {
			lr.inputs.add(d)
		}
	}
	dir = unescapeMeta(dir)
	lr.inputs.add(dir)
	if _, err := os.ReadDir(dir); err != nil && !errors.Is(err, os.ErrNotExist) {
		lr.wrongFile(n, err)
	}
	if len(names) == 0 {
		lr.warn(n, "no file matches this pattern yet; until one does, every key has the limit's own rate")
	}
	slices.Sort(names)
	return names
}

// isPattern reports whether a name has characters that are special in a
// pattern.
func isPattern(name string) bool {
	for i := 0; i < len(name); i++ {
		switch name[i] {
		case '\\':
			i++
		case '*', '?', '[':
			return true
		}
	}
	return false
}

// escapeMeta returns a pattern that matches only path.
func escapeMeta(path string) string {
	return strings.NewReplacer(`\`, `\\`, `*`, `\*`, `?`, `\?`, `[`, `\[`).Replace(path)
}

func unescapeMeta(pattern string) string {
	var b strings.Builder
	for i := 0; i < len(pattern); i++ {
		if pattern[i] == '\\' && i+1 < len(pattern) {
			i++
		}
		b.WriteByte(pattern[i])
	}
	return b.String()
}

// overrideColumns are the columns that an overrides file may have after the
// parts of the key, in any order.
var overrideColumns = []string{"rate", "burst", "quota", "plan", "starts", "mode"}

// columns says where the columns of an overrides file are.
type columns struct {
	count int
	at    map[string]int // the index in a row of each of overrideColumns that there is
}

// readColumns reads the header row of an overrides file for keys of a number of
// parts. The error says what to write instead.
func readColumns(header []string, parts int) (columns, error) {
	c := columns{count: len(header), at: make(map[string]int)}
	if len(header) <= parts {
		return c, mendHeader(header, parts)
	}
	for i, cell := range header[parts:] {
		name := strings.ToLower(strings.TrimSpace(cell))
		if !slices.Contains(overrideColumns, name) {
			return c, mendHeader(header, parts)
		}
		if _, twice := c.at[name]; twice {
			return c, fmt.Errorf("two columns are named %s", name)
		}
		c.at[name] = parts + i
	}
	if c.of("rate") < 0 {
		return c, mendHeader(header, parts)
	}
	return c, nil
}

// of returns the index of the column that a mistake in a field of an allowance is
// about: that of the field, of the rate for a burst, or if there is none of another
// one that says what is granted. It returns -1 if there is none of these.
func (c *columns) of(field string) int {
	if field == "burst" {
		field = "rate"
	}
	for _, name := range []string{field, "rate", "quota", "plan"} {
		if i, ok := c.at[name]; ok {
			return i
		}
	}
	return -1
}

// allowance returns what a row of an overrides file of a limit grants.
func (c *columns) allowance(row []string, d *draft) allowance {
	cell := func(name string) string {
		if i, ok := c.at[name]; ok {
			return strings.TrimSpace(row[i])
		}
		return ""
	}
	a := allowance{
		rate: cell("rate"), burst: cell("burst"), quota: cell("quota"), plan: cell("plan"), mode: cell("mode"),
		zone: d.granted.zone, starts: cell("starts"),
	}
	if a.starts == "" {
		a.starts, a.startsInherited = d.granted.starts, true
	}
	return a
}

// rowTiers finds the tiers of the rows of an overrides file. Most rows grant what an
// earlier one does, in the same text, which is then not read again.
type rowTiers struct {
	lr    *limitReader
	d     *draft
	at    columns          // zero before the header row
	known map[string]*tier // by the row's cells after the key, at most maxKnownTiers
	cells []byte           // of the last row, each after its length
}

// maxKnownTiers bounds the memory of a file whose rows all differ.
const maxKnownTiers = 1000

// of returns the tier of a row. It is nil if a mistake in its plan is reported. An
// error is about the cell with the index that is returned.
func (rt *rowTiers) of(row []string) (t *tier, cell int, err error) {
	rt.cells = rt.cells[:0]
	for _, c := range row[len(rt.d.key):] {
		rt.cells = append(binary.AppendUvarint(rt.cells, uint64(len(c))), c...)
	}
	if t := rt.known[string(rt.cells)]; t != nil {
		return t, 0, nil
	}
	granted := rt.at.allowance(row, rt.d)
	t, field, err := rt.lr.tierOf(granted)
	if err == nil && t != nil && t.quotaText == "" && !granted.startsInherited {
		field, err = "starts", fmt.Errorf("starts %w", errNoQuota)
	}
	if err != nil || t == nil {
		return nil, rt.at.of(field), err
	}
	if len(rt.known) < maxKnownTiers {
		rt.known[string(rt.cells)] = t
	}
	return t, 0, nil
}

// readOverridesFile reads a CSV file: a header row, then for each key a row
// with the key's parts and what the header names. total is the size of the
// limit's files so far.
func (lr *limitReader) readOverridesFile(n node, d *draft, o *overrides, name string, total *int64) {
	file, err := limiter.OpenFile(name)
	if err != nil {
		lr.inputs.failed(name, err)
		lr.wrongFile(n, err)
		return
	}
	defer func() { _ = file.Close() }()
	limit := &io.LimitedReader{R: lr.inputs.teeReader(name, file), N: maxOverrideBytes - *total + 1}
	defer func() { *total = maxOverrideBytes - limit.N + 1 }()
	text := bufio.NewReaderSize(limit, 64<<10) // which csv.NewReader uses as it is
	skipBOM(text)
	if len(o.file) == 0 {
		o.file = make(map[digest]override, estimateRows(text, file))
	}
	rows := csv.NewReader(text)
	rows.ReuseRecord = true
	rows.FieldsPerRecord = -1
	o.files = append(o.files, name)
	number := int32(len(o.files) - 1)

	before := len(lr.mistakes)
	wrong := func(line, column int, format string, args ...any) {
		lr.add(Mistake{File: name, Line: line, Column: column, Field: n.field, Message: fmt.Sprintf(format, args...)})
	}
	const mostMistakes = 100   // of one file: a wrong column makes every row wrong
	var syntax *csv.ParseError // here, so that not each row allocates it
	tiers := rowTiers{lr: lr, d: d, known: make(map[string]*tier)}
	for len(lr.mistakes)-before < mostMistakes {
		row, err := rows.Read()
		switch {
		case errors.Is(err, io.EOF):
			if tiers.at.count == 0 {
				wrong(1, 1, "empty file; want a header row such as key,rate,burst")
			}
			return
		case errors.As(err, &syntax):
			wrong(syntax.Line, syntax.Column, "%v", syntax.Err)
			return
		case err != nil:
			lr.wrong(n, "%v", err)
			return
		case limit.N <= 0:
			lr.wrong(n, "the overrides files exceed %d bytes", maxOverrideBytes)
			return
		}
		line, _ := rows.FieldPos(0)
		parts := len(d.key)
		if tiers.at.count == 0 {
			if tiers.at, err = readColumns(row, parts); err != nil {
				wrong(line, 1, "%v", err)
				return
			}
			continue
		}
		if len(row) != tiers.at.count {
			wrong(line, 1, "row of %d columns; want %d, as the header row has", len(row), tiers.at.count)
			continue
		}
		if len(o.file) >= maxOverrides {
			wrong(line, 1, "more than %d overrides", maxOverrides)
			return
		}
		tier, cell, err := tiers.of(row)
		if err != nil {
			_, column := rows.FieldPos(cell)
			wrong(line, column, "%v", err)
			continue
		}
		if tier == nil {
			d.notes(tier)
			continue
		}
		part, err := d.addOverride(o.file, row[:parts], override{tier: tier, file: number, row: int32(line)})
		if err != nil {
			_, column := rows.FieldPos(part)
			wrong(line, column, "%v", err)
		}
		if part, message := doubtfulPart(d, n, row[:parts]); message != "" && len(lr.warnings) < maxMistakes {
			_, column := rows.FieldPos(part)
			lr.warnings = append(lr.warnings,
				Mistake{File: name, Line: line, Column: column, Field: n.field, Message: message})
		}
	}
}

// skipBOM skips a byte order mark.
func skipBOM(b *bufio.Reader) {
	if mark, err := b.Peek(3); err == nil && len(withoutBOM(mark)) == 0 {
		_, _ = b.Discard(len(mark))
	}
}

// estimateRows returns how many rows a file has if all of it is like its start, which
// b has read nothing of yet. The table of overrides then need not grow.
func estimateRows(b *bufio.Reader, file *os.File) int {
	info, err := file.Stat()
	start, _ := b.Peek(b.Size()) // an error comes again
	if err != nil || len(start) == 0 {
		return 0
	}
	size, lines := min(info.Size(), maxOverrideBytes), int64(bytes.Count(start, []byte{'\n'}))
	return int(min(size*lines/int64(len(start)), maxOverrides))
}

// addOverride adds an override of the limit to a table. An error is about the part
// of the key with the index that is returned.
func (d *draft) addOverride(table map[digest]override, parts []string, row override) (part int, err error) {
	if len(parts) != len(d.key) {
		return 0, fmt.Errorf("want %d parts, as the limit's key has, not %d", len(d.key), len(parts))
	}
	for i, part := range parts {
		if err := checkPart(part); err != nil {
			return i, err
		}
	}
	if t := row.tier; d.cost.expression == nil && t.hasBucket() && d.cost.constant > t.holds() {
		return 0, fmt.Errorf("the limit's cost of %d exceeds the %s of %d, so every request would be denied",
			d.cost.constant, t.holder(), t.holds())
	}
	var digests [maxKeyParts]digest
	for i, part := range parts {
		if digests[i], err = d.key[i].digestOfPart(part); err != nil {
			return i, err
		}
	}
	sum, before := digestOf(digests[:len(parts)]), len(table)
	if table[sum] = row; len(table) == before { // one look-up, not two; the config is invalid
		return 0, errors.New("duplicate key; want one override for each key")
	}
	d.enforces, d.shadows = d.enforces || row.tier.mode == "enforce", d.shadows || row.tier.mode == "shadow"
	d.notes(row.tier)
	return 0, nil
}
