package limiter

import (
	"runtime"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// What arrives while a call is under way leaves with the next one, all at once.
func TestTakesGather(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, ctx := newFakeNode(), t.Context()
		all := []*caller{f.ask(ctx, time.Second)}
		f.wantBatches(t, 1) // an idle node's take waits for nobody
		for range 20 {
			all = append(all, f.ask(ctx, time.Second))
		}
		f.wantBatches(t)
		f.ended <- nil
		f.wantBatches(t, 20)
		f.ended <- nil
		for i, p := range all {
			if <-p.done; p.err != nil || p.abandoned || p.reply != "answered" || p.took != 0 {
				t.Errorf("take %d: %+v", i, p)
			}
		}
		f.wantBatches(t)
		if f.inFlight != 0 || len(f.waiting) != 0 {
			t.Errorf("%d in the air, %d waiting", f.inFlight, len(f.waiting))
		}
	})
}

// The settlements of requests that have ended go with the next take. None starts
// a call before endLinger is over, and none waits longer.
func TestSettlementsGoWithTakes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, ctx := newFakeNode(), t.Context()
		end := func(life time.Duration) *caller {
			p := newBlank()
			p.keys, p.linger = make([]string, 3), endLinger
			return f.start(ctx, life, p)
		}
		all := []*caller{end(time.Second), end(time.Second)}
		f.wantBatches(t)
		time.Sleep(endLinger - 1)
		all = append(all, f.ask(ctx, time.Second))
		f.wantBatches(t, 3)
		all = append(all, end(time.Second))
		f.ended <- nil
		f.wantBatches(t) // the end of a call does not start it
		time.Sleep(endLinger - 1)
		f.wantBatches(t)
		time.Sleep(time.Nanosecond)
		f.wantBatches(t, 1)
		all = append(all, end(time.Second), f.ask(ctx, time.Second))
		f.ended <- nil
		f.wantBatches(t, 2)
		f.ended <- nil
		all = append(all, end(endLinger)) // there is no time to wait
		f.wantBatches(t, 1)
		f.ended <- nil
		// While the most calls are under way, it leaves when one has ended.
		f = newFakeNode()
		for range minConnections {
			all = append(all, f.ask(ctx, time.Second))
			time.Sleep(2 * minLinger)
			f.wantBatches(t, 1)
		}
		all = append(all, end(time.Second))
		time.Sleep(2 * endLinger)
		f.wantBatches(t)
		f.ended <- nil
		f.wantBatches(t, 1)
		for range minConnections {
			f.ended <- nil
		}
		for i, p := range all {
			if <-p.done; p.err != nil || p.reply != "answered" {
				t.Errorf("%d: %+v", i, p)
			}
		}
	})
}

// A take for an idle node leaves with those of the callers that can run then.
func TestRunnableCallersGoAlong(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1))
	const callers = 8
	most := 0
	for range 10 { // once in a while the scheduler goes on with the first caller
		synctest.Test(t, func(t *testing.T) {
			f := newFakeNode()
			first := f.ask(t.Context(), time.Second) // opens the connections
			f.ended <- nil
			<-first.done
			<-f.began
			var all sync.WaitGroup
			for range callers {
				all.Go(func() {
					take := newBlank()
					take.keys, take.deadline = make([]string, 1), time.Now().Add(time.Second)
					_, _ = f.do(t.Context(), take)
				})
			}
			synctest.Wait()
			batch := len(<-f.began)
			most = max(most, batch)
			f.ended <- nil
			if batch < callers {
				f.ended <- nil
			}
			all.Wait()
		})
	}
	if most < callers {
		t.Errorf("at most %d of %d takes left together", most, callers)
	}
}
