package main

import (
	"bytes"
	"compress/gzip"
	"errors"
	"io"
	stdlog "log"
	"maps"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"go.uber.org/zap"
)

// bounds limits the resources that the clients of an HTTP server can use. The
// zero value of a field means its default.
type bounds struct {
	// connections is the maximum number of connections, which with HTTP/1 is
	// the maximum number of concurrent requests, too. The default is 64.
	connections int
	// read is the maximum time for reading a request, including its body. The
	// default is 10s. The header must arrive within 5s.
	read time.Duration
	// write is the maximum time from the end of the request's header to the end
	// of the response. The default is 20s.
	write time.Duration
	// idle is how long a connection is kept between two requests. The default
	// is 2m, more than the interval between two scrapes.
	idle time.Duration
}

// Bounds that are the same for all HTTP servers.
const (
	readHeader      = 5 * time.Second
	maxHeaderBytes  = 16 << 10
	maxHTTP2Streams = 64 // concurrent requests on an HTTP/2 connection
	// maxHTTP2Received and maxHTTP2OneStream are the flow-control windows of an
	// HTTP/2 connection and of one of its streams, in bytes.
	maxHTTP2Received  = 4 << 20
	maxHTTP2OneStream = 1 << 20
)

// server is an HTTP server with its listener. All HTTP servers of all commands
// are made by newServer.
type server struct {
	*http.Server
	listener net.Listener
}

// newServer returns a server that serves h on l when it is run. It logs errors
// of connections, a few per minute.
func newServer(l net.Listener, h http.Handler, log *zap.Logger, b bounds) *server {
	or := func(given, otherwise time.Duration) time.Duration {
		if given == 0 {
			return otherwise
		}
		return given
	}
	if b.connections == 0 {
		b.connections = 64
	}
	read := or(b.read, 10*time.Second)
	return &server{listener: bounded(l, b.connections), Server: &http.Server{
		Handler:           h,
		ReadHeaderTimeout: min(read, readHeader),
		ReadTimeout:       read,
		WriteTimeout:      or(b.write, 20*time.Second),
		IdleTimeout:       or(b.idle, 2*time.Minute),
		MaxHeaderBytes:    maxHeaderBytes,
		HTTP2: &http.HTTP2Config{
			MaxConcurrentStreams:          maxHTTP2Streams,
			MaxReceiveBufferPerConnection: maxHTTP2Received,
			MaxReceiveBufferPerStream:     maxHTTP2OneStream,
			SendPingTimeout:               30 * time.Second, // detects clients that are gone
			WriteByteTimeout:              10 * time.Second,
		},
		ErrorLog: stdlog.New(&throttledLog{log: log}, "", 0),
	}}
}

// run serves until the server is closed or shut down, and then returns nil. It
// uses TLS if TLSConfig is set.
func (s *server) run() error {
	serve := func() error { return s.Serve(s.listener) }
	if s.TLSConfig != nil {
		serve = func() error { return s.ServeTLS(s.listener, "", "") }
	}
	if err := serve(); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// throttledLog logs lines that clients cause: every ten seconds one about failed
// TLS handshakes and one about anything else. A line has the number of those
// that were omitted before it. It is safe for concurrent use.
type throttledLog struct {
	log *zap.Logger

	mu         sync.Mutex
	handshakes throttle
	others     throttle
}

// throttle is the state of one kind of lines.
type throttle struct {
	next    time.Time // when a line may be logged again
	omitted int
}

const throttleEvery = 10 * time.Second

// Write logs a line or counts it as omitted. It never fails.
func (s *throttledLog) Write(line []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	lines := &s.others
	if bytes.Contains(line, []byte("handshake")) {
		lines = &s.handshakes
	}
	now := time.Now()
	if now.Before(lines.next) {
		lines.omitted++
		return len(line), nil
	}
	s.log.Warn(strings.TrimSpace(string(line)), zap.Int("omitted_before", lines.omitted))
	lines.next, lines.omitted = now.Add(throttleEvery), 0
	return len(line), nil
}

// scrapeHandler serves the metrics of g. Prometheus' own handler keeps what it
// gathered, which takes several times the memory of the text, until the last
// byte is sent. A hundred clients that do not read would fill the memory. This
// handler gathers one scrape at a time into compressed text, and keeps only
// that until it is sent.
func scrapeHandler(g prometheus.Gatherer, log *zap.Logger, options promhttp.HandlerOpts) http.Handler {
	options.ErrorLog = zap.NewStdLog(log)
	options.OfferedCompressions = []promhttp.Compression{promhttp.Gzip}
	gather := promhttp.HandlerFor(g, options)
	one := make(chan struct{}, 1)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		select {
		case one <- struct{}{}:
		case <-r.Context().Done():
			return // the client has gone
		}
		scrape := scrape{header: make(http.Header), status: http.StatusOK}
		func() {
			defer func() { <-one }()
			compressed := r.Clone(r.Context())
			compressed.Header.Set("Accept-Encoding", "gzip")
			gather.ServeHTTP(&scrape, compressed)
		}()
		scrape.send(w, acceptsGzip(r.Header))
	})
}

// scrape is the response to a scrape before it is sent.
type scrape struct {
	header http.Header
	status int
	body   bytes.Buffer
}

// Header implements http.ResponseWriter.
func (s *scrape) Header() http.Header { return s.header }

// WriteHeader implements http.ResponseWriter.
func (s *scrape) WriteHeader(status int) { s.status = status }

// Write implements http.ResponseWriter.
func (s *scrape) Write(b []byte) (int, error) { return s.body.Write(b) }

// send sends the scrape. It decompresses it if the client does not accept gzip.
func (s *scrape) send(w http.ResponseWriter, acceptsGzip bool) {
	maps.Copy(w.Header(), s.header)
	var body io.Reader = &s.body
	if s.header.Get("Content-Encoding") == "gzip" && !acceptsGzip {
		w.Header().Del("Content-Encoding")
		plain, err := gzip.NewReader(&s.body)
		if err != nil {
			writeStatus(w, http.StatusInternalServerError, "the metrics cannot be decompressed")
			return
		}
		body = plain
	}
	w.WriteHeader(s.status)
	_, _ = io.Copy(w, body) // fails if the client has gone
}

// acceptsGzip reports whether a client accepts gzip, by its request header.
func acceptsGzip(h http.Header) bool {
	for coding := range strings.SplitSeq(strings.Join(h.Values("Accept-Encoding"), ","), ",") {
		name, parameter, _ := strings.Cut(coding, ";")
		if strings.TrimSpace(name) != "gzip" {
			continue
		}
		weight, found := strings.CutPrefix(strings.TrimSpace(parameter), "q=")
		q, err := strconv.ParseFloat(weight, 64)
		return !found || err == nil && q > 0
	}
	return false
}
