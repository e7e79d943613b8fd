package limiter

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/sluiceproxy/sluice/limiter/redistest"
)

// windowEnds are ends of windows: ordinary ones, those of days with a change to and
// from summer time, and of a leap year.
var windowEnds = []struct {
	unit               Unit
	zone, starts, ends string // ends is in RFC 3339
	lasts              string // the window before it
}{
	{Hour, "UTC", "", "2026-02-10T12:00:00Z", "1h0m0s"},
	{Hour, "Asia/Kolkata", "", "2026-02-10T12:30:00Z", "1h0m0s"},
	{Hour, "Europe/Berlin", "", "2026-03-29T01:00:00Z", "1h0m0s"},
	{Hour, "Australia/Lord_Howe", "", "2026-04-04T15:30:00Z", "1h30m0s"},
	{Hour, "Australia/Lord_Howe", "", "2026-10-03T16:00:00Z", "1h30m0s"},
	{Day, "UTC", "", "2026-02-11T00:00:00Z", "24h0m0s"},
	{Day, "Europe/Berlin", "", "2026-03-29T22:00:00Z", "23h0m0s"},
	{Day, "Europe/Berlin", "", "2026-10-25T23:00:00Z", "25h0m0s"},
	{Day, "America/New_York", "", "2026-03-09T04:00:00Z", "23h0m0s"},
	{Day, "America/New_York", "", "2026-11-02T05:00:00Z", "25h0m0s"},
	{Day, "Australia/Lord_Howe", "", "2026-10-04T13:00:00Z", "23h30m0s"},
	{Day, "Australia/Lord_Howe", "", "2026-04-05T13:30:00Z", "24h30m0s"},
	{Day, "Africa/Cairo", "", "2026-04-24T21:00:00Z", "23h0m0s"},
	{Day, "Africa/Cairo", "", "2026-10-29T22:00:00Z", "25h0m0s"},
	{Day, "America/Havana", "", "2026-03-09T04:00:00Z", "23h0m0s"},
	{Day, "America/Havana", "", "2026-11-02T05:00:00Z", "25h0m0s"},
	{Week, "UTC", "", "2026-11-30T00:00:00Z", "168h0m0s"},
	{Week, "Europe/Berlin", "", "2026-10-25T23:00:00Z", "169h0m0s"},
	{Week, "UTC", "2026-11-25", "2026-11-25T00:00:00Z", "168h0m0s"},
	{Month, "UTC", "", "2026-05-01T00:00:00Z", "720h0m0s"},
	{Month, "America/New_York", "", "2026-04-01T04:00:00Z", "743h0m0s"},
	{Day, "UTC", "", "2028-02-29T00:00:00Z", "24h0m0s"},
	{Month, "UTC", "", "2028-03-01T00:00:00Z", "696h0m0s"},
	{Month, "UTC", "2026-01-31", "2028-02-29T00:00:00Z", "696h0m0s"},
	{Year, "UTC", "", "2027-01-01T00:00:00Z", "8760h0m0s"},
	{Year, "Asia/Kathmandu", "2024-02-29", "2028-02-28T18:15:00Z", "8784h0m0s"},
}

// Sixty-four callers of three sidecars, whose clocks are up to 90 seconds off, take
// from one quota while Redis's own clock runs over the end of a window, or is stepped
// over it, and back: each window grants exactly its tokens, none are granted in the
// wrong one, no take fails, and none takes longer than at other times.
func TestQuotaIsExactByRedisClock(t *testing.T) {
	s := &switching{server: startStepped(t), around: redistest.Lasts(50*time.Millisecond, 500*time.Millisecond)}
	for _, off := range []time.Duration{-90 * time.Second, 0, 90 * time.Second} {
		r := newTestRedis(t, s.server.Server, serverClock)
		r.wall = func() int64 { return time.Now().UnixMicro() + s.ahead.Load() + off.Microseconds() }
		s.sidecars = append(s.sidecars, r)
	}
	for _, tt := range windowEnds {
		c := calendar(t, tt.unit, tt.zone, tt.starts)
		at, err := time.Parse(time.RFC3339, tt.ends)
		if err != nil {
			t.Fatal(err)
		}
		for _, manner := range []string{"run", "stepped"} {
			t.Run(fmt.Sprintf("%s/%s/%s/%s", manner, tt.unit, tt.zone, tt.ends), func(t *testing.T) {
				start, end := c.Window(at.Add(-1))
				if lasts := end.Sub(start).String(); !end.Equal(at) || lasts != tt.lasts {
					t.Fatalf("the window ends at %v, and lasts %s", end, lasts)
				}
				s.play(t, c, at.UnixMicro(), manner == "run")
			})
		}
	}
	if len(s.near) == 0 {
		return // only some subtests were run
	}
	// One pause of the machine makes all callers wait: of the ends the median counts.
	slices.Sort(s.near)
	near, away := s.near[len(s.near)/2], p99(s.away)
	t.Logf("p99 of the takes within %v of an end %v, the median of %d ends; of %d other takes %v", s.around/2, near,
		len(s.near), len(s.away), away)
	if near > 2*away+slack {
		t.Errorf("p99 near the ends of windows is %v, and away from them %v", near, away)
	}
}

// p99 sorts durations and returns their 99th percentile, or 0 if there are none.
func p99(all []time.Duration) time.Duration {
	slices.Sort(all)
	if len(all) == 0 {
		return 0
	}
	return all[len(all)*99/100]
}

// switching is sidecars that take while their Redis's clock passes the ends of windows.
type switching struct {
	server   stepped
	sidecars []*Redis
	// ahead is by how many microseconds the sidecars' clocks are ahead of the machine's,
	// besides what they differ by.
	ahead atomic.Int64
	// around is how long a clock runs around an end, and then on.
	around time.Duration

	mu sync.Mutex
	// near has for each end that the clock ran over the 99th percentile of how long the
	// takes around it took, and away how long each of all others took.
	near, away []time.Duration
}

// denials waits for takes that are denied from one instant of Redis's clock on and
// before another, in microseconds.
type denials struct {
	from, to int64
	left     atomic.Int64
	seen     chan struct{} // closed when none are left
}

// play takes from a new quota until the window that ends at an instant has no tokens,
// brings Redis's clock over the end, and takes until the next window has none either.
func (s *switching) play(t *testing.T, c Calendar, ends int64, runs bool) {
	const tokens, callers = 150, 64
	next := c.window(ends).end
	a := charge(quota(t, tokens, c), t.Name())
	beside := charge(quota(t, MaxTokens, calendar(t, Hour, "", "")), "beside")
	var awaited atomic.Pointer[denials]
	awaited.Store(&denials{})
	granted := map[int64]int{} // by when the window ends
	var nearAll []time.Duration
	stop := make(chan struct{})
	end := sync.OnceFunc(func() { close(stop) })
	// setTo sets Redis's clock.
	setTo := func(at int64) time.Duration {
		step := time.Duration(at-time.Now().UnixMicro()) * time.Microsecond
		s.server.step(step)
		return step
	}
	// denied waits until takes have been denied in a part of the time.
	denied := func(from, to int64) {
		d := &denials{from: from, to: to, seen: make(chan struct{})}
		d.left.Store(tokens)
		awaited.Store(d)
		select {
		case <-d.seen:
		case <-stop:
		case <-time.After(30 * time.Second):
			t.Errorf("nothing was denied between %v and %v", time.UnixMicro(from), time.UnixMicro(to))
			end()
		}
	}
	around := s.around.Microseconds()
	second := time.Second.Microseconds()
	s.ahead.Store(setTo(ends - 10*second).Microseconds())
	var wg sync.WaitGroup
	for caller := range callers {
		wg.Go(func() {
			var near, away []time.Duration
			verdicts := make([]Verdict, 2)
			for i := caller; ; i++ {
				select {
				case <-stop:
					s.mu.Lock()
					nearAll, s.away = append(nearAll, near...), append(s.away, away...)
					s.mu.Unlock()
					return
				default:
				}
				charges := []Charge{a, beside}[:1+i/len(s.sidecars)%2]
				began := time.Now()
				s.sidecars[i%len(s.sidecars)].Take(context.Background(), charges, verdicts[:len(charges)])
				took := time.Since(began)
				v := verdicts[0]
				if v.Err != nil || !v.Known() || len(charges) > 1 && !verdicts[1].Allowed {
					t.Errorf("%+v", verdicts[:len(charges)])
					end()
					continue
				}
				if until := v.at + v.FullAfter.Microseconds(); v.Allowed {
					if right := c.window(v.at).end; until != right {
						t.Errorf("granted at %v in the window until %v, want %v", time.UnixMicro(v.at), time.UnixMicro(until),
							time.UnixMicro(right))
					}
					s.mu.Lock()
					granted[until]++
					s.mu.Unlock()
				} else if d := awaited.Load(); d.from <= v.at && v.at < d.to && d.left.Add(-1) == 0 {
					close(d.seen)
				}
				if runs && ends-around/2 <= v.at && v.at < ends+around/2 {
					near = append(near, took)
				} else {
					away = append(away, took)
				}
			}
		})
	}
	denied(ends-10*second+around, ends)
	if runs {
		setTo(ends - around/2)
		denied(ends+around/2, next)
		denied(ends+around/2+around, next)
	} else {
		setTo(ends + 10*second)
		denied(ends+10*second, next)
	}
	setTo(ends - 5*second) // nothing is granted again
	denied(ends-5*second, ends)
	setTo(ends + 20*second)
	denied(ends+20*second, next)
	end()
	wg.Wait()
	if runs {
		s.near = append(s.near, p99(nearAll))
	}
	if want := map[int64]int{ends: tokens, next: tokens}; !maps.Equal(granted, want) {
		t.Errorf("granted %v by the ends of windows, want %v", granted, want)
	}
}

// Three sidecars whose clocks are up to 90 seconds off take from one quota, as fast
// as they can, over many ends of windows: each window grants exactly its tokens, and
// no take fails.
func TestQuotaIsExact(t *testing.T) {
	server := redistest.Start(t)
	const tokens, hourLasts = 150, 250 * time.Millisecond
	scale := int64(time.Hour / hourLasts)
	began := time.Now().UnixMicro()
	clock := fmt.Sprintf("local t = redis.call('TIME') return take(%d + (t[1] * 1000000 + t[2] - %d) * %d)",
		int64(begin), began, scale)
	a := charge(quota(t, tokens, calendar(t, Hour, "Asia/Kolkata", "")), "a")
	b := charge(quota(t, MaxTokens, calendar(t, Hour, "", "")), "b")
	var mu sync.Mutex
	granted, denied := map[int64]int64{}, map[int64]bool{} // by the window's start
	var wg sync.WaitGroup
	stop := time.Now().Add(redistest.Lasts(8*hourLasts, 40*hourLasts))
	for sidecar, off := range []time.Duration{-90 * time.Second, 0, 90 * time.Second} {
		r := newTestRedis(t, server, clock)
		r.wall = func() int64 { return begin + (time.Now().UnixMicro()-began)*scale + off.Microseconds() }
		for caller := range 22 {
			wg.Go(func() {
				for i := 0; time.Now().Before(stop); i++ {
					charges := []Charge{a, b}[:1+(i+caller+sidecar)%2]
					verdicts := make([]Verdict, len(charges))
					r.Take(t.Context(), charges, verdicts)
					for _, v := range verdicts {
						if v.Err != nil || !v.Known() {
							t.Errorf("%+v", v)
							return
						}
					}
					start := a.Bucket.Calendar().window(verdicts[0].at).start
					mu.Lock()
					if verdicts[0].Allowed {
						granted[start]++
					} else {
						denied[start] = true
					}
					mu.Unlock()
				}
			})
		}
	}
	wg.Wait()
	for start, n := range granted {
		if n > tokens || n < tokens && denied[start] {
			t.Errorf("the window from %d granted %d, want %d", start, n, tokens)
		}
	}
	if len(denied) < 5 {
		t.Errorf("only %d windows were used up: this says little", len(denied))
	}
	t.Logf("%d windows of %d tokens", len(granted), tokens)
}

// A sidecar whose clock is wrong learns from Redis's answers what the time is there: it
// asks twice when it first asks, and when Redis's clock has stepped, and else once.
func TestWrongWindowIsAskedAgainOnce(t *testing.T) {
	server := redistest.Start(t)
	for off, start := range map[time.Duration]string{
		-90 * time.Second: "2026-02-10T12:00:30Z", 90 * time.Second: "2026-02-10T14:59:30Z",
	} {
		// Each has a bucket of its own: one that was last taken from in a later window
		// keeps that window, of which an answer's time tells nothing.
		a := charge(quota(t, 100, calendar(t, Hour, "", "")), off.String())
		clock := &testClock{t: t, client: server.Client()}
		r, stepped := newTestRedis(t, server, keyClock), time.Duration(0)
		r.wall = func() int64 { return clock.now() + (off - stepped).Microseconds() }
		k, before := taker{t, r}, 0
		take := func(want int, when string) {
			t.Helper()
			if v := k.take(a)[0]; !v.Allowed {
				t.Errorf("%v off, %s: %+v", off, when, v)
			}
			if n := calls(t, r) - before; n != want {
				t.Errorf("%v off, %s: %d calls, want %d", off, when, n, want)
			}
			before = calls(t, r)
		}
		clock.setTo(start)
		take(2, "at first")
		take(1, "then")
		clock.advance(time.Hour)
		take(1, "an hour later")
		stepped = time.Hour
		clock.advance(stepped)
		take(2, "after a step")
		take(1, "after that")
	}
}

// A take whose guesses are all wrong fails, and takes nothing.
func TestNoGuessIsRight(t *testing.T) {
	server := redistest.Start(t)
	const leaps = "return take(1700000000000000 + redis.call('INCR', 'calls') * 7200000000)\n" // two hours a call
	r := newTestRedis(t, server, leaps)
	a, b := charge(quota(t, 100, calendar(t, Hour, "", "")), "a"), charge(bucket(t, 1, day, 5), "b")
	verdicts := make([]Verdict, 2)
	r.Take(t.Context(), []Charge{a, b}, verdicts)
	for _, v := range verdicts {
		if KindOf(v.Err) != KindState || v.Allowed {
			t.Errorf("%+v", v)
		}
	}
	if n := calls(t, r); n != maxGuesses {
		t.Errorf("%d calls, want %d", n, maxGuesses)
	}
	if n := server.Client().Exists(t.Context(), a.Key, b.Key).Val(); n != 0 {
		t.Errorf("%d buckets were written", n)
	}
}
