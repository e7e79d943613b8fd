package policy

import (
	"maps"
	"net/url"
	"strings"
	"time"
	"unicode"

	"github.com/sluiceproxy/sluice/limiter"
)

func (f *configFile) readRedis(n node) {
	f.redisAt, f.redisNode = n, n
	fields := f.access(&f.store.Username, &f.store.Password, &f.config.passwordFile, &f.store.TLS)
	maps.Copy(fields, map[string]func(node){
		"url": func(n node) {
			f.redisAt = n
			f.store.URL, _ = f.text(n)
			f.leaveOut(n, withoutUser(f.store.URL))
		},
		"mode": func(n node) {
			var s string
			f.oneOf(n, &s, string(limiter.Single), string(limiter.Cluster), string(limiter.Sentinel))
			f.store.Mode = limiter.RedisMode(s)
		},
		"addresses": func(n node) {
			texts(&f.reader, n, &f.store.Addresses, func(s string) (string, error) { return s, tcp(s) })
		},
		"master": func(n node) { f.store.Master, _ = f.text(n) },
		"sentinel": func(n node) {
			s := &limiter.SentinelOptions{}
			f.mapping(n, f.access(&s.Username, &s.Password, &f.config.sentinelPasswordFile, &s.TLS))
			f.store.Sentinel = s
		},
		"key_prefix": f.checked(&f.keyPrefix, checkDomain),
		"timeout":    func(n node) { f.duration(n, &f.store.Timeout, time.Millisecond, time.Minute) },
	})
	f.redis = f.mapping(n, fields)
}

// access returns the fields username, password, password_file and tls. It sets
// *isFile if the password is that of a file.
func (f *configFile) access(username, password *string, isFile *bool, tls **limiter.TLS) map[string]func(node) {
	passwords := 0
	one := func(read func(node) (string, bool)) func(node) {
		return func(n node) {
			if passwords++; passwords > 1 {
				f.wrong(n, "password and password_file are mutually exclusive")
				return
			}
			if s, ok := read(n); ok {
				*password = s
			}
			*isFile = strings.HasSuffix(n.field, "_file")
		}
	}
	return map[string]func(node){
		"tls":      func(n node) { *tls = f.readTLS(n) },
		"username": func(n node) { *username, _ = f.text(n) },
		"password": one(func(n node) (string, bool) {
			f.leaveOut(n, "")
			return f.text(n)
		}),
		"password_file": one(f.secretFile),
	}
}

// readTLS reads how servers are known. The files are read when it is used.
func (f *configFile) readTLS(n node) *limiter.TLS {
	c := &limiter.TLS{}
	file := func(into *string) func(node) {
		return func(n node) {
			if s, ok := f.text(n); ok {
				*into = f.path(s)
			}
		}
	}
	f.mapping(n, map[string]func(node){
		"ca_file":     file(&c.CAFile),
		"cert_file":   file(&c.CertFile),
		"key_file":    file(&c.KeyFile),
		"server_name": func(n node) { c.ServerName, _ = f.text(n) },
	})
	return c
}

// hideStore is hide for what is wrong with store.redis as a whole. Some of it
// is the library's, which does not quote: there whatever may be a secret is
// hidden, up to the semicolon behind which sluice says what is allowed.
func (f *configFile) hideStore(message string) string {
	message = f.hide(f.redisNode.Node, message)
	what, allowed, more := strings.Cut(message, "; ")
	if more {
		allowed = "; " + allowed
	}
	for name, value := range f.variables {
		if strings.ContainsFunc(value, func(c rune) bool { return !unicode.IsLetter(c) }) { // else it may be a word of the message
			what = strings.ReplaceAll(what, value, "${"+name+"}")
		}
	}
	return what + allowed
}

// withoutUser is a URL without its user and password, or "" where it is none.
func withoutUser(s string) string {
	u, err := url.Parse(s)
	if err != nil {
		return ""
	}
	u.User, u.RawQuery = nil, ""
	return u.String()
}
