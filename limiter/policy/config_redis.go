package policy

import (
	"cmp"
	"maps"
	"net/url"
	"strings"
	"time"
	"unicode"

	"github.com/goccy/go-yaml/ast"

	"github.com/sluiceproxy/sluice/limiter"
)

// shellVariable matches how shells and Kubernetes write variables.
var shellVariable = whenUsed(`^\$\(?([A-Za-z_][A-Za-z0-9_]*)\)?$`)

func (cr *configReader) readRedis(n node) {
	cr.redisAt, cr.redisNode = n, n
	if _, isText := n.Node.(*ast.StringNode); isText {
		cr.wrong(n, "must be a mapping, not a string; write redis: {url: ...}")
		return
	}
	fields := cr.accessFields(&cr.store.Username, &cr.store.Password, &cr.config.passwordFile, &cr.store.TLS)
	maps.Copy(fields, map[string]func(node){
		"url": func(n node) {
			cr.redisAt = n
			var ok bool
			if cr.store.URL, ok = cr.text(n); ok && shellVariable().MatchString(cr.store.URL) && !takesVariables(n) {
				cr.wrong(n, "an environment variable is written ${%s}", shellVariable().FindStringSubmatch(cr.store.URL)[1])
				ok = false
			}
			if !ok {
				cr.store.URL, cr.redisIncomplete = "", true
			}
			cr.hideFromHash(n, withoutUser(cr.store.URL))
		},
		"mode": func(n node) {
			var s string
			cr.oneOf(n, &s, string(limiter.Single), string(limiter.Cluster), string(limiter.Sentinel))
			cr.store.Mode = limiter.RedisMode(s)
			cr.redisIncomplete = cr.redisIncomplete || s == ""
		},
		"addresses": func(n node) {
			before := len(cr.mistakes)
			readStrings(&cr.reader, n, &cr.store.Addresses, func(s string) (string, error) { return s, checkHostPort(s) })
			cr.redisIncomplete = cr.redisIncomplete || len(cr.mistakes) > before
		},
		"master": func(n node) {
			var ok bool
			cr.store.Master, ok = cr.text(n)
			cr.redisIncomplete = cr.redisIncomplete || !ok
		},
		"sentinel": func(n node) {
			s := &limiter.SentinelOptions{}
			cr.mapping(n, cr.accessFields(&s.Username, &s.Password, &cr.config.sentinelPasswordFile, &s.TLS))
			cr.store.Sentinel = s
		},
		"key_prefix": cr.checked(&cr.keyPrefix, checkDomain),
		"timeout": func(n node) {
			cr.timeoutAt = n
			cr.duration(n, &cr.store.Timeout, time.Millisecond, time.Minute)
		},
	})
	cr.redis = true
	if !cr.mapping(n, fields) {
		cr.redisIncomplete = true
	}
}

// checkRedis reports what is wrong with store.redis, except what may only seem to
// be so because a field of it is misspelled, or has a mistake.
func (cr *configReader) checkRedis(o limiter.RedisOptions) {
	if cr.redisAt.Node == nil || cr.redisIncomplete && o.URL == "" {
		return
	}
	switch {
	case !cr.redisIncomplete:
	case o.Mode == "":
		o.Addresses, o.Master, o.Sentinel = nil, "", nil // which need a mode
	case o.Mode == limiter.Sentinel:
		o.Master = cmp.Or(o.Master, "any")
	}
	if err := o.Validate(); err != nil {
		cr.wrong(cr.redisAt, "%s", cr.hideStoreVariables(err.Error()))
	}
}

// accessFields returns readers of username, password, password_file and tls.
// They set *isFile if the password is read from a file.
func (cr *configReader) accessFields(username, password *string, isFile *bool,
	tls **limiter.TLS) map[string]func(node) {
	passwords := 0
	one := func(read func(node) (string, bool)) func(node) {
		return func(n node) {
			if passwords++; passwords > 1 {
				cr.wrong(n, "password and password_file are mutually exclusive")
				return
			}
			if s, ok := read(n); ok {
				*password = s
			}
			*isFile = strings.HasSuffix(n.field, "_file")
		}
	}
	return map[string]func(node){
		"tls":      func(n node) { *tls = cr.readTLS(n) },
		"username": func(n node) { *username, _ = cr.text(n) },
		"password": one(func(n node) (string, bool) {
			cr.hideFromHash(n, "")
			return cr.text(n)
		}),
		"password_file": one(cr.readSecretFile),
	}
}

// readTLS reads the TLS settings of the connection to servers. The files are
// read when a connection is made.
func (cr *configReader) readTLS(n node) *limiter.TLS {
	c := &limiter.TLS{}
	file := func(into *string) func(node) {
		return func(n node) {
			if s, ok := cr.text(n); ok {
				*into = cr.path(s)
			}
		}
	}
	complete := cr.mapping(n, map[string]func(node){
		"ca_file":     file(&c.CAFile),
		"cert_file":   file(&c.CertFile),
		"key_file":    file(&c.KeyFile),
		"server_name": func(n node) { c.ServerName, _ = cr.text(n) },
	})
	if !complete { // one of a pair may only seem to be missing
		c.CertFile, c.KeyFile = "", ""
	}
	return c
}

// hideStoreVariables is hideVariables for an error about store.redis as a
// whole. Part of that is the Redis library's, which does not quote values. So
// the values of all variables that may be secrets are hidden, up to the first
// semicolon, after which sluice says what to write.
func (cr *configReader) hideStoreVariables(message string) string {
	message = cr.hideVariables(cr.redisNode.Node, message)
	what, allowed, more := strings.Cut(message, "; ")
	if more {
		allowed = "; " + allowed
	}
	for name, value := range cr.variables {
		// A value of letters only might be a word of the message.
		if strings.ContainsFunc(value, func(c rune) bool { return !unicode.IsLetter(c) }) {
			what = strings.ReplaceAll(what, value, "${"+name+"}")
		}
	}
	return what + allowed
}

// withoutUser returns a URL without its user and password, or "" if it is
// invalid.
func withoutUser(s string) string {
	u, err := url.Parse(s)
	if err != nil {
		return ""
	}
	u.User, u.RawQuery = nil, ""
	return u.String()
}
