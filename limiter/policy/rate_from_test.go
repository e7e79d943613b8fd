package policy

import (
	"fmt"
	"strings"
	"testing"
	"time"
)

// TestRateFrom has rates that requests bring, in a claim.
func TestRateFrom(t *testing.T) {
	const claim = "metadata.filter_metadata.jwt.payload."
	c := parse(t, `
limits:
  - {name: a, key: `+claim+`sub, rate: 60/m, rate_from: `+claim+`rate, max_rate: 10000/m, cost: 2}
  - name: b
    key: `+claim+`sub
    rate: 5/2s
    burst: 7
    rate_from: `+claim+`rate
    max_rate: 100/s
    overrides: [{key: gold, rate: 3/s}]
  - name: c
    key: `+claim+`sub
    rate: none
    rate_from: 'has(`+claim+`rate) ? `+claim+`rate : null'
    max_rate: 1000/h
    on_failure: local
local_share: 0.5
`)
	if len(c.Warnings) > 0 {
		t.Error(c.Warnings)
	}
	const bad = `: rate_from: must be a rate such as "600/m", a number >= 0, "unlimited" or "none"`
	for _, tt := range []struct{ claims, want string }{
		{``, "a 60/m 60, b 5/2s 7, c none 0"},
		{`claim rate=null`, "a 60/m 60, b 5/2s 7, c none 0"},
		{`claim rate="600/m"`, "a 600/m 600, b 600/m 7, c 1000/h 1000"},
		{`claim rate="20000/m"`, "a 10000/m 10000, b 100/s 7, c 1000/h 1000"},
		{`claim rate="36000/h"`, "a 36000/h 10000, b 36000/h 7, c 1000/h 1000"},
		{`claim rate="10/2m"`, "a 10/2m 10, b 10/2m 7, c 10/2m 10"},
		{`claim rate="300/90s"`, "a 300/1m30s 300, b 300/1m30s 7, c 1000/h 1000"},
		{`claim rate="3/7d"`, "a 3/168h 3, b 3/168h 7, c 3/168h 3"},
		{`claim rate=120`, "a 120/m 120, b 120/2s 7, c 120/h 120"},
		{`claim rate=120.9`, "a 120/m 120, b 120/2s 7, c 120/h 120"},
		{`claim rate=1e30`, "a 10000/m 10000, b 100/s 7, c 1000/h 1000"},
		{`claim rate="120"`, "a 120/m 120, b 120/2s 7, c 120/h 120"},
		{`claim rate="1.2e2"`, "a 120/m 120, b 120/2s 7, c 120/h 120"},
		{`claim rate="unlimited"`, "a 10000/m 10000, b 100/s 7, c 1000/h 1000"},
		{`claim rate="none"`, "a none 0, b none 0, c none 0"},
		{`claim rate=0`, "a none 0, b none 0, c none 0"},
		{`claim rate="0"`, "a none 0, b none 0, c none 0"},
		{`claim rate="0/m"`, "a none 0, b none 0, c none 0"},
		{`claim rate=0.5`, "a none 0, b none 0, c none 0"},
		{`claim rate="600/m" claim sub="gold"`, "a 600/m 600, b 3/s 3, c 1000/h 1000"},
		{`claim rate=-1`, "a" + bad},
		{`claim rate="-1"`, "a" + bad},
		{`claim rate="-1/m"`, "a" + bad},
		{`claim rate="hunter2"`, "a" + bad},
		{`claim rate="10/fortnight"`, "a" + bad},
		{`claim rate="10/1ns"`, "a" + bad}, // no, it is above max_rate
		{`claim rate="1/0s"`, "a" + bad},
		{`claim rate="1/400d"`, "a" + bad},
		{`claim rate="inf"`, "a" + bad},
		{`claim rate="nan"`, "a" + bad},
		{`claim rate="0x10"`, "a" + bad},
		{`claim rate=true`, "a" + bad},
		{`claim rate=[1]`, "a" + bad},
		{`claim rate="` + strings.Repeat("0", 65) + `1"`, "a" + bad},
	} {
		if strings.Contains(tt.claims, "1ns") {
			tt.want = "a 10000/m 10000, b 100/s 7, c 1000/h 1000"
		}
		req := request(t, strings.TrimSuffix("GET h/ "+tt.claims, " "))
		x := c.Explain(req)
		var got []string
		for i, l := range x.Limits {
			if len(x.Draw.Mistakes) > 0 {
				got = append(got, strings.TrimPrefix(x.Draw.Mistakes[0].Error(), "limit "))
				break
			}
			got = append(got, fmt.Sprint(l.Limit.Name, " ", l.Rate, " ", l.Burst))
			if charge := x.Draw.Charges[i]; charge.HasBucket() == (l.Rate == noneRate) || charge.Bucket.Burst() != l.Burst ||
				l.Limit.Name == "c" && charge.Limit.LocalShare != .5 {
				t.Errorf("%s: %+v", tt.claims, charge)
			}
		}
		if strings.Join(got, ", ") != tt.want {
			t.Errorf("%s: %s, want %s", tt.claims, strings.Join(got, ", "), tt.want)
		}
		if x.Draw.Invalid != strings.Contains(tt.want, bad) {
			t.Errorf("%s: invalid: %v", tt.claims, x.Draw.Invalid)
		}
	}
	// What a request brings is a bucket like one that the config has.
	same := parse(t, "limits: [{name: a, key: "+claim+"sub, rate: 600/m}]").Draw(request(t, "GET h/")).Charges[0]
	if got := c.Draw(request(t, `GET h/ claim rate="600/m"`)).Charges[0]; got.Bucket != same.Bucket {
		t.Errorf("%+v, want %+v", got.Bucket, same.Bucket)
	}
	for claims, want := range map[string]string{
		``: "it applies to every request; its key part metadata.filter_metadata.jwt.payload.sub is absent: " +
			"the client's network is used instead; rate_from is absent, so the rate is the limit's own",
		`claim sub="s" claim rate=7`:           "it applies to every request; its rate is from rate_from",
		`claim sub="s" claim rate="unlimited"`: "it applies to every request; its rate is from rate_from, cut to max_rate",
		`claim sub="s" claim rate=0`: "it applies to every request; its rate is from rate_from; the rate is none, so the " +
			"request is denied",
	} {
		if got := c.Explain(request(t, strings.TrimSuffix("GET h/ "+claims, " "))).Limits[0].Reason; got != want {
			t.Errorf("%s: %s, want %s", claims, got, want)
		}
	}
	if !c.ReadsMetadata() || fmt.Sprint(c.Needs().Metadata) != "[jwt]" || c.Describe()[0].MaxRate != "10000/m" {
		t.Errorf("%v %v %+v", c.ReadsMetadata(), c.Needs(), c.Describe()[0])
	}
}

// TestRateFromExtremes brings rates that no limit may have, as its bucket would take
// longer than 100 years to fill, or for their many tokens.
func TestRateFromExtremes(t *testing.T) {
	c := parse(t, `limits:
  - {name: slow, key: client.ip, rate: 60/m, burst: 100000, rate_from: 'request.headers["rate"]', max_rate: 10000/m}
  - {name: fast, key: client.ip, rate: 60/d, rate_from: 'request.headers["rate"]', max_rate: 1000000/s}
`)
	for rate, want := range map[string]string{
		"1/d":          "36524 1",
		"2000000000/d": "100000 1000000",
		"3000000001/d": "100000 1000000",
	} {
		d := c.Draw(request(t, "GET h/ with rate="+rate))
		if len(d.Charges) != 2 {
			t.Errorf("%s: %+v", rate, d)
			continue
		}
		if got := fmt.Sprint(d.Charges[0].Bucket.Burst(), " ", d.Charges[1].Bucket.Burst()); got != want {
			t.Errorf("%s: bursts of %s, want %s", rate, got, want)
		}
	}
}

// TestBucketOfRateFrom finds the bucket of a limit that has one only for requests
// that bring a rate.
func TestBucketOfRateFrom(t *testing.T) {
	for _, rate := range []string{"none", "unlimited"} {
		c := parse(t, `{limits: [{name: a, key: client.ip, rate: `+rate+
			`, rate_from: 'request.headers["rate"]', max_rate: 100/m, overrides: [{key: 10.0.0.1, rate: none}]}]}`)
		b, err := c.Bucket(BucketName{Limit: "a", Parts: []string{"10.0.0.2"}})
		if err != nil || b.Rate != "100/m" || b.Charge.Bucket.Burst() != 100 {
			t.Errorf("%s: %+v, %v", rate, b, err)
		}
		if _, err := c.Bucket(BucketName{Limit: "a", Parts: []string{"10.0.0.1"}}); err == nil {
			t.Errorf("%s: an override with the rate none has a bucket", rate)
		}
	}
}

// FuzzRateFrom checks that no rate that a request brings is above
// max_rate, in tokens for each period and in burst.
func FuzzRateFrom(f *testing.F) {
	for _, s := range []string{
		"600/m", "1", "unlimited", "9e99", "10/1us", "99999999999999999999/s", "1/d", "0", "-0", "1/2562047h",
	} {
		f.Add(s)
	}
	e, mistakes := compile("request.headers.rate", forRate)
	if mistakes != nil {
		f.Fatal(mistakes)
	}
	r := &rateFrom{expression: e, tokens: 1000, period: time.Minute, own: time.Second}
	f.Fuzz(func(t *testing.T, s string) {
		b, err := r.evaluate(&subject{Request: &Request{Headers: map[string]string{"rate": s}}})
		if err != nil || !b.isKnown {
			return
		}
		tier, err := r.tierOf(b, new(tier))
		switch {
		case err != nil:
		case tier.none != (b.tokens == 0) || tier.none == tier.hasBucket():
			t.Errorf("%q: %+v", s, b)
		case tier.hasBucket() && (exceeds(b.tokens, b.period, r.tokens, r.period) || tier.bucket.Burst() > r.tokens):
			t.Errorf("%q: %v %d", s, b, tier.bucket.Burst())
		}
		if tier != nil && tier.hasBucket() {
			if _, _, err := parseRate(b.String()); err != nil {
				t.Errorf("%q is written %s: %v", s, b, err)
			}
		}
	})
}

// TestRateFromWarnings checks what is warned of.
func TestRateFromWarnings(t *testing.T) {
	const (
		sub    = `metadata.filter_metadata["envoy.filters.http.jwt_authn"].payload.sub`
		claim  = `metadata.filter_metadata["envoy.filters.http.jwt_authn"].payload.rate`
		other  = `metadata.filter_metadata["envoy.filters.http.json_to_metadata"]`
		chosen = " may be written by the client, who then chooses a rate of up to max_rate; read a claim, such as " +
			claim + ", or have Envoy set it before sluice is asked"
		subject = "the key does not say whose rate this is, so that one request with a low rate cuts the bucket of others; " +
			"add to the key what names the rate's owner, such as " + sub
	)
	for _, tt := range []struct {
		key, from string
		want      []string
	}{
		{sub, claim, nil},
		{"[client.network, '" + strings.ReplaceAll(sub, "payload.sub", `payload["tenant"]`) + "']", claim, nil},
		{"client.network", claim, []string{subject}},
		{claim, claim, []string{subject}},
		{"request.method", claim, []string{subject}},
		{`request.headers["x-user"]`, claim, []string{subject}},
		{sub, `request.headers["x-rate"]`, []string{`request.headers["x-rate"]` + chosen}},
		{sub, `request.cookies["rate"]`, []string{`request.cookies["rate"]` + chosen}},
		{sub, `request.params["rate"]`, []string{`request.params["rate"]` + chosen}},
		{other + ".tenant", other + ".rate", []string{other + chosen}},
		{sub, `context["rate"]`, []string{subject}},
		{`context["tenant"]`, `context["rate"]`, nil},
	} {
		c := parse(t, "limits:\n- {name: n, key: client.network, rate: 1/s}\n- name: a\n  key: "+tt.key+
			"\n  rate: 60/m\n  rate_from: "+tt.from+"\n  max_rate: 90/m")
		var got []string
		for _, w := range c.Warnings {
			if w.Field == "limits[1].rate_from" {
				got = append(got, w.Message)
			}
		}
		if strings.Join(got, "\n") != strings.Join(tt.want, "\n") {
			t.Errorf("%s by %s: %q, want %q", tt.from, tt.key, got, tt.want)
		}
	}
	c := parse(t, "limits: [{name: a, key: '"+sub+"', rate: 2/s, rate_from: '"+claim+"', max_rate: 60/m}]")
	if got := c.Warnings.Error(); !strings.Contains(got, "limits[0].max_rate: 60/m is below the rate of 2/s") {
		t.Error(got)
	}
	// Without rate_from a limit costs no allocation more, and a change is seen.
	for text, isSame := range map[string]bool{
		"limits: [{name: a, key: '" + sub + "', rate: 2/s, rate_from: '" + claim + "', max_rate: 60/m}]": true,
		"limits: [{name: a, key: '" + sub + "', rate: 2/s, rate_from: '" + claim + "', max_rate: 61/m}]": false,
		"limits: [{name: a, key: '" + sub + "', rate: 2/s, rate_from: '" + sub + "', max_rate: 60/m}]":   false,
		"limits: [{name: a, key: '" + sub + "', rate: 2/s}]":                                             false,
	} {
		if changed := parse(t, text).Since(c).Changed; len(changed) == 0 != isSame {
			t.Errorf("%s: %v", text, changed)
		}
	}
}
