package policy

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"google.golang.org/protobuf/types/known/structpb"
)

// request makes a request from a line such as "POST api.example.com/v1/orders
// from 10.0.0.1 by spiffe://a/b with x-api-key=k".
func request(t testing.TB, line string) *Request {
	t.Helper()
	req := &Request{Headers: map[string]string{}, Context: map[string]string{}, Scheme: "https", Protocol: "HTTP/2"}
	words := strings.Split(line, " ")
	req.Method = words[0]
	at := strings.IndexByte(words[1], '/')
	req.Host, req.Path = words[1][:at], words[1][at:]
	req.Source.Address = "203.0.113.7"
	for i := 2; i < len(words); i += 2 {
		switch value := words[i+1]; words[i] {
		case "from":
			req.Source.Address = strings.TrimPrefix(value, "nowhere")
		case "by":
			req.Source.Principal = value
		case "with":
			name, v, _ := strings.Cut(value, "=")
			text, err := url.PathUnescape(v)
			if err != nil {
				t.Fatal(err)
			}
			req.Headers[name] = text
		case "context":
			name, v, _ := strings.Cut(value, "=")
			req.Context[name] = strings.ReplaceAll(v, "_", " ")
		case "claim": // value in JSON; a name with dots is nested
			claim(t, req, value)
		default:
			t.Fatalf("%q: what is %q?", line, words[i])
		}
	}
	return req
}

// claim adds a claim of a JWT to a request, as Envoy's filter passes it on.
func claim(t testing.TB, req *Request, line string) {
	t.Helper()
	name, text, _ := strings.Cut(line, "=")
	var value any
	if err := json.Unmarshal([]byte(text), &value); err != nil {
		t.Fatalf("%s: %v", line, err)
	}
	names := strings.Split(name, ".")
	for i := len(names) - 1; i > 0; i-- {
		value = map[string]any{names[i]: value}
	}
	v, err := structpb.NewValue(value)
	if err != nil {
		t.Fatal(err)
	}
	if req.Metadata == nil {
		payload := structpb.NewStructValue(&structpb.Struct{Fields: map[string]*structpb.Value{}})
		req.Metadata = map[string]*structpb.Struct{"jwt": {Fields: map[string]*structpb.Value{"payload": payload}}}
	}
	req.Metadata["jwt"].Fields["payload"].GetStructValue().Fields[names[0]] = v
}

// drawn describes what a request draws as "name key cost, ...". It omits what
// all keys begin and end with.
func drawn(t testing.TB, c *Config, line string) string {
	t.Helper()
	d := c.Draw(request(t, line))
	if d.Exempt {
		return "exempt"
	}
	var out []string
	for _, l := range d.Unlimited {
		out = append(out, l.Name+" unlimited")
	}
	for _, m := range d.Mistakes {
		out = append(out, m.Error())
	}
	for _, charge := range d.Charges {
		prefix := "sluice:" + charge.Limit.Domain + ":" + charge.Limit.Name + ":{"
		key, ok := strings.CutPrefix(charge.Key, prefix)
		if !ok || !strings.HasSuffix(key, "}") {
			t.Errorf("%s: the key %q does not begin with %q or not end with }", line, charge.Key, prefix)
		}
		s := charge.Limit.Name + " " + strings.TrimSuffix(key, "}")
		if charge.Refused {
			s += " refused"
		}
		if !charge.HasBucket() {
			s += " none"
		}
		if charge.Cost != 1 {
			s += fmt.Sprint(" costs ", charge.Cost)
		}
		out = append(out, s)
	}
	return strings.Join(out, ", ")
}

// hashed returns the key part of a hashed value.
func hashed(value string) string {
	sum := sha256.Sum256([]byte(value))
	return "#43." + base64.RawURLEncoding.EncodeToString(sum[:])
}

var hashedIn = regexp.MustCompile(`#\(([^)]*)\)`)

// withHashes replaces each #(value) by hashed(value).
func withHashes(s string) string {
	return hashedIn.ReplaceAllStringFunc(s, func(found string) string { return hashed(found[2 : len(found)-1]) })
}

// env returns an environment of a few variables.
func env(vars ...string) func(string) (string, bool) {
	return func(name string) (string, bool) {
		for i := 0; i < len(vars); i += 2 {
			if vars[i] == name {
				return vars[i+1], true
			}
		}
		return "", false
	}
}

// parse returns a config that must be valid.
func parse(t testing.TB, text string) *Config {
	t.Helper()
	c, err := Parse("test.yaml", []byte(text), env())
	if err != nil {
		t.Fatalf("%v\n%s", err, text)
	}
	return c
}

// mistakes returns the Mistakes of an error, which must be one.
func mistakes(t testing.TB, err error) Mistakes {
	t.Helper()
	var m Mistakes
	if !errors.As(err, &m) {
		t.Fatalf("no mistakes: %v", err)
	}
	return m
}

// configs returns all files of testdata, as fuzzing seeds.
func configs(t testing.TB) (texts [][]byte) {
	t.Helper()
	files, err := filepath.Glob("testdata/*/*.yaml")
	if err != nil || len(files) == 0 {
		t.Fatal(files, err)
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		texts = append(texts, text)
	}
	return texts
}
