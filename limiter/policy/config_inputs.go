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

// Inputs are the files that a config was read from, or could not be read
// from.
type Inputs struct {
	// Paths are the files, and the directories in which more may appear.
	// Where one of them changes, the config may change.
	Paths []string
	// Hash covers the contents of all files: where it is equal, so is the
	// config. It is a secret if one of the files holds a secret.
	Hash [sha256.Size]byte
	// Piped says that the config came through a pipe, which can be read only
	// once. Only the files that it names can change.
	Piped bool

	text []byte // of a config that came through a pipe
}

// inputs collects Inputs.
type inputs struct {
	Inputs
	all    hash.Hash // of all contents
	public hash.Hash // of those that hold no secrets in files of their own
}

func newInputs() *inputs { return &inputs{all: sha256.New(), public: sha256.New()} }

func (in *inputs) add(path string) { in.Paths = append(in.Paths, path) }

// failed records a file that could not be read, so that the config is
// reloaded once it can be.
func (in *inputs) failed(file string, err error) {
	in.add(file)
	_, _ = fmt.Fprintf(in.all, "\x00%q\x01%v\x00", file, err)
}

// config reads the config file itself, of which maxFile bytes are allowed and
// one more is returned. A pipe is read to its end; again says that one has
// been read before, and that a file may not have become one since.
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

// read reads a file that the config names. Of one that is longer than most
// bytes it returns most and one more.
func (in *inputs) read(file string, most int) ([]byte, error) {
	text, err := readAtMost(file, most+1)
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

// reading returns r, and notes what is read of it: a file that holds no
// secret. Nothing else may be read meanwhile.
func (in *inputs) teeReader(file string, r io.Reader) io.Reader {
	in.add(file)
	both := io.MultiWriter(in.all, in.public)
	_, _ = fmt.Fprintf(both, "\x00%q\x00", file) // what follows has no such name in it, or is no CSV
	return io.TeeReader(r, both)
}

func (in *inputs) done() Inputs {
	slices.Sort(in.Paths)
	in.Paths = slices.Compact(in.Paths)
	in.Hash = [sha256.Size]byte(in.all.Sum(nil))
	return in.Inputs
}

func readAtMost(file string, most int) ([]byte, error) {
	f, err := limiter.OpenFile(file)
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }()
	return io.ReadAll(io.LimitReader(f, int64(most)))
}

// isPipe reports whether a path leads to what is read once, to its end: a
// pipe, a terminal or another device, such as /dev/stdin.
func isPipe(file string) bool {
	info, err := os.Stat(file)
	return err == nil && info.Mode()&(fs.ModeNamedPipe|fs.ModeCharDevice) != 0
}

// pipeTime is how long a config may take to come through a pipe.
const pipeTime = 30 * time.Second

// readPipe reads a pipe to its end. Who writes into it may come later, or
// never: after pipeTime it gives up.
func readPipe(file string, most int) ([]byte, error) {
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
		text, err := io.ReadAll(io.LimitReader(f, int64(most)))
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
