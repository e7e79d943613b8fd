package policy

import (
	"crypto/sha256"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"slices"
	"time"

	"github.com/sluiceproxy/sluice/limiter"
)

// Inputs are the files that a config was read from, including those that could
// not be read.
type Inputs struct {
	// Paths are the files, and the directories in which files may appear that
	// match a pattern. The config can change only if one of them does.
	Paths []string
	// Hash covers the contents of all files. Equal hashes mean equal configs.
	// Treat it as a secret: it may cover files with secrets.
	Hash [sha256.Size]byte
	// Piped reports that the config came through a pipe, which can be read only
	// once. Only the files that it names can change.
	Piped bool

	text []byte // of a config that came through a pipe
}

// inputs collects the Inputs while a config is read.
type inputs struct {
	Inputs
	all    hash.Hash // of all contents
	public hash.Hash // of all contents except files with secrets
}

func newInputs() *inputs { return &inputs{all: sha256.New(), public: sha256.New()} }

func (in *inputs) add(path string) { in.Paths = append(in.Paths, path) }

// failed records a file that could not be read, so that the config is reloaded
// once it can be.
func (in *inputs) failed(file string, err error) {
	in.add(file)
	_, _ = fmt.Fprintf(in.all, "\x00%q\x01%v\x00", file, err)
}

// config reads the config file, at most maxFile+1 bytes of it. A pipe is read
// to its end, once: if before came through a pipe, its text is used again. A
// file that was loaded before must not have become a pipe since.
func (in *inputs) config(file string, before *Inputs) ([]byte, error) {
	var text []byte
	var err error
	switch {
	case before != nil && before.Piped:
		text, in.Piped = before.text, true
	case before == nil && isPipe(file):
		text, err = readPipe(file, maxFile+1)
		in.Piped = true
	default:
		text, err = readAtMost(file, maxFile+1)
	}
	if err != nil {
		in.failed(file, err)
		return nil, err
	}
	if in.Piped {
		in.text = text
	} else {
		in.add(file)
	}
	in.note(file, text)
	_, _ = in.public.Write(text)
	return text, nil
}

// read reads a file that the config names, at most limit+1 bytes of it.
func (in *inputs) read(file string, limit int) ([]byte, error) {
	text, err := readAtMost(file, limit+1)
	if err != nil {
		in.failed(file, err)
		return nil, err
	}
	in.add(file)
	in.note(file, text)
	return text, nil
}

func (in *inputs) note(file string, text []byte) {
	_, _ = fmt.Fprintf(in.all, "%s %d ", file, len(text))
	_, _ = in.all.Write(text)
}

// teeReader returns a reader of r, a file without secrets, that adds what is
// read to the hashes. No other file may be read before it ends.
func (in *inputs) teeReader(file string, r io.Reader) io.Reader {
	in.add(file)
	both := io.MultiWriter(in.all, in.public)
	_, _ = fmt.Fprintf(both, "\x00%q\x00", file) // a separator that cannot occur in a valid CSV file
	return io.TeeReader(r, both)
}

func (in *inputs) done() Inputs {
	slices.Sort(in.Paths)
	in.Paths = slices.Compact(in.Paths)
	in.Hash = [sha256.Size]byte(in.all.Sum(nil))
	return in.Inputs
}

func readAtMost(file string, limit int) ([]byte, error) {
	f, err := limiter.OpenFile(file)
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }()
	return io.ReadAll(io.LimitReader(f, int64(limit)))
}

// isPipe reports whether a path is a pipe, a terminal or another device, such
// as /dev/stdin, that can be read only once.
func isPipe(file string) bool {
	info, err := os.Stat(file)
	return err == nil && info.Mode()&(fs.ModeNamedPipe|fs.ModeCharDevice) != 0
}

// pipeTime is how long a config may take to arrive through a pipe.
const pipeTime = 30 * time.Second

// readPipe reads a pipe to its end. It fails after pipeTime, because the writer
// may never open or close the pipe.
func readPipe(file string, limit int) ([]byte, error) {
	type result struct {
		text []byte
		err  error
	}
	done := make(chan result, 1)
	go func() {
		f, err := os.Open(file)
		if err != nil {
			done <- result{err: err}
			return
		}
		defer func() { _ = f.Close() }()
		text, err := io.ReadAll(io.LimitReader(f, int64(limit)))
		done <- result{text, err}
	}()
	late := time.NewTimer(pipeTime)
	defer late.Stop()
	select {
	case r := <-done:
		return r.text, r.err
	case <-late.C:
		return nil, fmt.Errorf("the pipe was not written and closed within %v", pipeTime)
	}
}
