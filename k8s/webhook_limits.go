package k8s

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"sync"
	"time"
)

// Limits on admission reviews. Anyone who may create a pod decides how large
// its review is, and anyone who reaches the port can send a body. So memory is
// bounded by what is read and not by what is expected: at any time at most one
// large review and smallAtOnce small ones are decoded, beside the first bytes
// of bodiesAtOnce others.
const (
	// maxReview is the maximum size of a review in bytes; etcd stores no object
	// above 1.5 MiB.
	maxReview = 4 << 20
	// maxValues is the maximum number of JSON values in a review, as
	// jsonCounter counts them. Decoded, each takes about 150 bytes. A pod
	// reaches it with about 6,000 variables and their managedFields.
	maxValues = 100_000
	// maxDepth is the maximum nesting of JSON values; a pod has about 20 levels.
	maxDepth = 100
	// smallReview, in bytes, and smallValues are the limits of a small review,
	// which nearly every pod has.
	smallReview = 128 << 10
	smallValues = 10_000
	// smallAtOnce is the number of small reviews that are decoded at a time.
	smallAtOnce = 4
	// bodiesAtOnce is the number of reviews that are read or wait at a time,
	// each with at most smallReview bytes in memory.
	bodiesAtOnce = 64
	// maxLargeWaiting is the number of large reviews among them.
	maxLargeWaiting = 16
	// reviewWait is the maximum time to receive a body, and to wait for a slot.
	// API servers wait 5 s for an answer (timeoutSeconds), and retry after a
	// 429 with Retry-After.
	reviewWait = 2 * time.Second
	// maxDrain is the maximum number of bytes that are read of the body of a
	// review that is refused, so that the client receives the answer instead of
	// a reset connection.
	maxDrain = 64 << 20
)

// errBusy reports that a review got no slot in time.
var errBusy = errors.New("too many concurrent admission reviews; retry later")

// tooLargeError reports a review that exceeds maxReview, maxValues or maxDepth.
type tooLargeError struct {
	reviewHead // set by reviewSlots.readReview
	limit      int
	unit       string
}

func (e *tooLargeError) Error() string {
	return fmt.Sprintf("the pod is too large to be injected: its admission review has more than %d %s; "+
		"label %s: disabled turns injection off", e.limit, e.unit, injectLabel)
}

// jsonCounter counts the bytes and values of JSON text before it is decoded. It
// allocates nothing. It counts each object, list, field and list element at
// least once, whether or not the text is valid.
type jsonCounter struct {
	bytes, values, depth int
	inString, escaped    bool
}

// add counts the next part of the text. It returns a *tooLargeError if the text
// now exceeds a limit.
func (c *jsonCounter) add(text []byte) error {
	c.bytes += len(text)
	for _, b := range text {
		switch {
		case c.escaped:
			c.escaped = false
		case c.inString:
			c.inString, c.escaped = b != '"', b == '\\'
		case b == '"':
			c.inString = true
		case b == '{', b == '[':
			c.values++
			if c.depth++; c.depth > maxDepth {
				return &tooLargeError{limit: maxDepth, unit: "levels"}
			}
		case b == '}', b == ']':
			c.depth--
		case b == ',', b == ':':
			c.values++
		}
	}
	switch {
	case c.bytes > maxReview:
		return &tooLargeError{limit: maxReview, unit: "bytes"}
	case c.values > maxValues:
		return &tooLargeError{limit: maxValues, unit: "values (fields and list elements)"}
	}
	return nil
}

// countingReader counts what is read, and returns a *tooLargeError once it
// exceeds a limit.
type countingReader struct {
	io.Reader
	counter *jsonCounter
}

func (r countingReader) Read(p []byte) (int, error) {
	n, err := r.Reader.Read(p)
	if tooLarge := r.counter.add(p[:n]); tooLarge != nil {
		return 0, tooLarge
	}
	return n, err
}

// reviewSlots limits the reviews that are handled at a time. Its channels are
// semaphores. It is safe for concurrent use.
type reviewSlots struct {
	wait                 time.Duration
	bodies, small, large chan struct{}

	mu sync.Mutex
	// largeNamespaces are the namespaces that have a large review that waits or
	// is decoded.
	largeNamespaces map[string]bool
}

func newReviewSlots() *reviewSlots {
	return &reviewSlots{
		wait:            reviewWait,
		bodies:          make(chan struct{}, bodiesAtOnce),
		small:           make(chan struct{}, smallAtOnce),
		large:           make(chan struct{}, 1),
		largeNamespaces: map[string]bool{},
	}
}

// acquire waits for a slot of a semaphore. It returns the function that
// releases the slot, or nil if ctx ends first.
func acquire(ctx context.Context, semaphore chan struct{}) (release func()) {
	select {
	case semaphore <- struct{}{}:
		return func() { <-semaphore }
	case <-ctx.Done():
		return nil
	}
}

// acquireLarge is acquire for a large review. Only one review of each namespace
// may wait, so that no namespace can keep the others from being served.
func (s *reviewSlots) acquireLarge(ctx context.Context, namespace string) (release func()) {
	s.mu.Lock()
	if s.largeNamespaces[namespace] || len(s.largeNamespaces) >= maxLargeWaiting {
		s.mu.Unlock()
		return nil
	}
	s.largeNamespaces[namespace] = true
	s.mu.Unlock()
	forget := func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.largeNamespaces, namespace)
	}
	releaseSlot := acquire(ctx, s.large)
	if releaseSlot == nil {
		forget()
		return nil
	}
	return func() { releaseSlot(); forget() }
}

// readReview decodes a review and calls respond with it. respond has to write
// the answer before it returns, as the review's slot is then released. If
// readReview does not call respond, it returns errBusy, a *tooLargeError, or an
// error of the body.
func (s *reviewSlots) readReview(w http.ResponseWriter, q *http.Request, respond func(*admissionReview)) (err error) {
	ctx, cancel := context.WithTimeout(q.Context(), s.wait)
	defer cancel()
	connection := http.NewResponseController(w)
	// httptest.ResponseRecorder has no deadlines.
	extendDeadline := func() { _ = connection.SetReadDeadline(time.Now().Add(s.wait)) }
	extendDeadline()
	var start []byte // the first bytes of the body; all of it if the review is small
	// Runs after the slots have been released.
	defer func() {
		tooLarge := (*tooLargeError)(nil)
		if errors.As(err, &tooLarge) {
			tooLarge.reviewHead = parseReviewHead(start)
		} else if !errors.Is(err, errBusy) {
			return
		}
		extendDeadline()
		_, _ = io.Copy(io.Discard, io.LimitReader(q.Body, maxDrain))
	}()
	release := acquire(ctx, s.bodies)
	if release == nil {
		return errBusy
	}
	defer release()
	size := int64(smallReview)
	if q.ContentLength >= 0 {
		size = min(size, q.ContentLength)
	}
	start = make([]byte, size+1)
	counter := &jsonCounter{}
	body := countingReader{q.Body, counter}
	n, err := io.ReadFull(body, start)
	complete := errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF)
	if err != nil && !complete {
		return err
	}
	start = start[:n]
	text := io.Reader(bytes.NewReader(start))
	if complete && counter.values <= smallValues {
		release = acquire(ctx, s.small)
	} else {
		release = s.acquireLarge(ctx, parseReviewHead(start).Namespace)
		text = io.MultiReader(text, body)
		extendDeadline()
	}
	if release == nil {
		return errBusy
	}
	defer release()
	var in admissionReview
	decoder := json.NewDecoder(text)
	decoder.UseNumber()
	if err := decoder.Decode(&in); err != nil {
		return err
	}
	_ = connection.SetReadDeadline(time.Time{})
	respond(&in)
	return nil
}

// reviewHead holds the fields of a review that API servers write before the
// object: enough to refuse the review, and to tell namespaces apart.
type reviewHead struct {
	UID, Namespace string
}

// parseReviewHead parses the start of a review. A field is empty if it does not
// come before the object, or is longer than maxName.
func parseReviewHead(text []byte) (head reviewHead) {
	d := json.NewDecoder(bytes.NewReader(text))
	// fields calls f with the name of each field of an object, until f returns
	// false or the text ends. f has to read the field's value from d.
	fields := func(f func(name string) bool) {
		if open, err := d.Token(); err != nil || open != json.Delim('{') {
			return
		}
		for d.More() {
			token, err := d.Token()
			name, _ := token.(string)
			if err != nil || !f(name) {
				return
			}
		}
	}
	// value reads a value, into to unless that is nil.
	value := func(to *string) bool {
		var raw json.RawMessage
		if d.Decode(&raw) != nil {
			return false
		}
		if to != nil && len(raw) <= maxName {
			_ = json.Unmarshal(raw, to) // to stays empty if the value is no string
		}
		return true
	}
	fields(func(name string) bool {
		if name != "request" {
			return value(nil)
		}
		fields(func(name string) bool {
			switch name {
			case "uid":
				return value(&head.UID)
			case "namespace":
				return value(&head.Namespace)
			}
			return name != "object" && value(nil)
		})
		return false
	})
	return head
}
