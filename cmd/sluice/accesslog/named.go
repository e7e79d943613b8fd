package accesslog

import (
	"encoding/csv"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"
)

// known are the names that JSON lines and the columns of CSV files have for an
// attribute: of Envoy and Istio, Traefik, Cloudflare, Caddy, nginx and others.
// The first that a log has is taken. Case does not matter.
var known = []struct {
	attribute string
	names     []string
	unit      time.Duration // of a duration; 0: as Entry.setDuration says
}{
	{attribute: "request.time", names: []string{
		"start_time", "StartUTC", "EdgeStartTimestamp", "time_iso8601", "msec", "time_local", "@timestamp", "timestamp", "ts",
		"time", "datetime", "date",
	}},
	{attribute: requestLine, names: []string{"request", "request_line"}},
	{attribute: "request.method", names: []string{
		"method", "RequestMethod", "ClientRequestMethod", "request_method", "request.method", "http_method", "verb",
	}},
	{attribute: "request.path", names: []string{
		"x_envoy_original_path", "path", "RequestPath", "ClientRequestURI", "request_uri", "request.uri", "uri", "url",
		"ClientRequestPath", "request.path", "request_path",
	}},
	{attribute: "request.host", names: []string{
		"authority", ":authority", "RequestHost", "RequestAddr", "ClientRequestHost", "http_host", "request.host", "host",
		"server_name",
	}},
	{attribute: "request.scheme", names: []string{"scheme", "RequestScheme", "ClientRequestScheme"}},
	{attribute: "request.protocol", names: []string{
		"protocol", "RequestProtocol", "ClientRequestProtocol", "server_protocol", "request.proto",
	}},
	{attribute: "request.id", names: []string{"request_id", "x_request_id", "x-request-id", "RayID"}},
	{attribute: "request.size", names: []string{"bytes_received", "RequestContentSize", "content_length"}},
	{attribute: "request.total_size", names: []string{"ClientRequestBytes", "request_length"}},
	{attribute: "request.duration", names: []string{"Duration"}, unit: 0},
	{attribute: "request.duration", names: []string{"request_time", "response_time", "elapsed"}, unit: 0},
	{attribute: "source.address", names: []string{
		"downstream_remote_address", "downstream_direct_remote_address", "ClientHost", "ClientAddr", "ClientIP",
		"remote_addr",
		"request.remote_ip", "remote_ip", "client_ip", "client_address", "source_address", "ip", "client",
	}},
	{attribute: xff, names: []string{"x_forwarded_for", "x-forwarded-for", "http_x_forwarded_for"}},
	{attribute: userAgent, names: []string{
		"user_agent", "user-agent", "http_user_agent", "ClientRequestUserAgent", "request_User-Agent",
	}},
	{attribute: referer, names: []string{"referer", "http_referer", "ClientRequestReferer", "request_Referer"}},
	{attribute: "response.code", names: []string{
		"response_code", "DownstreamStatus", "EdgeResponseStatus", "status", "status_code", "code",
	}},
	{attribute: "response.code_details", names: []string{"response_code_details"}},
	{attribute: "response.flags", names: []string{"response_flags"}},
	{attribute: "response.grpc_status", names: []string{"grpc_status", "grpc_status_number"}},
	{attribute: "response.size", names: []string{
		"bytes_sent", "DownstreamContentSize", "EdgeResponseBytes", "body_bytes_sent", "size", "bytes",
	}},
}

// object is a line with named fields.
type object interface {
	// get returns the text of a field, and whether there is one: a member of a
	// JSON object, in which dots descend, or a column.
	get(name string) (string, bool)
	// names returns the names of all fields, with dots where they are nested.
	names() []string
}

// bindNamed finds the fields of a sample that are known, and those of which the
// user says what they are. wanted are the attributes that are of use; nil: all.
func bindNamed(sample []object, fields []Field, wanted func(string) bool) (bindings []binding, err error) {
	have := make(map[string]string) // names as the log writes them, by lower case
	for _, o := range sample {
		for _, name := range o.names() {
			if lower := strings.ToLower(name); have[lower] == "" {
				have[lower] = name
			}
		}
	}
	bound := make(map[string]bool)
	for _, f := range fields {
		bound[f.Attribute] = true
	}
	add := func(attribute, name string, unit time.Duration) {
		if bound[attribute] || !isBase(attribute) && !wanted(attribute) {
			return
		}
		set, err := setterOf(attribute)
		if err != nil {
			return
		}
		if attribute == "request.duration" && name == "Duration" { // Traefik's
			unit = time.Nanosecond
			set = func(e *Entry, value string) error { return e.setDuration(value, unit) }
		}
		bound[attribute] = true
		bindings = append(bindings, binding{attribute: attribute, set: set, index: -1, name: name})
	}
	for _, k := range known {
		for _, name := range k.names {
			if at, ok := have[strings.ToLower(name)]; ok {
				add(k.attribute, at, k.unit)
				break
			}
		}
	}
	if !bound["source.address"] {
		for _, b := range bindings {
			if b.attribute == xff {
				b.attribute, b.set = peerInXFF, setters[peerInXFF]
				bindings = append(bindings, b)
			}
		}
	}
	for lower, name := range have {
		for prefix, of := range map[string]string{
			"request_": "request.headers", "http_": "request.headers", "request.headers.": "request.headers",
			"request_headers.": "request.headers", "requestheaders.": "request.headers", "headers.": "request.headers",
			"downstream_": "response.headers", "sent_http_": "response.headers", "resp_headers.": "response.headers",
			"response_headers.": "response.headers", "responseheaders.": "response.headers",
		} {
			if header, ok := strings.CutPrefix(lower, prefix); ok && header != "" {
				if strings.HasSuffix(prefix, "http_") {
					header = strings.ReplaceAll(header, "_", "-")
				}
				if attribute := fmt.Sprintf("%s[%q]", of, header); wanted(attribute) {
					add(attribute, name, 0)
				}
			}
		}
	}
	for _, f := range fields {
		if f.index >= 0 {
			bindings = append(bindings, binding{attribute: f.Attribute, set: f.set, index: f.index, name: f.Name, isUsers: true})
			continue
		}
		name := f.Name
		if at, ok := have[strings.ToLower(name)]; ok {
			name = at
		}
		bindings = append(bindings, binding{attribute: f.Attribute, set: f.set, index: -1, name: name, isUsers: true})
	}
	if !bound["request.time"] {
		names := slices.Sorted(maps.Values(have))
		if len(names) > 20 {
			names = append(names[:20], "...")
		}
		return nil, fmt.Errorf("no field has a time by its name; name it with --field request.time=NAME; the fields are %s",
			strings.Join(names, ", "))
	}
	sortBindings(bindings)
	return bindings, nil
}

// isBase reports whether an attribute is read whatever the config reads.
func isBase(attribute string) bool {
	switch attribute {
	case "request.time", requestLine, "request.method", "request.path", "request.url_path", "request.query",
		"request.host", "source.address", peerInXFF:
		return true
	}
	return false
}

// sortBindings puts a request line before the fields that are more specific, and
// what the user names last, so that it takes precedence.
func sortBindings(bindings []binding) {
	rank := func(b binding) int {
		switch {
		case b.isUsers && b.attribute != "request.path":
			return 4
		case b.attribute == requestLine:
			return 0
		case b.attribute == "request.path":
			return 1
		case b.attribute == "request.url_path":
			return 2
		}
		return 3
	}
	slices.SortStableFunc(bindings, func(a, b binding) int { return rank(a) - rank(b) })
}

// setAll sets what the bindings find in an object.
func setAll(o object, bindings []binding, e *Entry) error {
	for i := range bindings {
		b := &bindings[i]
		value, ok := o.get(b.name)
		if !ok || value == "" || value == "-" {
			if b.attribute == requestLine || b.attribute == "request.method" {
				e.noLine = e.noLine || ok
			}
			continue
		}
		if err := b.set(e, value); err != nil {
			return err
		}
	}
	return e.finish()
}

// jsonObject is a line of JSON.
type jsonObject map[string]any

func parseJSON(line string) (jsonObject, error) {
	d := json.NewDecoder(strings.NewReader(line))
	d.UseNumber()
	var o jsonObject
	if err := d.Decode(&o); err != nil || o == nil {
		return nil, errors.New("not a JSON object")
	}
	return o, nil
}

func (o jsonObject) get(name string) (string, bool) {
	v, ok := o[name]
	for at := 0; !ok; {
		i := strings.IndexByte(name[at:], '.')
		if i < 0 {
			return "", false
		}
		at += i
		if inner, isObject := o[name[:at]].(map[string]any); isObject {
			return jsonObject(inner).get(name[at+1:])
		}
		at++
	}
	return jsonText(v)
}

// jsonText returns the text of a value. A list is joined by commas, as the lines
// of a header are.
func jsonText(v any) (string, bool) {
	switch v := v.(type) {
	case string:
		return v, true
	case json.Number:
		return v.String(), true
	case bool:
		if v {
			return "true", true
		}
		return "false", true
	case []any:
		var texts []string
		for _, one := range v {
			if text, ok := jsonText(one); ok {
				texts = append(texts, text)
			}
		}
		return strings.Join(texts, ","), len(texts) > 0
	}
	return "", false
}

func (o jsonObject) names() (all []string) {
	for name, v := range o {
		if inner, ok := v.(map[string]any); ok {
			for _, nested := range jsonObject(inner).names() {
				all = append(all, name+"."+nested)
			}
			continue
		}
		all = append(all, name)
	}
	return all
}

type jsonParser struct{ bindings []binding }

func (p *jsonParser) parse(line string, e *Entry) error {
	o, err := parseJSON(line)
	if err != nil {
		return err
	}
	return setAll(o, p.bindings, e)
}

// row is a line of a CSV file.
type row struct {
	columns []string // names
	values  []string
}

func (r row) get(name string) (string, bool) {
	i := slices.Index(r.columns, name)
	if i < 0 || i >= len(r.values) {
		return "", false
	}
	return r.values[i], true
}

func (r row) names() []string { return r.columns }

type csvParser struct {
	bindings []binding // by index
	columns  int
	comma    rune
}

func (p *csvParser) parse(line string, e *Entry) error {
	values, err := splitCSV(line, p.comma)
	if err != nil || len(values) != p.columns {
		return fmt.Errorf("not %d columns", p.columns)
	}
	for i := range p.bindings {
		b := &p.bindings[i]
		value := strings.TrimSpace(values[b.index])
		if value == "" || value == "-" {
			continue
		}
		if err := b.set(e, value); err != nil {
			return err
		}
	}
	return e.finish()
}

func splitCSV(line string, comma rune) ([]string, error) {
	if strings.IndexByte(line, '"') < 0 {
		return strings.Split(line, string(comma)), nil
	}
	r := csv.NewReader(strings.NewReader(line))
	r.Comma, r.LazyQuotes, r.FieldsPerRecord = comma, true, -1
	values, err := r.Read()
	if err != nil {
		return nil, fmt.Errorf("not CSV: %w", err)
	}
	return values, nil
}
