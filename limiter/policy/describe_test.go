package policy

import (
	"fmt"
	"strings"
	"testing"
	"time"
)

func TestDescribe(t *testing.T) {
	c, err := Parse("t.yaml", []byte(`
limits:
  - {name: a, rate: 10/s, burst: 20, key: [client.ip, 'request.headers["k"]'], group: g, overrides: [{key: [10.0.0.1, y], rate: 1/s}]}
  - {name: b, rate: unlimited}
`), func(string) (string, bool) { return "", false })
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, d := range c.Describe() {
		got = append(got, fmt.Sprintf("%s %s %d %q %s %d", d.Limit.Name, d.Rate, d.Burst, d.Key, d.Group, d.Overrides))
	}
	if g, want := strings.Join(got,
		"\n"), "a 10/s 20 [\"client.ip\" \"request.headers[\\\"k\\\"]\"] g 1\nb unlimited 0 []  0"; g != want {
		t.Errorf("%s\nwant %s", g, want)
	}
}

// TestRoughDuration checks that a duration is written in its two largest units,
// rounded to the smaller one.
func TestRoughDuration(t *testing.T) {
	const day = 24 * time.Hour
	for d, want := range map[time.Duration]string{
		0:                                  "0s",
		1200 * time.Microsecond:            "1ms",
		1500 * time.Millisecond:            "1.5s",
		45 * time.Second:                   "45s",
		time.Minute - 1:                    "1m",
		90 * time.Second:                   "1m 30s",
		time.Hour - 1:                      "1h",
		time.Hour:                          "1h",
		200*time.Minute + 29*time.Second:   "3h 20m",
		day - time.Minute:                  "23h 59m",
		day - time.Second:                  "1d",
		day + 29*time.Minute:               "1d",
		21*day - 30*time.Minute:            "21d",
		21 * day:                           "21d",
		21*day + 5*time.Hour + time.Minute: "21d 5h",
		36525 * day:                        "36525d",
	} {
		if got := RoughDuration(d); got != want {
			t.Errorf("%v: %s, want %s", d, got, want)
		}
	}
}

// TestRoughWait checks that a wait is never written shorter than it is.
func TestRoughWait(t *testing.T) {
	const day = 24 * time.Hour
	for d, want := range map[time.Duration]string{
		0:                               "0s",
		1200 * time.Microsecond:         "2ms",
		45 * time.Second:                "45s",
		time.Minute - 1:                 "1m",
		90 * time.Second:                "1m 30s",
		time.Hour - 1:                   "1h",
		time.Hour + 1:                   "1h 1m",
		200*time.Minute + 1*time.Second: "3h 21m",
		day - time.Minute:               "23h 59m",
		day - 59*time.Second:            "1d",
		day:                             "1d",
		day + 29*time.Minute:            "1d 1h",
		21*day - 59*time.Minute:         "21d",
		36525 * day:                     "36525d",
	} {
		if got := RoughWait(d); got != want {
			t.Errorf("%v: %s, want %s", d, got, want)
		}
	}
}

// TestKeyParts checks that KeyParts returns the parts of a key, whatever their
// values, and none for other texts.
func TestKeyParts(t *testing.T) {
	h := &hasher{}
	var key []byte
	for _, v := range []string{"10.0.0.1", "=1.x~", "<script>"} {
		key = h.appendOpen(key, v)
	}
	key = h.appendHash(key, "secret")
	key = h.appendAbsent(key, "2001:db8::/64")
	want := "[{open 10.0.0.1} {open =1.x~} {open %3Cscript%3E} {hash K7gNU3sdo-OL0wNhqoVWhr3g6s1xYv72ol_pe_Unols} " +
		"{absent 2001:db8::/64}]"
	if got := fmt.Sprint(KeyParts(string(key))); got != want {
		t.Errorf("%s\nwant %s", got, want)
	}
	for i := range key { // truncated anywhere
		KeyParts(string(key[:i]))
	}
	for _, bad := range []string{"", "-", "=", "=9.a", "=-1.a", "x1.a", "=1", "=99999999999999999999.a"} {
		if got := KeyParts(bad); len(got) != 0 {
			t.Errorf("%q: %v", bad, got)
		}
	}
}
