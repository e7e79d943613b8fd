package limiter

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"os"
	"syscall"
)

// errNotRegular reports a named pipe, a device or a socket where a file is
// wanted. Reading one may wait for ever, and what was read is gone.
var errNotRegular = errors.New("not a regular file")

// OpenFile opens a file that a config names, to read it. It never waits: what
// is not a regular file is refused, with an error that is errNotRegular. The
// error is an *os.PathError.
func OpenFile(name string) (*os.File, error) {
	f, err := os.OpenFile(name, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	switch {
	case err != nil:
	case info.IsDir():
		err = &os.PathError{Op: "read", Path: name, Err: syscall.EISDIR}
	case !info.Mode().IsRegular():
		err = &os.PathError{Op: "read", Path: name, Err: errNotRegular}
	default:
		return f, nil
	}
	_ = f.Close()
	return nil, err
}

// maxPEM is how many bytes a file with certificates or a key may have.
const maxPEM = 1 << 20

// readPEM reads a file with certificates or a key.
func readPEM(name string) ([]byte, error) {
	f, err := OpenFile(name)
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }()
	text, err := io.ReadAll(io.LimitReader(f, maxPEM+1))
	if err == nil && len(text) > maxPEM {
		err = fmt.Errorf("%s: more than %d bytes", name, maxPEM)
	}
	return text, err
}

// readPair is tls.LoadX509KeyPair that never waits.
func readPair(certFile, keyFile string) (tls.Certificate, error) {
	cert, err := readPEM(certFile)
	if err != nil {
		return tls.Certificate{}, err
	}
	key, err := readPEM(keyFile)
	if err != nil {
		return tls.Certificate{}, err
	}
	return tls.X509KeyPair(cert, key)
}
