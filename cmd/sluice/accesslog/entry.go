// Package accesslog reads the access logs of proxies and web servers: common,
// combined, Envoy's and sluice's own text, an ALB's, JSON lines and CSV, each
// plain or compressed by gzip or zstd. It turns their lines into the requests
// that a policy draws for.
package accesslog

import (
	"errors"
	"fmt"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/structpb"

	"github.com/sluiceproxy/sluice/limiter/policy"
)

// Entry is a request that a log holds, and what is known of its end. What the
// log does not hold is empty. An Entry is reused from line to line.
type Entry struct {
	// At is when the request began, or if the log does not say it when it ended,
	// in microseconds since 1970. It is rounded down to the grain of the log.
	At      int64
	Request policy.Request
	End     policy.End

	duration time.Duration
	grain    time.Duration // of the time of this entry
	hasLine  bool          // the entry has a request line, or a method or a path
	noLine   bool          // it has one that is no request
}

// errNoRequest reports a line about a connection on which the client sent no
// request that a proxy would have asked about.
var errNoRequest = errors.New("no request")

var errNoTime = errors.New("no time")

// reset empties e, and keeps its memory.
func (e *Entry) reset() {
	headers, context, response, trailers := e.Request.Headers, e.Request.Context, e.End.Headers, e.End.Trailers
	clear(headers)
	clear(context)
	clear(response)
	clear(trailers)
	*e = Entry{
		Request: policy.Request{Headers: headers, Context: context},
		End:     policy.End{Headers: response, Trailers: trailers, Flags: e.End.Flags[:0]},
	}
}

// finish checks e after all fields were set, and derives what follows from them.
func (e *Entry) finish() error {
	switch {
	case e.grain == 0:
		return errNoTime
	case e.noLine:
		return errNoRequest
	}
	r := &e.Request
	if r.Method == "" {
		r.Method = "GET"
	}
	if r.Path == "" {
		r.Path = "/"
	}
	r.Time = time.UnixMicro(e.At).UTC()
	e.End.Method, e.End.Scheme, e.End.Host, e.End.Path = r.Method, r.Scheme, r.Host, r.Path
	e.End.Protocol, e.End.Time = r.Protocol, r.Time
	return nil
}

// setter sets one attribute of an entry from a text of the log.
type setter func(e *Entry, value string) error

// setterOf returns the setter of an attribute as the config writes it, such as
// request.method or request.headers["x-api-key"].
func setterOf(attribute string) (setter, error) {
	if s, ok := setters[attribute]; ok {
		return s, nil
	}
	path, err := splitAttribute(attribute)
	if err != nil {
		return nil, err
	}
	root := path[0] + "." + path[min(1, len(path)-1)]
	switch {
	case path[0] == "context" && len(path) == 2:
		return func(e *Entry, value string) error { set(&e.Request.Context, path[1], value); return nil }, nil
	case root == "request.headers" && len(path) == 3:
		return headerSetter(path[2]), nil
	case root == "request.params" && len(path) == 3:
		return func(e *Entry, value string) error { e.addParam(path[2], value); return nil }, nil
	case root == "request.cookies" && len(path) == 3:
		return func(e *Entry, value string) error { e.addCookie(path[2], value); return nil }, nil
	case root == "response.headers" && len(path) == 3:
		return func(e *Entry, value string) error { set(&e.End.Headers, path[2], value); return nil }, nil
	case root == "response.trailers" && len(path) == 3:
		return func(e *Entry, value string) error { set(&e.End.Trailers, path[2], value); return nil }, nil
	case root == "metadata.filter_metadata" && len(path) >= 4:
		return func(e *Entry, value string) error { e.setMetadata(path[2:], value); return nil }, nil
	case path[0] == "client":
		return nil, errors.New("it is derived; name source.address, or the header that client_ip reads")
	}
	return nil, errors.New(`want an attribute such as source.address, request.path or request.headers["x-api-key"]`)
}

// headerSetter sets a header of the request.
func headerSetter(name string) setter {
	name = strings.ToLower(name)
	return func(e *Entry, value string) error { set(&e.Request.Headers, name, value); return nil }
}

// addParam adds a parameter to the request's query.
func (e *Entry) addParam(name, value string) {
	separator := "?"
	if strings.Contains(e.Request.Path, "?") {
		separator = "&"
	}
	e.Request.Path += separator + url.QueryEscape(name) + "=" + url.QueryEscape(value)
}

// addCookie adds a cookie to the request's Cookie header.
func (e *Entry) addCookie(name, value string) {
	cookie := name + "=" + url.PathEscape(value)
	if before := e.Request.Headers["cookie"]; before != "" {
		cookie = before + "; " + cookie
	}
	set(&e.Request.Headers, "cookie", cookie)
}

// set sets an entry of a map that may be nil.
func set(m *map[string]string, name, value string) {
	if *m == nil {
		*m = make(map[string]string)
	}
	(*m)[name] = value
}

// setMetadata sets the field of a filter's dynamic metadata: path is the filter's
// name, and then at least one field.
func (e *Entry) setMetadata(path []string, value string) {
	if e.Request.Metadata == nil {
		e.Request.Metadata = make(map[string]*structpb.Struct)
	}
	of := e.Request.Metadata[path[0]]
	if of == nil {
		of = &structpb.Struct{}
		e.Request.Metadata[path[0]] = of
	}
	all := e.Request.Metadata // e is reset before the end is read
	e.End.Metadata = func() map[string]*structpb.Struct { return all }
	for _, name := range path[1 : len(path)-1] {
		if of.Fields == nil {
			of.Fields = make(map[string]*structpb.Value)
		}
		next := of.Fields[name].GetStructValue()
		if next == nil {
			next = &structpb.Struct{}
			of.Fields[name] = structpb.NewStructValue(next)
		}
		of = next
	}
	if of.Fields == nil {
		of.Fields = make(map[string]*structpb.Value)
	}
	of.Fields[path[len(path)-1]] = structpb.NewStringValue(value)
}

// splitAttribute splits a.b["c"].d into a, b, c and d.
func splitAttribute(s string) (path []string, err error) {
	wrong := fmt.Errorf(`want an attribute such as request.path or request.headers["x-api-key"]`)
	for rest := s; rest != ""; {
		if rest[0] == '[' {
			end := strings.IndexByte(rest, ']')
			if end < 4 || rest[1] != rest[end-1] || rest[1] != '"' && rest[1] != '\'' {
				return nil, wrong
			}
			path, rest = append(path, rest[2:end-1]), rest[end+1:]
			continue
		}
		rest = strings.TrimPrefix(rest, ".")
		end := strings.IndexAny(rest, ".[")
		if end < 0 {
			end = len(rest)
		}
		if end == 0 {
			return nil, wrong
		}
		path, rest = append(path, rest[:end]), rest[end:]
	}
	if len(path) < 2 {
		return nil, wrong
	}
	return path, nil
}

// Attributes of a log that expressions do not know.
const (
	requestLine = "request line" // GET /path HTTP/1.1
	peerInXFF   = "peer in x-forwarded-for"
)

var setters = map[string]setter{
	"request.time": func(e *Entry, value string) error {
		at, grain, err := parseTime(value)
		e.At, e.grain = at, grain
		return err
	},
	requestLine: (*Entry).setLine,
	"request.method": func(e *Entry, value string) error {
		e.Request.Method, e.hasLine = value, true
		e.noLine = e.noLine || !isMethod(value)
		return nil
	},
	"request.path": (*Entry).setTarget,
	"request.url_path": func(e *Entry, value string) error {
		_, query, hasQuery := strings.Cut(e.Request.Path, "?")
		if e.Request.Path = value; hasQuery {
			e.Request.Path += "?" + query
		}
		return nil
	},
	"request.query": func(e *Entry, value string) error {
		if value = strings.TrimPrefix(value, "?"); value != "" {
			path, _, _ := strings.Cut(e.Request.Path, "?")
			e.Request.Path = path + "?" + value
		}
		return nil
	},
	"request.host":     func(e *Entry, value string) error { e.Request.Host = value; return nil },
	"request.scheme":   func(e *Entry, value string) error { e.Request.Scheme = value; return nil },
	"request.protocol": func(e *Entry, value string) error { e.Request.Protocol = value; return nil },
	"request.id": func(e *Entry, value string) error {
		e.End.ID = value
		set(&e.Request.Headers, "x-request-id", value)
		return nil
	},
	"request.size": func(e *Entry, value string) (err error) {
		if e.End.RequestSize, err = parseSize(value); err == nil {
			set(&e.Request.Headers, "content-length", value)
		}
		return err
	},
	"request.total_size": func(e *Entry, value string) (err error) {
		e.End.RequestTotalSize, err = parseSize(value)
		return err
	},
	"request.duration": func(e *Entry, value string) error { return e.setDuration(value, 0) },
	"source.address":   func(e *Entry, value string) error { return setPeer(&e.Request.Source, value) },
	"source.port":      func(e *Entry, value string) error { return setPort(&e.Request.Source, value) },
	"source.principal": func(e *Entry, value string) error { e.Request.Source.Principal = value; return nil },
	peerInXFF: func(e *Entry, value string) error {
		return setPeer(&e.Request.Source, strings.TrimSpace(value[strings.LastIndexByte(value, ',')+1:]))
	},
	"destination.address":   func(e *Entry, value string) error { return setPeer(&e.Request.Destination, value) },
	"destination.port":      func(e *Entry, value string) error { return setPort(&e.Request.Destination, value) },
	"destination.principal": func(e *Entry, value string) error { e.Request.Destination.Principal = value; return nil },
	"response.code": func(e *Entry, value string) (err error) {
		if e.End.Code, err = strconv.ParseInt(value, 10, 64); err != nil || e.End.Code < 0 || e.End.Code > 999 {
			return fmt.Errorf("response.code is %s", quote(value))
		}
		return nil
	},
	"response.code_details": func(e *Entry, value string) error { e.End.CodeDetails = value; return nil },
	"response.flags": func(e *Entry, value string) error {
		e.End.Flags = append(e.End.Flags[:0], strings.Split(value, ",")...)
		return nil
	},
	"response.grpc_status": func(e *Entry, value string) error {
		if n, err := strconv.ParseInt(value, 10, 64); err == nil {
			e.End.GRPCStatus = &n
		}
		return nil
	},
	"response.size": func(e *Entry, value string) (err error) {
		e.End.Size, err = parseSize(value)
		return err
	},
	"response.total_size": func(e *Entry, value string) (err error) {
		e.End.TotalSize, err = parseSize(value)
		return err
	},
}

func parseSize(value string) (int64, error) {
	n, err := strconv.ParseInt(value, 10, 64)
	if err != nil || n < 0 {
		return 0, fmt.Errorf("a size is %s", quote(value))
	}
	return n, nil
}

// setLine sets method, path and protocol from a request line.
func (e *Entry) setLine(line string) error {
	line = unescape(line)
	e.hasLine = true
	method, rest, ok := strings.Cut(line, " ")
	if !ok || !isMethod(method) {
		e.noLine = true
		return nil
	}
	e.Request.Method = method
	target := rest
	if i := strings.LastIndexByte(rest, ' '); i >= 0 && strings.HasPrefix(rest[i+1:], "HTTP/") {
		target, e.Request.Protocol = rest[:i], rest[i+1:]
	} else if strings.HasPrefix(rest, "HTTP/") { // sluice's log without a path
		e.Request.Protocol = rest
		return nil
	}
	return e.setTarget(target)
}

// setTarget sets the path from the target of a request line, and the host too if
// it is a complete URL.
func (e *Entry) setTarget(target string) error {
	e.hasLine = true
	if strings.HasPrefix(target, "/") || target == "*" {
		e.Request.Path = target
		return nil
	}
	scheme, rest, ok := strings.Cut(target, "://")
	if !ok {
		e.noLine = true // CONNECT, and what is no HTTP
		return nil
	}
	e.Request.Scheme = scheme
	end := strings.IndexAny(rest, "/?")
	if end < 0 {
		e.Request.Host, e.Request.Path = rest, "/"
		return nil
	}
	e.Request.Host, e.Request.Path = rest[:end], rest[end:]
	if e.Request.Path[0] == '?' {
		e.Request.Path = "/" + e.Request.Path
	}
	return nil
}

func isMethod(s string) bool {
	for i := range len(s) {
		if (s[i] < 'A' || s[i] > 'Z') && s[i] != '-' && s[i] != '_' {
			return false
		}
	}
	return s != "" && s != "-"
}

// setPeer sets an address, which may have a port.
func setPeer(p *policy.Peer, value string) error {
	if _, err := netip.ParseAddr(value); err == nil {
		p.Address = value
		return nil
	}
	if ap, err := netip.ParseAddrPort(value); err == nil {
		p.Address, p.Port = ap.Addr().String(), uint32(ap.Port())
		return nil
	}
	if a, err := netip.ParseAddr(strings.Trim(value, "[]")); err == nil {
		p.Address = a.String()
		return nil
	}
	return fmt.Errorf("an address is %s", quote(value))
}

func setPort(p *policy.Peer, value string) error {
	n, err := strconv.ParseUint(value, 10, 16)
	if err != nil {
		return fmt.Errorf("a port is %s", quote(value))
	}
	p.Port = uint32(n)
	return nil
}

// setDuration sets how long the request took. Without a unit of the log, a number
// with a point is in seconds, as nginx writes it, and one without in
// milliseconds, as Envoy does.
func (e *Entry) setDuration(value string, unit time.Duration) error {
	d, err := time.ParseDuration(value)
	if n, numberErr := strconv.ParseFloat(value, 64); numberErr == nil && n >= 0 && n < 1e18 {
		if unit == 0 {
			unit = time.Millisecond
			if strings.Contains(value, ".") {
				unit = time.Second
			}
		}
		d, err = time.Duration(n*float64(unit)), nil
	}
	if err != nil || d < 0 {
		return fmt.Errorf("a duration is %s", quote(value))
	}
	e.duration, e.End.Duration = d, &e.duration
	return nil
}

// unescape decodes \xHH, \" and \\, as web servers write what a client sent.
func unescape(s string) string {
	if strings.IndexByte(s, '\\') < 0 {
		return s
	}
	b := make([]byte, 0, len(s))
	for i := 0; i < len(s); i++ {
		if s[i] != '\\' || i+1 == len(s) {
			b = append(b, s[i])
			continue
		}
		i++
		if s[i] == 'x' && i+2 < len(s) {
			if n, err := strconv.ParseUint(s[i+1:i+3], 16, 8); err == nil {
				b = append(b, byte(n))
				i += 2
				continue
			}
		}
		switch s[i] {
		case 't':
			b = append(b, '\t')
		case 'n':
			b = append(b, '\n')
		case 'r':
			b = append(b, '\r')
		default:
			b = append(b, s[i])
		}
	}
	return string(b)
}

// quote returns a text of a log in quotes, escaped, and cut to 60 bytes.
func quote(s string) string {
	const most = 60
	if len(s) > most {
		return fmt.Sprintf("%+q...", s[:most])
	}
	return fmt.Sprintf("%+q", s)
}
