package authz

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"

	"github.com/sluiceproxy/sluice/limiter/policy"
)

func TestRequestOf(t *testing.T) {
	full := checkOf("a", "1")
	full.Attributes.Source.Principal = "spiffe://a/b"
	full.Attributes.Destination = address("10.0.0.2", 8080)
	full.Attributes.ContextExtensions = map[string]string{"k": "v"}
	full.Attributes.Request.Http.Headers["content-length"] = "12"

	raw := checkOf()
	raw.Attributes.Request.Http.Headers = nil
	raw.Attributes.Request.Http.HeaderMap = &corev3.HeaderMap{Headers: []*corev3.HeaderValue{
		{Key: "X-Key", RawValue: []byte("a")}, {Key: "x-key", Value: "b"},
		{Key: "x-other", RawValue: []byte{0xff}},
		{Key: "Empty"}, {Key: "empty", Value: "c"},
	}}
	pipe := checkOf()
	pipe.Attributes.Source.Address = &corev3.Address{Address: &corev3.Address_Pipe{Pipe: &corev3.Pipe{Path: "/x"}}}
	bare := &authv3.CheckRequest{Attributes: &authv3.AttributeContext{Request: &authv3.AttributeContext_Request{
		Http: &authv3.AttributeContext_HttpRequest{},
	}}}

	for name, tt := range map[string]struct {
		check *authv3.CheckRequest
		want  string
	}{
		"full": {full, "GET https shop.example.com / HTTP/2 map[a:1 content-length:12] " +
			"{203.0.113.7 5000 spiffe://a/b} {10.0.0.2 8080 } map[k:v]"},
		"raw": {raw, "GET https shop.example.com / HTTP/2 map[empty:,c x-key:a,b x-other:\xff] " +
			"{203.0.113.7 5000 } { 0 } map[]"},
		"pipe": {pipe, "GET https shop.example.com / HTTP/2 map[] { 0 } { 0 } map[]"},
		"bare": {bare, "     map[] { 0 } { 0 } map[]"},
	} {
		r, err := requestOf(tt.check)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		got := fmt.Sprintf("%s %s %s %s %s %v %v %v %v", r.Method, r.Scheme, r.Host, r.Path, r.Protocol,
			r.Headers, r.Source, r.Destination, r.Context)
		if got != tt.want {
			t.Errorf("%s\n got %q\nwant %q", name, got, tt.want)
		}
	}
	for i, check := range []*authv3.CheckRequest{
		nil, {}, {Attributes: &authv3.AttributeContext{}},
		{Attributes: &authv3.AttributeContext{Request: &authv3.AttributeContext_Request{}}},
	} {
		if _, err := requestOf(check); !errors.Is(err, errNoHTTP) {
			t.Errorf("%d: %v", i, err)
		}
	}
}

func TestRequestID(t *testing.T) {
	for id, want := range map[string]string{
		"7f1f2a3b-5a0c-4a53-9d5a-0a3f5a9e3c11": "7f1f2a3b-5a0c-4a53-9d5a-0a3f5a9e3c11",
		"a\nb":                                 "",
		`"}`:                                   "",
		strings.Repeat("a", 65):                "",
		"":                                     "",
	} {
		if got := requestID(&policy.Request{Headers: map[string]string{"x-request-id": id}}); got != want {
			t.Errorf("%q: %q", id, got)
		}
	}
}
