package accesslog

import (
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"
)

// readAll reads a log and returns one line for each request, and the counts.
func readAll(t *testing.T, name string, stdin io.Reader, o Options) (*Source, []string, Counts) {
	t.Helper()
	s, err := Open(name, stdin, o)
	if err != nil {
		t.Fatal(err)
	}
	r, err := s.Start()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	var all []string
	var total Counts
	p := s.NewParser()
	for {
		c, err := r.Next()
		if errors.Is(err, io.EOF) {
			return s, all, total
		}
		if err != nil {
			t.Fatal(err)
		}
		counts := p.Parse(c, func(e *Entry) { all = append(all, show(e)) })
		total.Lines += counts.Lines
		total.Skipped += counts.Skipped
		total.NoRequest += counts.NoRequest
		total.Bad = append(total.Bad, counts.Bad...)
	}
}

// show returns an entry as text, without what is empty.
func show(e *Entry) string {
	r := &e.Request
	s := time.UnixMicro(e.At).UTC().Format("2006-01-02T15:04:05.999999") + " " + r.Source.Address + " " + r.Method + " " +
		r.Host + r.Path
	for _, header := range []string{"user-agent", "cookie", "x-forwarded-for", "x-api-key"} {
		if v := r.Headers[header]; v != "" {
			s += fmt.Sprintf(" %s=%q", header, v)
		}
	}
	if e.End.Code != 0 {
		s += fmt.Sprintf(" %d %dB", e.End.Code, e.End.Size)
	}
	if e.End.Duration != nil {
		s += " " + e.End.Duration.String()
	}
	return s
}

func fields(t *testing.T, texts ...string) (all []Field) {
	t.Helper()
	for _, text := range texts {
		f, err := ParseField(text)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, f)
	}
	return all
}

func TestFormats(t *testing.T) {
	for _, test := range []struct {
		name, format string
		fields       []string
		grain        time.Duration
		log, want    string
	}{
		{name: "common", format: "common", grain: time.Second,
			log:  `192.0.2.1 - frank [10/Oct/2000:13:55:36 -0700] "GET /apache_pb.gif?a=1 HTTP/1.0" 200 2326`,
			want: `2000-10-10T20:55:36 192.0.2.1 GET /apache_pb.gif?a=1 200 2326B`},
		{name: "combined", format: "combined", grain: time.Second,
			log: `2001:db8::1 - - [17/May/2015:10:05:03 +0000] "POST /a\x22b HTTP/1.1" 304 - "http://e.example/" "M\"z (x; y)"`,
			// A user agent is unescaped nowhere: it is a header as the log has it.
			want: `2015-05-17T10:05:03 2001:db8::1 POST /a"b user-agent="M\\\"z (x; y)" 304 0B`},
		{name: "combined with hosts", format: "combined with hosts", grain: time.Second,
			log:  `www.example.com:443 192.0.2.1 - - [17/May/2015:10:05:03 +0200] "GET / HTTP/2.0" 200 5 "-" "curl/8"`,
			want: `2015-05-17T08:05:03 192.0.2.1 GET www.example.com:443/ user-agent="curl/8" 200 5B`},
		{name: "nginx with more fields", format: "combined", grain: time.Second,
			fields: []string{`request.headers["x-api-key"]=key`, `request.duration=10`},
			log:    `192.0.2.1 - - [17/May/2015:10:05:03 +0000] "GET /a HTTP/1.1" 200 5 "-" "c" 0.250 key="k 1" rt=3`,
			want:   `2015-05-17T10:05:03 192.0.2.1 GET /a user-agent="c" x-api-key="k 1" 200 5B 250ms`},
		{name: "parameters and cookies by --field", format: "combined", grain: time.Second,
			fields: []string{`request.params["to ken"]=10`, "request.cookies.sid=11", "request.cookies['b']=11"},
			log:    `192.0.2.1 - - [17/May/2015:10:05:03 +0000] "GET /a?b=c HTTP/1.1" 200 5 "-" "c" "k&1" s;1`,
			want:   `2015-05-17T10:05:03 192.0.2.1 GET /a?b=c&to+ken=k%261 user-agent="c" cookie="sid=s%3B1; b=s%3B1" 200 5B`},
		{name: "nginx with a format of its own", format: "text by --field", grain: time.Millisecond,
			fields: []string{"request.time=1", "source.address=2", "request line=3", "request.host=4"},
			log:    `1431857103.120 192.0.2.1 "GET /a HTTP/1.1" shop.example.com`,
			want:   `2015-05-17T10:05:03.12 192.0.2.1 GET shop.example.com/a`},
		{name: "Envoy", format: "envoy", grain: time.Millisecond,
			log: `[2016-04-15T20:17:00.310Z] "POST /api/v1/locations HTTP/2" 204 - 154 7 226 100 "192.0.2.9, 10.0.35.28" ` +
				`"nsq2http" "cc21d9b0-cf5c-432b-8c7e-98aeb7988cd2" "locations.example" "tcp://10.0.2.1:80"`,
			want: `2016-04-15T20:17:00.31 10.0.35.28 POST locations.example/api/v1/locations user-agent="nsq2http" ` +
				`x-forwarded-for="192.0.2.9, 10.0.35.28" 204 7B 226ms`},
		{name: "Istio", format: "istio", grain: time.Millisecond,
			log: `[2020-11-25T21:26:18.409Z] "GET /status/418 HTTP/1.1" 418 - via_upstream - "-" 0 135 3 1 "-" "curl/7.73.0" ` +
				`"84961386-6d84-929d-98bd-c5aee93b5c88" "httpbin:8000" "127.0.0.1:80" inbound|8000|| 127.0.0.1:41854 ` +
				`10.44.1.27:80 10.44.1.23:37652 outbound_.8000_._.httpbin.foo.svc.cluster.local default`,
			want: `2020-11-25T21:26:18.409 10.44.1.23 GET httpbin:8000/status/418 user-agent="curl/7.73.0" 418 135B 3ms`},
		{name: "sluice", format: "sluice", grain: time.Millisecond,
			log:  `[2026-11-29T01:02:03.456Z] "GET HTTP/1.1" 200 - 12ms sluice=allowed limit=demo remaining=4 took=310us id=abc`,
			want: `2026-11-29T01:02:03.456  GET / 200 0B 12ms`},
		{name: "sluice with a client", format: "sluice", grain: time.Millisecond,
			log: `[2026-11-29T01:02:03.456Z] "GET /a HTTP/1.1" 429 - 1ms sluice=limited limit=demo remaining=0 took=310us ` +
				`client=192.0.2.7 key==9.192.0.2.7 id=abc`,
			want: `2026-11-29T01:02:03.456 192.0.2.7 GET /a 429 0B 1ms`},
		{name: "ALB", format: "alb", grain: time.Microsecond,
			log: `https 2018-07-02T22:23:00.186641Z app/my-lb/50dc6c495c0c9188 192.0.2.1:2817 10.0.0.1:80 0.086 0.048 0.037 200 200 ` +
				`0 57 "GET https://www.example.com:443/a?b=c HTTP/1.1" "curl/7.46.0" ECDHE-RSA-AES128-GCM-SHA256 TLSv1.2 ` +
				`arn:aws:x "Root=1-58337281" "www.example.com" "arn:aws:y" 1 2018-07-02T22:22:48.364000Z "forward" "-" "-"`,
			want: `2018-07-02T22:23:00.186641 192.0.2.1 GET www.example.com:443/a?b=c user-agent="curl/7.46.0" 200 0B`},
		{name: "Envoy's JSON", format: "JSON lines", grain: time.Millisecond,
			log: `{"start_time":"2024-05-17T10:05:03.250Z","method":"GET","path":"/a","protocol":"HTTP/1.1","response_code":200,` +
				`"response_flags":"-","bytes_received":0,"bytes_sent":12,"duration":7,"x_forwarded_for":"192.0.2.3",` +
				`"user_agent":"c","request_id":"r","authority":"e.example","upstream_host":"10.0.0.1:80"}`,
			want: `2024-05-17T10:05:03.25 192.0.2.3 GET e.example/a user-agent="c" x-forwarded-for="192.0.2.3" 200 12B 7ms`},
		{name: "Istio's JSON", format: "JSON lines", grain: time.Millisecond,
			log: `{"start_time":"2024-05-17T10:05:03.250Z","method":"GET","path":"/a","response_code":200,"bytes_sent":12,` +
				`"duration":7,"downstream_remote_address":"10.44.1.23:37652","x_forwarded_for":null,"authority":"e"}`,
			want: `2024-05-17T10:05:03.25 10.44.1.23 GET e/a 200 12B 7ms`},
		{name: "Traefik", format: "JSON lines", grain: time.Microsecond,
			log: `{"ClientAddr":"192.0.2.4:5","ClientHost":"192.0.2.4","Duration":1500000,"DownstreamContentSize":9,` +
				`"DownstreamStatus":200,"RequestHost":"t.example","RequestMethod":"GET","RequestPath":"/t","StartUTC":` +
				`"2024-05-17T10:05:03.123456789Z","request_X-Api-Key":"k","time":"2024-05-17T10:05:04Z"}`,
			want: `2024-05-17T10:05:03.123456 192.0.2.4 GET t.example/t x-api-key="k" 200 9B 1.5ms`},
		{name: "Cloudflare", format: "JSON lines", grain: time.Microsecond,
			log: `{"ClientIP":"2001:db8::7","ClientRequestHost":"c.example","ClientRequestMethod":"GET","ClientRequestURI":"/c?d",` +
				`"EdgeResponseBytes":3,"EdgeResponseStatus":200,"EdgeStartTimestamp":1715940303123456789,` +
				`"RequestHeaders":{"x-api-key":"k"}}`,
			want: `2024-05-17T10:05:03.123456 2001:db8::7 GET c.example/c?d x-api-key="k" 200 3B`},
		{name: "JSON with names of its own", format: "JSON lines", grain: time.Second,
			fields: []string{`request.headers["X-Api-Key"]=auth.key`, "request.time=when"},
			log:    `{"when":1715940303,"auth":{"key":"k=1"},"remote_addr":"192.0.2.1"}`,
			want:   `2024-05-17T10:05:03 192.0.2.1 GET / x-api-key="k=1"`},
		{name: "CSV", format: "CSV", grain: time.Second,
			log:  "time,client_ip,method,path,status,api key\n2024-05-17 10:05:03,192.0.2.1,GET,\"/a,b\",200,k\n",
			want: `2024-05-17T10:05:03 192.0.2.1 GET /a,b 200 0B`},
		{name: "CSV by columns", format: "CSV", grain: time.Second, fields: []string{`request.headers["x-api-key"]=api_key`},
			log:  "time,client_ip,method,path,status,api_key\n2024-05-17 10:05:03,192.0.2.1,GET,\"/a,b\",200,k\n",
			want: `2024-05-17T10:05:03 192.0.2.1 GET /a,b x-api-key="k" 200 0B`},
	} {
		t.Run(test.name, func(t *testing.T) {
			s, got, counts := readAll(t, "-", strings.NewReader(test.log), Options{Fields: fields(t, test.fields...)})
			if strings.Join(got, "\n") != test.want || counts.Skipped > 0 {
				t.Errorf("%s\nwant\n%s\n(%v)", strings.Join(got, "\n"), test.want, counts.Bad)
			}
			if s.Format != test.format || s.Grain != test.grain {
				t.Errorf("read as %s with the grain %v, want %s with %v", s.Format, s.Grain, test.format, test.grain)
			}
		})
	}
}

const oneLine = `192.0.2.1 - - [17/May/2015:10:05:03 +0000] "GET / HTTP/1.1" 200 5` + "\n"

func TestRefused(t *testing.T) {
	for _, test := range []struct {
		log     string
		format  string
		wantErr string
	}{
		{log: "", wantErr: "stdin: empty"},
		{log: "\n\n", wantErr: "stdin: empty"},
		{log: "PK\x03\x04\x00\x00", wantErr: "stdin: binary data"},
		{log: "\x1f\x8b\x00", wantErr: "stdin: damaged gzip"},
		{log: "hello world\n", wantErr: `stdin: unknown format; line 1 is "hello world"`},
		{log: oneLine, format: "json", wantErr: "stdin: not of the format json"},
		{log: oneLine, format: "csv", wantErr: "stdin: CSV: line 1 is"},
		{log: `{"a":1}`, wantErr: "stdin: JSON lines: no field has a time by its name"},
	} {
		_, err := Open("-", strings.NewReader(test.log), Options{Format: test.format})
		if err == nil || !strings.HasPrefix(err.Error(), test.wantErr) {
			t.Errorf("%q: %v, want %s", test.log, err, test.wantErr)
		}
	}
}

func TestFieldErrors(t *testing.T) {
	for text, want := range map[string]string{
		"request.path":     "want ATTRIBUTE=NAME",
		"client.ip=1":      "it is derived",
		"request.pat=1":    "want an attribute",
		"source.address=0": "the first field is number 1",
		`a["b]=x`:          "want an attribute",
	} {
		if _, err := ParseField(text); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %s", text, err, want)
		}
	}
}

// TestCompressed checks that gzip and zstd are opened whatever the name is, and
// that the end of a file that was cut is an error.
func TestCompressed(t *testing.T) {
	plain := strings.Repeat(oneLine, 10_000)
	var gz, zst bytes.Buffer
	z := gzip.NewWriter(&gz)
	_, _ = z.Write([]byte(plain))
	_ = z.Close()
	zw, err := zstd.NewWriter(&zst)
	if err != nil {
		t.Fatal(err)
	}
	_, _ = zw.Write([]byte(plain))
	_ = zw.Close()
	for name, content := range map[string][]byte{"a.log": []byte(plain), "a.log.gz": gz.Bytes(), "a.zst": zst.Bytes()} {
		path := filepath.Join(t.TempDir(), name)
		if err := os.WriteFile(path, content, 0o600); err != nil {
			t.Fatal(err)
		}
		for _, stdin := range []io.Reader{nil, bytes.NewReader(content)} {
			if stdin != nil {
				path = "-"
			}
			if _, got, _ := readAll(t, path, stdin, Options{}); len(got) != 10_000 {
				t.Errorf("%s: %d requests, want 10000", name, len(got))
			}
		}
	}
	s, err := Open("-", bytes.NewReader(gz.Bytes()[:gz.Len()-20]), Options{})
	if err != nil {
		t.Fatal(err)
	}
	r, err := s.Start()
	if err != nil {
		t.Fatal(err)
	}
	for err == nil {
		_, err = r.Next()
	}
	if !errors.Is(err, errCut) {
		t.Errorf("a log that was cut ends with %v", err)
	}
	if _, err := Open("-", bytes.NewReader(gz.Bytes()[:20]), Options{}); !errors.Is(err, errCut) {
		t.Errorf("a log that was cut before the end of its first line: %v", err)
	}
}

// TestLongLines checks that no part of a log is lost where lines are longer than
// a chunk.
func TestLongLines(t *testing.T) {
	long := `192.0.2.1 - - [17/May/2015:10:05:03 +0000] "GET /` + strings.Repeat("x", 400<<10) + ` HTTP/1.1" 200 5` + "\n"
	log := strings.Repeat(oneLine, 5000) + long + strings.Repeat(oneLine, 20_000) + long + oneLine
	_, got, counts := readAll(t, "-", strings.NewReader(log), Options{})
	if len(got) != 25_003 || counts.Lines != 25_003 {
		t.Errorf("%d requests, %+v", len(got), counts)
	}
}

func TestDamaged(t *testing.T) {
	log := oneLine + "junk\n" + `192.0.2.1 - - [17/May/2015:10:05:03 +0000] "-" 408 0` + "\n" +
		`192.0.2.1 - - [17/May/2015:10:05:03 +0000] "\x16\x03\x01" 400 0` + "\n" +
		`192.0.2.1 - - [99/May/2015:10:05:03 +0000] "GET / HTTP/1.1" 200 5` + "\n"
	_, got, counts := readAll(t, "-", strings.NewReader(log), Options{})
	if len(got) != 1 || counts.Lines != 5 || counts.Skipped != 2 || counts.NoRequest != 2 || counts.Bad[0].Line != 2 {
		t.Errorf("%d requests, %+v", len(got), counts)
	}
}
