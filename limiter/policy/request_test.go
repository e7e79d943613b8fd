package policy

import (
	"fmt"
	"slices"
	"strings"
	"testing"
)

// lines yields header lines, given as "name=value".
func lines(all ...string) func(yield func(name, value string) bool) {
	return func(yield func(name, value string) bool) {
		for _, line := range all {
			name, value, _ := strings.Cut(line, "=")
			if !yield(name, value) {
				return
			}
		}
	}
}

func TestSetHeaders(t *testing.T) {
	req := &Request{Headers: map[string]string{"x-old": "kept", "x-a": "replaced", "x-b": "1,2"},
		Repeated: []string{"x-b", "x-old"}}
	req.SetHeaders(lines("X-A=1", "x-c=1", "x-a=", "cookie=a=1", "Cookie=b=2", "x-b=3", "x-c=2", "x-c=3"))
	want := map[string]string{"x-old": "kept", "x-a": "1,", "x-b": "3", "x-c": "1,2,3", "cookie": "a=1; b=2"}
	if fmt.Sprint(req.Headers) != fmt.Sprint(want) {
		t.Errorf("headers %v, want %v", req.Headers, want)
	}
	if want := []string{"x-a", "x-c", "x-old"}; !slices.Equal(req.Repeated, want) {
		t.Errorf("repeated %v, want %v", req.Repeated, want)
	}
}

// TestRepeatedHeaderIsNoKey checks that a header which was sent twice is absent
// as a part of a key in any expression, so that no further value makes a
// bucket.
func TestRepeatedHeaderIsNoKey(t *testing.T) {
	network := "~11.203.0.113.7"
	for _, tt := range []struct {
		limit, want string
	}{
		{`key: 'request.headers["x-api-key"]'`, "a " + network},
		{`key: request.headers.other`, "a " + hashed("o")},
		{`key: 'request.headers["x-api-key"] + "-suffix"'`, "a " + network},
		{`key: 'request.headers["x-api-key"].split(",")[0]'`, "a " + network},
		{`key: 'request.headers[?"x-api-key"]'`, "a " + network},
		{`key: 'request.headers[?"x-api-key"].orValue("none")'`, "a " + hashed("none")},
		{`key: '"x-api-key" in request.headers'`, "a " + hashed("false")},
		{`key: 'has(request.headers.twice)'`, "a " + hashed("false")},
		{`key: 'request.headers.map(name, request.headers[name]).filter(v, v.startsWith("j")).size()'`,
			"a " + hashed("0")},
		{`key: request.id`, "a " + network},
		{`key: 'request.id + ""'`, "a " + network},
		{`key: request.headers.cookie`, "a " + hashed("a=1; b=2")},
		{`key: 'request.headers["x-api-key"]', absent: share`, "a ~0."},
		{`key: 'request.headers["x-api-key"]', absent: deny`, "a ~0. refused"},
		{`key: ['request.headers["x-api-key"]', request.method]`, "a " + network + "=3.GET"},
		// Elsewhere it is one joined value.
		{`when: 'request.headers["x-api-key"] == "real,j1"'`, "a -"},
		{`when: 'request.headers["x-api-key"] == "real"'`, ""},
		{`cost: 'request.headers["x-api-key"].size()'`, "a - costs 7"},
	} {
		c := parse(t, "limits:\n  - {name: a, rate: 1/s, "+tt.limit+"}\n")
		var got []string
		req := request(t, "GET h/")
		req.SetHeaders(lines("x-api-key=real", "other=o", "x-request-id=1", "twice=a", "cookie=a=1", "x-api-key=j1",
			"cookie=b=2", "x-request-id=2", "twice=b"))
		d := c.Draw(req)
		for _, m := range d.Mistakes {
			got = append(got, m.Error())
		}
		for _, charge := range d.Charges {
			text := "a " + strings.TrimSuffix(strings.TrimPrefix(charge.Key, "sluice:default:a:{"), "}")
			if charge.Refused {
				text += " refused"
			}
			if charge.Cost != 1 {
				text += fmt.Sprint(" costs ", charge.Cost)
			}
			got = append(got, text)
		}
		if got := strings.Join(got, ", "); got != tt.want {
			t.Errorf("%s\n got %s\nwant %s", tt.limit, got, tt.want)
		}
	}
}

// TestRepeatedHeaderHasNoOverride checks that a key's override does not apply
// to a client that sends the key and another.
func TestRepeatedHeaderHasNoOverride(t *testing.T) {
	c := parse(t,
		`limits: [{name: a, rate: 1/s, key: 'request.headers["x-api-key"]', overrides: [{key: gold, rate: 100/s}, {key: `+
			`"gold,x", rate: 200/s}]}]`)
	req := request(t, "GET h/")
	req.SetHeaders(lines("x-api-key=gold", "x-api-key=x"))
	if d := c.Draw(req); len(d.Charges) != 1 || d.Charges[0].Bucket.Burst() != 1 {
		t.Errorf("%+v", d.Charges)
	}
	reason := c.Explain(req).Limits[0].Reason
	if want := `it applies to every request; its key part request.headers["x-api-key"] is absent (the header was sent ` +
		`more than once): the client's network is used instead`; reason != want {
		t.Errorf("%s\nwant %s", reason, want)
	}
}

// TestRepeatedClientHeader checks that a header which was sent twice names no
// client, and exempts nobody.
func TestRepeatedClientHeader(t *testing.T) {
	c := parse(t, `
client_ip: {header: x-real-ip}
exempt: [{match: {clients: [203.0.113.0/24, 10.0.0.0/8]}}]
limits: [{name: a, rate: 1/s, key: client.ip}]
`)
	req := request(t, "GET h/")
	req.SetHeaders(lines("x-real-ip=10.0.0.1", "x-real-ip=10.0.0.2"))
	if d := c.Draw(req); d.Exempt || len(d.Charges) != 1 || !strings.HasSuffix(d.Charges[0].Key, "{=11.203.0.113.7}") {
		t.Errorf("%+v", d)
	}
}
