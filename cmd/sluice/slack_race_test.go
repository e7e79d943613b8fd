//go:build race

package main

import "time"

// slack is what an answer may take over its budget, where the race detector
// makes everything several times slower.
const slack = 250 * time.Millisecond

// isRace says that the race detector is on, which takes several times the memory.
const isRace = true
