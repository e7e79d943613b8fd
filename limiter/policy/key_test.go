package policy

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
)

// parts makes a key of values: each open, hashed, or absent.
func parts(h *hasher, values []string, kinds []int) string {
	var key []byte
	for i, v := range values {
		switch kinds[i] {
		case 0:
			key = h.appendOpen(key, v)
		case 1:
			key = h.appendHash(key, v)
		default:
			key = h.appendAbsent(key, v)
		}
	}
	return string(key)
}

// TestKeysDoNotCollide checks a million keys of separators, escapes, quotes,
// counts and tags: different parts make different keys.
func TestKeysDoNotCollide(t *testing.T) {
	pieces := []string{"", "a", "1", ".", "=", "#", "~", ":", "{", "}", "%", "%41", "A", "\x00", "\xff", "é", "/",
		"=1.a", "#43.", "~0.", "11.", "?"}
	random := rand.New(rand.NewPCG(1, 2))
	h := &hasher{}
	seen := make(map[string]string)
	for range 1_000_000 {
		n := random.IntN(4)
		values, kinds := make([]string, n), make([]int, n)
		for i := range values {
			for range random.IntN(4) {
				values[i] += pieces[random.IntN(len(pieces))]
			}
			if kinds[i] = random.IntN(3); kinds[i] == 2 {
				values[i] = []string{"", "10.0.0.1", "2001:db8::/64"}[random.IntN(3)]
			} else if values[i] == "" {
				values[i] = "x" // an empty value is absent
			}
			if kinds[i] == 0 && strings.Contains(values[i], "?") {
				kinds[i] = 1 // as appendOpen does
			}
		}
		key, of := parts(h, values, kinds), fmt.Sprintf("%q %v", values, kinds)
		if other, ok := seen[key]; ok && other != of {
			t.Fatalf("%s and %s both make %q", of, other, key)
		}
		seen[key] = of
		if strings.ContainsAny(key, "{}\" \r\n\x00") {
			t.Fatalf("%s makes %q", of, key)
		}
	}
}

func TestKeySecret(t *testing.T) {
	keys := map[string]bool{}
	for _, secret := range []string{"", "key_secret: one", "key_secret: two"} {
		c := parse(t, secret+"\nlimits:\n  - {name: a, rate: 1/s, key: 'request.headers[\"x-api-key\"]'}\n")
		key := drawn(t, c, "GET h/ with x-api-key=canary")
		if strings.Contains(key, "canary") || keys[key] {
			t.Errorf("%q: %s", secret, key)
		}
		keys[key] = true
	}
}

// TestKeysAreBounded checks that a part of a key has at most a few hundred
// bytes, whatever a client sends.
func TestKeysAreBounded(t *testing.T) {
	c := parse(t, `limits: [{name: a, rate: 1/s, key: [request.url_path, request.host]}]`)
	req := request(t, "GET h/")
	req.Path, req.Host = "/"+strings.Repeat("é", 50_000), strings.Repeat("h", 50_000)
	d := c.Draw(req)
	if len(d.Charges[0].Key) > 150 {
		t.Errorf("%d bytes", len(d.Charges[0].Key))
	}
}
