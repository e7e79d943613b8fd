package limiter

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"

	"github.com/redis/go-redis/v9"
)

// refusal is an error of Redis, or of the connection to it, with its fix.
type refusal struct {
	err error
	fix string
}

func (r *refusal) Error() string { return r.err.Error() + "; " + r.fix }
func (r *refusal) Unwrap() error { return r.err }

// explain returns err as a *StoreError, shortened, and with the fix if it is
// known.
func (o *RedisOptions) explain(err error) *StoreError {
	failed := storeError(err)
	if errors.As(failed.Err, new(*refusal)) {
		return failed
	}
	kind, cause := failed.Kind, shorten(failed.Err)
	fix := o.fixOf(kind, failed.Err)
	switch {
	case strings.Contains(err.Error(), unreachableSentinels) && errors.Is(err, redis.Nil):
		kind, cause = KindConnection, fmt.Errorf("no sentinel knows a master with the name %q", o.Master)
		fix = "check store.redis.master, and SENTINEL MASTERS on a sentinel"
	case strings.Contains(cause.Error(), "DENIED Redis is running in protected mode"):
		kind = KindAuth
	case strings.Contains(cause.Error(), "max number of clients reached"):
		kind = KindConnection
	}
	if fix == "" && kind == failed.Kind && cause.Error() == failed.Err.Error() {
		return failed
	}
	if fix != "" {
		cause = &refusal{cause, fix}
	}
	return &StoreError{Kind: kind, Err: cause}
}

// fixOf returns the fix of an error; empty if it is unknown.
func (o *RedisOptions) fixOf(kind ErrorKind, err error) string {
	text := err.Error()
	has := func(s string) bool { return strings.Contains(text, s) }
	ofSentinel := has(unreachableSentinels)
	var name *net.DNSError
	switch {
	case has("DENIED Redis is running in protected mode"):
		return "give Redis a password (requirepass, or ACL SETUSER) and sluice the same one, " +
			"or set protected-mode no if only trusted hosts reach it"
	case has("max number of clients reached"):
		return "raise maxclients in Redis, or find the clients that hold its connections (CLIENT LIST)"
	case ofSentinel && kind == KindAuth, ofSentinel && has("NOAUTH"), ofSentinel && has("WRONGPASS"):
		return "check store.redis.sentinel.username and store.redis.sentinel.password"
	case has("NOAUTH"):
		return "Redis requires a password: set store.redis.password or password_file"
	case has("WRONGPASS"):
		return "check store.redis.username and password, and ACL LIST in Redis"
	case has("cluster support disabled"):
		return "this is a single Redis: set store.redis.mode: single and url"
	case o.Mode != Cluster && (has("MOVED ") || has("CROSSSLOT ") || has("CLUSTERDOWN ")):
		return "this Redis is a cluster node: set store.redis.mode: cluster"
	case has("unknown command 'time'"), has("unknown command 'TIME'"):
		return "if this is a sentinel, set store.redis.mode: sentinel with addresses and master; " +
			"if it is a proxy, connect to Redis itself"
	case errors.Is(err, errIsSentinel):
		return "set store.redis.mode: sentinel with addresses and master"
	case errors.As(err, &name):
		return "check the host name in store.redis and the DNS of this machine"
	}
	return ""
}

// unreachableSentinels begins the library's error if no sentinel names the
// master.
const unreachableSentinels = "redis: all sentinels specified in configuration are unreachable"

var errIsSentinel = errors.New("this is a sentinel, not a Redis")

// maxErrorText is how many bytes of an error's text are kept. Redis's error for
// its protected mode fills a page.
const maxErrorText = 300

// shorten returns the error, or one with a shorter text on one line.
func shorten(err error) error {
	text := err.Error()
	short := strings.ReplaceAll(strings.Replace(text, unreachableSentinels, "no sentinel answers", 1), "\n", "; ")
	if len(short) > maxErrorText {
		short = strings.ToValidUTF8(short[:maxErrorText], "") + "..."
	}
	if short == text {
		return err
	}
	return &shortened{err, short}
}

// shortened is an error with another text.
type shortened struct {
	error
	text string
}

func (s *shortened) Error() string { return s.text }
func (s *shortened) Unwrap() error { return s.error }

// storeError returns an error of the library as a *StoreError.
func storeError(err error) *StoreError {
	if known, ok := errors.AsType[*StoreError](err); ok {
		return known
	}
	var network net.Error
	var answer redis.Error
	kind := KindOther
	switch {
	case errors.Is(err, errReply):
		kind = KindScript
	case errors.Is(err, context.DeadlineExceeded),
		errors.Is(err, redis.ErrPoolTimeout),
		errors.Is(err, redis.ErrPoolExhausted):
		kind = KindTimeout
	case errors.Is(err, context.Canceled): // the caller is gone; nothing is wrong with Redis
	case errors.As(err, &network) && network.Timeout():
		kind = KindTimeout
	case errors.As(err, &answer):
		code, text, _ := strings.Cut(answer.Error(), " ")
		if kind = kindOfCode(code); strings.HasPrefix(text, "The user executing the script") ||
			strings.HasPrefix(text, "ACL failure in script") {
			kind = KindAuth
		}
	default: // EOF, reset, refused, TLS, closed: all that is not an answer
		kind = KindConnection
	}
	return &StoreError{Kind: kind, Err: err}
}

// kindOfCode returns the kind of an error of Redis by its first word.
func kindOfCode(code string) ErrorKind {
	switch strings.TrimSuffix(code, ":") {
	case "NOAUTH", "WRONGPASS", "NOPERM":
		return KindAuth
	case "READONLY", "NOREPLICAS", "MISCONF", "MASTERDOWN":
		return KindReadOnly
	case "OOM":
		return KindOOM
	case "LOADING":
		return KindLoading
	case "NEWER":
		return KindState
	case "ERR", "SLUICE", "NOSCRIPT", "BUSY", "UNKILLABLE":
		return KindScript
	}
	return KindOther
}
