package policy

import (
	"bytes"
	"cmp"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/goccy/go-yaml/ast"

	"github.com/sluiceproxy/sluice/limiter"
)

// Load reads a config file. An empty name means an empty config. A pipe, such
// as /dev/stdin, is read to its end. Settings take precedence over the file
// unless they are weak, and later ones over earlier ones. getenv looks up the
// environment variables that the config uses as ${NAME}.
//
// The error is a Mistakes with every mistake of the config, up to 200. The
// Inputs are valid even if there is an error.
func Load(file string, getenv func(string) (string, bool), settings ...Setting) (*Config, Inputs, error) {
	return load(file, nil, getenv, settings)
}

// Reload is Load for a file that was loaded before. A config that came through
// a pipe keeps its text; only the files that it names are read again.
func Reload(
	file string, before Inputs, getenv func(string) (string, bool), settings ...Setting,
) (*Config, Inputs, error) {
	return load(file, &before, getenv, settings)
}

func load(
	file string, before *Inputs, getenv func(string) (string, bool), settings []Setting,
) (*Config, Inputs, error) {
	in := newInputs()
	if file == "" {
		c, err := readConfig(reader{getenv: getenv}, nil, settings, in)
		return c, in.done(), err
	}
	text, err := in.config(file, before)
	r := reader{file: file, dir: filepath.Dir(file), getenv: getenv}
	if in.Piped {
		r.dir = "." // file names are relative to the working directory then
	}
	c, err := readText(r, text, err, settings, in)
	return c, in.done(), err
}

// Read is Load for a config that comes from a stream. name is its name in
// mistakes; files that it names are relative to the working directory.
func Read(
	name string, from io.Reader, getenv func(string) (string, bool), settings ...Setting,
) (*Config, error) {
	text, err := io.ReadAll(io.LimitReader(from, maxFile+1))
	return readText(reader{file: name, dir: ".", getenv: getenv}, text, err, settings, newInputs())
}

// readText is readConfig for a text that may be empty, or could not be read.
func readText(r reader, text []byte, err error, settings []Setting, in *inputs) (*Config, error) {
	if err == nil && len(bytes.TrimSpace(withoutBOM(text))) == 0 {
		err = errors.New("the file is empty (perhaps it is still being written); for a config without limits " +
			"write limits: []")
	}
	if err != nil {
		if path, ok := errors.AsType[*os.PathError](err); ok {
			err = path.Err
		}
		return nil, Mistakes{{File: r.file, Message: err.Error()}}
	}
	return readConfig(r, text, settings, in)
}

// Parse is Load for text in memory. name is the file name in mistakes; files
// that the text names are relative to its directory.
func Parse(name string, text []byte, getenv func(string) (string, bool), settings ...Setting) (*Config, error) {
	return readConfig(reader{file: name, dir: filepath.Dir(name), getenv: getenv}, text, settings, newInputs())
}

// withoutBOM returns text without the byte order mark that some editors write
// at its beginning.
func withoutBOM(text []byte) []byte { return bytes.TrimPrefix(text, []byte("\xef\xbb\xbf")) }

func readConfig(r reader, text []byte, settings []Setting, in *inputs) (*Config, error) {
	cr := configReader{
		limitReader: newLimitReader(r),
		settings:    settings,
		store:       limiter.RedisOptions{Timeout: 100 * time.Millisecond},
		config: &Config{
			Listen:        Listen{GRPC: "127.0.0.1:9001", Admin: "127.0.0.1:9002", Metrics: "127.0.0.1:9003"},
			FailureStatus: 503,
			Headers:       Headers{XRateLimit: true, RetryAfter: true},
			Grace:         10 * time.Second,
			LogLevel:      "info",
			client:        clientIP{anyone: true},
		},
	}
	cr.inputs = in
	cr.hidden, cr.listenAt = make(map[[2]int]string), make(map[string]node)
	cr.applySettings(true)
	text = withoutBOM(text)
	if root := cr.document(text); root != nil {
		cr.readFile(*root)
	}
	cr.applySettings(false)
	if len(cr.mistakes) == 0 {
		cr.hashTokens()
	}
	c := cr.compile()
	if len(cr.mistakes) > 0 {
		sortMistakes(cr.mistakes, r.file)
		return nil, cr.mistakes
	}
	return c, nil
}

// configReader reads a config: first its fields, then the settings over them,
// and finally compile makes the Config.
type configReader struct {
	limitReader
	onFailureAt node
	listenAt    map[string]node // the listeners that the file gives, by field
	listenTLSAt node
	clientIPAt  node
	hidden      map[[2]int]string // text in place of secrets for Hash, by line and column
	settings    []Setting
	// config is allocated apart from configReader, because it outlives the text
	// and the nodes that were read.
	config *Config

	redis bool
	// redisIncomplete reports that a field of store.redis that others need may only
	// seem to be missing, or has a mistake, which is reported.
	redisIncomplete bool
	redisAt         node // its url, or redisNode
	redisNode       node
	timeoutAt       node
	store           limiter.RedisOptions
	drafts          []*draft
	exempt          []*match
	exemptAt        []node
}

var (
	namePattern   = regexp.MustCompile(`^[a-z0-9-]{1,63}$`)
	domainPattern = regexp.MustCompile(`^[A-Za-z0-9._/-]{1,253}$`)
	headerPattern = regexp.MustCompile("^[a-z0-9!#$%&'*+.^_`|~-]+$")
)

func checkDomain(s string) error {
	if !domainPattern.MatchString(s) {
		return fmt.Errorf("invalid value %q; want 1 to 253 letters, digits and . _ / -", s)
	}
	return nil
}

// maxSocketPath is the maximum length of a unix socket's path on Linux, in
// bytes.
const maxSocketPath = 107

func checkListen(s string) error {
	if path, ok := strings.CutPrefix(s, "unix://"); ok && filepath.IsAbs(path) {
		if len(path) > maxSocketPath {
			return fmt.Errorf("%q: the path has %d bytes; the maximum for a unix socket is %d", s, len(path),
				maxSocketPath)
		}
		return nil
	}
	return checkTCP(s, " or unix:///absolute/path")
}

func checkTCP(s, also string) error {
	if strings.Contains(s, "@") { // not quoted: the user may contain a password
		return fmt.Errorf("must not contain a user or password; want host:port%s", also)
	}
	if _, port, err := net.SplitHostPort(s); err == nil && port != "" {
		if _, err := net.LookupPort("tcp", port); err == nil {
			return nil
		}
	}
	return fmt.Errorf("invalid address %q; want host:port%s", s, also)
}

func checkHostPort(s string) error { return checkTCP(s, "") }

func (cr *configReader) readFile(root node) {
	c := cr.config
	fields, isMapping := entries(root.Node)
	if kind := describe(root.Node); !isMapping {
		cr.wrong(root, "a config is a mapping, not %s; write the limits under limits:", kind)
		return
	}
	for _, f := range fields {
		if f.Key.GetToken().Value == "apiVersion" { // of its many unknown fields one is enough
			cr.at(f.Key.GetToken(), "", "%s", misplaced[""]["apiVersion"])
			return
		}
	}
	var limits node // which are read after the plans
	if !cr.mapping(root, map[string]func(node){
		"domain": cr.checked(&cr.domain, checkDomain),
		"listen": func(n node) {
			cr.mapping(n, map[string]func(node){
				"grpc":    cr.listener(&c.Listen.GRPC, checkListen),
				"admin":   cr.listener(&c.Listen.Admin, checkHostPort),
				"metrics": cr.listener(&c.Listen.Metrics, checkHostPort),
				"tls":     cr.readListenTLS,
			})
		},
		"store": func(n node) {
			cr.mapping(n, map[string]func(node){"redis": cr.readRedis})
		},
		"routes":      cr.readRoutes,
		"mode":        func(n node) { cr.oneOf(n, &cr.mode, modes...) },
		"on_failure":  func(n node) { cr.onFailureAt = n; cr.readOnFailure(n, &cr.onFailure) },
		"local_share": cr.readLocalShare,
		"failure_status": func(n node) {
			v := int64(c.FailureStatus)
			cr.integer(n, &v, 500, 599)
			c.FailureStatus = int(v)
		},
		"grace":     func(n node) { cr.duration(n, &c.Grace, 0, time.Hour) },
		"log_level": func(n node) { cr.oneOf(n, &c.LogLevel, "debug", "info", "warn", "error") },
		"key_secret": func(n node) {
			cr.hideFromHash(n, "")
			cr.readSecret(n, cr.text)
		},
		"key_secret_file": func(n node) { cr.readSecret(n, cr.readSecretFile) },
		"headers":         cr.readHeaders,
		"client_ip": func(n node) {
			cr.clientIPAt = n
			cr.readClientIP(n)
		},
		"exempt": cr.readExempt,
		"plans":  cr.readPlans,
		"limits": func(n node) { limits = n },
	}) {
		cr.incomplete = true
	}
	if limits.Node != nil {
		cr.readLimits(limits)
	}
}

// listener is checked for the address of a listener.
func (cr *configReader) listener(into *string, check func(string) error) func(node) {
	return func(n node) {
		cr.listenAt[n.field] = n
		if port, ok := n.Node.(*ast.IntegerNode); ok {
			cr.wrong(n, "must be host:port, not a number; write 127.0.0.1:%s", port.GetToken().Value)
			return
		}
		cr.checked(into, check)(n)
	}
}

func (cr *configReader) readLimits(n node) {
	if !cr.checkList(n, "limits such as {name: per-client, key: client.network, rate: 10/m}", maxLimits) {
		return
	}
	cr.each(n, func(n node) {
		if d := new(draft); cr.readLimit(n, d) {
			cr.drafts = append(cr.drafts, d)
		}
	})
	if memory := memoryFor(len(cr.drafts), len(cr.expressions)); memory > shippedMemory {
		cr.warn(n, "%d limits need about %d MiB of memory, more than the %d MiB of an injected sidecar; "+
			"raise its memory limit",
			len(cr.drafts), memory>>20, shippedMemory>>20)
	}
}

// shippedMemory is the memory limit of an injected sidecar, in bytes.
const shippedMemory = 128 << 20

// memoryFor estimates the memory in bytes that a sidecar needs for a number of
// limits and distinct expressions, while it reloads its config and is scraped.
// It was measured with 10,000 limits, with one expression and with 10,000.
func memoryFor(limits, expressions int) int {
	return 32<<20 + limits*12<<10 + expressions*6<<10
}

func (cr *configReader) readExempt(n node) {
	if !cr.checkList(n, "exemptions such as {match: {paths: [/healthz]}}", maxLimits) {
		return
	}
	cr.each(n, func(n node) {
		m, before := &match{}, len(cr.mistakes)
		cr.mapping(n, map[string]func(node){"match": func(n node) { cr.readMatch(n, m) }})
		if len(cr.mistakes) > before {
			return
		}
		if m.matchesAll() {
			cr.wrong(n, "missing match; without it every request would be exempt")
			return
		}
		cr.exempt, cr.exemptAt = append(cr.exempt, m), append(cr.exemptAt, n)
	})
}

// checkList reports whether a value is a list with at most limit values.
// Otherwise it records a mistake.
func (cr *configReader) checkList(n node, of string, limit int) bool {
	values, ok := n.Node.(*ast.SequenceNode)
	switch {
	case !ok:
		cr.wrong(n, "must be a list of %s, not %s", of, describe(n.Node))
	case len(values.Values) > limit:
		cr.wrong(n, "list of %d values; the maximum is %d", len(values.Values), limit)
	default:
		return true
	}
	return false
}

func (cr *configReader) readLocalShare(n node) {
	cr.localShare = 1 // until it is read, as it is not missing
	s, ok := cr.scalar(n)
	if !ok {
		return
	}
	v, err := strconv.ParseFloat(s, 64)
	if err != nil || !(v >= 1e-6 && v <= 1) { // this form rejects NaN
		mend := ""
		percent, err := strconv.ParseFloat(strings.TrimSuffix(s, "%"), 64)
		if err == nil && percent >= 2 && percent <= 100 && !takesVariables(n) {
			mend = fmt.Sprintf("; write %v for %v %%", percent/100, percent)
		}
		cr.wrong(n, "must be a number from 0.000001 to 1, not %s%s", displayText(n, s), mend)
		return
	}
	cr.localShare = v
}

func (cr *configReader) readHeaders(n node) {
	if _, ok := n.Node.(*ast.SequenceNode); !ok {
		cr.wrong(n, "must be a list of x-ratelimit, retry-after and ratelimit, not %s%s", describe(n.Node), mendList(n))
		return
	}
	cr.config.Headers = Headers{} // an empty list means no headers
	cr.each(n, func(n node) {
		var s string
		cr.oneOf(n, &s, "x-ratelimit", "retry-after", "ratelimit")
		switch s {
		case "x-ratelimit":
			cr.config.Headers.XRateLimit = true
		case "retry-after":
			cr.config.Headers.RetryAfter = true
		case "ratelimit":
			cr.config.Headers.RateLimit = true
		}
	})
}

func (cr *configReader) readClientIP(n node) {
	c := &cr.config.client
	var ways []string
	complete := cr.mapping(n, map[string]func(node){
		"xff_from_right": func(n node) {
			ways = append(ways, n.field)
			v := int64(1)
			cr.integer(n, &v, 1, 100)
			c.xffFromRight = int(v)
		},
		"header": func(n node) {
			ways = append(ways, n.field)
			cr.checked(&c.header, func(s string) error {
				if !headerPattern.MatchString(s) {
					return fmt.Errorf("invalid header name %q; want one in lower case, such as x-real-ip", s)
				}
				return nil
			})(n)
		},
		"from": func(n node) {
			c.anyone = false
			readStrings(&cr.reader, n, new([]struct{}), func(s string) (none struct{}, err error) {
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
	if len(ways) > 1 || complete && len(ways) == 0 {
		cr.wrong(n, "want exactly one of xff_from_right and header")
	}
}

// applySettings applies the weak settings, before the file is read, or the
// others, after it.
func (cr *configReader) applySettings(weak bool) {
	c := cr.config
	for _, o := range cr.settings {
		if o.Weak != weak {
			continue
		}
		var err error
		switch o.Field {
		case "listen.grpc":
			c.Listen.GRPC, err = o.Value, checkListen(o.Value)
		case "listen.admin":
			c.Listen.Admin, err = o.Value, checkHostPort(o.Value)
		case "listen.metrics":
			c.Listen.Metrics, err = o.Value, checkHostPort(o.Value)
		case "domain":
			cr.domain, err = o.Value, checkDomain(o.Value)
		case "store.redis.url":
			cr.redis, cr.store.URL = true, o.Value
			cr.redisAt = node{}
			err = cr.store.Validate()
		case "grace":
			c.Grace, err = time.ParseDuration(o.Value)
			if err != nil || c.Grace < 0 || c.Grace > time.Hour {
				err = &advice{fmt.Sprintf("invalid duration %q", o.Value), mendDuration(o.Value, 0, time.Hour),
					"want one from 0s to 1h, such as 500ms or 10s"}
			}
		case "log_level":
			levels := []string{"debug", "info", "warn", "error"}
			if c.LogLevel = o.Value; !slices.Contains(levels, o.Value) {
				err = unknownValue(o.Value, levels)
			}
		default:
			err = errors.New("unknown setting")
		}
		if err != nil {
			cr.mistakes = append(cr.mistakes, Mistake{File: o.From, Field: o.Field, Message: err.Error()})
		}
	}
}

// compile makes the Config, after the file and the settings were read.
func (cr *configReader) compile() *Config {
	c := cr.config
	c.Domain = cr.domain
	if cr.redis {
		o := cr.store
		cr.checkRedis(o)
		c.Redis = &o
	}
	if cr.listenTLSAt.Node != nil && strings.HasPrefix(c.Listen.GRPC, "unix://") {
		cr.wrong(cr.listenTLSAt,
			"TLS requires listen.grpc to be host:port; access to a unix socket is controlled "+
				"by its directory's permissions")
	}
	if c.client.byHeader() && c.client.anyone && cr.clientIPAt.Node != nil &&
		slices.ContainsFunc(cr.exempt, func(m *match) bool { return len(m.clients) > 0 }) {
		cr.warn(cr.clientIPAt,
			"without from, a client that connects to sluice or its Envoy directly can write an exempt address into "+
				"the header; set from to the networks of your proxies")
	}
	if cr.onFailure == "local" && cr.localShare == 0 && !cr.incomplete {
		cr.wrong(cr.onFailureAt, noShare)
	}
	c.byName = make(map[string]int)
	var matches []*match
	for _, d := range cr.drafts {
		r := cr.rule(d)
		if r == nil {
			continue
		}
		if _, twice := c.byName[r.limit.Name]; twice {
			cr.wrong(d.nameAt, "duplicate name %q; want a different name for each limit", r.limit.Name)
		}
		c.byName[r.limit.Name] = len(c.rules)
		c.rules = append(c.rules, r)
		matches = append(matches, &r.match)
	}
	cr.warnOfGroups(cr.drafts)
	cr.warnOfSecret(cr.drafts)
	cr.warnOfLeases(cr.drafts)
	if len(cr.mistakes) == 0 {
		cr.lint()
	}
	c.timeoutAt = Mistake{File: cr.file, Field: "store.redis.timeout"}
	if at := cmp.Or(cr.timeoutAt.Node, cr.redisNode.Node); at != nil {
		position := start(at).Position
		c.timeoutAt.Line, c.timeoutAt.Column = position.Line, position.Column
	}
	c.index, c.exempt = newIndex(matches), newIndex(cr.exempt)
	c.Warnings, cr.warnings = cr.warnings, nil
	c.inherited = cr.limitReader
	c.inherited.inputs, c.inherited.expressions, c.inherited.tiers, c.inherited.mistakes = nil, nil, nil, nil
	c.Hash = hex.EncodeToString(cr.inputs.public.Sum(nil)[:8])
	return c
}

// warnOfSecret warns of limits that settle without a key_secret, where another
// process than the one that was asked may be told of the end.
func (cr *configReader) warnOfSecret(drafts []*draft) {
	if cr.config.Redis == nil || cr.config.hasher.secret != nil {
		return
	}
	for _, d := range drafts {
		if d.settle != nil {
			cr.warn(d.settleAt, "without key_secret only the process that decided a request can settle it; set key_secret if "+
				"one Envoy reaches several replicas, or if a restart of sluice must lose no settlements")
			return
		}
	}
}

// warnOfLeases warns of leases from a store that is this process anyway.
func (cr *configReader) warnOfLeases(drafts []*draft) {
	if cr.config.Redis != nil {
		return
	}
	for _, d := range drafts {
		if d.lease > 0 {
			cr.warn(d.leaseAt, "has no effect, as without store.redis the buckets are in this process; remove lease, or "+
				"set store.redis")
		}
	}
}

// readRoutes reads what Envoy's routes are allowed to set.
func (cr *configReader) readRoutes(n node) {
	cr.mapping(n, map[string]func(node){
		"limits": func(n node) {
			limits, ok := n.Node.(*ast.BoolNode)
			if !ok {
				cr.wrong(n, "must be true or false, not %s", describe(n.Node))
				return
			}
			cr.config.noRouteLimits = !limits.Value
		},
		"domains": func(n node) {
			readStrings(&cr.reader, n, &cr.config.routeDomains, func(s string) (string, error) { return s, checkDomain(s) })
		},
	})
}
