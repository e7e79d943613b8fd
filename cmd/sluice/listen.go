package main

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"go.uber.org/zap"
)

const defaultGRPC = "127.0.0.1:9001"

// maxSocketPath is the maximum length of a unix socket's path on Linux, in
// bytes.
const maxSocketPath = 107

// splitAddress splits a listen address into network and address. It is
// host:port, or unix:// with an absolute path.
func splitAddress(addr string) (network, address string, err error) {
	const want = "%q: must be host:port or unix:///absolute/path"
	if path, ok := strings.CutPrefix(addr, "unix://"); ok {
		if !filepath.IsAbs(path) {
			return "", "", fmt.Errorf(want, addr)
		}
		if len(path) > maxSocketPath {
			return "", "", fmt.Errorf("%q: the path has %d bytes; the maximum for a unix socket is %d",
				addr, len(path), maxSocketPath)
		}
		return "unix", path, nil
	}
	if _, port, err := net.SplitHostPort(addr); err != nil || port == "" {
		return "", "", fmt.Errorf(want, addr)
	}
	return "tcp", addr, nil
}

// listen binds an address. Any user may connect to a unix socket, because Envoy
// runs as another user; the permissions of its directory restrict access.
func listen(addr string, log *zap.Logger) (net.Listener, error) {
	network, address, err := splitAddress(addr)
	if err != nil {
		return nil, err
	}
	if network == "tcp" {
		l, err := net.Listen(network, address)
		return l, trimSyscall(err)
	}
	return listenUnix(address, log)
}

// listenUnix binds a socket's path. It replaces a socket that no process listens
// on, and fails if one does.
func listenUnix(path string, log *zap.Logger) (net.Listener, error) {
	// Two processes that start at once must not take each other's new socket for
	// a stale one. So the directory is locked from the check to the bind.
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return nil, err
	}
	defer func() { _ = dir.Close() }()
	err = syscall.Flock(int(dir.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
	if errors.Is(err, syscall.EWOULDBLOCK) {
		log.Warn("waiting for another process to release its lock on the socket's directory",
			zap.String("directory", dir.Name()))
		err = syscall.Flock(int(dir.Fd()), syscall.LOCK_EX)
	}
	if err != nil {
		return nil, fmt.Errorf("lock %s: %w", dir.Name(), err)
	}

	switch info, err := os.Lstat(path); {
	case errors.Is(err, os.ErrNotExist):
	case err != nil:
		return nil, err
	case info.Mode()&os.ModeSocket == 0:
		return nil, fmt.Errorf("%s exists and is not a socket", path)
	default:
		conn, err := net.DialTimeout("unix", path, time.Second)
		if err == nil {
			_ = conn.Close()
			return nil, fmt.Errorf("listen unix %s: address already in use", path)
		}
		if !errors.Is(err, syscall.ECONNREFUSED) {
			return nil, fmt.Errorf("%s: cannot tell whether a process listens on it: %w", path, trimSyscall(err))
		}
		if err := os.Remove(path); err != nil {
			return nil, err
		}
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, trimSyscall(err)
	}
	// When this process ends, the path may be its successor's.
	l.SetUnlinkOnClose(false)
	if err := os.Chmod(path, 0o666); err != nil {
		_ = l.Close()
		return nil, err
	}
	return l, nil
}

// trimSyscall removes the name of the system call from a net.OpError: "listen
// tcp 127.0.0.1:80: address already in use".
func trimSyscall(err error) error {
	var op *net.OpError
	var call *os.SyscallError
	if errors.As(err, &op) && errors.As(op.Err, &call) {
		op.Err = call.Err
	}
	return err
}
