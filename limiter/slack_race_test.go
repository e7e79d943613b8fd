//go:build race

package limiter

import "time"

// slack is by how much an answer may exceed its budget. The race detector makes
// everything several times slower.
const slack = 250 * time.Millisecond
