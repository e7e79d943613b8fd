package accesslog

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"
	"time"
)

// Formats are the values of Options.Format.
var Formats = []string{"auto", "common", "combined", "envoy", "json", "csv"}

// Options says how logs are read.
type Options struct {
	Format string  // one of Formats
	Fields []Field // what they say takes precedence
	// Wanted reports whether an attribute is of use; others are not read. nil
	// wants all.
	Wanted func(attribute string) bool
}

// ErrEmpty reports a log without a line.
var ErrEmpty = errors.New("empty")

// Source is one log whose format is known. Of one that can be read only once, as
// standard input, there is only one Reader, unless Last was called.
type Source struct {
	Name   string // of the file, or "stdin"
	Format string // for display: combined, JSON lines, ...
	// Grain is the unit in which the log gives times, at least a microsecond.
	Grain time.Duration
	// First is the time of the first line that was read, in microseconds since
	// 1970.
	First int64
	// Size is the size of the file in bytes, compressed as it is; 0: unknown.
	Size int64
	// Notes are what is assumed, in words.
	Notes []string

	holds  map[string]bool // attributes
	parser func() lineParser
	header bool     // the first line has the names of the columns
	spool  *os.File // a copy of stdin; nil: none
	// isCompressed says that a file is.
	isCompressed bool
	stdin        io.Reader // or a pipe, with the sample that was taken from it; nil: a file
}

// lineParser parses lines. It is not safe for concurrent use.
type lineParser interface {
	parse(line string, e *Entry) error
}

const (
	// sampleSize is how many bytes of a log are read to recognise its format, and
	// maxSample how many of its lines.
	sampleSize = 256 << 10
	maxSample  = 200
	// maxLine is the maximum length of a line in bytes.
	maxLine = 1 << 20
	// chunkSize is the size of a Chunk in bytes, unless a line is longer.
	chunkSize = 128 << 10
)

// Open recognises the format of the named file; "-" is stdin. The error begins
// with the name. It wraps ErrEmpty if there is no line.
func Open(name string, stdin io.Reader, o Options) (*Source, error) {
	s := &Source{Name: name}
	var from io.Reader
	once := name == "-" // it can be read only once
	if name == "-" {
		s.Name = "stdin"
		plain, err := decompress(stdin)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", s.Name, err)
		}
		from = plain
	} else {
		f, err := os.Open(name)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, withoutPath(err))
		}
		info, err := f.Stat()
		switch {
		case err != nil:
			_ = f.Close()
			return nil, fmt.Errorf("%s: %w", name, withoutPath(err))
		case info.IsDir():
			_ = f.Close()
			return nil, fmt.Errorf("%s: is a directory; name the logs in it", name)
		case info.Mode().IsRegular():
			s.Size = info.Size()
			defer func() { _ = f.Close() }() // Start opens it again
		default:
			once = true // a pipe
		}
		if from, err = decompress(f); err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		_, isPlain := from.(*bufio.Reader)
		s.isCompressed = !isPlain
	}
	sample := make([]byte, sampleSize)
	n, err := io.ReadFull(from, sample)
	isCut := errors.Is(err, errCut) // the lines before are of use
	if err != nil && !isCut && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
		return nil, fmt.Errorf("%s: %w", s.Name, err)
	}
	sample = sample[:n]
	if once {
		s.stdin = io.MultiReader(bytes.NewReader(sample), from)
	}
	if o.Wanted == nil {
		o.Wanted = func(string) bool { return true }
	}
	if err := s.recognise(sample, n == sampleSize, &o); err != nil {
		if isCut {
			err = errCut
		}
		return nil, fmt.Errorf("%s: %w", s.Name, err)
	}
	return s, nil
}

// withoutPath removes the name of the call and of the file from an error.
func withoutPath(err error) error {
	if p, ok := errors.AsType[*os.PathError](err); ok {
		return p.Err
	}
	return err
}

// recognise finds the format of a log by its first lines. isCut says that the
// sample does not end with a line.
func (s *Source) recognise(sample []byte, isCut bool, o *Options) error {
	if bytes.IndexByte(sample, 0) >= 0 {
		return errors.New("binary data; want an access log in text, JSON lines or CSV, plain or compressed by gzip or zstd")
	}
	sample = bytes.TrimPrefix(sample, []byte("\xef\xbb\xbf"))
	var lines []string
	for line := range strings.Lines(string(sample)) {
		complete := strings.HasSuffix(line, "\n") || !isCut
		if line = strings.TrimSpace(line); line != "" && complete && len(lines) < maxSample {
			lines = append(lines, line)
		}
	}
	switch {
	case len(sample) == 0 || len(lines) == 0 && !isCut:
		return ErrEmpty
	case len(lines) == 0:
		return fmt.Errorf("no line end within %d bytes; want an access log of lines", len(sample))
	}
	var candidates []candidate
	var failed error
	for _, find := range []func([]string, *Options) (*candidate, error){jsonCandidate, csvCandidate} {
		c, err := find(lines, o)
		if err != nil {
			failed = err
		}
		if c != nil {
			candidates = append(candidates, *c)
		}
	}
	candidates = append(candidates, textCandidates(o)...)
	best, read := -1, 0
	for i := range candidates {
		if n := candidates[i].count(lines); n > read {
			best, read = i, n
		}
	}
	if best < 0 {
		return unknownFormat(lines[0], failed, o)
	}
	c := &candidates[best]
	s.Format, s.parser, s.holds, s.header, s.Notes = c.name, c.parser, c.holds(), c.header, c.notes
	s.Grain, s.First = c.grain, c.first
	return nil
}

// unknownFormat says that no format reads the log.
func unknownFormat(line string, failed error, o *Options) error {
	if failed != nil {
		return failed
	}
	if o.Format != "auto" && o.Format != "" {
		return fmt.Errorf("not of the format %s; line 1 is %s; omit --format to have it recognized", o.Format, quote(line))
	}
	return fmt.Errorf("unknown format; line 1 is %s; want common, combined, Envoy's, sluice's or an ALB's text, "+
		"JSON lines, or CSV with a header row; or say which field of a line is what, from 1, as in "+
		"--field source.address=1 --field request.time=4 --field 'request line=5'", quote(line))
}

// candidate is a format that may be a log's.
type candidate struct {
	name     string
	parser   func() lineParser
	bindings []binding
	header   bool
	notes    []string

	first int64
	grain time.Duration
}

// holds returns the attributes that the format has.
func (c *candidate) holds() map[string]bool {
	all := make(map[string]bool)
	for _, b := range c.bindings {
		all[b.attribute] = true
	}
	for from, also := range map[string][]string{
		requestLine:          {"request.method", "request.path", "request.protocol"},
		"request.path":       {"request.url_path", "request.query"},
		"request.url_path":   {"request.path"},
		peerInXFF:            {"source.address"},
		"request.size":       {`request.headers["content-length"]`},
		"request.id":         {`request.headers["x-request-id"]`},
		"request.host":       {`request.headers[":authority"]`},
		"response.size":      {"response.total_size"},
		"request.total_size": {"request.size"},
	} {
		if all[from] {
			for _, name := range also {
				all[name] = true
			}
		}
	}
	if all["request.path"] {
		all["request.url_path"], all["request.query"] = true, true
	}
	return all
}

// count returns how many of the lines the format reads, and notes what their
// times are like.
func (c *candidate) count(lines []string) (n int) {
	if c.header {
		lines = lines[1:]
	}
	p, e := c.parser(), &Entry{}
	fraction := time.Second // the coarsest unit of all times
	for _, line := range lines {
		e.reset()
		err := p.parse(line, e)
		if err != nil && !errors.Is(err, errNoRequest) {
			continue
		}
		if n++; c.first == 0 && e.grain > 0 {
			c.first = e.At
		}
		if e.grain > 0 && (c.grain == 0 || e.grain < c.grain) {
			c.grain = e.grain
		}
		for e.grain > 0 && e.At%fraction.Microseconds() != 0 {
			fraction /= 10
		}
	}
	// The digits of a second may all be 0.
	if n >= 20 {
		c.grain = max(c.grain, fraction)
	}
	if c.grain == 0 {
		c.grain = time.Second
	}
	return n
}

func jsonCandidate(lines []string, o *Options) (*candidate, error) {
	if o.Format != "auto" && o.Format != "" && o.Format != "json" {
		return nil, nil
	}
	var sample []object
	for _, line := range lines {
		if object, err := parseJSON(line); err == nil {
			sample = append(sample, object)
		}
	}
	if len(sample) == 0 {
		return nil, nil
	}
	bindings, err := bindNamed(sample, o.Fields, o.Wanted)
	if err != nil {
		return nil, fmt.Errorf("JSON lines: %w", err)
	}
	c := &candidate{
		name: "JSON lines", bindings: bindings, parser: func() lineParser { return &jsonParser{bindings} },
	}
	c.notePeer()
	return c, nil
}

// notePeer notes where the address of the peer is taken from, if it is not a
// field of its own.
func (c *candidate) notePeer() {
	for _, b := range c.bindings {
		if b.attribute == peerInXFF {
			c.notes = append(c.notes, layouts[2].notes...)
		}
	}
}

func csvCandidate(lines []string, o *Options) (*candidate, error) {
	if o.Format != "auto" && o.Format != "" && o.Format != "csv" || strings.HasPrefix(lines[0], "{") {
		return nil, nil
	}
	comma := ','
	for _, other := range "\t;" {
		if strings.Count(lines[0], string(other)) > strings.Count(lines[0], string(comma)) {
			comma = other
		}
	}
	columns, _ := splitCSV(lines[0], comma) // a line that is no CSV has no columns
	if len(columns) < 2 && o.Format != "csv" {
		return nil, nil
	}
	for i := range columns {
		columns[i] = strings.TrimSpace(columns[i])
		if columns[i] == "" || strings.ContainsAny(columns[i], "\"[") { // not a header row
			if o.Format == "csv" {
				return nil, fmt.Errorf("CSV: line 1 is %s; want a header row with the names of the columns", quote(lines[0]))
			}
			return nil, nil
		}
	}
	bindings, err := bindNamed([]object{row{columns: columns}}, o.Fields, o.Wanted)
	if err != nil {
		if o.Format == "csv" {
			return nil, fmt.Errorf("CSV: %w", err)
		}
		return nil, nil
	}
	for i := range bindings {
		b := &bindings[i]
		if b.index < 0 {
			b.index = slices.Index(columns, b.name)
		}
		if b.index < 0 || b.index >= len(columns) {
			return nil, fmt.Errorf("CSV: no column %s; the columns are %s", quote(b.name), strings.Join(columns, ", "))
		}
	}
	c := &candidate{name: "CSV", bindings: bindings, header: true, parser: func() lineParser {
		return &csvParser{bindings: bindings, columns: len(columns), comma: comma}
	}}
	c.notePeer()
	return c, nil
}

func textCandidates(o *Options) (all []candidate) {
	for i := range layouts {
		l := &layouts[i]
		if o.Format != "auto" && o.Format != "" && o.Format != l.flag {
			continue
		}
		all = append(all, textCandidate(l, o))
	}
	// A format of the user's own, of which the fields say everything.
	hasTime := slices.ContainsFunc(o.Fields, func(f Field) bool { return f.Attribute == "request.time" })
	if hasTime && (o.Format == "auto" || o.Format == "") {
		all = append(all, textCandidate(&layout{name: "text by --field"}, o))
	}
	return all
}

func textCandidate(l *layout, o *Options) candidate {
	var bindings []binding
	users := make(map[string]bool)
	for _, f := range o.Fields {
		users[f.Attribute] = true
	}
	add := func(attribute string, index int, name string) {
		if !users[attribute] && (isBase(attribute) || o.Wanted(attribute)) {
			set, err := setterOf(attribute)
			if err == nil { // the tables are valid
				bindings = append(bindings, binding{attribute: attribute, set: set, index: index, name: name})
			}
		}
	}
	for _, index := range slices.Sorted(maps.Keys(l.at)) {
		add(l.at[index], index, "")
	}
	for _, name := range slices.Sorted(maps.Keys(l.named)) {
		add(l.named[name], -1, name)
	}
	if l.flag == "envoy" && l.name == "envoy" && !users["source.address"] {
		for _, index := range slices.Sorted(maps.Keys(l.at)) {
			if l.at[index] == xff {
				bindings = append(bindings, binding{attribute: peerInXFF, set: setters[peerInXFF], index: index})
			}
		}
	}
	for _, f := range o.Fields {
		bindings = append(bindings, binding{attribute: f.Attribute, set: f.set, index: f.index, name: f.Name, isUsers: true})
	}
	sortBindings(bindings)
	return candidate{name: l.name, bindings: bindings, notes: l.notes, parser: func() lineParser {
		return &textParser{layout: l, bindings: bindings}
	}}
}

// Holds reports whether the log has an attribute, named as policy names it.
func (s *Source) Holds(attribute string) bool {
	if s.holds[attribute] || s.holds[Whole(attribute)] {
		return true
	}
	// Of metadata, --field names a field of what the limit reads.
	for held := range s.holds {
		if strings.HasPrefix(held, attribute+".") {
			return true
		}
	}
	return false
}

// Whole returns the attribute of which a parameter or a cookie is a part, and
// other attributes as they are.
func Whole(attribute string) string {
	switch of, _, _ := strings.Cut(attribute, "["); of {
	case "request.params":
		return "request.query"
	case "request.cookies":
		return `request.headers["cookie"]`
	}
	return attribute
}
