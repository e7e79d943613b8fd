package main

import (
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"math/big"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/sluiceproxy/sluice/limiter/redistest"
)

// recipe returns the YAML below a heading of limiter/policy/README.md, with
// rates a thousandth of what they are, so that nothing refills while a test
// counts.
func recipe(t *testing.T, heading string) string {
	t.Helper()
	text := block(t, section(t, policyReadme, "### "+heading), "yaml")
	return strings.NewReplacer(
		"/s\n", "/1000s\n", "/m\n", "/1000m\n", "/h\n", "/1000h\n", "/s,", "/1000s,", "/m,", "/1000m,", "/h,", "/1000h,").
		Replace(text)
}

// served is an Envoy with sluice and an upstream behind it.
type served struct {
	t    *testing.T
	c    *http.Client
	addr string
	up   *upstream
	p    *process
}

// serveRecipe runs sluice with a config, or none if it is empty, and Envoy
// before it.
func serveRecipe(t *testing.T, config string, args []string, change ...func(string) string) *served {
	t.Helper()
	if config != "" {
		args = append(args, "--config", file(t, "sluice.yaml", config))
	}
	s := &served{t: t, c: client(t), up: startUpstream(t)}
	s.p = startSluice(t, args...)
	s.addr = startEnvoy(t, s.p.grpc, s.up.Listener.Addr().String(), append(change, patiently(t))...)
	return s
}

// asks sends n requests, each "METHOD path", with headers given as name, value,
// name, value. It returns how many passed. A response that is neither allowed
// nor limited fails the test.
func (s *served) asks(n int, what string, headers ...string) (passed int) {
	s.t.Helper()
	method, path, _ := strings.Cut(what, " ")
	for range n {
		answer, _ := send(s.t, s.c, method, "http://"+s.addr+path, headers...)
		switch answer.StatusCode {
		case http.StatusOK:
			passed++
		case http.StatusTooManyRequests:
		default:
			s.t.Errorf("%s: %d", what, answer.StatusCode)
		}
	}
	return passed
}

// want asks and says how many should pass.
func (s *served) want(passed, of int, what string, headers ...string) {
	s.t.Helper()
	if got := s.asks(of, what, headers...); got != passed {
		s.t.Errorf("%s %v: %d of %d passed, want %d", what, headers, got, of, passed)
	}
}

func TestRecipes(t *testing.T) {
	t.Run("API keys, and a stricter login", func(t *testing.T) {
		s := serveRecipe(t, recipe(t, "API keys, and a stricter login"), nil)
		s.want(200, 205, "GET /", "x-api-key", "one")
		s.want(50, 50, "GET /", "X-API-Key", "two")
		s.want(5, 8, "POST /login", "x-api-key", "two")
		s.want(0, 3, "POST //login/", "x-api-key", "three")
		s.want(200, 205, "GET /")                          // without a key: the network's
		s.want(145, 200, "GET /login", "x-api-key", "two") // 5 logins besides
	})
	t.Run("Plans by JWT claim, and tenants with rates of their own", func(t *testing.T) {
		issuer := newIssuer(t)
		s := serveRecipe(t, recipe(t, "Plans by JWT claim, and tenants with rates of their own"), nil, issuer.filter)
		for tenant, want := range map[string]int{"a": 20, "acme": 100, "our-own": 250} {
			s.want(want, 250, "GET /", "authorization", issuer.token(map[string]any{"tenant": tenant, "plan": "free"}))
		}
		s.want(200, 210, "GET /", "authorization", issuer.token(map[string]any{"tenant": "a", "plan": "gold"}))
		// A client without a plan is not gold.
		s.want(0, 1, "GET /", "authorization", issuer.token(map[string]any{"tenant": "a"}))
		s.want(20, 25, "GET /") // no token: the network's
	})
	t.Run("A rate from a claim", func(t *testing.T) {
		issuer := newIssuer(t)
		s := serveRecipe(t, recipe(t, "A rate from a claim"), nil, issuer.filter)
		token := func(sub string, rate any) []string {
			claims := map[string]any{"sub": sub}
			if rate != nil {
				claims["rate"] = rate
			}
			return []string{"authorization", issuer.token(claims)}
		}
		s.want(40, 43, "GET /", token("number", 40)...)
		s.want(50, 53, "GET /", token("text", "50/24h")...)
		s.want(60, 63, "GET /", token("absent", nil)...)
		s.want(60, 63, "GET /") // no token: the network's
		s.want(0, 3, "GET /", token("none", 0)...)
		s.want(60, 60, "GET /", token("another", nil)...)
		for sub, want := range map[string]string{"unlimited": "10000", "20000/1000m": "10000", "70/24h": "70"} {
			r, _ := fetch(t, s.c, "http://"+s.addr+"/", token(sub, sub)...)
			if got := r.Header.Get("X-Ratelimit-Limit"); got != want || r.StatusCode != 200 {
				t.Errorf("%s: %d, limit %s, want %s", sub, r.StatusCode, got, want)
			}
		}
		if r, body := fetch(t, s.c, "http://"+s.addr+"/", token("bad", "a lot")...); r.StatusCode != 503 {
			t.Errorf("a claim that is no rate: %d %s", r.StatusCode, body)
		}
	})
	t.Run("Three plans, and the tenants that have them", func(t *testing.T) {
		const heading = "Three plans, and the tenants that have them"
		rows := strings.ReplaceAll(block(t, section(t, policyReadme, "### "+heading), "csv"), "/h,", "/1000h,")
		text := strings.NewReplacer("tenants.csv", file(t, "tenants.csv", rows), "/h,", "/1000h,").Replace(recipe(t, heading))
		s := serveRecipe(t, text, nil)
		for tenant, want := range map[string]int{
			"acme": 100, "initech": 50, "umbrella": 30, "late-payer": 0, "new-here": 110, "somebody": 20,
		} {
			s.want(want, 110, "GET /", "x-tenant", tenant)
		}
	})
	t.Run("A month's quota, and a rate beside it", func(t *testing.T) {
		redis := redistest.Start(t)
		text := "store: {redis: {url: \"" + redis.URL() + "\", timeout: 10s}}\n" + recipe(t, "A month's quota, and a rate beside it")
		s := serveRecipe(t, text, nil)
		s.want(3, 4, "GET /", "x-api-key", "a") // by the burst
		s.want(20, 25, "GET /", "x-api-key", "paid-key")
		r, _ := fetch(t, s.c, "http://"+s.addr+"/", "x-api-key", "paid-key")
		wait, err := strconv.Atoi(r.Header.Get("Retry-After"))
		if err != nil || wait < 1 || wait > 31*86400 || r.Header.Get("X-Ratelimit-Reset") != r.Header.Get("Retry-After") ||
			r.Header.Get("X-Ratelimit-Limit") != "20" || r.StatusCode != 429 {
			t.Errorf("%d %v (%v)", r.StatusCode, r.Header, err)
		}
		s.want(30, 31, "GET /", "x-api-key", "partner-key")
		if keys := redis.Client().Keys(t.Context(), "sluice:default:plan/quota:{*").Val(); len(keys) != 2 {
			t.Errorf("%v", keys)
		}
		_, metrics := get(t, "http://"+s.p.metrics+"/metrics")
		for _, want := range []string{
			`sluice_rejections_total{limit="plan"} 2`, `sluice_rejections_total{limit="plan/quota"} 6`,
			`sluice_tokens_taken_total{limit="plan/quota"} 23`,
		} {
			if !strings.Contains(metrics, want) {
				t.Errorf("no %s", want)
			}
		}
	})
	t.Run("Kong's six windows", func(t *testing.T) {
		s := serveRecipe(t, recipe(t, "Kong's six windows"), nil)
		s.want(5, 7, "GET /")
		r, _ := fetch(t, s.c, "http://"+s.addr+"/")
		if r.Header.Get("X-Ratelimit-Limit") != "5" {
			t.Errorf("%v", r.Header)
		}
	})
	t.Run("A blocked client", func(t *testing.T) {
		redis := redistest.Start(t)
		text := "store: {redis: {url: \"" + redis.URL() + "\", timeout: 10s}}\n" + recipe(t, "A blocked client")
		s := serveRecipe(t, text, nil)
		for _, headers := range [][]string{
			{"x-forwarded-for", "203.0.113.7", "x-api-key", "one"}, {"x-forwarded-for", "192.0.2.1", "x-api-key", "stolen"},
		} {
			s.want(0, 3, "GET /", headers...)
			r, body := fetch(t, s.c, "http://"+s.addr+"/", headers...)
			for name := range r.Header {
				if name := strings.ToLower(name); name == "retry-after" || strings.HasPrefix(name, "x-ratelimit") {
					t.Errorf("%v: has %s", headers, name)
				}
			}
			if r.StatusCode != 429 || r.Header.Get("X-Envoy-Ratelimited") != "true" || strings.Contains(body, "retry") {
				t.Errorf("%v: %d %s", headers, r.StatusCode, body)
			}
		}
		if keys := redis.Client().Keys(t.Context(), "sluice:default:[a-z]*").Val(); len(keys) > 0 {
			t.Errorf("Redis was asked: %v", keys)
		}
		_, metrics := get(t, "http://"+s.p.metrics+"/metrics")
		for _, want := range []string{
			`sluice_rejections_total{limit="blocked"} 4`, `sluice_rejections_total{limit="per-key"} 4`,
			`sluice_checks_total{decision="limited"} 8`, `sluice_tokens_taken_total{limit="per-network"} 0`,
		} {
			if !strings.Contains(metrics, want) {
				t.Errorf("no %s", want)
			}
		}
		s.want(100, 103, "GET /", "x-forwarded-for", "192.0.2.1", "x-api-key", "one")
	})
	t.Run("One limit for all, before a fragile backend", func(t *testing.T) {
		s := serveRecipe(t, "client_ip: {xff_from_right: 2}\n"+recipe(t, "One limit for all, before a fragile backend"), nil)
		s.want(5, 7, "GET /reports/1", "x-forwarded-for", "203.0.113.1")
		s.want(3, 7, "GET /reports/1", "x-forwarded-for", "203.0.113.2") // the backend's 8 are used up
		r, _ := fetch(t, s.c, "http://"+s.addr+"/reports", "x-forwarded-for", "203.0.113.2")
		if r.Header.Get("X-Ratelimit-Limit") != "8" || r.StatusCode != 429 {
			t.Errorf("%d %v", r.StatusCode, r.Header)
		}
		_, metrics := get(t, "http://"+s.p.metrics+"/metrics")
		if want := `sluice_tokens_taken_total{limit="per-client"} 8`; !strings.Contains(metrics, want) {
			t.Errorf("no %s: a client has paid for what the backend denied", want)
		}
		s.want(5, 5, "GET /other")
	})
	t.Run("A new limit in the shadow", func(t *testing.T) {
		s := serveRecipe(t, recipe(t, "A new limit in the shadow"), nil)
		s.want(10, 10, "GET /")
		if s.up.got().Get("X-Sluice-Shadow") != "" {
			t.Error("the shadow limit would have denied too early")
		}
		s.want(40, 45, "GET /")
		if s.up.got().Get("X-Sluice-Shadow") != "per-client-strict" {
			t.Error("the upstream was not told of the shadow limit")
		}
		_, metrics := get(t, "http://"+s.p.metrics+"/metrics")
		for _, want := range []string{
			`sluice_limit_decisions_total{decision="shadow_limited",limit="per-client-strict"} 45`,
			`sluice_rejections_total{limit="per-client"} 5`,
		} {
			if !strings.Contains(metrics, want) {
				t.Errorf("no %s", want)
			}
		}
	})
	t.Run("Health checks and callers from inside are exempt", func(t *testing.T) {
		text := recipe(t, "Health checks and callers from inside are exempt")
		// A client that does not come through the load balancer is not believed
		// to be inside.
		direct := serveRecipe(t, text, nil)
		direct.want(10, 15, "GET /", "x-forwarded-for", "10.1.2.3")
		s := serveRecipe(t, strings.Replace(text, "192.0.2.0/24", "127.0.0.0/8", 1), nil)
		s.want(30, 30, "GET /healthz", "x-forwarded-for", "203.0.113.1")
		s.want(30, 30, "GET /", "x-forwarded-for", "10.1.2.3")
		s.want(30, 30, "GET /", "x-forwarded-for", "fd00::7")
		s.want(10, 15, "GET /", "x-forwarded-for", "203.0.113.1")
		s.want(0, 5, "GET /", "x-forwarded-for", "10.1.2.3, 203.0.113.1")
	})
	t.Run("Limits from Envoy's routes, without a file", func(t *testing.T) {
		perRoute := recipe(t, "Limits from Envoy's routes, without a file")
		s := serveRecipe(t, "", nil, func(b string) string {
			b = strings.Replace(
				b,
				"              - match: { prefix: / }\n",
				"              - match: { path: /free }\n                route: { cluster: upstream }\n              - match: { "+
					"prefix: / }\n",
				1,
			)
			return strings.Replace(
				b, "\n                route: { cluster: upstream }\n                # A route",
				"\n                route: { cluster: upstream }\n"+indent(perRoute, 16)+"                # A route", 1,
			)
		})
		s.want(5, 7, "GET /", "x-api-key", "one")
		s.want(5, 5, "POST /", "x-api-key", "one")
		s.want(0, 5, "POST /", "x-api-key", "two") // per-client's ten are used up
		s.want(20, 20, "GET /free")
	})
	t.Run("gRPC methods of different cost", func(t *testing.T) {
		s := serveRecipe(t, recipe(t, "gRPC methods of different cost"), nil)
		conn := dial(t, s.addr)
		call := func(method string) (remaining string, code codes.Code) {
			var header, trailer metadata.MD
			err := conn.Invoke(
				t.Context(), method, &emptypb.Empty{}, &emptypb.Empty{}, grpc.Header(&header), grpc.Trailer(&trailer),
			)
			return strings.Join(
					append(header.Get("x-ratelimit-remaining"), trailer.Get("x-ratelimit-remaining")...),
					"",
				), status.Code(
					err,
				)
		}
		for i, tt := range []struct {
			method, remaining string
			code              codes.Code
		}{
			{"/shop.v1.Catalog/Search", "90", codes.Unimplemented}, // as the upstream says
			{"/grpc.health.v1.Health/Check", "89", codes.OK},
			{"/shop.v1.Catalog/Search", "79", codes.Unimplemented},
		} {
			if remaining, code := call(tt.method); remaining != tt.remaining || code != tt.code {
				t.Errorf("%d: %s: %s, %v", i, tt.method, remaining, code)
			}
		}
		for range 7 {
			call("/shop.v1.Catalog/Search")
		}
		if remaining, code := call("/shop.v1.Catalog/Search"); remaining != "9" || code != codes.ResourceExhausted {
			t.Errorf("%s, %v", remaining, code)
		}
		if remaining, code := call("/grpc.health.v1.Health/Check"); remaining != "8" || code != codes.OK {
			t.Errorf("%s, %v", remaining, code)
		}
	})
	t.Run("Many services on one Redis", func(t *testing.T) {
		redis := redistest.Start(t)
		text := strings.Replace(recipe(t, "Many services on one Redis"), "${REDIS_URL}", redis.URL(), 1)
		checkout := serveRecipe(t, strings.Replace(text, `"}`, `", timeout: 10s}`, 1), nil)
		search := serveRecipe(
			t, strings.NewReplacer("shop/checkout", "shop/search", `"}`, `", timeout: 10s}`).Replace(text), nil,
		)
		checkout.want(10, 11, "GET /", "x-tenant", "a")
		search.want(2, 11, "GET /", "x-tenant", "a") // the tenant's 12 are used up
		search.want(8, 11, "GET /", "x-tenant", "b") // this service's own 10 are
		search.want(0, 2, "GET /")
		keys := redis.Client().Keys(t.Context(), "*").Val()
		slices.Sort(keys)
		got := strings.Join(keys, "\n")
		for _, want := range []string{
			"sluice:shop/checkout:per-client:{=9.127.0.0.1}", "sluice:shop/search:per-client:{=9.127.0.0.1}",
			"sluice:shop:tenant:{#43.",
		} {
			if !strings.Contains(got, want) {
				t.Errorf("no key %s in\n%s", want, got)
			}
		}
	})
}

// indent indents every line of a text.
func indent(text string, by int) string {
	space := strings.Repeat(" ", by)
	return space + strings.ReplaceAll(strings.TrimSuffix(text, "\n"), "\n", "\n"+space) + "\n"
}

// issuer issues tokens that an Envoy with its filter accepts.
type issuer struct {
	t   *testing.T
	key *rsa.PrivateKey
}

func newIssuer(t *testing.T) *issuer {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	return &issuer{t, key}
}

func base64url(b []byte) string { return base64.RawURLEncoding.EncodeToString(b) }

// token is a bearer token with the claims.
func (i *issuer) token(claims map[string]any) string {
	i.t.Helper()
	claims["iss"] = "https://issuer.example.com"
	body, err := json.Marshal(claims)
	if err != nil {
		i.t.Fatal(err)
	}
	signed := base64url([]byte(`{"alg":"RS256","kid":"k","typ":"JWT"}`)) + "." + base64url(body)
	sum := sha256.Sum256([]byte(signed))
	signature, err := rsa.SignPKCS1v15(rand.Reader, i.key, crypto.SHA256, sum[:])
	if err != nil {
		i.t.Fatal(err)
	}
	return "Bearer " + signed + "." + base64url(signature)
}

// keys returns the JWKS that verifies the tokens.
func (i *issuer) keys() string {
	return fmt.Sprintf(`{"keys":[{"kty":"RSA","alg":"RS256","kid":"k","n":"%s","e":"%s"}]}`,
		base64url(i.key.N.Bytes()), base64url(big.NewInt(int64(i.key.E)).Bytes()))
}

// filter inserts Envoy's JWT filter before ext_authz. A request may come
// without a token.
func (i *issuer) filter(bootstrap string) string {
	filter := `- name: envoy.filters.http.jwt_authn
  typed_config:
    "@type": type.googleapis.com/envoy.extensions.filters.http.jwt_authn.v3.JwtAuthentication
    providers:
      issuer:
        issuer: https://issuer.example.com
        payload_in_metadata: payload
        local_jwks: { inline_string: '` + i.keys() + `' }
    rules:
    - match: { prefix: / }
      requires: { requires_any: { requirements: [{ provider_name: issuer }, { allow_missing: {} }] } }
`
	const before = "          - name: envoy.filters.http.ext_authz\n"
	return strings.Replace(bootstrap, before, indent(filter, 10)+before, 1)
}

// TestEndpointsAndKeys checks rates by endpoint and by API key, each with its
// burst: from a file, and without a file from Envoy's routes.
func TestEndpointsAndKeys(t *testing.T) {
	const key = `request.headers["x-api-key"]`
	fromFile := serveRecipe(t, `
limits:
  - {name: per-key, rate: 1/d, burst: 12, key: '`+key+`', overrides: [{key: gold, rate: 1/d, burst: 30}]}
  - {name: search, rate: 1/d, burst: 5, key: '`+key+`', match: {paths: ["/search/**"]}}
  - {name: export, rate: 1/d, burst: 2, match: {paths: [/export], methods: [POST]}}
`, nil)
	extensions := func(entries string) string {
		return `typed_per_filter_config:
  envoy.filters.http.ext_authz:
    "@type": type.googleapis.com/envoy.extensions.filters.http.ext_authz.v3.ExtAuthzPerRoute
    check_settings:
      context_extensions:
` + indent(entries, 8)
	}
	quotedKey := strings.ReplaceAll(key, `"`, `\"`)
	fromEnvoy := serveRecipe(t, "", nil, func(b string) string {
		const host, route = "              routes:\n", "              - match: { prefix: / }\n"
		ofHost := extensions(
			`sluice.limit.per-key: "{rate: 1/d, burst: 12, key: '` + quotedKey + `', overrides: [{key: gold, rate: 1/d, burst: ` +
				`30}]}"`,
		)
		b = strings.Replace(b, host, indent(ofHost, 14)+host, 1)
		ofSearch := extensions(`sluice.limit.search: "{rate: 1/d, burst: 5, key: '` + quotedKey + `'}"`)
		ofExport := extensions(`sluice.limit.export: "{rate: 1/d, burst: 2, match: {methods: [POST]}}"`)
		ofFree := extensions(`sluice.limit.per-key: "off"`)
		return strings.Replace(
			b,
			route,
			"              - match: { path_separated_prefix: /search }\n                route: { cluster: upstream }\n"+indent(
				ofSearch,
				16,
			)+
				"              - match: { path: /export }\n                route: { cluster: upstream }\n"+indent(
				ofExport,
				16,
			)+
				"              - match: { path: /free }\n                route: { cluster: upstream }\n"+indent(
				ofFree,
				16,
			)+route,
			1,
		)
	})
	for name, s := range map[string]*served{"from a file": fromFile, "from Envoy": fromEnvoy} {
		t.Run(name, func(t *testing.T) {
			s.t = t
			s.want(5, 8, "GET /search/a", "x-api-key", "one")
			s.want(7, 8, "GET /other", "x-api-key", "one") // 12 in all
			s.want(0, 1, "GET /search", "x-api-key", "one")
			s.want(5, 8, "GET /search", "x-api-key", "gold")
			s.want(25, 30, "GET /other", "x-api-key", "gold") // 30 in all
			s.want(2, 4, "POST /export", "x-api-key", "two")
			s.want(0, 1, "POST /export", "x-api-key", "three") // one bucket for all
			s.want(2, 2, "GET /export", "x-api-key", "three")
			s.want(12, 14, "GET /other") // without a key: the network's
		})
	}
	fromEnvoy.t = t
	fromEnvoy.want(20, 20, "GET /free", "x-api-key", "one")
}
