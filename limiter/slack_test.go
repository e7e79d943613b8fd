//go:build !race

package limiter

import "time"

// slack is what an answer may take over its budget.
const slack = 50 * time.Millisecond
