package policy

import (
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"net/url"
	"regexp"
	"strings"
	"testing"

	"google.golang.org/protobuf/types/known/structpb"
)

// request makes a request of a line such as "POST api.example.com/v1/orders from 10.0.0.1 by spiffe://a/b with x-api-key=k".
func request(t testing.TB, line string) *Request {
	t.Helper()
	r := &Request{Headers: map[string]string{}, Context: map[string]string{}, Scheme: "https", Protocol: "HTTP/2", Size: -1}
	words := strings.Split(line, " ")
	r.Method = words[0]
	at := strings.IndexByte(words[1], '/')
	r.Host, r.Path = words[1][:at], words[1][at:]
	r.Source.Address = "203.0.113.7"
	for i := 2; i < len(words); i += 2 {
		switch value := words[i+1]; words[i] {
		case "from":
			r.Source.Address = strings.TrimPrefix(value, "nowhere")
		case "by":
			r.Source.Principal = value
		case "with":
			name, v, _ := strings.Cut(value, "=")
			text, err := url.PathUnescape(v)
			if err != nil {
				t.Fatal(err)
			}
			r.Headers[name] = text
		case "context":
			name, v, _ := strings.Cut(value, "=")
			r.Context[name] = v
		default:
			t.Fatalf("%q: what is %q?", line, words[i])
		}
	}
	return r
}

// drawn says what a request draws: "name key cost", one after another. What all keys begin and end with is left out.
func drawn(t testing.TB, c *Config, line string) string {
	t.Helper()
	d, err := c.Draw(request(t, line))
	if err != nil {
		return err.Error()
	}
	var out []string
	for _, charge := range d.Charges {
		prefix := "sluice:" + charge.Limit.Domain + ":" + charge.Limit.Name + ":{"
		key, ok := strings.CutPrefix(charge.Key, prefix)
		if !ok || !strings.HasSuffix(key, "}") {
			t.Errorf("%s: the key %q does not begin with %q or not end with }", line, charge.Key, prefix)
		}
		s := charge.Limit.Name + " " + strings.TrimSuffix(key, "}")
		if charge.Cost != 1 {
			s += fmt.Sprint(" costs ", charge.Cost)
		}
		out = append(out, s)
	}
	return strings.Join(out, ", ")
}

// hashed is the part of a key that a value is hashed to.
func hashed(value string) string {
	sum := sha256.Sum256([]byte(value))
	return "#43." + base64.RawURLEncoding.EncodeToString(sum[:])
}

var hashedIn = regexp.MustCompile(`#\(([^)]*)\)`)

// withHashes puts hashes for #(value).
func withHashes(s string) string {
	return hashedIn.ReplaceAllStringFunc(s, func(found string) string { return hashed(found[2 : len(found)-1]) })
}

func TestDraw(t *testing.T) {
	for _, section := range []struct {
		config string
		rows   [][2]string // a request, and what it draws
	}{
		{"", [][2]string{
			{"GET h/", ""},
		}},
		{"limits: [{name: all, rate: 1/s}]", [][2]string{
			{"GET h/", "all -"},
			{"POST other/x from nowhere", "all -"},
		}},
		{"limits: [{name: a, rate: 1/s, key: client.ip}, {name: b, rate: 1/s, key: client.network}]", [][2]string{
			{"GET h/", "a =11.203.0.113.7, b =11.203.0.113.7"},
			{"GET h/ from 2001:db8:0:1::7", "a =15.2001:db8:0:1::7, b =17.2001:db8:0:1::/64"},
			{"GET h/ from 2001:DB8:0000:1:0:0:0:7", "a =15.2001:db8:0:1::7, b =17.2001:db8:0:1::/64"},
			{"GET h/ from ::ffff:10.0.0.1", "a =8.10.0.0.1, b =8.10.0.0.1"},
			{"GET h/ from fe80::1%25eth0", "a =7.fe80::1, b =9.fe80::/64"},
			{"GET h/ from nowhere", "a ~0., b ~0."},
			{"GET h/ from 10.0.0.1 with x-forwarded-for=1.2.3.4", "a =8.10.0.0.1, b =8.10.0.0.1"},
		}},
		{`limits: [{name: a, rate: 1/s, key: 'request.headers["x-api-key"]'}]`, [][2]string{
			{"GET h/ with x-api-key=k", "a #(k)"},
			{"GET h/", "a ~11.203.0.113.7"},
			{"GET h/ with x-api-key=", "a ~11.203.0.113.7"},
			{"GET h/ from 2001:db8::1", "a ~13.2001:db8::/64"},
			{"GET h/ from nowhere", "a ~0."},
			// Nobody can send what stands in for an absent value.
			{"GET h/ with x-api-key=~11.203.0.113.7", "a #(~11.203.0.113.7)"},
		}},
		{`limits: [{name: a, rate: 1/s, absent: share, key: 'request.headers["x-api-key"]'}]`, [][2]string{
			{"GET h/", "a ~0."},
			{"GET h/ with x-api-key=k", "a #(k)"},
		}},
		{`limits: [{name: a, rate: 1/s, absent: skip, key: 'request.headers["x-api-key"]'}, {name: b, rate: 1/s}]`, [][2]string{
			{"GET h/", "b -"},
			{"GET h/ with x-api-key=k", "a #(k), b -"},
		}},
		{`limits: [{name: a, rate: 7/s, absent: deny, key: 'request.headers["x-api-key"]'}]`, [][2]string{
			{"GET h/", "a ~0. costs 8"},
			{"GET h/ with x-api-key=k", "a #(k)"},
		}},
		{`limits: [{name: a, rate: 1/s, key: [request.method, request.host, request.url_path]}]`, [][2]string{
			{"GET API.example.com:443/v1/a?token=s3cret", "a =3.GET=15.api.example.com=5./v1/a"},
			{"GET h/{a}%20b", "a =3.GET=1.h=14./%7Ba%7D%2520b"},
			{"GET h/\"\r\n\x00\xff", "a =3.GET=1.h=16./%22%0D%0A%00%FF"},
		}},
		{`limits: [{name: a, rate: 1/s, key: request.path}]`, [][2]string{
			{"GET h/v1/a", "a =5./v1/a"},
			{"GET h/v1/a?token=s3cret", "a #(/v1/a?token=s3cret)"},
		}},
		{`limits: [{name: a, rate: 1/s, key: ['request.query', 'request.path.split("?")[1]']}]`, [][2]string{
			{"GET h/?k", "a #(k)#(k)"},
			{"GET h/", "limit a: key: the expression fails"},
		}},
		{`limits: [{name: a, rate: 1/s, key: [request.scheme, request.protocol, source.address, source.principal, 'source.port']}]`, [][2]string{
			{"GET h/ by spiffe://a/ns/b", "a =5.https=6.HTTP/2=11.203.0.113.7=15.spiffe://a/ns/b=1.0"},
			{"GET h/", "a =5.https=6.HTTP/2=11.203.0.113.7~11.203.0.113.7=1.0"},
		}},
		{`limits: [{name: a, rate: 1/s, key: ['"x"', 'request.method.lowerAscii()', '1.5e13', '12u', 'true', '3.25']}]`, [][2]string{
			{"GET h/", "a =1.x=3.get=14.15000000000000=2.12=4.true=4.3.25"},
		}},
		{`limits: [{name: a, rate: 1/s, key: 'context["plan"]'}, {name: b, rate: 1/s, key: 'request.headers["a"] + request.method'}, {name: c, rate: 1/s, key: request.headers.a}]`, [][2]string{
			{"GET h/ context plan=k with a=k", "a #(k), b #(kGET), c #(k)"},
			{"GET h/", "a ~11.203.0.113.7, b ~11.203.0.113.7, c ~11.203.0.113.7"},
		}},
		{`limits: [{name: a, rate: 1/s, key: 'request.headers["a"] == "x"'}, {name: b, rate: 1/s, key: 'request.headers["a"] != "x"'}, {name: c, rate: 1/s, key: '"a" in request.headers'}]`, [][2]string{
			{"GET h/ with a=x", "a #(true), b #(false), c #(true)"},
		}},
		{`limits: [{name: a, rate: 1/s, key: 'request.headers["a"] != null'}, {name: b, rate: 1/s, key: 'request.headers[?"a"]'}]`, [][2]string{
			{"GET h/ with a=x", "a #(true), b #(x)"},
			{"GET h/ with a=", "a #(false), b ~11.203.0.113.7"},
			{"GET h/", "a #(false), b ~11.203.0.113.7"},
		}},
		{`limits: [{name: a, rate: 1/s, key: 'metadata.filter_metadata["envoy.filters.http.jwt_authn"].payload.sub'}]`, [][2]string{
			{"GET h/", "a ~11.203.0.113.7"},
		}},
		{`limits: [{name: a, rate: 1/s, domain: shared}, {name: b, rate: 1/s}]`, [][2]string{
			{"GET h/", "a -, b -"},
		}},
		{`limits: [{name: a, rate: 1/s, match: {hosts: [api.example.com, "*.example.org", "[::1]"]}}]`, [][2]string{
			{"GET api.example.com/", "a -"},
			{"GET API.Example.COM/", "a -"},
			{"GET api.example.com:8443/", "a -"},
			{"GET api.example.com./", "a -"},
			{"GET x.api.example.com/", ""},
			{"GET example.com/", ""},
			{"GET a.example.org/", "a -"},
			{"GET a.b.example.org:80/", "a -"},
			{"GET example.org/", ""},
			{"GET .example.org/", ""},
			{"GET aexample.org/", ""},
			{"GET [::1]:80/", "a -"},
			{"GET /", ""},
		}},
		{`limits: [{name: a, rate: 1/s, match: {methods: [GET, PROPFIND]}}]`, [][2]string{
			{"GET h/", "a -"},
			{"HEAD h/", "a -"},
			{"PROPFIND h/", "a -"},
			{"POST h/", ""},
			{"get h/", ""},
		}},
		{`limits: [{name: a, rate: 1/s, match: {methods: [HEAD]}}]`, [][2]string{
			{"HEAD h/", "a -"},
			{"GET h/", ""},
		}},
		{`limits: [{name: a, rate: 1/s, match: {paths: [/v1/orders, "/v1/orders/{id}/pay", "/v2/**"]}}]`, [][2]string{
			{"GET h/v1/orders", "a -"},
			{"GET h/v1/orders?x=1", "a -"},
			{"GET h/v1/orders/", "a -"},
			{"GET h/v1/Orders", ""},
			{"GET h/v1/orders/7", ""},
			{"GET h/v1/orders/7/pay", "a -"},
			{"GET h/v1/orders/7/8/pay", ""},
			{"GET h/v1/orders//pay", ""},
			{"GET h/v2", "a -"},
			{"GET h/v2/", "a -"},
			{"GET h/v2/x/y", "a -"},
			{"GET h/v2x", ""},
			{"GET h/v1", ""},
			{"GET h/", ""},
		}},
		{`limits: [{name: root, rate: 1/s, match: {paths: [/]}}, {name: every, rate: 1/s, match: {paths: ["/**"]}}]`, [][2]string{
			{"GET h/", "root -, every -"},
			{"GET h/?x", "root -, every -"},
			{"GET h//", "root -, every -"},
			{"GET h/a", "every -"},
		}},
		{`limits: [{name: a, rate: 1/s, match: {clients: [203.0.113.0/24, 10.1.2.3, "2001:db8::/32"]}}]`, [][2]string{
			{"GET h/ from 203.0.113.255", "a -"},
			{"GET h/ from 203.0.114.0", ""},
			{"GET h/ from 10.1.2.3", "a -"},
			{"GET h/ from 10.1.2.4", ""},
			{"GET h/ from ::ffff:10.1.2.3", "a -"},
			{"GET h/ from 2001:db8:ffff::1", "a -"},
			{"GET h/ from 2001:db9::1", ""},
			{"GET h/ from nowhere", ""},
		}},
		{`limits: [{name: a, rate: 1/s, match: {principals: ["spiffe://c/ns/web/*", "spiffe://c/ns/*/sa/admin", "spiffe://c/x"]}}]`, [][2]string{
			{"GET h/ by spiffe://c/ns/web/sa/shop", "a -"},
			{"GET h/ by spiffe://c/ns/app/sa/admin", "a -"},
			{"GET h/ by spiffe://c/ns/app/sa/user", ""},
			{"GET h/ by spiffe://c/x", "a -"},
			{"GET h/ by spiffe://c/xx", ""},
			{"GET h/ by spiffe://d/ns/web/sa/shop", ""},
			{"GET h/", ""},
		}},
		{`limits: [{name: a, rate: 1/s, match: {hosts: [h], methods: [POST], paths: [/x]}}, {name: b, rate: 1/s, match: {methods: [POST]}}]`, [][2]string{
			{"POST h/x", "a -, b -"},
			{"POST i/x", "b -"},
			{"POST h/y", "b -"},
			{"GET h/x", ""},
		}},
	} {
		c := parse(t, section.config)
		for _, row := range section.rows {
			if got, want := drawn(t, c, row[0]), withHashes(row[1]); got != want {
				t.Errorf("%s\n%s\n got %s\nwant %s", section.config, row[0], got, want)
			}
		}
	}
}

// A claim is found in Envoy's dynamic metadata.
func TestDrawByClaim(t *testing.T) {
	c := parse(t, `limits: [{name: a, rate: 1/s, key: 'metadata.filter_metadata["envoy.filters.http.jwt_authn"].payload.sub'}]`)
	r := request(t, "GET h/")
	claims, err := structpb.NewStruct(map[string]any{"payload": map[string]any{"sub": "k"}})
	if err != nil {
		t.Fatal(err)
	}
	r.Metadata = map[string]*structpb.Struct{"envoy.filters.http.jwt_authn": claims}
	d, err := c.Draw(r)
	if err != nil || d.Charges[0].Key != "sluice:default:a:{"+hashed("k")+"}" {
		t.Errorf("%+v, %v", d, err)
	}
}

// Whatever a path's spelling, it meets the limit of the plain one.
func TestPathVariants(t *testing.T) {
	c := parse(t, `limits: [{name: a, rate: 1/s, match: {hosts: [shop.example.com], paths: [/v1/orders]}}]`)
	for _, path := range []string{
		"/v1/orders", "//v1/orders", "/v1//orders", "/v1/orders/", "/v1/orders//", "/./v1/orders", "/v1/./orders", "/v1/orders/.",
		"/v1/x/../orders", "/../v1/orders", "/v1/orders/x/..", "/%76%31/orders", "/v1/%6frders", "/v1/%6Frders", "/v1%2forders",
		"/v1%2Forders", "/%2e/v1/orders", "/v1/%2e%2e/v1/orders", "/v1\\orders", "\\v1\\orders", "/v1%5corders", "/v1/orders;v=1",
		"/v1;a=b/orders", "/v1/orders;", "/v1/orders%3bv=1", "/v1/orders?", "/v1/orders?x=/../..", "/v1/orders/?x", "/v1/orders;a/?x",
	} {
		for _, host := range []string{"shop.example.com", "SHOP.example.COM", "shop.example.com:8080", "shop.example.com."} {
			if got := drawn(t, c, "GET "+host+"/x from 10.0.0.1"); got != "" {
				t.Fatal(got)
			}
			r := request(t, "GET "+host+"/")
			r.Path = path
			if d, err := c.Draw(r); err != nil || len(d.Charges) != 1 {
				t.Errorf("%s%s slips past: %v, %v", host, path, d, err)
			}
		}
	}
	for _, path := range []string{"/v1/order", "/v1/orders/x", "/v1/orders/%2e%2e", "/v1/%256frders", "/v1", "", "v1/orders2"} {
		r := request(t, "GET shop.example.com/")
		r.Path = path
		if d, err := c.Draw(r); err != nil || len(d.Charges) != 0 {
			t.Errorf("%s is limited: %v, %v", path, d, err)
		}
	}
}

func TestClientIP(t *testing.T) {
	for _, section := range []struct {
		config string
		rows   [][2]string // a request, and its client
	}{
		{"", [][2]string{
			{"GET h/ from 10.0.0.1 with x-forwarded-for=1.2.3.4", "10.0.0.1"},
		}},
		{"client_ip: {xff_from_right: 1}", [][2]string{
			{"GET h/ from 10.0.0.1 with x-forwarded-for=1.1.1.1,2.2.2.2", "2.2.2.2"},
			{"GET h/ from 10.0.0.1 with x-forwarded-for=forged,%202.2.2.2", "2.2.2.2"},
			{"GET h/ from 10.0.0.1", "10.0.0.1"},
			{"GET h/ from 10.0.0.1 with x-forwarded-for=garbage", "10.0.0.1"},
			{"GET h/ from 10.0.0.1 with x-forwarded-for=2.2.2.2,", "10.0.0.1"},
			{"GET h/ from 10.0.0.1 with x-forwarded-for=2.2.2.2:4711", "2.2.2.2"},
			{"GET h/ from 10.0.0.1 with x-forwarded-for=[2001:DB8::1]:4711", "2001:db8::1"},
			{"GET h/ from 10.0.0.1 with x-forwarded-for=[2001:db8::1]", "2001:db8::1"},
			{"GET h/ from 10.0.0.1 with x-forwarded-for=::ffff:2.2.2.2", "2.2.2.2"},
			{"GET h/ from 10.0.0.1 with x-forwarded-for=2001:db8:0:0:0:0:0:1", "2001:db8::1"},
		}},
		{"client_ip: {xff_from_right: 2}", [][2]string{
			{"GET h/ from 10.0.0.1 with x-forwarded-for=1.1.1.1,2.2.2.2,3.3.3.3", "2.2.2.2"},
			{"GET h/ from 10.0.0.1 with x-forwarded-for=3.3.3.3", "10.0.0.1"},
		}},
		{"client_ip: {header: x-envoy-external-address}", [][2]string{
			{"GET h/ from 10.0.0.1 with x-envoy-external-address=9.9.9.9", "9.9.9.9"},
			{"GET h/ from 10.0.0.1 with x-envoy-external-address=9.9.9.9,8.8.8.8", "10.0.0.1"},
			{"GET h/ from 10.0.0.1", "10.0.0.1"},
		}},
		{`client_ip: {xff_from_right: 1, from: [10.0.0.0/8, "spiffe://c/gateway*"]}`, [][2]string{
			{"GET h/ from 10.0.0.1 with x-forwarded-for=2.2.2.2", "2.2.2.2"},
			{"GET h/ from 11.0.0.1 with x-forwarded-for=2.2.2.2", "11.0.0.1"},
			{"GET h/ from 11.0.0.1 by spiffe://c/gateway-1 with x-forwarded-for=2.2.2.2", "2.2.2.2"},
			{"GET h/ from 11.0.0.1 by spiffe://c/app with x-forwarded-for=2.2.2.2", "11.0.0.1"},
			{"GET h/ from nowhere with x-forwarded-for=2.2.2.2", ""},
		}},
	} {
		c := parse(t, section.config)
		for _, row := range section.rows {
			if got := addressText(c.client.of(request(t, row[0]))); got != row[1] {
				t.Errorf("%s\n%s: %q, want %q", section.config, row[0], got, row[1])
			}
		}
	}
}
