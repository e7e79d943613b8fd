package main

import (
	"fmt"
	"maps"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/structpb"

	"github.com/sluiceproxy/sluice/limiter"
	"github.com/sluiceproxy/sluice/limiter/policy"
)

// TestEnvoyREADMECommands checks that envoy/README.md names each kind that
// `sluice envoy` prints, and no other.
func TestEnvoyREADMECommands(t *testing.T) {
	named := unique(document(t, envoyReadme), "`sluice envoy ([a-z-]+)")
	if want := slices.Sorted(maps.Keys(chains)); !slices.Equal(named, want) {
		t.Errorf("envoy/README.md names %v, want %v", named, want)
	}
}

// migration is one example of envoy/README.md: a config, and what requests draw
// under it.
type migration struct {
	heading string
	config  string
	want    []string // the lines "REQUEST -> LIMITS" of the config's comments
}

// migrations returns the examples below "## Migrating", in their order. A
// heading without a config has to say that there is no counterpart.
func migrations(t *testing.T) []migration {
	t.Helper()
	_, text, ok := strings.Cut(document(t, envoyReadme), "\n## Migrating\n")
	if !ok {
		t.Fatal("envoy/README.md has no section on migrating")
	}
	var all []migration
	for i, section := range strings.Split(text, "\n#### ") {
		heading, body, _ := strings.Cut(section, "\n")
		if i == 0 {
			continue
		}
		blocks := strings.Split(body, "```yaml\n# sluice\n")
		if len(blocks) == 1 && !strings.Contains(body, "o counterpart") {
			t.Errorf("%s: neither a config nor the words that there is no counterpart", heading)
		}
		for _, block := range blocks[1:] {
			config, _, _ := strings.Cut(block, "```")
			m := migration{heading: heading, config: config}
			for line := range strings.Lines(config) {
				if comment, ok := strings.CutPrefix(line, "# "); ok {
					m.want = append(m.want, strings.TrimSpace(comment))
				}
			}
			all = append(all, m)
		}
	}
	return all
}

// migrationToken is a word of the request in an example's comment.
var migrationToken = regexp.MustCompile(`[^ "]+="[^"]*"|[^ ]+`)

// migrationRequest reads a request of an example: "METHOD /path name=value".
// client, host and claim.NAME are not headers, and a value may be quoted.
func migrationRequest(t *testing.T, text string) *policy.Request {
	t.Helper()
	r := &policy.Request{
		Method: "GET", Scheme: "http", Path: "/", Host: "shop.example.com", Protocol: "HTTP/1.1",
		Headers: map[string]string{}, Source: policy.Peer{Address: "203.0.113.1"},
	}
	claims := map[string]any{}
	for _, word := range migrationToken.FindAllString(text, -1) {
		name, value, hasValue := strings.Cut(word, "=")
		value = strings.Trim(value, `"`)
		claim, isClaim := strings.CutPrefix(name, "claim.")
		switch {
		case strings.HasPrefix(word, "/"):
			r.Path = word
		case !hasValue && strings.ToUpper(word) == word:
			r.Method = word
		case !hasValue:
			t.Fatalf("%s: %q is no method, path or NAME=VALUE", text, word)
		case name == "client":
			r.Source.Address = value
		case name == "host":
			r.Host = value
		case isClaim:
			claims[claim] = value
		default:
			r.Headers[name] = value
		}
	}
	if len(claims) > 0 {
		payload, err := structpb.NewStruct(map[string]any{"payload": claims})
		if err != nil {
			t.Fatal(err)
		}
		r.Metadata = map[string]*structpb.Struct{"envoy.filters.http.jwt_authn": payload}
	}
	return r
}

// migrationRate is a rate as the examples write it.
var migrationRate = regexp.MustCompile(`^([0-9]+)/([0-9]*)([smhd])$`)

// migrationBucket returns the bucket that a rate means in the examples, whose
// burst is the rate's tokens.
func migrationBucket(t *testing.T, rate string) limiter.Bucket {
	t.Helper()
	m := migrationRate.FindStringSubmatch(rate)
	if m == nil {
		t.Fatalf("%q is not a rate", rate)
	}
	tokens, err := strconv.ParseInt(m[1], 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	periods := 1
	if m[2] != "" {
		if periods, err = strconv.Atoi(m[2]); err != nil {
			t.Fatal(err)
		}
	}
	unit := map[string]time.Duration{"s": time.Second, "m": time.Minute, "h": time.Hour, "d": 24 * time.Hour}[m[3]]
	b, err := limiter.NewBucket(tokens, time.Duration(periods)*unit, tokens)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// drawn returns what a request draws, in the words of the examples. It writes a
// rate as want does, if the bucket is that rate's. seen has the buckets of
// earlier requests; drawn adds to it.
func drawn(t *testing.T, d policy.Draw, want string, seen map[string]bool) string {
	t.Helper()
	rates := map[string]string{}
	for part := range strings.SplitSeq(want, ", ") {
		if words := strings.Fields(part); len(words) > 1 {
			rates[words[0]] = words[1]
		}
	}
	var parts []string
	for _, l := range d.Unlimited {
		parts = append(parts, l.Name+" unlimited")
	}
	for _, c := range d.Charges {
		rate := rates[c.Limit.Name]
		if !migrationRate.MatchString(rate) || migrationBucket(t, rate) != c.Bucket {
			rate = fmt.Sprintf("another rate, with a burst of %d", c.Bucket.Burst())
		}
		part := c.Limit.Name + " " + rate
		if seen[c.Key] {
			part += " (same bucket)"
		}
		seen[c.Key] = true
		if c.Limit.Shadow {
			part += " (shadow)"
		}
		parts = append(parts, part)
	}
	if d.Invalid || d.Exempt || len(d.Mistakes) > 0 {
		parts = append(parts, fmt.Sprintf("invalid: %v, exempt: %v, mistakes: %v", d.Invalid, d.Exempt, d.Mistakes))
	}
	if len(parts) == 0 {
		return "no limit"
	}
	return strings.Join(parts, ", ")
}

// TestMigrations checks that each example of envoy/README.md is a valid config
// and does what its comments say.
func TestMigrations(t *testing.T) {
	all := migrations(t)
	if len(all) < 25 {
		t.Errorf("only %d examples were found", len(all))
	}
	args := []string{"validate"}
	for i, m := range all {
		args = append(args, file(t, fmt.Sprintf("%d.yaml", i), m.config))
	}
	if status, stdout, stderr := sluice(t, nil, args...); status != 0 {
		t.Errorf("%s%s", stdout, stderr)
	}
	for _, m := range all {
		t.Run(m.heading, func(t *testing.T) {
			c, err := policy.Parse("sluice.yaml", []byte(m.config), os.LookupEnv)
			if err != nil {
				t.Fatal(err)
			}
			if len(m.want) == 0 {
				t.Error("no comment says what becomes of a request")
			}
			seen := map[string]bool{}
			for _, line := range m.want {
				request, want, ok := strings.Cut(line, "->")
				want = strings.TrimSpace(want)
				if !ok {
					t.Fatalf("%q is not REQUEST -> LIMITS", line)
				}
				if got := drawn(t, c.Draw(migrationRequest(t, request)), want, seen); got != want {
					t.Errorf("%s: %s, want %s", strings.TrimSpace(request), got, want)
				}
			}
		})
	}
}

// TestMigrationWindows checks the rates in the table of Kong's windows.
func TestMigrationWindows(t *testing.T) {
	rows := regexp.MustCompile("(?m)^\\| [^|]+ \\| ([0-9]+) \\| ([0-9]+) \\| `rate: ([^`]+)` \\|$").
		FindAllStringSubmatch(document(t, envoyReadme), -1)
	if len(rows) != 6 {
		t.Errorf("%d rows, want 6", len(rows))
	}
	for _, row := range rows {
		want := migrationBucket(t, row[1]+"/"+row[2]+"s")
		c, err := policy.Parse("sluice.yaml", []byte("limits: [{name: a, rate: "+row[3]+"}]"), os.LookupEnv)
		if err != nil {
			t.Errorf("%s: %v", row[0], err)
		} else if d := c.Draw(migrationRequest(t, "/")); len(d.Charges) != 1 || d.Charges[0].Bucket != want {
			t.Errorf("%s: another bucket than the rate's", row[0])
		}
	}
}
