package limiter

import (
	"context"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/redis/go-redis/v9"
)

// fakeNode is a node whose calls a test observes as they begin, and ends.
type fakeNode struct {
	*node
	began chan []*pending
	ended chan error
}

// unused is a client that never dials.
var unused = redis.NewClient(&redis.Options{PipelinePoolSize: -1})

// newFakeNode returns a node that uses the fake clock of a synctest bubble.
func newFakeNode() fakeNode {
	f := fakeNode{node: &node{name: "fake"}, began: make(chan []*pending, 100), ended: make(chan error)}
	f.call = func(ctx context.Context, _ *connection, batch []*pending) error {
		f.began <- batch
		select {
		case err := <-f.ended:
			for _, t := range batch {
				if err == nil {
					t.reply = "answered"
				}
			}
			return err
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	f.dial = func(context.Context) (*connection, error) {
		return &connection{Conn: unused.Conn(), opened: time.Now(), used: time.Now()}, nil
	}
	return f
}

// caller is one take and its result.
type caller struct {
	*pending
	abandoned bool
	err       error
	took      time.Duration
	done      chan struct{}
}

// ask starts a take of one charge with a deadline, and waits until it is
// queued.
func (f fakeNode) ask(ctx context.Context, life time.Duration) *caller {
	return f.askFor(ctx, life, 1)
}

// askFor is ask for a take of several charges.
func (f fakeNode) askFor(ctx context.Context, life time.Duration, charges int) *caller {
	p := newBlank()
	p.keys = make([]string, charges)
	return f.start(ctx, life, p)
}

// start sends p with a deadline, and waits until it is queued.
func (f fakeNode) start(ctx context.Context, life time.Duration, p *pending) *caller {
	began := time.Now()
	c := &caller{pending: p, done: make(chan struct{})}
	c.deadline = began.Add(life)
	go func() {
		c.abandoned, c.err = f.do(ctx, c.pending)
		c.took = time.Since(began)
		close(c.done)
	}()
	synctest.Wait()
	return c
}

// wantBatches checks how many takes the calls carry that have begun since, in
// any order: calls that leave together are made by goroutines of their own.
func (f fakeNode) wantBatches(t *testing.T, sizes ...int) {
	t.Helper()
	synctest.Wait()
	var got []int
	for len(f.began) > 0 {
		got = append(got, len(<-f.began))
	}
	slices.Sort(got)
	slices.Sort(sizes)
	if !slices.Equal(got, sizes) {
		t.Fatalf("calls of %v takes, want %v", got, sizes)
	}
}
