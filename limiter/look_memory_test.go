package limiter

import (
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// A look is answered as a take would be, and takes nothing, nor keeps a bucket for who asked.
func TestMemoryLooking(t *testing.T) {
	clock := &testClock{t: t, at: begin}
	m := newMemory("buckets", 1<<20, clock.now, nil, prometheus.NewRegistry())
	take, look := taker{t, m}, taker{t, m.Looking()}
	c := charge(bucket(t, 1, time.Second, 3), "a")
	for range 3 {
		look.want("ok 3", c.costs(2))
	}
	if m.entries.Load() != 0 {
		t.Errorf("%d buckets of who only looked", m.entries.Load())
	}
	take.want("ok 1", c.costs(2))
	look.want("no 1 retry 1s", c.costs(2))
	take.want("no 1 retry 1s", c.costs(2))
	clock.advance(time.Second)
	look.want("ok 2", c.costs(2))
	take.want("ok 0", c.costs(2))
}
