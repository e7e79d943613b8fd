package policy

import (
	"strings"
	"testing"
)

// TestReadable checks that people see the key of a readable limit in clear and
// escaped, that Redis has its hash, and that either names the bucket.
func TestReadable(t *testing.T) {
	const limit = `limits:
- name: a
  rate: 1/s
  key: ['request.headers["x-tenant"]', request.method, 'request.headers["x-plan"]']
  overrides: [{key: [acme, GET, gold], rate: 5/s}]
  readable: `
	for _, secret := range []string{"", "key_secret: 0123456789abcdef\n"} {
		hashed, readable := parse(t, secret+limit+"false"), parse(t, secret+limit+"true")
		for _, tt := range []struct{ line, want string }{
			{"GET h/ with x-tenant=acme with x-plan=gold", "=4.acme=3.GET=4.gold"},
			{`GET h/ with x-tenant={}?"%C3%A9%0A with x-plan=gold`, "=21.%7B%7D%3F%22%C3%A9%0A=3.GET=4.gold"},
			{"GET h/ with x-tenant=a%257Bb with x-plan=#43.x", "=7.a%257Bb=3.GET=7.%2343.x"},
			{"GET h/ with x-tenant=acme from 192.0.2.1", "=4.acme=3.GET~9.192.0.2.1"},
			{"POST h/ with x-plan=~0. from 2001:db8::1", "~13.2001:db8::/64=4.POST=3.~0."},
			{"GET h/ with x-plan=a with x-tenant=" + strings.Repeat("x", 200),
				"=200." + strings.Repeat("x", 200) + "=3.GET=1.a"},
		} {
			line, want := tt.line, tt.want
			was, is := hashed.Draw(request(t, line)).Charges[0], readable.Draw(request(t, line)).Charges[0]
			if is.Key != was.Key || is.Bucket != was.Bucket {
				t.Errorf("%s: in Redis %s %v, want %s %v", line, is.Key, is.Bucket, was.Key, was.Bucket)
			}
			if got := is.ShownKey(); got != want {
				t.Errorf("%s: %s, want %s", line, got, want)
			}
			if got := readable.Explain(request(t, line)).Limits[0].Key; got != want {
				t.Errorf("%s: explain says %s, want %s", line, got, want)
			}
			for key, shown := range map[string]string{want: want, was.ShownKey(): was.ShownKey()} {
				b, err := readable.Bucket(BucketName{Limit: "a", Key: key})
				if err != nil || b.Charge.Key != is.Key || b.Charge.ShownKey() != shown {
					t.Errorf("bucket %s: %s shown as %s, %v", key, b.Charge.Key, b.Charge.ShownKey(), err)
				}
				isGold := line == "GET h/ with x-tenant=acme with x-plan=gold"
				if hasHMAC := secret != "" && key != want; isGold && !hasHMAC && b.Rate != "5/s" {
					t.Errorf("bucket %s: its rate is %s", key, b.Rate)
				}
			}
		}
		b, err := readable.Bucket(BucketName{
			Limit: "a", Parts: []string{"acme", "GET", ""}, Absent: true, Client: "192.0.2.1",
		})
		if err != nil || b.Charge.ShownKey() != "=4.acme=3.GET~9.192.0.2.1" {
			t.Errorf("%s, %v", b.Charge.ShownKey(), err)
		}
		long := readable.Draw(request(t, "GET h/ with x-tenant="+strings.Repeat("é", 34)+" with x-plan=a")).Charges[0]
		if got := long.ShownKey(); !strings.HasPrefix(got, "#43.") || !strings.HasSuffix(got, "=3.GET=1.a") {
			t.Errorf("a long value is shown as %s", got)
		}
	}
}

// TestReadableChanges checks that a reload reports it, and that a limit without a
// hashed part is not readable.
func TestReadableChanges(t *testing.T) {
	a := parse(t, `
limits: [{name: a, rate: 1/s, key: 'request.headers["x-tenant"]'}, {name: b, rate: 1/s, key: request.method}]
`)
	b := parse(t, `limits: [{name: a, rate: 1/s, key: 'request.headers["x-tenant"]', readable: true},`+
		`{name: b, rate: 1/s, key: request.method, readable: true}]`)
	if got := b.Since(a).Changed; len(got) != 1 || got[0] != "a" {
		t.Error(got)
	}
	if d := b.Draw(request(t, "GET h/ with x-tenant=acme")); d.Charges[0].Shown != "=4.acme" || d.Charges[1].Shown != "" {
		t.Errorf("%+v", d.Charges)
	}
}
