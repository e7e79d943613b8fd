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

// What a review may cost. A pod comes from whoever may create one, and anybody
// who reaches the port can send a body, so memory is bounded by what is read
// and not by what is expected: one large review and smallAtOnce small ones are
// decoded at a time, beside the first bytes of bodiesAtOnce others.
const (
	// maxReview bounds the bytes of a review; etcd takes no object above 1.5 MiB.
	maxReview = 4 << 20
	// maxValues bounds what JSON is decoded into: some 150 bytes for each value,
	// as meter counts them. It is about 6,000 variables with their managedFields.
	maxValues = 100_000
	// maxDepth bounds how deep values lie in each other; a pod's are at 20.
	maxDepth = 100
	// smallReview and smallValues are what nearly every pod stays below.
	smallReview = 128 << 10
	smallValues = 10_000
	smallAtOnce = 4
	// bodiesAtOnce bounds the reviews that are read or wait, each with at most
	// smallReview bytes.
	bodiesAtOnce = 64
	// largeWaiting bounds the large ones among them.
	largeWaiting = 16
	// reviewWait bounds the time for a body, and the wait for a turn. API servers
	// wait 5 s for an answer (timeoutSeconds), and ask again after a 429.
	reviewWait = 2 * time.Second
	// maxDrain bounds what is read of a refused body, so that who sends it hears
	// the refusal and not a closed connection.
	maxDrain = 64 << 20
)

// errBusy reports that a review did not get its turn in time.
var errBusy = errors.New("too many reviews at once; try again")

// tooLargeError reports a review above a bound.
type tooLargeError struct {
	reviewHead // once read returns it
	bound      int
	of         string
}

func (e *tooLargeError) Error() string {
	return fmt.Sprintf("the pod is too large to be injected: its admission review has more than %d %s; with label %s: disabled it is left alone", e.bound, e.of, injectLabel)
}

// meter counts the values in JSON text, before anything is made of them. It
// needs no memory, and counts at least one for each object, list, field and
// element, whether or not the text is well-formed.
type jsonCounter struct {
	bytes, values, depth int
	inString, escaped    bool
}

// add counts the next part of the text. It returns a *tooLargeError where the
// text is now above a bound.
func (m *jsonCounter) add(text []byte) error {
	m.bytes += len(text)
	for _, c := range text {
		switch {
		case m.escaped:
			m.escaped = false
		case m.inString:
			m.inString, m.escaped = c != '"', c == '\\'
		case c == '"':
			m.inString = true
		case c == '{', c == '[':
			m.values++
			if m.depth++; m.depth > maxDepth {
				return &tooLargeError{bound: maxDepth, of: "levels"}
			}
		case c == '}', c == ']':
			m.depth--
		case c == ',', c == ':':
			m.values++
		}
	}
	switch {
	case m.bytes > maxReview:
		return &tooLargeError{bound: maxReview, of: "bytes"}
	case m.values > maxValues:
		return &tooLargeError{bound: maxValues, of: "values (fields and elements of lists)"}
	}
	return nil
}

// metered reads a body through a meter.
type meteredReader struct {
	io.Reader
	counter *jsonCounter
}

func (r meteredReader) Read(p []byte) (int, error) {
	n, err := r.Reader.Read(p)
	if tooLarge := r.counter.add(p[:n]); tooLarge != nil {
		return 0, tooLarge
	}
	return n, err
}

// turns keeps reviews within what may be under way at once. It is safe for
// concurrent use.
type reviewSlots struct {
	wait                 time.Duration
	bodies, small, large chan struct{}

	mu              sync.Mutex
	largeNamespaces map[string]bool // namespaces with a large review that waits or is decoded
}

func newReviewSlots() *reviewSlots {
	return &reviewSlots{
		wait:   reviewWait,
		bodies: make(chan struct{}, bodiesAtOnce), small: make(chan struct{}, smallAtOnce), large: make(chan struct{}, 1),
		largeNamespaces: map[string]bool{},
	}
}

// enter waits for room, and returns what gives it back; nil where ctx ends first.
func acquire(ctx context.Context, room chan struct{}) (leave func()) {
	select {
	case room <- struct{}{}:
		return func() { <-room }
	case <-ctx.Done():
		return nil
	}
}

// enterLarge is enter for a large review. Of each namespace one may wait, so
// that none can keep the others out.
func (t *reviewSlots) acquireLarge(ctx context.Context, namespace string) (leave func()) {
	t.mu.Lock()
	if t.largeNamespaces[namespace] || len(t.largeNamespaces) >= largeWaiting {
		t.mu.Unlock()
		return nil
	}
	t.largeNamespaces[namespace] = true
	t.mu.Unlock()
	forget := func() {
		t.mu.Lock()
		defer t.mu.Unlock()
		delete(t.largeNamespaces, namespace)
	}
	room := acquire(ctx, t.large)
	if room == nil {
		forget()
		return nil
	}
	return func() { room(); forget() }
}

// read reads a review, and calls answer with it, which is to write the answer
// before it returns. Its error, of a review that answer was not called with, is
// errBusy, a *tooLargeError, or what is wrong with the body.
func (t *reviewSlots) readReview(w http.ResponseWriter, q *http.Request, answer func(*admissionReview)) (err error) {
	ctx, cancel := context.WithTimeout(q.Context(), t.wait)
	defer cancel()
	connection := http.NewResponseController(w)
	inTime := func() { _ = connection.SetReadDeadline(time.Now().Add(t.wait)) } // a recorder of tests has none
	inTime()
	var start []byte // the first bytes, and for a small review all of it
	defer func() {   // after the turns have been given back
		tooLarge := (*tooLargeError)(nil)
		if errors.As(err, &tooLarge) {
			tooLarge.reviewHead = parseReviewHead(start)
		} else if !errors.Is(err, errBusy) {
			return
		}
		inTime()
		_, _ = io.Copy(io.Discard, io.LimitReader(q.Body, maxDrain))
	}()
	leave := acquire(ctx, t.bodies)
	if leave == nil {
		return errBusy
	}
	defer leave()
	size := int64(smallReview)
	if q.ContentLength >= 0 {
		size = min(size, q.ContentLength)
	}
	start = make([]byte, size+1)
	m := &jsonCounter{}
	body := meteredReader{q.Body, m}
	n, err := io.ReadFull(body, start)
	whole := errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF)
	if err != nil && !whole {
		return err
	}
	start = start[:n]
	text := io.Reader(bytes.NewReader(start))
	if whole && m.values <= smallValues {
		leave = acquire(ctx, t.small)
	} else {
		leave = t.acquireLarge(ctx, parseReviewHead(start).Namespace)
		text = io.MultiReader(text, body)
		inTime()
	}
	if leave == nil {
		return errBusy
	}
	defer leave()
	var in admissionReview
	decoder := json.NewDecoder(text)
	decoder.UseNumber()
	if err := decoder.Decode(&in); err != nil {
		return err
	}
	_ = connection.SetReadDeadline(time.Time{})
	answer(&in)
	return nil
}

// reviewHead is what a review says before its object, where API servers have
// it: enough to refuse it, and to tell namespaces apart.
type reviewHead struct {
	UID, Namespace string
}

// readHead reads the beginning of a review. A field is empty where it does not
// stand before the object, or is longer than a name can be.
func parseReviewHead(text []byte) (head reviewHead) {
	d := json.NewDecoder(bytes.NewReader(text))
	// fields calls each with the names of an object's fields, before the value
	// that follows is read, until it returns false or the text ends.
	fields := func(each func(name string) bool) {
		if open, err := d.Token(); err != nil || open != json.Delim('{') {
			return
		}
		for d.More() {
			name, err := d.Token()
			text, _ := name.(string)
			if err != nil || !each(text) {
				return
			}
		}
	}
	value := func(into *string) bool {
		var raw json.RawMessage
		if d.Decode(&raw) != nil {
			return false
		}
		if into != nil && len(raw) <= maxName {
			_ = json.Unmarshal(raw, into) // it stays empty where it is no string
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
