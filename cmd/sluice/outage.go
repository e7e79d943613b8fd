package main

import (
	"context"
	"time"

	"go.uber.org/zap"

	"github.com/sluiceproxy/sluice/limiter"
)

// outages logs when Redis stops answering and when it answers again. It is not
// safe for concurrent use.
type outages struct {
	log *zap.Logger
	// unreachable returns how many nodes do not answer.
	unreachable func() int
	// checks returns the number of checks so far, by outcome.
	checks func() map[limiter.Outcome]uint64

	since  time.Time                  // when the outage began; zero if there is none
	before map[limiter.Outcome]uint64 // the checks at the last look before it
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

// look logs whether Redis went away or came back since the last look.
func (o *outages) look(now time.Time) {
	nodes := o.unreachable()
	switch {
	case nodes > 0 && o.since.IsZero():
		o.since = now
		o.log.Warn("circuit breaker open, Redis does not answer", zap.Int("nodes", nodes))
	case nodes > 0:
	case o.since.IsZero():
		o.before = o.checks() // the checks that opened the breaker are part of the outage
	default:
		fields := []zap.Field{zap.Duration("after", now.Sub(o.since).Round(time.Millisecond))}
		checks := o.checks()
		for _, outcome := range []limiter.Outcome{
			limiter.FailedClosed, limiter.FailedOpen, limiter.FailedLocal, limiter.Delegated,
		} {
			if n := checks[outcome] - o.before[outcome]; n > 0 {
				fields = append(fields, zap.Uint64(outcome.String(), n))
			}
		}
		o.log.Info("Redis answers again", fields...)
		o.since, o.before = time.Time{}, checks
	}
}
