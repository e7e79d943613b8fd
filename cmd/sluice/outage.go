package main

import (
	"context"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"github.com/sluiceproxy/sluice/cmd/sluice/page"
	"github.com/sluiceproxy/sluice/limiter"
)

// outages logs when Redis stops answering and when it answers again. Only last
// is safe for concurrent use.
type outages struct {
	log *zap.Logger
	// unreachable returns how many nodes do not answer.
	unreachable func() int
	// checks returns the number of checks so far, by outcome.
	checks func() map[limiter.Outcome]uint64

	last atomic.Pointer[page.Outage] // as it was at the last look; nil: there was none
	// The checks at the last look without an outage, and at the one before that.
	recent, before map[limiter.Outcome]uint64
}

// looksEvery is how often outages looks whether Redis answers.
const looksEvery = 250 * time.Millisecond

// run looks until ctx ends.
func (o *outages) run(ctx context.Context) {
	tick := time.NewTicker(looksEvery)
	defer tick.Stop()
	for {
		o.look(time.Now())
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// failures are the outcomes that on_failure decides, in the order of the log.
var failures = []limiter.Outcome{limiter.FailedClosed, limiter.FailedOpen, limiter.FailedLocal, limiter.Delegated}

// look logs whether Redis went away or came back since the last look.
func (o *outages) look(now time.Time) {
	nodes, last, checks := o.unreachable(), o.last.Load(), o.checks()
	lasts := last != nil && last.Until.IsZero()
	if nodes == 0 && !lasts {
		if o.recent == nil {
			o.recent = checks
		}
		o.before, o.recent = o.recent, checks
		return
	}
	next := page.Outage{Since: now, Checks: make(map[limiter.Outcome]uint64)}
	if lasts {
		next.Since = last.Since
	} else {
		o.log.Warn("circuit breaker open, Redis does not answer", zap.Int("nodes", nodes))
	}
	// The checks that opened the breaker are part of the outage. Some of them may be
	// older than the last look before it.
	for _, outcome := range failures {
		if n := checks[outcome] - o.before[outcome]; n > 0 {
			next.Checks[outcome] = n
		}
	}
	if nodes == 0 {
		next.Until = now
		fields := []zap.Field{zap.Duration("after", now.Sub(next.Since).Round(time.Millisecond))}
		for _, outcome := range failures {
			if n := next.Checks[outcome]; n > 0 {
				fields = append(fields, zap.Uint64(outcome.String(), n))
			}
		}
		o.log.Info("Redis answers again", fields...)
		o.before, o.recent = checks, checks
	}
	o.last.Store(&next)
}
