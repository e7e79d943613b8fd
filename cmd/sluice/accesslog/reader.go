package accesslog

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync/atomic"

	"github.com/klauspost/compress/zstd"
)

// decompress returns a reader of what r contains, decompressed if it is gzip or
// zstd.
func decompress(r io.Reader) (io.Reader, error) {
	b := bufio.NewReaderSize(r, 64<<10)
	magic, _ := b.Peek(4)
	switch {
	case bytes.HasPrefix(magic, []byte{0x1f, 0x8b}):
		z, err := gzip.NewReader(b)
		if err != nil {
			return nil, fmt.Errorf("damaged gzip: %w", err)
		}
		return whole{z}, nil
	case bytes.Equal(magic, []byte{0x28, 0xb5, 0x2f, 0xfd}):
		z, err := zstd.NewReader(b, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true))
		if err != nil {
			return nil, fmt.Errorf("damaged zstd: %w", err)
		}
		return whole{z.IOReadCloser()}, nil
	}
	return b, nil
}

// errCut reports a compressed log that ends before its end, such as one that is
// still being written.
var errCut = errors.New("the compressed data ends too early")

// whole reads compressed data, and returns errCut where io.ErrUnexpectedEOF would
// be taken for that of io.ReadFull.
type whole struct{ io.ReadCloser }

func (w whole) Read(b []byte) (int, error) {
	n, err := w.ReadCloser.Read(b)
	if errors.Is(err, io.ErrUnexpectedEOF) {
		err = errCut
	}
	return n, err //nolint:wrapcheck // a reader's errors are the reader's below it
}

// tail is how much of the end of a file is read to find the time of its end.
const tail = 1 << 20

// Last returns the time of the latest request of the log, in microseconds since
// 1970; 0 if there is none. A log that can be read only once is kept in a
// temporary file.
func (s *Source) Last() (last int64, err error) {
	if s.stdin != nil && s.spool == nil {
		if err := s.keep(); err != nil {
			return 0, fmt.Errorf("%s: %w", s.Name, err)
		}
	}
	r, err := s.Start()
	if err != nil {
		return 0, err
	}
	defer r.Close()
	if f, ok := r.file.(*os.File); ok && !s.isCompressed && s.Size > tail {
		if _, err := f.Seek(-tail, io.SeekEnd); err != nil {
			return 0, fmt.Errorf("%s: %w", s.Name, withoutPath(err))
		}
		r.from, r.line = f, 2 // the first line is cut, and cannot be read
	}
	p := s.NewParser()
	for {
		c, err := r.Next()
		if errors.Is(err, io.EOF) {
			return last, nil
		}
		if err != nil {
			return last, err
		}
		p.Parse(c, func(e *Entry) { last = max(last, e.At) })
	}
}

// keep copies a log that can be read only once to a temporary file.
func (s *Source) keep() error {
	f, err := os.CreateTemp("", "sluice-backtest-")
	if err != nil {
		return withoutPath(err)
	}
	_ = os.Remove(f.Name()) // the open file is enough
	s.spool = f
	s.Size, err = io.Copy(f, s.stdin)
	return err //nolint:wrapcheck // Last says of which log
}

// Chunk is a number of whole lines of a Source.
type Chunk struct {
	Text string
	Line int // number of the first line, from 1
}

// Reader reads the lines of a Source in their order. Read is safe for concurrent
// use with Next.
type Reader struct {
	source *Source
	file   io.Closer
	from   io.Reader
	read   *atomic.Int64
	rest   []byte // of a line
	line   int
	err    error
}

// Start begins to read the log. The caller must call Close.
func (s *Source) Start() (*Reader, error) {
	r := &Reader{source: s, line: 1, read: new(atomic.Int64)}
	switch {
	case s.spool != nil:
		r.from = &counter{io.NewSectionReader(s.spool, 0, s.Size), r.read}
		return r, nil
	case s.stdin != nil:
		r.from = &counter{s.stdin, r.read}
		return r, nil
	}
	f, err := os.Open(s.Name)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", s.Name, withoutPath(err))
	}
	r.file = f
	if r.from, err = decompress(&counter{f, r.read}); err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("%s: %w", s.Name, err)
	}
	return r, nil
}

// Close closes the file.
func (r *Reader) Close() {
	if z, ok := r.from.(io.Closer); ok {
		_ = z.Close()
	}
	if r.file != nil {
		_ = r.file.Close()
	}
}

// Read returns how many bytes of the file were read, compressed as they are.
func (r *Reader) Read() int64 { return r.read.Load() }

// counter counts what is read.
type counter struct {
	io.Reader
	read *atomic.Int64
}

func (c *counter) Read(b []byte) (int, error) {
	n, err := c.Reader.Read(b)
	c.read.Add(int64(n))
	return n, err //nolint:wrapcheck // a reader's errors are the reader's below it
}

// Next returns the next lines. After the last it returns io.EOF, and after an
// error that error.
func (r *Reader) Next() (Chunk, error) {
	if r.err != nil {
		return Chunk{}, r.err
	}
	size := max(chunkSize, 2*len(r.rest))
	for {
		buf := make([]byte, size)
		n := copy(buf, r.rest)
		m, err := io.ReadFull(r.from, buf[n:])
		buf = buf[:n+m]
		end := bytes.LastIndexByte(buf, '\n') + 1
		switch {
		case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
			r.err, end = io.EOF, len(buf)
		case err != nil:
			r.err, end = fmt.Errorf("%s: %w", r.source.Name, err), len(buf)
		case end == 0 && size < maxLine:
			r.rest, size = buf, 2*size // a line that is longer than a chunk
			continue
		case end == 0:
			end = len(buf) // of a line that is too long, the parts are no lines
		}
		r.rest = buf[end:]
		if end == 0 {
			return Chunk{}, r.err
		}
		c := Chunk{Text: string(buf[:end]), Line: r.line}
		r.line += bytes.Count(buf[:end], []byte{'\n'})
		return c, nil
	}
}

// BadLine is a line that cannot be read.
type BadLine struct {
	Source string
	Line   int    // from 1
	Text   string // quoted, escaped and cut
	Reason string
}

// Counts says what became of the lines of a Chunk.
type Counts struct {
	Lines     int64 // without empty ones and a header row
	Skipped   int64 // that cannot be read
	NoRequest int64 // on which the client sent no request
	Bad       []BadLine
}

// maxBad is how many lines of a Chunk are kept that cannot be read.
const maxBad = 3

// Parser parses Chunks of one Source. It is not safe for concurrent use.
type Parser struct {
	source *Source
	lines  lineParser
	entry  Entry
}

// NewParser returns a Parser.
func (s *Source) NewParser() *Parser { return &Parser{source: s, lines: s.parser()} }

// Parse calls use for each request of a Chunk, in the order of the lines. use
// must not keep the entry; texts in it are parts of the Chunk's.
func (p *Parser) Parse(c Chunk, use func(*Entry)) (counts Counts) {
	number := c.Line - 1
	for line := range strings.Lines(c.Text) {
		number++
		if number == 1 {
			line = strings.TrimPrefix(line, "\xef\xbb\xbf")
			if p.source.header {
				continue
			}
		}
		if line = strings.TrimRight(line, "\r\n"); strings.TrimSpace(line) == "" {
			continue
		}
		counts.Lines++
		p.entry.reset()
		err := p.lines.parse(line, &p.entry)
		switch {
		case err == nil:
			use(&p.entry)
		case errors.Is(err, errNoRequest):
			counts.NoRequest++
		default:
			if counts.Skipped++; len(counts.Bad) < maxBad {
				counts.Bad = append(counts.Bad, BadLine{p.source.Name, number, quote(line), err.Error()})
			}
		}
	}
	return counts
}
