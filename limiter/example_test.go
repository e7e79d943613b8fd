package limiter_test

import (
	"context"
	"fmt"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/sluiceproxy/sluice/limiter"
)

// A request that draws from two buckets gets tokens from both or from none.
func ExampleDecide() {
	store := limiter.NewMemory(limiter.MemoryBudget(), nil, prometheus.NewRegistry())
	charge := func(name string, burst, cost int64) limiter.Charge {
		bucket, err := limiter.NewBucket(1, time.Hour, burst) // one token each hour
		if err != nil {
			panic(err)
		}
		return limiter.Charge{Limit: &limiter.Limit{Name: name}, Bucket: bucket, Key: name, Cost: cost}
	}
	for range 2 {
		decision := limiter.Decide(context.Background(), store,
			[]limiter.Charge{charge("client", 10, 1), charge("all", 5, 3)})
		fmt.Println(decision.Outcome)
		for i, verdict := range decision.Verdicts {
			fmt.Println(" ", decision.Charges[i].Limit.Name, verdict.Allowed, verdict.Remaining)
		}
	}
	// Output:
	// allowed
	//   client true 9
	//   all true 2
	// limited
	//   client true 9
	//   all false 2
}
