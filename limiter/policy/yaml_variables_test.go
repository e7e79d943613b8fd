package policy

import (
	"fmt"
	"regexp"
	"strings"
	"testing"
)

// TestVariableDefaults checks that defaults apply as in a shell: also if the
// variable is empty.
func TestVariableDefaults(t *testing.T) {
	for text, want := range map[string]string{
		"${SET}":               "shop",
		"${SET:-other}":        "shop",
		"${EMPTY:-other}":      "other",
		"${UNSET:-other}":      "other",
		"a${EMPTY}":            "a",
		"a${UNSET:-}":          "a",
		"${SET}/${EMPTY:-b}":   "shop/b",
		"${SET}${SET:-x}":      "shopshop",
		"${UNSET:-a-b:-c}":     `invalid value "a-b:-c"; want 1 to 253 letters, digits and . _ / -`,
		"${UNSET:-$$}":         `invalid value "$$"; want 1 to 253 letters, digits and . _ / -`,
		"$${SET}":              `invalid value "${SET}"; want 1 to 253 letters, digits and . _ / -`,
		"${UNSET}":             "environment variable UNSET is not set; write ${UNSET:-default} for a default",
		"${UNSET:-${SET}}":     "the default of UNSET contains a variable; want plain text",
		"${SET:-${UNSET}}":     "the default of SET contains a variable; want plain text",
		"${SET:-$${UNSET}}":    "the default of SET contains a variable; want plain text",
		"${UNSET-x}":           `invalid variable name "UNSET"; ` + variableForms,
		"${UNSET:?hunter2}":    `invalid variable name "UNSET"; ` + variableForms,
		"${UNSET:=hunter2}":    `invalid variable name "UNSET"; ` + variableForms,
		"${}":                  `invalid variable name ""; ` + variableForms,
		"${UNSET":              "variable without a closing brace; " + variableForms,
		"${EMPTY:-${UNSET}-$x": "the default of EMPTY contains a variable; want plain text",
	} {
		c, err := Parse("f", []byte("domain: '"+text+"'\n"), env("SET", "shop", "EMPTY", ""))
		var got string
		if err != nil {
			got = strings.TrimPrefix(mistakes(t, err)[0].Message, "f:1:9: domain: ")
		} else {
			got = c.Domain
		}
		if got != want {
			t.Errorf("%s: %s\nwant %s", text, got, want)
		}
	}
	// A default that is not replaced would be a well-known key.
	if _, err := Parse("f", []byte("key_secret: ${A:-${B}}\n"), env("B", "secret")); err == nil {
		t.Error("the secret is the text ${B}")
	}
}

// withVariable are configs that are wrong for any value of V.
var withVariable = []string{
	"domain: '${V}?!'", "listen: {grpc: '${V}?!'}", "listen: {admin: '${V}?!'}", "mode: '${V}?!'",
	"on_failure: '${V}?!'", "log_level: '${V}?!'",
	"local_share: '${V}?!'", "failure_status: '${V}?!'", "grace: '${V}?!'", "headers: ['${V}?!']",
	"key_secret_file: 'none/${V}?!'",
	"client_ip: {header: '${V} ?!'}", "client_ip: {xff_from_right: '${V}?!'}",
	"client_ip: {xff_from_right: 1, from: ['${V}?!']}",
	"client_ip: {xff_from_right: 1, from: ['://${V}', 'x', '${V}?!']}",
	"store: {redis: {url: '${V}?!'}}", "store: {redis: {url: 'http://${V}'}}",
	"store: {redis: {url: 'redis://h', mode: '${V}?!'}}",
	"store: {redis: {url: 'redis://h', timeout: '${V}?!'}}", "store: {redis: {mode: cluster, addresses: ['${V}?!']}}",
	"store: {redis: {url: 'redis://h', key_prefix: '${V}?!'}}", "store: {redis: {url: 'rediss://h', tls: {ca_file: " +
		"'none/${V}'}}}",
	"store: {redis: {url: 'redis://h', password_file: 'none/${V}'}}",
	"limits: [{name: '${V}?!', rate: 1/s}]", "limits: [{name: a, rate: '${V}?!'}]",
	"limits: [{name: a, rate: 1/s, burst: '${V}?!'}]",
	"limits: [{name: a, rate: 1/s, group: '${V}?!'}]", "limits: [{name: a, rate: 1/s, absent: '${V}?!'}]",
	"limits: [{name: a, rate: 1/s, match: {hosts: ['${V}?!']}}]", "limits: [{name: a, rate: 1/s, match: {methods: " +
		"['${V}?!']}}]",
	"limits: [{name: a, rate: 1/s, match: {paths: ['${V}?!']}}]", "limits: [{name: a, rate: 1/s, match: {clients: " +
		"['${V}?!']}}]",
	"limits: [{name: a, rate: 1/s, match: {principals: ['${V}?!']}}]",
	"limits: [{name: a, rate: 1/s, when: '${V}?!'}]", "limits: [{name: a, rate: 1/s, key: '${V}?!'}]",
	"limits: [{name: a, rate: 1/s, cost: '${V}?!'}]",
	"limits: [{name: a, rate: 1/s, key: client.ip, overrides: [{key: x, rate: '${V}?!'}]}]",
	"limits: [{name: a, rate: 1/s, key: client.ip, overrides_file: 'none/${V}'}]",
	"limits: [{name: a, rate: 1/s, key: client.ip, overrides_file: '[${V}'}]",
}

// TestNoMessageTellsAVariable checks that no message contains the value of a
// variable.
func TestNoMessageTellsAVariable(t *testing.T) {
	for _, secret := range []string{"hunter2-the-secret", "hunter2:x@h", `hunter2"\x`, "hunter2 2"} {
		for _, text := range withVariable {
			_, err := Parse("f", []byte(text), env("V", secret))
			if err == nil {
				t.Errorf("%s: no mistake", text)
			} else if strings.Contains(err.Error(), "hunter2") {
				t.Errorf("%s: %v", text, err)
			}
		}
	}
}

// TestMessagesKeepTheirWords checks that hiding a variable's value changes only
// the quoted parts of a message.
func TestMessagesKeepTheirWords(t *testing.T) {
	word := regexp.MustCompile(`[A-Za-z0-9]+`)
	quotes := regexp.MustCompile(`"[^"]*"`)
	for _, text := range withVariable {
		if strings.Contains(text, "redis: {url: '") || strings.Contains(text, "cost:") ||
			strings.Contains(text, "when:") || strings.Contains(text, "key: '") {
			continue // the store's own words, and CEL's
		}
		message := func(value string) string {
			_, err := Parse("f", []byte(text), env("V", value))
			if err == nil {
				return ""
			}
			return quotes.ReplaceAllString(mistakes(t, err)[0].Message, "QUOTED")
		}
		plain := message("zzzz")
		for _, w := range append(word.FindAllString(plain, -1), "10/s", "host:port") {
			if got := message(w); got != plain && strings.Count(got, " ") == strings.Count(plain, " ") {
				t.Errorf("%s with %s: %s\nwithout %s", text, w, got, plain)
			}
		}
	}
	// The value of a variable of another field is not hidden.
	_, err := Parse("f", []byte("domain: ${V}\nmode: want\n"), env("V", "want"))
	if got := fmt.Sprint(err); got != `f:2:7: mode: unknown value "want"; want one of enforce, shadow` {
		t.Error(got)
	}
}

// TestEnvironment checks that variables are replaced after the file is parsed:
// their values can be any text, and add no structure.
func TestEnvironment(t *testing.T) {
	c, err := Parse("f", []byte(`
key_secret: ${SECRET}
failure_status: ${STATUS:-502}
limits:
  - name: ${NAME}
    rate: ${RATE:-5}/s
    key: '"$${" + request.headers["${HEADER}"]'
`), env("SECRET", "a: [b", "NAME", "orders", "HEADER", "x-key"))
	if err != nil {
		t.Fatal(err)
	}
	if string(c.hasher.secret) != "a: [b" || c.FailureStatus != 502 || c.Limits()[0].Name != "orders" ||
		c.rules[0].tier.bucket.Burst() != 5 {
		t.Errorf("%+v %+v", c, c.rules[0])
	}
	s := &subject{Request: &Request{Headers: map[string]string{"x-key": "k"}}}
	if v, err := c.rules[0].key[0].keyPart(s); v != "${k" || err != nil {
		t.Errorf("%q, %v", v, err)
	}
	if _, err := Parse("f", []byte("limits: ${LIMITS}\n"), env("LIMITS", "[{name: a, rate: 1/s}]")); err == nil {
		t.Error("a variable made structure")
	}
}

// TestVariablesAreNotTold checks that neither a mistake nor an explanation
// contains the value of a variable, which may be a secret.
func TestVariablesAreNotTold(t *testing.T) {
	vars := env("TOKEN", "hunter2-the-secret", "SHORT", "x1")
	for _, text := range []string{
		"mode: ${TOKEN}", "domain: '${TOKEN}!'", "grace: ${TOKEN}", "listen: {grpc: '${TOKEN}'}",
		"limits: [{name: a, rate: '${TOKEN}'}]", "domain: '${1X:-hunter2-the-secret}'",
		"limits:\n  - {name: a, rate: 1/s, when: 'request.method == " +
			"${TOKEN}'}", "limits: [{name: a, rate: 1/s, match: {hosts: ['${TOKEN}!']}}]", "failure_status: '${TOKEN}'",
		"limits: [{name: '${TOKEN}_', rate: 1/s}]", "store: {redis: {url: '${TOKEN}'}}",
	} {
		if _, err := Parse("f", []byte(text), vars); err == nil || strings.Contains(err.Error(), "hunter2") {
			t.Errorf("%s: %v", text, err)
		}
	}
	c, err := Parse("f",
		[]byte(`limits: [{name: a, rate: 1/s, when: 'request.headers.k != "${TOKEN}"', key: '["${TOKEN}"][request.size]', `+
			`absent: skip}]`), vars)
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range []string{"GET h/ with k=hunter2-the-secret", "GET h/", "GET h/ with content-length=5"} {
		if x := fmt.Sprintf("%+v", c.Explain(request(t, line)).Limits[0]); strings.Contains(x, "hunter2") {
			t.Errorf("%s: %s", line, x)
		}
	}
}
