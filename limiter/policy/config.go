// Package policy says which buckets a request draws from: it reads the config, finds the limits that apply to a request, and
// makes the keys of their buckets. Plain strings come in (Request), charges go out (Config.Draw).
package policy

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/goccy/go-yaml/ast"

	"github.com/sluiceproxy/sluice/limiter"
)

// Config is a config that was read, checked and compiled. It is not changed any more, and safe for concurrent use.
type Config struct {
	Domain        string
	Listen        Listen
	Redis         *limiter.RedisOptions // nil: the buckets are in this process
	FailureStatus int                   // the HTTP status of a refused request, 500 to 599
	Headers       Headers
	Grace         time.Duration // for what is in flight at the end; 0 or more
	LogLevel      string        // debug, info, warn or error

	limits []*rule
	client clientIP
	hasher hasher
}

// Listen is where the sidecar listens: host:port each, or for GRPC also unix:///path.
type Listen struct {
	GRPC    string // for Envoy's checks
	Admin   string // for its operators
	Metrics string // /metrics, /healthz, /readyz
}

// Headers says which headers an answer has.
type Headers struct {
	XRateLimit bool // x-ratelimit-limit, -remaining, -reset
	RetryAfter bool // retry-after, on a denial
	RateLimit  bool // the IETF's RateLimit and RateLimit-Policy
}

// Limits are the file's, in its order.
func (c *Config) Limits() []*limiter.Limit {
	limits := make([]*limiter.Limit, len(c.limits))
	for i, l := range c.limits {
		limits[i] = l.limit
	}
	return limits
}

// FailsClosed reports whether an enforced limit of the file refuses requests while the store does not answer.
func (c *Config) FailsClosed() bool {
	return slices.ContainsFunc(c.limits, func(l *rule) bool {
		return !l.limit.Shadow && l.limit.OnFailure == limiter.Deny
	})
}

// Load reads a config file; "" is a file that says nothing. overrides are over what it says, the later ones over the earlier. getenv is
// what ${NAME} in it looks up. The error is a Mistakes, with every mistake in it.
func Load(file string, getenv func(string) (string, bool), overrides ...Override) (*Config, error) {
	if file == "" {
		return Parse("", nil, getenv, overrides...)
	}
	text, err := os.ReadFile(file)
	if err != nil {
		var path *os.PathError
		if errors.As(err, &path) {
			err = path.Err
		}
		return nil, Mistakes{{File: file, Message: err.Error()}}
	}
	return Parse(file, text, getenv, overrides...)
}

// Parse is Load for a text that is already there. name is what mistakes call it; the files that it names are relative to name's
// directory.
func Parse(name string, text []byte, getenv func(string) (string, bool), overrides ...Override) (*Config, error) {
	f := configFile{
		reader:    reader{file: name, getenv: getenv},
		overrides: overrides,
		domain:    "default",
		keyPrefix: "sluice",
		mode:      "enforce",
		onFailure: "deny",
		timeout:   100 * time.Millisecond,
		config: Config{
			Listen:        Listen{GRPC: "127.0.0.1:9001", Admin: "127.0.0.1:9002", Metrics: "127.0.0.1:9003"},
			FailureStatus: 503,
			Headers:       Headers{XRateLimit: true, RetryAfter: true},
			Grace:         10 * time.Second,
			LogLevel:      "info",
			client:        clientIP{anyone: true},
		},
	}
	f.override(true)
	if root := f.document(text); root != nil {
		f.readFile(*root)
	}
	f.override(false)
	c := f.compile()
	if len(f.mistakes) > 0 {
		slices.SortStableFunc(f.mistakes, func(a, b Mistake) int {
			if a.Line != b.Line {
				return a.Line - b.Line
			}
			return a.Column - b.Column
		})
		return nil, f.mistakes
	}
	return c, nil
}

// configFile is a config on its way from text to Config.
type configFile struct {
	reader
	overrides []Override
	config    Config

	domain, keyPrefix, mode, onFailure string
	redis                              bool
	redisAt                            node
	redisURL, username, password       string
	timeout                            time.Duration
	drafts                             []*draft
}

var (
	nameOf   = regexp.MustCompile(`^[a-z0-9-]{1,63}$`)
	domainOf = regexp.MustCompile(`^[A-Za-z0-9._/-]{1,253}$`)
	headerOf = regexp.MustCompile("^[a-z0-9!#$%&'*+.^_`|~-]+$")
)

func checkDomain(s string) error {
	if !domainOf.MatchString(s) {
		return fmt.Errorf("%q; allowed are 1 to 253 of letters, digits and . _ / -", s)
	}
	return nil
}

func checkListen(s string) error {
	if path, ok := strings.CutPrefix(s, "unix://"); ok && filepath.IsAbs(path) {
		return nil
	}
	return checkTCP(s, " and unix:///absolute/path")
}

func checkTCP(s, also string) error {
	if _, port, err := net.SplitHostPort(s); err == nil && port != "" {
		if _, err := net.LookupPort("tcp", port); err == nil {
			return nil
		}
	}
	return fmt.Errorf("%q; allowed are host:port%s", s, also)
}

// checked reads a text that check accepts.
func (f *configFile) checked(into *string, check func(string) error) func(node) {
	return func(n node) {
		s, ok := f.text(n)
		if !ok {
			return
		}
		if err := check(s); err != nil {
			f.wrong(n, "%v", err)
			return
		}
		*into = s
	}
}

func tcp(s string) error { return checkTCP(s, "") }

func (f *configFile) readFile(root node) {
	c := &f.config
	f.mapping(root, map[string]func(node){
		"domain": f.checked(&f.domain, checkDomain),
		"listen": func(n node) {
			f.mapping(n, map[string]func(node){
				"grpc":    f.checked(&c.Listen.GRPC, checkListen),
				"admin":   f.checked(&c.Listen.Admin, tcp),
				"metrics": f.checked(&c.Listen.Metrics, tcp),
			})
		},
		"store": func(n node) {
			f.mapping(n, map[string]func(node){"redis": f.readRedis})
		},
		"mode":       func(n node) { f.oneOf(n, &f.mode, "enforce", "shadow") },
		"on_failure": func(n node) { f.readOnFailure(n, &f.onFailure) },
		"failure_status": func(n node) {
			v := int64(c.FailureStatus)
			f.whole(n, &v, 500, 599)
			c.FailureStatus = int(v)
		},
		"grace":           func(n node) { f.duration(n, &c.Grace, 0, time.Hour) },
		"log_level":       func(n node) { f.oneOf(n, &c.LogLevel, "debug", "info", "warn", "error") },
		"key_secret":      func(n node) { f.readSecret(n, f.text) },
		"key_secret_file": func(n node) { f.readSecret(n, f.secretFile) },
		"headers":         f.readHeaders,
		"client_ip":       f.readClientIP,
		"limits":          f.readLimits,
	})
}

// readOnFailure reads a failure mode.
func (f *configFile) readOnFailure(n node, into *string) {
	f.oneOf(n, into, "deny", "allow", "delegate")
}

var failureModes = map[string]limiter.FailureMode{"deny": limiter.Deny, "allow": limiter.Allow, "delegate": limiter.Delegate}

func (f *configFile) readRedis(n node) {
	f.redisAt = n
	var passwords []node
	password := func(read func(node) (string, bool)) func(node) {
		return func(n node) {
			if passwords = append(passwords, n); len(passwords) > 1 {
				f.wrong(n, "a second password; allowed is one of password and password_file")
				return
			}
			if s, ok := read(n); ok {
				f.password = s
			}
		}
	}
	f.redis = f.mapping(n, map[string]func(node){
		"url": func(n node) {
			f.redisAt = n
			f.redisURL, _ = f.text(n)
		},
		"username":      func(n node) { f.username, _ = f.text(n) },
		"password":      password(f.text),
		"password_file": password(f.secretFile),
		"key_prefix":    f.checked(&f.keyPrefix, checkDomain),
		"timeout":       func(n node) { f.duration(n, &f.timeout, time.Millisecond, time.Minute) },
	})
}

// secretFile reads the file that a value names. The line's end at its end, which editors add, is no part of the secret.
func (f *configFile) secretFile(n node) (string, bool) {
	name, ok := f.text(n)
	if !ok {
		return "", false
	}
	if !filepath.IsAbs(name) {
		name = filepath.Join(filepath.Dir(f.file), name)
	}
	text, err := os.ReadFile(name)
	if err != nil {
		f.wrong(n, "%v", err)
		return "", false
	}
	secret := strings.TrimRight(string(text), "\r\n")
	if secret == "" || len(secret) > 4096 {
		f.wrong(n, "%s holds %d bytes; allowed are 1 to 4096", name, len(secret))
		return "", false
	}
	return secret, true
}

func (f *configFile) readSecret(n node, read func(node) (string, bool)) {
	if f.config.hasher.secret != nil {
		f.wrong(n, "a second secret; allowed is one of key_secret and key_secret_file")
		return
	}
	s, ok := read(n)
	if !ok {
		return
	}
	if s == "" {
		f.wrong(n, "an empty secret; leave the field out, or give it a value")
		return
	}
	f.config.hasher.secret = []byte(s)
}

func (f *configFile) readHeaders(n node) {
	if _, ok := n.Node.(*ast.SequenceNode); !ok {
		f.wrong(n, "%s; wanted is a list of x-ratelimit, retry-after, ratelimit", describe(n.Node))
		return
	}
	f.config.Headers = Headers{} // an empty list is one: no headers
	f.each(n, func(n node) {
		var s string
		f.oneOf(n, &s, "x-ratelimit", "retry-after", "ratelimit")
		switch s {
		case "x-ratelimit":
			f.config.Headers.XRateLimit = true
		case "retry-after":
			f.config.Headers.RetryAfter = true
		case "ratelimit":
			f.config.Headers.RateLimit = true
		}
	})
}

func (f *configFile) readClientIP(n node) {
	c := &f.config.client
	var ways []string
	ok := f.mapping(n, map[string]func(node){
		"xff_from_right": func(n node) {
			ways = append(ways, n.field)
			v := int64(1)
			f.whole(n, &v, 1, 100)
			c.xffFromRight = int(v)
		},
		"header": func(n node) {
			ways = append(ways, n.field)
			f.checked(&c.header, func(s string) error {
				if !headerOf.MatchString(s) {
					return fmt.Errorf("%q is no header's name in lower case", s)
				}
				return nil
			})(n)
		},
		"from": func(n node) {
			c.anyone = false
			texts(&f.reader, n, new([]struct{}), func(s string) (none struct{}, err error) {
				if strings.Contains(s, "://") {
					p, err := parsePrincipal(s)
					c.principals = append(c.principals, p)
					return none, err
				}
				p, err := parsePrefix(s)
				c.networks = append(c.networks, p)
				return none, err
			})
		},
	})
	if ok && len(ways) != 1 {
		f.wrong(n, "%d ways to the client's address; wanted is one of xff_from_right and header", len(ways))
	}
}

// override puts the overrides in: the weak ones before the file is read, the others over what it says.
func (f *configFile) override(weak bool) {
	c := &f.config
	for _, o := range f.overrides {
		if o.Weak != weak {
			continue
		}
		var err error
		switch o.Field {
		case "listen.grpc":
			c.Listen.GRPC, err = o.Value, checkListen(o.Value)
		case "listen.admin":
			c.Listen.Admin, err = o.Value, tcp(o.Value)
		case "listen.metrics":
			c.Listen.Metrics, err = o.Value, tcp(o.Value)
		case "domain":
			f.domain, err = o.Value, checkDomain(o.Value)
		case "store.redis.url":
			f.redis, f.redisURL = true, o.Value
			f.redisAt = node{}
			err = f.redisOptions().Validate()
		case "grace":
			c.Grace, err = time.ParseDuration(o.Value)
			if err != nil || c.Grace < 0 || c.Grace > time.Hour {
				err = fmt.Errorf("%q; allowed are durations such as 500ms and 10s, from 0s to 1h0m0s", o.Value)
			}
		case "log_level":
			if c.LogLevel = o.Value; !slices.Contains([]string{"debug", "info", "warn", "error"}, o.Value) {
				err = fmt.Errorf("%q; allowed are debug, info, warn, error", o.Value)
			}
		default:
			err = errors.New("no such setting")
		}
		if err != nil {
			f.mistakes = append(f.mistakes, Mistake{File: o.From, Field: o.Field, Message: err.Error()})
		}
	}
}

func (f *configFile) redisOptions() limiter.RedisOptions {
	return limiter.RedisOptions{URL: f.redisURL, Username: f.username, Password: f.password, Timeout: f.timeout}
}

// compile makes the Config of what was read.
func (f *configFile) compile() *Config {
	c := &f.config
	c.Domain = f.domain
	if f.redis {
		o := f.redisOptions()
		if err := o.Validate(); err != nil && f.redisAt.Node != nil {
			at := f.redisAt
			if !strings.HasSuffix(at.field, ".url") {
				at.field += ".url"
			}
			f.wrong(at, "%v", err)
		}
		c.Redis = &o
	}
	names := make(map[string]bool)
	for _, d := range f.drafts {
		if l := f.compileLimit(d); l != nil {
			if names[l.limit.Name] {
				f.wrong(d.nameAt, "a second limit %q; names are unique", l.limit.Name)
			}
			names[l.limit.Name] = true
			c.limits = append(c.limits, l)
		}
	}
	return c
}
