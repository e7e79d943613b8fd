//go:build race

package main

import "time"

// slack is what an answer may take over its budget, where the race detector
// makes everything several times slower.
const slack = 250 * time.Millisecond
