package accesslog

import (
	"fmt"
	"strings"
	"time"
)

// binding sets an attribute from one field of a line.
type binding struct {
	attribute string
	set       setter
	index     int    // of the field, from 0; -1: by name
	name      string // of a field NAME=value, of a column or of a JSON member
	isUsers   bool   // --field asked for it
}

// layout is a format of text: which field of a line is which attribute. Fields
// are separated by spaces; one in quotes or brackets may contain some.
type layout struct {
	name   string
	flag   string // the value of --format that selects it
	fewest int    // fields of a line
	check  func(line string, fields []string) bool
	at     map[int]string    // attributes by index
	named  map[string]string // attributes of fields NAME=value
	notes  []string
}

const (
	userAgent = `request.headers["user-agent"]`
	referer   = `request.headers["referer"]`
	xff       = `request.headers["x-forwarded-for"]`
)

// layouts are the known formats of text. Of several that read a log equally
// well, the first is taken.
var layouts = []layout{
	{
		name: "sluice", flag: "envoy", fewest: 5, check: isSluice,
		at: map[int]string{
			0: "request.time", 1: requestLine, 2: "response.code", 3: "response.flags", 4: "request.duration",
		},
		named: map[string]string{
			"id": "request.id", "path": "request.url_path", "client": "source.address", "source": "source.address",
			"address": "source.address", "host": "request.host", "authority": "request.host",
		},
	},
	{
		name: "istio", flag: "envoy", fewest: 20, check: isIstio,
		at: map[int]string{
			0: "request.time", 1: requestLine, 2: "response.code", 3: "response.flags", 4: "response.code_details",
			7: "request.size", 8: "response.size", 9: "request.duration", 11: xff, 12: userAgent, 13: "request.id",
			14: "request.host", 18: "destination.address", 19: "source.address",
		},
	},
	{
		name: "envoy", flag: "envoy", fewest: 13, check: isEnvoy,
		at: map[int]string{
			0: "request.time", 1: requestLine, 2: "response.code", 3: "response.flags", 4: "request.size", 5: "response.size",
			6: "request.duration", 8: xff, 9: userAgent, 10: "request.id", 11: "request.host",
		},
		notes: []string{"source.address is taken from the right end of x-forwarded-for, where Envoy adds it"},
	},
	{
		name: "alb", fewest: 14, check: isALB,
		at: map[int]string{
			1: "request.time", 3: "source.address", 8: "response.code", 10: "request.total_size", 11: "response.total_size",
			12: requestLine, 13: userAgent,
		},
		notes: []string{"the times are those of the responses"},
	},
	{
		name: "combined", flag: "combined", fewest: 9, check: isCommon(0),
		at: map[int]string{
			0: "source.address", 3: "request.time", 4: requestLine, 5: "response.code", 6: "response.size",
			7: referer, 8: userAgent,
		},
	},
	{
		name: "combined with hosts", flag: "combined", fewest: 10, check: isCommon(1),
		at: map[int]string{
			0: "request.host", 1: "source.address", 4: "request.time", 5: requestLine, 6: "response.code", 7: "response.size",
			8: referer, 9: userAgent,
		},
	},
	{
		name: "common", flag: "common", fewest: 7, check: isCommon(0),
		at: map[int]string{
			0: "source.address", 3: "request.time", 4: requestLine, 5: "response.code", 6: "response.size",
		},
	},
}

func isEnvoy(line string, fields []string) bool {
	return line[0] == '[' && strings.IndexByte(fields[0], '-') == 4 && !isSluice(line, fields)
}

func isIstio(line string, fields []string) bool {
	_, isNumber := digits(fields[4])
	return isEnvoy(line, fields) && !isNumber
}

func isSluice(line string, fields []string) bool {
	ms, ok := strings.CutSuffix(fields[4], "ms")
	_, isNumber := digits(ms)
	return line[0] == '[' && ok && isNumber
}

func isALB(_ string, fields []string) bool {
	switch fields[0] {
	case "http", "https", "h2", "grpcs", "ws", "wss":
		return strings.IndexByte(fields[1], '-') == 4
	}
	return false
}

func isCommon(shift int) func(string, []string) bool {
	return func(_ string, fields []string) bool {
		t := fields[3+shift]
		return len(t) > 11 && (t[2] == '/' || t[4] == '-')
	}
}

// splitFields appends the fields of a line to fields. A field that begins with a
// quote or a bracket ends with the one that closes it, and is given without
// them; in NAME="value" the quotes may contain spaces.
func splitFields(fields []string, line string) []string {
	for i := 0; i < len(line); {
		switch line[i] {
		case ' ', '\t':
			i++
			continue
		case '"', '[':
			closing := line[i]
			if closing == '[' {
				closing = ']'
			}
			end := i + 1
			for end < len(line) && line[end] != closing {
				if line[end] == '\\' {
					end++
				}
				end++
			}
			end = min(end, len(line))
			fields = append(fields, line[i+1:end])
			i = end + 1
			continue
		}
		end := i
		for end < len(line) && line[end] != ' ' {
			if line[end] == '"' {
				if n := strings.IndexByte(line[end+1:], '"'); n >= 0 {
					end += n + 1
				}
			}
			end++
		}
		end = min(end, len(line))
		fields = append(fields, line[i:end])
		i = end
	}
	return fields
}

// textParser parses the lines of one layout.
type textParser struct {
	layout   *layout
	bindings []binding
	fields   []string
	previous struct {
		text  string
		at    int64
		grain time.Duration
	}
}

func (p *textParser) parse(line string, e *Entry) error {
	p.fields = splitFields(p.fields[:0], line)
	if l := p.layout; len(p.fields) < l.fewest || l.check != nil && !l.check(line, p.fields) {
		return fmt.Errorf("not of the format %s", l.name)
	}
	for i := range p.bindings {
		b := &p.bindings[i]
		value := ""
		if b.index >= 0 {
			if b.index < len(p.fields) {
				value = p.fields[b.index]
			}
		} else {
			value = named(p.fields, b.name)
		}
		if value == "" || value == "-" {
			if b.attribute == requestLine {
				e.noLine = true
			}
			continue
		}
		if b.attribute == "request.time" && value == p.previous.text {
			e.At, e.grain = p.previous.at, p.previous.grain
			continue
		}
		if err := b.set(e, value); err != nil {
			return err
		}
		if b.attribute == "request.time" {
			p.previous.text, p.previous.at, p.previous.grain = value, e.At, e.grain
		}
	}
	return e.finish()
}

// named returns the value of a field NAME=value, or "".
func named(fields []string, name string) string {
	for _, f := range fields {
		if len(f) > len(name) && f[len(name)] == '=' && strings.HasPrefix(f, name) {
			return strings.Trim(f[len(name)+1:], `"`)
		}
	}
	return ""
}
