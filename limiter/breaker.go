package limiter

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/sony/gobreaker/v2"
)

const (
	// tripsAfter is how many takes in a row a node leaves without an answer until its breaker opens.
	tripsAfter = 5
	// probesEvery is how long an open breaker lets nothing through; then one take tries whether the node is back. So a dead node costs
	// one take its time budget now and then, and one that is back is found within this time and one round trip.
	probesEvery = 200 * time.Millisecond
)

// breakers spare nodes that do not answer, and the takes that would wait for them. Each node has its own.
type breakers struct {
	nodes sync.Map // of *breaker, by the node's address; as many as a cluster has nodes
	open  prometheus.Gauge
}

// breaker is a node's.
type breaker struct {
	*gobreaker.TwoStepCircuitBreaker[any]
	last atomic.Pointer[StoreError] // why it opened
}

func newBreakers(metrics prometheus.Registerer) *breakers {
	b := &breakers{open: prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "sluice_store_breaker_open", Help: "Redis nodes that are not asked, as they do not answer.",
	})}
	metrics.MustRegister(b.open)
	return b
}

func (b *breakers) of(node string) *breaker {
	if known, ok := b.nodes.Load(node); ok {
		return known.(*breaker)
	}
	made, _ := b.nodes.LoadOrStore(node, &breaker{TwoStepCircuitBreaker: gobreaker.NewTwoStepCircuitBreaker[any](gobreaker.Settings{
		Name:        node,
		Timeout:     probesEvery,
		ReadyToTrip: func(c gobreaker.Counts) bool { return c.ConsecutiveFailures >= tripsAfter },
		OnStateChange: func(_ string, from, to gobreaker.State) {
			if to == gobreaker.StateClosed {
				b.open.Dec()
			} else if from == gobreaker.StateClosed {
				b.open.Inc()
			}
		},
		// An answer is one, whatever it says; who hung up has not waited for one.
		IsSuccessful: func(err error) bool {
			k := KindOf(err)
			return err == nil || k != KindTimeout && k != KindConnection
		},
		IsExcluded: func(err error) bool { return errors.Is(err, context.Canceled) || errors.Is(err, errHurried) },
	})})
	return made.(*breaker)
}

// errHurried is of a take whose caller left it too little time to tell anything of the node.
var errHurried = errors.New("the caller's deadline was near")

// run asks a node, unless its breaker is open. Its error is a *StoreError.
func (b *breaker) run(ctx context.Context, timeout time.Duration, ask func() error) *StoreError {
	done, err := b.Allow()
	if err != nil {
		last := b.last.Load()
		if last == nil {
			last = &StoreError{Kind: KindConnection, Err: err}
		}
		return &StoreError{Kind: last.Kind, Err: fmt.Errorf("not asked, as it does not answer: %w", last.Err)}
	}
	began := time.Now()
	err = ask()
	if err == nil {
		done(nil)
		return nil
	}
	failed := storeError(err)
	b.last.Store(failed)
	if d, ok := ctx.Deadline(); ok && failed.Kind == KindTimeout && d.Sub(began) < timeout/2 {
		done(errHurried)
	} else {
		done(failed)
	}
	return failed
}
