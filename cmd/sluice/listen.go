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

// splitAddress reads a listen address: host:port, or unix:// and an absolute path.
func splitAddress(addr string) (network, address string, err error) {
	if path, ok := strings.CutPrefix(addr, "unix://"); ok {
		if !filepath.IsAbs(path) {
			return "", "", fmt.Errorf("%q: allowed are host:port and unix:///absolute/path", addr)
		}
		if most := 107; len(path) > most { // of Linux
			return "", "", fmt.Errorf("%q: a path of %d bytes; a unix socket's has at most %d", addr, len(path), most)
		}
		return "unix", path, nil
	}
	if _, port, err := net.SplitHostPort(addr); err != nil || port == "" {
		return "", "", fmt.Errorf("%q: allowed are host:port and unix:///absolute/path", addr)
	}
	return "tcp", addr, nil
}

// listen binds an address. On a unix socket everybody may connect: Envoy runs as another user, and who may reach the socket is
// for its directory to say.
func listen(addr string, log *zap.Logger) (net.Listener, error) {
	network, address, err := splitAddress(addr)
	if err != nil {
		return nil, err
	}
	if network == "tcp" {
		l, err := net.Listen(network, address)
		return l, plain(err)
	}
	return listenUnix(address, log)
}

// listenUnix binds a socket's path. A socket that nobody listens on any more is replaced; one that somebody listens on is in use.
func listenUnix(path string, log *zap.Logger) (net.Listener, error) {
	// Two processes that start at once must not take each other's fresh socket for a stale one, so the directory is
	// locked from the look to the bind.
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return nil, err
	}
	defer func() { _ = dir.Close() }()
	err = syscall.Flock(int(dir.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
	if errors.Is(err, syscall.EWOULDBLOCK) {
		log.Warn("waiting for another process to release its lock on the socket's directory", zap.String("directory", dir.Name()))
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
		return nil, fmt.Errorf("%s is there and is no socket", path)
	default:
		conn, err := net.DialTimeout("unix", path, time.Second)
		if err == nil {
			_ = conn.Close()
			return nil, fmt.Errorf("listen unix %s: address already in use", path)
		}
		if !errors.Is(err, syscall.ECONNREFUSED) {
			return nil, fmt.Errorf("%s: is somebody listening? %w", path, plain(err))
		}
		if err := os.Remove(path); err != nil {
			return nil, err
		}
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, plain(err)
	}
	// By the time that this process ends the path may be its successor's.
	l.SetUnlinkOnClose(false)
	if err := os.Chmod(path, 0o666); err != nil {
		_ = l.Close()
		return nil, err
	}
	return l, nil
}

// plain says "listen tcp 127.0.0.1:80: address already in use" without the system call's name.
func plain(err error) error {
	var op *net.OpError
	var call *os.SyscallError
	if errors.As(err, &op) && errors.As(op.Err, &call) {
		op.Err = call.Err
	}
	return err
}
