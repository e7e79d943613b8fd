package main

import (
	"bytes"
	"compress/gzip"
	"errors"
	"io"
	stdlog "log"
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

// bounds are what the peers of an HTTP server may take, all together. The zero value of a field is the default.
type bounds struct {
	// connections at once. With HTTP/1 it is the number of requests at once, too. Default: 64.
	connections int
	// read is the time for a whole request, its body included. Default: 10s. Its header has at most 5s.
	read time.Duration
	// write is the time for a response, counted from the end of the request's header. Default: 20s.
	write time.Duration
	// idle is how long a connection is kept between two requests. Default: 2m, more than an interval between scrapes.
	idle time.Duration
}

// What a peer of an HTTP server may take in any case.
const (
	readHeader        = 5 * time.Second
	maxHeaderBytes    = 16 << 10
	maxHTTP2Streams   = 64      // requests at once on an HTTP/2 connection
	maxHTTP2Received  = 4 << 20 // bytes of bodies that no handler has read yet, of an HTTP/2 connection
	maxHTTP2OneStream = 1 << 20 // and of one of its streams
)

// server is an HTTP server on its listener. Every HTTP server of every command is made by newServer.
type server struct {
	*http.Server
	listener net.Listener
}

// newServer returns a server that answers on l by h once it runs. Errors of connections go to log, a few a minute.
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
			SendPingTimeout:               30 * time.Second, // finds peers that are gone
			WriteByteTimeout:              10 * time.Second,
		},
		ErrorLog: stdlog.New(&seldomLog{log: log}, "", 0),
	}}
}

// run serves until the server is closed or shut down, and then returns nil. It speaks TLS where TLSConfig is set.
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

// seldomLog logs lines that peers cause: of failed TLS handshakes one in ten seconds, and so of all others. It says how many it
// left out before.
type seldomLog struct {
	log *zap.Logger

	mu         sync.Mutex
	handshakes seldomLines
	others     seldomLines
}

type seldomLines struct {
	next    time.Time
	omitted int
}

const seldomEvery = 10 * time.Second

// Write logs a line, or counts it. It never fails.
func (s *seldomLog) Write(line []byte) (int, error) {
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
	lines.next, lines.omitted = now.Add(seldomEvery), 0
	return len(line), nil
}

// scrapes serves the metrics of g. What Prometheus' own handler gathers for a scrape takes several times its text, and stays
// until the last byte is sent, so that some hundred scrapes that nobody reads would fill the memory. Here one scrape at a time is
// gathered, into compressed text, and only that waits for its reader.
func scrapes(g prometheus.Gatherer, log *zap.Logger, options promhttp.HandlerOpts) http.Handler {
	options.ErrorLog = zap.NewStdLog(log)
	options.OfferedCompressions = []promhttp.Compression{promhttp.Gzip}
	gather := promhttp.HandlerFor(g, options)
	one := make(chan struct{}, 1)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		select {
		case one <- struct{}{}:
		case <-r.Context().Done():
			return // the client is gone
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

// scrape is an answer that nobody has read yet.
type scrape struct {
	header http.Header
	status int
	body   bytes.Buffer
}

// Header is http.ResponseWriter's.
func (s *scrape) Header() http.Header { return s.header }

// WriteHeader is http.ResponseWriter's.
func (s *scrape) WriteHeader(status int) { s.status = status }

// Write is http.ResponseWriter's.
func (s *scrape) Write(b []byte) (int, error) { return s.body.Write(b) }

// send sends the scrape, decompressed for a client that does not accept gzip.
func (s *scrape) send(w http.ResponseWriter, acceptsGzip bool) {
	for name, values := range s.header {
		w.Header()[name] = values
	}
	var body io.Reader = &s.body
	if s.header.Get("Content-Encoding") == "gzip" && !acceptsGzip {
		w.Header().Del("Content-Encoding")
		plain, err := gzip.NewReader(&s.body)
		if err != nil {
			sayStatus(w, http.StatusInternalServerError, "the metrics could not be written")
			return
		}
		body = plain
	}
	w.WriteHeader(s.status)
	_, _ = io.Copy(w, body) // fails where the client is gone
}

// acceptsGzip reports whether a client says that it takes gzip.
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
